"""What two trainings that did the same have in common, to the last bit."""

import torch

# Of an entry of a record: what no two runs have in common.
MEASURED = (
    *('time', 'time_ms', 'write_ms', 'train_seconds', 'steps', 'tokens_per_sec', 'mfu', 'memory'),
)


def bit_differences(a, b, where: str = 'state') -> list[str]:
    """The keys under which two states differ, be it by one bit."""
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
    """Entries of a record, less what no two runs have in common."""
    return [{key: e[key] for key in e if key not in MEASURED} for e in entries]
