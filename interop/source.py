"""Somebody's checkpoint: its config in our terms, and its tensors as our parameters.

What comes from elsewhere is tensors and plain values: safetensors, or a pickle that torch reads
with weights_only=True. No code of theirs is run. Nothing is left over without a word: of the config
see `weight_maps.fields`, and every tensor is a parameter's, known to hold no weights, or refused.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from common.errors import UserError, nearest
from interop import hub
from interop.checkpoint_folder import read_object, weight_files
from interop.families import NANOGPT, TRANSFORMERS, Family, Weight
from interop.fields import brief
from model_builder import build_model
from model_config import ModelArchitectureConfig
from training.checkpointing import load_tensors
from training_config import GPT2_SIZES

SHOWN = 3  # tensors that a message names
# Of safetensors' types those that weights have; the others are quantized or no numbers.
FLOATING = ('F64', 'F32', 'F16', 'BF16', 'F8_E4M3', 'F8_E5M2')


class Stored(NamedTuple):
    """A tensor in a file: what it is, and how to get it."""

    shape: tuple[int, ...]
    floating: bool
    read: Callable[[], torch.Tensor]


@dataclass
class Source:
    """Somebody's checkpoint: its family, its config, and its tensors, read when they are needed."""

    name: str  # as the user called it: 'hf:gpt2'
    family: Family
    fields: dict
    tensors: dict[str, Stored]
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the user should know of it

    @cached_property
    def config(self) -> ModelArchitectureConfig:
        """The architecture in our terms. Raises UserError naming what cannot be expressed."""
        problems: list[str] = []
        options = self.family.read(self.fields, problems)
        if not problems and options.get('weight_tying') and self._has_a_head_of_its_own():
            options['weight_tying'] = False
            self.notes.append(
                f'{self.name}: its config ties the output head to the token table, but its files '
                f'have a head that differs. It is used as it is, untied, as transformers does.'
            )
        if not problems:
            try:
                return ModelArchitectureConfig(**{'arch_preset': 'custom', **options})
            except UserError as error:
                problems = list(error.problems)
        raise UserError(*(f'{self.name}: {problem}' for problem in problems))

    def check(self) -> None:
        """Compare config and tensors, before anything is made of them.

        Raises UserError where a tensor is missing, left over, or of another shape or type.
        """
        _ = self._sources

    def weights(self, config: ModelArchitectureConfig) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter of the model of `config` by name, one at a time.

        config: that of the source, but for harmless options. Raises UserError as `check` does.
        """
        shapes = {name: p.shape for name, p in build_model(config).named_parameters()}
        for name, (weight, names) in self._sources.items():
            tensor = weight.read([self.tensors[theirs].read() for theirs in names], config)
            if tensor.shape != shapes[name]:
                raise UserError(
                    f'{self.name}: {", ".join(names)} make a tensor of {tuple(tensor.shape)}, and '
                    f'{tuple(shapes[name])} is needed.'
                )
            yield name, tensor

    @cached_property
    def _sources(self) -> dict[str, tuple[Weight, list[str]]]:
        """Each parameter of the source's own config: what it is made of, and of which tensors."""
        config = self.config
        self._check_counts(config)
        try:
            parameters = dict(build_model(config).named_parameters())
        except UserError as error:
            raise UserError(*(f'{self.name}: {problem}' for problem in error.problems)) from error
        sources, shapes, zeros = {}, {}, set()
        for name, parameter in parameters.items():
            weight, theirs, beside = weight_of(self.family, name, config)
            names = [self._name_here(called) for called in theirs]
            sources[name] = weight, names
            written = weight.write(parameter.detach(), config)
            shapes.update((here, tuple(part.shape)) for here, part in zip(names, written))
            zeros.add(beside)
        self._check_names(shapes, zeros, config)
        self._check_shapes(shapes)
        return sources

    def _check_counts(self, config: ModelArchitectureConfig) -> None:
        """Each layer and each expert has tensors; a model of many more would take minutes."""
        for option in ('n_layer', 'num_experts'):
            number = config.to_dict().get(option) or 0
            if number > len(self.tensors):
                raise UserError(
                    f'{self.name}: {option}={number} by its config, and its files have '
                    f'{len(self.tensors)} tensors in all.'
                )

    def _check_names(self, shapes: dict, zeros: set, config: ModelArchitectureConfig) -> None:
        missing = [name for name in shapes if name not in self.tensors]
        known = shapes.keys() | {
            name for name in zeros & self.tensors.keys() if not self.tensors[name].read().any()
        }
        if config.weight_tying:
            known |= {self._name_here(name) for name in self._head}
        unknown = [
            name for name in self.tensors.keys() - known if not re.search(self.family.ignored, name)
        ]
        if missing or unknown:
            raise UserError(
                *(f'{self.name} has no tensor {name!r}.' for name in missing[:SHOWN]),
                *(
                    f'{self.name} has a tensor {name!r} that {self.family.architecture} of its '
                    f'config has no place for.'
                    for name in sorted(unknown)[:SHOWN]
                ),
            )

    def _check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        problems = []
        for name, shape in shapes.items():
            stored = self.tensors[name]
            if stored.shape != shape:
                problems.append(
                    f'{self.name}: {name} is a tensor of {stored.shape}, and {shape} was expected '
                    f'after its config.'
                )
            elif not stored.floating:
                problems.append(
                    f'{self.name}: {name} holds no floating-point numbers: only weights that are '
                    f'not quantized.'
                )
        if problems:
            raise UserError(*problems[:SHOWN])

    @property
    def _head(self) -> tuple[str, ...]:
        return self.family.weights['output_head.projection.weight'].theirs

    def _has_a_head_of_its_own(self) -> bool:
        """Whether the files have a head that is not the token table. Raises UserError.

        A pickle has a tied table under both names.
        """
        (head,) = self._head
        (table,) = self.family.weights['token_embedding.weight'].theirs
        here = [self.tensors.get(self._name_here(name)) for name in (head, table)]
        if None in here:
            return False
        one, other = (stored.read() for stored in here)
        differ = one.data_ptr() != other.data_ptr() and not torch.equal(one, other)
        if differ and self.family.ties_always:
            raise UserError(
                f'{self.name}: {head} and {table} differ, and {self.family.architecture} has one '
                f'table for both: which of them is right cannot be said.'
            )
        return differ

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
# Where checkpoints are


