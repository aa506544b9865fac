"""common/old_names.py and old_imports.py: components written for earlier versions still work."""

import pytest
import torch
from helpers.architectures import random_tokens, tiny

from common import old_imports, old_names
from model_builder import build_model
from model_components import (
    ATTENTION_BACKEND_REGISTRY,
    ATTENTION_REGISTRY,
    FFN_REGISTRY,
    POSITION_ENCODING_REGISTRY,
)

COMPONENTS = """
import torch

from components.contract import Auxiliary
from model_components import AttentionNeeds, FeedForward, MultiHeadAttention, Positions
from model_components import PositionEncoding, documents_of
from model_components import AttentionBackend
from model_config import (
    ATTENTION_BACKEND_REGISTRY, ATTENTION_REGISTRY, FFN_REGISTRY, POSITION_ENCODING_REGISTRY
)
from registry import Option


@ATTENTION_REGISTRY.register('old_attention')
class OldAttention(MultiHeadAttention):
    options = {**MultiHeadAttention.options, 'old_window': Option(int, 2, 'A window')}

    @classmethod
    def needs(cls, config, layer):
        spec = super().needs(config, layer)
        assert isinstance(spec, AttentionNeeds)
        return AttentionNeeds(spec.scale, window=config.old_window)

    def join(self, q, k, v, positions):
        assert self.layer_needs.window == 2 and isinstance(positions, Positions)
        return self.widened(self.found(q, k, v, positions))


@FFN_REGISTRY.register('old_ffn')
class OldFeedForward(FeedForward):
    def __init__(self, config, layer):
        super().__init__()
        self.up = torch.nn.Linear(config.n_embd, config.d_ff)
        self.down = torch.nn.Linear(config.d_ff, config.n_embd)

    @classmethod
    def default_d_ff(cls, config):
        return 2 * config.n_embd

    def inside(self, wide):
        return wide.relu()

    def forward(self, x):
        return self.narrowed(self.up(x)), Auxiliary(0.0, {'mean': x.detach().mean()})

    @classmethod
    def report(cls, means):
        return {'twice': 2 * super().report(means)['mean']}


@POSITION_ENCODING_REGISTRY.register('old_positions')
class OldPositions(PositionEncoding):
    def prepare(self, q_positions, k_positions):
        return Positions()


@ATTENTION_BACKEND_REGISTRY.register('old_backend')
class OldBackend(AttentionBackend):
    supports = frozenset({'window'})

    @staticmethod
    def mask(needs, bias, q_positions, k_positions, *documents):
        assert needs.hides(len(q_positions), len(k_positions))
        return needs.visible(q_positions[:, None], k_positions)

    @staticmethod
    def attend(q, k, v, mask, needs, dropout):
        scores = (q @ k.mT * needs.scale).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v


documents = documents_of(torch.tensor([[1, 0, 1]]), 0)
assert documents.numbers.tolist() == [[1, 1, 2]] and documents.places.tolist() == [[0, 1, 0]]
"""
REGISTRIES = {
    'old_attention': ATTENTION_REGISTRY,
    'old_ffn': FFN_REGISTRY,
    'old_positions': POSITION_ENCODING_REGISTRY,
    'old_backend': ATTENTION_BACKEND_REGISTRY,
}


@pytest.fixture
def register_old_components(monkeypatch):
    monkeypatch.setattr(old_names, '_noted', set())
    old_imports.allow()
    code = compile(COMPONENTS, 'old_config.py', 'exec')
    yield lambda: exec(code, {'__name__': 'old_config'})
    for name, registry in REGISTRIES.items():
        del registry._components[name], registry._sources[name]


def test_old_component_names_work_with_one_note(register_old_components, capsys):
    register_old_components()
    config = tiny(
        attention_type='old_attention',
        ffn_type='old_ffn',
        position_encoding='old_positions',
        attention_backend='old_backend',
    )
    model = build_model(config, 'cpu', 0)
    tokens = random_tokens(config, 2)
    for _ in range(2):
        loss, _, aux = model(tokens, tokens)
        loss.backward()
    assert aux.readings is aux.metrics and aux.metrics['mean'].shape == (config.n_layer,)
    summary = model.summarize_metrics({'mean': torch.tensor([1.0, 2.0])})
    assert summary == {'twice': 3.0}
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % config.vocab_size
    assert torch.equal(model(tokens)[:, -1], model(changed)[:, -1])  # beyond two windows
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == len(set(notes))
    for note in (
        'note: Positions is now AttentionInputs; the old name will be removed.',
        'note: OldAttention.needs is now layer_spec; the old name will be removed.',
        'note: OldAttention.layer_needs is now spec; the old name will be removed.',
        'note: OldFeedForward.inside is now nonlinearity; the old name will be removed.',
        'note: AttentionSpec.visible is now is_visible; the old name will be removed.',
    ):
        assert note in notes


def test_unknown_name_is_import_error():
    with pytest.raises(ImportError, match='Nothing'):
        exec('from model_components import Nothing', {})
