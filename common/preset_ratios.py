"""What presets share: Llama's options, and sizes as ratios of the model's own."""

from functools import partial

LLAMA = {
    'normalization': 'rmsnorm',
    'position_encoding': 'rope',
    'ffn_type': 'swiglu',
    'norm_position': 'pre',
    'bias': False,
    'weight_tying': False,
    'dropout': 0.0,
}


def kv_heads_in_groups_of(group: int, values: dict) -> int:
    """Number of key/value heads if `group` query heads, or the next lower divisor, share one."""
    heads = values['n_head']
    return next(heads // n for n in range(group, 0, -1) if heads % n == 0)


GROUPS_OF_FOUR = {
    'use_gqa': True,
    'num_kv_heads': partial(kv_heads_in_groups_of, 4),
    'd_ff': lambda values: 7 * values['n_embd'] // 2,
}


def multiple_of_8(ratio: float, values: dict) -> int:
    """The multiple of 8 nearest to ratio · n_embd."""
    return 8 * max(1, round(ratio * values['n_embd'] / 8))


def head_dim(ratio: float, values: dict) -> int:
    """The dimensions of a head of which all together are ratio · n_embd wide, a multiple of 8."""
    return multiple_of_8(ratio / values['n_head'], values)
