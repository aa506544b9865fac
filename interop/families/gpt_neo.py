"""GPT-Neo: windows in every second layer, a bias of the attention's output alone, no scale."""

from interop.fields import Fields, short_repr
from interop.layers import PerLayer
from interop.mapping import (
    ACTIVATIONS,
    MAX_LAYERS,
    Family,
    FieldMap,
    constant_option,
    export_only,
    field,
)
from interop.tensors import TensorMap, crop_positions, resize_vocabulary, tensor, with_biases
from model_config import ModelArchitectureConfig

_LOCAL, _GLOBAL = 'local', 'global'


def _expanded(groups: object) -> list[str] | None:
    """The kind of each layer from groups such as [[['global', 'local'], 12]]; None if malformed."""
    kinds: list[str] = []
    for group in groups if isinstance(groups, list) else [None]:
        if not isinstance(group, list) or len(group) != 2 or not isinstance(group[0], list):
            return None
        names, count = group
        if type(count) is not int or not set(map(str, names)) <= {_LOCAL, _GLOBAL}:
            return None
        kinds += names * min(max(count, 0), MAX_LAYERS)
    return kinds


def _read_windows(fields: Fields) -> dict:
    """The window of each layer; `attention_layers`, which transformers ignores, must agree."""
    layers = fields.take('num_layers', int, 24)
    window = fields.take('window_size', int, 256)
    kinds = _expanded(fields.value('attention_types') or [[[_GLOBAL, _LOCAL], 12]])
    if kinds is None:
        shown = short_repr(fields.values['attention_types'])
        fields.problems.append(
            f"attention_types={shown} is not supported; supported: such as [[['global', 'local'], "
            f'12]].'
        )
        return {}
    if len(kinds) != layers:
        fields.problems.append(f'attention_types has {len(kinds)} entries for {layers} layers.')
    copy = fields.value('attention_layers')
    if copy is not None and copy != kinds:
        fields.refuse('attention_layers', 'contradicts attention_types. Delete it')
    return {'sliding_window': PerLayer(window if kind == _LOCAL else None for kind in kinds)}


def _write_windows(config: ModelArchitectureConfig) -> dict:
    windows = [layer.get('sliding_window') for layer in config.layers]
    kinds = [_GLOBAL if window is None else _LOCAL for window in windows]
    window = next(filter(None, windows), 256)
    return {'attention_types': [[kinds, 1]], 'window_size': window}


_LAYER = 'transformer.h.{layer}.'
GPT_NEO = Family(
    name='gpt_neo',
    architecture='GPTNeoForCausalLM',
    prefix='transformer.',
    field_maps=(
        field('n_layer', 'num_layers', 24),
        field('n_head', 'num_heads', 16),
        field('n_embd', 'hidden_size', 2048),
        field('d_ff', 'intermediate_size', None),
        field('block_size', 'max_position_embeddings', 2048),
        field('vocab_size', 'vocab_size'),
        field('norm_eps', 'layer_norm_epsilon', 1e-5),
        field('activation', 'activation_function', 'gelu_new', ACTIVATIONS),
        field('weight_tying', 'tie_word_embeddings', True),
        constant_option(
            normalization='layernorm',
            position_encoding='learned_absolute',
            bias=True,
            attention_bias=False,
            attention_output_bias=True,
            attention_scale=1.0,
        ),
        FieldMap(_read_windows, _write_windows),
        export_only(
            embed_dropout='dropout',
            attention_dropout='attention_dropout',
            resid_dropout='residual_dropout',
        ),
    ),
    aliases={'num_attention_heads': 'num_heads', 'num_hidden_layers': 'num_layers'},
    irrelevant_fields=frozenset(
        {
            *('resid_dropout', 'embed_dropout', 'gradient_checkpointing'),
            *(f'summary_{what}' for what in ('type', 'use_proj', 'activation', 'proj_to_labels')),
            'summary_first_dropout',
        }
    ),
    weights={
        'token_embedding.weight': tensor('transformer.wte.weight', resize=resize_vocabulary),
        'position_encoding.table.weight': tensor('transformer.wpe.weight', resize=crop_positions),
        'output_head.projection.weight': tensor('lm_head.weight', resize=resize_vocabulary),
        **with_biases(
            {
                'final_norm.weight': tensor('transformer.ln_f.weight'),
                'blocks.{layer}.attention_norm.weight': tensor(_LAYER + 'ln_1.weight'),
                'blocks.{layer}.ffn_norm.weight': tensor(_LAYER + 'ln_2.weight'),
                'blocks.{layer}.attention.output.weight': tensor(
                    _LAYER + 'attn.attention.out_proj.weight'
                ),
                'blocks.{layer}.ffn.up.weight': tensor(_LAYER + 'mlp.c_fc.weight'),
                'blocks.{layer}.ffn.down.weight': tensor(_LAYER + 'mlp.c_proj.weight'),
            }
        ),
        'blocks.{layer}.attention.qkv.weight': TensorMap(
            tuple(f'{_LAYER}attn.attention.{name}_proj.weight' for name in 'qkv')
        ),
    },
    ignored_tensors=r'\.attn\.attention\.(masked_)?bias$',
)
