"""Checks of the model before the first iteration: causality, documents, and use of positions.

Later tokens and other sequences must not change a token's logits; otherwise the loss is
meaningless. The built model is tested under any strategy and with any weights: on a few tokens that
change from some position on, block by block, in training and in evaluation mode. Positions must
affect the output. Weights and random state are restored afterwards.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from common import hardware
from common.errors import UserError
from common.tensors import local_tensor
from components.checks import Call, check_form, label, observe_calls, registered_class
from components.faults import is_foreign
from inference.generate import eager_blocks
from model_builder import Transformer, flops_notes
from model_components import PositionEncoding
from model_config import (
    ATTENTION_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    ModelArchitectureConfig,
)

SHORT, LONG = 6, 66  # tokens: for every pair of positions; for chunks of up to 64
# Differences below this fraction of the values' standard deviation count as rounding, since the
# kernels for equal rows may differ (experts of a mixture get different numbers of rows).
CPU_ROUNDING = 1e-5
ROUNDING = {'float32': 5e-3, 'bfloat16': 0.05, 'float16': 0.02}  # on a GPU fp32 means TF32
CACHE_ROUNDING = 1e-3  # chunks and single tokens add in another order
SMALL = 0.05  # gains and biases below this are replaced, since they could hide a leak


class Probe(NamedTuple):
    """Tokens and changed tokens, (B, T) each, and the positions whose output must be equal."""

    tokens: torch.Tensor
    changed: torch.Tensor
    unaffected: torch.Tensor
    crosses_documents: bool = False  # whether only tokens of other documents change

    def covers(self, call: Call) -> bool:
        """Whether the output of a call has one entry for each of these tokens."""
        output = _first(call.output)
        if not _is_float(output) or output.dim() <= call.time_dim:
            return False
        return output.movedim(call.time_dim, 1).shape[:2] == self.unaffected.shape

    def gap(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        time_dim: int = 1,
        scale: torch.Tensor | None = None,
    ) -> float:
        """The largest difference at unaffected positions, in standard deviations of `scale`.

        Both are (B, T, …), or (B, H, T, …) with `time_dim` 2; 0 for tensors of another shape.
        scale: the computed part of `first`, if that is only a part; the last bits of `first` count
        as rounding.
        """
        if first.dim() <= time_dim or first.shape != second.shape:
            return 0.0
        last_bits = 4 * torch.finfo(first.dtype).eps
        scale = first if scale is None else scale
        first, second = (x.movedim(time_dim, 1).float() for x in (first, second))
        if first.shape[:2] != self.unaffected.shape:
            return 0.0
        a, b = first[self.unaffected], second[self.unaffected]
        if torch.equal(a, b):
            return 0.0
        difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
        largest = difference.nan_to_num(nan=math.inf, posinf=math.inf).max()
        largest = largest - last_bits * a.nan_to_num(0.0, 0.0, 0.0).abs().max()
        scale = scale.movedim(time_dim, 1).float()
        varied = scale - scale.mean((0, 1))  # a bias of all positions would hide much
        unit = varied.square().mean().sqrt().nan_to_num(1.0, 1.0).clamp(min=1e-30)
        return max(0.0, (largest / unit).item())


def check_model(
    model: Transformer, device: torch.device, dtype: str, converted: bool = False
) -> list[str]:
    """Raise UserError if a token's output depends on later tokens or on other sequences.

    Returns notes: on tokens and positions that do not affect the output, and on wrong FLOPs of a
    component.
    Every rank calls this, since a sharded model communicates. On a CPU it computes in fp32, where
    rounding hides nothing, unless its parameters are `converted` to `dtype` before they are used.
    """
    dtype, rounding = (dtype, ROUNDING[dtype]) if converted else precision(device, dtype)
    with (
        _without_hiding_weights(model, device),
        _without_head(model),
        eager_blocks(model),
        torch.no_grad(),
        hardware.autocast(device, dtype),
    ):
        runs = _ProbePasses(model, device, rounding)
        model.train()
        short = runs.compare(_probe(model, min(SHORT, model.config.block_size), device))
        notes = [*runs.mixing_notes(short), *runs.position_notes(short)]
        model.eval()
        long = _probe(model, min(LONG, model.config.block_size), device)
        notes += runs.cache_notes(long, runs.compare(long)[1])
        if model.end_of_text is not None and model.config.block_size > 1:
            runs.compare(_document_probe(model, min(LONG, model.config.block_size), device))
    return notes + flops_notes(model.config)


def precision(device: torch.device, dtype: str) -> tuple[str, float]:
    """The dtype of matrix products in these checks, and the size of its rounding errors."""
    return ('float32', CPU_ROUNDING) if device.type == 'cpu' else (dtype, ROUNDING[dtype])


def _tokens(
    model: Transformer, shape: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Random tokens without end-of-text tokens, and others that differ at every position."""
    vocabulary = [t for t in range(min(model.config.vocab_size, 1000)) if t != model.end_of_text]
    known, generator = torch.tensor(vocabulary), torch.Generator().manual_seed(0)
    index = torch.randint(len(known), shape, generator=generator)
    other = index + torch.randint(1, max(2, len(known)), shape, generator=generator)
    return known[index].to(device), known[other % len(known)].to(device)


