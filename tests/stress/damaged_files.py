"""Damaged checkpoint folders of other libraries: none may end in a traceback.

    python tests/stress/damaged_files.py [number of random cases] [part of a kind's name]

Every value in the config.json of every family is set to null, NaN, text, lists, objects, negative
and huge numbers, and deep nesting; likewise in the shard index, the .safetensors header, pickles
and nanoGPT's checkpoint. Files also have random bytes changed. Each folder is opened, checked and
read. Every error that is not a UserError is printed, and sets the exit code to 1.
"""

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from helpers import foreign_configs  # noqa: E402
from helpers.foreign_files import Folders, outcome  # noqa: E402


def main(cases: int = 200, part: str = '') -> int:
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        folders = Folders(Path(folder))
        kinds = {f'config.json of {f}': folders.configs(f) for f in foreign_configs.BASES}
        kinds |= {
            'index': folders.indices('llama'),
            'header': folders.headers('llama'),
            'pickles and bytes': folders.pickles('llama', cases),
            'nanoGPT': folders.nanogpt(),
        }
        for kind, damaged in kinds.items():
            if part not in kind:
                continue
            counts, slowest = Counter(), (0.0, '')
            for label, make in damaged:
                name = make()
                start = time.perf_counter()
                result = outcome(name)
                slowest = max(slowest, (time.perf_counter() - start, label))
                counts[result if result in ('read', 'refused') else 'traceback'] += 1
                if result not in ('read', 'refused'):
                    failed += 1
                    print(f'{label}: {result}')
            counted = ', '.join(f'{n:,} {what}' for what, n in sorted(counts.items()))
            print(f'{kind}: {counted}; slowest {slowest[0]:.2f} s ({slowest[1]!r})', flush=True)
    print(f'{failed} tracebacks')
    return bool(failed)


if __name__ == '__main__':
    sys.exit(main(*map(int, sys.argv[1:2]), *sys.argv[2:3]))
