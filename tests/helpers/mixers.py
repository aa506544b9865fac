"""A small mixer to try the checks of mixers on, and what they share: variants, modules, inputs."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import pytest
import torch
import torch.nn as nn

from components.attention_inputs import AttentionInputs
from components.base import without_autocast
from components.short_convolution import ShortConvolution
from helpers.architectures import legal_config, perturbed_model, tiny, values_of
from model_components import DOCUMENT_OPTIONS, Component, Initial, Mixer, Option
from model_config import MIXER_REGISTRY, ModelArchitectureConfig

CHUNK = 64
SMALL_CHUNK = 8
LENGTH = 2 * SMALL_CHUNK + 5
END = 3
EXAMPLE = 'example'


class ExampleMixer(Mixer):
    """Linear attention with decay a in each head: S_t = a · S_(t-1) + k_t v_tᵀ, y_t = S_tᵀ q_t.

    In chunks of c tokens, with the state S before the chunk:
    y_i = Σ_(j ≤ i) a^(i-j) (q_i · k_j) v_j + a^(i+1) Sᵀ q_i,
    and S becomes a^c S + Σ_j a^(c-1-j) k_j v_jᵀ.
    """

    tag = 'Example'
    cacheable = True
    mup_rule = True
    options: ClassVar = {
        'example_decay': Option(bool, True, 'Decay the state of the example'),
        **DOCUMENT_OPTIONS,
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        self.heads, self.head_dim = config.n_head, config.n_embd // config.n_head
        inner = self.heads * self.head_dim
        self.decay = nn.Parameter(torch.empty(self.heads)) if config.example_decay else None
        self.qkv = nn.Linear(config.n_embd, 3 * inner, bias=config.bias)
        self.convolution = ShortConvolution(3 * inner, width=3)
        self.output = nn.Linear(inner, config.n_embd, bias=config.bias)

    def initial_values(self):
        return {'decay': Initial.ones}

    def matrices(self):
        return {**super().matrices(), self.qkv.weight: (self.heads * self.head_dim,) * 3}

    def residual_weights(self):
        return [self.output.weight]

    def forward(self, x, attn_inputs):
        starts, cache = attn_inputs.starts, attn_inputs.cache
        mixed = self.convolution(self.qkv(x), starts, cache)
        with without_autocast(x.device):
            mixed = mixed.to(torch.promote_types(mixed.dtype, torch.float32))
            q, k, v = mixed.unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
            state = cache.get('state') if cache else None
            if state is None:
                state = q.new_zeros(*q.shape[:2], self.head_dim, self.head_dim)
            outputs = []
            for begin in range(0, x.size(1), CHUNK):
                part = slice(begin, begin + CHUNK)
                pieces = (each[:, :, part] for each in (q, k, v))
                y, state = self.chunk(*pieces, state, None if starts is None else starts[:, part])
                outputs.append(y)
            if cache:
                cache.set('state', state)
        y = torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
        return self.output(y.to(x.dtype))

    def chunk(self, q, k, v, state, starts):
        """q, k, v (B, H, c, D), state (B, H, D, D), starts (B, c) -> y and the next state."""
        size = q.size(2)
        index = torch.arange(size, device=q.device)
        decay = q.new_ones(self.heads) if self.decay is None else self.decay.to(q.dtype).sigmoid()
        powers = decay[:, None] ** torch.arange(size + 1, device=q.device)  # (H, c + 1)
        visible = (index[:, None] >= index)[None, None]
        reached, same = 1.0, 1.0
        if starts is not None:
            ids = starts.cumsum(dim=1)
            visible = visible & (ids[:, None, :, None] == ids[:, None, None, :])
            reached = (ids == 0)[:, None, :, None]
            same = (ids == ids[:, -1:])[:, None, :, None]
        weights = powers[:, (index[:, None] - index).clamp(min=0)] * visible
        y = (q @ k.mT * weights) @ v + (q * powers[:, 1:, None] * reached) @ state
        added = (k * powers[:, :-1].flip(1)[..., None] * same).mT @ v
        carried = reached[:, :, -1:] if starts is not None else 1.0
        return y, powers[:, -1:, None] * state * carried + added

    def flops(self, seq_len, causal):
        """Of the recurrent form: 2 D² for k vᵀ and 2 D² for Sᵀ q per token and head."""
        states = 4.0 * self.head_dim**2 * seq_len
        if not causal:
            sizes = [min(CHUNK, seq_len - begin) for begin in range(0, seq_len, CHUNK)]
            states += sum(4.0 * size**2 * self.head_dim for size in sizes)
        return {**super().flops(seq_len, causal), 'mixer_states': self.heads * states}


# --- Architectures and modules --------------------------------------------------------------------


def mixer_config(mixer: str, **values) -> ModelArchitectureConfig:
    """Two layers of width 16; `mixer` may be several."""
    documents = {'document_mask': True, 'end_of_text': END}
    return tiny(**{'mixer': mixer, 'block_size': 24, **documents, **values})


def variants(mixer: str) -> list[ModelArchitectureConfig]:
    """The defaults, each other value of one option, and random values of all options."""
    options = {k: o for k, o in MIXER_REGISTRY[mixer].options.items() if k not in DOCUMENT_OPTIONS}
    chosen: list[dict] = [{}]
    for key, option in options.items():
        chosen += [{key: value} for value in values_of(key, option) if value != option.default]
    for seed in range(8):
        choose, picked = random.Random(seed).choice, {}
        for key, option in options.items():
            if option.is_active(picked):
                picked[key] = choose(values_of(key, option))
        chosen.append(picked)
    documents = {'document_mask': True, 'end_of_text': END}
    base = {'mixer': mixer, 'block_size': 24, **documents}
    configs = [config for each in chosen if (config := legal_config({**base, **each}))]
    return list({config.hash: config for config in configs}.values())


def mixer_module(config: ModelArchitectureConfig, dtype=torch.float64) -> Component:
    """The mixer of the first layer, with weights that are not their initial values."""
    (module,) = perturbed_model(config, factor=3.0).blocks[0].mixers.values()
    return module.to(dtype).eval()


def random_inputs(batch: int, length: int, width: int, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(dtype)


def random_starts(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """(batch, length); the first token begins a document, and every sixth on average."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, length, generator=generator) < 1 / 6
    starts[:, 0] = True
    return starts


