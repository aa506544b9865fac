"""compare_architectures.py shows the values of the records, their differences and warnings."""

import csv
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.ladder_records import write_ladder
from helpers.project import PROJECT
from helpers.run_records import (
    GPT2,
    LLAMA,
    STUDY,
    make_record,
    replicated,
    rows,
    run_rows,
    section,
    warned,
    write,
)
from scipy import stats

import compare_architectures as ca
from common.errors import UserError
from common.formatting import LISTED
from comparison.compare import compare
from comparison.formats import render_text
from comparison.load import read_runs
from comparison.study_plan import read_study_plan
from comparison.warning_lines import rank_ranges


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
    """Write records into an empty working folder, run the command there, return its output."""
    monkeypatch.chdir(tmp_path)

    def run(*records, argv=()):
        write(tmp_path, *records)
        ca.main(list(argv))
        return capsys.readouterr().out

    return run


# --- Figures -------------------------------------------------------------------------------------


def test_ranking_shows_record_figures(compared):
    losses = {1: 6.41234, 2: 5.98719, 3: 6.0}
    text = compared(*(make_record(n, loss=loss) for n, loss in losses.items()))
    shown = rows(text, 'RANKING')
    order = sorted(losses, key=losses.get)
    assert [row['architecture'][-2:] for row in shown] == [f'{n:02d}' for n in order]
    assert [row['#'] for row in shown] == ['1', '2', '3']
    assert [row['val loss'] for row in shown] == ['5.9872', '6.0000', '6.4123']
    assert [row['vs #3'] for row in shown] == ['-0.4252', '-0.4123', 'baseline']
    ahead = rows(render_text(compare(read_runs([])[0], 'out-2')), 'RANKING')
    assert [row['vs #1'] for row in ahead] == ['baseline', '+0.0128', '+0.4252']
    for row in shown:
        assert float(row['bits/byte']) == pytest.approx(float(row['val loss']) * 0.4, abs=1e-4)


def test_cost_shows_record_figures(compared):
    (row,) = rows(compared(make_record(1)), 'COST')
    assert row == {
        '#': '1',
        'params': '123.55M',
        'FLOPs/token': '798.03M',
        'MFU': '31.23%',
        'tokens/s': f'{round(4096 / 2.41234):,}',
        'ms/iter': '2,412.3',
        'wall': '7m 11s',
        'peak GB': '3.21',
        'run': str(Path('out-1/run_20260101_120001')),
    }


def test_active_parameters_shown_where_fewer(compared):
    dense, sparse = make_record(1), make_record(2)
    dense['startup_info']['model']['active_params'] = 123_550_464
    sparse['startup_info']['model'] |= {'total_params': 300_000_000, 'active_params': 98_765_432}
    shown = rows(compared(dense, sparse), 'COST')
    assert {row['params']: row['active'] for row in shown} == {
        '123.55M': '123.55M',
        '300.00M': '98.77M',
    }


def test_unknown_figures_are_dashes(compared):
    record = make_record(1, loss=None)
    record['startup_info'] = dict.fromkeys(record['startup_info'])
    record['summary'] = dict.fromkeys(record['summary']) | {'final_iter': 0}
    text = compared(record)
    assert rows(text, 'RANKING')[0]['val loss'] == 'none'
    figures = rows(text, 'COST')[0]
    assert {key for key, cell in figures.items() if cell != '-'} == {'#', 'run'}


def test_untrained_loss_is_not_ranked(compared):
    diverged, untrained, trained = (make_record(n, loss=6.0) for n in (1, 2, 3))
    # Both had their lowest loss before the first update.
    diverged['eval_steps'] = [
        {'iter': 0, 'val_loss': 4.0, 'val_bits_per_byte': 2.0},
        {'iter': 50, 'val_loss': 9.0, 'val_bits_per_byte': 4.5},
        {'iter': 100, 'val_loss': None, 'val_bits_per_byte': None},
    ]
    untrained['eval_steps'] = untrained['eval_steps'][:1]
    text = compared(untrained, diverged, trained)
    ranked = [(row['val loss'], row['status']) for row in rows(text, 'RANKING')]
    assert ranked[0] == ('6.0000', 'finished 100/100')
    assert set(ranked[1:]) == {
        ('none', 'without a validation loss 100/100'),
        ('none', 'diverged 100/100'),
    }
    assert 'Not ranked, without a validation loss after training: #2-3' in text


