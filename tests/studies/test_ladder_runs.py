"""Ladders that run: the answer, a failed run, an added rung, changed options, own noise."""

import json
import re

import pytest

import study
import train
from common.errors import UserError
from records.record import read_record
from records.run_folders import latest_run
from studies import run_study, time_estimate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

LADDER = (
    'del max_iters\n'
    "eval_iters = 1; sweep = {'bias': [True, False], 'seed': [1, 2]}\n"
    "ladder = {'n_embd': [8, 16], 'n_head': [1, 2]}; n_layer = 1\n"
    "horizon = {'tokens': 256}\n"
)
FAILED = 'runs/n_embd=16_n_head=2/bias=False/seed=1'


def main(path, *arguments) -> int:
    return study.main([str(path), *arguments])


def folders(out) -> set[str]:
    plan = json.loads((out / 'study.json').read_text())
    return {point['folder'] for point in plan['points']}


def test_ladder_from_first_run_to_added_rung(
    study_file, trained_here, tmp_path, capsys, monkeypatch
):
    path, out = study_file(LADDER), tmp_path / 'out'
    train_main, failures = train.main, []

    def fail_once(arguments):
        if f'--out_dir={out / FAILED}' in arguments and not failures:
            failures.append(arguments)
            raise UserError('no room')
        return train_main(arguments)

    monkeypatch.setattr(time_estimate, '_measured_speeds', lambda *_: ())
    monkeypatch.setattr(train, 'main', fail_once)
    with monkeypatch.context() as patch:
        patch.setattr(run_study, 'print_comparison', lambda folder: None)
        assert main(path) == 1
    text = capsys.readouterr().out
    # Runs from the smallest rung; each line names the rung.
    ended = re.findall(r'^\[\d+/10\] (\S+?)/', text, flags=re.M)
    assert (
        ended == ['n_embd=8_n_head=1'] * 4 + ['n_embd=16_n_head=2'] * 4 + ['n_embd=32_n_head=4'] * 2
    )
    assert f'failed: {FAILED.removeprefix("runs/")} (train.py: no room' in text
    assert main(path) == 0
    text = capsys.readouterr().out
    assert '9 of 10 runs are already complete' in text and 'compute gain' in text.lower()
    for folder in folders(out):
        record = read_record(latest_run(out / folder))
        assert record['status'] == 'finished' and record['summary']['total_tokens'] == 256
        assert f'n_embd={record["config"]["n_embd"]}_' in folder

    # The plan uses the noise of these runs.
    assert main(path, '--plan_only', '--precision=0.01') == 0
    text = ' '.join(capsys.readouterr().out.split())
    assert f'from 10 runs in {out}' in text and '10 runs, 10 complete' in text

    # The extra rung becomes one of all variants: what has run stays.
    more = LADDER.replace('[8, 16]', '[8, 16, 32]').replace('[1, 2]}; n', '[1, 2, 4]}; n')
    before = {folder: latest_run(out / folder) for folder in folders(out)}
    monkeypatch.setattr(run_study, 'print_comparison', lambda folder: None)
    assert main(study_file(f'{more}baseline_extra = 0')) == 0
    assert '10 of 12 runs are already complete' in capsys.readouterr().out
    assert {folder: latest_run(out / folder) for folder in before} == before
    assert len(folders(out)) == 12

    with pytest.raises(
        UserError, match=r'n_embd=8_n_head=1.* was run with .*max_iters=2 \(now 4\)'
    ):
        main(study_file(LADDER.replace('256', '512')))
