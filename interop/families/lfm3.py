"""LFM3: gated short convolutions, attention with windows, and with half of a head rotated."""

import torch

from interop.families.lfm2 import CONV, WEIGHTS
from interop.families.llama import LAYER, QK_NORMS, projections, query_key_value_gate_rows
from interop.fields import Fields
from interop.layer_kinds import LayerKind, layer_kinds_field, named_by_default, named_by_list
from interop.mapping import (
    FULL,
    WINDOW,
    Family,
    FieldMap,
    constant_option,
    export_only,
    field,
    kv_heads_field,
    required_field,
    size_fields,
)
from interop.rope import rope_by_layer_type_fields
from interop.rotary_rows import half_rotated_rows, rows_of_half_rotated_head
from interop.tensors import TensorMap, tensor
from model_config import ModelArchitectureConfig

# --- Rotary positions -----------------------------------------------------------------------------

_DEFAULT_ROPE = {
    WINDOW: {'rope_type': 'default', 'rope_theta': 1e4},
    FULL: {'rope_type': 'proportional', 'rope_theta': 1e6, 'partial_rotary_factor': 0.5},
}


def _default_kinds(layers: int) -> list[str]:
    return [
        FULL if layer % 4 == 2 else WINDOW if layer % 4 == 0 and layer > 0 else CONV
        for layer in range(layers)
    ]


_rope = rope_by_layer_type_fields(
    lambda fields: (
        fields.take('layer_types', list, optional=True)
        or _default_kinds(fields.take('num_hidden_layers', int, 0))
    ),
    default_theta={WINDOW: 1e6, FULL: 1e6},
    version_4=False,
    partial=True,
)


def _partial(fields: Fields, kind: str, values: dict) -> dict:
    """The usual RoPE of a part of a head for a 'proportional' one, whose frequencies are those of
    the whole head: theta^(-2i/head_dim) = (theta^fraction)^(-2i/rotated)."""
    if values.get('rope_type') != 'proportional':
        if values.get('partial_rotary_factor', 1.0) != 1.0:
            fields.problems.append(
                f"rope_parameters: {kind}: partial_rotary_factor needs rope_type='proportional'."
            )
        return values
    theta, fraction = values.get('rope_theta', 1e6), values.get('partial_rotary_factor', 1.0)
    head_dim = fields.take('head_dim', int, 128)
    numbers = all(isinstance(each, (int, float)) for each in (theta, fraction))
    if not numbers or not 0 < fraction <= 1 or theta <= 0 or head_dim * fraction % 2:
        fields.problems.append(
            f'rope_parameters: {kind}: partial_rotary_factor={fraction!r} must give an even number '
            f'of rotated dimensions, and rope_theta={theta!r} be above 0.'
        )
        return {}
    rest = {k: v for k, v in values.items() if k not in ('rope_type', 'rope_theta', 'factor')}
    if values.get('factor', 1.0) != 1.0:
        rest |= {'rope_type': 'linear', 'factor': values['factor']}
    return {**rest, 'rope_theta': theta**fraction}


def _read_rope(fields: Fields) -> dict:
    parameters = fields.value('rope_parameters')
    parameters = _DEFAULT_ROPE if parameters is None else parameters
    if isinstance(parameters, dict):
        fields.values['rope_parameters'] = {
            kind: _partial(fields, kind, values) if isinstance(values, dict) else values
            for kind, values in parameters.items()
        }
    return _rope.read(fields)


def _write_rope(config: ModelArchitectureConfig) -> dict:
    written = _rope.write(config)['rope_parameters']
    for values in written.values():
        fraction = values['partial_rotary_factor']
        if fraction == 1:
            del values['partial_rotary_factor']
        else:
            # A theta of a few digits is exact again.
            theta = float(f'{values["rope_theta"] ** (1 / fraction):.12g}')
            values |= {'rope_type': 'proportional', 'rope_theta': theta}
    return {'rope_parameters': written}


# --- Weights --------------------------------------------------------------------------------------


def _row_order(config: ModelArchitectureConfig) -> torch.Tensor:
    rows = half_rotated_rows(config)
    return torch.cat((rows, torch.arange(len(rows), sum(query_key_value_gate_rows(config)))))


def _templates(config: ModelArchitectureConfig) -> tuple[str, ...]:
    gates = ('gate',) if config.attention_gate == 'head' else ()
    return projections('self_attn', 'q', 'k', 'v', *gates)


def _gain_order(config: ModelArchitectureConfig) -> torch.Tensor:
    rotated = int(config.head_dim * config.rope_fraction)
    return rows_of_half_rotated_head(config.head_dim, rotated)


_ATTENTION = (
    field('head_dim', 'head_dim', 128),
    field('attention_gate', 'use_attention_gate', True, {True: 'head', False: 'none'}),
    kv_heads_field(4),
    constant_option(attention_bias=False, qk_norm='rmsnorm', qk_norm_scope='head'),
    required_field(attention_bias=False),
    export_only(attention_dropout='attention_dropout'),
)

LFM3 = Family(
    name='lfm3',
    architecture='Lfm3ForCausalLM',
    prefix='model.',
    field_maps=(
        *size_fields(block_size=128_000),
        field('norm_eps', 'norm_eps', 1e-5),
        field('d_ff', 'intermediate_size', 7680),
        field('weight_tying', 'tie_word_embeddings', True),
        field('norm_position', 'use_sandwich_norm', True, {True: 'sandwich', False: 'pre'}),
        constant_option(normalization='rmsnorm', bias=False, ffn_type='swiglu', ffn_bias=False),
        layer_kinds_field(
            named_by_list('layer_types'),
            named_by_default(_default_kinds),
            kinds={
                CONV: LayerKind(
                    {'mixer': 'short_conv'},
                    (
                        field('short_conv_size', 'conv_L_cache', 7),
                        field('short_conv_bias', 'conv_bias', False),
                    ),
                ),
                FULL: LayerKind({'mixer': 'attention', 'sliding_window': None}, _ATTENTION),
                WINDOW: LayerKind(
                    {'mixer': 'attention'},
                    (*_ATTENTION, field('sliding_window', 'sliding_window', 256)),
                ),
            },
        ),
        FieldMap(_read_rope, _write_rope),
    ),
    aliases={'rms_norm_eps': 'norm_eps'},
    weights=WEIGHTS
    | {
        'blocks.{layer}.attention_output_norm.weight': tensor(LAYER + 'post_operator_norm.weight'),
        'blocks.{layer}.ffn_output_norm.weight': tensor(LAYER + 'post_ffn_norm.weight'),
        'blocks.{layer}.attention.qkv.weight': TensorMap(
            projections('self_attn', 'q', 'k', 'v'),
            rows=query_key_value_gate_rows,
            choose_templates=_templates,
            row_order=_row_order,
        ),
        'blocks.{layer}.attention.output.weight': TensorMap(projections('self_attn', 'o')),
        **{
            name: tensor(norm.templates[0], row_order=_gain_order)
            for name, norm in QK_NORMS.items()
        },
    },
)
