"""Runs of train.py on a GPU: strategies, logging, checkpoints, samples, profile, memory."""

import gzip
import json
import subprocess
import sys

import psutil
import pytest
import torch
from helpers.in_process import session_here, train_here
from helpers.one_device import each, no_waits, one_rank
from helpers.project import PROJECT, TINY_RUN
from helpers.rank_driver import rounded

import train
from common import hardware
from common.tensors import local_tensor
from parallel.strategies import DataParallel, SingleProcess
from records.record import read_record
from records.run_folders import latest_run
from training import iteration_log

STRATEGIES = {'ddp': {}, 'zero1': {'use_zero1': True}, 'fsdp': {'use_fsdp': True}}


def run_iterations(session, count: int) -> list[float]:
    """The losses of that many iterations."""
    entries = []
    session.logger.iteration = entries.append
    clock = hardware.StepClock(session.device)
    for _ in range(count):
        train.run_iteration(session, clock)
    iteration_log.flush(session)
    session.batch_reader.close()
    return [entry['loss'] for entry in entries]


@each('strategy', STRATEGIES, dry=STRATEGIES)
def test_strategies_train_as_one_process(device, strategy, tiny_dataset, tmp_path, monkeypatch):
    """One rank of NCCL or gloo. The sizes of DyT's parameters are no multiples of 16 bytes."""
    if strategy == 'ddp':  # which a job of one rank does not use
        monkeypatch.setattr(train, 'choose_strategy', DataParallel)
    options = {'device': device, 'normalization': 'dyt', 'compile': device.type == 'cuda'}
    options['grad_clip'] = 0.1
    with monkeypatch.context() as patch:
        patch.setattr(train, 'choose_strategy', SingleProcess)
        alone = run_iterations(session_here(tiny_dataset, tmp_path / 'alone', **options), 4)
    with one_rank():
        session = session_here(
            tiny_dataset, tmp_path / 'rank', **options, **STRATEGIES[strategy], max_iters=5
        )
        assert session.parallel.name == strategy
        losses = run_iterations(session, 4)
    assert losses == pytest.approx(alone, rel=1e-3)


def test_fsdp_in_bfloat16_equals_rounded_matrices(device, tiny_dataset, tmp_path, monkeypatch):
    """FSDP multiplies bfloat16 matrices; the reference rounds those of a single process."""
    options = {'device': device, 'dtype': 'bfloat16', 'bias': False, 'learning_rate': 2e-3}
    options |= {'arch_preset': 'llama', 'compile': False}
    with monkeypatch.context() as patch:
        rounded(patch, 0)
        alone = run_iterations(session_here(tiny_dataset, tmp_path / 'alone', **options), 4)
    options |= {'use_fsdp': True, 'fsdp_param_dtype': 'bfloat16'}
    with one_rank():
        losses = run_iterations(session_here(tiny_dataset, tmp_path / 'rank', **options), 4)
    assert losses == pytest.approx(alone, rel=1e-4)


@each('strategy', STRATEGIES, dry=('fsdp',))
def test_ranks_on_several_gpus_train_as_one_process(device, strategy, tiny_dataset, tmp_path):
    """By torchrun, which on a CPU starts a single process."""
    ranks = 2 if device.type == 'cuda' else 1
    if ranks > 1 and torch.cuda.device_count() < ranks:
        pytest.skip('needs two CUDA devices')
    options = {'n_layer': 2, 'device': device.type, 'dtype': 'float32', 'compile': False}
    alone = train_here(tiny_dataset, tmp_path / 'alone', **options)
    folder = tmp_path / 'ranks'
    values = {**TINY_RUN, **options, **STRATEGIES[strategy], 'dataset': tiny_dataset}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += [f'--nproc_per_node={ranks}', 'train.py']
    command += [*(f'--{k}={v}' for k, v in values.items()), f'--out_dir={folder}']
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = read_record(latest_run(folder) / 'record.json')
    losses = [entry['loss'] for entry in record['training_iterations']]
    assert losses == pytest.approx(alone.losses, rel=1e-3)
    assert record['startup_info']['hardware']['world_size'] == ranks


def test_logged_iterations_do_not_wait(device, tiny_dataset, tmp_path):
    """The measurements of an iteration are recorded while the next one runs."""
    session = session_here(tiny_dataset, tmp_path, device=device, dtype='auto', compile=False)
    session.pending_log.deferred = True  # as on CUDA
    entries = []
    session.logger.iteration = entries.append
    clock = hardware.StepClock(device)
    train.run_iteration(session, clock)
    assert not entries
    if device.type == 'cuda':
        with no_waits(device):
            train.run_iteration(session, clock)
    else:  # the copy to the host, which is made already, is read by `tolist`
        train.run_iteration(session, clock)
    assert [entry['iter'] for entry in entries] == [0]
    iteration_log.flush(session)
    assert [entry['iter'] for entry in entries] == [0, 1]
    session.batch_reader.close()


