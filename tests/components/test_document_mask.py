"""components/document_mask.py and document_mask: attention within documents only."""

import itertools
import json
import shutil

import pytest
import torch
from helpers.architectures import architectures, gradients, perturbed_model, tiny
from helpers.in_process import train_here
from hypothesis import given, settings

from common.errors import UserError
from components.document_mask import locate_documents
from configurator import read_command_line
from data.dataset import load_dataset
from model_builder import build_model
from planning.plan import plan_run
from training_config import load_settings, schema

pytestmark = pytest.mark.usefixtures('one_thread')
END = 3
MASKED = {'document_mask': True, 'end_of_text': END}
# Windows of 6 tokens with 3, 1, 2 and 6 documents.
TOKENS = torch.tensor([[5, END, 1, END, 2, 2], [1, 1, 2, 4, 5, 6], [7, 8, 9, END, 4, 4], [END] * 6])


def documents(row):
    """Reference by a loop: (begin, end) of each document."""
    ends = [t + 1 for t, token in enumerate(row.tolist()) if token == END]
    edges = sorted({0, *ends, len(row)})
    return list(itertools.pairwise(edges))


def test_document_ids_and_positions():
    ids, positions = locate_documents(TOKENS, END)
    for row, row_ids, row_positions in zip(TOKENS, ids.tolist(), positions.tolist()):
        expected = [
            (n, t - begin)
            for n, (begin, end) in enumerate(documents(row), start=1)
            for t in range(begin, end)
        ]
        assert list(zip(row_ids, row_positions)) == expected


def loss_alone(model, row):
    """The summed loss of a row's documents, computed separately, and all logits."""
    total, logits = 0.0, []
    targets = row.roll(-1)
    for begin, end in documents(row):
        alone = row[None, begin:end]
        loss, _, _ = model(alone, targets[None, begin:end])
        total = total + loss
        logits.append(model(alone)[0])
    return total, torch.cat(logits)


CHOICES = {
    'learned': {'position_encoding': 'learned_absolute'},
    'sinusoidal': {'position_encoding': 'sinusoidal'},
    'rope': {'position_encoding': 'rope', 'sliding_window': 2, 'attention_pattern': 'LG'},
    'alibi': {'position_encoding': 'alibi', 'use_gqa': True, 'num_kv_heads': 2},
    't5': {'position_encoding': 't5_relative', 't5_buckets': 4},
    'latents': {'attention_type': 'mla', 'position_encoding': 'rope', 'sliding_window': 2},
    'nothing': {'position_encoding': 'none'},
}


@pytest.mark.parametrize('backend', ['sdpa', 'manual'])
@pytest.mark.parametrize('choice', CHOICES.values(), ids=CHOICES)
def test_documents_in_window_match_separate_documents(choice, backend):
    """Compares logits, loss and all gradients."""
    model = perturbed_model(tiny(**choice, **MASKED, attention_backend=backend))
    loss, _, _ = model(TOKENS, TOKENS.roll(-1, dims=1))
    alone = [loss_alone(model, row) for row in TOKENS]
    expected = sum(loss for loss, _ in alone)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model(TOKENS), torch.stack([each for _, each in alone]))
    loss.backward()
    actual = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    expected.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures('flex_of_few_queries')
