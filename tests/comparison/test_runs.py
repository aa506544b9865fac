"""comparison/runs.py, conditions.py: outcomes, conditions of all runs, damaged records."""

import copy
import json
import math
from pathlib import Path

import pytest
from helpers.run_records import make_record, replicated, rows, run_rows, write

import compare_architectures as ca
from common.console_output import visible
from comparison.compare import compare
from comparison.formats import FORMATS, csv_cell, escape_markdown, render_text
from comparison.load import read_runs
from comparison.runs import run_from_record

HERE = Path('out/run/record.json')


# --- Outcome of a run ----------------------------------------------------------------------------


def event(kind):
    return {'event': kind, 'iter': 7}


@pytest.mark.parametrize(
    'changes, outcome',
    [
        ({}, 'finished'),
        ({'status': 'failed', 'events': [event('nonfinite'), event('failed')]}, 'diverged'),
        ({'status': 'failed', 'events': [event('nonfinite'), event('rollback')]}, 'failed'),
        ({'status': 'failed', 'events': [event('failed')]}, 'failed'),
        ({'status': 'failed', 'summary': {'nonfinite_updates': 1}}, 'diverged'),
        ({'status': 'failed', 'summary': {'nonfinite_updates': 1},
          'config': {'on_nonfinite': 'skip'}}, 'failed'),
        ({'summary': {'nonfinite_updates': 1}}, 'finished'),
        ({'status': 'interrupted'}, 'interrupted'),
        ({'status': 'running'}, 'running'),
        ({'eval_steps': [{'iter': 0, 'val_loss': 9.0}]}, 'without a validation loss'),
        ({'eval_steps': [{'iter': 50, 'val_loss': 4}, {'iter': 99, 'val_loss': None}]}, 'diverged'),
    ],
)  # fmt: skip
def test_run_outcome(changes, outcome):
    record = make_record(1)
    for key, value in changes.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) else value
    run = run_from_record(record, HERE)
    assert run.outcome == outcome
    assert outcome != 'diverged' or run.val_loss is None


def test_score_final_or_best():
    record = make_record(1)
    record['eval_steps'] = [{'iter': i, 'val_loss': x, 'val_bits_per_byte': x / 2}
                            for i, x in ((0, 1.0), (50, 2.9), (100, 9.0))]  # fmt: skip
    final, best = run_from_record(record, HERE), run_from_record(record, HERE, 'best')
    assert (final.val_loss, final.bits_per_byte, final.best_val_loss) == (9.0, 4.5, 2.9)
    assert (best.val_loss, best.bits_per_byte, best.evaluations) == (2.9, 1.45, 2)


def test_run_far_above_its_best_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    records = replicated({'stable': [3.0, 3.1, 3.2], 'blown': [9.0, 9.11, 9.19]})
    for record in records[3:]:
        record['eval_steps'][0]['val_loss'] = 5.6
        record['eval_steps'][1]['val_loss'] = 2.8 + 0.101 * record['config']['seed']
    write(tmp_path, *records)
    ca.main([])
    text = capsys.readouterr().out
    assert text.startswith('blown is worse than stable')
    assert 'blown: 3 of its runs end well above the best validation loss.' in text
    assert 'final 9.1100, best 3.0020, and above its untrained loss' in text
    ca.main(['--score=best'])
    text = capsys.readouterr().out
    assert text.startswith('blown is better than stable')
    assert 'The best of several evaluations is biased low' in text
    final = {row['architecture']: row['final'] for row in rows(text, 'RANKING')}
    assert final == {'blown': '9.1000', 'stable': '3.1000'}


# --- Conditions ----------------------------------------------------------------------------------


def resumed(record, **changed):
    record['events'].append({'event': 'resume', 'iter': 60, 'changed': changed})
    return record


@pytest.mark.parametrize('seed', [1, 2, 3])
def test_conditions_of_every_seed_count(seed):
    records = replicated({'a': [5.0, 5.1, 4.9], 'b': [4.9, 5.01, 4.8]})
    records[2 + seed]['startup_info']['data']['val_sha256'] = 'f' * 64
    comparison = compare(run_rows(records))
    assert list(comparison.loss_warnings) == ['val_sha256']
    verdict = comparison.verdicts[0]
    assert verdict.text == 'provisional' and 'val_sha256' in verdict.reasons[0]
    assert '(#1 in part)' in render_text(comparison)


