"""Diagnostics: each value equals a computation in plain torch, and training is unchanged."""

import math
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import perturbed_model, random_tokens, tiny
from helpers.in_process import train_here

from model_builder import build_model, parameter_groups
from parallel.strategies import SingleProcess, prepare_blocks
from training import diagnostics

ALONE = SingleProcess(None, torch.device('cpu'))
MODELS = {
    'llama': {},
    'gpt2': {'arch_preset': 'gpt2', 'attention_backend': 'manual'},
    'grouped': {'use_gqa': True, 'num_kv_heads': 2, 'norm_eps': 0.1},
    'one key': {'use_gqa': True, 'num_kv_heads': 1, 'attention_backend': 'manual'},
    'chunks and sinks': {
        **{'attention_chunk': 4, 'attention_sinks': True, 'attention_backend': 'manual'}
    },
    'mixed': {
        'n_layer': 3,
        'layer_pattern': 'LGM',
        'layer_kinds': {
            'L': {'n_head': 2, 'sliding_window': 2, 'd_ff': 24},
            'G': {'position_encoding': 'none', 'use_gqa': True, 'num_kv_heads': 1},
            'M': {'ffn_type': 'moe', 'num_experts': 3, 'load_balance_weight': 0.0},
        },
    },
}
EVERY_MODEL = pytest.mark.parametrize('values', MODELS.values(), ids=MODELS)


