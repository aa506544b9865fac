"""optim/schedules.py: against nanoGPT and torch, at the boundaries; problems and notes."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.in_process import train_here
from helpers.optimizer_options import RUN, options
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from configurator import read_command_line
from optim.schedules import learning_rate_at
from planning.plan import plan_run
from training_config import (
    SCHEDULE_REGISTRY,
    Settings,
    load_settings,
    schema,
)

CPU = torch.device('cpu')


def nanogpt_lr(it, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """nanoGPT's three cases, in the order of its comments."""
    if it < warmup_iters:  # 1) linear warm-up
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:  # 2) the minimum
        return min_lr
    ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)  # 3) cosine in between
    return min_lr + (learning_rate - min_lr) * (1 + math.cos(math.pi * ratio)) / 2


@pytest.mark.parametrize(('warmup', 'decay'), [(10, 100), (0, 100), (0, 1), (99, 100), (1, 7)])
def test_cosine_matches_nanogpt(warmup, decay):
    run = options(warmup_iters=warmup, lr_decay_iters=decay)
    ours = [learning_rate_at(step, run) for step in range(2 * decay)]
    theirs = [nanogpt_lr(step, 6e-4, 6e-5, warmup, decay) for step in range(2 * decay)]
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_learning_rate_at_boundaries():
    assert learning_rate_at(0, RUN) == pytest.approx(6e-4 / 11)
    assert learning_rate_at(10, RUN) == 6e-4  # the warm-up has ended, the cosine begins at the peak
    assert learning_rate_at(55, RUN) == pytest.approx((6e-4 + 6e-5) / 2)
    assert learning_rate_at(100, RUN) == learning_rate_at(10**9, RUN) == 6e-5
    # Warm-up as long as the decay, or longer: straight to the minimum, no division by zero.
    assert learning_rate_at(100, options(warmup_iters=100)) == 6e-5
    assert learning_rate_at(100, options(warmup_iters=101)) == pytest.approx(6e-4 * 101 / 102)


def test_learning_rate_without_decay_is_constant():
    run = options(decay_lr=False)
    assert {learning_rate_at(step, run) for step in (0, 5, 10, 50, 1000)} == {6e-4}


def torchs_rates(run, *schedules, milestones=()) -> list[float]:
    """Learning rates of 2 · 100 iterations by torch's schedulers, one after the other."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=run.learning_rate)
    made = [make(optimizer) for make in schedules]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, made, list(milestones))
    rates = []
    for _ in range(200):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def warm_up(updates):
    return lambda optimizer: torch.optim.lr_scheduler.LinearLR(
        optimizer, 1 / (updates + 1), 1.0, updates
    )


def straight(to, updates):
    return lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, to, updates)


def constant(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def root(to, updates):
    """Hägele et al. 2024, equation 1: f(n) = 1 − √n, here down to a share `to`."""
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: to + (1 - to) * (1 - math.sqrt(min(1.0, n / updates)))
    )


@pytest.mark.parametrize(
    ('changed', 'schedules', 'milestones'),
    [
        ({'lr_schedule': 'linear'}, [warm_up(10), straight(0.1, 90)], [10]),
        ({'lr_schedule': 'constant'}, [warm_up(10), constant], [10]),
        (
            {'lr_schedule': 'wsd', 'decay_fraction': 0.3, 'decay_shape': 'linear'},
            [warm_up(10), constant, straight(0.1, 30)],
            [10, 70],
        ),
        (
            {'lr_schedule': 'wsd', 'decay_fraction': 0.2, 'decay_shape': '1-sqrt'},
            [warm_up(10), constant, root(0.1, 20)],
            [10, 80],
        ),
    ],
    ids=['linear', 'constant', 'wsd linear', 'wsd 1-sqrt'],
)
def test_schedules_match_torch(changed, schedules, milestones):
    run = options(**changed)
    ours = [learning_rate_at(step, run) for step in range(200)]
    assert ours == pytest.approx(torchs_rates(run, *schedules, milestones=milestones), rel=1e-9)


SHAPES_OF_DECAY = {
    # Upper limit of the decrease in one of n iterations of a decay, as a fraction of the total.
    'cosine': lambda n: math.pi / (2 * n),
    'linear': lambda n: 1 / n,
    '1-sqrt': lambda n: math.sqrt(1 / n),
}


def resolved(**chosen) -> tuple[SimpleNamespace, list[str]]:
    """The run's options with derived values, and the problems of the schedule before."""
    given = {'lr_decay_iters': None, 'min_lr': None, 'warmup_iters': None, **chosen}
    run = options(**given)
    schedule = SCHEDULE_REGISTRY[run.lr_schedule]
    problems = schedule.problems(run)
    for key, (value, _) in schedule.derived_values(run).items():
        if getattr(run, key) is None:
            setattr(run, key, value)
    return run, problems


