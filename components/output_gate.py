"""The options of the gates on the outputs of attention's heads."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from common.registry import AnyBut, FrozenConfig, Option

_FUNCTIONS = {'sigmoid': torch.sigmoid, 'softplus': F.softplus}
_TAGS = {'elementwise': 'Gate', 'head': 'HeadGate'}  # of `attention_gate`
OUTPUT_GATE_OPTIONS = {
    'attention_gate': Option(
        str,
        'none',
        "Gates on the heads' outputs, from the input: for each dimension or each head",
        choices=('none', *_TAGS),
    ),
    'attention_gate_function': Option(
        str,
        'sigmoid',
        'Function of the gates; softplus as in Laguna',
        choices=tuple(_FUNCTIONS),
        requires=('attention_gate', AnyBut('none')),
    ),
}


def gate_function(config: FrozenConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    return _FUNCTIONS[config.get('attention_gate_function') or 'sigmoid']


def output_gate_tag(config: FrozenConfig) -> str:
    """The tag in the architecture's name; '' without a gate."""
    if config.get('attention_gate') not in _TAGS:
        return ''
    function = config.get('attention_gate_function') or 'sigmoid'
    return ('' if function == 'sigmoid' else function.capitalize()) + _TAGS[config.attention_gate]
