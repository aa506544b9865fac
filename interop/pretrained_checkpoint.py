"""A pretrained checkpoint: its config as our options, and its tensors as our parameters.

Only tensors and plain values are read: safetensors, or a pickle that torch loads with
weights_only=True. No foreign code is run. Nothing is ignored silently: see `interop.fields` for
the config; every tensor belongs to a parameter, is known not to be a weight, or is refused.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch

from common.errors import UserError, did_you_mean
from components.base import saved_tensors
from interop import hub
from interop.checkpoint_folder import read_json_object, weight_files
from interop.families import NANOGPT, TRANSFORMERS, Family, TensorMap
from interop.fields import short_repr
from interop.layers import layer_config
from interop.tensors import scale_rows
from model_builder import build_model
from model_config import ModelArchitectureConfig
from training.checkpoint import load_tensors, unreadable_tensors
from training_config import GPT2_SIZES

MAX_NAMED = 3  # maximum number of tensors that a message names
# The safetensors types of weights; the others are quantized or not numbers.
FLOATING = ('F64', 'F32', 'F16', 'BF16', 'F8_E4M3', 'F8_E5M2')


class StoredTensor(NamedTuple):
    """A tensor in a file: its shape and type, and a function that reads it."""

    shape: tuple[int, ...]
    is_floating_point: bool
    read: Callable[[], torch.Tensor]


@dataclass
class PretrainedCheckpoint:
    """A pretrained checkpoint: its family, its config, and its tensors, which are read lazily."""

    name: str  # the user's init_from: 'hf:gpt2'
    family: Family
    fields: dict
    tensors: dict[str, StoredTensor]
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # for the user

    @cached_property
    def config(self) -> ModelArchitectureConfig:
        """The architecture. Raises UserError naming the unsupported fields."""
        problems: list[str] = []
        options = self.family.read(self.fields, problems)
        if not problems and options.get('weight_tying') and self._has_untied_head():
            options['weight_tying'] = False
            self.notes.append(
                f'{self.name}: its config ties the output head to the token embedding, but its '
                f'files have a different head. The head is used, untied, as in transformers.'
            )
        if not problems:
            try:
                return ModelArchitectureConfig(**{'arch_preset': 'custom', **options})
            except UserError as error:
                problems = list(error.problems)
        raise UserError(*(f'{self.name}: {problem}' for problem in problems))

    def check(self) -> None:
        """Compare the config with the tensors before they are read.

        Raises UserError for a tensor that is missing, unexpected, or of another shape or type.
        """
        _ = self._tensor_maps

    def weights(self, config: ModelArchitectureConfig) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter of the model of `config` by name, one at a time.

        config: the checkpoint's, except for run-time options. Raises UserError as `check` does.
        """
        shapes = {name: t.shape for name, t in saved_tensors(build_model(config)).items()}
        for name, (tensor_map, names) in self._tensor_maps.items():
            read = [self.tensors[key].read() for key in names]
            tensor = tensor_map.read(read, layer_config(config, name))
            if tensor.shape != shapes[name]:
                raise UserError(
                    f'{self.name}: {", ".join(names)} give a tensor of shape '
                    f'{tuple(tensor.shape)}, but {tuple(shapes[name])} is needed.'
                )
            yield name, scale_rows(tensor, self.row_factors(name))

    def row_factors(self, name: str) -> torch.Tensor | float:
        """The constants of the config by which a parameter's rows are multiplied, or one of all."""
        fields = self.family.fields(self.fields, [])
        return self.family.row_factors(fields, name, layer_config(self.config, name))

    @cached_property
    def _tensor_maps(self) -> dict[str, tuple[TensorMap, list[str]]]:
        """For each parameter of the checkpoint's config, its map and the names of its tensors."""
        config = self.config
        self._check_counts(config)
        try:
            parameters = saved_tensors(build_model(config))
        except UserError as error:
            raise UserError(*(f'{self.name}: {problem}' for problem in error.problems)) from error
        tensor_maps: dict[str, tuple[TensorMap, list[str]]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in parameters.items():
            tensor_map, names = tensor_map_of(self.family, name, config)
            names = [self._stored_name(tensor_name) for tensor_name in names]
            tensor_maps[name] = tensor_map, names
            parts = tensor_map.write(parameter.detach(), layer_config(config, name))
            shapes.update((key, tuple(part.shape)) for key, part in zip(names, parts, strict=True))
        for name in shapes.keys() - self.tensors.keys():
            if re.search(self.family.zero_tensors, name):
                zeros = partial(torch.zeros, shapes[name])
                self.tensors[name] = StoredTensor(shapes[name], True, zeros)
        self._check_names(shapes, config)
        divided = {
            key
            for tensor_map, names in tensor_maps.values()
            if tensor_map.any_split
            for key in names
        }
        self._check_shapes(shapes, divided)
        return tensor_maps

    def _check_counts(self, config: ModelArchitectureConfig) -> None:
        """Raise UserError if the config has more layers or experts than the files have tensors.

        A model of that many would take minutes to build.
        """
        for option in ('n_layer', 'num_experts'):
            number = max(kind.get(option) or 0 for kind in config.kinds.values())
            if number > len(self.tensors):
                raise UserError(
                    f'{self.name}: its config has {option}={number}, but its files have only '
                    f'{len(self.tensors)} tensors.'
                )

    def _check_names(self, shapes: dict, config: ModelArchitectureConfig) -> None:
        missing = [name for name in shapes if name not in self.tensors]
        known = set(shapes)
        if config.weight_tying:
            known |= {self._stored_name(name) for name in self._head_templates}
        unknown = [
            name
            for name in self.tensors.keys() - known
            if not re.search(self.family.ignored_tensors, name)
        ]
        if missing or unknown:
            raise UserError(
                *(f'{self.name} has no tensor {name!r}.' for name in missing[:MAX_NAMED]),
                *(
                    f'{self.name} has a tensor {name!r} that is not part of '
                    f'{self.family.architecture} with its config.'
                    for name in sorted(unknown)[:MAX_NAMED]
                ),
            )

    def _check_shapes(self, shapes: dict[str, tuple[int, ...]], divided: set[str]) -> None:
        """divided: tensors of any number of rows; `weights` checks their sum."""
        problems = []
        for name, shape in shapes.items():
            stored = self.tensors[name]
            first = 1 if name in divided else 0
            if stored.shape[first:] != shape[first:]:
                problems.append(
                    f'{self.name}: {name} has shape {stored.shape}, but its config requires '
                    f'{shape}.'
                )
            elif not stored.is_floating_point:
                problems.append(
                    f'{self.name}: {name} is not a floating-point tensor. Quantized weights are '
                    f'not supported.'
                )
        if problems:
            raise UserError(*problems[:MAX_NAMED])

    @property
    def _head_templates(self) -> tuple[str, ...]:
        return self.family.weights['output_head.projection.weight'].templates

    def _has_untied_head(self) -> bool:
        """Whether the files have an output head that differs from the token embedding.

        A pickle has a tied tensor under both names. Raises UserError.
        """
        (head,) = self._head_templates
        (table,) = self.family.weights['token_embedding.weight'].templates
        stored = [self.tensors.get(self._stored_name(name)) for name in (head, table)]
        tensors = [tensor.read() for tensor in stored if tensor]
        if len(tensors) < 2:
            return False
        same_memory = tensors[0].data_ptr() == tensors[1].data_ptr()
        differ = not same_memory and not torch.equal(*tensors)
        if differ and self.family.ties_always:
            raise UserError(
                f'{self.name}: {head} and {table} differ, but {self.family.architecture} ties '
                f'them. Remove the wrong one from the files.'
            )
        return differ

    def _stored_name(self, name: str) -> str:
        """The tensor's name in this checkpoint; in one of a base model, without the prefix."""
        short = name.removeprefix(self.family.prefix)
        return short if short in self.tensors and name not in self.tensors else name


def tensor_map_of(
    family: Family, name: str, config: ModelArchitectureConfig
) -> tuple[TensorMap, list[str]]:
    """The map of a parameter, and the names of its tensors.

    Raises KeyError if the family has no such parameter.
    """
    layer = re.match(r'blocks\.(\d+)\.', name)
    tensor_map = family.weights[re.sub(r'^blocks\.\d+\.', 'blocks.{layer}.', name)]
    number = layer and layer[1]
    return tensor_map, tensor_map.names(number, layer_config(config, name))


# --------------------------------------------------------------------------------------------------
# Sources of checkpoints


def _open_hugging_face(name: str, place: str) -> PretrainedCheckpoint:
    """A folder with config.json and model.safetensors, or a name on the hub."""
    folder = Path(place) if Path(place).is_dir() else hub.model_folder(name, place)
    file = folder / 'config.json'
    try:
        fields = read_json_object(file)
        files = weight_files(folder)
    except (OSError, ValueError) as error:
        raise UserError(f'{name}: {folder} cannot be read: {error}.') from error
    kind = fields.get('model_type')
    if not isinstance(kind, str) or kind not in TRANSFORMERS:
        raise UserError(
            f'{name}: model_type={short_repr(kind)} is not supported.'
            f'{did_you_mean(kind, TRANSFORMERS) if isinstance(kind, str) else ""} '
            f'python interop/coverage.py lists the supported ones, and what the others lack.'
        )
    if fields.get('quantization_config'):
        raise UserError(f'{name}: quantization_config: quantized weights are not supported.')
    if not files:
        raise UserError(f'{name}: {folder} has neither model.safetensors nor pytorch_model.bin.')
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        opened = _open_tensors(name, path)
        twice = sorted(tensors.keys() & opened.keys())
        if twice:
            raise UserError(f'{name}: {twice[0]!r} is in {path.name} and in another file.')
        tensors |= opened
    family = TRANSFORMERS[kind]
    for pattern, ours in family.renamed_tensors.items():
        tensors = {re.sub(pattern, ours, key): stored for key, stored in tensors.items()}
    return PretrainedCheckpoint(name, family, fields, tensors, [file, *files])


def _open_tensors(name: str, path: Path) -> dict[str, StoredTensor]:
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
            key: StoredTensor(
                tuple(slice.get_shape()),
                slice.get_dtype() in FLOATING,
                partial(opened.get_tensor, key),
            )
            for key, slice in slices.items()
        }
    except Exception as error:
        raise UserError(f'{name}: {path} cannot be read: {error}.') from error


