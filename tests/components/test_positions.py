"""Position encodings: each against transformers' or the paper's formula."""

import math

import pytest
import torch
from helpers.architectures import perturbed_model, random_tokens, tiny

from common.errors import UserError
from components.positions import rotary_frequencies
from components.score_biases import alibi_slopes
from model_builder import build_model
from model_config import POSITION_ENCODING_REGISTRY, ROPE_SCALING_REGISTRY

pytestmark = pytest.mark.usefixtures('one_thread')


def encoding_of(device='cpu', **values):
    return build_model(tiny(**values), device=device).position_encoding


# --- Rotations ------------------------------------------------------------------------------------

LLAMA3 = {
    'rope_scaling': 'llama3',
    'rope_theta': 500000.0,
    'rope_original_block_size': 8192,
    'block_size': 131072,
}
SCALINGS = [
    {'rope_scaling': 'linear', 'rope_scaling_factor': 4.0},
    {**LLAMA3, 'rope_scaling_factor': 8.0},
    {**LLAMA3, 'rope_scaling_factor': 32.0, 'rope_low_freq_factor': 2.0, 'rope_fraction': 0.5},
    {**LLAMA3, 'rope_high_freq_factor': 9.0, 'rope_original_block_size': 1024},
    {'rope_scaling': 'yarn', 'rope_original_block_size': 2048, 'block_size': 16384},
    {
        'rope_scaling': 'yarn',
        'rope_scaling_factor': 16.0,
        'rope_original_block_size': 4096,
        'rope_theta': 150000.0,
        'rope_beta_fast': 20.0,
        'rope_beta_slow': 2.0,
        'rope_attention_factor': 1.25,
        'rope_fraction': 0.25,
    },
]


@pytest.mark.parametrize('values', SCALINGS, ids=lambda v: v['rope_scaling'])
def test_rope_scaling_matches_transformers(values):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = tiny(position_encoding='rope', n_embd=256, n_head=2, **values)
    names = {
        'rope_theta': 'rope_theta',
        'rope_scaling_factor': 'factor',
        'rope_original_block_size': 'original_max_position_embeddings',
        'rope_fraction': 'partial_rotary_factor',
        'rope_low_freq_factor': 'low_freq_factor',
        'rope_high_freq_factor': 'high_freq_factor',
        'rope_beta_fast': 'beta_fast',
        'rope_beta_slow': 'beta_slow',
        'rope_attention_factor': 'attention_factor',
    }
    given = {**values, 'rope_theta': config.rope_theta}
    given.setdefault('rope_scaling_factor', config.rope_scaling_factor)
    for key in ('rope_low_freq_factor', 'rope_high_freq_factor'):
        if key in config:
            given[key] = config.to_dict()[key]
    parameters = {names[key]: value for key, value in given.items() if key in names}
    theirs = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=config.block_size,
        rope_parameters={'rope_type': config.rope_scaling, **parameters},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[config.rope_scaling](theirs, device='cpu')
    positions = torch.tensor([0, 1, 7, 300, 20000])
    cos, sin = encoding_of(position_encoding='rope', n_embd=256, n_head=2, **values).prepare(
        positions, positions
    )[0]
    angles = positions[:, None] * frequencies
    # An angle of 20,000 radians has a precision of 0.001 in fp32.
    torch.testing.assert_close(cos, angles.cos() * factor, rtol=1e-5, atol=4e-3)
    torch.testing.assert_close(sin, angles.sin() * factor, rtol=1e-5, atol=4e-3)
    scaled = ROPE_SCALING_REGISTRY[config.rope_scaling].scaled(
        rotary_frequencies(2 * len(frequencies), config.rope_theta, positions.device), config
    )
    torch.testing.assert_close(scaled, frequencies, rtol=1e-6, atol=0)
    plain = rotary_frequencies(2 * len(frequencies), config.rope_theta, positions.device)
    changed = (scaled / plain - 1).abs() > 1e-3
    assert changed.any() and (config.rope_scaling == 'linear') == bool(changed.all())


