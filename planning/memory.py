"""Memory of a run per device, by part, for each strategy.

`planning.simulation` gives the memory of a micro-step on one device. This module adds what a
strategy shards, copies and communicates, following `parallel.strategies`; tests compare it with
measurements.
"""

import math
from collections import defaultdict
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
    """The parameters of a model by FSDP unit: each block, and the root."""

    def __init__(self, simulation: Simulation):
        self.blocks = [list(block.parameters()) for block in simulation.blocks]
        in_blocks = {parameter for block in self.blocks for parameter in block}
        self.all = list(simulation.model.parameters())
        self.root = [parameter for parameter in self.all if parameter not in in_blocks]


def nbytes(parameters: list[torch.nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


# --- Strategies -----------------------------------------------------------------------------------


class SingleMemory:
    """Bytes per device in addition to the micro-step's own. Counterpart of SingleProcess."""

    label = 'single'

    def __init__(self, units: FSDPUnits, run: TrainingConfig, ranks: int):
        self.units, self.run = units, run
        # Whether gradients of an earlier micro-step exist while a later one runs.
        self.accumulates = run.gradient_accumulation_steps > self._devices(ranks)
        self.parameter_bytes = self.gradient_bytes = nbytes(units.all)
        self.share = 1.0  # fraction of the optimizer state on this device

    def _devices(self, ranks: int) -> int:
        return 1

    def gradients(self, snapshot: MemorySnapshot) -> int:
        if self.accumulates:
            return self.gradient_bytes
        return int(snapshot.bytes_by_category[MemoryCategory.GRADIENTS])

    def communication(self, snapshot: MemorySnapshot) -> int:
        return 0


class DDPMemory(SingleMemory):
    """Counterpart of DataParallel. Its buckets always exist, and gradients are views of them."""

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
        return self.bucket // 2 * shortens


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
    """Counterpart of FullySharded. FSDP2 gathers a block's parameters into one flat buffer and
    copies them into full parameters; it prefetches one block, and reduces the gradients of the
    previous one.
    """

    label = 'fsdp'
    reshards = True

    def __init__(self, units: FSDPUnits, run: TrainingConfig, ranks: int):
        super().__init__(units, run, ranks)
        shards = self.shards = run.get('fsdp_shard_size') or ranks
        self.parameter_bytes = sum(self._shard_bytes(p, shards) for p in units.all)
        self.share = self.parameter_bytes / nbytes(units.all)
        # Bytes of each unit when gathered: its shards are padded to equal sizes.
        self.block_bytes = [
            shards * sum(self._shard_bytes(p, shards) for p in b) for b in units.blocks
        ]
        self.root_bytes = shards * sum(self._shard_bytes(p, shards) for p in units.root)
        self.sent_share = 0.5 if run.reduce_dtype == 'bfloat16' else 1.0  # relative to fp32

    def _devices(self, ranks: int) -> int:
        return ranks

    @staticmethod
    def _shard_bytes(parameter: torch.Tensor, shards: int) -> int:
        """The bytes of the first rank's shard: the rows, divided and rounded up."""
        return -(-parameter.shape[0] // shards) * (parameter.nbytes // parameter.shape[0])

    def _gathered(self, snapshot: MemorySnapshot) -> int:
        """Bytes of the full parameters of gathered blocks."""
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
        if self.accumulates:  # unsharded, since they are reduced in the last micro-step
            uncast = 0
            if self.sent_share < 1 and snapshot.phase == 'backward' and block is not None:
                uncast = self.block_bytes[block]
            return int(self.gradient_bytes * self.sent_share) + uncast
        gradients = int(snapshot.bytes_by_category[MemoryCategory.GRADIENTS])
        if snapshot.phase == 'backward':  # those of later blocks are already sharded
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
        # In the backward pass: the next block is gathered, the last one reduces its gradients.
        ahead = self.block_bytes[block - 1] if block > 0 and self.reshards else 0
        behind = self.block_bytes[block + 1] if block + 1 < len(self.block_bytes) else 0
        sent = 0 if self.accumulates else int(behind * self.sent_share)
        return gathered + self.root_bytes + ahead + sent


class FSDPWithoutReshardingMemory(FSDPMemory):
    """FSDP with fsdp_reshard_after_forward=False: gathered blocks stay until the backward pass."""

    label = 'fsdp*'
    reshards = False


STRATEGIES = (SingleMemory, DDPMemory, ZeRO1Memory, FSDPMemory, FSDPWithoutReshardingMemory)


def strategy_label(run: TrainingConfig, ranks: int) -> str:
    """The label of the strategy that the options select."""
    if run.use_fsdp:
        strategy = FSDPMemory if run.fsdp_reshard_after_forward else FSDPWithoutReshardingMemory
        return strategy.label
    if run.use_zero1:
        return ZeRO1Memory.label
    return (DDPMemory if ranks > 1 else SingleMemory).label


# --- A run's memory -------------------------------------------------------------------------------


class MemoryEstimator:
    """The memory of a run on one device, under each strategy."""

    def __init__(self, settings: Settings, on_gpu: bool, gpu_memory: float | None = None):
        self.run, self.layers = settings.run, settings.architecture.n_layer
        self.simulation = Simulation(settings.run, settings.architecture, on_gpu, gpu_memory)
        self.units = FSDPUnits(self.simulation)
        self.optimizer_bytes, self.update_bytes = self.simulation.update()
        self._simulated = cache(self._simulate)
        # Simulated micro-batches, by (checkpointing, accumulates).
        self._sizes: dict[tuple[str, bool], set[int]] = defaultdict(set)

    def _simulate(
        self, batch_size: int, checkpointing: str, accumulates: bool
    ) -> list[MemorySnapshot]:
        recomputed = recomputed_blocks(checkpointing, self.layers)
        return self.simulation.micro_step(batch_size, recomputed, accumulates)

    def strategies(self, ranks: int) -> list[SingleMemory]:
        """The strategies available for `ranks` devices."""
        available = STRATEGIES if ranks > 1 else STRATEGIES[:1]
        return [strategy(self.units, self.run, ranks) for strategy in available]

    def bytes_by_part(
        self, strategy: SingleMemory, batch_size: int, checkpointing: str
    ) -> Iterator[tuple[str, dict[str, float]]]:
        """(phase, bytes by part) at each snapshot of an iteration."""
        snapshots = self._simulated(batch_size, checkpointing, strategy.accumulates)
        # After the micro-step, the update: the optimizer's working memory, and all gradients.
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
        """Bytes of weights, gradients and optimizer state between two micro-steps."""
        no_batch = MemorySnapshot('update', None, np.array([0, 0, 0, strategy.gradient_bytes]))
        optimizer_bytes = self.optimizer_bytes * strategy.share
        return strategy.parameter_bytes + strategy.gradients(no_batch) + optimizer_bytes

    def activation_bytes(
        self, strategy: SingleMemory, batch_size: int, checkpointing: str
    ) -> float:
        """Peak bytes of activations, autocast copies of weights, and logits together."""
        snapshots = self._simulated(batch_size, checkpointing, strategy.accumulates)
        return max(float(sum(snapshot.bytes_by_category[:3])) for snapshot in snapshots)

    def totals(
        self, strategy: SingleMemory, batch_size: int, checkpointing: str | None
    ) -> list[float]:
        """Bytes at each snapshot of an iteration."""
        checkpointing = checkpointing or self.run.activation_checkpointing
        snapshots = self.bytes_by_part(strategy, batch_size, checkpointing)
        return [sum(parts.values()) for _, parts in snapshots]

    def peak(
        self, strategy: SingleMemory, batch_size: int, checkpointing: str | None = None
    ) -> float:
        """Peak bytes of an iteration."""
        return max(self.totals(strategy, batch_size, checkpointing))

    def largest_batch(
        self, strategy: SingleMemory, limit: float, checkpointing: str | None = None
    ) -> int:
        """The largest micro-batch, in sequences, that fits into `limit` bytes; 0 if none fits.

        The sizes that are simulated for one strategy serve the others too, which need similar ones.
        """
        checkpointing = checkpointing or self.run.activation_checkpointing
        sizes = self._sizes[checkpointing, strategy.accumulates]
        sizes |= {self.run.batch_size, 2 * self.run.batch_size}
        while True:
            fitting = {size for size in sizes if self.peak(strategy, size, checkpointing) <= limit}
            largest, smallest = max(fitting, default=0), min(sizes - fitting, default=None)
            if smallest in (1, largest + 1):
                return largest
            # The size at which the memory, nearly linear in the size, reaches the limit: between
            # the two, or beyond all sizes simulated so far.
            ends = [largest, smallest] if largest and smallest else sorted(sizes)[-2:]
            if not largest:
                ends = sorted(sizes)[:2]
            totals = [self.totals(strategy, size, checkpointing) for size in ends]
            crossing = size_at_limit(ends, totals, limit)
            if crossing is None or crossing < 1:
                return 0
            below = max(math.floor(crossing), largest)
            if smallest:
                below = min(below, smallest - 1)
            margin = below // 50
            if smallest and largest and smallest - largest <= 3 * margin:
                # Within a few percent only the division of the logits into chunks is not linear,
                # which is a small part of a sequence unless there are thousands.
                if below < 1000 and 0.05 < crossing - below < 0.95:
                    return below
                margin = 0
            # Simulate a size on either side; of a small batch, the two next to the limit.
            sides = {max(below - margin, 1), below + 1 + margin} - sizes
            sizes |= sides or {below, below + 1}

    def summary(self, strategy: SingleMemory, limit: float | None) -> dict:
        """The report's column for a strategy: its peak by part, and the largest batch."""
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


def size_at_limit(sizes: list[int], totals: list[list[float]], limit: float) -> float | None:
    """The size at which the first total reaches the limit, by a line through two sizes each.

    None if a total exceeds the limit at any size.
    """
    (one, two), crossings = sizes, []
    for at_one, at_two in zip(*totals):
        if at_two > at_one:
            crossings.append(one + (two - one) * (limit - at_one) / (at_two - at_one))
        elif at_one > limit:
            return None
    return min(crossings)
