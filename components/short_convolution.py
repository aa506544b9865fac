"""Causal depthwise convolution over a few tokens, as recurrences use it before their state."""

import torch
import torch.nn as nn

from components.base import Component, Fill, Initial
from components.kv_cache import MixerState


class ShortConvolution(Component, nn.Module):
    """y_t = bias + Σ_j weight[:, j] · x_(t - width + 1 + j), per channel; (B, T, C) -> (B, T, C).

    Computed as `width` products element by element, which count as no matrix multiplication, in
    fp32 or the dtype of x if that is wider.
    """

    mup_rule = True

    def __init__(self, channels: int, width: int, bias: bool = False):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(
        self,
        x: torch.Tensor,
        starts: torch.Tensor | None = None,
        state: MixerState | None = None,
        name: str = 'convolution',
    ) -> torch.Tensor:
        """starts (B, T): the first token of each document, which sees none before it. state: has
        the last inputs of earlier calls under `name`, and gets those of this one."""
        before = self.width - 1
        # 1. Put the inputs of the last tokens before x, or zeros.
        earlier = state.get(name) if state else None
        if earlier is None:
            earlier = x.new_zeros(x.size(0), before, x.size(2))
        padded = torch.cat((earlier.to(x.dtype), x), dim=1)
        # 2. Count the tokens of the same document before each token.
        same = None if starts is None else _tokens_before(starts, before)
        # 3. Keep the last inputs; those of another document are zeros for the next tokens.
        if state is not None:
            last = padded[:, x.size(1) :]
            if same is not None:
                age = torch.arange(before - 1, -1, -1, device=x.device)
                last = last.masked_fill((same[:, -1:] < age)[..., None], 0)
            state.set(name, last)
        # 4. Convolve.
        weight = self.weight.to(torch.promote_types(x.dtype, torch.float32))
        y = _Convolution.apply(padded, weight, same)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def initial_values(self) -> dict[str, Fill]:
        """As of `nn.Conv1d`."""
        bound = self.width**-0.5
        return {'weight': Initial.uniform(bound), 'bias': Initial.uniform(bound)}


class _Convolution(torch.autograd.Function):
    """Inputs (B, width - 1 + T, C), weight (C, width), tokens of the same document before each
    token (B, T) or None -> (B, T, C) in the dtype of the weight.

    A function of its own, since autograd would keep an input for each of the `width` products and
    pad the gradient of each: this halves the time on a CPU.
    """

    @staticmethod
    def forward(ctx, padded, weight, same):
        ctx.save_for_backward(padded, weight, same)
        before, inputs = weight.size(1) - 1, padded.to(weight.dtype)
        y = inputs[:, before:] * weight[:, before]
        for lag in range(1, before + 1):
            earlier = _of_same_document(_shifted(inputs, before, lag), lag, same)
            y.addcmul_(earlier, weight[:, before - lag])
        return y

    @staticmethod
    def backward(ctx, grad):
        padded, weight, same = ctx.saved_tensors
        before, inputs = weight.size(1) - 1, padded.to(weight.dtype)
        grad_inputs = torch.zeros_like(inputs)
        grad_taps = []
        for lag in range(before, -1, -1):
            grad_product = _of_same_document(grad, lag, same)
            grad_taps.append((grad_product * _shifted(inputs, before, lag)).sum(dim=(0, 1)))
            _shifted(grad_inputs, before, lag).addcmul_(grad_product, weight[:, before - lag])
        return grad_inputs.to(padded.dtype), torch.stack(grad_taps, dim=1), None


def _shifted(padded: torch.Tensor, before: int, lag: int) -> torch.Tensor:
    """The rows `lag` tokens before each token, (B, T, C), of (B, before + T, C)."""
    return padded[:, before - lag : padded.size(1) - lag]


def _of_same_document(x: torch.Tensor, lag: int, same: torch.Tensor | None) -> torch.Tensor:
    """x (B, T, C), with zeros for tokens whose document has fewer than `lag` tokens before them."""
    return x if same is None or lag == 0 else x.masked_fill((same < lag)[..., None], 0)


def _tokens_before(starts: torch.Tensor, most: int) -> torch.Tensor:
    """The number of tokens of the same document before each token, (B, T), at least `most` if the
    document begins before the first one and enough inputs of it are kept."""
    index = torch.arange(starts.size(1), device=starts.device)
    begin = torch.where(starts, index, -most).cummax(dim=1).values
    return index - begin
