"""Rank runs by validation loss, with their costs, differing options and comparability warnings.

python compare_architectures.py                      every run below the working folder
python compare_architectures.py --latest 3           the newest three by start time
python compare_architectures.py out-gpt2 out-llama/run_20260101_120000
python compare_architectures.py --baseline gpt2      differences from this architecture or run
python compare_architectures.py out-mine --format=json --fail_unless=better
python compare_architectures.py out-ladder           compute gain over the sizes of a ladder

Three steps, with plain data in between: `comparison.load` turns records into `Run` objects,
`comparison.compare` groups, ranks and tests them, `comparison.formats` renders the result. Only
records are read: no torch, and numpy only for a ladder.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import common.first_import  # noqa: F401

from common.console_output import write_text
from common.errors import ArgumentParser, run_script
from common.files import check_destination, write_file
from comparison import html_page, html_report, plots
from comparison.analysis import (
    BETTER,
    BLOCKED,
    EQUIVALENT,
    NOT_SIGNIFICANT,
    NOT_TESTED,
    PROVISIONAL,
    WORSE,
)
from comparison.answer import AnyComparison, compare_runs
from comparison.compare import Comparison
from comparison.formats import FORMATS, emphasize
from comparison.load import SCORES, read_runs

VERDICTS = (BETTER, WORSE, EQUIVALENT, NOT_SIGNIFICANT, PROVISIONAL, BLOCKED, NOT_TESTED)
EXIT_UNMET = 1  # exit code if the verdict is not one of --fail_unless


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text} is not a positive whole number')
    return int(text)


def positive_nats(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'{text} is not a positive number of nats, such as 0.01')
    return value


def verdict_list(text: str) -> list[str]:
    """The verdicts in a list such as `better,not_significant`."""
    names = [name.strip().replace('_', ' ') for name in text.split(',')]
    for name in names:
        if name not in VERDICTS:
            all_verdicts = ', '.join(verdict.replace(' ', '_') for verdict in VERDICTS)
            raise argparse.ArgumentTypeError(
                f'{name!r} is not a verdict. Choose from {all_verdicts}'
            )
    return names


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog='compare_architectures.py',
        description='Rank runs by validation loss, with costs, tests and what else differs. Of a '
        'ladder: compute gain by size.',
    )
    add = parser.add_argument
    add(
        'paths',
        nargs='*',
        type=Path,
        metavar='PATH',
        help='Run folder, folder that contains runs, or record file (default: the working folder)',
    )
    add(
        '--latest',
        type=positive_int,
        metavar='N',
        help='Number of newest runs to compare (default: all)',
    )
    add(
        '--baseline',
        metavar='NAME',
        help='Baseline: a preset, or (part of) an architecture, run or folder name (default: '
        "the study's baseline, else the oldest finished run)",
    )
    add(
        '--score',
        choices=SCORES,
        default='final',
        help='Evaluation by which a run is ranked: the last, or the one with the lowest loss, for '
        'runs with early stopping (default: final)',
    )
    add(
        '--margin',
        type=positive_nats,
        metavar='NATS',
        help='Difference in nats per token below which architectures count as equivalent, if the '
        'test shows it',
    )
    add(
        '--fail_unless',
        type=verdict_list,
        metavar='VERDICTS',
        help=f'Comma-separated verdicts; exit code {EXIT_UNMET} if the verdict (of a ladder: at '
        'the top rung) is none of them: '
        + ', '.join(verdict.replace(' ', '_') for verdict in VERDICTS),
    )
    add('--format', choices=FORMATS, default='text', help='Output format (default: text)')
    add(
        '--plot',
        type=Path,
        metavar='FILE',
        help='Plot of loss curves and Pareto fronts, or of the fits and gains of a ladder: .png, '
        '.svg or .pdf',
    )
    add('--report', type=Path, metavar='FILE', help='HTML page with all tables and plots')
    return parser.parse(argv)


def check_pictures(options: argparse.Namespace) -> None:
    """Raise UserError if --plot or --report cannot be written."""
    if options.plot:
        check_destination('--plot', options.plot, plots.SUFFIXES)
    if options.report:
        check_destination('--report', options.report, html_page.SUFFIXES)
    if options.plot or options.report:
        with plots.drawing():  # matplotlib is installed
            pass


def write_pictures(options: argparse.Namespace, comparison: AnyComparison) -> None:
    if isinstance(comparison, Comparison):
        figure = partial(plots.figure_of, comparison)
        page = partial(html_report.report_page, comparison)
    else:
        from comparison import ladder_plots, ladder_report  # with numpy, as its comparison

        figure = partial(ladder_plots.figure_of, comparison)
        page = partial(ladder_report.report_page, comparison)
    if options.plot:
        plots.save(figure, options.plot)
    if options.report:
        write_file(options.report, page().encode())


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    check_pictures(options)
    runs, skipped = read_runs(options.paths, options.latest, options.score)
    comparison = compare_runs(runs, options.baseline, skipped, options.score, options.margin)
    try:
        write_pictures(options, comparison)
    finally:  # print the text even if a picture cannot be written
        text, is_data = FORMATS[options.format](comparison), options.format != 'text'
        write_text(text if is_data else emphasize(text), end='', literal=is_data)
    verdict = comparison.main_verdict
    reached = NOT_TESTED if verdict is None else verdict.text
    return EXIT_UNMET if options.fail_unless and reached not in options.fail_unless else 0


if __name__ == '__main__':
    run_script(main)
