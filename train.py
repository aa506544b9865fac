"""Train a transformer from a config file: settings, set-up, loop, finish.

    python train.py config/arch_llama.py --max_iters=100
    python train.py config/arch_gpt2.py --position_encoding=rope --max_iters=100
    python train.py config/arch_llama.py --init_from=resume

Every option below is also a key of a config file; the command line wins over the file, the file
over the preset. --help with a file lists what it registers too. --list_components tells what each
component is, and its source. --print_config shows each resolved value and where it came from.
"""

import math
import sys
import time

import common.first_import  # noqa: F401

import torch

import interop
from common import hardware
from common.console_output import write_progress, write_text
from common.errors import run_script
from components.weight_initialization import name_seed
from configurator import format_help, read_command_line
from data.dataset import is_prepared, load_dataset, prepare_if_missing
from inference.sampling import PeriodicSample
from model_builder import parameter_groups, training_flops
from optim.schedules import learning_rate_at
from optim.step import GradientSums, GuardedOptimizer
from parallel import sharded_state
from parallel.strategies import SingleProcess, choose_strategy, recomputed_blocks
from planning.plan import plan_run
from planning.report import plan_report
from records.record_types import EvaluationEntry
from records.run_folders import new_run_folder
from records.trackers import enabled_trackers
from studies.grid import STUDY_KEYS
from training import stability, start_checks
from training.checkpoint import list_checkpoints
from training.checkpoint_writer import CheckpointManager
from training.component_reference import list_components
from training.diagnostics import UpdateRatio
from training.load import copy_tokenizer_file
from training.memory_check import check_training_size, user_friendly_errors
from training.metrics import RunMetrics
from training.record_header import record_header, run_environment
from training.resume import ResumeSource, TrainingProgress, find_resume_source, restart_notes
from training.session import RunContext, Session
from training.signals import SignalHandler
from training_config import TrainingConfig, load_settings, schema
from training_logger import TrainingLogger

InitSource = ResumeSource | interop.PretrainedSource


def main(argv: list[str]) -> int:
    # What the command line asks for: a text about the options, or a run.
    command_line = read_command_line(argv, schema, extra=STUDY_KEYS)
    if command_line.help and not command_line.problems:
        write_text(format_help(__doc__, schema()))
        return 0
    if command_line.list_components and not command_line.problems:
        write_text(list_components(command_line.list_format))
        return 0

    # The settings, over those of a run to resume or of somebody's weights.
    init_source = find_resume_source(command_line) or interop.find_pretrained(command_line)
    settings = load_settings(command_line)
    if settings.plan.plan:
        write_text(plan_report(plan_run(settings)))
        return 0

    # The device.
    device = hardware.select_device(settings.run.device)
    hardware.tune(device, settings.run.deterministic)
    dtype = hardware.resolve_dtype(settings.run.dtype, device)
    data = settings.run.dataset, settings.architecture.block_size
    if command_line.print_config:
        dataset = load_dataset(*data) if is_prepared(settings.run.dataset) else None
        write_text(settings.resolve(device, dtype, dataset).explain())
        return 0

    # The processes and the data; with these every option has its value.
    parallel = choose_strategy(settings.run, device)
    prepare_if_missing(settings.run.dataset)
    dataset = load_dataset(*data)
    dataset.verify_checksums(full=settings.run.verify_data, from_main=parallel.broadcast_from_main)
    settings = settings.resolve(device, dtype, dataset)
    if init_source:
        init_source.check(settings)

    # The run.
    context = RunContext(
        settings=settings, parallel=parallel, device=device, dataset=dataset, argv=argv
    )
    with user_friendly_errors(settings, parallel, device):
        check_training_size(settings, parallel, device)
        session = set_up(context, init_source)
    exit_code = run_training(session)
    parallel.close()
    return exit_code


# --------------------------------------------------------------------------------------------------
# Set-up


def set_up(context: RunContext, init_source: InitSource | None) -> Session:
    """Build everything that the loop needs, and begin or continue the record."""
    settings, parallel, device = context.settings, context.parallel, context.device
    run, architecture, dataset = settings.run, settings.architecture, context.dataset
    sample_writer = PeriodicSample.from_options(run, dataset)
    peak = parallel.broadcast_from_main(
        lambda: hardware.peak_flops(device, run.dtype, run.peak_tflops)
    )

    # The model, as the strategy recomputes, compiles and wraps it, and its optimizer.
    compiled = can_compile(run, device, parallel)
    recomputed = recomputed_blocks(run.activation_checkpointing, architecture.n_layer)
    raw_model, model = parallel.build(architecture, recomputed, compiled)
    groups, flops = parameter_groups(raw_model), training_flops(raw_model, recomputed)
    optimizer = GuardedOptimizer(parallel.build_optimizer(groups, run), run, device, parallel)

    # The weights and the progress of a checkpoint, or the weights of somebody's model.
    progress = TrainingProgress()
    if init_source:
        progress = init_source.restore(parallel, raw_model, optimizer)
    model_notes = start_checks.check_model(raw_model, device, run.dtype)

    # The record, begun or continued.
    logger = open_record(context, init_source)
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
        sample_writer=sample_writer,
        environment=environment,
    )


