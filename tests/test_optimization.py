"""optimization.py: the schedule, the groups, and one measured and guarded update."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import divided_state
from model_builder import ParameterGroup, build_model, parameter_groups
from model_config import ModelArchitectureConfig
from optimization import Updater, build_optimizer, learning_rate_at
from parallelism import SingleProcess

CPU = torch.device('cpu')
RUN = SimpleNamespace(
    decay_lr=True,
    learning_rate=6e-4,
    min_lr=6e-5,
    warmup_iters=10,
    lr_decay_iters=100,
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.1,
    grad_clip=1.0,
    dtype='float32',
)
FINITE = torch.tensor(1.0)
NAN = torch.tensor(math.nan)


def options(**changed) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(RUN), **changed})


# --- The schedule ---------------------------------------------------------------------------------


def nanogpt_lr(it, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """nanoGPT's three cases, in the order of its comments."""
    if it < warmup_iters:  # 1) linear warm-up
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:  # 2) the minimum
        return min_lr
    ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)  # 3) cosine in between
    return min_lr + (learning_rate - min_lr) * (1 + math.cos(math.pi * ratio)) / 2


@pytest.mark.parametrize(('warmup', 'decay'), [(10, 100), (0, 100), (0, 1), (99, 100), (1, 7)])
def test_the_learning_rate_is_nanogpts(warmup, decay):
    run = options(warmup_iters=warmup, lr_decay_iters=decay)
    ours = [learning_rate_at(step, run) for step in range(2 * decay)]
    theirs = [nanogpt_lr(step, 6e-4, 6e-5, warmup, decay) for step in range(2 * decay)]
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_the_corners_of_the_schedule():
    assert learning_rate_at(0, RUN) == pytest.approx(6e-4 / 11)
    assert learning_rate_at(10, RUN) == 6e-4  # warm-up is over, the cosine begins at the top
    assert learning_rate_at(55, RUN) == pytest.approx((6e-4 + 6e-5) / 2)
    assert learning_rate_at(100, RUN) == learning_rate_at(10**9, RUN) == 6e-5
    # Warm-up as long as the decay, or longer: straight to the minimum, no division by zero.
    assert learning_rate_at(100, options(warmup_iters=100)) == 6e-5
    assert learning_rate_at(100, options(warmup_iters=101)) == pytest.approx(6e-4 * 101 / 102)


def test_without_decay_the_rate_is_constant():
    run = options(decay_lr=False)
    assert {learning_rate_at(step, run) for step in (0, 5, 10, 50, 1000)} == {6e-4}


# --- The optimizer --------------------------------------------------------------------------------


@pytest.mark.parametrize('preset', ['legacy', 'llama'])
def test_adamw_decays_matrices_and_nothing_else(preset):
    config = ModelArchitectureConfig(
        arch_preset=preset, n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=16
    )
    model = build_model(config)
    optimizer = build_optimizer(parameter_groups(model), RUN)
    decay = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    assert decay == {id(p): 0.1 if p.dim() > 1 else 0.0 for p in model.parameters()}
    for group in optimizer.param_groups:
        assert (group['betas'], group['lr'], group['fused']) == ((0.9, 0.95), 6e-4, True)


# --- An update ------------------------------------------------------------------------------------

SHAPES = ((7, 5), (5,), (3, 4, 2))


def an_updater(**changed) -> Updater:
    """Over three parameters, one of them not decayed, and one more that never gets a gradient."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES)
    groups = [ParameterGroup('decayed', [a, c], True), ParameterGroup('not decayed', [b], False)]
    run = options(**changed)
    return Updater(build_optimizer(groups, run), run, CPU, SingleProcess(run, CPU))


def module_of(updater: Updater) -> torch.nn.Module:
    """Something that has the updater's parameters under names."""
    return torch.nn.ParameterList(updater.parameters)


def gradients_of(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator) + 0.3 for shape in (SHAPES[0], *SHAPES[:0:-1])]


