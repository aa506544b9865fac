"""DeepSeek-V2 and V3."""

import torch

from interop.families.llama import (
    ENDS,
    GATED,
    LAYER,
    PRE_NORMS,
    TABLES_OF_COSINES,
    llama_like,
    projections,
)
from interop.fields import Fields
from interop.mapping import Entry, Family, heads_must_divide_the_width, ours_is, same, theirs_is
from interop.rope import deepseek_rope
from interop.tensors import Weight, one, with_biases
from model_config import ModelArchitectureConfig


def _turned_pairs(columns: int) -> torch.Tensor:
    """DeepSeek turns columns 2i and 2i + 1 by one angle; ours are i and i + columns / 2."""
    return torch.arange(columns).view(-1, 2).T.flatten()


def _query_rows(config: ModelArchitectureConfig) -> torch.Tensor:
    own = torch.arange(config.qk_nope_head_dim)
    head = torch.cat((own, len(own) + _turned_pairs(config.qk_rope_head_dim)))
    return (torch.arange(config.n_head)[:, None] * len(head) + head).flatten()


def _latent_rows(config: ModelArchitectureConfig) -> torch.Tensor:
    latent = torch.arange(config.kv_lora_rank)
    return torch.cat((latent, len(latent) + _turned_pairs(config.qk_rope_head_dim)))


def _query_name(config: ModelArchitectureConfig) -> tuple[str, ...]:
    return projections('self_attn', 'q' if config.q_lora_rank is None else 'q_b')


def _read_groups(fields: Fields) -> dict:
    """Experts chosen within a few groups of them: only where that is no limit."""
    groups, chosen = fields.take('n_group', int, 8), fields.take('topk_group', int, 4)
    if groups != chosen:
        fields.problems.append(
            f'n_group={groups} with topk_group={chosen} cannot be expressed here; equal ones can.'
        )
    return {}


def _read_own_keys(fields: Fields) -> dict:
    heads = fields.take('num_attention_heads', int)
    if fields.take('num_key_value_heads', int, optional=True) not in (None, heads):
        fields.refuse('num_key_value_heads', f'latent attention has keys for all {heads} heads')
    return {}


def _read_head_dim(fields: Fields) -> dict:
    """The size that turns: the tables of cosines are made for it."""
    turning = fields.take('qk_rope_head_dim', int, 64)
    if fields.take('head_dim', int, optional=True) not in (None, turning):
        fields.refuse('head_dim', f'it must be qk_rope_head_dim={turning}')
    return {}


