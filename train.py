"""Train a transformer from a config file: settings, set-up, loop, finish.

    python train.py config/arch_llama.py --max_iters=100
    python train.py config/arch_gpt2.py --position_encoding=rope --max_iters=100
    python train.py config/arch_llama.py --init_from=resume

Every option below is also a key of a config file; the command line wins over the file, the file
over the preset. --help with a file lists what it registers too. --print_config shows each resolved
value and where it came from.
"""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch

import checkpointing
import hardware
import resumption
from configurator import format_help, read_command_line
from errors import run_script
from model_builder import build_model, name_seed, parameter_groups, training_flops
from optimization import Updater, build_optimizer, learning_rate_at
from parallelism import SingleProcess, choose_strategy
from startup import record_header
from token_data import TokenDataset, load_dataset, prepare_if_missing
from training_config import Settings, load_settings, schema
from training_logger import TrainingLogger, new_run_folder


def main(argv: list[str]) -> int:
    asked = read_command_line(argv, schema)
    if asked.help and not asked.problems:
        print(format_help(__doc__, schema()))
        return 0
    resumed = resumption.find(asked)
    settings = load_settings(asked)
    parallel = choose_strategy()
    device = hardware.select_device(settings.run.device)
    dtype = hardware.resolve_dtype(settings.run.dtype, device)
    if asked.print_config:
        print(settings.complete(device, dtype, dataset=None).explain())
        return 0
    prepare_if_missing(settings.run.dataset)
    dataset = load_dataset(settings.run.dataset, settings.architecture.block_size)
    settings = settings.complete(device, dtype, dataset)
    session = set_up(settings, parallel, device, dataset, resumed, argv)
    return run(session)


# --------------------------------------------------------------------------------------------------
# Set-up


@dataclass
class Session:
    """What a run consists of, once it is set up."""

    settings: Settings
    parallel: SingleProcess
    device: torch.device
    dataset: TokenDataset
    model: torch.nn.Module  # as it is called in training; its parameters are the bare model's
    updater: Updater
    logger: TrainingLogger
    progress: resumption.Progress
    flops_per_token: dict
    peak: hardware.Peak

    @property
    def tokens_per_iter(self) -> int:
        run, block_size = self.settings.run, self.settings.architecture.block_size
        return run.batch_size * run.gradient_accumulation_steps * block_size


def set_up(
    settings: Settings,
    parallel: SingleProcess,
    device: torch.device,
    dataset: TokenDataset,
    resumed: resumption.Resumed | None,
    argv: list[str],
) -> Session:
    """Build everything that the loop needs, and begin or continue the record."""
    run_options, architecture = settings.run, settings.architecture
    if resumed:
        resumed.check(settings)
    hardware.tune(device)
    peak = hardware.peak_flops(device, run_options.dtype, run_options.peak_tflops)
    compiled = run_options.compile
    if compiled and (problem := hardware.compile_problem(device)):
        print(f'warning: compile is off, since {problem}. --compile=False silences this.')
        compiled = False

    bare = build_model(architecture, device, run_options.seed)
    groups = parameter_groups(bare)
    flops = training_flops(bare)
    updater = Updater(build_optimizer(groups, run_options), run_options, device)
    if resumed:
        resumed.restore(bare, updater)
    model = parallel.wrap(bare, compiled)

    logger = TrainingLogger(
        resumed.run_folder if resumed else new_run_folder(run_options.out_dir),
        is_main=parallel.is_main,
        style=run_options.log_style,
        max_iters=run_options.max_iters,
    )
    header = record_header(
        settings, dataset, bare, groups, flops, peak, device, parallel, compiled, argv
    )
    if resumed:
        resumed.report(logger, header)
        progress = resumed.progress
    else:
        logger.start(**header)
        progress = resumption.Progress()
    return Session(
        settings, parallel, device, dataset, model, updater, logger, progress, flops, peak
    )


# --------------------------------------------------------------------------------------------------
# The run


def run(session: Session) -> int:
    """Train to the end, and close the record however it ends."""
    try:
        train(session)
    except KeyboardInterrupt:
        session.logger.finish('interrupted')
        raise
    except BaseException:
        session.logger.finish('failed')
        raise
    session.logger.finish('finished')
    return 0


def train(session: Session) -> None:
    """`max_iters` updates, with evaluations before the first, at intervals and after the last."""
    options, progress, clock = session.settings.run, session.progress, StepClock(session.device)
    if options.eval_only:
        evaluate(session)
        return
    hardware.reset_peak_memory(session.device)
    while True:
        due = progress.iter % options.eval_interval == 0 or progress.iter == options.max_iters
        if due and progress.evaluated_at != progress.iter:
            clock.pause()
            improved = evaluate(session)
            if progress.iter > 0 and (improved or options.always_save_checkpoint):
                save(session)
            clock.resume()
        if progress.iter == options.max_iters:
            return
        last = progress.iter == options.max_iters - 1
        update(session, clock, logged=last or progress.iter % options.log_interval == 0)


