"""The identity of an architecture: a hash that is equal exactly if all layers are.

It is computed from resolved options as plain data, so that old records can be compared with new
ones. Version 1 hashed the options themselves. Since version 2, where layers may have any options,
two ways to write the same layers have one identity. Both agree if all layers are alike.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

HASH_VERSION = 2
# Values of newer options that change nothing; records from before lack the options.
NEUTRAL = {'layer_pattern': None}
# The options of a mixture of experts in version 1, which its dense layers do not have.
_MIXTURE_OPTIONS = frozenset(
    {
        *('expert_ffn', 'num_experts', 'experts_per_token', 'shared_experts', 'expert_d_ff'),
        *('dense_layers', 'router_score', 'router_normalize', 'router_scale'),
        *('load_balance_weight', 'router_z_loss'),
    }
)


def hash_of_values(values: Mapping) -> str:
    """A hash of options as plain data; neutral values of newer options do not count."""
    counted = {k: v for k, v in values.items() if k not in NEUTRAL or v != NEUTRAL[k]}
    text = json.dumps(counted, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def hash_of_layers(layers: Sequence[Mapping], output: Mapping) -> str:
    """The hash of an architecture.

    layers: the resolved options of each layer, those of the model included. output: the model's
    own values of options that it uses outside its layers too, such as the norm before the head.
    """
    own = {k: v for k, v in output.items() if any(layer.get(k) != v for layer in layers)}
    if not own and all(layer == layers[0] for layer in layers):
        return hash_of_values(layers[0])
    return hash_of_values({'layers': [without_short_forms(layer) for layer in layers], **own})


def without_short_forms(layer: Mapping) -> dict:
    """The options of one layer, without those that only other layers would use."""
    unused = {'attention_pattern', *NEUTRAL}
    if 'dense_layers' in layer:
        unused |= {'dense_layers', 'd_ff'}  # the width of dense layers
    return {key: value for key, value in layer.items() if key not in unused}


def current_hash(stored: str, version: int, choices: Mapping) -> str:
    """The hash of the current version for a record's.

    choices: the resolved options in the record. The attention backend in the hash is that of a CPU
    unless it was set, which the stored hash tells.
    """
    pattern, dense = choices.get('attention_pattern', 'L'), choices.get('dense_layers', 0)
    if version >= HASH_VERSION or (pattern == 'L' and not dense):
        return stored
    backends = [choices.get('attention_backend'), 'sdpa', 'manual', 'flex']
    variants = [{**choices, 'attention_backend': backend} for backend in backends]
    hashed = next((v for v in variants if hash_of_values(v) == stored), choices)
    return hash_of_layers(layers_of_short_forms(hashed), {})


def layers_of_short_forms(choices: Mapping) -> list[dict]:
    """The options of each layer of a record of version 1, from both short forms."""
    pattern, dense = choices.get('attention_pattern', 'L'), choices.get('dense_layers', 0)
    layers = []
    for number in range(choices['n_layer']):
        layer = dict(choices)
        if 'attention_pattern' in layer:
            layer['attention_pattern'] = 'L'
            if pattern[number % len(pattern)] == 'G':
                layer['sliding_window'] = None
                del layer['attention_pattern']
        if number < dense:
            layer = {key: value for key, value in layer.items() if key not in _MIXTURE_OPTIONS}
            layer['ffn_type'] = choices['expert_ffn']
        elif 'dense_layers' in layer:
            layer['dense_layers'] = 0
        layers.append(layer)
    return layers
