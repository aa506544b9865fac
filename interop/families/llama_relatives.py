"""Families that differ from Llama in few parts: Arcee, Helium, Ernie 4.5, CWM, Ministral."""

from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    LLAMA,
    PAIRED_ATTENTION,
    PRE_NORMS,
    llama_fields,
    projections,
    swiglu_field,
)
from interop.fields import Fields
from interop.mapping import (
    ACTIVATIONS,
    Family,
    FieldMap,
    check_heads_divide_width,
    constant_option,
    field,
    head_size_field,
    kv_heads_field,
    windows_field,
)
from interop.rope import rope_fields
from interop.tensors import TensorMap, with_biases
from model_config import ModelArchitectureConfig

UNGATED_FFN = {
    'blocks.{layer}.ffn.up.weight': TensorMap(projections('mlp', 'up')),
    'blocks.{layer}.ffn.down.weight': TensorMap(projections('mlp', 'down')),
}

ARCEE = Family(
    name='arcee',
    architecture='ArceeForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=4096, norm_eps=1e-5),
        field('d_ff', 'intermediate_size'),
        field('head_dim', 'head_dim', None),
        field('activation', 'hidden_act', 'relu2', ACTIVATIONS),
        field('attention_bias', 'attention_bias', False),
        field('ffn_bias', 'mlp_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        kv_heads_field(),
        rope_fields(),
    ),
    check_loadable=check_heads_divide_width,
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | with_biases(ATTENTION | UNGATED_FFN),
)

HELIUM = Family(
    name='helium',
    architecture='HeliumForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=4096, norm_eps=1e-8),
        field('d_ff', 'intermediate_size', 7040),
        field('attention_bias', 'attention_bias', False),
        field('ffn_bias', 'mlp_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(attention_output_bias=False),
        head_size_field(128),
        kv_heads_field(20),
        rope_fields(default_theta=1e5),
        swiglu_field(),
    ),
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | with_biases(PAIRED_ATTENTION | GATED_FFN),
)

ERNIE4_5 = Family(
    name='ernie4_5',
    architecture='Ernie4_5ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=131_072, norm_eps=1e-5),
        field('d_ff', 'intermediate_size', 3072),
        field('head_dim', 'head_dim', 128),
        field('attention_bias', 'use_bias', False),
        field('ffn_bias', 'use_bias', False),
        field('weight_tying', 'tie_word_embeddings', True),
        kv_heads_field(2),
        rope_fields(default_theta=5e5),
        swiglu_field(),
    ),
    weights=LLAMA.weights | with_biases(PAIRED_ATTENTION),
)

# --- CWM ------------------------------------------------------------------------------------------

_CWM_ROPE = {
    'rope_type': 'llama3',
    'rope_theta': 1e6,
    'factor': 16.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
}
_rope = rope_fields(default_theta=1e6)


def _read_cwm_rope(fields: Fields) -> dict:
    """A config without rotary parameters has the scaling of the published model."""
    if not any(fields.value(name) for name in ('rope_parameters', 'rope_scaling')):
        fields.values['rope_parameters'] = _CWM_ROPE
    return _rope.read(fields)


def _write_cwm_rope(config: ModelArchitectureConfig) -> dict:
    """All in one object, since a missing one means a scaling."""
    written = _rope.write(config)
    scaling = written.pop('rope_scaling', {'rope_type': 'default'})
    return {'rope_parameters': scaling | written}


# transformers requires a number for this token.
_first_token_field = FieldMap(lambda fields: {}, lambda config: {'bos_token_id': 0})


CWM = Family(
    name='cwm',
    architecture='CwmForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=131_072, norm_eps=1e-5),
        field('d_ff', 'intermediate_size'),
        field('head_dim', 'head_dim', 128),
        field('ffn_bias', 'mlp_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        windows_field(8192, lambda layer, fields: layer % 4 != 0),
        kv_heads_field(8),
        FieldMap(_read_cwm_rope, _write_cwm_rope),
        _first_token_field,
        swiglu_field(),
    ),
    check_loadable=check_heads_divide_width,
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | ATTENTION | with_biases(GATED_FFN),
)

# --- Ministral ------------------------------------------------------------------------------------


def _has_window(layer: int, fields: Fields) -> bool:
    """Whether a layer has a window in files without `layer_types`."""
    return fields.take('sliding_window', int, 4096, optional=True) is not None


MINISTRAL = Family(
    name='ministral',
    architecture='MinistralForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=4096 * 32),
        field('d_ff', 'intermediate_size'),
        field('head_dim', 'head_dim', None),
        field('weight_tying', 'tie_word_embeddings', False),
        windows_field(4096, _has_window),
        kv_heads_field(8),
        rope_fields(),
        swiglu_field(),
    ),
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | ATTENTION | GATED_FFN,
)
