"""Falcon-H1: attention and Mamba-2 in parallel in each layer.

Its constant multipliers (Zuo et al. 2025, section 3.2.3) are those of activations. The ones of
embeddings and logits are options here; the others are multiplied into the weights that are read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from interop.families.llama import query_key_value_rows
from interop.families.mamba2 import BLOCK_FIELDS, BLOCK_WEIGHTS, IRRELEVANT, MIXER_FIELDS
from interop.fields import Fields
from interop.layers import options_with
from interop.mapping import Family, FieldMap, constant_option, field, kv_heads_field
from interop.rope import rope_fields
from model_config import ModelArchitectureConfig


class _Multipliers(NamedTuple):
    """Factors of activations in a layer.

    inputs: of the gate, x, keys, queries and steps of Mamba-2.
    """

    mamba: float
    inputs: list[float]
    mamba_out: float
    attention: float
    key: float
    attention_out: float
    gate: float
    down: float


def _read_multipliers(fields: Fields) -> _Multipliers:
    def number(name: str) -> float:
        return fields.take(name, float, 1.0)

    def several(name: str, count: int) -> list[float]:
        values = fields.take(name, list[float], optional=True)
        if values is not None and len(values) == count:
            return values
        if values is not None:
            fields.refuse(name, f'must be {count} numbers')
        return [1.0] * count

    gate, down = several('mlp_multipliers', 2)
    return _Multipliers(
        mamba=number('ssm_in_multiplier'),
        inputs=several('ssm_multipliers', 5),
        mamba_out=number('ssm_out_multiplier'),
        attention=number('attention_in_multiplier'),
        key=number('key_multiplier'),
        attention_out=number('attention_out_multiplier'),
        gate=gate,
        down=down,
    )


def _row_factors(fields: Fields, name: str, layer: ModelArchitectureConfig) -> torch.Tensor | float:
    """The factors of the rows of one of our parameters, or of all of them."""
    multipliers = _read_multipliers(fields)
    module, _, kind = name.rpartition('.')
    module = module.split('.', 2)[-1]  # without blocks.N
    is_weight = kind == 'weight'  # a factor of the input is none of the bias
    if module == 'mixers.mamba2.in_proj':
        width, keys = layer.mamba2_width, layer.mamba2_groups * layer.mamba2_state_size
        rows = (width, width, keys, keys, width // layer.mamba2_head_dim)
        factors = _repeated(multipliers.inputs, rows)
        return factors * multipliers.mamba if is_weight else factors
    if module == 'attention.qkv':
        factors = _repeated((1.0, multipliers.key, 1.0), query_key_value_rows(layer))
        return factors * multipliers.attention if is_weight else factors
    if module == 'ffn.gate_up':
        return _repeated((multipliers.gate, 1.0), (layer.d_ff, layer.d_ff))
    outputs = {
        'mixers.mamba2.out_proj': multipliers.mamba_out,
        'attention.output': multipliers.attention_out,
        'ffn.down': multipliers.down,
    }
    return outputs.get(module, 1.0)


def _repeated(factors: Sequence[float], rows: Sequence[int]) -> torch.Tensor:
    return torch.tensor(factors).repeat_interleave(torch.tensor(rows))


def _read_heads(fields: Fields) -> dict:
    width = fields.take('mamba_d_ssm', int, 1024, optional=True)
    expand, hidden = fields.take('mamba_expand', int, 2), fields.take('hidden_size', int, 4096)
    width = expand * hidden if width is None else width
    heads = fields.take('mamba_n_heads', int, 128)
    automatic = fields.value('mamba_d_head', 'auto') == 'auto'
    dims = width // max(heads, 1) if automatic else fields.take('mamba_d_head', int, 1)
    if heads < 1 or dims * heads != width:
        fields.refuse('mamba_n_heads', f'with heads of {dims}, does not fill a width of {width}')
        return {}
    return {'mamba2_width': width, 'mamba2_head_dim': dims}


def _write_heads(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'mamba2_width')
    if 'mamba2_width' not in options:
        return {}
    width, dims = options['mamba2_width'], options['mamba2_head_dim']
    return {'mamba_d_ssm': width, 'mamba_n_heads': width // dims, 'mamba_d_head': dims}


def _read_output_bias(fields: Fields) -> dict:
    fields.take('projectors_bias', bool, False)
    if bool(fields.value('projectors_bias')) != bool(fields.value('mamba_proj_bias')):
        fields.refuse('projectors_bias', 'must equal mamba_proj_bias')
    return {}


def _write_output_bias(config: ModelArchitectureConfig) -> dict:
    return {'projectors_bias': options_with(config, 'mamba2_width').get('mamba2_proj_bias', False)}


def _read_norm(fields: Fields) -> dict:
    first = fields.take('mamba_norm_before_gate', bool, True)
    eps = fields.take('rms_norm_eps', float, 1e-5)
    if not fields.take('mamba_rms_norm', bool, False):
        return {'mamba2_norm': False}
    return {'mamba2_norm': True, 'mamba2_norm_first': first, 'mamba2_norm_eps': eps}


def _write_norm(config: ModelArchitectureConfig) -> dict:
    options = options_with(config, 'mamba2_width')
    if not options.get('mamba2_norm'):
        return {'mamba_rms_norm': False}
    return {'mamba_rms_norm': True, 'mamba_norm_before_gate': options['mamba2_norm_first']}


def _read_constants(fields: Fields) -> dict:
    _read_multipliers(fields)
    return {}


FALCON_H1 = Family(
    name='falcon_h1',
    architecture='FalconH1ForCausalLM',
    prefix='model.',
    field_maps=(
        *BLOCK_FIELDS,
        field('block_size', 'max_position_embeddings', 8192),
        field('embedding_multiplier', 'embedding_multiplier', 1.0),
        field('logit_multiplier', 'lm_head_multiplier', 1.0),
        constant_option(mixer='attention+mamba2'),
        FieldMap(_read_heads, _write_heads),
        *MIXER_FIELDS,
        FieldMap(_read_norm, _write_norm),
        FieldMap(_read_output_bias, _write_output_bias),
        kv_heads_field(8),
        field('head_dim', 'head_dim', None),
        field('attention_bias', 'attention_bias', False),
        rope_fields(),
        FieldMap(_read_constants, lambda config: {}),
    ),
    irrelevant_fields=IRRELEVANT | {'mamba_use_mlp', 'mlp_expansion_factor'},
    weights=BLOCK_WEIGHTS,
    row_factors=_row_factors,
)
