"""components/delta_rule.py: against a plain loop over tokens in double precision."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from components import delta_rule as delta
from components.delta_rule import delta_rule

pytestmark = pytest.mark.usefixtures('one_thread')

CHUNK = 8
BATCH, KEY_HEADS, HEADS, K_DIM, V_DIM = 2, 2, 4, 5, 3
DECAYS = ('none', 'head', 'channel')


def token_by_token(q, k, v, beta, log_decay, starts, state):
    """S_t = (I - β_t k_t k_tᵀ) Diag(a_t) S_(t-1) + β_t k_t v_tᵀ, y_t = S_tᵀ q_t (Gated DeltaNet,
    equation 10; Kimi Linear, equation 1), for one sequence and head after the other."""
    batch, tokens, heads, _ = v.shape
    group = heads // k.size(2)
    outputs, states = [], []
    for b in range(batch):
        for h in range(heads):
            S, ys = state[b, h], []
            for t in range(tokens):
                key, query = k[b, t, h // group], q[b, t, h // group]
                if starts is not None and starts[b, t]:
                    S = torch.zeros_like(S)
                if log_decay is not None:
                    S = torch.exp(log_decay[b, t, h]).expand(len(key)).diag() @ S
                forget = torch.eye(len(key), dtype=S.dtype) - beta[b, t, h] * torch.outer(key, key)
                S = forget @ S + beta[b, t, h] * torch.outer(key, v[b, t, h])
                ys.append(S.T @ query)
            outputs.append(torch.stack(ys))
            states.append(S)
    y = torch.stack(outputs).unflatten(0, (batch, heads)).transpose(1, 2)
    return y, torch.stack(states).unflatten(0, (batch, heads))


def inputs(tokens: int, decay: str, documents: bool, seed: int = 0) -> list:
    """q, k, v, β up to 2, log decays, starts, state; keys of one head are much alike."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(random(tokens, KEY_HEADS, K_DIM) + 1, dim=-1) for _ in range(2))
    v, beta = random(tokens, HEADS, V_DIM), 2 * random(tokens, HEADS).sigmoid()
    shape = {'none': None, 'head': (tokens, HEADS), 'channel': (tokens, HEADS, K_DIM)}[decay]
    log_decay = None if shape is None else -F.softplus(random(*shape))
    starts = random(tokens) > 0.8 if documents else None
    state = random(HEADS, K_DIM, V_DIM)
    return [q, k, v, beta, log_decay, starts, state]


def differentiable(arguments: list) -> list[torch.Tensor]:
    tensors = [x for x in arguments if x is not None and x.is_floating_point()]
    return [x.requires_grad_() for x in tensors]


def assert_equal(arguments: list, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """Values and all gradients are those of the plain loop."""
    leaves = differentiable(arguments)
    results, gradients = [], []
    for rule in (delta_rule, token_by_token):
        y, state = rule(*arguments)
        generator = torch.Generator().manual_seed(9)
        weights = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (y, state))
        loss = sum((x * weight).sum() for x, weight in zip((y, state), weights))
        results.append([y, state])
        gradients.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    for actual, expected in zip([*results[0], *gradients[0]], [*results[1], *gradients[1]]):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize('documents', [False, True])
@pytest.mark.parametrize('tokens', [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
@pytest.mark.parametrize('decay', DECAYS)
def test_equals_a_loop_over_tokens(decay, tokens, documents, monkeypatch):
    monkeypatch.setattr(delta, 'CHUNK', CHUNK)
    assert_equal(inputs(tokens, decay, documents))


@pytest.mark.parametrize('decay', DECAYS)
def test_equals_a_loop_with_chunks_of_the_real_size(decay):
    q, k, v, beta, log_decay, starts, state = inputs(delta.CHUNK + 3, decay, True)
    of_one = [x if x is None else x[:1] for x in (q, k, v, beta, log_decay, starts, state)]
    assert_equal(of_one)


@pytest.mark.parametrize('decay', ['head', 'channel'])
@pytest.mark.parametrize('lowest', [-20.0, -1e3, -1e30])
def test_extreme_decays(decay, lowest, monkeypatch):
    """Some tokens empty the state or a channel of it, others keep it: no infinities, and no loss of
    precision after a token that empties it."""
    monkeypatch.setattr(delta, 'CHUNK', CHUNK)
    arguments = inputs(2 * CHUNK, decay, False)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(arguments[4].shape, generator=generator) < 0.3
    arguments[4] = torch.where(chosen, lowest, arguments[4])
    arguments[4][:, 1::5] = 0.0
    assert_equal(arguments)


@pytest.mark.parametrize('decay', DECAYS)
def test_single_precision(decay):
    """The error of fp32 does not grow with the length, even with β up to 2 and similar keys."""
    exact = [x if x is None else x[:1] for x in inputs(400, decay, False)]
    rounded = [None if x is None else x.float() for x in exact]
    y, state = delta_rule(*rounded)
    expected, last = delta_rule(*exact)
    assert ((y - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 2e-6
    torch.testing.assert_close(state.double(), last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('documents', [False, True])
@pytest.mark.parametrize('decay', DECAYS)
def test_parts_of_a_sequence_with_a_state(decay, documents, monkeypatch):
    monkeypatch.setattr(delta, 'CHUNK', CHUNK)
    *arguments, state = inputs(30, decay, documents)
    expected, last = delta_rule(*arguments, state)
    outputs, begin = [], 0
    for size in (1, 1, CHUNK, 3, 1, 16):
        part = (x if x is None else x[:, begin : begin + size] for x in arguments)
        y, state = delta_rule(*part, state)
        outputs.append(y)
        begin += size
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('decay', DECAYS)
def test_without_a_state_it_begins_with_zeros(decay):
    *arguments, state = inputs(5, decay, False)
    for actual, expected in zip(
        delta_rule(*arguments), delta_rule(*arguments, torch.zeros_like(state))
    ):
        assert torch.equal(actual, expected)


def test_a_stored_value_is_read_and_replaced():
    """With β = 1 and orthogonal keys the state is a table: a key reads its last value alone."""
    keys = torch.eye(4).double()[[0, 1, 2, 1, 3]][None, :, None]
    values = torch.arange(10.0).double().view(1, 5, 1, 2)
    query = keys.roll(-1, dims=1)  # the key of the next token
    y, state = delta_rule(query, keys, values, torch.ones(1, 5, 1).double())
    assert torch.equal(state[0, 0], values[0, [0, 3, 2, 4], 0])
    assert torch.equal(y[0, :, 0], values.new_tensor([[0, 0], [0, 0], [2, 3], [0, 0], [0, 1]]))


@pytest.mark.parametrize('tokens', [1, 2, 5, 63, 64, 65, 200])
@pytest.mark.parametrize('decay', DECAYS)
def test_flops_are_those_that_run(decay, tokens):
    arguments = [x if x is None else x[:1] for x in inputs(tokens, decay, False)]
    with FlopCounterMode(display=False) as counter:
        delta_rule(*arguments)
    sizes = KEY_HEADS, HEADS, K_DIM, V_DIM
    declared = delta.chunk_flops(tokens, *sizes, per_channel=decay == 'channel')
    assert declared == counter.get_total_flops()
