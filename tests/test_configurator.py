"""Config files, the command line, precedence, strict checks, printed configs."""

import pytest

from common.errors import UserError
from common.registry import Option, Registry, at_least
from configurator import (
    COMMAND_LINE,
    flatten,
    format_config,
    read_command_line,
)

SHAPES = Registry('shape', 'Shape', home='common.errors')
for name in ('square', 'circle', 'dark_triangle'):
    SHAPES.register(name)(type(name, (), {}))

SCHEMA = {
    'Sizes': {
        'width': Option(int, 8, 'Width of the shape', check=at_least(1)),
        'height': Option(int | None, None, 'Height of the shape; None: the width'),
        'shift': Option(int, 0, 'Offset of the shape'),
    },
    'Looks': {
        'shape': Option(str, 'square', 'Shape', choices=SHAPES),
        'scale': Option(float, 1.5, 'Scale of the drawing'),
        'title': Option(str, '', 'Title above the drawing'),
        'filled': Option(bool, True, 'Fill the shape'),
        'no_frame': Option(bool, False, 'A key that begins with no_'),
    },
}


def read(*argv):
    return read_command_line(list(argv), lambda: SCHEMA)


def refused(*argv):
    """The problems of a command line with an unreadable file."""
    with pytest.raises(UserError) as refusal:
        read(*argv)
    return refusal.value.problems


def merged(command_line):
    return {key: command_line.value(key, lambda: SCHEMA) for key in flatten(SCHEMA)}


@pytest.fixture
def config(tmp_path):
    """Writes a config file and returns its path."""

    def write(text, name='config.py'):
        (tmp_path / name).write_text(text, encoding='utf-8')
        return str(tmp_path / name)

    return write


# --------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    ('argv', 'expected'),
    [
        (['--width=3'], {'width': 3}),
        (['--width', '3'], {'width': 3}),
        (['--width=1e3'], {'width': 1000}),
        (['--shift=-1'], {'shift': -1}),
        (['--shift', '-1'], {'shift': -1}),
        (['--scale', '-1e-3'], {'scale': -0.001}),
        (['--scale=2'], {'scale': 2.0}),
        (['--height=None'], {'height': None}),
        (['--title=a=b=c'], {'title': 'a=b=c'}),
        (['--title', 'a=b'], {'title': 'a=b'}),
        (['--title='], {'title': ''}),
        (['--title=-x'], {'title': '-x'}),
        (['--title=--width=5'], {'title': '--width=5'}),
        (['--title=plot.py'], {'title': 'plot.py'}),
        (['--filled'], {'filled': True}),
        (['--filled', '--width=3'], {'filled': True, 'width': 3}),
        (['--filled', 'false', '--width=3'], {'filled': False, 'width': 3}),
        (['--filled=False'], {'filled': False}),
        (['--no-filled'], {'filled': False}),
        (['--no_filled'], {'filled': False}),
        (['--no_frame'], {'no_frame': True}),
        (['--no-frame'], {'no_frame': True}),
        (['--no-no_frame'], {'no_frame': False}),
        (['--width=3', '--width=4'], {'width': 4}),
    ],
)
def test_option_syntax(argv, expected):
    command_line = read(*argv)
    assert command_line.problems == []
    values = command_line.layers[-1].values
    assert values == expected
    assert {key: type(value) for key, value in values.items()} == {
        key: type(value) for key, value in expected.items()
    }


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (['--widht=3'], ['--widht', 'Did you mean width?']),
        (['--Shape=circle'], ['--Shape', 'Did you mean shape?']),
        (['--zzz=3'], ['--zzz', '--help']),
        (['--width=wide'], ['--width=wide', 'int']),
        (['--width=1.5'], ['--width=1.5', 'int']),
        (['--width=0'], ['width=0', 'at least 1']),
        (['--width=None'], ['--width=None', 'int']),
        (['--width'], ['--width needs a value', 'int']),
        (['--width', '--filled'], ['--width needs a value', 'int']),
        (['--filled=perhaps'], ['--filled=perhaps', 'bool']),
        (['--no-filled=True'], ['--no-filled=True']),
        (['--no-width'], ['--no-width', 'flags only']),
        (['--no-filed'], ['unknown', 'filed', 'Did you mean filled?']),
        (['--shape=circel'], ['shape', 'Did you mean circle?', "'dark_triangle'"]),
        (['circle'], ["'circle'", '--key=value', '*.py']),
        (['-width=3'], ["'-width=3'", '--key=value']),
        (['width=3'], ["'width=3'", '--key=value']),
    ],
)
def test_command_line_mistake_is_explained(argv, words):
    command_line = read(*argv)
    (problem,) = command_line.problems
    assert all(word in problem for word in words), problem
    assert command_line.layers[-1].values.keys() <= {'filled'}


