"""Canon layers: short convolutions beside the identity, at up to four places of a layer.

Allen-Zhu 2025, "Physics of Language Models: Part 4.1", where filters of width 4 have neither bias
nor activation.
"""

import torch
import torch.nn as nn

from common.registry import AnyBut, Option, at_least
from components.attention_inputs import AttentionInputs
from components.base import Component
from components.short_convolution import ShortConvolution
from model_config import (
    ATTENTION_REGISTRY,
    FFN_REGISTRY,
    MIXER_REGISTRY,
    NORM_POSITION_REGISTRY,
    ModelArchitectureConfig,
)

LETTERS = 'ABCD'
STATE = 'canon'  # name of their MixerState among the states of a layer


def is_canon(value: str) -> bool:
    return bool(value) and value == ''.join(letter for letter in LETTERS if letter in value)


CANON_OPTIONS = {
    'canon': Option(
        str | None,
        None,
        'Canon layers, x + short convolution of x: A at the input of the mixers, B at queries, '
        'keys and values, C at the input of the FFN, D at its hidden values; None: none',
        check=(is_canon, "letters of 'ABCD' in this order, such as 'AC'"),
    ),
    'canon_width': Option(
        int,
        4,
        'Tokens that a Canon layer combines, the own token included',
        check=at_least(1),
        requires=('canon', AnyBut(None)),
    ),
}


class CanonLayer(Component, nn.Module):
    """x + convolution(x)."""

    part = 'canon'
    mup_rule = True

    def __init__(self, letter: str, channels: int, width: int):
        super().__init__()
        self.letter, self.convolution = letter, ShortConvolution(channels, width)

    def forward(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> torch.Tensor:
        """(B, T, channels) -> (B, T, channels)."""
        state = None if attn_inputs.states is None else attn_inputs.states[STATE]
        return x + self.convolution(x, attn_inputs.starts, state, self.letter)


def canon_layer(config: ModelArchitectureConfig, letter: str, channels: int) -> CanonLayer | None:
    """The Canon layer of that letter, if the architecture has one."""
    chosen = letter in (config.get('canon') or '')
    return CanonLayer(letter, channels, config.canon_width) if chosen else None


def canon_tag(config: ModelArchitectureConfig) -> str:
    """The part of an architecture's name."""
    letters = config.get('canon')
    if letters is None:
        return ''
    return f'Canon{letters}{"" if config.canon_width == 4 else config.canon_width}'


def canon_problems(config: ModelArchitectureConfig) -> list[str]:
    """A sentence for each letter that the layer has no place for."""
    letters = config.get('canon') or ''
    layout = 'norm_position', NORM_POSITION_REGISTRY
    has_attention = 'attention' in MIXER_REGISTRY.components(config.mixer)
    places: dict[str, tuple] = {
        'A': (('mixer', None) if config.mixer == 'none' else layout,),
        'B': (('attention_type', ATTENTION_REGISTRY) if has_attention else ('mixer', None),),
        'C': (('ffn_type', None) if config.ffn_type == 'none' else layout,),
        'D': (('ffn_type', FFN_REGISTRY), layout),
    }
    missing = [
        (letter, key)
        for letter in letters
        for key, registry in places[letter]
        if registry is None or letter not in _applied(registry[config.get(key)])
    ]
    supported = ''.join(letter for letter in letters if letter not in dict(missing)) or None
    return [
        f'canon={letters!r}: {key}={config.get(key)!r} has no place for a Canon layer {letter}. '
        f'Set --canon={supported}.'
        for letter, key in missing
    ]


def _applied(component: type) -> str:
    """The letters of the class that defines the component's `forward`."""
    definer = next(cls for cls in component.__mro__ if 'forward' in vars(cls))
    return vars(definer).get('canon_letters', '')
