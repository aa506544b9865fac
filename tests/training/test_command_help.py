"""Help pages: `train.py --help` and `study.py --help`."""

import re

import pytest

import study
import train
from common.errors import UserError
from configurator import flatten
from training.command_help import ESSENTIAL_OPTIONS, training_help
from training_config import schema

OVERVIEW_LINES = 54
STUDY_OVERVIEW_LINES = 50


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')


def page(topic=''):
    return training_help(train.__doc__).page(topic)


def flat(topic=''):
    return ' '.join(page(topic).split())


def output_of(argv, capsys, main=train.main):
    assert main(argv) == 0
    return capsys.readouterr().out


def test_overview_is_short_and_shows_essential_options():
    lines = page().splitlines()
    assert len(lines) <= OVERVIEW_LINES and max(map(len, lines)) <= 80
    assert len([line for line in lines if 'python train.py config/' in line]) == 3
    for key in ESSENTIAL_OPTIONS:
        assert f'\n  --{key} ' in page()
        option = flatten(schema())[key]
        if option.choices is not None and not option.about:
            assert f'[{", ".join(option.choices)}]' in flat(), key


def test_every_option_is_in_one_group():
    groups = training_help('').groups
    keys = [key for group in groups for key in group.options]
    assert sorted(keys) == sorted(flatten(schema())) and len({g.name for g in groups}) == len(
        groups
    )
    members = {group.name: set(group.options) for group in groups}
    assert {'rope_theta', 't5_buckets', 'rope_beta_fast'} <= members['position']
    assert {'num_kv_heads', 'kv_lora_rank', 'attention_backend', 'qk_norm'} <= members['attention']
    assert {'norm_eps', 'parallel_shared_norm'} <= members['norm']
    assert {'activation', 'num_experts', 'd_ff'} <= members['ffn']
    assert {'beta1', 'lion_beta1', 'warmup_iters'} <= members['optimizer']
    assert {'arch_preset', 'n_layer', 'dropout', 'init_std'} <= members['architecture']


def test_all_page_describes_every_option():
    options = re.findall(r'^  --(\w+)[\w.]*=', page('all'), re.MULTILINE)
    assert sorted(options) == sorted(flatten(schema()))
    text = flat('all')
    for key, option in flatten(schema()).items():
        assert ' '.join(option.help.split()) in text, key
        if option.choices is not None and not option.about:
            assert f'[{", ".join(option.choices)}]' in text, key


@pytest.mark.parametrize('topic', [*(group.name for group in training_help('').groups), 'all'])
def test_help_texts_start_in_one_column(topic):
    for line in page(topic).splitlines():
        assert len(line) <= 80
        if line.startswith(' ') and not re.fullmatch(r'  --[\w.]+=\w+\??', line):
            assert line[26:28] == '  ' and line[28] != ' ', line


def test_option_page_names_its_component():
    text = flat('rope_theta')
    for words in ('--rope_theta=float', 'Default 10000.0', 'above 0', "position_encoding='rope'"):
        assert words in text
    assert 'rmsnorm' in flat('normalization') and 'Options: norm_eps.' in flat('normalization')
    assert 'llama3' in flat('arch_preset')


@pytest.mark.parametrize('main', [train.main, study.main])
def test_help_forms_are_equivalent(main, capsys):
    overview = output_of(['--help'], capsys, main)
    for argv in (['--help='], ['-h'], ['--help', '--n_layer=2'], ['--n_layer=2', '--help']):
        assert output_of(argv, capsys, main) == overview
    assert '--rope_scaling=str' in output_of(['--help=position'], capsys, main)
    assert output_of(['--help', 'position'], capsys, main) == output_of(
        ['--help=position'], capsys, main
    )


def test_study_help_starts_with_its_own_options(capsys):
    text = output_of(['--help'], capsys, study.main)
    assert len(text.splitlines()) <= STUDY_OVERVIEW_LINES
    assert max(map(len, text.splitlines())) <= 80
    assert 'sweep = {' in text and '\n  --jobs ' in text and '\n  --plan_only ' in text
    assert '--n_head' not in text
    for key in study.STUDY_KEYS:
        assert f'\n  {key} ' in text, key


def test_study_lists_components_and_refuses_print_config(capsys):
    assert output_of(['--list_components'], capsys, study.main) == output_of(
        ['--list_components'], capsys
    )
    with pytest.raises(UserError, match=r'single run.*--plan_only'):
        study.main(['config/studies/norms.py', '--print_config'])
