"""Llama and its close relatives: Mistral, Qwen3, OLMo 2, Mixtral."""

from dataclasses import replace

from interop.fields import Fields
from interop.layers import num_kv_heads_of
from interop.mapping import (
    Family,
    FieldMap,
    check_heads_divide_width,
    constant_option,
    export_only,
    field,
    kv_heads_field,
    size_fields,
    windows_field,
)
from interop.rope import rope_fields
from interop.rotary_rows import interleaved_rows
from interop.tensors import TensorMap, resize_vocabulary, tensor, with_biases
from model_config import ModelArchitectureConfig


def query_key_value_rows(config: ModelArchitectureConfig) -> tuple[int, ...]:
    shared = num_kv_heads_of(config)
    values = shared * config.value_head_dim
    return config.n_head * config.head_dim, shared * config.head_dim, values


def query_key_value_gate_rows(config: ModelArchitectureConfig) -> tuple[int, ...]:
    """With the rows of the gates of attention's outputs, if it has them."""
    gates = {'head': config.n_head, 'elementwise': config.n_head * config.value_head_dim}
    rows = query_key_value_rows(config)
    return rows if config.attention_gate == 'none' else (*rows, gates[config.attention_gate])


LAYER = 'model.layers.{layer}.'


def projections(block: str, *names: str) -> tuple[str, ...]:
    return tuple(f'{LAYER}{block}.{name}_proj.weight' for name in names)


def llama_fields(block_size: int, norm_eps: float = 1e-6) -> tuple[FieldMap, ...]:
    """Field maps shared by Llama and its descendants; the defaults of two fields differ."""
    return (
        *size_fields(block_size),
        field('norm_eps', 'rms_norm_eps', norm_eps),
        constant_option(normalization='rmsnorm', bias=False),
        export_only(attention_dropout='attention_dropout'),
    )


def swiglu_field(act: str = 'hidden_act') -> FieldMap:
    return field('ffn_type', act, 'silu', {'silu': 'swiglu'})


EMBEDDING_AND_HEAD = {
    'token_embedding.weight': tensor('model.embed_tokens.weight', resize=resize_vocabulary),
    'final_norm.weight': tensor('model.norm.weight'),
    'output_head.projection.weight': tensor('lm_head.weight', resize=resize_vocabulary),
}
ATTENTION = {
    'blocks.{layer}.attention.qkv.weight': TensorMap(
        projections('self_attn', 'q', 'k', 'v'), rows=query_key_value_rows
    ),
    'blocks.{layer}.attention.output.weight': TensorMap(projections('self_attn', 'o')),
}
# In which dimensions 2i and 2i + 1 of a head are rotated together.
PAIRED_ATTENTION = {
    **ATTENTION,
    'blocks.{layer}.attention.qkv.weight': replace(
        ATTENTION['blocks.{layer}.attention.qkv.weight'], row_order=interleaved_rows
    ),
}
GATED_FFN = {
    'blocks.{layer}.ffn.gate_up.weight': TensorMap(projections('mlp', 'gate', 'up')),
    'blocks.{layer}.ffn.down.weight': TensorMap(projections('mlp', 'down')),
}
EXPERTS = {
    'blocks.{layer}.ffn.router.weight': tensor(LAYER + 'mlp.gate.weight'),
    'blocks.{layer}.ffn.experts.gate_up.weight': TensorMap(
        projections('mlp.experts.{expert}', 'gate', 'up')
    ),
    'blocks.{layer}.ffn.experts.down.weight': TensorMap(
        projections('mlp.experts.{expert}', 'down')
    ),
}
PRE_NORMS = {
    'blocks.{layer}.attention_norm.weight': tensor(LAYER + 'input_layernorm.weight'),
    'blocks.{layer}.ffn_norm.weight': tensor(LAYER + 'post_attention_layernorm.weight'),
}
QK_NORMS = {
    'blocks.{layer}.attention.q_norm.weight': tensor(LAYER + 'self_attn.q_norm.weight'),
    'blocks.{layer}.attention.k_norm.weight': tensor(LAYER + 'self_attn.k_norm.weight'),
}
ROTARY_BUFFERS = r'rotary_emb\.inv_freq$'


