"""What the processes of a job tell one another: all of it trivial when there is only one.

Beside torch.distributed's collectives: plain values, decisions of the main rank, and why the job
ends, so that the failure of one rank is reported once, by whichever knows it best.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from common.environment import restarts_left
from common.errors import RankFailure, ReportedByOtherRank, UserError

FAILURE_REPORT_SECONDS = 10  # that a rank which lost contact waits to hear why the others end
DUPLICATE_REPORT_SECONDS = 3  # that a rank which fails waits for one before it to say the same


class SingleProcessGroup:
    """One process. Every method that communicates is to be called by every rank."""

    rank, world_size = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the record and publishes checkpoints."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        return tensor

    def all_reduce_max(self, numbers: list[float]) -> list[float]:
        """The largest of each number over all ranks; the device is not waited for."""
        return numbers

    def all_gather_object(self, value: Any) -> list:
        """The plain value of each rank, on every rank."""
        return [value]

    def broadcast_from_main(self, make: Callable[[], Any]) -> Any:
        """What `make()` returns on the main rank, on every rank; its UserError is raised on all."""
        return make()

    @contextmanager
    def propagate_failures(self) -> Iterator[None]:
        """Around work: what fails in it is told to the others, and their failure to this rank.

        Raises RankFailure where this rank is the one to say what became of another,
        ReportedByOtherRank where another says why all end, or the error itself.
        """
        yield

    def close(self) -> None:
        """Leave the process group."""


# --------------------------------------------------------------------------------------------------
# The start


def init_process_group(
    device: torch.device, timeout: timedelta
) -> tuple[dist.Store, dist.ProcessGroup]:
    """Form the process group; the store that the ranks share, and the group of plain values.

    Plain values travel by gloo, so that no answer waits for a GPU. Every iteration has some, so a
    rank that is lost is noticed there; NCCL, whose watchdog would abort the process without a word,
    has more patience. Raises UserError where not all come.
    """
    try:
        # Rendezvous: torchrun's store, where the ranks find one another.
        store, rank, size = next(rendezvous('env://', timeout=timeout))
        store = _store_for_this_attempt(store, rank, size, timeout)
        register_process(store, rank)
        members = {'store': store, 'rank': rank, 'world_size': size}
        # On a CPU one gloo group carries tensors and plain values alike.
        if device.type != 'cuda':
            dist.init_process_group('gloo', timeout=timeout, **members)
            return store, dist.group.WORLD
        # On GPUs tensors travel by NCCL, and plain values by a gloo group of their own.
        longer = timeout + timedelta(seconds=3 * FAILURE_REPORT_SECONDS)
        # With `device_id` a bad link shows here rather than as a slow first iteration.
        dist.init_process_group('cpu:gloo,cuda:nccl', timeout=longer, device_id=device, **members)
        return store, dist.new_group(backend='gloo', timeout=timeout)
    except RuntimeError as error:  # of the store, gloo or NCCL
        reason = str(error).partition('\n')[0]
        raise _rendezvous_error(timeout, reason) from error


def _rendezvous_error(timeout: timedelta, reason: str) -> UserError:
    return UserError(
        'the ranks did not all find one another within --distributed_timeout='
        f'{timeout.total_seconds():.0f} seconds: {reason}. Did torchrun start on every node, with '
        'the same --rdzv_id and --rdzv_endpoint, and can the nodes reach one another?'
    )


def register_process(store: dist.Store, rank: int) -> None:
    """Say where this rank's process is, before the group is formed, so that all are known in it."""
    store.set(f'process {rank}', f'{socket.gethostname()} {os.getpid()}')


def _store_for_this_attempt(
    store: dist.Store, rank: int, size: int, timeout: timedelta
) -> dist.Store:
    """A part of torchrun's store that is new, as the store itself is not after a restart.

    In the old one gloo finds the addresses of processes that are dead. torchrun numbers the
    restarts of each node, not of the job, so the ranks agree on a name for this attempt:

        rank r                                       rank 0
        sets 'question of r' to a word of its own →  finds the word
        waits for 'answer to <word>'              ←  sets it to the name of this attempt
        sets '<name> has r'                       →  goes on once every rank has set it
    """
    if rank:
        # Ask with a new word, which no answer of an earlier attempt can be to.
        question = uuid.uuid4().hex
        store.set(f'question of {rank}', question)
        # Wait for rank 0 to name the attempt, and confirm.
        attempt = store.get(f'answer to {question}').decode()
        store.set(f'{attempt} has {rank}', '')
        return dist.PrefixStore(attempt, store)
    attempt, missing = uuid.uuid4().hex, list(range(1, size))
    deadline = time.monotonic() + timeout.total_seconds()
    # Until all have confirmed, answer whatever question each of the missing has asked last.
    while missing := [r for r in missing if not store.check([f'{attempt} has {r}'])]:
        for other in missing:
            if store.check([f'question of {other}']):
                question = store.get(f'question of {other}').decode()
                store.set(f'answer to {question}', attempt)
        if time.monotonic() > deadline:
            raise _rendezvous_error(timeout, f'rank {missing[0]} did not start')
        time.sleep(0.01)
    return dist.PrefixStore(attempt, store)


