"""The options of runs as they are shown: flat, and one way of writing for each architecture."""

from collections.abc import Callable, Iterable
from typing import Any

from common.dict_option import flat_options
from comparison.runs import Run

# The device decides on it: runs of one architecture may differ in it.
DEVICE_CHOICES = frozenset({'attention_backend'})


def shown_options(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The options of each run, with dotted names such as `layer_kinds.L.sliding_window`.

    The same layers can be written in several ways: all runs of one architecture show the options of
    the first of them.
    """
    return _shown(runs, lambda run: run.config)


def shown_choices(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The same for the options of the architecture only."""
    return _shown(runs, lambda run: run.choices)


def _shown(
    runs: Iterable[Run], options_of: Callable[[Run], dict[str, Any]]
) -> list[dict[str, Any]]:
    first: dict[str, Run] = {}
    shown = []
    for run in runs:
        same = first.setdefault(run.architecture_hash, run)
        options = options_of(run)
        if same.choices != run.choices:
            own = run.choices.keys() - DEVICE_CHOICES
            written = same.choices.keys() - DEVICE_CHOICES
            options = {key: value for key, value in options.items() if key not in own}
            options |= {key: value for key, value in options_of(same).items() if key in written}
        shown.append(flat_options(options))
    return shown
