"""The lines of WARNINGS, and groups written by their ranks."""

from collections.abc import Sequence

from common.formatting import LISTED, join_names, nats, or_dash, wrapped
from comparison.compare import RISE, Comparison, runs_above_best
from comparison.differences import Values
from comparison.runs import DIVERGED, FINISHED, Run


def warning_lines(comparison: Comparison) -> list[str]:
    """Differences that affect comparability, unfinished runs and skipped records."""
    lines = []
    if comparison.ladder_warning:
        lines.append(wrapped(comparison.ladder_warning, '  '))
    if comparison.loss_warnings:
        lines += ['Losses are not directly comparable. Besides the architecture, these differ:']
        lines += [options_with_ranks(comparison.loss_warnings)]
        if {'tokenizer', 'vocab_size'} & comparison.loss_warnings.keys():
            lines += [
                'Across vocabularies, compare bits/byte (on the same text), not loss per token.'
            ]
    lines += _unfinished_lines(comparison) + _rise_lines(comparison)
    untrained = [rank for rank, group in enumerate(comparison.groups, 1) if group.loss is None]
    if untrained:
        lines += [f'Not ranked, without a validation loss after training: {rank_ranges(untrained)}']
    if comparison.speed_warnings:
        lines += [
            'Time and memory are not directly comparable. Besides the architecture, these differ:',
            options_with_ranks(comparison.speed_warnings),
        ]
    if comparison.best_warnings:
        lines += [
            'Best losses come from different numbers of evaluations: compare only final losses.',
            options_with_ranks(comparison.best_warnings),
        ]
    if comparison.code_warning:
        lines.append(wrapped(comparison.code_warning, '  '))
    lines += [f'Skipped {line}' for line in comparison.skipped]
    return lines


def _unfinished_lines(comparison: Comparison) -> list[str]:
    """The runs without a final loss: diverged ones, then unfinished ones."""
    diverged: list[str] = []
    unfinished: list[str] = []
    for rank, group in enumerate(comparison.groups, 1):
        for run in group.runs:
            if run.outcome != FINISHED:
                lines = diverged if run.outcome == DIVERGED else unfinished
                lines.append(f'  #{rank} {run.name}: {_run_status(run)}')
    if diverged:
        diverged.insert(0, 'Diverged, so these runs have no final loss:')
    if unfinished:
        unfinished.insert(0, 'Not finished: these runs have no final loss, so ranks may change.')
    return diverged + unfinished


def _run_status(run: Run) -> str:
    outcome = 'running or crashed' if run.outcome == 'running' else run.outcome
    return f'{outcome} {run.iters_done}/{or_dash(run.max_iters, str)}'


def _rise_lines(comparison: Comparison) -> list[str]:
    lines = []
    for rank, group in enumerate(comparison.groups, 1):
        for run in runs_above_best(group):
            above = ', and above its untrained loss' * run.blown_up
            lines.append(
                f'  #{rank} {run.name}: final {nats(run.curve[-1].loss)}, best '
                f'{or_dash(run.best_val_loss, nats)}{above}'
            )
    if lines:
        advice = '' if comparison.score == 'best' else '; --score=best ranks by the best loss'
        lines.insert(0, f'Ended more than {RISE:.0%} above the best validation loss{advice}:')
    return lines


def options_with_ranks(options: dict[str, Values]) -> str:
    """One paragraph per key: each value with the ranks that have it."""
    width = max(map(len, options))
    paragraphs = []
    for key, values in options.items():
        all_ranks = [rank for ranks in values.values() for rank in ranks]
        partial = {rank for rank in all_ranks if all_ranks.count(rank) > 1}
        values_with_ranks = [
            f'{text} ({rank_ranges(ranks)}{" in part" * bool(partial.intersection(ranks))})'
            for text, ranks in values.items()
        ]
        paragraphs.append(
            wrapped(f'  {key:{width}}  {join_names(values_with_ranks)}', ' ' * (width + 4))
        )
    return '\n'.join(paragraphs)


def rank_ranges(ranks: Sequence[int]) -> str:
    """Ascending ranks as `#1-3 #7`, with at most LISTED spans."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [f'#{first}' if first == last else f'#{first}-{last}' for first, last in spans]
    more = sum(last - first + 1 for first, last in spans[LISTED:])
    return ' '.join(texts[:LISTED]) + (f' and {more} more' if more else '')
