"""Norms of queries and keys in attention (QK norm): their options, scope and position."""

import torch
import torch.nn as nn

from common.registry import AnyBut, FrozenConfig, Option, tag_of
from components.base import Component, Initial
from model_config import (
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    ModelArchitectureConfig,
)

_WITH_NORM = ('qk_norm', AnyBut('none'))
QK_NORM_OPTIONS = {
    'qk_norm': Option(str, 'none', 'Norm of queries and keys (QK norm)', choices=NORM_REGISTRY),
    'qk_norm_scope': Option(
        str,
        'head',
        'Scope of QK norm: each head, with weights that heads share (head) or with weights for '
        'each head (each_head), or the whole projection',
        choices=('head', 'each_head', 'projection'),
        requires=_WITH_NORM,
    ),
    'qk_norm_position': Option(
        str,
        'before_rotation',
        'Position of QK norm, before or after the rotation by positions',
        choices=('before_rotation', 'after_rotation'),
        requires=_WITH_NORM,
    ),
}
_SCOPE_TAGS = {'head': '', 'each_head': 'each', 'projection': 'proj'}


class NormOfEachHead(Component, nn.Module):
    """A norm of each head with a weight, and a bias if the norm has one, for each dimension of each
    head: (…, H, D) -> (…, H, D) (Cohere's Command R+; Stable LM 2 12B)."""

    part = 'normalization'
    mup_rule = True

    def __init__(self, config: ModelArchitectureConfig, heads: int, head_dim: int):
        super().__init__()
        norm = NORM_REGISTRY[config.qk_norm]
        self.heads = heads
        self.plain_norm = NORM_REGISTRY[norm.plain](config, head_dim)
        self.weight = nn.Parameter(torch.empty(heads * head_dim))
        self.bias = nn.Parameter(torch.empty(heads * head_dim)) if norm.has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.plain_norm(x) * self.weight.unflatten(0, (self.heads, -1))
        return y if self.bias is None else y + self.bias.unflatten(0, (self.heads, -1))

    def initial_values(self) -> dict:
        return {'weight': Initial.ones, 'bias': Initial.zeros}


def qk_norms(
    config: ModelArchitectureConfig, q_rows: int, k_rows: int
) -> list[tuple[nn.Module, int]]:
    """The norms of queries and of keys, each with the number of dimensions that it normalizes.

    q_rows, k_rows: dimensions of all heads.
    """
    norm, scope = NORM_REGISTRY[config.qk_norm], config.get('qk_norm_scope')
    if scope == 'each_head':
        dim = config.head_dim
        return [(NormOfEachHead(config, rows // dim, dim), dim) for rows in (q_rows, k_rows)]
    dims = (q_rows, k_rows) if scope == 'projection' else (config.head_dim, config.head_dim)
    return [(norm(config, dim), dim) for dim in dims]


def qk_norm_tag(config: FrozenConfig) -> str:
    """Its part of the architecture's name; '' without a norm."""
    if config.get('qk_norm') in (None, 'none'):
        return ''
    tag = f'QK{tag_of(NORM_REGISTRY[config.qk_norm], config)}{_SCOPE_TAGS[config.qk_norm_scope]}'
    return tag + ('rot' if config.get('qk_norm_position') == 'after_rotation' else '')


def qk_norm_problems(config: ModelArchitectureConfig) -> list[str]:
    """Values of its options that mean nothing, a sentence each."""
    problems = []
    norm = NORM_REGISTRY[config.qk_norm]
    if config.get('qk_norm_scope') == 'each_head' and getattr(norm, 'plain', None) is None:
        able = [name for name in NORM_REGISTRY if getattr(NORM_REGISTRY[name], 'plain', None)]
        problems.append(
            f"qk_norm_scope='each_head' needs a norm with weights that are apart from its "
            f'statistics, but qk_norm={config.qk_norm!r} is chosen. Choose a qk_norm of '
            f'{", ".join(able)}, or --qk_norm_scope=head.'
        )
    rotates = POSITION_ENCODING_REGISTRY[config.position_encoding].rotates()
    if config.get('qk_norm_position') == 'after_rotation' and not rotates:
        problems.append(
            f"qk_norm_position='after_rotation' has no effect: position_encoding="
            f'{config.position_encoding!r} rotates nothing. Remove qk_norm_position.'
        )
    return problems
