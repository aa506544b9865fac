"""benchmarks/process_speed.py: results from given times, and a race of the smallest shape."""

import pytest

from benchmarks import process_speed as speed
from benchmarks.process_speed import ALONE, STRATEGIES, Team
from common.errors import UserError

pytestmark = pytest.mark.slow


def team(seconds, gigabytes=1.0, tokens=100, sent=0.0):
    return Team([], {'tokens': tokens, 'bytes_sent': sent}, seconds, gigabytes)


def test_efficiency_and_communication_use_same_turn():
    teams = {ALONE: team([1.0, 2.0, 4.0])}
    for strategy in STRATEGIES:
        teams[strategy] = team([2.0, 2.0, 5.0], gigabytes=3.0, sent=7.0)
        teams[f'{strategy} without'] = team([1.0, 1.5, 5.0])
    alone, *rows = speed.team_summary(teams)
    assert alone['efficiency'] == {'median': 1.0, 'least': 1.0, 'most': 1.0}
    assert alone['tokens_per_sec'] == {'median': 50.0, 'least': 25.0, 'most': 100.0}
    assert 'communication_percent' not in alone and [r['strategy'] for r in rows] == [*STRATEGIES]
    for row in rows:
        assert row['efficiency'] == {'median': 0.8, 'least': 0.5, 'most': 1.0}
        assert row['communication_percent'] == {'median': 25.0, 'least': 0.0, 'most': 50.0}
        assert (row['memory_gb'], row['bytes_sent']) == (3.0, 7.0)


def test_processes_compute_same_iteration_as_one(tmp_path, capsys, monkeypatch):
    """Two processes with DDP and FSDP, with real and with skipped collectives."""
    monkeypatch.delitem(STRATEGIES, 'zero1')
    options = ['--shape=tiny', '--turns=1', '--seconds=0.01', f'--json={tmp_path / "found.json"}']
    assert speed.main(options) == 0
    table = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in table[1:]] == [ALONE, *STRATEGIES]
    # Rings of two: an all-reduce sends the whole once, in fp32. FSDP gathers and reduces half of it
    # each, and gathers the first of two blocks once more.
    alone, ddp, fsdp = [float(line.split()[-1]) for line in table[1:]]
    block = 12 * 64**2 + 13 * 64
    parameters = 2 * block + (256 + 64) * 64 + 2 * 64
    assert alone == 0 and ddp == pytest.approx(4 * parameters / 1e6, abs=0.06)
    assert fsdp == pytest.approx((4 * parameters + 2 * block) / 1e6, abs=0.06)


def test_uneven_process_count_is_refused():
    with pytest.raises(UserError, match='--processes=3: at least 2, and a divisor of the 64'):
        speed.parse_arguments(['--processes=3'])
