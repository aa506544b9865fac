"""LongRoPE: a factor for each frequency of RoPE, found by a search."""

import math
from typing import ClassVar

import torch

from common.registry import FrozenConfig, Option
from components.positions import ScalingByWavelength, YarnScaling
from model_config import ATTENTION_REGISTRY, ROPE_SCALING_REGISTRY, ModelArchitectureConfig


def numbers_in(text: str) -> list[float]:
    """The numbers in a text such as '1.0, 1.25, 4'; none if it is malformed."""
    try:
        numbers = [float(part) for part in text.split(',')]
    except ValueError:
        return []
    return numbers if all(0 < number < math.inf for number in numbers) else []


_FACTORS = (lambda text: bool(numbers_in(text)), "numbers above 0 such as '1.0,1.25,4.0'")


@ROPE_SCALING_REGISTRY.register('longrope', source='Ding et al. 2024')
class LongRopeScaling(ScalingByWavelength):
    """Divides the frequency of each pair of dimensions by a factor of its own: the long factors if
    block_size is above rope_original_block_size, whatever the length of a text, or the short ones.

    Rotated queries and keys are also scaled, by `rope_attention_factor`.
    """

    tag = 'LongRoPE'
    options: ClassVar = {
        **ScalingByWavelength.options,
        'rope_attention_factor': YarnScaling.options['rope_attention_factor'],
        'rope_long_factors': Option(
            str,
            '1',
            'Factors of the wavelengths of all pairs, or one for all, in long contexts',
            check=_FACTORS,
        ),
        'rope_short_factors': Option(
            str,
            '1',
            'Factors of the wavelengths of all pairs, or one for all, in the original context',
            check=_FACTORS,
        ),
    }

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        derived = super().derived_values(config)
        length = config.rope_original_block_size or derived['rope_original_block_size'][0]
        growth = math.log(config.rope_scaling_factor) / math.log(max(length, 2))
        return {
            **derived,
            'rope_attention_factor': (
                math.sqrt(1 + growth),
                'sqrt(1 + ln(rope_scaling_factor) / ln(rope_original_block_size))',
            ),
        }

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        attention = ATTENTION_REGISTRY[config.attention_type]
        pairs = int(attention.rotary_dim(config) * config.rope_fraction) // 2
        return [
            f'{key} has {count} numbers, but RoPE rotates {pairs} pairs of dimensions. Give '
            f'{pairs} numbers, or one for all.'
            for key in ('rope_long_factors', 'rope_short_factors')
            if (count := len(numbers_in(getattr(config, key)))) not in (1, pairs)
        ]

    @classmethod
    def scaled(cls, frequencies: torch.Tensor, config: ModelArchitectureConfig) -> torch.Tensor:
        is_long = config.block_size > config.rope_original_block_size
        factors = numbers_in(config.rope_long_factors if is_long else config.rope_short_factors)
        return frequencies / torch.tensor(factors, device=frequencies.device)

    @staticmethod
    def attention_factor(config: ModelArchitectureConfig) -> float:
        return config.rope_attention_factor
