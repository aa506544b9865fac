"""The record's blocks have the same keys as types and in the schema."""

import types
import typing

import pytest
from helpers.record_schema import SCHEMA

from records import record_types
from records.record_types import Record


def resolved(schema):
    """A schema without its reference, and without the null that it allows beside an object."""
    if '$ref' in schema:
        return resolved(SCHEMA['$defs'][schema['$ref'].rsplit('/', 1)[1]])
    for choice in schema.get('anyOf', ()):
        if choice.get('type') == 'object':
            return choice
    return schema


def typed_dict_in(annotation):
    """The TypedDict that an annotation holds: itself, in a list or beside None."""
    if typing.is_typeddict(annotation):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is list:
        blocks_of_arguments = [typed_dict_in(argument) for argument in typing.get_args(annotation)]
        return next((block for block in blocks_of_arguments if block), None)
    return None


def blocks(block=Record, schema=SCHEMA):
    """Every TypedDict from the record down, with the schema of the same place."""
    yield block, schema
    for key, annotation in typing.get_type_hints(block).items():
        below = resolved(schema['properties'].get(key, {}))
        inner = typed_dict_in(annotation)
        below = resolved(below['items']) if below.get('type') == 'array' else below
        assert (inner is not None) == ('properties' in below), f'{block.__name__}.{key}'
        if inner:
            yield from blocks(inner, below)


@pytest.mark.parametrize(
    'block, schema', [*blocks()], ids=lambda value: getattr(value, '__name__', '')
)
def test_typed_dict_has_the_keys_of_its_schema(block, schema):
    assert block.__required_keys__ | block.__optional_keys__ == schema['properties'].keys()
    assert block.__required_keys__ == set(schema['required'])


def test_every_block_is_part_of_the_record():
    names = {block.__name__ for block, _ in blocks()}
    others = {'DataSeen', 'PartialDataSeen', 'MemoryFootprint', 'RecordHeader'}  # parts of blocks
    public = {
        name
        for name, value in vars(record_types).items()
        if typing.is_typeddict(value) and not name.startswith('_')
    }
    assert public == names | others