# --------------------------------------------------------------------------------------------------
# Several processes


class MultiProcessGroup(SingleProcessGroup):
    """The processes that torchrun started, once the process group is there."""

    def __init__(self, store: dist.Store, host_group: dist.ProcessGroup):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.store, self.host_group = store, host_group

    def all_reduce_sum(self, tensor):
        dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, numbers):
        on_host = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(on_host, op=dist.ReduceOp.MAX, group=self.host_group)
        return on_host.tolist()

    def all_gather_object(self, value):
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def broadcast_from_main(self, make):
        answer, problems = None, None
        if self.is_main:
            try:
                answer = make()
            except UserError as error:
                problems = error.problems
        shared = [answer, problems]
        dist.broadcast_object_list(shared, src=0, group=self.host_group)
        if shared[1] is not None:
            raise UserError(*shared[1])
        return shared[0]

    def close(self):
        dist.destroy_process_group()

    # --- Why the job ends ---

    @contextmanager
    def propagate_failures(self):
        try:
            yield
        except Exception as error:
            try:
                reported = self._error_to_raise(error)
            except dist.DistError:
                reported = RankFailure(
                    'the store that the ranks share is gone, and with it the torchrun that keeps '
                    f'it, or its machine. {_recovery_hint()}'
                )
            if reported is error:
                raise
            raise reported from error

    def _error_to_raise(self, error: Exception) -> Exception:
        """What to raise for `error`, once the others have had the time to tell of theirs."""
        message = ' '.join(str(error).split()) or type(error).__name__
        if not isinstance(error, UserError):
            message = f'{type(error).__name__}: {message}'
        contact_lost = isinstance(error, dist.DistError) or 'gloo' in message
        # Tell the others. Nothing is stored for this in an iteration: only at the end does a rank
        # say how it ended.
        self.store.set(f'end of {self.rank}', '' if contact_lost else message)
        # A user's mistake is every rank's; `run_script` sees to it that one tells it.
        if isinstance(error, UserError):
            return error
        # A fault of this rank: told by the first rank that has it.
        if not contact_lost:
            messages = self._failure_messages(range(self.rank), DUPLICATE_REPORT_SECONDS)
            return ReportedByOtherRank(message) if message in messages.values() else error
        # Contact is lost: another rank knows why it ended, and tells it itself.
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        messages = self._failure_messages(others, FAILURE_REPORT_SECONDS)
        causes = [f'rank {rank} failed: {cause}' for rank, cause in messages.items() if cause]
        if causes:
            return ReportedByOtherRank('; '.join(causes))
        # Or nobody knows: the first of those that are left tells what became of the others.
        silent = [rank for rank in others if rank not in messages]
        if silent:
            diagnosis = f'{self._describe_missing_ranks(silent)} {_recovery_hint()}'
        else:
            diagnosis = f'the ranks lost contact, though none of them died: {message}'
        is_first = all(rank > self.rank for rank in messages)
        return RankFailure(diagnosis) if is_first else ReportedByOtherRank(diagnosis)

    def _failure_messages(self, ranks: Iterable[int], seconds: float) -> dict[int, str]:
        """What those ranks that end say of it; not waited for are those that are known to be dead.

        Empty where one ends since it lost contact.
        """
        deadline, messages = time.monotonic() + seconds, {}
        waiting = list(ranks)
        while waiting and time.monotonic() < deadline:
            for rank in waiting[:]:
                # In this order: one that died after it spoke has spoken.
                dead = self._is_dead(rank)
                if self.store.check([f'end of {rank}']):
                    messages[rank] = self.store.get(f'end of {rank}').decode()
                elif not dead:
                    continue
                waiting.remove(rank)
            time.sleep(0.05)
        return dict(sorted(messages.items()))

    def _process(self, rank: int) -> tuple[str, int]:
        """The host of a rank, and the number of its process there."""
        host, number = self.store.get(f'process {rank}').decode().rsplit(' ', 1)
        return host, int(number)

    def _is_dead(self, rank: int) -> bool:
        """Whether a rank's process is known to be no more; of other hosts nothing is known."""
        host, number = self._process(rank)
        return host == socket.gethostname() and not psutil.pid_exists(number)

    def _describe_missing_ranks(self, silent: list[int]) -> str:
        sentences = []
        for rank in silent:
            host, number = self._process(rank)
            if self._is_dead(rank):
                what = 'ended without a word: killed, for want of memory perhaps, or crashed'
            else:
                what = (
                    'did not come: it hangs, or needs more than --distributed_timeout, or its '
                    'machine is gone'
                )
            sentences.append(f'rank {rank} (process {number} on {host}) {what}.')
        return ' '.join(sentences)


def _recovery_hint() -> str:
    if restarts_left() > 0:
        return (
            'torchrun starts the job again; with --init_from=auto it goes on where it last saved.'
        )
    return (
        'To go on from the last checkpoint, start the job with --init_from=auto; with '
        'torchrun --max-restarts=3 … --init_from=auto it does so by itself.'
    )
