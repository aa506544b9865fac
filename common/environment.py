"""The job that torchrun or Slurm started, from environment variables."""

import os

from common.errors import UserError

# Variables that torchrun sets for each process.
ENVIRONMENT = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')


def check_environment() -> None:
    """Raise UserError if torchrun's variables are incomplete or invalid.

    Such variables are left over from another job, or set by another launcher.
    """
    known = {key: os.environ[key] for key in ENVIRONMENT if key in os.environ}
    if known == {'WORLD_SIZE': '1'} or not {'RANK', 'LOCAL_RANK', 'WORLD_SIZE'} & set(known):
        return  # a single process, with or without WORLD_SIZE=1
    shown = ', '.join(f'{key}={value}' for key, value in known.items())
    missing = [key for key in ENVIRONMENT if key not in known]
    if missing:
        wrong = f'{", ".join(missing)} {"is" if len(missing) == 1 else "are"} not set'
    elif not all(known[key].isdecimal() for key in ENVIRONMENT if key != 'MASTER_ADDR'):
        wrong = 'all but MASTER_ADDR must be whole numbers'
    elif not int(known['LOCAL_RANK']) <= int(known['RANK']) < int(known['WORLD_SIZE']):
        wrong = 'they must satisfy LOCAL_RANK <= RANK < WORLD_SIZE'
    else:
        return
    raise UserError(
        f'{shown} in the environment, but {wrong}. For one process: unset {" ".join(known)}. For '
        'several, torchrun sets all of them: torchrun --standalone --nproc_per_node=2 train.py …'
    )


def launch_notes() -> list[str]:
    """Notes on the launch of the job, a sentence or two each."""
    tasks = os.environ.get('SLURM_STEP_NUM_TASKS', '1')
    if tasks == '1' or 'WORLD_SIZE' in os.environ:
        return []
    return [
        f'Slurm runs this command {tasks} times (SLURM_STEP_NUM_TASKS), and each of them trains a '
        'separate run. For one run on all of them start torchrun in each, as scripts/train.slurm '
        'does.'
    ]


def world_size() -> int:
    """The number of processes that torchrun started; 1 without it. Raises UserError."""
    check_environment()
    return int(os.environ.get('WORLD_SIZE', '1'))


def check_no_torchrun(caller: str) -> None:
    """Raise UserError in a process of torchrun, for a function that trains in one process."""
    if 'RANK' in os.environ and 'WORLD_SIZE' in os.environ:
        raise UserError(
            f'{caller} trains in one process, and torchrun started this one. For several '
            'processes: torchrun --standalone --nproc_per_node=2 train.py …'
        )


def job() -> str | None:
    """torchrun's id of the job, the same after a restart; None if it has none."""
    name = os.environ.get('TORCHELASTIC_RUN_ID', 'none')
    return None if name == 'none' else name


def restarts_left() -> int:
    """How often torchrun will start the job again if a rank fails."""
    made, most = (
        os.environ.get(f'TORCHELASTIC_{k}', '0') for k in ('RESTART_COUNT', 'MAX_RESTARTS')
    )
    return int(most) - int(made)
