"""`~` is the home folder in every option that is a path, wherever the option is set."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

from common.errors import ArgumentParser, UserError
from common.paths import BadPath, expand_home
from configurator import flatten, read_command_line
from training_config import schema

LONG = 'a' * 300
PATH_OPTIONS = ('out_dir', 'dataset', 'resume_run')


@pytest.fixture
def home(tmp_path, monkeypatch):
    for variable in ('HOME', 'USERPROFILE'):
        monkeypatch.setenv(variable, str(tmp_path))
    return tmp_path


def test_only_a_home_folder_is_expanded(home):
    assert expand_home('~') == str(home) and expand_home('~/a b/~') == f'{home}/a b/~'
    assert expand_home('hf:~/a') == f'hf:{home}/a'
    for text in ('', 'a', 'a/~', '/~', './~x', 'a~', 'hf:a/~b', 'C:\\a'):
        assert expand_home(text) == text
    for text in (f'~/{LONG}', LONG, f'hf:~/{LONG}', 'a\0b', '~/\0'):
        with pytest.raises(BadPath, match=r'too long|null'):
            expand_home(text)
    (home / 'loop').symlink_to(home / 'loop')
    with pytest.raises(BadPath, match='symbolic links'):
        expand_home('~/loop')
    with pytest.raises(BadPath, match=r'~nobody-at-all is not a home folder.*\./~nobody-at-all/x'):
        expand_home('~nobody-at-all/x')


@pytest.mark.parametrize('key', PATH_OPTIONS)
def test_options_of_a_run(key, home, tmp_path):
    (tmp_path / 'file.py').write_text(f"{key} = '~/from_file'\n")
    read = read_command_line([str(tmp_path / 'file.py')], schema)
    assert read.value(key, schema) == f'{home}/from_file'
    assert read_command_line(['~/file.py'], schema).value(key, schema) == f'{home}/from_file'
    for form in ([f'--{key}=~/typed'], [f'--{key}', '~/typed']):
        assert read_command_line(form, schema).value(key, schema) == f'{home}/typed'
    (problem,) = read_command_line([f'--{key}=~nobody-at-all'], schema).problems
    assert key in problem and '~nobody-at-all is not a home folder' in problem


@pytest.mark.parametrize('kind', ['hf', 'nanogpt'])
def test_weights_to_begin_from(kind, home):
    read = read_command_line([f'--init_from={kind}:~/weights'], schema)
    assert read.value('init_from', schema) == f'{kind}:{home}/weights'


def test_the_options_that_are_paths_are_known_as_such():
    texts = {key: option for key, option in flatten(schema()).items() if option.base_type is str}
    assert {key for key, option in texts.items() if option.is_path} == {*PATH_OPTIONS, 'init_from'}
    speak = {key for key, option in texts.items() if re.search('[Ff]older|path|here$', option.help)}
    assert speak <= {*PATH_OPTIONS, 'init_from'}


class Parsed(Exception):
    pass


COMMANDS = {
    'sample': ['~/a', '--out_dir=~/b', '--run=~/c'],
    'evaluate': ['~/a', '--out_dir=~/b', '--run=~/c', '--text=~/d', '--choices=~/e', '--json=~/f'],
    'export_checkpoint': ['~/a', '--out_dir=~/b', '--run=~/c', '--output=~/d'],
    'compare_architectures': ['~/a', '~/b', '--plot=~/c', '--report=~/d'],
    'data.prepare': ['~/a', '~/b', '--out=~/c'],
    'data.inspect_tokens': ['~/a'],
    'data.shakespeare.prepare': ['--source=~/a'],
}


@pytest.mark.parametrize('command', COMMANDS)
def test_paths_of_the_other_commands(command, home, monkeypatch):
    """As the command's own parser reads them: none keeps its `~`, and each becomes a path."""
    parse = ArgumentParser.parse

    def parsed(self, argv):
        raise Parsed(parse(self, argv))

    monkeypatch.setattr(ArgumentParser, 'parse', parsed)
    with pytest.raises(Parsed) as caught:
        importlib.import_module(command).main(COMMANDS[command])
    (options,) = caught.value.args
    assert isinstance(options, argparse.Namespace)
    given = [path for value in vars(options).values() for path in _listed(value)]
    expected = {argument.partition('~/')[2] for argument in COMMANDS[command]}
    assert {path.name for path in given if path.parent == home} == expected


def _listed(value):
    values = value if isinstance(value, list) else [value]
    return [Path(item) for item in values if isinstance(item, str | Path)]


def test_unknown_home_folder_is_user_error():
    parser = ArgumentParser()
    parser.add_argument('--json', type=Path)
    with pytest.raises(UserError, match=r'--json.*~nobody-at-all is not a home folder'):
        parser.parse(['--json=~nobody-at-all/x'])


def test_a_prompt_from_a_file_at_home(home):
    sample = importlib.import_module('sample')
    (home / 'prompt.txt').write_text('ROMEO:')
    assert sample.read_prompt('FILE:~/prompt.txt') == 'ROMEO:'
    assert sample.read_prompt('~/prompt.txt') == '~/prompt.txt'  # a text like any other