def backward(updater: Updater, gradients: list[torch.Tensor]) -> None:
    """Through the scaler, if there is one: the loss Σ parameter · gradient has this gradient."""
    updater.backward(sum((p * g).sum() for p, g in zip(updater.parameters, gradients)))


def snapshot(updater: Updater) -> list[torch.Tensor]:
    """Weights and everything that AdamW keeps for them."""
    states = [updater.optimizer.state[p] for p in updater.parameters]
    kept = [s[key] for s in states for key in ('exp_avg', 'exp_avg_sq', 'step') if key in s]
    return [tensor.detach().clone() for tensor in (*updater.parameters, *kept)]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


@pytest.mark.parametrize('grad_clip', [0.0, 0.5, 1e6])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_statistics_are_of_every_element_before_clipping(grad_clip, dtype):
    updater = an_updater(grad_clip=grad_clip, dtype=dtype)
    backward(updater, gradients_of(0))
    backward(updater, gradients_of(1))  # a second micro-batch
    sums = updater.update(1e-3, FINITE, measured=True)
    first, second = gradients_of(0), gradients_of(1)
    flat = np.concatenate([(a + b).numpy().ravel() for a, b in zip(first, second)])
    flat = flat.astype(np.float64)
    found = updater.statistics(sums.norm.item(), sums.total.item())
    assert found == pytest.approx(
        {'norm': np.sqrt((flat**2).sum()), 'mean': flat.mean(), 'std': flat.std()}, rel=1e-5
    )


def test_a_parameter_without_gradient_counts_as_zeros():
    updater = an_updater()
    first = gradients_of(0)[0]
    (updater.parameters[0] * first).sum().backward()
    sums = updater.update(1e-3, FINITE, measured=True)
    flat = np.zeros(sum(math.prod(shape) for shape in SHAPES))
    flat[: first.numel()] = first.numpy().ravel()
    found = updater.statistics(sums.norm.item(), sums.total.item())
    assert found['mean'] == pytest.approx(flat.mean(), rel=1e-5)
    assert found['std'] == pytest.approx(flat.std(), rel=1e-5)


@pytest.mark.parametrize('grad_clip', [0.0, 0.5, 1e6], ids=['off', 'clips', 'never reached'])
def test_updates_are_plain_adamw_with_torchs_clipping_bit_for_bit(grad_clip):
    updater = an_updater(grad_clip=grad_clip)
    plain = copy.deepcopy(updater.parameters)
    optimizer = torch.optim.AdamW(
        [
            {'params': [plain[0], plain[1]], 'weight_decay': 0.1},
            {'params': [plain[2]], 'weight_decay': 0.0},
        ],
        lr=6e-4,
        betas=(0.9, 0.95),
        fused=True,
    )
    for step in range(5):
        rate = learning_rate_at(step, RUN)
        backward(updater, gradients_of(step))
        updater.update(rate, FINITE, measured=step % 2 == 0)

        for parameter, gradient in zip(plain, gradients_of(step)):
            parameter.grad = gradient
        if grad_clip:
            norm = torch.nn.utils.clip_grad_norm_(plain, grad_clip)
            assert (norm > grad_clip) == (grad_clip == 0.5)
        for group in optimizer.param_groups:
            group['lr'] = rate
        optimizer.step()
        assert equal(updater.parameters, plain)
    assert not equal(an_updater().parameters, plain)
    assert updater.skipped == 0
    assert all(parameter.grad is None for parameter in updater.parameters)


LOSSES_AND_GRADIENTS = [
    pytest.param(NAN, 1.0, id='loss nan'),
    pytest.param(torch.tensor(math.inf), 1.0, id='loss inf'),
    pytest.param(FINITE, math.nan, id='gradient nan'),
    pytest.param(FINITE, math.inf, id='gradient inf'),
    pytest.param(FINITE, -math.inf, id='gradient -inf'),
    pytest.param(NAN, math.nan, id='both'),
]


