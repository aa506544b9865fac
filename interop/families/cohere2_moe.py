"""Cohere's mixture of experts: the blocks of Command R7B, whose experts may be averaged."""

from interop.families.cohere import COHERE_FIELDS, COHERE_WEIGHTS
from interop.families.deepseek import SHARED_EXPERTS
from interop.families.llama import EXPERTS
from interop.fields import Fields
from interop.layer_kinds import (
    DENSE,
    SPARSE,
    dense_and_sparse,
    layer_kinds_field,
    named_by_list,
    named_by_number,
)
from interop.layers import options_with
from interop.mapping import (
    WINDOW,
    Family,
    FieldMap,
    field,
    read_layer_types,
    required_field,
    windows_field,
)
from interop.rope import rope_fields, rope_in_some_layers
from model_config import ModelArchitectureConfig

# --- Norms ----------------------------------------------------------------------------------------


def _read_norm(fields: Fields) -> dict:
    of_rms = fields.take('rms_norm_eps', float, optional=True)
    of_layernorm = fields.take('layer_norm_eps', float, 1e-5)
    if of_rms is None:
        return {'normalization': 'layernorm_nobias', 'norm_eps': of_layernorm}
    return {'normalization': 'rmsnorm', 'norm_eps': of_rms}


def _write_norm(config: ModelArchitectureConfig) -> dict:
    if config.normalization == 'rmsnorm':
        return {'rms_norm_eps': config.norm_eps}
    return {'layer_norm_eps': config.get('norm_eps')}


# --- Positions ------------------------------------------------------------------------------------

_ROPE = rope_fields()
_FFN_NAMES = (
    named_by_list('mlp_layer_types'),
    named_by_number('first_k_dense_replace', 0, DENSE, SPARSE),
)


def _read_rope(fields: Fields) -> dict:
    """transformers reads `rope_parameters` alone."""
    if fields.value('rope_scaling') is not None:
        fields.refuse('rope_scaling', 'transformers ignores it. Put it into rope_parameters')
        return {}
    inner = fields.values.get('rope_parameters')
    if isinstance(inner, dict) and inner.get('rope_theta') is not None:
        # transformers writes the other one too, with its default.
        fields.value('rope_theta')
        fields.values.pop('rope_theta', None)
    return _ROPE.read(fields)


def _write_rope(config: ModelArchitectureConfig) -> dict:
    written = _ROPE.write(config)
    return {'rope_parameters': written.pop('rope_scaling', {'rope_type': 'default'}) | written}


def _has_window(layer: int, fields: Fields) -> bool:
    """Whether a layer has a window in files without `layer_types`."""
    dense = fields.take('first_k_dense_replace', int, 0)
    name, default = ('prefix_dense_sliding_window_pattern', 1)
    if layer >= dense:
        layer, name, default = layer - dense, 'sliding_window_pattern', 4
    size = fields.take(name, int, default)
    if size < 1:
        fields.refuse(name, 'must be at least 1')
    return (layer + 1) % max(size, 1) != 0


def _read_rotated(fields: Fields) -> list[bool]:
    """Layers with a window have positions; without one, dense layers may have them."""
    has_windows = fields.take('sliding_window', int, 4096, optional=True) is not None
    dense_rotated = fields.take('prefix_dense_sliding_window_pattern', int, 1) == 1
    types = read_layer_types(fields, _has_window)
    form = next((form for form in _FFN_NAMES if form.exist(fields)), _FFN_NAMES[1])
    ffns = form.read(fields, len(types))
    return [
        (kind == WINDOW and has_windows) or (ffn == DENSE and dense_rotated)
        for kind, ffn in zip(types, ffns)
    ]


def _write_pattern(config: ModelArchitectureConfig) -> dict:
    """Whether dense layers have positions without a window."""
    dense = [layer for layer in config.layers if layer.ffn_type != 'moe']
    rotated = all(layer.get('position_encoding') == 'rope' for layer in dense)
    return {'prefix_dense_sliding_window_pattern': 1 if rotated else 2}


# --- Experts --------------------------------------------------------------------------------------


def _read_dense_width(fields: Fields) -> dict:
    width = fields.take('intermediate_size', int, 22528)
    own = fields.take('prefix_dense_intermediate_size', int, optional=True)
    return {'d_ff': width if own is None else own}


def _write_dense_width(config: ModelArchitectureConfig) -> dict:
    return {'prefix_dense_intermediate_size': options_with(config, 'd_ff').get('d_ff')}


def _read_scores(fields: Fields) -> dict:
    """A softmax of the chosen experts' logits, or sigmoids."""
    score = fields.take('expert_selection_fn', str, 'softmax')
    normalize = fields.take('norm_topk_prob', bool, True)
    if score not in ('softmax', 'sigmoid'):
        fields.refuse('expert_selection_fn', "must be 'softmax' or 'sigmoid'")
        return {}
    return {'router_score': score, 'router_normalize': score == 'softmax' or normalize}


def _write_scores(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'router_score')
    if 'router_score' not in options:
        return {}
    return {
        'expert_selection_fn': options['router_score'],
        'norm_topk_prob': options['router_normalize'],
    }


_COMBINATION = 'shared_expert_combination_strategy'


def _check_combination(fields: Fields) -> dict:
    """The mean of shared and routed experts is read as their sum, of halved weights."""
    if fields.take(_COMBINATION, str, 'average') not in ('average', 'sum'):
        fields.refuse(_COMBINATION, "must be 'average' or 'sum'")
    return {}


def _halves(fields: Fields, name: str, layer: ModelArchitectureConfig) -> float:
    """The factor of the last matrices of experts."""
    is_mean = fields.take(_COMBINATION, str, 'average') == 'average'
    of_experts = name.endswith(('ffn.experts.down.weight', 'ffn.shared.down.weight'))
    return 0.5 if of_experts and is_mean and layer.get('shared_experts') else 1.0


COHERE2_MOE = Family(
    name='cohere2_moe',
    architecture='Cohere2MoeForCausalLM',
    prefix='model.',
    field_maps=(
        *COHERE_FIELDS,
        field('head_dim', 'head_dim', 128),
        FieldMap(_read_norm, _write_norm),
        required_field(hidden_act='silu'),
        windows_field(4096, _has_window),
        rope_in_some_layers(FieldMap(_read_rope, _write_rope), _read_rotated),
        FieldMap(lambda fields: {}, _write_pattern),
        FieldMap(_check_combination, lambda config: {_COMBINATION: 'sum'}),
        layer_kinds_field(
            *_FFN_NAMES,
            kinds=dense_and_sparse(
                FieldMap(_read_dense_width, _write_dense_width),
                field('num_experts', 'num_experts', 8),
                field('experts_per_token', 'num_experts_per_tok', 2),
                field('shared_experts', 'num_shared_experts', 0),
                field('expert_d_ff', 'intermediate_size', 22528),
                FieldMap(_read_scores, _write_scores),
            ),
        ),
    ),
    aliases={'num_local_experts': 'num_experts'},
    # superseded by layer_types
    irrelevant_fields=frozenset({'sliding_window_pattern', 'prefix_dense_sliding_window_pattern'}),
    row_factors=_halves,
    weights=COHERE_WEIGHTS | EXPERTS | SHARED_EXPERTS,
)