def planned_settings(**chosen) -> Settings:
    arguments = [f'--{key}={value}' for key, value in {'plan': True, **chosen}.items()]
    return load_settings(read_command_line(arguments, schema))


updates = st.integers(0, 60)


@pytest.mark.slow
@given(
    lr_schedule=st.sampled_from(('constant', 'cosine', 'linear', 'wsd')),
    max_iters=st.integers(1, 60),
    warmup_iters=st.none() | updates,
    lr_decay_iters=st.none() | st.integers(1, 60),
    min_lr=st.none() | st.sampled_from((0.0, 1e-5, 6e-4, 1e-3)),
    decay_fraction=st.sampled_from((0.0, 0.1, 0.5, 1.0)) | st.floats(0, 1),
    decay_shape=st.sampled_from(('1-sqrt', 'linear')),
)
@settings(max_examples=500, deadline=None)
def test_learning_rate_is_continuous_and_bounded(**chosen):
    run, problems = resolved(**chosen)
    top, warm_up, end = run.learning_rate, run.warmup_iters, run.lr_decay_iters
    rates = [learning_rate_at(step, run) for step in range(run.max_iters)]
    named = run.decay_shape if run.lr_schedule == 'wsd' else run.lr_schedule
    decays = named != 'constant'
    length = 1
    if decays:
        span = round(run.decay_fraction * end) if run.lr_schedule == 'wsd' else end
        length = max(1, min(span, end - warm_up))
    if problems:  # there is a jump, or a rise
        fall = max((a - b for a, b in itertools.pairwise(rates)), default=0.0)
        assert run.min_lr >= top or fall > 0.49 * top - run.min_lr
        return
    lowest = min(top / (warm_up + 1), run.min_lr if decays else top)
    assert all(lowest <= rate <= top for rate in rates)
    rising, falling = rates[: warm_up + 1], rates[warm_up:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert all(b - a <= 1.001 * top / (warm_up + 1) for a, b in itertools.pairwise(rising))
    if warm_up < run.max_iters:
        assert rates[warm_up] == top
    if decays:
        most = SHAPES_OF_DECAY[named](length) * (top - run.min_lr)
        assert all(a - b <= most * 1.001 for a, b in itertools.pairwise(falling))
        assert warm_up >= run.max_iters or all(rate == run.min_lr for rate in rates[end:])
    # Unexpected ends of a schedule are noted.
    notes = ' '.join(SCHEDULE_REGISTRY[run.lr_schedule].notes(run))
    assert ('ends during warm-up' in notes) == (warm_up >= run.max_iters)
    if decays:
        assert ('stays at min_lr' in notes) == (max(end, warm_up) < run.max_iters)
        assert ('ends before the decay' in notes) == (warm_up < run.max_iters < end)
    if run.lr_schedule == 'wsd' and warm_up < min(end, run.max_iters):
        assert ('is shorter' in notes) == (end - max(1, round(run.decay_fraction * end)) < warm_up)


@pytest.mark.parametrize(
    ('chosen', 'why'),
    [
        (
            {'lr_decay_iters': 10, 'warmup_iters': 10},
            'lr_decay_iters=10 is not above warmup_iters=10',
        ),
        ({'lr_decay_iters': 2}, r'warmup_iters=3: .*--warmup_iters=0'),  # a derived warm-up
        (
            {'lr_schedule': 'wsd', 'decay_fraction': 0.0, 'lr_decay_iters': 30, 'warmup_iters': 5},
            'decay_fraction=0 with lr_decay_iters=30',
        ),
        ({'min_lr': 1.0}, 'min_lr=1 is above'),
    ],
)
def test_discontinuous_schedule_is_rejected(chosen, why):
    with pytest.raises(UserError, match=why):
        planned_settings(max_iters=60, **chosen)


@pytest.mark.slow
def test_schedule_notes_in_run_and_plan(tiny_dataset, tmp_path):
    run = train_here(tiny_dataset, tmp_path, max_iters=4, lr_decay_iters=2, eval_iters=1)
    said = [event['message'] for event in run.events('note')]
    assert any(note.startswith('lr_decay_iters=2 is below max_iters=4') for note in said)
    rates = [entry['lr'] for entry in run.record['training_iterations']]
    assert rates[2:] == [run.record['config']['min_lr']] * 2
    plan = plan_run(planned_settings(max_iters=4, warmup_iters=9, n_layer=1, n_embd=8, n_head=1))
    assert any(note.startswith('warmup_iters=9 is not below') for note in plan['notes'])
