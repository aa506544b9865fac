"""Randomly damaged files, the same in every run. FUZZ_CASES=5000 tries more of them."""

import os
import random

CASES = int(os.environ.get('FUZZ_CASES', '100'))


def fuzzed(content: bytes, rng: random.Random) -> bytes:
    """The content with some bytes changed, removed, duplicated or truncated."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, length = rng.randrange(len(changed)), rng.choice((1, 1, 4, 64))
        what = rng.randrange(6)
        if what < 3:
            changed[at] = rng.choice((0, 0x2D, 0x30, 0x39, 0x7F, 0xFF, rng.randrange(256)))
        elif what == 3:
            del changed[at : at + length]
        elif what == 4:
            changed[at:at] = changed[at : at + length]
        elif rng.random() < 0.2:
            del changed[at:]
        if not changed:
            return b''
    return bytes(changed)
