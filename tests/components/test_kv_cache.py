"""components/kv_cache.py: the contents of the cache, and equal results with and without it."""

import random

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import (
    label,
    pairwise_architectures,
    perturbed_model,
    random_tokens,
    tiny,
)

from components.kv_cache import LayerCache
from inference.generate import generate
from model_components import Attention, LatentAttention, MultiHeadAttention
from model_config import ATTENTION_REGISTRY, PRESETS, ModelArchitectureConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]


# --- One layer's cache ----------------------------------------------------------------------------


@pytest.mark.parametrize('capacity', [1, 3, 8])
@pytest.mark.parametrize('seed', range(4))
def test_cache_returns_last_tokens_within_capacity(capacity, seed):
    """Chunks of random sizes: each token sees itself and the capacity - 1 tokens before it, once
    each.
    """
    choose = random.Random(seed)
    x = torch.randn(2, 3, 20, 4)
    cache, memory = LayerCache(capacity), set()
    while cache.length < 20:
        start = cache.length
        end = min(20, start + choose.choice([1, 1, 1, 2, 5]))
        positions = cache.positions(torch.arange(start, end))
        one, other = cache.extend(x[..., start:end, :], -x[..., start:end, :2])
        assert torch.equal(one, x[..., positions, :]) and torch.equal(other, -x[..., positions, :2])
        assert len(set(positions.tolist())) == len(positions) and positions.max() == end - 1
        assert set(range(max(0, start - capacity + 1), end)) <= set(positions.tolist())
        assert len(positions) <= max(capacity, capacity + end - start)
        memory.add(tuple(tensor.data_ptr() for tensor in cache.tensors))
        assert cache.nbytes == 2 * 3 * capacity * (4 + 2) * 4
    assert len(memory) == 1


