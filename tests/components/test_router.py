"""components/router.py: against transformers' routers and simple loops."""

import pytest
import torch
from helpers.architectures import tiny

from common.errors import UserError
from components.router import Router

MOE = {'ffn_type': 'moe', 'num_experts': 12, 'experts_per_token': 3}
GROUPS = {'router_groups': 4, 'router_groups_per_token': 2}
TOP2 = {'router_group_score': 'top2'}
BIAS = {'router_selection_bias': True}
LOGITS = {**BIAS, 'router_selection_bias_target': 'logits'}


def router(**values) -> Router:
    """A router whose biases are not zero."""
    torch.manual_seed(0)
    ours = Router(tiny(**{**MOE, **values}))
    with torch.no_grad():
        ours.weight.normal_()
        for bias in (ours.bias, ours.selection_bias):
            if bias is not None:
                bias.normal_(std=0.3)
    return ours


def tokens() -> torch.Tensor:
    return torch.randn(40, 16, generator=torch.Generator().manual_seed(1))


def routed_by_loop(ours: Router, config) -> tuple[list[list[int]], list[list[float]]]:
    """The experts and weights of each token, one token at a time."""
    chosen, weights = [], []
    for token in tokens().double():
        logits = ours.weight.double() @ token
        if ours.bias is not None:
            logits = logits + ours.bias.double()
        scores = logits.sigmoid() if config.router_score == 'sigmoid' else logits.softmax(0)
        ranked = logits if config.get('router_selection_bias_target') == 'logits' else scores
        if ours.selection_bias is not None:
            ranked = ranked + ours.selection_bias.double()
        size = config.num_experts // config.router_groups
        groups = [range(g * size, (g + 1) * size) for g in range(config.router_groups)]

        def group_score(group, ranked=ranked):
            best = sorted((ranked[e].item() for e in group), reverse=True)
            return sum(best[:2]) if config.router_group_score == 'top2' else best[0]

        allowed = list(range(config.num_experts))
        if config.router_groups > 1:
            best = sorted(groups, key=group_score, reverse=True)[: config.router_groups_per_token]
            allowed = [expert for group in best for expert in group]
        best = sorted(allowed, key=lambda e, r=ranked: -r[e].item())[: config.experts_per_token]
        own = [scores[expert].item() for expert in best]
        total = sum(own) if config.router_normalize else 1
        chosen.append(best)
        weights.append([config.router_scale * score / total for score in own])
    return chosen, weights


CHOICES = {
    'plain': {},
    'bias of logits': {'router_bias': True},
    'selection bias': {**BIAS, 'router_scale': 2.5},
    'selection bias of logits': {**LOGITS, 'router_score': 'sigmoid'},
    'groups': {**GROUPS, 'router_normalize': False},
    'groups by two': {**GROUPS, **TOP2, 'router_score': 'sigmoid'},
    'all': {**GROUPS, **TOP2, **BIAS, 'router_score': 'sigmoid', 'router_bias': True},
}


@pytest.mark.parametrize('name', CHOICES)
def test_choice_equals_loop(name):
    ours, config = router(**CHOICES[name]), tiny(**{**MOE, **CHOICES[name]})
    chosen, weights = routed_by_loop(ours, config)
    routing = ours.route(tokens())
    assert routing.chosen.tolist() == chosen
    torch.testing.assert_close(routing.weights, torch.tensor(weights), rtol=1e-5, atol=1e-6)
    if name != 'plain':
        others = router().route(tokens()).chosen
        assert not torch.equal(others, routing.chosen), 'the options change nothing'


def deepseek_v2(ours):
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    return DeepseekV2TopkRouter(
        DeepseekV2Config(
            hidden_size=16,
            num_attention_heads=2,
            n_routed_experts=12,
            num_experts_per_tok=3,
            topk_method='group_limited_greedy',
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
        )
    )


def deepseek_v3(ours):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=16,
            num_attention_heads=2,
            n_routed_experts=12,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
        )
    )
    theirs.e_score_correction_bias.copy_(ours.selection_bias)
    return theirs


V2 = {**GROUPS, 'router_normalize': False}
V3 = {**GROUPS, **TOP2, **BIAS, 'router_score': 'sigmoid'}


@pytest.mark.optional
@pytest.mark.parametrize(('make', 'values'), [(deepseek_v2, V2), (deepseek_v3, V3)])
@torch.no_grad()
def test_choice_equals_transformers(make, values):
    ours = router(**values, router_scale=1.7)
    theirs = make(ours)
    theirs.weight.copy_(ours.weight)
    _, weights, chosen = theirs(tokens())
    routing, order = ours.route(tokens()), chosen.argsort(-1)
    ours_order = routing.chosen.argsort(-1)
    assert torch.equal(routing.chosen.gather(-1, ours_order), chosen.gather(-1, order))
    torch.testing.assert_close(
        routing.weights.gather(-1, ours_order), weights.gather(-1, order), rtol=1e-5, atol=1e-7
    )


def test_selection_bias_has_no_gradient_and_no_effect_on_weights():
    ours = router(**BIAS)
    routing = ours.route(tokens())
    routing.weights.square().sum().backward()
    assert ours.weight.grad.any() and not ours.selection_bias.requires_grad
    with torch.no_grad():
        ours.selection_bias.add_(0.7)  # the same for all experts
    assert torch.equal(ours.route(tokens()).chosen, routing.chosen)
    assert torch.equal(ours.route(tokens()).weights, routing.weights)


def test_bias_moves_by_a_step_toward_the_mean_load():
    ours = router(**BIAS, num_experts=4, router_bias_update=0.25)
    before = ours.selection_bias.clone()
    ours.update_bias(torch.tensor([3, 5, 0, 4]))  # the mean is 3
    assert (ours.selection_bias - before).tolist() == pytest.approx([0, -0.25, 0.25, -0.25])


REFUSED = {
    'num_experts=12 must be a multiple of router_groups=5': {'router_groups': 5},
    'router_groups_per_token=5 is more than router_groups=4': {
        **GROUPS,
        'router_groups_per_token': 5,
    },
    'experts_per_token=4 is more than the 3 experts in': {
        **GROUPS,
        'router_groups_per_token': 1,
        'experts_per_token': 4,
    },
    'needs groups of at least 2 experts': {
        **TOP2,
        'router_groups': 12,
        'router_groups_per_token': 3,
    },
    'router_groups_per_token=2 .*it needs router_groups other than 1': {
        'router_groups_per_token': 2
    },
    'router_bias_update=0.1 .*it needs router_selection_bias=True': {'router_bias_update': 0.1},
}


@pytest.mark.parametrize('message', REFUSED)
def test_impossible_groups_are_refused(message):
    with pytest.raises(UserError, match=message):
        tiny(**{**MOE, **REFUSED[message]})


def test_router_tags_and_neutral_values():
    plain = tiny(**MOE)
    assert tiny(**V3, **MOE).name.replace('-G2of4top2-SelBias', '') == plain.name
    assert '-LogitSelBias-' in tiny(**MOE, **LOGITS).name
    assert '-RBias-' in tiny(**MOE, router_bias=True).name
    neutral = {'router_groups': 1, 'router_selection_bias': False, 'router_bias': False}
    assert tiny(**MOE, **neutral).hash == plain.hash
    assert (
        tiny(**MOE, **BIAS, router_selection_bias_target='scores').hash == tiny(**MOE, **BIAS).hash
    )
    for values in (BIAS, GROUPS, {'router_bias': True}):
        assert tiny(**MOE, **values).hash != plain.hash
