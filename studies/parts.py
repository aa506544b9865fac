"""The parts of a study: the study itself, or one for each rung of its ladder."""

from dataclasses import dataclass

from common.errors import UserError
from common.formatting import join_names
from components.width_rules import follows_mup, mup_problems
from model_builder import build_model
from studies.grid import Study
from studies.ladder import Rung, build_rungs, study_at
from studies.variants import (
    RunContext,
    Variant,
    baseline_variant,
    build_variants,
    with_micro_batch,
)
from training_config import OPTIMIZER_REGISTRY


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
    if study.transfer == 'mup' and not problems:
        problems = _transfer_problems(study, parts)
    if problems:
        raise UserError(*problems)
    return parts


def _transfer_problems(study: Study, parts: list[StudyPart]) -> list[str]:
    """Reasons why learning rate and initialization do not follow the width of the rungs."""
    begin, problems = f"{study.path}: transfer='mup'", []
    smallest, *larger = parts
    for variant in smallest.variants:
        narrow = build_model(variant.settings.architecture)
        wider = [v for part in larger for v in part.variants if v.label == variant.label]
        of_rungs = (mup_problems(narrow, build_model(v.settings.architecture)) for v in wider)
        problems += next(filter(None, of_rungs), [])  # of one rung, since those of others are alike
        optimizer = variant.settings.run.optimizer
        if not follows_mup(OPTIMIZER_REGISTRY[optimizer]):
            names = join_names(
                [n for n in OPTIMIZER_REGISTRY if follows_mup(OPTIMIZER_REGISTRY[n])]
            )
            problems.append(
                f'optimizer={optimizer!r} states no rule for learning rates that follow the width. '
                f'Optimizers with one: {names}.'
            )
    if len({part.baseline.settings.architecture.n_embd for part in parts}) == 1:
        problems.append('all rungs have the same n_embd, so it has no effect. Remove transfer.')
    return [f'{begin}: {problem}' for problem in dict.fromkeys(problems)]


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
