"""Order of the rows of queries and keys, for rotations of other pairs of dimensions than ours."""

import torch

from interop.layers import num_kv_heads_of
from model_config import ModelArchitectureConfig


def rows_of_interleaved_head(head_dim: int, rotated: int) -> torch.Tensor:
    """The order of a head's rows, the first `rotated` of which are rotated: theirs rotates
    dimensions 2i and 2i + 1 together, ours i and i + rotated / 2."""
    rows = torch.arange(head_dim)
    return torch.cat((rows[:rotated].view(-1, 2).T.flatten(), rows[rotated:]))


def interleaved_rows(config: ModelArchitectureConfig) -> torch.Tensor:
    """The order of the rows of stacked queries, keys and values, for such a rotation."""
    rotated = int(config.head_dim * config.rope_fraction) if 'rope_fraction' in config else 0
    head = rows_of_interleaved_head(config.head_dim, rotated)
    heads, shared = config.n_head, num_kv_heads_of(config)
    rows = torch.arange((heads + 2 * shared) * config.head_dim).view(-1, config.head_dim)
    turned, unchanged = rows.split((heads + shared, shared))
    return torch.cat((turned[:, head], unchanged)).flatten()
