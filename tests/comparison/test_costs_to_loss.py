"""The cost to the baseline's loss: recomputed with numpy.interp, by run and over the seeds."""

import json
import random

import numpy as np
import pytest
from helpers.ladder_records import write_ladder
from helpers.run_records import STUDY, compared, decaying, rows, section, study_record, write_study

from comparison.answer import compare_runs
from comparison.compare import compare
from comparison.costs_to_loss import GroupCost, RunCost, cost_to_baseline
from comparison.formats import render_json, render_markdown, render_text
from comparison.load import read_runs
from comparison.runs import DIVERGED

VARIANTS = STUDY['variants'][:3]
BASELINE = VARIANTS[0]['label']
TITLE = 'COST TO BASELINE LOSS'


def study(folder, losses, change=lambda n, seed, record: None, seeds=(1, 2, 3)):
    """The comparison of a study with the losses `losses(n, seed)` of variant n."""
    records = []
    for n, variant in enumerate(VARIANTS):
        of_variant = [study_record(n, seed, losses(n, seed), variant['asked']) for seed in seeds]
        for seed, record in zip(seeds, of_variant):
            change(n, seed, record)
        records.append(of_variant)
    write_study(folder, VARIANTS, records, baseline=BASELINE, tuned=[])
    return compared(folder)


def by_label(comparison):
    return dict(zip(comparison.labels, cost_to_baseline(comparison)))


def measured(run, cost):
    """Costs and losses of a run's evaluations."""
    return np.array([(getattr(point, cost), point.loss) for point in run.curve]).T


def test_baseline_needs_all_and_faster_variants_need_their_share(tmp_path):
    """Variant n has the curve of the baseline at a cost that is 1 / (1 + n / 4) of its."""

    def losses(n, seed):
        return [2 + 0.1 * seed + 3 * (i * (1 + n / 4)) ** -0.5 for i in range(1, 11)]

    for label, group in by_label(study(tmp_path, losses)).items():
        n = [variant['label'] for variant in VARIANTS].index(label)
        share = 1 / (1 + n / 4)
        for cost, price in (('tokens', 1), ('flops', 1 + n), ('seconds', 1)):
            median, low, high = group.spread(cost)
            assert {median.relation, low.relation, high.relation} == {''}
            # The curve is convex, so a straight line between its points crosses too late, by less
            # than the distance of two evaluations.
            assert price * share <= median.value < price * (share + 0.01)
            assert high.value - low.value < 1e-9  # the same curve, shifted
            if n == 0:
                assert median.value == 1


def test_crossings_equal_those_of_the_interpolated_curve(tmp_path):
    draw = random.Random(3)

    def losses(n, seed):
        return [loss - 0.15 * n + draw.uniform(-0.3, 0.3) for loss in decaying(0, seed)]

    crossed = 0
    for group in by_label(study(tmp_path, losses)).values():
        for run in group.runs:
            for cost, amount in run.amounts.items():
                costs, values = measured(run.run, cost)
                if run.relation == '>':
                    assert amount == costs[-1] and min(values) > run.loss
                elif run.relation == '<':
                    assert amount == costs[0] and values[0] <= run.loss
                else:
                    crossed += 1
                    assert np.interp(amount, costs, values) == pytest.approx(run.loss, abs=1e-9)
                    before = np.linspace(costs[0], amount * (1 - 1e-6), 300)
                    assert min(np.interp(before, costs, values)) > run.loss
    assert crossed > 9


def test_run_has_baseline_of_its_seed_or_else_its_mean(tmp_path):
    def unfinished(n, seed, record):
        if n == 0 and seed == 3:
            record['status'] = 'interrupted'

    comparison = study(tmp_path, lambda n, seed: decaying(-2 * n, seed), unfinished)
    costs = by_label(comparison)
    losses = [run.run.curve[-1].loss for run in costs[BASELINE].runs[:2]]
    for run, paired, loss in zip(
        costs[VARIANTS[1]['label']].runs, (True, True, False), (*losses, np.mean(losses))
    ):
        assert (run.paired, run.loss) == (paired, pytest.approx(loss))
        assert run.ratios['tokens'] == pytest.approx(run.amounts['tokens'] / 409600)
    assert 'for 3 runs without one: the mean of its runs' in ' '.join(
        section(render_text(comparison), TITLE)
    )


