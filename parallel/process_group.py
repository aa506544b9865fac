"""What the processes of a job tell one another: all of it trivial when there is only one."""

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from common.environment import restarts_left
from common.errors import LostRank, ToldElsewhere, UserError

ANSWER_SECONDS = 10  # that a rank which lost contact waits to hear why the others end
SAME_SECONDS = 3  # that a rank which fails waits for one before it to say the same


class Alone:
    """One process. Every method that communicates is to be called by every rank."""

    rank, world_size = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the record and publishes checkpoints."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        return tensor

    def largest(self, numbers: list[float]) -> list[float]:
        """The largest of each number over all ranks; the device is not waited for."""
        return numbers

    def gather(self, value) -> list:
        """The plain value of each rank, on every rank."""
        return [value]

    def from_main(self, make: Callable):
        """What `make()` returns on the main rank, on every rank; its UserError is raised on all."""
        return make()

    @contextmanager
    def accountable(self) -> Iterator[None]:
        """Around work: what fails in it is told to the others, and their failure to this rank.

        Raises LostRank where this rank is the one to say what became of another, ToldElsewhere
        where another says why all end, or the error itself.
        """
        yield

    def close(self) -> None:
        """Take leave of the others."""


def join(device: torch.device, timeout: timedelta) -> tuple[dist.Store, dist.ProcessGroup]:
    """Form the process group; the store that the ranks share, and the group of plain values.

    Plain values travel by gloo, so that no answer waits for a GPU. Every update has some, so a rank
    that is lost is noticed there; NCCL, whose watchdog would abort the process without a word, has
    more patience. Raises UserError where not all come.
    """
    try:
        return _join(device, timeout)
    except RuntimeError as error:  # of the store, gloo or NCCL
        reason = str(error).partition('\n')[0]
        raise _not_all_came(timeout, reason) from error


def _not_all_came(timeout: timedelta, reason: str) -> UserError:
    return UserError(
        'the ranks did not all find one another within --distributed_timeout='
        f'{timeout.total_seconds():.0f} seconds: {reason}. Did torchrun start on every node, with '
        'the same --rdzv_id and --rdzv_endpoint, and can the nodes reach one another?'
    )


def _join(device: torch.device, timeout: timedelta) -> tuple[dist.Store, dist.ProcessGroup]:
    store, rank, size = next(rendezvous('env://', timeout=timeout))
    store = _store_of_this_attempt(store, rank, size, timeout)
    announce(store, rank)
    known = {'store': store, 'rank': rank, 'world_size': size}
    if device.type != 'cuda':
        dist.init_process_group('gloo', timeout=timeout, **known)
        return store, dist.group.WORLD
    longer = timeout + timedelta(seconds=3 * ANSWER_SECONDS)
    dist.init_process_group('cpu:gloo,cuda:nccl', timeout=longer, **known)
    return store, dist.new_group(backend='gloo', timeout=timeout)


def announce(store: dist.Store, rank: int) -> None:
    """Say where this rank's process is, before the group is formed, so that all are known in it."""
    store.set(f'process {rank}', f'{socket.gethostname()} {os.getpid()}')


