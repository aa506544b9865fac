"""Families with other norms than Llama's: OLMo, nanochat, Stable LM."""

from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    GATED_FFN,
    LAYER,
    PRE_NORMS,
    ROTARY_BUFFERS,
    llama_fields,
    projections,
    query_key_value_rows,
    swiglu_field,
)
from interop.fields import Fields
from interop.layers import num_kv_heads_of
from interop.mapping import (
    ACTIVATIONS,
    Family,
    FieldMap,
    check_heads_divide_width,
    constant_option,
    export_only,
    field,
    head_size_field,
    kv_heads_field,
    size_fields,
)
from interop.rope import rope_fields
from interop.rotary_rows import negated_rows
from interop.tensors import TensorMap, tensor, with_biases
from model_config import ModelArchitectureConfig


def _sizes(block_size: int) -> tuple[FieldMap, ...]:
    return (
        *size_fields(block_size),
        export_only(attention_dropout='attention_dropout'),
    )


_EMBEDDING = {name: EMBEDDING_AND_HEAD[name] for name in EMBEDDING_AND_HEAD if 'norm' not in name}

# --- OLMo -----------------------------------------------------------------------------------------

OLMO = Family(
    name='olmo',
    architecture='OlmoForCausalLM',
    prefix='model.',
    field_maps=(
        *_sizes(2048),
        field('d_ff', 'intermediate_size', 11008),
        field('head_dim', 'head_dim', None),
        field('attention_bias', 'attention_bias', False),
        field('qkv_clip', 'clip_qkv', None),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(
            normalization='layernorm_nogain', norm_eps=1e-5, bias=False, ffn_bias=False
        ),
        kv_heads_field(),
        rope_fields(),
        swiglu_field(),
    ),
    check_loadable=check_heads_divide_width,
    weights=_EMBEDDING | GATED_FFN | with_biases(ATTENTION),
    ignored_tensors=ROTARY_BUFFERS,
)

# --- nanochat, whose rotation turns the other way -------------------------------------------------

NANOCHAT = Family(
    name='nanochat',
    architecture='NanoChatForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=2048),
        field('d_ff', 'intermediate_size', 8192),
        field('head_dim', 'head_dim', None),
        field('activation', 'hidden_act', 'relu2', ACTIVATIONS),
        field('attention_bias', 'attention_bias', False),
        field('logit_softcap', 'final_logit_softcapping', 15.0),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(
            normalization='rmsnorm_nogain',
            embedding_norm='rmsnorm_nogain',
            qk_norm='rmsnorm_nogain',
            qk_norm_position='after_rotation',
            ffn_type='standard',
            ffn_bias=False,
        ),
        kv_heads_field(),
        rope_fields(),
    ),
    weights=_EMBEDDING
    | with_biases(
        {
            'blocks.{layer}.attention.qkv.weight': TensorMap(
                projections('self_attn', 'q', 'k', 'v'),
                rows=query_key_value_rows,
                row_order=negated_rows,
            ),
            'blocks.{layer}.attention.output.weight': TensorMap(projections('self_attn', 'o')),
        }
    )
    | {
        'blocks.{layer}.ffn.up.weight': tensor(LAYER + 'mlp.fc1.weight'),
        'blocks.{layer}.ffn.down.weight': tensor(LAYER + 'mlp.fc2.weight'),
    },
    ignored_tensors=ROTARY_BUFFERS,
)

# --- Stable LM ------------------------------------------------------------------------------------


def _norm_of_each_head(which: str) -> TensorMap:
    """A tensor for each head of the queries ('q') or keys ('k')."""
    name = f'{LAYER}self_attn.{which}_layernorm.norms.'

    def heads(config: ModelArchitectureConfig) -> int:
        return config.n_head if which == 'q' else num_kv_heads_of(config)

    def names(config: ModelArchitectureConfig) -> tuple[str, ...]:
        return tuple(f'{name}{head}.weight' for head in range(heads(config)))

    return TensorMap(
        (name + '0.weight',),
        choose_templates=names,
        rows=lambda config: (config.head_dim,) * heads(config),
    )


_NORM_POSITIONS: dict[bool, dict] = {
    False: {'norm_position': 'pre'},
    True: {'norm_position': 'parallel', 'parallel_shared_norm': True},
}


def _read_parallel(fields: Fields) -> dict:
    return _NORM_POSITIONS[fields.take('use_parallel_residual', bool, False)]


def _write_parallel(config: ModelArchitectureConfig) -> dict:
    return {'use_parallel_residual': config.layers[0].norm_position == 'parallel'}


_STABLELM_NORMS = {
    'final_norm.weight': tensor('model.norm.weight'),
    **PRE_NORMS,
}
STABLELM = Family(
    name='stablelm',
    architecture='StableLmForCausalLM',
    prefix='model.',
    field_maps=(
        *_sizes(4096),
        field('d_ff', 'intermediate_size', 6912),
        field('norm_eps', 'layer_norm_eps', 1e-5),
        field('attention_bias', 'use_qkv_bias', False),
        field('qk_norm', 'qk_layernorm', False, {False: 'none', True: 'layernorm_nobias'}),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(
            normalization='layernorm', bias=False, attention_output_bias=False, ffn_bias=False
        ),
        FieldMap(
            lambda fields: (
                {'qk_norm_scope': 'each_head'} if fields.take('qk_layernorm', bool, False) else {}
            ),
            lambda config: {},
        ),
        FieldMap(_read_parallel, _write_parallel),
        head_size_field(),
        kv_heads_field(32),
        rope_fields(fraction='partial_rotary_factor'),
        swiglu_field(),
        export_only(hidden_dropout='residual_dropout'),
    ),
    weights=_EMBEDDING
    | with_biases(_STABLELM_NORMS | ATTENTION)
    | GATED_FFN
    | {
        f'blocks.{{layer}}.attention.{name}_norm.weight': _norm_of_each_head(name)
        for name in ('q', 'k')
    },
    ignored_tensors=ROTARY_BUFFERS,
)
