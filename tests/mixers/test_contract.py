"""What every mixer must meet; the checks are tried on an example and on broken ones."""

import pytest
import torch
import torch.nn as nn
from helpers import mixer_checks
from helpers.architectures import OWN_MIXERS
from helpers.mixer_checks import (
    check_beside_attention,
    check_bfloat16,
    check_bfloat16_gradients,
    check_causal,
    check_compiles,
    check_counts,
    check_documents,
    check_extremes,
    check_float32,
    check_flops,
    check_generation,
    check_gradients,
    check_gradients_of_values,
    check_initialization,
    check_lengths,
    check_mup,
    check_parameters_in_bfloat16,
    check_pieces,
)
from helpers.mixers import EXAMPLE, ExampleMixer

from model_components import Initial
from model_config import MIXER_REGISTRY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

CHECKS = [check for name, check in vars(mixer_checks).items() if name.startswith('check_')]


@pytest.fixture
def example(register):
    register(MIXER_REGISTRY, EXAMPLE, ExampleMixer)


@pytest.mark.usefixtures('example')
@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize('mixer', [EXAMPLE, *OWN_MIXERS])
def test_mixer(mixer, check):
    check(mixer)


# --- The checks find mistakes ---------------------------------------------------------------------


class SeesLaterTokens(ExampleMixer):
    def forward(self, x, attn_inputs):
        return super().forward(x, attn_inputs) + 0.1 * x.mean(dim=1, keepdim=True)


class MixesSequences(ExampleMixer):
    def forward(self, x, attn_inputs):
        return super().forward(x, attn_inputs) + 0.1 * x.mean(dim=0, keepdim=True)


class CrossesDocuments(ExampleMixer):
    def forward(self, x, attn_inputs):
        return super().forward(x, attn_inputs._replace(starts=None))


class StateCrossesDocuments(ExampleMixer):
    """Only from one chunk to the next."""

    def chunk(self, q, k, v, state, starts):
        y, after = super().chunk(q, k, v, state, starts)
        return y, after if starts is None else super().chunk(q, k, v, state, None)[1]


class LosesState(ExampleMixer):
    def forward(self, x, attn_inputs):
        return super().forward(x, attn_inputs._replace(cache=None))


class LosesConvolution(ExampleMixer):
    """Only the last inputs of the convolution."""

    def forward(self, x, attn_inputs):
        if attn_inputs.cache:
            attn_inputs.cache.tensors.pop('convolution', None)
        return super().forward(x, attn_inputs)


class StateGrows(ExampleMixer):
    def forward(self, x, attn_inputs):
        if (cache := attn_inputs.cache) is not None:
            earlier = cache.get('inputs')
            cache.set('inputs', x if earlier is None else torch.cat((earlier, x), dim=1))
        return super().forward(x, attn_inputs)


class StateHoldsMore(ExampleMixer):
    """The state is a view of all inputs."""

    def forward(self, x, attn_inputs):
        y = super().forward(x, attn_inputs)
        if attn_inputs.cache:
            attn_inputs.cache.tensors['last'] = x.repeat(2, 1, 1)[:1, -1]
        return y


class IsSingle(ExampleMixer):
    """Computes in fp32 in any case."""

    def chunk(self, q, k, v, state, starts):
        y, after = super().chunk(q.float(), k.float(), v.float(), state.float(), starts)
        return y.to(q.dtype), after.to(q.dtype)


class DropsGradient(ExampleMixer):
    """Of the state."""

    def chunk(self, q, k, v, state, starts):
        return super().chunk(q, k, v, state.detach(), starts)


class StateIsBfloat16(ExampleMixer):
    def chunk(self, q, k, v, state, starts):
        y, state = super().chunk(q, k, v, state.to(q.dtype), starts)
        return y, state if q.dtype == torch.float64 else state.bfloat16()


