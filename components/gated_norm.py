"""RMS normalization with a gate, at the output of recurrent mixers."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from components.base import Component, Fill, Initial


class GatedRMSNorm(Component, nn.Module):
    """weight · norm(x) · silu(gate), or weight · norm(x · silu(gate)) with `gate_first`.

    Each group of `group` dimensions is normalized alone, in fp32. Gated DeltaNet norms first with a
    weight that heads share (`width` = `group` = head dimension); Mamba-2 gates first.
    """

    mup_rule = True

    def __init__(self, width: int, eps: float, group: int | None = None, gate_first: bool = False):
        super().__init__()
        self.eps, self.group, self.gate_first = eps, group or width, gate_first
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """x, gate (..., width) -> (..., width) in the dtype of x."""
        y, gate = x.float(), F.silu(gate.float())
        if self.gate_first:
            y = y * gate
        grouped = y.unflatten(-1, (-1, self.group))
        grouped = grouped * torch.rsqrt(grouped.square().mean(dim=-1, keepdim=True) + self.eps)
        y = self.weight * grouped.flatten(-2)
        return (y if self.gate_first else y * gate).to(x.dtype)

    def initial_values(self) -> dict[str, Fill]:
        return {'weight': Initial.ones}
