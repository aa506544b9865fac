"""What a layer's mixers get beside the hidden states."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from components.kv_cache import LayerStates


class SharedInputs(NamedTuple):
    """What the layers of a model share; a layer gets what its components ask for.

    See `Component.shared_inputs`.
    """

    tokens: torch.Tensor | None = None  # (B, T)
    x0: torch.Tensor | None = None  # the input of the first block, (B, T, C)
    # Of the tokens in the text, (T,), or in their documents if those are kept apart, (B, T).
    positions: torch.Tensor | None = None
    # Values of the first layer whose attention has `share_values`, (B, T, KV heads · Dv).
    first_values: torch.Tensor | None = None


@dataclass
class Published:
    """What a layer makes for later ones during its forward pass."""

    values: torch.Tensor | None = None  # the later `SharedInputs.first_values`


class AttentionInputs(NamedTuple):
    """Inputs of a layer's mixers in addition to x, prepared once per forward pass.

    Those of attention come from the position encoding and, for the mask, the attention backend.
    """

    rotation: tuple[torch.Tensor, ...] = ()  # passed to `rotate`
    bias: torch.Tensor | None = None  # added to the scores, (H or 1, Tq, Tk), fp32
    mask: Any = None  # made by the attention backend from the bias and the visibility
    cache: Any = None  # the LayerCache of an attention, the MixerState of another; None: no cache
    states: LayerStates | None = None  # the caches of all mixers of the layer
    starts: torch.Tensor | None = None  # (B, T): the first token of a document; None: one document
    shared: SharedInputs = SharedInputs()
    published: Published | None = None  # of the layer whose values others use

    def of_mixer(self, name: str) -> 'AttentionInputs':
        """The inputs of one of the layer's mixers."""
        return self if self.states is None else self._replace(cache=self.states[name])
