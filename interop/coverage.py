"""Families of text decoders in transformers, and of which weights can be imported and exported.

    python interop/coverage.py

prints a table of all: `yes`, what is missing, or that only a table in `interop.families` is. The
families are those of MODEL_FOR_CAUSAL_LM_MAPPING_NAMES in transformers 5.24 without encoders,
decoders that need an encoder, models of images or sound, and other names of the same model.
"""

import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.console_output import write_text
from interop.families import TRANSFORMERS

# By transformers' model_type, what is missing in this project besides a table of weights.
FAMILIES = {
    # Most used.
    'deepseek_v2': '',
    'deepseek_v3': '',
    'deepseek_v32': 'sparse attention by an indexer',
    'deepseek_v4': 'hyper-connections, compressed sparse attention, '
    'experts chosen by a hash of the token',
    'gemma': '',
    'gemma2': '',
    'gemma3_text': '',
    'gemma4_text': 'embeddings in each layer, keys and values shared by layers',
    'glm4_moe': '',
    'gpt2': '',
    'gpt_neox': '',
    'gpt_oss': '',
    'kimi_linear': '',
    'llama': '',
    'llama4_text': '',
    'minimax_m2': '',
    'mistral': '',
    'mixtral': '',
    'olmo2': '',
    'olmo3': '',
    'opt': '',
    'phi3': '',
    'qwen2': '',
    'qwen3': '',
    'qwen3_5_text': '',
    'qwen3_moe': '',
    'qwen3_next': '',
    'smollm3': '',
    # Often used.
    'afmoe': '',
    'apertus': '',
    'arcee': '',
    'bailing_hybrid': 'KDA with bounded decays of full rank, gates of latent attention',
    'bitnet': 'ternary weights, norms before output projections, a gated FFN with squared ReLU',
    'bloom': '',
    'cohere': '',
    'cohere2': '',
    'dbrx': '',
    'diffllama': 'differential attention',
    'dots1': '',
    'ernie4_5': '',
    'ernie4_5_moe': '',
    'exaone': '',
    'exaone4': '',
    'falcon': '',
    'falcon_h1': '',
    'gemma3n_text': 'AltUp, embeddings in each layer, keys and values shared by layers, '
    'sparse activations',
    'glm': '',
    'glm4': '',
    'glm4_moe_lite': '',
    'glm_moe_dsa': 'sparse attention by an indexer',
    'gpt_bigcode': '',
    'gpt_neo': '',
    'gptj': '',
    'granite': '',
    'granitemoe': '',
    'granitemoehybrid': '',
    'granitemoeshared': '',
    'helium': '',
    'hunyuan_v1_dense': '',
    'hunyuan_v1_moe': '',
    'hy_v3': '',
    'jamba': '',
    'lfm2': '',
    'lfm2_moe': '',
    'longcat_flash': 'shortcut-connected experts, experts that compute nothing',
    'mamba': '',
    'mamba2': '',
    'mimo_v2_flash': '',
    'minicpm3': '',
    'minimax': '',
    'ministral3': '',
    'mpt': '',
    'nanochat': '',
    'nemotron': '',
    'nemotron_h': '',
    'olmo': '',
    'olmo_hybrid': '',
    'olmoe': '',
    'phi': '',
    'qwen2_moe': '',
    'recurrent_gemma': '',
    'rwkv': 'RWKV',
    'seed_oss': '',
    'stablelm': '',
    'starcoder2': '',
    'zamba2': 'blocks shared by layers',
    # Others.
    'apertus1p5_text': 'attention residuals',
    'axk1': '',
    'axk2': 'sparse attention by an indexer, gated norms',
    'bamba': '',
    'biogpt': '',
    'blt': 'patches of bytes',
    'codegen': '',
    'cohere2_moe': '',
    'cpmant': 'biases by segment',
    'ctrl': '',
    'cwm': '',
    'doge': 'learned masks',
    'dots3_note': 'sparse attention by an indexer',
    'exaone_moe': '',
    'falcon_mamba': '',
    'flex_olmo': '',
    'flint': '',
    'gpt_neox_japanese': '',
    'granite_swa': '',
    'granitemoe_swa': '',
    'hrm_text': 'looped depth',
    'hy_v4': 'hyper-connections, sparse attention by an indexer',
    'hyperclovax': '',
    'inkling_text': 'content-dependent relative bias',
    'inkling2_text': 'content-dependent relative bias, attention residuals',
    'inkling2_loop_text': 'content-dependent relative bias, attention residuals, looped depth',
    'internlm3': '',
    'iquestcoder': '',
    'jais2': '',
    'jetmoe': 'mixtures of attention heads',
    'kolibri1': '',
    'laguna': '',
    'lara_mini': '',
    'lfm3': '',
    'mellum': '',
    'minimax_m3_vl_text': 'sparse attention by an indexer',
    'ministral': '',
    'modernbert-decoder': 'a hidden layer before the output head, '
    'a first layer without a norm of attention',
    'openai-gpt': '',
    'persimmon': '',
    'phimoe': 'SparseMixer routing',
    'qwen4_exp_text': 'hyper-connections, sparse attention by an indexer, a memory of n-grams',
    'sarvam_mla': '',
    'sarvam_moe': '',
    'solar_open': '',
    'vaultgemma': '',
    'xglm': '',
    'xlstm': 'xLSTM',
    'youtu': '',
    'zamba': 'blocks shared by layers',
    'zaya': 'compressed convolutional attention, learned scales of the stream, '
    'a router with hidden layers',
}


def status(name: str) -> str:
    """Whether weights of a family can be imported and exported, or what is missing."""
    if name not in TRANSFORMERS:
        return FAMILIES[name] or 'a table of weights'
    original = TRANSFORMERS[name].alias_of
    return f'yes, an alias of {original}' if original else 'yes'


def count() -> str:
    """How many families are supported. Families that differ in names only are counted apart."""
    supported = [TRANSFORMERS[name] for name in FAMILIES if name in TRANSFORMERS]
    aliases = sum(bool(family.alias_of) for family in supported)
    return f'{len(supported)} of {len(FAMILIES)} families, of which {aliases} are aliases'


def main() -> None:
    for name in sorted(FAMILIES):
        write_text(f'{name:22}{status(name)}')
    write_text(count())


if __name__ == '__main__':
    main()