def _stored(name: str, path: Path, state: dict, prefix: str = '') -> dict[str, StoredTensor]:
    """The tensors of an unpickled dict, without the prefix. Raises UserError for other values."""
    stored = {}
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(
                f'{name}: {path} must contain tensors by name, but has {short_repr(key)} with '
                f'{type(tensor).__name__}.'
            )
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UserError(f'{name}: {path}: {key!r} is not a plain tensor.')
        stored[key.removeprefix(prefix)] = StoredTensor(
            tuple(tensor.shape), tensor.is_floating_point(), tensor.detach
        )
    return stored


def _unpickle(name: str, path: Path) -> dict:
    try:
        content = load_tensors(path)
    except OSError as error:
        raise UserError(f'{name}: {path} cannot be read: {error.strerror}.') from error
    except Exception as error:  # the unpickler raises all kinds of errors for a foreign file
        raise UserError(f'{name}: {unreadable_tensors(path, error)}') from error
    if not isinstance(content, dict):
        raise UserError(f'{name}: {path} holds no checkpoint.')
    return content


def _open_nanogpt(name: str, place: str) -> PretrainedCheckpoint:
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
    return PretrainedCheckpoint(name, NANOGPT, arguments, tensors, [path])


OPENERS = {'hf': _open_hugging_face, 'nanogpt': _open_nanogpt}


def open_checkpoint(name: str) -> PretrainedCheckpoint:
    """The checkpoint that `gpt2…`, `hf:…` or `nanogpt:…` names. Raises UserError."""
    kind, _, place = name.partition(':')
    if name in GPT2_SIZES:
        kind, place = 'hf', hub.ORGANIZATION + name
    return OPENERS[kind](name, place)
