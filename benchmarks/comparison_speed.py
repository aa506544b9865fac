"""CPU time to compare many records whose files are in the page cache.

    python benchmarks/comparison_speed.py [--records=1000] [--iterations=415] [--folder=FOLDER]

A short training gives a record and a journal. Copies are written for 50 architectures and as many
seeds as needed, each with its own losses and the given number of logged iterations. Then
compare_architectures.py reads all of them, five times. The output is the minimum CPU time (user and
system) of a process, and that of a process that only imports the module.
"""

import argparse
import copy
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.record_overhead import random_tokens  # noqa: E402
from records.record import read_record  # noqa: E402
from records.run_folders import latest_run  # noqa: E402
from training_logger import TrainingLogger  # noqa: E402

ARCHITECTURES, REPEATS = 50, 5
OPTIONS = {
    'n_layer': 2,
    'n_head': 2,
    'n_embd': 32,
    'block_size': 32,
    'batch_size': 4,
    'gradient_accumulation_steps': 1,
    'max_iters': 20,
    'eval_interval': 2,
    'eval_iters': 8,
    'device': 'cpu',
    'dtype': 'float32',
    'peak_tflops': 1.0,  # otherwise it would be measured
}


def example(folder: Path) -> dict:
    """The record of a short training."""
    (folder / 'dataset').mkdir()
    random_tokens(folder / 'dataset', vocab_size=256)
    options = {**OPTIONS, 'dataset': folder / 'dataset', 'out_dir': folder / 'example'}
    command = [sys.executable, str(PROJECT / 'train.py')]
    command += [f'--{key}={value}' for key, value in options.items()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_record(latest_run(folder / 'example'))


def write_run(folder: Path, record: dict, number: int, iterations: int) -> None:
    """Write the example as run `number` with other losses, using TrainingLogger."""
    rng = random.Random(number)
    record = copy.deepcopy(record)
    kind, seed = number % ARCHITECTURES, number // ARCHITECTURES
    record['config'] |= {'seed': seed, 'data_seed': seed}
    record['metadata'] |= {'seed': seed, 'data_seed': seed}
    record['architecture'] |= {'name': f'architecture {kind}', 'hash': f'{kind:012}'}
    folder.mkdir(parents=True)
    with open('/dev/null', 'w') as nowhere:
        logger = TrainingLogger(folder, style='line', stream=nowhere, max_iters=iterations)
        logger.record_due = float('inf')  # write record.json only at the end
        parts = ('config', 'architecture', 'metadata', 'startup_info')
        logger.start(**{part: record[part] for part in parts})
        entry, evaluations = record['training_iterations'][-1], record['eval_steps']
        due = {n * iterations // (len(evaluations) - 1): n for n in range(len(evaluations))}
        for iter in range(iterations + 1):
            if iter in due:
                evaluation = {**evaluations[due[iter]], 'iter': iter}
                evaluation['val_loss'] += 0.01 * kind + rng.gauss(0, 0.02)
                logger.evaluation(evaluation)
            if iter < iterations:
                logger.iteration({**entry, 'iter': iter, 'loss': entry['loss'] + rng.gauss(0, 0.1)})
        logger.finish()


def cpu_seconds(arguments: list[str]) -> float:
    """The minimum CPU time of several processes."""
    measured = []
    for _ in range(REPEATS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, cwd=PROJECT, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        measured.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(measured)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--records', type=int, default=1000, help='Number of records (default 1000)'
    )
    parser.add_argument(
        '--iterations', type=int, default=415, help='Logged iterations per record (default 415)'
    )
    parser.add_argument(
        '--folder', help='Folder in which to keep the records (default: a temporary one)'
    )
    options = parser.parse_args()
    folder = Path(options.folder or tempfile.mkdtemp(prefix='comparison_speed_'))
    try:
        if not (folder / 'runs').exists():
            folder.mkdir(parents=True, exist_ok=True)
            record = example(folder)
            for number in range(options.records):
                run_folder = folder / 'runs' / f'{number:05}' / 'run_20260101_000000'
                write_run(run_folder, record, number, options.iterations)
        size = sum(path.stat().st_size for path in folder.glob('runs/*/*/record.json'))
        imported = cpu_seconds(['-c', 'import compare_architectures'])
        compared = cpu_seconds(['compare_architectures.py', str(folder / 'runs')])
        print(
            json.dumps(
                {
                    'records': len(list((folder / 'runs').iterdir())),
                    'record_megabytes': round(size / 1e6, 1),
                    'cpu_seconds': round(compared, 3),
                    'of_which_start': round(imported, 3),
                }
            )
        )
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
    main()
