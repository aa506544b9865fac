"""Position encodings, other than biases of the scores (`components.score_biases`)."""

import math
from typing import ClassVar

import torch
import torch.nn as nn

from common.design_scaling import fraction_of_pairs
from common.option_merge import with_component_options
from common.registry import FrozenConfig, Option, above, at_least, tag_of
from components.attention_inputs import AttentionInputs
from components.base import Component
from model_config import (
    ATTENTION_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    ROPE_SCALING_REGISTRY,
    ModelArchitectureConfig,
)


class PositionEncoding(Component, nn.Module):
    """Three hooks, which do nothing by default. `prepare` computes tables, which are not stored."""

    part = 'position_encoding'
    # Whether it adds a bias to the scores, which the attention backend must support.
    has_bias: ClassVar[bool] = False
    # The longest sequence that it supports; None: any length.
    max_length: int | None = None

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()

    @classmethod
    def refused_in_kind(cls, name: str) -> str | None:
        """The reason why only some layers cannot have it, or None."""
        if cls.embed is PositionEncoding.embed:
            return None
        return (
            f'position_encoding={name!r} is added to the embedding, which all layers share: some '
            f"layers alone cannot have it. Set the model's position_encoding to 'rope' or "
            f"'none', and vary that."
        )

    @classmethod
    def depends_on(cls, config: ModelArchitectureConfig) -> tuple:
        """What it depends on besides its own options and those of the model, for a layer's config.

        Layers share an encoding if this and its options are equal. The default: the number of
        heads and their rotary dimensions, or nothing if it is added to the embedding.
        """
        if cls.embed is not PositionEncoding.embed:
            return ()
        return config.n_head, ATTENTION_REGISTRY[config.attention_type].rotary_dim(config)

    @classmethod
    def sharing_key(cls, config: ModelArchitectureConfig) -> tuple:
        """Layers in whose configs it is equal share an encoding."""
        options = with_component_options(cls.options)
        return cls, *(config.get(key) for key in options), *cls.depends_on(config)

    def prepare(self, q_positions: torch.Tensor, k_positions: torch.Tensor) -> AttentionInputs:
        """Inputs for positions (Tq,) of queries and (Tk,) of keys; called once per forward pass."""
        return AttentionInputs()

    def embed(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token embeddings (B, T, C) -> the input of the first block. Positions are (T,), or (B, T)
        if they restart in each document."""
        return x

    @staticmethod
    def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Queries or keys (B, H, T, D), rotated according to their positions."""
        return x

    @classmethod
    def rotates(cls) -> bool:
        return cls.rotate is not PositionEncoding.rotate


POSITION_ENCODING_REGISTRY.expect(PositionEncoding, constructed_with=('config',))


@POSITION_ENCODING_REGISTRY.register('none', source='Haviv et al. 2022')
class NoPositionEncoding(PositionEncoding):
    """No position encoding: the order is known from the causal mask alone."""

    tag = 'NoPos'

    @classmethod
    def depends_on(cls, config: ModelArchitectureConfig) -> tuple:
        return ()


@POSITION_ENCODING_REGISTRY.register('learned_absolute', source='Radford et al. 2019')
class LearnedAbsolute(PositionEncoding):
    """Adds a learned vector for each of `block_size` positions."""

    tag = 'AbsPos'
    mup_rule = True

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__(config)
        self.max_length = config.block_size
        self.table = nn.Embedding(config.block_size, config.n_embd)

    def embed(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return x + self.table(positions)


SINUSOID_TAGS = {'interleaved': '', 'halves': 'Halves', 'fairseq': 'Fairseq'}


@POSITION_ENCODING_REGISTRY.register('sinusoidal', source='Vaswani et al. 2017, section 3.5')
class Sinusoidal(PositionEncoding):
    """Adds sin(t · 10000^(-2i/C)) to dimension 2i and the cosine to dimension 2i + 1.

    With another `sinusoid_layout`, all sines come before all cosines. Vaswani et al. multiply the
    token embeddings by √C first (`scale_embeddings`).
    """

    tag = 'SinPos'
    options: ClassVar = {
        'sinusoid_layout': Option(
            str,
            'interleaved',
            'Sines and cosines in turns, or in halves (CTRL); fairseq: in halves, frequencies '
            '10000^(-i / (C/2 - 1)), and positions from 2 (XGLM)',
            choices=tuple(SINUSOID_TAGS),
        )
    }

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__(config)
        self.layout = config.get('sinusoid_layout') or 'interleaved'

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        return cls.tag + SINUSOID_TAGS[config.get('sinusoid_layout') or 'interleaved']

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        is_single = config.sinusoid_layout == 'fairseq' and config.n_embd < 4
        if config.n_embd % 2 == 0 and not is_single:
            return []
        fault, size = ('has only one', 'a larger') if is_single else ('is odd', 'an')
        return [
            f"position_encoding='sinusoidal' needs pairs of dimensions, but n_embd={config.n_embd} "
            f'{fault}. Choose {size} even n_embd.'
        ]

    def embed(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        pairs = x.size(-1) // 2
        if self.layout == 'fairseq':
            # As rotary_frequencies, but the last one is exactly 1/10000.
            exponents = torch.arange(pairs, device=x.device, dtype=torch.float) / (pairs - 1)
            angles = (positions[..., None] + 2) * (10000.0**exponents).reciprocal()
        else:
            angles = positions[..., None] * rotary_frequencies(2 * pairs, 10000.0, x.device)
        waves = angles.sin(), angles.cos()
        if self.layout == 'interleaved':
            return x + torch.stack(waves, dim=-1).flatten(-2)  # (…, T, C)
        return x + torch.cat(waves, dim=-1)


# --------------------------------------------------------------------------------------------------
# Rotations


def rotary_frequencies(dims: int, theta: float, device: torch.device) -> torch.Tensor:
    """theta^(-2i/dims) for each pair of dimensions, in radians per token, (dims/2,) in fp32."""
    exponents = torch.arange(0, dims, 2, device=device, dtype=torch.float) / dims
    return (theta**exponents).reciprocal()


class RotaryScaling(Component):
    """Scaling of RoPE's frequencies for a longer context than in pretraining.

    Never instantiated: both hooks are functions of the config. They may depend on its options and
    on those of the model, since layers that are alike in these share an encoding.
    """

    options: ClassVar = {
        'rope_scaling_factor': Option(
            float, 8.0, 'Ratio of the new context length to the original one', check=at_least(1)
        )
    }

    @staticmethod
    def scaled(frequencies: torch.Tensor, config: ModelArchitectureConfig) -> torch.Tensor:
        """Frequencies (pairs,) in radians per token, scaled for the longer context."""
        return frequencies

    @staticmethod
    def attention_factor(config: ModelArchitectureConfig) -> float:
        """Factor of rotated queries and keys."""
        return 1.0


ROPE_SCALING_REGISTRY.expect(RotaryScaling)


@ROPE_SCALING_REGISTRY.register('none', source='Su et al. 2021')
class NoScaling(RotaryScaling):
    """Unchanged frequencies."""

    tag = ''
    options: ClassVar = {}


@ROPE_SCALING_REGISTRY.register('linear', source='Chen et al. 2023')
class LinearScaling(RotaryScaling):
    """Divides all positions by `rope_scaling_factor` (position interpolation)."""

    tag = 'Linear'

    @staticmethod
    def scaled(frequencies: torch.Tensor, config: ModelArchitectureConfig) -> torch.Tensor:
        return frequencies / config.rope_scaling_factor


class ScalingByWavelength(RotaryScaling):
    """Interpolates low frequencies, whose wavelength exceeds the original context; keeps high ones.

    Frequencies are compared by their number of rotations in `rope_original_block_size` tokens.
    """

    renamed_methods: ClassVar = {'kept': 'kept_fraction'}

    options: ClassVar = {
        **RotaryScaling.options,
        'rope_original_block_size': Option(
            int | None,
            None,
            'Original context length; None: block_size / rope_scaling_factor',
            check=at_least(1),
        ),
    }

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        length = max(1, round(config.block_size / config.rope_scaling_factor))
        return {'rope_original_block_size': (length, 'block_size / rope_scaling_factor')}

    @staticmethod
    def kept_fraction(frequencies: torch.Tensor, config: ModelArchitectureConfig) -> torch.Tensor:
        """The weight of each unscaled frequency, from 0 (interpolated) to 1 (kept)."""
        raise NotImplementedError

    @classmethod
    def scaled(cls, frequencies: torch.Tensor, config: ModelArchitectureConfig) -> torch.Tensor:
        fraction = cls.kept_fraction(frequencies, config)
        return frequencies * (fraction + (1 - fraction) / config.rope_scaling_factor)


def _wrong_order(low: str, high: str, config: ModelArchitectureConfig) -> list[str]:
    values = config.to_dict()
    if values[low] < values[high]:
        return []
    return [f'{low}={values[low]:g} must be below {high}={values[high]:g}.']


@ROPE_SCALING_REGISTRY.register('llama3', source='Grattafiori et al. 2024; Llama 3.1')
class Llama3Scaling(ScalingByWavelength):
    """Keeps high frequencies, interpolates low ones; linear in the number of rotations between."""

    tag = 'Llama3'
    options: ClassVar = {
        **ScalingByWavelength.options,
        'rope_low_freq_factor': Option(
            float,
            1.0,
            'Rotations in the original context below which a frequency is interpolated',
            check=above(0),
        ),
        'rope_high_freq_factor': Option(
            float,
            4.0,
            'Rotations in the original context above which a frequency is unchanged',
            check=above(0),
        ),
    }

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        return _wrong_order('rope_low_freq_factor', 'rope_high_freq_factor', config)

    @staticmethod
    def kept_fraction(frequencies: torch.Tensor, config: ModelArchitectureConfig) -> torch.Tensor:
        turns = config.rope_original_block_size * frequencies / (2 * math.pi)
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        return ((turns - low) / (high - low)).clamp(0, 1)


@ROPE_SCALING_REGISTRY.register('yarn', source='Peng et al. 2023')
class YarnScaling(ScalingByWavelength):
    """Keeps high frequencies, interpolates low ones; linear in the index of the pair between.

    Rotated queries and keys are also scaled, by `rope_attention_factor`."""

    tag = 'YaRN'
    options: ClassVar = {
        **ScalingByWavelength.options,
        'rope_beta_fast': Option(
            float,
            32.0,
            'Rotations in the original context above which a frequency is unchanged',
            check=above(0),
        ),
        'rope_beta_slow': Option(
            float,
            1.0,
            'Rotations in the original context below which a frequency is interpolated',
            check=above(0),
        ),
        'rope_attention_factor': Option(
            float | None,
            None,
            'Factor of rotated queries and keys; None: 0.1 ln(rope_scaling_factor) + 1 with yarn, '
            '√(1 + ln(rope_scaling_factor) / ln(rope_original_block_size)) with longrope',
            check=above(0),
        ),
        'rope_round_pairs': Option(
            bool, True, 'Round the bounds between frequencies to whole pairs (not in gpt-oss)'
        ),
    }

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        return cls.tag if config.rope_round_pairs else f'{cls.tag}-unrounded'

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        factor = 0.1 * math.log(config.rope_scaling_factor) + 1
        derived = {'rope_attention_factor': (factor, '0.1 ln(rope_scaling_factor) + 1')}
        return {**super().derived_values(config), **derived}

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        problems = _wrong_order('rope_beta_slow', 'rope_beta_fast', config)
        if config.rope_theta <= 1:
            problems.append(
                f"rope_theta={config.rope_theta:g}: rope_scaling='yarn' needs its logarithm. "
                f'Choose a rope_theta above 1.'
            )
        return problems

    @staticmethod
    def kept_fraction(frequencies: torch.Tensor, config: ModelArchitectureConfig) -> torch.Tensor:
        pairs = len(frequencies)

        def pair_with(rotations: float) -> float:
            """Index of the pair with that number of rotations in the original context."""
            wavelength = config.rope_original_block_size / rotations
            return pairs * math.log(wavelength / (2 * math.pi)) / math.log(config.rope_theta)

        first, last = pair_with(config.rope_beta_fast), pair_with(config.rope_beta_slow)
        if config.rope_round_pairs:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        number = torch.arange(pairs, device=frequencies.device)
        return 1 - ((number - first) / max(last - first, 0.001)).clamp(0, 1)

    @staticmethod
    def attention_factor(config: ModelArchitectureConfig) -> float:
        return config.rope_attention_factor


@POSITION_ENCODING_REGISTRY.register('rope', source='Su et al. 2021; partial: Black et al. 2022')
class RotaryPositionEncoding(PositionEncoding):
    """Rotates pairs (i, i + D/2) of each head by position · theta^(-2i/D), as Llama does.

    D is the rotary dimension of a head times `rope_fraction`; the other dimensions stay unchanged.
    """

    tag = 'RoPE'
    options: ClassVar = {
        'rope_theta': Option(float, 10000.0, 'Base of the rotary frequencies', check=above(0)),
        'rope_fraction': Option(
            float,
            1.0,
            "Fraction of each head's dimensions that RoPE rotates (the first ones)",
            check=((lambda value: 0 < value <= 1), 'above 0 and at most 1'),
        ),
        'rope_scaling': Option(
            str,
            'none',
            'Scaling of RoPE for a longer context than in pretraining',
            choices=ROPE_SCALING_REGISTRY,
        ),
    }

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__(config)
        self.config, self.num_dims = config, self.rotated_dims(config)
        self.scaling = ROPE_SCALING_REGISTRY[config.rope_scaling]

    @classmethod
    def depends_on(cls, config: ModelArchitectureConfig) -> tuple:
        return (cls.rotated_dims(config),)

    @staticmethod
    def rotated_dims(config: ModelArchitectureConfig) -> int:
        """Number of rotated dimensions of a head; rounded down, as in transformers."""
        rotary_dim = ATTENTION_REGISTRY[config.attention_type].rotary_dim(config)
        return int(rotary_dim * config.rope_fraction)

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        part = '' if config.rope_fraction == 1 else f'{config.rope_fraction:g}'
        scaling = tag_of(ROPE_SCALING_REGISTRY[config.rope_scaling], config)
        return cls.tag + part + (f'-{scaling}' if scaling else '')

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        rotary_dim = ATTENTION_REGISTRY[config.attention_type].rotary_dim(config)
        rotated = cls.rotated_dims(config)
        if rotated > 0 and rotated % 2 == 0:
            return []
        if config.rope_fraction < 1:
            return [
                f'rope_fraction={config.rope_fraction:g} of a head of {rotary_dim} dimensions is '
                f'{rotated}, but RoPE rotates pairs. Choose a fraction that gives an even number, '
                f'such as {fraction_of_pairs(config.rope_fraction, rotary_dim):g}.'
            ]
        return [
            f"position_encoding='rope' rotates pairs of dimensions, but the head dimension "
            f'{rotary_dim} is odd. Choose an even one, through n_head (n_embd={config.n_embd} / '
            f'n_head={config.n_head}) or an option of the attention.'
        ]

    def prepare(self, q_positions: torch.Tensor, k_positions: torch.Tensor) -> AttentionInputs:
        # The angle of each position and pair, (T, rotated dims / 2)
        frequencies = rotary_frequencies(self.num_dims, self.config.rope_theta, q_positions.device)
        angles = q_positions[:, None] * self.scaling.scaled(frequencies, self.config)
        factor = self.scaling.attention_factor(self.config)
        return AttentionInputs(rotation=(angles.cos() * factor, angles.sin() * factor))

    @staticmethod
    def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> torch.Tensor:
        cos, sin = rotation  # (T, rotated dims / 2) each
        half = cos.size(-1)
        # Pairs are (i, i + half), in fp32; dimensions from 2 · half on pass through.
        first, second, passthrough = x.float().tensor_split((half, 2 * half), dim=-1)
        rotated = (first * cos - second * sin, second * cos + first * sin, passthrough)
        return torch.cat(rotated, dim=-1).to(x.dtype)
