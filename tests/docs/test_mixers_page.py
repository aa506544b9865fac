"""docs/mixers.md: every mixer is described, and its figures and messages are those of the code."""

import shlex

import pytest
import torch
from helpers.project import PROJECT

from configurator import read_command_line
from model_builder import build_model, flops_by_part
from model_config import MIXER_REGISTRY, ModelArchitectureConfig, schema

PAGE = (PROJECT / 'docs/mixers.md').read_text(encoding='utf-8')
LENGTH = 1024
OWN = [name for name in MIXER_REGISTRY if MIXER_REGISTRY[name].__module__.startswith('components.')]


def rows(text: str) -> list[list[str]]:
    """The cells of the first table in a text, without backquotes and the heading."""
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return [line.strip('| ').replace('`', '').split(' | ') for line in lines[2:]]


def section(heading: str) -> str:
    return PAGE.partition(f'\n## {heading}\n')[2].partition('\n## ')[0]


def table(name: str) -> list[list[str]]:
    return rows(PAGE.partition(f'<!-- {name} -->\n')[2].partition('<!-- end -->')[0])


@pytest.mark.parametrize('heading, left_out', [('Which one', []), ('Equations', ['none'])])
def test_every_mixer_is_in_the_table(heading, left_out):
    named = [name for row in rows(section(heading)) for name in row[0].split(', ')]
    assert sorted(named) == sorted(name for name in OWN if name not in left_out)


def costs(mixer: str) -> tuple[str, ...]:
    """Million parameters, million FLOPs by both rules, and KiB of the state, of one layer."""
    config = ModelArchitectureConfig(
        arch_preset='llama',
        mixer=mixer,
        ffn_type='none',
        n_layer=1,
        block_size=LENGTH,
        vocab_size=8,
    )
    model = build_model(config, 'cpu', seed=0).eval()
    (block,) = model.blocks
    module = block.attention or block.mixers[mixer]
    parameters = sum(parameter.numel() for parameter in module.parameters())
    flops = [
        sum(value for part, value in flops_by_part(model, causal).items() if part != 'output_head')
        for causal in (False, True)
    ]
    cache = model.empty_cache(LENGTH)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    millions = (f'{value / 1e6:.1f}' for value in (parameters, *flops))
    return (*millions, f'{cache.nbytes / 1024:,.0f}')


def test_costs_are_those_of_the_code():
    shown = {name: tuple(figures) for name, *figures in table('cost')}
    assert shown == {name: costs(name) for name in OWN if name != 'none'}


def test_mistakes_give_the_messages():
    shown = table('mistakes')
    assert len(shown) >= 5
    for arguments, message in shown:
        command_line = read_command_line(shlex.split(f'--arch_preset=llama {arguments}'), schema)
        problems = command_line.problems
        ModelArchitectureConfig.resolve(command_line.layers, problems)
        assert problems == [message]
