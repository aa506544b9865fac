"""benchmarks/component_cost.py: every component is measured, with what it needs to have a use."""

from benchmarks.component_cost import variants
from configurator import flatten, read_command_line
from model_config import architecture_options
from registry import Registry
from training_config import load_settings, schema


def resolved(changes):
    arguments = [f'--{key}={value}' for key, value in changes.items()]
    settings = load_settings(read_command_line([*arguments, '--device=cpu'], schema))
    return settings.to_dict()


def test_every_component_is_measured_with_what_it_needs():
    default, options = resolved({}), flatten(schema())
    changes = variants(options, default)
    assert len({str(change) for change in changes}) == len(changes)
    measured = set()
    for change in changes:
        values = resolved(change)
        assert change.items() <= values.items(), change
        measured |= values.items()
    for key, option in options.items():
        if isinstance(option.choices, Registry):
            assert {(key, name) for name in option.choices} <= measured, key
        if option.base_type is bool and key in architecture_options():
            assert {(key, False), (key, True)} <= measured, key