def test_yarn_with_tiny_context():
    config = tiny(position_encoding='rope', rope_scaling='yarn', rope_original_block_size=2)
    frequencies = torch.tensor([1.0, 0.01])
    scaled = ROPE_SCALING_REGISTRY['yarn'].scaled(frequencies, config)
    torch.testing.assert_close(scaled, torch.tensor([1.0, 0.01 / 8]))


def test_original_block_size_is_derived():
    values = {'position_encoding': 'rope', 'block_size': 4096, 'rope_scaling_factor': 4.0}
    for scaling in ('yarn', 'llama3'):
        assert tiny(**values, rope_scaling=scaling).rope_original_block_size == 1024
    factor = tiny(**values, rope_scaling='yarn').rope_attention_factor
    assert factor == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize('fraction', [1.0, 0.5, 0.25])
def test_partial_rope_matches_transformers(fraction):
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox import modeling_gpt_neox as neox

    parameters = {'rope_type': 'default', 'rope_theta': 50.0, 'partial_rotary_factor': fraction}
    theirs = neox.GPTNeoXRotaryEmbedding(
        GPTNeoXConfig(hidden_size=16, num_attention_heads=2, rope_parameters=parameters)
    )
    encoding = encoding_of(
        position_encoding='rope', rope_theta=50.0, rope_fraction=fraction, n_head=2
    )
    q, k = torch.randn(2, 3, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6)
    expected = neox.apply_rotary_pos_emb(q, k, *theirs(q, positions[None]))
    rotation = encoding.prepare(positions, positions).rotation
    for x, turned in zip((q, k), expected):
        torch.testing.assert_close(encoding.rotate(x, rotation), turned)


# --- Biases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('heads', range(1, 34))
def test_alibi_matches_transformers(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 7), heads, torch.float32)  # (H, 1, T)
    encoding = encoding_of(position_encoding='alibi', n_head=heads, n_embd=2 * heads)
    positions = torch.arange(7)
    bias = encoding.prepare(positions, positions).bias  # (H, T, T)
    # transformers' bias differs by a constant per query, which does not change the softmax.
    torch.testing.assert_close(bias - bias[:, :, :1], theirs.expand_as(bias), rtol=1e-5, atol=1e-6)
    assert (bias.diagonal(dim1=1, dim2=2) == 0).all()


