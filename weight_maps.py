"""Other people's formats as tables: the fields of a config and the tensors of a checkpoint.

A `Family` holds one architecture of theirs. Each of its entries says the same in their fields and
in our options, both ways, and each of its weights says which of their tensors a parameter of ours
is made of, both ways: `interop` imports and exports by the same tables. `{layer}` in a name stands
for the number of the layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model_config import ModelArchitectureConfig

# --------------------------------------------------------------------------------------------------
# Fields and options


class Entry(NamedTuple):
    """Fields of theirs and the options of ours that say the same.

    read: (their fields, problems) -> our options; what cannot be expressed here is added to
    `problems`, a sentence each. write: our config -> their fields. An option that they cannot
    express is left out by `write`: `interop.export` reads back what was written and finds it.
    """

    read: Callable[[dict, list[str]], dict]
    write: Callable[[ModelArchitectureConfig], dict]


_REQUIRED = object()


def same(ours: str, theirs: str, default=_REQUIRED, values: dict | None = None) -> Entry:
    """One field is one option. default: what the field is where it is missing.

    values: theirs -> ours where they are called otherwise; of several, the first is written.
    """
    back = {mine: name for name, mine in reversed((values or {}).items())}

    def read(fields: dict, problems: list[str]) -> dict:
        value = fields.get(theirs, default)
        if value is _REQUIRED:
            problems.append(f'{theirs} is missing.')
        elif values is None:
            return {ours: value}
        elif value in values:
            return {ours: values[value]}
        else:
            known = ', '.join(repr(name) for name in values)
            problems.append(f'{theirs}={value!r} cannot be expressed here; {known} can.')
        return {}

    def write(config: ModelArchitectureConfig) -> dict:
        value = config.to_dict().get(ours)
        if values is None:
            return {theirs: value}
        return {theirs: back[value]} if value in back else {}

    return Entry(read, write)


def ours_is(**options) -> Entry:
    """What all of that family have in our terms, and no field of theirs says."""
    return Entry(lambda fields, problems: options, lambda config: {})


def theirs_is(**constants) -> Entry:
    """Fields that may only be this here, which is also what they are where they are missing."""

    def read(fields: dict, problems: list[str]) -> dict:
        for name, value in constants.items():
            given = fields.get(name, value)
            if given != value and (given or value):  # null is as good as false
                problems.append(f'{name}={fields[name]!r} cannot be expressed here; {value!r} can.')
        return {}

    return Entry(read, lambda config: constants)


def written_only(**fields: str) -> Entry:
    """Their field = our option, for what does not change the function: it is a run's own."""
    return Entry(
        lambda theirs, problems: {},
        lambda config: {name: config.to_dict()[option] for name, option in fields.items()},
    )


def kv_heads(default: int | None = None) -> Entry:
    """Grouped-query attention. default: their number where the field is missing; None: n_head."""

    def read(fields: dict, problems: list[str]) -> dict:
        heads = fields.get('num_attention_heads')
        shared = fields.get('num_key_value_heads', default) or heads
        return {'use_gqa': True, 'num_kv_heads': shared} if shared != heads else {'use_gqa': False}

    return Entry(read, lambda config: {'num_key_value_heads': _kv_heads(config)})


def _kv_heads(config: ModelArchitectureConfig) -> int:
    options = config.to_dict()
    return config.num_kv_heads if options.get('use_gqa') else config.n_head


def windows(default: int, which: Callable[[int, dict], bool], switch: str | None = None) -> Entry:
    """A sliding window in some of the layers.

    default: its size where the field is missing. which: (layer, fields) -> whether the layer has
    it, where `layer_types` is missing. switch: a field without which there is none.
    """

    def read(fields: dict, problems: list[str]) -> dict:
        window = fields.get('sliding_window', default)
        if switch and not fields.get(switch):
            window = None
        layers = range(fields.get('num_hidden_layers') or 0)
        types = fields.get('layer_types') or [
            'sliding_attention' if which(layer, fields) else 'full_attention' for layer in layers
        ]
        letters = ''.join('L' if kind == 'sliding_attention' else 'G' for kind in types)
        unknown = set(types) - {'sliding_attention', 'full_attention'}
        problems.extend(f'layer_types has {kind!r}, unknown here.' for kind in sorted(unknown))
        if window is None or 'L' not in letters:
            return {'sliding_window': None}
        return {'sliding_window': window, 'attention_pattern': shortest_pattern(letters)}

    def write(config: ModelArchitectureConfig) -> dict:
        names = {'L': 'sliding_attention', 'G': 'full_attention'}
        window = config.to_dict().get('sliding_window')
        return {
            'sliding_window': window,
            **({switch: window is not None} if switch else {}),
            'layer_types': [names[letter] for letter in layer_letters(config)],
        }

    return Entry(read, write)


