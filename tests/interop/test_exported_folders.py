"""Exported folders load in transformers, or the export is refused with advice."""

import json
import sys
from types import SimpleNamespace

import pytest
from helpers.architectures import perturbed_model, tiny
from safetensors.torch import load_file, save_file

import interop
from common.errors import UserError

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]
UNEVEN_EXPERTS = {'n_embd': 24, 'n_head': 16}  # rows of a multiple of 16 bytes
# Some families of transformers require that n_head divides n_embd.
UNEVEN = {'n_embd': 30, 'n_head': 4}


def exported(folder, **values):
    """The model and the folder that it was exported to."""
    model = perturbed_model(tiny(**values)).eval()
    interop.export(model.config, dict(model.named_parameters()), folder)
    return model, folder


LOADS = {
    # Llama's config class refuses this width, Mistral's accepts it.
    'uneven-llama': ({'arch_preset': 'llama', **UNEVEN, 'head_dim': 8}, 'mistral'),
    'uneven-mixtral': ({'arch_preset': 'mixtral', **UNEVEN_EXPERTS, 'head_dim': 4}, 'mixtral'),
    'gemma2-without-a-window': ({'arch_preset': 'gemma2', 'sliding_window': None}, 'gemma2'),
    'gemma2-all-windows': ({'arch_preset': 'gemma2', 'attention_pattern': 'L'}, 'gemma2'),
    'qwen3-without-a-window': ({'arch_preset': 'qwen3', 'head_dim': 8}, 'qwen3'),
    # The cache of transformers refuses a model without attention.
    'convolutions-alone': ({'arch_preset': 'llama', 'mixer': 'short_conv'}, 'lfm2'),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', LOADS)
def test_exported_folder_loads(name, tmp_path):
    values, family = LOADS[name]
    model, folder = exported(tmp_path / 'theirs', **values)
    assert json.loads((folder / 'config.json').read_text())['model_type'] == family
    assert 'gives the same logits' in interop.check_export(model, folder)


REFUSED = {
    'n_embd=30 must be a multiple of n_head=4': {
        'arch_preset': 'gemma2',
        **UNEVEN,
        'head_dim': 8,
    },
    'n_embd=24 must be a multiple of n_head=16': {
        'arch_preset': 'deepseek',
        **UNEVEN_EXPERTS,
        'qk_nope_head_dim': 4,
        'qk_rope_head_dim': 2,
        'v_head_dim': 4,
    },
    'between beta_slow and beta_fast rotations': {
        'arch_preset': 'llama',
        'rope_scaling': 'yarn',
        'rope_original_block_size': 4,
    },
}


@pytest.mark.parametrize('message', REFUSED)
def test_configs_that_transformers_refuses_are_refused(message):
    with pytest.raises(UserError, match=message) as refusal:
        interop.convert_config(tiny(**REFUSED[message]))
    assert '--output=model.safetensors' in str(refusal.value)


def test_changed_folder_fails_the_check(tmp_path):
    model, folder = exported(tmp_path / 'theirs', arch_preset='llama')
    tensors = load_file(folder / 'model.safetensors')
    name = 'model.layers.0.mlp.down_proj.weight'
    save_file({**tensors, name: 2 * tensors[name]}, folder / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(UserError, match=r'logits differ by .*--output=model\.safetensors'):
        interop.check_export(model, folder)
    fields = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**fields, 'hidden_size': 30}))
    with pytest.raises(UserError, match='cannot use the exported folder'):
        interop.check_export(model, folder)


def test_check_without_memory_reads_the_config(tmp_path, monkeypatch):
    model, folder = exported(tmp_path / 'theirs', arch_preset='gemma2')
    nothing = SimpleNamespace(available=0)
    monkeypatch.setattr('interop.exporter.psutil.virtual_memory', lambda: nothing)
    assert 'not enough memory to load its weights' in interop.check_export(model, folder)
    fields = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**fields, 'intermediate_size': 8}))
    with pytest.raises(UserError, match='its parameters differ'):
        interop.check_export(model, folder)


def test_check_without_transformers(tmp_path, monkeypatch):
    model, folder = exported(tmp_path / 'theirs', arch_preset='llama')
    monkeypatch.setitem(sys.modules, 'transformers', None)
    assert 'transformers is not installed' in interop.check_export(model, folder)