@pytest.mark.parametrize('choice', ['rope', 'alibi'])
def test_flex_masks_documents(choice):
    torch._dynamo.reset()
    config = tiny(**CHOICES[choice], **MASKED)
    logits = [
        perturbed_model(config.replace(attention_backend=backend))(TOKENS)
        for backend in ('flex', 'manual')
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(architectures(**MASKED, attention_backend='sdpa', attention_sinks=False, init_std=0.02))
def test_any_architecture_masks_documents(config):
    model = perturbed_model(config).eval()
    with torch.no_grad():
        logits = model(TOKENS)
        alone = torch.stack([loss_alone(model, row)[1] for row in TOKENS])
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('choice', CHOICES.values(), ids=CHOICES)
def test_cached_generation_masks_documents(choice):
    model = perturbed_model(tiny(**choice, **MASKED)).eval()
    expected = model(TOKENS)
    for sizes in ([1] * 6, [2, 1, 3], [5, 1]):
        cache = model.empty_cache(6)
        logits = [model(piece, cache=cache) for piece in TOKENS.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_documents_are_located_only_with_document_mask():
    config = tiny()
    assert 'end_of_text' not in config and perturbed_model(config).end_of_text is None
    assert tiny(**MASKED).name == config.name.replace('-AbsPos', '-DocMask-AbsPos')
    assert tiny(**MASKED).hash != config.hash
    assert tiny(mixer='gla', **MASKED).name == f'{tiny(mixer="gla").name}-DocMask'
    with pytest.raises(UserError, match='end_of_text'):
        tiny(end_of_text=2)
    with pytest.raises(UserError, match='end_of_text is not set'):
        build_model(tiny(document_mask=True), 'cpu')


# --- In a run -------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def marked(tiny_dataset, tmp_path_factory):
    """The same data with each line as a document."""
    folder = tmp_path_factory.mktemp('marked') / 'data'
    shutil.copytree(tiny_dataset, folder)
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps({**meta, 'end_of_text': ord('\n')}))
    return folder


@pytest.mark.slow
def test_run_takes_end_of_text_from_dataset(marked, tmp_path):
    plain, masked, named = (
        train_here(marked, tmp_path / str(number), arch_preset='llama', max_iters=2, **options)
        for number, options in enumerate(
            [{}, {'document_mask': True}, {'document_mask': True, 'end_of_text': ord('\n')}]
        )
    )
    assert masked.losses == named.losses and masked.losses[0] != plain.losses[0]
    choices = masked.record['architecture']['choices']
    assert (choices['document_mask'], choices['end_of_text']) == (True, ord('\n'))
    assert masked.record['config']['document_mask'] is True
    assert '-DocMask-' in masked.record['architecture']['name']
    assert masked.record['architecture']['hash'] != plain.record['architecture']['hash']
    assert 'from the dataset' in masked.record['startup_info']['derived']['end_of_text']
    flops = [run.record['startup_info']['flops']['per_token'] for run in (plain, masked)]
    assert flops[0] == flops[1]  # FLOPs are counted for whole windows


def completed(*argv, dataset):
    data = load_dataset(dataset, 32)
    command_line = read_command_line(['--block_size=32', f'--dataset={dataset}', *argv], schema)
    return load_settings(command_line).resolve(torch.device('cpu'), 'float32', data)


def test_document_mask_without_end_of_text_is_rejected(tiny_dataset, marked):
    masked = '--document_mask=True'
    with pytest.raises(UserError, match=r'document_mask=True.*--end_of_text=ID'):
        completed(masked, dataset=tiny_dataset)
    with pytest.raises(UserError, match=r'end_of_text=256.*up to 255'):
        completed(masked, '--end_of_text=256', dataset=tiny_dataset)
    assert completed(masked, '--end_of_text=9', dataset=tiny_dataset).architecture.end_of_text == 9
    assert completed(masked, dataset=marked).architecture.end_of_text == ord('\n')
    assert 'end_of_text' not in completed(dataset=marked).architecture


@pytest.mark.slow
def test_plan_with_document_mask_needs_no_data(tmp_path):
    sizes = {'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'block_size': 64, 'batch_size': 4}
    sizes['dtype'] = 'float32'
    argv = [f'--{key}={value}' for key, value in sizes.items()]
    planned_bytes = []
    for masked in (False, True):
        argv_of_one = ['--plan', '--dataset=elsewhere', f'--document_mask={masked}', *argv]
        settings = load_settings(read_command_line(argv_of_one, schema))
        (figures,) = plan_run(settings)['memory'].values()
        planned_bytes.append(figures['total_gb'] * 1e9)
    assert planned_bytes[1] - planned_bytes[0] >= 4 * 64 * 64 * 4  # a mask of (B, 1, T, T) in fp32
