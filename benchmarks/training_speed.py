"""Training speed beside what a user would take instead: the same work, in turns, in one run.

    python benchmarks/training_speed.py --shape=gpt2-124m --nanogpt=PATH [--json=speed.json]
    python benchmarks/training_speed.py --shape=llama-12l --contestants=ours,transformers/compile
    python benchmarks/training_speed.py --shape=tiny --turns=2 --seconds=1       # a try

Each contestant is a process of its own. They are started one after the other and stay alive, and
then take turns, A B C A B C …, since the speed of a machine drifts: only what ran in the same turn
is compared. A turn is an update that is not timed and then as many as take --seconds; between
turns a contestant waits, without using the processor, and gives back memory that it does not use.

All do the same: model, first weights where they can be carried over, tokens and their order, batch,
precision, AdamW, clipping. The losses and gradient norms of their first updates are compared, and
the FLOPs of a token; a contestant that does not agree makes the exit code 1.

Contestants: ours (train.py) and, each if it is there, nanogpt (a checkout: --nanogpt), transformers
(pip install transformers), x-transformers (pip install x-transformers). nanogpt/cpu-recipe is what
nanoGPT's README runs on a CPU: fp32, not compiled. MFU is against the fastest matrix multiplication
of the same turn, in the contestant's dtype, at several shapes and those of the model; `causal`
counts attention over the half that a causal model needs, the other over the full square.

Options that are not known here are train.py's and go to ours: --attention_backend=manual.
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
    """The options; those of train.py in `given`. Raises UserError."""
    parser = ArgumentParser(
        prog='training_speed.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--shape', choices=SHAPES, default='gpt2-124m', help='default gpt2-124m')
    add('--contestants', type=words, default=[], help='kinds or kind/mode, with commas; all')
    add('--ours', type=words, default=[*OURS], help=f'modes of ours: {",".join(OURS)}')
    add('--nanogpt', help='a checkout of nanoGPT')
    add('--other', help='another checkout of this project, to take part as other/…')
    add('--turns', type=int, default=5, help='default 5')
    add('--seconds', type=float, default=10.0, help='of a turn, at least (default 10)')
    add('--steps', type=int, help='updates of a turn, instead of --seconds')
    add('--starts', type=int, choices=(1, 2), default=2, help='of those that compile: 2 (default) '
        'measures a warm cache too')  # fmt: skip
    add('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    add('--dtype', choices=('bfloat16', 'float32'), default='bfloat16', help='default bfloat16')
    add('--batch_size', type=int, help="sequences an update; the shape's")
    add('--dropout', type=float, help='default 0; with it losses are not compared')
    add('--bias', type=truth, help="False: without biases, which transformers' GPT-2 cannot")
    add('--peers_mallopt', type=truth, nargs='?', const=True, default=False,
        help="True: the peers' processes are set up like ours (hardware.tune)")  # fmt: skip
    add('--json', type=Path, help='write everything that was measured here')
    options, options.given = parser.parse_known_args(argv)
    unknown = [mode for mode in options.ours if mode not in OURS]
    if unknown:
        raise UserError(f'--ours={",".join(unknown)}: there are {", ".join(OURS)}.')
    for key in ('nanogpt', 'other'):
        path, needed = getattr(options, key), {'nanogpt': 'model.py', 'other': 'train.py'}[key]
        if path and not Path(path, needed).is_file():
            raise UserError(f'--{key}={path}: there is no {needed} in it.')
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
