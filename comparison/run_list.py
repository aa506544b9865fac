"""Runs for a notebook: one row per run, one row per logged point, and the comparison's verdicts.

    runs = load_runs('out')
    pandas.DataFrame(runs.rows())
    pandas.DataFrame(runs.curves())
    runs.compare(baseline='gpt2')['verdict']

Everything returned is a plain list or dict.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from comparison.answer import compare_runs
from comparison.baseline import group_labels
from comparison.compare import training_key, varied_options
from comparison.formats import render_json
from comparison.groups import group_runs
from comparison.load import RECORD_ERRORS, read_runs, skip_reason
from comparison.record_fields import count, entries, mapping, required
from comparison.runs import Run, run_data, tokens_seen
from comparison.shown_options import shown_options
from records.record import read_record

# The columns of `curves` besides those that name the run, in order. None where a row has no value.
CURVE_COLUMNS = (
    *('kind', 'iter', 'tokens_seen', 'flops', 'train_seconds', 'epochs'),
    *('loss', 'train_loss', 'val_loss', 'val_bits_per_byte', 'lr', 'grad_norm'),
    *('time_ms', 'tokens_per_sec', 'mfu_percent', 'mfu_causal_percent', 'hfu_percent'),
    *('achieved_tflops', 'peak_gb', 'loss_scale'),
)
READING = 'readings.'  # prefix of the columns of values that components report


class RunList(Sequence[Run]):
    """Runs, newest first, as `load_runs` returns them.

    skipped: one line for each record that could not be read, and why.
    score: whether `val_loss` is that of the final evaluation or of the best.
    """

    def __init__(
        self, runs: Sequence[Run], skipped: Sequence[str] = (), score: str = 'final'
    ) -> None:
        self._runs = list(runs)
        self.skipped = list(skipped)
        self.score = score

    @overload
    def __getitem__(self, index: int) -> Run: ...

    @overload
    def __getitem__(self, index: slice) -> 'RunList': ...

    def __getitem__(self, index: int | slice) -> 'Run | RunList':
        if isinstance(index, slice):
            return RunList(self._runs[index], self.skipped, self.score)
        return self._runs[index]

    def __len__(self) -> int:
        return len(self._runs)

    def __repr__(self) -> str:
        lines = [f'{len(self)} runs', *(f'  {run!r}' for run in self)]
        if self.skipped:
            lines.append(f'{len(self.skipped)} skipped:')
            lines += [f'  {line}' for line in self.skipped]
        return '\n'.join(lines)

    def rows(self, options: bool = True) -> list[dict[str, Any]]:
        """One dict per run: its name, how it ended, its losses and its costs.

        The keys are those of `compare_architectures.py --format=json`. None is an unknown value.
        Every option that is not the same in all runs follows under its own name, unless `options`
        is False.
        """
        labels = self._labels()
        rows = [{'label': label, **run_data(run)} for run, label in zip(self, labels)]
        if options:
            shown = shown_options(self)
            for key in varied_options([[of_run] for of_run in shown]):
                for row, of_run in zip(rows, shown):
                    row.setdefault(key, of_run.get(key))
        return rows

    def curves(self) -> list[dict[str, Any]]:
        """One dict per logged iteration and per evaluation, run after run, by rising iteration.

        `kind` says which of the two a row is. The keys are those of the record: `loss` is that of a
        logged batch, `train_loss` and `val_loss` are means over an evaluation. None stands where a
        row has no such value. `flops` is the training compute so far, with attention over its
        causal half. Values that components report follow as `readings.NAME`.

        A run whose record cannot be read is skipped with a warning.
        """
        rows: list[dict[str, Any]] = []
        for run, label in zip(self, self._labels()):
            names = {
                'label': label,
                'run': run.name,
                'seed': run.config.get('seed'),
                'data_seed': run.config.get('data_seed'),
            }
            try:
                rows += [{**names, **row} for row in _curve_rows(run)]
            except RECORD_ERRORS as error:
                warnings.warn(f'skipped {skip_reason(run.folder, error)}', stacklevel=2)
        readings = dict.fromkeys(key for row in rows for key in row if key.startswith(READING))
        return [{**row, **{key: row.get(key) for key in readings}} for row in rows]

    def compare(self, baseline: str | None = None, margin: float | None = None) -> dict[str, Any]:
        """The verdicts, groups, effects and warnings: the JSON output of the comparison as a dict.

        baseline: a preset, or (part of) the name of an architecture, run or folder; None: the
        baseline of the study, else the oldest finished run.
        margin: difference in nats per token below which architectures count as equivalent.
        """
        comparison = compare_runs(self, baseline, self.skipped, self.score, margin)
        return json.loads(render_json(comparison))

    def _labels(self) -> list[str]:
        """For each run the label of its architecture, the same for all of its seeds."""
        oldest_first = sorted(self, key=lambda run: run.start)
        groups = group_runs(oldest_first, training_key)
        keys = [training_key(group.runs[0]) for group in groups]
        label_of = dict(zip(keys, group_labels(groups)))
        return [label_of[training_key(run)] for run in self]


def load_runs(
    *paths: str | os.PathLike[str], latest: int | None = None, score: str = 'final'
) -> RunList:
    """The runs at or below the paths, newest first; without a path, below the working folder.

    A path is a run folder, a folder that contains runs (of a study, for example), or a record file.
    latest: how many of the newest runs to load; None: all.
    score: 'final' or 'best', the evaluation whose loss is a run's `val_loss`.

    A record that cannot be read is skipped with a warning, and listed in `skipped`. Raises
    UserError where a path does not exist or no run can be read.
    """
    runs, skipped = read_runs([Path(path).expanduser() for path in paths], latest, score)
    for line in skipped:
        warnings.warn(f'skipped {line}', stacklevel=2)
    return RunList(runs, skipped, score)


def _curve_rows(run: Run) -> list[dict[str, Any]]:
    """The logged iterations and evaluations of a run by rising iteration, each with all columns.

    An evaluation comes before the iteration of the same number: its `iter` counts completed
    iterations, and the batch of that number is the next.
    """
    record: Mapping[str, Any] = read_record(run.folder)
    tokens_per_iter = run.conditions['tokens_per_iter'][-1]
    rows = []
    for entry in entries(record, 'eval_steps'):
        tokens = tokens_seen(entry, tokens_per_iter)
        rows.append({'kind': 'evaluation', **entry, 'tokens_seen': tokens})
    for entry in entries(record, 'training_iterations'):
        rows.append(
            {
                'kind': 'iteration',
                **entry,
                **mapping(entry, 'mfu'),
                **mapping(entry, 'memory'),
                'grad_norm': mapping(entry, 'gradients').get('norm'),
                **{f'{READING}{k}': value for k, value in mapping(entry, 'readings').items()},
            }
        )
    by_iteration = sorted(rows, key=lambda row: required(count(row, 'iter'), 'iter'))
    return [_with_all_columns(row, run.causal_flops_per_token) for row in by_iteration]


def _with_all_columns(row: dict[str, Any], flops_per_token: float | None) -> dict[str, Any]:
    tokens = count(row, 'tokens_seen')
    if tokens is not None and flops_per_token is not None:
        row['flops'] = tokens * flops_per_token
    columns = (*CURVE_COLUMNS, *(key for key in row if key.startswith(READING)))
    return {column: row.get(column) for column in columns}
