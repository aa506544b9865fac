"""Tiny architectures for tests: random legal ones, and a pairwise covering set."""

import functools
import itertools
import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from hypothesis import assume, note
from hypothesis import strategies as st

import model_components  # noqa: F401  fills the registries before their names are listed
from common.architecture_options import architecture_options, layer_options, shared_options
from common.errors import UserError
from common.layer_pattern import letters_of
from common.registry import Option, Registry
from model_builder import Transformer, build_model, parameter_groups
from model_config import CORE_OPTIONS, MIXER_REGISTRY, ModelArchitectureConfig

SIZES = {'n_layer': 2, 'n_head': 4, 'n_embd': 16, 'block_size': 6, 'vocab_size': 11}

# Values to try for options that are neither switches nor choices, besides None where allowed.
# A KeyError names an option that is missing here: add it.
VALUES = {
    'd_ff': (40,),
    'dropout': (0.0, 0.1),
    'attention_dropout': (0.1,),
    'residual_dropout': (0.1,),
    'num_kv_heads': (1, 2),
    'head_dim': (6,),
    'value_head_dim': (5,),
    'q_lora_rank': (5,),
    'kv_lora_rank': (7,),
    'qk_nope_head_dim': (3,),
    'qk_rope_head_dim': (4,),
    'v_head_dim': (5,),
    'latent_norm_eps': (),  # not with every norm
    'attention_scale': (0.3,),
    'value_residual_weight': (0.3,),
    'residual_multiplier': (0.4,),
    'layer_scale_init': (0.5,),
    'attention_softcap': (1.5,),
    'swiglu_limit': (7.0, 0.3),
    'swiglu_alpha': (1.702, 1.0),
    'qkv_clip': (0.5,),
    'query_scale_growth': (0.7,),
    'query_scale_length': (2, 3),
    'query_scale_offset': (0, 1),
    'rope_long_factors': ('1', '2.5'),
    'rope_short_factors': ('1', '1.5'),
    'sliding_window': (2, 4),
    'attention_chunk': (2, 4),
    'canon': ('AC', 'BD'),
    'canon_width': (1, 3),
    'attention_pattern': ('L', 'LG'),
    'end_of_text': (3,),
    'norm_eps': (1e-5, 0.1),
    'dyt_alpha': (0.5, 1.5),
    'rope_theta': (10000.0, 50.0),
    'rope_fraction': (1.0, 0.5),
    'rope_scaling_factor': (2.0,),
    'rope_original_block_size': (4,),
    'rope_low_freq_factor': (1.0,),
    'rope_high_freq_factor': (4.0,),
    'rope_beta_fast': (32.0,),
    'rope_beta_slow': (1.0,),
    'rope_attention_factor': (1.5,),
    't5_buckets': (4, 32),
    't5_max_distance': (20,),
    'multiple_of': (8, 16),
    'logit_softcap': (2.0,),
    'embedding_multiplier': (1.0, 3.0),
    'logit_multiplier': (1.0, 0.25),
    'z_loss': (0.0, 0.1),
    'init_std': (0.02, 0.1),
    'mup_base_width': (4,),
    'num_experts': (3, 4),
    'experts_per_token': (1, 2),
    'shared_experts': (0, 1),
    'expert_d_ff': (24,),
    'dense_layers': (0, 1),
    'router_scale': (1.0, 2.5),
    'router_groups': (1, 2),
    'router_groups_per_token': (1, 2),
    'router_bias_update': (0.0, 0.01),
    'capacity_factor': (0.75, 4.0),
    'load_balance_weight': (0.0, 0.01),
    'router_z_loss': (0.0, 0.01),
    'mamba_expand': (1, 2),
    'mamba_state_size': (3, 16),
    'mamba_conv_size': (1, 4),
    'mamba_dt_rank': (4,),
    'mamba_norm_eps': (1e-6, 0.1),
    'rg_lru_width': (24,),
    'rg_lru_heads': (2,),
    'rg_lru_conv_size': (1, 4),
    'mamba2_width': (24,),
    'mamba2_head_dim': (8,),
    'mamba2_state_size': (5,),
    'mamba2_groups': (1, 2),
    'mamba2_conv_size': (4, 2),
    'mamba2_norm_eps': (1e-5, 0.1),
    'mamba2_dt_min': (0.0, 0.01),
    'mamba2_dt_max': (0.05,),
    'short_conv_size': (2, 4),
    **dict.fromkeys(('linear_heads', 'retnet_heads', 'lightning_heads', 'gla_heads'), (1, 3)),
    **dict.fromkeys(('linear_key_dim', 'retnet_key_dim', 'lightning_key_dim', 'gla_key_dim'), (6,)),
    **dict.fromkeys(
        ('linear_value_dim', 'retnet_value_dim', 'lightning_value_dim', 'gla_value_dim'), (3,)
    ),
    **dict.fromkeys(('linear_conv_size', 'retnet_conv_size', 'gla_conv_size'), (3,)),
    **dict.fromkeys(('retnet_norm_eps', 'lightning_norm_eps', 'gla_norm_eps'), (1e-5, 1e-3)),
    'gla_decay_rank': (16, 2),
    'gla_decay_root': (16.0, 1.0),
    'gdn_heads': (2,),
    'gdn_value_heads': (4,),
    'gdn_head_dim': (3,),
    'gdn_v_head_dim': (5,),
    'gdn_conv_size': (4, 2, 0),
    'gdn_norm_eps': (1e-5, 1e-3),
    **dict.fromkeys(('deepnorm_mixer_alpha', 'deepnorm_ffn_alpha'), (1.5,)),
    **dict.fromkeys(('deepnorm_mixer_beta', 'deepnorm_ffn_beta'), (1.0, 0.7)),
    'layer_pattern': (),  # `layer_tables` has patterns
}
# Options whose None is resolved from the dataset.
NEVER_NONE = ('end_of_text',)


