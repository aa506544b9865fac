"""A comparison as plain text, Markdown, CSV or JSON. Text from records is escaped here."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from common.console_output import bold, visible, yellow
from common.formatting import LISTED, WIDTH, first_lines, markdown_table, table, wrapped
from comparison.analysis import (
    BETTER,
    EQUIVALENT,
    NOT_SIGNIFICANT,
    NOT_TESTED,
    WORSE,
    CorrectedTest,
    Verdict,
)
from comparison.answer import AnyComparison
from comparison.compare import Comparison
from comparison.conditions import SEEDS
from comparison.costs import mean_loss_by_position
from comparison.costs_to_loss import GroupCost, cost_to_baseline
from comparison.runs import run_data
from comparison.section import Section
from comparison.tables import sample_of, sections


def one_line(text: str) -> str:
    """The text as one line, without terminal control characters."""
    return visible(text).replace('\n', '\\n').replace('\t', '\\t')


# --- Text ----------------------------------------------------------------------------------------

_TITLE = re.compile('^[A-Z]{4}[A-Z ]*(?=[ :(,]|$)', re.MULTILINE)
_FINDINGS = '|'.join((BETTER, WORSE, EQUIVALENT, NOT_SIGNIFICANT))
_VERDICT = re.compile(rf'^( *\d+ +)({_FINDINGS})(?= )', re.MULTILINE)


def render_text(comparison: AnyComparison) -> str:
    """Plain text, about 100 columns wide."""
    return '\n\n'.join(map(section_text, _all_sections(comparison))) + '\n'


def _all_sections(comparison: AnyComparison) -> list[Section]:
    if isinstance(comparison, Comparison):
        return sections(comparison)
    from comparison.ladder_tables import ladder_sections  # with numpy, as its comparison

    return ladder_sections(comparison)


def emphasize(text: str) -> str:
    """The text of a comparison with marks for `write_text`: bold titles and verdicts."""
    text = _TITLE.sub(lambda match: (yellow if match[0] == 'WARNINGS' else bold)(match[0]), text)
    return _VERDICT.sub(lambda match: match[1] + bold(match[2]), text)


def section_text(section: Section) -> str:
    parts = [visible(section.title), *(visible(wrapped(note)) for note in section.notes)]
    parts += map(visible, section.lines)
    if section.rows:
        rows = [[one_line(cell) for cell in row] for row in (section.header, *section.rows)]
        parts.append(table(rows, section.align))
    return '\n'.join([*parts, *excerpts(section.texts)])


def excerpts(texts: Sequence[tuple[str, str]]) -> list[str]:
    """The beginnings of the first texts below their headings, as lines."""
    lines = []
    for heading, text in texts[:LISTED]:
        excerpt = (f'    {line}'.rstrip() for line in first_lines(text, WIDTH - 4))
        lines += [one_line(heading), *excerpt]
    return lines + [f'and {len(texts) - LISTED} more'] * (len(texts) > LISTED)


# --- Markdown ------------------------------------------------------------------------------------

# Characters that Markdown or HTML treat as markup; an underscore only where it can open emphasis.
_MARKUP = re.compile(r'[\\`*|<>&\[\]$~@]|(?<![^\W_])_|_(?![^\W_])')


def escape_markdown(text: str) -> str:
    """The text escaped for Markdown."""
    return _MARKUP.sub(lambda match: f'&#{ord(match[0])};', one_line(text))


def render_markdown(comparison: AnyComparison) -> str:
    """The same sections as GitHub-flavored Markdown."""
    texts = []
    for section in _all_sections(comparison):
        lines = [*map(visible, section.lines), *excerpts(section.texts)]
        title = escape_markdown(' '.join(section.title.split()))
        parts = [f'### {title}' if section.rows or lines else title]
        parts += map(escape_markdown, section.notes)
        if lines:
            # Longer than any run of backticks in the lines, so that none closes the block.
            fence = '`' * max(3, 1 + max(map(len, re.findall('`*', '\n'.join(lines)))))
            parts.append(f'{fence}\n' + '\n'.join(lines) + f'\n{fence}')
        if section.rows:
            rules = ['---:' if side == '>' else ':---' for side in section.align]
            header, *rows = (
                [escape_markdown(cell) for cell in row] for row in (section.header, *section.rows)
            )
            parts.append('\n'.join(markdown_table(header, rows, rules)))
        texts.append('\n\n'.join(parts))
    return '\n\n'.join(texts) + '\n'


# --- Data ----------------------------------------------------------------------------------------


def render_csv(comparison: AnyComparison) -> str:
    """One line per run, with unformatted numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    runs = list(answer_data(comparison)['runs'])
    writer.writerow(runs[0] if runs else [])
    for run in runs:
        writer.writerow(map(csv_cell, run.values()))
    return out.getvalue()


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet interprets as a formula."""
    if value is None:
        return ''
    if isinstance(value, str):
        text = one_line(value)
        return f"'{text}" if text.startswith(('=', '+', '-', '@')) else text
    return value


def render_json(comparison: AnyComparison) -> str:
    return json.dumps(answer_data(comparison), indent=1, allow_nan=False, default=str) + '\n'


def answer_data(comparison: AnyComparison) -> dict[str, Any]:
    """The whole comparison, or that of a ladder, as plain values."""
    if isinstance(comparison, Comparison):
        return comparison_data(comparison)
    from comparison.ladder_data import ladder_data

    return ladder_data(comparison)


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison as plain values: verdict, groups, effects, warnings and runs."""
    costs_to_loss = dict(enumerate(cost_to_baseline(comparison), 1))
    return {
        'baseline': comparison.baseline_label,
        'score': comparison.score,
        'margin': comparison.margin,
        'verdict': main_verdict_data(comparison),
        'groups': [
            _group_data(comparison, rank, verdict)
            | {'cost_to_baseline': _cost_to_loss_data(costs_to_loss.get(rank))}
            for rank, verdict in enumerate(comparison.verdicts, 1)
        ],
        'equal_cost': [row._asdict() for row in comparison.equal_cost],
        'effects': [
            {**effect._asdict(), **_test_data(correction)}
            for effect, correction in comparison.effects
        ],
        'interactions': [
            {**interaction._asdict(), **_test_data(correction)}
            for interaction, correction in comparison.interactions
        ],
        'options_that_differ': comparison.options,
        'notes': comparison.notes,
        'loss_warnings': comparison.loss_warnings,
        'speed_warnings': comparison.speed_warnings,
        'code_warning': comparison.code_warning,
        'ladder_warning': comparison.ladder_warning,
        'skipped': comparison.skipped,
        'runs': [
            {'rank': rank, 'label': label, **run_data(run)}
            for rank, (group, label) in enumerate(zip(comparison.groups, comparison.labels), 1)
            for run in group.runs
        ],
    }


