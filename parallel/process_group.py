"""Communication between the processes of a job; trivial for a single process.

In addition to torch.distributed's collectives: Python values, decisions of the main rank, and
failures, so that a failure of one rank is reported once, by the rank that knows most about it.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed.rendezvous import rendezvous

from common.environment import restarts_left
from common.errors import RankFailure, ReportedByOtherRank, UserError

FAILURE_REPORT_SECONDS = 10  # a rank that lost contact waits for the reports of other ranks
DUPLICATE_REPORT_SECONDS = 3  # a failing rank waits for the same report of a lower rank

# torch's flight recorder keeps the last collectives of a rank in a ring buffer. NCCL's watchdog
# writes it to a file of each rank, if it comes before this program's own report.
FLIGHT_RECORDER = {'TORCH_FR_BUFFER_SIZE': '2000', 'TORCH_NCCL_DUMP_ON_TIMEOUT': '1'}
FLIGHT_RECORDER_PREFIX = 'collectives_of_rank_'


class SingleProcessGroup:
    """A single process. All ranks must call every method that communicates."""

    rank, world_size = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the record and publishes checkpoints."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        return tensor

    def all_reduce_max(self, numbers: list[float]) -> list[float]:
        """The maximum of each number over all ranks, without waiting for the device."""
        return numbers

    def all_gather_object(self, value: Any) -> list:
        """The Python value of each rank, on every rank."""
        return [value]

    def broadcast_from_main(self, make: Callable[[], Any]) -> Any:
        """The result of `make()` on the main rank, on every rank; all raise its UserError."""
        return make()

    def trace_collectives(self, folder: Path) -> None:
        """Write this rank's last collectives to `folder` if contact with another is lost."""

    @contextmanager
    def propagate_failures(self) -> Iterator[None]:
        """Context in which failures of any rank end all ranks with one report.

        Raises RankFailure if this rank reports the loss of another, ReportedByOtherRank if another
        rank reports the reason, or the error itself.
        """
        yield

    def close(self) -> None:
        """Leave the process group."""


SINGLE_PROCESS = SingleProcessGroup()


# --------------------------------------------------------------------------------------------------
# Start


def init_process_group(
    device: torch.device, timeout: timedelta
) -> tuple[dist.Store, dist.ProcessGroup]:
    """Create the process group; returns the store of the ranks and the group for Python values.

    Python values are sent through gloo, so that they do not wait for a GPU. Every iteration sends
    some, which detects a lost rank. NCCL has a longer timeout, since its watchdog would abort the
    process without a message. Raises UserError if ranks are missing.
    """
    try:
        # Rendezvous, through torchrun's store.
        store, rank, size = next(rendezvous('env://', timeout=timeout))
        store = _store_for_this_attempt(store, rank, size, timeout)
        register_process(store, rank)
        members = {'store': store, 'rank': rank, 'world_size': size}
        # On a CPU, one gloo group is used for tensors and Python values.
        if device.type != 'cuda':
            dist.init_process_group('gloo', timeout=timeout, **members)
            return store, dist.group.WORLD
        refuse_shared_gpus(store, rank, size, device)
        for name, value in FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value)
        # On GPUs, NCCL is used for tensors, and a separate gloo group for Python values.
        longer = tensor_timeout(device, timeout)
        # With `device_id` a bad link shows here rather than as a slow first iteration.
        dist.init_process_group('cpu:gloo,cuda:nccl', timeout=longer, device_id=device, **members)
        return store, dist.new_group(backend='gloo', timeout=timeout)
    except RuntimeError as error:  # from the store, gloo or NCCL
        reason = str(error).partition('\n')[0]
        raise _rendezvous_error(timeout, reason) from error


def tensor_timeout(device: torch.device, timeout: timedelta) -> timedelta:
    """The timeout of a group for tensors. NCCL's is longer than that of Python values."""
    seconds = 3 * FAILURE_REPORT_SECONDS if device.type == 'cuda' else 0
    return timeout + timedelta(seconds=seconds)


