"""A logger of the sample run: started, resumed or killed, and its output."""

import io

from helpers.sample_run import (
    ARCHITECTURE,
    CONFIG,
    DIAGNOSTICS,
    MAX_ITERS,
    METADATA,
    SAMPLE,
    STARTUP_INFO,
    checkpoint,
    evaluation,
    iteration,
)
from training_logger import TrainingLogger


def make_logger(folder, **options):
    return TrainingLogger(folder, **{'stream': io.StringIO(), 'max_iters': MAX_ITERS, **options})


def started_logger(folder, startup_info=STARTUP_INFO, metadata=METADATA, **options):
    logger = make_logger(folder, **options)
    logger.start(CONFIG, ARCHITECTURE, metadata, startup_info)
    return logger


def resumed_logger(folder, k, changed=None, metadata=METADATA, **options):
    logger = make_logger(folder, **options)
    logger.resume(
        k,
        checkpoint=f'checkpoints/{k}.pt',
        changed=changed or {},
        config=CONFIG,
        metadata=metadata,
        startup_info=STARTUP_INFO,
    )
    return logger


def kill(logger):
    """Leave the files as they are when the process of `logger` is killed."""
    logger.journal.close()


def new_output(logger):
    """The output of the logger since the last call."""
    stream = logger.console.stream
    text = stream.getvalue()
    stream.seek(0)
    stream.truncate()
    return text


def log_a_run(folder):
    """Log a run with every kind of line, killed once and resumed; return its open logger."""
    logger = started_logger(folder)
    logger.evaluation(evaluation(0, 10.9, 4.7))
    logger.iteration(iteration(0, time_ms=90_000.0, mfu=0.1, peak_gb=30.0))
    logger.iteration(iteration(10, time_ms=200.0, steps=10, mfu=30.0, peak_gb=20.0))
    logger.event('loss_spike', 10, ratio=3.5)
    logger.checkpoint(checkpoint(15))
    logger.iteration(iteration(20, time_ms=1.0, steps=10, mfu=99.0))  # lost in the crash
    kill(logger)
    logger = resumed_logger(folder, 15, {'learning_rate': [6e-4, 3e-4]})
    logger.iteration(iteration(20, time_ms=50_000.0, steps=5, mfu=0.2))  # warm-up again
    logger.iteration(iteration(30, loss=float('nan'), time_ms=300.0, steps=10, mfu=None))
    logger.evaluation({**evaluation(40, 3.5, 1.5), 'diagnostics': DIAGNOSTICS, 'sample': SAMPLE})
    logger.iteration(iteration(99, loss=2.5, time_ms=100.0, steps=69, mfu=60.0, peak_gb=None))
    logger.evaluation({**evaluation(100, 3.75, 1.6), 'sample': {**SAMPLE, 'text': None}})
    logger.checkpoint(checkpoint(100))
    return logger


def log_updates(logger, begin, end):
    """Log updates [begin, end); evaluations and checkpoints every 5, an event now and then."""
    for i in range(begin, end):
        if i % 5 == 0:
            logger.evaluation(evaluation(i, val_loss=10 - i / 10))
            logger.checkpoint(checkpoint(i))
        if i % 7 == 3:
            logger.event('loss_spike', i, f'loss of batch {i}')
        logger.iteration(iteration(i, loss=9 - i / 10))