def fast_or_slow(n, seed):
    """Variant 1 ends below the baseline with the seeds 1 and 2, and above it with 3."""
    return [loss + (0, 0.4 * (seed - 2.5), 0.6)[n] for loss in decaying(0, seed)]


def test_runs_that_do_not_reach_the_loss_are_counted_and_bounded(tmp_path):
    def changed(n, seed, record):
        if n == 2:  # ends early: diverged, running, without any evaluation
            record['status'] = ('failed', 'running', 'interrupted')[seed - 1]
            del record['eval_steps'][(5, 7, 1)[seed - 1] :]
            if seed == 1:
                record['eval_steps'][-2]['val_loss'] = 0.5  # low once, before it diverged
                record['eval_steps'][-1]['val_loss'] = None

    comparison = study(tmp_path, fast_or_slow, changed)
    costs = by_label(comparison)
    reaching, missing = (costs[variant['label']] for variant in VARIANTS[1:])
    assert (reaching.reached, missing.reached) == (2, 0)
    first, second, third = (run.ratios['tokens'] for run in reaching.runs)
    assert first < second < 1 == third
    assert reaching.spread('tokens') == ((second, ''), (first, ''), (1, '>'))
    # The diverged run does not count as one that reaches the loss, although it was below it once.
    assert [run.ratios['tokens'] for run in missing.runs] == pytest.approx([0.3, 0.6, 0])
    spread = missing.spread('flops')  # a token of variant 2 costs three times as much
    assert [ratio.value for ratio in spread[:2]] == pytest.approx([1.8, 0])
    assert [ratio.relation for ratio in spread] == ['>', '>', 'diverged']
    assert missing.diverged == 1
    # The same in every format.
    cells = {row['architecture']: row for row in rows(render_text(comparison), TITLE)}
    row = cells[VARIANTS[1]['label']]
    text = f'{second:.2f} ({first:.2f} to > 1.00)'
    assert (row['reached'], row['tokens']) == ('2 of 3', text)
    row = cells[VARIANTS[2]['label']]
    assert row['training FLOPs'] == '> 1.80 (> 0.00 to diverged)'
    assert row['reached'] == '0 of 3, 1 diverged'
    assert text.replace('>', '&#62;') in render_markdown(comparison)
    data = json.loads(render_json(comparison))['groups']
    entry = next(group for group in data if group['label'] == VARIANTS[1]['label'])
    entry = entry['cost_to_baseline']
    assert entry['reached'] == 2
    assert entry['ratios']['tokens']['high'] == {'value': 1, 'relation': '>'}
    assert {run['seed']: run['ratios']['tokens'] for run in entry['runs']} == {
        1: first,
        2: second,
        3: third,
    }


@pytest.mark.parametrize(
    ('ratios', 'median', 'low', 'high'),
    [
        ([('', 0.9), ('', 0.7)], ('', 0.8), ('', 0.7), ('', 0.9)),
        ([('>', 1.0), ('', 0.8)], ('>', 0.9), ('', 0.8), ('>', 1.0)),
        ([('<', 0.1), ('', 0.8)], ('<', 0.45), ('<', 0.1), ('', 0.8)),
        ([('<', 0.1), ('>', 1.0)], ('>', 0.5), ('<', 0.1), ('>', 1.0)),
        ([('', 0.8), ('', 0.9), ('>', 0.2)], ('', 0.9), ('', 0.8), ('>', 0.9)),
        ([('>', 0.2), ('', 0.8), ('>', 1.0)], ('>', 0.8), ('', 0.8), ('>', 1.0)),
        ([(DIVERGED, 0.1), ('', 0.8)], (DIVERGED, 0.8), ('', 0.8), (DIVERGED, 0.8)),
    ],
)
def test_spread_of_bounds(ratios, median, low, high):
    runs = [
        RunCost(None, 3.0, True, relation, {'tokens': 1.0}, {'tokens': value})
        for relation, value in ratios
    ]
    spread = GroupCost(None, runs).spread('tokens')
    expected = [(pytest.approx(value), relation) for relation, value in (median, low, high)]
    assert [tuple(ratio) for ratio in spread] == expected


