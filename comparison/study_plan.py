"""The plan that `study.py` writes beside its runs, and the variant of a run."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.record_fields import entries, mapping, number, required, text


@dataclass(frozen=True, eq=False)
class StudyPlan:
    """The content of study.json."""

    question: str
    command: str
    budget: dict
    tuned: list[str]
    variants: dict[str, dict]  # label -> the options that it sets
    folders: dict[str, str]  # folder of a trial -> label of its variant
    baseline: str | None  # label of the variant that others are compared with
    tuning: dict[str, dict]  # label -> its best value of each tuned option
    at_edge: dict[str, list[str]]  # label -> options whose best value is the first or last tried


def study_membership(folder: Path) -> dict[str, Any]:
    """The study that contains a run folder, and the variant of the run."""
    for parent in folder.absolute().parents[:5]:
        if plan := read_study_plan(parent):
            trial = folder.absolute().parent.relative_to(parent).as_posix()
            return {'study': plan, 'variant': plan.folders.get(trial)}
    return {}


@functools.cache
def read_study_plan(folder: Path) -> StudyPlan | None:
    """The plan in a folder; None if there is no readable one."""
    try:
        plan = json.loads((folder / 'study.json').read_text(encoding='utf-8'))
        variants = {required(text(v, 'label'), 'label'): v for v in entries(plan, 'variants')}
        return StudyPlan(
            question=text(plan, 'question') or '',
            command=required(text(plan, 'command'), 'command'),
            budget={key: number(plan['budget'], key) for key in mapping(plan, 'budget')},
            tuned=[str(key) for key in plan['tuned']],
            variants={label: mapping(variant, 'asked') for label, variant in variants.items()},
            folders={trial['folder']: trial['variant'] for trial in entries(plan, 'points')},
            baseline=text(plan, 'baseline'),
            tuning={label: mapping(variant, 'tuned') for label, variant in variants.items()},
            at_edge={
                label: [str(key) for key in variant.get('tuned_at_edge') or []]
                for label, variant in variants.items()
            },
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
