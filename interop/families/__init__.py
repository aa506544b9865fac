"""Other people's formats as tables: the fields of a config and the tensors of a checkpoint.

A `Family` holds one architecture of theirs. Each of its entries says the same in their fields and
in our options, both ways, and each of its weights says which of their tensors a parameter of ours
is made of, both ways: `interop` imports and exports by the same tables. `{layer}` in a name stands
for the number of the layer.
"""

from interop.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from interop.families.gemma2 import GEMMA2
from interop.families.gpt2 import GPT2, NANOGPT
from interop.families.gpt_neox import GPT_NEOX
from interop.families.llama import LLAMA, MISTRAL, MIXTRAL, OLMO2, QWEN3
from interop.families.opt import OPT
from interop.mapping import Family, function_of
from interop.tensors import Weight

# By transformers' model_type; the first that can express an architecture is what it is exported as.
TRANSFORMERS = {
    family.name: family
    for family in (
        GPT2,
        LLAMA,
        MISTRAL,
        QWEN3,
        OLMO2,
        GEMMA2,
        GPT_NEOX,
        OPT,
        MIXTRAL,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
    )
}

__all__ = ['NANOGPT', 'TRANSFORMERS', 'Family', 'Weight', 'function_of']
