"""comparison/ladder.py: reading a ladder, its rungs and baseline, failures, the command line."""

import json
import shlex
import shutil
import statistics
from pathlib import Path

import pytest
from helpers.ladder_records import (
    CURVES,
    PARAMS,
    STANDARD,
    Curve,
    Place,
    diverge,
    interrupt,
    ladder_record,
    tokens_of,
    write_ladder,
)
from helpers.run_records import make_record, write

import compare_architectures as ca
from common.errors import UserError
from comparison.answer import compare_runs
from comparison.compare import Comparison
from comparison.formats import FORMATS
from comparison.ladder import LadderComparison
from comparison.ladder_headline import ladder_headline
from comparison.load import read_runs
from comparison.study_plan import read_study_plan

SWIGLU = 'ffn_type=swiglu'
SMALL = {'params': PARAMS[:2], 'extra': 0}  # no fit, so that the analysis is fast


def compared(folder, **options):
    return compare_runs(*read_runs([folder])[:1], **options)


# --- Reading -------------------------------------------------------------------------------------


def test_each_run_has_the_plan_at_its_rung(tmp_path):
    write_ladder(tmp_path, extra=1)
    runs, _ = read_runs([tmp_path])
    whole = read_study_plan(tmp_path)
    assert [rung.params for rung in whole.ladder.rungs] == [*PARAMS, 2 * PARAMS[-1]]
    assert [rung.extra for rung in whole.ladder.rungs] == [False] * 4 + [True]
    assert whole.rung is None and len(runs) == 2 * 4 * 3 + 3
    for run in runs:
        rung = run.study.rung
        assert run.study is whole.ladder.plans[rung.number - 1]
        assert run.params == rung.params and run.config['n_layer'] == rung.options['n_layer']
        assert run.study.budget == {'tokens': tokens_of(rung.params)}
        assert list(run.study.variants) == list(CURVES)[: 1 if rung.extra else 2]


def test_matched_and_tuned_options_are_those_of_the_rung(tmp_path, capsys):
    write_ladder(tmp_path, **SMALL, tuned=['learning_rate'])
    content = json.loads((tmp_path / 'study.json').read_text())
    for index, rung in enumerate(content['ladder']['rungs']):
        rung['variants'] = [
            {**v, 'tuned': {'learning_rate': 0.01 / (index + 1)}} for v in rung['variants']
        ]
    content['ladder']['rungs'][1]['variants'][1]['tuned_at_edge'] = ['learning_rate']
    (tmp_path / 'study.json').write_text(json.dumps(content))
    read_study_plan.cache_clear()
    ca.main([str(tmp_path)])
    text = capsys.readouterr().out
    tuning = text.split('TUNING')[1].split('\n\n')[0]
    assert f'{SWIGLU} at rung 2 learning_rate' in tuning
    assert [line.split()[1] for line in tuning.splitlines()[-4:]] == ['0.01'] * 2 + ['0.005'] * 2


def changed(content, *path, value):
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


@pytest.mark.parametrize(
    ('path', 'value'),
    [
        (('ladder',), 'steps'),
        (('ladder', 'rungs'), None),
        (('ladder', 'rungs'), [1]),
        (('ladder', 'rungs', 0, 'label'), None),
        (('ladder', 'rungs', 0, 'params'), 'many'),
        (('ladder', 'rungs', 0, 'params'), -5),
        (('ladder', 'rungs', 0, 'options'), []),
        (('ladder', 'rungs', 0, 'variants'), 7),
        (('ladder', 'rungs', 0, 'budget'), {'tokens': 'all'}),
        (('ladder', 'horizon'), 20),
        (('points', 0, 'rung'), 9),
        (('points', 0, 'rung'), -1),
        (('points', 0, 'rung'), None),
        (('points', 0, 'rung'), 'first'),
        (('points', 0, 'folder'), 1.5),
        (('points', 0, 'variant'), {}),
    ],
)
def test_malformed_ladder_is_no_plan(tmp_path, path, value):
    write_ladder(tmp_path, params=PARAMS[:1], seeds=(1,), extra=1)
    content = json.loads((tmp_path / 'study.json').read_text())
    changed(content, *path, value=value)
    (tmp_path / 'study.json').write_text(json.dumps(content))
    read_study_plan.cache_clear()
    assert read_study_plan(tmp_path) is None
    comparison = compared(tmp_path)
    assert isinstance(comparison, Comparison)  # as runs of no study
    reason = f'No study or ladder is recognized, since {tmp_path / "study.json"} cannot be read'
    assert comparison.ladder_warning.startswith(reason)


