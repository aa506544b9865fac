"""components/width_rules.py: which components follow mup between two widths."""

import pytest
import torch
import torch.nn as nn
from helpers.architectures import tiny

from components.activations import Activation
from components.base import Initial
from components.feed_forward import SwiGLU
from components.width_rules import follows_mup, mup_problems
from model_builder import build_model
from model_config import ACTIVATION_REGISTRY
from optim.optimizers import AdamW, Lion, Muon


def problems(**values):
    widths = (32, 64)
    return mup_problems(
        *(build_model(tiny(**{'n_embd': w, 'n_head': w // 16, **values})) for w in widths)
    )


@pytest.mark.parametrize(
    ('values', 'parts'),
    [
        ({}, []),
        ({'arch_preset': 'llama', 'qk_norm': 'rmsnorm', 'use_gqa': True, 'num_kv_heads': 1}, []),
        ({'normalization': 'dyt', 'position_encoding': 't5_relative'}, []),
        ({'ffn_type': 'moe'}, ['blocks.0.ffn.router.weight']),
        ({'mixer': 'mamba'}, ["mixer='mamba' states no rule"]),
        ({'mixer': 'kda'}, ["mixer='kda' states no rule", 'kda.decay_output.weight do not grow']),
        (
            {'attention_type': 'mla'},
            ["attention_type='mla' states", 'attention.kv.weight do not grow'],
        ),
        ({'d_ff': 64}, ['ffn.down.weight do not grow with n_embd: 64 at n_embd=32, 64 at']),
        ({'n_head': 2}, ['grows from 16 to 32']),
        ({'scale_embeddings': True}, ['scale_embeddings=True']),
    ],
    ids=str,
)
def test_rules_between_widths(values, parts):
    """One sentence for each reason, whatever the number of layers."""
    sentences = problems(n_layer=3, **values)
    assert len(sentences) == len(parts)
    assert all(part in sentence for part, sentence in zip(parts, sentences))


def test_own_component_must_declare(monkeypatch):
    class Scaled(Activation):
        def __init__(self, config):
            super().__init__(config)
            self.scale = nn.Parameter(torch.empty(1))

        def initial_values(self):
            return {'scale': Initial.ones}

        def forward(self, x):
            return self.scale * x.relu()

    monkeypatch.setitem(ACTIVATION_REGISTRY._components, 'own', Scaled)
    monkeypatch.setitem(ACTIVATION_REGISTRY._sources, 'own', '')
    (problem,) = problems(activation='own')
    assert problem.startswith("activation='own' states no rule") and 'activation.scale' in problem
    monkeypatch.setattr(Scaled, 'mup_rule', True)
    assert problems(activation='own') == []


def test_declaration_is_inherited_only_without_own_weights():
    class Other(SwiGLU):
        def activate(self, gate):
            return gate.sigmoid()

    class WithWeights(SwiGLU):
        def __init__(self, *arguments):
            super().__init__(*arguments)

    class Declared(WithWeights):
        mup_rule = True

    assert [follows_mup(each) for each in (SwiGLU, Other, WithWeights, Declared)] == [
        *(True, True, False, True)
    ]
    assert [follows_mup(each) for each in (AdamW, Lion, Muon)] == [True, True, False]
