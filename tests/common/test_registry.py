"""Options accept and parse values, registries hold components, resolved values are frozen."""

import copy
import pickle

import pytest

from common.errors import UserError
from common.registry import (
    AnyBut,
    FrozenConfig,
    Option,
    Registry,
    above,
    at_least,
    between,
    fraction,
)

COUNT = Option(int, 3, 'A number')
RATE = Option(float, 0.5, 'A rate')
FLAG = Option(bool, False, 'A switch')
NAME = Option(str, 'a', 'A name')
LIMIT = Option(int | None, None, 'A limit', check=at_least(1))
COLOR = Option(str, 'red', 'A color', choices=('red', 'green', 'dark_blue'))


@pytest.mark.parametrize(
    ('option', 'text', 'value'),
    [
        (COUNT, '7', 7),
        (COUNT, '-1', -1),
        (COUNT, '1e6', 1_000_000),
        (COUNT, '1E3', 1000),
        (COUNT, '1_000', 1000),
        (RATE, '1e-3', 0.001),
        (RATE, '-1', -1.0),
        (RATE, '3', 3.0),
        (FLAG, 'True', True),
        (FLAG, 'false', False),
        (FLAG, '1', True),
        (FLAG, 'no', False),
        (NAME, 'key=value', 'key=value'),
        (NAME, '"quoted"', 'quoted'),
        (NAME, "it's", "it's"),
        (NAME, '', ''),
        (NAME, '12', '12'),
        (NAME, 'None', 'None'),
        (LIMIT, 'None', None),
        (LIMIT, '5', 5),
        (COLOR, 'green', 'green'),
    ],
)
def test_parse_command_line_text(option, text, value):
    parsed = option.parse('key', text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ('option', 'text'),
    [
        *((COUNT, text) for text in ('1.5', '1e-3', 'x', '', 'None', 'True', '1e999', 'nan')),
        *((RATE, text) for text in ('x', '', 'None', 'nan', 'inf', '-inf', '1e999')),
        *((FLAG, text) for text in ('maybe', '', '2', 'None')),
        *((LIMIT, text) for text in ('0', '-1', '0.5')),
        *((COLOR, text) for text in ('Red', 'blue', '', 'None')),
    ],
)
def test_parse_error_names_key_value_and_allowed(option, text):
    with pytest.raises(UserError) as refused:
        option.parse('some_key', text)
    (problem,) = refused.value.problems
    assert 'some_key' in problem and option.allowed() in problem
    assert text in problem or repr(float(text)) in problem


@pytest.mark.parametrize(
    ('needed', 'useful', 'useless'),
    [(True, [True], [False, None]), (AnyBut(None), [False, 0, 'none'], [None])],
)
def test_option_is_active_with_its_requirement(needed, useful, useless):
    option = Option(int, 3, 'A number', requires=('other', needed))
    assert all(option.is_active({'other': value}) for value in useful)
    assert not any(option.is_active({'other': value}) for value in useless)
    assert option == Option(int, 3, 'A number', requires=('other', needed))
    assert COUNT.is_active({})


@pytest.mark.parametrize(
    ('option', 'given', 'value'),
    [
        (RATE, 2, 2.0),
        (COUNT, 2, 2),
        (FLAG, True, True),
        (LIMIT, None, None),
        (COLOR, 'dark_blue', 'dark_blue'),
    ],
)
def test_accept_python_values(option, given, value):
    accepted = option.accept('key', given)
    assert accepted == value and type(accepted) is type(value)


@pytest.mark.parametrize(
    ('option', 'given'),
    [
        (COUNT, 2.0),
        (COUNT, True),
        (COUNT, '2'),
        (COUNT, None),
        (RATE, '0.5'),
        (RATE, False),
        (RATE, None),
        (RATE, float('nan')),
        (FLAG, 1),
        (FLAG, 'True'),
        (FLAG, None),
        (NAME, 3),
        (NAME, None),
        (LIMIT, 0),
        (LIMIT, [5]),
        (COLOR, 5),
        (COLOR, 'blue'),
    ],
)
def test_accept_rejects_other_types(option, given):
    with pytest.raises(UserError) as refused:
        option.accept('some_key', given)
    (problem,) = refused.value.problems
    assert f'some_key={given!r}' in problem and option.allowed() in problem


def test_misspelled_choice_gets_suggestion():
    with pytest.raises(UserError, match=r'Did you mean dark_blue\?'):
        COLOR.parse('color', 'dark-blu')


@pytest.mark.parametrize(
    ('check', 'inside', 'outside'),
    [
        (at_least(2), (2, 3), (1.999, -5)),
        (above(0), (1e-9, 3), (0, -1)),
        (between(-1, 1), (-1, 0, 1), (-1.001, 1.001)),
        (fraction(), (0, 0.999), (1, -0.001)),
    ],
)
def test_checks_at_bounds(check, inside, outside):
    option = Option(float, 0.5, 'A number', check=check)
    assert [option.accept('x', value) for value in inside] == list(inside)
    for value in outside:
        with pytest.raises(UserError):
            option.accept('x', value)