@pytest.mark.parametrize('ladder', [{}, {'ladder': None}])
def test_plan_without_ladder_reads_as_before(tmp_path, ladder):
    write_ladder(tmp_path, params=PARAMS[:1], extra=0)
    content = json.loads((tmp_path / 'study.json').read_text())
    del content['ladder']
    for point in content['points']:
        del point['rung']
    (tmp_path / 'study.json').write_text(json.dumps(content | ladder))
    read_study_plan.cache_clear()
    comparison = compared(tmp_path)
    assert isinstance(comparison, Comparison)
    assert comparison.study is read_study_plan(tmp_path) and comparison.study.ladder is None


def test_one_rung_is_an_ordinary_comparison(tmp_path):
    write_ladder(tmp_path, **SMALL)
    rungs = sorted((tmp_path / 'runs').iterdir())
    comparison = compared(rungs[1])
    assert isinstance(comparison, Comparison) and comparison.study.rung.number == 2
    assert comparison.baseline_label == 'ffn_type=standard' and comparison.loss_warnings == {}
    shutil.rmtree(rungs[0])
    assert isinstance(compared(tmp_path), Comparison)
    assert comparison.ladder_warning is None is compared(tmp_path).ladder_warning


def test_runs_of_other_studies_make_it_an_ordinary_comparison(tmp_path):
    write_ladder(tmp_path / 'ladder', **SMALL)
    write(tmp_path, make_record(1))
    assert isinstance(compared(tmp_path / 'ladder'), LadderComparison)
    comparison = compared(tmp_path)
    assert isinstance(comparison, Comparison)
    reason = f'No ladder is recognized, since {tmp_path / "ladder"} and other runs are compared'
    assert comparison.ladder_warning.startswith(reason)
    warnings = ' '.join(FORMATS['text'](comparison).split('\nWARNINGS\n')[1].split())
    assert reason in warnings and 'give the folder of one ladder.' in warnings
    assert json.loads(FORMATS['json'](comparison))['ladder_warning'] == comparison.ladder_warning
    write_ladder(tmp_path / 'other', **SMALL)
    assert 'and runs of another ladder are compared' in compared(tmp_path).ladder_warning
    rungs = [next((tmp_path / name / 'runs').iterdir()) for name in ('ladder', 'other')]
    runs, _ = read_runs(rungs)  # one rung of each
    assert compare_runs(runs).ladder_warning is None


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (None, 'is missing.'),
        ({'points': []}, 'does not name these runs.'),
        ({'ladder': None}, 'does not name these runs.'),
    ],
)
def test_folders_of_a_ladder_without_its_plan_are_named(tmp_path, change, reason):
    write_ladder(tmp_path, **SMALL, seeds=(1,))
    plan = tmp_path / 'study.json'
    content = json.loads(plan.read_text())
    plan.unlink() if change is None else plan.write_text(json.dumps(content | change))
    read_study_plan.cache_clear()
    comparison = compared(tmp_path)
    assert isinstance(comparison, Comparison)
    assert comparison.ladder_warning == f'No ladder is recognized, since {plan} {reason}'
    assert compared(next((tmp_path / 'runs').iterdir())).ladder_warning is None


def test_tuning_runs_are_not_compared(tmp_path):
    write_ladder(tmp_path, **SMALL)
    record = ladder_record(Place(SWIGLU, 0, 9), PARAMS[0], CURVES[SWIGLU], 1.0, number=90)
    folder = tmp_path / 'tuning' / 'RUNG' / SWIGLU / 'learning_rate=1' / record['run_name']
    folder.mkdir(parents=True)
    (folder / 'record.json').write_text(json.dumps(record))
    assert 9 not in {run.config['seed'] for run in read_runs([tmp_path])[0]}
    assert isinstance(compared(tmp_path), LadderComparison)


