"""Run a grid of training runs and compare them.

    python study.py config/studies/gated_ffn.py --jobs=2 --n_layer=4

A study file is a config file of train.py that also defines a grid:

    dataset, max_iters = 'shakespeare', 1000
    sweep = {'ffn_type': ['standard', 'swiglu'], 'seed': [1, 2, 3]}

Each run is a process of its own, with its own folder in out_dir. Run the same
command again to continue: finished runs are skipped, interrupted ones resumed,
failed ones retried (a run that diverged is finished). Ctrl-C saves a checkpoint
after the current iteration and stops. Only one study.py may use a folder at a
time. Further options on the command line apply to every run.

Keys of a study file:
  question    Question that the study answers, for the report
  sweep       {option: [values]}: all combinations; 'seed' sets data_seed too
  ablate      {option: [values]}: the base, and each single change of it
  exclude     [{option: value}, ...]: combinations to leave out
  reference   {option: value} of the reference (default: the base)
  baseline    {option: value}: variant that the others are compared with
              (default: the reference, else the first variant)
  match       'params' or 'flops': give all the reference's size, by match_by
  match_by    Option that match changes (default 'd_ff')
  match_step  Step of that change (default 8)
  budget      {'iterations' | 'tokens' | 'flops' | 'seconds': amount} of a run
  tune        {option: [values]}: values that each variant is tuned over
  tune_seed   Seed of the tuning runs, not one of the sweep's (default 0)
  ladder      {'params': [sizes]} or {option: [values]}: train all at each size
  horizon     {'tokens_per_param' | 'tokens' | 'flops': amount} of each run
  baseline_extra  Larger sizes that only the baseline trains (default 1)
  transfer    'mup': initialization and learning rate follow the width
Options of one kind of layers have dotted names: 'layer_kinds.L.sliding_window'.
"""

from pathlib import Path

import common.first_import  # noqa: F401

from common import hardware
from common.console_output import write_progress, write_text
from common.errors import UserError, run_script
from common.option_help import CommandHelp, HelpGroup
from common.registry import Option, above, at_least
from configurator import read_command_line
from data.dataset import load_dataset, prepare_if_missing
from studies.grid import merged_settings, read_study
from studies.keys import STUDY_KEYS
from studies.ladder_keys import smallest_point
from studies.overview import describe
from studies.parts import build_parts
from studies.run_study import run_study
from studies.runner import StudyRunner
from studies.seeds_needed import describe_seeds
from studies.state import StudyState
from studies.variants import RunContext
from training.command_help import help_groups
from training.component_reference import list_components
from training_config import schema as training_schema

OPTIONS = {
    'jobs': Option(
        int,
        1,
        'Number of simultaneous runs, which share the GPUs or the cores; with more than one, '
        'times are not compared',
        check=at_least(1, at_most=1000),
    ),
    'plan_only': Option(
        bool, False, 'Prepare the data, show the runs with their cost, and train none'
    ),
    'precision': Option(
        float | None,
        None,
        'Half-width of the interval of a difference, in nats, whose seeds the plan shows',
        check=above(0),
    ),
    'noise_from': Option(
        str | None,
        None,
        'Folder of a study whose noise the plan uses if this one has no finished runs',
    ),
}


def study_schema() -> dict[str, dict[str, Option]]:
    return {'Study': OPTIONS, **training_schema()}


def study_help() -> CommandHelp:
    """The pages of train.py, with the study's own options on the first one."""
    own = HelpGroup('study', 'Options of study.py', OPTIONS)
    return CommandHelp(
        __doc__ or '',
        [own, *help_groups()],
        essential=tuple(OPTIONS),
        title='Options of study.py',
        list_groups=False,
    )


def main(argv: list[str]) -> int:
    command_line = read_command_line(argv, study_schema, extra=STUDY_KEYS)
    if command_line.help is not None and not command_line.problems:
        write_text(study_help().page(command_line.help))
        return 0
    if command_line.list_components and not command_line.problems:
        write_text(list_components(command_line.list_format))
        return 0
    if command_line.print_config and not command_line.problems:
        raise UserError(
            '--print_config shows a single run: python train.py STUDY.py --print_config shows that '
            'of the base. For the runs of the study: python study.py STUDY.py --plan_only.'
        )
    in_file = {key for layer in command_line.layers[:-1] for key in layer.values}
    for key in [key for key in OPTIONS if key in in_file]:
        command_line.problems.append(
            f'{key} is set in a study file, which train.py reads too. Remove it there, and give '
            f'--{key} on the command line.'
        )
    study = read_study(command_line)
    settings = merged_settings(study, smallest_point(study))
    base = settings.run
    device = hardware.select_device(base.device)
    dtype = hardware.resolve_dtype(base.dtype, device)
    prepare_if_missing(base.dataset)
    dataset = load_dataset(base.dataset, settings.architecture.block_size)
    context = RunContext(device, dtype, dataset)
    jobs, plan_only, precision, noise_from = (
        command_line.value(key, study_schema) for key in OPTIONS
    )
    parts = build_parts(study, context, jobs)
    runner = StudyRunner(study, Path(base.out_dir), context, jobs, study_options=set(OPTIONS))
    state = StudyState(study, parts, runner)
    seeds = describe_seeds(state, precision, noise_from)
    plan = '\n'.join([describe(state, measure=plan_only), *seeds])
    if plan_only:
        write_text(plan)
        return 0
    write_progress(plan)
    return run_study(state)


if __name__ == '__main__':
    run_script(main)