def _probe(model: Transformer, length: int, device: torch.device) -> Probe:
    """Sequences, of which number i changes from position i on, and the last not at all.

    A long probe has one that changes near its end, inside the last of its chunks of 3 to 64 tokens.
    """
    cuts = range(length + 1) if length <= SHORT else (length - 5, length)
    tokens, other = _tokens(model, (len(cuts), length), device)
    unaffected = torch.arange(length, device=device) < torch.tensor(cuts, device=device)[:, None]
    return Probe(tokens, torch.where(unaffected, tokens, other), unaffected)


def _document_probe(model: Transformer, length: int, device: torch.device) -> Probe:
    """Sequences of two documents, of which the first one changes."""
    ends = sorted({min(1, length - 2), length // 2 - 1, length - 2})
    tokens, other = _tokens(model, (len(ends), length), device)
    index, end = torch.arange(length, device=device), torch.tensor(ends, device=device)[:, None]
    tokens = tokens.masked_fill(index == end, model.end_of_text)
    return Probe(tokens, torch.where(index < end, other, tokens), index > end, True)


class _ProbePasses:
    """Forward passes of one model, in which each block gets its input of the first pass."""

    def __init__(self, model: Transformer, device: torch.device, rounding: float):
        self.model, self.device, self.rounding = model, device, rounding

    def forward(self, tokens: torch.Tensor, on_call: Callable[[Call], None] | None = None):
        """The last hidden states, with the same dropout in each pass."""
        torch.manual_seed(0)
        if on_call is None:
            return self.model(tokens)
        with observe_calls(self.model, on_call):
            return self.model(tokens)

    def base(self, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The inputs and outputs of all blocks, and the last hidden states."""
        stream: list[torch.Tensor] = []
        with _at_blocks(self.model, lambda place, x: stream.append(x.clone())):
            return stream, self.forward(tokens, check_form)

    def compare(self, probe: Probe) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Raise UserError if the changed tokens affect an unaffected position. Returns `base`."""
        stream, hidden = self.base(probe.tokens)
        gaps: list[float] = []
        into: list[torch.Tensor] = []
        before = iter(stream)

        def force(place: str, x: torch.Tensor) -> torch.Tensor | None:
            expected, added = next(before), None
            if place == 'out' and into[-1].shape == expected.shape:
                added = expected - into[-1]
            gaps.append(probe.gap(expected, x, scale=added))
            into.append(expected)
            if place == 'out' or x.shape[:2] != probe.unaffected.shape:
                return None
            mask = probe.unaffected.view(*probe.unaffected.shape, *[1] * (x.dim() - 2))
            return torch.where(mask, expected, x)

        with _at_blocks(self.model, force):
            gaps.append(probe.gap(hidden, self.forward(probe.changed)))
        if max(gaps) > self.rounding:
            raise self.leak_error(probe)
        return stream, hidden

    def leak_error(self, probe: Probe) -> UserError:
        """The error for a leak, naming the first call with equal inputs and different outputs."""
        calls: list[list[Call]] = []
        for tokens in (probe.tokens, probe.tokens, probe.changed):
            seen: list[Call] = []

            def see(call: Call, seen: list[Call] = seen) -> None:
                seen.append(_copied(call))

            self.forward(tokens, see)
            calls.append(seen)
        when = 'in training' if self.model.training else 'in evaluation'
        again = probe._replace(unaffected=torch.ones_like(probe.unaffected))
        for before, after in zip(calls[0], calls[1]):
            if self._differs(again, before, after):
                return UserError(
                    f'{before.label} returns another output when called again with the same input '
                    f'and random seed ({when}), so its runs cannot be reproduced. Use the default '
                    f'random generator of torch, and keep no state between calls.'
                )
        culprit = 'The model'
        for before, after in zip(calls[0], calls[2]):
            if self._differs(probe, before, after):
                open_ones = {
                    label(c.registry, c.component) for c in calls[0] if not probe.covers(c)
                }
                culprit = before.label + _inside(self.model, before.component, open_ones)
                break
        if probe.crosses_documents:
            return UserError(
                f'{culprit} does not keep documents apart: with document_mask=True, tokens of the '
                f'document before change its output. Let a mixer begin anew where '
                f'attn_inputs.starts is true, and an attention use attn_inputs.mask.'
            )
        alone = probe._replace(unaffected=probe.unaffected & probe.unaffected.all(1, keepdim=True))
        first, second = self.forward(probe.tokens), self.forward(probe.changed)
        if alone.gap(first, second) > self.rounding:
            return UserError(
                f'{culprit} mixes the sequences of a batch ({when}): its output for a sequence '
                f'depends on the others, and so the loss depends on the composition of the batch. '
                f'Compute each sequence independently.'
            )
        return UserError(
            f'{culprit} is not causal ({when}): later tokens change its output at earlier '
            f'positions. The model sees the tokens that it must predict, so its loss is '
            f'meaningless. Let each position depend only on itself and on earlier positions.'
        )

    def _differs(self, probe: Probe, before: Call, after: Call) -> bool:
        """Whether a call has equal inputs at the unaffected positions, but another output."""
        dim = before.time_dim
        pairs = [(x, y) for x, y in zip(before.inputs, after.inputs) if _is_float(x)]
        same = all(probe.gap(x, y, dim) <= self.rounding / 10 for x, y in pairs)
        outputs = _first(before.output), _first(after.output)
        return same and _is_float(outputs[0]) and probe.gap(*outputs, dim) > self.rounding

    def mixing_notes(self, short: tuple[list[torch.Tensor], torch.Tensor]) -> list[str]:
        """A note if no layer mixes tokens: if the earlier tokens do not affect the last one.

        short: the `base` of the short probe.
        """
        length = min(SHORT, self.model.config.block_size)
        probe = _probe(self.model, length, self.device)
        before_last = torch.cat((probe.changed[:, :-1], probe.tokens[:, -1:]), dim=1)
        if torch.equal(before_last, probe.tokens):  # no other tokens exist
            return []
        if not torch.equal(self.forward(before_last)[0, -1], short[1][0, -1]):
            return []
        return [
            'no layer mixes tokens: a prediction depends on the last token alone, not on those '
            'before it.'
        ]

    def cache_notes(self, probe: Probe, hidden: torch.Tensor) -> list[str]:
        """A note if users' components compute another output token by token, with a cache.

        hidden: the last hidden states of the probe's tokens, (B, T, C).
        """
        components = [known for m in self.model.modules() if (known := registered_class(m))]
        users = {label(*known) for known in components if is_foreign(known[1])}
        length = hidden.size(1)
        if not users or length < 2 or self.model.uncacheable:
            return []
        cache, cut = self.model.empty_cache(length), max(1, length - 2)
        parts = (probe.tokens[:, :cut], *probe.tokens[:, cut:].split(1, dim=1))
        cached = torch.cat([self.model(part, cache=cache) for part in parts], dim=1)
        everywhere = probe._replace(unaffected=torch.ones_like(probe.unaffected))
        if everywhere.gap(hidden, cached) <= max(self.rounding, CACHE_ROUNDING):
            return []
        return [
            f'{", ".join(sorted(users))}: with `cacheable = True`, but the output token by token '
            f'is not that of the whole sequence, so that generated text would be wrong. Let '
            f'forward continue from attn_inputs.cache, or set `cacheable = False`.'
        ]

    def position_notes(self, short: tuple[list[torch.Tensor], torch.Tensor]) -> list[str]:
        """A note on each position encoding that does not affect the last token in its layers.

        Each block is compared with a pass in which all positions are 0. short: the `base` of the
        short probe, which is shorter than most windows.
        """
        model, length = self.model, min(SHORT, self.model.config.block_size)
        # In a window of one token, positions cannot matter.
        windows = {
            number: min(length, block.attention.spec.reach or length)
            for number, (block, layer) in enumerate(zip(model.blocks, model.config.layers))
            if _has_positions(layer) and block.attention.spec.reach != 1
        }
        reach = min(windows.values(), default=0)
        if reach < 2:
            return []
        tokens = _probe(model, length, self.device).tokens[:, :reach]
        stream = short[0] if reach == length else self.base(tokens)[0]
        reached, before = [], iter(stream)  # by the input and the output of each block

        def force(place: str, x: torch.Tensor) -> torch.Tensor | None:
            expected = next(before)
            reached.append(not torch.equal(expected[:, -1], x[:, -1]))
            return expected if place == 'in' else None

        with _without_positions(model), _at_blocks(model, force):
            self.forward(tokens)
        if reached[0]:  # by the embedding, for all layers
            return []
        return _unused_positions(model.config, {n: reached[2 * n + 1] for n in windows})


def _has_positions(layer: ModelArchitectureConfig) -> bool:
    if 'position_encoding' not in layer:
        return False
    encoding = POSITION_ENCODING_REGISTRY[layer.position_encoding]
    hooks = ('prepare', 'embed', 'rotate')
    return any(getattr(encoding, hook) is not getattr(PositionEncoding, hook) for hook in hooks)


def _unused_positions(config: ModelArchitectureConfig, reached: dict[int, bool]) -> list[str]:
    """A note on each position encoding that affects no layer which has it and the same attention.

    reached: layer -> whether positions affect its output.
    """
    layers: dict[tuple[str, str], list[int]] = {}
    for number in reached:
        layer = config.layers[number]
        layers.setdefault((layer.position_encoding, layer.attention_type), []).append(number)
    notes = []
    for (encoding, attention), numbers in layers.items():
        if any(reached[number] for number in numbers):
            continue
        letters = dict.fromkeys(config.layer_letters[number] for number in numbers)
        where = '' if len(letters) == len(config.kinds) else f'layers {", ".join(letters)}: '
        notes.append(
            f'{where}position_encoding={encoding!r} does not affect the output: it is the same '
            f'with all positions 0. If '
            f'{label(ATTENTION_REGISTRY, ATTENTION_REGISTRY[attention])} has a forward of its own, '
            'pass queries and keys through self.rotate(x, attn_inputs.rotation), and hand the mask '
            "to the backend; if no position is to be used, set position_encoding='none'."
        )
    return notes


def _is_float(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _copied(call: Call) -> Call:
    """The call with copies of its tensors, which later ones may overwrite."""

    def copied(x: object) -> object:
        return x.clone() if isinstance(x, torch.Tensor) else x

    return call._replace(inputs=tuple(map(copied, call.inputs)), output=copied(_first(call.output)))


def _inside(model: Transformer, component: type, candidates: set[str]) -> str:
    """The part of the message that names the candidates inside the component."""
    names = {
        label(*known)
        for module in model.modules()
        if (outer := registered_class(module)) and outer[1] is component
        for child in module.modules()
        if (known := registered_class(child)) and known[1] is not component
    } & candidates
    return f' (or a component inside it: {", ".join(sorted(names))})' if names else ''


@contextmanager
def _at_blocks(model: Transformer, see: Callable) -> Iterator[None]:
    """Call see('in' or 'out', x) at each block; a tensor returned for 'in' replaces the input."""

    def before(block: nn.Module, inputs: tuple) -> tuple | None:
        x = see('in', inputs[0])
        return None if x is None else (x, *inputs[1:])

    def after(block: nn.Module, inputs: tuple, outputs: tuple) -> None:
        see('out', outputs[0])

    handles = []
    for block in model.blocks:
        handles.append(block.register_forward_pre_hook(before))
        handles.append(block.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unchanged(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


@contextmanager
def _without_head(model: Transformer) -> Iterator[None]:
    """Make the model return hidden states: the head acts on each token separately, and is a third
    of the work."""
    model.output_head.forward = _unchanged  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del model.output_head.forward


def _embed_at_zero(embed: Callable, x: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    return embed(x, torch.zeros_like(pos))


@contextmanager
def _without_positions(model: Transformer) -> Iterator[None]:
    """Set all positions to 0."""
    attention_inputs, encodings = type(model).attention_inputs, model.position_encodings
    model.attention_inputs = lambda pos, *rest: attention_inputs(  # type: ignore[method-assign]
        model, torch.zeros_like(pos), *rest
    )
    for encoding in encodings:
        encoding.embed = partial(_embed_at_zero, encoding.embed)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.attention_inputs
        for encoding in encodings:
            del encoding.embed


@contextmanager
def _without_hiding_weights(model: Transformer, device: torch.device) -> Iterator[None]:
    """Replace zero weights and small gains and biases, which could hide a leak, by random ones.

    Afterwards weights, buffers, mode and random state are restored. Raises UserError for a buffer
    that a forward pass changes, since evaluations and recomputed passes would change it too.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    mode, saved = model.training, []
    generators = [] if device.type != 'cuda' else [device]
    with torch.random.fork_rng(devices=generators), torch.no_grad():
        for parameter in model.parameters():
            shard = local_tensor(parameter)
            if not shard.numel() or not _may_hide_a_leak(shard):
                continue
            saved.append((shard, None if not shard.any() else shard.clone()))
            std = 0.5 if shard.dim() < 2 else shard.shape[-1] ** -0.5
            generator = torch.Generator().manual_seed(len(saved))
            shard.copy_(torch.empty(shard.shape).normal_(0.0, std, generator=generator))
        try:
            yield
            for name, buffer in model.named_buffers():
                if not torch.equal(buffer, buffers[name]):
                    raise UserError(
                        f'the buffer {name} changes in a forward pass. Checkpoints do '
                        f'not contain buffers, so a resumed run would continue with other values. '
                        f'Do not modify buffers in forward(), but in after_update().'
                    )
        finally:
            for shard, values in saved:
                shard.zero_() if values is None else shard.copy_(values)
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            for module in model.modules():
                if hasattr(module, 'reshard'):  # sharded by FSDP2
                    module.reshard()  # the gathered parameters are the random ones
            model.train(mode)


def _may_hide_a_leak(weight: torch.Tensor) -> bool:
    """Whether a product with this weight may be too small to reveal a leak."""
    if weight.dim() < 2:
        return bool(weight.abs().max() < SMALL)
    return not weight.view(-1)[:64].any() and not weight.any()