# --- Names ---------------------------------------------------------------------------------------


def test_equal_names_show_differing_choices(compared):
    text = compared(make_record(1, bias=True, loss=4.0), make_record(2, bias=False))
    names = [row['architecture'] for row in rows(text, 'RANKING')]
    assert names == [f'{GPT2} [bias=True]', f'{GPT2} [bias=False]']


def test_equal_architectures_are_labeled_by_run(compared):
    text = compared(make_record(1), make_record(2, loss=4.0), make_record(3, architecture=LLAMA))
    names = {row['architecture'] for row in rows(text, 'RANKING')}
    assert names == {f'{GPT2} run_20260101_120001', f'{GPT2} run_20260101_120002', LLAMA}


# --- Selected runs -------------------------------------------------------------------------------


def test_latest_uses_start_time_across_time_zones(compared):
    records = [make_record(n, loss=n) for n in (1, 2, 3)]
    records[0]['start_time'] = '2026-01-01T11:00:00-05:00'  # 16:00 in UTC, the newest of all
    text = compared(*records, argv=['--latest', '2'])
    assert [row['val loss'] for row in rows(text, 'RANKING')] == ['1.0000', '3.0000']


def test_run_given_several_ways_counts_once(tmp_path):
    (folder, _) = write(tmp_path, make_record(1), make_record(2))
    copy = tmp_path / 'copies' / 'copy.json'
    copy.parent.mkdir()
    copy.write_bytes((folder / 'record.json').read_bytes())
    for path in (folder, folder.parent, folder / 'record.json', copy):
        runs, skipped = read_runs([path])
        assert [run.name for run in runs] == [folder.name] and not skipped
    runs, _ = read_runs([folder, folder.parent, folder / 'record.json', tmp_path])
    assert len(runs) == 2
    assert len(read_runs([copy, folder])[0]) == 2


def test_record_file_in_other_folder(tmp_path):
    (folder,) = write(tmp_path, make_record(1))
    renamed = folder.rename(tmp_path / 'my-best-run')
    assert [run.folder for run in read_runs([renamed])[0]] == [renamed]


def test_broken_record_is_skipped_by_name(compared, tmp_path):
    (tmp_path / 'out-x' / 'run_20260101_130000').mkdir(parents=True)
    (tmp_path / 'out-x' / 'run_20260101_130000' / 'record.json').write_text('{"run_name"')
    incomplete = make_record(3)
    del incomplete['architecture']['hash']
    text = compared(make_record(1), make_record(2), incomplete)
    assert len(rows(text, 'RANKING')) == 2
    skipped = [line for line in section(text, 'WARNINGS') if line.startswith('Skipped')]
    assert len(skipped) == 2
    assert any('run_20260101_130000' in line for line in skipped)
    assert any('run_20260101_120003' in line and 'hash' in line for line in skipped)


def test_no_runs_is_user_error_with_hint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))) as error:
        read_runs([])
    assert 'python train.py' in str(error.value)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='empty is not a run folder'):
        read_runs([Path('empty')])
    with pytest.raises(UserError, match='absent: no such file'):
        read_runs([Path('absent'), Path('empty')])


def test_reading_order_does_not_matter(tmp_path):
    records = [make_record(n, loss=5 + n % 3, seed=n) for n in range(1, 9)]
    paths = write(tmp_path, *records)
    texts = set()
    for seed in range(4):
        random.Random(seed).shuffle(paths)
        texts.add(render_text(compare(read_runs(paths)[0])))
    assert len(texts) == 1


# --- The baseline --------------------------------------------------------------------------------


def baseline(runs, name=None):
    return compare(runs, name).baseline.runs[0].name[-2:]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed = make_record(1, status='failed', done=10, arch_preset='speedrun')
    unmeasured = make_record(2, loss=None)
    llama = {'architecture': LLAMA, 'loss': 4.0, 'arch_preset': 'llama'}
    write(
        tmp_path,
        failed,
        unmeasured,
        make_record(3, loss=4.5, out_dir='out-gpt2'),
        make_record(4, out_dir='out-llama', **llama),
        make_record(5, out_dir='out-llama', **llama),
        make_record(6, out_dir='out-llama-bias', bias=True, **llama),
    )
    return read_runs([])[0]


