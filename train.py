"""Train a transformer and record everything in a run folder.

    python train.py config/arch_llama.py --max_iters=100
    python train.py config/arch_gpt2.py --position_encoding=rope --max_iters=100
    python train.py config/arch_llama.py --init_from=resume

Config files set the same options; the command line overrides them.
"""

import math
import os
import sys
import time
from collections.abc import Iterable
from typing import Any

import common.first_import  # noqa: F401

import torch

import interop
from common import hardware, live_region
from common.console_output import write_text
from common.environment import check_no_torchrun
from common.errors import UserError, run_script, translated_errors
from components.weight_initialization import name_seed
from configurator import PYTHON_CALL, CommandLine, Layer, read_command_line, validate_layer
from data.dataset import is_prepared, load_dataset, prepare_if_missing
from optim.schedules import learning_rate_at
from parallel import sharded_state
from parallel.choice import choose_strategy
from planning import micro_batch
from planning.plan import plan_run
from planning.report import plan_report
from records.record_types import EvaluationEntry
from studies.keys import STUDY_KEYS
from training import iteration_log, stability
from training.checkpoint import list_checkpoints
from training.command_help import training_help
from training.component_reference import list_components
from training.load import LoadedRun, PathLike, paths_of
from training.memory_check import check_training_size, user_friendly_errors
from training.resume import find_resume_source
from training.session import RunContext, Session
from training.setup import InitSource, set_up
from training.signals import interrupt_at_once
from training_config import Settings, load_settings, schema


def main(argv: list[str]) -> int:
    """`python train.py`: print what the options ask for, or train. Returns the exit code."""
    # Texts about the options.
    command_line = read_command_line(argv, schema, extra=STUDY_KEYS)
    if command_line.help is not None and not command_line.problems:
        write_text(training_help(__doc__).page(command_line.help))
        return 0
    if command_line.list_components and not command_line.problems:
        write_text(list_components(command_line.list_format))
        return 0

    # Texts about this run.
    settings, init_source = read_settings(command_line)
    if settings.plan.plan:
        write_text(plan_report(plan_run(settings)))
        return 0
    if command_line.print_config:
        write_text(explain_settings(settings))
        return 0

    # The run.
    session = start_session(settings, init_source, argv)
    exit_code = run_training(session)
    session.parallel.close()
    return exit_code


def train(config: PathLike | Iterable[PathLike] = (), **options: Any) -> LoadedRun:
    """Train a run from Python, with the options of the command line.

        run = train('config/arch_llama.py', max_iters=100, learning_rate=1e-3)

    config: a config file, or several of rising precedence. options: values that take precedence
    over the files, of the types that the options have in a config file.

    Returns the run, with the weights at its end, on the device that it was trained on; see
    `training.load.LoadedRun`. Raises UserError for a user's mistake, and KeyboardInterrupt if the
    run is interrupted: the first Ctrl-C (the stop button of a notebook) saves a checkpoint and
    stops, a second one stops at once. `init_from='resume'` then continues the run. SIGTERM saves
    a checkpoint, and then ends the process as it would without a run. Outside the main thread,
    signals are left alone. The random state of torch is overwritten.
    """
    check_no_torchrun('train()')
    with live_region.closed_at_end(), translated_errors():
        files = paths_of(config)
        command_line = read_python_call(files, options)
        settings, init_source = read_settings(command_line)
        if settings.plan.plan:
            raise UserError('plan=True: train() only trains. Plan with python train.py --plan.')
        argv = [*files, *(f'--{key}={value}' for key, value in options.items())]
        session = start_session(settings, init_source, argv)
        session.signals.on_second_stop = interrupt_at_once
        run_training(session)
    folder, iter = session.logger.run_folder, session.progress.iter
    session.signals.redeliver(f'stopped after {iter:,} iterations; the run is in {folder}')
    session.model.zero_grad(set_to_none=True)
    return LoadedRun(
        folder, session.checkpoint_index(), session.raw_model, session.settings.run.dtype
    )


# --------------------------------------------------------------------------------------------------
# Settings


