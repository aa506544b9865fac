"""The record of a run: nothing lost, nothing mixed, every figure recomputed another way."""

import io
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import jsonschema
import pytest
from helpers.sample_run import (
    ARCHITECTURE,
    CONFIG,
    DIAGNOSTICS,
    MAX_ITERS,
    METADATA,
    NO_PEAK,
    SAMPLE,
    STARTUP_INFO,
    TOKENS_PER_ITER,
    checkpoint,
    evaluation,
    iteration,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import training_logger
from common import files
from common.errors import UserError
from records import record
from records.record import assemble, read_outline
from records.record import read_record as read
from records.run_folders import find_records, latest_run, new_run_folder
from records.summary import memory_peak
from training_logger import TrainingLogger

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((ROOT / 'records/record_schema.json').read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def logger_in(folder, **options):
    return TrainingLogger(folder, **{'stream': io.StringIO(), 'max_iters': MAX_ITERS, **options})


def started(folder, startup_info=STARTUP_INFO, metadata=METADATA, **options):
    logger = logger_in(folder, **options)
    logger.start(CONFIG, ARCHITECTURE, metadata, startup_info)
    return logger


def resumed(folder, k, changed=None, metadata=METADATA, **options):
    logger = logger_in(folder, **options)
    logger.resume(
        k,
        checkpoint=f'checkpoints/{k}.pt',
        changed=changed or {},
        config=CONFIG,
        metadata=metadata,
        startup_info=STARTUP_INFO,
    )
    return logger


def killed(logger):
    """As the process of `logger` leaves it when it dies: the system closes its files."""
    logger.journal.close()


def shown(logger):
    """What the logger has printed since last asked."""
    stream = logger.console.stream
    text = stream.getvalue()
    stream.seek(0)
    stream.truncate()
    return text


@pytest.fixture
def folder(tmp_path):
    return new_run_folder(tmp_path)


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


def test_the_newest_run_is_the_one_that_began_last_whatever_the_time_zone(tmp_path):
    """Names are in local time: a container in UTC, a host in Tokyo, the hour after summer time."""
    names = {'run_20260102_120000': '+09:00', 'run_20260102_040000': '+00:00'}  # 03:00, 04:00 UTC
    for name, zone in names.items():
        folder = tmp_path / name
        folder.mkdir()
        hour = name[13:15]
        line = {'kind': 'start', 'time': 0.0, 'run_name': name}
        line['start_time'] = f'2026-01-02T{hour}:00:00{zone}'
        (folder / 'journal.jsonl').write_text(json.dumps(line) + '\n')
    assert latest_run(tmp_path).name == 'run_20260102_040000'
    # A record alone tells it too; without a time the name does.
    (tmp_path / 'run_20260102_040000' / 'journal.jsonl').rename(
        tmp_path / 'run_20260102_040000' / 'record.json'
    )
    assert latest_run(tmp_path).name == 'run_20260102_040000'
    for nonsense in ('', '{}', '{"start_time": "yesterday"}', '{"start_time": 5}'):
        for name in ('run_20260103_000000', 'run_99999999_999999'):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / 'journal.jsonl').write_text(nonsense)
        newest = 'run_20260103_000000' if nonsense else 'run_20260102_040000'
        assert latest_run(tmp_path).name == newest


def test_a_folder_in_the_way_of_the_record_is_named(tmp_path):
    folder = new_run_folder(tmp_path)
    logger = started(folder)
    (folder / 'record.json').unlink()
    (folder / 'record.json').mkdir()
    with pytest.raises(UserError, match=r'record\.json.*What was recorded before is intact'):
        logger.finish()
    assert read(folder)['status'] == 'finished'


def test_a_job_finds_the_run_that_it_began_or_went_on_with(tmp_path):
    first, second, third = (
        new_run_folder(tmp_path, datetime(2026, 1, 2, 3, 4, second)) for second in range(3)
    )
    for folder, job in ((first, 'a'), (second, 'b'), (third, None)):
        started(folder, metadata={**METADATA, 'job': job}).finish()
    assert latest_run(tmp_path) == latest_run(tmp_path, 'another') == third
    assert [latest_run(tmp_path, job) for job in 'ab'] == [first, second]
    resumed(second, 0, metadata={**METADATA, 'job': 'a'}).finish()
    assert [latest_run(tmp_path, job) for job in 'ab'] == [second, third]


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


def test_find_records_follows_links_to_other_disks_once(tmp_path):
    disk, out = tmp_path / 'disk', tmp_path / 'out'
    run = started(new_run_folder(disk / 'llama')).run_folder
    own = started(new_run_folder(out / 'gpt2')).run_folder
    for name in ('away', 'again'):
        (out / name).symlink_to(disk)
    (disk / 'back').symlink_to(out)
    (out / 'gone').symlink_to('nowhere')
    (out / 'self').symlink_to('self')
    assert find_records(out) == sorted([own, out / 'again' / 'llama' / run.name])


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
    killed(logger)
    logger = resumed(folder, 15, {'learning_rate': [6e-4, 3e-4]})
    logger.iteration(iteration(20, time_ms=50_000.0, steps=5, mfu=0.2))  # warm-up again
    logger.iteration(iteration(30, loss=float('nan'), time_ms=300.0, steps=10, mfu=None))
    logger.evaluation({**evaluation(40, 3.5, 1.5), 'diagnostics': DIAGNOSTICS, 'sample': SAMPLE})
    logger.iteration(iteration(99, loss=2.5, time_ms=100.0, steps=69, mfu=60.0, peak_gb=None))
    logger.evaluation({**evaluation(100, 3.75, 1.6), 'sample': {**SAMPLE, 'text': None}})
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
    assert [e.get('sample') for e in document['eval_steps']] == [
        *(None, SAMPLE, {**SAMPLE, 'text': None}),
    ]
    assert read(folder) == read(folder / 'journal.jsonl') == read(folder / 'record.json')
    (folder / 'journal.jsonl').unlink()
    assert read(folder) == document


def test_what_a_rank_holds_joins_what_was_known_at_the_start(folder):
    held = {'parameter_bytes': 100, 'gradient_bytes': 50, 'optimizer_bytes': 200}
    logger = started(folder)
    assert read(folder)['startup_info'] == STARTUP_INFO
    logger.memory_footprint(held)
    logger.finish()
    document = read(folder)
    expected = {**STARTUP_INFO, 'parallel': {'bytes_sent_per_update': 0.0, **held}}
    assert document['startup_info'] == expected
    VALIDATOR.validate(document)
    # Another process may be divided otherwise: it is not known again until it has measured.
    resumed(folder, 0).finish()
    assert read(folder)['startup_info'] == STARTUP_INFO


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
    if isinstance(document, list):
        for i, item in enumerate(document):
            yield from objects_of_fixed_shape(schema['items'], item, (*path, i))


def test_a_misspelt_key_anywhere_is_refused(folder):
    log_a_run(folder).finish()
    text = (folder / 'record.json').read_text()
    closed = {  # one of each shape
        tuple(key for key in path if isinstance(key, str)): path
        for path in objects_of_fixed_shape(SCHEMA, json.loads(text))
    }
    assert len(closed) > 20
    for path in closed.values():
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
    mfu = (30.0 * 10 * 200 + 60.0 * 69 * 100) / (10 * 200 + 69 * 100)
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
        'avg_mfu': pytest.approx(mfu),
        'avg_time_ms': pytest.approx(statistics.fmean(times)),
        'train_seconds': pytest.approx(90.0 + 5 * 50.0 + sum(times) / 1e3),
        'total_tokens': 100 * TOKENS_PER_ITER,
        **{'epochs': None, 'unique_tokens': None},  # older runs do not say
        # 6 x parameters that multiply, and attention over the full square
        'total_flops': 409_600 * (6 * 123_568_128 + 12 * 12 * 12 * 64 * 1024),
        'wall_seconds': pytest.approx(first + second, abs=0.002),
        'peak_memory_gb': 30.0,
        'nonfinite_updates': 0,
        'loss_spikes': 1,
        'gradient_growth': None,  # too short a log
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


@pytest.mark.parametrize('interval', [1, 4, 7])
def test_evaluations_know_the_seconds_of_the_updates_before_them(interval):
    draw = random.Random(interval)
    durations = [draw.uniform(50, 150) for _ in range(30)]
    shared = {'config': CONFIG, 'metadata': METADATA, 'startup_info': STARTUP_INFO}
    start = {'run_name': 'r', 'start_time': 't', 'architecture': ARCHITECTURE, **shared}
    lines = [{'kind': 'start', 'time': 0.0, **start}]
    for last in range(interval - 1, 30, interval):
        mean = statistics.fmean(durations[last + 1 - interval : last + 1])
        entry = {**iteration(last), 'time_ms': mean, 'steps': interval}
        entry['gradients'] = {'norm': 1.0 if last < 15 else 3.0, 'mean': 0.0, 'std': 0.0}
        lines.append({'kind': 'iteration', 'time': 1.0, **entry})
        # Within what one log entry stands for, every update took the same.
        durations[last + 1 - interval : last + 1] = [mean] * interval
    logged = 30 // interval * interval
    lines += [{'kind': 'evaluation', 'time': 2.0, **evaluation(i)} for i in (0, 5, 16, logged, 30)]
    document = assemble(lines)
    for entry in document['eval_steps']:
        known = entry['iter'] <= logged
        expected = pytest.approx(sum(durations[: entry['iter']]) / 1000) if known else None
        assert entry['train_seconds'] == expected
    norms = [e['gradients']['norm'] for e in document['training_iterations']]
    if interval == 1:
        late, early = statistics.fmean(norms[-7:]), statistics.fmean(norms[7:14])
        assert document['summary']['gradient_growth'] == pytest.approx(late / early)


def test_the_outline_of_a_record_is_the_record_without_its_iterations(folder):
    logger = started(folder)
    logger.iteration(iteration(0))
    logger.evaluation(evaluation(1))

    def outline():
        return {**read(folder), 'training_iterations': []}

    assert read_outline(folder) == outline()  # while it runs
    logger.finish()
    assert read_outline(folder) == outline()
    record = folder / 'record.json'
    text = record.read_text()
    # What has ended is read from record.json alone; one that is not of this end is not believed.
    record.write_text(text.replace('"val_loss": 4', '"val_loss": 3'))
    assert read_outline(folder)['eval_steps'] != outline()['eval_steps']
    record.write_text(text.replace('finished', 'interrupted'))
    assert read_outline(folder) == outline()
    record.write_text('{')
    assert read_outline(folder) == outline()


def test_what_nothing_tells_is_null(folder):
    started(folder, NO_PEAK)
    summary = read(folder)['summary']
    assert [summary.pop(key) for key in ('final_iter', 'nonfinite_updates', 'loss_spikes')] == [
        0
    ] * 3
    assert summary.pop('total_iterations') == MAX_ITERS
    assert summary.pop('wall_seconds') == 0
    assert set(summary.values()) == {None}
    VALIDATOR.validate(read(folder))


def test_the_only_logged_step_is_no_warm_up(folder):
    logger = started(folder)
    logger.iteration(iteration(0, time_ms=7.0))
    summary = logger.finish('interrupted')
    assert (summary['avg_time_ms'], summary['final_iter']) == (7.0, 1)


def test_peak_memory_is_the_devices_or_else_the_processs(folder):
    logger, entry = started(folder), iteration(0)
    memory = {'allocated_gb': 1.0, 'peak_gb': 4.0, 'reserved_gb': 2.0, 'rss_gb': 3.0}
    for key, expected in (('peak_gb', 4.0), ('reserved_gb', 2.0), ('allocated_gb', 1.0)):
        entry['memory'] = dict(memory)
        assert memory_peak(entry) == expected
        memory[key] = None
    logger.iteration({**entry, 'memory': memory})
    assert memory_peak({'memory': memory}) == logger.finish()['peak_memory_gb'] == 3.0
    assert memory_peak({'memory': dict.fromkeys(memory)}) is None


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
        if event['event'] not in ('resume', 'rollback')
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
        train(logger, begin, crash)
        killed(logger)
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


def test_a_run_that_was_rolled_back_has_the_record_of_one_that_never_strayed(folder, tmp_path):
    straight = started(new_run_folder(tmp_path / 'straight'))
    train(straight, 0, 30)
    logger = started(folder)
    train(logger, 0, 10)
    for strayed_to in (13, 16, 16):
        train(logger, 10, strayed_to)
        logger.rollback(
            10, from_iter=strayed_to, checkpoint='checkpoints/10.pt', message='loss is nan'
        )
        assert 'rollback at iter 10: loss is nan' in shown(logger)
        kept = read(folder)
        assert [entry['iter'] for entry in kept['training_iterations']] == list(range(10))
        assert kept['eval_steps'][-1]['iter'] <= 10
    train(logger, 10, 20)
    logger.rollback(20, from_iter=20, checkpoint='checkpoints/20.pt', message='lost on resuming')
    killed(logger)
    logger = resumed(folder, 15)
    train(logger, 15, 30)
    document = read(folder)
    VALIDATOR.validate(document)
    kept, never_strayed = entries(document), entries(read(straight.run_folder))
    strayed = [event['iter'] for event in kept.pop('events')]
    never_strayed.pop('events')
    assert kept == never_strayed
    # What led to a rollback happened, each time: batch 10 was met four times.
    assert strayed.count(10) == 4 and strayed.count(3) == 1
    events = [(e['event'], e['iter'], e.get('from_iter')) for e in document['events']]
    assert [event for event in events if event[0] in ('rollback', 'resume')] == [
        *(('rollback', 10, strayed_to) for strayed_to in (13, 16, 16)),
        ('resume', 15, None),
    ]


def test_the_summary_counts_spikes_and_updates_that_were_skipped(folder):
    logger = started(folder)
    logger.event('nonfinite', 4, '2 skipped', count=2)
    logger.iteration(iteration(5, loss=float('nan')))  # an event of its own, which counts nothing
    logger.event('loss_spike', 6)
    logger.event('nonfinite', 7, '3 skipped', count=3)
    logger.event('loss_spike', 8)
    logger.event('signal', 9, count=50)
    summary = logger.finish()
    assert (summary['nonfinite_updates'], summary['loss_spikes']) == (5, 2)
    assert len(read(folder)['events']) == 6
    VALIDATOR.validate(read(folder))


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
        logger = resumed(folder, 2)
        logger.event('after', 2)
        assert [event['event'] for event in read(folder)['events']] == [
            *survivors,
            'resume',
            'after',
        ]
        killed(logger)


def test_two_processes_do_not_train_one_run(folder):
    logger = started(folder)
    before = (folder / 'journal.jsonl').read_bytes()
    code = RESUME.format(tests=str(Path(__file__).parent), root=str(ROOT), folder=str(folder))
    command = [sys.executable, '-c', code]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert f'UserError: {folder}: another process is training this run' in refused.stderr
    assert (folder / 'journal.jsonl').read_bytes() == before
    assert read(folder)['status'] == 'running'  # readers are let in

    logger.finish('interrupted')
    allowed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert allowed.returncode == 0, allowed.stderr
    assert [event['event'] for event in read(folder)['events']] == ['resume']
    resumed(folder, 0)  # what is dead holds nothing


RESUME = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from test_training_logger import *
logger = resumed({folder!r}, 0)
"""


@pytest.mark.parametrize('absence', ['no fcntl', 'no locks'])
def test_a_system_without_locks_trains_all_the_same(folder, monkeypatch, absence):
    if absence == 'no fcntl':
        monkeypatch.setattr(files, 'fcntl', None)
    else:

        def unsupported(*args):
            raise OSError(95, 'Operation not supported')

        monkeypatch.setattr(files.fcntl, 'flock', unsupported)
    assert started(folder).finish()['final_iter'] == 0


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
training_logger.RECORD_SHARE = float('inf')  # write record.json at each evaluation
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
    assert logger.finish('failed') is None
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
    again, message = result.stdout.splitlines()[-2:]
    assert message.startswith('CAUGHT') and 'File too large' in message
    assert 'File too large' in again  # shown by `finish`, which spares the error that comes first
    assert str(folder / full) in message and '--init_from=resume' in message
    document = json.loads((folder / 'record.json').read_text())
    VALIDATOR.validate(document)
    assert (folder / 'journal.jsonl').read_bytes().endswith(b'}\n')
    assert [entry['iter'] for entry in document['eval_steps']] == [1]
    assert len(read(folder)['training_iterations']) >= 2
    assert sorted(os.listdir(folder)) == ['checkpoints', 'journal.jsonl', 'record.json']


@pytest.mark.parametrize('status', ['finished', 'interrupted', 'failed'])
def test_a_disk_that_is_full_at_the_end_is_told_of(folder, monkeypatch, status):
    logger = started(folder)
    before = (folder / 'journal.jsonl').read_bytes()
    shown(logger)

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'write', full)
    if status == 'failed':  # another error is on its way
        assert logger.finish(status) is None
        assert 'No space left' in shown(logger)
    else:
        with pytest.raises(UserError, match='No space left'):
            logger.finish(status)
    monkeypatch.undo()
    assert (folder / 'journal.jsonl').read_bytes() == before
    resumed(folder, 0).finish(status)  # nobody holds it any more
    assert read(folder)['status'] == status


def test_the_record_is_kept_up_to_date_in_a_hundredth_of_the_time(folder, monkeypatch):
    now, written = [0.0], []

    def slow(path, document):
        now[0] += 2.0
        written.append((now[0], len(document['eval_steps'])))

    monkeypatch.setattr(training_logger.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(training_logger, 'write_record', slow)
    logger = started(folder, style='line')
    for n in range(100):
        now[0] += 10.0
        logger.evaluation(evaluation(n))
    moments = [moment for moment, _ in written]
    assert len(moments) > 2
    assert all(200 <= b - a - 2.0 < 210 for a, b in itertools.pairwise(moments))
    logger.finish()
    assert written[-1][1] == 100


def test_an_evaluation_is_shown_beside_the_best_of_the_whole_run(folder):
    def standing(n, loss):
        logger.evaluation(evaluation(n, loss))
        return re.search('Best val loss so far: (.*)', shown(logger))[1]

    logger = started(folder)
    assert standing(0, float('nan')) == 'n/a'
    assert standing(10, 4.0) == 'this one'
    assert standing(20, 3.0) == 'this one'
    assert standing(30, 3.5) == '3.0000 at iter 20'
    logger.rollback(15, from_iter=31, checkpoint='checkpoints/15.pt', message='loss is nan')
    assert standing(20, 4.5) == '4.0000 at iter 10'
    killed(logger)
    logger = resumed(folder, 20)
    assert standing(30, 4.25) == '4.0000 at iter 10'


def test_whoever_reads_the_record_while_it_is_replaced_sees_a_whole_one(folder, monkeypatch):
    monkeypatch.setattr(training_logger, 'RECORD_SHARE', float('inf'))
    logger = started(folder)
    with open(folder / 'record.json') as reader:
        logger.evaluation(evaluation(0))
        assert json.load(reader)['eval_steps'] == []
    entry = {**evaluation(0), 'train_seconds': 0.0}
    assert read(folder / 'record.json')['eval_steps'] == [entry]


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
    assert SCHEMA['properties']['schema_version'] == {'const': record.SCHEMA_VERSION}
    assert SCHEMA['properties']['status']['enum'] == list(record.STATUSES)


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
    logger_in(folder, is_main=False).event('signal', 0)
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


def test_finish_before_start_does_nothing(folder):
    assert logger_in(folder).finish('failed') is None
    assert not (folder / 'journal.jsonl').exists()