def test_losses_do_not_depend_on_log_interval(device, tiny_dataset, tmp_path):
    options = {'device': device, 'max_iters': 7, 'eval_interval': 4, 'compile': False}
    runs = [
        train_here(tiny_dataset, tmp_path / str(interval), log_interval=interval, **options)
        for interval in (1, 3)
    ]
    every, third = (
        {entry['iter']: entry['loss'] for entry in run.record['training_iterations']}
        for run in runs
    )
    assert list(every) == list(range(7)) and list(third) == [0, 3, 6]
    assert third == {iter: every[iter] for iter in third}


def test_losses_equal_those_of_a_cpu(device, tiny_dataset, tmp_path):
    on_cpu = train_here(tiny_dataset, tmp_path / 'cpu')
    here = train_here(tiny_dataset, tmp_path / 'here', device=device, compile=False)
    assert here.losses == pytest.approx(on_cpu.losses, rel=1e-3)
    evaluated = [[e['val_loss'] for e in run.record['eval_steps']] for run in (on_cpu, here)]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-3)


def test_memory_is_recorded(device, tiny_dataset, tmp_path):
    run = train_here(tiny_dataset, tmp_path, device=device, dtype='auto', compile=False)
    for entry in run.record['training_iterations']:
        assert entry['memory']['peak_gb'] > 0
    checked = run.record['startup_info']['hardware']
    assert checked['device'].startswith(device.type)


def test_deterministic_run_writes_samples(device, tiny_dataset, tmp_path):
    """Twice the same, with kernels that refuse to be nondeterministic."""
    options = {'device': device, 'dtype': 'auto', 'deterministic': True, 'compile': False}
    options |= {'eval_interval': 2, 'sample_interval': 2, 'sample_tokens': 8}
    runs = [train_here(tiny_dataset, tmp_path / name, **options) for name in 'ab']
    texts = [[e['sample']['text'] for e in run.record['eval_steps']] for run in runs]
    assert len(texts[0]) == 3 and texts[0] == texts[1]
    assert runs[0].losses == runs[1].losses and runs[0].code == 0


def test_saved_run_resumes_as_if_it_had_not_stopped(device, tiny_dataset, tmp_path):
    """Through an asynchronous save, whose copies are in pinned memory on a GPU."""
    options = {'device': device, 'async_save': True, 'dropout': 0.1, 'deterministic': True}
    options |= {'compile': False, 'eval_interval': 2}
    whole = train_here(tiny_dataset, tmp_path / 'whole', max_iters=6, lr_decay_iters=6, **options)
    train_here(tiny_dataset, tmp_path / 'parts', max_iters=4, lr_decay_iters=6, **options)
    resumed = train_here(
        *(tiny_dataset, tmp_path / 'parts'), max_iters=6, init_from='resume', **options
    )
    assert resumed.losses == whole.losses
    weights = whole.weights()
    for name, values in resumed.saved_weights().items():
        assert torch.equal(values, weights[name].cpu())


def test_host_memory_of_a_save_is_that_of_the_state(device, tiny_dataset, tmp_path):
    sizes = {'n_embd': 1024, 'n_layer': 2} if device.type == 'cuda' else {}
    session = session_here(
        tiny_dataset, tmp_path, device=device, async_save=True, compile=False, **sizes
    )
    run_iterations(session, 1)
    states = session.optimizer.inner.state.values()
    tensors = [*session.raw_model.parameters(), *(v for s in states for v in s.values())]
    size = sum(local_tensor(t).nbytes for t in tensors if isinstance(t, torch.Tensor))
    process = psutil.Process()
    before = process.memory_info().rss
    train.save(session)
    session.checkpoints.finish()
    grown = process.memory_info().rss - before
    # The copies, and buffers of the writer.
    assert grown < 1.3 * size + 2**28
    if device.type == 'cuda':
        assert torch.cuda.host_memory_stats()['allocated_bytes.peak'] < 1.3 * size + 2**28
    assert session.progress.iter == 1


def test_profile_has_kernels_and_memory(device, tiny_dataset, tmp_path):
    run = train_here(tiny_dataset, tmp_path, device=device, profile=1, max_iters=5, compile=False)
    folder = run.folder / 'profile'
    with gzip.open(folder / 'iter0000003.json.gz') as file:
        kinds = {event.get('cat') for event in json.load(file)['traceEvents']}
    assert 'cpu_op' in kinds and len(run.events('profile')) == 1
    if device.type == 'cuda':
        assert 'kernel' in kinds
        assert (folder / 'iter0000003_memory.pickle').stat().st_size > 1000