def function_of(config: ModelArchitectureConfig) -> dict:
    """The options such that two ways of saying the same are the same."""
    options = config.to_dict()
    del options['bias']  # what the options of each part are where they are left open
    if 'attention_pattern' in options:
        options['attention_pattern'] = layer_letters(config)
    if 'use_gqa' in options:
        options |= {'use_gqa': True, 'num_kv_heads': _kv_heads(config)}
    if options.get('dense_layers') == 0:
        del options['d_ff']  # a width that no layer has
    return options


def layer_letters(config: ModelArchitectureConfig) -> str:
    """For each layer L (its attention has a window) or G (it has none)."""
    pattern = config.to_dict().get('attention_pattern', 'G')
    return ''.join(pattern[layer % len(pattern)] for layer in range(config.n_layer))


def shortest_pattern(letters: str) -> str:
    """The least that, repeated, begins with those letters."""
    for length in range(1, len(letters)):
        if all(letter == letters[n % length] for n, letter in enumerate(letters)):
            return letters[:length]
    return letters


# Of each scaling of ours: their key -> (our option, what it is where it is missing).
_SCALINGS = {
    'linear': {'factor': ('rope_scaling_factor', _REQUIRED)},
    'llama3': {
        'factor': ('rope_scaling_factor', _REQUIRED),
        'original_max_position_embeddings': ('rope_original_block_size', _REQUIRED),
        'low_freq_factor': ('rope_low_freq_factor', _REQUIRED),
        'high_freq_factor': ('rope_high_freq_factor', _REQUIRED),
    },
    'yarn': {
        'factor': ('rope_scaling_factor', _REQUIRED),
        'original_max_position_embeddings': ('rope_original_block_size', _REQUIRED),
        'beta_fast': ('rope_beta_fast', 32.0),
        'beta_slow': ('rope_beta_slow', 1.0),
        'attention_factor': ('rope_attention_factor', None),
    },
}


def rope(
    default_theta: float = 10000.0, theta: str = 'rope_theta', fraction: str | None = None
) -> Entry:
    """Rotary positions: read as transformers 5 and 4 write them, written as both read them.

    theta and fraction: what version 4 calls these fields of the family; without a name for the
    fraction the whole head turns.
    """

    def read(fields: dict, problems: list[str]) -> dict:
        given = dict(fields.get('rope_parameters') or fields.get('rope_scaling') or {})
        base = given.pop('rope_theta', fields.get(theta, default_theta))
        options = {'position_encoding': 'rope', 'rope_theta': base}
        if fraction:
            turned = given.pop('partial_rotary_factor', fields.get(fraction, 0.25))
            options['rope_fraction'] = turned
        named_before_4_43 = given.pop('type', 'default')
        kind = given.pop('rope_type', named_before_4_43)
        kind = 'none' if kind == 'default' else kind
        if kind not in ('none', *_SCALINGS):
            problems.append(f'rope_type={kind!r} cannot be expressed here.')
            return options
        scaling = _SCALINGS.get(kind, {})
        entries = [same(ours, name, default) for name, (ours, default) in scaling.items()]
        if 'original_max_position_embeddings' in scaling:
            length = fields.get('max_position_embeddings')
            given.setdefault('original_max_position_embeddings', length)
        for key, value in given.items():
            if key not in scaling and value is not None:
                problems.append(f'rope_scaling: {key}={value!r} cannot be expressed here.')
        for entry in entries:
            options |= entry.read(given, problems)
        return {**options, 'rope_scaling': kind}

    def write(config: ModelArchitectureConfig) -> dict:
        if config.position_encoding != 'rope':
            return {}
        written = {
            theta: config.rope_theta,
            **({fraction: config.rope_fraction} if fraction else {}),
        }
        scaling = _SCALINGS.get(config.rope_scaling)
        if scaling:
            values = {name: config.to_dict()[ours] for name, (ours, _) in scaling.items()}
            written['rope_scaling'] = {'rope_type': config.rope_scaling, **values}
        return written

    return Entry(read, write)


# --------------------------------------------------------------------------------------------------
# Tensors


