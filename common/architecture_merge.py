"""Merging of an architecture's options, for the model and for each kind of layers."""

from dataclasses import replace

from common.architecture_options import CORE_OPTIONS, PRESET_OPTION, short_forms
from common.option_merge import Layer, Merge, chosen_components, merge_layers
from common.registry import FrozenConfig, derived_values_of


def merge_architecture(stack: list[Layer], problems: list[str]) -> Merge:
    """The merged options of the layers of options, that of the preset first."""
    options = {'arch_preset': PRESET_OPTION, **CORE_OPTIONS}
    merged = merge_layers(options, stack, problems, preset='arch_preset')
    del merged.values['arch_preset']
    return merged


def merge_kind(stack: list[Layer], overrides: list[Layer]) -> Merge:
    """The merged options of layers of one kind, as of a model with such layers only."""
    left_out = {'layer_pattern', 'layer_kinds', *short_forms()}
    below = [
        replace(
            layer, values={k: v for k, v in layer.values.items() if k not in left_out}, level=level
        )
        for level, layer in enumerate(stack, start=1)
    ]
    return merge_architecture([*below, *overrides], [])


def derive_values(values: dict, origins: dict[str, str]) -> None:
    """Derive the values that are None from the merged values."""

    def fill(key: str, value, why: str) -> None:
        if key in values and values[key] is None:
            values[key], origins[key] = value, f'derived: {why}'

    fill('attention_dropout', values['dropout'], 'dropout')
    fill('residual_dropout', values['dropout'], 'dropout')
    for _, component in chosen_components(CORE_OPTIONS, values):
        for key, derived in derived_values_of(component, FrozenConfig(values, origins)).items():
            fill(key, *derived)
