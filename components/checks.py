"""Checks of components, when a model is built and when it runs for the first time.

`check_built` checks a model's modules. `observe_calls` passes each call of a component's method to
a function such as `check_form`, which checks the type and shape of the result.
`flops_disagreements` compares `flops()` with PyTorch's FLOP counter.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from common.registry import Registry
from components.attention import Attention
from components.attention_inputs import AttentionInputs
from components.base import AuxOutput, Component
from components.blocks import Block
from model_config import (
    ACTIVATION_REGISTRY,
    ATTENTION_BACKEND_REGISTRY,
    ATTENTION_REGISTRY,
    FFN_REGISTRY,
    MIXER_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
)

FLOPS_TOLERANCE = 0.03


class Call(NamedTuple):
    """A finished call of a component's method."""

    registry: Registry
    component: type
    method: str
    inputs: tuple
    output: object

    @property
    def label(self) -> str:
        """The method, for messages."""
        return f'{label(self.registry, self.component)}.{self.method}'

    @property
    def time_dim(self) -> int:
        """The time dimension of the inputs and the output; the batch dimension is before it."""
        return 2 if self.method in ('rotate', 'attend') else 1


def label(registry: Registry, component: type) -> str:
    """A component for messages: option, name and class."""
    name = next((n for n, known in registry.registered() if known is component), None)
    prefix = '' if name is None else f'{registry.option}={name!r}: '
    return prefix + component.__name__


def registered_class(module: nn.Module) -> tuple[Registry, type] | None:
    """The registry and the registered class of a module, whose own class may be derived from it.

    FSDP derives a class from that of each module that it shards.
    """
    for ancestor in type(module).__mro__:
        for registry in _FORMS:
            if any(known is ancestor for _, known in registry.registered()):
                return registry, ancestor
    return None


def check_built(model: nn.Module) -> None:
    """Raise UserError for a component whose constructor did not set required attributes."""
    pending = [model]
    while pending:
        module = pending.pop()
        name = type(module).__name__
        if '_modules' not in vars(module):
            raise UserError(f'{name}.__init__ must call super().__init__ first.')
        required = {Attention: ('spec',), Block: ('attention', 'ffn', 'mixers', 'residual')}
        for base, attributes in required.items():
            if isinstance(module, base):
                for missing in (a for a in attributes if not hasattr(module, a)):
                    raise UserError(
                        f'{name}.__init__ must call super().__init__(config, layer), or set '
                        f'self.{missing}.'
                    )
        pending += module.children()


# --------------------------------------------------------------------------------------------------
# Results of calls


@contextmanager
def observe_calls(model: nn.Module, on_call: Callable[[Call], None]) -> Iterator[None]:
    """Pass each call of a component's method to `on_call` after it returns, inner calls first."""
    with _observed_methods(model, on_call):
        handles = []
        for module in model.modules():
            if registered := registered_class(module):
                hook = partial(_on_forward, on_call, *registered)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _on_forward(on_call, registry, component, module, args, kwargs, output) -> None:
    if getattr(module, 'publishes_values', False):
        output = output[:2]
    on_call(Call(registry, component, 'forward', (*args, *kwargs.values()), output))


@contextmanager
def _observed_methods(model: nn.Module, on_call: Callable[[Call], None]) -> Iterator[None]:
    """Observe methods other than `forward`: of position encodings and attention backends."""
    encodings, backend = model.position_encodings, model.config.get('attention_backend')
    methods = [
        (encoding, method, POSITION_ENCODING_REGISTRY, type(encoding))
        for encoding in encodings
        for method in ('prepare', 'embed')
    ]
    for block, number in zip(model.blocks, model.encoding_numbers):
        if block.attention is None:
            continue
        attending = ATTENTION_BACKEND_REGISTRY, ATTENTION_BACKEND_REGISTRY[backend]
        positions = POSITION_ENCODING_REGISTRY, type(encodings[number])
        for method, owner in (('rotate', positions), ('attend', attending)):
            if hasattr(block.attention, method):
                methods.append((block.attention, method, *owner))
    originals = []
    for owner, method, registry, component in methods:
        call, original = getattr(owner, method), vars(owner).get(method)
        originals.append((owner, method, original))
        setattr(owner, method, partial(_call_observed, on_call, call, registry, component, method))
    try:
        yield
    finally:
        for owner, method, original in originals:
            delattr(owner, method)
            if original is not None:
                setattr(owner, method, original)


def _call_observed(on_call, call, registry, component, method, *inputs):
    output = call(*inputs)
    on_call(Call(registry, component, method, inputs, output))
    return output


def check_form(call: Call) -> None:
    """Raise UserError if the result of a method has the wrong type or shape."""
    form = _METHOD_FORMS.get(call.method) or _FORMS[call.registry]
    if problem := form(call.inputs, call.output):
        raise UserError(f'{call.label} must return {problem}.')


