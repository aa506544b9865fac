"""Feed-forward networks."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common.registry import FrozenConfig, Option, above, at_least, tag_of
from components.attention_inputs import AttentionInputs
from components.base import AuxOutput, Component
from components.canon import CanonLayer, canon_layer
from model_config import ACTIVATION_REGISTRY, FFN_REGISTRY, ModelArchitectureConfig


class FeedForward(Component, nn.Module):
    """(B, T, C) -> (B, T, C) and an AuxOutput (empty for dense networks).

    A network can be an expert of a mixture if its constructor takes `width` (None: d_ff) and
    `linear`, the class of its linear layers, which are then called with the groups of rows too.
    """

    renamed_methods: ClassVar = {
        'inside': 'nonlinearity',
        'narrowed': 'activate_and_project',
        'report': 'summarize_metrics',
    }
    part = 'ffn'
    canon: CanonLayer | None  # of the first matrix's output, for letter D
    down: nn.Linear  # the projection to the residual stream
    options: ClassVar = {
        'ffn_bias': Option(bool | None, None, 'Use biases in the FFN; None: bias'),
    }

    # Metrics of its AuxOutput that `summarize_metrics` reads; (): those that no other FFN declares.
    metric_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def build(cls, config: ModelArchitectureConfig, layer: int) -> nn.Module | None:
        """The module of a layer, or None."""
        return cls(config, layer)

    @classmethod
    def default_d_ff(cls, config: FrozenConfig) -> int:
        """The hidden width if `d_ff` is not set."""
        raise NotImplementedError

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        return {
            'd_ff': (cls.default_d_ff(config), f'default of {config.ffn_type}'),
            'ffn_bias': (config.bias, 'bias'),
        }

    @classmethod
    def summarize_metrics(cls, means: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Scalars for the record, by name, from its metrics of shape (layers, ...)."""
        return {name: mean.mean() for name, mean in means.items()}

    def nonlinearity(self, hidden: torch.Tensor) -> torch.Tensor:
        """The input of `down` from the output of the first matrix, element by element."""
        raise NotImplementedError

    def after_canon(
        self, hidden: torch.Tensor, attn_inputs: AttentionInputs | None
    ) -> torch.Tensor:
        """The output of the first matrix, after the Canon layer if there is one."""
        return hidden if self.canon is None else self.canon(hidden, attn_inputs)

    def activate_and_project(self, hidden: torch.Tensor, *groups) -> torch.Tensor:
        """down(nonlinearity(hidden)), with the nonlinearity recomputed in the backward pass, so
        that only `hidden` is kept.

        torch stops the recomputation before `down`. Not with expert groups, whose grouped product
        would be recomputed too.
        """

        def project(hidden: torch.Tensor) -> torch.Tensor:
            return self.down(self.nonlinearity(hidden), *groups)

        if groups or not torch.is_grad_enabled():
            return project(hidden)
        return checkpoint(project, hidden, use_reentrant=False)

    def residual_weights(self) -> list[torch.Tensor]:
        return [self.down.weight]


FFN_REGISTRY.expect(FeedForward, constructed_with=('config', 'layer'), forward=('x',))


