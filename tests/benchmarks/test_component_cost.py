"""benchmarks/component_cost.py: every component is measured, with what it needs to have a use."""

from benchmarks.component_cost import variants
from common.registry import Registry
from model_config import ModelArchitectureConfig, architecture_options


def test_every_component_is_measured_with_what_it_needs():
    options, default = architecture_options(), ModelArchitectureConfig()
    changes = variants(options, default.to_dict())
    assert len({str(change) for change in changes}) == len(changes)
    measured = set()
    for change in changes:
        values = ModelArchitectureConfig(**change).to_dict()
        assert change.items() <= values.items(), change
        measured |= values.items()
    for key, option in options.items():
        if isinstance(option.choices, Registry):
            assert {(key, name) for name in option.choices} <= measured, key
        if option.base_type is bool:
            assert {(key, False), (key, True)} <= measured, key