@dataclass(frozen=True)
class Weight:
    """Which of their tensors a parameter of ours is made of.

    theirs: their names, one below the other in ours; with `{expert}` in them those of one expert
    in a stack of all. rows: how many of our rows each has; None: all the same. transposed: theirs
    are (in, out). order: our row i is their row order[i]. plus: ours = theirs + plus. fit: what is
    done to a table of another length, on the way in. unused: so many rows of theirs come first and
    hold nothing. named: `theirs`, where it depends.
    zeros: a vector of theirs beside it, a number for each row, that is nothing but zeros here.
    """

    theirs: tuple[str, ...]
    rows: Callable[[ModelArchitectureConfig], tuple[int, ...]] | None = None
    transposed: bool = False
    order: Callable[[ModelArchitectureConfig], torch.Tensor] | None = None
    plus: float = 0.0
    fit: Callable[[torch.Tensor, ModelArchitectureConfig], torch.Tensor] | None = None
    unused: int = 0
    named: Callable[[ModelArchitectureConfig], tuple[str, ...]] | None = None
    zeros: str | None = None

    def names(self, layer: str | None, config: ModelArchitectureConfig) -> list[str]:
        """Their names in that layer, in the order of `read` and `write`."""
        experts = range(config.num_experts) if self.of_experts else (0,)
        theirs = self.named(config) if self.named else self.theirs
        return [name.format(layer=layer, expert=e) for e in experts for name in theirs]

    @property
    def of_experts(self) -> bool:
        return '{expert}' in self.theirs[0]

    def read(self, tensors: list[torch.Tensor], config: ModelArchitectureConfig) -> torch.Tensor:
        """Theirs as ours."""
        each = len(self.theirs)
        experts = [
            self._read(tensors[first : first + each], config)
            for first in range(0, len(tensors), each)
        ]
        return torch.stack(experts) if self.of_experts else experts[0]

    def write(self, tensor: torch.Tensor, config: ModelArchitectureConfig) -> list[torch.Tensor]:
        """Ours as theirs."""
        experts = tensor if self.of_experts else (tensor,)
        return [part for expert in experts for part in self._write(expert, config)]

    def _read(self, tensors: list[torch.Tensor], config: ModelArchitectureConfig) -> torch.Tensor:
        tensors = [tensor.T if self.transposed else tensor for tensor in tensors]
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        joined = joined[self.unused :]
        if self.order:
            joined = joined[self.order(config)]
        if self.plus:
            joined = joined.float() + self.plus
        return self.fit(joined, config) if self.fit else joined

    def _write(self, tensor: torch.Tensor, config: ModelArchitectureConfig) -> list[torch.Tensor]:
        if self.plus:
            tensor = (tensor.float() - self.plus).to(tensor.dtype)
        if self.order:
            tensor = tensor[self.order(config).argsort()]
        if self.unused:
            tensor = torch.cat((tensor.new_zeros(self.unused, *tensor.shape[1:]), tensor))
        rows = self.rows(config) if self.rows else len(tensor) // len(self.theirs)
        return [part.T if self.transposed else part for part in tensor.split(rows)]


def fit_vocabulary(table: torch.Tensor, config: ModelArchitectureConfig) -> torch.Tensor:
    """Rows cut off at the end, or added, for another vocab_size.

    An added row is the mean of the others, so its logit is their mean: by Jensen's inequality k
    of them cost at most ln(1 + k / V) nats. A row of zeros can be far likelier than all others.
    """
    missing = config.vocab_size - len(table)
    if missing <= 0:
        return table[: config.vocab_size]
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat((table, mean.expand(missing, -1)))


def fit_positions(table: torch.Tensor, config: ModelArchitectureConfig) -> torch.Tensor:
    """The first block_size positions."""
    return table[: config.block_size]


def one(theirs: str, **how) -> Weight:
    """One tensor of theirs is one of ours."""
    return Weight((theirs,), **how)


def _query_key_value_rows(config: ModelArchitectureConfig) -> tuple[int, ...]:
    shared = _kv_heads(config)
    return tuple(heads * config.head_dim for heads in (config.n_head, shared, shared))


def with_biases(weights: dict[str, Weight]) -> dict[str, Weight]:
    """The weights, and beside each `….weight` the `….bias` that is made in the same way."""

    def bias(name: str) -> str:
        return name.removesuffix('weight') + 'bias'

    biases = {
        bias(ours): Weight(tuple(map(bias, w.theirs)), rows=w.rows, order=w.order)
        for ours, w in weights.items()
    }
    return weights | biases


# --------------------------------------------------------------------------------------------------
# Families


@dataclass(frozen=True)
class Family:
    """One architecture of other people.

    name: transformers' model_type. architecture: its class. prefix: what their names begin with in
    a whole model, and lack in a checkpoint of its base. ignored: a pattern of tensors that hold no
    weights. What a family has no entry for in our options is at its default in it.
    """

    name: str
    architecture: str
    prefix: str
    entries: tuple[Entry, ...]
    weights: dict[str, Weight]
    ignored: str = r'$^'

    def read(self, fields: dict, problems: list[str]) -> dict:
        """Our options for their fields; what cannot be expressed is added to `problems`."""
        return {
            key: value
            for entry in self.entries
            for key, value in entry.read(fields, problems).items()
        }

    def write(self, config: ModelArchitectureConfig) -> dict:
        """Their fields for our options."""
        return {key: v for entry in self.entries for key, v in entry.write(config).items()}


# transformers.activations.ACT2FN; of several the first is written.
ACTIVATIONS = {
    'gelu': 'gelu',
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_fast': 'gelu_tanh',
    'silu': 'silu',
    'swish': 'silu',
    'relu': 'relu',
    'relu2': 'relu2',
}


