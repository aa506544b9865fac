"""Both ends of the transformer: tokens in, logits and loss out."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from components.contract import Component, Initial
from model_config import ModelArchitectureConfig


class TokenEmbedding(Component, nn.Embedding):
    """(B, T) tokens -> (B, T, C)."""

    part = 'token_embedding'

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__(config.vocab_size, config.n_embd)

    def initial_values(self) -> dict:
        return {'weight': Initial.normal}


IGNORED = -100  # a target that does not count, as in torch's cross-entropy


class OutputHead(Component, nn.Module):
    """Hidden states to logits, and to the loss: one place for all that concerns it."""

    part = 'output_head'

    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.projection = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden (B, T, C) -> logits (B, T, V); with targets (B, T): the loss in nats, summed over
        the targets that are not -100, in fp32, and their number."""
        logits = self.projection(hidden)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction='sum')
        return loss, (targets != IGNORED).sum()

    def matrices(self) -> dict[nn.Parameter, tuple[int, ...]]:
        return {}  # its rows are tokens, as in the table
