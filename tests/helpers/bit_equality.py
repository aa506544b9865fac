"""Bitwise comparison of two training runs."""

import torch

# Keys of an entry that are measured and differ between runs.
MEASURED = (
    *('time', 'time_ms', 'write_ms', 'train_seconds', 'steps', 'tokens_per_sec', 'mfu', 'memory'),
)


def bit_differences(a, b, where: str = 'state') -> list[str]:
    """The keys under which two states differ in any bit."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
        return [] if same else [where]
    if isinstance(a, dict | list):
        keys = a if isinstance(a, dict) else range(len(a))
        if len(a) != len(b):
            return [where]
        return [path for key in keys for path in bit_differences(a[key], b[key], f'{where}.{key}')]
    return [] if a == b else [where]


def without_measurements(entries: list[dict]) -> list[dict]:
    """The entries of a record without measured values."""
    return [{key: e[key] for key in e if key not in MEASURED} for e in entries]