def _gpt2_weights(transposed: bool) -> dict[str, Weight]:
    """OpenAI's code multiplies by (in, out) matrices; nanoGPT, of the same names, by (out, in)."""
    block = 'transformer.h.{layer}.'
    norms = {
        'blocks.{layer}.attention_norm.weight': one(block + 'ln_1.weight'),
        'blocks.{layer}.ffn_norm.weight': one(block + 'ln_2.weight'),
        'final_norm.weight': one('transformer.ln_f.weight'),
    }
    matrices = {
        'blocks.{layer}.attention.qkv.weight': 'attn.c_attn.weight',
        'blocks.{layer}.attention.output.weight': 'attn.c_proj.weight',
        'blocks.{layer}.ffn.up.weight': 'mlp.c_fc.weight',
        'blocks.{layer}.ffn.down.weight': 'mlp.c_proj.weight',
    }
    linear = {ours: one(block + name, transposed=transposed) for ours, name in matrices.items()}
    return {
        'token_embedding.weight': one('transformer.wte.weight', fit=fit_vocabulary),
        'position_encoding.table.weight': one('transformer.wpe.weight', fit=fit_positions),
        'output_head.projection.weight': one('lm_head.weight', fit=fit_vocabulary),
        **with_biases(norms | linear),
    }


GPT2 = Family(
    name='gpt2',
    architecture='GPT2LMHeadModel',
    prefix='transformer.',
    entries=(
        same('n_layer', 'n_layer'),
        same('n_head', 'n_head'),
        same('n_embd', 'n_embd'),
        same('d_ff', 'n_inner', None),
        same('block_size', 'n_positions', 1024),
        same('vocab_size', 'vocab_size'),
        same('norm_eps', 'layer_norm_epsilon', 1e-5),
        same('activation', 'activation_function', 'gelu_new', ACTIVATIONS),
        same('weight_tying', 'tie_word_embeddings', True),
        ours_is(normalization='layernorm', position_encoding='learned_absolute', bias=True),
        theirs_is(
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
        ),
        written_only(
            embd_pdrop='dropout', attn_pdrop='attention_dropout', resid_pdrop='residual_dropout'
        ),
    ),
    weights=_gpt2_weights(transposed=True),
    ignored=r'\.attn\.(masked_)?bias$',
)

# Not transformers': the `model_args` of nanoGPT's ckpt.pt.
NANOGPT = Family(
    name='nanogpt',
    architecture='GPT',
    prefix='transformer.',
    entries=(
        same('n_layer', 'n_layer'),
        same('n_head', 'n_head'),
        same('n_embd', 'n_embd'),
        same('block_size', 'block_size'),
        same('vocab_size', 'vocab_size'),
        same('bias', 'bias', True),
        same('normalization', 'bias', True, {True: 'layernorm', False: 'layernorm_nobias'}),
        ours_is(arch_preset='legacy', weight_tying=True),
    ),
    weights=_gpt2_weights(transposed=False),
    ignored=r'\.attn\.bias$|^lm_head\.weight$',  # the mask; the tied head
)


def _read_embedding_width(fields: dict, problems: list[str]) -> dict:
    width, embedding = fields.get('hidden_size'), fields.get('word_embed_proj_dim')
    if embedding not in (None, width):
        problems.append(f'word_embed_proj_dim={embedding} of {width} cannot be expressed here.')
    return {}


_OPT = 'model.decoder.'
_OPT_LAYER = _OPT + 'layers.{layer}.'
OPT = Family(
    name='opt',
    architecture='OPTForCausalLM',
    prefix='model.',
    entries=(
        same('n_layer', 'num_hidden_layers'),
        same('n_head', 'num_attention_heads'),
        same('n_embd', 'hidden_size'),
        same('d_ff', 'ffn_dim', 3072),
        same('block_size', 'max_position_embeddings', 2048),
        same('vocab_size', 'vocab_size'),
        same('activation', 'activation_function', 'relu', ACTIVATIONS),
        same('weight_tying', 'tie_word_embeddings', True),
        same('norm_position', 'do_layer_norm_before', True, {True: 'pre', False: 'post'}),
        same('attention_bias', 'enable_bias', True),
        same('ffn_bias', 'enable_bias', True),
        ours_is(normalization='layernorm', position_encoding='learned_absolute'),
        theirs_is(_remove_final_layer_norm=False, layer_norm_elementwise_affine=True),
        Entry(_read_embedding_width, lambda config: {'word_embed_proj_dim': config.n_embd}),
        written_only(dropout='residual_dropout', attention_dropout='attention_dropout'),
    ),
    weights={
        'token_embedding.weight': one(_OPT + 'embed_tokens.weight', fit=fit_vocabulary),
        'position_encoding.table.weight': one(
            _OPT + 'embed_positions.weight', fit=fit_positions, unused=2
        ),
        'output_head.projection.weight': one('lm_head.weight', fit=fit_vocabulary),
        **with_biases(
            {
                'final_norm.weight': one(_OPT + 'final_layer_norm.weight'),
                'blocks.{layer}.attention_norm.weight': one(
                    _OPT_LAYER + 'self_attn_layer_norm.weight'
                ),
                'blocks.{layer}.ffn_norm.weight': one(_OPT_LAYER + 'final_layer_norm.weight'),
                'blocks.{layer}.attention.qkv.weight': Weight(
                    tuple(f'{_OPT_LAYER}self_attn.{name}_proj.weight' for name in 'qkv')
                ),
                'blocks.{layer}.attention.output.weight': one(
                    _OPT_LAYER + 'self_attn.out_proj.weight'
                ),
                'blocks.{layer}.ffn.up.weight': one(_OPT_LAYER + 'fc1.weight'),
                'blocks.{layer}.ffn.down.weight': one(_OPT_LAYER + 'fc2.weight'),
            }
        ),
    },
)


