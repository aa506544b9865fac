"""Simulate the memory of a training step, without its device and without its computations.

The real model runs forward and backward, and the real optimizer steps, on fake tensors, which have
a size and no contents; every storage is tracked from allocation to release. So this module knows
no components or optimizers. Replacements of a GPU's fused kernels save the same tensors as they do.

Not torch's MemTracker or FSDPMemTracker: those measure the kernels of this machine, layer by
layer, under one strategy that must be set up. Tests compare this module with MemTracker.
"""

import operator
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import IntEnum
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from common import hardware
from common.tensors import storage_of
from components import attention_backends, cpu_attention, scan
from components import linear_cross_entropy as loss_module
from components.element_counter import WORKING_MEMORY
from model_builder import Transformer, parameter_groups
from model_config import ModelArchitectureConfig
from optim.step import GuardedOptimizer
from parallel.strategies import SingleProcess, prepare_blocks
from training_config import TrainingConfig

CPU = torch.device('cpu')


class MemoryCategory(IntEnum):
    """The purpose of a storage that is allocated during a micro-step."""

    ACTIVATIONS = 0
    WEIGHT_COPIES = 1  # autocast's, in the dtype of the matrix products
    LOGITS = 2  # and everything else of the output head and the loss
    GRADIENTS = 3


class Segment(NamedTuple):
    """A period of time: bytes by MemoryCategory, relative to its beginning."""

    peak: np.ndarray  # at the moment of the largest total
    change: np.ndarray  # at its end
    freed: dict[int, np.ndarray]  # bytes freed in it, by the number of the allocating segment


class MemorySnapshot(NamedTuple):
    """The peak of a segment: bytes by MemoryCategory, without those that are always allocated."""

    phase: str  # 'forward', 'loss', 'backward' or 'update'
    block: int | None  # None: before the first block
    bytes_by_category: np.ndarray


# --------------------------------------------------------------------------------------------------
# Tracking storages


class MemoryTracker(TorchDispatchMode):
    """Sums the storages that operations allocate, by MemoryCategory, until each is freed.

    Those of `weights` and `gradients` exist already and are not counted.
    """

    def __init__(self, weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]):
        super().__init__()
        self.weights = {storage_of(weight) for weight in weights}
        self.ignored = self.weights | {storage_of(gradient) for gradient in gradients}
        self.live: dict[int, tuple[weakref.ref, int, MemoryCategory, int]] = {}
        self.allocated = np.zeros(len(MemoryCategory), dtype=np.int64)
        self.category = MemoryCategory.ACTIVATIONS
        self.segments: list[Segment] = []
        self._begin()

    def _begin(self) -> None:
        self.start, self.peak = self.allocated.copy(), self.allocated.copy()
        self.freed: dict[int, np.ndarray] = {}

    def next_segment(self, category: MemoryCategory = MemoryCategory.ACTIVATIONS) -> None:
        """End a segment, and start one whose allocations are of that category."""
        segment = Segment(self.peak - self.start, self.allocated - self.start, self.freed)
        self.segments.append(segment)
        self.category = category
        self._begin()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # most calls: C++ asks for the device
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and storage_of(args[0]) in self.weights
        for output in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(output, torch.Tensor):
                self._on_allocate(output, MemoryCategory.WEIGHT_COPIES if cast else self.category)
        if func.overloadpacket in WORKING_MEMORY:
            self._update_peak(WORKING_MEMORY[func.overloadpacket](*args))
        return result

    def _on_allocate(self, tensor: torch.Tensor, category: MemoryCategory) -> None:
        key = storage_of(tensor)
        if key in self.live or key in self.ignored:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        reference = weakref.ref(storage, lambda _: self._on_free(key))
        self.live[key] = reference, size, category, len(self.segments)
        self.allocated[category] += size
        self._update_peak()

    def _update_peak(self, working: int = 0) -> None:
        """working: bytes that an operation holds for its own time, in the current category."""
        if self.allocated.sum() + working > self.peak.sum():
            self.peak = self.allocated.copy()
            self.peak[self.category] += working

    def _on_free(self, key: int) -> None:
        _, size, category, segment = self.live.pop(key)
        self.allocated[category] -= size
        self.freed.setdefault(segment, np.zeros_like(self.allocated))[category] += size

    def mark_gradient(self, parameter: torch.Tensor) -> None:
        """Count the parameter's new gradient as a gradient, not as working memory."""
        key = None if parameter.grad is None else storage_of(parameter.grad)
        if key in self.live:
            reference, size, category, segment = self.live[key]
            self.live[key] = reference, size, MemoryCategory.GRADIENTS, segment
            self.allocated[category] -= size
            self.allocated[MemoryCategory.GRADIENTS] += size


