"""benchmarks/gpu.py goes through every section on a CPU; its measurements are those of the loop."""

import json

import pytest
import torch
from helpers.in_process import session_here

from benchmarks import gpu
from benchmarks.gpu_workloads import (
    GPT2,
    TINY,
    Cost,
    PlainGPT,
    Updates,
    cost_of,
    loop_seconds,
    settings_of,
)
from common.errors import UserError
from model_builder import build_model

CPU = torch.device('cpu')


@pytest.mark.slow
def test_dry_run_goes_through_every_section(tmp_path, capsys, one_thread):
    code = gpu.main(['--dry', f'--json={tmp_path / "gpu.json"}'])
    written = json.loads((tmp_path / 'gpu.json').read_text())
    rows = written['rows']
    assert {row['section'] for row in rows} == {section.__name__ for section, _ in gpu.SECTIONS}
    assert [row['what'] for row in rows if row['good'] is False] == [] and code == 0
    out = capsys.readouterr().out
    checks = [row for row in rows if row['good']]
    assert f'{len(checks)} of {len(checks)} checks passed' in out
    assert all(row['what'] in out for row in rows)


def test_failing_section_and_lack_of_time_are_rows(monkeypatch, tmp_path):
    def failing(bench):
        yield gpu.Row('failing', 'first', True)
        raise RuntimeError('out of memory\nmore')

    def long(bench):
        yield gpu.Row('long', 'never', True)

    monkeypatch.setattr(gpu, 'SECTIONS', ((failing, 0), (long, 10**9)))
    lines: list[str] = []
    bench = gpu.Bench(CPU, True, tmp_path, deadline=float('inf'))
    bench.deadline = gpu.time.monotonic() + 100
    rows = gpu.run_sections(bench, [], lines.append)
    assert [row.good for row in rows] == [True, False, None]
    assert 'RuntimeError: out of memory' in lines[1] and 'no time left' in lines[2]


def test_without_a_gpu_there_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match='--dry goes through it on a CPU'):
        gpu.parse_arguments([])
    with pytest.raises(UserError, match="'speed' is no section: choose from parity"):
        gpu.parse_arguments(['--dry', 'speed'])


def test_plain_gpt_is_the_model_of_the_preset():
    """With equal weights, its loss is equal."""
    updates = Updates(CPU, dtype='float32', arch_preset='legacy')
    config = updates.config
    plain = PlainGPT(
        config.n_layer, config.n_head, config.n_embd, config.block_size, config.vocab_size
    )
    ours = list(updates.raw_model.parameters())
    assert [p.shape for p in plain.parameters()] == [p.shape for p in ours]
    with torch.no_grad():
        for parameter, values in zip(plain.parameters(), ours):
            parameter.copy_(values)
    loss = plain(*updates.batches[0])
    torch.testing.assert_close(loss, updates.backward(0))


def test_models_have_the_sizes_of_gpt2():
    """Of the run, of the optimizers' section and of the plain model."""
    model = build_model(settings_of(CPU, **GPT2).architecture)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == 124_475_904
    with torch.device('meta'):
        plain = PlainGPT(12, 12, 768, 1024, 50304)
    assert sum(p.numel() for p in plain.parameters()) == parameters
    assert GPT2.keys() >= TINY.keys()  # so that `Updates` takes no tiny size


def test_peak_and_time_of_a_cpu():
    cost = cost_of(CPU, lambda: torch.ones(3) + 1, calls=2)
    assert isinstance(cost, Cost) and cost.milliseconds > 0 and cost.peak_gb == 0


@pytest.mark.slow
def test_loop_is_timed_after_warm_up(tiny_dataset, tmp_path, one_thread):
    session = session_here(tiny_dataset, tmp_path, max_iters=4)
    assert loop_seconds(session, 2) > 0
    assert session.progress.iter == 4 and not session.logger.evaluations
