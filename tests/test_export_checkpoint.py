"""export_checkpoint.py: every exported format loads as the trained model."""

import errno
import hashlib
import importlib.util
import json
import os
import shutil

import numpy as np
import pytest
import torch
from helpers.in_process import train_here

import export_checkpoint
import interop
from common.errors import UserError, run_script
from data.tokenizer import Tokenizer
from model_builder import Transformer, build_model
from model_config import ModelArchitectureConfig

pytestmark = pytest.mark.optional

safetensors = pytest.importorskip('safetensors.torch')
TOKENS = torch.arange(24).view(2, 12) * 7 % 256


@pytest.fixture(scope='module')
def trained(tmp_path_factory, tiny_dataset) -> dict[str, tuple]:
    """Preset -> (out_dir, the logits of the trained model, its run)."""
    runs = {}
    for preset in ('gpt2', 'llama'):  # one has a tied head, one an untied head
        out_dir = tmp_path_factory.mktemp(preset)
        options = {'arch_preset': preset, 'eval_interval': 2, 'keep_last': 2, 'max_iters': 4}
        run = train_here(tiny_dataset, out_dir, **options)
        runs[preset] = out_dir, logits_of(run.session.raw_model), run
    return runs


def logits_of(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS)


def fresh(config: dict) -> Transformer:
    """A model with other weights, of the architecture in the config of an exported file."""
    architecture = json.loads(json.dumps(config['architecture']))
    return build_model(ModelArchitectureConfig.from_dict(architecture), 'cpu', seed=99)


def export(*arguments, code: int = 0) -> None:
    with pytest.raises(SystemExit) as exit:
        run_script(export_checkpoint.main, [str(argument) for argument in arguments])
    assert exit.value.code == code


@pytest.mark.parametrize('preset', ['gpt2', 'llama'])
def test_pt_file(trained, tmp_path, preset, capsys):
    out_dir, logits, run = trained[preset]
    output = tmp_path / 'model.pt'
    export(f'--out_dir={out_dir}', f'--output={output}')
    exported = torch.load(output, weights_only=True)
    config = exported['config']
    model = fresh(config)
    assert not torch.equal(logits_of(model), logits)
    model.load_state_dict(exported['model'])  # strict
    assert torch.equal(logits_of(model), logits)
    assert (config['iter'], config['dtype']) == (4, 'float32')
    assert config['val_loss'] == run.record['eval_steps'][-1]['val_loss']
    assert config['architecture_name'] == run.record['architecture']['name']
    # A tied embedding is stored once, under either name.
    parameters = run.record['startup_info']['model']['total_params']
    assert 4 * parameters < output.stat().st_size < 4 * parameters + 40_000
    out = capsys.readouterr().out
    assert f'{parameters:,} parameters' in out and str(output) in out
    assert [path.name for path in tmp_path.iterdir()] == ['model.pt']


@pytest.mark.parametrize('preset', ['gpt2', 'llama'])
def test_safetensors_file(trained, tmp_path, preset):
    out_dir, logits, _ = trained[preset]
    output = tmp_path / 'model.safetensors'
    export(f'--out_dir={out_dir}', f'--output={output}')
    with safetensors.safe_open(output, 'pt') as file:
        metadata, names = file.metadata(), set(file.keys())
    model = fresh(json.loads(metadata['config']))
    assert names == {name for name, _ in model.named_parameters()}
    assert safetensors.load_model(model, output) == (set(), [])
    assert torch.equal(logits_of(model), logits)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_hugging_face_folder(trained, tmp_path, dtype, capsys):
    from transformers import AutoModelForCausalLM

    out_dir, logits, _ = trained['llama']
    output = tmp_path / 'mine'
    export(f'--out_dir={out_dir}', '--format=hf', f'--output={output}', f'--dtype={dtype}')
    files = sorted(output.iterdir())
    tokenizer = ['tokenizer.json', 'tokenizer_config.json']
    assert [file.name for file in files] == [
        *('config.json', 'generation_config.json', 'model.safetensors'),
        *tokenizer,
    ]
    size = sum(file.stat().st_size for file in files)
    out = capsys.readouterr().out
    assert f'{size / 1e9:.2f} GB' in out and 'loads it and gives the same logits' in out
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == getattr(torch, dtype)
    with torch.no_grad():
        theirs = model.eval()(TOKENS).logits.float()
    # bfloat16 has 8 bits: each of a few dozen roundings is off by up to 2^-9.
    error = torch.linalg.norm(theirs - logits) / torch.linalg.norm(logits)
    assert error < (1e-5 if dtype == 'float32' else 0.02)

    (output / 'README.md').write_text('mine')
    (output / 'config.json').write_text('of old')
    arguments = f'--out_dir={out_dir}', '--format=hf', f'--output={output}'
    export(*arguments, code=2)
    assert '--overwrite' in capsys.readouterr().err
    export(*arguments, '--overwrite')
    assert json.loads((output / 'config.json').read_text())['dtype'] == 'float32'
    assert (output / 'README.md').read_text() == 'mine'
    assert [path.name for path in tmp_path.iterdir()] == ['mine']


