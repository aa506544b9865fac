"""The output head: from hidden states to logits or to the loss."""

from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from components.base import AuxOutput, Component, matmul_dtype
from components.linear_cross_entropy import linear_cross_entropy
from model_config import INITIALIZATION_REGISTRY, ModelArchitectureConfig

IGNORED = -100  # target without a loss, as in torch's cross-entropy
FEW_ROWS = 8


class OutputHead(Component, nn.Module):
    """From hidden states to logits or to the loss; with `head_bias`, a logit has a learned bias."""

    part = 'output_head'
    mup_rule = True  # `output_scale` and `logit_multiplier` multiply the hidden states
    metric_names: ClassVar = ('z_loss',)  # metrics of its AuxOutput, not multiplied by their weight

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.projection = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        scale = INITIALIZATION_REGISTRY[config.initialization].output_scale(config)
        self.scale = scale * config.logit_multiplier
        self.softcap, self.z_loss = config.logit_softcap, config.z_loss
        self.compiled = False

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, V); with `logit_softcap` c: c · tanh(logits / c) in fp32, which
        bounds them by c (Gemma Team 2024).
        """
        logits = self.project(self.scale_hidden(hidden))
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits.float() / self.softcap)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, V).

        For a few rows in fp32 on a CPU, as in generation, computed as weight · hiddenᵀ with at
        least two columns: hidden · weightᵀ, or a single column, takes MKL up to 5 times as long
        (benchmarks/generation.py).
        """
        rows, weight = hidden.shape[:-1].numel(), self.projection.weight
        bias = self.projection.bias
        if (
            torch.is_grad_enabled()
            or not 0 < rows <= FEW_ROWS
            or hidden.device.type != 'cpu'
            or matmul_dtype(weight) != torch.float32
        ):
            return self.projection(hidden)
        at_least_two = hidden.reshape(rows, -1).repeat(2 if rows == 1 else 1, 1)
        logits = (weight @ at_least_two.T)[:, :rows].T.contiguous().view(*hidden.shape[:-1], -1)
        return logits if bias is None else logits.add_(bias)

    def scale_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.scale == 1 else hidden * self.scale

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, AuxOutput]:
        """hidden (B, T, C) -> logits (B, T, V). With targets (B, T): the loss in nats, in fp32,
        summed over the targets that are not -100; their number; and the auxiliary loss.

        The auxiliary loss is `z_loss` times the mean of log² Z over these targets, with Z the sum
        of the exponentiated logits. It keeps the logits from drifting (Chowdhery et al. 2022).
        """
        if targets is None:
            return self.logits(hidden)
        targets = targets.flatten()
        counted = targets != IGNORED
        count = counted.sum()
        if self.z_loss == 0:
            scaled = self.scale_hidden(hidden).flatten(0, 1)
            weight, bias = self.projection.weight, self.projection.bias
            loss = linear_cross_entropy(
                scaled, weight, targets, self.softcap, IGNORED, self.compiled, bias
            )
            return loss, count, AuxOutput(0.0, {})
        # The relative weight of the two losses is not known here, so all logits are kept.
        logits = self.logits(hidden).flatten(0, 1).float()
        loss = F.cross_entropy(logits, targets, reduction='sum')
        squares = logits.logsumexp(dim=-1).square().where(counted, 0.0)
        z_loss = squares.sum() / count.clamp(min=1)
        return loss, count, AuxOutput(self.z_loss * z_loss, {'z_loss': z_loss.detach()})

    def matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        return {}  # its rows belong to tokens, as in the embedding
