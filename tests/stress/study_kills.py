"""Kill a study repeatedly, and compare its result with that of an uninterrupted study.

    python tests/stress/study_kills.py [--kills=6] [--seeds=3] [--updates=300] [--folder=FOLDER]

Four variants with several seeds are trained once without interruption. The same study is then ended
at random moments and restarted with the same command: by `kill -9` of the study and its runs, by
`kill -9` of the study alone, and by Ctrl-C. At the end, every loss and gradient norm of every run
must be bit-identical, and so must the comparison, except for times, memory and paths. The exit code
is 0 if nothing differs. With one thread, twice 12 runs take about 6 minutes on two slow cores.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / 'tests')]

from helpers.bit_equality import bit_differences, without_measurements  # noqa: E402
from stress.fault_run import clock, empty_folder, write_dataset  # noqa: E402

from records.record import read_record  # noqa: E402
from records.run_folders import find_records, latest_run  # noqa: E402

OPTIONS = {
    'n_layer': 2,
    'n_head': 2,
    'n_embd': 32,
    'block_size': 32,
    'batch_size': 4,
    'gradient_accumulation_steps': 1,
    'dropout': 0.1,
    'eval_interval': 10,
    'eval_iters': 8,
    'device': 'cpu',
    'dtype': 'float32',
    'peak_tflops': 1.0,  # otherwise each start would measure it
}
SWEEP = {'ffn_type': ['standard', 'swiglu'], 'position_encoding': ['learned_absolute', 'rope']}
# Keys of the comparison's JSON that are measured, or that are paths.
MEASURED = {
    *('run', 'runs', 'folder', 'front', 'mfu_percent', 'tokens_per_sec', 'time_ms'),
    *('wall_seconds', 'peak_memory_gb', 'seconds'),
}
KILLS = ('the study and its runs', 'Ctrl-C', 'the study alone')


class StudyRun:
    """A study in one folder, in as many processes as needed."""

    def __init__(self, folder: Path, name: str, seeds: int, iterations: int):
        self.out, self.log = folder / name, folder / f'{name}.log'
        self.file = folder / f'{name}.py'
        options = {**OPTIONS, 'dataset': str(folder / 'dataset'), 'out_dir': str(self.out)}
        options |= {'max_iters': iterations, 'sweep': {**SWEEP, 'seed': [*range(1, seeds + 1)]}}
        self.file.write_text(''.join(f'{key} = {value!r}\n' for key, value in options.items()))

    def start(self) -> None:
        with open(self.log, 'a') as log:
            self.process = subprocess.Popen(
                [sys.executable, str(PROJECT / 'study.py'), str(self.file)],
                env={**os.environ, 'OMP_NUM_THREADS': '1'},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def finish(self) -> None:
        if code := self.process.wait():
            sys.exit(f'the study ended with code {code}; its output is in {self.log}')

    def kill(self, kind: str) -> bool:
        """End the study in this way; return whether it was running."""
        if self.process.poll() is not None:
            return False
        if kind == 'Ctrl-C':
            self.process.send_signal(signal.SIGINT)
            return self.process.wait() != 0
        runs = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        if kind == 'the study and its runs':
            for run in runs:
                run.kill()
        return self.process.wait() < 0

    def records(self) -> dict[str, dict]:
        """The newest record of each trial, by its folder."""
        trials = self.out.glob('runs/*/*')
        runs = {str(trial.relative_to(self.out)): latest_run(trial) for trial in trials}
        return {name: read_record(run) for name, run in sorted(runs.items()) if run}

    def iterations(self) -> int:
        """Logged iterations of all runs; repeated ones count twice."""
        journals = self.out.glob('runs/*/*/run_*/journal.jsonl')
        return sum(journal.read_bytes().count(b'{"kind": "iteration"') for journal in journals)

    def comparison(self, format: str) -> str:
        command = [
            sys.executable,
            str(PROJECT / 'compare_architectures.py'),
            str(self.out / 'runs'),
        ]
        return subprocess.run(
            [*command, f'--format={format}'], capture_output=True, text=True, check=True
        ).stdout

    def table(self) -> dict:
        """The result of the comparison, without measured values."""
        data = _unmeasured(json.loads(self.comparison('json')))
        data['equal_cost'] = [row for row in data['equal_cost'] if row['cost'] != 'seconds']
        return data


def _unmeasured(value):
    if isinstance(value, dict):
        return {k: _unmeasured(v) for k, v in value.items() if k not in MEASURED}
    return [_unmeasured(item) for item in value] if isinstance(value, list) else value


def result(record: dict) -> dict:
    """The losses and gradient norms of a run."""
    return {
        'status': record['status'],
        'iterations': without_measurements(record['training_iterations']),
        'evaluations': without_measurements(record['eval_steps']),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kills', type=int, default=6, help='how many (default 6)')
    parser.add_argument('--seeds', type=int, default=3, help='of each variant (default 3)')
    parser.add_argument('--updates', type=int, default=300, help='of each run (default 300)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (default 0)')
    parser.add_argument(
        '--folder', help='Folder in which to keep the runs (default: a temporary one)'
    )
    options = parser.parse_args()
    with empty_folder(parser, options.folder) as folder:
        rng = random.Random(options.seed)
        return study_kills(folder, options.kills, options.seeds, options.updates, rng)


def study_kills(folder: Path, kills: int, seeds: int, iterations: int, rng: random.Random) -> int:
    """Run both studies and the kills, print the result; return 0 if nothing differs."""
    write_dataset(folder / 'dataset')
    reference = StudyRun(folder, 'uninterrupted', seeds, iterations)
    began = time.perf_counter()
    reference.start()
    reference.finish()
    took, expected = time.perf_counter() - began, reference.records()
    print(
        f'{len(expected)} runs of {iterations} updates without interruption: {took:.0f} s',
        flush=True,
    )

    study, began = StudyRun(folder, 'killed', seeds, iterations), time.perf_counter()
    killed, done, total = 0, 0, len(expected) * iterations
    for number in range(kills):
        study.start()
        # As many updates as leave some for the kills to come, at whatever speed.
        until = done + rng.uniform(0, 1.8) * (total - done) / (kills - number + 1)
        while study.iterations() < until and study.process.poll() is None:
            time.sleep(0.05)
        kind = KILLS[number % len(KILLS)]
        if not study.kill(kind):
            print('the study ended before all kills were made: raise --updates')
            break
        killed += 1
        complete = sum(r['status'] == 'finished' for r in study.records().values())
        done = study.iterations()
        print(
            f'kill {number + 1}/{kills} ({kind}): {complete} runs complete, '
            f'{done} of {total} updates made',
            flush=True,
        )
    study.start()
    study.finish()

    records = study.records()
    different = {
        'table': bit_differences(study.table(), reference.table(), 'table'),
        'runs': []
        if records.keys() == expected.keys()
        else sorted(records.keys() ^ expected.keys()),
    }
    if not different['runs']:
        for part in ('status', 'iterations', 'evaluations'):
            pairs = (
                (name, result(records[name])[part], result(expected[name])[part])
                for name in records
            )
            different[part] = [key for n, a, b in pairs for key in bit_differences(a, b, n)]
    resumes = sum(e['event'] == 'resume' for record in records.values() for e in record['events'])
    print(f'\nkills                    {killed}')
    print(f'resumes in the records   {resumes}')
    print(f'runs started again       {len(find_records(study.out)) - len(records)}')
    for part, keys in different.items():
        verdict = f'DIFFERENT: {", ".join(keys[:5])}' if keys else 'equal, to the last bit'
        print(f'{part:<24} {verdict}')
    print(f'time                     {clock(time.perf_counter() - began)} for the killed study')
    print(f'\n{study.comparison("text")}')
    return int(any(different.values()) or killed < kills)


if __name__ == '__main__':
    sys.exit(main())
