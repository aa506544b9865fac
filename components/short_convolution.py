"""Causal depthwise convolution over a few tokens, as recurrences use it before their state."""

import torch
import torch.nn as nn

from components.base import Component, Fill, Initial
from components.kv_cache import MixerState


class ShortConvolution(Component, nn.Module):
    """y_t = bias + Σ_j weight[:, j] · x_(t - width + 1 + j), per channel; (B, T, C) -> (B, T, C).

    Computed as `width` products element by element, which count as no matrix multiplication.
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
        # 3. Add a product for each distance.
        y = x * self.weight[:, before]
        for lag in range(1, self.width):
            shifted = padded[:, before - lag : before - lag + x.size(1)]
            if same is not None:
                shifted = shifted * (same >= lag)[..., None]
            y = y + shifted * self.weight[:, before - lag]
        # 4. Keep the last inputs; those of another document are zeros for the next tokens.
        if state is not None:
            last = padded[:, padded.size(1) - before :]
            if same is not None:
                age = torch.arange(before - 1, -1, -1, device=x.device)
                last = last * (same[:, -1:] >= age)[..., None]
            state.set(name, last)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def initial_values(self) -> dict[str, Fill]:
        """As of `nn.Conv1d`."""
        bound = self.width**-0.5
        return {'weight': Initial.uniform(bound), 'bias': Initial.uniform(bound)}


def _tokens_before(starts: torch.Tensor, most: int) -> torch.Tensor:
    """The number of tokens of the same document before each token, (B, T), at least `most` if the
    document begins before the first one and enough inputs of it are kept."""
    index = torch.arange(starts.size(1), device=starts.device)
    begin = torch.where(starts, index, -most).cummax(dim=1).values
    return index - begin