def _rendezvous_error(timeout: timedelta, reason: str) -> UserError:
    return UserError(
        'the ranks could not connect within --distributed_timeout='
        f'{timeout.total_seconds():.0f} seconds: {reason}. Check that torchrun runs on every node, '
        'with the same --rdzv_id and --rdzv_endpoint, and that the nodes can reach each other.'
    )


def register_process(store: dist.Store, rank: int) -> None:
    """Store the host and id of this rank's process, before the group is created."""
    store.set(f'process {rank}', f'{socket.gethostname()} {os.getpid()}')


def refuse_shared_gpus(store: dist.Store, rank: int, size: int, device: torch.device) -> None:
    """Raise UserError on every rank if two use the same GPU, before NCCL fails without a reason."""
    store.set(f'gpu {rank}', str(torch.cuda.get_device_properties(device).uuid))
    ranks_of: dict[str, list[str]] = {}
    for other, uuid_of_gpu in enumerate(store.multi_get([f'gpu {r}' for r in range(size)])):
        ranks_of.setdefault(uuid_of_gpu.decode(), []).append(str(other))
    for uuid_of_gpu, ranks in ranks_of.items():
        if len(ranks) > 1:
            host = store.get(f'process {ranks[0]}').decode().rsplit(' ', 1)[0]
            raise UserError(
                f'ranks {", ".join(ranks)} use the same GPU on {host} (GPU-{uuid_of_gpu}): each '
                'rank needs a GPU of its own. Start as many processes per node as it has GPUs '
                '(torchrun --nproc_per_node), without --device=cuda:N, and do not show the same '
                'single GPU to all of them (CUDA_VISIBLE_DEVICES).'
            )


def _store_for_this_attempt(
    store: dist.Store, rank: int, size: int, timeout: timedelta
) -> dist.Store:
    """A namespace of torchrun's store for this attempt, since restarts keep the store.

    In the old namespace, gloo would find the addresses of dead processes. torchrun counts restarts
    per node, not per job, so that the ranks agree on a name for the attempt:

        rank r                                        rank 0
        sets 'question of r' to a random token    →   reads the token
        waits for 'answer to <token>'             ←   sets it to the name of this attempt
        sets '<name> has r'                       →   continues when every rank has set it
    """
    if rank:
        # Ask with a new token, so that no answer of an earlier attempt can match.
        question = uuid.uuid4().hex
        store.set(f'question of {rank}', question)
        # Wait for rank 0 to name the attempt, and confirm.
        attempt = store.get(f'answer to {question}').decode()
        store.set(f'{attempt} has {rank}', '')
        return dist.PrefixStore(attempt, store)
    attempt, missing = uuid.uuid4().hex, list(range(1, size))
    deadline = time.monotonic() + timeout.total_seconds()
    # Answer the latest question of each missing rank until all have confirmed.
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
# Multiple processes


