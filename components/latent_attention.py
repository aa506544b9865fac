"""Multi-head latent attention."""

from typing import ClassVar

import torch
import torch.nn as nn

from common.registry import FrozenConfig, Option, above, at_least
from components.attention import Attention, uneven_heads
from components.attention_inputs import AttentionInputs
from model_config import ATTENTION_REGISTRY, NORM_REGISTRY, ModelArchitectureConfig


@ATTENTION_REGISTRY.register('mla', source='DeepSeek-AI 2024 (DeepSeek-V2), as in V3')
class LatentAttention(Attention):
    """Multi-head latent attention: keys and values of all heads from one low-rank latent.

    A key consists of `qk_nope_head_dim` dimensions per head, projected from the latent, and
    `qk_rope_head_dim` dimensions with positions, shared by all heads. The latents are normalized by
    the chosen normalization. As in DeepSeek-V2, up-projections have no bias. The KV cache holds the
    latent and the shared dimensions: `kv_lora_rank + qk_rope_head_dim` numbers per token.
    """

    tag = ''  # part of `head_tags`
    renamed_methods: ClassVar = {
        **Attention.renamed_methods,
        'found_in_latents': 'attend_absorbed',
    }
    cacheable = True
    options: ClassVar = {
        'q_lora_rank': Option(
            int | None, None, 'Rank of the query latent; None: no latent', check=at_least(1)
        ),
        'kv_lora_rank': Option(
            int | None,
            None,
            'Rank of the key/value latent; None: 4 · qk_nope_head_dim',
            check=at_least(1),
        ),
        'qk_nope_head_dim': Option(
            int | None,
            None,
            'Dimensions of a query or key head without positions; None: n_embd / n_head',
            check=at_least(1),
        ),
        'qk_rope_head_dim': Option(
            int | None,
            None,
            'Dimensions of a query or key head with positions, in keys shared by all heads; None: '
            'half of qk_nope_head_dim, rounded up to an even number',
            check=at_least(1),
        ),
        'v_head_dim': Option(
            int | None,
            None,
            'Dimensions of a value head; None: qk_nope_head_dim',
            check=at_least(1),
        ),
        'latent_norm_eps': Option(
            float | None,
            None,
            'Epsilon of the norms of latents (1e-6 in DeepSeek and Kimi); None: norm_eps',
            check=above(0),
        ),
        **Attention.options,
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        width, bias = config.n_embd, config.attention_bias
        heads, q_rank = config.n_head, config.q_lora_rank
        self.split_query = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        self.split_latent = (config.kv_lora_rank, config.qk_rope_head_dim)
        self.split_key_value = (config.qk_nope_head_dim, config.v_head_dim)
        if q_rank is None:
            self.q_down, self.q_norm = nn.Identity(), nn.Identity()
        else:
            self.q_down, self.q_norm = (
                nn.Linear(width, q_rank, bias=bias),
                latent_norm(config, q_rank),
            )
        self.q = nn.Linear(q_rank or width, heads * sum(self.split_query), bias=False)
        self.kv_down = nn.Linear(width, sum(self.split_latent), bias=bias)
        self.kv_norm = latent_norm(config, config.kv_lora_rank)
        self.kv = nn.Linear(config.kv_lora_rank, heads * sum(self.split_key_value), bias=False)

    @classmethod
    def _head_sizes(cls, config: FrozenConfig) -> dict[str, int]:
        """The head sizes; those that are not set are derived (DeepSeek-V2, section 2.1.4)."""
        nope = config.qk_nope_head_dim or max(1, config.n_embd // config.n_head)
        return {
            'qk_nope_head_dim': nope,
            'qk_rope_head_dim': config.qk_rope_head_dim or 2 * -(-nope // 4),
            'v_head_dim': config.v_head_dim or nope,
            'kv_lora_rank': config.kv_lora_rank or 4 * nope,
        }

    @classmethod
    def head_dims(cls, config: FrozenConfig) -> tuple[int, int]:
        sizes = cls._head_sizes(config)
        return sizes['qk_nope_head_dim'] + sizes['qk_rope_head_dim'], sizes['v_head_dim']

    @classmethod
    def rotary_dim(cls, config: ModelArchitectureConfig) -> int:
        return config.qk_rope_head_dim

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        why = {
            'qk_nope_head_dim': 'n_embd / n_head',
            'qk_rope_head_dim': 'half of qk_nope_head_dim',
            'v_head_dim': 'qk_nope_head_dim',
            'kv_lora_rank': '4 x qk_nope_head_dim',
        }
        derived = {key: (size, why[key]) for key, size in cls._head_sizes(config).items()}
        return {**derived, **super().derived_values(config)}

    @classmethod
    def head_tags(cls, config: ModelArchitectureConfig) -> list[str]:
        rank = '' if config.q_lora_rank is None else f'q{config.q_lora_rank}'
        sizes = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        return [f'MLA{config.kv_lora_rank}{rank}', 'x'.join(map(str, sizes))]

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        problems = uneven_heads(config, 'qk_nope_head_dim')
        if config.latent_norm_eps is not None and 'norm_eps' not in config:
            problems.append(
                f'latent_norm_eps={config.latent_norm_eps} has no effect: normalization='
                f'{config.normalization!r} has no epsilon. Remove latent_norm_eps.'
            )
        return problems

    def forward(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        # Queries, latents, and the key dimensions that all heads share.
        q = self.split_heads(self.q(self.q_norm(self.q_down(x)).to(x.dtype)))
        latent, k_rope = self.kv_down(x).split(self.split_latent, dim=-1)
        latent = self.kv_norm(latent).to(latent.dtype)

        # Positions rotate only the `rope` dimensions.
        q_nope, q_rope = q.split(self.split_query, dim=-1)
        q_rope = self.rotate(q_rope, attn_inputs.rotation).to(latent.dtype)
        k_rope = self.rotate(k_rope[:, None], attn_inputs.rotation)  # (B, 1, T, rope dims)
        k_rope = k_rope.to(latent.dtype)

        # Generation: if there are earlier tokens, attend to the latents themselves.
        if attn_inputs.cache is not None:
            continues = attn_inputs.cache.length > 0
            (cached,) = attn_inputs.cache.extend(torch.cat((latent[:, None], k_rope), dim=-1))
            if continues:
                y = self.attend_absorbed(q_nope, q_rope, cached, attn_inputs)
                return self.project_output(y)

        # Training: keys and values of each head, from the latent.
        k_nope, v = self.split_heads(self.kv(latent)).split(self.split_key_value, dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, self.num_heads, -1, -1)), dim=-1)
        return self.project_output(self.attend_heads(q, k, v, attn_inputs))

    def attend_absorbed(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        cached: torch.Tensor,
        attn_inputs: AttentionInputs,
    ) -> torch.Tensor:
        """The heads' outputs, (B, H, T, Dv), from cached tokens (B, 1, K, rank + rope dims).

        The up-projections are absorbed (DeepSeek-V2, section 2.1.2): with key = W · latent,
        q · key = (Wᵀ · q) · latent, and the mean of values is projected from the mean of latents.
        """
        weight = self.kv.weight.unflatten(0, (self.num_heads, -1))  # (H, dims, rank)
        to_key, to_value = weight.split(self.split_key_value, dim=1)
        q = torch.cat((q_nope @ to_key, q_rope), dim=-1)
        means = self.attend_heads(q, cached, cached, attn_inputs)[..., : self.split_latent[0]]
        return means @ to_value.mT

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, dimensions of all heads) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        return {**super().matrices(), self.kv_down.weight: self.split_latent}


def latent_norm(config: ModelArchitectureConfig, rank: int) -> nn.Module:
    """The norm of a latent."""
    norm = NORM_REGISTRY[config.normalization](config, rank)
    if config.latent_norm_eps is not None:
        norm.eps = config.latent_norm_eps
    return norm
