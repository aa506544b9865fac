"""Families with Gated DeltaNet and dense FFNs: Qwen3.5 (its text model), OLMo Hybrid."""

import copy
from dataclasses import replace

from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    LAYER,
    PRE_NORMS,
    QK_NORMS,
    REORDERED_NORMS,
    llama_fields,
    swiglu_field,
)
from interop.families.qwen3_next import DELTA_NET, GATED_ATTENTION, OFFSET_NORMS, qwen_mixers
from interop.fields import Fields
from interop.layer_kinds import LayerKind, layer_kinds_field, named_by_default, named_by_list
from interop.mapping import (
    FULL,
    LINEAR,
    Family,
    FieldMap,
    constant_option,
    field,
    kv_heads_field,
)
from interop.rope import read_rope_parameters, rope_fields
from interop.tensors import CONVOLUTION, TensorMap, tensor, with_biases
from model_config import ModelArchitectureConfig

_OURS, _THEIRS = 'blocks.{layer}.mixers.gated_deltanet.', LAYER + 'linear_attn.'


def projection_rows(config: ModelArchitectureConfig) -> tuple[int, ...]:
    """Of queries, keys, values, β, decays and gates."""
    keys = config.gdn_heads * config.gdn_head_dim
    values = config.gdn_value_heads * config.gdn_v_head_dim
    return keys, keys, values, config.gdn_value_heads, config.gdn_value_heads, values


# --- Qwen3.5 --------------------------------------------------------------------------------------


def _fused_rows(config: ModelArchitectureConfig) -> tuple[int, ...]:
    queries, keys, values, *rest = projection_rows(config)
    return queries + keys + values, *rest


def _text_rope_fields() -> FieldMap:
    """Without the parts of a rotation for places in images, which are equal in text."""
    rope = rope_fields(fraction='partial_rotary_factor')

    def read(fields: Fields) -> dict:
        of_text = copy.copy(fields)
        of_text.values = {
            key: {name: each for name, each in value.items() if not name.startswith('mrope_')}
            if key in ('rope_parameters', 'rope_scaling') and isinstance(value, dict)
            else value
            for key, value in fields.values.items()
        }
        return rope.read(of_text)

    return FieldMap(read, rope.write)


QWEN3_5 = Family(
    name='qwen3_5_text',
    architecture='Qwen3_5ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=32768),
        field('weight_tying', 'tie_word_embeddings', False),
        field('d_ff', 'intermediate_size', 12288),
        constant_option(ffn_bias=False),
        swiglu_field(),
        qwen_mixers(4, _text_rope_fields()),
    ),
    # transformers always has the gate of attention; the others are of multi-token prediction.
    irrelevant_fields=frozenset(
        {
            *('attn_output_gate', 'mamba_ssm_dtype', 'mlp_only_layers'),
            *('mtp_num_hidden_layers', 'mtp_use_dedicated_embeddings'),
        }
    ),
    weights=EMBEDDING_AND_HEAD
    | OFFSET_NORMS
    | with_biases(GATED_ATTENTION)
    | DELTA_NET
    | {
        _OURS + 'input.weight': TensorMap(
            tuple(f'{_THEIRS}in_proj_{name}.weight' for name in ('qkv', 'b', 'a', 'z')),
            rows=_fused_rows,
        )
    }
    | GATED_FFN,
    ignored_tensors=r'^(mtp|model\.visual)\.',
    renamed_tensors={r'^model\.language_model\.': 'model.'},
)

# --- OLMo Hybrid ----------------------------------------------------------------------------------


def _default_mixers(layers: int) -> list[str]:
    """Every fourth layer has attention; the last one if there are fewer."""
    names = [FULL if layer % 4 == 3 else LINEAR for layer in range(layers)]
    return names if FULL in names else [*names[:-1], FULL]


def _read_sizes(fields: Fields) -> dict:
    heads = fields.take('num_attention_heads', int, 1)
    key_heads = fields.take('linear_num_key_heads', int, heads, optional=True)
    value_heads = fields.take('linear_num_value_heads', int, heads, optional=True)
    key_heads, value_heads = (heads if x is None else x for x in (key_heads, value_heads))
    k_dim = fields.take('linear_key_head_dim', int, optional=True)
    if k_dim is None:
        k_dim = int(0.75 * fields.take('hidden_size', int, 1) / max(key_heads, 1))
    v_dim = fields.take('linear_value_head_dim', int, optional=True)
    return {
        'gdn_heads': key_heads,
        'gdn_value_heads': value_heads,
        'gdn_head_dim': k_dim,
        'gdn_v_head_dim': 2 * k_dim if v_dim is None else v_dim,
    }


