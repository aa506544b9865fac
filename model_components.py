"""The components that an architecture is made of, in their registries.

A component carries all that is special about it: its options, its part of the name, what it
cannot be combined with, its FLOPs, how its parameters begin. Adding one touches one place. See
`Component` for the contract; shapes are B batch, T time, C width (`n_embd`), H heads, D head size.
The package `components` has a module for each kind; importing this one fills the registries.
"""

from components.activations import Activation
from components.attention import Attention, MultiHeadAttention
from components.attention_backends import AttentionBackend, AttentionNeeds
from components.base import Auxiliary, Component, Initial, module_flops
from components.blocks import Block
from components.document_mask import Documents, documents_of
from components.ends import IGNORED, OutputHead, TokenEmbedding
from components.feed_forward import FeedForward
from components.initialization import Initialization
from components.kv_cache import Cache, LayerCache
from components.latent_attention import LatentAttention
from components.moe import MixtureOfExperts
from components.norms import Norm
from components.positions import PositionEncoding, Positions

__all__ = [
    'IGNORED',
    'Activation',
    'Attention',
    'AttentionBackend',
    'AttentionNeeds',
    'Auxiliary',
    'Block',
    'Cache',
    'Component',
    'Documents',
    'FeedForward',
    'Initial',
    'Initialization',
    'LatentAttention',
    'LayerCache',
    'MixtureOfExperts',
    'MultiHeadAttention',
    'Norm',
    'OutputHead',
    'PositionEncoding',
    'Positions',
    'TokenEmbedding',
    'documents_of',
    'module_flops',
]