def read_python_call(config_files: list[str], options: dict[str, Any]) -> CommandLine:
    """The files and options of `train()`, as `read_command_line` returns those of a shell.

    A path may be a `pathlib.Path`.
    """
    command_line = read_command_line(config_files, schema, extra=STUDY_KEYS)
    values = {
        key: os.fspath(value) if isinstance(value, os.PathLike) else value
        for key, value in options.items()
    }
    layer = validate_layer(Layer(PYTHON_CALL, values), schema(), command_line.problems)
    command_line.layers.append(layer)
    return command_line


def read_settings(command_line: CommandLine) -> tuple[Settings, InitSource | None]:
    """The merged settings, and the run or the pretrained weights that training starts from."""
    init_source = find_resume_source(command_line) or interop.find_pretrained(command_line)
    return load_settings(command_line), init_source


def explain_settings(settings: Settings) -> str:
    """Each resolved value and its origin; without prepared data, vocab_size stays open."""
    run = settings.run
    device = hardware.select_device(run.device)
    dtype = hardware.resolve_dtype(run.dtype, device)
    data = run.dataset, settings.architecture.block_size
    dataset = load_dataset(*data) if is_prepared(run.dataset) else None
    memory = micro_batch.device_memory(device)
    return micro_batch.resolve(settings, device, dtype, dataset, memory).explain()


# --------------------------------------------------------------------------------------------------
# Set-up


def start_session(settings: Settings, init_source: InitSource | None, argv: list[str]) -> Session:
    """Prepare the device, the processes and the data, and set up the run."""
    # The device.
    device = hardware.select_device(settings.run.device)
    hardware.tune(device, settings.run.deterministic)
    dtype = hardware.resolve_dtype(settings.run.dtype, device)

    # The processes and the data; with these every option has its value.
    parallel = choose_strategy(settings.run, device)
    prepare_if_missing(settings.run.dataset)
    dataset = load_dataset(settings.run.dataset, settings.architecture.block_size)
    dataset.verify_checksums(full=settings.run.verify_data, from_main=parallel.broadcast_from_main)
    memory = micro_batch.device_memory(device)
    if memory is not None:  # the smallest of the ranks
        (negated,) = parallel.all_reduce_max([-float(memory)])
        memory = int(-negated)
    settings = micro_batch.resolve(settings, device, dtype, dataset, memory)
    parallel.run = settings.run
    if init_source:
        init_source.check(settings)

    # The model, the optimizer and the record.
    context = RunContext(
        settings=settings, parallel=parallel, device=device, dataset=dataset, argv=argv
    )
    with user_friendly_errors(settings, parallel, device):
        check_training_size(settings, parallel, device)
        return set_up(context, init_source)


# --------------------------------------------------------------------------------------------------
# The run


def run_training(session: Session) -> int:
    """Train to the end, and close the record even if training fails. Returns the exit code."""
    with session.signals:  # also after the loop: torchrun stops the other ranks when one fails
        try:
            errors = user_friendly_errors(session.settings, session.parallel, session.device)
            with errors, session.profiler:
                training_loop(session)
                session.checkpoints.finish()
        except BaseException as error:
            iteration_log.record_last(session)
            session.checkpoints.abort()
            session.logger.finish('failed', reason=str(error) or type(error).__name__)
            raise
        finally:
            session.batch_reader.close()
        exit_code = session.signals.exit_code
        session.logger.finish('interrupted' if exit_code else 'finished')
    return exit_code


def training_loop(session: Session) -> None:
    """`max_iters` iterations, with evaluations before the first, at intervals and at the end."""
    if session.settings.run.eval_only:
        evaluate(session)
        return
    hardware.reset_peak_memory(session.device)
    clock = hardware.StepClock(session.device)
    signals, checkpoints = session.signals, session.checkpoints
    while True:
        # Share the signals that any rank has received.
        signals.sync(session.parallel, checkpoints.writing)
        # Publish the pending checkpoint once every rank has written its part.
        if checkpoints.in_progress and not signals.checkpoint_writing:
            with clock.paused():
                checkpoints.publish()
        # Evaluate and save, if that is due or a signal requests it.
        iter = session.progress.iter
        evaluation_due = session.evaluation_due(iter) and session.progress.evaluated_at != iter
        if evaluation_due or signals.pending:
            with clock.paused():
                evaluate_and_checkpoint(session, evaluation_due)
            if signals.stop_signal:
                return
        # Train one iteration. A rollback may have lowered the iteration number.
        if session.progress.iter >= session.settings.run.max_iters:
            return
        with session.profiler.iteration(session.progress.iter, clock):
            run_iteration(session, clock)