# --------------------------------------------------------------------------------------------------
# The model


class Simulation:
    """The real model of a run, and its optimizer, on fake tensors."""

    def __init__(
        self,
        run: TrainingConfig,
        architecture: ModelArchitectureConfig,
        on_gpu: bool,
        gpu_memory: float | None = None,
    ):
        """gpu_memory: bytes of the GPU's memory; None: ASSUMED_GPU_MEMORY."""
        self.run, self.block_size = run, architecture.block_size
        self.fake = FakeTensorMode()
        method = gpu_loss_method(run, gpu_memory or ASSUMED_GPU_MEMORY)
        self.kernels = partial(gpu_kernels, method) if on_gpu else nullcontext
        with self.fake:
            self.model = Transformer(architecture).train()
        self.blocks = list(self.model.blocks)

    def update(self) -> tuple[int, int]:
        """Bytes of the optimizer state, and of the working memory of an update."""
        single_process = SingleProcess(self.run, CPU)
        with self.fake:
            inner = single_process.build_optimizer(parameter_groups(self.model), self.run)
            optimizer = GuardedOptimizer(inner, self.run, CPU, single_process)
            loss = torch.zeros(())
            optimizer.scaler.scale(loss)  # initializes the scaler, as in the backward pass
            with self._tracked(accumulates=True) as tracker:
                optimizer.step(self.run.learning_rate, loss, measured=True)
                tracker.next_segment()
            (segment,) = tracker.segments
            states = inner.state.values()
            state_values = [value for state in states for value in state.values()]
            state_bytes = sum(
                value.nbytes for value in state_values if isinstance(value, torch.Tensor)
            )
        return state_bytes, int((segment.peak - segment.change).sum())

    def micro_step(
        self, batch_size: int, recomputed: list[int], accumulates: bool
    ) -> list[MemorySnapshot]:
        """Snapshots of one forward and backward pass of `batch_size` sequences.

        accumulates: gradients of an earlier micro-step exist, and are not counted. Otherwise the
        gradients of this one are allocated, and counted.
        """
        # Run the model without the repetitions of equal blocks.
        with self._shortened(recomputed) as run:
            with self.fake, self._tracked(accumulates) as tracker, self.kernels(), few_chunks():
                self._forward_and_backward(batch_size, tracker)
            count = len(self.model.blocks)
        # Split the segments: embedding, blocks, loss, blocks backward, embedding backward.
        first, *segments, last = tracker.segments
        forward, (head, exit, loss), backward = (
            segments[:count],
            segments[count : count + 3],
            segments[: count + 2 : -1],
        )
        # The end of autocast frees its copies of every block: count the omitted blocks too.
        middle = range(1 + run.begin + run.period, 1 + run.begin + 2 * run.period)
        freed = sum(exit.freed[number] for number in middle if number in exit.freed)
        exit = exit._replace(change=exit.change - run.omitted * freed)
        # Insert the omitted blocks, as copies of the middle period.
        forward, backward = run.restored(forward), run.restored(backward)
        blocks = range(len(self.blocks))
        phases = [
            ('forward', None, first),
            *(('forward', block, forward[block]) for block in blocks),
            *(('loss', None, segment) for segment in (head, exit, loss)),
            *(('backward', block, backward[block]) for block in reversed(blocks)),
            ('backward', None, last),
        ]
        # Accumulate: each segment begins where the previous one ended.
        snapshots, allocated = [], np.zeros(len(MemoryCategory), dtype=np.int64)
        for phase, block, segment in phases:
            snapshots.append(MemorySnapshot(phase, block, allocated + segment.peak))
            allocated = allocated + segment.change
        return snapshots

    @contextmanager
    def converted(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Context in which these parameters are bfloat16, as if FSDP had gathered them so."""
        before = [parameter.data for parameter in parameters]
        with self.fake:
            for parameter in parameters:
                parameter.grad = None
                parameter.data = parameter.data.bfloat16()
        try:
            yield
        finally:
            for parameter, data in zip(parameters, before):
                parameter.grad = None
                parameter.data = data

    @contextmanager
    def _shortened(self, recomputed: list[int]) -> Iterator['Repetition']:
        """Shorten the model to three periods of repeating blocks. Yields the repetition."""
        encodings = self.model.encoding_numbers
        run = _repetition(self.blocks, [(n in recomputed, e) for n, e in enumerate(encodings)])
        left = run.shortened(list(range(len(self.blocks))))
        self.model.blocks = nn.ModuleList(self.blocks[number] for number in left)
        self.model.encoding_numbers = [encodings[number] for number in left]
        recomputed_left = [at for at, number in enumerate(left) if number in recomputed]
        prepare_blocks(self.model, recomputed_left, compiled=False)
        try:
            yield run
        finally:
            for at in recomputed_left:
                del self.model.blocks[at].forward
            self.model.blocks = nn.ModuleList(self.blocks)
            self.model.encoding_numbers = encodings

    @contextmanager
    def _tracked(self, accumulates: bool) -> Iterator[MemoryTracker]:
        parameters = list(self.model.parameters())
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter) if accumulates else None
        gradients = [p.grad for p in parameters if p.grad is not None]
        tracker = MemoryTracker(parameters, gradients)
        with tracker:
            yield tracker

    def _forward_and_backward(self, batch_size: int, tracker: MemoryTracker) -> None:
        """As in the training loop, with a segment for each block in each direction."""
        handles = [
            parameter.register_post_accumulate_grad_hook(tracker.mark_gradient)
            for parameter in self.model.parameters()
        ]
        first, last = self.model.blocks[0], self.model.blocks[-1]

        def end_segment_on_gradient(tensor: torch.Tensor) -> None:
            tensor.register_hook(lambda _: tracker.next_segment())

        def before(block: nn.Module, inputs: tuple) -> None:
            tracker.next_segment()
            if block is first:
                end_segment_on_gradient(inputs[0])

        def after(block: nn.Module, inputs: tuple, outputs: tuple) -> None:
            if block is last:
                tracker.next_segment(MemoryCategory.LOGITS)
            end_segment_on_gradient(outputs[0])

        for block in self.model.blocks:
            handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
        tokens = torch.zeros((batch_size, self.block_size), dtype=torch.long)
        with hardware.autocast(CPU, self.run.dtype):
            loss_sum, _, auxiliary = self.model(tokens, tokens)
            tracker.next_segment()
        tracker.next_segment(MemoryCategory.LOGITS)
        (loss_sum / tokens.numel() + auxiliary.loss).backward()
        tracker.next_segment()
        for handle in handles:
            handle.remove()


class Repetition(NamedTuple):
    """Blocks that repeat: periods of `period` blocks from block `begin`, of which the middle one of
    three stands for `omitted` more."""

    begin: int
    period: int
    omitted: int  # periods

    def shortened(self, blocks: list) -> list:
        """The blocks without the omitted periods."""
        kept = self.begin + 2 * self.period
        return blocks[:kept] + blocks[kept + self.omitted * self.period :]

    def restored(self, segments: list[Segment]) -> list[Segment]:
        """The segments of all blocks, from those of the shortened ones."""
        middle, after = self.begin + self.period, self.begin + 2 * self.period
        copies = segments[middle:after] * self.omitted
        return segments[:after] + copies + segments[after:]


def _repetition(blocks: list[nn.Module], facts: list) -> Repetition:
    """The repetition that omits most blocks. facts: of each block, what else must repeat."""
    # Number the distinct kinds of blocks.
    distinct: list[tuple[nn.Module, object]] = []
    kinds = []
    for block, fact in zip(blocks, facts):
        same = (k for k, (b, f) in enumerate(distinct) if f == fact and _same_module(b, block))
        kind = next(same, len(distinct))
        kinds.append(kind)
        if kind == len(distinct):
            distinct.append((block, fact))
    # For each period, find where blocks equal those one period later.
    best = Repetition(0, len(blocks), 0)
    for period in range(1, len(blocks) // 4 + 1):
        begin = 0
        for equal, group in groupby(map(operator.eq, kinds, kinds[period:])):
            length = sum(1 for _ in group)
            omitted = (length + period) // period - 3
            if equal and omitted * period > best.omitted * best.period:
                best = Repetition(begin, period, omitted)
            begin += length
    return best


_OF_ANY_MODULE = vars(nn.Module()).keys() - {'training'}


def _same_module(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are equal except for the values of their parameters."""

    def facts(module: nn.Module) -> dict:
        attributes = {
            key: value for key, value in vars(module).items() if key not in _OF_ANY_MODULE
        }
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = [(name, t.shape, t.dtype, t.requires_grad) for name, t in tensors]
        return {
            'own': attributes,
            'tensors': shapes,
            'children': [n for n, _ in module.named_children()],
        }

    try:
        same = type(one) is type(other) and facts(one) == facts(other)
    except RuntimeError:  # tensors other than parameters cannot be compared
        return False
    return same and all(map(_same_module, one.children(), other.children()))


# --------------------------------------------------------------------------------------------------
# A GPU's fused kernels


ASSUMED_GPU_MEMORY = 80e9  # bytes, if the GPU is not known


@contextmanager
def gpu_kernels(method: loss_module.LossMethod) -> Iterator[None]:
    """Replace functions that torch fuses on a GPU only, so that they save what the GPU would.

    The functions of `torch.nn.functional` are replaced, since a mode that intercepts them is not
    active while the backward pass recomputes a block.
    """
    changes: list[tuple[dict, dict]] = [
        (vars(F), STAND_INS),
        (vars(cpu_attention), {'supports': lambda q, k: False}),
        (vars(loss_module), {'loss_method': lambda device, compiled: method}),
        (vars(attention_backends), {'fused_attention': fused_flex_attention}),
        (vars(scan), {'BLOCK_ELEMENTS': {}}),
    ]
    with _replaced(changes):
        yield


def gpu_loss_method(run: TrainingConfig, memory: float) -> loss_module.LossMethod:
    """The method for the loss on the GPU of a run, with a stand-in for the compiled function."""
    if run.device == 'mps':
        return loss_module.OTHER_METHOD
    return loss_module.cuda_method(memory, fused_loss if run.compile else None)


def fused_loss(logits: torch.Tensor, *_) -> torch.Tensor:
    """Allocates a loss per row."""
    return logits.new_empty(len(logits), dtype=torch.float32)


@contextmanager
def few_chunks() -> Iterator[None]:
    """Compute only the first two chunks and the last chunk of the loss: the others, of which a
    large batch has hundreds, use the same memory as the second."""

    def starts(length: int, rows: int) -> list[int]:
        every = chunk_starts(length, rows)
        return sorted({*every[:2], every[-1]})

    chunk_starts = loss_module.chunk_starts
    with _replaced([(vars(loss_module), {'chunk_starts': starts})]):
        yield


@contextmanager
def _replaced(changes: list[tuple[dict, dict]]) -> Iterator[None]:
    """Update each dict of names with its replacements, and restore it afterwards."""
    real = [{name: names[name] for name in others} for names, others in changes]
    for names, others in changes:
        names.update(others)
    try:
        yield
    finally:
        for (names, _), before in zip(changes, real):
            names.update(before)


def fused_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False):
    """Saves a mask of one byte per element."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


class FusedRMSNorm(torch.autograd.Function):
    """Saves its input, the weight and one number per row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def fused_rms_norm(x: torch.Tensor, shape, weight: torch.Tensor | None = None, eps=None):
    return FusedRMSNorm.apply(x, weight)


