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
from functools import partial

import common.first_import  # noqa: F401

import torch

import interop
from common import hardware
from common.console_output import write_progress, write_text
from common.errors import run_script
from components.weight_initialization import name_seed
from configurator import format_components, format_help, read_command_line
from data.dataset import TokenDataset, is_prepared, load_dataset, prepare_if_missing
from inference.sampling import OwnSample
from model_builder import parameter_groups, training_flops
from optim.schedules import learning_rate_at
from optim.step import Updater
from parallel import sharded_state
from parallel.strategies import SingleProcess, choose_strategy, recomputed_blocks
from planning.plan import plan_run
from planning.report import plan_report
from records.run_folders import new_run_folder
from records.trackers import enabled_trackers
from studies.grid import STUDY_KEYS
from training import checkpointing, diagnostics, resumption, stability, start_checks
from training.checkpoint_writer import Saver
from training.record_header import record_header, surroundings
from training.session import Session
from training.signals import Interruption
from training_config import Settings, load_settings, schema
from training_logger import TrainingLogger


def main(argv: list[str]) -> int:
    asked = read_command_line(argv, schema, aside=STUDY_KEYS)
    if asked.help and not asked.problems:
        write_text(format_help(__doc__, schema()))
        return 0
    if asked.list_components and not asked.problems:
        write_text(format_components(schema()))
        return 0
    started_from = resumption.find(asked) or interop.find_pretrained(asked)
    settings = load_settings(asked)
    if settings.plan.plan:
        write_text(plan_report(plan_run(settings)))
        return 0
    device = hardware.select_device(settings.run.device)
    hardware.tune(device, settings.run.deterministic)
    dtype = hardware.resolve_dtype(settings.run.dtype, device)
    data = settings.run.dataset, settings.architecture.block_size
    if asked.print_config:
        dataset = load_dataset(*data) if is_prepared(settings.run.dataset) else None
        write_text(settings.complete(device, dtype, dataset).explain())
        return 0
    parallel = choose_strategy(settings.run, device)
    prepare_if_missing(settings.run.dataset)
    dataset = load_dataset(*data)
    dataset.check_content(full=settings.run.verify_data, from_main=parallel.from_main)
    settings = settings.complete(device, dtype, dataset)
    if started_from:
        started_from.check(settings)
    with stability.explained(settings, parallel, device):
        stability.check_training_size(settings, parallel, device)
        session = set_up(settings, parallel, device, dataset, started_from, argv)
    code = run(session)
    parallel.close()
    return code


# --------------------------------------------------------------------------------------------------
# Set-up


def set_up(
    settings: Settings,
    parallel: SingleProcess,
    device: torch.device,
    dataset: TokenDataset,
    started_from: resumption.Resumed | interop.PretrainedSource | None,
    argv: list[str],
) -> Session:
    """Build everything that the loop needs, and begin or continue the record."""
    options, architecture = settings.run, settings.architecture
    own_sample = OwnSample.of(options, dataset)
    peak = parallel.from_main(
        lambda: hardware.peak_flops(device, options.dtype, options.peak_tflops)
    )
    compiled = options.compile
    if compiled and (problem := hardware.compile_problem(device)):
        if parallel.is_main:
            write_progress(
                f'warning: compile is off, since {problem}. --compile=False silences this.'
            )
        compiled = False

    recomputed = recomputed_blocks(options.activation_checkpointing, architecture.n_layer)
    raw_model, model = parallel.build(architecture, recomputed, compiled)
    groups = parameter_groups(raw_model)
    flops = training_flops(raw_model, recomputed)
    updater = Updater(parallel.build_optimizer(groups, options), options, device, parallel)
    progress = (
        started_from.restore(parallel, raw_model, updater)
        if started_from
        else resumption.Progress()
    )
    checked = start_checks.check_model(raw_model, device, options.dtype)

    logger = TrainingLogger(
        parallel.from_main(
            lambda: (started_from and started_from.run_folder) or new_run_folder(options.out_dir)
        ),
        is_main=parallel.is_main,
        style=options.log_style,
        max_iters=options.max_iters,
        trackers=enabled_trackers(options),
    )
    weights_from = parallel.from_main(lambda: started_from and started_from.weights_from)
    header = record_header(
        settings,
        dataset,
        raw_model,
        updater.optimizer,
        flops,
        peak,
        device,
        parallel,
        compiled,
        argv,
        weights_from,
    )
    here = surroundings(header)
    if parallel.is_main:
        resumption.keep_tokenizer(dataset, logger.run_folder)
    if started_from:
        started_from.report(logger, header, here)
    else:
        logger.start(**header)
    for note in [*dataset.notes, *settings.notes, *resumption.notes(options), *checked]:
        logger.event('note', None, note)
    return Session(
        settings=settings,
        parallel=parallel,
        device=device,
        dataset=dataset,
        raw_model=raw_model,
        model=model,
        updater=updater,
        logger=logger,
        progress=progress,
        flops_per_token=flops,
        peak=peak,
        update_size=diagnostics.UpdateSize(groups, parallel),
        interruption=Interruption(speaks=parallel.is_main),
        saver=Saver(options, device, parallel, logger),
        own_sample=own_sample,
        surroundings=here,
    )


