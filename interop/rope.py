"""Config fields of rotary positions, in the formats of transformers 5 and 4."""

import math
from collections.abc import Callable, Iterable

from interop.fields import Fields, short_repr
from interop.layers import ABSENT, PerLayer, options_with
from interop.mapping import FULL, REQUIRED, WINDOW, FieldMap, field, layer_types
from model_config import ModelArchitectureConfig

_LENGTH = 'original_max_position_embeddings'
_LISTS = ('long_factor', 'short_factor')  # of numbers; ours are texts
# For each of our scalings: their key -> (our option, its value if the key is missing).
_SCALINGS = {
    'linear': {'factor': ('rope_scaling_factor', REQUIRED)},
    'llama3': {
        'factor': ('rope_scaling_factor', REQUIRED),
        'original_max_position_embeddings': ('rope_original_block_size', REQUIRED),
        'low_freq_factor': ('rope_low_freq_factor', REQUIRED),
        'high_freq_factor': ('rope_high_freq_factor', REQUIRED),
    },
    'yarn': {
        'factor': ('rope_scaling_factor', REQUIRED),
        'original_max_position_embeddings': ('rope_original_block_size', REQUIRED),
        'beta_fast': ('rope_beta_fast', 32.0),
        'beta_slow': ('rope_beta_slow', 1.0),
        'attention_factor': ('rope_attention_factor', None),
        'truncate': ('rope_round_pairs', True),
    },
    'longrope': {
        'factor': ('rope_scaling_factor', None),
        'original_max_position_embeddings': ('rope_original_block_size', REQUIRED),
        'attention_factor': ('rope_attention_factor', None),
        'long_factor': ('rope_long_factors', REQUIRED),
        'short_factor': ('rope_short_factors', REQUIRED),
    },
}


def rope_fields(
    default_theta: float = 10000.0,
    theta: str = 'rope_theta',
    fraction: str | None = None,
    default_fraction: float = 0.25,
) -> FieldMap:
    """theta, fraction: names of these fields in version 4.

    Without a name for the fraction, the whole head is rotated.
    """

    def read(fields: Fields) -> dict:
        default = default_fraction if fraction else 1.0
        parameters = read_rope_parameters(fields)
        return _read(fields, parameters, default_theta, theta, fraction, default_fraction=default)

    def write(config: ModelArchitectureConfig) -> dict:
        options = options_with(config, 'rope_theta')
        if 'rope_theta' not in options:
            return {}
        written = {
            theta: options['rope_theta'],
            **({fraction: options['rope_fraction']} if fraction else {}),
        }
        if options['rope_scaling'] in _SCALINGS:
            written['rope_scaling'] = _scaling_fields(options)
        return written

    return FieldMap(read, write)


def partial_rope_fields(default_fraction: float) -> FieldMap:
    """The rotated fraction of a head is read from the object of rotary parameters alone.

    default_fraction: if it is missing there.
    """
    key = 'partial_rotary_factor'

    def read(fields: Fields) -> dict:
        rope_parameters = read_rope_parameters(fields)
        rope_parameters.values.setdefault(key, default_fraction)
        return _read(fields, rope_parameters, 10000.0, fraction=key)

    def write(config: ModelArchitectureConfig) -> dict:
        options = options_with(config, 'rope_theta')
        if 'rope_theta' not in options:
            return {}
        names = {'rope_theta': options['rope_theta'], key: options['rope_fraction']}
        return {'rope_parameters': {**names, **_scaling_fields(options)}}

    return FieldMap(read, write)


def _scaling_fields(options: dict) -> dict:
    """The type of scaling and its parameters."""
    scaling = _SCALINGS.get(options['rope_scaling'], {})
    return {
        'rope_type': options['rope_scaling'] if scaling else 'default',
        **{
            name: [float(number) for number in options[option].split(',')]
            if name in _LISTS
            else options[option]
            for name, (option, _) in scaling.items()
        },
    }