class GainIsBfloat16(ExampleMixer):
    """Rounds a parameter that is not in a product of matrices."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.gain = nn.Parameter(torch.empty(1))

    def initial_values(self):
        return {**super().initial_values(), 'gain': Initial.ones}

    def forward(self, x, attn_inputs):
        return super().forward(x, attn_inputs) * self.gain.bfloat16()


class IsCoarse(ExampleMixer):
    """Differs by a tenth under autocast."""

    def forward(self, x, attn_inputs):
        y = super().forward(x, attn_inputs)
        return y + 0.1 * y.abs() if y.dtype == torch.bfloat16 else y


class GradientIsCoarse(ExampleMixer):
    """The gradient that enters it differs by a twentieth under autocast."""

    def forward(self, x, attn_inputs):
        y = super().forward(x, attn_inputs)
        return y + 0.05 * (y - y.detach()) if y.dtype == torch.bfloat16 else y


class Overflows(ExampleMixer):
    def forward(self, x, attn_inputs):
        return super().forward(x, attn_inputs) + 0 * x.exp().square()


class CountsChunks(ExampleMixer):
    """Counts the chunks in the recurrent form too."""

    def flops(self, seq_len, causal):
        return super().flops(seq_len, False)


class CountsNothing(ExampleMixer):
    def flops(self, seq_len, causal):
        return super().flops(seq_len, True)


class HasUnusedWeight(ExampleMixer):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.unused = nn.Linear(2, 2)


class ReadsValue(ExampleMixer):
    """Depends on data in Python."""

    def forward(self, x, attn_inputs):
        return super().forward(x, attn_inputs) * (1.0 if x.sum().item() < 1e9 else 2.0)


class DependsOnLayer(ExampleMixer):
    """Has a number of the layer that torch.compile takes for a constant."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.scale = layer + 1

    def forward(self, x, attn_inputs):
        return super().forward(x, attn_inputs) * self.scale


class WritesUnknown(ExampleMixer):
    def residual_weights(self):
        return []


class IsRandom(ExampleMixer):
    """Ignores the generator."""

    def initial_values(self):
        return {'decay': lambda tensor, generator: tensor.uniform_()}


class KnowsNeighbor(ExampleMixer):
    """Differs if another mixer is beside it."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.beside = config.mixer != EXAMPLE

    def forward(self, x, attn_inputs):
        return super().forward(x, attn_inputs) * (0.5 if self.beside else 1.0)


class CountsElsewhere(ExampleMixer):
    def flops(self, seq_len, causal):
        return {'other': sum(super().flops(seq_len, causal).values())}


class HidesMatrices(ExampleMixer):
    """So that initialization and learning rates do not follow the width."""

    def matrices(self):
        return {}


BROKEN = [
    (SeesLaterTokens, check_causal),
    (SeesLaterTokens, check_lengths),
    (MixesSequences, check_documents),
    (CrossesDocuments, check_causal),
    (CrossesDocuments, check_documents),
    (StateCrossesDocuments, check_causal),
    (LosesState, check_pieces),
    (LosesConvolution, check_pieces),
    (StateGrows, check_generation),
    (StateHoldsMore, check_generation),
    (LosesState, check_generation),
    (IsSingle, check_gradients_of_values),
    (DropsGradient, check_gradients_of_values),
    (StateIsBfloat16, check_bfloat16),
    (GainIsBfloat16, check_parameters_in_bfloat16),
    (StateIsBfloat16, check_float32),
    (IsCoarse, check_bfloat16),
    (GradientIsCoarse, check_bfloat16_gradients),
    (Overflows, check_extremes),
    (CountsChunks, check_flops),
    (CountsNothing, check_flops),
    (HasUnusedWeight, check_gradients),
    (ReadsValue, check_compiles),
    (DependsOnLayer, check_compiles),
    (WritesUnknown, check_initialization),
    (IsRandom, check_initialization),
    (HidesMatrices, check_mup),
    (HidesMatrices, check_initialization),
    (CountsElsewhere, check_counts),
    (KnowsNeighbor, check_beside_attention),
]
FAILURES = (AssertionError, torch._dynamo.exc.TorchDynamoException)


@pytest.mark.parametrize(
    ('broken', 'check'), BROKEN, ids=lambda each: each.__name__.removeprefix('check_')
)
def test_broken_mixer_is_found(broken, check, register):
    register(MIXER_REGISTRY, EXAMPLE, broken)
    with pytest.raises(FAILURES):
        check(EXAMPLE)