TEXT = "The naïve fox,  it's 12345!\n\n“jumps” 🦊 over\t"


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['byte', 'byte-documents', 'char', 'gpt2'])
def test_tokenizer_is_exported(tmp_path, kind, capsys):
    """transformers gives the same tokens and logits of a text from the folder alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    described = {'kind': kind.partition('-')[0]}
    if kind == 'char':
        described['characters'] = sorted(set(TEXT))
    if kind == 'byte-documents':
        described['end_of_text'] = True
    tokenizer, data = Tokenizer(described), tmp_path / 'data'
    ids = tokenizer.encode(TEXT)
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    data.mkdir()
    splits = {}
    for split in ('train', 'val'):
        tokens = np.array((ids + end) * 3, np.uint16)
        tokens.tofile(data / f'{split}.bin')
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
        splits[split] = {'tokens': len(tokens), 'bytes': 3 * len(TEXT.encode()), 'sha256': digest}
    meta = {'format_version': 1, 'tokenizer': described, 'vocab_size': tokenizer.vocab_size}
    (data / 'meta.json').write_text(json.dumps({**meta, 'dtype': 'uint16', 'splits': splits}))
    run = train_here(data, tmp_path / 'out', arch_preset='llama', n_embd=8, max_iters=2)

    output = tmp_path / 'theirs'
    export(f'--out_dir={tmp_path / "out"}', '--format=hf', f'--output={output}')
    assert 'note' not in capsys.readouterr().out
    loaded = AutoTokenizer.from_pretrained(output)
    theirs = AutoModelForCausalLM.from_pretrained(output).eval()
    token_ids = loaded(TEXT, add_special_tokens=False, return_tensors='pt')['input_ids']
    assert token_ids[0].tolist() == ids
    assert loaded.decode(token_ids[0]) == TEXT
    assert loaded.eos_token_id == tokenizer.end_of_text
    assert theirs.config.eos_token_id == tokenizer.end_of_text
    assert theirs.generation_config.eos_token_id == tokenizer.end_of_text
    assert loaded.model_max_length == 32
    padded = run.session.raw_model.config.vocab_size
    assert (padded > tokenizer.vocab_size) == (kind == 'gpt2')
    with torch.no_grad():
        tokens = token_ids[:, :16]
        expected = run.session.raw_model.eval()(tokens)
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        theirs.lm_head.weight[tokenizer.vocab_size :] += 100 * theirs.model.norm.weight  # if drawn
        drawn = theirs.generate(tokens, max_new_tokens=5, do_sample=False)
    assert drawn.max() < tokenizer.vocab_size


def test_weights_are_written_without_a_tokenizer(trained, tmp_path, monkeypatch, capsys):
    out_dir, _, _ = trained['llama']
    monkeypatch.setitem(__import__('sys').modules, 'tokenizers', None)
    output = tmp_path / 'mine'
    export(f'--out_dir={out_dir}', '--format=hf', f'--output={output}')
    out = capsys.readouterr().out
    assert 'note: the tokenizer was not written: the tokenizer needs a package: pip install' in out
    assert not (output / 'tokenizer.json').exists()
    assert (output / 'model.safetensors').exists()


def test_inexpressible_architecture_is_refused(trained, tmp_path, monkeypatch, capsys):
    out_dir, _, _ = trained['gpt2']
    llama_alone = {'llama': interop.TRANSFORMERS['llama']}
    monkeypatch.setattr(interop.exporter, 'TRANSFORMERS', llama_alone)
    export(f'--out_dir={out_dir}', '--format=hf', f'--output={tmp_path / "mine"}', code=2)
    error = capsys.readouterr().err
    assert "normalization='layernorm_nobias'" in error and "norm_position='post'" in error
    assert list(tmp_path.iterdir()) == []


def test_failed_check_leaves_no_folder(trained, tmp_path, monkeypatch, capsys):
    out_dir, _, _ = trained['llama']

    def refuse(model, folder):
        raise UserError('transformers cannot use the exported folder')

    monkeypatch.setattr(interop, 'check_export', refuse)
    export(f'--out_dir={out_dir}', '--format=hf', f'--output={tmp_path / "mine"}', code=2)
    assert 'cannot use the exported folder' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('suffix', ['pt', 'safetensors'])
def test_weights_are_rounded_to_the_dtype(trained, tmp_path, monkeypatch, dtype, suffix):
    out_dir, _, run = trained['gpt2']
    monkeypatch.chdir(tmp_path)
    export(f'--out_dir={out_dir}', f'--format={suffix}', f'--dtype={dtype}')
    if suffix == 'pt':
        weights = torch.load('model.pt', weights_only=True)['model']
    else:
        weights = safetensors.load_file('model.safetensors')
    for name, weight in run.weights().items():
        assert torch.equal(weights[name], weight.to(getattr(torch, dtype))), name


def test_run_and_checkpoint_options(trained, tmp_path):
    out_dir, _, run = trained['llama']
    copied = shutil.copytree(run.folder / 'checkpoints/iter_00000002', tmp_path / 'best')
    named = {
        run.folder: 4,
        run.folder.name: 4,
        run.folder / 'checkpoints/iter_00000002': 2,
        copied: 2,
    }
    for number, (name, iter) in enumerate(named.items()):
        output = tmp_path / f'{number}.pt'
        export(f'--out_dir={out_dir}', f'--run={name}', f'--output={output}')
        assert torch.load(output, weights_only=True)['config']['iter'] == iter


def test_overwrite_is_explicit_and_atomic(trained, tmp_path, capsys, monkeypatch):
    out_dir, _, _ = trained['gpt2']
    output = tmp_path / 'model.pt'
    output.write_text('precious')
    arguments = f'--out_dir={out_dir}', f'--output={output}'
    export(*arguments, code=2)
    assert '--overwrite' in capsys.readouterr().err and output.read_text() == 'precious'

    def fail(state, path):
        path.write_bytes(b'half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', fail)
        export(*arguments, '--overwrite', code=2)
    error = capsys.readouterr().err
    assert str(output) in error and os.strerror(errno.ENOSPC) in error
    assert output.read_text() == 'precious' and len(list(tmp_path.iterdir())) == 1
    export(*arguments, '--overwrite')
    assert torch.load(output, weights_only=True)['config']['iter'] == 4


MISTAKES = {
    '--out_dir=nothing': ['nothing', 'no run'],
    '--run=run_1': ['run_1', 'not a run'],
    '--output=model.bin': ['model.bin', '.pt', '.safetensors'],
    '--output=model.pt --format=safetensors': ['model.pt', '.safetensors', '--format=safetensors'],
    '--format=gguf': ['gguf', 'pt', 'safetensors'],
    '--dtype=int8': ['int8', 'bfloat16'],
    '--output=nowhere/model.pt': ['the folder nowhere does not exist'],
    '--output=folder.pt': ['folder.pt is a folder'],
    '--output=file --format=hf': ['file is a file', 'a folder'],
    '--ouput=model.pt': ['--ouput', 'Did you mean --output'],
    'no_such.py': ['no_such.py'],
    '--run=broken/iter_00000002': ['state.pt', 'damaged'],
    '--run=unfinished/iter_00000002': ['index.json'],
}


@pytest.mark.parametrize('arguments', MISTAKES)
def test_mistakes_write_nothing(trained, tmp_path, monkeypatch, capsys, arguments):
    out_dir, _, run = trained['gpt2']
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder.pt').mkdir()
    (tmp_path / 'file').touch()
    for name in ('broken', 'unfinished'):
        shutil.copytree(run.folder / 'checkpoints', name)
    with open('broken/iter_00000002/state.pt', 'r+b') as file:
        file.truncate(1000)
    os.remove('unfinished/iter_00000002/index.json')
    before = sorted(tmp_path.rglob('*'))
    export(f'--out_dir={out_dir}', *arguments.split(), code=2)
    error = capsys.readouterr().err
    assert all(word in error for word in MISTAKES[arguments]), error
    assert 'Traceback' not in error and sorted(tmp_path.rglob('*')) == before


def test_missing_package_is_named_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    export('--output=model.safetensors', code=2)
    assert 'pip install safetensors' in capsys.readouterr().err


def test_values_beyond_the_dtype_are_refused(trained, tmp_path, monkeypatch, capsys):
    out_dir, _, _ = trained['gpt2']
    load_model = export_checkpoint.load_model

    def grown(*arguments):
        model = load_model(*arguments)
        next(model.parameters()).data[0, 0] = 1e5
        return model

    monkeypatch.setattr(export_checkpoint, 'load_model', grown)
    output = tmp_path / 'model.pt'
    export(f'--out_dir={out_dir}', f'--output={output}', '--dtype=float16', code=2)
    assert '--dtype=float16' in capsys.readouterr().err and not output.exists()
    export(f'--out_dir={out_dir}', f'--output={output}', '--dtype=bfloat16')


def test_full_disk_is_reported(trained, tmp_path):
    out_dir, _, _ = trained['gpt2']
    resource = pytest.importorskip('resource')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        for suffix in ('pt', 'safetensors'):
            export(f'--out_dir={out_dir}', f'--output={tmp_path}/model.{suffix}', code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_script_starts(run_script):
    assert '--overwrite' in run_script('export_checkpoint.py', '--help').stdout
