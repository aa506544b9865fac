"""Begin from other people's weights, and write ours for them, by the tables of `weight_maps`.

    python train.py config/mine.py --init_from=gpt2                    # or gpt2-medium, -large, -xl
    python train.py config/mine.py --init_from=hf:FOLDER_OR_NAME       # Hugging Face
    python train.py config/mine.py --init_from=nanogpt:out/ckpt.pt     # nanoGPT

What comes from elsewhere is tensors and plain values: safetensors, or a pickle that torch reads
with weights_only=True. No code of theirs is run.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

import hub
from configurator import CommandLine, Layer
from errors import UserError, nearest
from model_builder import Transformer, build_model
from model_config import (
    INITIALIZATION_REGISTRY,
    ROPE_SCALING_REGISTRY,
    ModelArchitectureConfig,
)
from optimization import Updater
from parallelism import SingleProcess
from resumption import Progress
from token_files import file_sha256
from training_config import BEGINNINGS, GPT2_SIZES, Settings, schema
from training_logger import TrainingLogger
from weight_maps import NANOGPT, TRANSFORMERS, Family, Weight, function_of

# How long sequences are, how many documents are in one, and how it is computed: a run with imported
# weights may have it otherwise, and another's model is given one document at a time.
HARMLESS = ('block_size', 'vocab_size', 'attention_backend', 'document_mask', 'end_of_text')


def of_training(config: ModelArchitectureConfig) -> set[str]:
    """Options that act in training alone: a run with imported weights has its own."""
    initialization = INITIALIZATION_REGISTRY[config.initialization]
    begin = {key for c in INITIALIZATION_REGISTRY for key in INITIALIZATION_REGISTRY[c].options}
    begin.add('initialization')
    if initialization.output_scale(config) != 1:
        begin.clear()  # it acts on the logits, too
    dropout = {'dropout', 'attention_dropout', 'residual_dropout'}
    losses = {'z_loss', 'load_balance_weight', 'router_z_loss'}
    return {'multiple_of', *begin, *dropout, *losses}


def of_longer_context(config: ModelArchitectureConfig) -> set[str]:
    """Options that a run with imported weights may set to reach beyond their context."""
    if config.to_dict().get('rope_scaling') != 'none':  # no RoPE, or it has been scaled before
        return set()
    scalings = (ROPE_SCALING_REGISTRY[name] for name in ROPE_SCALING_REGISTRY)
    return {'rope_scaling', *(key for scaling in scalings for key in scaling.options)}


@dataclass
class Source:
    """Somebody's checkpoint: its family, its config, and its tensors, read when asked for."""

    name: str  # as it was asked for: 'hf:gpt2'
    family: Family
    fields: dict
    tensors: dict[str, Callable[[], torch.Tensor]]
    files: list[Path] = field(default_factory=list)

    @cached_property
    def config(self) -> ModelArchitectureConfig:
        """The architecture in our terms. Raises UserError naming what cannot be expressed."""
        problems: list[str] = []
        options = self.family.read(self.fields, problems)
        if problems:
            raise UserError(*(f'{self.name}: {problem}' for problem in problems))
        try:
            return ModelArchitectureConfig(**{'arch_preset': 'custom', **options})
        except UserError as error:
            raise UserError(*(f'{self.name}: {problem}' for problem in error.problems)) from error

    def weights(self, config: ModelArchitectureConfig) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter of the model of `config` by name, one at a time.

        config: that of the source, but for harmless options. Raises UserError where a tensor is
        missing, left over, or of another shape.
        """
        wanted = {
            name: (*weight_of(self.family, name, config), parameter.shape)
            for name, parameter in build_model(config).named_parameters()
        }
        used = {theirs for _, names, _, _ in wanted.values() for theirs in names}
        zeros = {
            beside
            for _, _, beside, _ in wanted.values()
            if beside in self.tensors and not self.tensors[beside]().any()
        }
        head = self.family.weights['output_head.projection.weight'].theirs
        tied = head if config.weight_tying else ()
        found = {self._name_here(theirs): theirs for theirs in used}
        left = [
            name
            for name in self.tensors.keys() - found.keys() - zeros - set(tied)
            if not re.search(self.family.ignored, name)
        ]
        missing = [theirs for name, theirs in found.items() if name not in self.tensors]
        if missing or left:
            raise UserError(
                *(f'{self.name} has no tensor {name!r}.' for name in missing[:3]),
                *(
                    f'{self.name} has a tensor {name!r} that {self.family.architecture} of its '
                    f'config has no place for.'
                    for name in sorted(left)[:3]
                ),
            )
        for name, (weight, names, _, shape) in wanted.items():
            tensors = [self.tensors[self._name_here(theirs)]() for theirs in names]
            try:
                tensor = weight.read(tensors, config)
            except (RuntimeError, IndexError) as error:
                raise UserError(f'{self.name}: {", ".join(names)} do not fit: {error}') from error
            if tensor.shape != shape:
                raise UserError(
                    f'{self.name}: {", ".join(names)} make a tensor of {tuple(tensor.shape)}, and '
                    f'{tuple(shape)} was expected after its config.'
                )
            yield name, tensor

    def _name_here(self, name: str) -> str:
        """The name in this checkpoint, which may be that of a base model without the prefix."""
        short = name.removeprefix(self.family.prefix)
        return short if short in self.tensors and name not in self.tensors else name


def weight_of(
    family: Family, name: str, config: ModelArchitectureConfig
) -> tuple[Weight, list[str], str | None]:
    """What a parameter of ours is made of, the names of that, and of zeros beside it.

    Raises KeyError where the family has no such thing.
    """
    layer = re.match(r'blocks\.(\d+)\.', name)
    weight = family.weights[re.sub(r'^blocks\.\d+\.', 'blocks.{layer}.', name)]
    number = layer and layer[1]
    zeros = weight.zeros and weight.zeros.format(layer=number)
    return weight, weight.names(number, config), zeros


# --------------------------------------------------------------------------------------------------
# Where checkpoints are found


def _open_hugging_face(name: str, place: str) -> Source:
    """A folder with config.json and model.safetensors, or a name on the hub."""
    folder = Path(place) if Path(place).is_dir() else hub.model_folder(name, place)
    file = folder / 'config.json'
    try:
        fields = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f'{name}: {file} cannot be read: {error}') from error
    kind = fields.get('model_type') if isinstance(fields, dict) else None
    if kind not in TRANSFORMERS:
        known = ', '.join(TRANSFORMERS)
        raise UserError(
            f'{name}: model_type={kind!r} is not known here; known are {known}.'
            f'{nearest(str(kind), TRANSFORMERS)}'
        )
    if fields.get('quantization_config'):
        raise UserError(f'{name}: quantization_config: only weights that are not quantized.')
    try:
        files = hub.weight_files(folder)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f'{name}: the index of {folder} cannot be read: {error!r}.') from error
    if not files:
        raise UserError(f'{name}: {folder} has neither model.safetensors nor pytorch_model.bin.')
    tensors = {key: get for path in files for key, get in _open_tensors(name, path).items()}
    return Source(name, TRANSFORMERS[kind], fields, tensors, [file, *files])


def _open_tensors(name: str, path: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Tensor name -> what reads it."""
    if path.suffix != '.safetensors':
        return {key: lambda t=t: t for key, t in _unpickle(name, path).items()}
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(f'{name}: {path.name} needs a package: pip install safetensors.') from error
    try:
        opened = safe_open(path, framework='pt')
        return {key: lambda key=key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except Exception as error:
        raise UserError(f'{name}: {path} cannot be read: {error}') from error


def _unpickle(name: str, path: Path) -> dict:
    try:
        found = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f'{name}: {path} cannot be read: {error.strerror}.') from error
    except Exception as error:  # a foreign file makes the unpickler fail in every way there is
        raise UserError(
            f'{name}: {path} cannot be read as tensors and plain values ({type(error).__name__}); '
            f'whatever else it holds was not run.'
        ) from error
    if not isinstance(found, dict):
        raise UserError(f'{name}: {path} holds no checkpoint.')
    return found