class FusedAttention(torch.autograd.Function):
    """Saves its inputs, its output and one number per query (Dao 2023); never the scores."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        batch, heads, length, _ = q.shape
        output = q.new_empty(batch, length, heads, v.size(-1)).transpose(1, 2)  # (B, H, T, D)
        log_sums = q.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, output, log_sums)
        return output

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, mask, _, _ = ctx.saved_tensors
        _sum_in_float32 = torch.empty_like(q, dtype=torch.float32)  # of q's gradient
        needed = zip((q, k, v, mask), ctx.needs_input_grad)
        return tuple(
            torch.empty_like(tensor) if needs_grad else None for tensor, needs_grad in needed
        )


def fused_attention(q, k, v, attn_mask=None, **_):
    if torch.is_autocast_enabled('cpu'):
        q, k, v = (tensor.to(torch.get_autocast_dtype('cpu')) for tensor in (q, k, v))
    return FusedAttention.apply(q, k, v, attn_mask)


def fused_flex_attention(q, k, v, mask, bias, spec, sinks=None):
    """As above; the block mask is shared by layers, and a learned bias or sink gets a gradient."""
    y = FusedAttention.apply(q, k, v, bias)
    return y if sinks is None else (y * sinks.sigmoid()[:, None, None]).to(y.dtype)


STAND_INS = {
    'dropout': fused_dropout,
    'rms_norm': fused_rms_norm,
    'scaled_dot_product_attention': fused_attention,
}
