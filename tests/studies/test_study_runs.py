"""study.py: outcomes of runs, stopped studies, and two studies in one folder."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.project import PROJECT
from stress.study_kills import study_kills

import study
import train
from common import files as file_writing
from common.errors import UserError
from comparison.load import read_runs
from comparison.runs import causal_flops
from model_builder import build_model, training_flops
from records.record import read_record
from records.run_folders import latest_run
from studies import lock as lock_module
from studies import overview, run_study, runner, time_estimate
from studies.lock import study_lock
from studies.outcome import STOP_SIGNALS, outcome_from_exit, outcome_from_record
from studies.progress import StudyProgress

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

SMALL = (
    "max_iters = 3; eval_iters = 2; sweep = {'ffn_type': ['standard', 'swiglu'], 'seed': [1, 2]}"
)


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """scripted('…'): replace train.py by a script with this text.

    The script has the variables `seed` and `out`, and imports os, signal, sys and time.
    """

    def script(text: str) -> None:
        path = tmp_path / 'scripted_train.py'
        head = (
            'import os, signal, sys, time\n'
            "options = dict(a[2:].split('=', 1) for a in sys.argv[1:] if a.startswith('--'))\n"
            "seed, out = int(options.get('seed', -1)), options['out_dir']\n"
        )
        path.write_text(head + text)
        monkeypatch.setattr(runner, 'TRAIN', path)
        monkeypatch.setattr(run_study, 'print_comparison', lambda folder: None)

    return script


def main(path, *arguments) -> int:
    return study.main([str(path), *arguments])


def read_plan(out) -> dict:
    return json.loads((out / 'study.json').read_text())


def losses(out):
    """The final validation loss of each trial by its folder."""
    return {
        trial['folder']: read_record(latest_run(out / trial['folder']))['summary']['final_val_loss']
        for trial in read_plan(out)['points']
    }


# --- Complete studies ----------------------------------------------------------------------------


def test_study_from_command_line(study_file, run_script, tmp_path):
    path = study_file(SMALL.replace('[1, 2]', '[1]') + "; question = 'Gated?'")
    out = run_script('study.py', path, '--jobs=2').stdout
    assert 'Gated?' in out and '2 variants with 1 seed each' in out
    assert '[2/2]' in out and 'RANKING' in out
    assert len(losses(tmp_path / 'out')) == 2 and None not in losses(tmp_path / 'out').values()
    plan = read_plan(tmp_path / 'out')
    assert plan['question'] == 'Gated?'
    for trial in plan['points']:
        record = read_record(latest_run(tmp_path / 'out' / trial['folder']))
        assert record['config']['concurrent_runs'] == 2
        assert record['config']['seed'] == record['config']['data_seed']


def test_complete_trials_are_skipped_and_checked(study_file, trained_here, tmp_path, capsys):
    kinds = "sweep = {'layer_pattern': ['G', 'LG'], 'layer_kinds.L.sliding_window': [4],"
    path, out = (
        study_file(SMALL.replace("sweep = {'ffn_type': ['standard', 'swiglu'],", kinds)),
        tmp_path / 'out',
    )
    assert main(path) == 0
    assert [variant['asked'] for variant in read_plan(out)['variants']] == [
        {'layer_pattern': 'G'},
        {'layer_pattern': 'LG', 'layer_kinds.L.sliding_window': 4},
    ]
    before = losses(out)
    assert main(path) == 0
    assert '4 of 4 runs are already complete' in capsys.readouterr().out
    assert losses(out) == before and len(list(out.rglob('run_*'))) == 4
    with pytest.raises(UserError, match=r'learning_rate=0\.0006 \(now 0\.01\)'):
        main(path, '--learning_rate=0.01')


TUNED = (
    "max_iters = 3; eval_iters = 2; sweep = {'bias': [True, False], 'seed': [1]}\n"
    "tune = {'learning_rate': [1e-9, 1e-3, 1e-2]}; baseline = {'bias': False}\n"
)


def test_tuning_chooses_by_final_loss(study_file, trained_here, tmp_path, capsys):
    path, out = study_file(TUNED), tmp_path / 'out'
    assert main(path) == 0
    text = capsys.readouterr().out
    plan = read_plan(out)
    assert plan['baseline'] == 'bias=False' and plan['tuned'] == ['learning_rate']
    for variant in plan['variants']:
        tuning = {
            rate: read_record(latest_run(out / f'tuning/{variant["label"]}/learning_rate={rate}'))
            for rate in (1e-9, 1e-3, 1e-2)
        }
        best = min(tuning, key=lambda rate: tuning[rate]['summary']['final_val_loss'])
        assert variant['tuned'] == {'learning_rate': best}
        assert variant['tuned_at_edge'] == ['learning_rate'] * (best != 1e-3)
        (run,) = [p for p in plan['points'] if p['variant'] == variant['label']]
        assert read_record(latest_run(out / run['folder']))['config']['learning_rate'] == best
        assert f'tuned {variant["label"]}: learning_rate={best}' in text
    # One counter covers the tuning runs and the compared runs.
    assert re.findall(r'^\[(\d)/8\] (tuning )?', text, flags=re.M) == [
        *((str(n), 'tuning ') for n in range(1, 7)),
        *((str(n), '') for n in (7, 8)),
    ]
    # A second call chooses the same from the records; the comparison ignores tuning runs.
    assert main(path) == 0 and read_plan(out) == plan
    assert len(read_runs([out])[0]) == 2


def test_diverged_tuning_setting_is_worst(study_file, trained_here, tmp_path, capsys):
    text = "max_iters = 3; eval_iters = 2; sweep = {'bias': [True], 'seed': [1]}\n"
    path = study_file(f"{text}tune = {{'learning_rate': [1e-3, 1e30]}}")
    assert main(path) == 0
    assert read_plan(tmp_path / 'out')['variants'][0]['tuned'] == {'learning_rate': 1e-3}
    assert 'learning_rate=1e+30: diverged' in capsys.readouterr().out
    path = study_file(f"{text}tune = {{'learning_rate': [1e30]}}")
    with pytest.raises(UserError, match='all tuning runs of bias=True diverged'):
        main(path)


def test_budget_in_seconds_is_timed_first(study_file, trained_here, tmp_path, capsys, monkeypatch):
    train_main, timed = train.main, {'n_layer=1': 20.5, 'n_layer=2': 41.0}

    def with_fixed_times(arguments):
        """Records of timing runs whose times do not depend on the machine."""
        code = train_main(arguments)
        (folder,) = [Path(a.partition('=')[2]) for a in arguments if a.startswith('--out_dir=')]
        if folder.parent.name == 'timing':
            path = latest_run(folder) / 'record.json'
            record = json.loads(path.read_text())
            assert record['summary']['avg_time_ms'] > 0
            record['summary']['avg_time_ms'] = timed[folder.name]
            path.write_text(json.dumps(record))
        return code

    monkeypatch.setattr(train, 'main', with_fixed_times)
    path = study_file(
        "eval_iters = 1; sweep = {'n_layer': [1, 2], 'seed': [1]}; budget = {'seconds': 0.2}"
    )
    assert main(path, '--plan_only') == 0
    text = capsys.readouterr().out
    assert '4 runs (2 to time an iteration, 2 to compare), 0 complete' in text
    assert main(path) == 0
    out = tmp_path / 'out'
    for trial in read_plan(out)['points']:
        iterations = read_record(latest_run(out / trial['folder']))['config']['max_iters']
        assert iterations == {'n_layer=1': 9, 'n_layer=2': 4}[trial['variant']]
    assert '[2/4] timing n_layer=2' in capsys.readouterr().out


# --- Plans and estimates -------------------------------------------------------------------------


def test_plan_counts_runs_tokens_and_flops(study_file, trained_here, capsys):
    text = (
        "eval_iters = 2; sweep = {'n_layer': [1, 3], 'seed': [1, 2, 3]}\n"
        "tune = {'learning_rate': [1e-3, 1e-2]}; budget = {'tokens': 400}"
    )
    path = study_file(text)
    assert main(path, '--plan_only') == 0
    plan = capsys.readouterr().out
    assert '10 runs (4 to tune learning_rate with seed 0, 6 to compare), 0 complete' in plan
    assert 'few iterations made now' in plan
    iterations, total = 400 // 128, 0
    for n_layer in (1, 3):
        architecture = architecture_of_one(
            study_file(f"sweep = {{'n_layer': [{n_layer}]}}", 'one.py')
        )
        flops = training_flops(build_model(architecture))['per_token_causal'] * iterations * 128
        (row,) = [line.split() for line in plan.splitlines() if f'n_layer={n_layer} ' in line]
        assert row[1:4] == [str(iterations * 128), f'{flops:.3g}', f'{5 * flops:.3g}']
        total += 5 * flops
    assert f'total: {10 * iterations * 128:,} tokens, {total:.3g} training FLOPs' in plan

    assert main(path, '--seed=7') == 0
    capsys.readouterr()
    assert main(path, '--plan_only', '--seed=7') == 0
    assert '6 to compare), 10 complete' in capsys.readouterr().out


def architecture_of_one(path):
    """The architecture of the only variant of a study."""
    states = []

    def capture(state, measure):
        states.append(state)
        return ''

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, 'describe', capture)
        main(path, '--plan_only')
    return states[0].parts[0].variants[0].settings.architecture


def test_time_estimate_uses_recorded_speed(study_file, trained_here, tmp_path, capsys, monkeypatch):
    path, out = study_file(SMALL), tmp_path / 'out'
    assert main(path) == 0
    records = [read_record(latest_run(out / p['folder'])) for p in read_plan(out)['points']]
    speed = {  # seconds per FLOP
        r['architecture']['name']: r['summary']['wall_seconds'] / causal_flops(r) for r in records
    }
    assert len(speed) == 2
    processes = sorted(out.rglob('process.json'))
    starts = [json.loads(path.read_text())['start_seconds'] for path in processes]
    assert len(starts) == 4
    for path, start in zip(processes, starts):
        assert start >= 0
        path.write_text(json.dumps({'start_seconds': start + 19}))
    more = study_file(SMALL.replace('[1, 2]', '[1, 2, 3, 4]'), 'more.py')
    estimates = []

    def estimate(*arguments):
        estimates.append(time_estimate.estimate_time(*arguments))
        return estimates[-1]

    monkeypatch.setattr(overview, 'estimate_time', estimate)
    capsys.readouterr()
    assert main(more, '--plan_only') == 0
    assert '8 runs, 4 complete' in (text := capsys.readouterr().out)
    assert f'at the speed of 4 runs in {out}' in text
    by_architecture = {}
    for r in records:
        by_architecture.setdefault(r['architecture']['name'], []).append(r)
    expected = sum(
        2
        * sum(r['summary']['wall_seconds'] / causal_flops(r) for r in runs)
        / 2
        * causal_flops(runs[0])
        for runs in by_architecture.values()
    )
    # Four runs are left, each with the start of its process.
    expected += sum(starts) + 4 * 19
    assert estimates[0].seconds == pytest.approx(expected)

    # Runs that are not complete do not count.
    run = latest_run(out / 'runs/ffn_type=swiglu/seed=2')
    (run / 'record.json').unlink()
    journal = (run / 'journal.jsonl').read_text().splitlines(keepends=True)
    (run / 'journal.jsonl').write_text(''.join(journal[:-1]))
    assert main(more, '--plan_only') == 0
    assert f'at the speed of 3 runs in {out}' in capsys.readouterr().out


def test_time_left_covers_whole_study(study_file, trained_here, monkeypatch):
    """The estimate is the FLOPs left in all kinds of runs at the rate since the start."""
    seen = []
    on_trial_end = StudyProgress.on_trial_end

    def timed(progress, running, outcome):
        progress.began = time.monotonic() - 10.0  # pretend that the study has run for ten seconds
        on_trial_end(progress, running, outcome)
        trials = [trial for kind in progress.trials.values() for trial in kind]
        completed = sum(trial.flops for trial in progress.ended_trials)
        left = sum(trial.flops for trial in trials if trial not in progress.ended_trials)
        seen.append((progress.seconds_left(), left, completed))

    monkeypatch.setattr(StudyProgress, 'on_trial_end', timed)
    text = "max_iters = 2; eval_iters = 1; sweep = {'n_layer': [1, 3], 'seed': [1]}"
    assert main(study_file(f"{text}; tune = {{'learning_rate': [1e-3, 1e-2]}}")) == 0
    assert len(seen) == 6 and seen[-1][0] == 0.0
    for seconds, left, completed in seen:
        assert seconds == pytest.approx(10.0 * left / completed, rel=0.05)


# --- Outcomes of runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('code', 'kind', 'reason', 'final'),
    [
        (0, 'finished', '', 0),
        (2, 'failed', 'n_head=3 does not divide', 2),
        (130, 'interrupted', 'SIGINT', 130),
        (143, 'interrupted', 'SIGTERM', 143),
        (-signal.SIGTERM, 'interrupted', 'SIGTERM', 143),
        (129, 'interrupted', 'SIGHUP', 129),
        (-signal.SIGKILL, 'killed', 'SIGKILL', 137),
        (137, 'killed', 'SIGKILL', 137),
        (-signal.SIGSEGV, 'killed', 'SIGSEGV', 139),
        (255, 'failed', 'n_head=3 does not divide', 255),
    ],
)
def test_outcome_from_exit_code(code, kind, reason, final):
    assert outcome_from_exit(code, 'n_head=3 does not divide', False) == (kind, reason, final)


def test_out_of_memory_is_named():
    outcome = outcome_from_exit(-signal.SIGKILL, '', out_of_memory=True)
    assert outcome.kind == 'killed' and 'ran out of memory' in outcome.reason


FIVE = "sweep = {'bias': [True], 'seed': [1, 2, 3, 4, 5]}"


def test_interrupted_killed_and_failed_runs_differ(study_file, scripted, capsys):
    scripted(
        'if seed == 1: sys.exit(143)\n'
        'if seed == 2: os.kill(os.getpid(), signal.SIGKILL)\n'
        'if seed == 3: os.kill(os.getpid(), signal.SIGTERM)\n'
        "if seed == 4: sys.exit('no room for \\x1b[31mthis')\n"
    )
    assert main(study_file(FIVE), '--jobs=5') == 1
    text = capsys.readouterr().out
    assert '\x1b' not in text
    for seed, kind, advice in (
        (1, 'interrupted', '(SIGTERM): run the same command to continue it'),
        (2, 'killed', 'run the same command to continue it'),
        (3, 'interrupted', '(SIGTERM): run the same command to continue it'),
        (4, 'failed', 'run the same command to retry it'),
    ):
        (line,) = re.findall(rf'^\w+: bias=True/seed={seed}\b.*$', text, flags=re.M)
        assert line.startswith(kind) and line.endswith(advice)
        assert re.search(rf'^\[\d/5\] bias=True/seed={seed}: {kind}', text, flags=re.M)
    assert '(SIGKILL' in text and 'no room for' in text
    assert 'seed=5: ' in text and not re.search(r'^\w+: bias=True/seed=5', text, flags=re.M)


def test_interrupted_runs_set_exit_code(study_file, scripted):
    scripted('sys.exit(143 if seed == 2 else 0)')
    assert main(study_file(FIVE)) == 143


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_stops_runs_then_study(study_file, scripted, capsys, tmp_path, number):
    scripted(
        'if seed == 2:\n'
        '    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n'
        f'    os.kill(os.getppid(), {int(number)})\n'
        '    time.sleep(60)\n'
        '    sys.exit(1)\n'
    )
    before = signal.getsignal(number)
    path = study_file(FIVE)
    assert main(path) == 128 + number
    assert signal.getsignal(number) is before
    text = capsys.readouterr().out
    assert 'seed=2: interrupted (SIGTERM)' in text and 'seed=3' not in text
    assert text.rstrip().endswith(f'To continue: python study.py {path}')
    assert not re.search(r'^(interrupted|failed): ', text, flags=re.M)


def test_final_comparison_can_be_interrupted(study_file, scripted, monkeypatch):
    scripted('')
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    seen = []
    monkeypatch.setattr(
        run_study,
        'print_comparison',
        lambda folder: seen.extend(map(signal.getsignal, STOP_SIGNALS)),
    )
    assert main(study_file(FIVE)) == 0
    assert seen == handlers


@pytest.mark.parametrize(
    ('events', 'policy', 'kind'),
    [
        (['nonfinite', 'nonfinite', 'failed'], 'stop', 'diverged'),
        (['note', 'rollback', 'nonfinite', 'broken_checkpoint', 'failed'], 'rollback', 'diverged'),
        (['nonfinite', 'rollback', 'failed'], 'rollback', None),  # a later, other failure
        (['nonfinite', 'failed'], 'skip', None),
        (['failed'], 'stop', None),
        (['nonfinite', 'failed', 'resume', 'failed'], 'stop', None),
    ],
)
def test_failure_after_nonfinite_update_is_not_divergence(events, policy, kind):
    record = {'status': 'failed', 'config': {'on_nonfinite': policy}}
    outcome = outcome_from_record({**record, 'events': [{'event': name} for name in events]})
    assert (outcome and outcome.kind) == kind


def test_full_disk_keeps_previous_plan(study_file, trained_here, tmp_path, monkeypatch):
    path, out = study_file(SMALL.replace('[1, 2]', '[1]')), tmp_path / 'out'
    assert main(path) == 0
    before = (out / 'study.json').read_bytes()

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(file_writing.os, 'fsync', full)
    with pytest.raises(UserError, match=r'study\.json: cannot be written \(No space left'):
        main(path)
    assert (out / 'study.json').read_bytes() == before


def test_failed_tuning_is_reported(study_file, scripted, capsys):
    scripted("sys.exit(2 if 'learning_rate=0.01' in out else 0)")
    path = study_file("sweep = {'bias': [True]}; tune = {'learning_rate': [1e-3, 1e-2]}")
    assert main(path) == 1
    text = capsys.readouterr().out
    assert 'failed: bias=True/learning_rate=0.01' in text
    assert 'The comparison needs all tuning runs' in text


def test_diverged_trial_is_a_result(study_file, trained_here, tmp_path, capsys):
    path = study_file(
        "max_iters = 3; eval_iters = 2; sweep = {'learning_rate': [1e30, 1e-3], 'seed': [1]}"
    )
    assert main(path) == 0
    text = capsys.readouterr().out
    assert 'diverged: learning_rate=1e+30/seed=1' in text
    assert re.search(r'learning_rate=0.001/seed=1: validation loss \d', text)
    # A second call does not train it again.
    assert main(path) == 0
    assert '2 of 2 runs are already complete' in capsys.readouterr().out
    assert len(list((tmp_path / 'out').rglob('run_*'))) == 2


# --- Contents of the folder ----------------------------------------------------------------------


@pytest.mark.parametrize(
    'change',
    [
        lambda run: (run / 'journal.jsonl').write_text('{"kind": "sta\n{}\n'),
        lambda run: (run / 'journal.jsonl').write_bytes(b'\xff\xfe\x00broken\n'),
        lambda run: (run / 'journal.jsonl').unlink() or (run / 'record.json').write_text('[]'),
        lambda run: (
            (run / 'journal.jsonl').unlink() or (run / 'record.json').write_text('{"a": 1}')
        ),
    ],
)
def test_unreadable_record_is_named_and_kept(study_file, trained_here, tmp_path, capsys, change):
    path = study_file(SMALL.replace('[1, 2]', '[1]'))
    assert main(path) == 0
    run = latest_run(tmp_path / 'out/runs/ffn_type=swiglu/seed=1')
    change(run)
    files = {file: file.read_bytes() for file in run.iterdir() if file.is_file()}
    assert main(path) == 1
    text = capsys.readouterr().out
    assert re.search(r'^unreadable: ffn_type=swiglu/seed=1 \(.*: move its folder', text, flags=re.M)
    assert {file: file.read_bytes() for file in run.iterdir() if file.is_file()} == files


def test_summary_without_figures_is_user_error(study_file, trained_here, tmp_path):
    path = study_file(TUNED)
    assert main(path) == 0
    for value in (None, 'x', [], {}, float('nan'), 10**400):
        for run in (tmp_path / 'out').rglob('run_*'):
            (run / 'journal.jsonl').unlink(missing_ok=True)
            record = json.loads((run / 'record.json').read_text())
            record['summary'] = dict.fromkeys(record['summary'], value)
            (run / 'record.json').write_text(json.dumps(record))
        with pytest.raises(UserError, match='all tuning runs of'):
            main(path)


def test_file_in_place_of_folder_is_user_error(study_file, trained_here, tmp_path):
    path, out = study_file(SMALL), tmp_path / 'out'
    out.write_text('a file')
    with pytest.raises(UserError, match=r'cannot be written .* --out_dir=FOLDER'):
        main(path)
    out.unlink()
    (out / 'runs').mkdir(parents=True)
    (out / 'runs/ffn_type=standard').write_text('a file')
    with pytest.raises(UserError, match='a run cannot be started there'):
        main(path)
    (out / 'runs/ffn_type=standard').unlink()
    (out / 'study.json').unlink()
    (out / 'study.json').mkdir()
    with pytest.raises(UserError, match=r'study\.json: cannot be written'):
        main(path)


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '{"points": 3}', '\x00'])
def test_broken_plan_is_replaced(study_file, trained_here, tmp_path, text):
    path, out = study_file(SMALL), tmp_path / 'out'
    out.mkdir()
    (out / 'study.json').write_text(text)
    assert main(path) == 0
    assert len(read_plan(out)['points']) == 4


def test_plan_of_older_version_is_read(study_file, trained_here, tmp_path):
    """The older plan has no baseline and no tuned values."""
    out = tmp_path / 'out'
    assert main(study_file(TUNED)) == 0
    plan = read_plan(out)
    del plan['baseline']
    for variant in plan['variants']:
        del variant['tuned'], variant['tuned_at_edge']
    (out / 'study.json').write_text(json.dumps(plan))
    runs, _ = read_runs([out])
    assert {run.variant for run in runs} == {'bias=True', 'bias=False'}
    assert main(study_file(TUNED)) == 0
    assert 'baseline' in read_plan(out)


# --- One study in a folder -----------------------------------------------------------------------


def test_second_study_in_folder_is_refused(study_file, trained_here, tmp_path):
    out = tmp_path / 'out'
    with (
        study_lock(out),
        pytest.raises(UserError, match=rf'{out}: another study \(pid {os.getpid()}\)'),
    ):
        main(study_file(SMALL))
    assert main(study_file(SMALL)) == 0  # the lock was released with its study


def test_plan_only_while_study_runs(study_file, tmp_path, capsys):
    with study_lock(tmp_path / 'out'):
        assert main(study_file(SMALL), '--plan_only') == 0


def test_lock_ends_with_its_process(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            '-c',
            'import sys, time; from pathlib import Path; from studies.lock import study_lock\n'
            'with study_lock(Path(sys.argv[1])): print(flush=True); time.sleep(60)',
            str(tmp_path),
        ],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    with pytest.raises(UserError, match=rf'pid {holder.pid}\)'), study_lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with study_lock(tmp_path):
        pass


def test_runs_of_killed_study_are_awaited(tmp_path, monkeypatch, capsys):
    """The runs hold the lock too, and save a checkpoint before they end."""
    with study_lock(tmp_path) as lock:
        run = subprocess.Popen(['sleep', '60'], pass_fds=lock)
    ended = subprocess.Popen(['true'])
    ended.wait()
    (tmp_path / 'study.lock').write_text(f'{ended.pid} {lock_module.socket.gethostname()}\n')
    monkeypatch.setattr(lock_module.time, 'sleep', lambda _: (run.kill(), run.wait()))
    with study_lock(tmp_path):
        assert (
            f'waiting for the runs of a killed study (pid {ended.pid})' in capsys.readouterr().out
        )

    with study_lock(tmp_path) as lock:
        run = subprocess.Popen(['sleep', '60'], pass_fds=lock)
    (tmp_path / 'study.lock').write_text(f'{ended.pid} {lock_module.socket.gethostname()}\n')
    monkeypatch.setattr(lock_module, 'GRACE_SECONDS', -1.0)
    with pytest.raises(UserError, match='has ended, but its runs have not'), study_lock(tmp_path):
        pass
    run.kill()
    run.wait()


def test_killed_study_matches_undisturbed_one(tmp_path, capsys):
    code = study_kills(tmp_path, kills=2, seeds=1, iterations=12, rng=random.Random(3))
    assert code == 0, capsys.readouterr().out


# --- Study files in train.py and config/studies --------------------------------------------------


def test_train_uses_base_of_study(study_file, run_script):
    out = run_script('train.py', study_file(SMALL)).stdout
    assert 'holds a study' in out


@pytest.mark.parametrize(
    ('path', 'baseline'),
    [
        ('families', 'like=llama'),
        ('gated_ffn', 'ffn_type=standard'),
        ('ladder_glu', 'ffn_type=standard'),
        ('ladder_llama', 'arch_preset=llama'),
        ('layer_patterns', 'layer_pattern=G'),
        ('mixers', 'layer_pattern=A'),
        ('norm_position', 'norm_position=pre warmup_iters=100 depth_scaled_init=True'),
        ('norms', 'normalization=layernorm'),
        ('positions', 'position_encoding=rope'),
        ('presets', 'arch_preset=legacy'),
    ],
)
def test_project_studies_can_be_run(path, baseline, tiny_dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(time_estimate, 'MEASURING_SECONDS', -1.0)
    path, out = PROJECT / f'config/studies/{path}.py', f'--out_dir={tmp_path / "out"}'
    assert main(path, f'--dataset={tiny_dataset}', '--plan_only', out) == 0
    text = capsys.readouterr().out
    assert int(re.search(r'(\d+) seeds each', text)[1]) >= 3 and '?' in text.splitlines()[0]
    assert text.splitlines()[1].endswith(f'; baseline: {baseline}')


def test_every_project_study_is_tested():
    assert len(list((PROJECT / 'config/studies').glob('*.py'))) == 10