def _write_sizes(config: ModelArchitectureConfig) -> dict:
    return {
        'linear_num_key_heads': config.gdn_heads,
        'linear_num_value_heads': config.gdn_value_heads,
        'linear_key_head_dim': config.gdn_head_dim,
        'linear_value_head_dim': config.gdn_v_head_dim,
    }


_rope = rope_fields()


def _read_positions(fields: Fields) -> dict:
    """RoPE, unless its theta is null."""
    thetas = [
        held.values['rope_theta']
        for held in (read_rope_parameters(fields), fields)
        if 'rope_theta' in held.values
    ]
    if thetas[:1] != [None]:
        return _rope.read(fields)
    fields.unread.difference_update(('rope_theta', 'rope_parameters', 'rope_scaling'))
    return {'position_encoding': 'none'}


def _write_positions(config: ModelArchitectureConfig) -> dict:
    if config.position_encoding == 'rope':
        return _rope.write(config)
    return {'rope_parameters': {'rope_type': 'default', 'rope_theta': None}}


def _check_both_kinds(fields: dict) -> str | None:
    if {*fields['layer_types']} == {LINEAR, FULL}:
        return None
    return (
        'OLMo Hybrid has layers with attention and layers with mixer=gated_deltanet in transformers'
    )


def _norms(config: ModelArchitectureConfig) -> dict[str, TensorMap]:
    return PRE_NORMS if config.norm_position == 'pre' else REORDERED_NORMS


def _norm(name: str) -> TensorMap:
    """A norm whose name of theirs depends on the layer's kind."""
    return replace(PRE_NORMS[name], choose_templates=lambda config: _norms(config)[name].templates)


OLMO_HYBRID = Family(
    name='olmo_hybrid',
    architecture='OlmoHybridForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=65536),
        field('d_ff', 'intermediate_size', 11008),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(ffn_bias=False),
        swiglu_field(),
        layer_kinds_field(
            named_by_list('layer_types'),
            named_by_default(_default_mixers),
            kinds={
                LINEAR: LayerKind(
                    {'mixer': 'gated_deltanet', 'norm_position': 'pre'},
                    (
                        FieldMap(_read_sizes, _write_sizes),
                        field('gdn_conv_size', 'linear_conv_kernel_dim', 4),
                        field('gdn_negative_eigenvalues', 'linear_allow_neg_eigval', True),
                        constant_option(gdn_norm_eps=1e-5, gdn_gate=True),
                    ),
                ),
                FULL: LayerKind(
                    {'mixer': 'attention', 'norm_position': 'reordered'},
                    (
                        field('head_dim', 'head_dim', None),
                        field('attention_bias', 'attention_bias', False),
                        kv_heads_field(),
                        FieldMap(_read_positions, _write_positions),
                        constant_option(qk_norm='rmsnorm', qk_norm_scope='projection'),
                    ),
                ),
            },
        ),
    ),
    # Of initial weights.
    irrelevant_fields=frozenset(
        {
            *('linear_a_log_min', 'linear_a_log_max', 'linear_dt_min', 'linear_dt_max'),
            'linear_dt_init_floor',
        }
    ),
    check_loadable=_check_both_kinds,
    # The names in published files.
    renamed_tensors={
        r'\.attention_layer_norm\.': '.input_layernorm.',
        r'\.feedforward_layer_norm\.': '.post_attention_layernorm.',
    },
    weights=EMBEDDING_AND_HEAD
    | {name: _norm(name) for name in PRE_NORMS}
    | QK_NORMS
    | GATED_FFN
    | with_biases(ATTENTION)
    | {
        _OURS + 'input.weight': TensorMap(
            tuple(f'{_THEIRS}{name}_proj.weight' for name in 'qkvbag'), rows=projection_rows
        ),
        _OURS + 'convolution.weight': TensorMap(
            tuple(f'{_THEIRS}{name}_conv1d.weight' for name in 'qkv'),
            rows=lambda config: projection_rows(config)[:3],
            layout=CONVOLUTION,
            any_split=True,  # transformers saves three parts of equal length
        ),
        _OURS + 'A_log': tensor(_THEIRS + 'A_log'),
        _OURS + 'dt_bias': tensor(_THEIRS + 'dt_bias'),
        _OURS + 'norm.weight': tensor(_THEIRS + 'o_norm.weight'),
        _OURS + 'output.weight': tensor(_THEIRS + 'o_proj.weight'),
    },
)
