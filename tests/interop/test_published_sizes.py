"""Released models have as many parameters here as their authors say."""

import pytest
from helpers.transformers_models import architecture

from model_builder import build_model, count_parameters


def sizes(layers: int, width: int, heads: int, ffn: int, vocabulary: int, **others) -> dict:
    return {
        'num_hidden_layers': layers,
        'hidden_size': width,
        'num_attention_heads': heads,
        'intermediate_size': ffn,
        'vocab_size': vocabulary,
        **others,
    }


def gpt2_sizes(layers: int, width: int, heads: int, length: int, vocabulary: int) -> dict:
    return {
        'n_layer': layers,
        'n_embd': width,
        'n_head': heads,
        'n_positions': length,
        'vocab_size': vocabulary,
    }


# The fields of config.json, and the number of parameters as published.
PUBLISHED = {
    # Model cards, on huggingface.co.
    'Qwen/Qwen3-30B-A3B': (
        'qwen3_moe',
        sizes(48, 2048, 32, 6144, 151_936, num_key_value_heads=4, head_dim=128),
        '30.5B',
    ),
    'allenai/OLMoE-1B-7B-0924': ('olmoe', sizes(16, 2048, 16, 1024, 50_304), '6.9B'),
    'baidu/ERNIE-4.5-0.3B': ('ernie4_5', sizes(18, 1024, 16, 3072, 103_424), '0.36B'),
    'kyutai/helium-1-preview-2b': ('helium', sizes(24, 2560, 20, 7040, 48_000), '2B'),
    'mistralai/Ministral-8B-Instruct-2410': (
        'ministral',
        sizes(36, 4096, 32, 12_288, 131_072, head_dim=128, num_key_value_heads=8),
        '8,019,808,256',
    ),
    'mosaicml/mpt-7b': (
        'mpt',
        {'n_layers': 32, 'd_model': 4096, 'n_heads': 32, 'vocab_size': 50_432},
        '7B',
    ),
    'LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct': (
        'exaone',
        sizes(32, 4096, 32, 14_336, 102_400),
        '7.8B',
    ),
    'inceptionai/Jais-2-8B-Chat': ('jais2', sizes(32, 3328, 26, 26_624, 150_272), '8B'),
    'IQuestLab/IQuest-Coder-V1-40B': ('iquestcoder', sizes(80, 5120, 40, 27_648, 76_800), '40B'),
    'tencent/Youtu-LLM-2B': ('youtu', sizes(32, 2048, 16, 6144, 128_256), '1.96B'),
    # Li et al. 2023, Ben Allal et al. 2023, Lozhkov et al. 2024.
    'bigcode/starcoderbase': ('gpt_bigcode', gpt2_sizes(40, 6144, 48, 8192, 49_152), '15.5B'),
    'bigcode/santacoder': ('gpt_bigcode', gpt2_sizes(24, 2048, 16, 2048, 49_280), '1.1B'),
    'bigcode/starcoder2-3b': ('starcoder2', sizes(30, 3072, 24, 12_288, 49_152), '3B'),
    # Radford et al. 2018, Luo et al. 2022.
    'openai-community/openai-gpt': ('openai-gpt', gpt2_sizes(12, 768, 12, 512, 40_478), '117M'),
    'microsoft/biogpt': ('biogpt', sizes(24, 1024, 16, 4096, 42_384), '347M'),
}


def rounded(count: int, published: str) -> str:
    """The number, written as the published one is."""
    unit = {'B': 1e9, 'M': 1e6}.get(published[-1])
    if unit is None:
        return f'{count:,}'
    digits = len(published[:-1].partition('.')[2])
    return f'{count / unit:.{digits}f}{published[-1]}'


@pytest.mark.parametrize('name', PUBLISHED)
def test_released_models_have_their_number_of_parameters(name):
    family, fields, published = PUBLISHED[name]
    model = build_model(architecture({'model_type': family, **fields}))
    assert rounded(sum(p.numel() for p in model.parameters()), published) == published


def test_active_parameters_of_olmoe():
    """1.3B of its 6.9B are used for each token (Muennighoff et al. 2024)."""
    family, fields, _ = PUBLISHED['allenai/OLMoE-1B-7B-0924']
    counts = count_parameters(build_model(architecture({'model_type': family, **fields})))
    assert rounded(counts['active_params'], '1.3B') == '1.3B'


# Tables of Gemma Team 2024 (Gemma) and Parmar et al. 2024 (Nemotron-4 15B): without embeddings.
NON_EMBEDDING = {
    'google/gemma-2b': (
        'gemma',
        sizes(18, 2048, 8, 16_384, 256_000, num_key_value_heads=1),
        '1,981,884,416',
    ),
    'google/gemma-7b': ('gemma', sizes(28, 3072, 16, 24_576, 256_000), '7,751,248,896'),
    'nvidia/Nemotron-4-15B': (
        'nemotron',
        sizes(32, 6144, 48, 24_576, 256_000, num_key_value_heads=8),
        '12.5B',
    ),
}


@pytest.mark.parametrize('name', NON_EMBEDDING)
def test_parameters_without_embeddings(name):
    family, fields, published = NON_EMBEDDING[name]
    model = build_model(architecture({'model_type': family, **fields}))
    embeddings = ('token_embedding.weight', 'output_head.projection.weight')
    parameters = dict(model.named_parameters())
    count = sum(p.numel() for key, p in parameters.items() if key not in embeddings)
    assert rounded(count, published) == published