def test_default_baseline_is_oldest_finished_run(runs):
    assert baseline(runs) == '03'


@pytest.mark.parametrize(
    'name, expected',
    [
        (GPT2, '03'),
        ('abspos', '03'),
        ('out-gpt2', '03'),
        ('run_20260101_120005', '05'),
        ('120001', '01'),
        # The exact name of a folder comes before a part of out-llama-bias; its oldest run counts.
        ('out-llama', '04'),
        ('out-llama/', '04'),
        ('bias=True', '06'),
        ('speedrun', '01'),  # a preset that no name contains
        ('out-llama-bias/run_20260101_120006', '06'),
        ('out-llama-bias/run_20260101_120006/', '06'),
    ],
)
def test_baseline_by_architecture_run_or_folder(runs, name, expected):
    assert baseline(runs, name) == expected


@pytest.mark.parametrize(
    'name, message',
    [
        ('RoPE', 'different architectures.*120004.*Give a longer part'),
        (LLAMA, 'different architectures'),
        ('mamba', 'no run in this comparison.*Architectures: .*' + LLAMA),
        ('run_20260101_120008', 'Did you mean run_20260101_12000'),
    ],
)
def test_ambiguous_baseline_name_is_refused(runs, name, message):
    with pytest.raises(UserError, match=message):
        baseline(runs, name)


def test_baseline_without_loss_gives_no_differences(runs):
    text = render_text(compare(runs, 'run_20260101_120002'))
    difference_rows = [row['vs #6'] for row in rows(text, 'RANKING')]
    assert difference_rows == ['-'] * 5 + ['baseline']
    assert 'The baseline has no validation loss' in text


# --- Options that differ -------------------------------------------------------------------------


def test_options_that_differ_and_only_those(compared):
    text = compared(
        make_record(1, loss=3, beta2=0.99, seed=1),
        make_record(2, loss=4, ffn_type='swiglu', log_style='line', seed=2, novelty=0.5),
    )
    shown = {row['option']: (row['#1'], row['#2']) for row in rows(text, 'OPTIONS')}
    assert shown == {
        'ffn_type': ('standard', 'swiglu'),
        'beta2': ('0.99', '-'),
        'seed': ('1', '2'),
        'novelty': ('-', '0.5'),
    }


def test_no_options_differ(compared):
    assert 'OPTIONS THAT DIFFER: none' in compared(make_record(1), make_record(2))


def test_many_runs_are_grouped_by_value(compared):
    records = [make_record(n, loss=n, ffn_type='swiglu' if n in (1, 2, 3, 9) else 'geglu')
               for n in range(1, 10)]  # fmt: skip
    (line,) = section(compared(*records), 'OPTIONS')
    assert line.split() == ['ffn_type', 'swiglu', '(#1-3', '#9),', 'geglu', '(#4-8)']


def test_wide_values_are_grouped(compared):
    text = compared(*(make_record(n, loss=n, device='x' * 40 + str(n)) for n in (1, 2, 3)))
    lines = section(text, 'OPTIONS')
    assert lines[0].split()[:3] == ['device', 'x' * 40 + '1', '(#1),']
    assert max(map(len, lines)) <= 100


def test_long_lists_are_cut_with_count(compared):
    ranks = [*range(1, 40, 2), 40, 41]  # fifteen spans, the last of three runs
    shown, more = re.fullmatch(r'(.*) and (\d+) more', rank_ranges(ranks)).groups()
    assert len(shown.split()) + int(more) == len(ranks)
    text = compared(*(make_record(n, loss=n, beta2=n) for n in range(1, 13)))
    (shown,) = section(text, 'OPTIONS')
    assert shown.count('(#') == 8 and shown.endswith('and 4 more')


# --- Warnings ------------------------------------------------------------------------------------

