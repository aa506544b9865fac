"""Pages of `--help`: overview, groups, single options, all options."""

import argparse

import pytest

from common.dict_option import DictOption
from common.errors import ArgumentParser, UserError
from common.option_help import CommandHelp, HelpGroup, split_by_choice
from common.registry import AnyBut, Option, Registry, at_least

SHAPES = Registry('shape', 'Shape', home='common.errors')


class Square:
    """A square: four equal sides.

    More about squares.
    """

    options = {'side': Option(float, 1.0, 'Length of a side')}  # noqa: RUF012


class Circle:
    """A circle."""

    options = {'radius': Option(float, 1.0, 'Radius of the circle')}  # noqa: RUF012


SHAPES.register('square')(Square)
SHAPES.register('dark_circle')(Circle)
SIZES = {
    'width': Option(int, 8, 'Width of the drawing', check=at_least(1)),
    'height': Option(int | None, None, 'Height of the drawing; None: the width'),
    'margin': Option(int, 0, 'Margin', requires=('height', AnyBut(None))),
    'a_name_that_reaches_into_the_column': Option(str, ' ', 'Help of the long name'),
}
LOOKS = {
    'shape': Option(str, 'square', 'Shape', choices=SHAPES, aliases={'round': ('width', 3)}),
    **Square.options,
    **Circle.options,
    'filled': Option(bool, True, 'Fill the shape ' + 'with a pattern of dots ' * 5),
}
HELP = CommandHelp(
    'Draw a shape.\n\n    draw.py --shape=square\n\nA long description of the command. '
    + 'Text ' * 30,
    [HelpGroup('sizes', 'Sizes of the drawing', SIZES), HelpGroup('looks', 'Its looks', LOOKS)],
    essential=('width', 'shape'),
)


@pytest.fixture(params=[80, 100, 200])
def columns(request, monkeypatch):
    monkeypatch.setenv('COLUMNS', str(request.param))
    return min(request.param, 100)


def flat(topic):
    return ' '.join(HELP.page(topic).split())


def test_overview_lists_essential_options_and_groups(columns):
    page = HELP.page('')
    assert page.startswith('Draw a shape.\n\n    draw.py --shape=square\n\n')
    assert '  --width              Width of the drawing (default 8)' in page
    assert '[square, dark_circle]' in page and '--filled' not in page
    assert '  sizes          4     Sizes of the drawing\n' in page
    assert 'or all 8 (--help=all)' in flat('')


@pytest.mark.parametrize('topic', ['', 'sizes', 'looks', 'all', 'width', 'shape', 'filled'])
def test_lines_fit_the_terminal(columns, topic):
    assert max(map(len, HELP.page(topic).splitlines())) <= columns


def test_group_page_lists_options_in_columns(columns):
    page = HELP.page('sizes')
    assert '--height=int?             Height of the drawing; None: the width\n' in page
    # A name that is too long has a line of its own.
    assert f'--a_name_that_reaches_into_the_column=str\n{" " * 28}Help of the long name' in page
    assert '--filled' not in page and "(default ' ')" in page
    starts = {
        line.index(option.help.split()[0])
        for line in page.splitlines()
        for option in SIZES.values()
        if line.startswith(' ') and option.help in line
    }
    assert starts == {28}


def test_all_page_lists_every_option_once():
    page = HELP.page('all')
    for key in HELP.options:
        assert page.count(f'  --{key}=') == 1


def test_option_page():
    page = flat('width')
    assert page.startswith('--width=int Width of the drawing Type int Default 8')
    assert 'Allowed int, at least 1' in page and '(--help=sizes)' in page
    assert "Used with shape='square'" in flat('side')
    assert 'Used with height other than None' in flat('margin')
    page = flat('shape')
    assert 'dark_circle A circle. Options: radius.' in page
    assert 'four equal sides' in page and 'More about' not in page
    assert "shape='round' sets width=3" in page


def test_page_of_a_dict_option_shows_how_one_value_is_set():
    layers = DictOption(
        dict,
        {},
        'Shapes of layers that differ',
        names=(str.isalpha, 'a word'),
        placeholder='WORD',
        example={'top': {'width': 3}},
        entry_options=lambda: {'width': SIZES['width'], 'height': SIZES['height']},
    )
    groups = [*HELP.groups, HelpGroup('more', 'More', {'layers': layers})]
    pages = CommandHelp('Draw.', groups, essential=('width',))
    page = ' '.join(pages.page('layers').split())
    assert page.startswith('--layers.WORD.OPTION=value Shapes of layers that differ Type dict')
    assert 'Allowed a dict, a word -> {option: value}' in page
    assert "In a file layers = {'top': {'width': 3}}" in page
    assert 'Removal --layers.WORD=None' in page
    assert page.endswith('Options of an entry: width, height')
    assert 'By layer --layers.WORD.width=value' in ' '.join(pages.page('width').split())
    assert 'By layer' not in pages.page('margin')
    assert '  --layers.WORD.OPTION=value\n' in pages.page('more')


def test_topic_may_be_written_as_a_flag():
    assert HELP.page('--dark-circle'.replace('dark-circle', 'shape')) == HELP.page('shape')


@pytest.mark.parametrize(
    ('topic', 'words'),
    [
        ('size', 'Did you mean sizes?'),
        ('hieght', 'Did you mean height?'),
        ('zzz', 'name. Groups'),
        ('name', 'Options with this word: a_name_that'),
    ],
)
def test_unknown_topic_suggests_names(topic, words):
    with pytest.raises(UserError) as error:
        HELP.page(topic)
    (problem,) = error.value.problems
    assert problem.startswith(f'--help={topic}: ') and words in problem
    assert problem.endswith('Groups: sizes, looks, all.')


def test_split_by_choice_follows_components():
    chosen, rest = split_by_choice(LOOKS, ['shape'])
    assert list(chosen) == ['shape', 'side', 'radius'] and list(rest) == ['filled']


def test_parser_help_has_the_same_layout(columns, capsys):
    parser = ArgumentParser(prog='draw.py', description='Draw.\n\n    draw.py a.txt --size=3')
    parser.add_argument('files', nargs='*', metavar='FILE', help='Files to draw')
    parser.add_argument('--size', type=int, required=True, help='Size of the drawing')
    parser.add_argument('--kind', choices=('plain', 'dark'), help='Kind (default plain)')
    parser.add_argument('--fast', action='store_true', help='Draw fast')
    parser.add_argument('--hidden', help=argparse.SUPPRESS)
    with pytest.raises(SystemExit) as ended:
        parser.parse(['--help'])
    page = capsys.readouterr().out
    assert ended.value.code == 0 and max(map(len, page.splitlines())) <= columns
    assert page.startswith(
        'Draw.\n\n    draw.py a.txt --size=3\n\nUsage: python draw.py [FILE ...] [OPTIONS]'
    )
    assert '  FILE                      Files to draw\n' in page
    assert '  --size=N                  Size of the drawing (required)\n' in page
    assert '  --kind=NAME               Kind (default plain) [plain, dark]\n' in page
    assert '  --fast                    Draw fast\n' in page and 'hidden' not in page