def unrolled(model, tokens):
    """A forward pass in plain torch: (outputs of the blocks, their causal scores, logits)."""
    positions = torch.arange(tokens.size(1))
    prepared = model.attention_inputs(positions)
    x = model.position_encoding.embed(model.token_embedding(tokens), positions)
    streams, scores = [], []
    for block, attn_inputs in zip(model.blocks, prepared):
        attention = block.attention
        normed = block.attention_norm(x) if block.tag == 'PreNorm' else x
        kv_heads = attention.rows[1] // attention.head_dim
        sizes = [h * attention.head_dim for h in (attention.num_heads, kv_heads, kv_heads)]
        q, k, _ = F.linear(normed, attention.qkv.weight, attention.qkv.bias).split(sizes, dim=-1)
        scores.append([])
        for head in range(attention.num_heads):
            kv_head = head * kv_heads // attention.num_heads
            one_q, one_k = (
                attention.rotate(
                    t[..., n * attention.head_dim :][..., : attention.head_dim],
                    attn_inputs.rotation,
                )
                for t, n in ((q, head), (k, kv_head))
            )
            products = torch.einsum('btd,bsd->bts', one_q, one_k) / math.sqrt(attention.head_dim)
            length = tokens.size(1)
            window, chunk = attention.spec.window or length, attention.spec.chunk or length
            scores[-1] += [
                products[:, t, max(0, t + 1 - window, t // chunk * chunk) : t + 1]
                for t in range(length)
            ]
        x, _ = block(x, attn_inputs)
        streams.append(x)
    return streams, scores, model.output_head.projection(model.final_norm(x))


@EVERY_MODEL
@pytest.mark.parametrize('recomputed', [[], [0, 1]], ids=['', 'recomputed'])
def test_layer_statistics_equal_plain_torch(values, recomputed):
    config = tiny(**{'arch_preset': 'llama', **values}, dropout=0.3)
    model = perturbed_model(config).eval()
    tokens, targets = random_tokens(config, 3, seed=0), random_tokens(config, 3, seed=1)
    streams, scores, logits = unrolled(model, tokens)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    expected = [
        {
            'layer': layer,
            'activation_rms': (stream**2).mean().sqrt().item(),
            'gradient_norm': math.sqrt(sum((p.grad**2).sum().item() for p in block.parameters())),
            'max_attention_logit': max(part.abs().max().item() for part in parts),
        }
        for layer, (block, stream, parts) in enumerate(zip(model.blocks, streams, scores))
    ]
    assert expected[0]['gradient_norm'] > 0

    model.zero_grad()
    prepare_blocks(model, recomputed, compiled=False)
    layers = diagnostics.layer_statistics(model, model, ALONE, tokens, targets, nullcontext)
    for ours, theirs in zip(layers, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    # A second call gives the same: no hook, probe or gradient remains.
    assert diagnostics.layer_statistics(model, model, ALONE, tokens, targets, nullcontext) == layers
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(block._forward_hooks for block in model.blocks)


def test_layers_without_attention_have_no_logits():
    """The others have those of their own layer."""
    kinds = {'N': {'mixer': 'none'}}
    config = tiny(n_layer=4, layer_pattern='NANA', layer_kinds=kinds, position_encoding='rope')
    model = perturbed_model(config).eval()
    with torch.no_grad():
        model.blocks[3].attention.qkv.weight.mul_(100)
    tokens = random_tokens(config, 2)
    layers = diagnostics.layer_statistics(model, model, ALONE, tokens, tokens, nullcontext)
    _, small, _, large = (layer['max_attention_logit'] for layer in layers)
    assert [layer['max_attention_logit'] is None for layer in layers] == [True, False] * 2
    assert large > 1000 * small > 0
    assert all(layer['activation_rms'] > 0 and layer['gradient_norm'] > 0 for layer in layers)


def test_logits_of_future_tokens_are_ignored():
    """The largest product is that of a query with a later key, which the mask excludes."""
    config = tiny(n_layer=1, n_head=1, position_encoding='none', normalization='rmsnorm')
    model = build_model(config, 'cpu', 0).eval()
    with torch.no_grad():
        model.token_embedding.weight.zero_()
        model.token_embedding.weight[0, 0] = model.token_embedding.weight[1, 1] = 1.0
        qkv = model.blocks[0].attention.qkv.weight.zero_()
        qkv[0, 0] = 1.0  # the query of token 0 …
        qkv[16, 1] = 40.0  # … matches the key of token 1
        qkv[16, 0] = 0.5  # and, less, its own key

    def max_logit(first):
        tokens = torch.tensor([[first, 1 - first, *[2] * (config.block_size - 2)]])
        (layer,) = diagnostics.layer_statistics(model, model, ALONE, tokens, tokens, nullcontext)
        return layer['max_attention_logit']

    # The norm scales a one-hot vector of width 16 to 4: 4 · 4 · weight / √16.
    assert max_logit(0) == pytest.approx(0.5 * 4, rel=1e-3)
    assert max_logit(1) == pytest.approx(40 * 4, rel=1e-3)


@pytest.mark.parametrize(
    ('length', 'edges'),
    [
        (1, [0, 1]),
        (2, [0, 1, 2]),
        (6, [0, 1, 2, 4, 6]),
        (8, [0, 1, 2, 4, 8]),
        (9, [0, 1, 2, 4, 8, 9]),
    ],
)
def test_loss_by_position_equals_mean_over_positions(length, edges):
    config = tiny(block_size=length, n_layer=1)
    model = perturbed_model(config).eval()
    tokens, targets = random_tokens(config, 5, seed=0), random_tokens(config, 5, seed=1)
    probabilities = model(tokens).softmax(-1).gather(-1, targets[..., None])[..., 0].detach()
    losses = -probabilities.log()  # (B, T)
    expected = [
        {'from': low, 'to': high, 'loss': losses[:, low:high].mean().item()}
        for low, high in pairwise(edges)
    ]
    batches = ((tokens[rows], targets[rows]) for rows in (slice(0, 2), slice(2, 4), slice(4, 5)))
    intervals = diagnostics.loss_by_position(model, ALONE, batches, nullcontext)
    for ours, theirs in zip(intervals, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_update_to_weight_ratio_equals_plain_torch():
    model = perturbed_model(tiny())
    groups = parameter_groups(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ratio = diagnostics.UpdateRatio(groups, ALONE)
    ratio.end()  # without begin()
    assert ratio.ratios is None
    ratio.begin()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.01 * number * torch.ones_like(parameter))
    ratio.end()
    expected = {}
    kinds = {
        'matrices': lambda name, p: p.dim() > 1 and 'blocks' in name,
        'tables': lambda name, p: p.dim() > 1 and 'blocks' not in name,
        'gains and biases': lambda name, p: p.dim() == 1,
    }
    for name, belongs in kinds.items():
        chosen = [(before[n], p) for n, p in model.named_parameters() if belongs(n, p)]
        change = sum(((p - old) ** 2).sum().item() for old, p in chosen)
        expected[name] = math.sqrt(change / sum((old**2).sum().item() for old, _ in chosen))
    assert ratio.ratios == pytest.approx(expected, rel=1e-4)


# --- In a run -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [
        {'dropout': 0.2},
        {'activation_checkpointing': 'full', 'use_gqa': True, 'num_kv_heads': 1},
        {'attention_backend': 'manual', 'dtype': 'bfloat16'},
    ],
    ids=lambda options: '-'.join(map(str, options.values())),
)
def test_diagnostics_do_not_change_training(tiny_dataset, tmp_path, options):
    options = {**options, 'max_iters': 6, 'eval_interval': 2}
    plain, observed = (
        train_here(tiny_dataset, tmp_path / str(enabled), **options, diagnostics=enabled)
        for enabled in (False, True)
    )
    assert observed.losses == plain.losses
    for name, weight in plain.weights().items():
        assert torch.equal(observed.weights()[name], weight), name
    assert not any('diagnostics' in step for step in plain.record['eval_steps'])


def test_diagnostics_are_recorded(tiny_dataset, tmp_path):
    run = train_here(
        tiny_dataset, tmp_path, max_iters=3, eval_interval=9, diagnostics=True, grad_clip=0.0
    )
    first, last = (step['diagnostics'] for step in run.record['eval_steps'])
    # Before the first update there is no ratio.
    assert first['update_to_weight'] == {}
    assert last['update_to_weight'].keys() == {'matrices', 'tables', 'gains and biases'}
    # The mean over positions is the validation loss itself: same windows, same weights.
    for step in run.record['eval_steps']:
        parts = step['diagnostics']['val_loss_by_position']
        total = sum(part['loss'] * (part['to'] - part['from']) for part in parts)
        assert total / parts[-1]['to'] == pytest.approx(step['val_loss'], rel=1e-4)

    # The last evaluation is of the weights that the run ended with.
    session = run.session
    batch = next(session.evaluation_batches('val'))
    session.model.eval()
    expected = diagnostics.layer_statistics(
        session.raw_model, session.model, ALONE, *batch, session.autocast
    )
    for ours, theirs in zip(last['layers'], expected, strict=True):
        assert ours == pytest.approx(theirs)
    # The last update is the difference of the last two sets of weights.
    shorter = train_here(
        tiny_dataset,
        tmp_path / 'shorter',
        max_iters=2,
        grad_clip=0.0,
        lr_decay_iters=3,
        eval_interval=9,
    )
    old, new = shorter.weights(), run.weights()
    matrices = [name for name in new if new[name].dim() > 1 and 'blocks' in name]
    change = math.sqrt(sum(((new[n] - old[n]) ** 2).sum().item() for n in matrices))
    size = math.sqrt(sum((old[n] ** 2).sum().item() for n in matrices))
    assert last['update_to_weight']['matrices'] == pytest.approx(change / size, rel=1e-4)
