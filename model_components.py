"""The components that an architecture is made of, in their registries: one import to write one.

A component carries all that is special about it: its options, its part of the name, what it
cannot be combined with, its FLOPs, how its parameters begin. Adding one touches one place. See
`Component` for the contract; shapes are B batch, T time, C width (`n_embd`), H heads, D head size.
The package `components` has a module for each kind; importing this one fills the registries.
"""

from common.old_names import renamed_classes
from common.registry import AnyBut, Option, above, at_least, between, fraction
from components.activations import Activation
from components.attention import Attention, MultiHeadAttention
from components.attention_backends import AttentionBackend, AttentionSpec
from components.base import AuxOutput, Component, Initial, module_flops
from components.blocks import Block
from components.document_mask import Documents, locate_documents
from components.embedding import TokenEmbedding
from components.feed_forward import FeedForward, GatedFeedForward
from components.initialization import Initialization
from components.kv_cache import Cache, LayerCache
from components.latent_attention import LatentAttention
from components.lm_head import IGNORED, OutputHead
from components.moe import MixtureOfExperts
from components.norms import Norm
from components.positions import AttentionInputs, PositionEncoding, RotaryScaling
from model_config import (
    ACTIVATION_REGISTRY,
    ATTENTION_BACKEND_REGISTRY,
    ATTENTION_REGISTRY,
    FFN_REGISTRY,
    INITIALIZATION_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    ROPE_SCALING_REGISTRY,
    ModelArchitectureConfig,
)

__all__ = [
    'ACTIVATION_REGISTRY',
    'ATTENTION_BACKEND_REGISTRY',
    'ATTENTION_REGISTRY',
    'FFN_REGISTRY',
    'IGNORED',
    'INITIALIZATION_REGISTRY',
    'NORM_POSITION_REGISTRY',
    'NORM_REGISTRY',
    'POSITION_ENCODING_REGISTRY',
    'ROPE_SCALING_REGISTRY',
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
    'Documents',
    'FeedForward',
    'GatedFeedForward',
    'Initial',
    'Initialization',
    'LatentAttention',
    'LayerCache',
    'MixtureOfExperts',
    'ModelArchitectureConfig',
    'MultiHeadAttention',
    'Norm',
    'Option',
    'OutputHead',
    'PositionEncoding',
    'RotaryScaling',
    'TokenEmbedding',
    'above',
    'at_least',
    'between',
    'fraction',
    'locate_documents',
    'module_flops',
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