_LAYER = 'model.layers.{layer}.'


def _projections(block: str, *names: str) -> tuple[str, ...]:
    return tuple(f'{_LAYER}{block}.{name}_proj.weight' for name in names)


def llama_like(block_size: int, norm_eps: float = 1e-6) -> tuple[Entry, ...]:
    """What Llama and its descendants share; the defaults of two fields differ among them."""
    return (
        same('n_layer', 'num_hidden_layers'),
        same('n_head', 'num_attention_heads'),
        same('n_embd', 'hidden_size'),
        same('block_size', 'max_position_embeddings', block_size),
        same('vocab_size', 'vocab_size'),
        same('norm_eps', 'rms_norm_eps', norm_eps),
        ours_is(normalization='rmsnorm', bias=False),
        written_only(attention_dropout='attention_dropout'),
    )


def swiglu(act: str = 'hidden_act') -> Entry:
    return same('ffn_type', act, 'silu', {'silu': 'swiglu'})


_ENDS = {
    'token_embedding.weight': one('model.embed_tokens.weight', fit=fit_vocabulary),
    'final_norm.weight': one('model.norm.weight'),
    'output_head.projection.weight': one('lm_head.weight', fit=fit_vocabulary),
}
_ATTENTION = {
    'blocks.{layer}.attention.qkv.weight': Weight(
        _projections('self_attn', 'q', 'k', 'v'), rows=_query_key_value_rows
    ),
    'blocks.{layer}.attention.output.weight': Weight(_projections('self_attn', 'o')),
}
_GATED = {
    'blocks.{layer}.ffn.gate_up.weight': Weight(_projections('mlp', 'gate', 'up')),
    'blocks.{layer}.ffn.down.weight': Weight(_projections('mlp', 'down')),
}
_PRE_NORMS = {
    'blocks.{layer}.attention_norm.weight': one(_LAYER + 'input_layernorm.weight'),
    'blocks.{layer}.ffn_norm.weight': one(_LAYER + 'post_attention_layernorm.weight'),
}
_QK_NORMS = {
    'blocks.{layer}.attention.q_norm.weight': one(_LAYER + 'self_attn.q_norm.weight'),
    'blocks.{layer}.attention.k_norm.weight': one(_LAYER + 'self_attn.k_norm.weight'),
}
_TABLES_OF_COSINES = r'rotary_emb\.inv_freq$'

LLAMA = Family(
    name='llama',
    architecture='LlamaForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=2048),
        same('d_ff', 'intermediate_size'),
        same('head_dim', 'head_dim', None),
        same('attention_bias', 'attention_bias', False),
        same('ffn_bias', 'mlp_bias', False),
        same('weight_tying', 'tie_word_embeddings', False),
        kv_heads(),
        rope(),
        swiglu(),
    ),
    weights=_ENDS | _PRE_NORMS | with_biases(_ATTENTION | _GATED),
    ignored=_TABLES_OF_COSINES,
)

MISTRAL = Family(
    name='mistral',
    architecture='MistralForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=4096 * 32),
        same('d_ff', 'intermediate_size'),
        same('head_dim', 'head_dim', None),
        same('sliding_window', 'sliding_window', 4096),
        same('weight_tying', 'tie_word_embeddings', False),
        kv_heads(8),
        rope(),
        swiglu(),
    ),
    weights=_ENDS | _PRE_NORMS | _ATTENTION | _GATED,
    ignored=_TABLES_OF_COSINES,
)

QWEN3 = Family(
    name='qwen3',
    architecture='Qwen3ForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=32768),
        same('d_ff', 'intermediate_size'),
        same('head_dim', 'head_dim', 128),
        same('attention_bias', 'attention_bias', False),
        same('weight_tying', 'tie_word_embeddings', False),
        ours_is(qk_norm='rmsnorm', qk_norm_scope='head', ffn_bias=False),
        windows(
            4096,
            lambda layer, fields: layer >= fields.get('max_window_layers', 28),
            switch='use_sliding_window',
        ),
        kv_heads(32),
        rope(),
        swiglu(),
    ),
    weights=_ENDS | _PRE_NORMS | _QK_NORMS | _GATED | with_biases(_ATTENTION),
)

OLMO2 = Family(
    name='olmo2',
    architecture='Olmo2ForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=2048, norm_eps=1e-5),
        same('d_ff', 'intermediate_size'),
        same('head_dim', 'head_dim', None),
        same('attention_bias', 'attention_bias', False),
        same('weight_tying', 'tie_word_embeddings', False),
        ours_is(
            norm_position='reordered',
            qk_norm='rmsnorm',
            qk_norm_scope='projection',
            ffn_bias=False,
        ),
        kv_heads(),
        rope(),
        swiglu(),
    ),
    weights=_ENDS
    | _QK_NORMS
    | _GATED
    | with_biases(_ATTENTION)
    | {
        'blocks.{layer}.attention_norm.weight': one(_LAYER + 'post_attention_layernorm.weight'),
        'blocks.{layer}.ffn_norm.weight': one(_LAYER + 'post_feedforward_layernorm.weight'),
    },
)


