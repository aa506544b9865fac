"""Llama 4: chunks of attention with RoPE, layers without positions, experts weighted at inputs."""

from interop.families.llama import (
    EMBEDDING_AND_HEAD,
    LAYER,
    PAIRED_ATTENTION,
    PRE_NORMS,
    ROTARY_BUFFERS,
    llama_fields,
    projections,
)
from interop.families.mixed_layers import read_rotated
from interop.fields import Fields
from interop.layer_kinds import (
    DENSE,
    SPARSE,
    LayerKind,
    LayerNames,
    dense_and_sparse,
    layer_kinds_field,
    named_by_index,
    named_by_position,
)
from interop.layers import PerLayer
from interop.mapping import (
    FULL,
    Family,
    FieldMap,
    check_layer_types,
    constant_option,
    field,
    kv_heads_field,
    required_field,
)
from interop.rope import rope_fields
from interop.tensors import TRANSPOSED, TensorMap, tensor, with_biases
from model_config import ModelArchitectureConfig

# --- Kinds of attention ---------------------------------------------------------------------------

_ROTARY, _WITHOUT = 'rotary', 'without positions'


def _read_rotated(fields: Fields) -> list[bool]:
    """Whether each layer has rotary positions. An empty list counts as a missing one."""
    if fields.values.get('no_rope_layers') == []:
        fields.values['no_rope_layers'] = None
    return read_rotated(fields)


_POSITIONS = LayerNames(
    ('no_rope_layers', 'no_rope_layer_interval'),
    lambda fields, layers: [_ROTARY if each else _WITHOUT for each in _read_rotated(fields)],
    lambda names: {'no_rope_layers': [int(name == _ROTARY) for name in names]},
)


def _read_norm(fields: Fields) -> dict:
    if not fields.take('use_qk_norm', bool, True):
        return {'qk_norm': 'none'}
    return {
        'qk_norm': 'rmsnorm_nogain',
        'qk_norm_scope': 'head',
        'qk_norm_position': 'after_rotation',
    }


def _write_norm(layer: ModelArchitectureConfig) -> dict:
    return {'use_qk_norm': layer.get('qk_norm') == 'rmsnorm_nogain'}


def _read_growth(fields: Fields) -> dict:
    """The factor of queries by their position (Nakanishi 2025, in transformers' words tuning)."""
    tuned = fields.take('attn_temperature_tuning', bool, True)
    growth = fields.take('attn_scale', float, 0.1)
    length = fields.take('floor_scale', int, 8192)
    if not tuned or growth == 0:
        return {'query_scale_growth': None}
    return {
        'query_scale_growth': growth,
        'query_scale_length': length,
        'query_scale_offset': 1,
    }


def _write_growth(layer: ModelArchitectureConfig) -> dict:
    growth = layer.get('query_scale_growth')
    if growth is None:
        return {'attn_temperature_tuning': False}
    return {
        'attn_temperature_tuning': True,
        'attn_scale': growth,
        'floor_scale': layer.query_scale_length,
    }


_ATTENTION = layer_kinds_field(
    _POSITIONS,
    kinds={
        _ROTARY: LayerKind(
            {'position_encoding': 'rope'},
            (
                rope_fields(default_theta=5e5),
                FieldMap(_read_norm, _write_norm),
                constant_option(query_scale_growth=None),
            ),
        ),
        _WITHOUT: LayerKind(
            {'position_encoding': 'none'},
            (FieldMap(_read_growth, _write_growth), constant_option(qk_norm='none')),
        ),
    },
)

# --- Chunks ---------------------------------------------------------------------------------------

_CHUNKED = 'chunked_attention'


def _read_chunks(fields: Fields) -> dict:
    """Chunks in the layers of that type; without types, in those with rotary positions."""
    chunk = fields.take('attention_chunk_size', int, 8192, optional=True)
    types = fields.take('layer_types', list, optional=True)
    if types is None:
        rotated = _read_rotated(fields)
        return {'attention_chunk': PerLayer(chunk if each else None for each in rotated)}
    layers = fields.take('num_hidden_layers', int, 0)
    check_layer_types(fields, types, layers, (_CHUNKED, FULL))
    if chunk is None and _CHUNKED in types:
        fields.refuse('layer_types', 'has chunks, but attention_chunk_size is null')
    return {'attention_chunk': PerLayer(chunk if kind == _CHUNKED else None for kind in types)}


def _write_chunks(config: ModelArchitectureConfig) -> dict:
    chunks = [layer.get('attention_chunk') for layer in config.layers]
    return {
        'attention_chunk_size': next(filter(None, chunks), None),
        'layer_types': [FULL if chunk is None else _CHUNKED for chunk in chunks],
    }


# --- Kinds of FFNs --------------------------------------------------------------------------------

_LISTED = named_by_index('moe_layers', SPARSE, DENSE)
_STEPS = named_by_position('interleave_moe_layer_step', 1, SPARSE, DENSE)


def _read_sparse(fields: Fields, layers: int | None) -> list[str]:
    return (_LISTED if _LISTED.exist(fields) else _STEPS).read(fields, layers)


_FFNS = layer_kinds_field(
    LayerNames((*_LISTED.fields, *_STEPS.fields), _read_sparse, _LISTED.write),
    kinds=dense_and_sparse(
        field('d_ff', 'intermediate_size_mlp', 16384),
        field('num_experts', 'num_local_experts', 16),
        field('experts_per_token', 'num_experts_per_tok', 1),
        field('expert_d_ff', 'intermediate_size', 8192),
        constant_option(expert_weights_at='input', shared_experts=1),
        constant_option(router_score='sigmoid', router_normalize=False, router_scale=1.0),
    ),
)

_THEIRS, _OURS = LAYER + 'feed_forward.', 'blocks.{layer}.ffn.'

LLAMA4 = Family(
    name='llama4_text',
    architecture='Llama4ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=4096 * 32, norm_eps=1e-5),
        field('head_dim', 'head_dim', 128),
        field('attention_bias', 'attention_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(ffn_bias=False),
        required_field(hidden_act='silu'),
        kv_heads_field(8),
        _ATTENTION,
        FieldMap(_read_chunks, _write_chunks),
        _FFNS,
    ),
    # Superseded by lists of layers; of a tool that quantizes models.
    irrelevant_fields=frozenset(
        {'no_rope_layer_interval', 'interleave_moe_layer_step', 'for_llm_compressor'}
    ),
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | with_biases(PAIRED_ATTENTION)
    | {
        _OURS + 'gate_up.weight': TensorMap(projections('feed_forward', 'gate', 'up')),
        _OURS + 'down.weight': TensorMap(projections('feed_forward', 'down')),
        _OURS + 'router.weight': tensor(_THEIRS + 'router.weight'),
        _OURS + 'experts.gate_up.weight': tensor(
            _THEIRS + 'experts.gate_up_proj', layout=TRANSPOSED
        ),
        _OURS + 'experts.down.weight': tensor(_THEIRS + 'experts.down_proj', layout=TRANSPOSED),
        _OURS + 'shared.gate_up.weight': TensorMap(
            projections('feed_forward.shared_expert', 'gate', 'up')
        ),
        _OURS + 'shared.down.weight': TensorMap(projections('feed_forward.shared_expert', 'down')),
    },
    ignored_tensors=ROTARY_BUFFERS,
)
