"""The presets' config files have the parameter counts that they state."""

import re

import pytest
from helpers.project import PROJECT

from configurator import read_config_file
from model_builder import build_model, count_parameters
from model_config import PRESETS, ModelArchitectureConfig


@pytest.mark.parametrize('preset', [p for p in PRESETS if p not in ('custom', 'legacy')])
def test_every_preset_has_a_config_file_that_counts_right(preset):
    problems = []
    values, text = read_config_file(str(PROJECT / f'config/arch_{preset}.py'), problems)
    assert problems == []
    assert values['arch_preset'] == preset and values['out_dir'] == f'out-{preset}'
    counted = count_parameters(
        build_model(ModelArchitectureConfig(arch_preset=preset, vocab_size=50304))
    )
    comment = ' '.join(line[2:] for line in text.splitlines() if line.startswith('# '))
    stated = re.search(r'12 layers × 768 wide: ([\d,]+) parameters', comment)
    if preset != 'team':  # which refers to llama
        assert stated[1] == f'{counted["total_params"]:,}'
        active = re.search(r'a token uses ([\d,]+)', comment) or stated
        assert active[1] == f'{counted["active_params"]:,}'
