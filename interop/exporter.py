"""Export a model to transformers, as an architecture there that computes the same function."""

import contextlib
import copy
import io
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from common.errors import UserError
from components.base import saved_tensors
from interop.families import TRANSFORMERS, Family
from interop.layers import canonical_options, in_layers, layer_config, paired_kinds
from interop.pretrained_checkpoint import tensor_map_of
from model_builder import Transformer, build_model
from model_config import INITIALIZATION_REGISTRY, ModelArchitectureConfig

# Relative difference of logits that are computed in another order in fp32.
TOLERANCE = 1e-3
CHECKED_TOKENS = 16  # length of the text on which logits are compared
FILE_HINT = 'A file can hold any architecture: --output=model.safetensors.'
# Sequence length, documents per sequence, and implementation: a run with pretrained weights may
# change them, and an exported model gets one document at a time.
BACKENDS = ('attention_backend', 'mixer_backend')
RUN_TIME_OPTIONS = ('block_size', 'vocab_size', *BACKENDS, 'document_mask', 'end_of_text')


def training_only_options(config: ModelArchitectureConfig) -> set[str]:
    """Options that only affect training: a run with pretrained weights sets its own."""
    initialization = INITIALIZATION_REGISTRY[config.initialization]
    initial = {key for c in INITIALIZATION_REGISTRY for key in INITIALIZATION_REGISTRY[c].options}
    initial.add('initialization')
    if initialization.output_scale(config) != 1:
        initial.clear()  # it also affects the logits
    dropout = {'dropout', 'attention_dropout', 'residual_dropout'}
    losses = {'z_loss', 'load_balance_weight', 'router_z_loss'}
    mixtures = {'router_bias_update', 'capacity_factor'}
    return {'multiple_of', *mixtures, *initial, *dropout, *losses}


class ConvertedConfig(NamedTuple):
    """An architecture in transformers' terms: the family, and the fields of its config."""

    family: Family
    fields: dict
    config: ModelArchitectureConfig  # the model's own, or one of the same function


def convert_config(config: ModelArchitectureConfig) -> ConvertedConfig:
    """The architecture in the first family of transformers that can express it.

    Raises UserError naming the options that none can express, and the layers that have them.
    """
    attempts: list[tuple[Family, list[str], str | None]] = []
    for variant in (config, *zero_bias_variants(config)):
        for family in TRANSFORMERS.values():
            fields = family.write(variant)
            problems: list[str] = []
            lost = _lost_options(family, fields, variant, problems)
            refusal = None if lost else next(iter(problems), None) or family.check_loadable(fields)
            if not lost and not refusal:
                return ConvertedConfig(family, {'model_type': family.name, **fields}, variant)
            attempts.append((family, lost, refusal))
    family, lost, refusal = min(attempts[: len(TRANSFORMERS)], key=lambda attempt: len(attempt[1]))
    values = (refusal or '').rstrip('.') or ', '.join(lost)
    raise UserError(
        f'transformers cannot express this architecture: {values}. The closest family, '
        f'{family.architecture}, does not support that. {FILE_HINT}'
    )


def zero_bias_variants(config: ModelArchitectureConfig) -> Iterator[ModelArchitectureConfig]:
    """The same function with additional biases, all zero: those beside LayerNorms, and those for
    the choice of experts."""
    configs = {None: config, **config.kinds}
    if all(c.normalization in ('layernorm', 'layernorm_nobias') for c in configs.values()):
        biases = ('attention_bias', 'ffn_bias')
        yield _with_options(config, biases, normalization='layernorm')
    if any('router_selection_bias' in c for c in configs.values()):
        yield _with_options(config, ('router_selection_bias',))


def _with_options(
    config: ModelArchitectureConfig, switches: tuple[str, ...], **values
) -> ModelArchitectureConfig:
    """The config with these values, and with the switches on wherever they are in use."""
    changes = {
        letter: {**values, **{key: True for key in switches if key in c}}
        for letter, c in {None: config, **config.kinds}.items()
    }
    own = changes.pop(None)
    return config.replace(
        **own, **({'layer_kinds': changes} if config.get('layer_pattern') else {})
    )


def _lost_options(
    family: Family, fields: dict, config: ModelArchitectureConfig, problems: list[str]
) -> list[str]:
    """The options that change in any layer when the fields are read back, as text."""
    read = family.read(fields, problems)
    try:
        back = ModelArchitectureConfig(**{'arch_preset': 'custom', **read})
    except UserError:  # invalid without the options that were left out
        pairs = [(letter, canonical_options(kind), read) for letter, kind in config.kinds.items()]
    else:
        pairs = list(paired_kinds(config, back, canonical_options))
    ignored = {*RUN_TIME_OPTIONS, *training_only_options(config)}
    places: dict[str, dict[str, None]] = {}  # of each lost option, an ordered set
    for place, options, read_back in pairs:
        for key, value in options.items():
            if key not in ignored and not _nearly_equal(read_back.get(key), value):
                places.setdefault(f'{key}={value!r}', {})[place] = None
    return [f'{text} {in_layers(where, config)}'.rstrip() for text, where in places.items()]