@pytest.mark.parametrize(
    ('arguments', 'topic'),
    [
        (['--help'], ''),
        (['-h'], ''),
        (['--help='], ''),
        (['--help=looks'], 'looks'),
        (['--help', 'looks'], 'looks'),
        (['-h', 'looks'], 'looks'),
        (['--help', '--filled'], ''),
        (['--help=a=b'], 'a=b'),
        (['--help=looks', '--help'], ''),
        ([], None),
    ],
)
def test_help_flag_and_topic(arguments, topic):
    command_line = read('--width=3', *arguments)
    assert command_line.help == topic
    assert not command_line.print_config and command_line.problems == []
    assert command_line.layers[-1].values['width'] == 3


def test_help_flag_before_config_file(config):
    command_line = read('--help', config('width = 3'))
    assert command_line.help == '' and command_line.layers[0].values == {'width': 3}


@pytest.mark.parametrize('flag', ['--print_config', '--print-config'])
def test_print_config_flag(flag):
    command_line = read(flag, '--width=3')
    assert (
        command_line.print_config
        and command_line.help is None
        and command_line.layers[-1].values == {'width': 3}
    )


# --------------------------------------------------------------------------------------------------
# The merge


def test_layer_precedence(config):
    first = config("width = 1\nheight = 1\nshape = 'circle'\nshift = 1", 'first.py')
    second = config('width = 2\nheight = 2', 'second.py')
    # Options may stand before, between or after the files.
    for argv in (['--width=3', first, second], [first, second, '--width=3']):
        command_line = read(*argv)
        assert command_line.problems == []
        assert [layer.origin for layer in command_line.layers] == [first, second, COMMAND_LINE]
        defaults = {key: option.default for key, option in flatten(SCHEMA).items()}
        levels = {'width': 3, 'height': 2, 'shape': 'circle', 'shift': 1}
        assert merged(command_line) == {**defaults, **levels}


def test_none_overrides_file(config):
    assert merged(read(config('height = 4'), '--height=None'))['height'] is None


def test_config_file_texts_are_stored(config):
    text = '# why: ä\nwidth = 2\n'
    path = config(text)
    assert read(path).config_files == [{'path': path, 'text': text}]


def test_int_widens_to_float(config):
    value = read(config('scale = 3')).layers[0].values['scale']
    assert value == 3.0 and type(value) is float


# --------------------------------------------------------------------------------------------------
# Config files


def test_imports_functions_and_private_names_are_no_options(config):
    command_line = read(
        config(
            'import math\n'
            'import os.path as paths\n'
            'import xml.dom\n'
            'from math import pi\n'
            'from math import e as euler, sqrt\n'
            'try:\n'
            '    import json\n'
            'except ImportError:\n'
            '    json = None\n'
            '_helper = 7\n'
            '__private = [8]\n'
            'def double(x):\n'
            '    local = 2\n'
            '    return local * x\n'
            'triple = lambda x: 3 * x\n'
            'class Thing:\n'
            '    size = 3\n'
            'width = double(_helper)\n'
            'scale = pi * euler\n'
        )
    )
    assert command_line.problems == []
    assert command_line.layers[0].values.keys() == {'width', 'scale'}
    assert command_line.layers[0].values['width'] == 14


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('widht = 3', ['widht', 'Did you mean width?']),
        ('helper = 7\nwidth = helper', ["'helper'"]),
        ('import math\npie = math.pi', ["'pie'"]),
        ('for step in range(3):\n    width = 1 + step', ["'step'"]),
        ('width = 2.0', ['width=2.0', 'float given', 'int']),
        ("width = '2'", ["width='2'", 'str given', 'int']),
        ('width = True', ['width=True', 'bool given', 'int']),
        ('width = None', ['width=None', 'int']),
        ('filled = 1', ['filled=1', 'int given', 'bool']),
        ("scale = '1e-3'", ["scale='1e-3'", 'str given', 'float']),
        ("scale = float('nan')", ['scale=nan', 'finite']),
        ("shape = 'circel'", ["shape='circel'", 'Did you mean circle?']),
        ('width = -3', ['width=-3', 'at least 1']),
    ],
)
def test_file_mistake_names_file(config, text, words):
    path = config(text)
    command_line = read(path)
    (problem,) = command_line.problems
    assert path in problem and all(word in problem for word in words), problem


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('width = 2\nheight = = 3', ['line 2']),
        ('width = 2\n    height = 3', ['line 2', 'indent']),
        ('width = 2\n\nheight = 1 / 0', ['line 3', 'ZeroDivisionError', 'division by zero']),
        ('import no_such_module_here', ['line 1', 'no_such_module_here']),
        ('def f():\n    raise ValueError("too odd")\nf()', ['line 2', 'ValueError', 'too odd']),
        ('import sys\nsys.exit(0)', ['line 2', 'SystemExit']),
        ('raise SystemExit', ['line 1', 'SystemExit']),
        ('width = 2\0', ['null bytes']),
    ],
)
def test_file_that_raises_names_line(config, text, words):
    path = config(text)
    (problem,) = refused(path, '--width=3', '--registered_by_the_file=4')
    assert path in problem and all(word in problem for word in words), problem


