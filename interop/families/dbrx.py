"""DBRX: a mixture of experts in every layer; queries, keys and values are clipped."""

from interop.fields import Fields
from interop.layers import num_kv_heads_of, options_with
from interop.mapping import (
    Family,
    FieldMap,
    constant_option,
    field,
    kv_head_options,
    required_field,
)
from interop.rope import rope_fields
from interop.tensors import Layout, TensorMap, resize_vocabulary, tensor
from model_config import ModelArchitectureConfig

_ROPE = rope_fields()


def _read_attention(fields: Fields) -> dict:
    """Fields of attention have their own object; that of the rotation there is not used."""
    attention = fields.subobject('attn_config')
    heads, shared = fields.take('n_heads', int), attention.take('kv_n_heads', int, 1)
    clip = attention.take('clip_qkv', float, optional=True)
    theta = attention.take('rope_theta', float, 10000.0)
    attention.refuse_unread()
    fields.values.setdefault('max_position_embeddings', fields.values.get('max_seq_len', 2048))
    options = _ROPE.read(fields)
    if options.get('rope_theta') not in (None, theta):
        attention.refuse(
            'rope_theta',
            f'transformers uses rope_theta={options["rope_theta"]}, which is outside attn_config. '
            f'Set both to the value of the training',
        )
    return {**options, **kv_head_options(heads, shared), 'qkv_clip': clip}


def _write_attention(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'qkv_clip')
    attention = {
        'kv_n_heads': num_kv_heads_of(config.layers[0]),
        'clip_qkv': options.get('qkv_clip'),
        'rope_theta': options.get('rope_theta'),
    }
    return {**_ROPE.write(config), 'attn_config': attention}


def _check_clip(fields: dict) -> str | None:
    """transformers fails without it."""
    return None if fields['attn_config']['clip_qkv'] else 'DBRX needs a qkv_clip in transformers'


_EXPERTS = (
    field('expert_d_ff', 'ffn_hidden_size', 3584),
    field('num_experts', 'moe_num_experts', 4),
    field('experts_per_token', 'moe_top_k', 1),
    # Of a norm, here the sum.
    field('router_normalize', 'moe_normalize_expert_weights', 1.0, {1.0: True, None: False}),
    field('expert_ffn', 'ffn_act_fn', None, {None: 'swiglu'}),
)


def _read_experts(fields: Fields) -> dict:
    experts = fields.subobject('ffn_config')
    if experts.values.get('ffn_act_fn') == {'name': 'silu'}:  # the default
        experts.values['ffn_act_fn'] = None
    options = {key: value for each in _EXPERTS for key, value in each.read(experts).items()}
    # The first is that of the model; the others are of training.
    experts.refuse_unread(frozenset({'hidden_size', 'moe_jitter_eps', 'moe_loss_weight'}))
    return options


def _write_experts(config: ModelArchitectureConfig) -> dict:
    written = {key: value for each in _EXPERTS for key, value in each.write(config).items()}
    return {'ffn_config': written}


def _gate_up(config: ModelArchitectureConfig) -> Layout:
    """Theirs: the gates of all experts, then the up-projections of all."""
    return Layout(
        lambda theirs: (
            theirs.unflatten(0, (2, config.num_experts, -1)).transpose(0, 1).flatten(1, 2)
        ),
        lambda ours: ours.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2),
    )


def _down(config: ModelArchitectureConfig) -> Layout:
    return Layout(
        lambda theirs: theirs.unflatten(0, (config.num_experts, -1)).mT,
        lambda ours: ours.mT.flatten(0, 1),
    )


_BLOCK = 'transformer.blocks.{layer}.'
_THEIRS, _OURS = _BLOCK + 'ffn.experts.mlp.', 'blocks.{layer}.ffn.experts.'

DBRX = Family(
    name='dbrx',
    architecture='DbrxForCausalLM',
    prefix='transformer.',
    field_maps=(
        field('n_layer', 'n_layers', 24),
        field('n_head', 'n_heads', 16),
        field('n_embd', 'd_model', 2048),
        field('block_size', 'max_seq_len', 2048),
        field('vocab_size', 'vocab_size', 32000),
        constant_option(normalization='layernorm_nobias', norm_eps=1e-5, bias=False),
        constant_option(ffn_type='moe', router_score='softmax', weight_tying=False),
        required_field(tie_word_embeddings=False),
        FieldMap(_read_attention, _write_attention),
        FieldMap(_read_experts, _write_experts),
    ),
    aliases={
        'hidden_size': 'd_model',
        'num_attention_heads': 'n_heads',
        'num_hidden_layers': 'n_layers',
        'max_position_embeddings': 'max_seq_len',
    },
    check_loadable=_check_clip,
    # The first follows from attn_config.
    irrelevant_fields=frozenset({'num_key_value_heads', 'emb_pdrop'}),
    weights={
        'token_embedding.weight': tensor('transformer.wte.weight', resize=resize_vocabulary),
        'output_head.projection.weight': tensor('lm_head.weight', resize=resize_vocabulary),
        'final_norm.weight': tensor('transformer.norm_f.weight'),
        'blocks.{layer}.attention_norm.weight': tensor(_BLOCK + 'norm_attn_norm.norm_1.weight'),
        'blocks.{layer}.ffn_norm.weight': tensor(_BLOCK + 'norm_attn_norm.norm_2.weight'),
        'blocks.{layer}.attention.qkv.weight': tensor(_BLOCK + 'norm_attn_norm.attn.Wqkv.weight'),
        'blocks.{layer}.attention.output.weight': tensor(
            _BLOCK + 'norm_attn_norm.attn.out_proj.weight'
        ),
        'blocks.{layer}.ffn.router.weight': tensor(_BLOCK + 'ffn.router.layer.weight'),
        _OURS + 'gate_up.weight': TensorMap((_THEIRS + 'w1', _THEIRS + 'v1'), layout=_gate_up),
        _OURS + 'down.weight': tensor(_THEIRS + 'w2', layout=_down),
    },
)