def test_resumed_run_has_all_its_conditions():
    records = replicated({'a': [5.0, 5.1], 'b': [4.9, 5.0]})
    resumed(records[2], learning_rate=[3e-3, 6e-4], threads=[1, 2])
    comparison = compare(run_rows(records))
    assert comparison.loss_warnings == {
        'learning_rate': {'0.003 then 0.0006': [1], '0.0006': [1, 2]}
    }
    assert comparison.speed_warnings == {'threads': {'1 then 2': [1], '2': [1, 2]}}


@pytest.mark.parametrize('option', ['beta2', 'on_nonfinite', 'muon_momentum', 'reduce_dtype'])
def test_every_training_option_is_a_condition(option):
    records = [make_record(1, **{option: 1}), make_record(2, ffn_type='swiglu', **{option: 2})]
    assert list(compare(run_rows(records)).loss_warnings) == [option]
    # In a record older than an option, the option counts as its default.
    del records[1]['config'][option]
    assert compare(run_rows(records)).loss_warnings == {}


def test_dtype_of_gathered_parameters_is_a_condition():
    """FSDP with fp32 parameters computes what the other strategies do, which lack the option."""
    records = [make_record(1), make_record(2, ffn_type='swiglu', fsdp_param_dtype='float32')]
    assert compare(run_rows(records)).loss_warnings == {}
    records[1]['config']['fsdp_param_dtype'] = 'bfloat16'
    assert list(compare(run_rows(records)).loss_warnings) == ['fsdp_param_dtype']


def test_evaluation_count_is_condition_of_best_score():
    records = replicated({'a': [5.0, 5.1], 'b': [4.9, 5.0]})
    for record in records[2:]:
        record['config']['eval_interval'] = 1
    for record in records[:2]:
        record['config']['eval_interval'] = 10
    final = compare(run_rows(records))
    assert final.loss_warnings == {} and list(final.best_warnings) == ['eval_interval']
    assert 'Best losses come from different numbers of evaluations' in render_text(final)
    best = compare(run_rows(records), score='best')
    assert list(best.loss_warnings) == ['eval_interval']
    # Seeds that differ in it still belong to one architecture.
    records[0]['config']['eval_interval'] = 5
    assert len(compare(run_rows(records)).groups) == 2


def test_data_hashes_are_compared_by_seed():
    records = replicated({'a': [5.0, 5.1], 'b': [4.9, 5.0]})
    for record in records:
        for entry in record['eval_steps'][1:]:
            entry['data_hash'] = f'{record["config"]["seed"]:016x}{entry["iter"]}'
    stray = make_record(50, status='failed', seed=9, architecture='c', ffn_type='c', loss=None)
    assert compare(run_rows([*records, stray])).loss_warnings.keys() <= {'tokens_seen'}
    for record in records[2:]:
        record['eval_steps'][-1]['data_hash'] = 'f' * 16
    assert 'data_hash' in compare(run_rows([*records, stray])).loss_warnings
    # Only hashes of the same iteration are compared.
    records[2]['eval_steps'].pop()
    records[3]['eval_steps'].pop()
    assert 'data_hash' not in compare(run_rows(records)).loss_warnings


def test_code_differences_are_one_line():
    records = replicated({'a': [5.0, 5.1], 'b': [4.9, 5.02]})
    for record in records:
        record['metadata'] |= {'code': {'train.py': 'x', 'model_builder.py': 'y'},
                               'versions': {'torch': '2.13.0'}, 'git_commit': 'abc'}  # fmt: skip
    records[3]['metadata']['git_commit'] = 'def'  # the files of the code are the same
    assert compare(run_rows(records)).code_warning is None
    records[3]['metadata']['code'] = {'train.py': 'x', 'model_builder.py': 'z'}
    warning = compare(run_rows(records)).code_warning
    assert 'model_builder.py' in warning and 'train.py' not in warning
    records[2]['metadata']['versions'] = {'torch': '1.0'}
    comparison = compare(run_rows(records))
    assert 'torch 1.0 (#1), 2.13.0 (#1 #2)' in comparison.code_warning
    assert comparison.verdicts[0].text == 'not significant'  # a note does not make it provisional
    for record in records:  # older records
        del record['metadata']['code']
    assert 'git commit' in compare(run_rows(records)).code_warning


def test_seed_mean_of_rates_is_total_over_total():
    records = replicated({'a': [5.0, 5.1]})
    for record, (seconds, ms, mfu, peak) in zip(records, ((100, 1000, 20, 1), (300, 3000, 30, 2))):
        record['summary'] |= {'train_seconds': seconds, 'avg_time_ms': ms, 'avg_mfu': mfu}
        record['startup_info']['hardware']['peak_tflops'] = peak
    cost = rows(render_text(compare(run_rows(records))), 'COST')[0]
    assert cost['tokens/s'] == f'{(4096 / 1 * 100 + 4096 / 3 * 300) / 400:,.0f}'
    assert cost['MFU'] == f'{(20 * 100 * 1 + 30 * 300 * 2) / (100 * 1 + 300 * 2):.2f}%'


