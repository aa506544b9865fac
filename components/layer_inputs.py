"""What layers share: position encodings, the masks and rotations of attention, values of the first
layer with attention, metrics of FFNs."""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.errors import UserError
from components.attention_backends import AttentionBackend, AttentionSpec
from components.attention_inputs import AttentionInputs, Published, SharedInputs
from components.base import AuxOutput
from components.blocks import Block
from components.document_mask import Documents, attention_groups
from components.kv_cache import Cache, LayerCache
from components.positions import PositionEncoding
from model_config import (
    NORM_POSITION_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    ModelArchitectureConfig,
)


def position_encodings(
    config: ModelArchitectureConfig,
) -> tuple[list[PositionEncoding], list[int | None]]:
    """The position encodings of a model, and the number of each layer's, None without attention.

    Layers share one if its `sharing_key` is the same. The first one with parameters comes first.
    """
    keys: list[tuple | None] = []
    built = {}
    for layer in config.layers:
        if 'position_encoding' not in layer:
            keys.append(None)
            continue
        encoding = POSITION_ENCODING_REGISTRY[layer.position_encoding]
        keys.append(encoding.sharing_key(layer))
        if keys[-1] not in built:
            built[keys[-1]] = encoding(layer)
    order = sorted(built, key=lambda key: not list(built[key].parameters()))
    numbers = [None if key is None else order.index(key) for key in keys]
    return [built[key] for key in order], numbers


class LayerNeeds(NamedTuple):
    """What determines the inputs of a layer's mixers."""

    spec: AttentionSpec | None  # of its attention, if it has one
    encoding: PositionEncoding | None
    has_others: bool  # whether it has mixers other than attention, or Canon layers


def layer_inputs(
    backend: type[AttentionBackend] | None,
    needs: Sequence[LayerNeeds],
    pos: torch.Tensor,
    documents: Documents | None,
    cache: Cache | None,
) -> list[AttentionInputs]:
    """Inputs of each layer's mixers for positions (T,).

    Layers with the same encoding share rotations, and those that see the same tokens and have the
    same bias share masks.
    documents: of each token so far, (B, all), if they are kept apart.
    """
    prepared: dict[tuple, tuple[AttentionInputs, torch.Tensor]] = {}
    masks: dict[tuple, object] = {}
    starts = None
    if documents is not None and any(each.has_others for each in needs):
        starts = documents.positions[:, pos] == 0
    inputs = []
    for number, (spec, encoding, _) in enumerate(needs):
        states = cache.layers[number] if cache else None
        if spec is None or encoding is None or backend is None:
            inputs.append(AttentionInputs(states=states, starts=starts))
            continue
        layer_cache = states['attention'] if states else None
        assert layer_cache is None or isinstance(layer_cache, LayerCache)
        # Training: queries and keys are the same tokens. Generation: the keys are the tokens in the
        # layer's cache, which depend on its window or chunk.
        span = spec.reach if cache else None
        if (encoding, span) not in prepared:
            k_pos = layer_cache.positions(pos) if layer_cache else pos
            prepared[encoding, span] = encoding.prepare(pos, k_pos), k_pos
        shared, k_pos = prepared[encoding, span]
        biased = encoding if shared.bias is not None else None
        key = spec.window, spec.documents, spec.chunk, biased
        if key not in masks:
            groups = (attention_groups(each, documents, spec.chunk) for each in (pos, k_pos))
            groups = (each for each in groups if each is not None)
            masks[key] = backend.mask(spec, shared.bias, pos, k_pos, *groups)
        inputs.append(
            shared._replace(
                bias=None, mask=masks[key], cache=layer_cache, states=states, starts=starts
            )
        )
    return inputs


