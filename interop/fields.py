"""The fields of a config.json: each is read with its type, and none is ignored silently.

transformers keeps every field of a config.json, and any part of a model may read it. So each field
is either read by a field map of the family, known to change no logits, or refused by name.
"""

import math
from collections.abc import Callable
from typing import Any

from common.registry import Option

# Upper limit of all sizes; sums and products of such numbers stay computable.
MAX_SIZE = 2**31

# Fields that change no logits in any family, whatever their value.
IRRELEVANT_FIELDS = frozenset(
    {
        # Origin of the file, and the program that reads it.
        *('_name_or_path', 'name_or_path', '_commit_hash', 'model_type', 'architectures'),
        *('transformers_version', 'auto_map', 'transformers.js_config', 'is_llama_config'),
        *('unsloth_version', 'unsloth_fixed', 'tokenizer_class', 'finetuning_task'),
        # Implementation, set here by --dtype, --attention_backend and others.
        *('dtype', 'torch_dtype', 'attn_implementation', '_attn_implementation'),
        *('_attn_implementation_autoset', 'experts_implementation', '_experts_implementation'),
        *('use_cache', 'cache_implementation', 'gradient_checkpointing', 'pretraining_tp'),
        *('chunk_size_feed_forward', 'torchscript', 'use_bfloat16', 'tf_legacy_loss', 'ep_size'),
        # Outputs besides the logits.
        *('return_dict', 'use_return_dict', 'output_hidden_states', 'output_attentions'),
        *('output_router_logits', 'output_past', 'tie_last_hidden_states'),
        'keys_to_ignore_at_inference',
        # Training has its own options for these.
        *('initializer_range', 'initializer_factor', 'init_std', 'attention_dropout'),
        *('activation_dropout', 'classifier_dropout', 'hidden_dropout', 'dropout', 'layerdrop'),
        *('attn_pdrop', 'embd_pdrop', 'resid_pdrop', 'attention_probs_dropout_prob'),
        *('hidden_dropout_prob', 'router_aux_loss_coef', 'router_jitter_noise'),
        *('aux_loss_alpha', 'seq_aux'),
        # Heads other than a language model's.
        *('id2label', 'label2id', 'num_labels', '_num_labels', 'problem_type'),
        # Encoders and decoders, which a causal language model does not have.
        *('is_decoder', 'is_encoder_decoder', 'cross_attention_hidden_size'),
        *('tie_encoder_decoder', 'decoder_start_token_id'),
        # Special tokens and sampling.
        *('bos_token_id', 'eos_token_id', 'pad_token_id', 'sep_token_id', 'unk_token_id'),
        *('cls_token_id', 'mask_token_id', 'prefix', 'task_specific_params'),
        *('max_length', 'min_length', 'max_new_tokens', 'do_sample', 'early_stopping'),
        *('num_beams', 'num_beam_groups', 'diversity_penalty', 'temperature', 'top_k', 'top_p'),
        *('typical_p', 'repetition_penalty', 'length_penalty', 'no_repeat_ngram_size'),
        *('encoder_no_repeat_ngram_size', 'bad_words_ids', 'num_return_sequences'),
        *('output_scores', 'return_dict_in_generate', 'forced_bos_token_id'),
        *('forced_eos_token_id', 'remove_invalid_values', 'suppress_tokens'),
        *('exponential_decay_length_penalty', 'begin_suppress_tokens', 'epsilon_cutoff'),
        *('eta_cutoff', 'encoder_repetition_penalty'),
    }
)

# Fields with a single supported value, in every family where no field map reads them.
CONSTANTS: dict[str, Any] = {
    'is_causal': True,  # otherwise tokens see later ones
    'add_cross_attention': False,
    'use_bidirectional_attention': None,
    'use_sliding_window': False,
    'pruned_heads': {},
    'rope_interleaved': False,
}


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < 1e300 and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _all(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


# type: (its name in messages, a check of a value)
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ('a whole number', _is_whole_number),
    float: ('a finite number', _is_finite_number),
    bool: ('true or false', lambda v: isinstance(v, bool)),
    str: ('a text', _is_text),
    list: ('a list of texts', _all(_is_text)),
    list[float]: ('a list of finite numbers', _all(_is_finite_number)),
    list[int]: ('a list of whole numbers', _all(_is_whole_number)),
    dict: ('an object', lambda v: isinstance(v, dict)),
}