CONFIG, DATA, HARDWARE = ('config',), ('startup_info', 'data'), ('startup_info', 'hardware')
CHANGES = [
    # part of the record, key, another value, affects the loss, affects time and memory
    (DATA, 'dataset', 'openwebtext', True, False),
    (DATA, 'train_sha256', '00' * 32, True, False),
    (DATA, 'val_sha256', None, True, False),
    (DATA, 'tokenizer', 'bytes', True, False),
    (DATA, 'vocab_size', 256, True, False),
    (DATA, 'model_vocab_size', 256, True, True),
    (DATA, 'block_size', 1024, True, True),
    (DATA, 'tokens_per_iter', 8192, True, True),
    (DATA, 'eval_windows', {'train': 50, 'val': 10}, True, False),
    (DATA, 'batch_size', 8, False, True),
    (CONFIG, 'optimizer', 'muon', True, False),
    (CONFIG, 'lr_schedule', 'wsd', True, False),
    (CONFIG, 'learning_rate', 1e-3, True, False),
    (CONFIG, 'min_lr', None, True, False),
    (CONFIG, 'warmup_iters', 50, True, False),
    (CONFIG, 'lr_decay_iters', 600000, True, False),
    (CONFIG, 'decay_lr', False, True, False),
    (CONFIG, 'weight_decay', 0.3, True, False),
    (CONFIG, 'grad_clip', 0.0, True, False),
    (CONFIG, 'max_iters', 200, True, False),
    (('metadata',), 'data_seed', 7, True, False),
    (CONFIG, 'sampling', 'epoch', True, False),
    (('metadata',), 'weights_from', {'source': 'hf:gpt2'}, True, False),
    (('metadata',), 'strategy', 'fsdp', False, True),
    (('metadata',), 'world_size', 8, False, True),
    (('summary',), 'total_tokens', 123_456, True, False),
    (HARDWARE, 'dtype', 'float32', True, True),
    (HARDWARE, 'device', 'cuda:0', False, True),
    (HARDWARE, 'device_name', 'NVIDIA B200', False, True),
    (HARDWARE, 'threads', 64, False, True),
    (HARDWARE, 'compile', True, False, True),
]


@pytest.mark.parametrize('where, key, value, loss, speed', CHANGES, ids=[c[1] for c in CHANGES])
def test_incomparable_conditions_are_named(compared, where, key, value, loss, speed):
    records = [make_record(n, loss=n) for n in (1, 2, 3)]
    part = records[1]
    for name in where:
        part = part[name]
    # Two parts of a record have the world size; strategies change both.
    if key == 'world_size':
        records[1]['startup_info']['hardware'][key] = value
    part[key] = value
    text = compared(*records)
    name = {'total_tokens': 'tokens_seen'}.get(key, key)
    assert warned(text, 'Losses') == ({name} if loss else set())
    assert warned(text, 'Time and memory') == ({name} if speed else set())
    assert ('see WARNINGS' in text) == loss
    (line,) = {line for line in section(text, 'WARNINGS') if re.match(rf'  {name}\b', line)}
    assert '(#1 #3)' in line and '(#2)' in line
    if value is None:
        assert 'unknown (#2)' in line
    vocabulary = key in ('tokenizer', 'vocab_size')
    assert ('compare bits/byte' in text) == vocabulary


@pytest.mark.parametrize(
    'where, key, value',
    [
        (('config',), 'out_dir', 'elsewhere'),
        (('config',), 'ffn_type', 'swiglu'),
        (('config',), 'seed', 7),
        (HARDWARE, 'device', 'cpu:0'),
        (DATA, 'eval_windows', {'train': 7, 'val': 50}),
        (('summary',), 'avg_mfu', None),
    ],
)
def test_comparable_runs_give_no_warning(compared, where, key, value):
    records = [make_record(1), make_record(2)]
    part = records[1]
    for name in where:
        part = part[name]
    part[key] = value
    assert 'WARNINGS' not in compared(*records)


@pytest.mark.parametrize('status', ['interrupted', 'failed', 'running'])
def test_unfinished_runs_are_marked(compared, status):
    text = compared(make_record(1), make_record(2, loss=4.0, status=status, done=60))
    shown = 'running or crashed' if status == 'running' else status
    assert [row['status'] for row in rows(text, 'RANKING')] == [
        f'{shown} 60/100',
        'finished 100/100',
    ]
    assert f'  #1 run_20260101_120002: {shown} 60/100' in section(text, 'WARNINGS')
    assert 'tokens_seen' in warned(text, 'Losses')