def _open_nanogpt(name: str, place: str) -> Source:
    """nanoGPT's ckpt.pt, or the folder that holds it."""
    path = Path(place)
    path = path / 'ckpt.pt' if path.is_dir() else path
    if not path.is_file():
        raise UserError(f'{name}: there is no file {path}. Give the path of a ckpt.pt.')
    checkpoint = _unpickle(name, path)
    arguments, state = checkpoint.get('model_args'), checkpoint.get('model')
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise UserError(f'{name}: {path} is no checkpoint of nanoGPT: it has no model_args.')
    # torch.compile's wrapper leaves its mark in the names.
    tensors = {key.removeprefix('_orig_mod.'): lambda t=t: t for key, t in state.items()}
    return Source(name, NANOGPT, arguments, tensors, [path])


OPENERS = {'hf': _open_hugging_face, 'nanogpt': _open_nanogpt}


def open_source(name: str) -> Source:
    """The checkpoint that `gpt2…`, `hf:…` or `nanogpt:…` names. Raises UserError."""
    kind, _, place = name.partition(':')
    if name in GPT2_SIZES:
        kind, place = 'hf', hub.ORGANISATION + name
    return OPENERS[kind](name, place)


# --------------------------------------------------------------------------------------------------
# Train on


@dataclass
class Imported:
    """A new run that begins from somebody's weights. As `resumption.Resumed` to `train.py`."""

    source: Source
    run_folder = None  # a new one

    @property
    def weights_from(self) -> dict:
        """For the record: what was asked for, what it is, and the sums of the files."""
        return {
            'source': self.source.name,
            'architecture': self.source.family.architecture,
            'files': {path.name: file_sha256(path) for path in self.source.files},
        }

    def check(self, settings: Settings) -> None:
        """Refuse options that contradict the source. Raises UserError naming them."""
        architecture = settings.architecture
        theirs, now = self.source.config.to_dict(), architecture.to_dict()
        free = {*HARMLESS, *of_training(architecture), *of_longer_context(self.source.config)}
        problems = [
            f'{key}={now.get(key)!r} ({architecture.origins.get(key, "not in use")}) contradicts '
            f'init_from={self.source.name}, which has {theirs.get(key)!r}: leave {key} out.'
            for key in {**theirs, **now}
            if key not in free and theirs.get(key) != now.get(key)
        ]
        known, scaling = self.source.config.block_size, now.get('rope_scaling')
        if scaling not in ('none', theirs.get('rope_scaling')) and architecture.block_size <= known:
            problems.append(
                f'rope_scaling={scaling!r} is for more tokens than the {known} of '
                f'init_from={self.source.name}, and block_size={architecture.block_size}: leave '
                f'it out, or give a larger --block_size.'
            )
        places = build_model(self.source.config).position_encoding.max_length
        if places is not None and architecture.block_size > places:
            problems.append(
                f'block_size={architecture.block_size}: init_from={self.source.name} has places '
                f'for {places} tokens, and learned ones cannot be made up: --block_size={places}, '
                f'or less.'
            )
        if problems:
            raise UserError(*problems)

    @torch.no_grad()
    def restore(self, parallel: SingleProcess, model: Transformer, updater: Updater) -> Progress:
        """Fill what this rank holds of each parameter; nothing has been trained yet."""
        pieces = parallel.weights(model)
        for name, tensor in self.source.weights(model.config):
            piece = pieces[name]
            end = piece.offset + len(piece.tensor)
            piece.tensor.copy_(tensor.reshape(-1)[piece.offset : end])
        return Progress()

    def report(self, logger: TrainingLogger, header: dict, surroundings: dict) -> None:
        """Begin the record."""
        logger.start(**header)
        asked, known = header['config'], self.source.config.block_size
        if asked['block_size'] > known and asked.get('rope_scaling') == 'none':
            logger.event(
                'note',
                None,
                f'block_size={asked["block_size"]}: {self.source.name} was trained on {known} '
                f'tokens, and RoPE as it is goes badly beyond that: --rope_scaling=yarn.',
            )


