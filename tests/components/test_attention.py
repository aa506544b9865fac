"""components/attention.py, latent_attention.py, attention_backends.py: against transformers'
classes.
"""

import importlib
import itertools
import re

import pytest
import torch
from helpers.architectures import gradients, perturbed_model, random_tokens, tiny
from torch.utils.flop_counter import FlopCounterMode

from components.attention_backends import AttentionSpec
from inference.generate import generate
from inference.sampling import Sampler
from model_builder import build_model, recompute, training_flops
from model_config import ATTENTION_BACKEND_REGISTRY, ATTENTION_REGISTRY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

# --- Each backend against a plain loop ------------------------------------------------------------


def attention_in_a_loop(q, k, v, spec, bias):
    """Reference: one query at a time, in double precision; queries are at the last positions of the
    keys.
    """
    out = torch.empty(*q.shape[:3], v.size(-1), dtype=torch.double)
    before = k.size(2) - q.size(2)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        group, last = h // (q.size(1) // k.size(1)), before + t + 1
        first = max(0, last - spec.window) if spec.window else 0
        scores = spec.scale * (k[b, group, first:last].double() @ q[b, h, t].double())
        if spec.softcap:
            scores = spec.softcap * (scores / spec.softcap).tanh()
        if bias is not None:
            scores = scores + bias[h % bias.size(0), t, first:last].double()
        out[b, h, t] = scores.softmax(-1) @ v[b, group, first:last].double()
    return out


@pytest.mark.parametrize('backend', ['sdpa', 'manual', 'flex'])
@pytest.mark.parametrize('window', [None, 1, 3, 20])
@pytest.mark.parametrize('softcap', [None, 1.5])
@pytest.mark.usefixtures('flex_of_few_queries')
def test_backend_matches_reference_loop(backend, window, softcap):
    """Grouped heads or not, values of another width, with and without bias, fewer queries than
    keys.
    """
    backend = ATTENTION_BACKEND_REGISTRY[backend]
    if softcap and 'softcap' not in backend.supports:
        return
    torch._dynamo.reset()  # otherwise each case counts as a recompilation of the same function
    generator = torch.Generator().manual_seed(0)
    axes = itertools.product((4, 2, 1), (8, 6), (None, 1, 4), (6, 2))
    for number, (kv_heads, v_width, bias_heads, queries) in enumerate(axes):
        if number % 3:  # a third of the combinations, with all values in combination
            continue
        q = 3 * torch.randn(2, 4, queries, 8, generator=generator)
        k = torch.randn(2, kv_heads, 6, 8, generator=generator)
        v = torch.randn(2, kv_heads, 6, v_width, generator=generator)
        bias = torch.randn(bias_heads, queries, 6, generator=generator) if bias_heads else None
        spec = AttentionSpec(0.4, bias is not None, softcap=softcap, window=window)
        positions = torch.arange(6)
        mask = backend.mask(spec, bias, positions[6 - queries :], positions)
        y = backend.attend(q, k, v, mask, spec, 0.0)
        torch.testing.assert_close(y, attention_in_a_loop(q, k, v, spec, bias).float())


@pytest.mark.parametrize('values', [{'head_dim': 6, 'n_head': 3}, {'n_head': 4}])
def test_head_dim_need_not_divide_n_embd(values):
    config = tiny(**values)
    attention = build_model(config, 'cpu').blocks[0].attention
    assert attention.output.in_features == config.n_head * config.head_dim


@pytest.mark.usefixtures('flex_of_few_queries')
def test_flex_generates_like_manual_and_trains_on_cuda_only():
    values = {'sliding_window': 3, 'attention_pattern': 'LG', 'attention_softcap': 2.0}
    texts = []
    for backend in ('flex', 'manual'):
        model = perturbed_model(
            tiny(**values, attention_backend=backend, position_encoding='alibi')
        ).eval()
        prompt = random_tokens(model.config, batch=2)[:, :1]
        drawn = generate(model, prompt, 9, choose=Sampler(11, temperature=0))
        texts.append(torch.stack(list(drawn)))
    assert torch.equal(*texts) and len(texts[0].unique()) > 1
    flex = ATTENTION_BACKEND_REGISTRY['flex']
    config = tiny(attention_backend='flex', head_dim=16)
    assert flex.training_problems(config, 'cuda') == []
    assert 'Train with sdpa or manual (' in flex.training_problems(config, 'cpu')[0]
    capped = config.replace(attention_softcap=2.0)  # not a feature of sdpa
    assert 'CUDA only. Train with manual (' in flex.training_problems(capped, 'cpu')[0]
    assert 'at least 16' in flex.training_problems(config.replace(head_dim=8), 'cuda')[0]


