"""Mixture of experts: each token uses a few of many feed-forward networks."""

import inspect
import math
from decimal import Decimal
from functools import cache, partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from common.registry import AnyBut, FrozenConfig, Option, above, at_least, tag_of
from components.base import AuxOutput, Fill, Initial, matmul_dtype
from components.feed_forward import FeedForward
from components.router import Router, Routing
from model_config import FFN_REGISTRY, ModelArchitectureConfig

# --------------------------------------------------------------------------------------------------
# Matrix products by groups of rows


@torch.library.custom_op('components::grouped_mm', mutates_args=())
def grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """torch's grouped_mm: a (N, in) times b (groups, in, out) -> (N, out), where group g has the
    rows ends[g - 1] … ends[g] of a. For the gradient of b: a (in, N) times b (N, out) -> (groups,
    in, out). Both in the dtype of a, to which b is cast.

    Wrapped in an operator because torch's has no shape function for fp32 on the meta device, which
    torch.compile needs too, and no FLOP formula; and because the cast in it is repeated in the
    backward pass, so that no copy of all experts' weights is kept until then. `ends` stays on the
    device.
    """
    product = F.grouped_mm(a, b.to(a.dtype), offs=ends)
    if b.dim() == 2:
        # A group without rows has the gradient 0. Kernels of some GPUs leave its memory as it was
        # (pytorch#172439).
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        product.masked_fill_(empty[:, None, None], 0.0)
    return product


@grouped_mm.register_fake
def _(a, b, ends):
    by_rows = b.dim() == 3
    return a.new_empty((len(a), b.size(2)) if by_rows else (len(ends), len(a), b.size(1)))


@register_flop_formula(torch.ops.components.grouped_mm)
def _(a_shape, b_shape, *_, **__) -> int:
    return 2 * math.prod(a_shape) * b_shape[-1]


def _save_operands(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    a, b, ends = ctx.saved_tensors
    grad = grad.contiguous()  # the gradient of a sum is expanded, which torch's does not support
    return grouped_mm(grad, b.mT, ends), grouped_mm(a.mT, grad, ends).to(b.dtype), None


grouped_mm.register_autograd(_gradients, setup_context=_save_operands)


class ExpertGroups(NamedTuple):
    """Groups of rows, in the order of their experts."""

    ends: torch.Tensor  # (experts,) int32: end of each expert's rows
    expert: torch.Tensor  # (rows,): the expert of each row


class ExpertLinear(nn.Linear):
    """A linear layer for each expert: weight (experts, out, in), bias (experts · out)."""

    def __init__(self, experts: int, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias=False)
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))
        if bias:  # one-dimensional, by which optimizers recognize biases
            self.bias = nn.Parameter(torch.empty(experts * out_features))

    def forward(self, x: torch.Tensor, groups: ExpertGroups) -> torch.Tensor:
        """(rows, in) -> (rows, out)."""
        dtype = matmul_dtype(x)  # autocast does not cover `grouped_mm`
        y = grouped_mm(x.to(dtype), self.weight.mT, groups.ends)
        if self.bias is None:
            return y
        return y + self.bias.to(dtype).view(-1, self.out_features).index_select(0, groups.expert)


# --------------------------------------------------------------------------------------------------
# The mixture

# Major compute capabilities of the GPUs on which torch's grouped_mm is a kernel, for bf16.
GROUPED_MM_CAPABILITIES = (9, 10)


@cache  # asked for each component whenever options are listed
def can_be_expert(ffn: type[FeedForward]) -> bool:
    """Whether its constructor takes the width and the class of its linear layers."""
    return {'width', 'linear'} <= inspect.signature(ffn).parameters.keys()


