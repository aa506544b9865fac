"""Runs with non-finite losses or gradients: stop, skip and rollback; and loss spikes.

The non-finite values come from bad data: sequences whose loss or gradient is not finite.
"""

import itertools
import math

import pytest
import torch
from helpers.in_process import Run, train_here

from data.dataset import TokenDataset
from model_builder import build_model
from optim.step import GuardedOptimizer
from parallel import strategies
from training import stability
from training.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow

SEQUENCES = 4  # per iteration: two micro-batches of two
OPTIONS = {'eval_iters': 1, 'n_layer': 1, 'learning_rate': 1e-2, 'warmup_iters': 0}


@pytest.fixture
def broken_data(monkeypatch):
    """broken_data(is_bad, kind) damages the second micro-batch of batch n if is_bad(n).

    kind: the non-finite value, 'loss' or 'gradient'; or 'spike', a finite loss that is too large.
    Returns a list of the first sequence number of each micro-batch that training reads.
    """
    first_numbers = []

    def install(is_bad, kind: str = 'loss') -> list[int]:
        batch, build = TokenDataset.batch, strategies.build_model

        def recorded_batch(dataset, order, first_number, count):
            first_numbers.append(first_number)
            return batch(dataset, order, first_number, count)

        def damage(model, arguments, output):
            if isinstance(output, torch.Tensor):  # no loss: checks at start, or generation
                return None
            number = first_numbers[-1] if model.training else 0
            if number % SEQUENCES == 0 or not is_bad(number // SEQUENCES):
                return None
            loss_sum, count, auxiliary = output
            if kind == 'gradient':
                loss_sum.register_hook(lambda gradient: gradient * math.inf)
                return None
            return loss_sum * (math.nan if kind == 'loss' else 100.0), count, auxiliary

        def build_damaged(*arguments):
            model = build(*arguments)
            model.register_forward_hook(damage)
            return model

        monkeypatch.setattr(TokenDataset, 'batch', recorded_batch)
        monkeypatch.setattr(strategies, 'build_model', build_damaged)
        return first_numbers

    return install


def batches_of(first_numbers: list[int]) -> list[int]:
    """The numbers of the batches that were trained on, in order."""
    assert first_numbers[1::2] == [first + 2 for first in first_numbers[::2]]
    return [first // SEQUENCES for first in first_numbers[::2]]


def plain_weights(run: Run, data: list[int]) -> dict[str, torch.Tensor]:
    """The weights after plain AdamW on these batches (None: skipped, the schedule advances)."""
    settings = run.session.settings
    model = build_model(settings.architecture, 'cpu', settings.run.seed)
    groups = [
        {'params': [p for p in model.parameters() if (p.dim() > 1) == decayed], 'weight_decay': w}
        for decayed, w in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    steps = len(data)
    for step, number in enumerate(data):
        if number is None:
            continue
        rate = 1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        dataset = run.session.dataset
        batch = dataset.batch(dataset.order('random', 1337), number * SEQUENCES, SEQUENCES)
        loss_sum, count, _ = model(*map(torch.from_numpy, batch))
        optimizer.zero_grad()
        (loss_sum / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group['lr'] = rate
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_close(weights: dict, expected: dict) -> None:
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)


def nonfinite_counts(run: Run) -> list[tuple[int, int]]:
    """(iter, count) of the events that count non-finite iterations."""
    return [(e['iter'], e['count']) for e in run.events('nonfinite') if 'count' in e]


KINDS = pytest.mark.parametrize('kind', ['loss', 'gradient'])


# --- stop -----------------------------------------------------------------------------------------


@KINDS
def test_stop_names_last_checkpoint(broken_data, tiny_dataset, tmp_path, capsys, kind):
    broken_data(lambda batch: batch == 3, kind)
    run = train_here(tiny_dataset, tmp_path, **OPTIONS, max_iters=9, eval_interval=2)
    assert run.code == 2
    error = capsys.readouterr().err
    assert 'not finite in 1 iteration(s) up to iter 3' in error
    assert '--on_nonfinite=skip' in error and '--on_nonfinite=rollback' in error
    assert 'iter_00000002' in error and 'Traceback' not in error
    record = run.record
    assert record['status'] == 'failed'
    assert nonfinite_counts(run) == [(3, 1)]
    last = record['training_iterations'][-1]
    assert (last['iter'], last['loss'] is None) == (3, kind == 'loss')
    assert last['gradients']['norm'] is None
    folders = [path.name for path in (run.folder / 'checkpoints').iterdir()]
    assert folders == ['iter_00000002']
    # The weights in memory are also intact.
    assert all(torch.isfinite(weight).all() for weight in run.weights().values())


def test_stop_without_checkpoint_says_so(broken_data, tiny_dataset, tmp_path, capsys):
    broken_data(lambda batch: batch == 0)
    run = train_here(tiny_dataset, tmp_path, **OPTIONS)
    assert (run.code, run.record['status']) == (2, 'failed')
    assert 'No checkpoint exists' in capsys.readouterr().err
    assert not list((run.folder / 'checkpoints').iterdir())


@pytest.mark.parametrize(('log_interval', 'eval_interval'), [(5, 100), (100, 4)])
def test_nonfinite_is_detected_at_next_log_or_save(
    broken_data, tiny_dataset, tmp_path, capsys, log_interval, eval_interval
):
    broken_data(lambda batch: batch in (1, 3))
    run = train_here(
        tiny_dataset,
        tmp_path,
        **OPTIONS,
        max_iters=9,
        log_interval=log_interval,
        eval_interval=eval_interval,
    )
    assert run.code == 2
    detected_at = 5 if log_interval == 5 else 3  # the last iteration before the stop
    assert nonfinite_counts(run) == [(detected_at, 2)]
    assert f'2 iteration(s) up to iter {detected_at}' in capsys.readouterr().err
    assert not list((run.folder / 'checkpoints').iterdir())


# --- skip -----------------------------------------------------------------------------------------


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize('log_interval', [1, 4])
def test_skip_omits_only_nonfinite_iterations(
    broken_data, tiny_dataset, tmp_path, kind, log_interval
):
    first_numbers = broken_data(lambda batch: batch in (2, 3, 5), kind)
    run = train_here(
        tiny_dataset,
        tmp_path,
        **OPTIONS,
        max_iters=8,
        log_interval=log_interval,
        on_nonfinite='skip',
    )
    assert (run.code, run.record['status']) == (0, 'finished')
    assert batches_of(first_numbers) == list(range(8))
    expected = [(2, 1), (3, 1), (5, 1)] if log_interval == 1 else [(4, 2), (7, 1)]
    assert nonfinite_counts(run) == expected
    assert run.record['summary']['final_iter'] == 8
    assert_close(run.weights(), plain_weights(run, [0, 1, None, None, 4, None, 6, 7]))
    assert run.saved_weights().keys() == run.weights().keys()
    for name, weight in run.weights().items():
        assert torch.equal(run.saved_weights()[name], weight)


# --- rollback -------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize('log_interval', [1, 100])
def test_rollback_skips_data_since_checkpoint(
    broken_data, tiny_dataset, tmp_path, kind, log_interval
):
    first_numbers = broken_data(lambda batch: batch == 5, kind)
    run = train_here(
        tiny_dataset,
        tmp_path,
        **OPTIONS,
        max_iters=9,
        eval_interval=3,
        log_interval=log_interval,
        on_nonfinite='rollback',
    )
    record = run.record
    assert (run.code, record['status']) == (0, 'finished')
    # Back to the checkpoint after 3 iterations; batches 3, 4 and 5 are not used again.
    assert batches_of(first_numbers) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert_close(run.weights(), plain_weights(run, [0, 1, 2, 6, 7, 8, 9, 10, 11]))
    (event,) = run.events('rollback')
    assert (event['iter'], event['from_iter']) == (3, 6)
    assert event['checkpoint'] == 'checkpoints/iter_00000003'
    # The record has each iteration once, without those that were undone.
    logged = list(range(9)) if log_interval == 1 else [0, 8]
    assert [e['iter'] for e in record['training_iterations']] == logged
    assert None not in run.losses
    assert [e['iter'] for e in record['eval_steps']] == [0, 3, 6, 9]
    assert record['summary']['final_iter'] == 9


def test_rollback_to_checkpoint_in_progress(delayed_saves, broken_data, tiny_dataset, tmp_path):
    first_numbers = broken_data(lambda batch: batch == 5)
    options = {'max_iters': 9, 'eval_interval': 3, 'on_nonfinite': 'rollback', 'async_save': True}
    run = train_here(tiny_dataset, tmp_path, **OPTIONS, **options)
    assert (run.code, run.record['status']) == (0, 'finished')
    assert batches_of(first_numbers) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert_close(run.weights(), plain_weights(run, [0, 1, 2, 6, 7, 8, 9, 10, 11]))
    assert [event['iter'] for event in run.events('rollback')] == [3]
    assert [entry['iter'] for entry in run.record['checkpoints']] == [3, 6, 9]


def test_second_rollback_skips_more_data(broken_data, tiny_dataset, tmp_path):
    first_numbers = broken_data(lambda batch: batch in (4, 7))
    run = train_here(
        tiny_dataset, tmp_path, **OPTIONS, max_iters=6, eval_interval=3, on_nonfinite='rollback'
    )
    assert run.code == 0
    # 0 1 2 | 3 4!, back to 3: 5 6 7!, back to 3: 8 9 10
    assert batches_of(first_numbers) == list(range(11))
    assert_close(run.weights(), plain_weights(run, [0, 1, 2, 8, 9, 10]))
    assert [event['from_iter'] for event in run.events('rollback')] == [5, 6]


def test_resume_after_rollback_keeps_data_position(broken_data, tiny_dataset, tmp_path):
    first_numbers = broken_data(lambda batch: batch == 4)
    options = {**OPTIONS, 'eval_interval': 3, 'on_nonfinite': 'rollback', 'lr_decay_iters': 9}
    train_here(tiny_dataset, tmp_path, **options, max_iters=6)
    before = len(first_numbers)
    run = train_here(tiny_dataset, tmp_path, **options, max_iters=9, init_from='resume')
    assert batches_of(first_numbers[before:]) == [8, 9, 10]
    assert run.session.progress.rollbacks == 1
    assert_close(run.weights(), plain_weights(run, [0, 1, 2, 5, 6, 7, 8, 9, 10]))


def test_rollbacks_are_limited(broken_data, tiny_dataset, tmp_path, capsys):
    first_numbers = broken_data(lambda batch: batch >= 2)
    run = train_here(
        tiny_dataset, tmp_path, **OPTIONS, max_iters=9, eval_interval=2, on_nonfinite='rollback'
    )
    assert (run.code, run.record['status']) == (2, 'failed')
    assert len(run.events('rollback')) == stability.MAX_ROLLBACKS
    assert batches_of(first_numbers) == list(range(2 + 1 + stability.MAX_ROLLBACKS))
    assert 'iter_00000002' in capsys.readouterr().err
    assert [path.name for path in (run.folder / 'checkpoints').iterdir()] == ['iter_00000002']


def test_rollback_without_checkpoint_fails(broken_data, tiny_dataset, tmp_path, capsys):
    broken_data(lambda batch: batch == 1)
    run = train_here(tiny_dataset, tmp_path, **OPTIONS, on_nonfinite='rollback')
    assert (run.code, run.record['status']) == (2, 'failed')
    assert 'No checkpoint exists' in capsys.readouterr().err


# --- Evaluations and weights ----------------------------------------------------------------------


@pytest.mark.parametrize(('call', 'split'), [(2, 'train_loss'), (3, 'val_loss')])
def test_nonfinite_evaluation_is_never_best(tiny_dataset, tmp_path, monkeypatch, call, split):
    build, calls = strategies.build_model, itertools.count()

    def damage(model, arguments, output):
        if isinstance(output, torch.Tensor):  # no loss: checks at start
            return None
        if model.training or next(calls) != call:  # two splits per evaluation
            return None
        return torch.tensor(math.nan), *output[1:]

    def build_damaged(*arguments):
        model = build(*arguments)
        model.register_forward_hook(damage)
        return model

    monkeypatch.setattr(strategies, 'build_model', build_damaged)
    run = train_here(tiny_dataset, tmp_path, **OPTIONS, max_iters=4, eval_interval=2)
    assert run.code == 0
    steps = run.record['eval_steps']
    assert [step[split] is None for step in steps] == [False, True, False]
    assert [event['iter'] for event in run.events('nonfinite')] == [2]
    known = [step['val_loss'] for step in steps if step['val_loss'] is not None]
    assert run.record['summary']['best_val_loss'] == min(known)


def test_nonfinite_weights_are_not_saved(tiny_dataset, tmp_path, monkeypatch, capsys):
    step, calls = GuardedOptimizer.step, itertools.count(1)

    def overflowing(self, *arguments, **keywords):
        sums = step(self, *arguments, **keywords)
        if next(calls) == 3:
            self.parameters[0].data.view(-1)[0] = math.inf
        return sums

    monkeypatch.setattr(GuardedOptimizer, 'step', overflowing)
    run = train_here(
        tiny_dataset, tmp_path, **OPTIONS, max_iters=4, eval_interval=1, always_save_checkpoint=True
    )
    assert (run.code, run.record['status']) == (2, 'failed')
    error = capsys.readouterr().err
    assert (
        'weights are not all finite after 3 iterations' in error and 'did not change' not in error
    )
    assert 'The last checkpoint is' in error and 'iter_00000002' in error
    assert list_checkpoints(run.folder / 'checkpoints')[0].name == 'iter_00000002'


# --- Spikes ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_loss_spike_is_recorded(broken_data, tiny_dataset, tmp_path):
    broken_data(lambda batch: batch == 40, 'spike')
    options = {**OPTIONS, 'learning_rate': 1e-4, 'block_size': 8, 'n_embd': 16}
    run = train_here(tiny_dataset, tmp_path, **options, max_iters=44)
    assert run.code == 0
    assert [event['iter'] for event in run.events('loss_spike')] == [40]
    assert not run.events('nonfinite')


def test_loss_spike_threshold():
    """More than six standard deviations above the mean of the last 32 logged losses."""
    losses = [4.0 + 0.1 * (-1) ** i for i in range(32)]  # mean 4, deviation 0.1
    for loss, expected in ((4.59, False), (4.61, True), (math.inf, True), (0.0, False)):
        recent = list(losses)
        assert stability.is_spike(loss, recent) == expected
        assert recent == ([*losses[1:], loss] if math.isfinite(loss) else losses)
    assert not stability.is_spike(math.nan, list(losses))
    assert not stability.is_spike(1e9, losses[1:])  # too few recent losses
