"""Measurements inside a model at evaluations (`diagnostics=True`).

Per layer: the RMS of the residual stream, the gradient norm, the largest attention logit. Per
parameter group: the size of the last update relative to the weights. And the loss by position in
the context, in which position encodings differ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.tensors import local_tensor
from components.document_mask import attention_groups, locate_documents
from inference.generate import eager_blocks
from model_builder import ParameterGroup, Transformer
from model_components import IGNORED
from parallel.process_group import SingleProcessGroup
from parallel.strategies import SingleProcess
from records.record_types import LayerDiagnostics, PositionLoss


def layer_statistics(
    raw_model: Transformer,
    model: nn.Module,
    parallel: SingleProcess,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    autocast,
) -> list[LayerDiagnostics]:
    """For each block, on one batch (B, T) in evaluation mode: `activation_rms` of its output,
    `gradient_norm` of its parameters for the mean loss, and `max_attention_logit`, None without
    attention.

    model: `raw_model` as called in training. Every rank gets the same batch. Clears all gradients;
    to be called between iterations.
    """
    squares: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: squares.append(out[0].float().pow(2).mean()))
        for block in raw_model.blocks
    ]
    logits: dict[int, torch.Tensor] = {}
    try:
        # Hooks and probes would make compiled blocks recompile.
        with (
            eager_blocks(raw_model),
            torch.enable_grad(),
            parallel.micro_step(model, last=True),
        ):
            with _probed_attention(raw_model, tokens, logits), autocast():
                loss_sum, count, auxiliary = model(tokens, targets)
            # Divided by the number of ranks, since their gradients are summed.
            ((loss_sum / count + auxiliary.loss) / parallel.world_size).backward()
        norms = [
            parallel.norm([local_tensor(p.grad) for p in block.parameters() if p.grad is not None])
            for block in raw_model.blocks
        ]
    finally:
        for hook in hooks:
            hook.remove()
        parallel.clear_gradients(model)
    without = torch.zeros_like(norms[0])
    largest = torch.stack([logits.get(layer, without) for layer in range(len(norms))])
    measured = torch.stack([torch.stack(squares).sqrt(), torch.stack(norms), largest])
    return [
        {
            'layer': layer,
            'activation_rms': rms,
            'gradient_norm': norm,
            'max_attention_logit': logit if layer in logits else None,
        }
        for layer, (rms, norm, logit) in enumerate(measured.T.tolist())
    ]


@contextmanager
def _probed_attention(
    model: Transformer, tokens: torch.Tensor, logits: dict[int, torch.Tensor]
) -> Iterator[None]:
    """Set the largest |scale · q kᵀ| of each block's attention, if any, before caps and biases."""
    documents = None
    if model.end_of_text is not None:
        documents = locate_documents(tokens, model.end_of_text)

    def probe(layer, attend):
        def probed(q, k, v, mask, spec, dropout, *sinks):
            grouped = q.detach().unflatten(1, (k.size(1), -1))  # (B, KV heads, group, T, D)
            scores = grouped.float() @ k.detach().float()[:, :, None].transpose(-2, -1)
            positions = torch.arange(q.size(2), device=q.device)
            hidden = ~spec.is_visible(positions[:, None], positions)
            groups = attention_groups(positions, documents, spec.chunk)
            if groups is not None:
                groups = groups[:, None, None]
                hidden = hidden | (groups[..., None] != groups[..., None, :])  # (B, 1, 1, T, T)
            largest = scores.abs().masked_fill(hidden, 0.0).max()
            logits[layer] = largest * spec.scale
            return attend(q, k, v, mask, spec, dropout, *sinks)

        return probed

    attentions = {
        layer: block.attention
        for layer, block in enumerate(model.blocks)
        if block.attention is not None
    }
    originals = {layer: attention.attend for layer, attention in attentions.items()}
    try:
        for layer, attention in attentions.items():
            attention.attend = probe(layer, originals[layer])
        yield
    finally:
        for layer, attention in attentions.items():
            attention.attend = originals[layer]


@torch.no_grad()
def loss_by_position(
    model: nn.Module, ranks: SingleProcessGroup, batches: Iterator[list[torch.Tensor]], autocast
) -> list[PositionLoss]:
    """Mean loss in nats over positions [0, 1), [1, 2), [2, 4), [4, 8), … of the context.

    batches: this rank's (tokens, targets), each (B, T).
    """
    total: torch.Tensor | int = 0  # summed loss and number of targets, by position: (2, T)
    for tokens, targets in batches:
        with autocast():
            logits = model(tokens)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction='none'
        ).view(targets.shape)
        total += torch.stack([losses.sum(0), (targets != IGNORED).sum(0)])
    loss_sum, count = ranks.all_reduce_sum(total)
    mean = (loss_sum / count).tolist()
    edges = [0] + [2**k for k in range(len(mean).bit_length()) if 2**k < len(mean)] + [len(mean)]
    return [
        {'from': low, 'to': high, 'loss': sum(mean[low:high]) / (high - low)}
        for low, high in pairwise(edges)
    ]


class UpdateRatio:
    """The size of an update relative to the weights: ‖Δw‖ / ‖w‖ for each parameter group."""

    def __init__(self, groups: list[ParameterGroup], parallel: SingleProcess):
        self.groups = {group.name: [local_tensor(p) for p in group.parameters] for group in groups}
        self.parallel = parallel
        self.before: list[list[torch.Tensor]] | None = None
        self.ratios: dict[str, float] | None = None

    def begin(self) -> None:
        """Copy the weights; the copy is released by `end`."""
        self.before = [[p.clone() for p in weights] for weights in self.groups.values()]

    @torch.no_grad()
    def end(self) -> None:
        """Compute the ratios, if `begin` was called."""
        if self.before is None:
            return
        self.ratios = {}
        norm = self.parallel.norm
        for (name, weights), before in zip(self.groups.items(), self.before):
            change = torch._foreach_sub(weights, before)
            self.ratios[name] = (norm(change) / norm(before)).item()
        self.before = None
