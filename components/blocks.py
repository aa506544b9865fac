"""Block layouts: mixers, feed-forward network and norms around the residual stream."""

import functools
from typing import ClassVar

import torch
import torch.nn as nn

from common.registry import Option
from components.attention_inputs import AttentionInputs
from components.base import AuxOutput, Component
from components.canon import CANON_OPTIONS, STATE, canon_layer, canon_problems, canon_tag
from components.kv_cache import LayerStates, MixerState
from model_config import (
    FFN_REGISTRY,
    MIXER_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    RESIDUAL_REGISTRY,
    ModelArchitectureConfig,
)

NO_AUX = AuxOutput(0.0, {})


class Block(Component, nn.Module):
    """Mixers and a feed-forward network around the residual stream; subclasses add norms.

    forward: x (B, T, C) and AttentionInputs -> x (B, T, C) and the AuxOutput of the FFN. It calls
    `enter` first, and `add` with the output of each sublayer, after its norm if there is one. A
    sublayer that the layer lacks has no norms: `mixes` or `ffn` says so.
    """

    # Whether the output of the last block needs a final norm.
    final_norm: ClassVar[bool] = True
    # Whether its third output is the attention's values.
    publishes_values: ClassVar[bool] = False
    # Letters of the Canon layers that `forward` applies: A by `self.mix`, C and D by `self.feed`.
    canon_letters: ClassVar[str] = ''
    options: ClassVar = {**CANON_OPTIONS}

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        return '-'.join(filter(None, (cls.tag, canon_tag(config))))

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        return canon_problems(config)

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__()
        built = {
            name: mixer.build(config, layer)
            for name, mixer in MIXER_REGISTRY.components(config.mixer).items()
        }
        self.attention = built.pop('attention', None)
        others = {name: mixer for name, mixer in built.items() if mixer is not None}
        self.mixers = nn.ModuleDict(others) if others else {}
        self.mixes = self.attention is not None or bool(others)
        self.ffn = FFN_REGISTRY[config.ffn_type].build(config, layer)
        self.canon = config.get('canon') or ''
        self.canon_a = canon_layer(config, 'A', config.n_embd)
        self.canon_c = canon_layer(config, 'C', config.n_embd)
        self.dropout = nn.Dropout(config.residual_dropout)
        without = (*(() if self.mixes else ('attention',)), *(() if self.ffn else ('ffn',)))
        for name in self.norms(config):
            if not name.startswith(without):
                self.add_module(name, NORM_REGISTRY[config.normalization](config, config.n_embd))
        sublayers = {'mixer': self.mixes, 'ffn': self.ffn is not None}
        present = tuple(name for name, is_present in sublayers.items() if is_present)
        self.residual = RESIDUAL_REGISTRY[config.residual](config, layer, present)

    @classmethod
    def norms(cls, config: ModelArchitectureConfig) -> tuple[str, ...]:
        """Attribute names of the layout's norms: those of mixers begin with `attention`, those of
        the FFN with `ffn`."""
        return 'attention_norm', 'ffn_norm'

    @functools.cached_property
    def shared_names(self) -> tuple[str, ...]:
        """The entries of `SharedInputs` for which the components of the block ask."""
        components = [module for module in self.modules() if isinstance(module, Component)]
        return tuple(sorted({name for each in components for name in each.shared_inputs()}))

    def mix(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> torch.Tensor:
        """The sum of the outputs of the layer's mixers for the same input, (B, T, C)."""
        if self.canon_a is not None:
            x = self.canon_a(x, attn_inputs)
        outputs = [] if self.attention is None else [self.attention(x, attn_inputs)]
        for name, mixer in self.mixers.items():
            outputs.append(mixer(x, attn_inputs.of_mixer(name)))
        return sum(outputs[1:], outputs[0])

    def feed(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> tuple[torch.Tensor, AuxOutput]:
        """The output of the FFN for its input, (B, T, C), and its AuxOutput."""
        if self.canon_c is not None:
            x = self.canon_c(x, attn_inputs)
        return self.ffn(x, attn_inputs=attn_inputs) if 'D' in self.canon else self.ffn(x)

    def enter(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> torch.Tensor:
        """The residual stream (B, T, C) at the entrance of the block."""
        return self.residual.enter(x, attn_inputs.shared)

    def add(self, x: torch.Tensor, y: torch.Tensor, sublayer: str) -> torch.Tensor:
        """The residual stream x after the 'mixer' or 'ffn' with the output y; applies dropout."""
        return self.residual.add(x, self.dropout(y), sublayer)

    def empty_cache(self, tokens: int) -> LayerStates:
        """The states of the layer's mixers before the first of at most `tokens` tokens."""
        attention = {} if self.attention is None else {'attention': self.attention}
        mixers = {**attention, **self.mixers}
        states = {name: mixer.empty_cache(tokens) for name, mixer in mixers.items()}
        return {**states, STATE: MixerState()} if self.canon else states


NORM_POSITION_REGISTRY.expect(
    Block, constructed_with=('config', 'layer'), forward=('x', 'attn_inputs')
)


@NORM_POSITION_REGISTRY.register('pre', source='Radford et al. 2019; Xiong et al. 2020')
class PreNormBlock(Block):
    """x + sublayer(norm(x)), mixers then FFN."""

    tag = 'PreNorm'
    canon_letters = 'ACD'

    def forward(self, x, attn_inputs):
        x = self.enter(x, attn_inputs)
        if self.mixes:
            x = self.add(x, self.mix(self.attention_norm(x), attn_inputs), 'mixer')
        if self.ffn is None:
            return x, NO_AUX
        y, aux = self.feed(self.ffn_norm(x), attn_inputs)
        return self.add(x, y, 'ffn'), aux


@NORM_POSITION_REGISTRY.register('post', source='Vaswani et al. 2017')
class PostNormBlock(Block):
    """norm(x + sublayer(x)); no norm follows the last block."""

    tag = 'PostNorm'
    canon_letters = 'ACD'
    final_norm = False

    def forward(self, x, attn_inputs):
        x = self.enter(x, attn_inputs)
        if self.mixes:
            x = self.attention_norm(self.add(x, self.mix(x, attn_inputs), 'mixer'))
        if self.ffn is None:
            return x, NO_AUX
        y, aux = self.feed(x, attn_inputs)
        return self.ffn_norm(self.add(x, y, 'ffn')), aux


@NORM_POSITION_REGISTRY.register('entrance', source='MiniMax 2025')
class EntranceNormBlock(Block):
    """norm(x) + sublayer(norm(x)): post-norm with each norm before the next sublayer.

    It differs from `post` in a norm of the embedding; the final norm is that of the last FFN.
    """

    tag = 'EntranceNorm'
    canon_letters = 'ACD'

    def forward(self, x, attn_inputs):
        x = self.enter(x, attn_inputs)
        if self.mixes:
            x = self.attention_norm(x)
            x = self.add(x, self.mix(x, attn_inputs), 'mixer')
        if self.ffn is None:
            return x, NO_AUX
        x = self.ffn_norm(x)
        y, aux = self.feed(x, attn_inputs)
        return self.add(x, y, 'ffn'), aux


@NORM_POSITION_REGISTRY.register('sandwich', source='Ding et al. 2021; Gemma 2: Gemma Team 2024')
class SandwichNormBlock(Block):
    """x + norm(sublayer(norm(x)))."""

    tag = 'SandwichNorm'
    canon_letters = 'ACD'

    @classmethod
    def norms(cls, config: ModelArchitectureConfig) -> tuple[str, ...]:
        return 'attention_norm', 'attention_output_norm', 'ffn_norm', 'ffn_output_norm'

    def forward(self, x, attn_inputs):
        x = self.enter(x, attn_inputs)
        if self.mixes:
            y = self.mix(self.attention_norm(x), attn_inputs)
            x = self.add(x, self.attention_output_norm(y), 'mixer')
        if self.ffn is None:
            return x, NO_AUX
        y, aux = self.feed(self.ffn_norm(x), attn_inputs)
        return self.add(x, self.ffn_output_norm(y), 'ffn'), aux


@NORM_POSITION_REGISTRY.register('ffn_sandwich', source='SK Telecom 2026 (A.X K1)')
class FFNSandwichNormBlock(PreNormBlock):
    """x + mixers(norm(x)), then x + norm(FFN(norm(x)))."""

    tag = 'FFNSandwichNorm'

    @classmethod
    def norms(cls, config: ModelArchitectureConfig) -> tuple[str, ...]:
        return 'attention_norm', 'ffn_norm', 'ffn_output_norm'

    def feed(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> tuple[torch.Tensor, AuxOutput]:
        y, aux = super().feed(x, attn_inputs)
        return self.ffn_output_norm(y), aux


@NORM_POSITION_REGISTRY.register('reordered', source='Liu et al. 2022; OLMo 2: OLMo et al. 2024')
class ReorderedNormBlock(Block):
    """x + norm(sublayer(x))."""

    tag = 'ReorderedNorm'
    canon_letters = 'ACD'

    def forward(self, x, attn_inputs):
        x = self.enter(x, attn_inputs)
        if self.mixes:
            x = self.add(x, self.attention_norm(self.mix(x, attn_inputs)), 'mixer')
        if self.ffn is None:
            return x, NO_AUX
        y, aux = self.feed(x, attn_inputs)
        return self.add(x, self.ffn_norm(y), 'ffn'), aux


@NORM_POSITION_REGISTRY.register('parallel', source='Wang & Komatsuzaki 2021; Black et al. 2022')
class ParallelBlock(Block):
    """x + mixers(norm(x)) + FFN(norm(x)), with two norms or a shared one."""

    tag = 'Parallel'
    canon_letters = 'ACD'
    options: ClassVar = {
        'parallel_shared_norm': Option(
            bool, False, 'Use one norm for both branches (GPT-J, PaLM) instead of two'
        ),
        **Block.options,
    }

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        norms = '1Norm' if config.parallel_shared_norm else ''
        return '-'.join(filter(None, (cls.tag + norms, canon_tag(config))))

    @classmethod
    def norms(cls, config: ModelArchitectureConfig) -> tuple[str, ...]:
        both = super().norms(config)
        return both[:1] if shares_norm(config) else both

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        self.shared_norm = shares_norm(config)

    def forward(self, x, attn_inputs):
        x = entered = self.enter(x, attn_inputs)
        aux = NO_AUX
        if self.mixes:
            normed = self.attention_norm(entered)
            x = self.add(x, self.mix(normed, attn_inputs), 'mixer')
        if self.ffn is not None:
            fed = normed if self.shared_norm else self.ffn_norm(entered)
            y, aux = self.feed(fed, attn_inputs)
            x = self.add(x, y, 'ffn')
        return x, aux


def shares_norm(config: ModelArchitectureConfig) -> bool:
    """Whether a parallel layer has both sublayers, and one norm for them."""
    return config.parallel_shared_norm and 'none' not in (config.mixer, config.ffn_type)
