"""gpt-oss: mixtures of clamped SwiGLUs with biases, windows in every other layer, sinks."""

import torch

from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    LAYER,
    PRE_NORMS,
    llama_fields,
)
from interop.fields import Fields
from interop.mapping import (
    Family,
    FieldMap,
    constant_option,
    field,
    kv_heads_field,
    required_field,
    windows_field,
)
from interop.rope import rope_fields
from interop.tensors import TRANSPOSED, Layout, TensorMap, tensor, with_biases
from model_config import ModelArchitectureConfig

_ROPE = rope_fields(default_theta=150000.0)
_DEFAULT_ROPE = {
    'rope_type': 'yarn',
    'factor': 32.0,
    'beta_fast': 32.0,
    'beta_slow': 1.0,
    'truncate': False,
    'original_max_position_embeddings': 4096,
}


def _read_rope(fields: Fields) -> dict:
    """Rotary positions; without any in the file, with YaRN."""
    if fields.value('rope_parameters') is None and fields.value('rope_scaling') is None:
        fields.values['rope_parameters'] = dict(_DEFAULT_ROPE)
    return _ROPE.read(fields)


def _write_rope(config: ModelArchitectureConfig) -> dict:
    """Without scaling, an object that says so, since a missing one means YaRN."""
    written = _ROPE.write(config)
    if 'rope_theta' in written and 'rope_scaling' not in written:
        written['rope_scaling'] = {'rope_type': 'default'}
    return written


# Theirs: (experts, in, out), with the columns of gate and up-projection in turns.
_GATE_UP = Layout(
    lambda theirs: theirs.mT.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2),
    lambda ours: ours.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).mT.contiguous(),
)


def _gate_up_rows(config: ModelArchitectureConfig) -> torch.Tensor:
    """The order of the biases of all experts."""
    numbers = torch.arange(config.num_experts * 2 * config.expert_d_ff)
    return numbers.view(config.num_experts, -1, 2).transpose(1, 2).flatten()


_EXPERTS, _OURS = LAYER + 'mlp.experts.', 'blocks.{layer}.ffn.experts.'

GPT_OSS = Family(
    name='gpt_oss',
    architecture='GptOssForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=131072, norm_eps=1e-5),
        field('expert_d_ff', 'intermediate_size', 2880),
        field('head_dim', 'head_dim', 64),
        field('attention_bias', 'attention_bias', True),
        constant_option(attention_sinks=True, ffn_type='moe', expert_ffn='clamped_swiglu'),
        constant_option(ffn_bias=True, router_bias=True, shared_experts=0),
        constant_option(router_score='softmax', router_normalize=True, router_scale=1.0),
        field('num_experts', 'num_local_experts', 128),
        field('experts_per_token', 'num_experts_per_tok', 4),
        field('swiglu_alpha', 'swiglu_alpha', 1.702),
        field('swiglu_limit', 'swiglu_limit', 7.0),
        field('weight_tying', 'tie_word_embeddings', False),
        required_field(hidden_act='silu'),
        windows_field(128, lambda layer, fields: layer % 2 == 0),
        kv_heads_field(8),
        FieldMap(_read_rope, _write_rope),
    ),
    aliases={'num_experts': 'num_local_experts'},
    # Of OpenAI's files; transformers does not read them.
    irrelevant_fields=frozenset({'experts_per_token', 'initial_context_length'}),
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | with_biases(ATTENTION)
    | with_biases({'blocks.{layer}.ffn.router.weight': tensor(LAYER + 'mlp.router.weight')})
    | {
        'blocks.{layer}.attention.sinks': tensor(LAYER + 'self_attn.sinks'),
        _OURS + 'gate_up.weight': tensor(_EXPERTS + 'gate_up_proj', layout=_GATE_UP),
        _OURS + 'down.weight': tensor(_EXPERTS + 'down_proj', layout=TRANSPOSED),
        _OURS + 'gate_up.bias': TensorMap(
            (_EXPERTS + 'gate_up_proj_bias',),
            row_order=_gate_up_rows,
            their_shape=lambda config: (config.num_experts, 2 * config.expert_d_ff),
        ),
        _OURS + 'down.bias': TensorMap(
            (_EXPERTS + 'down_proj_bias',),
            their_shape=lambda config: (config.num_experts, config.n_embd),
        ),
    },
)
