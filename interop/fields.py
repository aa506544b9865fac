"""The fields of somebody's config.json: each is read with its type, and none is left unread.

transformers keeps whatever a config.json holds, and any part of a model may read it. So a field has
one of three fates here: a field map of the family reads it, it is known to change no logits, or it
is refused by name.
"""

import math
from collections.abc import Callable
from typing import Any

from common.registry import Option

# No size of a model is larger; sums and products of such numbers stay computable.
MAX_SIZE = 2**31

# Fields that change no logits, whatever they hold, in every family.
IRRELEVANT_FIELDS = frozenset(
    {
        # Where the file comes from and which program reads it.
        *('_name_or_path', 'name_or_path', '_commit_hash', 'model_type', 'architectures'),
        *('transformers_version', 'auto_map', 'transformers.js_config', 'is_llama_config'),
        *('unsloth_version', 'unsloth_fixed', 'tokenizer_class', 'finetuning_task'),
        # How the numbers are computed: here --dtype, --attention_backend and the rest say it.
        *('dtype', 'torch_dtype', 'attn_implementation', '_attn_implementation'),
        *('_attn_implementation_autoset', 'experts_implementation', '_experts_implementation'),
        *('use_cache', 'cache_implementation', 'gradient_checkpointing', 'pretraining_tp'),
        *('chunk_size_feed_forward', 'torchscript', 'use_bfloat16', 'tf_legacy_loss', 'ep_size'),
        # What is handed back beside the logits.
        *('return_dict', 'use_return_dict', 'output_hidden_states', 'output_attentions'),
        *('output_router_logits', 'output_past', 'tie_last_hidden_states'),
        'keys_to_ignore_at_inference',
        # Training has its own options for these.
        *('initializer_range', 'initializer_factor', 'init_std', 'attention_dropout'),
        *('activation_dropout', 'classifier_dropout', 'hidden_dropout', 'dropout', 'layerdrop'),
        *('attn_pdrop', 'embd_pdrop', 'resid_pdrop', 'attention_probs_dropout_prob'),
        *('hidden_dropout_prob', 'router_aux_loss_coef', 'router_jitter_noise'),
        *('aux_loss_alpha', 'seq_aux'),
        # Other heads than a language model's.
        *('id2label', 'label2id', 'num_labels', '_num_labels', 'problem_type'),
        # Encoders and decoders: a causal language model is neither's part.
        *('is_decoder', 'is_encoder_decoder', 'cross_attention_hidden_size'),
        *('tie_encoder_decoder', 'decoder_start_token_id'),
        # Tokens, and how text is drawn.
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

# Fields that may only be this, in every family where no field map reads them.
CONSTANTS: dict[str, Any] = {
    'is_causal': True,  # else each token sees those after it
    'add_cross_attention': False,
    'use_bidirectional_attention': None,
    'use_sliding_window': False,
    'pruned_heads': {},
    'rope_interleaved': False,
}

# kind: (what it is in words, whether a value is one)
_KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    int: ('a whole number', lambda v: isinstance(v, int) and not isinstance(v, bool)),
    float: (
        'a finite number',
        lambda v: (
            isinstance(v, (int, float))
            and not isinstance(v, bool)
            and abs(v) < 1e300
            and math.isfinite(v)
        ),
    ),
    bool: ('true or false', lambda v: isinstance(v, bool)),
    str: ('a text', lambda v: isinstance(v, str)),
    list: ('a list of texts', lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v)),
    dict: ('an object', lambda v: isinstance(v, dict)),
}


def same_value(first: Any, second: Any) -> bool:
    """Equal, and of one type: 1 is neither true nor '1', but it is 1.0."""
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (first, second))
    return (numbers or type(first) is type(second)) and first == second


def short_repr(value) -> str:
    """The value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


class Fields:
    """A config.json, or an object inside it: what is read of it, and what is wrong with it.

    problems: gets a sentence for each value that cannot be read. options: those of ours, which say
    of what type a field is that is one of them. aliases: other names of transformers' for the same
    fields. within: the name of the object, for messages.
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
            if alias in self.values:
                self.require_agreement(alias, name)
                self.values.setdefault(name, self.values.pop(alias))
        self.unread = set(self.values)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def take(self, name: str, kind: type, default=None, optional: bool = False):
        """The field, or its default where it is missing or no such value; then it is a problem.

        optional: null is allowed.
        """
        value = self.value(name, default)
        if name not in self.values or (value is None and optional):
            return value
        words, is_one = _KINDS[kind]
        if not is_one(value):
            self.refuse(name, f'it takes {words}{" or null" if optional else ""}')
        elif kind is int and not -MAX_SIZE < value < MAX_SIZE:
            self.refuse(name, 'no size of a model is that large')
        else:
            return value
        return default

    def value(self, name: str, default=None):
        """The field as it is, of whatever type."""
        self.unread.discard(name)
        return self.values.get(name, default)

    def refuse(self, name: str, why: str) -> None:
        self.problems.append(f'{self.full_name(name)}={short_repr(self.values.get(name))}: {why}.')

    def require(self, name: str, constant) -> None:
        """The field may only be the constant; null is as good as false."""
        value = self.value(name, constant)
        void = constant is None or constant is False
        if not same_value(value, constant) and not (void and (value is None or value is False)):
            self.problems.append(
                f'{self.full_name(name)}={short_repr(value)} cannot be expressed here; '
                f'{constant!r} can.'
            )

    def require_agreement(self, name: str, other: str) -> None:
        """Two fields that say the same must not contradict each other."""
        if name in self.values and other in self.values:
            first, second = self.values[name], self.values[other]
            if not same_value(first, second):
                self.problems.append(
                    f'{self.full_name(name)}={short_repr(first)} and '
                    f'{self.full_name(other)}={short_repr(second)} '
                    f'contradict each other: delete one of them.'
                )

    def subobject(self, name: str) -> 'Fields':
        """An object inside it; an empty one where it is missing or null."""
        values = self.take(name, dict, optional=True) or {}
        return Fields(values, self.problems, self.options, within=name)

    def full_name(self, name: str) -> str:
        return f'{self.within}: {name}' if self.within else name

    def refuse_unread(self, irrelevant: frozenset[str] = frozenset()) -> None:
        """Whatever no field map has read must be irrelevant, or is refused. null says nothing."""
        for name, constant in CONSTANTS.items():
            if name in self.unread:
                self.require(name, constant)
        for name in sorted(self.unread - IRRELEVANT_FIELDS - irrelevant, key=str):
            if self.values[name] is not None:
                self.refuse(
                    name,
                    'a field that is unknown here. If it changes nothing in the model, delete it '
                    'from config.json',
                )
