"""`load_runs`: rows, curves and verdicts are plain data and equal the records."""

import copy
import json
import math
import subprocess
import sys
import warnings

import pytest
from helpers.loggers import log_a_run
from helpers.project import PROJECT
from helpers.run_records import (
    GPT2,
    LLAMA,
    STUDY,
    decaying,
    make_record,
    replicated,
    study_record,
    write,
    write_study,
)

import compare_architectures
from common.errors import UserError
from comparison import load_runs
from records.record import read_record


def iteration_entry(number: int, **readings) -> dict:
    return {
        'iter': number,
        'loss': 8.0 - number / 100,
        'lr': 1e-3 * (1 - number / 100),
        'time_ms': 20.0 + number,
        'steps': 1,
        'tokens_per_sec': 4096 / (0.02 + number / 1000),
        'tokens_seen': 4096 * (number + 1),
        'mfu': {'mfu_percent': 30.0 + number, 'mfu_causal_percent': 28.0, 'hfu_percent': 30.0},
        'memory': {'peak_gb': 1.5},
        'gradients': {'norm': 0.5 + number, 'mean': 0.0, 'std': 0.1},
        'loss_scale': None,
        'readings': readings,
    }


@pytest.fixture
def two_runs(tmp_path):
    """A folder with two records with logged iterations: (folder, first, second)."""
    first, second = make_record(1, loss=5.0), make_record(2, loss=4.5, architecture=LLAMA)
    second['config']['learning_rate'] = 1e-3
    first['training_iterations'] = [iteration_entry(n) for n in (0, 50, 99)]
    second['training_iterations'] = [iteration_entry(n, balance=0.25) for n in (0, 99)]
    for record in (first, second):
        record['summary']['train_seconds'] = 241.2
    write(tmp_path, first, second)
    return tmp_path, first, second


def test_rows_equal_record_values(two_runs):
    folder, first, second = two_runs
    rows = load_runs(folder).rows()
    assert [row['run'] for row in rows] == [second['run_name'], first['run_name']]
    for row, record in zip(rows, (second, first)):
        summary, startup = record['summary'], record['startup_info']
        expected = {
            'label': record['architecture']['name'],
            'folder': str(folder / record['config']['out_dir'] / record['run_name']),
            'architecture': record['architecture']['name'],
            'status': 'finished',
            'outcome': 'finished',
            'seed': 1337,
            'data_seed': 1337,
            'val_loss': record['eval_steps'][-1]['val_loss'],
            'best_val_loss': min(e['val_loss'] for e in record['eval_steps'][1:]),
            'bits_per_byte': record['eval_steps'][-1]['val_bits_per_byte'],
            'params': startup['model']['total_params'],
            'flops_per_token': startup['flops']['per_token'],
            'causal_flops_per_token': startup['flops']['per_token_causal'],
            'mfu_percent': summary['avg_mfu'],
            'time_ms': summary['avg_time_ms'],
            'tokens_per_sec': 1000 * startup['data']['tokens_per_iter'] / summary['avg_time_ms'],
            'wall_seconds': summary['wall_seconds'],
            'peak_memory_gb': summary['peak_memory_gb'],
            'train_seconds': 241.2,
            'iters_done': 100,
            'max_iters': 100,
            'learning_rate': record['config']['learning_rate'],
        }
        assert {key: row[key] for key in expected} == expected
    # Options that both share or that affect no result have no column.
    assert not rows[0].keys() & {'n_layer', 'log_interval', 'out_dir'}
    assert 'learning_rate' not in load_runs(folder).rows(options=False)[0]


def test_rows_have_keys_and_values_of_json_output(two_runs, capsys):
    folder, *_ = two_runs
    compare_architectures.main([str(folder), '--format=json'])
    output = json.loads(capsys.readouterr().out)
    by_name = {row['run']: row for row in load_runs(folder).rows()}
    for run in output['runs']:
        del run['rank'], run['label']
        assert run.items() <= by_name[run['run']].items()


def test_compare_equals_json_output(tmp_path, capsys):
    write(tmp_path, *replicated({'standard': [5.0, 5.02, 5.01], 'swiglu': [4.7, 4.71, 4.69]}))
    compare_architectures.main(
        [str(tmp_path), '--format=json', '--baseline=swiglu', '--margin=0.01', '--score=best']
    )
    expected = json.loads(capsys.readouterr().out)
    runs = load_runs(tmp_path, score='best')
    assert runs.compare(baseline='swiglu', margin=0.01) == expected
    assert expected['verdict']['verdict'] == 'worse'


def test_rows_label_all_seeds_of_a_variant_alike(tmp_path):
    variants = STUDY['variants'][:2]
    records = [
        [study_record(n, seed, decaying(n, seed), v['asked']) for seed in (1, 2)]
        for n, v in enumerate(variants)
    ]
    rows = load_runs(write_study(tmp_path, variants, records)).rows()
    labels = [(row['label'], row['seed'], row['bias']) for row in rows]
    assert sorted(labels) == sorted(
        (v['label'], seed, v['asked']['bias']) for v in variants for seed in (1, 2)
    )