class MultiProcessGroup(SingleProcessGroup):
    """The processes started by torchrun, after `init_process_group`."""

    def __init__(self, store: dist.Store, host_group: dist.ProcessGroup):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.store, self.host_group = store, host_group
        self.trace_folder: Path | None = None

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
        answer, problems = self.broadcast_object((answer, problems))
        if problems is not None:
            raise UserError(*problems)
        return answer

    def broadcast_object(self, value):
        """The value of the main rank, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def trace_collectives(self, folder):
        self.trace_folder = folder
        # Read by NCCL's watchdog when it writes.
        os.environ.setdefault('TORCH_FR_DUMP_TEMP_FILE', str(folder / FLIGHT_RECORDER_PREFIX))

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
                    'the store of the ranks is unreachable: the torchrun that provides it has '
                    f'ended, or its host is down. {_recovery_hint()}'
                )
            if reported is error:
                raise
            raise reported from error

    def _error_to_raise(self, error: Exception) -> Exception:
        """The exception to raise for `error`, after waiting for the reports of other ranks."""
        message = ' '.join(str(error).split()) or type(error).__name__
        if not isinstance(error, UserError):
            message = f'{type(error).__name__}: {message}'
        contact_lost = isinstance(error, dist.DistError) or 'gloo' in message
        # Report to the others. Ranks write to the store only when they end, not in iterations.
        self.store.set(f'end of {self.rank}', '' if contact_lost else message)
        # A user error occurs on every rank; `run_script` prints it on one.
        if isinstance(error, UserError):
            return error
        # A fault of this rank: the lowest rank with the same fault reports it.
        if not contact_lost:
            messages = self._failure_messages(range(self.rank), DUPLICATE_REPORT_SECONDS)
            return ReportedByOtherRank(message) if message in messages.values() else error
        # Contact is lost: a rank that failed reports the reason itself.
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        messages = self._failure_messages(others, FAILURE_REPORT_SECONDS)
        causes = [f'rank {rank} failed: {cause}' for rank, cause in messages.items() if cause]
        if causes:
            return ReportedByOtherRank('; '.join(causes))
        # No rank knows the reason: the lowest remaining rank reports on the missing ones.
        silent = [rank for rank in others if rank not in messages]
        trace = '' if silent and all(map(self._is_dead, silent)) else self._write_trace()
        if silent:
            diagnosis = f'{self._describe_missing_ranks(silent)}{trace} {_recovery_hint()}'
        else:
            diagnosis = f'the ranks lost contact, but none of them ended ({message}).{trace}'
        is_first = all(rank > self.rank for rank in messages)
        return RankFailure(diagnosis) if is_first else ReportedByOtherRank(diagnosis)

    def _write_trace(self) -> str:
        """Write this rank's last collectives; a sentence on those of all ranks, or ''."""
        if self.trace_folder is None:
            return ''
        # Those of NCCL are recorded apart.
        kind = 'nccl' if 'nccl' in dist.get_backend() else 'fr'
        try:
            path = self.trace_folder / f'{FLIGHT_RECORDER_PREFIX}{self.rank}'
            path.write_bytes(getattr(_distributed_c10d, f'_dump_{kind}_trace')())
        except (OSError, RuntimeError):  # the folder is gone, or the recorder is off
            return ''
        return (
            f' The last collectives of the remaining ranks are in {path.parent}: torchfrtrace '
            f'--prefix={FLIGHT_RECORDER_PREFIX} {path.parent} compares them.'
        )

    def _failure_messages(self, ranks: Iterable[int], seconds: float) -> dict[int, str]:
        """The reports of ranks that end, without waiting for those known to be dead.

        The report of a rank that lost contact is empty.
        """
        deadline, messages = time.monotonic() + seconds, {}
        waiting = list(ranks)
        while waiting and time.monotonic() < deadline:
            for rank in waiting[:]:
                # In this order, since a rank may report and then die.
                dead = self._is_dead(rank)
                if self.store.check([f'end of {rank}']):
                    messages[rank] = self.store.get(f'end of {rank}').decode()
                elif not dead:
                    continue
                waiting.remove(rank)
            time.sleep(0.05)
        return dict(sorted(messages.items()))

    def _process(self, rank: int) -> tuple[str, int]:
        """Host and process id of a rank."""
        host, number = self.store.get(f'process {rank}').decode().rsplit(' ', 1)
        return host, int(number)

    def _is_dead(self, rank: int) -> bool:
        """Whether a rank's process is known to have ended; unknown for other hosts."""
        host, number = self._process(rank)
        return host == socket.gethostname() and not psutil.pid_exists(number)

    def _describe_missing_ranks(self, silent: list[int]) -> str:
        sentences = []
        for rank in silent:
            host, number = self._process(rank)
            if self._is_dead(rank):
                what = 'exited without an error message (killed, e.g. out of memory, or crashed)'
            else:
                what = (
                    'is not responding: it hangs, exceeds --distributed_timeout, or its host is '
                    'down'
                )
            sentences.append(f'rank {rank} (process {number} on {host}) {what}.')
        return ' '.join(sentences)


def _recovery_hint() -> str:
    if restarts_left() > 0:
        return (
            'torchrun restarts the job; with --init_from=auto it resumes from the last checkpoint.'
        )
    return (
        'To resume from the last checkpoint, start the job with --init_from=auto. With '
        'torchrun --max-restarts=3 … --init_from=auto, it restarts and resumes automatically.'
    )