# --- Rungs ---------------------------------------------------------------------------------------


def test_losses_and_costs_are_those_of_the_records(tmp_path):
    write_ladder(tmp_path, **SMALL)
    records = [json.loads(path.read_text()) for path in tmp_path.rglob('record.json')]
    comparison = compared(tmp_path)
    ladder = comparison.analysis.ladder
    for label in comparison.variants:
        for rung in comparison.rungs:
            mine = [
                record
                for record in records
                if record['config']['n_layer'] == rung.options['n_layer']
                and f'ffn_type={record["config"]["ffn_type"]}' == label
            ]
            losses = ladder.losses[label][rung.number - 1]
            expected = {(r['config']['seed'],) * 2: r['summary']['final_val_loss'] for r in mine}
            assert losses == pytest.approx(expected) and len(losses) == 3
            flops = 6 * rung.params * statistics.fmean(r['summary']['total_tokens'] for r in mine)
            assert ladder.costs[label][rung.number - 1] == pytest.approx(flops)
            verdict = comparison.verdict(rung, label)
            # The verdict is the one that the rung's own comparison gives.
            folder = next((tmp_path / 'runs').glob(f'n_layer={rung.options["n_layer"]}_*'))
            own = compared(folder).verdicts
            if label != comparison.baseline:
                assert verdict.test == own[0].test and verdict.text == own[0].text == 'better'


FAILURES = {
    'diverged': (diverge, 'blocked', '1 of 3 seeds of this architecture diverged'),
    'interrupted': (interrupt, 'provisional', '1 of 3 seeds of this architecture: interrupted'),
    'missing': (lambda record: False, 'provisional', '1 of 3 seeds of this architecture: missing'),
}


@pytest.mark.parametrize('outcome', FAILURES)
def test_failures_are_counted_and_change_the_verdict(tmp_path, capsys, outcome):
    change, verdict, reason = FAILURES[outcome]
    failed = Place(SWIGLU, 1, 2)
    write_ladder(
        tmp_path, **SMALL, change=lambda record, place: change(record) if place == failed else None
    )
    comparison = compared(tmp_path)
    top = comparison.top
    assert top.outcomes(SWIGLU) == {'finished': 2, outcome: 1} and top.failures(SWIGLU) == 1
    assert comparison.rungs[0].failures(SWIGLU) == 0 == top.failures(comparison.baseline)
    assert comparison.main_verdict.text == verdict and reason in comparison.main_verdict.reasons
    assert ca.main([str(tmp_path), '--fail_unless=better']) == 1
    text = ' '.join(capsys.readouterr().out.split())
    assert f'{SWIGLU}: 5 of 6 runs finished, 1 {outcome}.' in text and reason in text
    assert '2/3' in text and '5/6' in text


def test_top_rung_without_runs_is_provisional(tmp_path, capsys):
    write_ladder(tmp_path, **SMALL | {'extra': 1}, change=lambda record, place: place.rung != 1)
    comparison = compared(tmp_path)
    assert comparison.top.number == 2 and comparison.top.comparison is None
    assert comparison.main_verdict is None
    assert ca.main([str(tmp_path), '--fail_unless=not_tested', '--format=json']) == 0
    assert json.loads(capsys.readouterr().out)['verdict'] is None
    ca.main([str(tmp_path)])
    text = ' '.join(capsys.readouterr().out.split())
    assert text.startswith('Provisionally, at rung 1 (') and 'since rung 2 has not finished' in text


def test_top_rung_where_all_runs_diverged_is_said_first(tmp_path, capsys):
    at_top = (SWIGLU, 1)
    write_ladder(
        tmp_path,
        **SMALL,
        change=lambda record, place: diverge(record) if place[:2] == at_top else None,
    )
    assert ca.main([str(tmp_path), '--fail_unless=better']) == 1
    text = ' '.join(capsys.readouterr().out.split())
    assert text.startswith(f'All runs of {SWIGLU} at rung 2 diverged. At rung 1 (')


