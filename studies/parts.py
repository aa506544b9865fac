"""The parts of a study: the study itself, or one for each rung of its ladder."""

from dataclasses import dataclass

from common.errors import UserError
from studies.grid import Study
from studies.ladder import Rung, build_rungs, study_at
from studies.variants import (
    RunContext,
    Variant,
    baseline_variant,
    build_variants,
    with_micro_batch,
)


@dataclass(frozen=True)
class StudyPart:
    """A study at one size, with its variants."""

    study: Study
    variants: list[Variant]
    baseline: Variant
    rung: Rung | None = None  # None without a ladder


def build_parts(study: Study, context: RunContext, jobs: int) -> list[StudyPart]:
    """A part for each rung; a single one without a ladder. Raises UserError with all problems."""
    if not study.ladder:
        return [_build_part(study, context, jobs)]
    parts: list[StudyPart] = []
    problems: list[str] = []
    for rung in build_rungs(study, context):
        try:
            parts.append(_build_part(study_at(study, rung), context, jobs, rung))
        except UserError as error:
            problems += [f'rung {rung.label}: {problem}' for problem in error.problems]
    if problems:
        raise UserError(*problems)
    return parts


def _build_part(
    study: Study, context: RunContext, jobs: int, rung: Rung | None = None
) -> StudyPart:
    variants = build_variants(study, context)
    if rung is not None and rung.extra:
        variants = [baseline_variant(study, variants)]
    study = with_micro_batch(study, variants, context, jobs)
    if study.micro_batch:
        labels = {variant.label for variant in variants}
        variants = [v for v in build_variants(study, context) if v.label in labels]
    return StudyPart(study, variants, baseline_variant(study, variants), rung)
