"""Attention modules."""

import math
from typing import ClassVar

import torch
import torch.nn as nn

from common.old_names import renamed_attribute
from common.registry import AnyBut, FrozenConfig, Option, above, at_least, between
from components.attention_backends import AttentionSpec
from components.attention_inputs import AttentionInputs
from components.base import Component, Fill, Initial
from components.canon import canon_layer
from components.document_mask import DOCUMENT_OPTIONS
from components.kv_cache import LayerCache
from components.output_gate import OUTPUT_GATE_OPTIONS, gate_function, output_gate_tag
from components.qk_norm import QK_NORM_OPTIONS, qk_norm_problems, qk_norm_tag, qk_norms
from components.query_scale import QUERY_SCALE_OPTIONS, query_scale, query_scale_tag
from model_config import (
    ATTENTION_BACKEND_REGISTRY,
    ATTENTION_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    ModelArchitectureConfig,
)

VALUE_RESIDUAL_TAGS = {'fixed': 'VRes', 'learned': 'VResL'}


def is_pattern(value: str) -> bool:
    return 'L' in value and set(value) <= {'L', 'G'}


class Attention(Component, nn.Module):
    """Causal attention with `n_head` heads; a subclass computes queries, keys and values.

    A subclass defines `forward` and `head_dims`. If its `forward` uses `attn_inputs.cache`, as
    `attend_and_project` does, it sets `cacheable = True`.
    """

    renamed_methods: ClassVar = {
        'needs': 'layer_spec',
        'join': 'attend_and_project',
        'found': 'attend_heads',
        'widened': 'project_output',
    }
    layer_needs = renamed_attribute('layer_needs', 'spec')
    cacheable = False
    part = 'attention'
    flops_part = 'attention_projections'
    options: ClassVar = {
        'attention_bias': Option(bool | None, None, 'Use biases in the attention; None: bias'),
        'attention_output_bias': Option(
            bool | None,
            None,
            'Use a bias in the output projection of attention; None: attention_bias',
        ),
        'attention_scale': Option(
            float | None,
            None,
            'Scale of the attention scores; None: 1 / √(dimensions of a query head)',
            check=above(0),
        ),
        'attention_softcap': Option(
            float | None,
            None,
            'Soft cap c of the attention scores: c · tanh(scores / c); None: off',
            check=above(0),
        ),
        'sliding_window': Option(
            int | None,
            None,
            'Attention window in tokens, the own token included; None: no window',
            check=at_least(1),
        ),
        'attention_pattern': Option(
            str,
            'L',
            'Pattern of layers, repeated: L (local) with the window, G (global) without',
            check=(
                is_pattern,
                "letters L (local) and G (global), with at least one L, such as 'LLLG'",
            ),
            requires=('sliding_window', AnyBut(None)),
            scope='pattern',
        ),
        'attention_chunk': Option(
            int | None,
            None,
            'Tokens of a chunk, to which the attention of its tokens is limited (Llama 4); chunks '
            'are counted from the beginning of the text, or of its document; None: no chunks',
            check=at_least(1),
            requires=('sliding_window', None),
        ),
        'attention_sinks': Option(
            bool,
            False,
            'Add a learned logit to the softmax of each head, without a value, so that a head can '
            'attend to nothing (gpt-oss)',
        ),
        **DOCUMENT_OPTIONS,
    }

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if 'forward' in vars(cls) and 'cacheable' not in vars(cls):
            cls.cacheable = False  # not inherited: the base class's value describes another forward

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__()
        self.num_heads, self.spec = config.n_head, self.layer_spec(config, layer)
        self.qk_head_dim, self.v_head_dim = self.head_dims(config)
        self.attend = ATTENTION_BACKEND_REGISTRY[config.attention_backend].attend
        self.rotate = POSITION_ENCODING_REGISTRY[config.position_encoding].rotate
        self.sinks = nn.Parameter(torch.empty(config.n_head)) if self.spec.sinks else None
        bias = config.get('attention_output_bias')  # None: not an option of the class
        bias = config.attention_bias if bias is None else bias
        self.output = nn.Linear(self.num_heads * self.v_head_dim, config.n_embd, bias=bias)

    @classmethod
    def head_dims(cls, config: FrozenConfig) -> tuple[int, int]:
        """Dimensions of a head of queries and keys, and of values."""
        raise NotImplementedError

    @classmethod
    def rotary_dim(cls, config: ModelArchitectureConfig) -> int:
        """Dimensions of a query or key head that a position encoding may rotate."""
        return cls.head_dims(config)[0]

    @classmethod
    def layer_spec(cls, config: ModelArchitectureConfig, layer: int) -> AttentionSpec:
        """The layer's attention scores, described for a backend."""
        chunk = config.get('attention_chunk')
        return AttentionSpec(
            scale=config.attention_scale,
            bias=POSITION_ENCODING_REGISTRY[config.position_encoding].has_bias,
            dropout=config.attention_dropout,
            softcap=config.attention_softcap,
            window=config.sliding_window,
            documents=config.document_mask or chunk is not None,
            sinks=bool(config.get('attention_sinks')),
            chunk=chunk,
        )

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        scale = cls.head_dims(config)[0] ** -0.5
        bias = config.bias if config.attention_bias is None else config.attention_bias
        return {
            'attention_bias': (config.bias, 'bias'),
            'attention_output_bias': (bias, 'attention_bias'),
            'attention_scale': (scale, '1 / sqrt(dimensions of a query head)'),
        }

    @classmethod
    def layer_overrides(cls, config: FrozenConfig, layer: int) -> tuple[str, dict]:
        pattern = config.get('attention_pattern') or 'L'
        if 'G' not in pattern:
            return '', {}
        letter = pattern[layer % len(pattern)]
        return letter, {} if letter == 'L' else {'sliding_window': None}

    @classmethod
    def name_tag(cls, config: ModelArchitectureConfig) -> str:
        tags = [cls.tag] if cls.tag else []
        tags += cls.head_tags(config)
        if config.get('attention_output_bias') not in (None, config.attention_bias):
            tags.append('OBias' if config.attention_output_bias else 'QKVBias')
        if config.attention_scale != cls.head_dims(config)[0] ** -0.5:
            tags.append(f'Scale{config.attention_scale:g}')
        if config.attention_softcap is not None:
            tags.append(f'Cap{config.attention_softcap:g}')
        if config.sliding_window is not None:
            tags.append(f'SW{config.sliding_window}')
            tags += [config.attention_pattern] if 'G' in config.attention_pattern else []
        if config.get('attention_chunk') is not None:
            tags.append(f'Chunk{config.attention_chunk}')
        if config.document_mask:
            tags.append('DocMask')
        if config.get('attention_sinks'):
            tags.append('Sinks')
        return '-'.join(tags)

    @classmethod
    def head_tags(cls, config: ModelArchitectureConfig) -> list[str]:
        """Tags of the heads in the architecture's name."""
        return []

    def empty_cache(self, tokens: int) -> LayerCache:
        """A cache for `tokens` tokens, or for those that a query sees if they are fewer."""
        return LayerCache(min(self.spec.reach or tokens, tokens))

    def attend_and_project(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_inputs: AttentionInputs
    ) -> torch.Tensor:
        """q (B, H, T, D), k (B, KV heads, T, D), v (B, KV heads, T, Dv) -> (B, T, C)."""
        return self.project_output(self.attend_with_cache(q, k, v, attn_inputs))

    def attend_with_cache(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_inputs: AttentionInputs
    ) -> torch.Tensor:
        """`attend_heads` to the cached tokens too, if there is a cache."""
        if attn_inputs.cache is not None:
            k, v = attn_inputs.cache.extend(k, v)
        return self.attend_heads(q, k, v, attn_inputs)

    def attend_heads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_inputs: AttentionInputs
    ) -> torch.Tensor:
        """q (B, H, T, D), k (B, KV heads, K, D), v (B, KV heads, K, Dv) -> (B, H, T, Dv)."""
        dropout = self.spec.dropout if self.training else 0.0
        sinks = () if self.sinks is None else (self.sinks,)
        return self.attend(q, k, v, attn_inputs.mask, self.spec, dropout, *sinks)

    def project_output(self, y: torch.Tensor) -> torch.Tensor:
        """Output projection of the heads' outputs, (B, H, T, Dv) -> (B, T, C)."""
        return self.output(y.transpose(1, 2).flatten(2))

    def flops(self, seq_len: int, causal: bool) -> dict[str, float]:
        """FLOPs of the projections, and of the scores: 2 · (D + Dv) per head and query-key pair.

        The full square has T² pairs, whatever the window, as a dense product computes them. Causal
        counts the visible pairs: T² / 2; w · T - w² / 2 with a window of w < T tokens (where the
        pairs on the diagonal count half); c² / 2 for each chunk of c tokens, of which the last may
        be shorter.
        """
        reach = min(self.spec.reach or seq_len, seq_len)
        pairs = reach * seq_len - reach**2 / 2 if causal else seq_len**2
        if causal and self.spec.chunk is not None:
            pairs = (seq_len // reach * reach**2 + (seq_len % reach) ** 2) / 2
        scores = 2.0 * self.num_heads * (self.qk_head_dim + self.v_head_dim) * pairs
        return {**super().flops(seq_len, causal), 'attention_scores': scores}

    def initial_values(self) -> dict[str, Fill]:
        return {} if self.sinks is None else {'sinks': Initial.zeros}

    def residual_weights(self) -> list[torch.Tensor]:
        return [self.output.weight]


ATTENTION_REGISTRY.expect(
    Attention,
    constructed_with=('config', 'layer'),
    head_dims=('config',),
    forward=('x', 'attn_inputs'),
)


@ATTENTION_REGISTRY.register('standard', source='Vaswani et al. 2017; grouped: Ainslie et al. 2023')
class MultiHeadAttention(Attention):
    """Multi-head attention; with `use_gqa`, the heads share `num_kv_heads` keys and values.

    With `attention_gate`, the heads' outputs are multiplied by sigmoid(x W), or another function,
    before the output projection, where x is the attention's input (Qiu et al. 2025, section 2.2;
    Qwen3-Next). W is the last rows of `qkv`.

    With `value_residual`, the values are λ₁ · those of the model's first layer with attention +
    λ₂ · the layer's own (Zhou et al. 2024, equation 6), which the KV cache keeps. The λ are fixed
    numbers that add up to 1, or learned without constraint in each layer but the first.
    """

    tag = ''
    cacheable = True
    mup_rule = True
    canon_letters = 'B'
    options: ClassVar = {
        'head_dim': Option(
            int | None, None, 'Head dimension; None: n_embd / n_head', check=at_least(1)
        ),
        'value_head_dim': Option(
            int | None,
            None,
            'Dimensions of a value head (MiMo-V2-Flash: 2/3 of head_dim); None: head_dim',
            check=at_least(1),
        ),
        'use_gqa': Option(bool, False, 'Use grouped-query attention: heads share keys and values'),
        'num_kv_heads': Option(
            int | None,
            None,
            'Number of key/value heads, a divisor of n_head (1: multi-query attention)',
            check=at_least(1),
            requires=('use_gqa', True),
        ),
        'qkv_clip': Option(
            float | None,
            None,
            'Clip queries, keys and values, as projected, to ± this value; None: off',
            check=above(0),
        ),
        **QK_NORM_OPTIONS,
        **QUERY_SCALE_OPTIONS,
        **OUTPUT_GATE_OPTIONS,
        'value_residual': Option(
            str,
            'none',
            'Mix the values of the first layer with attention into those of the layer, with fixed '
            'or learned weights',
            choices=('none', *VALUE_RESIDUAL_TAGS),
        ),
        'value_residual_weight': Option(
            float,
            0.5,
            "Weight of the first layer's values, at first if it is learned; of a layer's own: 1 "
            'minus that',
            check=between(0, 1),
            requires=('value_residual', AnyBut('none')),
        ),
        **Attention.options,
    }

    def __init__(self, config: ModelArchitectureConfig, layer: int):
        super().__init__(config, layer)
        self.head_dim, kv_heads = config.head_dim, self.kv_heads(config)
        q_rows, k_rows = config.n_head * config.head_dim, kv_heads * config.head_dim
        outputs = {'elementwise': config.n_head * self.v_head_dim, 'head': config.n_head}
        gates = outputs.get(config.get('attention_gate'))
        self.rows = (q_rows, k_rows, kv_heads * self.v_head_dim, *([gates] if gates else []))
        self.gate_function = gate_function(config)
        self.qkv = nn.Linear(config.n_embd, sum(self.rows), bias=config.attention_bias)
        self.canon = canon_layer(config, 'B', sum(self.rows[:3]))
        (self.q_norm, q_dim), (self.k_norm, k_dim) = qk_norms(config, q_rows, k_rows)
        self.norm_dims = q_dim, k_dim
        self.norms_rotated = config.get('qk_norm_position') == 'after_rotation'
        self.qkv_clip, self.query_scale = config.get('qkv_clip'), query_scale(config)
        self.first_weight = config.get('value_residual_weight')
        is_learned = config.get('value_residual') == 'learned'
        self.value_lambdas = nn.Parameter(torch.empty(2)) if is_learned else None
        rotates = POSITION_ENCODING_REGISTRY[config.position_encoding].rotates()
        self.replaces_q_and_k = rotates and config.qk_norm == 'none'

    @classmethod
    def head_dims(cls, config: FrozenConfig) -> tuple[int, int]:
        head_dim = config.head_dim or max(1, config.n_embd // config.n_head)
        return head_dim, config.get('value_head_dim') or head_dim

    @staticmethod
    def kv_heads(config: ModelArchitectureConfig) -> int:
        return config.num_kv_heads if config.use_gqa else config.n_head

    @classmethod
    def derived_values(cls, config: FrozenConfig) -> dict[str, tuple]:
        head_dim, value_head_dim = cls.head_dims(config)
        return {
            'head_dim': (head_dim, 'n_embd / n_head'),
            'value_head_dim': (value_head_dim, 'head_dim'),
            **super().derived_values(config),
        }

    @classmethod
    def head_tags(cls, config: ModelArchitectureConfig) -> list[str]:
        tags = []
        if config.head_dim * config.n_head != config.n_embd:
            tags.append(f'HD{config.head_dim}')
        if cls.head_dims(config)[1] != config.head_dim:
            tags.append(f'VD{config.value_head_dim}')
        if config.use_gqa:
            tags.append('MQA' if config.num_kv_heads == 1 else f'GQA{config.num_kv_heads}')
        tags += filter(None, (qk_norm_tag(config), query_scale_tag(config)))
        if config.get('qkv_clip') is not None:
            tags.append(f'QKVClip{config.qkv_clip:g}')
        tags += filter(None, (output_gate_tag(config),))
        if config.get('value_residual') in VALUE_RESIDUAL_TAGS:
            weight = config.value_residual_weight
            tag = VALUE_RESIDUAL_TAGS[config.value_residual]
            tags.append(tag if weight == 0.5 else f'{tag}{weight:g}')
        return tags

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        problems = uneven_heads(config, 'head_dim') + qk_norm_problems(config)
        heads, kv_heads = config.n_head, config.get('num_kv_heads')
        if config.use_gqa and (not kv_heads or heads % kv_heads):
            small = [h for h in range(1, math.isqrt(heads) + 1) if heads % h == 0]
            divisors = sorted({*small, *(heads // h for h in small)})
            problems.append(
                f'num_kv_heads={kv_heads}: use_gqa=True needs a num_kv_heads that '
                f'divides n_head={heads}. Choose one of {", ".join(map(str, divisors))}.'
            )
        return problems

    @classmethod
    def model_problems(cls, config: ModelArchitectureConfig) -> list[str]:
        """Whether later layers use the first layer's values, and theirs have the same sizes."""
        numbered = zip(config.layer_letters, config.layers)
        sharing = [(letter, layer) for letter, layer in numbered if 'value_residual' in layer]
        if all(layer.value_residual == 'none' for _, layer in sharing):
            return []
        (first_letter, first), *others = sharing
        later = [(letter, layer) for letter, layer in others if layer.value_residual != 'none']
        if not later:
            return [
                f'value_residual={first.value_residual!r} has no effect: no layer after the first '
                f'one with attention has it. Remove it.'
            ]
        problems = {}
        for letter, layer in later:
            sizes, of_first = (
                (cls.kv_heads(each), cls.head_dims(each)[1]) for each in (layer, first)
            )
            if sizes != of_first:
                problems[letter] = (
                    f'value_residual={layer.value_residual!r} (layers {letter}): their '
                    f'{sizes[0]} key/value heads of {sizes[1]} dimensions differ from the '
                    f'{of_first[0]} of {of_first[1]} of the first layer with attention '
                    f'({first_letter}), whose values they would mix in. Give both the same sizes, '
                    f'or set --layer_kinds.{letter}.value_residual=none.'
                )
        return list(problems.values())

    def forward(self, x: torch.Tensor, attn_inputs: AttentionInputs) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        of_heads = self.rows[:3]
        qkv, *gate = self.qkv(x).split((sum(of_heads), *self.rows[3:]), dim=-1)
        if self.qkv_clip is not None:
            qkv = qkv.clamp(-self.qkv_clip, self.qkv_clip)
        if self.canon is not None:
            qkv = self.canon(qkv, attn_inputs)
        q, k, v = qkv.split(of_heads, dim=-1)
        norms = (q, self.q_norm, self.norm_dims[0]), (k, self.k_norm, self.norm_dims[1])
        q, k = (self.norm_and_rotate(*norm, attn_inputs.rotation).to(v.dtype) for norm in norms)
        if self.query_scale is not None:
            q = self.query_scale.scaled(q, attn_inputs.shared.positions)
        if self.replaces_q_and_k:
            v = v.contiguous()  # a view would keep the memory of the replaced q and k
        v = self.split_heads(self.share_values(v, attn_inputs), self.v_head_dim)
        if not gate:
            return self.attend_and_project(q, k, v, attn_inputs)
        y = self.attend_with_cache(q, k, v, attn_inputs)
        factor = self.gate_function(gate[0]).to(y.dtype)
        factor = factor.unflatten(-1, (self.num_heads, -1))  # (B, T, H, 1 or Dv)
        return self.project_output(y * factor.transpose(1, 2))

    def norm_and_rotate(
        self, x: torch.Tensor, norm: nn.Module, dims: int, rotation: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Queries or keys (B, T, heads · D) -> (B, heads, T, D). dims: those that are normalized
        together."""
        if not self.norms_rotated:
            return self.rotate(self.split_heads(norm(x.unflatten(-1, (-1, dims)))), rotation)
        rotated = self.rotate(self.split_heads(x), rotation).transpose(1, 2).flatten(2)
        return self.split_heads(norm(rotated.unflatten(-1, (-1, dims))))

    def shared_inputs(self) -> tuple[str, ...]:
        shared = ('first_values',) if self.first_weight is not None else ()
        return shared if self.query_scale is None else (*shared, 'positions')

    def share_values(self, v: torch.Tensor, attn_inputs: AttentionInputs) -> torch.Tensor:
        """Values v (B, T, KV heads · Dv), with those of the first layer if there is a
        `value_residual`; the first layer publishes its own."""
        if attn_inputs.published is not None:
            attn_inputs.published.values = v
        first = attn_inputs.shared.first_values
        if first is None:
            return v
        if self.value_lambdas is None:
            return v.lerp(first, self.first_weight)
        of_first, of_own = self.value_lambdas.split(1)
        return (of_first * first + of_own * v).to(v.dtype)

    def initial_values(self) -> dict[str, Fill]:
        if self.value_lambdas is None:
            return super().initial_values()
        weight = self.first_weight

        def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
            tensor.copy_(torch.tensor([weight, 1 - weight]))

        return {**super().initial_values(), 'value_lambdas': fill}

    def split_heads(self, x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
        """(B, T, ...) with the dimensions of all heads -> (B, heads, T, D). dim: D; None:
        head_dim."""
        return x.flatten(2).unflatten(-1, (-1, dim or self.head_dim)).transpose(1, 2)

    def matrices(self) -> dict[torch.Tensor, tuple[int, ...]]:
        return {**super().matrices(), self.qkv.weight: self.rows}


def uneven_heads(config: ModelArchitectureConfig, key: str) -> list[str]:
    """The problem if the head size `key` derives from n_embd / n_head, which is no integer."""
    if config.n_embd % config.n_head == 0 or not config.origins[key].startswith('derived'):
        return []
    most = min(config.n_head, config.n_embd)
    nearest = (h for distance in range(most) for h in (most - distance, most + distance))
    heads = next(h for h in nearest if config.n_embd % h == 0)
    return [
        f'n_head={config.n_head} does not divide n_embd={config.n_embd}, but {key} is derived as '
        f'n_embd / n_head. Use the nearest divisor, --n_head={heads}, or set {key}.'
    ]
