"""A factor of queries that grows with their position, for long contexts (Llama 4, Ministral 3)."""

from typing import NamedTuple

import torch

from common.registry import AnyBut, FrozenConfig, Option, above, at_least

_WITH_GROWTH = ('query_scale_growth', AnyBut(None))
QUERY_SCALE_OPTIONS = {
    'query_scale_growth': Option(
        float | None,
        None,
        'β of the factor 1 + β · ln(1 + ⌊(t + query_scale_offset) / query_scale_length⌋) of '
        'queries at position t; None: off',
        check=above(0),
    ),
    'query_scale_length': Option(
        int,
        8192,
        'Number of positions after which the factor of queries grows',
        check=at_least(1),
        requires=_WITH_GROWTH,
    ),
    'query_scale_offset': Option(
        int,
        0,
        'Added to the positions for the factor of queries (Llama 4: 1)',
        check=at_least(0),
        requires=_WITH_GROWTH,
    ),
}


class QueryScale(NamedTuple):
    """1 + growth · ln(1 + ⌊(t + offset) / length⌋) of a position t."""

    growth: float
    length: int
    offset: int

    def scaled(self, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Queries (B, H, T, D) at positions (T,), or (B, T) if they restart in each document."""
        steps = (positions + self.offset).div(self.length, rounding_mode='floor')
        factor = 1 + self.growth * steps.log1p()
        if positions.dim() == 2:
            factor = factor[:, None]
        return (q * factor[..., None]).to(q.dtype)


def query_scale(config: FrozenConfig) -> QueryScale | None:
    if config.get('query_scale_growth') is None:
        return None
    return QueryScale(
        config.query_scale_growth, config.query_scale_length, config.query_scale_offset
    )


def query_scale_tag(config: FrozenConfig) -> str:
    growth = config.get('query_scale_growth')
    return '' if growth is None else f'QGrow{growth:g}'