def with_starts(starts: torch.Tensor | None, cache=None) -> AttentionInputs:
    return AttentionInputs(starts=starts, cache=cache)


def check_loop(
    mixer: Component, width: int, loop: Callable, lengths: Iterable[int], **options
) -> None:
    """The mixer's outputs and gradients are those of loop(x, starts), a loop over tokens in double
    precision, in one document and in several.

    width: of x. options: of `torch.autograd.grad` of the mixer.
    """
    for length in lengths:
        one_document = torch.arange(length).expand(2, -1) == 0
        for starts in (None, random_starts(2, length)):
            x = random_inputs(2, length, width).requires_grad_()
            y = mixer(x, with_starts(starts))
            expected = loop(x, one_document if starts is None else starts)
            torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
            point, target = [x, *mixer.parameters()], random_inputs(2, length, width, 1)
            for gradient, of_loop in zip(
                torch.autograd.grad((y * target).sum(), point, **options),
                torch.autograd.grad((expected * target).sum(), point, materialize_grads=True),
                strict=True,
            ):
                torch.testing.assert_close(gradient, of_loop, rtol=1e-8, atol=1e-10)


def split_randomly(length: int, seed: int) -> list[int]:
    """Lengths of pieces that add up to `length`, many of them 1."""
    choose, sizes = random.Random(seed).choice, []
    while sum(sizes) < length:
        sizes.append(
            min(choose((1, 1, 2, 3, 5, SMALL_CHUNK, SMALL_CHUNK + 1)), length - sum(sizes))
        )
    return sizes


# Constants by which mixers divide a sequence: tokens of a chunk, or elements computed at once.
SMALL = {
    'CHUNK': SMALL_CHUNK,
    'MIN_TOKENS': SMALL_CHUNK,
    'SEGMENT': 1,
    'BLOCK_ELEMENTS': {'cpu': 1},
}


@contextmanager
def small_chunks() -> Iterator[None]:
    """Let mixers compute in chunks of a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith(('components.', __name__)):
                for key in SMALL.keys() & vars(module).keys():
                    patch.setattr(module, key, SMALL[key])
        yield
