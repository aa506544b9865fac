"""Parameters and FLOPs of a model's blocks by kind of layers."""

from collections.abc import Iterable, Sequence

import torch.nn as nn

from components.base import Component, module_flops
from records.record_types import KindFlops, KindParameters


def inactive_params(module: nn.Module) -> int:
    """The parameters in the module that a token does not use."""
    return sum(m.inactive_params() for m in module.modules() if isinstance(m, Component))


def parameters_by_kind(letters: Sequence[str], blocks: Iterable[nn.Module]) -> list[KindParameters]:
    """The record's `startup_info.model.by_kind`. letters: the kind of each block."""
    counts: list[KindParameters] = []
    for kind, of_kind in _by_kind(letters, blocks).items():
        params = sum(parameter.numel() for block in of_kind for parameter in block.parameters())
        active = params - sum(map(inactive_params, of_kind))
        counts.append(
            {'kind': kind, 'layers': len(of_kind), 'params': params, 'active_params': active}
        )
    return counts


def flops_by_kind(
    letters: Sequence[str], blocks: Iterable[nn.Module], length: int
) -> list[KindFlops]:
    """The record's `startup_info.flops.by_kind`: training FLOPs per token.

    letters: the kind of each block. length: tokens of a sequence.
    """

    def per_token(of_kind: list[nn.Module], causal: bool) -> float:
        forward = [module_flops(block, length, causal, 'other') for block in of_kind]
        return 3.0 * sum(sum(by_part.values()) for by_part in forward) / length

    return [
        {
            'kind': kind,
            'per_token': per_token(of_kind, causal=False),
            'per_token_causal': per_token(of_kind, causal=True),
        }
        for kind, of_kind in _by_kind(letters, blocks).items()
    ]


def _by_kind(letters: Sequence[str], blocks: Iterable[nn.Module]) -> dict[str, list[nn.Module]]:
    by_kind: dict[str, list[nn.Module]] = {}
    for letter, block in zip(letters, blocks, strict=True):
        by_kind.setdefault(letter, []).append(block)
    return by_kind
