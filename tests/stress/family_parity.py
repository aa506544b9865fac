"""The largest differences between a tiny model of each family and its import, as a table.

    python tests/stress/family_parity.py [family …]

Both models have the same random weights, in fp32 on the CPU. Each figure is relative to the largest
magnitude of the tensor: of the logits, of the worst parameter's gradient, and of the logits that
transformers computes from our export. The last column counts greedy tokens that are equal, with and
without the cache. The last line names the families over the bounds of the tests (1e-5, 1e-4, 1e-5,
all tokens equal), which set the exit code to 1.
"""

import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from helpers import transformers_models as reference  # noqa: E402
from helpers.foreign_configs import BASES  # noqa: E402
from helpers.transformers_models import BOUNDS  # noqa: E402

from interop.exporter import silent_transformers  # noqa: E402

NEW_TOKENS = 11  # with a prompt of 5, the 16 tokens of the models' context


def measured(family: str, folder: Path) -> tuple[dict[str, float], int, int]:
    """The differences by kind, and how many of how many new tokens are equal."""
    parity = reference.compared({'model_type': family, **BASES[family]}, folder)
    differences = {kind: reference.largest_difference(*pair) for kind, pair in parity.pairs.items()}
    expected, texts = reference.continuations(parity, NEW_TOKENS)
    equal = sum(int((text == expected).sum()) for text in texts)
    return differences, equal, len(texts) * expected.numel()


def main(*families: str) -> int:
    torch.set_num_threads(1)
    worse = []
    print('| family | logits | gradients | logits of the export | equal tokens |')
    print('| --- | --- | --- | --- | --- |')
    for family in families or sorted(BASES):
        with tempfile.TemporaryDirectory() as folder, silent_transformers():
            differences, equal, of = measured(family, Path(folder))
        figures = ' | '.join(f'{differences[kind]:.1e}' for kind in BOUNDS)
        print(f'| `{family}` | {figures} | {equal} of {of} |', flush=True)
        if equal < of or any(differences[kind] >= bound for kind, bound in BOUNDS.items()):
            worse.append(family)
    print(f'\nfamilies: {len(families or BASES)}; over the bounds: {", ".join(worse) or "none"}')
    return bool(worse)


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