def rope_by_layer_type_fields(
    read_types: Callable[[Fields], list[str]],
    default_theta: dict[str, float],
    local_theta: str | None = None,
    version_4: bool = True,
    partial: bool = False,
    default_fraction: float = 1.0,
) -> FieldMap:
    """Rotary positions of layers with a window and of those without, in `rope_parameters`.

    read_types: returns WINDOW, FULL or the name of a kind without attention for each layer.
    default_theta: of the first two. local_theta: the name in version 4 of theta in layers with a
    window, if it has one. version_4: whether the `rope_theta` and `rope_scaling` of version 4
    exist; they belong to layers without a window. partial: whether a part of a head may be rotated.
    default_fraction: that part if it is missing and nothing is scaled.
    """
    outside = {WINDOW: local_theta, FULL: 'rope_theta' if version_4 else None}
    copies = () if version_4 else ('rope_theta',)

    def read(fields: Fields) -> dict:
        if fields.value('rope_scaling') and not version_4:
            fields.refuse('rope_scaling', 'must be in the rope_parameters of the layers')
        elif fields.value('rope_scaling') and fields.value('rope_parameters'):
            fields.refuse('rope_scaling', 'rope_parameters exists too. Delete one of them')
        if _LENGTH in fields:
            fields.refuse(_LENGTH, 'must be in the rope_parameters of the layers')
        parameters = fields.subobject('rope_parameters')
        nested = {kind: parameters.subobject(kind) for kind in outside}
        _refuse_rest(parameters)
        if fields.value('rope_scaling'):
            nested[FULL] = fields.subobject('rope_scaling')
            nested[FULL].values.setdefault('rope_type', 'default')
        if partial:
            _set_default_fraction(nested.values(), default_fraction)
        options = {
            kind: _read(
                fields, nested[kind], default_theta[kind], name, None, copies, partial=partial
            )
            for kind, name in outside.items()
        }
        types = read_types(fields)
        return {
            option: PerLayer(options.get(kind, {}).get(option, ABSENT) for kind in types)
            for option in {**options[WINDOW], **options[FULL]}
        }

    def write(config: ModelArchitectureConfig) -> dict:
        written = {}
        for kind, layer in zip(layer_types(config), config.layers):
            if kind not in written and layer.get('position_encoding') == 'rope':
                written[kind] = {
                    'rope_theta': layer.rope_theta,
                    **({'partial_rotary_factor': layer.rope_fraction} if partial else {}),
                    **_scaling_fields(layer.to_dict()),
                }
        return {'rope_parameters': written}

    return FieldMap(read, write)


def _set_default_fraction(parameters: Iterable[Fields], fraction: float) -> None:
    """The fraction of a head that is rotated if the field is missing; with scaling, all of it."""
    for each in parameters:
        scaling = each.values.get('rope_type', each.values.get('type', 'default'))
        default = fraction if scaling == 'default' else 1.0
        each.values.setdefault('partial_rotary_factor', default)


def rope_in_some_layers(rope: FieldMap, read_rotated: Callable[[Fields], list[bool]]) -> FieldMap:
    """Rotary positions in some of the layers, and no positions in the others.

    rope: the fields of rotary positions. read_rotated: whether each layer has them.
    """

    def read(fields: Fields) -> dict:
        encodings = PerLayer('rope' if rotated else 'none' for rotated in read_rotated(fields))
        options = rope.read(fields)
        return {**(options if 'rope' in encodings else {}), 'position_encoding': encodings}

    return FieldMap(read, rope.write)


def read_rope_parameters(fields: Fields) -> Fields:
    """The object of rotary parameters: `rope_parameters`, or `rope_scaling` of version 4.

    Two different ones are refused: transformers would use `rope_scaling` and drop the other,
    including its `rope_theta`, which is hardly intended.
    """
    values = fields.value('rope_scaling'), fields.value('rope_parameters')
    if all(values):
        fields.require_agreement('rope_scaling', 'rope_parameters')
    return fields.subobject('rope_scaling' if values[0] else 'rope_parameters')


def _read(
    fields: Fields,
    rope_parameters: Fields,
    default_theta: float,
    theta: str | None = 'rope_theta',
    fraction: str | None = None,
    copies: tuple[str, ...] = ('rope_theta',),
    default_fraction: float = 1.0,
    partial: bool = False,
) -> dict:
    # copies: other names of theta, whose values must be equal. partial: whether a part of a head
    # may be rotated, although its fraction has no name outside the object.
    # The base frequency, and the fraction of a head that is rotated.
    options = {
        'position_encoding': 'rope',
        'rope_theta': _number(fields, rope_parameters, 'rope_theta', theta, default_theta, copies),
    }
    key = 'partial_rotary_factor'
    rotated = _number(fields, rope_parameters, key, fraction, default_fraction, (key,))
    if fraction or partial:
        options['rope_fraction'] = rotated
    elif rotated != 1:
        fields.problems.append(f'partial_rotary_factor={rotated} is not supported; supported: 1.0.')
    # The type of scaling, called `type` before version 4.43.
    rope_parameters.require_agreement('rope_type', 'type')
    legacy_kind = rope_parameters.take('type', str, 'default')
    kind = rope_parameters.take('rope_type', str, legacy_kind)
    kind = 'none' if kind == 'default' else kind
    original_length = _original_length(fields, rope_parameters)
    if kind not in ('none', *_SCALINGS):
        fields.problems.append(f'rope_type={short_repr(kind)} is not supported.')
        return options
    # The parameters of that scaling, some of which are optional.
    scaling = _SCALINGS.get(kind, {})
    if _LENGTH in scaling and original_length is not None:
        rope_parameters.values[_LENGTH] = original_length
    for key, (option, default) in scaling.items():
        if key in _LISTS:
            options[option] = _joined(rope_parameters, key)
            continue
        missing = key not in rope_parameters or (
            rope_parameters.values[key] is None and default is not REQUIRED
        )
        if missing and default is not REQUIRED:
            rope_parameters.value(key)
            options[option] = default
        else:
            options |= field(option, key, default).read(rope_parameters)
    if kind == 'longrope' and options['rope_scaling_factor'] is None:
        ratio = fields.take('max_position_embeddings', int, 1) / (original_length or 1)
        options['rope_scaling_factor'] = max(ratio, 1.0)
    if kind == 'yarn':
        _refuse_crossed_bounds(rope_parameters, options)
    _refuse_rest(rope_parameters)
    return {**options, 'rope_scaling': kind}


