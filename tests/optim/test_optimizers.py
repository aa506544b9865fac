"""optim/optimizers.py: each optimizer against a reference, and the grouping of matrices."""

import math

import pytest
import torch
from helpers.optimizer_options import options

from model_builder import ParameterGroup, build_model, parameter_groups
from model_config import ModelArchitectureConfig
from optim.optimizers import orthogonalize
from parallel.strategies import SingleProcess
from training_config import OPTIMIZER_REGISTRY

CPU = torch.device('cpu')
DECAY = 0.1


def random(*shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(*shapes) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(random(*shape, seed=n)) for n, shape in enumerate(shapes)]


def build(groups: list[ParameterGroup], **changed) -> torch.optim.Optimizer:
    run = options(weight_decay=DECAY, **changed)
    return SingleProcess(run, CPU).build_optimizer(groups, run)


def train(optimizer, weights, gradients, rate=lambda step: 1e-2 / (step + 1), steps=4) -> None:
    """gradients(step) returns one gradient per weight."""
    for step in range(steps):
        for weight, gradient in zip(weights, gradients(step)):
            weight.grad = gradient.clone()
        for group in optimizer.param_groups:
            group['lr'] = rate(step) * group.get('lr_scale', 1.0)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()


def random_gradients(weights):
    """A function of the step, for `train`."""
    return lambda step: [
        random(*weight.shape, seed=100 * step + 7 * n) for n, weight in enumerate(weights)
    ]


@pytest.mark.parametrize('optimizer', list(OPTIMIZER_REGISTRY))
@pytest.mark.parametrize('preset', ['legacy', 'llama'])
def test_weight_decay_and_rule_of_groups(preset, optimizer):
    """Hidden matrices and embeddings have weight decay; Muon updates only hidden matrices."""
    model = build_model(
        ModelArchitectureConfig(
            arch_preset=preset, n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=16
        )
    )
    built = build(parameter_groups(model), optimizer=optimizer)
    actual = {
        id(p): (group['weight_decay'], group['rule'], group['lr_scale'])
        for group in built.param_groups
        for p in group['params']
    }
    rules = {'adamw': ('fused AdamW',) * 2, 'muon': ('Muon', 'fused AdamW'), 'lion': ('Lion',) * 2}
    hidden, rest = rules[optimizer]
    assert actual == {
        id(p): (
            DECAY if p.dim() > 1 else 0.0,
            hidden if p.dim() > 1 and name.startswith('blocks.') else rest,
            1.0,
        )
        for name, p in model.named_parameters()
    }
    fused = [g for g in built.param_groups if g['rule'] == 'fused AdamW']
    assert all((g['betas'], g['fused']) == ((0.9, 0.95), True) for g in fused)


# --- Muon -----------------------------------------------------------------------------------------

MATRICES = ((8, 5), (5, 8), (6, 6), (8, 5), (1, 4))


@pytest.mark.parametrize('adjust_lr_fn', ['original', 'match_rms_adamw'])
@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-6), ('bfloat16', 2e-3)])
def test_muon_matches_torch_with_adamw_for_rest(monkeypatch, adjust_lr_fn, dtype, tolerance):
    ours, theirs = parameters(*MATRICES, (3,)), parameters(*MATRICES, (3,))
    groups = [
        ParameterGroup('matrices', ours[:-1], True, rows=[(rows,) for rows, _ in MATRICES]),
        ParameterGroup('rest', ours[-1:], False),
    ]
    optimizer = build(
        groups, optimizer='muon', muon_adjust_lr_fn=adjust_lr_fn, dtype=dtype, muon_momentum=0.9
    )
    train(optimizer, ours, random_gradients(ours))

    if dtype == 'float32':  # torch's iteration is always in bfloat16
        monkeypatch.setattr(torch.Tensor, 'bfloat16', lambda tensor: tensor.clone())
    muon = torch.optim.Muon(
        theirs[:-1], weight_decay=DECAY, momentum=0.9, adjust_lr_fn=adjust_lr_fn
    )
    adamw = torch.optim.AdamW(theirs[-1:], weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    for reference in (muon, adamw):
        train(reference, theirs, random_gradients(theirs))
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs)) < tolerance
    moved = [(a - b).abs().max().item() for a, b in zip(ours, parameters(*MATRICES, (3,)))]
    assert min(moved) > 10 * tolerance or dtype == 'bfloat16'