# --- Notes and headlines -------------------------------------------------------------------------


def test_equal_flops_need_all_finished():
    records = [make_record(1), make_record(2, ffn_type='swiglu', status='interrupted', done=40)]
    for record in records:
        record['summary']['total_flops'] = 1e12
    comparison = compare(run_rows(records))
    assert comparison.notes == [] and 'tokens_seen' in comparison.loss_warnings


def test_headline_names_unequal_budgets():
    records = [make_record(1, max_iters=20), make_record(2, ffn_type='swiglu', max_iters=3)]
    text = ' '.join(render_text(compare(run_rows(records))).partition('\n\n')[0].split())
    assert 'not directly comparable (max_iters; see WARNINGS)' in text


def test_single_architecture_has_no_verdict():
    text = render_text(compare(run_rows(replicated({'a': [5.0, 5.1]}))))
    assert 'VERDICT' not in text and 'comparisons' not in text
    one, other = make_record(1), make_record(2, loss=4.0, weight_decay=0.5)
    text = render_text(compare(run_rows([one, other])))
    assert 'One seed per architecture' not in text
    assert 'No two runs differ only in their seeds' in text


# --- Records of any content ----------------------------------------------------------------------

BAD = [None, math.nan, -math.inf, 'x\x1b[2J', [1], {'a': 1}, True, -1, 10**400, 1.5]


def places(value, path=()):
    """Every place in a nested document."""
    yield path
    items = value.items() if isinstance(value, dict) else []
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        yield from places(item, (*path, key))


def with_value(record, path, value):
    record = copy.deepcopy(record)
    parent = record
    for key in path[:-1]:
        parent = parent[key]
    if path:
        parent[path[-1]] = value
        return record
    return value


def full_record(number, **changes):
    record = make_record(number, **changes)
    record['events'] = [event('nonfinite'), {'event': 'resume', 'changed': {'lr': [1, 2]}}]
    record['summary'] |= {'loss_spikes': 1, 'gradient_growth': 1.5, 'total_flops': 1e12}
    record['metadata'] |= {'versions': {'torch': '2'}, 'weights_from': {'source': 'x'}, 'code': {}}
    record['eval_steps'][-1] |= {
        'data_hash': 'ab',
        'train_seconds': 2.0,
        'sample': {'prompt': 'a', 'text': 'b'},
        'diagnostics': {'val_loss_by_position': [{'from': 0, 'to': 4, 'loss': 2.0}]},
    }
    return record


@pytest.mark.slow
def test_damaged_record_does_not_stop_comparison(tmp_path):
    others = [full_record(n, loss=5 + n / 100, seed=n, ffn_type=ffn)
              for n, ffn in ((1, 'a'), (2, 'a'), (3, 'b'))]  # fmt: skip
    template = full_record(4, loss=4.9, seed=4, ffn_type='b')
    folder = tmp_path / 'out-4' / template['run_name']
    folder.mkdir(parents=True)
    rest = [
        run_from_record(record, Path(f'out/{n}/record.json')) for n, record in enumerate(others)
    ]
    cases = compared = 0
    for path in [*places(template)][1:]:
        for value in BAD:
            record = with_value(template, path, value)
            cases += 1
            try:
                run = run_from_record(record, folder / 'record.json')
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
                continue  # such a record is skipped with a warning
            compared += 1
            comparison = compare([*rest, run])
            for form in (FORMATS['json'], FORMATS[(cases % 2 and 'text') or 'csv']):
                assert '\x1b' not in visible(form(comparison))
                json.dumps(form(comparison), allow_nan=False)
    assert cases > 1000 and cases / 4 < compared < cases


def test_malformed_record_is_skipped_with_its_key(tmp_path):
    bad, worse = make_record(2), make_record(3)
    bad['summary']['peak_memory_gb'] = 'x'
    worse['summary']['total_tokens'] = math.nan
    write(tmp_path, make_record(1), bad, worse)
    runs, lines = read_runs([tmp_path])
    assert [run.name for run in runs] == [make_record(1)['run_name']]
    line, other = sorted(lines)
    assert bad['run_name'] in line and "peak_memory_gb is 'x', not a number" in line
    assert 'total_tokens is nan' in other


# --- Escaping, by format -------------------------------------------------------------------------