def _joined(rope_parameters: Fields, key: str) -> str:
    """A list of numbers above 0 as a text; '1' if it is something else, which is refused."""
    numbers = rope_parameters.value(key)
    listed = numbers if isinstance(numbers, list) else []
    if listed and all(type(each) in (int, float) and 0 < each < 1e300 for each in listed):
        return ','.join(map(repr, map(float, listed)))
    rope_parameters.refuse(key, 'must be a list of numbers above 0')
    return '1'


def _refuse_rest(rope_parameters: Fields) -> None:
    """Refuse all keys that were not read, which might have an effect."""
    for key in sorted(rope_parameters.unread, key=str):
        if rope_parameters.values[key] is not None:
            rope_parameters.refuse(key, 'not supported')


def _refuse_crossed_bounds(rope_parameters: Fields, options: dict) -> None:
    """Refuse YaRN with crossed bounds, for which transformers scales nothing."""
    length = options.get('rope_original_block_size') or 0
    slow, fast = options.get('rope_beta_slow') or 0, options.get('rope_beta_fast') or 0
    if not 2 * math.pi * slow < length < 2 * math.pi * fast * options['rope_theta']:
        rope_parameters.refuse(
            _LENGTH, 'no pair of dimensions makes between beta_slow and beta_fast rotations in it'
        )


def _number(
    fields: Fields,
    rope_parameters: Fields,
    key: str,
    name: str | None,
    default: float,
    copies: tuple[str, ...],
) -> float:
    """A number in the object, or outside it under the family's own name.

    copies: other names outside it, which transformers does not read; the values must be equal.
    """
    read = {rope_parameters.full_name(key): rope_parameters.take(key, float, optional=True)}
    unread = {copy: fields.take(copy, float, optional=True) for copy in copies if copy != name}
    if name:
        read[name] = fields.take(name, float, optional=True)
    values = {called: value for called, value in read.items() if value is not None}
    value = next(iter(values.values()), default)
    values |= {called: other for called, other in unread.items() if other is not None}
    if any(other != value for other in values.values()):
        shown = ' and '.join(f'{called}={other!r}' for called, other in values.items())
        fields.problems.append(f'{shown}, but {key} is {value!r}. Delete the wrong one.')
    return value


def _original_length(fields: Fields, rope_parameters: Fields) -> int | None:
    """The context length before scaling: in the object, outside it, or the context length."""
    inside = rope_parameters.values.get(_LENGTH)
    beside = fields.take(_LENGTH, int, optional=True)
    if None not in (inside, beside) and inside != beside:
        fields.problems.append(
            f'{_LENGTH}={beside} contradicts that in rope_scaling, {short_repr(inside)}. Delete '
            f'one of them.'
        )
    if beside is not None or inside is not None:
        return inside if beside is None else beside
    return fields.take('max_position_embeddings', int)


def _yarn_factor(weight: float, factor: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def deepseek_rope_fields(nope: int = 128) -> FieldMap:
    """Like `rope_fields`, with DeepSeek's YaRN factors, one of which scales attention scores.

    nope: the size of a head without positions if the field is missing.
    """
    plain = rope_fields()

    def read(fields: Fields) -> dict:
        rope_parameters = read_rope_parameters(fields)
        mscale, mscale_all_dim = (
            rope_parameters.take(key, float, optional=True) for key in ('mscale', 'mscale_all_dim')
        )
        options = _read(fields, rope_parameters, 10000.0)
        factor = options.get('rope_scaling_factor')
        if factor is None or not mscale_all_dim:
            return options
        score_factor = _yarn_factor(mscale_all_dim, factor)
        if mscale and options.get('rope_attention_factor', 0) is None:
            options['rope_attention_factor'] = _yarn_factor(mscale, factor) / score_factor
        head_dim = fields.take('qk_nope_head_dim', int, nope)
        head_dim += fields.take('qk_rope_head_dim', int, 64)
        if head_dim <= 0:  # refused by the checks of the options
            return options
        return {**options, 'attention_scale': head_dim**-0.5 * score_factor * score_factor}

    def write(config: ModelArchitectureConfig) -> dict:
        written, options = plain.write(config), options_with(config, 'qk_nope_head_dim')
        scaling = written.get('rope_scaling')
        if scaling and 'qk_nope_head_dim' in options and scaling['factor'] > 1:
            head_dim = options['qk_nope_head_dim'] + options['qk_rope_head_dim']
            score_factor = (options['attention_scale'] * head_dim**0.5) ** 0.5
            scaling['mscale_all_dim'] = (score_factor - 1) / (0.1 * math.log(scaling['factor']))
        return written

    return FieldMap(read, write)
