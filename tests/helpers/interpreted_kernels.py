"""Mixers with a package's kernels, by Triton's interpreter on a CPU, beside plain PyTorch.

    TRITON_INTERPRET=1 python interpreted_kernels.py PACKAGE CASE…

prints, as JSON, the largest differences of outputs and of gradients, in fp32, relative to the
largest values. Cases are those of `kernel_packages`.
"""

import builtins
import importlib
import importlib.util
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
MODULES = {
    'fla': [f'fla.ops.{n}' for n in ('gated_delta_rule', 'kda', 'gla', 'simple_gla')],
    'mamba_ssm': ['mamba_ssm.ops.triton.ssd_combined'],
}


def import_kernels(package: str) -> None:
    """Import a package's kernels, without what needs a GPU, and make up for what the interpreter
    of Triton 3.9 cannot do."""
    import triton.language as tl
    from triton.runtime.autotuner import Autotuner

    class Index(int):
        """Of a loop; the interpreter's are Python's."""

        def to(self, dtype):
            return tl.full([], int(self), dtype)

    Autotuner._bench = lambda self, *args, **kwargs: [1.0, 1.0, 1.0]  # not timed
    torch.cuda.device = lambda *args: nullcontext()
    torch.cuda.get_device_properties = lambda *args: SimpleNamespace(multi_processor_count=4)
    if package == 'mamba_ssm':  # whose `__init__` needs the compiled extension
        module = ModuleType(package)
        module.__spec__ = importlib.util.find_spec(package)
        module.__path__ = list(module.__spec__.submodule_search_locations)
        sys.modules |= {package: module, 'selective_scan_cuda': ModuleType('selective_scan_cuda')}
    for name in MODULES[package]:
        importlib.import_module(name)
    for name, module in list(sys.modules.items()):
        if name.startswith(f'{package}.ops'):
            vars(module)['range'] = lambda *ends: map(Index, builtins.range(*ends))


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def compare(case: str, has_documents: bool = False) -> tuple[float, float]:
    from helpers.kernel_packages import both_modules, results
    from helpers.mixers import random_inputs, random_starts, with_starts

    documents = {'document_mask': True, 'end_of_text': 3} if has_documents else {}
    modules = both_modules(case, torch.float32, n_embd=64, n_head=2, **documents)
    x = random_inputs(1, 70, 64, dtype=torch.float32)
    inputs = with_starts(random_starts(1, 70) if has_documents else None)
    (expected, of_plain), (actual, of_kernel) = (results(each, x, inputs) for each in modules)
    gradients = [pair for pair in zip(of_kernel, of_plain) if pair[1] is not None]
    return difference(actual, expected), max(difference(*pair) for pair in gradients)


def main(package: str, *cases: str) -> None:
    from components import mixer_kernels

    import_kernels(package)
    mixer_kernels.DEVICES, mixer_kernels.HALF = ('cpu',), (torch.float32,)
    mixer_kernels.SSD_CHUNK = 32
    differences = {case: compare(case) for case in cases}
    if package == 'mamba_ssm':
        differences['mamba2, documents'] = compare('mamba2', has_documents=True)
    print(json.dumps(differences))


if __name__ == '__main__':
    main(*sys.argv[1:])