def can_compile(run: TrainingConfig, device: torch.device, parallel: SingleProcess) -> bool:
    """Whether the blocks are compiled; a warning where it is asked for and cannot be."""
    if not run.compile or not (problem := hardware.compile_problem(device)):
        return bool(run.compile)
    if parallel.is_main:
        write_progress(f'warning: compile is off, since {problem}. --compile=False silences this.')
    return False


def open_record(context: RunContext, init_source: InitSource | None) -> TrainingLogger:
    """The logger of the run that is resumed, or of a new one."""
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


# --------------------------------------------------------------------------------------------------
# The run


def run_training(session: Session) -> int:
    """Train to the end, and close the record however it ends. Returns the exit code."""
    with session.signals:  # beyond the loop: torchrun asks the others to stop when one fails
        try:
            with user_friendly_errors(session.settings, session.parallel, session.device):
                train(session)
                session.checkpoints.finish()
        except BaseException as error:
            session.checkpoints.abort()
            session.logger.finish('failed', reason=str(error) or type(error).__name__)
            raise
        exit_code = session.signals.exit_code
        session.logger.finish('interrupted' if exit_code else 'finished')
    return exit_code


def train(session: Session) -> None:
    """`max_iters` iterations, with evaluations before the first, at intervals and at the end."""
    if session.settings.run.eval_only:
        evaluate(session)
        return
    hardware.reset_peak_memory(session.device)
    clock = hardware.StepClock(session.device)
    signals, checkpoints = session.signals, session.checkpoints
    while True:
        # Tell every rank which signals any of them has received.
        signals.sync(session.parallel, checkpoints.writing)
        # Publish the checkpoint that is being written, once every rank has written it.
        if checkpoints.in_progress and not signals.checkpoint_writing:
            with clock.paused():
                checkpoints.publish()
        # Evaluate and save, where that is due or a signal asks for it.
        iter = session.progress.iter
        evaluation_due = session.evaluation_due(iter) and session.progress.evaluated_at != iter
        if evaluation_due or signals.pending:
            with clock.paused():
                evaluate_and_checkpoint(session, evaluation_due)
            if signals.stop_signal:
                return
        # Train; after a rollback there is more to do again.
        if session.progress.iter >= session.settings.run.max_iters:
            return
        run_iteration(session, clock)


def evaluate_and_checkpoint(session: Session, evaluation_due: bool) -> None:
    """Evaluate if that is due, and save if the result, an option or a signal asks for it."""
    if stability.handle_nonfinite(session, int(session.optimizer.skipped.item())):
        return
    improved = evaluation_due and evaluate(session)
    always = evaluation_due and session.settings.run.always_save_checkpoint
    if (session.signals.pending or improved or always) and session.progress.iter > 0:
        save(session)


# --------------------------------------------------------------------------------------------------
# One iteration


def run_iteration(session: Session, clock: hardware.StepClock) -> None:
    """One update of the weights from sequences iter · G to (iter + 1) · G of the global order."""
    run, progress, optimizer = session.settings.run, session.progress, session.optimizer
    learning_rate = learning_rate_at(progress.iter, run)
    is_logged = progress.iter % run.log_interval == 0 or progress.iter == run.max_iters - 1
    # Remember the weights where the next evaluation tells how far they have moved.
    if run.diagnostics and session.evaluation_due(progress.iter + 1):
        session.metrics.update_ratio.begin()
    # Forward and backward; the gradients of all ranks are added up in the last backward pass.
    loss = session.parallel.all_reduce_sum(forward_backward(session))
    # Measure and clip the gradient, and update the weights.
    sums = optimizer.step(learning_rate, loss, measured=is_logged)
    session.metrics.update_ratio.end()
    # Count.
    progress.iter += 1
    progress.tokens += session.tokens_per_iter
    clock.steps += 1
    # Log.
    if is_logged:
        log_iteration(session, clock, learning_rate, loss, sums)


