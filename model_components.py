"""All components of a model and their registries: one import to write one of your own.

    from model_components import ACTIVATION_REGISTRY, Activation, Initial, Option

    @ACTIVATION_REGISTRY.register('star_relu', source='Yu et al. 2022')
    class StarReLU(Activation):
        options = {'star_scale': Option(float, 0.8944, 'Initial scale of StarReLU')}

        def __init__(self, config):
            super().__init__(config)
            self.initial_scale = config.star_scale
            self.scale = nn.Parameter(torch.empty(1))

        def initial_values(self):
            return {'scale': Initial.constant(self.initial_scale)}

        def forward(self, x):
            return self.scale * x.relu().square()

A component defines everything specific to it: its description (the beginning of its docstring), its
options, its part of the name, what it cannot be combined with, its FLOPs and the initial values of
its parameters. `Component` describes the methods. Letters of shapes: B batch, T time, C width
(`n_embd`), H heads, D head dimension.

The package `components` has a module for each kind. Importing this module fills the registries.
Optimizers and learning-rate schedules are written with `from optim import …`.
"""

from common.conditions import Naming
from common.old_names import renamed_classes
from common.registry import AnyBut, Option, above, at_least, between, fraction
from components.activations import Activation
from components.attention import Attention, MultiHeadAttention
from components.attention_backends import (
    AttentionBackend,
    AttentionSpec,
    additive_mask,
    repeat_kv,
)
from components.attention_inputs import AttentionInputs, SharedInputs
from components.base import AuxOutput, Component, Initial, matmul_dtype, module_flops
from components.blocks import Block
from components.delta_net import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from components.document_mask import DOCUMENT_OPTIONS, Documents, locate_documents
from components.embedding import TokenEmbedding
from components.feed_forward import FeedForward, GatedFeedForward
from components.gated_norm import GatedRMSNorm
from components.gated_short_convolution import GatedShortConvolution
from components.initialization import Initialization
from components.kv_cache import Cache, LayerCache, MixerState
from components.latent_attention import LatentAttention
from components.linear_attention import LinearAttention
from components.lm_head import IGNORED, OutputHead
from components.long_rope import LongRopeScaling
from components.mamba import Mamba
from components.mamba2 import Mamba2
from components.mixers import Mixer
from components.moe import MixtureOfExperts
from components.norms import ElementwiseAffine, Norm
from components.positions import PositionEncoding, RotaryScaling
from components.residual_stream import Residual
from components.rg_lru import RGLRU
from components.score_biases import ALiBi
from components.short_convolution import ShortConvolution
from model_config import (
    ACTIVATION_REGISTRY,
    ATTENTION_BACKEND_REGISTRY,
    ATTENTION_REGISTRY,
    FFN_REGISTRY,
    INITIALIZATION_REGISTRY,
    MIXER_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    RESIDUAL_REGISTRY,
    ROPE_SCALING_REGISTRY,
    ModelArchitectureConfig,
)

__all__ = [
    'ACTIVATION_REGISTRY',
    'ATTENTION_BACKEND_REGISTRY',
    'ATTENTION_REGISTRY',
    'DOCUMENT_OPTIONS',
    'FFN_REGISTRY',
    'IGNORED',
    'INITIALIZATION_REGISTRY',
    'MIXER_REGISTRY',
    'NORM_POSITION_REGISTRY',
    'NORM_REGISTRY',
    'POSITION_ENCODING_REGISTRY',
    'RESIDUAL_REGISTRY',
    'RGLRU',
    'ROPE_SCALING_REGISTRY',
    'ALiBi',
    'Activation',
    'AnyBut',
    'Attention',
    'AttentionBackend',
    'AttentionInputs',
    'AttentionSpec',
    'AuxOutput',
    'Block',
    'Cache',
    'Component',
    'DeltaNet',
    'Documents',
    'ElementwiseAffine',
    'FeedForward',
    'GatedDeltaNet',
    'GatedFeedForward',
    'GatedRMSNorm',
    'GatedShortConvolution',
    'Initial',
    'Initialization',
    'KimiDeltaAttention',
    'LatentAttention',
    'LayerCache',
    'LinearAttention',
    'LongRopeScaling',
    'Mamba',
    'Mamba2',
    'Mixer',
    'MixerState',
    'MixtureOfExperts',
    'ModelArchitectureConfig',
    'MultiHeadAttention',
    'Naming',
    'Norm',
    'Option',
    'OutputHead',
    'PositionEncoding',
    'Residual',
    'RotaryScaling',
    'SharedInputs',
    'ShortConvolution',
    'TokenEmbedding',
    'above',
    'additive_mask',
    'at_least',
    'between',
    'fraction',
    'locate_documents',
    'matmul_dtype',
    'module_flops',
    'repeat_kv',
]

__getattr__ = renamed_classes(
    __name__,
    {
        'AttentionNeeds': 'AttentionSpec',
        'Auxiliary': 'AuxOutput',
        'Positions': 'AttentionInputs',
        'documents_of': 'locate_documents',
    },
)
