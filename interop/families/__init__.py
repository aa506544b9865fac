"""Tables of other programs' formats: the fields of a config and the tensors of a checkpoint.

A `Family` is one of their architectures. Its field maps relate fields of their config to our
options, and its tensor maps relate their tensors to our parameters, both ways: `interop` imports
and exports by the same tables. `{layer}` in a name is the number of the layer.
"""

from interop.families.afmoe import AFMOE
from interop.families.alibi import BLOOM, FALCON
from interop.families.axk1 import AXK1
from interop.families.biased_mixtures import (
    ERNIE4_5_MOE,
    EXAONE_MOE,
    HY_V3,
    QWEN2_MOE,
)
from interop.families.cohere import COHERE, COHERE2, MINICPM3
from interop.families.cohere2_moe import COHERE2_MOE
from interop.families.dbrx import DBRX
from interop.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, YOUTU
from interop.families.falcon_h1 import FALCON_H1
from interop.families.gated_deltanet import OLMO_HYBRID, QWEN3_5
from interop.families.gemma import GEMMA, GEMMA2, GEMMA3, VAULTGEMMA
from interop.families.glm_moe import DOTS1, GLM4_MOE, GLM4_MOE_LITE, MINIMAX_M2, SOLAR_OPEN
from interop.families.gpt2 import GPT2, NANOGPT
from interop.families.gpt2_relatives import BIOGPT, GPT_BIGCODE, MPT, OPENAI_GPT
from interop.families.gpt_neo import GPT_NEO
from interop.families.gpt_neox import GPT_NEOX, GPT_NEOX_JAPANESE
from interop.families.gpt_oss import GPT_OSS
from interop.families.gptj import CODEGEN, GPTJ, PHI
from interop.families.granite import (
    GRANITE,
    GRANITE4,
    GRANITE_MOE,
    GRANITE_MOE_SHARED,
    HYPERCLOVAX,
)
from interop.families.granite_swa import GRANITE_MOE_SWA, GRANITE_SWA
from interop.families.hunyuan import HUNYUAN_DENSE, HUNYUAN_MOE
from interop.families.kimi_linear import KIMI_LINEAR
from interop.families.lara_mini import LARA_MINI
from interop.families.layernorm_rope import JAIS2, NEMOTRON, PERSIMMON, STARCODER2
from interop.families.lfm2 import LFM2, LFM2_MOE
from interop.families.lfm3 import LFM3
from interop.families.llama import LLAMA, MISTRAL, MIXTRAL, OLMO2, QWEN3
from interop.families.llama4 import LLAMA4
from interop.families.llama_aliases import EXAONE, INTERNLM3, IQUESTCODER
from interop.families.llama_relatives import ARCEE, CWM, ERNIE4_5, HELIUM, MINISTRAL
from interop.families.mamba import FALCON_MAMBA, JAMBA, MAMBA
from interop.families.mamba2 import BAMBA, MAMBA2
from interop.families.mimo import MIMO_V2_FLASH
from interop.families.minimax import MINIMAX
from interop.families.mixed_layers import EXAONE4, MELLUM, OLMO3, SMOLLM3
from interop.families.mixtures import FLEX_OLMO, OLMOE, QWEN3_MOE
from interop.families.nemotron_h import NEMOTRON_H
from interop.families.norm_variants import NANOCHAT, OLMO, STABLELM
from interop.families.opt import OPT
from interop.families.phi3 import APERTUS, MINISTRAL3, PHI3
from interop.families.qwen2 import GLM, GLM4, QWEN2, SEED_OSS
from interop.families.qwen3_next import QWEN3_NEXT
from interop.families.recurrent_gemma import RECURRENT_GEMMA
from interop.families.sarvam import SARVAM_MLA, SARVAM_MOE
from interop.families.sinusoids import CTRL, XGLM
from interop.families.windowed_mixtures import FLINT, KOLIBRI1, LAGUNA
from interop.mapping import Family
from interop.tensors import TensorMap

# By transformers' model_type. An architecture is exported as the first that can express it.
TRANSFORMERS = {
    family.name: family
    for family in (
        GPT2,
        LLAMA,
        MISTRAL,
        QWEN3,
        OLMO2,
        GEMMA2,
        GEMMA3,
        GPT_NEOX,
        OPT,
        MIXTRAL,
        QWEN3_MOE,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GLM4_MOE,
        GLM4_MOE_LITE,
        DOTS1,
        MINIMAX_M2,
        GPT_OSS,
        QWEN2,
        QWEN2_MOE,
        ERNIE4_5_MOE,
        SOLAR_OPEN,
        HY_V3,
        EXAONE_MOE,
        AFMOE,
        SMOLLM3,
        OLMO3,
        EXAONE4,
        MELLUM,
        MAMBA2,
        BAMBA,
        NEMOTRON_H,
        MINIMAX,
        MAMBA,
        FALCON_MAMBA,
        JAMBA,
        RECURRENT_GEMMA,
        LFM2,
        LFM2_MOE,
        QWEN3_5,
        QWEN3_NEXT,
        KIMI_LINEAR,
        OLMO_HYBRID,
        SEED_OSS,
        GLM,
        GLM4,
        GPTJ,
        CODEGEN,
        PHI,
        GPT_NEO,
        GEMMA,
        OLMOE,
        STARCODER2,
        NEMOTRON,
        ERNIE4_5,
        ARCEE,
        HELIUM,
        MPT,
        GPT_BIGCODE,
        FLEX_OLMO,
        MINISTRAL,
        CWM,
        VAULTGEMMA,
        JAIS2,
        PERSIMMON,
        BIOGPT,
        OPENAI_GPT,
        YOUTU,
        EXAONE,
        INTERNLM3,
        IQUESTCODER,
        GRANITE,
        GRANITE_MOE,
        GRANITE_MOE_SHARED,
        GRANITE4,
        HYPERCLOVAX,
        FALCON_H1,
        OLMO,
        NANOCHAT,
        HUNYUAN_DENSE,
        HUNYUAN_MOE,
        STABLELM,
        BLOOM,
        FALCON,
        COHERE,
        COHERE2,
        MINICPM3,
        PHI3,
        MINISTRAL3,
        APERTUS,
        DBRX,
        SARVAM_MOE,
        SARVAM_MLA,
        LLAMA4,
        MIMO_V2_FLASH,
        GRANITE_SWA,
        GRANITE_MOE_SWA,
        FLINT,
        KOLIBRI1,
        LAGUNA,
        LARA_MINI,
        GPT_NEOX_JAPANESE,
        LFM3,
        CTRL,
        XGLM,
        AXK1,
        COHERE2_MOE,
    )
}

__all__ = ['NANOGPT', 'TRANSFORMERS', 'Family', 'TensorMap']