def same_value(first: Any, second: Any) -> bool:
    """Whether values are equal and of one type: 1 equals 1.0, but neither true nor '1'."""
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (first, second))
    return (numbers or type(first) is type(second)) and first == second


def short_repr(value) -> str:
    """The value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


class Fields:
    """The fields of a config.json, or of an object in it, with the problems found so far.

    problems: receives a sentence for each invalid value. options: our options, which give the type
    of a field that maps to one of them. aliases: other names in transformers for the same fields;
    `OBJECT.FIELD` is a field in an object. within: the name of the object, for messages.
    """

    def __init__(
        self,
        values: dict,
        problems: list[str],
        options: dict[str, Option],
        aliases: dict[str, str] | None = None,
        within: str = '',
    ):
        self.values, self.problems = dict(values), problems
        self.options, self.within = options, within
        for alias, name in (aliases or {}).items():
            self._take_out_of_object(alias)
            if alias in self.values:
                self.require_agreement(alias, name)
                self.values.setdefault(name, self.values.pop(alias))
        self.unread = set(self.values)

    def _take_out_of_object(self, alias: str) -> None:
        """Move the field `OBJECT.FIELD` out of its object, and remove an object left empty."""
        name, _, inner = alias.partition('.')
        held = self.values.get(name)
        if inner and isinstance(held, dict) and inner in held:
            self.values[alias] = held[inner]
            self.values[name] = {key: value for key, value in held.items() if key != inner}
            if not self.values[name]:
                del self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def take(self, name: str, kind: Any, default=None, optional: bool = False):
        """The field; its default if it is missing, or invalid, which is added to the problems.

        kind: int, float, bool, str, list (of texts), list[int], list[float] or dict. optional:
        null is allowed.
        """
        value = self.value(name, default)
        if name not in self.values or (value is None and optional):
            return value
        words, is_one = _KINDS[kind]
        if not is_one(value):
            self.refuse(name, f'must be {words}{" or null" if optional else ""}')
        elif kind is int and not -MAX_SIZE < value < MAX_SIZE:
            self.refuse(name, 'too large for a size of a model')
        else:
            return value
        return default

    def value(self, name: str, default=None):
        """The field, of any type."""
        self.unread.discard(name)
        return self.values.get(name, default)

    def refuse(self, name: str, why: str) -> None:
        self.problems.append(f'{self.full_name(name)}={short_repr(self.values.get(name))}: {why}.')

    def require_length(self, name: str, entries: list, layers: int) -> None:
        """Refuse a list that has not one entry for each layer."""
        if len(entries) != layers:
            self.refuse(name, f'has {len(entries)} entries for {layers} layers')

    def require(self, name: str, constant) -> None:
        """Refuse a field that differs from the constant; null equals false."""
        value = self.value(name, constant)
        void = constant is None or constant is False
        if not same_value(value, constant) and not (void and (value is None or value is False)):
            self.problems.append(
                f'{self.full_name(name)}={short_repr(value)} is not supported; supported: '
                f'{constant!r}.'
            )

    def require_agreement(self, name: str, other: str) -> None:
        """Refuse two fields of the same meaning that contradict each other."""
        if name in self.values and other in self.values:
            first, second = self.values[name], self.values[other]
            if not same_value(first, second):
                self.problems.append(
                    f'{self.full_name(name)}={short_repr(first)} and '
                    f'{self.full_name(other)}={short_repr(second)} '
                    f'contradict each other: delete one of them.'
                )

    def subobject(self, name: str) -> 'Fields':
        """The object in a field; an empty one if it is missing or null."""
        values = self.take(name, dict, optional=True) or {}
        return Fields(values, self.problems, self.options, within=self.full_name(name))

    def full_name(self, name: str) -> str:
        return f'{self.within}: {name}' if self.within else name

    def refuse_unread(self, irrelevant: frozenset[str] = frozenset()) -> None:
        """Refuse fields that no field map has read, unless they are irrelevant or null."""
        for name, constant in CONSTANTS.items():
            if name in self.unread:
                self.require(name, constant)
        for name in sorted(self.unread - IRRELEVANT_FIELDS - irrelevant, key=str):
            if self.values[name] is not None:
                self.refuse(
                    name,
                    'an unknown field. If it does not affect the model, delete it from config.json',
                )
