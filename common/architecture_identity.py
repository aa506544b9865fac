"""The identity of an architecture: a hash that is equal exactly if all layers are.

It is computed from resolved options as plain data, so that old records can be compared with new
ones. Version 1 hashed the options as they were written. Since version 2, where layers may have any
options, two ways to write the same layers have one identity. Both versions agree on an architecture
whose layers are all alike.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

from common.layer_pattern import MOST_LAYERS

HASH_VERSION = 2
# Values of newer options that change nothing; records from before lack the options.
NEUTRAL = {
    'layer_pattern': None,
    'mixer': 'attention',
    'attention_gate': 'none',
    'attention_gate_function': 'sigmoid',
    'attention_output_bias': None,
    'canon': None,
    'head_bias': False,
    'embedding_norm': 'none',
    'qkv_clip': None,
    'query_scale_growth': None,
    'alibi_scaled': False,
    'sinusoid_layout': 'interleaved',
    'qk_norm_position': 'before_rotation',
    'shared_gate': False,
    'latent_norm_eps': None,
    'value_residual': 'none',
    'residual': 'addition',
    'attention_sinks': False,
    'attention_chunk': None,
    'value_head_dim': None,
    'rope_round_pairs': True,
    'expert_weights_at': 'output',
    'router_bias': False,
    'router_groups': 1,
    'router_selection_bias': False,
    'router_selection_bias_target': 'scores',
    'capacity_factor': None,
    'mixer_backend': 'torch',
    'embedding_multiplier': 1.0,
    'logit_multiplier': 1.0,
}
# Newer options whose neutral value is the value of another option.
NEUTRAL_LIKE = {'attention_output_bias': 'attention_bias', 'value_head_dim': 'head_dim'}
# The options of a mixture of experts in version 1, which its dense layers do not have.
_MIXTURE_OPTIONS = frozenset(
    {
        *('expert_ffn', 'num_experts', 'experts_per_token', 'shared_experts', 'expert_d_ff'),
        *('dense_layers', 'router_score', 'router_normalize', 'router_scale'),
        *('load_balance_weight', 'router_z_loss', 'shared_gate', 'expert_weights_at'),
        *('router_bias', 'router_groups', 'router_selection_bias', 'capacity_factor'),
    }
)


def hash_of_values(values: Mapping) -> str:
    """A hash of options as plain data; neutral values of newer options do not count."""
    text = json.dumps(_counted(values), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _counted(values: Mapping) -> dict:
    neutral = {**NEUTRAL, **{key: values.get(other) for key, other in NEUTRAL_LIKE.items()}}
    return {
        key: value
        for key, value in values.items()
        if key not in NEUTRAL or value not in (NEUTRAL[key], neutral[key])
    }


def with_neutral_values(options: Mapping) -> dict:
    """The options of a record, which may lack newer ones: those have their neutral values."""
    values = {**NEUTRAL, **options}
    for key, other in NEUTRAL_LIKE.items():
        if values[key] is None and other in values:
            values[key] = values[other]
        elif values[key] is None:  # a model without attention
            del values[key]
    return values


def hash_of_layers(layers: Sequence[Mapping], shared: Mapping) -> str:
    """The hash of an architecture.

    layers: the resolved options of each layer, those of the model included. shared: the model's own
    values of options that it uses outside its layers too, such as the norm before the output head.
    """
    # 1. The distinct kinds of layers in the order of the layers, and the kind of each layer.
    used = {id(layer): without_short_forms(layer) for layer in layers}
    kinds: list[dict] = []
    numbers = []
    for layer in layers:
        options = used[id(layer)]
        if options not in kinds:
            kinds.append(options)
        numbers.append(kinds.index(options))
    # 2. Where the model differs from its layers, its own values count too.
    own = {k: v for k, v in _counted(shared).items() if any(kind.get(k) != v for kind in kinds)}
    if len(kinds) == 1 and not own:
        return hash_of_values(_uniform(layers[0]))
    return hash_of_values({'kinds': kinds, 'layers': numbers, 'model': own})


def without_short_forms(layer: Mapping) -> dict:
    """The options of a layer, without those that only other layers would use."""
    unused = {'attention_pattern'}
    if 'dense_layers' in layer:
        unused |= {'dense_layers', 'd_ff'}  # the width of dense layers
    return {key: value for key, value in _counted(layer).items() if key not in unused}


def _uniform(layer: Mapping) -> dict:
    """The options of a model whose layers are all like this one, as version 1 hashed them."""
    pattern = {'attention_pattern': 'L'} if 'attention_pattern' in layer else {}
    return {**layer, **pattern}


def identity_of_record(stored: str, version: int, choices: Mapping) -> str:
    """The identity of a record's architecture: its hash in the current version.

    stored, version, choices: the hash in the record, its version, and the resolved options. If the
    hash cannot be computed again, the identity differs from all of the current version. Raises
    ValueError if the options are malformed.
    """
    if version == HASH_VERSION:
        return stored
    hashed = _hashed_options(stored, choices) if version == 1 else None
    if hashed is None:
        return f'{stored} (version {version})'
    return hash_of_layers(layers_of_short_forms(hashed), {})


def _hashed_options(stored: str, choices: Mapping) -> Mapping | None:
    """The options that have the stored hash of version 1, or None.

    The hash counts the attention backend of a CPU unless it was set; the record has that of the
    run's device.
    """
    for backend in (choices.get('attention_backend'), 'sdpa', 'manual', 'flex'):
        values = {**choices, 'attention_backend': backend}
        if hash_of_values(values) == stored:
            return values
    return None


def layers_of_short_forms(choices: Mapping) -> list[dict]:
    """The options of each layer of a record of version 1, from both short forms.

    Raises ValueError if an option that this depends on is malformed.
    """
    count, dense = choices.get('n_layer'), choices.get('dense_layers', 0)
    pattern, expert = choices.get('attention_pattern', 'L'), choices.get('expert_ffn')
    if type(count) is not int or not 1 <= count <= MOST_LAYERS:
        raise ValueError(f'n_layer is {count!r:.40}, not a number from 1 to {MOST_LAYERS:,}')
    if type(dense) is not int or dense < 0 or (dense and not isinstance(expert, str)):
        raise ValueError(f'dense_layers is {dense!r:.40} with expert_ffn {expert!r:.40}')
    if not isinstance(pattern, str) or not pattern or pattern.strip('LG'):
        raise ValueError(f'attention_pattern is {pattern!r:.40}, not letters L and G')
    kinds: dict[tuple, dict] = {}
    layers = []
    for number in range(count):
        kind = is_global, is_dense = pattern[number % len(pattern)] == 'G', number < dense
        if kind not in kinds:
            kinds[kind] = _layer_of_kind(choices, is_global, is_dense)
        layers.append(kinds[kind])
    return layers


def _layer_of_kind(choices: Mapping, is_global: bool, is_dense: bool) -> dict:
    """The options of a layer that is global (without a window) or dense (without experts)."""
    layer = dict(choices)
    if is_global:
        layer['sliding_window'] = None
        layer.pop('attention_pattern', None)
    if is_dense:
        layer = {key: value for key, value in layer.items() if key not in _MIXTURE_OPTIONS}
        layer['ffn_type'] = choices['expert_ffn']
    elif 'dense_layers' in layer:
        layer['dense_layers'] = 0
    return layer
