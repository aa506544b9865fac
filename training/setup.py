"""Set up a run: build the model and the optimizer, restore the weights, start the record."""

from pathlib import Path
from typing import Protocol

import torch

from common import hardware
from common.console_output import write_progress, yellow
from inference.sampling import PeriodicSample
from model_builder import Transformer, parameter_groups, training_flops
from optim.step import GuardedOptimizer
from parallel.strategies import SingleProcess, recomputed_blocks
from records.record_types import RecordHeader, WeightsSource
from records.run_folders import new_run_folder
from records.trackers import enabled_trackers
from training import start_checks
from training.checkpoint_writer import CheckpointManager
from training.diagnostics import UpdateRatio
from training.load import copy_tokenizer_file
from training.metrics import RunMetrics
from training.pending_log import PendingLog
from training.profiler import IterationProfiler
from training.record_header import record_header, run_environment
from training.resume import TrainingProgress, restart_notes
from training.session import RunContext, Session
from training.signals import SignalHandler
from training_config import Settings, TrainingConfig
from training_logger import TrainingLogger


class InitSource(Protocol):
    """Where the first weights come from: a run to resume, or a pretrained model."""

    @property
    def run_folder(self) -> Path | None:
        """The run to continue; None: a new run."""

    @property
    def weights_from(self) -> WeightsSource | None:
        """The pretrained model, for the record."""

    def check(self, settings: Settings) -> None:
        """Raise UserError if the settings contradict the source."""

    def restore(
        self, parallel: SingleProcess, model: Transformer, optimizer: GuardedOptimizer
    ) -> TrainingProgress:
        """Load the weights, and of a run also the optimizer state and the progress."""

    def report(self, logger: TrainingLogger, header: RecordHeader, environment: dict) -> None:
        """Start or continue the record."""


def set_up(context: RunContext, init_source: InitSource | None) -> Session:
    """Build everything that the training loop needs, and start or continue the record."""
    settings, parallel, device = context.settings, context.parallel, context.device
    run, architecture, dataset = settings.run, settings.architecture, context.dataset
    sample_writer = PeriodicSample.from_options(run, dataset)
    peak = parallel.broadcast_from_main(
        lambda: hardware.peak_flops(device, run.dtype, run.peak_tflops)
    )

    # Build the model (recomputed, compiled and wrapped as configured) and the optimizer.
    compiled = can_compile(run, device, parallel)
    recomputed = recomputed_blocks(run.activation_checkpointing, architecture.n_layer)
    raw_model, model = parallel.build(architecture, recomputed, compiled)
    groups, flops = parameter_groups(raw_model), training_flops(raw_model, recomputed)
    optimizer = GuardedOptimizer(parallel.build_optimizer(groups, run), run, device, parallel)

    # Load a checkpoint, or pretrained weights.
    progress = TrainingProgress()
    if init_source:
        progress = init_source.restore(parallel, raw_model, optimizer)
    # Check that the model is causal.
    model_notes = start_checks.check_model(raw_model, device, run.dtype, parallel.converts)
    model_notes += component_notes(settings, device)

    # Start or continue the record.
    logger = open_record(context, init_source)
    parallel.trace_collectives(logger.run_folder)
    header = record_header(
        context,
        model=raw_model,
        optimizer=optimizer.inner,
        flops=flops,
        peak=peak,
        compiled=compiled,
        weights_from=parallel.broadcast_from_main(lambda: init_source and init_source.weights_from),
    )
    environment = run_environment(header)
    if parallel.is_main:
        copy_tokenizer_file(dataset, logger.run_folder)
    if init_source:
        init_source.report(logger, header, environment)
    else:
        logger.start(**header)
    for note in [*dataset.notes, *settings.notes, *restart_notes(run), *model_notes]:
        logger.event('note', None, note)
    return Session(
        **vars(context),
        raw_model=raw_model,
        model=model,
        optimizer=optimizer,
        progress=progress,
        logger=logger,
        checkpoints=CheckpointManager(run, device, parallel, logger),
        signals=SignalHandler(verbose=parallel.is_main),
        metrics=RunMetrics(flops, peak, UpdateRatio(groups, parallel)),
        pending_log=PendingLog(device),
        profiler=IterationProfiler(run.profile if parallel.is_main else 0, device, logger),
        sample_writer=sample_writer,
        environment=environment,
    )


def component_notes(settings: Settings, device: torch.device) -> list[str]:
    """Notes of the chosen components on training on this device."""
    run, architecture = settings.run, settings.architecture
    if run.eval_only:
        return []
    return architecture.sentences('training_notes', device, run.dtype)


def can_compile(run: TrainingConfig, device: torch.device, parallel: SingleProcess) -> bool:
    """Whether to compile the blocks. Prints a warning if `compile` is set and not possible."""
    if not run.compile:
        return False
    if problem := hardware.compile_problem(device):
        if parallel.is_main:
            write_progress(
                f'{yellow("warning:")} compile is off, since {problem}. '
                '--compile=False silences this.'
            )
        return False
    # Models that were compiled before in this process count toward dynamo's recompilation limit.
    torch.compiler.reset()
    return True


def open_record(context: RunContext, init_source: InitSource | None) -> TrainingLogger:
    """The logger of the run that is resumed, or of a new run."""
    run, parallel = context.settings.run, context.parallel
    return TrainingLogger(
        parallel.broadcast_from_main(
            lambda: (init_source and init_source.run_folder) or new_run_folder(run.out_dir)
        ),
        is_main=parallel.is_main,
        style=run.log_style,
        max_iters=run.max_iters,
        trackers=enabled_trackers(run),
    )