@pytest.mark.parametrize('grad_clip', [0.0, 1.0])
@pytest.mark.parametrize(('loss', 'element'), LOSSES_AND_GRADIENTS)
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('steps_before', [0, 2])
def test_what_is_not_finite_changes_nothing(loss, element, grad_clip, dtype, steps_before):
    updater = an_updater(grad_clip=grad_clip, dtype=dtype)
    for step in range(steps_before):
        backward(updater, gradients_of(step))
        updater.update(1e-3, FINITE, measured=True)
    before = snapshot(updater)
    gradients = gradients_of(9)
    gradients[1][2, 1, 1] = element * gradients[1][2, 1, 1]
    backward(updater, gradients)
    updater.update(1e-3, loss, measured=True)
    # The first update makes the optimizer's state: zeros, at step 0.
    made = [torch.zeros_like(t) for t in snapshot(updater)[len(before) :]]
    assert equal(snapshot(updater), before + made)
    # In fp16 an overflowing gradient is the scaler's business, a lost loss is not.
    assert updater.skipped == (dtype == 'float32' or not torch.isfinite(loss))
    assert all(parameter.grad is None for parameter in updater.parameters)

    # And it goes on as if that update had not been there.
    control = an_updater(grad_clip=grad_clip, dtype=dtype)
    for step in range(steps_before):
        backward(control, gradients_of(step))
        control.update(1e-3, FINITE, measured=True)
    for one in (updater, control):
        backward(one, gradients_of(5))
        one.update(1e-3, FINITE, measured=True)
    assert equal(snapshot(updater), snapshot(control))
    assert not equal(snapshot(updater), before + made)


def test_skipped_updates_add_up():
    updater = an_updater()
    for loss in (FINITE, NAN, FINITE, NAN, NAN):
        backward(updater, gradients_of(0))
        updater.update(1e-3, loss, measured=False)
    assert updater.skipped == 3


def test_the_fp16_scale_halves_at_an_overflow_and_is_reported():
    updater = an_updater(dtype='float16')
    before = updater.loss_scale
    assert before == torch.amp.GradScaler('cpu').get_scale()
    backward(updater, gradients_of(0))
    updater.update(1e-3, FINITE, measured=False)
    assert updater.loss_scale == before
    overflow = gradients_of(1)
    overflow[0][0, 0] = math.inf
    backward(updater, overflow)
    updater.update(1e-3, FINITE, measured=False)
    assert updater.loss_scale == before / 2
    assert updater.skipped == 0
    assert an_updater().loss_scale is None


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_a_saved_and_loaded_updater_goes_on_bit_for_bit(dtype):
    one, other = an_updater(dtype=dtype), an_updater(dtype=dtype)
    overflow = gradients_of(1)
    overflow[0][0, 0] = math.inf
    for gradients in (gradients_of(0), overflow):
        backward(one, gradients)
        one.update(1e-3, FINITE, measured=False)
    with torch.no_grad():
        for parameter in other.parameters:
            parameter.fill_(math.nan)  # the weights come with the rest
    state = divided_state.collect(one.parallel, module_of(one), one)
    stored = divided_state.StoredState([state])
    divided_state.restore(stored, other.parallel, module_of(other), other)
    before = snapshot(one)
    for updater in (other, one):
        assert equal(snapshot(updater), before)  # the other's update did not reach into this one
        backward(updater, gradients_of(2))
        updater.update(1e-3, FINITE, measured=False)
    assert equal(snapshot(one), snapshot(other)) and not equal(snapshot(one), before)
    assert one.loss_scale == other.loss_scale


@pytest.mark.parametrize('element', [math.nan, math.inf])
def test_weights_that_are_not_finite_are_told(element):
    updater = an_updater()
    assert updater.weights_are_finite()
    with torch.no_grad():
        updater.parameters[1][0, 0, 0] = element
    assert not updater.weights_are_finite()
