"""The rows of an interval plot as plain data: verdicts and main effects."""

from typing import NamedTuple

from common.dict_option import short_name, text_of
from comparison.analysis import BETTER, BLOCKED, PROVISIONAL, WORSE
from comparison.compare import Comparison
from comparison.picture_labels import ellipsized, short_labels
from comparison.significance import ALPHA


class IntervalRow(NamedTuple):
    """A difference with its interval."""

    text: str
    mean: float
    low: float | None
    high: float | None
    finding: str | None  # BETTER or WORSE if significant


def difference_rows(comparison: Comparison) -> list[IntervalRow]:
    """The difference of each group from the baseline, with the interval of its test."""
    rows = []
    for rank, verdict in enumerate(comparison.verdicts, 1):
        test = verdict.test
        if test is None:
            continue
        note = f' ({verdict.text})' if verdict.text in (BLOCKED, PROVISIONAL) else ''
        rows.append(
            IntervalRow(
                f'#{rank} {short_labels(comparison)[rank - 1]}{note}',
                test.difference.mean,
                test.interval.low,
                test.interval.high,
                verdict.text if verdict.text in (BETTER, WORSE) else None,
            )
        )
    return rows


def effect_rows(comparison: Comparison) -> list[IntervalRow]:
    """The main effect of each value in the grid."""
    several = len({effect.option for effect, _ in comparison.effects}) > 1
    rows = []
    for effect, correction in comparison.effects:
        if effect.mean is None:
            continue
        option = f'{short_name(effect.option)}: ' * several
        value, against = (ellipsized(text_of(each)) for each in (effect.value, effect.against))
        text = f'{option}{value} against {against}'
        if correction is None:
            rows.append(IntervalRow(text, effect.mean, None, None, None))
            continue
        significant = correction.p_value < ALPHA
        finding = (BETTER if effect.mean < 0 else WORSE) if significant else None
        low, high, _ = correction.interval
        rows.append(IntervalRow(text, effect.mean, low, high, finding))
    return rows
