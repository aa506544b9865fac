"""Groups of processes that train with gloo, for `test_parallelism.py`.

    python rank_driver.py PLAN.json FOLDER

The plan is a list of stages [world_size, [run, …]]. torch is imported once; each stage forks
`world_size` ranks, which perform its runs together. A run is {'name', 'options', …} with options of
`train.py` and keys of `SPECIALS`; each rank writes `<name>.<rank>.pt`.
"""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

import train
from common import errors
from common.errors import UserError, run_script
from components.base import saved_buffers
from data.dataset import TokenDataset
from model_builder import Transformer
from optim.step import GuardedOptimizer
from parallel import strategies
from parallel.process_group import MultiProcessGroup, register_process
from training.checkpoint import PendingCheckpoint
from training.signals import SignalHandler

ONE_TOO_MANY = 2  # iteration of the fault, from 0
BATCHES = 4  # per iteration


# --- Faults ---------------------------------------------------------------------------------------


def signal_in_update(patch, rank):
    """The last rank receives SIGTERM while it reads its batch."""
    read, calls = TokenDataset.batch, []

    def batch(self, *arguments):
        calls.append(1)
        if rank == world() - 1 and len(calls) == ONE_TOO_MANY * BATCHES // world() + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, *arguments)

    patch.setattr(TokenDataset, 'batch', batch)


def signal_while_agreeing(patch, rank):
    """The last rank receives SIGTERM just after the ranks agreed that none has received one."""
    agree, calls = SignalHandler.sync, []

    def interrupted(self, ranks, *arguments):
        def all_reduce_max(numbers):
            answer = ranks.all_reduce_max(numbers)
            calls.append(1)
            if rank == world() - 1 and len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return answer

        agree(self, SimpleNamespace(all_reduce_max=all_reduce_max), *arguments)

    patch.setattr(SignalHandler, 'sync', interrupted)