def test_no_finished_baseline(tmp_path, capsys):
    def change(record, place):
        if place.variant != SWIGLU:
            interrupt(record)

    write_ladder(tmp_path, **SMALL, change=change)
    assert ca.main([str(tmp_path)]) == 0
    text = ' '.join(capsys.readouterr().out.split())
    assert text.startswith('No finished run of the baseline, ffn_type=standard, has a validation')
    assert '6 of 6 runs finished' not in text and '0 of 6 runs finished, 6 interrupted.' in text


def test_conditions_that_differ_between_rungs_are_named(tmp_path, capsys):
    def change(record, place):
        if place.rung == 1:
            record['startup_info']['data']['val_sha256'] = 'f' * 64
            record['startup_info']['hardware']['threads'] = 7

    write_ladder(tmp_path, **SMALL, change=change)
    comparison = compared(tmp_path)
    assert list(comparison.loss_warnings) == ['val_sha256']
    assert list(comparison.speed_warnings) == ['threads']
    assert comparison.main_verdict.text == 'better'  # nothing differs within a rung
    ca.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert 'Rungs are not directly comparable (val_sha256; see WARNINGS).' in ' '.join(text.split())
    assert 'val_sha256  cdcdcdcdcdcd (#1), ffffffffffff (#2)' in text
    write_ladder(tmp_path / 'same', **SMALL)
    same = compared(tmp_path / 'same')
    assert same.loss_warnings == {} == same.speed_warnings


@pytest.mark.parametrize('runs', [1, 2])
def test_gains_in_time_need_runs_that_trained_alone(tmp_path, runs):
    def change(record, place):
        record['config']['concurrent_runs'] = runs
        # A variant that is twice as slow as its FLOPs.
        record['summary']['train_seconds'] *= 1 + (place.variant == SWIGLU)

    write_ladder(tmp_path, **SMALL | {'extra': 1}, change=change)
    comparison = compared(tmp_path)
    if runs > 1:
        assert comparison.time_gains is None
        return
    for gain, in_time in zip(comparison.analysis.gains[SWIGLU], comparison.time_gains[SWIGLU]):
        assert in_time.value.value == pytest.approx(gain.value.value / 2, rel=1e-3)


# --- The command line ----------------------------------------------------------------------------


@pytest.mark.parametrize('name', [SWIGLU, 'swiglu'])
def test_baseline_can_be_another_variant(tmp_path, name):
    write_ladder(tmp_path, **SMALL | {'extra': 1})
    comparison = compared(tmp_path, baseline=name)
    assert comparison.baseline == SWIGLU and comparison.others == ['ffn_type=standard']
    assert comparison.baseline_reason.startswith(f'--baseline {name}')
    assert comparison.main_verdict.text == 'worse'
    gains = comparison.analysis.gains['ffn_type=standard']
    assert [gain.rung for gain in gains] == [0, 1, 2]
    assert comparison.verdict(comparison.rungs[2], 'ffn_type=standard') is None
    # The headline is about the top rung, although the other variant has runs above it.
    assert ladder_headline(comparison).startswith('At the top rung (200.00K parameters')


def test_mistakes_are_one_line(tmp_path):
    write_ladder(tmp_path, **SMALL)
    # Without an extra rung, the loss of the better variant is out of reach.
    assert (
        f'To measure the gain of {SWIGLU}, train ffn_type=standard further (baseline_extra in the '
        f'study file), or choose {SWIGLU} as --baseline.'
    ) in ladder_headline(compared(tmp_path))
    assert 'To measure' not in ladder_headline(compared(tmp_path, baseline=SWIGLU))
    for name, message in (('nothing', 'no run in this comparison'), ('ffn_type', 'matches 2 runs')):
        with pytest.raises(UserError, match=message):
            ca.main([str(tmp_path), f'--baseline={name}'])


def test_options_of_the_command_line(tmp_path, capsys):
    write_ladder(tmp_path, **SMALL)
    assert ca.main([str(tmp_path), '--fail_unless=better', '--margin=5']) == 1  # equivalent
    assert 'equivalent' in capsys.readouterr().out
    assert ca.main([str(tmp_path), '--fail_unless=better', '--score=best']) == 0
    assert 'the best of several evaluations' in capsys.readouterr().out
    # The newest seven runs: one of the smaller rung.
    assert ca.main([str(tmp_path), '--latest=7', '--fail_unless=better']) == 0
    assert '3 missing' in capsys.readouterr().out.replace('\n', ' ')


