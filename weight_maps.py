"""Other people's formats as tables: the fields of a config and the tensors of a checkpoint.

A `Family` holds one architecture of theirs. Each of its entries says the same in their fields and
in our options, both ways, and each of its weights says which of their tensors a parameter of ours
is made of, both ways: `interop` imports and exports by the same tables. `{layer}` in a name stands
for the number of the layer.
"""

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
            if fields.get(name, value) != value:
                problems.append(f'{name}={fields[name]!r} cannot be expressed here; {value!r} can.')
        return {}

    return Entry(read, lambda config: constants)


def written_only(**fields: str) -> Entry:
    """Their field = our option, for what does not change the function: it is a run's own."""
    return Entry(
        lambda theirs, problems: {},
        lambda config: {name: config.to_dict()[option] for name, option in fields.items()},
    )


def _read_kv_heads(fields: dict, problems: list[str]) -> dict:
    heads = fields.get('num_key_value_heads') or fields.get('num_attention_heads')
    if heads == fields.get('num_attention_heads'):
        return {'use_gqa': False}
    return {'use_gqa': True, 'num_kv_heads': heads}


KV_HEADS = Entry(
    _read_kv_heads,
    lambda config: {
        'num_key_value_heads': config.num_kv_heads if config.use_gqa else config.n_head
    },
)


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

    theirs: their names, one below the other in ours. rows: how many of our rows each has, where
    there are several. transposed: theirs are (in, out). order: our row i is their row order[i].
    plus: ours = theirs + plus. fit: what is done to a table of another length, on the way in.
    """

    theirs: tuple[str, ...]
    rows: Callable[[ModelArchitectureConfig], tuple[int, ...]] | None = None
    transposed: bool = False
    order: Callable[[ModelArchitectureConfig], torch.Tensor] | None = None
    plus: float = 0.0
    fit: Callable[[torch.Tensor, ModelArchitectureConfig], torch.Tensor] | None = None

    def names(self, layer: str | None, config: ModelArchitectureConfig) -> list[str]:
        """Their names in that layer, in the order of `read` and `write`."""
        return [name.format(layer=layer) for name in self.theirs]

    def read(self, tensors: list[torch.Tensor], config: ModelArchitectureConfig) -> torch.Tensor:
        """Theirs as ours."""
        tensors = [tensor.T if self.transposed else tensor for tensor in tensors]
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if self.order:
            joined = joined[self.order(config)]
        if self.plus:
            joined = joined.float() + self.plus
        return self.fit(joined, config) if self.fit else joined

    def write(self, tensor: torch.Tensor, config: ModelArchitectureConfig) -> list[torch.Tensor]:
        """Ours as theirs."""
        if self.plus:
            tensor = tensor - self.plus
        if self.order:
            tensor = tensor[self.order(config).argsort()]
        parts = tensor.split(self.rows(config)) if self.rows else [tensor]
        return [part.T if self.transposed else part for part in parts]


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
    kv_heads = config.num_kv_heads if config.use_gqa else config.n_head
    return tuple(heads * config.head_dim for heads in (config.n_head, kv_heads, kv_heads))


def _gate_up_rows(config: ModelArchitectureConfig) -> tuple[int, ...]:
    return config.d_ff, config.d_ff


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


# transformers.activations.ACT2FN
ACTIVATIONS = {'gelu': 'gelu', 'silu': 'silu', 'swish': 'silu', 'relu': 'relu'}


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
        same(
            'activation',
            'activation_function',
            'gelu_new',
            {**ACTIVATIONS, 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'},
        ),
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

_LLAMA_SIZES = (
    same('n_layer', 'num_hidden_layers'),
    same('n_head', 'num_attention_heads'),
    same('n_embd', 'hidden_size'),
    same('d_ff', 'intermediate_size'),
    same('block_size', 'max_position_embeddings', 2048),
    same('vocab_size', 'vocab_size'),
    same('norm_eps', 'rms_norm_eps', 1e-6),
    KV_HEADS,
)
_LLAMA_WEIGHTS = {
    'token_embedding.weight': one('model.embed_tokens.weight', fit=fit_vocabulary),
    'blocks.{layer}.attention_norm.weight': one('model.layers.{layer}.input_layernorm.weight'),
    'blocks.{layer}.attention.qkv.weight': Weight(
        tuple(f'model.layers.{{layer}}.self_attn.{x}_proj.weight' for x in 'qkv'),
        rows=_query_key_value_rows,
    ),
    'blocks.{layer}.attention.output.weight': one('model.layers.{layer}.self_attn.o_proj.weight'),
    'blocks.{layer}.ffn_norm.weight': one('model.layers.{layer}.post_attention_layernorm.weight'),
    'blocks.{layer}.ffn.gate_up.weight': Weight(
        tuple(f'model.layers.{{layer}}.mlp.{x}_proj.weight' for x in ('gate', 'up')),
        rows=_gate_up_rows,
    ),
    'blocks.{layer}.ffn.down.weight': one('model.layers.{layer}.mlp.down_proj.weight'),
    'final_norm.weight': one('model.norm.weight'),
    'output_head.projection.weight': one('lm_head.weight', fit=fit_vocabulary),
}

LLAMA = Family(
    name='llama',
    architecture='LlamaForCausalLM',
    prefix='model.',
    entries=(
        *_LLAMA_SIZES,
        rope(),
        same('ffn_type', 'hidden_act', 'silu', {'silu': 'swiglu'}),
        same('weight_tying', 'tie_word_embeddings', False),
        same('bias', 'attention_bias', False),
        same('bias', 'mlp_bias', False),
        ours_is(normalization='rmsnorm'),
        written_only(attention_dropout='attention_dropout'),
    ),
    weights=_LLAMA_WEIGHTS,
    ignored=r'rotary_emb\.inv_freq$',
)

# By transformers' model_type; the first that can express an architecture is what it is exported as.
TRANSFORMERS = {family.name: family for family in (GPT2, LLAMA)}