def _open_hugging_face(name: str, place: str) -> Source:
    """A folder with config.json and model.safetensors, or a name on the hub."""
    folder = Path(place) if Path(place).is_dir() else hub.model_folder(name, place)
    file = folder / 'config.json'
    try:
        fields = read_object(file)
        files = weight_files(folder)
    except (OSError, ValueError) as error:
        raise UserError(f'{name}: {folder} cannot be read: {error}.') from error
    kind = fields.get('model_type')
    if not isinstance(kind, str) or kind not in TRANSFORMERS:
        known = ', '.join(TRANSFORMERS)
        raise UserError(
            f'{name}: model_type={brief(kind)} is not known here; known are {known}.'
            f'{nearest(kind, TRANSFORMERS) if isinstance(kind, str) else ""}'
        )
    if fields.get('quantization_config'):
        raise UserError(f'{name}: quantization_config: only weights that are not quantized.')
    if not files:
        raise UserError(f'{name}: {folder} has neither model.safetensors nor pytorch_model.bin.')
    tensors: dict[str, Stored] = {}
    for path in files:
        opened = _open_tensors(name, path)
        twice = sorted(tensors.keys() & opened.keys())
        if twice:
            raise UserError(f'{name}: {path.name} has {twice[0]!r}, and another file has it, too.')
        tensors |= opened
    return Source(name, TRANSFORMERS[kind], fields, tensors, [file, *files])


def _open_tensors(name: str, path: Path) -> dict[str, Stored]:
    """The tensors of a file by name. Raises UserError."""
    if path.suffix != '.safetensors':
        return _stored(name, path, _unpickle(name, path))
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(f'{name}: {path.name} needs a package: pip install safetensors.') from error
    try:
        opened = safe_open(path, framework='pt')
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        return {
            key: Stored(
                tuple(slice.get_shape()),
                slice.get_dtype() in FLOATING,
                lambda key=key: opened.get_tensor(key),
            )
            for key, slice in slices.items()
        }
    except Exception as error:
        raise UserError(f'{name}: {path} cannot be read: {error}.') from error


def _stored(name: str, path: Path, state: dict, prefix: str = '') -> dict[str, Stored]:
    """The tensors of an unpickled dict, without that prefix. Raises UserError for all else."""
    stored = {}
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(
                f'{name}: {path} must hold tensors by name, and has {brief(key)} with '
                f'{type(tensor).__name__}.'
            )
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UserError(f'{name}: {path}: {key!r} is no plain tensor.')
        stored[key.removeprefix(prefix)] = Stored(
            tuple(tensor.shape), tensor.is_floating_point(), lambda tensor=tensor: tensor
        )
    return stored


def _unpickle(name: str, path: Path) -> dict:
    try:
        content = load_tensors(path)
    except OSError as error:
        raise UserError(f'{name}: {path} cannot be read: {error.strerror}.') from error
    except Exception as error:  # a foreign file makes the unpickler fail in every way there is
        raise UserError(
            f'{name}: {path} cannot be read as tensors and plain values ({type(error).__name__}); '
            f'whatever else it holds was not run.'
        ) from error
    if not isinstance(content, dict):
        raise UserError(f'{name}: {path} holds no checkpoint.')
    return content


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
    tensors = _stored(name, path, state, prefix='_orig_mod.')
    return Source(name, NANOGPT, arguments, tensors, [path])


OPENERS = {'hf': _open_hugging_face, 'nanogpt': _open_nanogpt}


def open_source(name: str) -> Source:
    """The checkpoint that `gpt2…`, `hf:…` or `nanogpt:…` names. Raises UserError."""
    kind, _, place = name.partition(':')
    if name in GPT2_SIZES:
        kind, place = 'hf', hub.ORGANIZATION + name
    return OPENERS[kind](name, place)