def test_training_flex_on_cpu_is_rejected(train):
    refused = train('--attention_backend=flex', code=2).stderr
    assert 'has no backward pass on cpu' in refused and 'Traceback' not in refused
    assert refused == train('--attention_backend=flex', '--plan', code=2).stderr
    measured = train('--attention_backend=flex', '--eval_only=True')
    assert 'flex_attention called without' not in measured.stderr


# --- Others' attentions ---------------------------------------------------------------------------


def theirs(name, **fields):
    """The attention class of a model in transformers, such as 'Qwen3', and a config for it."""
    folder = re.sub(r'(?<=k)V', '_v', name).lower()
    module = importlib.import_module(f'transformers.models.{folder}.modeling_{folder}')
    config = getattr(module, f'{name}Config')(
        hidden_size=16,
        num_attention_heads=4,
        num_hidden_layers=2,
        rms_norm_eps=1e-6,
        attn_implementation='eager',
        **fields,
    )
    return getattr(module, f'{name}Attention'), config


def compare(ours, positions, attention, rotary, window, weights):
    """Compare outputs and gradients of both on the same input."""
    x, length = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1)), 6
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen &= ~seen.tril(-(window or length))
    mask = torch.zeros(length, length).masked_fill(~seen, -torch.inf)[None, None]
    expected = attention(x, position_embeddings=rotary, attention_mask=mask)[0]
    ours.load_state_dict(weights(dict(attention.named_parameters())))
    y = ours(x, positions)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * target).sum().backward()
    (expected * target).sum().backward()
    expected_gradients = weights(gradients(attention))
    for name, grad in gradients(ours).items():
        assert torch.linalg.norm(expected_gradients[name]) > 1e-3, name
        error = torch.linalg.norm(grad - expected_gradients[name])
        assert error < 1e-5 * torch.linalg.norm(expected_gradients[name]), name


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.2, 0.5, generator=generator)
    return module


def standard_weights(tensors):
    """transformers' weights under our names, with q, k and v in one matrix."""
    qkv = torch.cat([tensors[f'{n}_proj.weight'] for n in 'qkv'])
    norms = {name: tensors[name] for name in tensors if '_norm' in name}
    return {'qkv.weight': qkv, 'output.weight': tensors['o_proj.weight'], **norms}


def rope(columns):
    """Cosines and sines in the form of transformers' layers."""
    positions = torch.arange(6)
    frequency = 10000.0 ** (-torch.arange(0, columns, 2) / columns)
    angles = positions[:, None] * torch.cat((frequency, frequency))
    return angles.cos()[None], angles.sin()[None]


@pytest.mark.parametrize('backend', ['sdpa', 'manual'])
@pytest.mark.parametrize(
    ('name', 'fields', 'values'),
    [
        (
            'Qwen3',
            {'head_dim': 6, 'num_key_value_heads': 2},
            {'head_dim': 6, 'use_gqa': True, 'num_kv_heads': 2, 'qk_norm': 'rmsnorm'},
        ),
        (
            'Olmo2',
            {'num_key_value_heads': 2},
            {
                'use_gqa': True,
                'num_kv_heads': 2,
                'qk_norm': 'rmsnorm',
                'qk_norm_scope': 'projection',
            },
        ),
        (
            'Mistral',
            {'head_dim': 4, 'num_key_value_heads': 1, 'sliding_window': 3},
            {'use_gqa': True, 'num_kv_heads': 1, 'sliding_window': 3},
        ),
        (
            'Gemma2',
            {
                'head_dim': 8,
                'num_key_value_heads': 2,
                'sliding_window': 3,
                'query_pre_attn_scalar': 10,
                'attn_logit_softcapping': 2.0,
            },
            {
                'head_dim': 8,
                'use_gqa': True,
                'num_kv_heads': 2,
                'sliding_window': 3,
                'attention_pattern': 'LG',
                'attention_scale': 10**-0.5,
                'attention_softcap': 2.0,
            },
        ),
    ],
    ids=['qwen3', 'olmo2', 'mistral', 'gemma2'],
)
def test_attention_matches_transformers(name, fields, values, backend):
    if 'attention_softcap' in values and backend == 'sdpa':
        return
    config = tiny(
        **values,
        norm_eps=1e-6,
        normalization='rmsnorm',
        bias=False,
        position_encoding='rope',
        attention_backend=backend,
    )
    attention, their_config = theirs(name, **fields)
    model = build_model(config, 'cpu')
    attn_inputs = model.attention_inputs(torch.arange(6))
    for layer, block in enumerate(model.blocks):
        pattern = values.get('attention_pattern', 'L')
        local = pattern[layer % len(pattern)] == 'L'
        compare(
            block.attention,
            attn_inputs[layer],
            randomize(attention(their_config, layer)),
            rope(config.head_dim),
            config.sliding_window if local else None,
            standard_weights,
        )