def _read_scale(fields: dict, problems: list[str]) -> dict:
    return {'attention_scale': fields.get('query_pre_attn_scalar', 256) ** -0.5}


def _write_scale(config: ModelArchitectureConfig) -> dict:
    scale = config.to_dict().get('attention_scale')
    return {'query_pre_attn_scalar': round(scale**-2)} if scale else {}


def _read_backend(fields: dict, problems: list[str]) -> dict:
    """The fused one knows no softcap."""
    capped = fields.get('attn_logit_softcapping', 50.0) is not None
    return {'attention_backend': 'manual' if capped else 'sdpa'}


GEMMA2 = Family(
    name='gemma2',
    architecture='Gemma2ForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=8192),
        same('d_ff', 'intermediate_size'),
        same('head_dim', 'head_dim', 256),
        same('attention_bias', 'attention_bias', False),
        same('attention_softcap', 'attn_logit_softcapping', 50.0),
        same('logit_softcap', 'final_logit_softcapping', 30.0),
        same('weight_tying', 'tie_word_embeddings', True),
        ours_is(norm_position='sandwich', ffn_type='geglu', ffn_bias=False, scale_embeddings=True),
        theirs_is(use_bidirectional_attention=None),
        same(
            'geglu_tanh',
            'hidden_activation',
            'gelu_pytorch_tanh',
            {'gelu_pytorch_tanh': True, 'gelu_new': True, 'gelu': False},
        ),
        Entry(_read_scale, _write_scale),
        Entry(_read_backend, lambda config: {}),
        windows(4096, lambda layer, fields: layer % 2 == 0),
        kv_heads(4),
        rope(),
    ),
    weights=_GATED
    | with_biases(_ATTENTION)
    | {
        'token_embedding.weight': _ENDS['token_embedding.weight'],
        'output_head.projection.weight': _ENDS['output_head.projection.weight'],
        # x · (1 + weight)
        'final_norm.weight': one('model.norm.weight', plus=1.0),
        **{
            f'blocks.{{layer}}.{ours}.weight': one(f'{_LAYER}{theirs}_layernorm.weight', plus=1.0)
            for ours, theirs in {
                'attention_norm': 'input',
                'attention_output_norm': 'post_attention',
                'ffn_norm': 'pre_feedforward',
                'ffn_output_norm': 'post_feedforward',
            }.items()
        },
    },
)


def _query_key_value_of_each_head(config: ModelArchitectureConfig) -> torch.Tensor:
    """GPT-NeoX: head after head its query, key and value; ours: all queries, all keys, ..."""
    rows = torch.arange(3 * config.n_head * config.head_dim)
    return rows.view(config.n_head, 3, config.head_dim).transpose(0, 1).flatten()


_NEOX_LAYER = 'gpt_neox.layers.{layer}.'
GPT_NEOX = Family(
    name='gpt_neox',
    architecture='GPTNeoXForCausalLM',
    prefix='gpt_neox.',
    entries=(
        same('n_layer', 'num_hidden_layers'),
        same('n_head', 'num_attention_heads'),
        same('n_embd', 'hidden_size'),
        same('d_ff', 'intermediate_size'),
        same('block_size', 'max_position_embeddings', 2048),
        same('vocab_size', 'vocab_size'),
        same('norm_eps', 'layer_norm_eps', 1e-5),
        same('activation', 'hidden_act', 'gelu', ACTIVATIONS),
        same('attention_bias', 'attention_bias', True),
        same('weight_tying', 'tie_word_embeddings', False),
        same('norm_position', 'use_parallel_residual', True, {True: 'parallel', False: 'pre'}),
        ours_is(normalization='layernorm', ffn_bias=True, bias=True),
        rope(theta='rotary_emb_base', fraction='rotary_pct'),
        written_only(attention_dropout='attention_dropout', hidden_dropout='residual_dropout'),
    ),
    weights={
        'token_embedding.weight': one('gpt_neox.embed_in.weight', fit=fit_vocabulary),
        'output_head.projection.weight': one('embed_out.weight', fit=fit_vocabulary),
        **with_biases(
            {
                'final_norm.weight': one('gpt_neox.final_layer_norm.weight'),
                'blocks.{layer}.attention_norm.weight': one(_NEOX_LAYER + 'input_layernorm.weight'),
                'blocks.{layer}.ffn_norm.weight': one(
                    _NEOX_LAYER + 'post_attention_layernorm.weight'
                ),
                'blocks.{layer}.attention.qkv.weight': one(
                    _NEOX_LAYER + 'attention.query_key_value.weight',
                    order=_query_key_value_of_each_head,
                ),
                'blocks.{layer}.attention.output.weight': one(
                    _NEOX_LAYER + 'attention.dense.weight'
                ),
                'blocks.{layer}.ffn.up.weight': one(_NEOX_LAYER + 'mlp.dense_h_to_4h.weight'),
                'blocks.{layer}.ffn.down.weight': one(_NEOX_LAYER + 'mlp.dense_4h_to_h.weight'),
            }
        ),
    },
    ignored=r'\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$',
)

