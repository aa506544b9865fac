"""components/lm_head.py in a run: effects of the z-loss."""

import pytest
import torch
from helpers.in_process import train_here

from components.lm_head import FEW_ROWS
from model_builder import build_model
from model_config import ModelArchitectureConfig


@pytest.fixture(scope='module')
def trained(tiny_dataset, tmp_path_factory):
    """train_here with one iteration of four sequences and fixed options."""

    def run(**options):
        folder = tmp_path_factory.mktemp('ends')
        values = {'max_iters': 1, 'warmup_iters': 0, 'grad_clip': 0.0, 'eval_iters': 2, **options}
        return train_here(tiny_dataset, folder, **values)

    return run


@pytest.mark.slow
def test_z_loss_affects_gradient_only(trained):
    """The gradient is that of one plain formula over all tokens; no reported loss includes it, and
    the record shows it."""
    divided = [{'batch_size': 4 // n, 'gradient_accumulation_steps': n} for n in (1, 2, 4)]
    runs = [trained(z_loss=0.5, **division) for division in divided]
    plain = trained(**divided[1])
    tokens, targets = (torch.cat(part) for part in zip(*runs[1].trained_on))
    model = build_model(runs[0].session.settings.architecture, device='cpu', seed=1337)
    logits = model(tokens)
    log_z = logits.logsumexp(-1)
    loss = (log_z - logits.gather(-1, targets[..., None])[..., 0]).mean()
    (loss + 0.5 * log_z.square().mean()).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()

    def first(run):
        (entry,) = run.record['training_iterations']
        return entry

    for run in runs:
        assert first(run)['gradients']['norm'] == pytest.approx(norm, rel=1e-4)
        assert first(run)['readings'] == {
            'z_loss': pytest.approx(log_z.square().mean().item(), rel=1e-5)
        }
        assert first(run)['loss'] == pytest.approx(loss.item(), rel=1e-6)
        before = run.record['eval_steps'][0]
        assert before['val_loss'] == pytest.approx(plain.record['eval_steps'][0]['val_loss'])
    assert first(plain)['readings'] == {}
    assert first(plain)['loss'] == pytest.approx(first(runs[1])['loss'])
    assert abs(first(plain)['gradients']['norm'] / norm - 1) > 0.1


@pytest.mark.parametrize('rows', [0, 1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('bias', [False, True])
def test_logits_of_few_rows_match_projection(rows, dtype, bias):
    sizes = {'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'vocab_size': 37, 'head_bias': bias}
    head = build_model(ModelArchitectureConfig(arch_preset='llama', **sizes), 'cpu', 1).output_head
    if bias:
        head.projection.bias.data.normal_()
    hidden = torch.randn(rows, 1, 16)
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        expected = head.logits(hidden).detach()  # with gradients: by the projection itself
        with torch.no_grad():
            actual = head.logits(hidden)
    assert actual.is_contiguous() and actual.dtype == dtype
    torch.testing.assert_close(actual, expected)