# --------------------------------------------------------------------------------------------------
# The run


def run(session: Session) -> int:
    """Train to the end, and close the record however it ends. Returns the exit code."""
    with session.interruption:  # beyond the loop: torchrun asks the others to stop when one fails
        try:
            with stability.explained(session.settings, session.parallel, session.device):
                train(session)
                session.saver.finish()
        except BaseException as error:
            session.saver.give_up()
            session.logger.finish('failed', reason=str(error) or type(error).__name__)
            raise
        stopped = session.interruption.exit_code
        session.logger.finish('interrupted' if stopped else 'finished')
    return stopped


def train(session: Session) -> None:
    """`max_iters` updates, with evaluations before the first, at intervals and after the last."""
    if session.settings.run.eval_only:
        evaluate(session)
        return
    hardware.reset_peak_memory(session.device)
    clock = hardware.StepClock(session.device)
    while True:
        done = session.progress.iter
        due = session.evaluation_due(done) and session.progress.evaluated_at != done
        session.interruption.agree(session.parallel, session.saver.writing)
        if session.saver.under_way and not session.interruption.writing:
            with clock.paused():
                session.saver.publish()
        if due or session.interruption.pending:
            with clock.paused():
                between_updates(session, due)
            if session.interruption.stop_signal:
                return
        if session.progress.iter >= session.settings.run.max_iters:
            return
        update(session, clock)


def between_updates(session: Session, due: bool) -> None:
    """Evaluate if it is `due`, and save if that, or somebody, asks for it."""
    options = session.settings.run
    if rolled_back(session, int(session.updater.skipped.item())):
        return
    improved = due and evaluate(session)
    wanted = session.interruption.pending or improved or (due and options.always_save_checkpoint)
    if wanted and session.progress.iter > 0:
        save(session)


def update(session: Session, clock: hardware.StepClock) -> None:
    """One update of the weights from sequences iter · G to (iter + 1) · G of the global order."""
    options, progress, model = session.settings.run, session.progress, session.model
    learning_rate = learning_rate_at(progress.iter, options)
    logged = progress.iter % options.log_interval == 0 or progress.iter == options.max_iters - 1
    if options.diagnostics and session.evaluation_due(progress.iter + 1):
        session.update_size.begin()
    micro_steps, ranks = options.gradient_accumulation_steps, session.parallel.world_size
    model.train()
    loss = torch.zeros((), device=session.device)
    for micro_step in range(session.parallel.rank, micro_steps, ranks):
        # The micro-batch's number over the whole run.
        number = (progress.iter + progress.data_shift) * micro_steps + micro_step
        batch = session.training_batch(number)
        # Dropout has a stream of its own at every micro-batch, so no random state is ever saved.
        torch.manual_seed(name_seed(options.seed, f'dropout/{number}'))
        with session.parallel.micro_step(model, last=micro_step + ranks >= micro_steps):
            with session.autocast():
                loss_sum, _, auxiliary = model(*batch)
            share = loss_sum / session.tokens_per_iter
            session.updater.backward(share + auxiliary.loss / micro_steps)
        loss += share.detach()
        session.readings.add(auxiliary.metrics)
    loss = session.parallel.sum(loss)
    sums = session.updater.update(learning_rate, loss, measured=logged)
    session.update_size.end()
    progress.iter += 1
    progress.tokens += session.tokens_per_iter
    clock.steps += 1
    if logged:
        readings = session.raw_model.summarize_metrics(session.readings.take(session.parallel))
        measured = [loss, sums.norm, sums.total, session.updater.skipped, *readings.values()]
        log_update(session, clock, learning_rate, torch.stack(measured), list(readings))