def evaluate_and_checkpoint(session: Session, evaluation_due: bool) -> None:
    """Evaluate if due; save if the loss improved or if an option or a signal requests it."""
    if iteration_log.flush(session):  # the run went back to a checkpoint
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
    # Keep a copy of the weights, if the next evaluation reports the size of this update.
    if run.diagnostics and session.evaluation_due(progress.iter + 1):
        session.metrics.update_ratio.begin()
    # Forward and backward; the last backward pass sums the gradients over all ranks.
    loss = session.parallel.all_reduce_sum(forward_backward(session))
    # Measure and clip the gradient, and update the weights.
    sums = optimizer.step(learning_rate, loss, measured=is_logged)
    session.metrics.counts.pass_on(session.raw_model.blocks, session.parallel, optimizer.nonfinite)
    session.metrics.update_ratio.end()
    # Count.
    progress.iter += 1
    progress.tokens += session.tokens_per_iter
    clock.steps += 1
    # Log.
    measured = None
    if is_logged:
        measured = iteration_log.measure(session, clock, learning_rate, loss, sums)
    iteration_log.record_due(session, clock, measured)


def forward_backward(session: Session) -> torch.Tensor:
    """Accumulate the gradients of this rank's micro-batches. Returns its part of the mean loss."""
    run, progress, model = session.settings.run, session.progress, session.model
    micro_steps, ranks = run.gradient_accumulation_steps, session.parallel.world_size
    model.train()
    loss = torch.zeros((), device=session.device)
    for micro_step in range(session.parallel.rank, micro_steps, ranks):
        # Read the micro-batch, by its number in the whole run.
        number = (progress.iter + progress.data_shift) * micro_steps + micro_step
        batch = session.training_batch(number)
        # Seed dropout for each micro-batch, so that checkpoints need no random state.
        torch.manual_seed(name_seed(run.seed, f'dropout/{number}'))
        with session.parallel.micro_step(model, last=micro_step + ranks >= micro_steps):
            with session.autocast():
                loss_sum, _, aux = model(*batch)
            share = loss_sum / session.tokens_per_iter
            session.optimizer.backward(share + aux.loss / micro_steps)
        loss += share.detach()
        session.metrics.aux.add(aux.metrics)
        session.metrics.counts.add(aux.counts)
    return loss


# --------------------------------------------------------------------------------------------------
# Between iterations


@torch.no_grad()
def evaluate(session: Session) -> bool:
    """Measure the loss on the fixed windows of both splits. Returns whether it is the best."""
    run, progress = session.settings.run, session.progress
    began = time.perf_counter()
    session.model.eval()
    losses = {split: session.mean_loss(split) for split in ('train', 'val')}
    bytes_per_token = session.dataset.bytes_per_token('val')
    entry: EvaluationEntry = {
        'iter': progress.iter,
        'train_loss': losses['train'],
        'val_loss': losses['val'],
        'val_bits_per_byte': bytes_per_token and losses['val'] / math.log(2) / bytes_per_token,
        'lr': learning_rate_at(progress.iter, run),
        'data_hash': session.sync_data_hash() if progress.iter else None,
        **session.data_seen(),
        'time_ms': None,  # set below
    }
    # Add diagnostics and a sample, if requested.
    if run.diagnostics:
        entry['diagnostics'] = session.measure_diagnostics()
    entry['time_ms'] = (time.perf_counter() - began) * 1e3
    if session.sample_due(progress.iter):
        entry['sample'] = session.write_sample()
    session.logger.evaluation(entry)
    return progress.note_evaluation(losses['val'])


def save(session: Session) -> None:
    """Save a checkpoint, after the previous one is published. Raises UserError for weights that
    are not finite."""
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