def test_killed_run_is_read_from_journal(compared, tmp_path):
    record = make_record(1)
    outline = ('config', 'architecture', 'metadata', 'startup_info')
    mfu = {'mfu_percent': 30.0, 'mfu_causal_percent': 28.0, 'hardware_peak_tflops': 0.01}
    mfu |= {'achieved_tflops': 0.003}
    memory = {'allocated_gb': None, 'peak_gb': None, 'reserved_gb': None, 'rss_gb': 2.5}
    lines = [
        {'kind': 'start', 'time': 0.0, **{key: record[key] for key in outline}}
        | {key: record[key] for key in ('run_name', 'start_time')},
        {'kind': 'evaluation', 'time': 1.0, **record['eval_steps'][0]},
        *(
            {'kind': 'iteration', 'time': 2.0 + i, 'iter': i, 'steps': 1, 'loss': 5.0}
            | {'time_ms': 1000.0, 'tokens_seen': 4096 * (i + 1), 'mfu': mfu, 'memory': memory}
            for i in range(60)
        ),
        {'kind': 'evaluation', 'time': 62.0, **record['eval_steps'][1]},
    ]
    folder = tmp_path / 'out' / record['run_name']
    folder.mkdir(parents=True)
    torn = '\n'.join(json.dumps(line) for line in lines) + '\n{"kind": "iterat'
    (folder / 'journal.jsonl').write_text(torn)
    text = compared()
    (shown,) = rows(text, 'RANKING')
    assert (shown['val loss'], shown['status']) == ('5.5000', 'running or crashed 60/100')
    cost = rows(text, 'COST')[0]
    assert (cost['MFU'], cost['tokens/s'], cost['peak GB']) == ('30.00%', '4,096', '2.50')


# --- Seeds ---------------------------------------------------------------------------------------


def test_single_seed_has_no_error_bar(compared):
    twins = (make_record(2), make_record(3, out_dir='again'))  # a seed that ran twice counts once
    text = compared(make_record(1, ffn_type='swiglu'), *twins)
    assert 'no error bar' in text and '--seed=2' in text and '+/-' not in text
    assert 'no error bar' not in render_text(compare(read_runs([Path('out-1')])[0]))


def test_seeds_give_mean_and_interval(compared):
    losses = [5.01, 5.05, 4.97]
    text = compared(
        *(
            # A preset with the same options is the same architecture.
            make_record(n, loss=loss, seed=n, arch_preset='llama' if n == 1 else 'team')
            for n, loss in enumerate(losses, 1)
        ),
        make_record(4, loss=4.0, status='interrupted', done=50, seed=4),
        make_record(5, loss=6.0, seed=5, weight_decay=0.5),  # other training options
        make_record(6, loss=7.0, seed=6, bias=True),
    )
    shown = rows(text, 'RANKING')
    # An interrupted seed belongs to its group, and its loss so far is no score.
    assert [row['val loss'] for row in shown] == ['5.0100', '6.0000', '7.0000']
    assert [row['seeds'] for row in shown] == ['3/4', '1', '1']
    assert shown[0]['status'] == '1 interrupted'
    half = stats.t.ppf(0.975, 2) * stats.sem(losses)
    assert [row['+/-'] for row in shown] == [f'{half:.4f}', '-', '-']
    assert [row['vs #1'] for row in shown] == ['baseline', '+0.9900', '+1.9900']
    assert {row['verdict'] for row in rows(text, 'VERDICT')} == {'not tested'}


def test_run_with_same_seeds_counts_once(compared):
    records = replicated({'standard': [5.0, 5.1], 'swiglu': [4.9, 5.0]})
    twin = make_record(99, loss=4.0, seed=1, ffn_type='swiglu', architecture='swiglu')
    shown = rows(compared(*records, twin), 'RANKING')
    assert [(row['val loss'], row['seeds']) for row in shown] == [('4.9500', '2'), ('5.0500', '2')]


