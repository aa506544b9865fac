"""components/feed_forward.py: the nonlinearity is recomputed, without other changes."""

import weakref

import pytest
import torch

from model_components import Activation
from model_config import FFN_REGISTRY, ModelArchitectureConfig

DENSE = [name for name in FFN_REGISTRY if name not in ('moe', 'none')]


def network(ffn_type):
    config = ModelArchitectureConfig(ffn_type=ffn_type, n_embd=16, n_head=2, vocab_size=32)
    torch.manual_seed(0)
    return FFN_REGISTRY[ffn_type](config, 0)


def gradients(network, output, x):
    inputs = [x, *network.parameters()]
    return torch.autograd.grad(output.square().sum(), inputs)


class Noisy(Activation):
    """Differs in each call, like a randomized ReLU."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.gain = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.gain * x * torch.rand_like(x)


@pytest.mark.parametrize('noisy', [False, True])
@pytest.mark.parametrize('ffn_type', DENSE)
def test_recomputed_nonlinearity_changes_nothing(ffn_type, noisy):
    ffn, x = network(ffn_type), torch.randn(2, 5, 16, requires_grad=True)
    if noisy and ffn_type == 'standard':
        ffn.activation = Noisy()
    first = ffn.up if ffn_type == 'standard' else ffn.gate_up
    torch.manual_seed(1)
    plain = ffn.down(ffn.nonlinearity(first(x)))
    expected = gradients(ffn, plain, x)
    torch.manual_seed(1)
    actual, _ = ffn(x)
    torch.rand(3)  # other random numbers in between must not matter
    assert torch.equal(actual, plain)
    for one, other in zip(gradients(ffn, actual, x), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize('ffn_type', DENSE)
def test_nonlinearity_output_is_not_saved(ffn_type, monkeypatch):
    ffn, x = network(ffn_type), torch.randn(2, 5, 16, requires_grad=True)
    made, products, nonlinearity = [], [], ffn.nonlinearity
    ffn.down.register_forward_hook(lambda *_: products.append(1))

    def watched(hidden):
        result = nonlinearity(hidden)
        made.append(weakref.ref(result.untyped_storage()))
        return result

    monkeypatch.setattr(ffn, 'nonlinearity', watched)
    output, _ = ffn(x)
    assert [storage() for storage in made] == [None]
    gradients(ffn, output, x)
    assert len(made) == 2 and len(products) == 1, 'the product is not computed again'
    with torch.no_grad():
        ffn(x)
    assert len(made) == 3
