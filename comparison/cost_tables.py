"""The tables COST, LOSS AT EQUAL COST and COST TO BASELINE LOSS."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from common.formatting import duration, nats, or_dash, si
from comparison.compare import Comparison
from comparison.costs import COSTS
from comparison.costs_to_loss import GroupCost, Ratio, Spread, cost_to_baseline
from comparison.groups import Metric
from comparison.runs import DIVERGED, Run
from comparison.section import Section

COST_TO_BASELINE = 'COST TO BASELINE LOSS'


class Column(NamedTuple):
    """A column: its name, the metric of a run, and the format."""

    name: str
    metric: Metric
    form: Callable[[float], str]
    weight: Metric = lambda run: 1.0  # of a run in its group's mean


def cost_section(comparison: Comparison) -> Section:
    columns, notes = _columns(comparison), []
    if comparison.concurrent > 1:
        notes.append(
            f'{comparison.concurrent} runs trained at the same time, so times are not compared.'
        )
    header = ['#', *(column.name for column in columns)]
    rows = [
        [
            str(rank),
            *(or_dash(group.mean(column.metric, column.weight), column.form) for column in columns),
        ]
        for rank, group in enumerate(comparison.groups, 1)
    ]
    if comparison.repeated and any(comparison.fronts):
        header.append('front')
        rows = [[*row, front or '-'] for row, front in zip(rows, comparison.fronts)]
        notes.append(_front_note(comparison))
    header.append('architecture' if comparison.repeated else 'run')
    firsts = [group.runs[0] for group in comparison.groups]
    names = [run.architecture if comparison.repeated else str(run.folder) for run in firsts]
    rows = [[*row, name] for row, name in zip(rows, names)]
    title = 'COST (FLOPs count the causal half of attention; MFU counts the full square)'
    return Section(title, notes, header, rows, '>' * (len(header) - 1) + '<')


def _columns(comparison: Comparison) -> list[Column]:
    columns = [Column('params', lambda run: run.params, si)]
    # Without experts, active parameters equal all parameters.
    if any(group.runs[0].active_params != group.runs[0].params for group in comparison.groups):
        columns.append(Column('active', lambda run: run.active_params, si))
    columns.append(Column('FLOPs/token', lambda run: run.causal_flops_per_token, si))
    if comparison.concurrent == 1:
        columns += [
            Column('MFU', lambda run: run.mfu_percent, '{:.2f}%'.format, _peak_seconds),
            Column('tokens/s', lambda run: run.tokens_per_sec, '{:,.0f}'.format, _seconds),
            Column('ms/iter', lambda run: run.time_ms, '{:,.1f}'.format),
            Column('wall', lambda run: run.wall_seconds, duration),
        ]
    return [*columns, Column('peak GB', lambda run: run.peak_memory_gb, '{:.2f}'.format)]


def _seconds(run: Run) -> float | None:
    """Weight of a rate, so that the mean over runs is total work over total time."""
    return run.train_seconds


def _peak_seconds(run: Run) -> float | None:
    return run.train_seconds and run.train_seconds * (run.peak_tflops or 1.0)


def _front_note(comparison: Comparison) -> str:
    letters_present = set(''.join(comparison.fronts))
    meanings = [
        f'{title.split(",")[0].removesuffix(" of training").removeprefix("peak ")} ({letter})'
        for letter, (title, _) in comparison.front_costs.items()
        if letter in letters_present
    ]
    return f'front: no other has a lower loss at the same or lower cost in {", ".join(meanings)}.'


def equal_cost_section(comparison: Comparison) -> Section | None:
    if not comparison.equal_cost:
        return None
    amounts = {'tokens': si, 'flops': si, 'seconds': duration}
    units = {**COSTS, 'seconds': 'of training'}
    header = [f'{amounts[c.cost](c.amount)} {units[c.cost]}' for c in comparison.equal_cost]
    rows = [
        [str(rank), *(or_dash(c.losses[rank - 1], nats) for c in comparison.equal_cost)]
        for rank in range(1, len(comparison.groups) + 1)
    ]
    notes = [
        'Losses at the largest cost that all runs have reached, interpolated between evaluations. '
        'A run whose learning-rate schedule continues beyond that point has not decayed fully.'
    ]
    return Section('LOSS AT EQUAL COST', notes, ['#', *header], rows, '>' * (1 + len(header)))


def cost_to_baseline_section(comparison: Comparison) -> Section | None:
    costs = cost_to_baseline(comparison)
    if not costs:
        return None
    keys = cost_to_baseline_keys(costs)
    rows = [
        [str(rank), *cost_to_baseline_cells(group, keys), label]
        for rank, (group, label) in enumerate(zip(costs, comparison.labels), 1)
    ]
    notes = cost_to_baseline_notes(costs, comparison.score)
    if comparison.loss_warnings:
        notes.append('These losses are not directly comparable: see WARNINGS.')
    header = ['#', *cost_to_baseline_header(keys), 'architecture']
    return Section(COST_TO_BASELINE, notes, header, rows, '>' * (len(header) - 1) + '<')


def cost_to_baseline_keys(costs: Sequence[GroupCost]) -> list[str]:
    """The costs that are known for all runs of some group."""
    return [key for key in COSTS if any(group.spread(key) for group in costs)]


def cost_to_baseline_header(keys: Sequence[str]) -> list[str]:
    return ['reached', *(COSTS[key] for key in keys)]


def cost_to_baseline_cells(group: GroupCost, keys: Sequence[str]) -> list[str]:
    """How many runs reach the loss, and the spread of each cost."""
    reached = f'{group.reached} of {len(group.runs)}'
    if group.diverged:
        reached += f', {group.diverged} {DIVERGED}'
    return [reached, *(or_dash(group.spread(key), spread_text) for key in keys)]


def cost_to_baseline_notes(costs: Sequence[GroupCost], score: str) -> list[str]:
    paired = [run.paired for group in costs for run in group.runs]
    reference = f"the {score} loss of the baseline's run with the same seeds"
    if not all(paired):
        reference += f' (for {paired.count(False)} runs without one: the mean of its runs)'
    several = ' Median and range over seeds.' * any(len(group.runs) > 1 for group in costs)
    return [
        f'Where the validation loss first reaches {reference}: the cost so far over the total of '
        f'the baseline, interpolated between evaluations.{several} ">": not reached by the end '
        'of a run of this cost. A loss reached before the learning rate has decayed would be '
        'reached sooner by a shorter schedule.'
    ]


def spread_text(spread: Spread) -> str:
    """The median and the range: `0.83 (0.80 to > 1.00)`; one number if all runs are equal."""
    median, low, high = map(ratio_text, spread)
    return low if low == high else f'{median} ({low} to {high})'


def ratio_text(ratio: Ratio) -> str:
    return (
        DIVERGED if ratio.relation == DIVERGED else f'{ratio.relation} {ratio.value:.2f}'.lstrip()
    )
