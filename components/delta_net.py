"""Mixers whose state follows the delta rule: DeltaNet, Gated DeltaNet, Kimi Delta Attention."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.registry import FrozenConfig, Option, above, at_least
from components.attention_inputs import AttentionInputs
from components.base import Fill, Initial, at_least_fp32, recomputed, without_autocast
from components.delta_rule import LOWEST_LOG_DECAY, chunk_flops, delta_rule, recurrent_flops
from components.document_mask import DOCUMENT_OPTIONS
from components.gated_norm import GatedRMSNorm
from components.mixer_kernels import BACKEND_OPTIONS, backend_tag, run_kernel, runs_here
from components.mixers import Mixer
from components.short_convolution import ShortConvolution
from model_config import MIXER_REGISTRY, ModelArchitectureConfig

# Tokens of which the backward pass holds all intermediate values at once; a multiple of chunks.
SEGMENT = 1024
L2_EPS = 1e-6  # added to the square of the norm of queries and keys
# In names, where a value differs from the derived one.
_SIZE_TAGS = {
    'gdn_heads': 'H',
    'gdn_value_heads': 'VH',
    'gdn_head_dim': 'D',
    'gdn_v_head_dim': 'DV',
}


class DeltaRuleMixer(Mixer):
    """The delta rule (see `components/delta_rule.py`) between projections, with these options.

    Queries, keys and values pass a short convolution and silu; queries and keys are normalized to
    length 1, queries then divided by √`gdn_head_dim`. β is the sigmoid of a projection, or twice
    that with negative eigenvalues. The output of each head is normalized, and gated unless
    `gdn_gate=False`. There are no biases. A subclass makes the decay and the gate.
    """

    cacheable = True
    # Defaults of gdn_head_dim · gdn_heads / n_embd, of the width of values / that of keys, and of
    # gdn_gate.
    key_width: ClassVar[float] = 1.0
    value_expansion: ClassVar[float] = 1.0
    has_gate: ClassVar[bool] = True
    per_channel: ClassVar[bool] = False  # whether each channel of a key has a decay
    options: ClassVar = {
        'gdn_heads': Option(
            int | None, None, 'Heads of queries and keys; None: n_head', check=at_least(1)
        ),
        'gdn_value_heads': Option(
            int | None,
            None,
            'Heads of values, a multiple of gdn_heads; each has a state; None: gdn_heads',
            check=at_least(1),
        ),
        'gdn_head_dim': Option(
            int | None,
            None,
            'Dimensions of a query or key head; None: n_embd / gdn_heads, times 0.75 in '
            'gated_deltanet',
            check=at_least(1),
        ),
        'gdn_v_head_dim': Option(
            int | None,
            None,
            'Dimensions of a value head; None: all values are as wide as all keys, in '
            'gated_deltanet twice as wide',
            check=at_least(1),
        ),
        'gdn_conv_size': Option(
            int,
            4,
            'Tokens in the short convolution of queries, keys and values; 0: none',
            check=at_least(0),
        ),
        'gdn_negative_eigenvalues': Option(
            bool, False, 'Let β reach 2 instead of 1, so that a state can change signs'
        ),
        'gdn_gate': Option(
            bool | None, None, 'Gate the output of heads; None: yes, but not in deltanet'
        ),
        'gdn_norm_eps': Option(float, 1e-5, 'Epsilon of the norm of the output', check=above(0)),
        **BACKEND_OPTIONS,
        **DOCUMENT_OPTIONS,
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        self.key_heads, self.heads = config.gdn_heads, config.gdn_value_heads
        self.k_dim, self.v_dim = config.gdn_head_dim, config.gdn_v_head_dim
        self.largest_beta = 2.0 if config.gdn_negative_eigenvalues else 1.0
        keys, values = self.key_heads * self.k_dim, self.heads * self.v_dim
        # Rows of the projection: queries, keys, values; β; decay; gate.
        self.qkv_rows = keys, keys, values
        rest = self.heads, self.decay_rows(config), self.gate_rows(config)
        self.rows = sum(self.qkv_rows), *rest
        self.input = nn.Linear(config.n_embd, sum(self.rows), bias=False)
        width = config.gdn_conv_size
        self.convolution = ShortConvolution(self.rows[0], width) if width else None
        self.norm = GatedRMSNorm(self.v_dim, config.gdn_norm_eps, activate=self.activate_gate)
        self.output = nn.Linear(values, config.n_embd, bias=False)

    activate_gate = staticmethod(F.silu)

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        heads = config.gdn_heads or config.n_head
        value_heads = config.gdn_value_heads or heads
        k_dim = config.gdn_head_dim or max(1, round(cls.key_width * config.n_embd / heads))
        v_dim = max(1, round(cls.value_expansion * heads * k_dim / value_heads))
        return {
            'gdn_heads': (heads, 'n_head'),
            'gdn_value_heads': (value_heads, 'gdn_heads'),
            'gdn_head_dim': (k_dim, f'{cls.key_width:g} · n_embd / gdn_heads'),
            'gdn_v_head_dim': (v_dim, f'{cls.value_expansion:g} times the width of keys'),
            'gdn_gate': (cls.has_gate, f'default of {config.mixer}'),
        }

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        heads, value_heads = config.gdn_heads, config.gdn_value_heads
        problems = cls._differing_defaults(config)
        if value_heads % heads:
            problems.append(
                f'gdn_value_heads={value_heads} is no multiple of gdn_heads={heads}. Use '
                f'--gdn_value_heads={-(-value_heads // heads) * heads}.'
            )
        return problems

    @classmethod
    def _differing_defaults(cls, config: ModelArchitectureConfig) -> list[str]:
        """Options that are not set, and whose defaults differ between these mixers of a layer."""
        chosen = MIXER_REGISTRY.components(config.mixer).items()
        family = {name: each for name, each in chosen if issubclass(each, DeltaRuleMixer)}
        values, problems = config.to_dict(), []
        for key in cls.derived_values(config):
            unset = FrozenConfig({**values, key: None}, {})
            defaults = {name: each.derived_values(unset)[key][0] for name, each in family.items()}
            if config.origins[key].startswith('derived') and len({*defaults.values()}) > 1:
                listed = ' and '.join(f'{value} in {name}' for name, value in defaults.items())
                problems.append(
                    f'mixer={config.mixer!r}: the mixers share {key}, and its default is {listed}. '
                    f'Set --{key}.'
                )
        return problems

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        tags, values = [cls.tag], config.to_dict()
        for key, tag in _SIZE_TAGS.items():
            derived, _ = cls.derived_values(FrozenConfig({**values, key: None}, {}))[key]
            if values[key] != derived:
                tags.append(f'{tag}{values[key]}')
        if config.gdn_conv_size != 4:
            tags.append(f'Conv{config.gdn_conv_size}')
        if config.gdn_negative_eigenvalues:
            tags.append('Neg')
        if config.gdn_gate != cls.has_gate:
            tags.append('Gate' if config.gdn_gate else 'NoGate')
        return '-'.join(tags) + backend_tag(config)

    @classmethod
    def decay_rows(cls, config: ModelArchitectureConfig) -> int:
        """Width of the projection for the decay."""
        return 0

    @classmethod
    def gate_rows(cls, config: ModelArchitectureConfig) -> int:
        """Width of the projection for the gate."""
        return config.gdn_value_heads * config.gdn_v_head_dim if config.gdn_gate else 0

    def log_decay(self, projected: torch.Tensor) -> torch.Tensor | None:
        """From the projection (B, T, decay_rows): (B, T, H), or (B, T, H, Dk) per channel."""
        return None

    def gate(self, projected: torch.Tensor) -> torch.Tensor | None:
        """From the projection (B, T, gate_rows): (B, T, H, Dv), before its activation."""
        return projected.unflatten(-1, (self.heads, self.v_dim)) if self.rows[-1] else None

    def forward(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        starts, cache = attn_inputs.starts, attn_inputs.cache
        mixed, beta, decay, gate = self.input(x).split(self.rows, dim=-1)
        if self.convolution is not None:
            mixed = self.convolution(mixed, starts, cache)
        state = None if cache is None else cache.get('state')
        outputs = []
        by_token = mixed, beta, self.log_decay(decay), starts
        by_kernel = runs_here(self.kernel, mixed, cache, starts)
        tokens = mixed.size(1)
        size = tokens if by_kernel else SEGMENT
        for segment in zip(*(_segments(x, tokens, size) for x in by_token)):
            y, state = recomputed(self.apply_rule, *segment, state, by_kernel)
            outputs.append(y)
        if cache is not None:
            cache.set('state', state)
        return self.output(self.norm(torch.cat(outputs, dim=1), self.gate(gate)).flatten(2))

    def apply_rule(
        self,
        mixed: torch.Tensor,
        beta: torch.Tensor,
        log_decay: torch.Tensor | None,
        starts: torch.Tensor | None,
        state: torch.Tensor | None,
        by_kernel: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """mixed: queries, keys and values (B, T, their rows) before silu; beta (B, T, H) before the
        sigmoid -> outputs (B, T, H, Dv) in the dtype of `mixed`, and the state (B, H, Dk, Dv), of
        which kernels give none."""
        with without_autocast(mixed.device):
            q, k, v = F.silu(at_least_fp32(mixed)).split(self.qkv_rows, dim=-1)
            q = _normalized(q.unflatten(-1, (self.key_heads, -1)), self.k_dim**-0.5)
            k = _normalized(k.unflatten(-1, (self.key_heads, -1)))
            v = v.unflatten(-1, (self.heads, -1))
            beta = self.largest_beta * at_least_fp32(beta).sigmoid()
            if by_kernel:
                y = self._run_kernel(v.to(mixed.dtype), q, k, beta, log_decay)
            else:
                y, state = delta_rule(q, k, v, beta, log_decay, starts, state)
        return y.to(mixed.dtype), state

    def _run_kernel(self, v, q, k, beta, log_decay):
        decay = () if log_decay is None else (log_decay.clamp(min=LOWEST_LOG_DECAY),)
        assert self.kernel is not None
        return run_kernel(self.kernel, v, q.to(v.dtype), k.to(v.dtype), beta, *decay)

    def flops(self, seq_len: int, causal: bool) -> dict[str, float]:
        """The state's products as they run; causal: 6 · Dk · Dv per token and value head, for the
        read kᵀ S, the update k uᵀ and the read qᵀ S, without the decay, which is elementwise."""
        sizes = self.heads, self.k_dim, self.v_dim
        if causal:
            states = recurrent_flops(seq_len, *sizes)
        else:
            states = sum(
                chunk_flops(tokens, self.key_heads, *sizes, self.per_channel)
                for tokens in ([seq_len] if self.kernel else _segment_sizes(seq_len))
            )
        return {**super().flops(seq_len, causal), 'mixer_states': states}

    def matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        rows = tuple(rows for rows in (*self.qkv_rows, *self.rows[1:]) if rows)
        return {**super().matrices(), self.input.weight: rows}

    def residual_weights(self) -> list[torch.Tensor]:
        return [self.output.weight]


def _segment_sizes(tokens: int) -> list[int]:
    whole, rest = divmod(tokens, SEGMENT)
    return [SEGMENT] * whole + [rest] * (rest > 0)


def _segments(x: torch.Tensor | None, tokens: int, size: int) -> Sequence[torch.Tensor | None]:
    """Segments of x (B, tokens, ...), of `size` tokens each; the last one may be shorter."""
    return [None] * -(-tokens // size) if x is None else x.split(size, dim=1)


def _normalized(x: torch.Tensor, length: float = 1.0) -> torch.Tensor:
    return x * (torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + L2_EPS) * length)


@MIXER_REGISTRY.register('deltanet', source='Schlag et al. 2021; Yang et al. 2024')
class DeltaNet(DeltaRuleMixer):
    """The delta rule without decay (arXiv:2406.06484): keys and values as wide as the model, and
    no output gate."""

    tag = 'DeltaNet'
    kernels: ClassVar = {'fla': 'delta_rule'}
    mup_rule = True
    has_gate = False


@MIXER_REGISTRY.register('gated_deltanet', source='Yang et al. 2024, arXiv:2412.06464')
class GatedDeltaNet(DeltaRuleMixer):
    """The delta rule with a decay of each head, exp(-exp(A_log) · softplus(projection + dt_bias)).

    As in the source, keys are 0.75 · n_embd and values 1.5 · n_embd wide, so that the layer has
    about 6 · n_embd² weights; Qwen3-Next (gdn_head_dim=128 at n_embd=2048, 16 heads of keys and 32
    of values) has 1 and 2 · n_embd.
    """

    tag = 'GDN'
    kernels: ClassVar = {'fla': 'gated_delta_rule'}
    mup_rule = True
    key_width, value_expansion = 0.75, 2.0

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))

    @classmethod
    def decay_rows(cls, config: ModelArchitectureConfig) -> int:
        return config.gdn_value_heads

    def log_decay(self, projected: torch.Tensor) -> torch.Tensor:
        step = F.softplus(at_least_fp32(projected) + self.dt_bias)
        return -at_least_fp32(self.A_log).exp() * step

    def initial_values(self) -> dict[str, Fill]:
        """As in the source: exp(A_log) uniform from 0 (0.01, so that its logarithm is finite) to
        16; softplus(dt_bias) log-uniform from 0.001 to 0.1."""
        return {'A_log': _log_uniform_rates(0.01), 'dt_bias': Initial.step_bias(1e-3, 0.1)}


def _log_uniform_rates(low: float) -> Fill:
    """The logarithm of a uniform value from low to 16."""
    return lambda tensor, generator: tensor.uniform_(low, 16.0, generator=generator).log_()


@MIXER_REGISTRY.register('kda', source='Kimi Linear: Kimi Team 2025, arXiv:2510.26692')
class KimiDeltaAttention(DeltaRuleMixer):
    """The delta rule with a decay of each channel of a key head, otherwise as `gated_deltanet`.

    Decay and gate are projections of rank `gdn_v_head_dim`; the gate is a sigmoid. Keys and values
    are as wide as the model.
    """

    tag = 'KDA'
    kernels: ClassVar = {'fla': 'kda'}
    per_channel = True
    activate_gate = staticmethod(torch.sigmoid)

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        rank, channels = self.v_dim, self.heads * self.k_dim
        self.decay_output = nn.Linear(rank, channels, bias=False)
        self.gate_output = None
        if config.gdn_gate:
            self.gate_output = nn.Linear(rank, self.heads * self.v_dim, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(channels))

    @classmethod
    def decay_rows(cls, config: ModelArchitectureConfig) -> int:
        return config.gdn_v_head_dim

    @classmethod
    def gate_rows(cls, config: ModelArchitectureConfig) -> int:
        return config.gdn_v_head_dim if config.gdn_gate else 0

    def log_decay(self, projected: torch.Tensor) -> torch.Tensor:
        channels = at_least_fp32(self.decay_output(projected)) + self.dt_bias
        step = F.softplus(channels).unflatten(-1, (self.heads, -1))
        return -at_least_fp32(self.A_log).exp()[:, None] * step

    def gate(self, projected: torch.Tensor) -> torch.Tensor | None:
        return super().gate(projected if self.gate_output is None else self.gate_output(projected))

    def initial_values(self) -> dict[str, Fill]:
        """As `gated_deltanet`, with exp(A_log) from 1 (as in the released code)."""
        return {'A_log': _log_uniform_rates(1.0), 'dt_bias': Initial.step_bias(1e-3, 0.1)}
