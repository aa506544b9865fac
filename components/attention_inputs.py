"""What a layer's mixers get beside the hidden states."""

from typing import Any, NamedTuple

import torch

from components.kv_cache import LayerStates


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

    def of_mixer(self, name: str) -> 'AttentionInputs':
        """The inputs of one of the layer's mixers."""
        return self if self.states is None else self._replace(cache=self.states[name])
