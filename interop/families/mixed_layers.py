"""Families whose layers differ in windows, positions or FFNs: SmolLM3, OLMo 3, EXAONE 4, Mellum."""

from functools import partial

from interop.families.llama import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    EXPERTS,
    GATED_FFN,
    OLMO_FIELDS,
    PRE_NORMS,
    QK_NORMS,
    REORDERED_NORMS,
    llama_fields,
    swiglu_field,
)
from interop.fields import Fields
from interop.layer_kinds import LayerKind, layer_kinds_field, named_by_list
from interop.mapping import (
    FULL,
    MAX_LAYERS,
    WINDOW,
    Family,
    FieldMap,
    all_but_every_nth,
    constant_option,
    field,
    kv_heads_field,
    read_layer_types,
    required_field,
    windows_field,
)
from interop.rope import rope_by_layer_type_fields, rope_fields, rope_in_some_layers
from interop.tensors import with_biases
from model_config import ModelArchitectureConfig

# --- SmolLM3 --------------------------------------------------------------------------------------

_has_rope = all_but_every_nth('no_rope_layer_interval', 4)  # in files without `no_rope_layers`


def read_rotated(fields: Fields) -> list[bool]:
    """Whether each layer has rotary positions."""
    layers = min(fields.take('num_hidden_layers', int, 0), MAX_LAYERS)
    flags = fields.value('no_rope_layers')
    if flags is None:
        return [_has_rope(layer, fields) for layer in range(layers)]
    if not isinstance(flags, list) or any(flag not in (0, 1) for flag in flags):
        fields.refuse('no_rope_layers', 'must be a list of numbers, 1 with RoPE and 0 without')
        return []
    if len(flags) < layers:
        fields.refuse('no_rope_layers', f'has {len(flags)} entries for {layers} layers')
    return [flag == 1 for flag in flags[:layers]]


def _write_rotated(config: ModelArchitectureConfig) -> dict:
    flags = [int(layer.get('position_encoding') != 'none') for layer in config.layers]
    return {'no_rope_layers': flags}


def _has_smollm3_window(layer: int, fields: Fields) -> bool:
    if not fields.take('use_sliding_window', bool, False):
        return False
    return read_rotated(fields)[layer : layer + 1] == [False]


def _check_smollm3_windows(fields: Fields) -> dict:
    """Refuse windows that only some of transformers' attention implementations would use."""
    types = fields.take('layer_types', list, optional=True) or []
    if WINDOW in types and not fields.take('use_sliding_window', bool, False):
        fields.refuse('layer_types', 'has windows, but use_sliding_window is not true')
    return {}


SMOLLM3 = Family(
    name='smollm3',
    architecture='SmolLM3ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=32768),
        field('d_ff', 'intermediate_size', 11008),
        field('head_dim', 'head_dim', None),
        field('attention_bias', 'attention_bias', False),
        field('ffn_bias', 'mlp_bias', False),
        field('weight_tying', 'tie_word_embeddings', True),
        kv_heads_field(4),
        rope_in_some_layers(rope_fields(default_theta=2e6), read_rotated),
        FieldMap(lambda fields: {}, _write_rotated),
        windows_field(None, _has_smollm3_window, switch='use_sliding_window'),
        FieldMap(_check_smollm3_windows, lambda config: {}),
        swiglu_field(),
    ),
    # superseded by no_rope_layers; in old files
    irrelevant_fields=frozenset({'no_rope_layer_interval', 'max_window_layers'}),
    weights=EMBEDDING_AND_HEAD | PRE_NORMS | with_biases(ATTENTION | GATED_FFN),
)

# --- OLMo 3 ---------------------------------------------------------------------------------------


def _has_olmo3_window(layer: int, fields: Fields) -> bool:
    """Whether a layer has a window in files without `layer_types`."""
    return (layer + 1) % 4 != 0


OLMO3 = Family(
    name='olmo3',
    architecture='Olmo3ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=2048, norm_eps=1e-5),
        *OLMO_FIELDS,
        windows_field(4096, _has_olmo3_window),
        rope_by_layer_type_fields(
            partial(read_layer_types, has_window=_has_olmo3_window),
            default_theta={WINDOW: 5e5, FULL: 5e5},
        ),
    ),
    weights=EMBEDDING_AND_HEAD | REORDERED_NORMS | QK_NORMS | GATED_FFN | with_biases(ATTENTION),
)

