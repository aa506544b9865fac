"""The whole workflow: train, override, compare, sample."""

import json
import re

import jsonschema
import pytest
import torch
from helpers.project import PROJECT

from common.console_output import visible
from data.tokenizer import Tokenizer
from inference.generate import generate
from inference.sampling import Sampler
from model_builder import build_model
from model_config import ModelArchitectureConfig
from training.checkpoint import load_state, read_index

pytestmark = pytest.mark.slow


def record_of(folder):
    (path,) = folder.glob('*/run_*/record.json')
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ('preset', 'name'),
    [
        ('gpt2', '2L-2H-32D-AbsPos-LN-NB-GELU-PostNorm'),
        ('llama', '2L-2H-32D-RoPE-RMS-SwiGLU-PreNorm'),
        ('team', '2L-2H-32D-RoPE-RMS-SwiGLU-PreNorm'),
        ('hybrid', '2L-2H-32D-RoPE-LN-NB-GELU-PreNorm'),
        ('custom', '2L-2H-32D-RoPE-RMS-GELU-PreNorm'),
    ],
)
def test_config_file_trains_its_architecture(train, tmp_path, preset, name):
    out = train(str(PROJECT / f'config/arch_{preset}.py')).stdout
    record = record_of(tmp_path)
    schema = json.loads((PROJECT / 'records/record_schema.json').read_text())
    jsonschema.validate(record, schema)
    assert record['architecture']['name'] == name and name in out
    assert record['status'] == 'finished'
    assert [e['iter'] for e in record['training_iterations']] == [0, 1, 2, 3]
    assert [e['iter'] for e in record['eval_steps']] == [0, 4]
    # The checkpoint has the architecture in the record.
    (folder,) = tmp_path.glob('*/run_*/checkpoints/iter_00000004')
    checkpoint = read_index(folder)
    (state,) = load_state(checkpoint)
    config = ModelArchitectureConfig.from_dict(record['architecture']['choices'])
    assert config.hash == record['architecture']['hash']
    expected = {name: p.shape for name, p in build_model(config).named_parameters()}
    assert {name: weight.shape for name, weight in state['model'].items()} == expected


def test_override_reaches_model_record_and_comparison(train, run_script, tmp_path):
    gpt2 = str(PROJECT / 'config/arch_gpt2.py')
    train(gpt2, '--out_dir=plain')
    out = train(gpt2, '--out_dir=changed', '--position_encoding=rope').stdout
    name = '2L-2H-32D-RoPE-LN-NB-GELU-PostNorm'
    assert name in out
    (plain,) = tmp_path.glob('plain/run_*/record.json')
    (changed,) = tmp_path.glob('changed/run_*/record.json')
    before, after = (json.loads(path.read_text()) for path in (plain, changed))
    assert after['config']['position_encoding'] == 'rope'
    assert after['architecture']['hash'] != before['architecture']['hash']
    table = 32 * 32  # block_size × n_embd, the learned positions
    params = [r['startup_info']['model']['total_params'] for r in (before, after)]
    assert params[0] - params[1] == table
    text = run_script('compare_architectures.py', '--latest', '2').stdout
    assert name in text and re.search(r'position_encoding +.*rope', text)


def test_training_learns(train, tmp_path):
    """Text of ten random words: the loss falls far below that of uniform bytes."""
    train('--arch_preset=llama', '--max_iters=60', '--learning_rate=0.01', '--log_style=line')
    record = record_of(tmp_path)
    first, last = record['eval_steps'][0]['val_loss'], record['eval_steps'][-1]['val_loss']
    assert first == pytest.approx(torch.log(torch.tensor(256.0)).item(), abs=0.1)
    assert last < first - 2
    assert record['summary']['best_val_loss'] == last


def test_sample_equals_checkpoint_model(train, run_script, tmp_path):
    train('--arch_preset=llama', '--out_dir=out')
    arguments = ['--start=the ', '--num_samples=1', '--max_new_tokens=20', '--temperature=0']
    out = run_script('sample.py', *arguments, '--dtype=float32', '--device=cpu').stdout
    (folder,) = tmp_path.glob('out/run_*/checkpoints/iter_00000004')
    checkpoint = read_index(folder)
    config = ModelArchitectureConfig.from_dict(checkpoint.index['architecture'])
    model = build_model(config, 'cpu', seed=0).eval()
    (state,) = load_state(checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state['model'][name])
    tokenizer = Tokenizer({'kind': 'byte'})
    start = tokenizer.encode('the ')
    drawn = generate(model, torch.tensor([start]), 20, choose=Sampler(256, temperature=0))
    assert visible(tokenizer.decode(start + [token.item() for token in drawn])) in out


def test_sample_is_reproducible_by_seed(train, run_script):
    train('--out_dir=out')

    def text(seed):
        out = run_script('sample.py', '--num_samples=2', '--max_new_tokens=30', f'--seed={seed}')
        return out.stdout.rpartition('-' * 80)[0]  # without the speed

    assert text(1) == text(1) != text(2)


def test_eval_only_measures_without_saving(train, tmp_path):
    train('--eval_only')
    record = record_of(tmp_path)
    assert [e['iter'] for e in record['eval_steps']] == [0]
    assert not record['training_iterations'] and not record['checkpoints']


def test_bfloat16_losses_match_float32(train, tmp_path):
    losses = {}
    for dtype in ('float32', 'bfloat16'):
        train(f'--dtype={dtype}', f'--out_dir={dtype}', '--max_iters=8')
        (path,) = tmp_path.glob(f'{dtype}/run_*/record.json')
        record = json.loads(path.read_text())
        losses[dtype] = [e['loss'] for e in record['training_iterations']]
        assert record['startup_info']['hardware']['dtype'] == dtype
        (folder,) = path.parent.glob('checkpoints/*')
        (state,) = load_state(read_index(folder))
        assert {weight.dtype for weight in state['model'].values()} == {torch.float32}
    assert losses['bfloat16'] != losses['float32']
    assert losses['bfloat16'] == pytest.approx(losses['float32'], abs=0.03)
