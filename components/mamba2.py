"""Mamba-2: a selective state space with one decay per head."""

import math
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.registry import FrozenConfig, Option, above, at_least
from components.attention_inputs import AttentionInputs
from components.base import Fill, Initial, at_least_fp32, without_autocast
from components.document_mask import DOCUMENT_OPTIONS
from components.gated_norm import GatedRMSNorm
from components.mixer_kernels import (
    BACKEND_OPTIONS,
    SSD_CHUNK,
    backend_tag,
    run_kernel,
    runs_here,
)
from components.mixers import Mixer, largest_divisor
from components.short_convolution import ShortConvolution
from components.state_space_duality import CHUNK, Inputs, matrix_flops, state_space_duality
from model_config import MIXER_REGISTRY, ModelArchitectureConfig

MOST_HEAD_DIMS = 64  # of a derived head dimension
STEPS = (1e-3, 0.1)  # initial range of the step sizes
RATES = (1.0, 16.0)  # initial range of the rates of decay


@MIXER_REGISTRY.register('mamba2', source='Dao & Gu 2024')
class Mamba2(Mixer):
    """Selective state space whose heads have one decay each, computed in chunks (SSD).

    Of each token, one projection gives a gate z, x, keys and queries (B and C of the paper), and a
    step size of each head; x, keys and queries pass a short convolution and SiLU. With Δ =
    softplus(step + dt_bias) and A = -exp(A_log), a head has the state (Dao & Gu 2024, section 7)

        S_t = exp(Δ_t A) S_(t-1) + Δ_t B_t x_tᵀ        y_t = S_tᵀ C_t + D x_t

    The output projection follows RMSNorm(y · silu(z)), normalized in each group, or y · silu(z).

    The published models have heads of 64 and a state of 128. Where n_embd / n_head is less than 64,
    so are the heads; the state is always twice as large as a head.
    """

    tag = 'Mamba2'
    kernels: ClassVar = {'mamba_ssm': 'state_space_duality'}
    cacheable = True
    mup_rule = True
    options: ClassVar = {
        'mamba2_width': Option(
            int | None, None, 'Width of all heads together; None: 2 · n_embd', check=at_least(1)
        ),
        'mamba2_head_dim': Option(
            int | None,
            None,
            'Head dimension, a divisor of mamba2_width; None: n_embd / n_head, at most '
            f'{MOST_HEAD_DIMS}',
            check=at_least(1),
        ),
        'mamba2_state_size': Option(
            int | None,
            None,
            "Dimensions of a head's keys and queries; None: 2 · mamba2_head_dim",
            check=at_least(1),
        ),
        'mamba2_groups': Option(
            int,
            1,
            'Groups of heads that share keys and queries, and are normalized alone',
            check=at_least(1),
        ),
        'mamba2_conv_size': Option(
            int, 4, 'Tokens that the short convolution spans', check=at_least(1)
        ),
        'mamba2_conv_bias': Option(bool, True, 'Use a bias in the short convolution'),
        'mamba2_proj_bias': Option(bool, False, 'Use biases in the projections'),
        'mamba2_norm': Option(bool, True, 'Normalize the gated output'),
        'mamba2_norm_first': Option(
            bool, False, 'Normalize before the gate', requires=('mamba2_norm', True)
        ),
        'mamba2_norm_eps': Option(
            float,
            1e-5,
            'Epsilon of the norm of the gated output',
            check=above(0),
            requires=('mamba2_norm', True),
        ),
        'mamba2_dt_min': Option(float, 0.0, 'Lower limit of the step sizes', check=at_least(0)),
        'mamba2_dt_max': Option(
            float | None, None, 'Upper limit of the step sizes; None: none', check=above(0)
        ),
        **BACKEND_OPTIONS,
        **DOCUMENT_OPTIONS,
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        width, self.head_dim = config.mamba2_width, config.mamba2_head_dim
        self.groups, self.state = config.mamba2_groups, config.mamba2_state_size
        self.heads, keys = width // self.head_dim, self.groups * self.state
        self.step_limits = config.mamba2_dt_min, config.mamba2_dt_max
        self.rows = (width, width, keys, keys, self.heads)  # z, x, keys, queries, steps
        self.in_proj = nn.Linear(config.n_embd, sum(self.rows), bias=config.mamba2_proj_bias)
        self.conv = ShortConvolution(
            width + 2 * keys, config.mamba2_conv_size, config.mamba2_conv_bias
        )
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = None
        if config.mamba2_norm:
            self.norm = GatedRMSNorm(
                width,
                config.mamba2_norm_eps,
                group=width // self.groups,
                gate_first=not config.mamba2_norm_first,
            )
        self.out_proj = nn.Linear(width, config.n_embd, bias=config.mamba2_proj_bias)

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        width = config.mamba2_width or 2 * config.n_embd
        most = max(1, min(MOST_HEAD_DIMS, config.n_embd // config.n_head))
        head_dim = largest_divisor(width, most)
        reason = f'the largest divisor of mamba2_width up to n_embd / n_head and {MOST_HEAD_DIMS}'
        return {
            'mamba2_width': (width, '2 · n_embd'),
            'mamba2_head_dim': (head_dim, reason),
            'mamba2_state_size': (2 * (config.mamba2_head_dim or head_dim), '2 · mamba2_head_dim'),
        }

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        width, head_dim = config.mamba2_width, config.mamba2_head_dim
        tags = [cls.tag]
        if width != 2 * config.n_embd:
            tags.append(f'W{width}')
        if head_dim != min(MOST_HEAD_DIMS, config.n_embd // config.n_head):
            tags.append(f'HD{head_dim}')
        if config.mamba2_state_size != 2 * head_dim:
            tags.append(f'State{config.mamba2_state_size}')
        if config.mamba2_groups != 1:
            tags.append(f'Groups{config.mamba2_groups}')
        if config.mamba2_conv_size != 4:
            tags.append(f'Conv{config.mamba2_conv_size}')
        if not config.mamba2_norm:
            tags.append('NoNorm')
        elif config.mamba2_norm_first:
            tags.append('NormFirst')
        return '-'.join(tags) + backend_tag(config)

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        width, head_dim = config.mamba2_width, config.mamba2_head_dim
        groups = config.mamba2_groups
        least, largest = config.mamba2_dt_min, config.mamba2_dt_max
        problems = []
        if width % head_dim:
            problems.append(
                f'mamba2_head_dim={head_dim} does not divide mamba2_width={width}. Set a '
                f'--mamba2_head_dim that does, such as {largest_divisor(width, head_dim)}.'
            )
        elif (width // head_dim) % groups:
            heads = width // head_dim
            problems.append(
                f'mamba2_groups={groups} does not divide the {heads} heads, mamba2_width={width} '
                f'/ mamba2_head_dim={head_dim}. Set a divisor, such as '
                f'--mamba2_groups={largest_divisor(heads, groups)}.'
            )
        if largest is not None and largest < least:
            problems.append(
                f'mamba2_dt_max={largest:g} is below mamba2_dt_min={least:g}. Set a '
                f'larger --mamba2_dt_max, or leave it out.'
            )
        return problems

    def forward(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        starts, cache = attn_inputs.starts, attn_inputs.cache
        width, _, keys, _, heads = self.rows
        gate, mixed, steps = self.in_proj(x).split((width, width + 2 * keys, heads), dim=-1)
        mixed = F.silu(self.conv(mixed, starts, cache))
        with without_autocast(x.device):
            inputs, state = self.recurrence(mixed, steps), cache.get('state') if cache else None
            if runs_here(self.kernel, mixed, cache, starts):
                y = self._run_kernel(inputs, mixed.dtype, starts)
            else:
                y, state = state_space_duality(inputs, self.D, state, starts, cache is not None)
        if cache is not None:
            cache.set('state', state)
        return self.out_proj(self.gated(y.flatten(2).to(x.dtype), gate))

    def recurrence(self, mixed: torch.Tensor, steps: torch.Tensor) -> Inputs:
        """Inputs of the recurrence from x, keys and queries (B, T, ...) and the steps of heads
        (B, T, H) before softplus; in fp32, or the dtype of the inputs if that is wider."""
        steps = F.softplus(at_least_fp32(steps) + self.dt_bias).clamp(*self.step_limits)
        values, keys, queries = at_least_fp32(mixed).split(self.rows[1:4], dim=-1)
        return Inputs(
            values.unflatten(-1, (self.heads, -1)),
            steps,
            -steps * at_least_fp32(self.A_log).exp(),
            keys.unflatten(-1, (self.groups, -1)),
            queries.unflatten(-1, (self.groups, -1)),
        )

    def _run_kernel(self, inputs: Inputs, dtype: torch.dtype, starts: torch.Tensor | None):
        """y (B, T, H, P). dtype: of values, keys and queries; steps and rates stay in fp32."""
        assert self.kernel is not None
        x, keys, queries = (each.to(dtype) for each in (inputs.x, inputs.keys, inputs.queries))
        rates, skip = -at_least_fp32(self.A_log).exp(), at_least_fp32(self.D)
        documents = () if starts is None else (starts.cumsum(dim=1, dtype=torch.int32),)
        return run_kernel(self.kernel, x, inputs.steps, rates, keys, queries, skip, *documents)

    def gated(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """(B, T, width) -> the same shape."""
        return y * F.silu(gate) if self.norm is None else self.norm(y, gate)

    def flops(self, seq_len: int, causal: bool) -> dict[str, float]:
        """FLOPs of the projections, and of the states: N · P multiply-adds per head and token for
        the update of a state (N, P) and as many for reading it, or the products that run."""
        if causal:
            states = 4.0 * seq_len * self.heads * self.head_dim * self.state
        else:
            sizes = self.heads, self.head_dim, self.groups, self.state
            states = matrix_flops(seq_len, *sizes, SSD_CHUNK if self.kernel else CHUNK)
        return {**super().flops(seq_len, causal), 'mixer_states': states}

    def initial_values(self) -> dict[str, Fill]:
        """As in the authors' implementation: step sizes whose logarithms are uniform, rates of
        decay that are uniform."""
        return {'dt_bias': _initial_steps, 'A_log': _initial_rates, 'D': Initial.ones}

    def residual_weights(self) -> list[torch.Tensor]:
        return [self.out_proj.weight]

    def matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        return {**super().matrices(), self.in_proj.weight: self.rows}


def _initial_steps(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """The inverse of softplus of step sizes Δ: log(exp(Δ) - 1)."""
    low, high = map(math.log, STEPS)
    steps = tensor.uniform_(low, high, generator=generator).exp()
    tensor.copy_(steps + (-torch.expm1(-steps)).log())


def _initial_rates(tensor: torch.Tensor, generator: torch.Generator) -> None:
    tensor.uniform_(*RATES, generator=generator).log_()
