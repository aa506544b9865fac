"""Reports of models with several kinds of layers."""

import io
import re

import pytest
from helpers.sample_run import CONFIG, HEADER, METADATA, STARTUP_INFO

from common.console_output import displayed
from common.layer_pattern import pattern_tag
from model_builder import build_model, count_parameters, training_flops
from model_config import ModelArchitectureConfig
from records import trackers
from records.short_report import short_report
from records.startup_report import startup_report
from training.record_header import layer_choices

KINDS = {
    'L': {'sliding_window': 4},
    'M': {'ffn_type': 'moe', 'num_experts': 4, 'position_encoding': 'none'},
}


@pytest.fixture(scope='module')
def header():
    config = ModelArchitectureConfig(
        arch_preset='llama', n_layer=6, n_head=2, n_embd=16, block_size=8, vocab_size=32,
        layer_pattern='LLM', layer_kinds=KINDS,
    )  # fmt: skip
    model = build_model(config)
    architecture = {
        'name': config.name,
        'hash': config.hash,
        'choices': config.to_dict(),
        'layers': layer_choices(config),
    }
    hardware = {**STARTUP_INFO['hardware'], 'expected_tokens_per_sec_at_50_mfu': None}
    info = {**STARTUP_INFO, 'model': count_parameters(model), 'flops': training_flops(model)}
    total = info['model']['total_params']
    groups = [{**STARTUP_INFO['optimizer']['groups'][0], 'params': total}]
    info |= {
        'hardware': hardware,
        'optimizer': {**STARTUP_INFO['optimizer'], 'groups': groups},
        'chosen': {'layer_kinds': 'command line', 'layer_pattern': 'command line'},
    }
    run = {**CONFIG, **config.to_dict()}
    return {**HEADER, 'architecture': architecture, 'startup_info': info, 'config': run}


def lines_of(report, header):
    text = displayed(report(header, 'out/run_20261129_131508'), io.StringIO())
    return [line.rstrip() for line in text.splitlines()]


def numbers(line):
    return [
        int(number.replace(',', '')) for number in re.findall(r'(?<![\d.])\d[\d,]*(?![\d.])', line)
    ]


def test_full_report_has_pattern_differences_and_counts(header):
    lines = lines_of(startup_report, header)
    start = next(i for i, line in enumerate(lines) if 'KINDS OF LAYERS' in line)
    section = lines[start + 1 : lines.index('', lines.index('', start) + 1)]
    text = '\n'.join(section)
    assert 'Layer Pattern:         LLMLLM (4 L, 2 M)' in text
    words = ' '.join(text.split())
    assert 'Layers L: sliding_window=4, position_encoding=rope, rope_theta=10000.0' in words
    assert 'Layers M: sliding_window=None, position_encoding=none, ffn_type=moe' in words
    assert 'attention_pattern' not in text and 'rms' not in text  # equal in all layers
    # The parameters, counted from the shapes of the blocks' own tensors.
    norms, attention, head = 2 * 16, 4 * 16**2, 16
    dense = header['architecture']['layers']['kinds']['L']['d_ff']
    width = header['architecture']['layers']['kinds']['M']['expert_d_ff']
    of_l = 4 * (norms + attention + 3 * 16 * dense)
    of_m = 2 * (norms + attention + 4 * 3 * 16 * width + 16 * 4)
    table = section[section.index('') + 1 :]
    rows = {line.split()[1]: numbers(line) for line in table}
    assert rows['L'][:2] == [4, of_l] and rows['M'][:2] == [2, of_m]
    rest, total = (next(line for line in section if name in line) for name in ('rest of', 'total'))
    assert 2 * 32 * 16 + head in numbers(rest)
    assert numbers(total)[:2] == [6, of_l + of_m + 2 * 32 * 16 + head]
    assert max(map(len, section)) <= 80
    assert not any("{'" in line for line in lines)  # no dict of Python


def test_short_report_names_what_differs_by_kind(header):
    lines = lines_of(short_report, header)
    text = ' '.join(' '.join(lines).split())
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert '-LLM-L(SW4+RoPE)-M(NoPos+MoE2of4)' in text.replace(' ', '')
    assert 'L: rope, theta 10,000; M: none' in text
    assert 'Attention: standard; L: window 4' in text
    assert re.search('FFN Type: swiglu, width [0-9]+; M: moe, 4 experts, 2 per token', text), text
    assert 'Normalization: rmsnorm, pre' in text  # equal in both
    assert "{'" not in text


def test_record_without_counts_by_kind_is_reported(header):
    """A model whose layers are all alike, as an older version recorded it."""
    architecture = {key: HEADER['architecture'][key] for key in ('name', 'hash', 'choices')}
    report = startup_report({**HEADER, 'architecture': architecture}, 'out')
    assert 'KINDS OF LAYERS' not in report


def test_trackers_get_options_of_kinds_as_single_values(header):
    values = trackers._run_values({**header, 'metadata': METADATA})
    assert values['layer_kinds.L.sliding_window'] == 4
    assert values['layer_pattern'] == 'LLM' and 'layer_kinds' not in values


@pytest.mark.parametrize(
    ('letters', 'tag'),
    [
        ('LLLGLLLGLL', 'LLLG'),
        ('LLLG', 'LLLG'),
        ('DDD' + 'M' * 58, '3D58M'),
        ('LLLLLG' * 10, 'LLLLLG'),
        ('AB', 'AB'),
        ('A' * 30 + 'B', '30AB'),
        ('ABC' * 5 + 'CBACBCCABBACABACCBAC', 'ABCABCABCABCABCCBACBC...'),
    ],
)
def test_long_patterns_are_short_in_names(letters, tag):
    """Letters, digits and dots only: safe in file names, shells, HTML and CSV."""
    assert pattern_tag(letters) == tag and len(tag) <= 24