def tiny(**values) -> ModelArchitectureConfig:
    return ModelArchitectureConfig(**{'arch_preset': 'custom', **SIZES, **values})


def values_of(key: str, option: Option) -> list:
    """The values to try for an option."""
    if key == 'mixer_backend':  # the kernels of others run on CUDA only
        return ['torch']
    if isinstance(option.choices, Registry):  # without components that tests registered
        named = option.choices
        own = [name for name in named if named[name].__module__.startswith('components.')]
        return [name for name in own if (key, name) != ('ffn_type', 'none')]
    if option.choices is not None:
        return list(option.choices)
    values = (False, True) if option.base_type is bool else VALUES[key]
    none = option.optional and key not in NEVER_NONE
    return [*([None] if none else []), *values]


def pick_values(pick: Callable[[Sequence], object], **fixed) -> dict:
    """A value chosen by `pick` for each active option; `fixed` values are not changed.

    The mixer is attention unless it is fixed, and every layer has an FFN.
    """
    chosen: dict = {}
    fixed = {'mixer': 'attention', **fixed}

    def add(options: dict[str, Option]) -> None:
        for key, option in options.items():
            if key in SIZES or key in chosen or not option.is_active(chosen):
                continue
            chosen[key] = fixed[key] if key in fixed else pick(values_of(key, option))
            if isinstance(option.choices, Registry) and chosen[key] is not None:
                for component in option.choices.components(chosen[key]).values():
                    add(component.options)

    add(CORE_OPTIONS)
    if chosen['mixer'] == 'attention':
        del chosen['mixer']  # the default
    return chosen


# Layers of kind U have the model's own options.
PATTERNS = ('UA', 'AB', 'UAB', 'AAB*', 'U AB*', 'B*2 A*', 'ABA B*', 'U*3 AB', 'A')


def usual_sublayers(pick: Callable[[Sequence], object]) -> dict:
    """Attention and an FFN in every layer."""
    return {}


def layer_table_values(
    pick: Callable[[Sequence], object], sublayers: Callable = usual_sublayers, **fixed
) -> dict:
    """Values of a model of five layers of up to three kinds; each kind has a value chosen by `pick`
    for each option in which layers may differ. `fixed` values are those of all kinds.

    sublayers: chooses the mixer and the FFN of a kind.
    """

    def values_of_layers() -> dict:
        # Absolute position encodings are those of all layers.
        own = {
            'position_encoding': pick(('rope', 'none', 'alibi', 't5_relative')),
            'num_kv_heads': pick((1, 2)),
            'qk_rope_head_dim': 4,
            'experts_per_token': 2,
            **sublayers(pick),
        }
        values = {'mixer': 'attention', **pick_values(pick, **{**own, **fixed})}
        values['n_head'] = pick((2, 4))
        return {key: value for key, value in values.items() if key in layer_options()}

    pattern = pick(PATTERNS)
    kinds = {letter: values_of_layers() for letter in letters_of(pattern)}
    base = kinds.pop('U', {})
    # Without layers of its own, the model still has the norm before the head, dropout, and options
    # of all mixers such as a backend of attention.
    mixers = [kind['mixer'] for kind in (base, *kinds.values()) if kind]
    mixer = next((name for name in mixers if 'attention' in name.split('+')), mixers[0])
    fixed = {'attention_backend': pick((None, 'manual')), 'layer_pattern': None, **fixed}
    model = pick_values(pick, **{**base, **fixed, 'mixer': mixer})
    shared, options = shared_options(model), architecture_options()
    of_model = {k: v for k, v in model.items() if options[k].scope == 'model' or k in shared}
    kinds_table = {'layer_pattern': pattern, 'layer_kinds': kinds}
    return {**of_model, **base, **kinds_table, 'n_layer': 5}


