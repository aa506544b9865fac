"""Llama and its close relatives: Mistral, Qwen3, OLMo 2, Mixtral."""

from interop.fields import Fields
from interop.mapping import (
    Entry,
    Family,
    heads_must_divide_the_width,
    kv_heads,
    kv_heads_of,
    ours_is,
    same,
    windows,
    written_only,
)
from interop.rope import rope
from interop.tensors import Weight, fit_vocabulary, one, with_biases
from model_config import ModelArchitectureConfig


def _query_key_value_rows(config: ModelArchitectureConfig) -> tuple[int, ...]:
    shared = kv_heads_of(config)
    return tuple(heads * config.head_dim for heads in (config.n_head, shared, shared))


LAYER = 'model.layers.{layer}.'


def projections(block: str, *names: str) -> tuple[str, ...]:
    return tuple(f'{LAYER}{block}.{name}_proj.weight' for name in names)


def llama_like(block_size: int, norm_eps: float = 1e-6) -> tuple[Entry, ...]:
    """What Llama and its descendants share; the defaults of two fields differ among them."""
    return (
        same('n_layer', 'num_hidden_layers'),
        same('n_head', 'num_attention_heads'),
        same('n_embd', 'hidden_size'),
        same('block_size', 'max_position_embeddings', block_size),
        same('vocab_size', 'vocab_size'),
        same('norm_eps', 'rms_norm_eps', norm_eps),
        ours_is(normalization='rmsnorm', bias=False),
        written_only(attention_dropout='attention_dropout'),
    )


def swiglu(act: str = 'hidden_act') -> Entry:
    return same('ffn_type', act, 'silu', {'silu': 'swiglu'})


ENDS = {
    'token_embedding.weight': one('model.embed_tokens.weight', fit=fit_vocabulary),
    'final_norm.weight': one('model.norm.weight'),
    'output_head.projection.weight': one('lm_head.weight', fit=fit_vocabulary),
}
ATTENTION = {
    'blocks.{layer}.attention.qkv.weight': Weight(
        projections('self_attn', 'q', 'k', 'v'), rows=_query_key_value_rows
    ),
    'blocks.{layer}.attention.output.weight': Weight(projections('self_attn', 'o')),
}
GATED = {
    'blocks.{layer}.ffn.gate_up.weight': Weight(projections('mlp', 'gate', 'up')),
    'blocks.{layer}.ffn.down.weight': Weight(projections('mlp', 'down')),
}
PRE_NORMS = {
    'blocks.{layer}.attention_norm.weight': one(LAYER + 'input_layernorm.weight'),
    'blocks.{layer}.ffn_norm.weight': one(LAYER + 'post_attention_layernorm.weight'),
}
_QK_NORMS = {
    'blocks.{layer}.attention.q_norm.weight': one(LAYER + 'self_attn.q_norm.weight'),
    'blocks.{layer}.attention.k_norm.weight': one(LAYER + 'self_attn.k_norm.weight'),
}
TABLES_OF_COSINES = r'rotary_emb\.inv_freq$'

LLAMA = Family(
    name='llama',
    architecture='LlamaForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=2048),
        same('d_ff', 'intermediate_size'),
        same('head_dim', 'head_dim', None),
        same('attention_bias', 'attention_bias', False),
        same('ffn_bias', 'mlp_bias', False),
        same('weight_tying', 'tie_word_embeddings', False),
        kv_heads(),
        rope(),
        swiglu(),
    ),
    unloadable=heads_must_divide_the_width,
    weights=ENDS | PRE_NORMS | with_biases(ATTENTION | GATED),
    ignored=TABLES_OF_COSINES,
)


def _refuse_layer_types(fields: Fields) -> dict:
    """With them, be they null, transformers makes a model of another family of it."""
    if 'layer_types' in fields:
        fields.value('layer_types')
        fields.refuse('layer_types', "transformers reads such a config as model_type 'ministral'")
    return {}


MISTRAL = Family(
    name='mistral',
    architecture='MistralForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=4096 * 32),
        same('d_ff', 'intermediate_size'),
        same('head_dim', 'head_dim', None),
        same('sliding_window', 'sliding_window', 4096),
        same('weight_tying', 'tie_word_embeddings', False),
        Entry(_refuse_layer_types, lambda config: {}),
        kv_heads(8),
        rope(),
        swiglu(),
    ),
    weights=ENDS | PRE_NORMS | ATTENTION | GATED,
    ignored=TABLES_OF_COSINES,
)

QWEN3 = Family(
    name='qwen3',
    architecture='Qwen3ForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=32768),
        same('d_ff', 'intermediate_size'),
        same('head_dim', 'head_dim', 128),
        same('attention_bias', 'attention_bias', False),
        same('weight_tying', 'tie_word_embeddings', False),
        ours_is(qk_norm='rmsnorm', qk_norm_scope='head', ffn_bias=False),
        windows(
            4096,
            lambda layer, fields: layer >= fields.take('max_window_layers', int, 28),
            switch='use_sliding_window',
        ),
        kv_heads(32),
        rope(),
        swiglu(),
    ),
    harmless=frozenset({'max_window_layers'}),  # where layer_types says it
    weights=ENDS | PRE_NORMS | _QK_NORMS | GATED | with_biases(ATTENTION),
)

OLMO2 = Family(
    name='olmo2',
    architecture='Olmo2ForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=2048, norm_eps=1e-5),
        same('d_ff', 'intermediate_size'),
        same('head_dim', 'head_dim', None),
        same('attention_bias', 'attention_bias', False),
        same('weight_tying', 'tie_word_embeddings', False),
        ours_is(
            norm_position='reordered',
            qk_norm='rmsnorm',
            qk_norm_scope='projection',
            ffn_bias=False,
        ),
        kv_heads(),
        rope(),
        swiglu(),
    ),
    weights=ENDS
    | _QK_NORMS
    | GATED
    | with_biases(ATTENTION)
    | {
        'blocks.{layer}.attention_norm.weight': one(LAYER + 'post_attention_layernorm.weight'),
        'blocks.{layer}.ffn_norm.weight': one(LAYER + 'post_feedforward_layernorm.weight'),
    },
)

_MIXTRAL_MOE = LAYER + 'block_sparse_moe.'
MIXTRAL = Family(
    name='mixtral',
    architecture='MixtralForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=4096 * 32, norm_eps=1e-5),
        same('expert_d_ff', 'intermediate_size'),
        same('head_dim', 'head_dim', None),
        same('sliding_window', 'sliding_window', None),
        same('num_experts', 'num_local_experts', 8),
        same('experts_per_token', 'num_experts_per_tok', 2),
        same('expert_ffn', 'hidden_act', 'silu', {'silu': 'swiglu'}),
        same('weight_tying', 'tie_word_embeddings', False),
        ours_is(ffn_type='moe', router_score='softmax', router_normalize=True),
        kv_heads(8),
        rope(default_theta=1e6),
    ),
    aliases={'num_experts': 'num_local_experts'},
    weights=ENDS
    | PRE_NORMS
    | ATTENTION
    | {
        'blocks.{layer}.ffn.router.weight': one(_MIXTRAL_MOE + 'gate.weight'),
        'blocks.{layer}.ffn.experts.gate_up.weight': Weight(
            tuple(f'{_MIXTRAL_MOE}experts.{{expert}}.{name}.weight' for name in ('w1', 'w3'))
        ),
        'blocks.{layer}.ffn.experts.down.weight': one(_MIXTRAL_MOE + 'experts.{expert}.w2.weight'),
    },
)
