"""RG-LRU: a gated linear recurrence of single numbers (De et al. 2024, Griffin)."""

from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.registry import FrozenConfig, Option, at_least
from components.attention_inputs import AttentionInputs
from components.base import Fill, Initial, at_least_fp32, without_autocast
from components.document_mask import DOCUMENT_OPTIONS
from components.mixers import Mixer, largest_divisor
from components.scan import linear_scan
from components.short_convolution import ShortConvolution
from model_config import MIXER_REGISTRY, ModelArchitectureConfig

DECAY_SCALE = 8.0  # c of the paper
DECAY_RANGE = 0.9, 0.999  # of a^c at the start of training
LARGEST_SLOPE = 1000.0  # of the square root in the scale of the input


@MIXER_REGISTRY.register('rg_lru', source='De et al. 2024 (Griffin)')
class RGLRU(Mixer):
    """Recurrent block of Griffin: a gated linear recurrence beside a GELU branch.

    x is projected, passes a causal convolution, and enters h_t = a_t h_(t-1) + √(1 - a_t²) i_t x_t,
    with gates r_t and i_t from block-diagonal projections of x_t, and a_t = σ(Λ)^(8 r_t). The
    output is projected from h_t · gelu(y_t), with y another projection of the input. Defaults are
    those of RecurrentGemma; the first token of a document enters without the factor √(1 - a²).
    """

    tag = 'RGLRU'
    cacheable = True
    mup_rule = True
    options: ClassVar = {
        'rg_lru_width': Option(
            int | None, None, 'Number of states of the RG-LRU; None: n_embd', check=at_least(1)
        ),
        'rg_lru_heads': Option(
            int | None,
            None,
            "Blocks of the RG-LRU's gates, a divisor of rg_lru_width; None: n_head",
            check=at_least(1),
        ),
        'rg_lru_conv_size': Option(
            int, 4, "Tokens that the RG-LRU's convolution sees", check=at_least(1)
        ),
        'rg_lru_bias': Option(
            bool | None, None, 'Use biases in the projections of the RG-LRU; None: bias'
        ),
        **DOCUMENT_OPTIONS,
    }

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        return {
            'rg_lru_width': (config.n_embd, 'n_embd'),
            'rg_lru_heads': (config.n_head, 'n_head'),
            'rg_lru_bias': (config.bias, 'bias'),
            **super().derived_values(config),
        }

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        width, heads = config.rg_lru_width, config.rg_lru_heads
        if width % heads == 0:
            return []
        divisor = largest_divisor(width, heads)
        return [
            f'rg_lru_heads={heads} does not divide rg_lru_width={width}. Use --rg_lru_heads='
            f'{divisor}, or set rg_lru_width to a multiple.'
        ]

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        tag = cls.tag
        if config.rg_lru_width != config.n_embd:
            tag += f'-W{config.rg_lru_width}'
        if config.rg_lru_heads != config.n_head:
            tag += f'-H{config.rg_lru_heads}'
        return tag

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        width, heads, bias = config.rg_lru_width, config.rg_lru_heads, config.rg_lru_bias
        self.linear_y = nn.Linear(config.n_embd, width, bias=bias)
        self.linear_x = nn.Linear(config.n_embd, width, bias=bias)
        self.conv = ShortConvolution(width, config.rg_lru_conv_size, bias=True)
        block = (heads, width // heads, width // heads)  # block, inputs, outputs
        self.input_gate_weight = nn.Parameter(torch.empty(block))
        self.input_gate_bias = nn.Parameter(torch.empty(block[:2]))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(block))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(block[:2]))
        self.recurrent_param = nn.Parameter(torch.empty(width))  # -Λ
        self.linear_out = nn.Linear(width, config.n_embd, bias=bias)

    def forward(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        gate = F.gelu(self.linear_y(x), approximate='tanh')
        x = self.conv(self.linear_x(x), attn_inputs.starts, attn_inputs.cache)
        # (B, T, W), the gates' logits.
        inputs = self._block_diagonal(x, self.input_gate_weight)
        decays = self._block_diagonal(x, self.recurrent_gate_weight)
        with without_autocast(x.device):
            wide, inputs, decays = map(at_least_fp32, (x, inputs, decays))
            h = self._recurrence(wide, inputs, decays, attn_inputs)
        return self.linear_out(h.to(x.dtype) * gate)

    def _block_diagonal(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(B, T, W) -> (B, T, W), each head's part times its own matrix."""
        heads = x.unflatten(-1, weight.shape[:2]).transpose(1, 2)  # (B, H, T, W / H)
        return torch.matmul(heads, weight).transpose(1, 2).flatten(2)

    def _recurrence(
        self,
        x: torch.Tensor,
        inputs: torch.Tensor,
        decays: torch.Tensor,
        attn_inputs: AttentionInputs,
    ) -> torch.Tensor:
        """The states of x (B, T, W), with the logits of both gates before their biases."""
        cache, dtype = attn_inputs.cache, x.dtype
        before = cache.get('state') if cache else None
        # 1. a = σ(Λ)^(8 r), in logarithms.
        r = torch.sigmoid(decays + self.recurrent_gate_bias.to(dtype).flatten())
        log_a = -DECAY_SCALE * r * F.softplus(self.recurrent_param.to(dtype))
        a = log_a.exp()
        # 2. The input, scaled so that the states keep the variance of x.
        scale = _BoundedSqrt.apply(-torch.expm1(2 * log_a))
        begins = _begins(x, attn_inputs.starts, before)
        if begins is not None:
            a, scale = a.masked_fill(begins, 0.0), scale.masked_fill(begins, 1.0)
        x = x * torch.sigmoid(inputs + self.input_gate_bias.to(dtype).flatten()) * scale
        # 3. The states.
        h = linear_scan(a, x, x.new_zeros(x[:, 0].shape) if before is None else before)
        if cache:
            cache.set('state', h[:, -1])
        return h

    def flops(self, seq_len: int, causal: bool) -> dict[str, float]:
        """Of the projections, the gates' blocks included; with `causal`, 2 per token and state for
        h = a · h + b. The scan has no matrix product.
        """
        gates = 2.0 * (self.input_gate_weight.numel() + self.recurrent_gate_weight.numel())
        counted = super().flops(seq_len, causal)
        counted[self.flops_part] += gates * seq_len
        states = 2.0 * self.recurrent_param.numel() * seq_len if causal else 0.0
        return {**counted, 'mixer_states': states}

    def matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        gates = self.input_gate_weight, self.recurrent_gate_weight
        return {**super().matrices(), **{gate: (gate.size(1),) for gate in gates}}

    def residual_weights(self) -> list[torch.Tensor]:
        return [self.linear_out.weight]

    def undecayed(self) -> list[torch.Tensor]:
        return [self.input_gate_bias, self.recurrent_gate_bias]

    def initial_values(self) -> dict[str, Fill]:
        """Λ so that a^c = σ(Λ)^8 is uniform in DECAY_RANGE (section 2.4); gates as of LeCun."""
        gates = Initial.normal(self.input_gate_weight.size(1) ** -0.5)
        return {
            'input_gate_weight': gates,
            'input_gate_bias': Initial.zeros,
            'recurrent_gate_weight': gates,
            'recurrent_gate_bias': Initial.zeros,
            'recurrent_param': _uniform_decays,
        }


class _BoundedSqrt(torch.autograd.Function):
    """√x, with a slope of at most LARGEST_SLOPE: it is infinite at 0, where a = 1."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        root = x.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (root,) = ctx.saved_tensors
        return grad * (0.5 / root).clamp(max=LARGEST_SLOPE)


def _begins(
    x: torch.Tensor, starts: torch.Tensor | None, before: torch.Tensor | None
) -> torch.Tensor | None:
    """(B, T, 1): the first tokens, of a document or of all; None if there is none."""
    if starts is not None:
        return starts.unsqueeze(-1)
    if before is not None:
        return None
    return (torch.arange(x.size(1), device=x.device) == 0)[None, :, None]


def _uniform_decays(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """-Λ, from a^c: softplus(-Λ) = -log σ(Λ) = -log(a^c) / c."""
    low, high = DECAY_RANGE
    decay = tensor.uniform_(low, high, generator=generator).log() / -DECAY_SCALE
    tensor.copy_(torch.log(torch.expm1(decay)))