def forward_backward(session: Session) -> torch.Tensor:
    """Add up the gradients of this rank's micro-batches; its share of the iteration's mean loss."""
    run, progress, model = session.settings.run, session.progress, session.model
    micro_steps, ranks = run.gradient_accumulation_steps, session.parallel.world_size
    model.train()
    loss = torch.zeros((), device=session.device)
    for micro_step in range(session.parallel.rank, micro_steps, ranks):
        # The micro-batch's number over the whole run.
        number = (progress.iter + progress.data_shift) * micro_steps + micro_step
        batch = session.training_batch(number)
        # Dropout has a stream of its own at every micro-batch, so no random state is ever saved.
        torch.manual_seed(name_seed(run.seed, f'dropout/{number}'))
        with session.parallel.micro_step(model, last=micro_step + ranks >= micro_steps):
            with session.autocast():
                loss_sum, _, aux = model(*batch)
            share = loss_sum / session.tokens_per_iter
            session.optimizer.backward(share + aux.loss / micro_steps)
        loss += share.detach()
        session.metrics.aux.add(aux.metrics)
    return loss


def log_iteration(
    session: Session,
    clock: hardware.StepClock,
    learning_rate: float,
    loss: torch.Tensor,
    sums: GradientSums,
) -> None:
    """Record the iteration just made. Reading what the device has measured is its one
    synchronization."""
    optimizer = session.optimizer
    # Everything measured on the device, to be read at once.
    aux = session.raw_model.summarize_metrics(session.metrics.aux.mean_and_reset(session.parallel))
    measured = torch.stack([loss, sums.norm, sums.total, optimizer.skipped, *aux.values()])
    # What is measured on the host comes first: there a rank that is lost is noticed.
    session.record_memory_footprint()
    memory = session.memory_usage()
    loss_value, norm, total, skipped, *aux_values = measured.tolist()
    seconds, steps = clock.take()
    iter, (tokens_per_second, mfu) = session.progress.iter - 1, session.throughput(seconds)
    session.logger.iteration(
        {
            'iter': iter,
            'loss': loss_value,
            'lr': learning_rate,
            'time_ms': seconds * 1e3,
            'steps': steps,
            'tokens_per_sec': tokens_per_second,
            **session.data_seen(),
            'mfu': mfu,
            'memory': memory,
            'gradients': optimizer.statistics(norm, total),
            'loss_scale': optimizer.loss_scale,
            'readings': dict(zip(aux, aux_values)),
        }
    )
    # What may have gone wrong.
    if stability.is_spike(loss_value, session.progress.recent_losses):
        session.logger.event('loss_spike', iter, f'loss {loss_value:.4f} is far above those before')
    stability.handle_nonfinite(session, int(skipped))
    hardware.reset_peak_memory(session.device)
    clock.restart()


# --------------------------------------------------------------------------------------------------
# Between iterations


@torch.no_grad()
def evaluate(session: Session) -> bool:
    """Measure the loss on the fixed windows of both splits; whether it is the best so far."""
    run, progress, model = session.settings.run, session.progress, session.model
    began = time.perf_counter()
    model.eval()
    # The mean loss of each split, over all ranks.
    losses = {}
    for split in ('train', 'val'):
        total = torch.zeros(2, device=session.device)  # summed loss, number of targets
        for batch in session.evaluation_batches(split):
            with session.autocast():
                loss_sum, count, _ = model(*batch)
            total += torch.stack([loss_sum, count.to(loss_sum.dtype)])
        loss_sum, count = session.parallel.all_reduce_sum(total).tolist()
        losses[split] = loss_sum / count
    bytes_per_token = session.dataset.bytes_per_token('val')
    entry: EvaluationEntry = {
        'iter': progress.iter,
        'train_loss': losses['train'],
        'val_loss': losses['val'],
        'val_bits_per_byte': bytes_per_token and losses['val'] / math.log(2) / bytes_per_token,
        'lr': learning_rate_at(progress.iter, run),
        'data_hash': session.sync_data_hash() if progress.iter else None,
        **session.data_seen(),
        'time_ms': None,  # until it is done
    }
    # What goes on inside the model, and what it writes, where that is asked for.
    if run.diagnostics:
        entry['diagnostics'] = session.measure_diagnostics()
    entry['time_ms'] = (time.perf_counter() - began) * 1e3
    if session.sample_due(progress.iter):
        entry['sample'] = session.write_sample()
    session.logger.evaluation(entry)
    return progress.note_evaluation(losses['val'])


def save(session: Session) -> None:
    """Save this moment, when the save before it is done. Nothing that is not finite is saved."""
    checkpoints, iter = session.checkpoints, session.progress.iter
    checkpoints.publish()
    began = time.perf_counter()
    if not session.optimizer.weights_are_finite():
        session.logger.event('nonfinite', iter, 'the weights are not all finite')
        raise stability.nonfinite_weights_error(iter, list_checkpoints(checkpoints.folder))
    session.sync_data_hash()
    state = sharded_state.collect(
        session.parallel, session.raw_model, session.optimizer, checkpoints.snapshot
    )
    checkpoints.begin(state, session.checkpoint_index(), began)


if __name__ == '__main__':
    run_script(main, sys.argv[1:])
