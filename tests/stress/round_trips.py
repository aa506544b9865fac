"""Differences of logits after exporting presets to transformers and importing them back.

    python tests/stress/round_trips.py [preset …] [--key=value …]

Each preset is small unless sizes are given (--n_layer=12 --n_embd=768 …), with perturbed weights in
fp32. `export` compares AutoModelForCausalLM on our exported folder with our model; `import`
compares our model, loaded from the folder that transformers then saves, with that of transformers.
A difference is the largest of any logit, relative to the largest logit. The exit code is 1 for any
difference above 1e-4, far more than rounding in fp32. Presets that transformers cannot represent
are named.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import interop
from common.errors import UserError
from common.formatting import table
from model_builder import Transformer, build_model
from model_config import PRESETS, ModelArchitectureConfig

SIZES = {'n_layer': 4, 'n_head': 4, 'n_embd': 64, 'block_size': 64, 'vocab_size': 96}
TOLERANCE = 1e-4


def perturbed_model(config: ModelArchitectureConfig) -> Transformer:
    """Initialized as for training, then perturbed, so that no norm weight is 1 and no bias 0."""
    model = build_model(config, 'cpu', seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def round_trip(config: ModelArchitectureConfig, folder: Path) -> tuple[str, float, float]:
    """The architecture's name in transformers, and the differences of export and import.

    Raises UserError.
    """
    from transformers import AutoModelForCausalLM

    model = perturbed_model(config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, config.block_size), generator=generator)
    interop.export(config, dict(model.named_parameters()), folder / 'ours')
    theirs = AutoModelForCausalLM.from_pretrained(
        folder / 'ours', attn_implementation='eager'
    ).eval()
    their_logits = theirs(tokens).logits
    theirs.save_pretrained(folder / 'theirs')
    source = interop.open_checkpoint(f'hf:{folder / "theirs"}')
    again = build_model(source.config, 'cpu').eval()
    again.load_state_dict(dict(source.weights(source.config)), strict=False)
    exported = difference(their_logits, model(tokens))
    return source.family.architecture, exported, difference(again(tokens), their_logits)


def main(arguments: list[str]) -> int:
    given = dict(argument[2:].split('=') for argument in arguments if argument.startswith('--'))
    sizes = SIZES | {key: int(value) for key, value in given.items()}
    presets = [argument for argument in arguments if not argument.startswith('--')]
    rows, worst = [('preset', 'in transformers', 'export', 'import')], 0.0
    for preset in presets or [name for name in PRESETS if name != 'custom']:
        config = ModelArchitectureConfig(arch_preset=preset, **sizes)
        with tempfile.TemporaryDirectory() as folder:
            try:
                architecture, *differences = round_trip(config, Path(folder))
            except UserError as error:
                rows.append((preset, str(error).partition(': ')[2].partition(' The ')[0], '-', '-'))
                continue
        rows.append((preset, architecture, *(f'{value:.1e}' for value in differences)))
        worst = max(worst, *differences)
    print(table(rows, '<<>>'))
    return int(worst > TOLERANCE)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
