"""What a run would need: parameters, FLOPs, memory of each strategy, and time. No device, no data.

    print(plan_report(plan(settings)))              # what --plan shows, by planning/report.py
    plan(settings)['memory']['fsdp']['total_gb']    # the same as data

`simulation` finds what a micro-step holds on one device. What a strategy divides, repeats and sends
is reckoned here, from what `parallelism` does; the tests hold it against what is measured.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from common import gpu_specs, hardware
from common.errors import UserError
from data.dataset import is_prepared, load_dataset
from model_builder import count_parameters, training_flops
from parallel.strategies import recomputed_blocks
from planning.simulation import Kind, Moment, Simulation
from training_config import Settings

# Of a GPU's memory; the rest is for the CUDA context, NCCL and what fragmentation wastes.
USABLE = 0.9
# The vocabulary where no data says: GPT-2's 50,257 byte pairs, padded to a multiple of 64.
ASSUMED_VOCABULARY = 50304
# Tokens of a micro-batch that a plan goes through: ten times what the largest GPU trains on.
LARGEST_MICRO_BATCH = 2**22
DDP_BUCKET = 25 * 2**20  # bytes; a larger parameter has a bucket of its own


def plan(settings: Settings) -> dict:
    """Everything that `report.plan_report` shows, as plain values; sizes in GB of 10⁹ bytes.

    Raises UserError for a GPU that is not known, a dtype that it does not have, or a micro-batch
    that no device holds.
    """
    gpu = gpu_specs.find_gpu(settings.plan.gpu) if settings.plan.gpu else None
    settings, notes = completed(settings, gpu)
    _check_size(settings)
    run, architecture = settings.run, settings.architecture
    memory = Memory(settings, on_gpu=run.device != 'cpu')
    model = memory.simulation.model
    recomputed = recomputed_blocks(run.activation_checkpointing, architecture.n_layer)
    flops = training_flops(model, recomputed)
    peak = gpu.peak(run.dtype) if gpu else gpu_specs.Peak(None, 'pass --gpu', measured=False)
    if run.peak_tflops is not None:
        peak = gpu_specs.Peak(run.peak_tflops, '--peak_tflops', measured=False)
    limit = gpu and USABLE * gpu.memory_gb * hardware.GB
    tokens = run.batch_size * run.gradient_accumulation_steps * architecture.block_size
    counted = count_parameters(model)
    return {
        'architecture': {'name': architecture.name, 'hash': architecture.hash},
        'model': counted,
        'flops': flops,
        'batch': {
            'batch_size': run.batch_size,
            'gradient_accumulation_steps': run.gradient_accumulation_steps,
            'block_size': architecture.block_size,
            'tokens_per_iter': tokens,
            'micro_steps_per_rank': run.gradient_accumulation_steps // settings.ranks,
            'max_iters': run.max_iters,
            'tokens': tokens * run.max_iters,
            'tokens_per_parameter': tokens * run.max_iters / counted['total_params'],
        },
        'hardware': {
            'device': gpu.name if gpu else run.device,
            'world_size': settings.ranks,
            'dtype': run.dtype,
            'activation_checkpointing': run.activation_checkpointing,
            'memory_gb': gpu and gpu.memory_gb,
            'memory_source': gpu and gpu.memory_source,
            'usable_gb': limit and limit / hardware.GB,
            'peak_tflops': peak.tflops and peak.tflops * settings.ranks,
            'peak_source': peak.source,
        },
        'chosen': _chosen(settings),
        'memory': {s.label: memory.figures(s, limit) for s in memory.strategies(settings.ranks)},
        'advice': list(_advice(settings, memory, limit)) if limit else [],
        'time': _time(settings, flops, peak, tokens),
        'notes': [*notes, *settings.notes, *_notes(memory, settings)],
        'derived': settings.derived,
    }


def _check_size(settings: Settings) -> None:
    """Raise UserError for a micro-batch that would take minutes to go through, and fits nowhere."""
    tokens = settings.run.batch_size * settings.architecture.block_size
    if tokens > LARGEST_MICRO_BATCH:
        raise UserError(
            f'batch_size={settings.run.batch_size:,} × block_size='
            f'{settings.architecture.block_size:,} are {tokens:,} tokens in a micro-batch: a plan '
            f'takes at most {LARGEST_MICRO_BATCH:,}. Lower batch_size.'
        )


def completed(settings: Settings, gpu: gpu_specs.Gpu | None) -> tuple[Settings, list[str]]:
    """The settings with what depends on the planned device and the data, and what was assumed."""
    run, notes = settings.run, []
    if gpu:
        if run.device != 'auto' and not run.device.startswith('cuda'):
            raise UserError(
                f'gpu={settings.plan.gpu!r} plans for a GPU and device={run.device!r} asks for '
                f'another: leave one of them out.'
            )
        device, dtype = torch.device('cuda'), gpu.resolve_dtype(run.dtype)
    elif run.device.startswith('cuda'):
        device, dtype = torch.device('cuda'), 'bfloat16' if run.dtype == 'auto' else run.dtype
    else:
        device = hardware.select_device(run.device)
        dtype = hardware.resolve_dtype(run.dtype, device)
    try:
        prepared = is_prepared(run.dataset)
    except UserError:  # it may be where the run will be
        prepared = False
    block_size = settings.architecture.block_size
    dataset = load_dataset(run.dataset, block_size) if prepared else None
    settings = settings.complete(device, dtype, dataset)
    if settings.architecture.vocab_size is None:
        architecture = settings.architecture.replace(vocab_size=ASSUMED_VOCABULARY)
        settings = replace(settings, architecture=architecture)
        notes.append(
            f"The vocabulary is taken to be GPT-2's, {ASSUMED_VOCABULARY:,}, as the dataset "
            f'{run.dataset!r} is not prepared here; --vocab_size sets it.'
        )
    architecture = settings.architecture
    if 'end_of_text' in architecture and architecture.end_of_text is None:  # whichever token it is
        settings = replace(settings, architecture=architecture.replace(end_of_text=0))
    return settings, notes


# --------------------------------------------------------------------------------------------------
# What a strategy divides, repeats and sends


class Sizes:
    """The parameters of a model, by who gathers them under FSDP: a block, or the root."""

    def __init__(self, simulation: Simulation):
        self.blocks = [list(block.parameters()) for block in simulation.blocks]
        in_blocks = {parameter for block in self.blocks for parameter in block}
        self.all = list(simulation.model.parameters())
        self.root = [parameter for parameter in self.all if parameter not in in_blocks]


def nbytes(parameters: list[torch.Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


class Single:
    """Bytes on one device, beside those of the micro-step itself. Counterpart: SingleProcess."""

    label = 'single'

    def __init__(self, sizes: Sizes, run, ranks: int):
        self.sizes, self.run = sizes, run
        # Whether gradients of an earlier micro-step are there while a later one runs.
        self.accumulates = run.gradient_accumulation_steps > self._devices(ranks)
        self.parameters = self.gradient_bytes = nbytes(sizes.all)
        self.share = 1.0  # of the optimizer's state that is here

    def _devices(self, ranks: int) -> int:
        return 1

    def gradients(self, moment: Moment) -> int:
        return self.gradient_bytes if self.accumulates else moment.held[Kind.GRADIENTS]

    def communication(self, moment: Moment) -> int:
        return 0


class DDP(Single):
    """Counterpart: DataParallel. Its buckets are always there, and gradients are views of them once
    they are sent; what accumulates before that is apart.
    """

    label = 'ddp'

    def __init__(self, sizes, run, ranks):
        super().__init__(sizes, run, ranks)
        largest = max(parameter.nbytes for parameter in sizes.all)
        self.bucket = max(min(DDP_BUCKET, self.gradient_bytes), largest)

    def _devices(self, ranks):
        return ranks

    def gradients(self, moment):
        return self.gradient_bytes

    def communication(self, moment):
        if moment.phase == 'update':
            return 0
        shortens = self.run.reduce_dtype == 'bfloat16' and moment.phase == 'backward'
        return self.gradient_bytes * self.accumulates + self.bucket // 2 * shortens


class ZeRO1(DDP):
    """Counterpart: ZeRO1, whose parameters are one flat buffer in equal stretches."""

    label = 'zero1'

    def __init__(self, sizes, run, ranks):
        super().__init__(sizes, run, ranks)
        elements = sum(parameter.numel() for parameter in sizes.all)
        self.stretch = 4 * -(-elements // ranks)
        self.parameters = self.stretch * ranks
        self.share = self.stretch / (4 * elements)

    def communication(self, moment):
        # A copy of the rank's own stretch, from which the others' are gathered in place.
        return self.stretch if moment.phase == 'update' else super().communication(moment)


class FSDP(Single):
    """Counterpart: FullySharded. FSDP2 gathers a block's parameters into one flat buffer, and from
    it into whole parameters; it gathers one block ahead, and sends one block's gradients behind.
    """

    label = 'fsdp'
    reshards = True

    def __init__(self, sizes, run, ranks):
        super().__init__(sizes, run, ranks)
        shards = self.shards = run.get('fsdp_shard_size') or ranks
        whole = nbytes(sizes.all)
        self.parameters = sum(self._shard(p, shards) for p in sizes.all)
        self.share = self.parameters / whole
        self.blocks = [shards * sum(self._shard(p, shards) for p in b) for b in sizes.blocks]
        self.root = shards * sum(self._shard(p, shards) for p in sizes.root)
        self.sent = 0.5 if run.reduce_dtype == 'bfloat16' else 1.0  # of a gradient's bytes

    def _devices(self, ranks):
        return ranks

    @staticmethod
    def _shard(parameter: torch.Tensor, shards: int) -> int:
        """What the first rank holds: of the rows, divided and rounded up."""
        return -(-parameter.shape[0] // shards) * (parameter.nbytes // parameter.shape[0])

    def _gathered(self, moment: Moment) -> int:
        """Whole parameters of blocks."""
        if moment.phase == 'loss':
            return 0 if self.reshards else sum(self.blocks)
        if moment.block is None:
            return 0
        return self.blocks[moment.block] if self.reshards else sum(self.blocks[: moment.block + 1])

    def gradients(self, moment):
        own = self.blocks[moment.block] if moment.block is not None else 0
        if moment.phase == 'update':
            return self.parameters
        if self.accumulates:  # whole, since nothing is sent before the last micro-step
            made = own if self.sent < 1 and moment.phase == 'backward' else 0
            return int(self.gradient_bytes * self.sent) + made
        if moment.phase == 'backward':  # later blocks' have been divided
            first = 0 if moment.block is None else moment.block + 1
            later = sum(self.blocks[first:])
            return moment.held[Kind.GRADIENTS] - later + later // self.shards
        return moment.held[Kind.GRADIENTS]

    def communication(self, moment):
        number, gathered = moment.block, self._gathered(moment)
        if moment.phase == 'update':
            return 0
        if moment.phase == 'loss':
            return gathered + self.root + self.blocks[-1]
        if number is None:
            return 2 * self.root
        if moment.phase == 'forward':
            return gathered + self.root + self.blocks[number]
        ahead = self.blocks[number - 1] if number > 0 and self.reshards else 0
        behind = self.blocks[number + 1] if number + 1 < len(self.blocks) else 0
        return gathered + self.root + ahead + (0 if self.accumulates else int(behind * self.sent))


class FSDPWhole(FSDP):
    """With fsdp_reshard_after_forward=False: gathered blocks stay until the backward pass."""

    label = 'fsdp*'
    reshards = False


STRATEGIES = (Single, DDP, ZeRO1, FSDP, FSDPWhole)


def _chosen(settings: Settings) -> str:
    """The label of the strategy that the options choose."""
    run = settings.run
    if run.use_fsdp:
        return (FSDP if run.fsdp_reshard_after_forward else FSDPWhole).label
    if run.use_zero1:
        return ZeRO1.label
    return (DDP if settings.ranks > 1 else Single).label


# --------------------------------------------------------------------------------------------------
# Memory


class Memory:
    """The memory of a run on one device, under each strategy."""

    def __init__(self, settings: Settings, on_gpu: bool):
        self.run, self.layers = settings.run, settings.architecture.n_layer
        self.simulation = Simulation(settings.run, settings.architecture, on_gpu)
        self.sizes = Sizes(self.simulation)
        self.optimizer, self.update = self.simulation.update()
        self._simulated = cache(self._simulate)

    def _simulate(self, batch_size: int, checkpointing: str, accumulates: bool) -> list[Moment]:
        recomputed = recomputed_blocks(checkpointing, self.layers)
        return self.simulation.micro_step(batch_size, recomputed, accumulates)

    def strategies(self, ranks: int) -> list[Single]:
        """Those that there are for so many devices."""
        return [
            made(self.sizes, self.run, ranks) for made in STRATEGIES[: None if ranks > 1 else 1]
        ]

    def parts(self, strategy: Single, batch_size: int, checkpointing: str) -> Iterator[tuple]:
        """(phase, bytes by part) at the moments of an update."""
        moments = self._simulated(batch_size, checkpointing, strategy.accumulates)
        working = np.array([self.update * strategy.share, 0, 0, 0])
        gradients = np.array([0, 0, 0, strategy.gradient_bytes])
        for moment in [*moments, Moment('update', None, working + gradients)]:
            activations, copies, head, _ = moment.held
            yield (
                moment.phase,
                {
                    'parameters': strategy.parameters,
                    'gradients': strategy.gradients(moment),
                    'optimizer': self.optimizer * strategy.share,
                    'activations': activations,
                    'weight_copies': copies,
                    'logits': head,
                    'communication': strategy.communication(moment),
                },
            )

    def totals(self, strategy: Single, batch_size: int, checkpointing: str | None) -> list[float]:
        """Bytes at the moments of an update."""
        checkpointing = checkpointing or self.run.activation_checkpointing
        parts = self.parts(strategy, batch_size, checkpointing)
        return [sum(bytes.values()) for _, bytes in parts]

    def total(self, strategy: Single, batch_size: int, checkpointing: str | None = None) -> float:
        """Bytes at the fullest moment."""
        return max(self.totals(strategy, batch_size, checkpointing))

    def largest_batch(
        self, strategy: Single, limit: float, checkpointing: str | None = None
    ) -> int:
        """The most sequences in a micro-batch that fit into `limit` bytes; 0 if none does."""
        size, most = self.run.batch_size, 0
        while True:
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
                return most
            if self.total(strategy, size, checkpointing) <= limit:
                if size <= most:
                    return most
                most = size

    def figures(self, strategy: Single, limit: float | None) -> dict:
        """What the report shows of a strategy: the fullest moment, and what fits."""
        parts = self.parts(strategy, self.run.batch_size, self.run.activation_checkpointing)
        phase, fullest = max(parts, key=lambda moment: sum(moment[1].values()))
        total = sum(fullest.values())
        return {
            'parts': {part: float(size) / hardware.GB for part, size in fullest.items()},
            'total_gb': float(total) / hardware.GB,
            'fullest': phase,
            'fits': None if limit is None else bool(total <= limit),
            'largest_batch_size': limit and self.largest_batch(strategy, limit),
        }


def _advice(settings: Settings, memory: Memory, limit: float) -> Iterator[str]:
    """What to try where nothing fits, with what it comes to."""
    run, ranks = settings.run, settings.ranks
    sequences = run.batch_size * run.gradient_accumulation_steps

    def leanest(batch_size: int, checkpointing: str, ranks: int) -> tuple[float, str]:
        totals = [
            (memory.total(strategy, batch_size, checkpointing), strategy.label)
            for strategy in memory.strategies(ranks)
        ]
        return min(totals)

    def tried(options: str, batch_size: int, checkpointing: str, ranks: int) -> str:
        total, label = leanest(batch_size, checkpointing, ranks)
        verdict = 'fits' if total <= limit else 'does not fit'
        return f'{options}: {label} takes {total / hardware.GB:.1f} GB, which {verdict}.'

    def smaller(checkpointing: str) -> tuple[str, int] | None:
        largest = max(
            memory.largest_batch(s, limit, checkpointing) for s in memory.strategies(ranks)
        )
        if not 0 < largest < run.batch_size:
            return None
        steps = -(-sequences // (largest * ranks)) * ranks
        return f'--batch_size={largest} --gradient_accumulation_steps={steps}', largest

    asked = run.activation_checkpointing
    if leanest(run.batch_size, asked, ranks)[0] <= limit:
        return
    if found := smaller(asked):
        yield tried(found[0], found[1], asked, ranks)
    if asked != 'full':
        options = '--activation_checkpointing=full'
        yield tried(options, run.batch_size, 'full', ranks)
        alone = leanest(run.batch_size, 'full', ranks)[0] <= limit
        if not alone and (found := smaller('full')):
            yield tried(f'{options} {found[0]}', found[1], 'full', ranks)
    for more in (ranks * 2**power for power in range(1, 12)):
        if memory.total(FSDP(memory.sizes, run, more), run.batch_size) <= limit:
            yield tried(f'--world_size={more}', run.batch_size, asked, more)
            return
    yield 'More devices alone do not help: the micro-batch itself is too large.'


def _notes(memory: Memory, settings: Settings) -> Iterator[str]:
    """What a reader of the figures should know."""
    run, ranks = settings.run, settings.ranks
    steps = run.gradient_accumulation_steps // ranks
    if ranks > 1 and steps > 1:
        shard = FSDP(memory.sizes, run, ranks).parameters / hardware.GB
        yield (
            f'While gradients accumulate, over {steps} micro-batches on each device, FSDP keeps '
            f'them whole and DDP and ZeRO-1 hold them beside their buckets. With '
            f'gradient_accumulation_steps={ranks} FSDP would keep {shard:.1f} GB of them, and the '
            f'others only the buckets.'
        )
    if run.compile:
        yield 'Memory is that without torch.compile, which often needs less.'


# --------------------------------------------------------------------------------------------------
# Time


def _time(settings: Settings, flops: dict, peak: gpu_specs.Peak, tokens_per_iter: int):
    """How long the run takes on all devices at the MFU given; None without a peak."""
    if peak.tflops is None:
        return None
    rate = settings.ranks * peak.tflops * 1e12 * settings.plan.plan_mfu / flops['per_token']
    per_iter = tokens_per_iter / rate
    return {
        'mfu': settings.plan.plan_mfu,
        'tokens_per_sec': rate,
        'seconds_per_iter': per_iter,
        'seconds': per_iter * settings.run.max_iters,
        'device_hours': per_iter * settings.run.max_iters * settings.ranks / 3600,
    }
