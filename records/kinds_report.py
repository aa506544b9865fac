"""The kinds of layers of a model in reports: what differs, their parameters and FLOPs."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.architecture_identity import without_short_forms
from common.formatting import flop_count, percent
from common.layer_pattern import compact_pattern
from records.record_types import FlopsInfo, LayerChoices, ModelInfo
from records.report_layout import field_line, total_table


def kinds_section(layers: LayerChoices, model: ModelInfo, flops: FlopsInfo) -> list[str]:
    """The pattern, the options in which kinds differ, and a table of parameters and FLOPs.

    FLOPs are those of training a token, with causal attention. Asserts that no kind exceeds the
    whole.
    """
    differences = kind_differences(layers['kinds'])
    return [
        field_line('Layer Pattern', pattern_text(layers['letters'])),
        *(
            field_line(f'Layers {kind}', ', '.join(f'{key}={own[key]}' for key in own))
            for kind, own in differences.items()
        ),
        '',
        *kinds_table(model, flops),
    ]


def pattern_text(letters: Sequence[str]) -> str:
    """`LLLGLLLG (6 L, 2 G)`: a pattern of these layers, and the number of each kind."""
    counts = ', '.join(f'{letters.count(kind)} {kind}' for kind in dict.fromkeys(letters))
    single = all(len(letter) == 1 for letter in letters)
    return f'{compact_pattern("".join(letters))} ({counts})' if single else counts


def kind_differences(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each kind its values of the options that are not equal in all kinds."""
    missing = object()
    kinds = {kind: without_short_forms(options) for kind, options in kinds.items()}
    first, *others = kinds.values()
    keys = dict.fromkeys(key for options in kinds.values() for key in options)
    differing = [
        key
        for key in keys
        if any(other.get(key, missing) != first.get(key, missing) for other in others)
    ]
    return {
        kind: {key: options[key] for key in differing if key in options}
        for kind, options in kinds.items()
    }


def kinds_table(model: ModelInfo, flops: FlopsInfo) -> list[str]:
    """Parameters and causal FLOPs of the blocks of each kind; the rest of the model; the total."""
    counts, of_flops = model['by_kind'], flops['by_kind']
    total, all_flops = model['total_params'], flops['per_token_causal']
    outside = total - sum(kind['params'] for kind in counts)
    flops_outside = all_flops - sum(kind['per_token_causal'] for kind in of_flops)
    assert outside >= 0 and flops_outside >= -1e-9 * all_flops, (counts, of_flops)

    def row(layers: int | None, params: int, per_token: float) -> list[str]:
        figures = [f'{params:,}', percent(params, total)]
        figures += [flop_count(per_token), percent(per_token, all_flops)]
        return ['' if layers is None else f'{layers:,}', *figures]

    rows = {
        kind['kind']: row(kind['layers'], kind['params'], its_flops['per_token_causal'])
        for kind, its_flops in zip(counts, of_flops, strict=True)
    }
    rows['rest of the model'] = row(None, outside, max(0.0, flops_outside))
    rows['total'] = row(sum(kind['layers'] for kind in counts), total, all_flops)
    return total_table('Kind', ['layers', 'parameters', 'share', 'causal FLOPs', 'share'], rows)