HOSTILE = '=cmd|x`y<b>&\x1b[2J\n# h *a* _b_ [l](u) @me $z$'


def test_record_text_is_escaped_in_every_format(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    records = [
        make_record(n, architecture=HOSTILE + str(n), seed=seed, ffn_type=str(n), dataset=HOSTILE)
        for n, seed in ((1, 1), (2, 2))
    ]
    write(tmp_path, *records)
    for form in ('text', 'markdown', 'csv'):
        ca.main([f'--format={form}'])
        text = capsys.readouterr().out
        assert '\x1b' not in text and ('\\x1b' in text or '&#92;x1b' in text)
        if form == 'markdown':
            outside = ''.join(text.split('```')[::2])  # text within fences is literal
            for markup in ('<b>', '*a*', '[l](u)', '`y', '@me', '$z$', ' _b_ '):
                assert markup not in outside
    assert len(capsys.readouterr().out.splitlines()) == 0
    ca.main(['--format=csv'])
    assert "'=cmd" in capsys.readouterr().out
    ca.main(['--format=json'])
    data = json.loads(capsys.readouterr().out)
    assert {run['label'] for run in data['runs']} >= {HOSTILE + '1', HOSTILE + '2'}


@pytest.mark.parametrize('text', ['=1+1', '+1', '-1', '@x'])
def test_csv_cells_are_no_formulas(text):
    assert csv_cell(text) == f"'{text}"
    assert csv_cell(-1.5) == -1.5


def test_plain_names_stay_readable_in_markdown():
    assert escape_markdown('ffn_type=swiglu 12L-12H') == 'ffn_type=swiglu 12L-12H'


# --- Verdict and exit code for scripts -----------------------------------------------------------

AHEAD = {'a': [5.0, 5.1, 4.9, 5.02], 'b': [4.8, 4.91, 4.69, 4.83]}


def verdict_of(tmp_path, capsys, records, *argv):
    write(tmp_path, *records)
    code = ca.main([str(tmp_path), '--format=json', *argv])
    return code, json.loads(capsys.readouterr().out)['verdict']


def test_json_verdict_and_exit_code(tmp_path, capsys):
    records = replicated(AHEAD)
    code, verdict = verdict_of(tmp_path, capsys, records, '--fail_unless=better')
    assert (code, verdict['verdict'], verdict['reasons']) == (0, 'better', [])
    assert verdict['architecture'] == 'b' and verdict['baseline'] == 'a'
    low, high = verdict['interval']
    assert low < verdict['difference'] < high < 0 and verdict['p_value'] < 0.05
    assert ca.main([str(tmp_path), '--fail_unless=worse,not_significant']) == 1
    assert ca.main([str(tmp_path), '--fail_unless=worse,better']) == 0


def test_provisional_verdict_fails_exit_code(tmp_path, capsys):
    running = make_record(50, status='running', loss=4.0, seed=9, ffn_type='b', architecture='b')
    records = [*replicated(AHEAD), running]
    code, verdict = verdict_of(tmp_path, capsys, records, '--fail_unless=better')
    assert (code, verdict['verdict'], verdict['finding']) == (1, 'provisional', 'better')
    assert verdict['reasons'] == ['1 of 5 seeds of this architecture: running']


def test_single_runs_have_no_verdict(tmp_path, capsys):
    records = [make_record(1), make_record(2, ffn_type='swiglu')]
    code, verdict = verdict_of(tmp_path, capsys, records, '--fail_unless=better')
    assert (code, verdict['verdict']) == (1, 'not tested')
    assert 'one seed per architecture' in verdict['reasons']


def test_text_answer_is_first_and_last(tmp_path, capsys):
    write(tmp_path, *replicated(AHEAD))
    ca.main([str(tmp_path)])
    first, *_, last = capsys.readouterr().out.strip().split('\n\n')
    assert ' '.join(last.split()) == 'ANSWER: ' + ' '.join(first.split())
    assert first.startswith('b is better than a by 0.1975 nats per token (95% interval')


def test_answer_direction_follows_baseline(tmp_path, capsys):
    write(tmp_path, *replicated(AHEAD))
    ca.main([str(tmp_path), '--baseline=b'])
    text = capsys.readouterr().out
    assert text.startswith('a is worse than b by 0.1975 nats per token (95% interval 0.')


@pytest.mark.parametrize(
    'argument', ['--margin=0', '--margin=-1', '--margin=nan', '--margin=x', '--fail_unless=good']
)
def test_mistakes_in_verdict_options(argument):
    from common.errors import UserError

    with pytest.raises(UserError, match=r'margin|Choose from better'):
        ca.parse_arguments([argument])