def llama_model_fields(
    block_size: int,
    norm_eps: float = 1e-6,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    theta: float = 10000.0,
) -> tuple[FieldMap, ...]:
    """All field maps of Llama and its aliases, which have other defaults."""
    return (
        *llama_fields(block_size, norm_eps),
        field('d_ff', 'intermediate_size'),
        field('head_dim', 'head_dim', head_dim),
        field('attention_bias', 'attention_bias', False),
        field('ffn_bias', 'mlp_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        kv_heads_field(kv_heads),
        rope_fields(default_theta=theta),
        swiglu_field(),
    )


LLAMA = Family(
    name='llama',
    architecture='LlamaForCausalLM',
    prefix='model.',
    field_maps=llama_model_fields(block_size=2048),
    check_loadable=check_heads_divide_width,
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | with_biases(ATTENTION | GATED_FFN),
    ignored_tensors=ROTARY_BUFFERS,
)


def _refuse_layer_types(fields: Fields) -> dict:
    """Refuse `layer_types`, even null: transformers would load another family."""
    if 'layer_types' in fields:
        fields.value('layer_types')
        fields.refuse('layer_types', "transformers reads such a config as model_type 'ministral'")
    return {}


MISTRAL = Family(
    name='mistral',
    architecture='MistralForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=4096 * 32),
        field('d_ff', 'intermediate_size'),
        field('head_dim', 'head_dim', None),
        field('sliding_window', 'sliding_window', 4096),
        field('weight_tying', 'tie_word_embeddings', False),
        FieldMap(_refuse_layer_types, lambda config: {}),
        kv_heads_field(8),
        rope_fields(),
        swiglu_field(),
    ),
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | ATTENTION | GATED_FFN,
    ignored_tensors=ROTARY_BUFFERS,
)

QWEN3 = Family(
    name='qwen3',
    architecture='Qwen3ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=32768),
        field('d_ff', 'intermediate_size'),
        field('head_dim', 'head_dim', 128),
        field('attention_bias', 'attention_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(qk_norm='rmsnorm', qk_norm_scope='head', ffn_bias=False),
        windows_field(
            4096,
            lambda layer, fields: layer >= fields.take('max_window_layers', int, 28),
            switch='use_sliding_window',
        ),
        kv_heads_field(32),
        rope_fields(),
        swiglu_field(),
    ),
    irrelevant_fields=frozenset({'max_window_layers'}),  # superseded by layer_types
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | QK_NORMS | GATED_FFN | with_biases(ATTENTION),
)

OLMO_FIELDS = (
    field('d_ff', 'intermediate_size'),
    field('head_dim', 'head_dim', None),
    field('attention_bias', 'attention_bias', False),
    field('weight_tying', 'tie_word_embeddings', False),
    constant_option(
        norm_position='reordered',
        qk_norm='rmsnorm',
        qk_norm_scope='projection',
        ffn_bias=False,
    ),
    kv_heads_field(),
    swiglu_field(),
)
REORDERED_NORMS = {
    'blocks.{layer}.attention_norm.weight': tensor(LAYER + 'post_attention_layernorm.weight'),
    'blocks.{layer}.ffn_norm.weight': tensor(LAYER + 'post_feedforward_layernorm.weight'),
}
OLMO2 = Family(
    name='olmo2',
    architecture='Olmo2ForCausalLM',
    prefix='model.',
    field_maps=(*llama_fields(block_size=2048, norm_eps=1e-5), *OLMO_FIELDS, rope_fields()),
    weights=EMBEDDING_AND_HEAD | REORDERED_NORMS | QK_NORMS | GATED_FFN | with_biases(ATTENTION),
)

_MIXTRAL_MOE = LAYER + 'block_sparse_moe.'
MIXTRAL_EXPERTS = {
    'blocks.{layer}.ffn.router.weight': tensor(_MIXTRAL_MOE + 'gate.weight'),
    'blocks.{layer}.ffn.experts.gate_up.weight': TensorMap(
        tuple(f'{_MIXTRAL_MOE}experts.{{expert}}.{name}.weight' for name in ('w1', 'w3'))
    ),
    'blocks.{layer}.ffn.experts.down.weight': tensor(_MIXTRAL_MOE + 'experts.{expert}.w2.weight'),
}
MIXTRAL = Family(
    name='mixtral',
    architecture='MixtralForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=4096 * 32, norm_eps=1e-5),
        field('expert_d_ff', 'intermediate_size'),
        field('head_dim', 'head_dim', None),
        field('sliding_window', 'sliding_window', None),
        field('num_experts', 'num_local_experts', 8),
        field('experts_per_token', 'num_experts_per_tok', 2),
        field('expert_ffn', 'hidden_act', 'silu', {'silu': 'swiglu'}),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(ffn_type='moe', router_score='softmax', router_normalize=True),
        kv_heads_field(8),
        rope_fields(default_theta=1e6),
    ),
    aliases={'num_experts': 'num_local_experts'},
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | ATTENTION | MIXTRAL_EXPERTS,
)
