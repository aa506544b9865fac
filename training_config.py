"""The options of a run (nanoGPT's and more), merged with the architecture into `Settings`.

settings = load_settings(command_line)  # merged and checked, without derived values
settings = settings.resolve(...)        # when the device and the dataset are known
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.environment import world_size
from common.errors import UserError
from common.hardware import select_device
from common.option_merge import chosen_components, merge, with_component_options
from common.parallel_options import PARALLEL_OPTIONS, derived_fsdp_options
from common.registry import (
    AnyBut,
    FrozenConfig,
    Option,
    Registry,
    above,
    at_least,
    between,
    derived_values_of,
    sentences_of,
)
from common.system_options import SYSTEM_OPTIONS
from configurator import CommandLine, Schema, flatten, format_config
from data.dataset import TokenDataset, is_prepared
from data.options import DATA_OPTIONS
from model_builder import (
    build_model,
    check_calls,
    complete,
    flops_by_part,
    with_backend_of,
    with_end_of_text,
    with_vocabulary,
)
from model_config import ModelArchitectureConfig, layer_of_dict
from model_config import schema as architecture_schema
from records import trackers

OPTIMIZER_REGISTRY = Registry('optimizer', 'Optimizer', 'optim.optimizers')
SCHEDULE_REGISTRY = Registry('lr_schedule', 'Learning-rate schedule', 'optim.schedules')


INIT_FROM = ('scratch', 'resume', 'auto')  # without pretrained weights
GPT2_SIZES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')


def is_init_from(value: str) -> bool:
    kind, _, source = value.partition(':')
    return value in (*INIT_FROM, *GPT2_SIZES) or bool(kind in ('hf', 'nanogpt') and source)


# fmt: off
RUN_OPTIONS = {
    'out_dir': Option(str, 'out', 'Folder of the runs, each in a subfolder of its own',
                      is_path=True),
    'init_from': Option(str, 'scratch', 'Start of the run. scratch: new weights; resume: the '
                        'newest run in out_dir; auto: resume if there is one, else scratch; gpt2, '
                        'gpt2-medium, gpt2-large, gpt2-xl, hf:… or nanogpt:…: a new run from '
                        'pretrained weights',
                        check=(is_init_from, "'scratch', 'resume', 'auto', 'gpt2' (or gpt2-medium, "
                               "gpt2-large, gpt2-xl), 'hf:FOLDER_OR_NAME' (Hugging Face) or "
                               "'nanogpt:CKPT.PT'"), is_path=True),
    'resume_run': Option(str | None, None, 'Run to resume, a folder or its name; None: the newest '
                         'in out_dir', is_path=True),
    'eval_interval': Option(int | None, None, 'Iterations between evaluations; None: max_iters / '
                            '10, from 20 to 2000, or sample_interval', check=at_least(1)),
    'eval_iters': Option(int | None, None, 'Number of evaluation windows of block_size tokens; '
                         'None: depends on the device', check=at_least(1)),
    'eval_only': Option(bool, False, 'Evaluate once and exit'),
    'log_interval': Option(int, 1, 'Iterations between log entries', check=at_least(1)),
    'log_style': Option(str, 'auto', 'Form of log entries. auto: a block, redrawn in place on a '
                        'terminal; block: blocks one below the other; line: one line each',
                        choices=('auto', 'block', 'line')),
    'report': Option(str, 'short', 'Length of the start-up report', choices=('short', 'full')),
    'always_save_checkpoint': Option(bool, True, 'Save a checkpoint at every evaluation, not only '
                                     'when the validation loss improves'),
    'async_save': Option(bool | None, None, 'Write checkpoints in the background, from a copy in '
                         'host memory; None: True except on a CPU'),
    'keep_last': Option(int, 1, 'Number of newest checkpoints to keep', check=at_least(1)),
    'keep_best': Option(bool, True, 'Also keep the checkpoint with the lowest validation loss'),
    'on_nonfinite': Option(str, 'stop', 'Action when a loss or gradient is not finite (the weights '
                           'are never updated with it). stop: end the run; skip: continue; '
                           'rollback: return to the last checkpoint',
                           choices=('stop', 'skip', 'rollback')),
    'sample_interval': Option(int, 0, 'Iterations between text samples, a multiple of '
                              'eval_interval; 0: none', check=at_least(0)),
    'sample_prompt': Option(str, '\n', 'Prompt of the text samples',
                            requires=('sample_interval', AnyBut(0))),
    'sample_tokens': Option(int, 128, 'Tokens per text sample',
                            check=at_least(1, at_most=1_000_000),
                            requires=('sample_interval', AnyBut(0))),
    'diagnostics': Option(bool, False, 'At evaluations, also measure the layers, the last weight '
                          'update and the loss by position'),
    'concurrent_runs': Option(int, 1, 'Number of runs that share this machine, set by study.py; '
                              'above 1, times are not compared', check=at_least(1)),
    'profile': Option(int, 0, 'Number of iterations to profile, for a trace of operations and '
                      'kernels and, on CUDA, of memory; 0: none', check=at_least(0, at_most=100)),
    'debug': Option(bool, False, 'Show the traceback of user errors too'),
}
OPTIMIZER_OPTIONS = {
    'max_iters': Option(int, 5000, 'Number of iterations', check=at_least(1)),
    'optimizer': Option(str, 'adamw', 'Optimizer', choices=OPTIMIZER_REGISTRY),
    'learning_rate': Option(float, 6e-4, 'Peak learning rate', check=above(0)),
    'weight_decay': Option(float, 0.1, 'Weight decay of matrices and embeddings',
                           check=at_least(0)),
    'grad_clip': Option(float, 1.0, 'Maximum gradient norm; 0: no clipping', check=at_least(0)),
    'decay_lr': Option(bool, True, 'Warm up and decay the learning rate by lr_schedule; else it is '
                       'constant'),
    'lr_schedule': Option(str, 'cosine', 'Learning-rate schedule after warm-up',
                          choices=SCHEDULE_REGISTRY, requires=('decay_lr', True)),
}
# Read by --plan only, and no property of the run itself: no record or checkpoint has them.
PLAN_OPTIONS = {
    'plan': Option(bool, False, 'Show parameters, FLOPs, the memory per strategy and the time of '
                   'this run, then exit; needs no device and no data'),
    'world_size': Option(int, 1, 'Number of devices to plan for', check=at_least(1),
                         requires=('plan', True)),
    'gpu': Option(str | None, None, 'GPU model to plan for, such as A100-80GB or B200; None: '
                  'without a check of what fits and without a time estimate',
                  requires=('plan', True)),
    'plan_mfu': Option(float, 0.4, 'MFU assumed for the time estimate (0 to 1)',
                       check=between(0.01, 1), requires=('plan', True)),
}
# fmt: on
OPTION_GROUPS = {
    'Run': RUN_OPTIONS,
    'Data': DATA_OPTIONS,
    'Optimizer': OPTIMIZER_OPTIONS,
    'System': SYSTEM_OPTIONS,
    'Distributed training (torchrun)': PARALLEL_OPTIONS,
    'Experiment trackers': trackers.OPTIONS,
}
PLAN_GROUP = {'Planning (instead of a run)': PLAN_OPTIONS}

# On a CPU, with a single sequence, 100 iterations of the 12-layer presets take minutes. On a GPU,
# 12 sequences × 40 micro-batches × 1024 tokens = 491,520 tokens per iteration, as in nanoGPT; the
# 480 sequences are divided otherwise where the GPU's memory is known (`planning.micro_batch`).
CPU_SEQUENCES = (1, 1)  # per micro-batch, and per iteration
ACCELERATOR_SEQUENCES = (12, 480)
CPU_EVAL_TOKENS = 8192
# Training FLOPs per process from which torch.compile is worthwhile on a CPU. It takes half a minute
# once, and saves 0 to 3 % of the time and a fifth of the memory on two cores without AMX
# (benchmarks/RESULTS.md). At their 3e11 to 5e11 FLOPs per second, this is a run of 40 minutes.
CPU_COMPILE_FLOPS = 1e15
# The same on a CUDA GPU, an estimate: it takes 20 to 60 seconds once, and fused norms, activations
# and rotations save about a third of the time. At 1e14 FLOPs per second, as of a small model on a
# large GPU or a large model on an A100, this is a run of 100 seconds.
CUDA_COMPILE_FLOPS = 1e16
ACCELERATOR_EVAL_ITERS = 200
# Enough evaluations for a curve. More would be slow on a CPU, where an evaluation takes as long as
# five iterations of one sequence, and saves a checkpoint.
EVALUATIONS = 10
EVAL_INTERVALS = (20, 2000)  # minimum and maximum


class TrainingConfig(FrozenConfig):
    """The options of a run; values that are still to be derived are None."""

    @classmethod
    def from_dict(cls, values: dict) -> 'TrainingConfig':
        """The options whose `to_dict()` is `values`; missing ones have their defaults.

        Raises UserError, which lists every problem.
        """
        problems: list[str] = []
        layer = layer_of_dict(values, 'from_dict()', run_schema(), problems)
        merged = merge(flatten(OPTION_GROUPS), [layer], problems)
        if problems:
            raise UserError(*problems)
        return cls(*merged)

    def components(self) -> Iterator[type]:
        """The chosen optimizer, and the schedule if there is one."""
        for _, component in chosen_components(flatten(OPTION_GROUPS), self._values):
            yield component


@dataclass(frozen=True)
class Settings:
    """All settings of a run, merged: training options, architecture, command line, plan."""

    run: TrainingConfig
    architecture: ModelArchitectureConfig
    command_line: CommandLine
    plan: FrozenConfig
    ranks: int  # number of processes, actual or planned
    derived: dict[str, str] = field(default_factory=dict)  # key -> value and reason

    @property
    def notes(self) -> list[str]:
        """Notes for the user on config files and, if they are resolved, on options."""
        notes = []
        if self.command_line.extra:
            path = self.command_line.config_files[-1]['path']
            notes = [f'{path} holds a study: this is a single run; python study.py {path} runs all']
        if not self.run.eval_only:
            for component in self.run.components():
                notes += sentences_of(component, 'notes', self.run)
        return notes

    def to_dict(self) -> dict:
        """All resolved options in one dict, as in the record."""
        architecture = self.architecture
        start = {'arch_preset': architecture.preset, **architecture.start.named()}
        return {**self.run.to_dict(), **start, **architecture.to_dict()}

    def resolve(
        self,
        device: torch.device,
        dtype: str,
        dataset: TokenDataset | None,
        micro_batch: tuple[int, str] | None = None,
        memory: float | None = None,
    ) -> 'Settings':
        """Derive the values that depend on the device and the data.

        micro_batch: the value to derive for batch_size on CUDA, and the reason; `planning.
        micro_batch.resolve` gives it. memory: bytes of the device; None: unknown. Without a
        dataset, vocab_size may remain None. Raises UserError if it is too small, or if an option
        contradicts the derived dtype.
        """
        run, architecture = self.run, self.architecture
        derivation = Derivation(run, device, self.ranks)
        derive = derivation.derive
        # From the options and the device.
        derive('eval_interval', *eval_interval_of(run))
        derivation.derive_batch(architecture.block_size, micro_batch)
        for component in run.components():
            for key, (value, why) in derived_values_of(component, run).items():
                derive(key, value, why)
        derive('device', str(device), 'planned' if self.plan.plan else 'best available')
        derive('dtype', dtype, f'supported by this {device.type}')
        # On a CPU, it would take cores and memory from the training.
        derive('async_save', device.type != 'cpu', f'for {device.type}')
        if run.wandb_log:
            derive('wandb_project', Path(run.dataset).name, "the dataset's name")
            derive('wandb_run_name', architecture.name, "the architecture's name")
        # From the data.
        check_token_count(derivation.values, architecture)
        if dataset is not None:
            architecture = with_vocabulary(architecture, dataset, run.dataset, derivation.shown)
            architecture = with_end_of_text(architecture, dataset, run.dataset)
        check_calls(architecture)
        if not run.eval_only and (
            problems := architecture.sentences('dtype_problems', derivation.values['dtype'])
        ):
            raise UserError(*problems)
        # A planned device is not here, and compiles.
        architecture = (
            architecture.for_device(device.type)
            if self.plan.plan
            else with_backend_of(device, architecture)
        )
        # From all of these.
        derivation.derive_compile(architecture, has_data=dataset is not None)
        derivation.derive_fsdp(architecture, memory)
        for key, value in architecture.to_dict().items():
            _, _, why = architecture.origins[key].partition('derived: ')
            if why:
                derivation.shown[key] = f'{value} ({why})'
        return replace(
            self,
            run=TrainingConfig(derivation.values, derivation.origins, run.dropped),
            architecture=architecture,
            derived=derivation.shown,
        )

    def explain(self) -> str:
        """Each resolved value with its origin, for `--print_config`."""
        run = self.run.to_dict()
        groups = {
            title: {key: run[key] for key in options if key in run}
            for title, options in run_schema().items()
        }
        groups['Architecture ' + self.architecture.name] = {
            **self.architecture.start.named(),
            **self.architecture.to_dict(),
        }
        origins = {**self.run.origins, **self.architecture.origins}
        notes = self.run.dropped + self.architecture.dropped
        return format_config(groups, origins, notes, self.architecture.layer_lines())


# --------------------------------------------------------------------------------------------------
# Derived values


class Derivation:
    """Derives the options of a run that are not set."""

    def __init__(self, run: TrainingConfig, device: torch.device, ranks: int):
        self.values, self.origins = run.to_dict(), dict(run.origins)
        self.shown: dict[str, str] = {}  # key -> value and reason
        self.device, self.ranks = device.type, ranks

    def derive(self, key: str, value: Any, why: str) -> None:
        """Set the option, if it is in use and not set."""
        if key not in self.values or self.values[key] not in (None, 'auto'):
            return
        form = {int: ',', float: 'g'}.get(type(value), '')
        self.shown[key] = f'{value:{form}} ({why})'
        self.values[key], self.origins[key] = value, f'derived: {why}'

    def derive_batch(self, block_size: int, micro_batch: tuple[int, str] | None) -> None:
        """Derive the sizes of micro-batch, iteration and evaluation from the kind of device."""
        on_cpu, why = self.device == 'cpu', f'for {self.device}'
        batch_size, sequences = CPU_SEQUENCES if on_cpu else ACCELERATOR_SEQUENCES
        why_this_size = why
        if self.device == 'cuda' and self.values['gradient_accumulation_steps'] is None:
            sequences = sequences_per_iter(self.ranks)
            sizes = [size for size in divisors(sequences // self.ranks) if size <= batch_size]
            batch_size, why_this_size = micro_batch or (sizes[-1], why)
        self.derive('batch_size', batch_size, why_this_size)
        accumulation = max(1, round(sequences / self.values['batch_size']))
        accumulation = -(-accumulation // self.ranks) * self.ranks
        shared = f', a multiple of {self.ranks} ranks' if self.ranks > 1 else ''
        self.derive('gradient_accumulation_steps', accumulation, f'{why}{shared}')
        windows = max(8, CPU_EVAL_TOKENS // block_size) if on_cpu else ACCELERATOR_EVAL_ITERS
        tokens = f': {CPU_EVAL_TOKENS:,} tokens, or 8 windows' if on_cpu else ''
        self.derive('eval_iters', windows, f'{why}{tokens}')

    def derive_compile(self, architecture: ModelArchitectureConfig, has_data: bool) -> None:
        """Compile on a CPU or a CUDA GPU if the run is long enough.

        Without data this is unknown; for a GPU, the vocabulary size is assumed then.
        """
        least = {'cpu': CPU_COMPILE_FLOPS, 'cuda': CUDA_COMPILE_FLOPS}.get(self.device)
        if least is None:
            # Inductor's backend for MPS is a prototype.
            self.derive('compile', False, f'for {self.device}')
        elif self.values['compile'] is None and (has_data or self.device == 'cuda'):
            flops = flops_of_run(self.values, architecture) / self.ranks
            why = f'worthwhile from about {least:.0e} FLOPs, and this run has'
            each = ' on each rank' if self.ranks > 1 else ''
            self.derive('compile', flops >= least, f'for {self.device}: {why} {flops:.2g}{each}')

    def derive_fsdp(self, architecture: ModelArchitectureConfig, memory: float | None) -> None:
        """Derive FSDP's options (unknown without a vocabulary). Raises UserError."""
        if self.values['use_fsdp'] and architecture.vocab_size is not None:
            elements = sum(p.numel() for p in build_model(architecture).parameters())
            options = derived_fsdp_options(self.values, self.device, self.ranks, elements, memory)
            for key, (value, why) in options.items():
                self.derive(key, value, why)