def log_update(
    session: Session,
    clock: hardware.StepClock,
    learning_rate: float,
    measured: torch.Tensor,
    readings: list[str],
) -> None:
    """Record the update just made. Reading `measured` is its one synchronisation.

    readings: the names of its last figures, which the components report.
    """
    session.record_held()
    memory = session.largest_memory()  # first: a rank that is lost is noticed on the host
    loss, norm, total, skipped, *values = measured.tolist()
    seconds, steps = clock.take()
    iter, tokens_per_second = session.progress.iter - 1, session.tokens_per_iter / seconds
    session.logger.iteration(
        {
            'iter': iter,
            'loss': loss,
            'lr': learning_rate,
            'time_ms': seconds * 1e3,
            'steps': steps,
            'tokens_per_sec': tokens_per_second,
            **session.seen(),
            'mfu': session.utilization(tokens_per_second),
            'memory': memory,
            'gradients': session.updater.statistics(norm, total),
            'loss_scale': session.updater.loss_scale,
            'readings': dict(zip(readings, values)),
        }
    )
    if stability.is_spike(loss, session.progress.recent_losses):
        session.logger.event('loss_spike', iter, f'loss {loss:.4f} is far above those before')
    rolled_back(session, int(skipped))
    hardware.reset_peak_memory(session.device)
    clock.restart()


def rolled_back(session: Session, skipped: int) -> bool:
    """Do as `on_nonfinite` says about updates that the device has skipped; whether it went back.

    Raises UserError if the run is to stop.
    """
    if not skipped:
        return False
    options, failed, folder = session.settings.run, session.progress, session.saver.folder
    session.updater.skipped.zero_()
    message = f'{skipped} update(s) skipped: loss or gradient not finite'
    session.logger.event('nonfinite', failed.iter - 1, message, count=skipped)
    if options.on_nonfinite == 'skip':
        return False
    session.saver.finish()
    tell = partial(session.logger.event, 'broken_checkpoint', failed.iter)
    found = checkpointing.newest(folder, tell) if options.on_nonfinite == 'rollback' else None
    if found is None or failed.rollbacks == stability.MAX_ROLLBACKS:
        raise stability.nonfinite_error(failed.iter, skipped, checkpointing.published(folder))
    checkpoint, state = found
    session.progress = resumption.restore(
        session.parallel, session.raw_model, session.updater, checkpoint, state
    )
    # Leave out the data between the checkpoint and here, or the same thing would happen again.
    left_out = failed.iter - checkpoint.iter
    session.progress.data_shift = failed.data_shift + left_out
    session.progress.rollbacks = failed.rollbacks + 1
    session.logger.rollback(
        checkpoint.iter,
        from_iter=failed.iter,
        checkpoint=str(checkpoint.path.relative_to(session.logger.run_folder)),
        message=f"went back from iter {failed.iter}, leaving out {left_out} updates' worth of data",
    )
    return True


@torch.no_grad()
def evaluate(session: Session) -> bool:
    """Measure the loss on the fixed windows of both splits; whether it is the best so far."""
    options, progress, model = session.settings.run, session.progress, session.model
    began = time.perf_counter()
    model.eval()
    losses = {}
    for split in ('train', 'val'):
        total = torch.zeros(2, device=session.device)  # summed loss, number of targets
        for batch in session.evaluation_batches(split):
            with session.autocast():
                loss_sum, count, _ = model(*batch)
            total += torch.stack([loss_sum, count.to(loss_sum.dtype)])
        loss_sum, count = session.parallel.sum(total).tolist()
        losses[split] = loss_sum / count
    bytes_per_token = session.dataset.bytes_per_token('val')
    entry = {
        'iter': progress.iter,
        'train_loss': losses['train'],
        'val_loss': losses['val'],
        'val_bits_per_byte': bytes_per_token and losses['val'] / math.log(2) / bytes_per_token,
        'lr': learning_rate_at(progress.iter, options),
        'data_hash': session.agree_on_data() if progress.iter else None,
        **session.seen(),
    }
    if options.diagnostics:
        first = next(session.evaluation_batches('val', divided=False))
        entry['diagnostics'] = {
            'layers': diagnostics.layer_statistics(
                session.raw_model, model, session.parallel, *first, session.autocast
            ),
            'update_to_weight': session.update_size.ratios or {},
            'val_loss_by_position': diagnostics.loss_by_position(
                model, session.parallel, session.evaluation_batches('val'), session.autocast
            ),
        }
    entry['time_ms'] = (time.perf_counter() - began) * 1e3
    if session.sample_due(progress.iter):
        entry['sample'] = session.write_sample()
    session.logger.evaluation(entry)
    return progress.note_evaluation(losses['val'])


def save(session: Session) -> None:
    """Save this moment, when the save before it is done. Nothing that is not finite is saved."""
    saver, progress = session.saver, session.progress
    saver.publish()
    began = time.perf_counter()
    if not session.updater.weights_are_finite():
        session.logger.event('nonfinite', progress.iter, 'the weights are not all finite')
        raise stability.nonfinite_weights_error(
            progress.iter, checkpointing.published(saver.folder)
        )
    session.agree_on_data()
    state = sharded_state.collect(session.parallel, session.raw_model, session.updater, saver.kept)
    saver.begin(state, session.checkpoint_index(), began)


if __name__ == '__main__':
    run_script(main, sys.argv[1:])
