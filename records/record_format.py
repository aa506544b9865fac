"""docs/record-format.md, generated from `record_schema.json`:

python -m records.record_format > docs/record-format.md
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.console_output import write_text
from common.formatting import markdown_anchor, markdown_table

Schema = dict[str, Any]

SCHEMA_FILE = Path(__file__).with_name('record_schema.json')
COMMAND = 'python -m records.record_format > docs/record-format.md'
INTRODUCTION = """\
# Record format

This page lists every key of `record.json`, the file in which a run keeps its results.

A run folder contains the record twice:

- `journal.jsonl` gets one line for every logged iteration, evaluation, checkpoint and event, as
  soon as it happens; on a GPU, an iteration while the next one runs. A crash loses at most the last
  line, and on a GPU one entry that was not yet written.
- `record.json` is the whole record in one document. It is written after evaluations and at the end.

You rarely need to parse either. In Python, read one record, or all runs of a folder as tables (see
[python-api.md](python-api.md)):

```python
from comparison import load_runs
from records.record import read_record
from records.run_folders import latest_run

record = read_record(latest_run('out-llama'))
print(record['summary']['final_val_loss'])
rows = load_runs('out-llama').rows()  # one dict per run
```

How to read the tables:

- `null` means that a value is unknown.
- A key marked *optional* can be missing: in older records, or where it does not apply.
- `iter` counts completed iterations.
- Losses are in nats per token. GB are 10^9 bytes.
- A file that contains `NaN` or `Infinity` is not a record: such values are written as `null`.

The JSON schema is `records/record_schema.json`. [comparing.md](comparing.md) explains how records
are compared; [checkpoints.md](checkpoints.md) explains how a run resumes from them.

<!-- This page is generated. Change records/record_schema.json, then run:
{command} -->
"""


def record_format_page() -> str:
    """The page in Markdown."""
    schema = json.loads(SCHEMA_FILE.read_text(encoding='utf-8'))
    parts = [INTRODUCTION.replace('{command}', COMMAND)]
    for path, block in _blocks('', schema, schema['$defs']):
        title = f'`{path}`' if path else 'The record'
        parts.append(f'## {title}\n\n' + '\n'.join(_table(path, block, schema['$defs'])) + '\n')
        if block.get('additionalProperties') is not False:
            parts.append('Further keys are possible.\n')
    return '\n'.join(parts)


def _blocks(path: str, schema: Schema, defs: dict[str, Schema]) -> Iterator[tuple[str, Schema]]:
    """Each object of the record by its path, parents first."""
    yield path, schema
    for key, value in schema['properties'].items():
        block, suffix = _inner_object(value, defs)
        if block is not None:
            yield from _blocks(f'{_joined(path, key)}{suffix}', block, defs)


def _joined(path: str, key: str) -> str:
    return f'{path}.{key}' if path else key


def _inner_object(schema: Schema, defs: dict[str, Schema]) -> tuple[Schema | None, str]:
    """The object with keys of its own that a value is or contains; `[]` for a list of them."""
    resolved = _resolved(schema, defs)
    for choice in resolved.get('anyOf', []):
        if 'properties' in choice:
            return choice, ''
    if resolved.get('type') == 'array':
        items = _resolved(resolved['items'], defs)
        return (items, '[]') if 'properties' in items else (None, '')
    return (resolved, '') if 'properties' in resolved else (None, '')


def _resolved(schema: Schema, defs: dict[str, Schema]) -> Schema:
    """The schema with its reference replaced; its own description counts."""
    if '$ref' not in schema:
        return schema
    return {**_resolved(defs[schema['$ref'].rpartition('/')[2]], defs), **schema}


def _table(path: str, block: Schema, defs: dict[str, Schema]) -> list[str]:
    rows = []
    for key, value in block['properties'].items():
        schema = _resolved(value, defs)
        optional = '' if key in block['required'] else ', *optional*'
        meaning = schema['description'].replace('|', r'\|')
        inner, suffix = _inner_object(value, defs)
        name = f'`{key}`'
        if inner is not None:
            name = f'[{name}](#{markdown_anchor(_joined(path, key) + suffix)})'
        kind = _type_text(schema, defs) + optional
        rows.append((name, kind, schema.get('unit', ''), meaning))
    return markdown_table(('Key', 'Type', 'Unit', 'Meaning'), rows)


NAMES = {
    'object': 'object',
    'array': 'list',
    'integer': 'integer',
    'number': 'number',
    'string': 'text',
    'boolean': 'true or false',
    'null': 'null',
}


def _type_text(schema: Schema, defs: dict[str, Schema]) -> str:
    if 'const' in schema:
        return f'`{json.dumps(schema["const"])}`'
    if 'enum' in schema:
        return ', '.join(f'`{value}`' for value in schema['enum'])
    if 'anyOf' in schema:
        return ' or '.join(_type_text(choice, defs) for choice in schema['anyOf'])
    kinds = schema['type'] if isinstance(schema['type'], list) else [schema['type']]
    names = [NAMES[kind] for kind in kinds]
    if names == ['list']:
        items = _resolved(schema['items'], defs)
        return f'list of {"objects" if items["type"] == "object" else "texts"}'
    if names == ['object'] and 'properties' not in schema:
        values = schema.get('additionalProperties')
        if isinstance(values, dict):
            return f'object of {_type_text(_resolved(values, defs), defs)} values'
    return ' or '.join(names)


if __name__ == '__main__':
    write_text(record_format_page(), end='', literal=True)
