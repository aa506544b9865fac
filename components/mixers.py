"""What mixes information across tokens in a layer: attention, and mixers of other kinds.

Attention has registries of its own (`attention_type` and those it leads to). Other mixers derive
from `Mixer`.
"""

from typing import ClassVar

import torch
import torch.nn as nn

from components.attention_inputs import AttentionInputs
from components.base import Component
from components.document_mask import DOCUMENT_OPTIONS
from components.kv_cache import MixerState
from components.mixer_kernels import find_kernel
from model_config import ATTENTION_REGISTRY, MIXER_REGISTRY, ModelArchitectureConfig


class Mixer(Component, nn.Module):
    """(B, T, C) -> (B, T, C), causal; several in a layer see the same input and are added.

    The options of a mixer begin with its prefix, such as `mamba2_groups`, and include
    `DOCUMENT_OPTIONS`. Its module is `blocks.N.mixers.NAME`.

    `attn_inputs.starts` (B, T), unless None, is true at the first token of each document: there
    its output may depend on no earlier token. `attn_inputs.cache`, unless None, is the MixerState
    from earlier calls, which `forward` reads and sets if the class has `cacheable = True`.

    `flops(seq_len, causal=False)` counts the matrix products that run. With `causal=True`, a
    recurrence counts in its recurrent form, whatever the chunks in which it is computed.
    """

    part = 'mixer'
    flops_part = 'mixer_projections'
    cacheable = False
    # Kernels of other packages that can compute it, by `mixer_backend`; its options then include
    # BACKEND_OPTIONS. See `components/mixer_kernels.py`.
    kernels: ClassVar[dict[str, str]] = {}
    # Whether it may stand beside others in a layer.
    joins: ClassVar[bool] = True
    options: ClassVar = {**DOCUMENT_OPTIONS}

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__()
        self.kernel = find_kernel(self.kernels, config)

    @classmethod
    def build(cls, config: ModelArchitectureConfig, layer: int) -> nn.Module | None:
        """The module of a layer, or None."""
        return cls(config, layer)

    def empty_cache(self, tokens: int) -> MixerState:
        """The state before the first of at most `tokens` tokens."""
        return MixerState()

    def forward(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> torch.Tensor:
        raise NotImplementedError


MIXER_REGISTRY.expect(Mixer, constructed_with=('config', 'layer'), forward=('x', 'attn_inputs'))


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number up to `most`."""
    return next(divisor for divisor in range(min(most, number), 0, -1) if number % divisor == 0)


class _Selector(Mixer):
    """A choice that has no module of its own, and so is never constructed."""

    options: ClassVar = {}

    def forward(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> torch.Tensor:
        raise NotImplementedError


@MIXER_REGISTRY.register('attention', source='Vaswani et al. 2017')
class AttentionMixer(_Selector):
    """Attention, of the kind that `attention_type` names."""

    tag = ''

    @classmethod
    def build(cls, config: ModelArchitectureConfig, layer: int) -> nn.Module:
        return ATTENTION_REGISTRY[config.attention_type](config, layer)


@MIXER_REGISTRY.register('none', source='Nemotron-H: NVIDIA 2025')
class NoMixer(_Selector):
    """No mixer: the layer is a feed-forward network alone."""

    tag = 'NoMixer'
    joins = False

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        if config.ffn_type != 'none':
            return []
        return [
            "mixer='none' with ffn_type='none' leaves a layer without any sublayer. Choose a mixer "
            'or an FFN.'
        ]

    @classmethod
    def build(cls, config: ModelArchitectureConfig, layer: int) -> None:
        return None
