"""Families with other norms than Llama's: OLMo, nanochat, Hunyuan, Stable LM."""

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
)
from interop.rope import read_rope_parameters, rope_fields
from interop.rotary_rows import negated_rows
from interop.tensors import TensorMap, tensor, with_biases
from model_config import ModelArchitectureConfig


def _sizes(block_size: int) -> tuple[FieldMap, ...]:
    return (
        field('n_layer', 'num_hidden_layers'),
        field('n_head', 'num_attention_heads'),
        field('n_embd', 'hidden_size'),
        field('block_size', 'max_position_embeddings', block_size),
        field('vocab_size', 'vocab_size'),
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

# --- Hunyuan --------------------------------------------------------------------------------------


def _hunyuan_rope_fields() -> FieldMap:
    """Rotary positions, of which `rope_type: dynamic` with `alpha` is another theta."""
    plain = rope_fields()

    def read(fields: Fields) -> dict:
        rope_parameters = read_rope_parameters(fields)
        alpha = rope_parameters.take('alpha', float, optional=True)
        kind = rope_parameters.values.get('rope_type', rope_parameters.values.get('type'))
        head_dim = fields.take('head_dim', int, optional=True)
        if kind != 'dynamic' or not alpha:
            return plain.read(fields)
        outside = fields.take('rope_theta', float, 10000.0)
        theta = rope_parameters.take('rope_theta', float, outside)
        if not head_dim or head_dim <= 2 or alpha < 0 or theta <= 0:
            fields.refuse('head_dim', 'with alpha, it must be above 2, and alpha and theta above 0')
            return {}
        stretched = theta * alpha ** (head_dim / (head_dim - 2))
        return {'position_encoding': 'rope', 'rope_scaling': 'none', 'rope_theta': stretched}

    return FieldMap(read, plain.write)


_HUNYUAN_FIELDS = (
    *llama_fields(block_size=2048, norm_eps=1e-5),
    field('head_dim', 'head_dim', None),
    field('attention_bias', 'attention_bias', False),
    field('weight_tying', 'tie_word_embeddings', False),
    constant_option(qk_norm='rmsnorm', qk_norm_scope='head', qk_norm_position='after_rotation'),
    kv_heads_field(),
    _hunyuan_rope_fields(),
)
HUNYUAN_DENSE = Family(
    name='hunyuan_v1_dense',
    architecture='HunYuanDenseV1ForCausalLM',
    prefix='model.',
    field_maps=(
        *_HUNYUAN_FIELDS,
        field('d_ff', 'intermediate_size', 11008),
        constant_option(ffn_bias=False),
        swiglu_field(),
    ),
    # In released files; the class does not read them, and the architecture implies some.
    irrelevant_fields=frozenset(
        {
            *('eod_token_id', 'org_vocab_size', 'im_start_id', 'im_end_id', 'im_newline_id'),
            *('text_start_id', 'text_end_id', 'use_qk_norm', 'use_cla', 'cla_share_factor'),
            *('attention_head_dim', 'norm_type', 'pool_type', 'add_classification_head'),
            *('class_num', 'mask_init_id', 'sep_token_id', 'num_media_embeds'),
        }
    ),
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | GATED_FFN
    | with_biases(ATTENTION)
    | {
        'blocks.{layer}.attention.q_norm.weight': tensor(
            LAYER + 'self_attn.query_layernorm.weight'
        ),
        'blocks.{layer}.attention.k_norm.weight': tensor(LAYER + 'self_attn.key_layernorm.weight'),
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