def find(asked: CommandLine) -> Imported | None:
    """The checkpoint that the command line begins from; its architecture lies beneath all else.

    Raises UserError if it cannot be read or expressed.
    """
    init_from = asked.value('init_from', schema)
    if init_from in BEGINNINGS:
        return None
    source = open_source(init_from)
    own = of_training(source.config)
    values = {key: value for key, value in source.config.to_dict().items() if key not in own}
    values['arch_preset'] = source.config.preset
    beneath = Layer(init_from, values)
    asked.layers.insert(0, beneath)
    if of_longer_context(source.config) and asked.value('rope_scaling', schema) != 'none':
        known, wanted = source.config.block_size, asked.value('block_size', schema)
        beneath.values['rope_scaling_factor'] = max(1.0, wanted / known)
        beneath.values['rope_original_block_size'] = known
    return Imported(source)


# --------------------------------------------------------------------------------------------------
# Export


class Expression(NamedTuple):
    """How transformers says an architecture: the family, its config's fields, and what they are."""

    family: Family
    fields: dict
    config: ModelArchitectureConfig  # ours, or one of the same function


def expressed_as(config: ModelArchitectureConfig) -> Expression:
    """The architecture in the first family of transformers that can express it.

    Raises UserError naming what none can express.
    """
    losses: list[tuple[Family, list[str]]] = []
    for said in (config, *with_zero_biases(config)):
        for family in TRANSFORMERS.values():
            fields = family.write(said)
            lost = _lost(family, fields, said)
            if not lost:
                return Expression(family, {'model_type': family.name, **fields}, said)
            losses.append((family, lost))
    family, lost = min(losses[: len(TRANSFORMERS)], key=lambda entry: len(entry[1]))
    options = function_of(config)
    values = ', '.join(f'{key}={options[key]!r}' for key in lost)
    raise UserError(
        f'transformers cannot express this architecture: {values}. The nearest that it has is '
        f'{family.architecture}, which cannot be that.'
    )


