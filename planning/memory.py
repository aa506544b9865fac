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
from common.parallel_options import derived_fsdp_options
from model_builder import Transformer
from parallel.shard_units import ShardUnit, shard_units
from parallel.strategies import aligned_elements, recomputed_blocks
from planning.simulation import MemoryCategory, MemorySnapshot, Simulation
from training_config import Settings, TrainingConfig

DDP_BUCKET = 25 * 2**20  # bytes; a larger parameter has a bucket of its own


class FSDPUnits:
    """The parameters of a model, and how FSDP shards them: by unit, with which options."""

    def __init__(self, model: Transformer, param_dtype: str, reduces_every_micro_step: bool):
        self.all = list(model.parameters())
        self.param_dtype, self.reduces_every_micro_step = param_dtype, reduces_every_micro_step
        self.every = shard_units(model, param_dtype, reshard_after_forward=True)
        number = {block: index for index, block in enumerate(model.blocks)}
        self.blocks = [unit for unit in self.every if unit.modules[0] in number]
        self.root, *others = [unit for unit in self.every if unit not in self.blocks]
        # The embedding is freed after its lookup, unless it is tied to the head.
        self.head = others[-1]
        self.embedding: ShardUnit | None = others[0] if len(others) == 2 else None


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
        self.converted = False  # whether parameters are converted before they are used

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
    """Counterpart of FullySharded. FSDP2 gathers a unit's parameters into one flat buffer and
    copies them into full parameters; it prefetches one block, and reduces the gradients of the
    previous one.
    """

    label = 'fsdp'
    reshards = True

    def __init__(self, units: FSDPUnits, run: TrainingConfig, ranks: int):
        super().__init__(units, run, ranks)
        self.shards = run.get('fsdp_shard_size') or ranks
        self.parameter_bytes = 4 * sum(self._padded(unit) for unit in units.every) // self.shards
        self.share = self.parameter_bytes / nbytes(units.all)
        self.reduced_size = 2 if run.reduce_dtype == 'bfloat16' else 4  # bytes of an element
        # Whether gradients of earlier micro-steps exist as shards, or unsharded.
        self.accumulates_shards = self.accumulates and units.reduces_every_micro_step
        self.accumulates &= not units.reduces_every_micro_step
        self.converted = units.param_dtype == 'bfloat16'

    def _devices(self, ranks: int) -> int:
        return ranks

    def _padded(self, unit: ShardUnit | None) -> int:
        """Elements of a unit when gathered."""
        return unit.elements(self.shards) if unit else 0

    def _gathered_bytes(self, unit: ShardUnit | None) -> int:
        return self._padded(unit) * unit.dtype.itemsize if unit else 0

    def _reduced_bytes(self, unit: ShardUnit | None) -> int:
        """Bytes of the buffer from which a unit's gradients are reduced, while they are."""
        return 0 if self.accumulates else self._padded(unit) * self.reduced_size

    def _blocks_gathered(self, snapshot: MemorySnapshot) -> int:
        """Bytes of the full parameters of gathered blocks."""
        sizes = [self._gathered_bytes(block) for block in self.units.blocks]
        if snapshot.phase == 'loss':
            return sizes[-1] if self.reshards else sum(sizes)
        if snapshot.block is None:
            return 0
        return sizes[snapshot.block] if self.reshards else sum(sizes[: snapshot.block + 1])

    def gradients(self, snapshot: MemorySnapshot) -> int:
        units, block = self.units, snapshot.block
        if snapshot.phase == 'update':
            return self.parameter_bytes
        if self.accumulates:  # unsharded, in the dtype in which they are reduced
            elements = sum(parameter.numel() for parameter in units.all)
            summed = elements * self.reduced_size
            if snapshot.phase != 'backward' or block is None:
                return summed
            of_block = units.blocks[block]
            not_yet_added = of_block.dtype.itemsize != self.reduced_size
            return summed + self._gathered_bytes(of_block) * not_yet_added
        unsharded = int(snapshot.bytes_by_category[MemoryCategory.GRADIENTS])
        sharded = self.parameter_bytes if self.accumulates_shards else 0
        if snapshot.phase == 'backward':  # those of later units are already sharded
            later = units.blocks[0 if block is None else block + 1 :]
            later += [units.head] if units.embedding else []
            unsharded -= sum(self._gathered_bytes(unit) for unit in later)
            if not self.accumulates_shards:
                sharded = 4 * sum(self._padded(unit) for unit in later) // self.shards
        return max(0, unsharded) + sharded

    def communication(self, snapshot: MemorySnapshot) -> int:
        units, block = self.units, snapshot.block
        root, embedding, head = (
            self._gathered_bytes(unit) for unit in (units.root, units.embedding, units.head)
        )
        tied = 0 if units.embedding else head
        gathered = root + self._blocks_gathered(snapshot)
        if snapshot.phase == 'update':
            return 0
        if snapshot.phase == 'loss':
            if tied:  # the buffer of the last all-gather is the last block's
                return gathered + head + self._gathered_bytes(units.blocks[-1])
            return gathered + head + max(head, self._reduced_bytes(units.head))
        if block is None:
            if snapshot.phase == 'forward':  # the parameters, and the buffer of the last all-gather
                return root + 2 * (embedding + tied)
            table = units.embedding or units.head
            behind = max(self._reduced_bytes(unit) for unit in (units.blocks[0], table))
            return root + tied + behind
        if snapshot.phase == 'forward':
            return gathered + tied + self._gathered_bytes(units.blocks[block])
        # In the backward pass: the next block is gathered, the last one reduces its gradients.
        ahead = self._gathered_bytes(units.blocks[block - 1]) if block > 0 and self.reshards else 0
        after = [*units.blocks, units.head if units.embedding else None][block + 1]
        return gathered + tied + ahead + self._reduced_bytes(after)


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
        """gpu_memory: bytes of the GPU; from it, options of FSDP are derived that are not set.

        Raises UserError if an option of FSDP contradicts others.
        """
        self.run, self.layers = settings.run, settings.architecture.n_layer
        self.simulation = Simulation(settings.run, settings.architecture, on_gpu, gpu_memory)
        self.optimizer_bytes, self.update_bytes = self.simulation.update()
        self.units = self._fsdp_units(settings, gpu_memory)
        self._simulated = cache(self._simulate)
        # Simulated micro-batches, by (checkpointing, accumulates, converted).
        self._sizes: dict[tuple[str, bool, bool], set[int]] = defaultdict(set)

    def _fsdp_units(self, settings: Settings, memory: float | None) -> FSDPUnits:
        run, model = settings.run, self.simulation.model
        elements = sum(parameter.numel() for parameter in model.parameters())
        device = run.device.partition(':')[0]
        options = derived_fsdp_options(run.to_dict(), device, settings.ranks, elements, memory)
        values = {
            key: run.get(key) if run.get(key) is not None else value
            for key, (value, _) in options.items()
        }
        return FSDPUnits(model, values['fsdp_param_dtype'], values['fsdp_reduce_every_micro_step'])

    def _simulate(
        self, batch_size: int, checkpointing: str, accumulates: bool, converted: bool
    ) -> list[MemorySnapshot]:
        recomputed = recomputed_blocks(checkpointing, self.layers)
        in_bfloat16 = [
            parameter
            for unit in self.units.every * converted
            if unit.dtype == torch.bfloat16
            for parameter in unit.parameters
        ]
        with self.simulation.converted(in_bfloat16):
            return self.simulation.micro_step(batch_size, recomputed, accumulates)

    def _snapshots(
        self, strategy: SingleMemory, batch_size: int, checkpointing: str
    ) -> list[MemorySnapshot]:
        return self._simulated(batch_size, checkpointing, strategy.accumulates, strategy.converted)

    def strategies(self, ranks: int) -> list[SingleMemory]:
        """The strategies available for `ranks` devices."""
        available = STRATEGIES if ranks > 1 else STRATEGIES[:1]
        return [strategy(self.units, self.run, ranks) for strategy in available]

    def bytes_by_part(
        self, strategy: SingleMemory, batch_size: int, checkpointing: str
    ) -> Iterator[tuple[str, dict[str, float]]]:
        """(phase, bytes by part) at each snapshot of an iteration."""
        snapshots = self._snapshots(strategy, batch_size, checkpointing)
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
        snapshots = self._snapshots(strategy, batch_size, checkpointing)
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
        sizes = self._sizes[checkpointing, strategy.accumulates, strategy.converted]
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
