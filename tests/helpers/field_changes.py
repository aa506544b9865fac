"""Every field of a config.json set to other legal values, checked against transformers.

`Flips` builds tiny models of every supported family: the model of transformers for a config.json,
saved, and ours loaded from that folder. Both must have equal logits, or ours must refuse the field
by name. Values that transformers itself refuses are ignored.
"""

import dataclasses
import json
import shutil
import types
import typing
from pathlib import Path

import torch

import interop
from common.errors import UserError
from helpers import transformers_models as reference
from helpers.foreign_configs import BASES
from interop.exporter import silent_transformers
from interop.fields import IRRELEVANT_FIELDS
from model_builder import build_model

LLAMA3 = {
    'rope_type': 'llama3',
    'rope_theta': 50.0,
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 12,
}
YARN = {
    'type': 'yarn',
    'factor': 4.0,
    'rope_theta': 50.0,
    'original_max_position_embeddings': 8,
}
_TEXTS = {
    'hidden_act': ('relu', 'gelu', 'gelu_pytorch_tanh', 'silu'),
    'topk_method': ('group_limited_greedy', 'greedy', 'noaux_tc'),
    'scoring_func': ('sigmoid', 'softmax'),
    'summary_type': ('last', 'mean'),
    'dtype': ('bfloat16',),
    'torch_dtype': ('float16',),
}
_TEXTS['activation_function'] = _TEXTS['hidden_activation'] = _TEXTS['hidden_act']
# Fields that a config.json may have besides those of its class.
BESIDE = {
    'is_causal': (False, None, True),
    'rope_scaling': (LLAMA3, YARN, {'type': 'linear', 'factor': 4.0}, None),
    'rope_parameters': (
        LLAMA3,
        YARN,
        {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 9.0},
        {'sliding_attention': {'rope_type': 'default', 'rope_theta': 9.0}, 'full_attention': YARN},
    ),
    'rope_theta': (7.0,),
    'rope_local_base_freq': (7.0,),
    'rotary_emb_base': (7.0,),
    'rotary_pct': (0.25,),
    'partial_rotary_factor': (0.5, 1.0),
    'original_max_position_embeddings': (4,),
    'layer_types': (['full_attention'] * 2, ['sliding_attention', 'full_attention']),
    'sliding_window': (3, None),
    'sliding_window_pattern': (1, 3, 'LG'),
    'no_rope_layers': ([0, 0], [1, 1, 0], None),
    'no_rope_layer_interval': (1, 2),
    'mlp_layer_types': (['sparse', 'dense'], ['sparse'] * 2, ['dense'] * 2),
    'use_sliding_window': (True, False),
    'head_dim': (8, 16),
    'qk_head_dim': (8,),
    'attention_chunk_size': (4,),
    'use_bidirectional_attention': (True,),
    'is_decoder': (True,),
    'is_encoder_decoder': (True,),
    'add_cross_attention': (True,),
    'per_layer_config': ({'0': {'attention_bias': True}},),
    'tie_word_embeddings': (True, False),
    'attention_bias': (True,),
    'mlp_bias': (True,),
    'scoring_func': ('softmax',),
    'moe_layer_freq': (2,),
    'pretraining_tp': (2,),
    'n_ctx': (8,),
    'chunk_size_feed_forward': (4,),
    'tie_last_hidden_states': (False,),
    'kv_sharing_modes': (['a'],),
    'torch_dtype': ('float16',),
    'rope_interleaved': (True,),
    'temperature': (0.5,),
    'architectures': (['GPT2Model'],),
    'foo': (1,),
}


def config_class(family: str):
    from transformers import AutoConfig

    return type(AutoConfig.for_model(family))