# --------------------------------------------------------------------------------------------------
# Registries


@pytest.fixture
def shapes():
    registry = Registry('shape', 'Shape', home='common.errors')

    @registry.register('square', source='Euclid')
    class Square:
        pass

    return registry


def test_registry_lists_registered_components(shapes):
    option = Option(str, 'square', 'A shape', choices=shapes)

    @shapes.register('circle')
    class Circle:
        pass

    assert list(shapes) == ['square', 'circle']
    assert shapes['circle'] is Circle and 'circle' in shapes and 'triangle' not in shapes
    assert shapes.source('square') == 'Euclid'
    assert option.accept('shape', 'circle') == 'circle'
    with pytest.raises(UserError, match="one of 'square', 'circle'"):
        option.accept('shape', 'triangle')


def test_duplicate_name_is_rejected(shapes):
    class Other:
        pass

    before = shapes['square']
    with pytest.raises(UserError, match=r"shape='square' is registered twice.*Square.*Other"):
        shapes.register('square')(Other)
    assert shapes['square'] is before


def test_redefined_class_replaces_itself():
    registry = Registry('shape', 'Shape', home='common.errors')

    def define():
        @registry.register('square')
        class Square:
            pass

        return Square

    first, second = define(), define()
    assert first is not second and registry['square'] is second and list(registry) == ['square']


# --------------------------------------------------------------------------------------------------
# Resolved values


def test_frozen_config_cannot_be_set():
    config = FrozenConfig({'width': 8}, {'width': 'default'})
    for key in ('width', 'new', 'origins'):
        with pytest.raises(AttributeError, match='frozen'):
            setattr(config, key, 9)
    with pytest.raises(AttributeError, match='frozen'):
        del config.origins
    config.to_dict()['width'] = 9
    assert config.width == 8 and 'width' in config and 'height' not in config
    with pytest.raises(AttributeError, match='height'):
        _ = config.height


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_frozen_config_survives_copying(copied):
    config = FrozenConfig({'width': 8}, {'width': 'default'})
    again = copied(config)
    assert again == config and again.origins == config.origins


def test_frozen_config_repr_shows_keys_and_values():
    config = FrozenConfig({'width': 8, 'name': 'a'}, {})
    assert repr(config) == "FrozenConfig(width=8, name='a')"
    long = FrozenConfig({f'option_{number}': number for number in range(10)}, {})
    lines = repr(long).splitlines()
    assert lines[0] == 'FrozenConfig(' and lines[-1] == ')'
    assert lines[1:-1] == [f'    option_{number}={number},' for number in range(10)]


def test_frozen_config_dir_lists_options_and_methods():
    config = FrozenConfig({'width': 8, 'name': 'a'}, {})
    assert {'width', 'name', 'to_dict', 'get', 'origins'} <= set(dir(config))


def test_frozen_configs_are_equal_by_class_and_values():
    config = FrozenConfig({'width': 8, 'name': 'a'}, {})
    same = FrozenConfig({'name': 'a', 'width': 8}, {'width': 'file'})
    assert config == same and hash(config) == hash(same) and len({config, same}) == 1
    others = FrozenConfig({}, {}), FrozenConfig({'width': 9, 'name': 'a'}, {})
    for other in (*others, type('Other', (FrozenConfig,), {})({'width': 8, 'name': 'a'}, {})):
        assert config != other
    assert config != {'width': 8, 'name': 'a'}


def test_missing_option_of_frozen_config_names_the_nearest():
    config = FrozenConfig({'width': 8}, {})
    with pytest.raises(AttributeError, match="no option 'widht', or no chosen component") as raised:
        _ = config.widht
    assert (raised.value.name, raised.value.obj) == ('widht', config)  # for Python's suggestion


def test_registry_subset_includes_later_components():
    whole = Registry('color', 'Color', home='common.registry')
    whole.register('red')(type('Red', (), {'warm': True}))
    part = whole.where(lambda component: component.warm, 'light', 'Light')
    whole.register('blue', source='The sky')(type('Blue', (), {'warm': False}))
    whole.register('amber', source='Trees')(type('Amber', (), {'warm': True}))
    assert list(part) == ['red', 'amber'] and 'blue' in whole and 'blue' not in part
    assert part['amber'] is whole['amber'] and part.source('amber') == 'Trees'
    with pytest.raises(KeyError):
        part['blue']
    with pytest.raises(UserError, match="light takes one of 'red', 'amber'"):
        Option(str, 'red', 'A light', choices=part).accept('light', 'blue')
