"""Jobs of several ranks continue after a kill or a time limit, with torchrun and Slurm."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.project import PROJECT, TINY_RUN

from records.record import read_record
from records.run_folders import latest_run
from training.checkpoint import list_checkpoints, load_state, read_index

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != 'linux' or not shutil.which('bash'), reason='needs Linux and bash'
    ),
]

# Replacements of Slurm's commands, with all nodes on this machine.
FAKES = {
    'scontrol': 'if [ $1 = show ]; then echo localhost; else echo "$@" > $LOG; fi',
    'srun': """
nodes=()
for node in $(seq $SLURM_NNODES); do "$@" & nodes+=($!); done
trap 'kill -TERM "${nodes[@]}"' TERM
code=0
for node in "${nodes[@]}"; do
    while kill -0 $node 2>/dev/null; do wait $node; code=$?; done
done
exit $code""",
    'torchrun': f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.fixture
def slurm(tmp_path):
    """slurm(--key=value, …) runs `scripts/train.slurm` as job 7 on two nodes with one rank each."""
    commands, jobs = tmp_path / 'commands', []
    commands.mkdir()
    for name, body in FAKES.items():
        (commands / name).write_text(f'#!/bin/bash\n{body}\n')
        (commands / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]

    def submit(*arguments):
        job = subprocess.Popen(
            ['bash', 'scripts/train.slurm', *map(str, arguments)],
            cwd=PROJECT,
            env={
                **os.environ,
                'PATH': f'{commands}:{os.environ["PATH"]}',
                'LOG': str(tmp_path / 'requeued'),
                'OMP_NUM_THREADS': '1',
                'MASTER_PORT': str(port),
                'SLURM_JOB_ID': '7',
                'SLURM_JOB_NODELIST': 'two',
                'SLURM_NNODES': '2',
                'SLURM_GPUS_ON_NODE': '1',
            },
            stdout=open(tmp_path / 'output.txt', 'a'),  # noqa: SIM115 used by the job
            stderr=subprocess.STDOUT,
        )
        jobs.append(job)
        return job

    yield submit
    for job in jobs:
        for process in [*descendants(job), job]:
            process.kill()
        job.wait()


def descendants(job: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get('RANK') if 'train.py' in process.cmdline() else None
    except psutil.Error:
        return None


def wait_for(condition, job: subprocess.Popen, output: Path) -> None:
    """Wait until `condition()` holds; fail if the job ends first."""
    deadline = time.monotonic() + 120
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.02)


def test_two_node_job_survives_kill_and_time_limit(slurm, tmp_path, tiny_dataset):
    """The requeued job resumes its own run, not a newer one of another job in the folder."""
    out, output = tmp_path / 'out', tmp_path / 'output.txt'
    options = {**TINY_RUN, 'dataset': tiny_dataset, 'out_dir': out, 'max_iters': 10**6}
    options |= {'eval_interval': 50, 'log_style': 'line', 'use_zero1': True}
    arguments = [f'--{key}={value}' for key, value in options.items()]
    events: list[dict] = []

    def final_iter() -> int:
        if (run := latest_run(out)) is None:
            return 0
        record = read_record(run)
        events[:] = record['events']
        return record['summary']['final_iter']

    job = slurm(*arguments)
    wait_for(lambda: final_iter() > 60, job, output)
    (victim,) = [process for process in descendants(job) if rank_of(process) == '1']
    victim.kill()
    wait_for(lambda: final_iter() and [e for e in events if e['event'] == 'resume'], job, output)
    run = latest_run(out)
    (failure,) = [event for event in events if event['event'] == 'failed']
    assert 'rank 1' in failure['message']
    goal = final_iter() + 10
    wait_for(lambda: final_iter() > goal, job, output)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=120) != 0
    record = read_record(run)
    stopped = record['summary']['final_iter']
    assert record['status'] == 'interrupted' and record['metadata']['job'] == '7'
    assert record['checkpoints'][-1]['iter'] == stopped
    assert (tmp_path / 'requeued').read_text() == 'requeue 7\n'

    shutil.copytree(run, out / 'run_29991231_235959')
    journal = out / 'run_29991231_235959' / 'journal.jsonl'
    journal.write_text(journal.read_text().replace('"job": "7"', '"job": "8"'))
    (tmp_path / 'requeued').unlink()
    assert slurm(*arguments, f'--max_iters={stopped + 3}').wait(timeout=120) == 0
    assert {path.name for path in out.iterdir()} == {run.name, 'run_29991231_235959'}
    record = read_record(run)
    assert record['status'] == 'finished' and record['summary']['final_iter'] == stopped + 3
    assert [entry['iter'] for entry in record['training_iterations']] == list(range(stopped + 3))
    for path in list_checkpoints(run / 'checkpoints'):
        load_state(read_index(path))
    assert not (tmp_path / 'requeued').exists()


def test_restarted_job_equals_uninterrupted_job(tmp_path):
    result = subprocess.run(
        [
            sys.executable,
            PROJECT / 'tests/stress/fault_run.py',
            '--strategy=fsdp',
            '--kills=1',
            '--updates=30',
            f'--folder={tmp_path}',
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count('bit-identical') == 7
    assert 'kills                    1 (1 training)' in result.stdout
    assert 'unreadable checkpoints   0' in result.stdout


def test_slurm_script_parses():
    subprocess.run(['bash', '-n', PROJECT / 'scripts' / 'train.slurm'], check=True)
