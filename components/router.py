"""The router of a mixture of experts: scores, the choice of experts, and their weights."""

from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn as nn

from common.registry import AnyBut, Option, above, at_least
from components.base import without_autocast
from model_config import ModelArchitectureConfig

SCORES = {'softmax': partial(torch.softmax, dim=-1), 'sigmoid': torch.sigmoid}
# Scores of a group of experts (N, groups), from those of its experts (N, groups, experts).
GROUP_SCORES = {
    'max': lambda scores: scores.amax(dim=-1),
    'top2': lambda scores: scores.topk(2, dim=-1).values.sum(dim=-1),
}
GROUP_TAGS = {'max': '', 'top2': 'top2'}


class Routing(NamedTuple):
    """The router's results for N tokens, of which each uses k experts."""

    logits: torch.Tensor  # (N, experts)
    scores: torch.Tensor  # (N, experts), without the selection bias
    weights: torch.Tensor  # (N, k), of the chosen experts' outputs
    chosen: torch.Tensor  # (N, k), numbers of the experts
    # (N, k): whether the token is within the expert's capacity; None: nothing is dropped.
    fits: torch.Tensor | None = None


class Router(nn.Linear):
    """Scores for each expert, and the experts with the highest scores. Computed in fp32.

    With `router_groups`, a token first chooses groups of experts, by their best experts, and then
    experts of these groups (DeepSeek-V2, section 2.2.2; 'top2' as in DeepSeek-V3).

    With `router_selection_bias`, a bias of each expert is added to the scores, or to the logits
    (`router_selection_bias_target`), but only for these choices. After each update of the weights
    it grows by `router_bias_update` for an expert that got fewer tokens than the mean and shrinks
    for one that got more, which balances the load without a loss (Wang et al. 2024; DeepSeek-V3,
    section 2.1.2). It is a buffer, without gradient.
    """

    options: ClassVar = {
        'router_score': Option(
            str, 'softmax', 'Function that turns router logits into scores', choices=tuple(SCORES)
        ),
        'router_bias': Option(bool, False, 'Use a learned bias in the router logits (gpt-oss)'),
        'router_normalize': Option(
            bool, True, "Normalize the scores of a token's experts to a sum of 1"
        ),
        'router_scale': Option(
            float, 1.0, "Factor of the scores of a token's experts", check=above(0)
        ),
        'router_groups': Option(
            int,
            1,
            'Number of groups of experts, of which a token uses some; 1: no groups',
            check=at_least(1),
        ),
        'router_groups_per_token': Option(
            int,
            1,
            'Number of groups of experts per token',
            check=at_least(1),
            requires=('router_groups', AnyBut(1)),
        ),
        'router_group_score': Option(
            str,
            'max',
            'Score of a group: that of its best expert (DeepSeek-V2), or the sum of its best two '
            '(DeepSeek-V3)',
            choices=tuple(GROUP_SCORES),
            requires=('router_groups', AnyBut(1)),
        ),
        'router_selection_bias': Option(
            bool,
            False,
            'Add a bias to the scores for the choice of experts only, by which the load is '
            'balanced without a loss (DeepSeek-V3)',
        ),
        'router_selection_bias_target': Option(
            str,
            'scores',
            'What the selection bias is added to: the scores, or the logits (Kolibri)',
            choices=('scores', 'logits'),
            requires=('router_selection_bias', True),
        ),
        'router_bias_update': Option(
            float,
            0.001,
            'Step of the selection bias after each update of the weights; 0: it stays as it is',
            check=at_least(0),
            requires=('router_selection_bias', True),
        ),
    }

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__(config.n_embd, config.num_experts, bias=bool(config.get('router_bias')))
        self.experts_per_token = config.experts_per_token
        self.score, self.normalize = SCORES[config.router_score], config.router_normalize
        self.scale = config.router_scale
        self.groups = config.get('router_groups') or 1
        if self.groups > 1:
            self.groups_per_token = config.router_groups_per_token
            self.group_score = GROUP_SCORES[config.router_group_score]
        has_bias = config.get('router_selection_bias')
        self.biases_logits = config.get('router_selection_bias_target') == 'logits'
        self.bias_step = config.router_bias_update if has_bias else 0.0
        bias = torch.empty(config.num_experts, dtype=torch.float32) if has_bias else None
        self.register_buffer('selection_bias', bias)

    @staticmethod
    def problems(config: ModelArchitectureConfig) -> list[str]:
        groups = config.get('router_groups') or 1
        if groups == 1:
            return []
        experts, chosen = config.num_experts, config.router_groups_per_token
        if experts % groups:
            return [
                f'num_experts={experts} must be a multiple of router_groups={groups}. Set such as '
                f'--num_experts={-(-experts // groups) * groups}.'
            ]
        size, problems = experts // groups, []
        if chosen > groups:
            problems.append(
                f'router_groups_per_token={chosen} is more than router_groups={groups}. Set at '
                f'most --router_groups_per_token={groups}.'
            )
        elif chosen * size < config.experts_per_token:
            problems.append(
                f'experts_per_token={config.experts_per_token} is more than the {chosen * size} '
                f'experts in router_groups_per_token={chosen} groups of {size}. Set fewer, or more '
                f'groups per token.'
            )
        if config.router_group_score == 'top2' and size == 1:
            problems.append(
                f"router_group_score='top2' needs groups of at least 2 experts, but router_groups="
                f'{groups} has {size} in each. Set --router_group_score=max, or fewer groups.'
            )
        return problems

    @staticmethod
    def tags(config: ModelArchitectureConfig) -> list[str]:
        """Tags in the architecture's name."""
        tags = ['RBias'] if config.get('router_bias') else []
        if 'router_group_score' in config:
            groups = f'{config.router_groups_per_token}of{config.router_groups}'
            tags.append(f'G{groups}{GROUP_TAGS[config.router_group_score]}')
        if config.get('router_selection_bias'):
            of_logits = config.get('router_selection_bias_target') == 'logits'
            tags.append('LogitSelBias' if of_logits else 'SelBias')
        return tags

    def route(self, tokens: torch.Tensor) -> Routing:
        """tokens (N, C) -> Routing."""
        with without_autocast(tokens.device):
            logits = self(tokens.float())  # (N, experts)
        scores = self.score(logits)
        if self.groups == 1 and self.selection_bias is None:
            weights, chosen = scores.topk(self.experts_per_token)  # (N, k)
        else:
            chosen = self.choose((logits if self.biases_logits else scores).detach())
            weights = scores.gather(-1, chosen)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return Routing(logits, scores, weights * self.scale, chosen)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The experts (N, k) for scores or logits (N, experts), by groups and with the bias."""
        if self.selection_bias is not None:
            scores = scores + self.selection_bias
        if self.groups > 1:
            by_group = scores.unflatten(-1, (self.groups, -1))  # (N, groups, experts of a group)
            best = self.group_score(by_group).topk(self.groups_per_token).indices
            excluded = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter(-1, best, False)
            scores = by_group.masked_fill(excluded[..., None], -torch.inf).flatten(-2)
        return scores.topk(self.experts_per_token).indices

    @torch.no_grad()
    def update_bias(self, tokens: torch.Tensor) -> None:
        """Change the selection bias by the number of tokens of each expert, (experts,) integers.

        The error is computed in integers, so that it is the same for any number of ranks.
        """
        missing = tokens.sum() - len(tokens) * tokens  # experts · (mean - load)
        self.selection_bias.add_(missing.sign(), alpha=self.bias_step)
