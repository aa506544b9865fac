"""What layers share: position encodings, the masks and rotations of attention, metrics of FFNs."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from components.attention_backends import AttentionBackend, AttentionSpec
from components.base import AuxOutput
from components.kv_cache import Cache
from components.positions import AttentionInputs, PositionEncoding
from model_config import POSITION_ENCODING_REGISTRY, ModelArchitectureConfig


def position_encodings(
    config: ModelArchitectureConfig,
) -> tuple[list[PositionEncoding], list[int]]:
    """The position encodings of a model, and the number of each layer's.

    Layers share one if its `sharing_key` is the same. The first one with parameters comes first.
    """
    classes = [POSITION_ENCODING_REGISTRY[layer.position_encoding] for layer in config.layers]
    keys = [encoding.sharing_key(layer) for encoding, layer in zip(classes, config.layers)]
    built = {}
    for key, encoding, layer in zip(keys, classes, config.layers):
        if key not in built:
            built[key] = encoding(layer)
    order = sorted(built, key=lambda key: not list(built[key].parameters()))
    return [built[key] for key in order], [order.index(key) for key in keys]


def attention_inputs(
    backend: type[AttentionBackend],
    specs: Sequence[AttentionSpec],
    encodings: Sequence[PositionEncoding],
    pos: torch.Tensor,
    doc_ids: torch.Tensor | None,
    cache: Cache | None,
) -> list[AttentionInputs]:
    """Inputs of each layer's attention for positions (T,), from its spec and position encoding.

    Layers with the same encoding share rotations, and those that see the same tokens and have the
    same bias share masks.
    doc_ids: the document of each token so far, (B, all), if masks depend on documents.
    """
    prepared: dict[tuple, tuple[AttentionInputs, torch.Tensor]] = {}
    masks: dict[tuple, object] = {}
    inputs = []
    for number, (spec, encoding) in enumerate(zip(specs, encodings)):
        layer_cache = cache.layers[number] if cache else None
        # Training: queries and keys are the same tokens. Generation: the keys are the tokens in the
        # layer's cache, which depend on its window.
        span = spec.window if cache else None
        if (encoding, span) not in prepared:
            k_pos = layer_cache.positions(pos) if layer_cache else pos
            prepared[encoding, span] = encoding.prepare(pos, k_pos), k_pos
        shared, k_pos = prepared[encoding, span]
        key = spec.window, spec.documents, encoding if shared.bias is not None else None
        if key not in masks:
            documents = () if doc_ids is None else (doc_ids[:, pos], doc_ids[:, k_pos])
            masks[key] = backend.mask(spec, shared.bias, pos, k_pos, *documents)
        inputs.append(shared._replace(bias=None, mask=masks[key], cache=layer_cache))
    return inputs


def merge_aux(aux_outputs: Iterable[AuxOutput]) -> AuxOutput:
    """The sum of the losses, and each metric stacked over the layers that have it.

    A vector that is shorter than in other layers, such as the load of fewer experts, ends with nan.
    """
    losses: list = []
    by_name: dict[str, list[torch.Tensor]] = {}
    for aux in aux_outputs:
        losses.append(aux.loss)
        for name, metric in aux.metrics.items():
            by_name.setdefault(name, []).append(metric)
    return AuxOutput(sum(losses), {name: _stacked(values) for name, values in by_name.items()})


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
