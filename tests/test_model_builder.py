"""model_builder.py: models against other implementations, initialization, counts, generation."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import transformers_models as reference
from helpers.architectures import (
    gradients,
    label,
    pairwise_architectures,
    perturbed_model,
    random_tokens,
    tiny,
)

from common.errors import UserError
from inference.generate import generate
from inference.sampling import Sampler
from model_builder import (
    build_model,
    count_parameters,
    parameter_groups,
    training_flops,
)
from model_config import NORM_REGISTRY, ModelArchitectureConfig

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]


def preset(name: str, **values) -> ModelArchitectureConfig:
    """A preset with 12 layers, n_embd 768, 1024 tokens and a vocabulary of 50,304."""
    return ModelArchitectureConfig(arch_preset=name, **{'vocab_size': 50304, **values})


# --- The same model as other people's -------------------------------------------------------------


def assert_same_model(model, weights_as_ours, theirs_forward, theirs_gradients_as_ours):
    """Logits, loss and gradients of `model` with the reference's weights equal the reference's."""
    missing, unexpected = model.load_state_dict(weights_as_ours(), strict=False)
    tied = ['output_head.projection.weight'] if model.config.weight_tying else []
    assert (missing, unexpected) == (tied, [])

    tokens = random_tokens(model.config, batch=3)
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)  # the last token has no target
    logits, loss = theirs_forward(tokens, targets)
    loss.backward()
    loss_sum, count, auxiliary = model(tokens, targets)
    (loss_sum / count).backward()
    torch.testing.assert_close(model(tokens), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss_sum / count, loss, rtol=1e-5, atol=1e-5)
    assert (count, auxiliary.loss) == (targets.numel() - len(tokens), 0)
    expected = theirs_gradients_as_ours()
    assert expected.keys() == gradients(model).keys()
    for name, grad in gradients(model).items():
        assert torch.linalg.norm(expected[name]) > 1e-3, name
        assert torch.linalg.norm(grad - expected[name]) < 1e-5 * torch.linalg.norm(
            expected[name]
        ), name
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-5)


SIZES = {'n_embd': 32, 'block_size': 16, 'vocab_size': 40}


TORCH_LAYER = {
    'attention.qkv.': 'self_attn.in_proj_',
    'attention.output.': 'self_attn.out_proj.',
    'attention_norm.': 'norm1.',
    'ffn.up.': 'linear1.',
    'ffn.down.': 'linear2.',
    'ffn_norm.': 'norm2.',
}


@pytest.mark.parametrize('activation', ['gelu', 'relu'])
@pytest.mark.parametrize(
    'values',
    [
        {'arch_preset': 'gpt2'},
        {'arch_preset': 'gpt2', 'bias': True, 'normalization': 'layernorm'},
        {'arch_preset': 'gpt2', 'norm_position': 'pre'},
    ],
    ids=['post', 'post-bias', 'pre'],
)
def test_blocks_match_torch_encoder_layer(values, activation):
    """The `gpt2` preset is post-norm without biases, with no norm after the last block."""
    config = tiny(**SIZES, **values, activation=activation)
    theirs = nn.ModuleDict(
        {
            'tokens': nn.Embedding(config.vocab_size, config.n_embd),
            'positions': nn.Embedding(config.block_size, config.n_embd),
            'layers': nn.ModuleList(
                nn.TransformerEncoderLayer(
                    config.n_embd,
                    config.n_head,
                    4 * config.n_embd,
                    dropout=0.0,
                    activation=activation,
                    batch_first=True,
                    norm_first=config.norm_position == 'pre',
                    bias=config.bias,
                )
                for _ in range(config.n_layer)
            ),
        }
    )
    if config.norm_position == 'pre':
        theirs['final'] = nn.LayerNorm(config.n_embd, bias=False)
    reference.randomize(theirs)

    def forward(tokens, targets):
        x = theirs['tokens'](tokens) + theirs['positions'].weight[: tokens.size(1)]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.size(1))
        for layer in theirs['layers']:
            x = layer(x, src_mask=mask, is_causal=True)
        if 'final' in theirs:
            x = theirs['final'](x)
        logits = x @ theirs['tokens'].weight.T
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def as_ours(tensors):
        renamed = {
            'token_embedding.weight': tensors['tokens.weight'],
            'position_encoding.table.weight': tensors['positions.weight'],
        }
        if 'final' in theirs:
            renamed['final_norm.weight'] = tensors['final.weight']
        for layer in range(config.n_layer):
            for ours, name in TORCH_LAYER.items():
                for kind in ('weight', 'bias'):
                    if f'layers.{layer}.{name}{kind}' in tensors:
                        source = tensors[f'layers.{layer}.{name}{kind}']
                        renamed[f'blocks.{layer}.{ours}{kind}'] = source
        return renamed

    assert_same_model(
        build_model(config, device='cpu'),
        lambda: as_ours(theirs.state_dict()),
        forward,
        lambda: as_ours(gradients(theirs)),
    )


# --- Initialization -------------------------------------------------------------------------------


def weights(seed: int | None = 1337, **values) -> dict[str, torch.Tensor]:
    return build_model(tiny(**values), device='cpu', seed=seed).state_dict()


def test_weights_depend_on_seed_only():
    first = weights(n_layer=2)
    before = torch.random.get_rng_state()
    again = weights(n_layer=2)
    assert torch.equal(torch.random.get_rng_state(), before)  # drawn from their own streams
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = weights(seed=1338, n_layer=2)
    for name, tensor in first.items():
        constant = tensor.unique().numel() == 1
        assert torch.equal(tensor, other[name]) == constant, name
    matrices = [tensor.flatten()[:16] for tensor in first.values() if tensor.dim() > 1]
    assert len({tuple(tensor.tolist()) for tensor in matrices}) == len(matrices) - 1  # the tied one


def test_equal_names_start_equal_across_architectures():
    one = weights(arch_preset='gpt2')
    two = weights(arch_preset='llama', position_encoding='learned_absolute')
    common = [name for name in one if name in two and one[name].shape == two[name].shape]
    assert {'token_embedding.weight', 'blocks.1.attention.qkv.weight'} < set(common)
    for name in common:
        if name != 'output_head.projection.weight':  # the tied parameter is the token embedding
            assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize('ffn', ['standard', 'swiglu'])
def test_depth_scaled_residual_projections(ffn):
    config = tiny(ffn_type=ffn, n_layer=8, n_embd=64, vocab_size=200, block_size=100, bias=True)
    for name, parameter in build_model(config, device='cpu', seed=3).named_parameters():
        if parameter.dim() == 1:
            value = 1.0 if name.endswith('norm.weight') else 0.0
            assert torch.equal(parameter, torch.full_like(parameter, value)), name
            continue
        scaled = name.endswith(('attention.output.weight', 'ffn.down.weight'))
        std = 0.02 / math.sqrt(2 * 8) if scaled else 0.02  # Radford et al. 2019
        assert parameter.std().item() == pytest.approx(std, rel=0.06), name
        assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name


def test_uninitialized_parameter_is_error(monkeypatch):
    class Forgetful(NORM_REGISTRY['rmsnorm']):
        def __init__(self, config, width):
            super().__init__(config, width)
            self.gain = nn.Parameter(torch.empty(width))

    components = {name: NORM_REGISTRY[name] for name in NORM_REGISTRY}
    monkeypatch.setattr(NORM_REGISTRY, '_components', components)
    NORM_REGISTRY.register('forgetful')(Forgetful)
    with pytest.raises(UserError, match=r'blocks\.0\.attention_norm\.gain.*Forgetful'):
        build_model(tiny(normalization='forgetful'), device='cpu')


def test_model_needs_vocab_size():
    with pytest.raises(UserError, match='vocab_size'):
        build_model(tiny(vocab_size=None))


# --- Parameters and FLOPs -------------------------------------------------------------------------


@pytest.mark.parametrize('chosen', pairwise_architectures(), ids=label)
def test_parameters_are_counted_and_grouped_once(chosen):
    config = tiny(**chosen)
    model = build_model(config)
    frozen = model.blocks[0].attention.output.weight.requires_grad_(False)
    sizes = {
        id(p): p.numel()
        for module in model.modules()
        for p in module._parameters.values()
        if p is not None
    }
    counted = count_parameters(model)
    total = sum(sizes.values())
    assert counted['total_params'] == sum(counted['components'].values()) == total
    assert counted['trainable_params'] == total - frozen.numel()

    table = config.vocab_size * config.n_embd
    positions = {
        'learned_absolute': config.block_size * config.n_embd,
        't5_relative': chosen.get('t5_buckets', 0) * config.n_head,
    }.get(config.position_encoding, 0)
    assert counted['components']['token_embedding'] == table
    assert counted['components'].get('position_encoding', 0) == positions
    head = (0 if config.weight_tying else table) + config.vocab_size * config.head_bias
    assert counted['components'].get('output_head', 0) == head
    assert counted['components']['attention'] == sum(
        sizes[id(p)]
        for block in model.blocks
        for name, p in block.attention.named_parameters()
        # Norms and Canon layers are separate parts, wherever they are.
        if '_norm.' not in name and 'canon' not in name
    )
    assert counted['non_embedding_params'] == total - positions - (
        0 if config.weight_tying else table
    )

    groups = parameter_groups(model)
    grouped = [id(p) for group in groups for p in group.parameters]
    assert sorted(grouped) == sorted(sizes.keys() - {id(frozen)})
    assert all(group.decayed == (p.dim() > 1) for group in groups for p in group.parameters)


@pytest.fixture(scope='module')
def full_size():
    """transformers' models with the presets' sizes, on the meta device."""
    return SimpleNamespace(
        gpt2=reference.of(preset('legacy'), device='meta'),
        llama=reference.of(preset('llama'), device='meta'),
    )


def test_preset_parameter_counts(full_size):
    def count(name, **values):
        return count_parameters(build_model(preset(name, **values)))['total_params']

    assert count('legacy') == full_size.gpt2.num_parameters()
    assert count('llama') == count('team') == full_size.llama.num_parameters() == 162_220_800
    # Preset gpt2 has no biases, and post-norm has no final norm.
    assert count('gpt2') == 124_372_992
    assert count('gpt2') == sum(
        parameter.numel()
        for name, parameter in full_size.gpt2.named_parameters()
        if not name.endswith('.bias') and 'ln_f' not in name
    )
    # The model that OpenAI released.
    assert count('legacy', vocab_size=50257) == 124_439_808


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_preset_flops_match_closed_form(full_size, name):
    """6 per parameter in matrix products, plus 12 · L · H · Q · T (Chowdhery et al. 2022)."""
    theirs = getattr(full_size, name)
    multiplying = sum(
        module.weight.numel()
        for module in theirs.modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == 'Conv1D'
    )
    flops = training_flops(build_model(preset(name)))
    square = 12 * 12 * 12 * 64 * 1024
    assert flops['per_token'] == 6 * multiplying + square == 854_654_976
    assert flops['per_token_causal'] == 6 * multiplying + square / 2 == 798_031_872
    assert flops['breakdown']['attention_scores'] == square
    assert flops['breakdown_causal'] == {**flops['breakdown'], 'attention_scores': square / 2}
    assert sum(flops['breakdown'].values()) == flops['per_token']
    ratio = (8 * 768**2 + 2 * 1024 * 768) / (16 * 768**2)
    assert flops['attention_ffn_ratio'] == pytest.approx(ratio)
    assert round(ratio, 3) == 0.667
    shorter = training_flops(build_model(preset(name, block_size=512)))
    assert shorter['per_token'] == 6 * multiplying + square / 2


@pytest.mark.parametrize('chosen', pairwise_architectures(), ids=label)
def test_causal_flops_differ_in_scores_only(chosen):
    """Half, if only causality masks."""
    config = tiny(**chosen)
    flops = training_flops(build_model(config))
    full, causal = (flops[key]['attention_scores'] for key in ('breakdown', 'breakdown_causal'))
    assert flops['breakdown_causal'] == {**flops['breakdown'], 'attention_scores': causal}
    assert flops['per_token'] - flops['per_token_causal'] == pytest.approx(full - causal)
    if config.sliding_window is None and config.attention_chunk is None:
        assert causal == full / 2
    else:
        assert causal < full / 2


LAYERS, LENGTH, WIDTH, HIDDEN, HEADS, HEAD = 2, 6, 16, 40, 4, 4


@pytest.mark.parametrize(
    ('changed', 'elements'),
    [
        # None of these writes additional elements outside products.
        ({'bias': True}, 0),
        ({'weight_tying': True}, 0),
        ({'activation': 'relu'}, 0),
        ({'attention_backend': 'sdpa'}, 0),
        # A lookup and an addition.
        ({'position_encoding': 'learned_absolute'}, 2 * LENGTH * WIDTH),
        # Two element-wise operations, silu and the product, instead of one.
        ({'ffn_type': 'swiglu'}, LAYERS * LENGTH * HIDDEN),
        # Of each half of queries and keys: two products and their sum or difference; then both
        # joined; and the values' copy. Once for all layers: the product of positions and the D/2
        # frequencies, its cosine and sine, both scaled, and four steps to the frequencies
        # themselves.
        (
            {'position_encoding': 'rope'},
            LAYERS * (2 * (3 * LENGTH * WIDTH + LENGTH * WIDTH) + LENGTH * WIDTH)
            + 5 * LENGTH * HEAD // 2
            + 4 * HEAD // 2,
        ),
        # One layer more: two norms, with a mean and a deviation for each token; scores divided,
        # masked and normalized in each head (all layers share one mask); the heads put side by
        # side; the activation; two sums.
        (
            {'n_layer': LAYERS + 1},
            2 * (LENGTH * WIDTH + 2 * LENGTH)
            + 3 * HEADS * LENGTH * LENGTH
            + LENGTH * WIDTH
            + LENGTH * HIDDEN
            + 2 * LENGTH * WIDTH,
        ),
    ],
    ids=lambda value: label(value) if isinstance(value, dict) else '',
)
def test_elementwise_operations_by_architecture(changed, elements):
    """The difference made by a change of the architecture, counted by hand."""
    plain = {
        'normalization': 'layernorm',
        'position_encoding': 'none',
        'attention_backend': 'manual',
        'bias': False,
        'weight_tying': False,
        'd_ff': HIDDEN,
    }
    before, after = (
        training_flops(build_model(tiny(**values)))['elementwise_per_token'] * LENGTH
        for values in (plain, {**plain, **changed})
    )
    assert after - before == pytest.approx(elements)


# --- Generation -----------------------------------------------------------------------------------


def continuation(model, tokens, count, **options):
    choose = Sampler(model.config.vocab_size, **options)
    return torch.stack(list(generate(model, tokens, count, choose=choose)), dim=1)


@pytest.fixture(scope='module', params=['learned_absolute', 'rope'])
def model(request):
    return perturbed_model(tiny(position_encoding=request.param, vocab_size=12)).eval()


def test_greedy_generation_takes_likeliest_token(model):
    """Also beyond the context length, where the oldest tokens are dropped."""
    prompt = random_tokens(model.config, batch=3)[:, :2]
    text = prompt
    for _ in range(10):
        logits = model(text[:, -model.config.block_size :])[:, -1]
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    assert len(text.unique()) > 2
    for options in ({'temperature': 0}, {'top_k': 1}):
        assert torch.equal(continuation(model, prompt, 10, **options), text[:, 2:]), options


def test_seeded_generation_is_repeatable(model):
    def text(seed):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.zeros((2, 1), dtype=torch.long)
        return continuation(model, prompt, 8, generator=generator)

    assert torch.equal(text(5), text(5))
    assert not torch.equal(text(5), text(6))


def test_only_learned_positions_are_limited_to_block_size():
    for name in ('rope', 'none', 'learned_absolute'):
        config = ModelArchitectureConfig(
            n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=8, position_encoding=name
        )
        model = build_model(config, 'cpu', 1)
        tokens = torch.zeros((1, 5), dtype=torch.long)
        if name == 'learned_absolute':
            with pytest.raises(UserError, match=r'length 5 exceeds block_size=4'):
                model(tokens)
        else:
            assert model(tokens).shape == (1, 5, 8)