@pytest.mark.parametrize('backend', ['sdpa', 'manual'])
@pytest.mark.parametrize('q_rank', [None, 5])
@pytest.mark.parametrize('bias', [False, True])
def test_latent_attention_matches_transformers(q_rank, bias, backend):
    """DeepSeek-V3's attention, with rotated dimensions in halves as in ours."""
    sizes = {
        'q_lora_rank': q_rank,
        'kv_lora_rank': 7,
        'qk_nope_head_dim': 3,
        'qk_rope_head_dim': 4,
        'v_head_dim': 5,
    }
    config = tiny(
        attention_type='mla',
        **sizes,
        norm_eps=1e-6,
        normalization='rmsnorm',
        attention_bias=bias,
        position_encoding='rope',
        attention_backend=backend,
    )
    attention, their_config = theirs(
        'DeepseekV3', **sizes, num_key_value_heads=4, attention_bias=bias, rope_interleave=False
    )
    names = {
        'q_a_proj': 'q_down',
        'q_a_layernorm': 'q_norm',
        'q_b_proj': 'q',
        'q_proj': 'q',
        'kv_a_proj_with_mqa': 'kv_down',
        'kv_a_layernorm': 'kv_norm',
        'kv_b_proj': 'kv',
        'o_proj': 'output',
    }

    def weights(tensors):
        return {
            f'{names[key.rpartition(".")[0]]}.{key.rpartition(".")[2]}': value
            for key, value in tensors.items()
        }

    model = build_model(config, 'cpu')
    compare(
        model.blocks[0].attention,
        model.attention_inputs(torch.arange(6))[0],
        randomize(attention(their_config, 0)),
        rope(4),
        None,
        weights,
    )


def test_latent_sizes_match_paper():
    """DeepSeek-V2, section 2.1.4: the latent is four heads wide, the rotated part half a head."""
    config = tiny(attention_type='mla', n_embd=5120, n_head=40, position_encoding='rope')
    sizes = (config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim)
    assert (*sizes, config.v_head_dim) == (512, 128, 64, 128)
    assert config.attention_scale == pytest.approx((128 + 64) ** -0.5)


# --- Masks, FLOPs, names, matrices ----------------------------------------------------------------


def test_layers_with_equal_spec_share_mask(monkeypatch):
    masks = []
    backend = ATTENTION_BACKEND_REGISTRY['manual']
    original = backend.mask
    monkeypatch.setattr(backend, 'mask', lambda *given: masks.append(original(*given)) or masks[-1])
    values = {'n_layer': 8, 'sliding_window': 2, 'attention_pattern': 'LLLG'}
    model = build_model(tiny(**values, attention_backend='manual'), 'cpu')
    attn_inputs = model.attention_inputs(torch.arange(6))
    assert len(masks) == 2
    windows = [(p.mask > -1).sum(-1).max().item() for p in attn_inputs]
    assert windows == [2, 2, 2, 6, 2, 2, 2, 6]


