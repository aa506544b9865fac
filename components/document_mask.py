"""Document boundaries in a window of tokens."""

from typing import NamedTuple

import torch

from common.old_names import by_old_name
from common.registry import Option, at_least

# Of every mixer. Documents are kept apart in all layers or in none.
DOCUMENT_OPTIONS = {
    'document_mask': Option(
        bool,
        False,
        'Keep documents apart: attention within documents only, states and absolute positions that '
        'restart in each document',
        scope='model',
    ),
    'end_of_text': Option(
        int | None,
        None,
        'Token that ends a document; None: from the dataset',
        check=at_least(0),
        requires=('document_mask', True),
        scope='model',
    ),
}


class Documents(NamedTuple):
    """The document of each token, numbered from 1, and its position in it, from 0: (B, T) each.

    Positions in a document that begins before the window count from the window's first token.
    """

    ids: torch.Tensor
    positions: torch.Tensor

    @property
    def numbers(self) -> torch.Tensor:
        return by_old_name(self, 'numbers', 'ids')

    @property
    def places(self) -> torch.Tensor:
        return by_old_name(self, 'places', 'positions')


def locate_documents(tokens: torch.Tensor, end_of_text: int) -> Documents:
    """Documents of tokens (B, T); an end-of-text token is the last one of its document."""
    begins = (tokens == end_of_text).roll(1, dims=1)
    begins[:, 0] = True
    index = torch.arange(tokens.size(1), device=tokens.device)
    first = torch.where(begins, index, 0).cummax(dim=1).values
    return Documents(begins.cumsum(dim=1), index - first)


def attention_groups(
    pos: torch.Tensor, documents: Documents | None, chunk: int | None
) -> torch.Tensor | None:
    """Numbers of the groups within which tokens at positions (T,) attend, (B or 1, T), in ascending
    order: their document, or the chunk of so many tokens in it. None: no groups.

    documents: of each token so far, if they are kept apart; the chunks of each begin with it.
    """
    if documents is None:
        return None if chunk is None else (pos // chunk)[None]
    if chunk is None:
        return documents.ids[:, pos]
    return (documents.positions % chunk == 0).cumsum(dim=1)[:, pos]
