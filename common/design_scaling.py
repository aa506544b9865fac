"""A released model's options as functions of the user's sizes, with the ratios that it has.

Widths follow n_embd, numbers of heads n_head, dimensions of a head n_embd / n_head, windows
block_size, and patterns of layers n_layer. Numbers of experts, shapes of convolutions, states of a
channel, bases of RoPE, multipliers and switches are as published. At the published sizes, all
options are those of the released model.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from common.architecture_presets import kv_heads_in_groups_of
from common.layer_pattern import expand_pattern
from common.pattern_scaling import scaled_pattern

SMALLEST_HEAD = 16  # dimensions, if n_head is not set
SMALLEST_WINDOW = 16  # tokens
UNEVEN = 1.6  # how much farther another number of heads may be for heads of a multiple of 8


class Published(NamedTuple):
    """The options of a released model, or of one kind of its layers, and its sizes."""

    options: dict

    @property
    def n_embd(self) -> int:
        return self.options['n_embd']

    @property
    def n_head(self) -> int:
        """The number of heads; for a model without attention, of heads of 64 dimensions."""
        return self.options.get('n_head', max(1, self.n_embd // 64))

    @property
    def head_dim(self) -> int:
        """The dimensions of a query head of attention."""
        own = self.options
        if 'qk_nope_head_dim' in own:
            return own['qk_nope_head_dim'] + own['qk_rope_head_dim']
        return own.get('head_dim') or self.n_embd // self.n_head


# A scaling: the published value, the published options, the user's merged values -> the value.
Scaling = Callable[[Any, Published, dict], Any]


def multiple_of_8(size: float) -> int:
    """The multiple of 8 nearest to a size."""
    return 8 * max(1, round(size / 8))


def fraction_of_pairs(fraction: float, dims: int) -> float:
    """The fraction if that of `dims` dimensions is a whole number of pairs, or else of fewer pairs,
    at least one, in six digits.
    """
    rotated = int(dims * fraction)
    if rotated > 0 and rotated % 2 == 0:
        return fraction
    pairs = max(1, rotated // 2)
    return math.ceil(2 * pairs / dims * 1e6) / 1e6  # rounded up: 0.181818 · 22 is less than 4


def _current(values: dict, key: str) -> Any:
    """A merged value, computed if it is still a function."""
    value = values.get(key)
    return value(values) if callable(value) else value


def _width(value: int, published: Published, values: dict) -> int:
    if values['n_embd'] == published.n_embd:
        return value
    return multiple_of_8(value * values['n_embd'] / published.n_embd)


def _rank(value: int, published: Published, values: dict) -> int:
    return math.ceil(value * values['n_embd'] / published.n_embd)


def _heads_of(values: dict, published: Published) -> int:
    """The user's number of heads; without attention, that of heads that shrink like attention's."""
    if 'n_head' in published.options:
        return values['n_head']
    return scaled_heads(published.n_head, published, values)


def _head_dim(value: int, published: Published, values: dict) -> int:
    ratio = values['n_embd'] * published.n_head / (_heads_of(values, published) * published.n_embd)
    return value if ratio == 1 else multiple_of_8(value * ratio)


def _heads(value: int, published: Published, values: dict) -> int:
    return max(1, round(value * _heads_of(values, published) / published.n_head))


def _kv_heads(value: int, published: Published, values: dict) -> int:
    if value == 1:
        return 1
    return kv_heads_in_groups_of(max(1, published.n_head // value), values)


def scaled_heads(value: int, published: Published, values: dict) -> int:
    """Heads of attention: both their number and their dimensions grow as √n_embd.

    Of the numbers that divide n_embd into heads of an even number of dimensions, the nearest; a
    multiple of 8 outweighs a factor below UNEVEN.
    """
    width = values['n_embd']
    if width == published.n_embd:
        return value
    ideal = value * math.sqrt(width / published.n_embd)
    divisors = [heads for heads in range(1, width // SMALLEST_HEAD + 1) if width % heads == 0]
    even = [heads for heads in divisors if width // heads % 2 == 0]

    def distance(heads: int) -> float:
        uneven = width // heads % 8 != 0
        return abs(math.log(heads / ideal)) + uneven * math.log(UNEVEN)

    return min(even or divisors or [1], key=distance)


def _value_heads(value: int, published: Published, values: dict) -> int:
    each = value // (published.options.get('gdn_heads') or value)
    return max(1, each) * (_current(values, 'gdn_heads') or values['n_head'])


def _mamba2_width(value: int, published: Published, values: dict) -> int:
    """A multiple of the dimensions of a head."""
    head_dim = _current(values, 'mamba2_head_dim')
    return head_dim * max(1, round(value * values['n_embd'] / published.n_embd / head_dim))


def _mamba2_groups(value: int, published: Published, values: dict) -> int:
    """A divisor of the number of heads, of as many heads as published."""
    own = published.options
    in_group = own['mamba2_width'] // own['mamba2_head_dim'] // value
    heads = _current(values, 'mamba2_width') // _current(values, 'mamba2_head_dim')
    return kv_heads_in_groups_of(in_group, {'n_head': heads})


def _rg_lru_width(value: int, published: Published, values: dict) -> int:
    """A multiple of the number of heads, by default those of attention."""
    heads = _current(values, 'rg_lru_heads') or values['n_head']
    return heads * max(1, round(value * values['n_embd'] / published.n_embd / heads))


def _context(value: int, published: Published, values: dict) -> int:
    length = values['block_size']
    if length == published.options['block_size']:
        return value
    return max(SMALLEST_WINDOW, round(value * length / published.options['block_size']))


def _attention_scale(value: float, published: Published, values: dict) -> float:
    """As published relative to 1 / √(dimensions of a query head), or to 1 / dimensions if it is
    exactly that, as in µP. Scores that are not scaled stay so.
    """
    if value == 1:
        return value
    if 'qk_nope_head_dim' in published.options:
        now = _current(values, 'qk_nope_head_dim') + _current(values, 'qk_rope_head_dim')
    else:
        now = _current(values, 'head_dim') or values['n_embd'] // values['n_head']
    power = 1.0 if math.isclose(value * published.head_dim, 1) else 0.5
    return value * (published.head_dim / now) ** power


def _rope_fraction(value: float, published: Published, values: dict) -> float:
    """As published, or less if it is not a whole number of pairs of the dimensions of a head."""
    head_dim = _current(values, 'head_dim') or values['n_embd'] // values['n_head']
    return fraction_of_pairs(value, head_dim)


def _deepnorm_alpha(value: float, published: Published, values: dict) -> float:
    """(2 · layers)^¼ if it is exactly that in the released model."""
    if math.isclose(value, (2 * published.options['n_layer']) ** 0.25):
        return (2 * values['n_layer']) ** 0.25
    return value


def _first_layers(value: int, published: Published, values: dict) -> int:
    """First layers of another kind, at least one if there are any."""
    layers = values['n_layer']
    return min(layers - 1, max(1, round(value * layers / published.options['n_layer'])))


def _pattern(value: str, published: Published, values: dict) -> str:
    layers = published.options['n_layer']
    if values['n_layer'] == layers:
        return value
    return scaled_pattern(expand_pattern(value, layers), values['n_layer'])


# By option; the others are as published.
SCALINGS: dict[str, Scaling] = {
    **dict.fromkeys(('d_ff', 'expert_d_ff', 'q_lora_rank', 'kv_lora_rank'), _width),
    'mamba_dt_rank': _rank,
    'n_head': scaled_heads,
    'num_kv_heads': _kv_heads,
    **dict.fromkeys(('head_dim', 'value_head_dim', 'v_head_dim'), _head_dim),
    **dict.fromkeys(('qk_nope_head_dim', 'qk_rope_head_dim'), _head_dim),
    **dict.fromkeys(('gdn_head_dim', 'gdn_v_head_dim'), _head_dim),
    **dict.fromkeys(('mamba2_head_dim', 'mamba2_state_size'), _head_dim),
    **{
        f'{mixer}_{width}': _head_dim
        for mixer in ('linear', 'retnet', 'lightning', 'gla')
        for width in ('key_dim', 'value_dim')
    },
    **dict.fromkeys(('gdn_heads', 'rg_lru_heads'), _heads),
    **{f'{mixer}_heads': _heads for mixer in ('linear', 'retnet', 'lightning', 'gla')},
    'gdn_value_heads': _value_heads,
    'mamba2_width': _mamba2_width,
    'mamba2_groups': _mamba2_groups,
    'rg_lru_width': _rg_lru_width,
    **dict.fromkeys(('sliding_window', 'attention_chunk', 'query_scale_length'), _context),
    'rope_original_block_size': _context,
    'attention_scale': _attention_scale,
    'rope_fraction': _rope_fraction,
    **dict.fromkeys(('deepnorm_mixer_alpha', 'deepnorm_ffn_alpha'), _deepnorm_alpha),
    'dense_layers': _first_layers,
    'layer_pattern': _pattern,
    'attention_pattern': _pattern,
}
# Sizes that the user or the dataset gives.
GIVEN = {'n_layer', 'n_embd', 'block_size', 'vocab_size'}


def scaled_design(options: dict) -> dict:
    """Options of a preset's form: functions of the user's sizes in place of what depends on them.

    options: those of the released model.
    """
    design = _scaled({k: v for k, v in options.items() if k not in GIVEN}, Published(options))
    if 'layer_kinds' in options:
        design['layer_kinds'] = {
            letter: _scaled(kind, Published({**options, **kind}))
            for letter, kind in options['layer_kinds'].items()
        }
    return design


def _scaled(options: dict, published: Published) -> dict:
    return {
        key: partial(_call, SCALINGS[key], value, published)
        if key in SCALINGS and value not in (None, 0)
        else value
        for key, value in options.items()
    }


def _call(scaling: Scaling, value: Any, published: Published, values: dict) -> Any:
    return scaling(value, published, values)