@pytest.mark.parametrize('window', [None, 1, 2, 5, 6, 100])
def test_attention_flops_full_and_causal(window):
    """Full FLOPs against torch's counter, also with recomputation; causal ones by pairs."""
    pattern = {} if window is None else {'attention_pattern': 'LG'}
    config = tiny(
        sliding_window=window, head_dim=6, attention_backend='manual', n_layer=2, **pattern
    )
    length = config.block_size
    tokens = torch.zeros((1, length), dtype=torch.long)

    def counted(recomputed: list[int]) -> tuple[int, int]:
        model = build_model(config, 'cpu', 0)
        for number in recomputed:
            recompute(model.blocks[number])
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens)[0].backward()
        products = counter.get_flop_counts()['Global'][torch.ops.aten.bmm]
        return counter.get_total_flops(), products

    total, square = counted([])
    flops = training_flops(build_model(config), [0, 1])
    assert flops['per_token'] * length == pytest.approx(total)
    assert flops['breakdown']['attention_scores'] * length == pytest.approx(square)
    again = flops['recomputed_per_token'] * length
    assert total + again == pytest.approx(counted([0, 1])[0])

    positions = torch.arange(length)
    seen = 0.0
    for block in build_model(config).blocks:
        spec = block.attention.spec
        pairs = spec.is_visible(positions[:, None], positions).sum().item()
        seen += pairs - min(spec.window or length, length) / 2
    per_pair = 3 * 2 * (6 + 6) * config.n_head
    assert flops['breakdown_causal']['attention_scores'] * length == pytest.approx(per_pair * seen)
    others = {part: value for part, value in flops['breakdown'].items() if 'scores' not in part}
    assert others.items() <= flops['breakdown_causal'].items()


@pytest.mark.parametrize(
    ('values', 'tag'),
    [
        ({}, ''),
        ({'use_gqa': True, 'num_kv_heads': 1}, 'MQA'),
        ({'use_gqa': True, 'num_kv_heads': 2, 'head_dim': 6}, 'HD6-GQA2'),
        ({'qk_norm': 'rmsnorm'}, 'QKRMS'),
        ({'qk_norm': 'rmsnorm', 'qk_norm_scope': 'projection'}, 'QKRMSproj'),
        ({'sliding_window': 3}, 'SW3'),
        ({'sliding_window': 3, 'attention_pattern': 'LLG'}, 'SW3-LLG'),
        (
            {'attention_scale': 0.1, 'attention_softcap': 50.0, 'attention_backend': 'manual'},
            'Scale0.1-Cap50',
        ),
        ({'attention_type': 'mla'}, 'MLA16-4x2x4'),
        ({'attention_type': 'mla', 'q_lora_rank': 9}, 'MLA16q9-4x2x4'),
    ],
)
def test_attention_name_tag(values, tag):
    config = tiny(**values)
    assert ATTENTION_REGISTRY[config.attention_type].name_tag(config) == tag


@pytest.mark.parametrize('attention_type', ['standard', 'mla'])
def test_stacked_matrices_cover_projection(attention_type):
    config = tiny(attention_type=attention_type)
    attention = build_model(config).blocks[0].attention
    for weight, rows in attention.matrices().items():
        assert sum(rows) == weight.size(0)
    assert len(attention.matrices()) == sum(p.dim() == 2 for p in attention.parameters())


@pytest.mark.parametrize(
    ('values', 'is_saved'),
    [
        ({'position_encoding': 'rope'}, False),
        ({'position_encoding': 'rope', 'use_gqa': True, 'num_kv_heads': 2}, False),
        ({'position_encoding': 'rope', 'qk_norm': 'rmsnorm'}, True),  # keeps its input
        ({'position_encoding': 'learned_absolute'}, True),  # q and k are parts of it
    ],
)
def test_qkv_projection_output_is_freed(values, is_saved):
    """Recognized by its size, which no other tensor kept by the attention has."""
    config = tiny(attention_type='standard', attention_backend='sdpa', dropout=0.0, **values)
    model, saved_bytes, sizes = build_model(config, device='cpu', seed=1), set(), set()

    def check(attention, *_):
        product = attention.qkv.out_features * 2 * config.block_size * 4
        assert (product in saved_bytes) == is_saved
        sizes.update(saved_bytes)

    def note(tensor):
        saved_bytes.add(tensor.untyped_storage().nbytes())
        return tensor

    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda *_: saved_bytes.clear())
        block.attention.register_forward_hook(check)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(random_tokens(config, batch=2))
    assert sizes  # the hooks were called
