"""Order of the rows of queries, keys and values that other programs rotate or group differently."""

import torch

from interop.layers import num_kv_heads_of
from model_config import ModelArchitectureConfig


def rows_of_interleaved_head(head_dim: int, rotated: int) -> torch.Tensor:
    """The order of a head's rows, the first `rotated` of which are rotated: theirs rotates
    dimensions 2i and 2i + 1 together, ours i and i + rotated / 2."""
    rows = torch.arange(head_dim)
    return torch.cat((rows[:rotated].view(-1, 2).T.flatten(), rows[rotated:]))


def rows_of_half_rotated_head(head_dim: int, rotated: int) -> torch.Tensor:
    """The order of a head's rows, `rotated` of which are rotated: theirs rotates dimensions i and
    i + head_dim / 2 together for the first i, ours i and i + rotated / 2."""
    rows, pairs = torch.arange(head_dim).view(2, -1), rotated // 2
    return torch.cat((rows[:, :pairs].flatten(), rows[:, pairs:].flatten()))


def half_rotated_rows(config: ModelArchitectureConfig) -> torch.Tensor:
    """The order of the rows of stacked queries, keys and values, for such a rotation."""
    rotated = int(config.head_dim * config.rope_fraction)
    return _with_rows_of_heads(rows_of_half_rotated_head(config.head_dim, rotated), config)


def negated_rows(config: ModelArchitectureConfig) -> torch.Tensor:
    """The order of the rows of stacked queries, keys and values, for a rotation of whole heads by
    the negated angles: the halves of each head are exchanged."""
    return _with_rows_of_heads(torch.arange(config.head_dim).roll(config.head_dim // 2), config)


def rows_grouped_by_kv_head(config: ModelArchitectureConfig) -> torch.Tensor:
    """The order of rows, where theirs has, for each key/value head in turn, the queries that share
    it, the key and the value."""
    shared = num_kv_heads_of(config)
    rows = torch.arange((config.n_head + 2 * shared) * config.head_dim)
    queries, key, value = rows.view(shared, -1, config.head_dim).split(
        (config.n_head // shared, 1, 1), dim=1
    )
    return torch.cat((queries.flatten(), key.flatten(), value.flatten()))


def interleaved_rows(config: ModelArchitectureConfig) -> torch.Tensor:
    """The order of the rows of stacked queries, keys and values, for such a rotation."""
    rotated = int(config.head_dim * config.rope_fraction) if 'rope_fraction' in config else 0
    return _with_rows_of_heads(rows_of_interleaved_head(config.head_dim, rotated), config)


def _with_rows_of_heads(head: torch.Tensor, config: ModelArchitectureConfig) -> torch.Tensor:
    """The order of the rows of stacked queries, keys and values, from that of each query or key
    head."""
    heads, shared = config.n_head, num_kv_heads_of(config)
    rows = torch.arange((heads + 2 * shared) * config.head_dim).view(-1, config.head_dim)
    turned, unchanged = rows.split((heads + shared, shared))
    return torch.cat((turned[:, head], unchanged)).flatten()
