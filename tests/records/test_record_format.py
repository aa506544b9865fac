"""docs/record-format.md has every key of the schema, each with a meaning."""

import re

from helpers.loggers import log_a_run
from helpers.project import PROJECT
from helpers.record_schema import SCHEMA

from records.record import read_record
from records.record_format import COMMAND, record_format_page

PAGE = PROJECT / 'docs/record-format.md'
UNITS = {
    *('nats per token', 'bits per byte', 'tokens', 'tokens/s', 'bytes', 'GB', 'ms', 's', '%'),
    *('FLOPs', 'TFLOP/s', 'parameters', 'iterations', 'epochs', 'documents', 'sequences', 'values'),
}


def sections(page):
    """The rows of each section by its path: key -> (type, unit, meaning)."""
    keys = {}
    for block in page.split('\n## ')[1:]:
        title, *lines = block.splitlines()
        rows = [line.strip('| ').split(' | ') for line in lines if line.startswith(('| `', '| [`'))]
        keys[title.strip('`')] = {row[0].strip('[`').partition('`')[0]: row[1:] for row in rows}
    return keys


def test_page_is_up_to_date():
    page = record_format_page()
    assert PAGE.read_text() == page, f'{COMMAND}\nThe page is:\n{page}'


def test_every_key_has_type_and_meaning():
    def properties(schema):
        if isinstance(schema, dict):
            for key, value in schema.get('properties', {}).items():
                yield key, value
            for value in schema.values():
                yield from properties(value)
        elif isinstance(schema, list):
            for value in schema:
                yield from properties(value)

    for key, schema in properties(SCHEMA):
        definition = SCHEMA['$defs'].get(schema.get('$ref', '').rpartition('/')[2], {})
        meaning = schema.get('description') or definition.get('description')
        assert meaning, key
        assert not meaning.endswith('.'), key
        assert schema.get('unit') is None or schema['unit'] in UNITS, key


def test_page_has_every_key_of_a_run(tmp_path):
    folder = tmp_path / 'run_20260101_120000'
    (folder / 'checkpoints').mkdir(parents=True)
    log_a_run(folder).finish('finished')
    documented = sections(record_format_page())

    checked = set()

    def check(path, value):
        if isinstance(value, list):
            path, value = f'{path}[]', {k: v for each in value for k, v in each.items()}
        assert value.keys() <= documented[path].keys(), path
        checked.add(path)
        for key, inner in value.items():
            inner_path = f'{path}.{key}' if path != 'The record' else key
            is_block = inner_path in documented or f'{inner_path}[]' in documented
            if is_block and inner is not None and inner_path != 'events':  # those have more keys
                check(inner_path, inner)

    check('The record', read_record(folder))
    others = {'events[]', 'metadata.weights_from', 'architecture.layers'}
    assert documented.keys() == checked | others


def test_links_of_page_have_targets():
    page = record_format_page()
    targets = {
        re.sub(r'[^\w -]', '', line[3:]).lower() for line in page.splitlines() if line[:3] == '## '
    }
    links = set(re.findall(r'\(#([\w-]+)\)', page))
    assert links
    assert links <= targets