def cached_numbers(**values) -> list[int]:
    """Numbers per token in the layers' caches of 6 tokens: (layers,)."""
    model = perturbed_model(tiny(**values)).eval()
    cache = model.empty_cache(6)
    with torch.no_grad():
        model(random_tokens(model.config, batch=2)[:, :3], cache=cache)
    return [states['attention'].nbytes // (2 * 4) for states in cache.layers]


def test_cache_size_by_layer():
    """n_embd 16 in 4 heads: keys and values of the key heads, of the window only, or latents."""
    assert cached_numbers() == [6 * 2 * 16] * 2
    assert cached_numbers(use_gqa=True, num_kv_heads=1) == [6 * 2 * 4] * 2
    assert cached_numbers(sliding_window=2) == [2 * 2 * 16] * 2
    assert cached_numbers(sliding_window=4, attention_pattern='LG') == [4 * 2 * 16, 6 * 2 * 16]
    latent = {'attention_type': 'mla', 'kv_lora_rank': 7, 'qk_rope_head_dim': 2}
    assert cached_numbers(**latent) == [6 * (7 + 2)] * 2
    kinds = {'L': {'sliding_window': 2, 'head_dim': 8}, 'A': latent}
    mixed = cached_numbers(n_layer=3, layer_pattern='LGA', layer_kinds=kinds)
    assert mixed == [2 * 2 * 32, 6 * 2 * 16, 6 * (7 + 2)]


# --- A model goes on from its cache ---------------------------------------------------------------


@torch.no_grad()
def check_in_pieces(config):
    """Chunks of any size give the same logits as all tokens at once, for a batch of different
    texts.
    """
    torch._dynamo.reset()  # otherwise each length counts as a recompilation of flex
    model, tokens = perturbed_model(config).eval(), random_tokens(config, batch=3)
    expected, length = model(tokens), config.block_size
    # Rounding errors grow with the logits, of which some architectures have large ones.
    error = 1e-4 * max(1.0, expected.abs().max().item())
    for sizes in ([1] * length, [3, *[1] * (length - 3)], [2, length - 2], [length - 1, 1]):
        cache = model.empty_cache(length)
        logits = [model(piece, cache=cache) for piece in tokens.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0.0, atol=error)


@pytest.mark.parametrize('preset', PRESETS)
def test_preset_continues_from_cache(preset):
    sizes = {'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'block_size': 12, 'vocab_size': 11}
    check_in_pieces(ModelArchitectureConfig(arch_preset=preset, **sizes))


@pytest.mark.slow
@pytest.mark.usefixtures('flex_of_few_queries')
@pytest.mark.parametrize('chosen', pairwise_architectures()[::6], ids=label)
def test_random_architecture_continues_from_cache(chosen):
    check_in_pieces(tiny(**chosen).replace(init_std=0.02))


ATTENTIONS = {
    'heads': {},
    'groups': {'use_gqa': True, 'num_kv_heads': 2},
    'one key head': {'use_gqa': True, 'num_kv_heads': 1, 'qk_norm': 'rmsnorm'},
    'latents': {'attention_type': 'mla', 'kv_lora_rank': 8, 'qk_rope_head_dim': 4},
}
ENCODINGS = {
    'none': {},
    'learned_absolute': {},
    'sinusoidal': {},
    'rope': {'rope_fraction': 0.5, 'rope_scaling': 'yarn', 'rope_original_block_size': 4},
    'alibi': {},
    't5_relative': {'t5_buckets': 4},
}


@pytest.mark.parametrize('attention', ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize('encoding', ENCODINGS)
def test_attention_and_encoding_continue_from_cache(attention, encoding):
    """Also with windows, with the backends that generate on any device."""
    values = {'position_encoding': encoding, **ENCODINGS[encoding], **attention}
    windows = {'sliding_window': 3, 'attention_pattern': 'LG'}
    check_in_pieces(tiny(**values))
    check_in_pieces(tiny(**values, **windows))
    check_in_pieces(tiny(**values, **windows, attention_backend='manual', attention_softcap=2.0))


# --- Text -----------------------------------------------------------------------------------------


def texts(config, prompt, count):
    """Compares logits and text with and without the cache."""
    model, results = perturbed_model(config).eval(), []
    for cache in (True, False):
        logits = []

        def choose(each, logits=logits):
            logits.append(each)
            return (each.argmax(dim=-1) + len(logits)) % config.vocab_size

        text = list(generate(model, prompt, count, choose=choose, cache=cache))
        results.append((torch.stack(logits), torch.stack(text)))
    return results


@pytest.mark.parametrize('encoding', ['learned_absolute', 'rope', 'alibi'])
@pytest.mark.parametrize('prompt', [1, 4, 6, 9])
def test_text_is_equal_with_and_without_cache(encoding, prompt):
    """Also beyond the context, where the oldest tokens are dropped, and with a longer prompt."""
    config = tiny(position_encoding=encoding, sliding_window=4, attention_pattern='LG')
    tokens = random_tokens(config, batch=3).repeat(1, 2)[:, :prompt]
    (logits, text), (expected, written) = texts(config, tokens, 10)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(text, written) and len(text.unique()) > 2


@torch.no_grad()
def test_each_token_is_processed_once(monkeypatch):
    model, lengths = perturbed_model(tiny(position_encoding='rope')).eval(), []
    model.blocks[0].register_forward_hook(lambda _, args, __: lengths.append(args[0].size(1)))
    prompt = random_tokens(model.config, batch=2)[:, :3]
    list(generate(model, prompt, 6, choose=lambda logits: logits.argmax(-1)))
    assert lengths == [3, 1, 1, 1, 6, 6]  # the context has 6 tokens


# --- Components that know no cache ----------------------------------------------------------------


class ShiftedAttention(MultiHeadAttention):
    """Uses the previous token, which is not in a cache of keys and values."""

    def forward(self, x, positions):
        return super().forward(F.pad(x[:, :-1], (0, 0, 1, 0)), positions)


def test_custom_forward_generates_without_cache(register):
    register(ATTENTION_REGISTRY, 'shifted', ShiftedAttention)
    config = tiny(attention_type='shifted')
    model = perturbed_model(config)
    assert model.uncacheable == ['ShiftedAttention'] and perturbed_model(tiny()).uncacheable == []
    (logits, text), (expected, written) = texts(config, random_tokens(config, batch=2)[:, :2], 8)
    assert torch.equal(logits, expected) and torch.equal(text, written)


def test_cacheable_resets_only_with_own_forward():
    class Renamed(MultiHeadAttention):
        tag = 'Renamed'

    class Own(LatentAttention):
        cacheable = True

        def forward(self, x, positions):
            return super().forward(x, positions)

    class OwnAgain(Own):
        def forward(self, x, positions):
            return super().forward(x, positions)

    assert Renamed.cacheable and Own.cacheable and not OwnAgain.cacheable
    assert not Attention.cacheable and MultiHeadAttention.cacheable
