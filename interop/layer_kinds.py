"""Families whose layers are of several kinds, such as attention in some and a recurrence in others.

How a hybrid family is declared, as data:

    FIELDS = layer_kinds_field(
        named_by_list('layer_types'),                          # the form that an export writes
        named_by_position('full_attention_interval', 4, LINEAR, FULL),   # another form of the same
        kinds={
            LINEAR: LayerKind(
                {'mixer': 'gated_deltanet'},                   # what tells our layers apart
                (field('gdn_heads', 'linear_num_value_heads', 32), ...),
            ),
            FULL: LayerKind({'mixer': 'attention'}, (rope_fields(), kv_heads_field(2), ...)),
        },
    )

- `LayerKind` has the options that identify our layers of that kind, and the field maps of options
  that only those layers have: they are read into those layers alone, and written from the first of
  them. So all options of attention (`head_dim`, RoPE, QK norms, biases, …) belong to its kind,
  and what all layers have (sizes, norms, the FFN) to `Family.field_maps`. A layer of one sublayer
  has `'mixer': 'none'` or `'ffn_type': 'none'`, mixers in parallel `'mixer': 'attention+mamba2'`.
  A family with such layers only needs no kinds but `constant_option`.
- If both mixers and FFNs differ, each has a `layer_kinds_field`.
- Several forms of the names may exist in a config.json; those that do must agree.
- Weights: `Family.weights` has our names of all kinds, `blocks.{layer}.mixers.NAME.*` for mixers
  other than attention. A layer uses those it has. If a name of theirs depends on the kind,
  `TensorMap.choose_templates` gets the layer's config. The norms here are `attention_norm`
  (whatever the mixer) and `ffn_norm`. For rows that are fused or permuted, and for tensors of
  another shape, see `TensorMap`.
- Tests: `helpers.transformers_models.assert_parity(fields, letters, folder)`, and an entry in BASES
  of tests/helpers/foreign_configs.py, by which each field alone is compared with transformers.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from interop.fields import Fields, short_repr
from interop.layers import ABSENT, PerLayer
from interop.mapping import MAX_LAYERS, FieldMap, constant_option
from model_config import ModelArchitectureConfig


class LayerKind(NamedTuple):
    """Layers that config.json calls alike.

    options: ours, by which a layer is recognized. field_maps: further options of these layers.
    """

    options: dict
    field_maps: tuple[FieldMap, ...] = ()

    def read(self, fields: Fields) -> dict:
        """The options of layers of this kind."""
        maps = (field_map.read(fields) for field_map in self.field_maps)
        return {**self.options, **{key: value for read in maps for key, value in read.items()}}

    def includes(self, layer: ModelArchitectureConfig) -> bool:
        return all(layer.get(key) == value for key, value in self.options.items())


# Layers whose FFN is SwiGLU or a mixture of experts, as transformers' `mlp_layer_types` names them.
DENSE, SPARSE = 'dense', 'sparse'


def dense_and_sparse(dense_width: FieldMap, *experts: FieldMap) -> dict[str, LayerKind]:
    """The kinds of both FFNs. dense_width: of `d_ff`; experts: of the options of a mixture, whose
    experts are SwiGLU too."""
    return {
        DENSE: LayerKind({'ffn_type': 'swiglu'}, (dense_width,)),
        SPARSE: LayerKind({'ffn_type': 'moe'}, (*experts, constant_option(expert_ffn='swiglu'))),
    }


def first_is_dense(layers: int) -> list[str]:
    """The kinds of layers of which all but the first have experts."""
    return [SPARSE if layer else DENSE for layer in range(layers)]


class LayerNames(NamedTuple):
    """Fields of config.json that name the kind of each layer.

    fields: their names. read: the fields and the number of layers, None if config.json has none ->
    the names. write: the names -> the fields.
    """

    fields: tuple[str, ...]
    read: Callable[[Fields, int | None], list[str]]
    write: Callable[[list[str]], dict]

    def exist(self, fields: Fields) -> bool:
        return any(fields.value(name) is not None for name in self.fields)


def named_by_list(
    name: str, aliases: dict[str, str] | None = None, default: str | None = None
) -> LayerNames:
    """A list of names. aliases: other names of the same kinds. default: of all layers if the field
    is missing."""

    def read(fields: Fields, layers: int | None) -> list[str]:
        names = fields.take(name, list, optional=True)
        if names is None and default is not None:
            return [default] * (layers or 0)
        if names is None:
            fields.problems.append(f'{fields.full_name(name)} is missing.')
            return []
        if layers is not None:
            fields.require_length(name, names, layers)
        return [(aliases or {}).get(kind, kind) for kind in names]

    return LayerNames((name,), read, lambda names: {name: names})


def named_by_letters(name: str, letters: dict[str, str]) -> LayerNames:
    """A text with a letter for each layer, such as 'M-M*'. letters: letter -> name."""
    letter_of = {kind: letter for letter, kind in letters.items()}

    def read(fields: Fields, layers: int | None) -> list[str]:
        text = fields.take(name, str, '')
        if layers is not None and len(text) != layers:
            fields.refuse(name, f'has {len(text)} letters for {layers} layers')
        return [letters.get(letter, letter) for letter in text]

    return LayerNames(
        (name,), read, lambda names: {name: ''.join(letter_of[kind] for kind in names)}
    )


def named_by_index(name: str, chosen: str, other: str, first: int = 0) -> LayerNames:
    """The list of the numbers of all layers of the kind `chosen`; the rest are of kind `other`.

    first: the number of the first layer.
    """

    def read(fields: Fields, layers: int | None) -> list[str]:
        numbers = fields.take(name, list[int], optional=True) or []
        if not {*numbers} <= {*range(first, first + (layers or 0))}:
            fields.refuse(name, f'must be layers from {first} to {first + (layers or 0) - 1}')
        return [chosen if first + layer in numbers else other for layer in range(layers or 0)]

    def write(names: list[str]) -> dict:
        return {name: [first + layer for layer, kind in enumerate(names) if kind == chosen]}

    return LayerNames((name,), read, write)


def named_by_position(
    period: str, default: int, chosen: str, other: str, offset: str | None = None, start: int = 0
) -> LayerNames:
    """One layer of each group of `period` layers is of kind `chosen`, the rest of kind `other`.

    period: the field with the size of a group. offset: the field with the place in the group, from
    0, whose default is `start`; without that field, it is the last layer of the group.
    """

    def read(fields: Fields, layers: int | None) -> list[str]:
        size = fields.take(period, int, default)
        if size < 1:
            fields.refuse(period, 'must be at least 1')
        size = max(size, 1)
        place = fields.take(offset, int, start) if offset else size - 1
        if offset and not 0 <= place < size:
            fields.refuse(offset, f'must be from 0 to {size - 1}, below {period}')
        return [chosen if layer % size == place else other for layer in range(layers or 0)]

    def write(names: list[str]) -> dict:
        first = names.index(chosen) if chosen in names else len(names)
        later = [layer for layer, kind in enumerate(names) if kind == chosen and layer > first]
        size = later[0] - first if later else max(len(names), first + 1)
        return {period: size, offset: first} if offset else {period: first + 1}

    return LayerNames((period, *((offset,) if offset else ())), read, write)


def named_by_number(name: str, default: int, first: str, rest: str) -> LayerNames:
    """The number of first layers of the kind `first`; the others are of kind `rest`."""

    def read(fields: Fields, layers: int | None) -> list[str]:
        number = fields.take(name, int, default)
        return [first if layer < number else rest for layer in range(layers or 0)]

    def write(names: list[str]) -> dict:
        return {name: len(list(itertools.takewhile(first.__eq__, names)))}

    return LayerNames((name,), read, write)


def named_by_default(kinds_of: Callable[[int], Iterable[str]]) -> LayerNames:
    """The kinds of layers if no field names them. kinds_of: number of layers -> names."""
    return LayerNames((), lambda fields, layers: list(kinds_of(layers or 0)), lambda names: {})


def layer_kinds_field(
    *forms: LayerNames, kinds: dict[str, LayerKind], depth_follows: bool = False
) -> FieldMap:
    """The kind of each layer, with the options of each kind.

    forms: how config.json may name the kinds: an export writes the first, and the last gives them
    if all are missing. kinds: by name; a layer of ours is of the first kind that includes it.
    depth_follows: without `num_hidden_layers`, the names give the number of layers.
    """

    def read(fields: Fields) -> dict:
        names = _read_names(fields, forms, kinds, depth_follows)
        depth = {'n_layer': len(names)} if depth_follows else {}
        del names[MAX_LAYERS:]
        options = {name: kinds[name].read(fields) for name in dict.fromkeys(names)}
        # Fields of kinds that no layer has count as read, whatever their values.
        unused = copy.copy(fields)
        unused.problems = []
        for name in kinds.keys() - options.keys():
            kinds[name].read(unused)
        fields.unread.intersection_update(unused.unread)
        keys = dict.fromkeys(key for name in names for key in options[name])
        return {
            **depth,
            **{
                key: PerLayer(
                    _in_layer(options[name].get(key, ABSENT), layer)
                    for layer, name in enumerate(names)
                )
                for key in keys
            },
        }

    def write(config: ModelArchitectureConfig) -> dict:
        layers: dict[str, ModelArchitectureConfig] = {}  # the first of each kind
        names = []
        for layer in config.layers:
            name = next((name for name, kind in kinds.items() if kind.includes(layer)), None)
            if name is not None:
                layers.setdefault(name, layer)
            # A layer of another kind is lost, and so refused, when the fields are read back.
            names.append(next(iter(kinds)) if name is None else name)
        written = {
            key: value
            for name, layer in layers.items()
            for field_map in kinds[name].field_maps
            for key, value in field_map.write(layer).items()
        }
        return {**written, **forms[0].write(names)}

    return FieldMap(read, write)


def _read_names(
    fields: Fields, forms: Sequence[LayerNames], kinds: dict[str, LayerKind], depth_follows: bool
) -> list[str]:
    """The kind of each layer; the first one for kinds that are not supported."""
    layers = fields.take('num_hidden_layers', int, None if depth_follows else 0)
    layers = layers if layers is None else min(max(layers, 0), MAX_LAYERS)
    present = [form for form in forms if form.exist(fields)] or [forms[-1]]
    names, *others = (form.read(fields, layers) for form in present)
    for form, other in zip(present[1:], others):
        if other != names:
            shown = ' and '.join(present[0].fields + form.fields)
            fields.problems.append(f'{shown} contradict each other: delete one of them.')
    for name in dict.fromkeys(names):
        if name not in kinds:
            shown = ', '.join(map(repr, kinds))
            fields.problems.append(
                f'{present[0].fields[0]}: {short_repr(name)} is not supported; supported: {shown}.'
            )
    return [name if name in kinds else next(iter(kinds)) for name in names]


def _in_layer(value, layer: int):
    """The value of an option in a layer, which may differ within a kind."""
    return value[layer] if isinstance(value, PerLayer) else value
