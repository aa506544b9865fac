"""Compare every preset compiled block by block with eager mode: logits, loss and gradients.

    python tests/stress/compile_parity.py [preset …]

Each preset is tiny and in fp32; its blocks are compiled as in training
(`parallel.strategies.prepare_blocks`). A difference is the norm of the difference of a tensor
divided by the norm of the tensor; the largest of the model is printed. Differences in the last bits
are normal, since fused operations round less often; the exit code is 1 for any difference above
1e-5. `graphs` is the number of graphs compiled for a forward pass in training and one in
evaluation; it must not grow with the number of layers.
"""

import sys
import time
from pathlib import Path

import torch
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model_builder import Transformer, build_model
from model_config import PRESETS, ModelArchitectureConfig
from parallel.strategies import prepare_blocks

SIZES = {'n_layer': 4, 'n_head': 4, 'n_embd': 64, 'block_size': 32, 'vocab_size': 96}
TOLERANCE = 1e-5


def results(model: Transformer) -> dict[str, torch.Tensor]:
    """Logits, loss and gradients for the same tokens, by name."""
    tokens = torch.randint(96, (2, 33), generator=torch.Generator().manual_seed(0))
    loss_sum, count, auxiliary = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    loss = loss_sum / count
    (loss + auxiliary.loss).backward()
    with torch.no_grad():
        logits = model.eval()(tokens[:, :-1].contiguous())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {'logits': logits, 'loss': loss.detach(), **gradients}


def compare(preset: str) -> tuple[float, int]:
    """The largest difference, and the number of graphs."""
    config = ModelArchitectureConfig(arch_preset=preset, **SIZES)
    by_mode = []
    for compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        model = build_model(config, 'cpu', seed=1)
        prepare_blocks(model, [], compiled)
        by_mode.append(results(model))
    eager, compiled = by_mode
    largest = max(
        (torch.linalg.norm(compiled[name] - tensor) / torch.linalg.norm(tensor)).item()
        for name, tensor in eager.items()
    )
    return largest, counters['stats']['unique_graphs']


def main(presets: list[str]) -> int:
    worst = 0.0
    print(f'{"preset":<12}{"largest difference":>20}{"graphs":>8}{"seconds":>9}')
    for preset in presets or [name for name in PRESETS if name != 'custom']:
        began = time.perf_counter()
        largest, graphs = compare(preset)
        print(f'{preset:<12}{largest:>20.1e}{graphs:>8}{time.perf_counter() - began:>9.1f}')
        worst = max(worst, largest)
    return int(worst > TOLERANCE)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