def full_disk(patch, rank):
    """The last rank cannot write tensors."""

    def save(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == world() - 1:
        patch.setattr(torch, 'save', save)


def written_late(patch, rank):
    """The checkpoint of iteration 10 is written after two more iterations."""
    write, update, updates, made = (
        PendingCheckpoint.write,
        GuardedOptimizer.step,
        [],
        threading.Event(),
    )

    def late(self, state):
        assert self.index['iter'] != 10 or made.wait(60)
        write(self, state)

    def counted(self, *arguments, **keywords):
        sums = update(self, *arguments, **keywords)
        updates.append(1)
        if len(updates) == 12:
            made.set()
        return sums

    patch.setattr(PendingCheckpoint, 'write', late)
    patch.setattr(GuardedOptimizer, 'step', counted)


def lost_loss(patch, rank):
    """The loss of one micro-batch, and thus of one rank, is infinite in one iteration."""
    read, forward, number = TokenDataset.batch, Transformer.forward, []

    def batch(self, order, first_number, count):
        number[:] = [first_number // count]
        return read(self, order, first_number, count)

    def poisoned(self, tokens, *targets):
        if not targets:  # at start, where the model is checked
            return forward(self, tokens)
        loss_sum, *others = forward(self, tokens, *targets)
        if self.training and number[0] == ONE_TOO_MANY * BATCHES + 1:
            loss_sum = loss_sum * float('inf')
        return loss_sum, *others

    patch.setattr(TokenDataset, 'batch', batch)
    patch.setattr(Transformer, 'forward', poisoned)


def overflow(patch, rank):
    """One gradient element overflows in one iteration; with FSDP only one rank has it."""
    update, calls = GuardedOptimizer.step, []

    def poisoned(self, *arguments, **keywords):
        calls.append(1)
        gradient = self.parameters[0].grad
        divided = isinstance(gradient, DTensor)
        if len(calls) == ONE_TOO_MANY + 1 and (rank == world() - 1 or not divided):
            here = gradient.to_local() if divided else gradient
            here.view(-1)[-1] = float('inf')
        return update(self, *arguments, **keywords)

    patch.setattr(GuardedOptimizer, 'step', poisoned)


def rounded(patch, rank):
    """Matrices are rounded to bfloat16 in forward and backward passes; updates are of the exact
    ones. Neither a router, nor a table that is looked up, even if it is multiplied too."""
    forward, backward = Transformer.forward, GuardedOptimizer.backward
    exact: dict[torch.Tensor, torch.Tensor] = {}

    def restore():
        for parameter, values in exact.items():
            parameter.data.copy_(values)
        exact.clear()

    def rounded_forward(self, *arguments, **options):
        exceptions = {'router', 'position_encoding', 'token_embedding'}
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not exceptions & set(name.split('.')):
                exact[parameter] = parameter.data.clone()
                parameter.data.copy_(parameter.data.bfloat16())
        output = forward(self, *arguments, **options)
        if not torch.is_grad_enabled():
            restore()
        return output

    def restoring_backward(self, loss):
        backward(self, loss)
        restore()

    patch.setattr(Transformer, 'forward', rounded_forward)
    patch.setattr(GuardedOptimizer, 'backward', restoring_backward)


SPECIALS = {
    made.__name__: made
    for made in (
        signal_in_update,
        signal_while_agreeing,
        full_disk,
        written_late,
        lost_loss,
        overflow,
        rounded,
    )
}


# --- Traffic --------------------------------------------------------------------------------------

SCALARS = 64  # bytes; smaller messages are scalars and are not counted


def counted(patch) -> list[float]:
    """The bytes that this rank sends in each iteration, with ring collectives."""
    sent, under_way, update = [], [], train.run_iteration

    def counting(collective, factor):
        def called(*arguments, **options):
            whole = max(t.nbytes for t in (*arguments, *options.values()) if torch.is_tensor(t))
            ranks = dist.get_world_size(options.get('group'))
            if under_way and whole > SCALARS:
                sent[-1] += factor * (ranks - 1) / ranks * whole
            return collective(*arguments, **options)

        return called

    exchange = dist.all_to_all_single

    def counted_exchange(received, given, received_sizes, given_sizes, group=None, **options):
        others = sum(given_sizes) - given_sizes[dist.get_rank(group)]
        sent[-1] += others * given.element_size()
        return exchange(received, given, received_sizes, given_sizes, group=group, **options)

    def counted_update(*arguments):
        sent.append(0.0)
        under_way.append(True)
        update(*arguments)
        under_way.clear()

    for name, factor in (
        ('all_reduce', 2),
        ('all_gather_single', 1),
        ('reduce_scatter_single', 1),
    ):
        patch.setattr(dist, name, counting(getattr(dist, name), factor))
    patch.setattr(dist, 'all_to_all_single', counted_exchange)
    patch.setattr(train, 'run_iteration', counted_update)
    return sent


# --- A run ----------------------------------------------------------------------------------------


def world() -> int:
    return int(os.environ.get('WORLD_SIZE', '1'))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole parameter. Must be called by every rank."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def nbytes(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def weights(session) -> dict[str, torch.Tensor]:
    session.parallel.weight_shards(session.raw_model)  # frees what an evaluation left gathered
    return {name: whole(p) for name, p in session.raw_model.named_parameters()}


def run(plan: dict, rank: int, store: dist.Store | None) -> dict:
    """Train as planned and measure the live objects. store: of the process group."""
    left = {'gradients': []}
    set_up, backward = train.set_up, GuardedOptimizer.backward

    def kept_set_up(*arguments):
        left['session'] = session = set_up(*arguments)
        left['initial'] = weights(session)
        left['parameter_bytes'] = sum(nbytes(p) for p in session.raw_model.parameters())
        return session

    def watched(self, loss):
        backward(self, loss)
        if len(left['gradients']) < BATCHES:
            gradients = [p.grad for p in self.parameters]
            known = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
            left['gradients'].append([g if g is None else g.detach().clone() for g in known])

    def main(argv):
        try:
            return train.main(argv)
        except UserError as error:
            left['problems'] = error.problems
            raise

    arguments = [f'--{key}={value}' for key, value in plan['options'].items()]
    torch.compiler.reset()  # do not reuse graphs of an earlier run
    counters.clear()
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        patch.setattr(train, 'set_up', kept_set_up)
        patch.setattr(GuardedOptimizer, 'backward', watched)
        left['sent'] = counted(patch)
        patch.setattr(errors, 'GRACE_SECONDS', 0)
        patch.setattr(errors, 'exit_process', sys.exit)
        patch.setattr(MultiProcessGroup, 'close', lambda self: None)  # the next run needs them too
        if store is not None:
            known = dist.PrefixStore(plan['name'], store), dist.group.WORLD
            register_process(known[0], rank)
            patch.setattr(strategies, 'init_process_group', lambda device, timeout: known)
        if 'special' in plan:
            SPECIALS[plan['special']](patch, rank)
        with pytest.raises(SystemExit) as exit:
            run_script(main, arguments)
    left['code'] = exit.value.code
    left['compiled_frames'] = counters['frames']['ok']
    left['stderr'] = stderr.getvalue()
    session = left.pop('session', None)
    if session:
        left['folder'] = str(session.logger.run_folder)
        left['scale'] = session.optimizer.loss_scale
        left['optimizer_bytes'] = sum(
            nbytes(value)
            for state in session.optimizer.inner.state.values()
            for value in state.values()
        )
        if left['code'] == 0:
            left['weights'] = weights(session)
            left['biases'] = saved_buffers(session.raw_model)
    return left


def go_through(runs: list[dict], rank: int, size: int, folder: Path, stage: int) -> None:
    """The runs of a stage on one rank."""
    torch.set_num_threads(1)
    with open(folder / f'stage_{stage}.{rank}.txt', 'w') as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    store = None
    if size > 1:
        store = dist.FileStore(f'{folder}/stage_{stage}.store', size)
        os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(size)}
        os.environ |= {'MASTER_ADDR': 'localhost', 'MASTER_PORT': '29500'}  # unused: see `store`
        dist.init_process_group(
            'gloo',
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=60),
        )
    for plan in runs:
        try:
            left = run(plan, rank, store)
        except BaseException:
            torch.save({'error': traceback.format_exc()}, folder / f'{plan["name"]}.{rank}.pt')
            raise
        torch.save(left, folder / f'{plan["name"]}.{rank}.pt')
    os._exit(0)  # do not wait for other ranks


if __name__ == '__main__':
    plan, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    fork = multiprocessing.get_context('fork')
    for stage, (size, runs) in enumerate(plan):
        ranks = [
            fork.Process(target=go_through, args=(runs, rank, size, folder, stage))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
            assert process.exitcode == 0, (
                folder / f'stage_{stage}.{ranks.index(process)}.txt'
            ).read_text()
