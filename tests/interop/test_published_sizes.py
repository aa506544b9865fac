"""Released models have as many parameters here as their authors say, in total and per token."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
from helpers.transformers_models import architecture

from common.published_designs import PUBLISHED_DESIGNS
from model_builder import build_model, count_parameters


class Size(NamedTuple):
    """The published numbers of parameters of a model, as they are written there."""

    family: str  # whose published design the model is, apart from `fields`
    total: str  # '' if another row has it
    active: str  # of those that a token uses; '' for models without experts
    source: str
    fields: Mapping = MappingProxyType({})  # of config.json
    without: tuple[int, int] = (0, 0)  # tables (vocabulary × width) left out of total and active


def sizes(layers: int, width: int, heads: int, kv_heads: int, ffn: int, **others) -> dict:
    return {
        'num_hidden_layers': layers,
        'hidden_size': width,
        'num_attention_heads': heads,
        'num_key_value_heads': kv_heads,
        'intermediate_size': ffn,
        **others,
    }


def gpt2(layers: int, width: int, heads: int, length: int, vocabulary: int) -> dict:
    others = {'n_inner': 4 * width, 'n_positions': length, 'vocab_size': vocabulary}
    return {'n_layer': layers, 'n_embd': width, 'n_head': heads, **others}


def neox(layers: int, width: int, heads: int, vocabulary: int) -> dict:
    return {
        'num_hidden_layers': layers,
        'hidden_size': width,
        'num_attention_heads': heads,
        'intermediate_size': 4 * width,
        'vocab_size': vocabulary,
    }


def mamba2(layers: int, width: int) -> dict:
    others = {'vocab_size': 50288, 'n_groups': 1, 'tie_word_embeddings': True}
    return {'hidden_size': width, 'num_hidden_layers': layers, 'num_heads': width // 32, **others}


CARD = 'card on huggingface.co'
README = 'README on github.com'
FALCON_H1 = {'mamba_d_state': 256, 'head_dim': 128, 'mamba_rms_norm': True}
GLM_4_5 = {
    **sizes(92, 5120, 96, 8, 12288, moe_intermediate_size=1536, n_routed_experts=160),
    **{'use_qk_norm': True, 'first_k_dense_replace': 3},
}

MIXTURES = {
    'Mixtral 8x7B': Size('mixtral', '46.7B', '12.9B', 'mistral.ai/news/mixtral-of-experts'),
    'Mixtral 8x22B': Size(
        'mixtral',
        '141B',
        '39B',
        'mistral.ai/news/mixtral-8x22b',
        sizes(56, 6144, 48, 8, 16384, vocab_size=32768),
    ),
    'DeepSeek-V2-Lite': Size(
        'deepseek_v2', '15.7B', '2.4B', 'DeepSeek-AI 2024a, appendix B', without=(0, 1)
    ),
    'DeepSeek-V2': Size(
        'deepseek_v2',
        '236B',
        '21B',
        README,
        {
            **sizes(60, 5120, 128, 128, 12288, q_lora_rank=1536, routed_scaling_factor=16.0),
            **{'moe_intermediate_size': 1536, 'n_routed_experts': 160},
            **{'topk_method': 'group_limited_greedy', 'n_group': 8, 'topk_group': 3},
        },
    ),
    'DeepSeek-V3': Size('deepseek_v3', '671B', '37B', README),
    'Kimi K2': Size(
        'deepseek_v3',
        '1T',
        '32B',
        README,
        {
            **{'num_attention_heads': 64, 'num_key_value_heads': 64, 'n_routed_experts': 384},
            **{'n_group': 1, 'topk_group': 1, 'first_k_dense_replace': 1, 'vocab_size': 163840},
        },
    ),
    'Qwen1.5-MoE-A2.7B': Size('qwen2_moe', '14.3B', '2.7B', CARD),
    'Qwen3-30B-A3B': Size('qwen3_moe', '30.5B', '3.3B', CARD),
    'Qwen3-30B-A3B without embeddings': Size('qwen3_moe', '29.9B', '', CARD, without=(2, 0)),
    'Qwen3-235B-A22B': Size(
        'qwen3_moe',
        '235B',
        '22B',
        CARD,
        sizes(94, 4096, 64, 4, 12288, moe_intermediate_size=1536),
    ),
    'Qwen3-Next-80B-A3B': Size('qwen3_next', '80B', '3B', CARD),
    'Qwen3-Next-80B-A3B without embeddings': Size('qwen3_next', '79B', '', CARD, without=(2, 0)),
    # The total has the layer for multi-token prediction, which is as another layer.
    'GLM-4.5': Size(
        'glm4_moe', '355B', '', README, {**GLM_4_5, 'num_hidden_layers': 93}, without=(2, 0)
    ),
    'GLM-4.5 per token': Size('glm4_moe', '', '32B', README, GLM_4_5, without=(0, 2)),
    'GLM-4.5-Air': Size('glm4_moe', '106B', '12B', README, without=(2, 2)),
    'GLM-4.7-Flash': Size('glm4_moe_lite', '30B', '3B', 'its name on huggingface.co, 30B-A3B'),
    'gpt-oss-20b': Size('gpt_oss', '20.91B', '3.61B', 'OpenAI 2025, table 1', without=(0, 1)),
    'gpt-oss-120b': Size(
        'gpt_oss',
        '116.83B',
        '5.13B',
        'OpenAI 2025, table 1',
        {'num_hidden_layers': 36, 'num_local_experts': 128},
        without=(0, 1),
    ),
    'OLMoE-1B-7B': Size('olmoe', '6.9B', '1.3B', README),
    'ERNIE-4.5-21B-A3B': Size('ernie4_5_moe', '21B', '3B', CARD),
    'dots.llm1': Size('dots1', '142B', '14B', README),
    'Hunyuan-A13B': Size('hunyuan_v1_moe', '80B', '13B', README),
    'Granite 3.0 1B-A400M': Size('granitemoe', '1.3B', '0.4B', CARD),
    'Granite 3.0 3B-A800M': Size(
        'granitemoe',
        '3.3B',
        '0.8B',
        CARD,
        sizes(32, 1536, 24, 8, 512, num_local_experts=40),
    ),
    'Granite 4.0 H-Tiny': Size('granitemoehybrid', '7B', '1B', CARD),
    'Granite 4.0 H-Small': Size(
        'granitemoehybrid',
        '32B',
        '9B',
        CARD,
        {
            **sizes(40, 4096, 32, 8, 768, shared_intermediate_size=1536, mamba_n_heads=128),
            **{'num_local_experts': 72, 'num_experts_per_tok': 10},
        },
    ),
    'MiniMax-M2': Size('minimax_m2', '0.23T', '10B', README, without=(0, 1)),
    'MiniMax-Text-01': Size('minimax', '456B', '45.9B', README, without=(0, 2)),
    'Kimi-Linear-48B-A3B': Size('kimi_linear', '48B', '3B', README, without=(2, 0)),
    'LFM2-8B-A1B': Size('lfm2_moe', '8.3B', '1.5B', CARD),
    'Jamba v0.1': Size('jamba', '52B', '12B', 'Lieber et al. 2024'),
    'Trinity Mini': Size('afmoe', '26B', '3B', 'Singh et al. 2026'),
    'Trinity Nano': Size(
        'afmoe',
        '6B',
        '1B',
        'Singh et al. 2026',
        sizes(56, 1024, 8, 2, 3072, moe_intermediate_size=256),
    ),
    'K-EXAONE': Size('exaone_moe', '236B', '23B', README),
    'Hy3 preview': Size('hy_v3', '295B', '21B', CARD),
    'Solar Open 100B': Size('solar_open', '102.6B', '12B', CARD),
    'DBRX': Size('dbrx', '132B', '36B', README),
    'FlexOlmo 7x7B': Size('flex_olmo', '33B', '', CARD),
}

PYTHIA = 'Biderman et al. 2023, table 1'
GEMMA, GEMMA2 = 'Gemma Team 2024a, table 2', 'Gemma Team 2024b, table 2'
DENSE = {
    'XGLM 564M': Size('xglm', '564M', '', CARD),
    'GPT-1': Size('openai-gpt', '117M', '', 'Radford et al. 2019, table 2'),
    'GPT-2 small': Size('gpt2', '124M', '', README),
    'LLaMA 7B': Size('llama', '6.7B', '', 'Touvron et al. 2023, table 2'),
    'LLaMA 13B': Size(
        'llama', '13.0B', '', 'Touvron et al. 2023, table 2', sizes(40, 5120, 40, 40, 13824)
    ),
    'LLaMA 65B': Size(
        'llama', '65.2B', '', 'Touvron et al. 2023, table 2', sizes(80, 8192, 64, 64, 22016)
    ),
    'Pythia 160M': Size('gpt_neox', '85,056,000', '', PYTHIA, without=(2, 0)),
    'Pythia 410M': Size(
        'gpt_neox', '302,311,424', '', PYTHIA, neox(24, 1024, 16, 50304), without=(2, 0)
    ),
    'Pythia 1.4B': Size(
        'gpt_neox', '1,208,602,624', '', PYTHIA, neox(24, 2048, 16, 50304), without=(2, 0)
    ),
    'Pythia 6.9B': Size(
        'gpt_neox', '6,444,163,072', '', PYTHIA, neox(32, 4096, 32, 50432), without=(2, 0)
    ),
    'OPT 125M': Size('opt', '125M', '', 'Zhang et al. 2022, table 1'),
    'BLOOM 560M': Size('bloom', '559,214,592', '', CARD),
    'Falcon 7B': Size('falcon', '7B', '', CARD),
    'Falcon RW 1B': Size(
        'falcon',
        '1B',
        '',
        CARD,
        {
            **{'alibi': True, 'bias': True, 'multi_query': False, 'parallel_attn': False},
            **{'hidden_size': 2048, 'num_attention_heads': 32, 'num_hidden_layers': 24},
            'vocab_size': 50304,
        },
    ),
    'MPT 7B': Size('mpt', '7B', '', CARD),
    'GPT-J 6B': Size('gptj', '6.05B', '', CARD),
    'GPT-Neo 1.3B': Size('gpt_neo', '1.3B', '', CARD),
    'CodeGen 350M': Size('codegen', '0.35B', '', README),
    'SantaCoder': Size('gpt_bigcode', '1.1B', '', 'Ben Allal et al. 2023'),
    'StarCoderBase': Size(
        'gpt_bigcode', '15.5B', '', 'Li et al. 2023', gpt2(40, 6144, 48, 8192, 49152)
    ),
    'StarCoder2 3B': Size('starcoder2', '3B', '', 'Lozhkov et al. 2024'),
    'BioGPT': Size('biogpt', '347M', '', 'Luo et al. 2022'),
    'StableLM 3B 4E1T': Size('stablelm', '2,795,443,200', '', README),
    # The exact numbers on their cards, 1,644,417,024 and 12,143,605,760, count other norms.
    'Stable LM 2 1.6B': Size(
        'stablelm',
        '1.64B',
        '',
        CARD,
        sizes(24, 2048, 32, 32, 5632, vocab_size=100352, use_qkv_bias=True),
    ),
    'Stable LM 2 12B': Size(
        'stablelm',
        '12.1B',
        '',
        CARD,
        {
            **sizes(40, 5120, 32, 8, 13824, vocab_size=100352),
            **{'qk_layernorm': True, 'use_parallel_residual': True},
        },
    ),
    'Phi-1': Size('phi', '1.3B', '', CARD, without=(1, 0)),
    'Phi-2': Size(
        'phi', '2.7B', '', CARD, sizes(32, 2560, 32, 32, 10240, partial_rotary_factor=0.4)
    ),
    'Phi-3 mini': Size('phi3', '3.8B', '', CARD),
    'Phi-4 mini': Size(
        'phi3',
        '3.8B',
        '',
        CARD,
        {
            **sizes(32, 3072, 24, 8, 8192, partial_rotary_factor=0.75),
            **{'max_position_embeddings': 131072, 'sliding_window': 262144},
            **{'tie_word_embeddings': True, 'vocab_size': 200064},
            'rope_scaling': {
                'type': 'longrope',  # its factors are shortened
                'long_factor': [1.0] * 48,
                'short_factor': [1.0] * 48,
            },
        },
    ),
    'Gemma 2B': Size(
        'gemma', '1,981,884,416', '', GEMMA, sizes(18, 2048, 8, 1, 16384), without=(1, 0)
    ),
    'Gemma 7B': Size('gemma', '7,751,248,896', '', GEMMA, without=(1, 0)),
    'Gemma 2 2B': Size('gemma2', '2,024,517,888', '', GEMMA2, without=(1, 0)),
    'Gemma 2 9B': Size(
        'gemma2', '8,324,201,984', '', GEMMA2, sizes(42, 3584, 16, 8, 14336), without=(1, 0)
    ),
    'Gemma 3 1B': Size('gemma3_text', '698M', '', 'Gemma Team 2025, table 1', without=(1, 0)),
    'VaultGemma 1B': Size('vaultgemma', '1B', '', CARD),
    'Nemotron-4 15B': Size(
        'nemotron',
        '12.5B',
        '',
        'Parmar et al. 2024, table 1',
        sizes(32, 6144, 48, 8, 24576, head_dim=None),
        without=(2, 0),
    ),
    'Qwen2.5 0.5B': Size(
        'qwen2',
        '0.49B',
        '',
        CARD,
        sizes(24, 896, 14, 2, 4864, vocab_size=151936, tie_word_embeddings=True),
    ),
    'Qwen2.5 7B': Size('qwen2', '7.61B', '', CARD),
    'Qwen2.5 7B without embeddings': Size('qwen2', '6.53B', '', CARD, without=(2, 0)),
    'Qwen3.5 27B': Size(
        'qwen3_5_text',
        '27B',
        '',
        CARD,
        sizes(64, 5120, 24, 4, 17408, linear_num_value_heads=48),
    ),
    'Olmo Hybrid 7B': Size('olmo_hybrid', '7B', '', CARD),
    'OLMo 7B': Size('olmo', '7B', '', 'Groeneveld et al. 2024'),
    'SmolLM3 3B': Size('smollm3', '3B', '', CARD),
    'ERNIE-4.5-0.3B': Size('ernie4_5', '0.36B', '', CARD),
    'Ministral 8B': Size('ministral', '8,019,808,256', '', CARD),
    'Ministral 3 8B': Size('ministral3', '8.4B', '', CARD),
    'EXAONE 3.0 7.8B': Size('exaone', '7.8B', '', README),
    'EXAONE 4.0 32B': Size('exaone4', '30.95B', '', CARD, without=(2, 0)),
    'Command R': Size('cohere', '35B', '', CARD),
    'Command R7B': Size('cohere2', '7B', '', CARD, without=(1, 0)),
    'Granite 3.0 2B': Size('granite', '2.5B', '', CARD),
    'Apertus 8B': Size('apertus', '8B', '', CARD),
    'Seed-OSS 36B': Size('seed_oss', '36B', '', CARD),
    'GLM-4 9B': Size('glm', '9B', '', CARD),
    'Helium 1 2B': Size('helium', '2B', '', CARD),
    'MiniCPM3 4B': Size('minicpm3', '4B', '', README),
    'CWM': Size('cwm', '32B', '', CARD),
    'IQuest-Coder-V1 40B': Size('iquestcoder', '40B', '', README),
    'Jais 2 8B': Size('jais2', '8B', '', CARD),
    'Youtu-LLM 2B': Size('youtu', '1.96B', '', CARD),
    'nanochat d20': Size(
        'nanochat', '560,988,160', '', 'log of its speedrun', sizes(20, 1280, 10, 10, 5120)
    ),
    'nanochat d32': Size('nanochat', '1,879,048,192', '', 'log of its run'),
}

RECURRENT = {
    'Mamba 130M': Size('mamba', '0.13B', '', 'Gu & Dao 2023'),
    'Mamba 2.8B': Size(
        'mamba',
        '2.8B',
        '',
        'Gu & Dao 2023',
        {'hidden_size': 2560, 'num_hidden_layers': 64, 'time_step_rank': 160},
    ),
    'Mamba-2 130M': Size('mamba2', '0.13B', '', 'Dao & Gu 2024', mamba2(24, 768)),
    'Mamba-2 370M': Size('mamba2', '0.37B', '', 'Dao & Gu 2024', mamba2(48, 1024)),
    'Mamba-2 780M': Size('mamba2', '0.78B', '', 'Dao & Gu 2024', mamba2(48, 1536)),
    'Mamba-2 2.7B': Size('mamba2', '2.7B', '', 'Dao & Gu 2024', mamba2(64, 2560)),
    'Codestral Mamba': Size('mamba2', '7,285,403,648', '', 'mistral.ai/news/codestral-mamba'),
    'Falcon Mamba 7B': Size('falcon_mamba', '7B', '', CARD),
    'RecurrentGemma 9B': Size('recurrent_gemma', '8.58B', '', 'Botev et al. 2024, table 1'),
    'Bamba 9B': Size('bamba', '9.78B', '', README),
    'Nemotron-H 8B': Size('nemotron_h', '8B', '', 'NVIDIA 2025a'),
    'Nemotron Nano 9B v2': Size(
        'nemotron_h',
        '9B',
        '',
        'NVIDIA 2025b',
        {
            **{'hidden_size': 4480, 'intermediate_size': 15680, 'num_attention_heads': 40},
            **{'mamba_head_dim': 80, 'vocab_size': 131072},
            'hybrid_override_pattern': 'M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-',
        },
    ),
    'Falcon-H1 0.5B': Size('falcon_h1', '0.52B', '', 'Zuo et al. 2025'),
    'Falcon-H1 1.5B': Size(
        'falcon_h1',
        '1.55B',
        '',
        'Zuo et al. 2025',
        {
            **sizes(24, 2048, 8, 2, 4608, mamba_d_ssm=3072, mamba_n_heads=48, mamba_d_head=64),
            **{'vocab_size': 65537, **FALCON_H1},
        },
    ),
    'Falcon-H1 7B': Size(
        'falcon_h1',
        '7.59B',
        '',
        'Zuo et al. 2025',
        {
            **sizes(44, 3072, 12, 2, 12288, mamba_d_ssm=3072, mamba_n_heads=24, mamba_d_head=128),
            **{'vocab_size': 130048, **FALCON_H1},
        },
    ),
    'LFM2 350M': Size(
        'lfm2',
        '354,483,968',
        '',
        CARD,
        {'hidden_size': 1024, 'block_ff_dim': 6656, 'num_attention_heads': 16},
    ),
    'LFM2 700M': Size(
        'lfm2',
        '742,489,344',
        '',
        CARD,
        {'hidden_size': 1536, 'block_ff_dim': 10240, 'num_attention_heads': 24},
    ),
    'LFM2 1.2B': Size('lfm2', '1,170,340,608', '', CARD),
}
PUBLISHED = {**MIXTURES, **DENSE, **RECURRENT}
UNITS = {'T': 1e12, 'B': 1e9, 'M': 1e6}


def is_written(count: int, published: str) -> bool:
    """Whether a number, rounded or cut off, is the published one."""
    unit = UNITS.get(published[-1])
    if unit is None:
        return f'{count:,}' == published
    step = 10.0 ** -len(published[:-1].partition('.')[2])
    return -step / 2 <= count / unit - float(published[:-1]) < step


@pytest.mark.parametrize('name', PUBLISHED)
def test_released_models_have_their_numbers_of_parameters(name):
    size = PUBLISHED[name]
    fields = {**PUBLISHED_DESIGNS[size.family].config, **size.fields}
    config = architecture({'model_type': size.family, **fields})
    counts = count_parameters(build_model(config, 'meta'))
    table = config.vocab_size * config.n_embd
    total, active = (
        counts[key] - tables * table
        for key, tables in zip(('total_params', 'active_params'), size.without, strict=True)
    )
    assert not size.total or is_written(total, size.total), f'{total:,}, not {size.total}'
    assert not size.active or is_written(active, size.active), f'{active:,}, not {size.active}'


def test_published_numbers_are_rounded_or_cut_off():
    assert is_written(2_451_000_000, '2.4B') and is_written(2_351_000_000, '2.4B')
    assert not is_written(2_501_000_000, '2.4B') and not is_written(2_349_000_000, '2.4B')
    assert is_written(2_451, '2,451') and not is_written(2_452, '2,451')