def test_file_not_utf8(tmp_path):
    path = tmp_path / 'latin.py'
    path.write_bytes("title = 'naïve'".encode('latin-1'))
    (problem,) = refused(str(path))
    assert str(path) in problem


def test_error_without_message(config):
    text = 'class Odd(Exception):\n    def __str__(self):\n        raise ValueError\nraise Odd'
    (problem,) = refused(config(text))
    assert problem.endswith('line 4: Odd')


def test_values_without_repr(config):
    odd = 'class Odd:\n    def __repr__(self):\n        raise ValueError\ntitle = Odd()'
    (problem,) = read(config(odd)).problems
    assert 'title=a value of type Odd' in problem
    (problem,) = read(config('width = 10**5000')).problems
    assert 'width=a value of type int' in problem
    (problem,) = read(config("width = 'x' * 10**6")).problems
    assert len(problem) < 500


def test_keyboard_interrupt_in_file(config):
    with pytest.raises(KeyboardInterrupt):
        read(config('raise KeyboardInterrupt'))


def test_missing_file_suggests_others(config, tmp_path):
    there = config('width = 2', 'arch_gpt.py')
    (problem,) = refused(str(tmp_path / 'arch_gtp.py'))
    assert problem.endswith(f'arch_gtp.py does not exist. Did you mean {there}?')
    (problem,) = refused(str(tmp_path / 'zzz.py'))
    assert problem.endswith(f'zzz.py does not exist. Files in {tmp_path}: arch_gpt.py.')
    (problem,) = refused(str(tmp_path / 'no' / 'where.py'))
    assert 'where.py does not exist' in problem


def test_registered_component_adds_options(config):
    path = config('_registered = True\ndepth = 5')

    def schema():
        return {**SCHEMA, 'Own': {'depth': Option(int, 1, 'Depth')}}

    command_line = read_command_line([path, '--depth=6'], schema)
    assert command_line.problems == [] and command_line.value('depth', schema) == 6
    assert read(path).problems  # without its component the key is unknown


def test_all_problems_at_once(config, tmp_path):
    first = config("widht = 1\nshape = 'circel'", 'first.py')
    command_line = read(first, '--heigth=2', '--width=wide', '--scale', 'stray')
    wrong = ['widht', 'circel', '--heigth', '--width=wide', '--scale=stray']
    assert len(command_line.problems) == len(wrong)
    for words in wrong:
        assert sum(words in problem for problem in command_line.problems) == 1, words
    # With a missing file, only the missing files are reported: its components are unknown.
    missing = [str(tmp_path / name) for name in ('missing.py', 'other.py')]
    problems = refused(first, *missing, '--heigth=2')
    assert [path in problem for path, problem in zip(missing, problems)] == [True, True]


# --------------------------------------------------------------------------------------------------
# Printed config


def test_printed_config_round_trip(config):
    values = {'width': 5, 'height': None, 'shape': 'circle', 'title': "it's # 1", 'filled': False}
    origins = {key: f'from {key}' for key in values}
    text = format_config({'All of it': values}, origins, ['something was left out'])
    command_line = read(config(text))
    assert command_line.problems == [] and command_line.layers[0].values == values
    for key in values:
        (line,) = [line for line in text.splitlines() if line.startswith(f'{key} = ')]
        assert line.endswith(f'# from {key}')
    assert text.splitlines()[-1] == '# something was left out'
