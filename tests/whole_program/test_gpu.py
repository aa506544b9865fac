"""Tests that need a CUDA device; skipped without one."""

import json

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
]


def record_of(folder) -> dict:
    (path,) = folder.glob('*/record.json')
    return json.loads(path.read_text())


def losses(record: dict) -> list[float]:
    return [entry['loss'] for entry in record['training_iterations']]


def test_gpu_losses_match_cpu(train, tmp_path):
    train('--device=cpu', '--out_dir=cpu')
    train('--device=cuda', '--out_dir=cuda')
    on_cpu, on_gpu = record_of(tmp_path / 'cpu'), record_of(tmp_path / 'cuda')
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=1e-3)


def test_compiled_losses_match_eager(train, tmp_path):
    train('--device=cuda', '--out_dir=eager')
    train('--device=cuda', '--compile=True', '--out_dir=compiled')
    eager, compiled = record_of(tmp_path / 'eager'), record_of(tmp_path / 'compiled')
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-3)


def test_gpu_memory_is_recorded(train, tmp_path):
    train('--device=cuda', '--dtype=bfloat16', '--out_dir=run')
    for entry in record_of(tmp_path / 'run')['training_iterations']:
        assert entry['memory']['peak_gb'] > 0