def test_differing_data_hash_is_warned_about(compared):
    records = replicated({'standard': [5.0, 5.1], 'swiglu': [4.9, 5.0]})
    for record in records:
        record['eval_steps'][-1]['data_hash'] = f'{record["config"]["seed"]:016x}'
    assert 'WARNINGS' not in render_text(compare(run_rows(records)))
    records[3]['eval_steps'][-1]['data_hash'] = 'f' * 16  # seed 2 of one architecture alone
    assert warned(render_text(compare(run_rows(records))), 'Losses') == {'data_hash'}
    records[3]['config']['seed'] = 3  # seeds that are not shared have other data
    assert 'WARNINGS' not in render_text(compare(run_rows(records)))


def test_loss_by_position_shown_where_recorded(compared):
    one, other = make_record(1), make_record(2, ffn_type='swiglu')
    assert 'LOSS BY POSITION' not in render_text(compare(run_rows([one, other])))
    position_losses = [{'from': 0, 'to': 1, 'loss': 3.25}, {'from': 1, 'to': 64, 'loss': 1.75}]
    one['eval_steps'][-1]['diagnostics'] = {'val_loss_by_position': position_losses}
    shown = rows(compared(one, other), 'LOSS BY POSITION')
    assert shown == [
        {'#': '1', '0': '3.250', '1-63': '1.750'},
        {'#': '2', '0': '-', '1-63': '-'},
    ]


def test_last_sample_of_each_architecture_is_shown(compared):
    records = [make_record(1, loss=4.0), make_record(2, loss=5.0, ffn_type='swiglu')]
    assert 'SAMPLES' not in render_text(compare(run_rows(records)))
    for record, texts in zip(records, (('old', 'new\n```\n\x1b[2J'), ('last', None))):
        for entry, text in zip(record['eval_steps'][1:], texts):
            entry['sample'] = {'prompt': 'A: ', 'text': text, 'time_ms': 1.0}
    text = compared(*records)
    lines = text.partition('\nSAMPLES\n')[2].partition('\n\n')[0].splitlines()[1:]
    (one, other) = (line.split(', after ') for line in lines if line.startswith('#'))
    assert one[0].startswith('#1 ') and 'swiglu' in other[0] and other[0].startswith('#2 ')
    assert lines == [
        f'{one[0]}, after 100 iterations',
        *('    A: new', '    ```', '    \\x1b[2J'),
        f'{other[0]}, after 50 iterations',
        '    A: last',
    ]
    # Four spaces keep the fence of Markdown closed.
    markdown = compared(argv=['out-1', 'out-2', '--format=markdown'])
    assert '### SAMPLES\n\n' in markdown and '\n    ```\n' in markdown
    samples = [group['sample'] for group in json.loads(compared(argv=['--format=json']))['groups']]
    assert samples == [
        {'prompt': 'A: ', 'text': 'new\n```\n\x1b[2J', 'time_ms': 1.0, 'iter': 100},
        {'prompt': 'A: ', 'text': 'last', 'time_ms': 1.0, 'iter': 50},
    ]


def test_many_samples_are_cut_with_count(compared):
    records = [make_record(n, loss=n, n_layer=n) for n in range(1, 13)]
    for record in records:
        record['eval_steps'][-1]['sample'] = {'prompt': '', 'text': 'a', 'time_ms': 1.0}
    shown = compared(*records).partition('\nSAMPLES\n')[2].partition('\n\n')[0]
    assert shown.count('    a\n') == LISTED and shown.endswith(f'and {12 - LISTED} more')


def test_sample_options_are_no_difference(compared):
    text = compared(
        make_record(1), make_record(2, ffn_type='swiglu', sample_interval=50, sample_prompt='A')
    )
    assert 'sample_' not in text


def test_equal_flops_are_a_note_not_a_warning(compared):
    records = [make_record(1, max_iters=100), make_record(2, max_iters=105, ffn_type='swiglu')]
    for record, tokens in zip(records, (409_600, 430_080)):
        record['summary'] |= {'total_tokens': tokens, 'total_flops': 3.5e14 + tokens}
    text = compared(*records)
    assert 'Equal training FLOPs (within 0.00%)' in text and 'WARNINGS' not in text