@FFN_REGISTRY.register('moe', source='Shazeer et al. 2017; shared experts: Dai et al. 2024')
class MixtureOfExperts(FeedForward):
    """Mixture of experts: each token uses `experts_per_token` FFNs, weighted by a router's scores.

    The router and both auxiliary losses are computed in fp32. With `expert_weights_at='input'`, the
    output is the sum of expert(weight · x) instead of weight · expert(x).

    With `capacity_factor`, in training an expert takes at most
    ceil(capacity_factor · tokens · k / experts) tokens of a sequence, the first ones in the order
    of positions. From those beyond it, it is dropped: it adds nothing to their outputs, and the
    weights of their other experts stay as they are (Switch Transformer: Fedus et al. 2022, section
    2.2; each sequence by itself is a group of GShard: Lepikhin et al. 2020, section 2.2). So an
    output depends neither on later tokens nor on other sequences, nor on the number of ranks. In
    evaluation and generation nothing is dropped. Dropped pairs of token and expert are computed,
    and multiplied by 0, so that shapes are static.
    """

    tag = 'MoE'
    metric_names = ('expert_load', 'dropped_share', 'load_balance_loss', 'router_z_loss')
    options: ClassVar = {
        'expert_ffn': Option(
            str,
            'swiglu',
            'Feed-forward network of each expert',
            choices=FFN_REGISTRY.where(can_be_expert, 'expert_ffn', 'Expert of a mixture'),
        ),
        'num_experts': Option(int, 8, 'Number of routed experts', check=at_least(1)),
        'experts_per_token': Option(
            int, 2, 'Number of routed experts per token (top k)', check=at_least(1)
        ),
        'shared_experts': Option(
            int, 0, 'Number of experts that every token uses, in addition', check=at_least(0)
        ),
        'shared_gate': Option(
            bool,
            False,
            "Weight the shared experts' output by a sigmoid of the token (Qwen2-MoE)",
            requires=('shared_experts', AnyBut(0)),
        ),
        'expert_weights_at': Option(
            str,
            'output',
            "Place of the router's weights: on the experts' outputs, or on their inputs (Llama 4)",
            choices=('output', 'input'),
        ),
        'expert_d_ff': Option(
            int | None, None, 'Hidden width of an expert; None: d_ff', check=at_least(1)
        ),
        'dense_layers': Option(
            int,
            0,
            'Number of first layers with one dense expert_ffn of width d_ff instead',
            check=at_least(0),
            scope='pattern',
        ),
        **Router.options,
        'capacity_factor': Option(
            float | None,
            None,
            'Maximum load of an expert in a sequence, relative to an equal load: in training, it '
            'skips the tokens beyond it (GShard, Switch Transformer); None: no maximum',
            check=above(0),
        ),
        'load_balance_weight': Option(
            float,
            0.01,
            'Weight of the load-balancing loss, computed per micro-batch (so it depends on '
            'batch_size) and summed over layers',
            check=at_least(0),
        ),
        'router_z_loss': Option(
            float,
            0.0,
            'Weight of the z-loss of the router logits, summed over layers',
            check=at_least(0),
        ),
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__()
        self.num_experts = config.num_experts
        self.experts_per_token = config.experts_per_token
        self.weighs_inputs = config.get('expert_weights_at') == 'input'
        self.balance_weight, self.z_weight = config.load_balance_weight, config.router_z_loss
        factor = config.get('capacity_factor')
        # As a fraction, since 1.1 · 10 is more than 11 in floating point.
        self.capacity_ratio = Decimal(str(factor or 1)).as_integer_ratio()
        self.has_capacity = factor is not None
        expert, width = FFN_REGISTRY[config.expert_ffn], config.expert_d_ff
        self.router = Router(config)
        self.experts = expert(config, layer, width, partial(ExpertLinear, config.num_experts))
        shared = config.shared_experts * width  # as one network, since their outputs are added
        self.shared = expert(config, layer, shared) if shared else None
        gated = shared and config.shared_gate
        self.shared_gate = nn.Linear(config.n_embd, 1, bias=False) if gated else None

    @classmethod
    def layer_overrides(cls, config: FrozenConfig, layer: int) -> tuple[str, dict]:
        if config.dense_layers == 0:
            return '', {}
        return ('D', {'ffn_type': config.expert_ffn}) if layer < config.dense_layers else ('M', {})

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        width = FFN_REGISTRY[config.expert_ffn].default_d_ff(config)
        return {
            'd_ff': (width, f'default of {config.expert_ffn}'),
            'expert_d_ff': (config.d_ff or width, 'd_ff'),
        }

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        problems = Router.problems(config)
        experts, chosen = config.num_experts, config.experts_per_token
        if chosen > experts:
            problems.append(
                f'experts_per_token={chosen} is more than num_experts={experts}. Set at most '
                f'--experts_per_token={experts}.'
            )
        if chosen == 1 and experts > 1 and config.router_normalize:
            problems.append(
                'experts_per_token=1 with router_normalize=True gives every token the weight 1, '
                'so that the router cannot learn. Set --router_normalize=False.'
            )
        if config.dense_layers >= config.n_layer:
            problems.append(
                f'dense_layers={config.dense_layers} leaves no mixture in n_layer='
                f'{config.n_layer} layers. Set fewer, or ffn_type={config.expert_ffn!r}.'
            )
        for key in ('n_embd', 'expert_d_ff'):
            size = config.to_dict()[key]
            if size % 8:
                problems.append(
                    f"{key}={size}: ffn_type='moe' uses grouped matrix products, whose rows must "
                    f'begin at multiples of 16 bytes. Set a multiple of 8, such as '
                    f'--{key}={math.ceil(size / 8) * 8}.'
                )
        return problems

    @classmethod
    def training_notes(
        cls, config: ModelArchitectureConfig, device: torch.device, dtype: str
    ) -> list[str]:
        if device.type != 'cuda':
            return []
        major, minor = torch.cuda.get_device_capability(device)
        if dtype == 'bfloat16' and major in GROUPED_MM_CAPABILITIES:
            return []
        return [
            f"ffn_type='moe' is slow here: torch has kernels of grouped matrix products only for "
            f'bfloat16 on GPUs of compute capability 9 and 10 (such as H100, H200, B200). For '
            f'{dtype} on compute capability {major}.{minor} it multiplies one expert at a time, '
            f'and each time waits for the GPU.'
        ]

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        shared = f'+{config.shared_experts}' if config.shared_experts else ''
        shared += 'Gated' if config.get('shared_gate') else ''
        mixture = f'{cls.tag}{config.experts_per_token}of{config.num_experts}{shared}'
        expert = tag_of(FFN_REGISTRY[config.expert_ffn], config)
        place = ['InputWeights'] if config.get('expert_weights_at') == 'input' else []
        factor = config.get('capacity_factor')
        capacity = [] if factor is None else [f'Capacity{factor:g}']
        return '-'.join((mixture, *Router.tags(config), *place, *capacity, expert))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, AuxOutput]:
        tokens = x.flatten(0, -2)  # (N, C)
        routing = self.router.route(tokens)
        # The experts of each token, and the shared experts.
        groups, order = self.group_by_expert(routing.chosen)
        if self.has_capacity and self.training:
            fits = self.within_capacity(groups, order, x.size(-2)).view_as(routing.chosen)
            routing = routing._replace(weights=routing.weights.where(fits, 0.0), fits=fits)
        y = self.mix_experts(tokens, routing, groups, order).view(x.shape)
        if self.shared is not None:
            y = y + self.gate_shared(x, self.shared(x)[0])
        return y, self.aux_output(routing, groups)

    def gate_shared(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The output of the shared experts y (B, T, C), with their gate."""
        return y if self.shared_gate is None else self.shared_gate(x).sigmoid() * y

    def group_by_expert(self, chosen: torch.Tensor) -> tuple[ExpertGroups, torch.Tensor]:
        """Choices (N, k), sorted by expert, and their original indices (N · k,)."""
        expert, order = chosen.flatten().sort(stable=True)
        experts = torch.arange(self.num_experts, device=chosen.device)
        ends = torch.searchsorted(expert, experts, right=True, out_int32=True)
        return ExpertGroups(ends, expert), order

    def capacity(self, tokens: int) -> int:
        """The most tokens that an expert takes of a sequence of so many."""
        numerator, denominator = self.capacity_ratio
        pairs = tokens * self.experts_per_token
        return min(-(-pairs * numerator // (denominator * self.num_experts)), tokens)

    def within_capacity(
        self, groups: ExpertGroups, order: torch.Tensor, seq_len: int
    ) -> torch.Tensor:
        """Whether each pair of token and expert (N · k,) is within the expert's capacity."""
        pairs = len(order)
        sequence = order // (seq_len * self.experts_per_token)
        # Sorted, since pairs of an expert are in the order of sequences and positions.
        group = groups.expert * pairs + sequence
        first = torch.searchsorted(group, group)  # pair of the same expert and sequence
        fits = torch.arange(pairs, device=order.device) - first < self.capacity(seq_len)
        return torch.empty_like(fits).scatter(0, order, fits)

    def mix_experts(
        self, tokens: torch.Tensor, routing: Routing, groups: ExpertGroups, order: torch.Tensor
    ) -> torch.Tensor:
        """The outputs of the experts for tokens (N, C), summed with weights (N, k) of outputs or
        inputs."""
        weights = routing.weights
        rows = tokens.to(matmul_dtype(tokens)).index_select(0, order // self.experts_per_token)
        if self.weighs_inputs:
            rows = (rows * weights.flatten().index_select(0, order)[:, None]).to(rows.dtype)
        y, _ = self.experts(rows, groups)
        y = y.index_select(0, order.argsort()).view(*weights.shape, -1)  # (N, k, C)
        if self.weighs_inputs:
            if routing.fits is not None:  # biases give an output for the input 0
                y = y.where(routing.fits[..., None], 0.0)
            return y.sum(dim=1)
        return (y * weights[..., None]).sum(dim=1).to(y.dtype)

    def aux_output(self, routing: Routing, groups: ExpertGroups) -> AuxOutput:
        """Both auxiliary losses, as means over the tokens, and metrics of the load balance.

        The load-balancing loss (Fedus et al. 2022; with several experts per token as in Mixtral) is
        experts · Σ load · probability, where an expert's load is the fraction of tokens that it
        gets and its probability the mean score. Its minimum is k. The router z-loss (Zoph et al.
        2022) is log² Σ exp(logits).
        """
        logits, scores = routing.logits, routing.scores
        tokens = groups.ends.diff(prepend=groups.ends.new_zeros(1))  # (experts,)
        load = tokens / len(logits)
        probability = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=0)
        balance = self.num_experts * (load * probability).sum()
        z = logits.logsumexp(dim=-1).square().mean()
        metrics = {
            'expert_load': load,
            'load_balance_loss': balance.detach(),
            'router_z_loss': z.detach(),
        }
        if self.has_capacity:
            fits = torch.ones_like(routing.chosen) if routing.fits is None else routing.fits
            metrics['dropped_share'] = 1 - fits.float().mean()
        return AuxOutput(
            self.balance_weight * balance + self.z_weight * z,
            metrics,
            (tokens,) if self.router.bias_step else (),
        )

    def after_update(self, counts: torch.Tensor) -> None:
        self.router.update_bias(counts)

    @classmethod
    def summarize_metrics(cls, means: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Metrics of the load balance, computed per layer. All but the last count what the router
        chose, before any pair is dropped.

        The busiest expert's load relative to a uniform load, as mean over the layers and in the
        worst layer; the effective number of experts (exp of the load's entropy); the number of idle
        experts in all layers; the mean of both losses, without their weights; with a capacity, the
        share of the pairs of token and expert that were dropped, as mean over the layers.
        """
        load = means['expert_load']  # (layers, experts), nan beyond a layer's number of experts
        exists = ~load.isnan()
        load = load.nan_to_num()
        share = load / load.sum(dim=-1, keepdim=True)
        busiest = share.amax(dim=-1) * exists.sum(dim=-1)
        summary = {
            'busiest_expert': busiest.mean(),
            'busiest_expert_worst_layer': busiest.max(),
            'effective_experts': torch.special.entr(share).sum(dim=-1).exp().mean(),
            'idle_experts': ((load == 0) & exists).sum().float(),
            'load_balance_loss': means['load_balance_loss'].mean(),
            'router_z_loss': means['router_z_loss'].mean(),
        }
        if 'dropped_share' in means:  # of the layers that have a capacity
            summary['dropped_share'] = means['dropped_share'].mean()
        return summary

    def flops(self, seq_len: int, causal: bool) -> dict[str, float]:
        # The router, the shared experts and k of the other experts for every token.
        total = super().flops(seq_len, causal)
        one_expert = self.experts.flops(seq_len, causal)
        others = self.experts_per_token - 1
        return {part: flops + others * one_expert.get(part, 0.0) for part, flops in total.items()}

    def inactive_params(self) -> int:
        idle = self.num_experts - self.experts_per_token
        return sum(p.numel() for p in self.experts.parameters()) // self.num_experts * idle

    def initial_values(self) -> dict[str, Fill]:
        return {'router.selection_bias': Initial.zeros} if self.saved_buffers() else {}

    def saved_buffers(self) -> tuple[str, ...]:
        return () if self.router.selection_bias is None else ('router.selection_bias',)

    def residual_weights(self) -> list[torch.Tensor]:
        return []  # the experts return theirs

    def matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        return {}  # the router's rows belong to experts, as the head's belong to tokens
