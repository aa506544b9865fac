"""Granite with windows and attention sinks, and its mixture of experts."""

from dataclasses import replace

from interop.families.granite import GRANITE, GRANITE_MOE_SHARED
from interop.families.llama import LAYER
from interop.fields import Fields
from interop.layers import ABSENT, PerLayer
from interop.mapping import FieldMap, constant_option, field, kv_heads_field, windows_field
from interop.rope import rope_fields
from interop.tensors import tensor
from model_config import ModelArchitectureConfig

_ROPE = rope_fields()


def _read_rope(fields: Fields) -> dict:
    """Rotary positions with a base of each layer; 0 means no positions."""
    options, layers = _ROPE.read(fields), fields.take('num_hidden_layers', int, 0)
    thetas = fields.take('layer_rope_theta', list[float], optional=True)
    if thetas is None:
        return options
    fields.require_length('layer_rope_theta', thetas, layers)
    rotated = {
        key: PerLayer(value if theta else ABSENT for theta in thetas)
        for key, value in options.items()
    }
    return {
        **rotated,
        'position_encoding': PerLayer('rope' if theta else 'none' for theta in thetas),
        'rope_theta': PerLayer(theta or ABSENT for theta in thetas),
    }


def _write_rope(config: ModelArchitectureConfig) -> dict:
    thetas = [layer.get('rope_theta') or 0.0 for layer in config.layers]
    return {**_ROPE.write(config), 'layer_rope_theta': thetas}


_LAYERS = (
    constant_option(attention_sinks=True),
    windows_field(128, lambda layer, fields: layer % 4 != 0),
    FieldMap(_read_rope, _write_rope),
)
_SINKS = {'blocks.{layer}.attention.sinks': tensor(LAYER + 'self_attn.sinks')}
_MIXTURE, _EXPERTS = LAYER + 'block_sparse_moe.', 'blocks.{layer}.ffn.experts.'

GRANITE_SWA = replace(
    GRANITE,
    name='granite_swa',
    architecture='GraniteSWAForCausalLM',
    field_maps=(
        *GRANITE.field_maps,
        # Other defaults.
        field('block_size', 'max_position_embeddings', 8192),
        field('norm_eps', 'rms_norm_eps', 1e-5),
        field('d_ff', 'intermediate_size', 8192),
        field('weight_tying', 'tie_word_embeddings', True),
        kv_heads_field(4),
        *_LAYERS,
    ),
    weights=GRANITE.weights | _SINKS,
)

GRANITE_MOE_SWA = replace(
    GRANITE_MOE_SHARED,
    name='granitemoe_swa',
    architecture='GraniteMoeSWAForCausalLM',
    field_maps=(*GRANITE_MOE_SHARED.field_maps, *_LAYERS),
    weights=GRANITE_MOE_SHARED.weights
    | _SINKS
    | {
        'blocks.{layer}.ffn.router.weight': tensor(_MIXTURE + 'router.weight'),
        _EXPERTS + 'gate_up.weight': tensor(_MIXTURE + 'experts.gate_up_proj'),
        _EXPERTS + 'down.weight': tensor(_MIXTURE + 'experts.down_proj'),
    },
)
