"""A record has the entries of its journal, without those that were dropped."""

import json
import re

import pytest
from helpers.loggers import kill, log_a_run, log_updates, new_output, resumed_logger, started_logger
from helpers.record_schema import SCHEMA, VALIDATOR
from helpers.sample_run import METADATA, SAMPLE, STARTUP_INFO, evaluation, iteration
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from records import record
from records.record import read_outline, read_record
from records.run_folders import new_run_folder


def test_full_record_matches_schema(run_folder):
    VALIDATOR.check_schema(SCHEMA)
    summary = log_a_run(run_folder).finish()
    document = json.loads((run_folder / 'record.json').read_text())
    VALIDATOR.validate(document)
    assert document['summary'] == summary
    assert document['status'] == 'finished'
    assert document['metadata'] == METADATA
    assert [e.get('sample') for e in document['eval_steps']] == [
        *(None, SAMPLE, {**SAMPLE, 'text': None}),
    ]
    assert (
        read_record(run_folder)
        == read_record(run_folder / 'journal.jsonl')
        == read_record(run_folder / 'record.json')
    )
    (run_folder / 'journal.jsonl').unlink()
    assert read_record(run_folder) == document


def test_memory_footprint_joins_startup_info(run_folder):
    footprint = {'parameter_bytes': 100, 'gradient_bytes': 50, 'optimizer_bytes': 200}
    logger = started_logger(run_folder)
    assert read_record(run_folder)['startup_info'] == STARTUP_INFO
    logger.memory_footprint(footprint)
    logger.finish()
    document = read_record(run_folder)
    expected = {**STARTUP_INFO, 'parallel': {'bytes_sent_per_update': 0.0, **footprint}}
    assert document['startup_info'] == expected
    VALIDATOR.validate(document)
    # Another process may be divided otherwise: it is not known again until it has measured.
    resumed_logger(run_folder, 0).finish()
    assert read_record(run_folder)['startup_info'] == STARTUP_INFO


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


def test_schema_rejects_misspelled_keys(run_folder):
    log_a_run(run_folder).finish()
    text = (run_folder / 'record.json').read_text()
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


def test_outline_equals_record_without_iterations(run_folder):
    logger = started_logger(run_folder)
    logger.iteration(iteration(0))
    logger.evaluation(evaluation(1))

    def outline():
        return {**read_record(run_folder), 'training_iterations': []}

    assert read_outline(run_folder) == outline()  # while it runs
    logger.finish()
    assert read_outline(run_folder) == outline()
    record = run_folder / 'record.json'
    text = record.read_text()
    # What has ended is read from record.json alone; one that is not of this end is not believed.
    record.write_text(text.replace('"val_loss": 4', '"val_loss": 3'))
    assert read_outline(run_folder)['eval_steps'] != outline()['eval_steps']
    record.write_text(text.replace('finished', 'interrupted'))
    assert read_outline(run_folder) == outline()
    record.write_text('{')
    assert read_outline(run_folder) == outline()


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
def test_malformed_record_raises_user_error_with_path(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_record(path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_record(tmp_path)


def test_missing_record_raises_user_error_with_path(tmp_path):
    with pytest.raises(UserError, match=r'nowhere.*No such file'):
        read_record(tmp_path / 'nowhere')
    with pytest.raises(UserError, match=r'neither journal\.jsonl nor record\.json'):
        read_record(tmp_path)


def test_other_schema_version_is_refused(run_folder):
    document = started_logger(run_folder).finish() and read_record(run_folder)
    (run_folder / 'record.json').write_text(json.dumps({**document, 'schema_version': 2}))
    with pytest.raises(UserError, match='schema_version 2'):
        read_record(run_folder / 'record.json')


def test_schema_has_version_and_statuses_of_code():
    assert SCHEMA['properties']['schema_version']['const'] == record.SCHEMA_VERSION
    assert SCHEMA['properties']['status']['enum'] == list(record.STATUSES)


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
def test_resumed_run_has_record_of_uninterrupted_run(tmp_path_factory, crashes):
    whole = started_logger(new_run_folder(tmp_path_factory.mktemp('whole')))
    log_updates(whole, 0, 20)
    folder = new_run_folder(tmp_path_factory.mktemp('killed'))
    logger, begin = started_logger(folder), 0
    for crash in crashes:
        crash = max(begin + 1, crash)
        log_updates(logger, begin, crash)
        kill(logger)
        begin = (crash - 1) // 5 * 5
        logger = resumed_logger(folder, begin)
    log_updates(logger, begin, 20)

    document = read_record(folder)
    assert entries(document) == entries(read_record(whole.run_folder))
    restarts = [event for event in document['events'] if event['event'] == 'resume']
    assert len(restarts) == len(crashes)
    iters = [entry['iter'] for entry in document['training_iterations']]
    assert iters == list(range(20))


def test_resume_drops_entries_after_checkpoint(run_folder):
    logger = started_logger(run_folder)
    for n in (0, 10, 20):
        logger.iteration(iteration(n))
        logger.evaluation(evaluation(n))
        logger.event('signal', n)
    logger.finish('interrupted')
    logger = resumed_logger(run_folder, 10, {'threads': [2, 4]})
    assert 'threads' in new_output(logger)
    document = read_record(run_folder)
    assert (document['status'], document['end_time']) == ('running', None)
    assert [entry['iter'] for entry in document['training_iterations']] == [0]
    assert [entry['iter'] for entry in document['eval_steps']] == [0, 10]
    assert [event['iter'] for event in document['events']] == [0, 10, 10]
    assert document['events'][-1]['changed'] == {'threads': [2, 4]}
    VALIDATOR.validate(document)


def test_rolled_back_run_has_record_of_straight_run(run_folder, tmp_path):
    straight = started_logger(new_run_folder(tmp_path / 'straight'))
    log_updates(straight, 0, 30)
    logger = started_logger(run_folder)
    log_updates(logger, 0, 10)
    for strayed_to in (13, 16, 16):
        log_updates(logger, 10, strayed_to)
        logger.rollback(
            10, from_iter=strayed_to, checkpoint='checkpoints/10.pt', message='loss is nan'
        )
        assert 'rollback at iter 10: loss is nan' in new_output(logger)
        record = read_record(run_folder)
        assert [entry['iter'] for entry in record['training_iterations']] == list(range(10))
        assert record['eval_steps'][-1]['iter'] <= 10
    log_updates(logger, 10, 20)
    logger.rollback(20, from_iter=20, checkpoint='checkpoints/20.pt', message='lost on resuming')
    kill(logger)
    logger = resumed_logger(run_folder, 15)
    log_updates(logger, 15, 30)
    document = read_record(run_folder)
    VALIDATOR.validate(document)
    after_resume, never_strayed = entries(document), entries(read_record(straight.run_folder))
    strayed = [event['iter'] for event in after_resume.pop('events')]
    never_strayed.pop('events')
    assert after_resume == never_strayed
    # What led to a rollback happened, each time: batch 10 was met four times.
    assert strayed.count(10) == 4 and strayed.count(3) == 1
    events = [(e['event'], e['iter'], e.get('from_iter')) for e in document['events']]
    assert [event for event in events if event[0] in ('rollback', 'resume')] == [
        *(('rollback', 10, strayed_to) for strayed_to in (13, 16, 16)),
        ('resume', 15, None),
    ]