def publish_first_values(blocks: nn.ModuleList, config: ModelArchitectureConfig) -> None:
    """Make the first block with attention publish its values, if a later block needs them."""
    shares = (hasattr(block.attention, 'share_values') for block in blocks)
    number = next((n for n, each in enumerate(shares) if each), len(blocks))
    needs_values = ['first_values' in block.shared_names for block in blocks]
    if any(needs_values[number + 1 :]):
        layer = config.layers[number]
        layout = NORM_POSITION_REGISTRY[layer.norm_position]
        blocks[number] = _publishing(layout)(layer, number)


@functools.cache
def _publishing(layout: type[Block]) -> type[Block]:
    """The block layout, with the attention's values as a third output: `SharedInputs.first_values`.

    They are an output, and no side effect, so that a recomputed, compiled or sharded block has them
    like any other block.
    """

    class Publishing(layout):  # type: ignore[misc,valid-type]
        publishes_values = True

        def __init__(self, config: ModelArchitectureConfig, layer: int):
            super().__init__(config, layer)
            self.attention.value_lambdas = None  # no other values to mix with its own

        def forward(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> tuple:
            published = Published()
            output = super().forward(x, attn_inputs._replace(published=published))
            if published.values is None:
                attention = type(self.attention)
                raise UserError(
                    f'value_residual: {attention.__name__}.forward does not publish the values of '
                    f'the first layer. Call v = self.share_values(v, attn_inputs) there.'
                )
            return *output, published.values

    Publishing.__name__ = Publishing.__qualname__ = layout.__name__
    return Publishing


def shared_inputs(blocks: Iterable[Block], **entries: torch.Tensor) -> SharedInputs:
    """The entries for which any of the blocks asks; others would only be kept in memory."""
    names = {name for block in blocks for name in block.shared_names}
    return SharedInputs(**{name: value for name, value in entries.items() if name in names})


def run_block(
    block: Block, x: torch.Tensor, attn_inputs: AttentionInputs, shared: SharedInputs
) -> tuple[torch.Tensor, AuxOutput, SharedInputs]:
    """The outputs of a block, and what the next one shares.

    The block gets those entries of `shared` for which its components ask.
    """
    if names := block.shared_names:
        entries = SharedInputs(**{name: getattr(shared, name) for name in names})
        attn_inputs = attn_inputs._replace(shared=entries)
    x, aux, *values = block(x, attn_inputs)
    return x, aux, shared._replace(first_values=values[0]) if values else shared


def merge_aux(aux_outputs: Iterable[AuxOutput]) -> AuxOutput:
    """The sum of the losses, each metric stacked over the layers that have it, and all counts.

    A vector that is shorter than in other layers, such as the load of fewer experts, ends with nan.
    """
    losses: list = []
    by_name: dict[str, list[torch.Tensor]] = {}
    counts: list[torch.Tensor | None] = []
    for aux in aux_outputs:
        losses.append(aux.loss)
        counts.append(aux.counts[0] if aux.counts else None)
        for name, metric in aux.metrics.items():
            by_name.setdefault(name, []).append(metric)
    metrics = {name: _stacked(values) for name, values in by_name.items()}
    counted = any(each is not None for each in counts)
    return AuxOutput(sum(losses), metrics, tuple(counts) if counted else ())


def _stacked(values: list[torch.Tensor]) -> torch.Tensor:
    if len({value.shape for value in values}) == 1:
        return torch.stack(values)
    longest = max(len(value) for value in values)
    return torch.stack([F.pad(v, (0, longest - len(v)), value=torch.nan) for v in values])


def summarize_metrics(
    blocks: Iterable[nn.Module], means: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The metrics of the FFNs for the record, by each class of FFN in the blocks.

    means: metrics of shape (layers that have it, ...).
    """
    classes = list(dict.fromkeys(type(block.ffn) for block in blocks if block.ffn is not None))
    declared = {name for ffn in classes for name in ffn.metric_names}
    summary: dict[str, torch.Tensor] = {}
    for ffn in classes:
        names = ffn.metric_names or means.keys() - declared
        summary |= ffn.summarize_metrics({n: mean for n, mean in means.items() if n in names})
    return summary