@FFN_REGISTRY.register('standard', source='Vaswani et al. 2017')
class StandardFeedForward(FeedForward):
    """down(activation(up(x))), by default 4 · n_embd wide."""

    tag = ''
    mup_rule = True
    canon_letters = 'D'
    options: ClassVar = {
        **FeedForward.options,
        'activation': Option(
            str,
            'gelu',
            'Activation of the FFN; the name of a gated FFN sets ffn_type instead',
            choices=ACTIVATION_REGISTRY,
            aliases={
                gated: ('ffn_type', gated)
                for gated in ('swiglu', 'geglu', 'reglu', 'glu', 'bilinear')
            },
        ),
    }

    def __init__(
        self,
        config: ModelArchitectureConfig,
        layer: int,
        width: int | None = None,
        linear: Callable[..., nn.Module] = nn.Linear,
    ):
        super().__init__()
        width = width or config.d_ff
        self.up = linear(config.n_embd, width, bias=config.ffn_bias)
        self.canon = canon_layer(config, 'D', width)
        self.activation = ACTIVATION_REGISTRY[config.activation](config)
        self.down = linear(width, config.n_embd, bias=config.ffn_bias)

    @classmethod
    def default_d_ff(cls, config: FrozenConfig) -> int:
        return 4 * config.n_embd

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        activation = tag_of(ACTIVATION_REGISTRY[config.activation], config)
        return '-'.join(filter(None, (cls.tag, activation)))

    def nonlinearity(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.activation(hidden)

    def forward(
        self, x: torch.Tensor, *groups, attn_inputs: AttentionInputs | None = None
    ) -> tuple[torch.Tensor, AuxOutput]:
        hidden = self.after_canon(self.up(x, *groups), attn_inputs)
        return self.activate_and_project(hidden, *groups), AuxOutput(0.0, {})


class GatedFeedForward(FeedForward):
    """down(activate(gate(x)) · up(x)), by default 8/3 · n_embd wide."""

    mup_rule = True
    canon_letters = 'D'
    options: ClassVar = {
        **FeedForward.options,
        'multiple_of': Option(
            int, 8, 'Multiple to which a derived d_ff is rounded', check=at_least(1)
        ),
    }

    def __init__(
        self,
        config: ModelArchitectureConfig,
        layer: int,
        width: int | None = None,
        linear: Callable[..., nn.Module] = nn.Linear,
    ):
        super().__init__()
        self.config, width = config, width or config.d_ff
        self.gate_up = linear(config.n_embd, 2 * width, bias=config.ffn_bias)
        self.canon = canon_layer(config, 'D', 2 * width)
        self.down = linear(width, config.n_embd, bias=config.ffn_bias)

    @classmethod
    def default_d_ff(cls, config: FrozenConfig) -> int:
        multiple = config.multiple_of
        return max(1, round(8 * config.n_embd / 3 / multiple)) * multiple

    def matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        width = self.down.in_features
        return {**super().matrices(), self.gate_up.weight: (width, width)}

    def activate(self, gate: torch.Tensor) -> torch.Tensor:
        """The function applied to the gate before the product."""
        raise NotImplementedError

    def nonlinearity(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return self.activate(gate) * up

    def forward(
        self, x: torch.Tensor, *groups, attn_inputs: AttentionInputs | None = None
    ) -> tuple[torch.Tensor, AuxOutput]:
        hidden = self.after_canon(self.gate_up(x, *groups), attn_inputs)
        return self.activate_and_project(hidden, *groups), AuxOutput(0.0, {})


@FFN_REGISTRY.register('swiglu', source='Shazeer 2020')
class SwiGLU(GatedFeedForward):
    """down(silu(gate(x)) · up(x)), by default 8/3 · n_embd wide: as many weights as `standard`."""

    tag = 'SwiGLU'

    def activate(self, gate: torch.Tensor) -> torch.Tensor:
        return F.silu(gate)


@FFN_REGISTRY.register('clamped_swiglu', source='gpt-oss: OpenAI 2025')
class ClampedSwiGLU(GatedFeedForward):
    """down(g · sigmoid(α g) · (u + 1)), with g = gate(x) at most c and u = up(x) from -c to c."""

    options: ClassVar = {
        **GatedFeedForward.options,
        'swiglu_limit': Option(
            float,
            7.0,
            'Bound c of the gate and the up-projection of clamped_swiglu',
            check=above(0),
        ),
        'swiglu_alpha': Option(
            float, 1.702, 'Factor α in the sigmoid of clamped_swiglu', check=above(0)
        ),
    }

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        alpha = '' if config.swiglu_alpha == 1.702 else f'a{config.swiglu_alpha:g}'
        return f'SwiGLUc{config.swiglu_limit:g}{alpha}'

    def nonlinearity(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        limit = self.config.swiglu_limit
        up = up.clamp(-limit, limit)
        return self.activate(gate.clamp(max=limit)) * (up + 1)

    def activate(self, gate: torch.Tensor) -> torch.Tensor:
        return gate * torch.sigmoid(self.config.swiglu_alpha * gate)


@FFN_REGISTRY.register('geglu', source='Shazeer 2020')
class GEGLU(GatedFeedForward):
    """down(gelu(gate(x)) · up(x)), as wide as SwiGLU."""

    tag = 'GEGLU'
    options: ClassVar = {
        **GatedFeedForward.options,
        'geglu_tanh': Option(bool, False, "Use GELU's tanh approximation in GEGLU (Gemma)"),
    }

    def activate(self, gate: torch.Tensor) -> torch.Tensor:
        return F.gelu(gate, approximate='tanh' if self.config.geglu_tanh else 'none')


@FFN_REGISTRY.register('reglu', source='Shazeer 2020')
class ReGLU(GatedFeedForward):
    """down(relu(gate(x)) · up(x)), as wide as SwiGLU."""

    tag = 'ReGLU'

    def activate(self, gate: torch.Tensor) -> torch.Tensor:
        return F.relu(gate)


@FFN_REGISTRY.register('glu', source='Dauphin et al. 2017; Shazeer 2020')
class GLU(GatedFeedForward):
    """down(sigmoid(gate(x)) · up(x)), as wide as SwiGLU."""

    tag = 'GLU'

    def activate(self, gate: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(gate)


@FFN_REGISTRY.register('bilinear', source='Mnih & Hinton 2007; Shazeer 2020')
class Bilinear(GatedFeedForward):
    """down(gate(x) · up(x)), a gate without an activation; as wide as SwiGLU."""

    tag = 'Bilinear'

    def activate(self, gate: torch.Tensor) -> torch.Tensor:
        return gate


@FFN_REGISTRY.register('none', source='Mamba: Gu & Dao 2023; Nemotron-H: NVIDIA 2025')
class NoFeedForward(FeedForward):
    """No feed-forward network: the layer is a mixer alone."""

    tag = 'NoFFN'
    options: ClassVar = {}

    @classmethod
    def build(cls, config: ModelArchitectureConfig, layer: int) -> None:
        return None

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        return {}

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, AuxOutput]:
        raise NotImplementedError
