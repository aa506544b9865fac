"""Training speed compared with other libraries: equal work, in turns, in one run.

    python benchmarks/training_speed.py --shape=gpt2-124m --nanogpt=PATH [--json=speed.json]
    python benchmarks/training_speed.py --shape=llama-12l --contestants=ours,transformers/compile
    python benchmarks/training_speed.py --shape=tiny --turns=2 --seconds=1       # a quick test

Each contestant is a process of its own. All are started one after the other, stay alive, and take
turns, A B C A B C …, since the speed of a machine drifts: only measurements of the same turn are
compared. A turn is one untimed iteration, then as many as take --seconds. Between turns a
contestant waits without using the CPU and returns unused memory.

All do equal work: model, initial weights where they can be converted, tokens and their order,
batch, precision, AdamW, clipping. The losses and gradient norms of the first iterations are
compared, and the FLOPs per token. The exit code is 1 if a contestant differs.

Contestants: ours (train.py) and, if available, nanogpt (a checkout: --nanogpt), transformers (pip
install transformers) and x-transformers (pip install x-transformers). nanogpt/cpu-recipe is the
recipe for CPUs in nanoGPT's README: fp32, not compiled. The peak for the MFU is the fastest matrix
product of the same turn, in the contestant's dtype, at several shapes including those of the model.
`causal` counts attention over the half that a causal model needs; otherwise over the full square.

Other options go to train.py, for our contestants only: --attention_backend=manual.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.race import OURS, SHAPES, ContestantLost, Race, words  # noqa: E402
from benchmarks.race_report import race_summary, report_text  # noqa: E402
from common.errors import ArgumentParser, UserError, run_script  # noqa: E402


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options; those for train.py are in `given`. Raises UserError."""
    parser = ArgumentParser(
        prog='training_speed.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--shape', choices=SHAPES, default='gpt2-124m', help='Model and batch (default gpt2-124m)')
    add(
        '--contestants',
        type=words,
        default=[],
        help='Comma-separated kinds or kind/mode (default: all)',
    )
    add('--ours', type=words, default=[*OURS], help=f'Modes of ours (default {",".join(OURS)})')
    add('--nanogpt', help='Folder of a checkout of nanoGPT')
    add('--other', help='Folder of another checkout of this project, which takes part as other/…')
    add('--turns', type=int, default=5, help='Number of turns (default 5)')
    add('--seconds', type=float, default=10.0, help='Minimum length of a turn (default 10)')
    add('--steps', type=int, help='Iterations per turn, instead of --seconds')
    add('--starts', type=int, choices=(1, 2), default=2, help='Starts of contestants that '
        'compile; 2 (default) also measures a warm cache')  # fmt: skip
    add('--device', default='auto', help='Device: auto, cpu, cuda or cuda:N')
    add(
        '--dtype',
        choices=('bfloat16', 'float32'),
        default='bfloat16',
        help='Precision (default bfloat16)',
    )
    add('--batch_size', type=int, help='Sequences per iteration (default: of the shape)')
    add('--dropout', type=float, help='Dropout (default 0); with dropout, losses are not compared')
    add('--bias', type=truth, help='False: no biases, which GPT-2 in transformers does not support')
    add('--peers_mallopt', type=truth, nargs='?', const=True, default=False,
        help='True: set up the processes of peers like ours (hardware.tune)')  # fmt: skip
    add('--json', type=Path, help='Write all measurements to this file')
    options, options.given = parser.parse_known_args(argv)
    unknown = [mode for mode in options.ours if mode not in OURS]
    if unknown:
        raise UserError(f'--ours={",".join(unknown)}: choose from {", ".join(OURS)}.')
    for key in ('nanogpt', 'other'):
        path, needed = getattr(options, key), {'nanogpt': 'model.py', 'other': 'train.py'}[key]
        if path and not Path(path, needed).is_file():
            raise UserError(f'--{key}={path}: has no {needed}.')
    for key in ('turns', 'steps', 'batch_size'):
        if getattr(options, key) is not None and getattr(options, key) < 1:
            raise UserError(f'--{key} must be at least 1.')
    return options


def truth(text: str) -> bool:
    if text not in ('True', 'False'):
        raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')
    return text == 'True'


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    with tempfile.TemporaryDirectory(
        prefix='training_speed_', ignore_cleanup_errors=True
    ) as folder:
        race = Race(options, Path(folder))
        try:
            race.run()
        except ContestantLost as lost:
            raise UserError(str(lost)) from lost
        finally:
            race.end()
    summary = race_summary(race)
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + '\n')
    print(report_text(summary))
    return int(any(entry['problems'] for entry in summary['agreement'].values()))


if __name__ == '__main__':
    run_script(main)
