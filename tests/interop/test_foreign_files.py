"""Damaged Hugging Face folders are refused with one message, whatever the damage."""

import json
import shutil

import pytest
import torch
from helpers import foreign_configs
from helpers.foreign_files import Folders, outcome
from safetensors.torch import load_file, save_file

import interop
from common.errors import UserError

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp('foreign'))


# A part of tests/stress/damaged_files.py: every n-th of its cases.
@pytest.mark.slow
@pytest.mark.parametrize(
    ('kind', 'arguments', 'every'),
    [
        *(('configs', (family,), 23) for family in ('gpt2', 'llama', 'deepseek_v3')),
        ('indices', ('llama',), 1),
        ('headers', ('llama',), 4),
        ('pickles', ('llama', 6), 1),
        ('nanogpt', (), 3),
    ],
)
def test_damaged_files_end_in_an_error_message(folders, kind, arguments, every):
    damaged = getattr(folders, kind)(*arguments)
    outcomes = {}
    for number, (label, make) in enumerate(damaged):
        if number % every == 0:
            outcomes[label] = outcome(make())
    assert {k: v for k, v in outcomes.items() if v not in ('read', 'refused')} == {}
    assert list(outcomes.values()).count('refused') > 10


def changed(folders, family, change=lambda tensors: None, **fields) -> interop.PretrainedCheckpoint:
    """A checkpoint opened from a copy of the family's folder with other tensors and fields."""
    whole = folders.whole(family)
    tensors = load_file(whole / 'model.safetensors')
    change(tensors)
    config = json.loads((whole / 'config.json').read_text())
    name = folders.damage(family, 'config.json', json.dumps({**config, **fields}).encode())
    save_file(tensors, folders.copy / 'model.safetensors')
    return interop.open_checkpoint(name)


EMBEDDING = 'model.embed_tokens.weight'
MISFITS = {
    # Another number of rows than in the config is an error, not a request for another size.
    r'embed_tokens.weight has shape \(40, 32\), but its config requires \(50, 32\)': {
        'vocab_size': 50
    },
    r'q_proj.weight has shape \(48, 32\), but its config requires \(24, 32\)': {
        'num_attention_heads': 2
    },
    'its config has n_layer=5000, but its files have only 21 tensors': {'num_hidden_layers': 5000},
    'copy: no tensor can be as large': {
        'intermediate_size': 2**31 - 1,
        'hidden_size': 2**31 - 1,
    },
    'hidden_size=1000000000000: too large for a size of a model': {'hidden_size': 10**12},
}


@pytest.mark.parametrize('message', MISFITS)
def test_mismatched_sizes_are_refused(folders, message):
    with pytest.raises(UserError, match=message):
        changed(folders, 'llama', **MISFITS[message]).check()


@pytest.mark.parametrize(
    ('family', 'sizes'),
    [
        (
            'gpt_neox',
            {'hidden_size': 10**9, 'num_attention_heads': 125 * 10**6, 'intermediate_size': 8},
        ),
        ('deepseek_v2', {'qk_nope_head_dim': 10**9, 'v_head_dim': 10**9}),
        ('llama', {'num_attention_heads': 10**9, 'num_key_value_heads': 10**9}),
    ],
)
def test_huge_sizes_are_refused_without_allocation(folders, family, sizes):
    with pytest.raises(UserError, match=r'but its config requires|no tensor can be|takes int'):
        changed(folders, family, **sizes).check()


def test_extra_positions_are_refused(folders):
    with pytest.raises(
        UserError, match=r'wpe.weight has shape \(16, 32\), but its config requires \(8, 32\)'
    ):
        changed(folders, 'gpt2', n_positions=8).check()


def test_undeclared_quantized_tensors_are_refused(folders):
    def quantize(tensors):
        tensors['model.norm.weight'] = tensors['model.norm.weight'].to(torch.int8)

    with pytest.raises(UserError, match=r'model\.norm\.weight is not a floating-point tensor'):
        changed(folders, 'llama', quantize).check()


def test_duplicate_tensor_in_shards_is_refused(folders):
    index = json.dumps({'weight_map': {'a': 'one.safetensors', 'b': 'two.safetensors'}}).encode()
    name = folders.damage('llama', 'model.safetensors.index.json', index)
    for shard in ('one', 'two'):
        shutil.copy(folders.copy / 'model.safetensors', folders.copy / f'{shard}.safetensors')
    (folders.copy / 'model.safetensors').unlink()
    with pytest.raises(UserError, match=r'is in two\.safetensors and in another file'):
        interop.open_checkpoint(name)


def test_legacy_pickle_is_read(folders):
    tensors = load_file(folders.whole('llama') / 'model.safetensors')
    name = folders.damage('llama', 'pytorch_model.bin', b'', 'model.safetensors')
    torch.save(tensors, folders.copy / 'pytorch_model.bin', _use_new_zipfile_serialization=False)
    source = interop.open_checkpoint(name)
    source.check()
    assert torch.equal(source.tensors[EMBEDDING].read(), tensors[EMBEDDING])


def test_differing_tied_head_is_used_untied(folders):
    """transformers does the same. A head that equals the embedding stays tied."""

    def untie(tensors):
        tensors['lm_head.weight'] = tensors[EMBEDDING] + 1

    source = changed(folders, 'llama', untie, tie_word_embeddings=True)
    assert source.config.weight_tying is False
    assert 'files have a different head' in source.notes[0]
    weights = dict(source.weights(source.config))
    assert torch.equal(
        weights['output_head.projection.weight'], weights['token_embedding.weight'] + 1
    )

    def copy(tensors):
        tensors['lm_head.weight'] = tensors[EMBEDDING].clone()

    source = changed(folders, 'llama', copy, tie_word_embeddings=True)
    assert source.config.weight_tying and source.notes == []
    source.check()


@pytest.mark.parametrize('same', [True, False])
def test_nanogpt_tied_table_under_two_names(tmp_path, same):
    sizes = {'n_layer': 1, 'n_head': 2, 'n_embd': 8, 'block_size': 8, 'vocab_size': 9}
    state = {'transformer.wte.weight': torch.zeros(9, 8), 'lm_head.weight': torch.zeros(9, 8)}
    state['lm_head.weight'][0] = 0 if same else 1
    torch.save({'model_args': sizes, 'model': state}, tmp_path / 'ckpt.pt')
    source = interop.open_checkpoint(f'nanogpt:{tmp_path}')
    if same:
        assert source.config.weight_tying
    else:
        with pytest.raises(UserError, match='ties them'):
            _ = source.config


def test_undamaged_folders_are_read(folders):
    for family in foreign_configs.BASES:
        interop.open_checkpoint(f'hf:{folders.whole(family)}').check()