_MIXTRAL_MOE = _LAYER + 'block_sparse_moe.'
MIXTRAL = Family(
    name='mixtral',
    architecture='MixtralForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=4096 * 32, norm_eps=1e-5),
        same('expert_d_ff', 'intermediate_size'),
        same('head_dim', 'head_dim', None),
        same('sliding_window', 'sliding_window', None),
        same('num_experts', 'num_local_experts', 8),
        same('experts_per_token', 'num_experts_per_tok', 2),
        same('expert_ffn', 'hidden_act', 'silu', {'silu': 'swiglu'}),
        same('weight_tying', 'tie_word_embeddings', False),
        ours_is(ffn_type='moe', router_score='softmax', router_normalize=True),
        kv_heads(8),
        rope(default_theta=1e6),
    ),
    weights=_ENDS
    | _PRE_NORMS
    | _ATTENTION
    | {
        'blocks.{layer}.ffn.router.weight': one(_MIXTRAL_MOE + 'gate.weight'),
        'blocks.{layer}.ffn.experts.gate_up.weight': Weight(
            tuple(f'{_MIXTRAL_MOE}experts.{{expert}}.{name}.weight' for name in ('w1', 'w3'))
        ),
        'blocks.{layer}.ffn.experts.down.weight': one(_MIXTRAL_MOE + 'experts.{expert}.w2.weight'),
    },
)


def _turned_pairs(columns: int) -> torch.Tensor:
    """DeepSeek turns columns 2i and 2i + 1 by one angle; ours are i and i + columns / 2."""
    return torch.arange(columns).view(-1, 2).T.flatten()


def _query_rows(config: ModelArchitectureConfig) -> torch.Tensor:
    own = torch.arange(config.qk_nope_head_dim)
    head = torch.cat((own, len(own) + _turned_pairs(config.qk_rope_head_dim)))
    return (torch.arange(config.n_head)[:, None] * len(head) + head).flatten()


def _latent_rows(config: ModelArchitectureConfig) -> torch.Tensor:
    latent = torch.arange(config.kv_lora_rank)
    return torch.cat((latent, len(latent) + _turned_pairs(config.qk_rope_head_dim)))


def _query_name(config: ModelArchitectureConfig) -> tuple[str, ...]:
    return _projections('self_attn', 'q' if config.q_lora_rank is None else 'q_b')


def _yarn_factor(fields: dict, key: str) -> float:
    return 0.1 * fields[key] * math.log(fields['factor']) + 1.0


def deepseek_rope() -> Entry:
    """As `rope`, with YaRN's factors as DeepSeek has them: one of them scales the scores."""
    plain = rope()

    def read(fields: dict, problems: list[str]) -> dict:
        given = dict(fields.get('rope_parameters') or fields.get('rope_scaling') or {})
        factors = {key: given.pop(key, None) for key in ('mscale', 'mscale_all_dim')}
        factors['factor'] = given.get('factor')
        options = plain.read({**fields, 'rope_parameters': given}, problems)
        if factors['factor'] is None or not factors['mscale_all_dim']:
            return options
        of_scores = _yarn_factor(factors, 'mscale_all_dim')
        if factors['mscale'] and 'rope_attention_factor' in options:
            ratio = _yarn_factor(factors, 'mscale') / of_scores
            options['rope_attention_factor'] = options['rope_attention_factor'] or ratio
        columns = fields['qk_nope_head_dim'] + fields['qk_rope_head_dim']
        return {**options, 'attention_scale': columns**-0.5 * of_scores**2}

    def write(config: ModelArchitectureConfig) -> dict:
        written, options = plain.write(config), config.to_dict()
        scaling = written.get('rope_scaling')
        if scaling and 'qk_nope_head_dim' in options and scaling['factor'] > 1:
            columns = config.qk_nope_head_dim + config.qk_rope_head_dim
            of_scores = (config.attention_scale * columns**0.5) ** 0.5
            scaling['mscale_all_dim'] = (of_scores - 1) / (0.1 * math.log(scaling['factor']))
        return written

    return Entry(read, write)


def _read_groups(fields: dict, problems: list[str]) -> dict:
    """Experts chosen within a few groups of them: only where that is no limit."""
    groups, chosen = fields.get('n_group', 8), fields.get('topk_group', 4)
    if groups != chosen:
        problems.append(
            f'n_group={groups} with topk_group={chosen} cannot be expressed here; equal ones can.'
        )
    return {}


def _read_own_keys(fields: dict, problems: list[str]) -> dict:
    heads, own = fields.get('num_attention_heads'), fields.get('num_key_value_heads')
    if own not in (None, heads):
        problems.append(f'num_key_value_heads={own} of {heads} heads cannot be expressed here.')
    return {}