def test_alibi_slopes_match_paper():
    """Press et al.: 1/2 … 1/256 for 8 heads, and for 16 heads also those 'geometrically averaged'
    between.
    """
    eight = [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(8, torch.device('cpu')).tolist() == pytest.approx(eight)
    sixteen = [2 ** (-i / 2) for i in range(1, 17)]
    assert alibi_slopes(16, torch.device('cpu')).tolist() == pytest.approx(sixteen)
    assert alibi_slopes(11, torch.device('cpu')).tolist() == pytest.approx(eight + sixteen[:6:2])


@pytest.mark.parametrize(('buckets', 'max_distance'), [(32, 128), (8, 20), (7, 12), (2, 2)])
def test_t5_bias_matches_transformers(buckets, max_distance):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    theirs = T5Attention(
        T5Config(
            d_model=16,
            num_heads=4,
            d_kv=4,
            is_decoder=True,
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=max_distance,
        ),
        has_relative_attention_bias=True,
        layer_idx=0,
    )
    encoding = encoding_of(
        position_encoding='t5_relative', t5_buckets=buckets, t5_max_distance=max_distance
    )
    with torch.no_grad():
        encoding.table.weight.normal_(generator=torch.Generator().manual_seed(0))
        theirs.relative_attention_bias.weight.copy_(encoding.table.weight)
    positions = torch.arange(300)
    past = torch.ones(300, 300).tril()
    bias = encoding.prepare(positions, positions).bias
    assert torch.equal(bias * past, theirs.compute_bias(300, 300)[0] * past)
    used = encoding.bucket(positions).unique()
    assert used.tolist() == list(range(buckets))


def test_sinusoidal_matches_paper():
    table = encoding_of(position_encoding='sinusoidal').embed(
        torch.zeros(1, 9, 16), torch.arange(9)
    )
    for t in range(9):
        for i in range(8):
            angle = t / 10000 ** (2 * i / 16)
            expected = (math.sin(angle), math.cos(angle))
            assert table[0, t, 2 * i : 2 * i + 2].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('layout', ['halves', 'fairseq'])
def test_sinusoids_in_halves(layout):
    encoding = encoding_of(position_encoding='sinusoidal', sinusoid_layout=layout)
    table = encoding.embed(torch.zeros(1, 9, 16), torch.arange(9))
    for t in range(9):
        for i in range(8):
            angle = t / 10000 ** (i / 8) if layout == 'halves' else (t + 2) / 10000 ** (i / 7)
            assert table[0, t, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[0, t, 8 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_sinusoid_layouts_have_tags_and_a_neutral_value():
    usual = tiny(position_encoding='sinusoidal')
    assert tiny(position_encoding='sinusoidal', sinusoid_layout='interleaved').hash == usual.hash
    halves = tiny(position_encoding='sinusoidal', sinusoid_layout='halves')
    assert halves.name == usual.name.replace('SinPos', 'SinPosHalves') and halves.hash != usual.hash


# --- All of them ----------------------------------------------------------------------------------

VARIANTS = [
    *({'position_encoding': name} for name in POSITION_ENCODING_REGISTRY),
    *({'position_encoding': 'rope', 'rope_scaling': name} for name in ROPE_SCALING_REGISTRY),
    {'position_encoding': 'rope', 'rope_fraction': 0.5},
    {'position_encoding': 'sinusoidal', 'sinusoid_layout': 'fairseq'},
]
BOUNDLESS = [v for v in VARIANTS if v['position_encoding'] != 'learned_absolute']


def label(values):
    return '-'.join(str(value) for value in values.values())


@pytest.mark.parametrize('values', BOUNDLESS, ids=label)
def test_twice_block_size_is_finite_and_causal(values):
    config = tiny(**values)
    model, length = perturbed_model(config).eval(), 2 * config.block_size
    tokens = random_tokens(config.replace(block_size=length), batch=1).expand(length, length)
    changed = tokens.clone()  # row t: token t differs
    changed.diagonal().add_(1).remainder_(config.vocab_size)
    logits = model(tokens)
    different = (logits != model(changed)).any(dim=-1)
    assert torch.isfinite(logits).all()
    assert torch.equal(different, torch.ones(length, length, dtype=torch.bool).triu())


def test_learned_positions_end_at_block_size():
    model = perturbed_model(tiny(position_encoding='learned_absolute'))
    tokens = torch.zeros(1, model.config.block_size + 1, dtype=torch.long)
    with pytest.raises(UserError) as refused:
        model(tokens)
    (problem,) = refused.value.problems
    assert "position_encoding='learned_absolute'" in problem and '\n' not in problem


@pytest.mark.parametrize('values', VARIANTS, ids=label)
def test_encoding_depends_on_order_of_past(values):
    """One attention layer without positions is invariant to the order of tokens."""
    model = perturbed_model(tiny(**values, n_layer=1)).eval()
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    last, swapped = model(tokens)[0, -1], model(tokens[:, [1, 0, 2, 3, 4, 5]])[0, -1]
    blind = values['position_encoding'] == 'none'
    assert torch.allclose(last, swapped, rtol=1e-3, atol=1e-3) == blind


@pytest.mark.parametrize('values', VARIANTS, ids=label)
def test_rotation_and_bias_are_fp32_under_autocast(values):
    model = perturbed_model(tiny(**values))
    positions = torch.arange(4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        prepared = model.position_encoding.prepare(positions, positions)
        x = model.position_encoding.embed(torch.zeros(1, 4, 16), positions)
    tensors = [*prepared.rotation, x] + ([prepared.bias] if prepared.bias is not None else [])
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_position_encoding_name_tag():
    rope = {'position_encoding': 'rope'}
    assert '-RoPE-LN-' in tiny(**rope).name
    assert '-RoPE0.5-LN-' in tiny(**rope, rope_fraction=0.5).name
    both = tiny(**rope, rope_fraction=0.5, rope_scaling='yarn')
    assert '-RoPE0.5-YaRN-LN-' in both.name
