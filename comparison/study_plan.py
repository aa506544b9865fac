"""The plan that `study.py` writes beside its runs, and the variant of a run."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from comparison.record_fields import count, entries, mapping, number, required, text

PLAN = 'study.json'


@dataclass(frozen=True, eq=False)
class RungPlan:
    """One of the sizes of a ladder."""

    number: int  # from 1, the smallest
    label: str
    options: dict
    params: int  # of the reference, without token table, output head and position tables
    extra: bool  # only the baseline trains it


@dataclass(frozen=True, eq=False)
class LadderPlan:
    """The sizes at which a study trains its variants."""

    horizon: dict
    transfer: str  # how learning rate and initialization follow the size
    folder: Path  # of the study
    rungs: list[RungPlan]
    plans: 'list[StudyPlan]' = field(default_factory=list)  # the study at each rung


@dataclass(frozen=True, eq=False)
class StudyPlan:
    """The content of study.json. Of a ladder: as it is at one rung, or as a whole."""

    question: str
    command: str
    budget: dict
    tuned: list[str]
    variants: dict[str, dict]  # label -> the options that it sets
    folders: dict[str, str]  # folder of a trial -> label of its variant
    baseline: str | None  # label of the variant that others are compared with
    tuning: dict[str, dict]  # label -> its best value of each tuned option
    at_edge: dict[str, list[str]]  # label -> options whose best value is the first or last tried
    ladder: LadderPlan | None = None
    rung: RungPlan | None = None  # that this plan is for; None for the whole study
    rung_indices: dict[str, int] = field(default_factory=dict)  # folder of a trial -> its rung

    @property
    def origin(self) -> 'LadderPlan | StudyPlan':
        """The study itself: the same object for all rungs of a ladder."""
        return self.ladder or self

    def at(self, trial: str) -> 'StudyPlan':
        """The plan at the rung of a trial, given by its folder."""
        if self.ladder is None or trial not in self.rung_indices:
            return self
        return self.ladder.plans[self.rung_indices[trial]]


def study_membership(folder: Path) -> dict[str, Any]:
    """The study that contains a run folder, and the variant of the run."""
    for parent in folder.absolute().parents[:5]:
        if plan := read_study_plan(parent):
            trial = folder.absolute().parent.relative_to(parent).as_posix()
            return {'study': plan.at(trial), 'variant': plan.folders.get(trial)}
    return {}


def unreadable_plan(folder: Path) -> Path | None:
    """The study.json above a run folder, if it is no readable plan."""
    plans = [parent for parent in folder.absolute().parents[:5] if (parent / PLAN).is_file()]
    return plans[0] / PLAN if plans and not any(map(read_study_plan, plans)) else None


@functools.cache
def read_study_plan(folder: Path) -> StudyPlan | None:
    """The plan in a folder; None if there is no readable one."""
    try:
        content = json.loads((folder / PLAN).read_text(encoding='utf-8'))
        trials = entries(content, 'points')
        plan = StudyPlan(
            question=text(content, 'question') or '',
            command=_text(content, 'command'),
            tuned=[str(key) for key in content['tuned']],
            folders={_text(trial, 'folder'): _text(trial, 'variant') for trial in trials},
            baseline=text(content, 'baseline'),
            **_variants(content),
        )
        return _with_ladder(plan, content, folder) if mapping(content, 'ladder') else plan
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _text(source: Mapping[str, Any], key: str) -> str:
    """A text that must be there. Raises ValueError."""
    return required(text(source, key), key)


def _variants(content: Mapping[str, Any]) -> dict[str, Any]:
    """The variants of a study or of a rung, and its budget."""
    variants = {_text(v, 'label'): v for v in entries(content, 'variants')}
    budget = mapping(content, 'budget')
    return {
        'budget': {key: number(budget, key) for key in budget},
        'variants': {label: mapping(variant, 'asked') for label, variant in variants.items()},
        'tuning': {label: mapping(variant, 'tuned') for label, variant in variants.items()},
        'at_edge': {
            label: [str(key) for key in variant.get('tuned_at_edge') or []]
            for label, variant in variants.items()
        },
    }


def _with_ladder(plan: StudyPlan, content: Mapping[str, Any], folder: Path) -> StudyPlan:
    """The plan with its ladder. Raises LookupError and ValueError if it is malformed."""
    source = content['ladder']
    ladder = LadderPlan(
        horizon=mapping(source, 'horizon'),
        transfer=text(source, 'transfer') or 'none',
        folder=folder,
        rungs=[
            RungPlan(
                number=index,
                label=_text(rung, 'label'),
                options=mapping(rung, 'options'),
                params=required(count(rung, 'params'), 'params'),
                extra=rung.get('extra') is True,
            )
            for index, rung in enumerate(entries(source, 'rungs'), 1)
        ],
    )
    indices = {
        trial['folder']: required(count(trial, 'rung'), 'rung')
        for trial in entries(content, 'points')
    }
    if not ladder.rungs or max(indices.values(), default=0) >= len(ladder.rungs):
        raise LookupError('a run is at a rung that the ladder does not have')
    whole = replace(plan, ladder=ladder, rung_indices=indices)
    for rung, own in zip(ladder.rungs, entries(source, 'rungs')):
        ladder.plans.append(replace(whole, rung=rung, **_variants(own)))
    return whole