_DEEPSEEK = (
    theirs_is(rms_norm_eps=1e-6),  # whatever the field says, the norms of latents have that
    same('d_ff', 'intermediate_size'),
    same('q_lora_rank', 'q_lora_rank', 1536),
    same('kv_lora_rank', 'kv_lora_rank', 512),
    same('qk_nope_head_dim', 'qk_nope_head_dim', 128),
    same('qk_rope_head_dim', 'qk_rope_head_dim', 64),
    same('v_head_dim', 'v_head_dim', 128),
    same('attention_bias', 'attention_bias', False),
    same('expert_ffn', 'hidden_act', 'silu', {'silu': 'swiglu'}),
    same('weight_tying', 'tie_word_embeddings', False),
    ours_is(attention_type='mla', ffn_type='moe', ffn_bias=False),
    Entry(_read_own_keys, lambda config: {'num_key_value_heads': config.n_head}),
    deepseek_rope(),
)
_DEEPSEEK_WEIGHTS = (
    _ENDS
    | _PRE_NORMS
    | _GATED
    | {
        'blocks.{layer}.attention.q_norm.weight': one(_LAYER + 'self_attn.q_a_layernorm.weight'),
        'blocks.{layer}.attention.kv_norm.weight': one(_LAYER + 'self_attn.kv_a_layernorm.weight'),
        'blocks.{layer}.attention.q.weight': Weight(
            _projections('self_attn', 'q_b'), named=_query_name, order=_query_rows
        ),
        'blocks.{layer}.attention.kv.weight': Weight(_projections('self_attn', 'kv_b')),
        **with_biases(
            {
                'blocks.{layer}.attention.q_down.weight': Weight(_projections('self_attn', 'q_a')),
                'blocks.{layer}.attention.kv_down.weight': one(
                    _LAYER + 'self_attn.kv_a_proj_with_mqa.weight', order=_latent_rows
                ),
                'blocks.{layer}.attention.output.weight': Weight(_projections('self_attn', 'o')),
            }
        ),
        'blocks.{layer}.ffn.router.weight': one(_LAYER + 'mlp.gate.weight'),
        'blocks.{layer}.ffn.experts.gate_up.weight': Weight(
            _projections('mlp.experts.{expert}', 'gate', 'up')
        ),
        'blocks.{layer}.ffn.experts.down.weight': Weight(
            _projections('mlp.experts.{expert}', 'down')
        ),
        'blocks.{layer}.ffn.shared.gate_up.weight': Weight(
            _projections('mlp.shared_experts', 'gate', 'up')
        ),
        'blocks.{layer}.ffn.shared.down.weight': Weight(_projections('mlp.shared_experts', 'down')),
    }
)

DEEPSEEK_V2 = Family(
    name='deepseek_v2',
    architecture='DeepseekV2ForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=2048),
        *_DEEPSEEK,
        same('num_experts', 'n_routed_experts', 64),
        same('experts_per_token', 'num_experts_per_tok'),
        same('expert_d_ff', 'moe_intermediate_size', 1407),
        same('shared_experts', 'n_shared_experts', 2),
        same('dense_layers', 'first_k_dense_replace', 0),
        same('router_scale', 'routed_scaling_factor', 1.0),
        ours_is(router_score='softmax', router_normalize=False),
        theirs_is(topk_method='greedy', norm_topk_prob=False, mlp_bias=False),
    ),
    weights=_DEEPSEEK_WEIGHTS,
    ignored=_TABLES_OF_COSINES,
)

DEEPSEEK_V3 = Family(
    name='deepseek_v3',
    architecture='DeepseekV3ForCausalLM',
    prefix='model.',
    entries=(
        *llama_like(block_size=4096),
        *_DEEPSEEK,
        same('num_experts', 'n_routed_experts', 256),
        same('experts_per_token', 'num_experts_per_tok', 8),
        same('expert_d_ff', 'moe_intermediate_size', 2048),
        same('shared_experts', 'n_shared_experts', 1),
        same('dense_layers', 'first_k_dense_replace', 3),
        same('router_normalize', 'norm_topk_prob', True),
        same('router_scale', 'routed_scaling_factor', 2.5),
        ours_is(router_score='sigmoid'),
        theirs_is(rope_interleave=True),
        Entry(_read_groups, lambda config: {'n_group': 1, 'topk_group': 1}),
    ),
    weights=_DEEPSEEK_WEIGHTS
    | {
        # The zeros move the choice of experts, not their weight, to even out their load.
        'blocks.{layer}.ffn.router.weight': one(
            _LAYER + 'mlp.gate.weight', zeros=_LAYER + 'mlp.gate.e_score_correction_bias'
        ),
    },
    ignored=_TABLES_OF_COSINES,
)

# By transformers' model_type; the first that can express an architecture is what it is exported as.
TRANSFORMERS = {
    family.name: family
    for family in (
        GPT2,
        LLAMA,
        MISTRAL,
        QWEN3,
        OLMO2,
        GEMMA2,
        GPT_NEOX,
        OPT,
        MIXTRAL,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
    )
}