def other_values(field: dataclasses.Field, base) -> list:
    """Other values that the type of a field allows."""
    if field.name in _TEXTS:
        return [text for text in _TEXTS[field.name] if text != base]
    kinds = typing.get_args(field.type) or (field.type,)
    values: list = [None] if types.NoneType in kinds and base is not None else []
    if bool in kinds:
        values.append(not base)
    elif int in kinds or float in kinds:
        number = 1 if base is None else base
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            return values
        values += [2 * number or 1] if int in kinds and float not in kinds else [number / 2 or 0.1]
        values += [number + 1] if int in kinds else [number * 1.5 + 0.1]
    return values


LEFT_OUT = ...  # value of a missing field


def field_changes(
    family: str, each: int | None = None, irrelevant: bool = True, base: dict | None = None
) -> list[dict]:
    """Changes of one field each. each: maximum number of values per field.

    irrelevant: also change fields that affect no logits in any family. base: other fields than
    those of BASES.
    """
    cls = config_class(family)
    default, base = cls(), base or BASES[family]
    pairs = []
    for field in dataclasses.fields(cls):
        if field.name in ('transformers_version', 'id2label', 'label2id', 'problem_type'):
            continue  # for other heads, and listed as harmless
        value = base.get(field.name, getattr(default, field.name, None))
        pairs += [(field.name, other) for other in other_values(field, value)[:each]]
    pairs += [(name, value) for name, values in BESIDE.items() for value in values]
    changes = [{name: value} for name, value in pairs]
    for alias, name in cls.attribute_map.items():
        value = base.get(name, getattr(default, name, None))
        if value is not None:
            changes += [{alias: 2 * value}, {alias: value}, {alias: value, name: LEFT_OUT}]
    return [
        change
        for n, change in enumerate(changes)
        if change not in changes[:n] and (irrelevant or not change.keys() <= IRRELEVANT_FIELDS)
    ]


class Flips:
    """Compares models of changed config.json files, in a folder that is overwritten."""

    def __init__(self, folder: Path):
        self.folder = folder

    def outcome(self, family: str, changes: dict, base: dict | None = None) -> str:
        """'equal', 'refused', 'illegal' (for transformers), or the difference or error."""
        try:
            return self._outcome(family, changes, base)
        except UserError:
            return 'refused'
        except Exception as error:
            return f'FAILED: {error!r}'

    def _outcome(self, family: str, changes: dict, base: dict | None) -> str:
        fields = {
            'model_type': family,
            'vocab_size': 40,
            **reference.NO_SPECIAL_TOKENS,
            **(base or BASES[family]),
            **changes,
        }
        fields = {name: value for name, value in fields.items() if value is not LEFT_OUT}
        problems: list[str] = []
        interop.TRANSFORMERS[family].read(fields, problems)
        if problems:
            return 'refused'
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        try:
            with silent_transformers():
                theirs, expected, tokens = self._theirs(fields)
        except Exception:
            return 'illegal'
        source = interop.open_checkpoint(f'hf:{self.folder}')
        ours = build_model(source.config, 'cpu').eval()
        ours.load_state_dict(dict(source.weights(source.config)), strict=False)
        with torch.no_grad():
            logits = ours(tokens)
        off = (logits - expected).norm() / expected.norm()
        return 'equal' if off < 1e-4 else f'DIFFERENT by {off:.2g}: {type(theirs).__name__}'

    def _theirs(self, fields: dict):
        """The model of transformers, its logits, and the tokens; saved in the folder."""
        from transformers import AutoConfig, AutoModelForCausalLM

        file = self.folder / 'config.json'
        file.write_text(json.dumps(fields))
        config = AutoConfig.from_pretrained(self.folder)
        model = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=reference.attention_of(config.model_type),
            dtype=torch.float32,
        )
        reference.randomize(model.eval())
        tokens = torch.arange(24).view(2, 12) * 7 % 40
        with torch.no_grad():
            expected = model(tokens, return_dict=True).logits
        model.save_pretrained(self.folder)
        file.write_text(json.dumps(fields))
        return model, expected, tokens
