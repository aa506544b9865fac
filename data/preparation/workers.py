"""Distribute work to processes; results come in the order of the work."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

from common.errors import UserError

ITEMS_AHEAD = 2  # items in progress per process: enough to keep it busy in little memory

_task: Callable


def map_in_order(task: Callable, items: Iterable, workers: int) -> Generator[Any, None, None]:
    """`task(item)` for each item, in order, computed by `workers` processes (1: this one).

    Only a few items are in memory at a time. `task` is sent to each process once. Raises the errors
    of `items` and of the tasks, and UserError if a process is lost.
    """
    if workers == 1:
        yield from map(task, items)
        return
    # spawn: a fork would copy locks held by threads of packages that read Parquet or the network.
    context = multiprocessing.get_context('spawn')
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(task,))
    futures: deque[Future] = deque()
    try:
        for item in items:
            futures.append(pool.submit(_run_task, item))
            if len(futures) > ITEMS_AHEAD * workers:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            'A worker process was killed, perhaps because memory ran out. Progress is saved. Run '
            'the same command again to continue; to use less memory, add '
            f'--workers={max(workers // 2, 1)}'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """Number of processor cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_worker(task: Callable) -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles it and ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        connection.wait([parent.sentinel])
    os._exit(1)


def _run_task(item):
    return _task(item)