def test_newton_schulz_singular_values():
    for shape in ((3, 20, 12), (2, 3, 12, 20), (1, 16, 16)):
        matrices = random(*shape, seed=3)
        u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
        actual = orthogonalize(matrices, 5, torch.float32)
        inside = u.mT @ actual @ vt.mT  # diagonal if the singular vectors are equal
        diagonal = inside.diagonal(dim1=-2, dim2=-1)
        assert actual.shape == shape
        torch.testing.assert_close(inside, torch.diag_embed(diagonal), atol=1e-4, rtol=0)
        large = torch.linalg.svdvals(matrices) > 0.1 * torch.linalg.matrix_norm(matrices)[..., None]
        assert diagonal[large].min() > 0.6 and diagonal.max() < 1.3
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 4), 5, torch.float32), torch.zeros(1, 3, 4))


@pytest.mark.parametrize('rows', [(4, 4, 4), (8, 2, 2), (12,)])
@pytest.mark.parametrize('stack', [(), (3,)])
def test_stacked_matrices_train_separately(rows, stack):
    """Fused projections and experts: split by rows, and along the leading dimensions."""
    fused, other = parameters((*stack, sum(rows), 6), (3,))
    pieces = [
        torch.nn.Parameter(piece.detach().clone())
        for matrix in fused.view(-1, sum(rows), 6)
        for piece in matrix.split(rows)
    ]
    together = [
        ParameterGroup('matrices', [fused], True, rows=[rows]),
        ParameterGroup('rest', [other], False),
    ]
    apart = [
        ParameterGroup('matrices', pieces, True, rows=[(len(piece),) for piece in pieces]),
        ParameterGroup('rest', [other], False),
    ]
    gradient = random_gradients([fused])

    def split(step):
        matrices = gradient(step)[0].view(-1, sum(rows), 6)
        return [piece for matrix in matrices for piece in matrix.split(rows)]

    train(build(together, optimizer='muon'), [fused], gradient)
    train(build(apart, optimizer='muon'), pieces, split)
    expected = torch.cat(pieces).view_as(fused)
    torch.testing.assert_close(fused, expected, atol=1e-6, rtol=0)
    assert (fused - parameters(fused.shape)[0]).abs().max() > 1e-3


def test_muon_learning_rate():
    weights, control = parameters((4, 4), (3,)), parameters((4, 4), (3,))
    for some, changed in (
        (weights, {'muon_learning_rate': 6e-4 * 5}),
        (control, {'learning_rate': 6e-4, 'muon_learning_rate': 6e-4}),
    ):
        groups = [
            ParameterGroup('matrices', some[:1], True, rows=[(4,)]),
            ParameterGroup('rest', some[1:], False, lr_scale=2.0),
        ]
        optimizer = build(groups, optimizer='muon', **changed)
        scales = {group['rule']: group['lr_scale'] for group in optimizer.param_groups}
        assert scales == {'Muon': pytest.approx(5 if some is weights else 1), 'fused AdamW': 2.0}
        rate = (lambda step: 1e-2) if some is weights else (lambda step: 5e-2)
        train(optimizer, some, random_gradients(some), rate=rate)
    torch.testing.assert_close(weights[0], control[0])
    assert not torch.equal(weights[1], control[1])


def test_match_rms_adamw_update_size():
    """match_rms_adamw gives updates with an RMS of 0.2 (Liu et al. 2025)."""
    for shape in ((64, 64), (256, 64), (64, 256)):
        weight, other = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.zeros(1))
        groups = [
            ParameterGroup('matrices', [weight], True, rows=[(shape[0],)]),
            ParameterGroup('rest', [other], False),
        ]
        optimizer = build(groups, optimizer='muon')
        train(optimizer, [weight], random_gradients([weight]), rate=lambda step: 1.0, steps=1)
        assert weight.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


# --- Lion -----------------------------------------------------------------------------------------


def test_lion_matches_pseudocode():
    """Chen et al. 2023, algorithm 2, element by element in plain Python."""
    weights = parameters((3, 4), (5,))
    groups = [
        ParameterGroup('decayed', weights[:1], True),
        ParameterGroup('not decayed', weights[1:], False),
    ]
    train(build(groups, optimizer='lion', lion_beta1=0.8), weights, random_gradients(weights))
    for number, (start, decay) in enumerate(zip(parameters((3, 4), (5,)), (DECAY, 0.0))):
        for index, theta in enumerate(start.flatten().tolist()):
            m = 0.0
            for step in range(4):
                g = random_gradients(weights)(step)[number].flatten()[index].item()
                c = 0.8 * m + (1 - 0.8) * g
                theta -= 1e-2 / (step + 1) * (math.copysign(1.0, c) + decay * theta)
                m = 0.99 * m + (1 - 0.99) * g
            assert weights[number].flatten()[index].item() == pytest.approx(theta, abs=1e-6)
