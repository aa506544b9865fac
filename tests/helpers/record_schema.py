"""The schema of record.json, and a validator by it."""

import json

import jsonschema

from helpers.project import PROJECT

SCHEMA = json.loads((PROJECT / 'records/record_schema.json').read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