def divisors(number: int) -> list[int]:
    """All divisors, from 1 to the number itself."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def sequences_per_iter(ranks: int) -> int:
    """The sequences of an iteration on GPUs, equally many on each rank.

    If the ranks do not divide them, whole micro-batches are added.
    """
    batch_size, sequences = ACCELERATOR_SEQUENCES
    if sequences % ranks == 0:
        return sequences
    return batch_size * -(-sequences // (batch_size * ranks)) * ranks


def check_token_count(run: dict, architecture: ModelArchitectureConfig) -> None:
    """Raise UserError if the run has more tokens than can be counted exactly."""
    keys = ('max_iters', 'gradient_accumulation_steps', 'batch_size')
    tokens = math.prod(run[key] for key in keys) * architecture.block_size
    if tokens > 2**53:
        factors = ' × '.join(f'{key}={run[key]:,}' for key in keys)
        raise UserError(
            f'{factors} × block_size={architecture.block_size:,} are {tokens:.3g} tokens in total; '
            'the maximum is 2**53 (9e15). Reduce one of them.'
        )


def eval_interval_of(run: TrainingConfig) -> tuple[int, str]:
    """The derived value of eval_interval, and the reason."""
    least, most = EVAL_INTERVALS
    interval = min(most, max(least, run.max_iters // EVALUATIONS))
    if run.sample_interval % interval != 0:
        return run.sample_interval, 'sample_interval, since samples are written at evaluations'
    return interval, f'max_iters / {EVALUATIONS}, from {least} to {most}'


def flops_of_run(run: dict, architecture: ModelArchitectureConfig) -> float:
    """Training FLOPs of all ranks, from the resolved options."""
    if run['eval_only']:
        return 0.0
    sequences = run['batch_size'] * run['gradient_accumulation_steps'] * run['max_iters']
    per_token = sum(flops_by_part(build_model(complete(architecture)), causal=False).values())
    return sequences * architecture.block_size * per_token


def run_schema() -> Schema:
    """The training options by group, including those of optimizers and schedules."""
    return {title: with_component_options(options) for title, options in OPTION_GROUPS.items()}


def schema() -> Schema:
    """All options of a run by group, including those that a config file registered."""
    return {**run_schema(), **PLAN_GROUP, **architecture_schema()}


def load_settings(command_line: CommandLine) -> Settings:
    """Merge defaults < preset < config file < command line. UserError lists every problem."""
    problems = list(command_line.problems)
    run = TrainingConfig(*merge(flatten(OPTION_GROUPS), command_line.layers, problems))
    plan = FrozenConfig(*merge(flatten(PLAN_GROUP), command_line.layers, problems))
    ranks = plan.world_size if plan.plan else world_size()
    architecture = ModelArchitectureConfig.resolve(command_line.layers, problems)
    problems += [*run_problems(run, plan, ranks), *device_problems(run, plan, architecture)]
    if problems:
        raise UserError(*problems)
    return Settings(run, architecture, command_line, plan, ranks)


def device_problems(
    run: TrainingConfig, plan: FrozenConfig, architecture: ModelArchitectureConfig
) -> list[str]:
    """Reasons why the chosen components cannot train on the device, a sentence each."""
    if run.eval_only and not run.diagnostics:
        return []
    on_cuda = plan.plan and (plan.gpu is not None or run.device.startswith('cuda'))
    try:
        device = 'cuda' if on_cuda else select_device(run.device).type
    except UserError:  # reported among the run's problems
        return []
    return architecture.for_device(device).sentences('training_problems', device)


def run_problems(run: TrainingConfig, plan: FrozenConfig, ranks: int) -> list[str]:
    """Problems of combinations of training options, a sentence each."""
    problems = [] if plan.plan else problems_here(run)
    for component in run.components():
        problems += sentences_of(component, 'problems', run)
    return [*problems, *rank_problems(run, ranks), *option_problems(run)]


def problems_here(run: TrainingConfig) -> list[str]:
    """Problems of the device, the dataset and the trackers, which a plan does not use."""
    problems: list[str] = []
    checks = partial(select_device, run.device), partial(is_prepared, run.dataset)
    for check in (*checks, partial(trackers.check_packages, run)):
        try:
            check()
        except UserError as error:
            problems += error.problems
    return problems


def rank_problems(run: TrainingConfig, ranks: int) -> Iterator[str]:
    """Problems of the division of the run between ranks."""
    if run.use_fsdp and run.use_zero1:
        yield (
            'use_fsdp=True and use_zero1=True: FSDP shards the optimizer state already. Remove '
            'one of them.'
        )
    size, accumulation = run.get('fsdp_shard_size'), run.gradient_accumulation_steps
    if size is not None and ranks % size != 0:
        yield f'fsdp_shard_size={size} does not divide the {ranks} ranks. Set a divisor.'
    if accumulation is not None and accumulation % ranks != 0:
        yield (
            f'gradient_accumulation_steps={accumulation} counts the micro-batches of all '
            f'{ranks} ranks and must be a multiple of that. Set for example '
            f'--gradient_accumulation_steps={-(-accumulation // ranks) * ranks}.'
        )


def option_problems(run: TrainingConfig) -> Iterator[str]:
    """Problems of sample_interval and resume_run."""
    every, interval = run.sample_interval, run.eval_interval
    if interval is not None and every % interval != 0:
        nearest = -(-every // interval) * interval
        yield (
            f'sample_interval={every} must be a multiple of eval_interval={interval}, since '
            f'samples are written at evaluations. Set for example --sample_interval={nearest}.'
        )
    if run.resume_run is not None and run.init_from not in ('resume', 'auto'):
        yield (
            f'resume_run={run.resume_run!r} has no effect with init_from={run.init_from}. Add '
            f'--init_from=resume, or remove resume_run.'
        )
