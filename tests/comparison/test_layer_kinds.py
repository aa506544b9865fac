"""Comparisons of architectures with several kinds of layers."""

import json

import pytest
from helpers.run_records import make_record, rows, run_rows

from common.architecture_identity import HASH_VERSION, hash_of_values
from comparison.baseline import group_labels
from comparison.compare import compare
from comparison.formats import FORMATS
from comparison.html_page import section_html
from comparison.run_list import RunList
from comparison.runs import run_from_record
from comparison.tables import options_section
from model_config import ModelArchitectureConfig

SIZES = {'n_layer': 4, 'n_head': 2, 'n_embd': 16, 'block_size': 16, 'vocab_size': 32}
WINDOWS = {'L': {'sliding_window': 4}}
NO_POSITIONS = {'G': {'position_encoding': 'none'}}


def record_of(number, seed=1, loss=5.0, version=HASH_VERSION, training=None, **options):
    """A record of a llama with these options, as this version or version 1 writes it."""
    config = ModelArchitectureConfig(**{'arch_preset': 'llama', **SIZES, **options})
    choices = json.loads(json.dumps(config.to_dict()))
    architecture = {'name': config.name, 'hash': config.hash, 'choices': choices}
    if version == 1:
        del choices['layer_pattern']
        architecture['hash'] = hash_of_values(choices)
    else:
        architecture |= {'hash_version': version, 'layers': None}
    record = make_record(number, loss=loss, seed=seed, data_seed=seed, **(training or {}))
    for key in ('n_layer', 'bias', 'ffn_type'):
        del record['config'][key]
    record['config'] |= choices
    record['architecture'] = architecture
    return record


def patterned(number, pattern, kinds, **others):
    return record_of(number, layer_pattern=pattern, layer_kinds=kinds, **others)


def test_options_of_kinds_are_rows_of_their_own():
    records = [
        record_of(1),
        patterned(2, 'LG', WINDOWS, loss=4.9),
        patterned(3, 'LLLG', {**WINDOWS, **NO_POSITIONS}, loss=4.8),
    ]
    comparison = compare(run_rows(records))
    expected = {
        'layer_pattern': {'#1': 'LLLG', '#2': 'LG', '#3': 'None'},
        'layer_kinds.L.sliding_window': {'#1': '4', '#2': '4', '#3': '-'},
        'layer_kinds.G.position_encoding': {'#1': 'none', '#2': '-', '#3': '-'},
    }
    for form in ('text', 'json'):
        text = FORMATS[form](comparison)
        assert "{'" not in text  # no dict of Python
    options = {row.pop('option'): row for row in rows(FORMATS['text'](comparison), 'OPTIONS')}
    assert options == expected
    (cells,) = [row for row in RunList(run_rows(records)).rows() if row['layer_pattern'] == 'LLLG']
    assert cells['layer_kinds.G.position_encoding'] == 'none'
    assert json.loads(FORMATS['json'](comparison))['options_that_differ'].keys() == expected.keys()


def test_equal_names_get_the_options_of_kinds_that_differ():
    records = [
        patterned(n, 'LG', {'L': {'rope_theta': theta}}) for n, theta in ((1, 100.0), (2, 200.0))
    ]
    assert records[0]['architecture']['name'] == records[1]['architecture']['name']
    comparison = compare(run_rows(records))
    name = records[0]['architecture']['name']
    assert group_labels(comparison.groups) == [
        f'{name} [layer_kinds.L.rope_theta={theta}]' for theta in (100.0, 200.0)
    ]


def test_labels_do_not_name_ways_of_writing():
    """LG and LGLG are the same four layers; the runs differ in weight decay only."""
    records = [
        patterned(1, 'LG', WINDOWS),
        patterned(2, 'LGLG', WINDOWS, training={'weight_decay': 0.5}),
    ]
    names = [record['run_name'] for record in records]
    comparison = compare(run_rows(records))
    assert [label.rpartition(' ')[2] for label in comparison.labels] == names
    assert comparison.options.keys() == {'weight_decay'}


@pytest.mark.parametrize('version', [1, HASH_VERSION])
def test_same_layers_in_two_ways_are_one_architecture(version):
    """Seeds of one group, and no options of the architecture that differ."""
    short = {'sliding_window': 4, 'attention_pattern': 'LLLG'}
    records = [
        record_of(1, version=version, **short),
        patterned(2, 'LLLG', WINDOWS, seed=2),
        patterned(3, 'AAAB', {'A': {'sliding_window': 4}}, seed=3),
    ]
    comparison = compare(run_rows(records))
    (group,) = comparison.groups
    assert len(group.runs) == 3 and not comparison.options
    assert not comparison.loss_warnings
    records.append(patterned(4, 'LLLG', WINDOWS, loss=4.0, training={'weight_decay': 0.5}))
    records.append(patterned(5, 'LLGG', WINDOWS, loss=6.0))
    comparison = compare(run_rows(records))
    assert comparison.options.keys() == {'layer_pattern', 'weight_decay'}
    assert len(comparison.groups) == 3


def test_old_run_that_was_resumed_lacks_no_new_option():
    """Its config has the new option, and its choices, written at the start, do not."""
    resumed = record_of(1, version=1)
    resumed['config']['layer_pattern'] = None
    old = record_of(2, version=1, seed=2)
    new = record_of(3, seed=3)
    comparison = compare(run_rows([resumed, old, new]))
    assert len(comparison.groups) == 1
    assert not comparison.options and not comparison.loss_warnings


def test_hashes_of_other_versions_do_not_match():
    records = [record_of(1), record_of(2, seed=2, version=HASH_VERSION + 1)]
    assert len(compare(run_rows(records)).groups) == 2
    renamed = [{**record, 'architecture': {**record['architecture'], 'hash': 'x'}}
               for record in (record_of(1), record_of(2, seed=2, version=1))]  # fmt: skip
    assert len(compare(run_rows(renamed)).groups) == 2


def test_baseline_by_preset_finds_a_model_with_a_pattern():
    records = [
        record_of(1, loss=4.0),
        patterned(2, 'LG', {'L': {'sliding_window': 4}}, arch_preset='gemma2', sliding_window=None),
    ]
    records[1]['config']['arch_preset'] = 'gemma2'
    assert compare(run_rows(records), baseline='gemma2').baseline_rank == 2


def test_text_of_kinds_is_escaped(tmp_path):
    hostile = '<b>*a*\x1b[2J\n'
    records = [record_of(1), record_of(2, loss=4.0)]
    for record in records[1:]:
        record['architecture']['hash'] = 'other'
        kinds = {hostile: {hostile: hostile}, 'L': hostile, 'M': {'x': {'y': [1]}}}
        for options in (record['config'], record['architecture']['choices']):
            options |= {'layer_pattern': hostile, 'layer_kinds': kinds}
    runs = [run_from_record(record, tmp_path / record['run_name']) for record in records]
    comparison = compare(runs)
    for form in ('text', 'markdown', 'csv'):
        assert '\x1b' not in FORMATS[form](comparison)
    page = section_html(options_section(comparison))
    assert '<b>' not in page and '&lt;b&gt;' in page and '\x1b' not in page
