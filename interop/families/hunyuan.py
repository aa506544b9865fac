"""Hunyuan, dense and with experts: QK norm after the rotation."""

from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    EXPERTS,
    GATED_FFN,
    LAYER,
    PRE_NORMS,
    ROTARY_BUFFERS,
    llama_fields,
    projections,
    swiglu_field,
)
from interop.fields import Fields
from interop.layers import options_with
from interop.mapping import Family, FieldMap, constant_option, field, kv_heads_field, required_field
from interop.rope import read_rope_parameters, rope_fields
from interop.tensors import TensorMap, tensor, with_biases


def _rope_fields() -> FieldMap:
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


_FIELDS = (
    *llama_fields(block_size=2048, norm_eps=1e-5),
    field('head_dim', 'head_dim', None),
    field('attention_bias', 'attention_bias', False),
    field('weight_tying', 'tie_word_embeddings', False),
    constant_option(qk_norm='rmsnorm', qk_norm_scope='head', qk_norm_position='after_rotation'),
    required_field(use_qk_norm=True, use_cla=False),  # in released files
    kv_heads_field(),
    _rope_fields(),
)
# In released files; the classes of transformers do not read them.
_UNUSED = frozenset(
    {
        *('eod_token_id', 'org_vocab_size', 'im_start_id', 'im_end_id', 'im_newline_id'),
        *('text_start_id', 'text_end_id', 'cla_share_factor', 'attention_head_dim'),
        *('norm_type', 'pool_type', 'add_classification_head', 'class_num', 'mask_init_id'),
        *('sep_token_id', 'num_media_embeds'),
    }
)
_WEIGHTS = (
    EMBEDDING_AND_HEAD
    | PRE_NORMS
    | with_biases(ATTENTION)
    | {
        'blocks.{layer}.attention.q_norm.weight': tensor(
            LAYER + 'self_attn.query_layernorm.weight'
        ),
        'blocks.{layer}.attention.k_norm.weight': tensor(LAYER + 'self_attn.key_layernorm.weight'),
    }
)
HUNYUAN_DENSE = Family(
    name='hunyuan_v1_dense',
    architecture='HunYuanDenseV1ForCausalLM',
    prefix='model.',
    field_maps=(
        *_FIELDS,
        field('d_ff', 'intermediate_size', 11008),
        constant_option(ffn_bias=False),
        swiglu_field(),
    ),
    irrelevant_fields=_UNUSED,
    weights=_WEIGHTS | GATED_FFN,
    ignored_tensors=ROTARY_BUFFERS,
)


def _one_for_all_layers(option: str, name: str, default: int) -> FieldMap:
    """A number that may be a list of one for each layer; they must be equal."""

    def read(fields: Fields) -> dict:
        value = fields.value(name, default)
        numbers = value if isinstance(value, list) and value else [value]
        number = numbers[0]
        if type(number) is not int or any(other != number for other in numbers):
            fields.refuse(name, 'must be a whole number, the same in all layers')
            return {}
        return {option: number}

    return FieldMap(read, lambda config: {name: options_with(config, option).get(option)})


HUNYUAN_MOE = Family(
    name='hunyuan_v1_moe',
    architecture='HunYuanMoEV1ForCausalLM',
    prefix='model.',
    field_maps=(
        *_FIELDS,
        field('expert_d_ff', 'intermediate_size', 11008),
        _one_for_all_layers('num_experts', 'num_experts', 1),
        _one_for_all_layers('experts_per_token', 'moe_topk', 1),
        field('expert_ffn', 'hidden_act', 'silu', {'silu': 'swiglu'}),
        constant_option(
            ffn_type='moe',
            ffn_bias=False,
            shared_experts=1,
            router_score='softmax',
            router_normalize=True,
        ),
    ),
    aliases={'num_experts_per_tok': 'moe_topk', 'num_local_experts': 'num_experts'},
    irrelevant_fields=_UNUSED,
    weights=_WEIGHTS
    | EXPERTS
    | {
        'blocks.{layer}.ffn.router.weight': tensor(LAYER + 'mlp.gate.wg.weight'),
        'blocks.{layer}.ffn.shared.gate_up.weight': TensorMap(
            projections('mlp.shared_mlp', 'gate', 'up')
        ),
        'blocks.{layer}.ffn.shared.down.weight': TensorMap(projections('mlp.shared_mlp', 'down')),
    },
    ignored_tensors=ROTARY_BUFFERS,
)
