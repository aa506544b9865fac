"""Multi-head latent attention."""

from typing import ClassVar

import torch
import torch.nn as nn

from common.registry import Option, at_least
from components.attention import Attention, uneven_heads
from components.positions import Positions
from model_config import ATTENTION_REGISTRY, NORM_REGISTRY, ModelArchitectureConfig


@ATTENTION_REGISTRY.register('mla', source='DeepSeek-AI 2024 (DeepSeek-V2), as in V3')
class LatentAttention(Attention):
    """Keys and values of all heads from one narrow latent; positions turn columns beside it.

    A key is the head's own `qk_nope_head_dim` columns, made of the latent, and the
    `qk_rope_head_dim` columns that all heads share. The latents pass the chosen normalization. As
    DeepSeek has it, what widens a latent has no bias. Of a token, generation keeps its latent and
    the shared columns: for all heads together, `kv_lora_rank + qk_rope_head_dim` numbers.
    """

    tag = ''  # `head_tags` say it
    cacheable = True
    options: ClassVar = {
        'q_lora_rank': Option(
            int | None, None, 'Width of the latent of queries; None: no latent', check=at_least(1)
        ),
        'kv_lora_rank': Option(
            int | None,
            None,
            'Width of the latent of keys and values; None: 4 x qk_nope_head_dim',
            check=at_least(1),
        ),
        'qk_nope_head_dim': Option(
            int | None,
            None,
            'Columns of a query or key without position; None: n_embd / n_head',
            check=at_least(1),
        ),
        'qk_rope_head_dim': Option(
            int | None,
            None,
            'Columns of a query or key with position, one key for all heads; None: half of the '
            'columns without, rounded up to an even number',
            check=at_least(1),
        ),
        'v_head_dim': Option(
            int | None, None, 'Columns of a value; None: qk_nope_head_dim', check=at_least(1)
        ),
        **Attention.options,
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        norm, width, bias = (
            NORM_REGISTRY[config.normalization],
            config.n_embd,
            config.attention_bias,
        )
        heads, q_rank = config.n_head, config.q_lora_rank
        self.split_query = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        self.split_latent = (config.kv_lora_rank, config.qk_rope_head_dim)
        self.split_key_value = (config.qk_nope_head_dim, config.v_head_dim)
        if q_rank is None:
            self.q_down, self.q_norm = nn.Identity(), nn.Identity()
        else:
            self.q_down, self.q_norm = nn.Linear(width, q_rank, bias=bias), norm(config, q_rank)
        self.q = nn.Linear(q_rank or width, heads * sum(self.split_query), bias=False)
        self.kv_down = nn.Linear(width, sum(self.split_latent), bias=bias)
        self.kv_norm = norm(config, config.kv_lora_rank)
        self.kv = nn.Linear(config.kv_lora_rank, heads * sum(self.split_key_value), bias=False)

    @classmethod
    def _sizes(cls, config) -> dict[str, int]:
        """The head sizes, derived where they are open (DeepSeek-V2, section 2.1.4)."""
        own = config.qk_nope_head_dim or max(1, config.n_embd // config.n_head)
        return {
            'qk_nope_head_dim': own,
            'qk_rope_head_dim': config.qk_rope_head_dim or 2 * -(-own // 4),
            'v_head_dim': config.v_head_dim or own,
            'kv_lora_rank': config.kv_lora_rank or 4 * own,
        }

    @classmethod
    def head_dims(cls, config) -> tuple[int, int]:
        sizes = cls._sizes(config)
        return sizes['qk_nope_head_dim'] + sizes['qk_rope_head_dim'], sizes['v_head_dim']

    @classmethod
    def rotary_dim(cls, config: ModelArchitectureConfig) -> int:
        return config.qk_rope_head_dim

    @classmethod
    def derived_values(cls, config) -> dict[str, tuple]:
        why = {
            'qk_nope_head_dim': 'n_embd / n_head',
            'qk_rope_head_dim': 'half of qk_nope_head_dim',
            'v_head_dim': 'qk_nope_head_dim',
            'kv_lora_rank': '4 x qk_nope_head_dim',
        }
        derived = {key: (size, why[key]) for key, size in cls._sizes(config).items()}
        return {**derived, **super().derived_values(config)}

    @classmethod
    def head_tags(cls, config: ModelArchitectureConfig) -> list[str]:
        rank = '' if config.q_lora_rank is None else f'q{config.q_lora_rank}'
        sizes = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        return [f'MLA{config.kv_lora_rank}{rank}', 'x'.join(map(str, sizes))]

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        return uneven_heads(config, 'qk_nope_head_dim')

    def forward(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        q = self.in_heads(self.q(self.q_norm(self.q_down(x)).to(x.dtype)))
        latent, k_turned = self.kv_down(x).split(self.split_latent, dim=-1)
        latent = self.kv_norm(latent).to(latent.dtype)
        q_own, q_turned = q.split(self.split_query, dim=-1)
        q_turned = self.rotate(q_turned, positions.rotation).to(latent.dtype)
        k_turned = self.rotate(k_turned[:, None], positions.rotation)  # (B, 1, T, columns)
        k_turned = k_turned.to(latent.dtype)
        if positions.cache is not None:
            goes_on = positions.cache.length > 0
            (kept,) = positions.cache.extend(torch.cat((latent[:, None], k_turned), dim=-1))
            if goes_on:
                return self.widened(self.found_in_latents(q_own, q_turned, kept, positions))
        k_own, v = self.in_heads(self.kv(latent)).split(self.split_key_value, dim=-1)
        q = torch.cat((q_own, q_turned), dim=-1)
        k = torch.cat((k_own, k_turned.expand(-1, self.num_heads, -1, -1)), dim=-1)
        return self.widened(self.found(q, k, v, positions))

    def found_in_latents(
        self, q_own: torch.Tensor, q_turned: torch.Tensor, kept: torch.Tensor, positions: Positions
    ) -> torch.Tensor:
        """What the heads find, (B, H, T, Dv), in kept tokens (B, 1, K, rank + turned columns).

        No latent is widened: since a key is W · latent, q · key is (Wᵀ · q) · latent, and the mean
        of values is the mean of latents, widened (DeepSeek-V2, section 2.1.2).
        """
        weight = self.kv.weight.unflatten(0, (self.num_heads, -1))  # (H, columns, rank)
        to_key, to_value = weight.split(self.split_key_value, dim=1)
        q = torch.cat((q_own @ to_key, q_turned), dim=-1)
        means = self.found(q, kept, kept, positions)[..., : self.split_latent[0]]
        return means @ to_value.mT

    def in_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads' columns) -> (B, H, T, columns)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def matrices(self) -> dict[nn.Parameter, tuple[int, ...]]:
        return {**super().matrices(), self.kv_down.weight: self.split_latent}
