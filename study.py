"""Run a study: the grid of runs that a config file asks for, then the comparison.

    python study.py config/studies/gated_ffn.py
    python study.py config/studies/gated_ffn.py --jobs=2 --n_layer=4

The file is a config file of train.py with a grid beside the usual keys, for example

    sweep = {'ffn_type': ['standard', 'swiglu'], 'seed': [1, 2, 3]}

Each point is a process of its own: train.py with the options of the point, in a folder of its own
below out_dir. Points that are complete are skipped, interrupted ones resumed, failed ones reported
and tried again the next time; one that diverged is complete. Ctrl-C stops after the update in
progress, with everything saved. A folder takes one study at a time. What stands behind the file on
the command line is handed to every run. Keys of a study:

    question    what it is to answer, a line for the report
    sweep       {option: [values]}: every combination; 'seed' varies the data's seed with it
    ablate      {option: [values]}: the base, and each single change of it
    exclude     [{option: value}, …]: points of the grid to leave out
    baseline    the variant that the others are compared with, a dict of options (by default the
                `reference`, else the first of the grid)
    match       'params' or 'flops': make the variants equal to the `reference` (a dict of options,
                by default the base) by changing `match_by` ('d_ff', or another size) in steps of
                `match_step` (8)
    budget      {'iterations' | 'tokens' | 'flops' | 'seconds': amount} for each run
    tune        {option: [values]}: each variant first chooses its own best, at `tune_seed` (0),
                which is no seed of the sweep
"""

from pathlib import Path

import common.first_import  # noqa: F401

from common import hardware
from common.console_output import write_progress, write_text
from common.errors import run_script
from common.registry import Option, at_least
from configurator import format_help, read_command_line
from data.dataset import load_dataset, prepare_if_missing
from studies.grid import STUDY_KEYS, merged_settings, read_study
from studies.overview import describe
from studies.run_study import run_study
from studies.runner import StudyRunner
from studies.state import StudyState
from studies.variants import RunContext, baseline_variant, build_variants
from training_config import schema as training_schema

OPTIONS = {
    'jobs': Option(
        int,
        1,
        'Runs at a time, on the GPUs that there are or sharing the cores; '
        'times are then not compared',
        check=at_least(1, at_most=1000),
    ),
    'plan_only': Option(bool, False, 'Show the runs and what they take, and start none'),
}


def study_schema() -> dict[str, dict[str, Option]]:
    return {'Study': OPTIONS, **training_schema()}


def main(argv: list[str]) -> int:
    command_line = read_command_line(argv, study_schema, extra=STUDY_KEYS)
    if command_line.help and not command_line.problems:
        write_text(format_help(__doc__, study_schema()))
        return 0
    study = read_study(command_line)
    settings = merged_settings(study, {})
    base = settings.run
    device = hardware.select_device(base.device)
    dtype = hardware.resolve_dtype(base.dtype, device)
    prepare_if_missing(base.dataset)
    dataset = load_dataset(base.dataset, settings.architecture.block_size)
    context = RunContext(device, dtype, dataset)
    variants = build_variants(study, context)
    plan_only, jobs = (command_line.value(key, study_schema) for key in ('plan_only', 'jobs'))
    runner = StudyRunner(study, Path(base.out_dir), context, jobs, study_options=set(OPTIONS))
    state = StudyState(study, variants, baseline_variant(study, variants), runner)
    if plan_only:
        write_text(describe(state, measure=True))
        return 0
    write_progress(describe(state, measure=False))
    return run_study(state)


if __name__ == '__main__':
    run_script(main)
