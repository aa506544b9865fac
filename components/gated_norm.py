"""RMS normalization with a gate, at the output of recurrent mixers."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from components.base import Component, Fill, Initial, recomputed


class GatedRMSNorm(Component, nn.Module):
    """weight · norm(x) · silu(gate), or weight · norm(x · silu(gate)) with `gate_first`.

    `activate` may be another function of the gate than silu; without a gate, weight · norm(x).

    Each group of `group` dimensions, a divisor of `width`, is normalized alone, in fp32 or the
    dtype of x if that is wider. Gated DeltaNet norms first with a weight that heads share (`width`
    = `group` = head dimension); Mamba-2 gates first.
    """

    mup_rule = True

    def __init__(
        self,
        width: int,
        eps: float,
        group: int | None = None,
        gate_first: bool = False,
        activate: Callable[[torch.Tensor], torch.Tensor] = F.silu,
    ):
        super().__init__()
        self.eps, self.group, self.gate_first = eps, group or width, gate_first
        self.activate = activate
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """x, gate (..., width) -> (..., width) in the dtype of x; only they are kept for the
        backward pass."""
        return recomputed(self.norm_and_gate, x, gate)

    def norm_and_gate(self, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        y, factor = x.to(dtype), 1.0 if gate is None else self.activate(gate.to(dtype))
        if self.gate_first:
            y = y * factor
        normed = F.rms_norm(y.unflatten(-1, (-1, self.group)), (self.group,), eps=self.eps)
        y = self.weight * normed.flatten(-2)
        return (y if self.gate_first else y * factor).to(x.dtype)

    def initial_values(self) -> dict[str, Fill]:
        return {'weight': Initial.ones}