def test_curves_equal_record_entries(two_runs):
    folder, first, second = two_runs
    curves = load_runs(folder).curves()
    assert len({tuple(row) for row in curves}) == 1  # the same columns in all rows
    for record in (first, second):
        rows = [row for row in curves if row['run'] == record['run_name']]
        assert [row['iter'] for row in rows] == sorted(row['iter'] for row in rows)
        evaluations = [row for row in rows if row['kind'] == 'evaluation']
        per_token = record['startup_info']['flops']['per_token_causal']
        for row, entry in zip(evaluations, record['eval_steps'], strict=True):
            shared = ('iter', 'train_loss', 'val_loss', 'val_bits_per_byte')
            assert [row[key] for key in shared] == [entry[key] for key in shared]
            assert row['loss'] is row['grad_norm'] is row['mfu_percent'] is None
            # These entries have no tokens_seen, like those of older records.
            assert row['tokens_seen'] == entry['iter'] * 4096
            assert row['flops'] == row['tokens_seen'] * per_token
        iterations = [row for row in rows if row['kind'] == 'iteration']
        for row, entry in zip(iterations, record['training_iterations'], strict=True):
            shared = ('iter', 'loss', 'lr', 'time_ms', 'tokens_per_sec', 'tokens_seen')
            assert [row[key] for key in shared] == [entry[key] for key in shared]
            assert row['flops'] == entry['tokens_seen'] * per_token
            assert row['mfu_percent'] == entry['mfu']['mfu_percent']
            assert row['peak_gb'] == entry['memory']['peak_gb']
            assert row['grad_norm'] == entry['gradients']['norm']
            assert row['val_loss'] is None
            assert row['readings.balance'] == entry['readings'].get('balance')


def test_curves_of_a_journal_leave_out_lost_iterations(tmp_path):
    folder = tmp_path / 'run_20260101_120000'
    (folder / 'checkpoints').mkdir(parents=True)
    logger = log_a_run(folder)
    logger.finish('finished')
    record = read_record(folder)
    curves = load_runs(tmp_path).curves()
    for kind, key in (('evaluation', 'eval_steps'), ('iteration', 'training_iterations')):
        assert [r['iter'] for r in curves if r['kind'] == kind] == [e['iter'] for e in record[key]]
    losses = {row['iter']: row['loss'] for row in curves if row['kind'] == 'iteration'}
    assert losses[30] is None  # it was not finite
    assert losses[99] == 2.5


def test_damaged_record_is_skipped_with_warning(two_runs):
    folder, first, _ = two_runs
    damaged = copy.deepcopy(first)
    damaged['summary']['final_iter'] = 'many'
    for name, text in (('torn', '{"schema'), ('odd', json.dumps(damaged)), ('list', '[]')):
        (folder / name).mkdir()
        (folder / name / 'record.json').write_text(text)
    with pytest.warns(UserWarning) as caught:
        runs = load_runs(folder)
    assert len(runs) == len(runs.rows()) == 2
    assert [str(each.message) for each in caught] == [f'skipped {line}' for line in runs.skipped]
    for name in ('torn', 'odd', 'list'):
        assert sum(str(folder / name) in line for line in runs.skipped) == 1
    assert runs.compare()['skipped'] == runs.skipped
    assert '3 skipped' in repr(runs)


def test_malformed_iterations_are_skipped_with_warning(two_runs):
    folder, *_ = two_runs
    path = next(folder.glob('out-1/*/record.json'))
    record = json.loads(path.read_text())
    for entry, reason in (({'iter': 'first'}, 'iter is'), ({'iter': 1, 'mfu': 3}, 'mfu is')):
        record['training_iterations'] = [entry]
        path.write_text(json.dumps(record))
        with pytest.warns(UserWarning, match=reason):
            curves = load_runs(folder).curves()
        assert {row['run'] for row in curves} == {'run_20260101_120002'}


def test_paths_latest_and_missing(two_runs, monkeypatch):
    folder, first, second = two_runs
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(load_runs(folder / 'out-1', str(folder / 'out-2'))) == 2
        assert [run.name for run in load_runs(folder, latest=1)] == [second['run_name']]
        record_file = next(folder.glob('out-1/*/record.json'))
        assert [run.name for run in load_runs(record_file)] == [first['run_name']]
        monkeypatch.chdir(folder)
        assert len(load_runs()) == 2
        monkeypatch.setenv('HOME', str(folder))
        assert len(load_runs('~/out-1')) == 1
    with pytest.raises(UserError, match='absent'):
        load_runs('absent')


def test_repr_names_runs(two_runs):
    folder, *_ = two_runs
    runs = load_runs(folder)
    lines = repr(runs).splitlines()
    assert lines[0] == '2 runs'
    assert lines[1].strip() == repr(runs[0])
    for part in ('run_20260101_120002', LLAMA, 'seed 1337', 'finished 100/100', '4.5000'):
        assert part in repr(runs[0])
    assert GPT2 in repr(runs[1:])
    assert len(runs[1:]) == 1


@pytest.mark.optional
def test_pandas_makes_data_frames(two_runs):
    pandas = pytest.importorskip('pandas')
    folder, first, _ = two_runs
    runs = load_runs(folder)
    table = pandas.DataFrame(runs.rows()).set_index('run')
    assert table.loc[first['run_name'], 'val_loss'] == 5.0
    curves = pandas.DataFrame(runs.curves())
    final = curves[curves['kind'] == 'evaluation'].groupby('run')['val_loss'].last()
    assert math.isclose(final[first['run_name']], 5.0)


def test_import_needs_no_torch():
    code = 'import sys; from comparison import load_runs; print(*sys.modules)'
    result = subprocess.run(
        [sys.executable, '-c', code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert not {'torch', 'numpy', 'pandas', 'matplotlib'} & set(result.stdout.split())
