"""Whether the weights of a model follow the rules of maximal update between two widths."""

import math
from collections.abc import Iterator

import torch.nn as nn

from common.registry import ALL_REGISTRIES
from components.attention import Attention
from components.base import Component
from components.weight_initialization import owned_tensors

# A ratio of sizes may differ from that of the widths by this factor, since sizes are rounded.
TOLERANCE = 1.15


def follows_mup(kind: type) -> bool:
    """Whether a component or an optimizer declares `mup_rule`.

    A subclass with weights or updates of its own must declare it itself.
    """
    for each in kind.__mro__:
        if 'mup_rule' in vars(each):
            return bool(vars(each)['mup_rule'])
        if vars(each).keys() & {'__init__', 'matrices', 'step'}:
            return False
    return False


def mup_problems(narrow: nn.Module, wide: nn.Module) -> list[str]:
    """Reasons why `initialization='mup'` does not transfer from one model to a wider one.

    A sentence each; none if the widths are equal.
    """
    before, after = narrow.config.n_embd, wide.config.n_embd
    if before == after:
        return []
    problems = [*_without_rule(wide), *_fixed_fan_ins(narrow, wide), *_growing_heads(narrow, wide)]
    if wide.config.scale_embeddings:
        problems.append('scale_embeddings=True makes embeddings grow with n_embd. Set it to False.')
    return list(dict.fromkeys(problems))


def _without_rule(model: nn.Module) -> Iterator[str]:
    """One sentence for each class, whatever the number of layers."""
    examples: dict[type, str] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, Component) or follows_mup(type(module)):
            continue
        for name, _, tensor in owned_tensors(module):
            if isinstance(tensor, nn.Parameter):
                examples.setdefault(type(module), f'{prefix}.{name}')
    for kind, example in examples.items():
        option, name = _choice(kind)
        yield (
            f'{name} states no rule for its weights, such as {example}. Choose another {option}. '
            f'In one of your own whose weights follow the rules, set mup_rule = True.'
        )


def _choice(kind: type) -> tuple[str, str]:
    """The option that chooses a component, and the choice; if there is none, the class."""
    for registry in ALL_REGISTRIES:
        for name, component in registry.registered():
            if component is kind:
                return registry.option, f'{registry.option}={name!r}'
    return 'component', kind.__name__


def _fan_ins(model: nn.Module) -> dict[str, int]:
    """Name of a hidden matrix -> its number of inputs."""
    components = [module for module in model.modules() if isinstance(module, Component)]
    hidden = {id(weight) for component in components for weight in component.matrices()}
    return {n: p.shape[-1] for n, p in model.named_parameters() if id(p) in hidden}


def _fixed_fan_ins(narrow: nn.Module, wide: nn.Module) -> Iterator[str]:
    before, after = narrow.config.n_embd, wide.config.n_embd
    sizes = _fan_ins(wide)
    for name, size in _fan_ins(narrow).items():
        if name in sizes and not _is_near(sizes[name] / size, after / before):
            yield (
                f'the inputs of {name} do not grow with n_embd: {size} at n_embd={before}, '
                f'{sizes[name]} at n_embd={after}. Let the size follow n_embd.'
            )
            return  # the same in every layer


def _growing_heads(narrow: nn.Module, wide: nn.Module) -> Iterator[str]:
    """Attention scores grow with the head size unless their factor falls with it."""
    modules = dict(wide.named_modules())
    for name, module in narrow.named_modules():
        other = modules.get(name)
        if not isinstance(module, Attention) or not isinstance(other, Attention):
            continue
        factors = [each.spec.scale * each.qk_head_dim for each in (module, other)]
        if not _is_near(factors[1], factors[0]):
            yield (
                f'the size of a query head grows from {module.qk_head_dim} to {other.qk_head_dim}, '
                f'and attention scores with it. Let n_head follow n_embd, or add a list of '
                f'attention_scale to ladder.'
            )
            return


def _is_near(one: float, other: float) -> bool:
    return abs(math.log(one / other)) < math.log(TOLERANCE)