# --- EXAONE 4 -------------------------------------------------------------------------------------

_EXAONE4_WINDOW = 4096  # if the field is missing
_is_local = all_but_every_nth('sliding_window_pattern', 4)


def _has_exaone4_window(layer: int, fields: Fields) -> bool:
    """Whether a layer has a window in files without `layer_types`."""
    return _exaone4_window(fields) is not None and _is_local(layer, fields)


def _exaone4_window(fields: Fields) -> int | None:
    return fields.take('sliding_window', int, _EXAONE4_WINDOW, optional=True)


def _read_exaone4_rotated(fields: Fields) -> list[bool]:
    """Layers without a window have no positions, unless no layer can have one."""
    without_windows = _exaone4_window(fields) is None
    types = read_layer_types(fields, _has_exaone4_window)
    return [without_windows or kind == WINDOW for kind in types]


def _write_exaone4_window(config: ModelArchitectureConfig) -> dict:
    """The window; without windows its default, or null if layers have rotary positions."""
    window = next(filter(None, (layer.get('sliding_window') for layer in config.layers)), None)
    rotated = any(layer.get('position_encoding') == 'rope' for layer in config.layers)
    return {'sliding_window': window if rotated else window or _EXAONE4_WINDOW}


EXAONE4_LAYERS = (
    windows_field(_EXAONE4_WINDOW, _has_exaone4_window),
    rope_in_some_layers(rope_fields(), _read_exaone4_rotated),
    FieldMap(lambda fields: {}, _write_exaone4_window),
)
EXAONE4 = Family(
    name='exaone4',
    architecture='Exaone4ForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=2048, norm_eps=1e-5),
        field('d_ff', 'intermediate_size'),
        field('head_dim', 'head_dim', None),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(
            norm_position='reordered',
            qk_norm='rmsnorm',
            qk_norm_scope='head',
            attention_bias=False,
            ffn_bias=False,
        ),
        kv_heads_field(32),
        *EXAONE4_LAYERS,
        swiglu_field(),
    ),
    irrelevant_fields=frozenset({'sliding_window_pattern'}),  # superseded by layer_types
    weights=EMBEDDING_AND_HEAD | REORDERED_NORMS | QK_NORMS | GATED_FFN | ATTENTION,
)

# --- Mellum ---------------------------------------------------------------------------------------

_FFNS = layer_kinds_field(
    named_by_list('mlp_layer_types', default='sparse'),
    kinds={
        'dense': LayerKind({'ffn_type': 'swiglu'}),
        'sparse': LayerKind(
            {'ffn_type': 'moe'},
            (
                field('num_experts', 'num_local_experts', 64),
                field('experts_per_token', 'num_experts_per_tok', 8),
                field('expert_d_ff', 'moe_intermediate_size', 896),
                field('router_normalize', 'norm_topk_prob', True),
                constant_option(expert_ffn='swiglu', router_score='softmax'),
            ),
        ),
    },
)


def _has_mellum_window(layer: int, fields: Fields) -> bool:
    return False


MELLUM = Family(
    name='mellum',
    architecture='MellumForCausalLM',
    prefix='model.',
    field_maps=(
        *llama_fields(block_size=131_072),
        field('d_ff', 'intermediate_size', 7168),
        field('head_dim', 'head_dim', 128),
        field('attention_bias', 'attention_bias', False),
        field('weight_tying', 'tie_word_embeddings', False),
        constant_option(qk_norm='rmsnorm', qk_norm_scope='head', ffn_bias=False),
        kv_heads_field(4),
        required_field(hidden_act='silu'),
        _FFNS,
        windows_field(1024, _has_mellum_window),
        rope_by_layer_type_fields(
            partial(read_layer_types, has_window=_has_mellum_window),
            default_theta={WINDOW: 1e4, FULL: 5e5},
            version_4=False,
        ),
    ),
    aliases={'num_experts': 'num_local_experts'},
    # Multi-token prediction has layers of its own, whose tensors are refused.
    irrelevant_fields=frozenset(
        {
            *('num_mtp_layers', 'num_nextn_predict_layers'),
            *('mtp_layer_types', 'mtp_mlp_layer_types'),
        }
    ),
    weights=EMBEDDING_AND_HEAD
    | PRE_NORMS
    | QK_NORMS
    | GATED_FFN
    | with_biases(ATTENTION)
    | EXPERTS,
)
