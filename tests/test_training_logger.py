"""The record of a run: nothing lost, nothing mixed, every figure recomputed another way."""

import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import training_logger
from errors import UserError
from training_logger import TrainingLogger, assemble, find_records, latest_run, new_run_folder
from training_logger import read_record as read

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((ROOT / 'record_schema.json').read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

# 12 layers of width 768, 12 heads, SwiGLU of 2048, an untied head over 50,304 tokens.
EMBEDDING, ATTENTION, FFN, NORMS = 50304 * 768, 12 * 4 * 768**2, 12 * 3 * 768 * 2048, 25 * 768
TOTAL = 2 * EMBEDDING + ATTENTION + FFN + NORMS
FULL = {
    'attention_projections': 6 * ATTENTION,
    'attention_scores': 12 * 12 * 768 * 1024,
    'ffn': 6 * FFN,
    'output_head': 6 * EMBEDDING,
}
CAUSAL = {**FULL, 'attention_scores': FULL['attention_scores'] // 2}
TOKENS_PER_ITER = 4096
MAX_ITERS = 100

CONFIG = {'arch_preset': 'llama', 'max_iters': MAX_ITERS, 'seed': 1, 'data_seed': 2}
ARCHITECTURE = {
    'name': '12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm',
    'hash': '3f9c0a7be21d',
    'choices': {
        'n_layer': 12,
        'normalization': 'rmsnorm',
        'position_encoding': 'rope',
        'rope_theta': 10000.0,
        'use_gqa': False,
        'ffn_type': 'swiglu',
    },
}
METADATA = {
    'seed': 1,
    'data_seed': 2,
    'strategy': 'single',
    'world_size': 1,
    'git_commit': None,
    'git_clean': None,
    'versions': {'python': '3.12.1', 'torch': '2.13.0', 'numpy': '2.1.0'},
    'command': 'python train.py config/arch_llama.py',
    'threads': 2,
    'platform': 'Linux',
    'config_files': [{'path': 'config/arch_llama.py', 'sha256': 'a' * 64, 'text': '# θ\n'}],
}
STARTUP_INFO = {
    'model': {
        'total_params': TOTAL,
        'trainable_params': TOTAL,
        'non_embedding_params': TOTAL - EMBEDDING,
        'components': {
            'token_embedding': EMBEDDING,
            'position_encoding': 0,
            'attention': ATTENTION,
            'ffn': FFN,
            'normalization': NORMS,
            'output_head': EMBEDDING,
        },
    },
    'flops': {
        'per_token': sum(FULL.values()),
        'per_token_causal': sum(CAUSAL.values()),
        'breakdown': FULL,
        'breakdown_causal': CAUSAL,
        'attention_ffn_ratio': 2 / 3,
        'elementwise_per_token': 1234567,
    },
    'optimizer': {
        'name': 'adamw',
        'learning_rate': 6e-4,
        'min_lr': 6e-5,
        'warmup_iters': 5,
        'lr_decay_iters': 100,
        'weight_decay': 0.1,
        'betas': [0.9, 0.95],
        'grad_clip': 1.0,
        'fused': True,
        'groups': [
            {'name': 'decay', 'tensors': 86, 'params': TOTAL - NORMS, 'weight_decay': 0.1},
            {'name': 'no_decay', 'tensors': 25, 'params': NORMS, 'weight_decay': 0.0},
        ],
    },
    'hardware': {
        'device': 'cuda:0',
        'device_name': 'NVIDIA A100-SXM4-80GB',
        'world_size': 1,
        'dtype': 'bfloat16',
        'peak_tflops': 312.0,
        'peak_source': 'NVIDIA A100 datasheet, dense bfloat16',
        'threads': 2,
        'expected_tokens_per_sec_at_50_mfu': 182516.2,
        'compile': True,
    },
    'data': {
        'dataset': 'shakespeare',
        'path': 'data/shakespeare',
        'tokenizer': 'gpt2',
        'vocab_size': 50257,
        'model_vocab_size': 50304,
        'train_tokens': 301966,
        'val_tokens': 36059,
        'train_sha256': 'b' * 64,
        'val_sha256': 'c' * 64,
        'train_bytes_per_token': 3.3,
        'val_bytes_per_token': None,
        'batch_size': 1,
        'gradient_accumulation_steps': 4,
        'block_size': 1024,
        'tokens_per_iter': TOKENS_PER_ITER,
        'eval_windows': {'train': 20, 'val': 20},
    },
    'derived': {'warmup_iters': '5: 5 % of max_iters'},
}
NO_PEAK = {
    **STARTUP_INFO,
    'hardware': {
        **STARTUP_INFO['hardware'],
        'peak_tflops': None,
        'peak_source': 'no peak is known for this device; --peak_tflops gives one',
        'expected_tokens_per_sec_at_50_mfu': None,
    },
}


def iteration(i, *, loss=3.2145, time_ms=234.0, steps=1, mfu=32.45, peak_gb=15.67, rss_gb=2.5):
    return {
        'iter': i,
        'loss': loss,
        'lr': 1.5e-6,
        'time_ms': time_ms,
        'steps': steps,
        'tokens_per_sec': 3557.0,
        'tokens_seen': (i + 1) * TOKENS_PER_ITER,
        'mfu': {
            'mfu_percent': mfu,
            'mfu_causal_percent': mfu and 0.934 * mfu,
            'achieved_tflops': 101.2,
            'hardware_peak_tflops': mfu and 312.0,
            'flops_per_token': STARTUP_INFO['flops']['per_token'],
            'architecture': ARCHITECTURE['name'],
        },
        'memory': {'allocated_gb': 12.34, 'peak_gb': peak_gb, 'reserved_gb': 16, 'rss_gb': rss_gb},
        'gradients': {'norm': 2.3456, 'mean': -1.23e-5, 'std': 3.45e-4},
    }


def evaluation(n, val_loss=4.2, bits=1.8):
    return {
        'iter': n,
        'train_loss': 4.1,
        'val_loss': val_loss,
        'val_bits_per_byte': bits,
        'lr': 1e-4,
        'time_ms': 5123.0,
    }


def checkpoint(n):
    return {'iter': n, 'val_loss': None, 'path': f'checkpoints/{n}.pt', 'time_ms': 812.0}


def logger_in(folder, **options):
    return TrainingLogger(folder, **{'stream': io.StringIO(), 'max_iters': MAX_ITERS, **options})


def started(folder, startup_info=STARTUP_INFO, **options):
    logger = logger_in(folder, **options)
    logger.start(CONFIG, ARCHITECTURE, METADATA, startup_info)
    return logger


def resumed(folder, k, changed=None, **options):
    logger = logger_in(folder, **options)
    logger.resume(
        k,
        checkpoint=f'checkpoints/{k}.pt',
        changed=changed or {},
        config=CONFIG,
        metadata=METADATA,
        startup_info=STARTUP_INFO,
    )
    return logger


def shown(logger):
    """What the logger has printed since last asked."""
    text = logger.stream.getvalue()
    logger.stream.seek(0)
    logger.stream.truncate()
    return text


@pytest.fixture
def folder(tmp_path):
    return new_run_folder(tmp_path)


class Utf8Terminal(io.StringIO):
    encoding = 'utf-8'

    def isatty(self):
        return True


# --- run folders ----------------------------------------------------------------------------------


def test_runs_of_one_second_do_not_collide_and_the_newest_is_found(tmp_path):
    now = datetime(2026, 1, 2, 3, 4, 5)
    folders = [new_run_folder(tmp_path / 'deep' / 'out', now) for _ in range(11)]
    assert len(set(folders)) == 11
    assert folders[0].name == 'run_20260102_030405'
    assert folders[10].name == 'run_20260102_030405_11'
    assert all((folder / 'checkpoints').is_dir() for folder in folders)

    out = folders[0].parent
    assert latest_run(out) is None  # none of them has begun
    for folder in folders[:10]:
        started(folder).finish()
    assert latest_run(out) == folders[9]  # _10 comes after _2 and _9
    later = new_run_folder(out, datetime(2026, 1, 2, 3, 4, 6))
    started(later)
    (out / 'run_of_mine').mkdir()
    assert latest_run(out) == later
    assert latest_run(tmp_path / 'nowhere') is None


def test_simultaneous_processes_get_folders_of_their_own(tmp_path):
    code = (
        'import sys; from datetime import datetime; from training_logger import new_run_folder\n'
        'for _ in range(25): print(new_run_folder(sys.argv[1], datetime(2026, 1, 1)))'
    )
    command = [sys.executable, '-c', code, str(tmp_path)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    made = [line for process in running for line in process.communicate(timeout=60)[0].split()]
    assert len(made) == len(set(made)) == 75


def test_an_impossible_out_dir_is_the_users_mistake(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'file/out.*--out_dir'):
        new_run_folder(tmp_path / 'file' / 'out')

    def read_only(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(os, 'mkdir', read_only)
    with pytest.raises(UserError, match='Permission denied'):
        new_run_folder(tmp_path)


def test_find_records_finds_runs_and_searches_nothing_else(tmp_path):
    runs = [new_run_folder(tmp_path / place) for place in ('out-a', 'out-b/study/x')]
    hidden = [
        new_run_folder(tmp_path / place)
        for place in ('.git/out', 'data/out', 'env/out', '.venv/lib', str(runs[0] / 'checkpoints'))
    ]
    (tmp_path / 'env' / 'pyvenv.cfg').touch()
    for run in runs + hidden:
        started(run)
    renamed = runs[1].rename(tmp_path / 'baseline')
    (tmp_path / 'loop').symlink_to(tmp_path)
    new_run_folder(tmp_path / 'out-c')  # never began

    assert find_records(tmp_path) == sorted([runs[0], renamed])
    assert find_records(renamed) == [renamed]
    assert find_records(tmp_path / 'nowhere') == []
    (tmp_path / 'record.json').write_text('{}')  # a stray one hides nothing
    assert set(find_records(tmp_path)) == {tmp_path, runs[0], renamed}


# --- the document ---------------------------------------------------------------------------------


def log_a_run(folder):
    """A run with every kind of line, killed once and resumed; returns its logger, not finished."""
    logger = started(folder)
    logger.evaluation(evaluation(0, 10.9, 4.7))
    logger.iteration(iteration(0, time_ms=90_000.0, mfu=0.1, peak_gb=30.0))
    logger.iteration(iteration(10, time_ms=200.0, steps=10, mfu=30.0, peak_gb=20.0))
    logger.event('loss_spike', 10, ratio=3.5)
    logger.checkpoint(checkpoint(15))
    logger.iteration(iteration(20, time_ms=1.0, steps=10, mfu=99.0))  # lost with the process
    logger = resumed(folder, 15, {'learning_rate': [6e-4, 3e-4]})
    logger.iteration(iteration(20, time_ms=50_000.0, steps=5, mfu=0.2))  # warm-up again
    logger.iteration(iteration(30, loss=float('nan'), time_ms=300.0, steps=10, mfu=None))
    logger.evaluation(evaluation(40, 3.5, 1.5))
    logger.iteration(iteration(99, loss=2.5, time_ms=100.0, steps=69, mfu=60.0, peak_gb=None))
    logger.evaluation(evaluation(100, 3.75, 1.6))
    logger.checkpoint(checkpoint(100))
    return logger


def test_a_full_document_is_what_the_schema_says(folder):
    VALIDATOR.check_schema(SCHEMA)
    summary = log_a_run(folder).finish()
    document = json.loads((folder / 'record.json').read_text())
    VALIDATOR.validate(document)
    assert document['summary'] == summary
    assert document['status'] == 'finished'
    assert document['metadata'] == METADATA
    assert read(folder) == read(folder / 'journal.jsonl') == read(folder / 'record.json')
    (folder / 'journal.jsonl').unlink()
    assert read(folder) == document


def objects_of_fixed_shape(schema, document, path=()):
    """Paths into the document of all objects that the schema closes."""
    if '$ref' in schema:
        schema = SCHEMA['$defs'][schema['$ref'].rsplit('/', 1)[1]]
    if schema.get('additionalProperties') is False:
        yield path
    if isinstance(document, dict):
        for key in schema.get('properties', {}).keys() & document.keys():
            below = schema['properties'][key]
            yield from objects_of_fixed_shape(below, document[key], (*path, key))
    if isinstance(document, list) and document:
        yield from objects_of_fixed_shape(schema['items'], document[0], (*path, 0))


def test_a_misspelt_key_anywhere_is_refused(folder):
    log_a_run(folder).finish()
    text = (folder / 'record.json').read_text()
    closed = list(objects_of_fixed_shape(SCHEMA, json.loads(text)))
    assert len(closed) > 15
    for path in closed:
        document = json.loads(text)
        place = document
        for key in path:
            place = place[key]
        name = next(iter(place))
        place[name + 'x'] = place.pop(name)
        messages = [error.message for error in VALIDATOR.iter_errors(document)]
        assert any(repr(name) in message and 'required' in message for message in messages), path
        assert any(repr(name + 'x') in message for message in messages), path


def test_summary_figures(folder):
    summary = log_a_run(folder).finish()
    # Updates 1-10 and 21-99 count; 0 and the first five after the resume warm up.
    times = [200.0] * 10 + [300.0] * 10 + [100.0] * 69
    mfus = [30.0] * 10 + [60.0] * 69
    lines = [json.loads(line) for line in (folder / 'journal.jsonl').read_text().splitlines()]
    resume = next(i for i, line in enumerate(lines) if line['kind'] == 'resume')
    first, second = (
        part[-1]['time'] - part[0]['time'] for part in (lines[:resume], lines[resume:])
    )
    assert summary == {
        'total_iterations': 100,
        'final_iter': 100,
        'final_train_loss': 2.5,
        'best_val_loss': 3.5,
        'final_val_loss': 3.75,
        'val_bits_per_byte': 1.5,
        'avg_mfu': pytest.approx(statistics.fmean(mfus)),
        'avg_time_ms': pytest.approx(statistics.fmean(times)),
        'total_tokens': 100 * TOKENS_PER_ITER,
        # 6 x parameters that multiply, and attention over the full square
        'total_flops': 409_600 * (6 * 123_568_128 + 12 * 12 * 12 * 64 * 1024),
        'wall_seconds': pytest.approx(first + second, abs=0.002),
        'peak_memory_gb': 30.0,
    }


def test_wall_time_counts_processes_and_not_what_lies_between():
    shared = {'config': CONFIG, 'metadata': METADATA, 'startup_info': STARTUP_INFO}
    start = {'run_name': 'r', 'start_time': 't', 'architecture': ARCHITECTURE, **shared}
    lines = [
        {'kind': 'start', 'time': 100.0, **start},
        {'kind': 'iteration', 'time': 130.0, **iteration(0)},
        {'kind': 'resume', 'time': 9000.0, 'iter': 0, 'changed': {}, **shared},
        {'kind': 'iteration', 'time': 9007.0, **iteration(0)},
    ]
    assert assemble(lines)['summary']['wall_seconds'] == 37.0
    document = assemble(lines)
    assert assemble(lines) == document, 'assembling must leave the lines as they are'


def test_what_nothing_tells_is_null(folder):
    started(folder, NO_PEAK)
    summary = read(folder)['summary']
    assert summary.pop('final_iter') == 0
    assert summary.pop('total_iterations') == MAX_ITERS
    assert summary.pop('wall_seconds') == 0
    assert set(summary.values()) == {None}
    VALIDATOR.validate(read(folder))


def test_the_only_logged_step_is_no_warm_up(folder):
    logger = started(folder)
    logger.iteration(iteration(0, time_ms=7.0, peak_gb=None))
    summary = logger.finish('interrupted')
    assert (summary['avg_time_ms'], summary['final_iter']) == (7.0, 1)
    assert summary['peak_memory_gb'] == 2.5


def test_values_that_are_not_finite_become_null_and_are_told_of(folder):
    logger = started(folder)
    entry = iteration(3, loss=float('nan'))
    entry['gradients']['norm'] = float('inf')
    logger.iteration(entry)
    logger.evaluation(evaluation(4, val_loss=float('-inf')))
    assert 'loss nan' in shown(logger).lower().replace(':', '')
    logger.finish('failed')

    def refuse(constant):
        raise AssertionError(f'{constant} is no JSON')

    for line in (folder / 'journal.jsonl').read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    document = json.loads((folder / 'record.json').read_text(), parse_constant=refuse)
    VALIDATOR.validate(document)
    assert document['training_iterations'][0]['loss'] is None
    assert document['training_iterations'][0]['gradients']['norm'] is None
    assert document['summary']['best_val_loss'] is None
    told = [(event['event'], event['iter'], event['message']) for event in document['events']]
    assert told == [('nonfinite', 3, 'loss is nan'), ('nonfinite', 4, 'val_loss is -inf')]


# --- resume ---------------------------------------------------------------------------------------


def train(logger, begin, end):
    """Log updates [begin, end); evaluations and checkpoints every 5, an event now and then."""
    for i in range(begin, end):
        if i % 5 == 0:
            logger.evaluation(evaluation(i, val_loss=10 - i / 10))
            logger.checkpoint(checkpoint(i))
        if i % 7 == 3:
            logger.event('loss_spike', i, f'loss of batch {i}')
        logger.iteration(iteration(i, loss=9 - i / 10))


def entries(document):
    lists = {key: document[key] for key in ('training_iterations', 'eval_steps', 'checkpoints')}
    lists['events'] = [
        {key: value for key, value in event.items() if key != 'time'}
        for event in document['events']
        if event['event'] != 'resume'
    ]
    return lists


@settings(max_examples=15, deadline=None)
@given(crashes=st.lists(st.integers(1, 19), max_size=3))
def test_a_run_that_is_killed_and_resumed_has_the_record_of_one_that_was_not(
    tmp_path_factory, crashes
):
    whole = started(new_run_folder(tmp_path_factory.mktemp('whole')))
    train(whole, 0, 20)
    folder = new_run_folder(tmp_path_factory.mktemp('killed'))
    logger, begin = started(folder), 0
    for crash in crashes:
        crash = max(begin + 1, crash)
        train(logger, begin, crash)  # and killed there, with no goodbye
        begin = (crash - 1) // 5 * 5
        logger = resumed(folder, begin)
    train(logger, begin, 20)

    document = read(folder)
    assert entries(document) == entries(read(whole.run_folder))
    restarts = [event for event in document['events'] if event['event'] == 'resume']
    assert len(restarts) == len(crashes)
    iters = [entry['iter'] for entry in document['training_iterations']]
    assert iters == list(range(20))


def test_resume_takes_back_what_the_checkpoint_does_not_hold(folder):
    logger = started(folder)
    for n in (0, 10, 20):
        logger.iteration(iteration(n))
        logger.evaluation(evaluation(n))
        logger.event('signal', n)
    logger.finish('interrupted')
    logger = resumed(folder, 10, {'threads': [2, 4]})
    assert 'threads' in shown(logger)
    document = read(folder)
    assert (document['status'], document['end_time']) == ('running', None)
    assert [entry['iter'] for entry in document['training_iterations']] == [0]
    assert [entry['iter'] for entry in document['eval_steps']] == [0, 10]
    assert [event['iter'] for event in document['events']] == [0, 10, 10]
    assert document['events'][-1]['changed'] == {'threads': [2, 4]}
    VALIDATOR.validate(document)


def test_resume_needs_a_journal(folder):
    with pytest.raises(UserError, match=r'journal\.jsonl'):
        resumed(folder, 10)
    assert not (folder / 'journal.jsonl').exists()


def test_a_journal_is_never_begun_twice(folder):
    started(folder)
    before = (folder / 'journal.jsonl').read_bytes()
    with pytest.raises(UserError, match=r'journal\.jsonl'):
        started(folder)
    assert (folder / 'journal.jsonl').read_bytes() == before


# --- crashes --------------------------------------------------------------------------------------


def test_a_last_line_torn_at_any_byte_is_left_out_and_mended(tmp_path):
    logger = started(new_run_folder(tmp_path))
    logger.event('before', 0)
    path = logger.run_folder / 'journal.jsonl'
    kept = path.read_bytes()
    logger.event('torn', 0)
    whole = path.read_bytes()
    folder = new_run_folder(tmp_path)
    torn = folder / 'journal.jsonl'
    for end in range(len(kept), len(whole) + 1):
        torn.write_bytes(whole[:end])
        survivors = ['before', 'torn'] if end >= len(whole) - 1 else ['before']
        assert [event['event'] for event in read(folder)['events']] == survivors
        resumed(folder, 2).event('after', 2)
        assert [event['event'] for event in read(folder)['events']] == [
            *survivors,
            'resume',
            'after',
        ]


ENDLESS = """
import itertools, sys
sys.path[:0] = [{tests!r}, {root!r}]
from test_training_logger import *
logger = TrainingLogger({folder!r}, style='line', max_iters=10**9)
logger.start(CONFIG, ARCHITECTURE, METADATA, STARTUP_INFO)
for i in itertools.count():
    logger.iteration(iteration(i))
    if i % 10 == 9:
        logger.evaluation(evaluation(i))
"""


def test_kill_9_loses_nothing_that_the_console_showed(folder):
    code = ENDLESS.format(tests=str(Path(__file__).parent), root=str(ROOT), folder=str(folder))
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    seen = []
    for line in process.stdout:
        if match := re.match(r'iter (\d+):', line):
            seen.append(int(match[1]))
        if len(seen) == 40:
            process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    document = read(folder)
    iters = [entry['iter'] for entry in document['training_iterations']]
    assert iters == list(range(len(iters)))
    assert len(seen) <= len(iters) <= len(seen) + 1
    assert document['status'] == 'running'
    VALIDATOR.validate(json.loads((folder / 'record.json').read_text()))


FULL_DISK = """
import resource, sys
sys.path[:0] = [{tests!r}, {root!r}]
from test_training_logger import *
logger = TrainingLogger({folder!r}, style='line', max_iters=10**9)
logger.start(CONFIG, ARCHITECTURE, METADATA, STARTUP_INFO)
logger.iteration(iteration(0))
logger.evaluation(evaluation(1))
room = {room}
resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
try:
    for i in range(1, 100):
        logger.iteration(iteration(i))
        {each}
except UserError as error:
    print('CAUGHT', error)
"""


@pytest.mark.parametrize(
    'full, room, each',
    [
        ('journal.jsonl', '(logger.run_folder / "journal.jsonl").stat().st_size + 1000', ''),
        # The document is larger than the journal, so the limit meets it first.
        (
            'record.json',
            '(logger.run_folder / "record.json").stat().st_size + 300',
            'logger.evaluation(evaluation(i + 1))',
        ),
    ],
)
def test_a_full_disk_is_told_of_and_spares_what_was_written(folder, full, room, each):
    code = FULL_DISK.format(
        tests=str(Path(__file__).parent), root=str(ROOT), folder=str(folder), room=room, each=each
    )
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=True
    )
    message = result.stdout.splitlines()[-1]
    assert message.startswith('CAUGHT') and 'File too large' in message
    assert str(folder / full) in message and '--init_from=resume' in message
    document = json.loads((folder / 'record.json').read_text())
    VALIDATOR.validate(document)
    assert (folder / 'journal.jsonl').read_bytes().endswith(b'}\n')
    assert [entry['iter'] for entry in document['eval_steps']] == [1]
    assert len(read(folder)['training_iterations']) >= 2
    assert sorted(os.listdir(folder)) == ['checkpoints', 'journal.jsonl', 'record.json']


def test_whoever_reads_the_record_while_it_is_replaced_sees_a_whole_one(folder):
    logger = started(folder)
    with open(folder / 'record.json') as reader:
        logger.evaluation(evaluation(0))
        assert json.load(reader)['eval_steps'] == []
    assert read(folder / 'record.json')['eval_steps'] == [evaluation(0)]


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name, content',
    [
        ('record.json', b''),
        ('record.json', b'{"schema_version": 1}'),
        ('record.json', b'[1, 2]'),
        ('record.json', b'\xff\xfe\x00 rubbish'),
        ('record.json', b'[' * 100_000),
        ('journal.jsonl', b''),
        ('journal.jsonl', b'{"kind": "start", "time": 1.0, "run_na'),
        ('journal.jsonl', b'{"kind": "iteration", "iter": 0, "time": 1.0}\n'),
        ('journal.jsonl', b'{"a": 1}\nrubbish\n'),
        ('journal.jsonl', b'17\n'),
        ('journal.jsonl', b'{"kind": "start", "time": 1.0, "run_name": "r", "start_time": "t"}\n'),
    ],
)
def test_a_file_that_is_no_record_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read(path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read(tmp_path)


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(UserError, match=r'nowhere.*No such file'):
        read(tmp_path / 'nowhere')
    with pytest.raises(UserError, match=r'no journal\.jsonl and no record\.json'):
        read(tmp_path)


def test_a_record_of_another_version_is_refused(folder):
    document = started(folder).finish() and read(folder)
    (folder / 'record.json').write_text(json.dumps({**document, 'schema_version': 2}))
    with pytest.raises(UserError, match='schema_version 2'):
        read(folder / 'record.json')


def test_the_schema_knows_the_version_and_the_states_that_are_written():
    assert SCHEMA['properties']['schema_version'] == {'const': training_logger.SCHEMA_VERSION}
    assert SCHEMA['properties']['status']['enum'] == list(training_logger.STATUSES)


# --- ranks and console ----------------------------------------------------------------------------


def test_other_ranks_write_and_show_nothing(folder, capsys):
    before = sorted(folder.rglob('*'))
    logger = logger_in(folder, is_main=False, stream=None)
    logger.start(CONFIG, ARCHITECTURE, METADATA, STARTUP_INFO)
    logger.iteration(iteration(0))
    logger.evaluation(evaluation(0))
    logger.checkpoint(checkpoint(0))
    logger.event('signal', 0)
    resumed(folder, 0, is_main=False, stream=None)
    logger_in(None, is_main=False).event('signal', 0)
    assert logger.finish() is None
    assert sorted(folder.rglob('*')) == before
    assert capsys.readouterr().out == ''


def test_the_line_is_on_disk_before_the_console_shows_it(folder):
    class Watching(io.StringIO):
        def write(self, text):
            for i in re.findall(r'^iter (\d+)', text, re.MULTILINE):
                last = (folder / 'journal.jsonl').read_text().splitlines()[-1]
                checked.append(json.loads(last)['iter'] == int(i))
            return super().write(text)

    checked = []
    logger = started(folder, style='line', stream=Watching())
    for i in range(3):
        logger.iteration(iteration(i))
    assert checked == [True] * 3


def test_a_line_an_iteration_reads_like_nanogpt(folder):
    logger = started(folder, style='line')
    shown(logger)
    logger.iteration(iteration(33))
    line = shown(logger)
    match = re.match(r'iter (\d+): loss ([\d.]+), time ([\d.]+)ms, mfu (-?[\d.]+)%', line)
    assert match and match.groups() == ('33', '3.2145', '234.00', '32.45')
    assert line.endswith('lr 1.50e-06, tok/s 3,557, mem 15.7GB, grad 2.346, eta n/a\n')
    logger.evaluation(evaluation(34))
    assert shown(logger) == 'step 34: train loss 4.1000, val loss 4.2000, 1.8000 bits per byte\n'
    logger.evaluation(evaluation(35, bits=None))
    assert shown(logger) == 'step 35: train loss 4.1000, val loss 4.2000\n'


def test_the_block_of_an_iteration_is_the_design_documents(folder):
    logger = started(folder, stream=Utf8Terminal())
    shown(logger)
    logger.iteration(iteration(5))
    rule = '─' * 80
    assert shown(logger) == '\n'.join(
        [
            rule,
            '📍 Iter      5 │ Loss: 3.2145 │ Time: 234ms │ LR: 1.50e-06 │ ETA: n/a',
            rule,
            '⚡ MFU: 32.45% (causal 30.31%) │ Achieved: 101.2 TF │ Peak: 312.0 TF',
            '   Tokens/s: 3,557 │ FLOPs/token: 854.7 MF',
            '💾 Memory: 12.34 GB alloc │ 15.67 GB peak │ 16.00 GB reserved',
            '📊 Gradients: norm=2.3456 │ mean=-1.23e-05 │ std=3.45e-04',
            '',
        ]
    )


def test_a_missing_mfu_comes_with_the_reason(folder):
    logger = started(folder, NO_PEAK)
    assert 'unknown (no peak is known for this device' in shown(logger)
    logger.iteration(iteration(5, mfu=None))
    text = shown(logger)
    assert 'MFU: n/a (no peak is known for this device; --peak_tflops gives one)' in text
    assert 'Peak:' not in text


def test_an_evaluation_is_shown_beside_the_best(folder):
    logger = started(folder)
    for n, loss in ((0, 4.5), (10, 4.0)):
        logger.evaluation(evaluation(n, loss))
        assert 'Best val loss so far: this one' in shown(logger)
    logger.evaluation(evaluation(20, 4.25))
    assert 'Best val loss so far: 4.0000 at iter 10' in shown(logger)


@pytest.mark.parametrize('style', ['auto', 'block', 'line'])
@pytest.mark.parametrize('info', [STARTUP_INFO, NO_PEAK], ids=['peak', 'no peak'])
def test_a_log_file_gets_plain_text_and_80_columns_and_a_terminal_the_same_words(
    tmp_path, style, info
):
    texts = []
    for stream in (io.StringIO(), Utf8Terminal()):
        logger = started(new_run_folder(tmp_path), info, style=style, stream=stream)
        logger.iteration(iteration(5, mfu=None if info is NO_PEAK else 32.45))
        logger.evaluation(evaluation(6, 10.9))
        logger.checkpoint(checkpoint(6))
        logger.event('signal', 6, 'SIGTERM')
        logger.finish()
        texts.append(stream.getvalue().replace(str(logger.run_folder), 'FOLDER'))
    plain, fancy = texts
    assert plain.isascii()
    assert re.findall('[A-Za-z]{2,}', plain) == re.findall('[A-Za-z]{2,}', fancy)
    assert '🚀' in fancy and '├─' in fancy
    if style != 'line':
        assert max(map(len, plain.splitlines())) <= 80


def test_the_startup_report_shows_every_choice_and_figures_that_add_up(folder):
    logger = started(folder)
    report = shown(logger)
    for key, value in {
        'Architecture Name': '12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm',
        'Layers': '12',
        'Normalization': 'rmsnorm',
        'Position Encoding': 'rope',
        'RoPE Theta': '10000.0',
        'Use GQA': 'False',
        'FFN Type': 'swiglu',
        'Tokens/iteration': '1 sequence x 4 accumulation x 1,024 tokens = 4,096',
        'Vocabulary': '50,257 data -> 50,304 model',
        'Attention/FFN ratio': '0.67 (causal half)',
        'Expected tokens/s': '182,516 at 50 % MFU',
        'Peak': '312.0 TFLOP/s (NVIDIA A100 datasheet, dense bfloat16)',
        'warmup_iters': '5: 5 % of max_iters',
        'Folder': str(folder),
    }.items():
        assert re.search(rf'{re.escape(key)}: +{re.escape(value)}$', report, re.MULTILINE), key
    totals = re.findall(r'^ +total +(.*)$', report, re.MULTILINE)
    assert [total.split() for total in totals] == [
        ['162,220,800', '100.0', '%'],
        ['111', '162,220,800'],
        ['854.7', 'MF', '100.0', '%', '798.0', 'MF', '100.0', '%'],
    ]


@pytest.mark.parametrize('part, key', [('model', 'total_params'), ('flops', 'per_token')])
def test_tables_that_do_not_add_up_are_refused(folder, part, key):
    figures = STARTUP_INFO[part]
    with pytest.raises(AssertionError):
        started(folder, {**STARTUP_INFO, part: {**figures, key: figures[key] + 1000}})


def test_the_optimizer_must_hold_every_parameter(folder):
    optimizer = STARTUP_INFO['optimizer']
    with pytest.raises(AssertionError):
        started(
            folder,
            {**STARTUP_INFO, 'optimizer': {**optimizer, 'groups': optimizer['groups'][:1]}},
        )


def test_time_left_is_the_pace_since_the_first_logged_step(folder, monkeypatch):
    clock = iter([1000.0, 1030.0, 1060.0, 1061.0])
    logger = started(folder, style='line')
    monkeypatch.setattr(training_logger.time, 'monotonic', lambda: next(clock))
    left = []
    for i in (9, 19, 39, 99):
        shown(logger)
        logger.iteration(iteration(i))
        left.append(shown(logger).rsplit('eta ', 1)[1].strip())
    # 10 updates in 30 s and 80 to go; 30 in 60 s and 60 to go
    assert left == ['n/a', '0:04:00', '0:02:00', '0:00:00']


def test_the_closing_block_says_where_and_what_next(folder):
    logger = log_a_run(folder)
    shown(logger)
    logger.finish('interrupted')
    text = shown(logger)
    for expected in (
        'TRAINING INTERRUPTED after 100 of 100 iterations',
        '3.5000 (iter 40; 1.5000 bits per byte)',
        '350.1 TFLOPs',  # 409,600 tokens x 854.7 MF
        str(folder / 'record.json'),
        'python compare_architectures.py',
        '--init_from=resume',
    ):
        assert expected in text


def test_finish_before_start_does_nothing(folder):
    assert logger_in(folder).finish('failed') is None
    assert not (folder / 'journal.jsonl').exists()


def test_an_unknown_style_is_the_users_mistake(folder):
    with pytest.raises(UserError, match=r"log_style='lines' .*Did you mean line\?"):
        logger_in(folder, style='lines')


def test_a_stream_that_lacks_letters_does_not_end_the_run(tmp_path):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding='ascii', write_through=True)
    started(new_run_folder(tmp_path / 'læring'), stream=stream).finish()
    assert b'TRAINING FINISHED' in raw.getvalue()


@pytest.mark.parametrize(
    'value, text',
    [
        (None, 'n/a'),
        (0, '0.0 F'),
        (854_654_976, '854.7 MF'),
        (35.1e9, '35.1 GF'),
        (999.96e9, '1.0 TF'),
        (312e12, '312.0 TF'),
        (3e24, '3,000.0 ZF'),
    ],
)
def test_flops_have_the_unit_that_suits_them(value, text):
    assert training_logger._flops(value) == text