_DEEPSEEK = (
    theirs_is(rms_norm_eps=1e-6),  # whatever the field says, the norms of latents have that
    same('d_ff', 'intermediate_size'),
    same('q_lora_rank', 'q_lora_rank', 1536),
    same('kv_lora_rank', 'kv_lora_rank', 512),
    same('qk_nope_head_dim', 'qk_nope_head_dim', 128),
    same('qk_rope_head_dim', 'qk_rope_head_dim', 64),
    same('v_head_dim', 'v_head_dim', 128),
    same('attention_bias', 'attention_bias', False),
    same('expert_ffn', 'hidden_act', 'silu', {'silu': 'swiglu'}),
    same('weight_tying', 'tie_word_embeddings', False),
    ours_is(attention_type='mla', ffn_type='moe', ffn_bias=False),
    Entry(_read_own_keys, lambda config: {'num_key_value_heads': config.n_head}),
    Entry(_read_head_dim, lambda config: {}),
    theirs_is(moe_layer_freq=1),
    deepseek_rope(),
)
# Prediction of more than the next token reads layers of its own, which are refused as tensors.
_HARMLESS = frozenset({'qk_head_dim', 'num_nextn_predict_layers', 'num_mtp_layers'})
_DEEPSEEK_WEIGHTS = (
    ENDS
    | PRE_NORMS
    | GATED
    | {
        'blocks.{layer}.attention.q_norm.weight': one(LAYER + 'self_attn.q_a_layernorm.weight'),
        'blocks.{layer}.attention.kv_norm.weight': one(LAYER + 'self_attn.kv_a_layernorm.weight'),
        'blocks.{layer}.attention.q.weight': Weight(
            projections('self_attn', 'q_b'), named=_query_name, order=_query_rows
        ),
        'blocks.{layer}.attention.kv.weight': Weight(projections('self_attn', 'kv_b')),
        **with_biases(
            {
                'blocks.{layer}.attention.q_down.weight': Weight(projections('self_attn', 'q_a')),
                'blocks.{layer}.attention.kv_down.weight': one(
                    LAYER + 'self_attn.kv_a_proj_with_mqa.weight', order=_latent_rows
                ),
                'blocks.{layer}.attention.output.weight': Weight(projections('self_attn', 'o')),
            }
        ),
        'blocks.{layer}.ffn.router.weight': one(LAYER + 'mlp.gate.weight'),
        'blocks.{layer}.ffn.experts.gate_up.weight': Weight(
            projections('mlp.experts.{expert}', 'gate', 'up')
        ),
        'blocks.{layer}.ffn.experts.down.weight': Weight(
            projections('mlp.experts.{expert}', 'down')
        ),
        'blocks.{layer}.ffn.shared.gate_up.weight': Weight(
            projections('mlp.shared_experts', 'gate', 'up')
        ),
        'blocks.{layer}.ffn.shared.down.weight': Weight(projections('mlp.shared_experts', 'down')),
    }
)

DEEPSEEK_V2 = Family(
    name='deepseek_v2',
    architecture='DeepseekV2ForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=2048),
        *_DEEPSEEK,
        same('num_experts', 'n_routed_experts', 64),
        same('experts_per_token', 'num_experts_per_tok'),
        same('expert_d_ff', 'moe_intermediate_size', 1407),
        same('shared_experts', 'n_shared_experts', 2),
        same('dense_layers', 'first_k_dense_replace', 0),
        same('router_scale', 'routed_scaling_factor', 1.0),
        ours_is(router_score='softmax', router_normalize=False),
        theirs_is(topk_method='greedy', norm_topk_prob=False, mlp_bias=False),
        theirs_is(scoring_func='softmax'),
    ),
    aliases={'num_experts': 'n_routed_experts'},
    # Groups are for other values of topk_method.
    harmless=_HARMLESS | {'n_group', 'topk_group'},
    unloadable=heads_must_divide_the_width,
    weights=_DEEPSEEK_WEIGHTS,
    ignored=TABLES_OF_COSINES,
)

DEEPSEEK_V3 = Family(
    name='deepseek_v3',
    architecture='DeepseekV3ForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=4096),
        *_DEEPSEEK,
        same('num_experts', 'n_routed_experts', 256),
        same('experts_per_token', 'num_experts_per_tok', 8),
        same('expert_d_ff', 'moe_intermediate_size', 2048),
        same('shared_experts', 'n_shared_experts', 1),
        same('dense_layers', 'first_k_dense_replace', 3),
        same('router_normalize', 'norm_topk_prob', True),
        same('router_scale', 'routed_scaling_factor', 2.5),
        ours_is(router_score='sigmoid'),
        theirs_is(rope_interleave=True, scoring_func='sigmoid', topk_method='noaux_tc'),
        Entry(_read_groups, lambda config: {'n_group': 1, 'topk_group': 1}),
    ),
    aliases={'num_local_experts': 'n_routed_experts'},
    harmless=_HARMLESS,
    weights=_DEEPSEEK_WEIGHTS
    | {
        # The zeros move the choice of experts, not their weight, to even out their load.
        'blocks.{layer}.ffn.router.weight': one(
            LAYER + 'mlp.gate.weight', zeros=LAYER + 'mlp.gate.e_score_correction_bias'
        ),
    },
    ignored=TABLES_OF_COSINES,
)
