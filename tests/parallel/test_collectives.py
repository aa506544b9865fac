"""What each of eight ranks sends in an update, and when, with a fake process group.

The bytes that the start-up report and the record show are those that are sent.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers.architectures import random_tokens, tiny
from helpers.collective_recorder import CollectiveRecorder
from helpers.fake_ranks import fake_group
from helpers.optimizer_options import options
from torch.nn.parallel import DistributedDataParallel

from model_builder import parameter_groups
from optim.step import GuardedOptimizer
from parallel import strategies
from parallel.fully_sharded import FullySharded
from parallel.strategies import DataParallel, ZeRO1

RANKS = 8
CPU = torch.device('cpu')
STRATEGIES = {'ddp': DataParallel, 'zero1': ZeRO1}
# An odd number of elements in each block, so that what follows needs alignment; unequal matrices.
LAYERS = {'layer_pattern': 'LG', 'layer_kinds': {'G': {'d_ff': 24, 'head_dim': 6}}}
ARCHITECTURE = tiny(normalization='dyt', ffn_type='swiglu', d_ff=40, **LAYERS)
BUCKET_MB = 0.004  # so that the tiny model has several


class Rank:
    """One of eight ranks: its strategy, model and optimizer."""

    def __init__(self, strategy: str, rank: int, run):
        self.parallel = STRATEGIES[strategy](run, CPU)
        self.model, self.wrapped = self.parallel.build(ARCHITECTURE, [], compiled=False)
        groups = parameter_groups(self.model)
        self.inner = self.parallel.build_optimizer(groups, run)
        self.optimizer = GuardedOptimizer(self.inner, run, CPU, self.parallel)
        self.tokens = random_tokens(ARCHITECTURE, 2)

    def update(self, micro_steps: int) -> list[list]:
        """The collectives of each micro-step, and of the optimizer step."""
        phases = []
        with CollectiveRecorder() as recorder:
            for number in range(micro_steps):
                with self.parallel.micro_step(self.wrapped, last=number == micro_steps - 1):
                    loss, count, _ = self.wrapped(self.tokens, self.tokens)
                self.optimizer.backward(loss / count / micro_steps)
                phases.append(recorder.take())
            self.optimizer.step(1e-3, torch.zeros(()), measured=True)
            phases.append(recorder.take())
        return phases


@pytest.fixture
def ranks(monkeypatch):
    """`ranks(strategy, run, numbers)`: the ranks of those numbers, one after the other."""
    monkeypatch.setattr(
        strategies,
        'DistributedDataParallel',
        partial(DistributedDataParallel, bucket_cap_mb=BUCKET_MB),
    )
    ranges: list = [None] * RANKS  # of matrices, by rank

    def all_gather_object(values, value, group=None):
        ranges[dist.get_rank()] = value
        values[:] = [of_rank or value for of_rank in ranges]

    monkeypatch.setattr(dist, 'all_gather_object', all_gather_object)

    def of(strategy, run, numbers=range(RANKS)):
        if (strategy, run.optimizer) == ('zero1', 'muon'):  # so that each then knows all ranges
            for rank in range(RANKS):
                with fake_group(RANKS, rank):
                    Rank(strategy, rank, run)
        for rank in numbers:
            with fake_group(RANKS, rank):
                yield Rank(strategy, rank, run)

    return of


def run_options(**changed):
    return options(seed=1, distributed_timeout=60, reduce_dtype='float32', **changed)


@pytest.mark.parametrize(('micro_steps', 'reduce_dtype'), [(1, 'float32'), (3, 'bfloat16')])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('strategy', STRATEGIES)
def test_update_sends_what_is_reported(strategy, optimizer, micro_steps, reduce_dtype, ranks):
    run = run_options(optimizer=optimizer)
    run.reduce_dtype = reduce_dtype
    sent, reported = 0.0, 0.0
    for rank in ranks(strategy, run, range(RANKS) if optimizer == 'muon' else (0, 5)):
        rank.update(micro_steps)  # DDP arranges its buckets in the first one
        *accumulated, last, step = rank.update(micro_steps)
        elements = sum(parameter.numel() for parameter in rank.model.parameters())

        # Gradients are reduced in the last backward pass only, bucket by bucket.
        assert accumulated == [[]] * (micro_steps - 1)
        assert len(last) > 3 and {call.name for call in last} == {'all_reduce'}
        assert {call.dtype for call in last} == {getattr(torch, reduce_dtype)}
        assert sum(call.elements for call in last) == elements

        # Then matrices are exchanged, and at last parameters are gathered.
        names = [call.name for call in step]
        gathers = ['all_gather'] if strategy == 'zero1' else []
        exchanges = len(names) - len(gathers)
        assert names == ['all_to_all'] * exchanges + gathers
        assert bool(exchanges) == (optimizer == 'muon')
        if gathers:
            assert step[-1].elements == rank.parallel.flat.numel() >= elements

        # What is sent.
        calls = [*last, *step]
        fixed = sum(call.bytes_sent for call in calls if call.name != 'all_to_all')
        assert fixed == pytest.approx(rank.parallel.bytes_sent(rank.model, micro_steps))
        sent += sum(call.bytes_sent for call in calls if call.name == 'all_to_all')
        reported += rank.inner.bytes_sent
    # Muon reports the mean of the ranks, of which some own more matrices.
    assert sent == pytest.approx(reported) and bool(sent) == (optimizer == 'muon')


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_gradients_lie_in_buckets_from_the_first_micro_step(strategy, ranks):
    """And nowhere else, so that they take 4 bytes per parameter, however many micro-steps."""
    for rank in ranks(strategy, run_options(optimizer='adamw'), (2,)):
        parameters = list(rank.model.parameters())

        def storages(parameters=parameters) -> dict[int, int]:
            found = [parameter.grad.untyped_storage() for parameter in parameters]
            return {storage.data_ptr(): storage.nbytes() for storage in found}

        nbytes, places = sum(parameter.nbytes for parameter in parameters), []
        assert sum(storages().values()) == nbytes
        for _ in range(2):
            for last in (False, False, True):
                with rank.parallel.micro_step(rank.wrapped, last=last):
                    loss, count, _ = rank.wrapped(rank.tokens, rank.tokens)
                rank.optimizer.backward(loss / count)
                places.append(storages())
            rank.optimizer.step(1e-3, torch.zeros(()), measured=True)
            places.append(storages())
            assert not any(parameter.grad.any() for parameter in parameters)
        # DDP arranges its buckets in the first forward pass; they stay from then on.
        assert all(place == places[0] for place in places)
        assert sum(places[0].values()) == nbytes and len(places[0]) > 3


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_parameters_and_shards_are_aligned(optimizer, ranks):
    """Compiled graphs rely on it for parameters; 128 bytes are those of a memory transaction."""
    for rank in ranks('zero1', run_options(optimizer=optimizer)):
        assert any(parameter.numel() % 4 for parameter in rank.model.parameters())
        begin = rank.parallel.flat.data_ptr()
        tensors = [
            *rank.model.parameters(),
            *(shard.tensor for shard in rank.parallel.shards.values()),
        ]
        offsets = [tensor.data_ptr() - begin for tensor in tensors if tensor.numel()]
        assert all(offset % strategies.ALIGNMENT == 0 for offset in offsets)
        states = [t for state in rank.inner.state.values() for t in state.values() if t.numel()]
        assert states and all(state.data_ptr() % 16 == 0 for state in states)


def test_groups_of_hybrid_sharding_have_the_timeout_of_the_run(monkeypatch):
    """Not torch's own of 30 minutes, after which a lost rank would be noticed late."""
    timeouts = []
    monkeypatch.setattr(
        dist.distributed_c10d,
        '_set_pg_timeout',
        lambda timeout, group: timeouts.append((timeout.total_seconds(), group.size())),
    )
    run = run_options(fsdp_shard_size=4)
    with fake_group(RANKS, 5):
        FullySharded(run, CPU)
    assert sorted(timeouts) == [(60.0, 2), (60.0, 4)]
