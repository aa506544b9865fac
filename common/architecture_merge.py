"""Merging of an architecture's options, for the model and for each kind of layers."""

from dataclasses import replace
from typing import NamedTuple

from common.architecture_options import (
    CORE_OPTIONS,
    PRESET_OPTION,
    START_OPTIONS,
    short_forms,
)
from common.architecture_presets import PRESETS
from common.option_merge import Layer, Merge, chosen_components, merge_layers
from common.published_designs import FAMILY, design_layer
from common.registry import FrozenConfig, derived_values_of


class Start(NamedTuple):
    """The preset, or the family of `like` in its place; and its layer of options."""

    preset: str
    like: str | None
    layer: Layer

    def named(self) -> dict[str, str]:
        """The option that names it."""
        return {'arch_preset': self.preset} if self.like is None else {'like': self.like}


def start_of(layers: list[Layer], problems: list[str]) -> Start:
    """What the layers of options name as their start. Both a preset and a family are a problem."""
    named: dict[str, tuple[str, str]] = {}  # value and origin
    for layer in layers:
        named |= {k: (layer.values[k], layer.origin) for k in START_OPTIONS if k in layer.values}
    preset, preset_origin = named.get('arch_preset', (PRESET_OPTION.default, 'default'))
    like, origin = named.get('like', (None, ''))
    if like is None:
        return Start(preset, None, Layer(f'preset {preset}', PRESETS[preset]))
    if 'arch_preset' in named:
        problems.append(
            f'like={like!r} ({origin}) and arch_preset={preset!r} ({preset_origin}): a design '
            f'starts from one of them. Remove the other.'
        )
    return Start('custom', like, design_layer(like))


def merge_architecture(stack: list[Layer], problems: list[str]) -> Merge:
    """The merged options of the layers of options, that of the preset or the family first."""
    named = 'like' if stack[0].origin.startswith(FAMILY) else 'arch_preset'
    merged = merge_layers({**START_OPTIONS, **CORE_OPTIONS}, stack, problems, preset=named)
    for key in START_OPTIONS:
        del merged.values[key]
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