def main_verdict_data(comparison: Comparison) -> dict[str, Any] | None:
    """The main verdict, for scripts."""
    verdict = comparison.main_verdict
    return None if verdict is None else verdict_data(comparison, verdict)


def verdict_data(comparison: Comparison, verdict: Verdict) -> dict[str, Any]:
    """A verdict of a comparison, for scripts."""
    test = verdict.test
    reasons = list(verdict.reasons)
    if not comparison.repeated:
        reasons.insert(0, 'one seed per architecture')
    return {
        'architecture': comparison.labels[comparison.groups.index(verdict.group)],
        'baseline': comparison.baseline_label,
        'verdict': verdict.text,
        'finding': None if verdict.finding == NOT_TESTED else verdict.finding,
        'reasons': list(dict.fromkeys(reasons)),
        'difference': test and test.difference.mean,
        'interval': test and [test.interval.low, test.interval.high],
        'confidence': test and test.interval.confidence,
        'p_value': test and test.p_value,
        'equivalence_p_value': verdict.equivalence_p_value,
        'detectable': test and test.detectable,
        'comparisons': sum(v.test is not None for v in comparison.verdicts),
    }


def _test_data(correction: CorrectedTest | None) -> dict[str, Any]:
    """A corrected test as plain values."""
    if correction is None:
        return {'difference': None, 'p_value': None}
    test, interval = correction.difference, correction.interval
    return {
        'difference': {
            'mean': test.mean,
            'low': interval.low,
            'high': interval.high,
            'confidence': interval.confidence,
            'p_value': test.p_value,
            'noise': test.noise,
            'error': test.error,
            'freedom': test.freedom,
            'paired': test.paired,
            'count': min(test.counts),
            'counts': list(test.counts),
        },
        'p_value': correction.p_value,
    }


def _group_data(comparison: Comparison, rank: int, verdict: Verdict) -> dict[str, Any]:
    group = verdict.group
    first = group.runs[0]
    return {
        'rank': rank,
        'label': comparison.labels[rank - 1],
        'architecture': first.architecture,
        'val_loss': group.loss,
        'best_val_loss': group.mean(lambda run: run.best_val_loss),
        'interval': group.estimate and [group.estimate.low, group.estimate.high],
        'deviation': group.estimate and group.estimate.deviation,
        'seeds': len(group.losses),
        'outcomes': dict(group.outcomes),
        'finished': group.finished,
        'verdict': verdict.text,
        'finding': verdict.finding,
        'reasons': list(verdict.reasons),
        **_test_data(verdict.test),
        'equivalence_p_value': verdict.equivalence_p_value,
        'detectable': verdict.test and verdict.test.detectable,
        'front': comparison.fronts[rank - 1],
        'loss_by_position': [
            {'from': start, 'to': end, 'loss': loss}
            for (start, end), loss in mean_loss_by_position(group).items()
        ],
        'sample': sample_of(group),
        'runs': [str(run.folder) for run in group.runs],
    }


def _cost_to_loss_data(cost: GroupCost | None) -> dict[str, Any] | None:
    """The costs to the baseline's loss of each run, and their spread."""
    if cost is None:
        return None
    spreads = {key: cost.spread(key) for key in cost.runs[0].ratios}
    return {
        'reached': cost.reached,
        'ratios': {
            key: spread and {part: ratio._asdict() for part, ratio in spread._asdict().items()}
            for key, spread in spreads.items()
        },
        'runs': [
            {
                **{key: run.run.config.get(key) for key in SEEDS},
                **{key: value for key, value in run._asdict().items() if key != 'run'},
            }
            for run in cost.runs
        ],
    }


FORMATS: dict[str, Callable[[AnyComparison], str]] = {
    'text': render_text,
    'markdown': render_markdown,
    'csv': render_csv,
    'json': render_json,
}