def test_runs_without_known_flops_are_named(tmp_path, capsys):
    def change(record, place):
        if place == Place(SWIGLU, 1, 2):
            del record['summary']['total_flops']

    write_ladder(tmp_path, **SMALL, change=change)
    comparison = compared(tmp_path)
    assert [len(losses) for losses in comparison.analysis.ladder.losses[SWIGLU]] == [3, 2]
    assert comparison.verdict(comparison.top, SWIGLU).test.difference.counts == (3, 3)
    ca.main([str(tmp_path)])
    assert 'the training FLOPs are unknown: 1 run.' in capsys.readouterr().out
    for record in tmp_path.glob('runs/*/*/*/*/record.json'):
        record.write_text(record.read_text().replace('"total_flops"', '"other_flops"'))
    ca.main([str(tmp_path)])
    assert 'has a validation loss and known training FLOPs.' in capsys.readouterr().out


def test_command_of_each_rung_shows_its_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_ladder(tmp_path / 'a b', **SMALL | {'extra': 1})
    ca.main(['a b'])
    lines = capsys.readouterr().out.split('RUNGS IN FULL\n')[1].split('\n\n')[0].splitlines()
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        words = shlex.split(line)
        assert words[:3] == [f'{number}:', 'python', 'compare_architectures.py']
        runs, _ = read_runs([Path(words[3])])
        assert {run.study.rung.number for run in runs} == {number}
        assert isinstance(compare_runs(runs), Comparison)


def test_ladder_of_one_architecture(tmp_path, capsys):
    write_ladder(tmp_path, {'ffn_type=standard': STANDARD}, **SMALL)
    assert ca.main([str(tmp_path), '--fail_unless=not_tested']) == 0
    text = capsys.readouterr().out
    assert text.startswith('ffn_type=standard is the only architecture of this ladder.')
    assert 'NOISE' in text and 'COMPUTE GAIN' not in text


def test_plan_that_lacks_the_variants_of_its_runs(tmp_path, capsys):
    write_ladder(tmp_path, **SMALL, baseline='gone')
    content = json.loads((tmp_path / 'study.json').read_text())
    for rung in content['ladder']['rungs']:
        rung['variants'] = []
    (tmp_path / 'study.json').write_text(json.dumps(content))
    read_study_plan.cache_clear()
    assert ca.main([str(tmp_path), '--fail_unless=better']) == 0
    assert SWIGLU in capsys.readouterr().out


def test_tokens_are_those_of_finished_runs_or_of_the_budget(tmp_path):
    def change(record, place):
        if place.rung == 1:
            interrupt(record)
            record['summary']['total_tokens'] = 4096

    write_ladder(tmp_path, **SMALL, change=change)
    assert [rung.tokens for rung in compared(tmp_path).rungs] == list(map(tokens_of, PARAMS[:2]))


def test_equal_sizes_have_no_slope(tmp_path):
    write_ladder(tmp_path, params=[PARAMS[0]] * 4, extra=1)
    comparison = compared(tmp_path)
    assert all('nan' not in render(comparison) for render in FORMATS.values())


def test_eight_variants_and_several_reversals(tmp_path):
    curves = {'ffn_type=standard': STANDARD} | {
        # They cross the baseline at 3e12 FLOPs, between the two rungs.
        f'ffn_type=f{n}': Curve(1.5, 90 * 3e12 ** (0.01 * n), 0.15 + 0.01 * n)
        for n in range(1, 8)
    }
    write_ladder(tmp_path, curves, **SMALL | {'extra': 1}, noise=0.0005)
    comparison = compared(tmp_path)
    assert len(comparison.others) == 7
    text = ' '.join(FORMATS['text'](comparison).split())
    assert text.count('is behind at rung 1 and ahead at rung 2 (significant at both)') >= 7
    order = [text.index(f'ffn_type=f{n} ') for n in (7, 6, 5)]
    assert order == sorted(order)  # the largest gain first
    assert comparison.main_verdict.group is comparison.top.groups['ffn_type=f7']
