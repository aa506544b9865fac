"""Where documents begin and end in a window of tokens."""

from typing import NamedTuple

import torch


class Documents(NamedTuple):
    """The document of each token, numbered from 1, and its place in it from 0: (B, T) each.

    What the window cuts off counts as absent: its first token is at place 0.
    """

    numbers: torch.Tensor
    places: torch.Tensor


def documents_of(tokens: torch.Tensor, end_of_text: int) -> Documents:
    """Of tokens (B, T); the end-of-text token is the last of the document that it ends."""
    begins = (tokens == end_of_text).roll(1, dims=1)
    begins[:, 0] = True
    index = torch.arange(tokens.size(1), device=tokens.device)
    first = torch.where(begins, index, 0).cummax(dim=1).values
    return Documents(begins.cumsum(dim=1), index - first)
