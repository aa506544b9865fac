"""The bytes that a run holds on one device, part by part, under each strategy.

`planning.simulation` finds what a micro-step holds on one device. What a strategy shards, repeats
and sends is reckoned here, from what `parallel.strategies` does; the tests hold it against what is
measured.
"""

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch

from common import hardware
from parallel.strategies import aligned_elements, recomputed_blocks
from planning.simulation import MemoryCategory, MemorySnapshot, Simulation
from training_config import Settings, TrainingConfig

DDP_BUCKET = 25 * 2**20  # bytes; a larger parameter has a bucket of its own


class FSDPUnits:
    """The parameters of a model, by who gathers them under FSDP: a block, or the root."""

    def __init__(self, simulation: Simulation):
        self.blocks = [list(block.parameters()) for block in simulation.blocks]
        in_blocks = {parameter for block in self.blocks for parameter in block}
        self.all = list(simulation.model.parameters())
        self.root = [parameter for parameter in self.all if parameter not in in_blocks]


def nbytes(parameters: list[torch.nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


# --- What a strategy shards, repeats and sends ----------------------------------------------------


class SingleMemory:
    """Bytes on one device, beside those of the micro-step itself. Counterpart: SingleProcess."""

    label = 'single'

    def __init__(self, units: FSDPUnits, run: TrainingConfig, ranks: int):
        self.units, self.run = units, run
        # Whether gradients of an earlier micro-step are there while a later one runs.
        self.accumulates = run.gradient_accumulation_steps > self._devices(ranks)
        self.parameter_bytes = self.gradient_bytes = nbytes(units.all)
        self.share = 1.0  # of the optimizer's state that is here

    def _devices(self, ranks: int) -> int:
        return 1

    def gradients(self, snapshot: MemorySnapshot) -> int:
        if self.accumulates:
            return self.gradient_bytes
        return int(snapshot.bytes_by_category[MemoryCategory.GRADIENTS])

    def communication(self, snapshot: MemorySnapshot) -> int:
        return 0


class DDPMemory(SingleMemory):
    """Counterpart: DataParallel. Its buckets are always there, and gradients are views of them once
    they are sent; what accumulates before that is apart.
    """

    label = 'ddp'

    def __init__(self, units: FSDPUnits, run: TrainingConfig, ranks: int):
        super().__init__(units, run, ranks)
        largest = max(parameter.nbytes for parameter in units.all)
        self.bucket = max(min(DDP_BUCKET, self.gradient_bytes), largest)

    def _devices(self, ranks: int) -> int:
        return ranks

    def gradients(self, snapshot: MemorySnapshot) -> int:
        return self.gradient_bytes

    def communication(self, snapshot: MemorySnapshot) -> int:
        if snapshot.phase == 'update':
            return 0
        shortens = self.run.reduce_dtype == 'bfloat16' and snapshot.phase == 'backward'
        return self.gradient_bytes * self.accumulates + self.bucket // 2 * shortens


class ZeRO1Memory(DDPMemory):
    """Counterpart: ZeRO1, whose parameters are one flat buffer in equal shards."""

    label = 'zero1'

    def __init__(self, units: FSDPUnits, run: TrainingConfig, ranks: int):
        super().__init__(units, run, ranks)
        elements = sum(aligned_elements(parameter.numel()) for parameter in units.all)
        self.shard_bytes = 4 * aligned_elements(-(-elements // ranks))
        self.parameter_bytes = self.shard_bytes * ranks
        self.share = self.shard_bytes / (4 * elements)

    def communication(self, snapshot: MemorySnapshot) -> int:
        # A copy of the rank's own shard, from which the others' are gathered in place.
        return self.shard_bytes if snapshot.phase == 'update' else super().communication(snapshot)


class FSDPMemory(SingleMemory):
    """Counterpart: FullySharded. FSDP2 gathers a block's parameters into one flat buffer, and from
    it into whole parameters; it gathers one block ahead, and sends one block's gradients behind.
    """

    label = 'fsdp'
    reshards = True

    def __init__(self, units: FSDPUnits, run: TrainingConfig, ranks: int):
        super().__init__(units, run, ranks)
        shards = self.shards = run.get('fsdp_shard_size') or ranks
        self.parameter_bytes = sum(self._shard_bytes(p, shards) for p in units.all)
        self.share = self.parameter_bytes / nbytes(units.all)
        # Of each unit, as gathered: its shards are padded to equal sizes.
        self.block_bytes = [
            shards * sum(self._shard_bytes(p, shards) for p in b) for b in units.blocks
        ]
        self.root_bytes = shards * sum(self._shard_bytes(p, shards) for p in units.root)
        self.sent_share = 0.5 if run.reduce_dtype == 'bfloat16' else 1.0  # of a gradient's bytes

    def _devices(self, ranks: int) -> int:
        return ranks

    @staticmethod
    def _shard_bytes(parameter: torch.Tensor, shards: int) -> int:
        """What the first rank holds: of the rows, divided and rounded up."""
        return -(-parameter.shape[0] // shards) * (parameter.nbytes // parameter.shape[0])

    def _gathered(self, snapshot: MemorySnapshot) -> int:
        """Whole parameters of blocks."""
        if snapshot.phase == 'loss':
            return 0 if self.reshards else sum(self.block_bytes)
        if snapshot.block is None:
            return 0
        if self.reshards:
            return self.block_bytes[snapshot.block]
        return sum(self.block_bytes[: snapshot.block + 1])

    def gradients(self, snapshot: MemorySnapshot) -> int:
        block = snapshot.block
        if snapshot.phase == 'update':
            return self.parameter_bytes
        if self.accumulates:  # whole, since nothing is sent before the last micro-step
            uncast = 0
            if self.sent_share < 1 and snapshot.phase == 'backward' and block is not None:
                uncast = self.block_bytes[block]
            return int(self.gradient_bytes * self.sent_share) + uncast
        gradients = int(snapshot.bytes_by_category[MemoryCategory.GRADIENTS])
        if snapshot.phase == 'backward':  # later blocks' have been reduced and scattered
            later = sum(self.block_bytes[0 if block is None else block + 1 :])
            return gradients - later + later // self.shards
        return gradients

    def communication(self, snapshot: MemorySnapshot) -> int:
        block, gathered = snapshot.block, self._gathered(snapshot)
        if snapshot.phase == 'update':
            return 0
        if snapshot.phase == 'loss':
            return gathered + self.root_bytes + self.block_bytes[-1]
        if block is None:
            return 2 * self.root_bytes
        if snapshot.phase == 'forward':
            return gathered + self.root_bytes + self.block_bytes[block]
        # In the backward pass: the block before is gathered, the one behind sends its gradients.
        ahead = self.block_bytes[block - 1] if block > 0 and self.reshards else 0
        behind = self.block_bytes[block + 1] if block + 1 < len(self.block_bytes) else 0
        sent = 0 if self.accumulates else int(behind * self.sent_share)
        return gathered + self.root_bytes + ahead + sent


class FSDPWithoutReshardingMemory(FSDPMemory):
    """With fsdp_reshard_after_forward=False: gathered blocks stay until the backward pass."""

    label = 'fsdp*'
    reshards = False


STRATEGIES = (SingleMemory, DDPMemory, ZeRO1Memory, FSDPMemory, FSDPWithoutReshardingMemory)


def strategy_label(run: TrainingConfig, ranks: int) -> str:
    """The label of the strategy that the options choose."""
    if run.use_fsdp:
        strategy = FSDPMemory if run.fsdp_reshard_after_forward else FSDPWithoutReshardingMemory
        return strategy.label
    if run.use_zero1:
        return ZeRO1Memory.label
    return (DDPMemory if ranks > 1 else SingleMemory).label


# --- A run's memory -------------------------------------------------------------------------------


class MemoryEstimator:
    """The memory of a run on one device, under each strategy."""

    def __init__(self, settings: Settings, on_gpu: bool):
        self.run, self.layers = settings.run, settings.architecture.n_layer
        self.simulation = Simulation(settings.run, settings.architecture, on_gpu)
        self.units = FSDPUnits(self.simulation)
        self.optimizer_bytes, self.update_bytes = self.simulation.update()
        self._simulated = cache(self._simulate)

    def _simulate(
        self, batch_size: int, checkpointing: str, accumulates: bool
    ) -> list[MemorySnapshot]:
        recomputed = recomputed_blocks(checkpointing, self.layers)
        return self.simulation.micro_step(batch_size, recomputed, accumulates)

    def strategies(self, ranks: int) -> list[SingleMemory]:
        """Those that there are for so many devices."""
        available = STRATEGIES if ranks > 1 else STRATEGIES[:1]
        return [strategy(self.units, self.run, ranks) for strategy in available]

    def bytes_by_part(
        self, strategy: SingleMemory, batch_size: int, checkpointing: str
    ) -> Iterator[tuple[str, dict[str, float]]]:
        """(phase, bytes by part) at the moments of an update."""
        snapshots = self._simulated(batch_size, checkpointing, strategy.accumulates)
        # The update follows the micro-step: the optimizer's working memory, and all gradients.
        at_update = np.array([self.update_bytes * strategy.share, 0, 0, strategy.gradient_bytes])
        for snapshot in [*snapshots, MemorySnapshot('update', None, at_update)]:
            activations, weight_copies, logits, _ = snapshot.bytes_by_category
            yield (
                snapshot.phase,
                {
                    'parameters': strategy.parameter_bytes,
                    'gradients': strategy.gradients(snapshot),
                    'optimizer': self.optimizer_bytes * strategy.share,
                    'activations': activations,
                    'weight_copies': weight_copies,
                    'logits': logits,
                    'communication': strategy.communication(snapshot),
                },
            )

    def state_bytes(self, strategy: SingleMemory) -> float:
        """Of weights, gradients and the optimizer's state, between two micro-steps."""
        no_batch = MemorySnapshot('update', None, np.array([0, 0, 0, strategy.gradient_bytes]))
        optimizer_bytes = self.optimizer_bytes * strategy.share
        return strategy.parameter_bytes + strategy.gradients(no_batch) + optimizer_bytes

    def activation_bytes(
        self, strategy: SingleMemory, batch_size: int, checkpointing: str
    ) -> float:
        """Of activations, copies of weights and logits, at the moment that has most of them."""
        snapshots = self._simulated(batch_size, checkpointing, strategy.accumulates)
        return max(float(sum(snapshot.bytes_by_category[:3])) for snapshot in snapshots)

    def totals(
        self, strategy: SingleMemory, batch_size: int, checkpointing: str | None
    ) -> list[float]:
        """Bytes at the moments of an update."""
        checkpointing = checkpointing or self.run.activation_checkpointing
        snapshots = self.bytes_by_part(strategy, batch_size, checkpointing)
        return [sum(parts.values()) for _, parts in snapshots]

    def peak(
        self, strategy: SingleMemory, batch_size: int, checkpointing: str | None = None
    ) -> float:
        """Bytes at the fullest moment."""
        return max(self.totals(strategy, batch_size, checkpointing))

    def largest_batch(
        self, strategy: SingleMemory, limit: float, checkpointing: str | None = None
    ) -> int:
        """The most sequences in a micro-batch that fit into `limit` bytes; 0 if none does."""
        size, largest = self.run.batch_size, 0
        while True:
            # A line through two sizes for each moment; `total` and `doubled` are its points.
            one, two = (self.totals(strategy, n, checkpointing) for n in (size, 2 * size))
            if any(total > limit and doubled <= total for total, doubled in zip(one, two)):
                return 0  # it is not for the batch's sake
            # Each moment is close to a line, bent upwards: outside `size` to 2 · `size` it says too
            # many rather than too few. But downwards where the logits begin to come in chunks: from
            # what fits, another look may find more.
            room = min(
                (limit - total) / (doubled - total)
                for total, doubled in zip(one, two)
                if doubled > total
            )
            size = math.floor(size * (1 + room))
            if size < 1:
                return largest
            if self.peak(strategy, size, checkpointing) <= limit:
                if size <= largest:
                    return largest
                largest = size

    def summary(self, strategy: SingleMemory, limit: float | None) -> dict:
        """What the report shows of a strategy: the fullest moment, and what fits."""
        snapshots = self.bytes_by_part(
            strategy, self.run.batch_size, self.run.activation_checkpointing
        )
        phase, fullest = max(snapshots, key=lambda snapshot: sum(snapshot[1].values()))
        total = sum(fullest.values())
        return {
            'parts': {part: float(size) / hardware.GB for part, size in fullest.items()},
            'total_gb': float(total) / hardware.GB,
            'fullest': phase,
            'fits': None if limit is None else bool(total <= limit),
            'largest_batch_size': limit and self.largest_batch(strategy, limit),
        }
