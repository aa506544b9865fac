"""components/short_convolution.py: against torch's grouped convolution, whole and in pieces."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from components.kv_cache import MixerState
from components.short_convolution import ShortConvolution

pytestmark = pytest.mark.usefixtures('one_thread')

BATCH, CHANNELS = 2, 3
SHAPES = [(1, 5), (2, 1), (3, 2), (4, 1), (4, 3), (4, 17)]  # width, tokens


def convolution(width: int, bias: bool = True, dtype=torch.float64) -> ShortConvolution:
    module = ShortConvolution(CHANNELS, width, bias=bias).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(width))
    return module


def inputs(tokens: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(BATCH, tokens, CHANNELS, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def random_starts(tokens: int, seed: int, first: bool) -> torch.Tensor:
    """Starts of documents of a few tokens; whether the first token begins one."""
    starts = torch.rand(BATCH, tokens, generator=torch.Generator().manual_seed(seed)) < 0.3
    starts[:, 0] = first
    return starts


def of_torch(module: ShortConvolution, x: torch.Tensor) -> torch.Tensor:
    """The convolution of one document by torch, (B, T, C)."""
    y = F.conv1d(
        x.transpose(1, 2),
        module.weight[:, None],
        module.bias,
        padding=module.width - 1,
        groups=CHANNELS,
    )
    return y[..., : x.size(1)].transpose(1, 2)


def document_by_document(module, x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Each document of each sequence by itself."""
    rows = []
    for sequence, begins in zip(x, starts):
        bounds = sorted({0, *begins.nonzero().flatten().tolist(), len(sequence)})
        parts = [of_torch(module, sequence[None, a:b]) for a, b in itertools.pairwise(bounds)]
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


def check_equal(module, x, y, expected):
    """Equal values and gradients of x, weight and bias."""
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(y, generator=torch.Generator().manual_seed(0))
    for actual, correct in zip(
        torch.autograd.grad(y, (x, *module.parameters()), cotangent),
        torch.autograd.grad(expected, (x, *module.parameters()), cotangent),
        strict=True,
    ):
        assert torch.allclose(actual, correct, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('width, tokens', SHAPES)
def test_equals_grouped_convolution(width, tokens, bias):
    module, x = convolution(width, bias), inputs(tokens)
    check_equal(module, x, module(x), of_torch(module, x))


@pytest.mark.parametrize('first', [False, True])
@pytest.mark.parametrize('width, tokens', SHAPES)
def test_documents_are_separate(width, tokens, first):
    module, x = convolution(width), inputs(tokens)
    for seed in range(3):
        starts = random_starts(tokens, seed, first)
        check_equal(module, x, module(x, starts), document_by_document(module, x, starts))


def test_values_of_other_documents_do_not_matter_even_if_infinite():
    module, x = convolution(4), inputs(6)
    starts = torch.zeros(BATCH, 6, dtype=torch.bool)
    starts[:, 3] = True
    spoiled = torch.cat((torch.full_like(x[:, :3], torch.inf), x[:, 3:]), dim=1)
    assert torch.equal(module(spoiled, starts)[:, 3:], module(x, starts)[:, 3:])


@pytest.mark.parametrize('documents', [False, True])
@pytest.mark.parametrize('lengths', [(1,) * 9, (2, 1, 6), (5, 4), (1, 7, 1)])
@pytest.mark.parametrize('width', [1, 2, 4])
def test_pieces_equal_the_whole(width, lengths, documents):
    module, x = convolution(width), inputs(9).detach()
    starts = random_starts(9, seed=width, first=True) if documents else None
    state, parts = MixerState(), []
    for piece, begins in zip(
        x.split(lengths, dim=1),
        [None] * len(lengths) if starts is None else starts.split(lengths, dim=1),
        strict=True,
    ):
        parts.append(module(piece, begins, state, 'taps'))
        taps = state.get('taps')
        assert taps.shape == (BATCH, width - 1, CHANNELS) and taps.dtype == x.dtype
    assert torch.allclose(torch.cat(parts, dim=1), module(x, starts), rtol=1e-12, atol=1e-12)
    assert state.nbytes == BATCH * (width - 1) * CHANNELS * 8


def test_two_convolutions_share_a_state_under_their_names():
    module, x = convolution(3), inputs(4).detach()
    state = MixerState()
    module(x, None, state, 'a')
    module(2 * x, None, state, 'b')
    step = inputs(1).detach()
    whole = module(torch.cat((x, step), dim=1))[:, -1:]
    assert torch.allclose(module(step, None, state, 'a'), whole)
    assert not torch.allclose(module(step, None, state, 'b'), whole)


def test_bfloat16_inputs_are_summed_in_fp32():
    """fp32 weights, as under autocast; the output is the exact one, rounded once."""
    module, x = convolution(4, dtype=torch.float32), inputs(50, torch.bfloat16)
    y = module(x, random_starts(50, seed=0, first=True))
    exact = convolution(4)
    expected = document_by_document(exact, x.double(), random_starts(50, seed=0, first=True))
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.double(), expected, rtol=2**-8, atol=1e-5)
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and module.weight.grad.dtype == torch.float32
    expected.sum().backward()
    assert torch.allclose(module.weight.grad.double(), exact.weight.grad, rtol=1e-5, atol=1e-4)


def test_only_the_inputs_are_kept_for_the_backward_pass():
    """Memory: the input once, not once for each tap, with documents too."""
    module, x = convolution(4), inputs(64)
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(x, random_starts(64, seed=0, first=True))
    assert sum(saved.values()) < 2 * x.nbytes


@pytest.mark.parametrize('documents', [False, True])
def test_compiles_without_breaks(documents):
    torch._dynamo.reset()
    module, x = convolution(3), inputs(7)
    starts = random_starts(7, seed=1, first=True) if documents else None
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    check_equal(module, x, compiled(x, starts), module(x, starts))