@pytest.fixture
def study(tmp_path):
    """Four variants with two seeds each; the loss is additive but for swiglu without bias."""
    points, losses = [], {}
    for n, variant in enumerate(STUDY['variants']):
        for seed in (1, 2):
            point = variant['asked']
            gated, plain = point['ffn_type'] == 'swiglu', not point['bias']
            noise = 0.001 * (n * n - 3) * (2 * seed - 3)
            loss = 5 + 0.1 * seed - 0.2 * gated + 0.05 * plain + 0.3 * gated * plain + noise
            record = make_record(
                10 * n + seed,
                loss=loss,
                seed=seed,
                data_seed=seed,
                architecture=point['ffn_type'],
                learning_rate=1e-3 * (n + 1),
                **point,
            )
            record['metadata']['data_seed'] = seed
            trial = f'runs/{n}/seed={seed}'
            folder = tmp_path / 'out' / trial / record['run_name']
            folder.mkdir(parents=True)
            (folder / 'record.json').write_text(json.dumps(record))
            points.append({'folder': trial, 'variant': variant['label']})
            losses[point['ffn_type'], point['bias'], seed] = loss
    (tmp_path / 'out/study.json').write_text(json.dumps({**STUDY, 'points': points}))
    read_study_plan.cache_clear()
    return tmp_path / 'out', losses


def test_study_has_labels_effects_and_interactions(study, capsys):
    folder, losses = study
    ca.main([str(folder)])
    text = capsys.readouterr().out
    names = {row['architecture'] for row in rows(text, 'RANKING')}
    assert names == {variant['label'] for variant in STUDY['variants']}
    assert 'Tuned separately for each architecture: learning_rate (see TUNING).' in text
    assert warned(text, 'Losses') == set()  # the study varies seeds and rates on purpose

    lines = section(text, 'MAIN EFFECTS')
    gated = [
        losses['swiglu', bias, seed] - losses['standard', bias, seed]
        for bias in (True, False)
        for seed in (1, 2)
    ]
    (row,) = [line.split() for line in lines if line.startswith('ffn_type')]
    assert row[1:4] == ['swiglu', 'standard', f'{statistics.mean(gated):+.4f}']
    assert row[-1] == '4'

    (line,) = [x for x in section(text, 'INTERACTIONS') if x.startswith('ffn_type=swiglu')]
    together = statistics.mean(
        losses['swiglu', False, s]
        - losses['swiglu', True, s]
        - losses['standard', False, s]
        + losses['standard', True, s]
        for s in (1, 2)
    )
    assert f'{together:+.4f}' in line


def test_varied_options_give_no_warning(study, capsys):
    folder, _ = study
    path = folder / 'study.json'
    plan = json.loads(path.read_text()) | {'tuned': []}
    ca.main([str(folder)])
    assert warned(capsys.readouterr().out, 'Losses') == set()
    path.write_text(json.dumps(plan))
    read_study_plan.cache_clear()
    ca.main([str(folder)])
    assert warned(capsys.readouterr().out, 'Losses') == {'learning_rate'}
    for n, variant in enumerate(plan['variants']):
        variant['asked']['learning_rate'] = 1e-3 * (n + 1)
    path.write_text(json.dumps(plan))
    read_study_plan.cache_clear()
    ca.main([str(folder)])
    assert 'WARNINGS' not in capsys.readouterr().out


def test_tuning_runs_are_not_compared(study, capsys):
    folder, _ = study
    ca.main([str(folder)])
    before = capsys.readouterr().out
    tuning = make_record(0, loss=1.0, architecture='standard', seed=0)
    place = folder / 'tuning/0' / tuning['run_name']
    place.mkdir(parents=True)
    (place / 'record.json').write_text(json.dumps(tuning))
    ca.main([str(folder)])
    assert capsys.readouterr().out == before
    ca.main([str(folder / 'tuning')])  # compared on its own, it is shown
    assert '1.0000' in capsys.readouterr().out


