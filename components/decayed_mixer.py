"""What mixers have in common whose state decays: linear attention and its relatives."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.registry import FrozenConfig, Option, above, at_least
from components.attention_inputs import AttentionInputs
from components.base import Fill, at_least_fp32, recomputed, without_autocast
from components.decayed_attention import decayed_attention, decayed_attention_flops
from components.mixer_kernels import backend_tag, run_kernel, runs_here
from components.mixers import Mixer
from components.short_convolution import ShortConvolution
from model_config import ModelArchitectureConfig


def head_options(prefix: str, heads: str, key_dim: str, value_dim: str) -> dict[str, Option]:
    """Options of all of these mixers. heads, key_dim, value_dim: what None means."""
    return {
        f'{prefix}_heads': Option(int | None, None, f'Heads; None: {heads}', check=at_least(1)),
        f'{prefix}_key_dim': Option(
            int | None, None, f'Dimensions of a key head; None: {key_dim}', check=at_least(1)
        ),
        f'{prefix}_value_dim': Option(
            int | None, None, f'Dimensions of a value head; None: {value_dim}', check=at_least(1)
        ),
    }


def conv_option(prefix: str) -> dict[str, Option]:
    """Yang et al. 2024 (DeltaNet), section 3.3."""
    return {
        f'{prefix}_conv_size': Option(
            int | None,
            None,
            'Width of a convolution of queries, keys and values in tokens; None: no convolution',
            check=at_least(2),
        )
    }


def eps_option(prefix: str, eps: float) -> dict[str, Option]:
    text = 'Epsilon of the norm of the outputs of heads'
    return {f'{prefix}_norm_eps': Option(float, eps, text, check=above(0))}


class DecayedMixer(Mixer):
    """Projections, heads of `decayed_attention` and an output projection.

    A subclass says how queries, keys and values are prepared, how the state decays, and what
    follows.
    """

    cacheable = True
    mup_rule = True
    prefix: ClassVar[str]  # of its options
    # Heads in the source, whatever the width; None: n_head.
    source_heads: ClassVar[int | None] = None
    # Dimensions of all keys and of all values, as multiples of n_embd; those of a key are a
    # multiple of `key_unit`.
    key_ratio: ClassVar[float] = 1.0
    value_ratio: ClassVar[float] = 1.0
    key_unit: ClassVar[int] = 1
    # Whether each channel of a key decays by itself.
    decays_by_channel: ClassVar[bool] = False

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        self.heads, self.key_dim, self.value_dim = self.sizes(config)
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        self.rows = (keys, keys, values, *self.other_rows(config))
        self.input = nn.Linear(config.n_embd, sum(self.rows), bias=False)
        width = self.option(config, 'conv_size')
        self.conv = ShortConvolution(2 * keys + values, width) if width else None
        self.output = nn.Linear(values, config.n_embd, bias=False)

    @classmethod
    def option(cls, config: FrozenConfig, name: str):
        """The value of its option of that name; None if it has none."""
        return config.get(f'{cls.prefix}_{name}')

    @classmethod
    def usual_heads(cls, config: FrozenConfig) -> int:
        """At most as many as in the source; fewer if they do not divide the keys."""
        heads, dims = cls.source_heads or config.n_head, int(cls.key_ratio * config.n_embd)
        while cls.source_heads and heads > 1 and dims % (heads * cls.key_unit):
            heads //= 2
        return heads

    @classmethod
    def usual_dims(cls, config: FrozenConfig) -> tuple[int, int]:
        """Dimensions of a key and of a value."""
        heads = cls.option(config, 'heads') or cls.usual_heads(config)
        units = max(1, int(cls.key_ratio * config.n_embd) // (heads * cls.key_unit))
        return units * cls.key_unit, max(1, int(cls.value_ratio * config.n_embd) // heads)

    @classmethod
    def sizes(cls, config: FrozenConfig) -> tuple[int, int, int]:
        """Heads, dimensions of a key, dimensions of a value."""
        usual = (cls.usual_heads(config), *cls.usual_dims(config))
        heads, key_dim, value_dim = (
            cls.option(config, name) or size
            for name, size in zip(('heads', 'key_dim', 'value_dim'), usual)
        )
        return heads, key_dim, value_dim

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        heads, key_dim, value_dim = cls.sizes(config)
        all_keys = f'{cls.key_ratio:g} · n_embd / {cls.prefix}_heads'
        all_values = f'{cls.value_ratio:g} · n_embd / {cls.prefix}_heads'
        why_heads = f'{cls.source_heads} if they divide n_embd' if cls.source_heads else 'n_head'
        return {
            f'{cls.prefix}_heads': (heads, why_heads),
            f'{cls.prefix}_key_dim': (key_dim, all_keys),
            f'{cls.prefix}_value_dim': (value_dim, all_values),
        }

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        heads, key_dim, value_dim = cls.sizes(config)
        usual_key_dim, usual_value_dim = cls.usual_dims(config)
        width = cls.option(config, 'conv_size')
        tags = [
            cls.tag,
            f'H{heads}' if heads != cls.usual_heads(config) else '',
            f'K{key_dim}' if key_dim != usual_key_dim else '',
            f'V{value_dim}' if value_dim != usual_value_dim else '',
            f'Conv{width}' if width else '',
            *cls.own_tags(config),
        ]
        return ''.join(tags) + backend_tag(config)

    @classmethod
    def own_tags(cls, config: ModelArchitectureConfig) -> list[str]:
        """Tags of options that differ from their defaults."""
        return []

    def other_rows(self, config: ModelArchitectureConfig) -> tuple[int, ...]:
        """Sizes of the projections of the input besides queries, keys and values."""
        return ()

    def forward(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        starts, cache = attn_inputs.starts, attn_inputs.cache
        qkv, *others = self.input(x).split((sum(self.rows[:3]), *self.rows[3:]), dim=-1)
        if self.conv is not None:
            qkv = F.silu(self.conv(qkv, starts, cache))
        log_decay = self.log_decay(others)
        state = cache.get('state') if cache is not None else None
        kernel = self.kernel if runs_here(self.kernel, qkv, cache, starts) else None
        with without_autocast(x.device):
            wide = at_least_fp32(qkv) if kernel is None else qkv
            q, k, v = (self.split_heads(part) for part in wide.split(self.rows[:3], dim=-1))
            y, state = self.attend(q, k, v, log_decay, state, starts, kernel)
            if cache is not None:
                cache.set('state', state)
            y = self.finish(y.transpose(1, 2), others)
        return self.output(y.flatten(2).to(qkv.dtype))

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, dimensions of all heads) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def log_decay(self, others: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Log of the decay, (H,) or (B, H, T, K); others: projections of `other_rows`."""
        return None

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_decay: torch.Tensor | None,
        state: torch.Tensor | None,
        starts: torch.Tensor | None,
        kernel: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs of heads (B, H, T, V), and the new state, of which kernels give none.

        kernel: computes it, in the dtype of the values.
        """
        if kernel is None:
            return decayed_attention(q, k, v, log_decay, state, starts)
        inputs = [x.to(v.dtype).transpose(1, 2) for x in (v, q, k)]
        if log_decay is not None:
            inputs.append(log_decay if log_decay.dim() == 1 else log_decay.transpose(1, 2))
        return at_least_fp32(run_kernel(kernel, *inputs)).transpose(1, 2), None

    def finish(self, y: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
        """Norm and gate of the outputs of heads, (B, T, H, V)."""
        return y

    @property
    def state_columns(self) -> int:
        return self.value_dim

    def flops(self, seq_len: int, causal: bool) -> dict[str, float]:
        """Per token and head, k_t v_tᵀ and S_tᵀ q_t are 2 · K · V each in the recurrent form."""
        sizes = self.heads, self.key_dim, self.state_columns
        if causal:
            states = 4.0 * seq_len * self.heads * self.key_dim * self.state_columns
        else:
            states = decayed_attention_flops(seq_len, *sizes, self.decays_by_channel)
        return {**super().flops(seq_len, causal), 'mixer_states': states}

    def matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        """Those of the projections; not GLA's table of decays, whose inputs are few."""
        return {self.input.weight: self.rows, self.output.weight: (self.output.out_features,)}

    def residual_weights(self) -> list[torch.Tensor]:
        return [self.output.weight]


class FixedDecayMixer(DecayedMixer):
    """A constant decay of each head, and a gate of the outputs."""

    kernels: ClassVar = {'fla': 'simple_gla'}

    mup_rule = True

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        self.eps = self.option(config, 'norm_eps')
        self.constants = self.log_decays_of_heads(config, layer)
        # A buffer, so that layers of different decays share one compiled graph.
        self.register_buffer('log_decays', torch.empty(self.heads), persistent=False)

    def log_decays_of_heads(self, config: ModelArchitectureConfig, layer: int) -> list[float]:
        raise NotImplementedError

    def other_rows(self, config):
        return (self.heads * self.value_dim,)  # the gate

    def log_decay(self, others):
        return self.log_decays

    def finish(self, y, others):
        (gate,) = others
        return recomputed(self.norm_and_gate, y, gate)

    def norm_and_gate(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """y (B, T, H, V), gate (B, T, H · V) -> (B, T, H, V) in the dtype of y."""
        raise NotImplementedError

    def initial_values(self) -> dict[str, Fill]:
        def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
            tensor.copy_(torch.tensor(self.constants, dtype=tensor.dtype))

        return {'log_decays': fill}
