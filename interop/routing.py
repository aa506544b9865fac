"""Fields and tensors of routers: groups of experts, and the bias for the choice of experts."""

from interop.fields import Fields
from interop.layers import options_with
from interop.mapping import FieldMap, constant_option, field
from interop.tensors import TensorMap, tensor
from model_config import ModelArchitectureConfig


def router_groups_field(groups: int | None, per_token: int | None, score: str) -> FieldMap:
    """Groups of experts, `n_group`, of which a token uses `topk_group`.

    groups, per_token: the values of missing fields. score: the family's score of a group. If a
    token uses all groups, they are no limit.
    """

    def read(fields: Fields) -> dict:
        total = fields.take('n_group', int, groups, optional=True)
        chosen = fields.take('topk_group', int, per_token, optional=True)
        if total == chosen:
            return {'router_groups': 1}
        if total is None or chosen is None:
            missing = 'n_group' if total is None else 'topk_group'
            fields.refuse(missing, 'must be a number, as the other of n_group and topk_group')
            return {}
        return {
            'router_groups': total,
            'router_groups_per_token': chosen,
            'router_group_score': score,
        }

    def write(config: ModelArchitectureConfig) -> dict:
        options = options_with(config, 'router_groups')
        if 'router_groups' not in options:
            return {}
        chosen = options.get('router_groups_per_token', 1)
        return {'n_group': options['router_groups'], 'topk_group': chosen}

    return FieldMap(read, write)


def biased_router_fields(
    normalize: bool, scale: float, groups: int = 1, per_token: int = 1
) -> tuple[FieldMap, ...]:
    """The router of DeepSeek-V3. normalize, scale, groups, per_token: values of missing fields."""
    return (
        field('router_normalize', 'norm_topk_prob', normalize),
        field('router_scale', 'routed_scaling_factor', scale),
        constant_option(router_score='sigmoid', router_selection_bias=True),
        router_groups_field(groups, per_token, 'top2'),
    )


# Such a router in families without fields for it.
BALANCED_ROUTER = constant_option(
    router_score='sigmoid', router_normalize=True, router_selection_bias=True, router_groups=1
)


def selection_bias(name: str) -> dict[str, TensorMap]:
    """The map of the bias that balances the load. name: that of the tensor."""
    return {'blocks.{layer}.ffn.router.selection_bias': tensor(name)}