def with_zero_biases(config: ModelArchitectureConfig) -> Iterator[ModelArchitectureConfig]:
    """The same function, were all its biases there and nothing but zeros; if that makes sense."""
    options = config.to_dict()
    if options['normalization'] in ('layernorm', 'layernorm_nobias'):
        biases = {key: True for key in ('attention_bias', 'ffn_bias') if key in options}
        yield config.replace(normalization='layernorm', **biases)


def _lost(family: Family, fields: dict, config: ModelArchitectureConfig) -> list[str]:
    """The options that come back as something else when the fields are read again."""
    read = family.read(fields, [])
    try:
        back = function_of(ModelArchitectureConfig(**{'arch_preset': 'custom', **read}))
    except UserError:  # what is left out makes it illegal
        back = read
    lost = [key for key, value in function_of(config).items() if not _equal(back.get(key), value)]
    return [key for key in lost if key not in {*HARMLESS, *of_training(config)}]


def _equal(one, other) -> bool:
    """Whether values are the same, but for the rounding of a formula."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return one == other


def export(config: ModelArchitectureConfig, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a folder that transformers' AutoModelForCausalLM.from_pretrained loads.

    weights: whole parameters by name, tied ones once, in the dtype that they are to have. Raises
    UserError naming what transformers cannot express, and OSError.
    """
    family, fields, said = expressed_as(config)
    (dtype,) = {tensor.dtype for tensor in weights.values()}
    biases = {
        name: torch.zeros(parameter.shape, dtype=dtype)
        for name, parameter in build_model(said).named_parameters()
        if name not in weights
    }
    tensors = {}
    for name, tensor in (weights | biases).items():
        weight, names, zeros = weight_of(family, name, said)
        tensors.update(zip(names, weight.write(tensor.detach(), said)))
        if zeros:
            tensors[zeros] = tensor.new_zeros(len(tensor))
    header = {
        'architectures': [family.architecture],
        'dtype': str(dtype).removeprefix('torch.'),
        # Which tokens begin and end a text is the tokenizer's; the defaults are other people's.
        **dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id')),
        **fields,
    }
    folder.mkdir()
    save_tensors(tensors, folder / 'model.safetensors', {})
    _write_json(folder / 'config.json', header)


def tell_tokens(folder: Path, end_of_text: int | None, unused: range) -> None:
    """Say in an exported folder which token ends a text, and which ids no text has.

    Raises OSError.
    """
    header = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    ends = dict.fromkeys(('bos_token_id', 'eos_token_id'), end_of_text)
    _write_json(folder / 'config.json', header | ends)
    # What generates pads with it, too; in the config it would be an embedding without a gradient.
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
    except SafetensorError as error:  # so a full disk is told
        raise OSError(str(error)) from error