@st.composite
def layer_tables(draw, **fixed) -> ModelArchitectureConfig:
    """A hypothesis strategy for legal tiny architectures whose layers differ."""
    values = layer_table_values(lambda values: draw(st.sampled_from(values)), **fixed)
    config = legal_config(values)
    assume(config is not None)
    note(config.to_dict())
    return config


# The project's own mixers that have a module of their own, besides attention.
OWN_MIXERS = [
    name
    for name in MIXER_REGISTRY
    if MIXER_REGISTRY[name].__module__.startswith('components.')
    and name not in ('attention', 'none')
]


@functools.cache
def joined_mixers() -> list[str]:
    """Pairs of mixers that may share a layer without options."""
    pairs = itertools.combinations(['attention', *OWN_MIXERS], 2)
    return [mixer for mixer in map('+'.join, pairs) if legal_config({'mixer': mixer})]


def any_sublayers(pick: Callable[[Sequence], object]) -> dict:
    """A mixer, two or none, and an FFN or none."""
    mixer = pick(['attention', 'none', *OWN_MIXERS, *joined_mixers()[: len(OWN_MIXERS) + 2]])
    networks = values_of('ffn_type', CORE_OPTIONS['ffn_type'])
    return {'mixer': mixer, 'ffn_type': pick(networks + ['none'] * (mixer != 'none'))}


@st.composite
def hybrids(draw, **fixed) -> ModelArchitectureConfig:
    """A hypothesis strategy for legal tiny architectures whose layers have different sublayers."""
    config = legal_config(hybrid_values(lambda values: draw(st.sampled_from(values)), **fixed))
    assume(config is not None)
    note(config.to_dict())
    return config


def hybrid_values(pick: Callable[[Sequence], object], **fixed) -> dict:
    return layer_table_values(pick, any_sublayers, **fixed)


def with_backend(config: ModelArchitectureConfig, backend: str) -> ModelArchitectureConfig | None:
    """The same architecture with another backend; None if the backend does not support it."""
    try:
        return config.replace(attention_backend=backend)
    except UserError:
        return None


def legal_config(values: dict) -> ModelArchitectureConfig | None:
    """The architecture, or None if the values are invalid."""
    try:
        return tiny(**values)
    except UserError:
        return None


@st.composite
def architectures(draw, **fixed) -> ModelArchitectureConfig:
    """A hypothesis strategy for legal tiny architectures."""
    config = legal_config(pick_values(lambda values: draw(st.sampled_from(values)), **fixed))
    assume(config is not None)
    note(config.to_dict())
    return config


@functools.cache
def random_architectures(number: int) -> tuple[dict, ...]:
    """The values of `number` random legal architectures, the same in every run."""
    choose = random.Random(0).choice
    candidates = (pick_values(choose) for _ in itertools.count())
    return tuple(
        itertools.islice((values for values in candidates if legal_config(values)), number)
    )


@functools.cache
def pairwise_architectures() -> tuple[dict, ...]:
    """Legal architectures that cover every possible pair of option values."""

    def pairs(values: dict) -> frozenset:
        return frozenset(itertools.combinations(values.items(), 2))

    left = {index: pairs(values) for index, values in enumerate(random_architectures(SAMPLED))}
    chosen = []
    while left:
        best = max(left, key=lambda index: len(left[index]))
        met = left[best]
        chosen.append(random_architectures(SAMPLED)[best])
        left = {index: rest for index, unmet in left.items() if (rest := unmet - met)}
    return tuple(chosen)


SAMPLED = 400


def label(combination: dict) -> str:
    """A test id."""
    return '-'.join(str(value) for value in combination.values())


def perturbed_model(config: ModelArchitectureConfig, factor: float = 10.0) -> Transformer:
    """A model with non-uniform attention, and norm weights and biases that are not 1 and 0.

    factor: that of initial matrices.
    """
    model = build_model(config, device='cpu', seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            parameter.mul_(factor if parameter.dim() > 1 else 1.0).add_(0.1 * noise)
    return model


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def random_tokens(config: ModelArchitectureConfig, batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, config.block_size), generator=generator)


def changes_after_updates(config):
    """Mean change of the last block's output and of the logits after four Adam iterations."""
    model = build_model(config, device='cpu', seed=1)
    optimizer = torch.optim.Adam(
        [{'params': g.parameters, 'lr': 0.01 * g.lr_scale} for g in parameter_groups(model)]
    )
    tokens = random_tokens(config, batch=8)
    streams = []
    model.blocks[-1].register_forward_hook(lambda _, __, out: streams.append(out[0].detach()))
    first = model(tokens).detach()
    for _ in range(4):
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = model(tokens).detach()
    return [(b - a).abs().mean().item() for a, b in ((streams[0], streams[-1]), (first, last))]