def update(session: Session, clock: 'StepClock', logged: bool) -> None:
    """One update of the weights from sequences iter · G to (iter + 1) · G of the global order."""
    options, model, step = session.settings.run, session.model, session.progress.iter
    learning_rate = learning_rate_at(step, options)
    micro_steps = options.gradient_accumulation_steps
    model.train()
    loss = torch.zeros((), device=session.device)
    for micro_step in range(micro_steps):
        number = step * micro_steps + micro_step  # of the micro-batch, over the whole run
        tokens, targets = session.dataset.batch(
            options.data_seed, number * options.batch_size, options.batch_size
        )
        # Dropout has a stream of its own at every micro-batch, so no random state is ever saved.
        torch.manual_seed(name_seed(options.seed, f'dropout/{number}'))
        with autocast(session):
            loss_sum, _, auxiliary_loss = model(
                to_device(tokens, session.device), to_device(targets, session.device)
            )
        share = loss_sum / session.tokens_per_iter
        session.updater.backward(share + auxiliary_loss / micro_steps)
        loss += share.detach()
    loss = session.parallel.sum(loss)
    sums = session.updater.update(learning_rate, loss, measured=logged)
    session.progress.iter += 1
    clock.steps += 1
    if logged:
        log_update(session, clock, learning_rate, torch.stack([loss, sums.norm, sums.total]))


def log_update(
    session: Session, clock: 'StepClock', learning_rate: float, measured: torch.Tensor
) -> None:
    """Record the update just made. Reading `measured` is its one synchronisation."""
    loss, norm, total = measured.tolist()
    seconds, steps = clock.take()
    tokens_per_second = session.tokens_per_iter / seconds
    peak = session.peak.tflops and session.peak.tflops * session.parallel.world_size
    achieved = tokens_per_second * session.flops_per_token['per_token'] / 1e12
    achieved_causal = tokens_per_second * session.flops_per_token['per_token_causal'] / 1e12
    session.logger.iteration(
        {
            'iter': session.progress.iter - 1,
            'loss': loss,
            'lr': learning_rate,
            'time_ms': seconds * 1e3,
            'steps': steps,
            'tokens_per_sec': tokens_per_second,
            'tokens_seen': session.progress.iter * session.tokens_per_iter,
            'mfu': {
                'mfu_percent': peak and 100 * achieved / peak,
                'mfu_causal_percent': peak and 100 * achieved_causal / peak,
                'achieved_tflops': achieved,
                'hardware_peak_tflops': peak,
                'flops_per_token': session.flops_per_token['per_token'],
                'architecture': session.settings.architecture.name,
            },
            'memory': hardware.memory_usage(session.device),
            'gradients': session.updater.statistics(norm, total),
        }
    )
    hardware.reset_peak_memory(session.device)
    clock.restart()


@torch.no_grad()
def evaluate(session: Session) -> bool:
    """Measure the loss on the fixed windows of both splits; whether it is the best so far."""
    options, dataset, progress = session.settings.run, session.dataset, session.progress
    began = time.perf_counter()
    session.model.eval()
    losses = {}
    for split in ('train', 'val'):
        starts = dataset.windows(split, options.eval_iters)
        total = torch.zeros(2, device=session.device)  # summed loss, number of targets
        for first in range(0, len(starts), options.batch_size):
            tokens, targets = dataset.read(split, starts[first : first + options.batch_size])
            with autocast(session):
                loss_sum, count, _ = session.model(
                    to_device(tokens, session.device), to_device(targets, session.device)
                )
            total += torch.stack([loss_sum, count.to(loss_sum.dtype)])
        loss_sum, count = session.parallel.sum(total).tolist()
        losses[split] = loss_sum / count
    bytes_per_token = dataset.bytes_per_token('val')
    session.logger.evaluation(
        {
            'iter': progress.iter,
            'train_loss': losses['train'],
            'val_loss': losses['val'],
            'val_bits_per_byte': bytes_per_token and losses['val'] / math.log(2) / bytes_per_token,
            'lr': learning_rate_at(progress.iter, options),
            'time_ms': (time.perf_counter() - began) * 1e3,
        }
    )
    return progress.note_evaluation(losses['val'])


def save(session: Session) -> None:
    """Publish a checkpoint of this moment and record it."""
    began = time.perf_counter()
    folder = session.logger.run_folder / 'checkpoints'
    index = resumption.checkpoint_index(session.settings, session.progress)
    state = {'model': session.model.state_dict(), **session.updater.state_dict()}
    checkpoint = checkpointing.save(folder, state, index)
    checkpointing.prune(folder, keep_last=1, keep_best=True)
    session.logger.checkpoint(
        {
            'iter': checkpoint.iter,
            'val_loss': checkpoint.val_loss,
            'path': str(checkpoint.path.relative_to(session.logger.run_folder)),
            'time_ms': (time.perf_counter() - began) * 1e3,
        }
    )


def autocast(session: Session):
    """The precision of the matrix multiplications; parameters and losses stay in fp32."""
    if session.settings.run.dtype == 'float32':
        return nullcontext()
    return torch.autocast(session.device.type, getattr(torch, session.settings.run.dtype))


def to_device(array, device: torch.device) -> torch.Tensor:
    """A numpy array as a tensor on the device; the copy to a GPU does not wait."""
    tensor = torch.from_numpy(array)
    if device.type == 'cuda':
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class StepClock:
    """Seconds that went into updates since the last log entry, and their number."""

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.seconds, self.steps, self.began = 0.0, 0, time.perf_counter()

    def pause(self) -> None:
        """Stop for an evaluation or a checkpoint."""
        hardware.synchronize(self.device)
        self.seconds += time.perf_counter() - self.began

    def resume(self) -> None:
        self.began = time.perf_counter()

    def take(self) -> tuple[float, int]:
        """Seconds an update, and the number of updates that they are the mean of."""
        self.pause()
        return self.seconds / self.steps, self.steps


if __name__ == '__main__':
    run_script(main, sys.argv[1:])
