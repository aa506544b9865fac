"""Checks at start of what a mixer promises: context, its state for generation, and documents."""

from typing import ClassVar

import pytest
import torch
from helpers.architectures import tiny

from common.errors import UserError
from model_builder import build_model
from model_components import Mixer
from model_config import MIXER_REGISTRY
from training.start_checks import check_model

pytestmark = pytest.mark.usefixtures('one_thread')


def checked(**values) -> list[str]:
    """The notes of the check of a tiny model."""
    model = build_model(tiny(**values), 'cpu', seed=1)
    return check_model(model, torch.device('cpu'), 'float32')


def test_model_that_mixes_no_tokens_is_noted():
    (note,) = checked(mixer='none')
    assert 'no layer mixes tokens' in note
    kinds = {'N': {'mixer': 'none'}}
    assert checked(mixer='short_conv', layer_pattern='NM', layer_kinds=kinds) == []


# --- Generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize('block_size', [2, 8, 80])
def test_mixer_that_forgets_its_state_is_noted(register, block_size):
    class Sum(Mixer):
        tag = 'Sum'
        cacheable = True
        keeps_state: ClassVar = True

        def forward(self, x, attn_inputs):
            y, cache = x.cumsum(1), attn_inputs.cache
            if cache is None or not self.keeps_state:
                return y
            y = y if cache.get('sum') is None else y + cache.get('sum')
            cache.set('sum', y[:, -1:])
            return y

    register(MIXER_REGISTRY, 'sum', Sum)
    register(MIXER_REGISTRY, 'forgetful', type('Forgetful', (Sum,), {'keeps_state': False}))
    assert checked(mixer='sum', block_size=block_size) == []
    (note,) = checked(mixer='forgetful', block_size=block_size)
    assert note.startswith("mixer='forgetful': Forgetful: with `cacheable = True`")


# --- Documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize('block_size', [3, 8, 80])
def test_mixer_that_reads_other_documents_is_named(register, block_size):
    """A running sum does not begin anew where a document begins; attention does."""

    class Sum(Mixer):
        tag = 'Sum'

        def forward(self, x, attn_inputs):
            return x.cumsum(1)

    register(MIXER_REGISTRY, 'sum', Sum)
    assert checked(mixer='sum', block_size=block_size) == []
    documents = {'document_mask': True, 'end_of_text': 3, 'block_size': block_size}
    with pytest.raises(UserError, match=r'Sum\.forward does not keep documents apart'):
        checked(mixer='attention+sum', **documents)
    assert checked(mixer='attention+mamba2', **documents) == []
