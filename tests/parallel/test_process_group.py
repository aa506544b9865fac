"""Ranks that die, hang or fail: each ends with one message that names the cause.

`FORKED` runs all cases in forked groups, with a store like torchrun's.
"""

import json
import os
import subprocess
import sys

import pytest
from helpers.project import PROJECT
from torch.distributed.flight_recorder.components.loader import read_dump

from common.environment import launch_notes, world_size
from common.errors import UserError
from parallel.process_group import FLIGHT_RECORDER_PREFIX

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]

TORCHRUN = {
    **{'RANK': '1', 'LOCAL_RANK': '1', 'WORLD_SIZE': '2'},
    **{'MASTER_ADDR': 'localhost', 'MASTER_PORT': '29500'},
}


@pytest.fixture
def environment(monkeypatch):
    for key in (*TORCHRUN, 'SLURM_STEP_NUM_TASKS'):
        monkeypatch.delenv(key, raising=False)

    def change(**values):
        for key, value in values.items():
            monkeypatch.delenv(key, raising=False)
            if value is not None:
                monkeypatch.setenv(key, value)

    return change


def test_partial_torchrun_environment_is_refused(environment):
    assert world_size() == 1
    environment(MASTER_ADDR='somewhere')  # of another program
    assert world_size() == 1
    environment(**TORCHRUN)
    assert world_size() == 2
    for key in TORCHRUN:
        environment(**{**TORCHRUN, key: None})
        with pytest.raises(UserError, match=f'but {key} is not set.*unset .*torchrun'):
            world_size()
    for key in TORCHRUN.keys() - {'MASTER_ADDR', 'MASTER_PORT'}:
        environment(**{**dict.fromkeys(TORCHRUN), key: '2'})  # from an earlier job
        with pytest.raises(UserError, match=f'{key}=2 in the environment.*unset {key}'):
            world_size()
    environment(**{**dict.fromkeys(TORCHRUN), 'WORLD_SIZE': '1'})
    assert world_size() == 1
    for odd in ({'WORLD_SIZE': 'two'}, {'RANK': '2'}, {'RANK': '-1'}, {'WORLD_SIZE': '0'}):
        environment(**{**TORCHRUN, **odd})
        with pytest.raises(UserError, match=f'{next(iter(odd))}={next(iter(odd.values()))}'):
            world_size()


def test_independent_slurm_tasks_are_noted(environment):
    assert launch_notes() == []
    environment(SLURM_STEP_NUM_TASKS='2')
    (note,) = launch_notes()
    assert 'runs this command 2 times' in note and 'scripts/train.slurm' in note
    environment(**TORCHRUN)
    assert launch_notes() == []


FORKED = r"""
import json, multiprocessing, os, pathlib, signal, sys, time
from datetime import timedelta

import torch
import torch.distributed as dist

from common import errors
from parallel import process_group as ranks
from common.errors import UserError, run_script

errors.GRACE_SECONDS, ranks.FAILURE_REPORT_SECONDS = 1, 2
CPU, TIMEOUT = torch.device('cpu'), timedelta(seconds=3)
os.environ |= {'MASTER_ADDR': 'localhost', 'TORCHELASTIC_USE_AGENT_STORE': 'True'}


def keep_store(sender):
    # In a process of its own: a process that has threads, as this has, cannot be forked safely.
    server = dist.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)
    sender.send(server.port)
    time.sleep(600)


def killed(parallel):
    if parallel.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def hangs(parallel):
    if parallel.rank == 1:
        time.sleep(600)


def bug(parallel):
    if parallel.rank == 1:
        raise ZeroDivisionError('on rank 1')


def bug_of_all(parallel):
    raise ZeroDivisionError('on all')


def mistake(parallel):
    if parallel.rank == 1:
        raise UserError('a mistake')


def fine(parallel):
    pass


def late(parallel):
    pass  # rank 1 does not even come


def rank_of(case, rank, size, folder):
    os.environ |= {'RANK': str(rank), 'WORLD_SIZE': str(size)}
    os.environ['TORCHELASTIC_ERROR_FILE'] = f'{folder}/{case}.{rank}.json'
    with open(f'{folder}/{case}.{rank}.txt', 'w') as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)

    def main(argv):
        if case == 'late' and rank == 1:
            time.sleep(600)
        parallel = ranks.MultiProcessGroup(*ranks.init_process_group(CPU, TIMEOUT))
        parallel.trace_collectives(pathlib.Path(folder, case))
        with parallel.propagate_failures():
            assert parallel.all_reduce_max([float(rank)]) == [size - 1.0]
            CASES[case](parallel)
            parallel.all_reduce_max([1.0])

    run_script(main, [])


def of_other_host(parallel):
    # As if rank 1 ran elsewhere, where nobody can look for its process.
    parallel._process = lambda rank: ('elsewhere', 1)
    killed(parallel)


CASES = {
    case.__name__: case
    for case in (fine, killed, hangs, late, bug, bug_of_all, mistake, of_other_host)
}
PLAN = [('killed', 2), ('fine', 2), ('killed', 3), *((case, 3) for case in CASES), ('fine', 4)]

if __name__ == '__main__':
    folder, context, answers = sys.argv[1], multiprocessing.get_context('fork'), []
    for case in ('hangs', 'killed'):
        os.mkdir(f'{folder}/{case}')
    receiver, sender = context.Pipe()
    context.Process(target=keep_store, args=(sender,), daemon=True).start()
    os.environ['MASTER_PORT'] = str(receiver.recv())
    for case, size in PLAN:
        processes = [
            context.Process(target=rank_of, args=(case, rank, size, folder)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        # As torchrun does: wait for processes to end, and kill those that hang.
        while alive := [rank for rank in range(size) if processes[rank].is_alive()]:
            if alive == [1] and case in ('hangs', 'late'):
                processes[1].kill()
            time.sleep(0.02)
        texts = [pathlib.Path(f'{folder}/{case}.{rank}.txt').read_text() for rank in range(size)]
        files = [pathlib.Path(f'{folder}/{case}.{rank}.json') for rank in range(size)]
        known = [json.loads(f.read_text())['message'] if f.exists() else None for f in files]
        for file in files:
            file.unlink(missing_ok=True)
        codes = [process.exitcode for process in processes]
        answers.append({'case': case, 'codes': codes, 'texts': texts, 'for_torchrun': known})
    pathlib.Path(folder, 'answers.json').write_text(json.dumps(answers))
"""