def _store_of_this_attempt(
    store: dist.Store, rank: int, size: int, timeout: timedelta
) -> dist.Store:
    """A part of torchrun's store that is new, as the store itself is not after a restart.

    In the old one gloo finds the addresses of processes that are dead. torchrun numbers the
    restarts of each node, not of the job, so the ranks agree on a name: each asks with a word that
    is its own, and the first answers until all have come.
    """
    if rank:
        question = uuid.uuid4().hex
        store.set(f'question of {rank}', question)
        attempt = store.get(f'answer to {question}').decode()
        store.set(f'{attempt} has {rank}', '')
        return dist.PrefixStore(attempt, store)
    attempt, missing = uuid.uuid4().hex, list(range(1, size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing := [r for r in missing if not store.check([f'{attempt} has {r}'])]:
        for other in missing:
            if store.check([f'question of {other}']):
                question = store.get(f'question of {other}').decode()
                store.set(f'answer to {question}', attempt)
        if time.monotonic() > deadline:
            raise _not_all_came(timeout, f'rank {missing[0]} did not start')
        time.sleep(0.01)
    return dist.PrefixStore(attempt, store)


class Together(Alone):
    """The processes that torchrun started, once the process group is there."""

    def __init__(self, store: dist.Store, host_group: dist.ProcessGroup):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.store, self.host_group = store, host_group

    def sum(self, tensor):
        dist.all_reduce(tensor)
        return tensor

    def largest(self, numbers):
        on_host = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(on_host, op=dist.ReduceOp.MAX, group=self.host_group)
        return on_host.tolist()

    def gather(self, value):
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def from_main(self, make):
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

    @contextmanager
    def accountable(self):
        try:
            yield
        except Exception as error:
            try:
                explained = self._explain(error)
            except dist.DistError:
                explained = LostRank(
                    'the store that the ranks share is gone, and with it the torchrun that keeps '
                    f'it, or its machine. {_way_on()}'
                )
            if explained is error:
                raise
            raise explained from error

    def _explain(self, error: Exception) -> Exception:
        """What to raise for `error`, once the others have had the time to tell of theirs."""
        told = ' '.join(str(error).split()) or type(error).__name__
        if not isinstance(error, UserError):
            told = f'{type(error).__name__}: {told}'
        contact_lost = isinstance(error, dist.DistError) or 'gloo' in told
        # Nothing is stored for this in an update: only at the end does a rank say how it ended.
        self.store.set(f'end of {self.rank}', '' if contact_lost else told)
        if isinstance(error, UserError):
            return error  # `run_script` sees to it that a common mistake is told once
        if not contact_lost:
            ends = self._ends(range(self.rank), SAME_SECONDS)
            return ToldElsewhere(told) if told in ends.values() else error
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        ends = self._ends(others, ANSWER_SECONDS)
        causes = [f'rank {rank} failed: {end}' for rank, end in ends.items() if end]
        if causes:
            return ToldElsewhere('; '.join(causes))
        silent = [rank for rank in others if rank not in ends]
        message = (
            f'{self._whereabouts(silent)} {_way_on()}'
            if silent
            else f'the ranks lost contact, though none of them died: {told}'
        )
        return ToldElsewhere(message) if any(r < self.rank for r in ends) else LostRank(message)

    def _ends(self, ranks, seconds: float) -> dict[int, str]:
        """What those ranks that end say of it; not waited for are those that are known to be dead.

        Empty where one ends since it lost contact.
        """
        deadline, ends = time.monotonic() + seconds, {}
        waiting = list(ranks)
        while waiting and time.monotonic() < deadline:
            for rank in waiting[:]:
                # In this order: one that died after it spoke has spoken.
                dead = self._is_dead(rank)
                if self.store.check([f'end of {rank}']):
                    ends[rank] = self.store.get(f'end of {rank}').decode()
                elif not dead:
                    continue
                waiting.remove(rank)
            time.sleep(0.05)
        return dict(sorted(ends.items()))

    def _process(self, rank: int) -> tuple[str, int]:
        """The host of a rank, and the number of its process there."""
        host, number = self.store.get(f'process {rank}').decode().rsplit(' ', 1)
        return host, int(number)

    def _is_dead(self, rank: int) -> bool:
        """Whether a rank's process is known to be no more; of other hosts nothing is known."""
        host, number = self._process(rank)
        return host == socket.gethostname() and not psutil.pid_exists(number)

    def _whereabouts(self, silent: list[int]) -> str:
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

    def close(self):
        dist.destroy_process_group()


def _way_on() -> str:
    if restarts_left() > 0:
        return (
            'torchrun starts the job again; with --init_from=auto it goes on where it last saved.'
        )
    return (
        'To go on from the last checkpoint, start the job with --init_from=auto; with '
        'torchrun --max-restarts=3 … --init_from=auto it does so by itself.'
    )