def _tensor(shape: tuple[int, ...], like: torch.Tensor, output: object) -> str | None:
    """The expected and the actual output, if it is no tensor of that shape; else None."""
    expected = f'a tensor {tuple(shape)}'
    if not isinstance(output, torch.Tensor):
        return f'{expected}, and returned {_described(output)}'
    if output.shape != shape:
        return f'{expected}, and returned {tuple(output.shape)}'
    if output.device != like.device:
        return f'{expected} on {like.device}, and returned one on {output.device}'
    if output.dtype not in (like.dtype, torch.float32, torch.bfloat16, torch.float16):
        return f'{expected} of {like.dtype} or float32, and returned one of {output.dtype}'
    return None


def _described(output: object) -> str:
    if isinstance(output, tuple):
        return f'a tuple of {", ".join(map(_described, output)) or "nothing"}'
    if isinstance(output, torch.Tensor):
        return f'a tensor {tuple(output.shape)}'
    return 'None' if output is None else f'{type(output).__name__} {output!r}'[:80]


def _same_shape(inputs: tuple, output: object) -> str | None:
    return _tensor(inputs[0].shape, inputs[0], output)


def _with_aux_output(inputs: tuple, output: Any) -> str | None:
    x = inputs[0]
    is_pair = isinstance(output, tuple) and len(output) == 2
    if not is_pair:
        given = _tensor(x.shape, x, output) or f'a tensor {tuple(output.shape)} alone'
        given = given.partition('and returned ')[2] or given
        return f'a pair, a tensor {tuple(x.shape)} and an AuxOutput, and returned {given}'
    first, aux = output
    if not isinstance(aux, AuxOutput):
        return f'an AuxOutput beside its tensor, and returned {_described(aux)}'
    loss, metrics, counts = aux
    if not isinstance(loss, (int, float)) and not (
        isinstance(loss, torch.Tensor) and not loss.dim()
    ):
        return f'an AuxOutput with a number as its loss, and that is {_described(loss)}'
    if not isinstance(metrics, dict) or not all(
        isinstance(each, torch.Tensor) for each in metrics.values()
    ):
        return f'an AuxOutput with a dict of tensors, and that is {_described(metrics)}'
    if not isinstance(counts, tuple) or not all(
        isinstance(each, torch.Tensor) and each.dim() == 1 and not each.is_floating_point()
        for each in counts
    ):
        return f'an AuxOutput with a tuple of vectors of integers, and that is {counts!r:.80}'
    return _tensor(x.shape, x, first)


def _prepared(inputs: tuple, output: object) -> str | None:
    if not isinstance(output, AttentionInputs):
        return f'AttentionInputs, and returned {_described(output)}'
    if output.bias is None:
        return None
    tail = tuple(len(positions) for positions in inputs)
    if not isinstance(output.bias, torch.Tensor) or tuple(output.bias.shape[1:]) != tail:
        shape = tuple(getattr(output.bias, 'shape', ()))
        return (
            f'AttentionInputs with a bias (heads or 1, {tail[0]}, {tail[1]}), and that is {shape}'
        )
    return None


def _attended(inputs: tuple, output: object) -> str | None:
    q, _, v = inputs[:3]
    return _tensor((*q.shape[:3], v.size(-1)), q, output)


_FORMS = {
    ACTIVATION_REGISTRY: _same_shape,
    NORM_REGISTRY: _same_shape,
    ATTENTION_REGISTRY: _same_shape,
    MIXER_REGISTRY: _same_shape,
    FFN_REGISTRY: _with_aux_output,
    NORM_POSITION_REGISTRY: _with_aux_output,
}
_METHOD_FORMS = {
    'prepare': _prepared,
    'embed': _same_shape,
    'rotate': _same_shape,
    'attend': _attended,
}


# --------------------------------------------------------------------------------------------------
# FLOPs


def flops_disagreements(model: nn.Module) -> list[str]:
    """Differences between `flops()` and PyTorch's count, a sentence for each class.

    model: on the meta device, with the manual attention backend, so that everything is counted.
    """
    reaches = [block.attention.spec.reach for block in model.blocks if block.attention]
    length = min([model.config.block_size, *filter(None, reaches)])  # within all windows
    tokens = torch.empty((1, length), dtype=torch.long, device='meta')
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens)
    counts = counter.get_flop_counts()
    counted = {name.partition('.')[2]: sum(ops.values()) for name, ops in counts.items()}

    def disagreements(path: str, module: nn.Module) -> Iterator[str]:
        if isinstance(module, Component):
            declared = sum(module.flops(length, False).values())
            measured = counted.get(path, 0)
            if abs(declared - measured) <= FLOPS_TOLERANCE * max(declared, measured):
                return
        inner = [
            sentence
            for name, child in module.named_children()
            for sentence in disagreements(f'{path}.{name}' if path else name, child)
        ]
        # A class with its own flops() is responsible for the modules inside it.
        if not isinstance(module, Component) or (inner and type(module).flops is Component.flops):
            yield from inner
            return
        registry, component = registered_class(module) or (None, type(module))
        name = label(registry, component) if registry else component.__name__
        yield (
            f'{name}.flops() returns {declared:,.0f} FLOPs for a sequence of {length} tokens, but '
            f'PyTorch counts {measured:,}. MFU, FLOP budgets and matching use flops(). (PyTorch '
            f'counts operators without a formula as 0.)'
        )

    return list(dict.fromkeys(disagreements('', model)))