def _nearly_equal(one, other) -> bool:
    """Whether two values are equal up to rounding."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return one == other


def export(config: ModelArchitectureConfig, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a folder that transformers' AutoModelForCausalLM.from_pretrained loads.

    weights: full tensors by name, tied ones once; parameters in the dtype to write. Raises
    UserError naming the options that transformers cannot express, and OSError.
    """
    family, fields, variant = convert_config(config)
    built = build_model(variant)
    (dtype,) = {weights[name].dtype for name, _ in built.named_parameters() if name in weights}
    biases = {
        name: torch.zeros(tensor.shape, dtype=dtype)
        for name, tensor in saved_tensors(built).items()
        if name not in weights
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in (weights | biases).items():
        tensor_map, names = tensor_map_of(family, name, variant)
        parts = tensor_map.write(tensor.detach(), layer_config(variant, name))
        tensors.update(zip(names, parts, strict=True))
        for constant, value in tensor_map.constants:
            tensors[constant.format(layer=name.split('.')[1])] = tensor.new_tensor(value)
    header = {
        'architectures': [family.architecture],
        'dtype': str(dtype).removeprefix('torch.'),
        # Special tokens depend on the tokenizer; the family's defaults would be wrong.
        **dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id')),
        **fields,
    }
    folder.mkdir()
    save_tensors(tensors, folder / 'model.safetensors', {})
    _write_json(folder / 'config.json', header)


def write_generation_config(folder: Path, end_of_text: int | None, unused: range) -> None:
    """Write the end-of-text token and the unused token ids to an exported folder.

    Raises OSError.
    """
    header = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    ends = dict.fromkeys(('bos_token_id', 'eos_token_id'), end_of_text)
    if end_of_text is not None:
        _write_json(folder / 'config.json', header | ends)
    # generate() also pads with it; in config.json it would be an embedding without a gradient.
    generation = {**ends, 'pad_token_id': end_of_text, 'suppress_tokens': [*unused] or None}
    _write_json(folder / 'generation_config.json', generation)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a .safetensors file, on the CPU. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    written = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(written, path, metadata={'format': 'pt', **metadata})
    except SafetensorError as error:  # raised for a full disk
        raise OSError(str(error)) from error


# --------------------------------------------------------------------------------------------------
# Check with transformers


@torch.no_grad()
def check_export(model: Transformer, folder: Path) -> str:
    """Load an exported folder with transformers, and compare its logits with the model's.

    Returns a sentence on what was checked: without transformers nothing, and without memory for two
    more models only the config and the number of parameters. Raises UserError if transformers
    cannot load the folder or computes other logits.
    """
    try:
        with silent_transformers():
            from transformers import AutoConfig, AutoModelForCausalLM, __version__
    except ImportError:
        return 'transformers is not installed, so it was not loaded as a check'
    parameters = sum(parameter.numel() for parameter in model.parameters())
    enough = psutil.virtual_memory().available > 2 * 4 * parameters
    try:
        with silent_transformers():
            if enough:
                theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
                off = _difference(copy.deepcopy(model).float().eval(), theirs)
                problem = off > TOLERANCE and f'its logits differ by {off:.1e}'
            else:
                with torch.device('meta'):
                    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
                made = sum(
                    p.numel() for p in build_model(convert_config(model.config).config).parameters()
                )
                problem = (
                    theirs.num_parameters(only_trainable=True) != made and 'its parameters differ'
                )
    except Exception as error:  # transformers raises all kinds of errors
        problem = f'{type(error).__name__}: {error}'
    if problem:
        raise UserError(
            f'transformers {__version__} cannot use the exported folder ({problem}). {FILE_HINT}'
        )
    if enough:
        return f'transformers {__version__} loads it and gives the same logits'
    return f'transformers {__version__} reads its config; not enough memory to load its weights'


def _difference(ours: Transformer, theirs: torch.nn.Module) -> float:
    """The largest difference of the logits, relative to the largest of ours."""
    length = min(CHECKED_TOKENS, ours.config.block_size)
    tokens = torch.arange(length)[None] * 7919 % ours.config.vocab_size
    expected = ours(tokens)
    # Without a cache, which transformers refuses for models without any attention.
    logits = theirs(tokens, use_cache=False).logits[..., : ours.config.vocab_size]
    if expected.shape != logits.shape:
        return math.inf
    same = torch.equal(expected.isnan(), logits.isnan())  # of weights that are not finite
    off = torch.linalg.norm((logits - expected).nan_to_num(0.0, 0.0, 0.0))
    return (off / torch.linalg.norm(expected.nan_to_num())).item() if same else math.inf


@contextlib.contextmanager
def silent_transformers() -> Iterator[None]:
    """Silence transformers' progress bars, and warnings about what the check reports."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield
