"""Whether blocks use the mixers, the FFN, the residual component and the values of their layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.nn as nn

from common.errors import UserError
from components.blocks import Block
from components.checks import label
from components.residual_stream import Residual
from model_config import ATTENTION_REGISTRY, NORM_POSITION_REGISTRY, ModelArchitectureConfig


@dataclass
class _Uses:
    """What a block uses of its own during a forward pass."""

    methods: set[str] = field(default_factory=set)
    added: set[str] = field(default_factory=set)  # sublayers


@contextmanager
def checked_layouts(model: nn.Module) -> Iterator[None]:
    """Raise UserError if a block of a forward pass within the context leaves out what it has."""
    blocks = list(zip(model.blocks, model.config.layers))
    uses = {block: _Uses() for block, _ in blocks}
    observed: list[tuple[nn.Module, str]] = []
    running: list[Block] = []  # the last one is the block whose forward pass was begun last
    handles = [block.register_forward_pre_hook(lambda b, _: running.append(b)) for block in uses]
    for block, used in uses.items():
        owners = {'mix': block, 'enter': block.residual, 'add': block.residual}
        if hasattr(block.attention, 'share_values'):
            owners['share_values'] = block.attention
        for method, owner in owners.items():
            _observe(owner, method, used)
            observed.append((owner, method))
    try:
        yield
        problems = [_unused(block, config, uses[block]) for block, config in blocks]
    except (AttributeError, TypeError) as error:
        # 'NoneType' object is not callable, or 'Block' object has no attribute 'ffn_norm'
        problems = [_absent(block, config) for block, config in blocks if block in running[-1:]]
        is_explained = any(word in str(error) for word in ('NoneType', 'attention', 'ffn'))
        if not is_explained or not any(problems):
            raise
        raise UserError(*filter(None, problems)) from error
    finally:
        for handle in handles:
            handle.remove()
        for owner, method in observed:
            delattr(owner, method)
    if any(problems):
        raise UserError(*dict.fromkeys(filter(None, problems)))


def _observe(owner: nn.Module, method: str, used: _Uses) -> None:
    """Note the calls of a method in `used`."""
    original = getattr(owner, method)

    def observed(*arguments, **named):
        used.methods.add(method)
        if method == 'add':
            used.added.add(named.get('sublayer') or arguments[2])
        return original(*arguments, **named)

    setattr(owner, method, observed)


def _forward(config: ModelArchitectureConfig) -> str:
    layout = NORM_POSITION_REGISTRY[config.norm_position]
    return f'{label(NORM_POSITION_REGISTRY, layout)}.forward'


def _unused(block: Block, config: ModelArchitectureConfig, used: _Uses) -> str | None:
    """The problem if the block did not use what it has."""
    if block.mixers and 'mix' not in used.methods:
        return _must_mix(config)
    asks = hasattr(block.attention, 'share_values') and block.attention.shared_inputs()
    if asks and 'share_values' not in used.methods:
        attention = ATTENTION_REGISTRY[config.attention_type]
        return (
            f'{label(ATTENTION_REGISTRY, attention)}.forward ignores value_residual='
            f'{config.value_residual!r}. Call v = self.share_values(v, attn_inputs) with the '
            f'values (B, T, KV heads · D), or remove value_residual.'
        )
    kind = type(block.residual)
    enters = 'enter' in used.methods or kind.enter is Residual.enter
    adds = used.added >= {*block.residual.sublayers} or kind.add is Residual.add
    if enters and adds:
        return None
    return (
        f'{_forward(config)} ignores residual={config.residual!r}. Begin with '
        f'x = self.enter(x, attn_inputs), and replace x + self.dropout(y) by '
        f"self.add(x, y, 'mixer') and self.add(x, y, 'ffn'); or remove residual."
    )


def _absent(block: Block, config: ModelArchitectureConfig) -> str | None:
    """The problem if the block called an attention or an FFN that it does not have."""
    if block.mixers and block.attention is None:
        return _must_mix(config)
    if not block.mixes:
        return (
            f'{_forward(config)} does not support mixer={config.mixer!r}: leave out the mixers '
            f'unless self.mixes is true.'
        )
    if block.ffn is None:
        return (
            f'{_forward(config)} does not support ffn_type={config.ffn_type!r}: leave out the FFN '
            f'if self.ffn is None.'
        )
    return None


def _must_mix(config: ModelArchitectureConfig) -> str:
    return (
        f'{_forward(config)} must call self.mix(x, attn_inputs), which runs all of '
        f'mixer={config.mixer!r}, in place of self.attention(x, attn_inputs).'
    )
