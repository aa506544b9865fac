"""Mamba: a selective state space with a diagonal state matrix (Gu & Dao 2023)."""

import math
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.registry import AnyBut, FrozenConfig, Option, above, at_least
from components.attention_inputs import AttentionInputs
from components.base import Component, Fill, Initial, at_least_fp32, without_autocast
from components.document_mask import DOCUMENT_OPTIONS
from components.mixer_kernels import BACKEND_OPTIONS, backend_tag, run_kernel, runs_here
from components.mixers import Mixer
from components.scan import selective_scan
from components.short_convolution import ShortConvolution
from model_config import MIXER_REGISTRY, ModelArchitectureConfig

# Range of the steps dt at the start of training, log-uniform, and the least one.
DT_RANGE = 1e-3, 1e-1
DT_FLOOR = 1e-4


@MIXER_REGISTRY.register('mamba', source='Gu & Dao 2023; norms: Jamba, Lieber et al. 2024')
class Mamba(Mixer):
    """Selective state space: N states for each of `mamba_expand` · n_embd channels.

    x and z are projected from the input; x passes a causal convolution and SiLU, and gives the
    step dt of each channel, B and C. Then h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t, and the output
    is projected from (C_t · h_t + D x_t) · silu(z_t). Defaults are those of the paper.
    """

    tag = 'Mamba'
    kernels: ClassVar = {'mamba_ssm': 'selective_scan'}
    cacheable = True
    options: ClassVar = {
        'mamba_expand': Option(int, 2, 'Number of channels of Mamba per n_embd', check=at_least(1)),
        'mamba_state_size': Option(int, 16, 'States of a channel of Mamba', check=at_least(1)),
        'mamba_conv_size': Option(
            int, 4, "Tokens that Mamba's convolution sees", check=at_least(1)
        ),
        'mamba_dt_rank': Option(
            int | None,
            None,
            "Rank of the projection of Mamba's steps dt; None: n_embd / 16, rounded up",
            check=at_least(1),
        ),
        'mamba_conv_bias': Option(bool, True, "Use a bias in Mamba's convolution"),
        'mamba_proj_bias': Option(bool, False, 'Use biases in the projections in and out of Mamba'),
        'mamba_norm': Option(
            str,
            'none',
            'RMS norms of dt, B and C of Mamba: none, with learned weights (Jamba), or without '
            'weights (FalconMamba)',
            choices=('none', 'weighted', 'unweighted'),
        ),
        'mamba_norm_eps': Option(
            float,
            1e-6,
            'Epsilon of the norms of dt, B and C',
            check=above(0),
            requires=('mamba_norm', AnyBut('none')),
        ),
        **BACKEND_OPTIONS,
        **DOCUMENT_OPTIONS,
    }

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        rank = math.ceil(config.n_embd / 16)
        return {'mamba_dt_rank': (rank, 'n_embd / 16'), **super().derived_values(config)}

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        if config.mamba_norm == 'none':
            return []
        return [
            f'mamba_norm={config.mamba_norm!r} with {key}=1 leaves only the sign of a number. Use '
            f'--{key}=2 or more, or --mamba_norm=none.'
            for key in ('mamba_dt_rank', 'mamba_state_size')
            if config.get(key) == 1
        ]

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        tag = cls.tag
        if config.mamba_expand != 2:
            tag += f'x{config.mamba_expand}'
        if config.mamba_state_size != 16:
            tag += f'-N{config.mamba_state_size}'
        if config.mamba_norm != 'none':
            tag += {'weighted': '-Norm', 'unweighted': '-NormNW'}[config.mamba_norm]
        return tag + backend_tag(config)

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        width, states = config.mamba_expand * config.n_embd, config.mamba_state_size
        self.sizes = (config.mamba_dt_rank, states, states)  # of dt, B and C
        bias = config.mamba_proj_bias
        self.in_proj = nn.Linear(config.n_embd, 2 * width, bias=bias)
        self.conv = ShortConvolution(width, config.mamba_conv_size, config.mamba_conv_bias)
        self.x_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(config.mamba_dt_rank, width)
        self.A_log = nn.Parameter(torch.empty(width, states))
        self.D = nn.Parameter(torch.empty(width))
        self.out_proj = nn.Linear(width, config.n_embd, bias=bias)
        self.norms = nn.ModuleList()
        if config.mamba_norm != 'none':
            weighted, eps = config.mamba_norm == 'weighted', config.mamba_norm_eps
            self.norms.extend(_StateNorm(size, eps, weighted) for size in self.sizes)

    def forward(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        cache, starts = attn_inputs.cache, attn_inputs.starts
        # 1. Project, and convolve x.
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv(x, starts, cache))
        # 2. The step of each channel, and B and C, which channels share.
        parts = self.x_proj(x).split(self.sizes, dim=-1)
        if self.norms:
            parts = tuple(norm(part) for norm, part in zip(self.norms, parts))
        low_rank, b, c = parts
        dt = F.linear(low_rank, self.dt_proj.weight)
        # 3. The states, and what is read from them.
        with without_autocast(x.device):
            wide, dt, b, c = map(at_least_fp32, (x, dt, b, c))
            y = self._scan(wide, dt, b, c, attn_inputs)
            y = y * F.silu(at_least_fp32(z))
        return self.out_proj(y.to(x.dtype))

    def _scan(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        attn_inputs: AttentionInputs,
    ) -> torch.Tensor:
        """x, dt before its bias (B, T, D), b, c (B, T, N) -> C · h + D x, (B, T, D)."""
        cache, starts = attn_inputs.cache, attn_inputs.starts
        dt = F.softplus(dt + self.dt_proj.bias.to(x.dtype))
        decay = -torch.exp(self.A_log.to(x.dtype)).t().contiguous()  # (N, D)
        if runs_here(self.kernel, x, cache, starts):
            assert self.kernel is not None
            return run_kernel(self.kernel, x, dt, decay, b, c) + self.D * x
        initial = cache.get('state') if cache else None
        if initial is None:
            initial = x.new_zeros(x.size(0), *decay.shape)
        keep = None if starts is None else (~starts).to(x.dtype)
        y, state = selective_scan(x, dt, decay, b, c, initial, keep)
        if cache:
            cache.set('state', state)
        return y + self.D * x

    def flops(self, seq_len: int, causal: bool) -> dict[str, float]:
        """Of the projections, and per token and element of the state: 2 to read it, y = C · h,
        which is the one matrix product that runs; with `causal`, 2 more to update it by dt x B, as
        in mixers whose state is updated by an outer product. Decays, element by element, are
        counted in none of them.
        """
        of_element = 4.0 if causal else 2.0
        states = of_element * self.A_log.numel() * seq_len
        return {**super().flops(seq_len, causal), 'mixer_states': states}

    def matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        halves = (self.in_proj.out_features // 2,) * 2
        return {**super().matrices(), self.in_proj.weight: halves, self.x_proj.weight: self.sizes}

    def residual_weights(self) -> list[torch.Tensor]:
        return [self.out_proj.weight]

    def undecayed(self) -> list[torch.Tensor]:
        return [self.A_log]

    def initial_values(self) -> dict[str, Fill]:
        """A = -1, ..., -N in each channel (S4D-real), D = 1, and steps dt from 0.001 to 0.1."""
        bound = self.dt_proj.in_features**-0.5
        return {
            'A_log': _count_from_one,
            'D': Initial.ones,
            'dt_proj.weight': Initial.uniform(bound),
            'dt_proj.bias': _log_uniform_steps,
        }


class _StateNorm(Component, nn.Module):
    """RMS norm of the last dimension, in fp32, with or without a weight."""

    def __init__(self, width: int, eps: float, weighted: bool):
        super().__init__()
        self.width, self.eps = (width,), eps
        self.weight = nn.Parameter(torch.empty(width)) if weighted else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else at_least_fp32(self.weight)
        return F.rms_norm(at_least_fp32(x), self.width, weight, self.eps).to(x.dtype)

    def initial_values(self) -> dict[str, Fill]:
        return {'weight': Initial.ones}


def _count_from_one(tensor: torch.Tensor, generator: torch.Generator) -> None:
    tensor.copy_(torch.arange(1.0, tensor.size(1) + 1).log())


def _log_uniform_steps(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Biases whose softplus is log-uniform in DT_RANGE."""
    low, high = map(math.log, DT_RANGE)
    dt = tensor.uniform_(low, high, generator=generator).exp().clamp(min=DT_FLOOR)
    tensor.copy_(dt + torch.log(-torch.expm1(-dt)))