def test_costs_that_are_unknown_or_meaningless_have_no_column(tmp_path):
    def untimed(n, seed, record):
        del record['eval_steps'][3]['train_seconds']

    def concurrent(n, seed, record):
        record['metadata']['concurrent_runs'] = 2

    for name, change, keys in (
        ('untimed', untimed, ['tokens', 'flops', 'seconds']),
        ('concurrent', concurrent, ['tokens', 'flops']),
    ):
        comparison = study(tmp_path / name, fast_or_slow, change)
        assert [*cost_to_baseline(comparison)[0].runs[0].ratios] == keys
        header = rows(render_text(comparison), TITLE)[0]
        assert [*header] == ['#', 'reached', 'tokens', 'training FLOPs', 'architecture']


def test_best_losses_are_compared_where_runs_are_ranked_by_them(tmp_path):
    def losses(n, seed):
        return [*(loss + 0.02 * n for loss in decaying(0, seed)[:-2]), 4.0, 4.0 - 0.3 * n]

    final = study(tmp_path, losses)
    best = compare(read_runs([tmp_path], score='best')[0], score='best')
    for comparison, kind in ((final, 'final'), (best, 'best')):
        text = render_text(comparison)
        assert f'the {kind} loss of the baseline' in ' '.join(section(text, TITLE))
        for group in cost_to_baseline(comparison):
            for run in group.runs:
                costs, values = measured(run.run, 'tokens')
                if run.relation == '':
                    value = np.interp(run.amounts['tokens'], costs, values)
                    assert value == pytest.approx(run.loss)
    assert by_label(best)[BASELINE].spread('tokens').median.value == 0.8
    assert [cost.reached for cost in cost_to_baseline(best)] == [3, 0, 0]


def test_no_section_without_curves_or_finished_baseline(tmp_path):
    def one_evaluation(n, seed, record):
        del record['eval_steps'][1:-1]

    def unfinished(n, seed, record):
        record['status'] = 'running' if n == 0 else record['status']

    for change in (one_evaluation, unfinished):
        comparison = study(tmp_path / change.__name__, fast_or_slow, change)
        assert cost_to_baseline(comparison) == []
        assert TITLE not in render_text(comparison)
        groups = json.loads(render_json(comparison))['groups']
        assert {group['cost_to_baseline'] for group in groups} == {None}


def test_ladder_has_the_costs_of_each_rung(tmp_path):
    def concurrent(record, place):
        if place.rung == 1:
            record['metadata']['concurrent_runs'] = 2

    folder = write_ladder(tmp_path, params=(100_000, 200_000), seeds=(1, 2), change=concurrent)
    comparison = compare_runs(read_runs([folder])[0])
    ladder = rows(render_text(comparison), TITLE)
    assert [row['rung'] for row in ladder] == ['1', '2']  # the last has only the baseline
    for row, rung in zip(ladder, comparison.rungs):
        at_rung = rows(render_text(rung.comparison), TITLE)
        (expected,) = (row for row in at_rung if row['architecture'] == 'ffn_type=swiglu')
        del expected['#']
        assert expected | {'rung': row['rung'], 'seconds of training': '-'} == (
            row | {'seconds of training': '-'}
        )
        assert ('seconds of training' in expected) == (row['seconds of training'] != '-')