def test_superseded_run_is_not_compared(study, capsys):
    folder, _ = study
    ca.main([str(folder)])
    before = capsys.readouterr().out
    killed = make_record(0, loss=None, status='running', done=0, architecture='standard', seed=1)
    place = folder / 'runs/0/seed=1' / killed['run_name']
    place.mkdir()
    (place / 'record.json').write_text(json.dumps(killed))
    ca.main([str(folder)])
    assert capsys.readouterr().out == before
    (folder / 'study.json').unlink()  # without a study every run counts
    read_study_plan.cache_clear()
    ca.main([str(folder)])
    assert killed['run_name'] in capsys.readouterr().out


def test_all_formats_agree(study, capsys):
    folder, losses = study
    ca.main([str(folder), '--format', 'json'])
    data = json.loads(capsys.readouterr().out)
    assert len(data['groups']) == 4 and len(data['runs']) == 8
    assert sorted(run['val_loss'] for run in data['runs']) == pytest.approx(sorted(losses.values()))
    ca.main([str(folder), '--format', 'csv'])
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [float(run['val_loss']) for run in table] == [run['val_loss'] for run in data['runs']]
    ca.main([str(folder), '--format', 'markdown'])
    text = capsys.readouterr().out
    for group in data['groups']:
        assert f'| {group["rank"]} | {group["val_loss"]:.4f} |' in text


# --- The command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--latest', '0'], '0 is not a positive whole number'),
        (['--latest', 'three'], 'three is not'),
        (['--latest'], 'expected one argument'),
        (['--latst', '3'], 'unknown option --latst. Did you mean --latest'),
        (['--late=3'], 'unknown option --late=3'),
        (['absent'], 'absent: no such file or folder'),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        ca.main(argv)


def script(folder, *argv, **environ):
    return subprocess.run(
        [sys.executable, str(PROJECT / 'compare_architectures.py'), *argv],
        cwd=folder,
        env={**os.environ, **environ},
        capture_output=True,
        timeout=60,
    )


def test_exit_codes(tmp_path):
    failed = script(tmp_path)
    assert failed.returncode == 2 and b'Traceback' not in failed.stderr
    assert failed.stderr.startswith(b'compare_architectures.py: no run to compare')
    write(tmp_path, make_record(1), make_record(2))
    # Options may come between paths.
    assert script(tmp_path, 'out-1', '--latest', '2', 'out-2').stdout.count(b'run_2026') >= 2


def test_ascii_terminal(tmp_path):
    write(tmp_path, make_record(1, out_dir='out-é'), make_record(2, loss=4.0, architecture='Ω'))
    done = script(tmp_path, PYTHONIOENCODING='ascii', PYTHONUTF8='0')
    assert done.returncode == 0 and not done.stderr
    assert b'out-\\xe9' in done.stdout and b'\\u03a9' in done.stdout
    # The output of the command itself is ASCII everywhere.
    text = script(tmp_path, PYTHONIOENCODING='utf-8').stdout.decode()
    assert text.replace('é', '').replace('Ω', '').isascii()


def test_imports_neither_torch_nor_numpy(tmp_path):
    """Nor the statistics of ladders, even to compare one rung of a ladder."""
    write_ladder(tmp_path, params=[100_000], extra=0)
    code = (
        'import sys, compare_architectures as ca; ca.main([sys.argv[1], "--format=csv"]); '
        'print({"torch", "numpy", "scaling"} & sys.modules.keys())'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    *table, modules = done.stdout.splitlines()
    assert modules == 'set()' and len(table) == 7, done.stderr


def test_lines_fit_100_columns(compared):
    text = compared(
        make_record(1, architecture=LLAMA, loss=5.98, out_dir='out-llama'),
        make_record(2, architecture=GPT2, loss=6.41, out_dir='out-gpt2', ffn_type='swiglu'),
        make_record(3, architecture=LLAMA, loss=5.99, out_dir='out-team', arch_preset='team'),
    )
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(('seeds', 'cautioned'), [(2, True), (3, False)])
def test_two_seeds_are_called_a_poor_estimate(compared, seeds, cautioned):
    losses = {'standard': [5.0, 5.1, 5.2], 'swiglu': [4.9, 5.02, 5.15]}
    text = compared(*replicated({ffn: values[:seeds] for ffn, values in losses.items()}))
    assert ('Two seeds are a poor estimate' in ' '.join(text.split())) is cautioned