@pytest.fixture(scope='module')
def forked(tmp_path_factory):
    """The folder in which the ranks of all cases have left their results."""
    if sys.platform != 'linux':
        pytest.skip('ranks are forked')
    folder = tmp_path_factory.mktemp('ranks')
    (folder / 'forked.py').write_text(FORKED)
    subprocess.run(
        [sys.executable, folder / 'forked.py', folder],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(PROJECT)},
        check=True,
        timeout=120,
    )
    return folder


@pytest.fixture(scope='module')
def answers(forked):
    """Results of the ranks of a case; of the last case with that name."""
    return json.loads((forked / 'answers.json').read_text())


def of(answers: list[dict], case: str) -> dict:
    return [answer for answer in answers if answer['case'] == case][-1]


def only_speaker(answer: dict) -> tuple[int, str]:
    """The only rank that printed anything, and its text."""
    ((rank, text),) = [(rank, text) for rank, text in enumerate(answer['texts']) if text]
    return rank, text


def test_restart_ignores_stale_store(answers):
    """Groups of different sizes use the store of one torchrun one after the other."""
    fine = [answer for answer in answers if answer['case'] == 'fine']
    assert [answer['codes'] for answer in fine] == [[0] * 2, [0] * 3, [0] * 4]
    assert not any(text for answer in fine for text in answer['texts'])


def test_killed_rank_is_named_once(answers):
    for answer in [answer for answer in answers if answer['case'] == 'killed']:
        assert answer['codes'] == [1, -9, 1][: len(answer['codes'])]
        rank, text = only_speaker(answer)
        assert rank == 0 and 'rank 1' in text and 'exited without an error message' in text
        assert '--init_from=auto' in text and 'Traceback' not in text and 'gloo' not in text
        assert all('rank 1' in known['message'] for known in answer['for_torchrun'] if known)


@pytest.mark.parametrize('case', ['hangs', 'of_other_host'])
def test_hanging_rank_is_named_once(answers, case):
    answer = of(answers, case)
    assert answer['codes'] == [1, -9, 1]
    rank, text = only_speaker(answer)
    assert rank == 0 and 'rank 1' in text and 'rank 2' not in text
    assert (
        'is not responding' in text and '--distributed_timeout' in text and 'Traceback' not in text
    )


def test_last_collectives_of_remaining_ranks_are_left(answers, forked):
    """If a rank does not respond; that a killed one stopped is known without them."""
    folder = forked / 'hangs'
    files = {rank: folder / f'{FLIGHT_RECORDER_PREFIX}{rank}' for rank in (0, 2)}
    assert sorted(folder.iterdir()) == sorted(files.values())
    for rank, file in files.items():
        entries = read_dump(FLIGHT_RECORDER_PREFIX, str(file))['entries']
        last = entries[-1]['profiling_name'], entries[-1]['input_dtypes']
        assert last == ('gloo:all_reduce', ['Double']), rank
    assert f'--prefix={FLIGHT_RECORDER_PREFIX} {folder}' in of(answers, 'hangs')['texts'][0]
    assert not list((forked / 'killed').iterdir())
    assert FLIGHT_RECORDER_PREFIX not in of(answers, 'killed')['texts'][0]


def test_missing_rank_is_named(answers):
    answer = of(answers, 'late')
    assert answer['codes'] == [2, -9, 2]
    first, _, third = answer['texts']
    assert 'rank 1 did not start' in first and '--distributed_timeout=3' in first
    assert 'could not connect' in third and 'Traceback' not in first + third


def test_bug_of_one_rank_is_reported_once(answers):
    answer = of(answers, 'bug')
    assert answer['codes'] == [1, 1, 1]
    rank, text = only_speaker(answer)
    assert rank == 1 and text.count('Traceback') == 1 and 'ZeroDivisionError: on rank 1' in text
    cause, *_, consequence = (answer['for_torchrun'][rank] for rank in (1, 2, 0))
    assert cause['message'] == 'ZeroDivisionError: on rank 1'
    assert consequence['message'] == 'rank 1 failed: ZeroDivisionError: on rank 1'
    # torchrun reports the earliest as the root cause.
    times = [int(known['extraInfo']['timestamp']) for known in answer['for_torchrun']]
    assert times[1] == min(times)


def test_bug_of_all_ranks_is_reported_once(answers):
    answer = of(answers, 'bug_of_all')
    assert answer['codes'] == [1, 1, 1]
    rank, text = only_speaker(answer)
    assert rank == 0 and text.count('Traceback') == 1 and 'ZeroDivisionError: on all' in text


def test_user_error_of_one_rank_is_reported_once(answers):
    answer = of(answers, 'mistake')
    assert answer['codes'] == [1, 2, 1]
    rank, text = only_speaker(answer)
    assert rank == 1 and 'rank 1: a mistake' in text and 'Traceback' not in text
