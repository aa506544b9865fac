"""Random tiny configs of the supported families: sizes, heads, layers and other legal fields."""

import random

from helpers.field_changes import LEFT_OUT
from helpers.foreign_configs import BASES

_LAYERS = ('num_hidden_layers', 'n_layer', 'num_layers', 'n_layers')
_HEADS = ('num_attention_heads', 'n_head', 'num_heads', 'n_heads')
_KV_HEADS = ('num_key_value_heads', 'num_kv_heads')
_WIDTHS = ('hidden_size', 'n_embd', 'd_model')
# Lists with an entry for each layer, of the kinds that the base's list has.
_KINDS = ('layer_types', 'mlp_layer_types', 'layers_block_type', 'block_types', 'no_rope_layers')
# Lists of numbers of layers.
_INDICES = ('mlp_only_layers', 'attn_layer_indices')


def _first(base: dict, names: tuple[str, ...]) -> str:
    return next((name for name in names if name in base), names[0])


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _other_size(rng: random.Random, value: int) -> int:
    return rng.choice([value, max(1, value // 2), 2 * value, value + 1, value + 8])


def random_config(family: str, rng: random.Random, changes: list[dict]) -> dict:
    """A config of the family that may be illegal: sizes at random, and at most two of `changes`."""
    base = BASES[family]
    layers, heads = rng.randint(1, 4), rng.choice([1, 2, 3, 4, 6])
    drawn: dict = {}
    for name, value in base.items():
        if name in _KINDS:
            drawn[name] = [rng.choice(value) for _ in range(layers)]
        elif name in _INDICES:
            drawn[name] = sorted(rng.sample(range(layers), rng.randint(0, layers)))
        elif name == 'attention_types':  # GPT-Neo: [[kinds, repetitions]]
            drawn[name] = [[[rng.choice(value[0][0]) for _ in range(layers)], 1]]
        elif isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
            drawn[name] = _other_size(rng, value)
    if any(name in base for name in (*_LAYERS, 'layers_block_type')):
        drawn[_first(base, _LAYERS)] = layers
    if 'layers_block_type' in base:
        drawn.pop(_first(base, _LAYERS))
    heads_name, width = _first(base, _HEADS), _first(base, _WIDTHS)
    if heads_name in base:
        drawn[heads_name] = heads
        drawn[width] = heads * rng.choice([4, 8, 12, 16])
        kv_heads = _first(base, _KV_HEADS)
        if kv_heads in base:
            shared = base[kv_heads] != base[heads_name]
            drawn[kv_heads] = rng.choice(_divisors(heads)) if shared else heads
    extra: dict = {}
    complete = [change for change in changes if LEFT_OUT not in change.values()]
    for change in rng.sample(complete, min(len(complete), rng.randint(0, 2))):
        extra |= change
    return {**base, **drawn, **extra}
