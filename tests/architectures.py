"""Tiny architectures for tests: every combination of the options, and a subset that covers them."""

import itertools
import random

import torch

from model_builder import Transformer, build_model
from model_config import (
    ACTIVATION_REGISTRY,
    ATTENTION_BACKEND_REGISTRY,
    FFN_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
    ModelArchitectureConfig,
)

SIZES = {'n_layer': 2, 'n_head': 4, 'n_embd': 16, 'block_size': 6, 'vocab_size': 11}


def tiny(**values) -> ModelArchitectureConfig:
    return ModelArchitectureConfig(**{'arch_preset': 'custom', **SIZES, **values})


def feed_forwards() -> list[dict]:
    """Every FFN with every activation that it takes."""
    return [
        {'ffn_type': ffn, **activation}
        for ffn in FFN_REGISTRY
        for activation in (
            [{'activation': name} for name in ACTIVATION_REGISTRY]
            if 'activation' in FFN_REGISTRY[ffn].options
            else [{}]
        )
    ]


AXES = {
    'normalization': [{'normalization': name} for name in NORM_REGISTRY],
    'position_encoding': [{'position_encoding': name} for name in POSITION_ENCODING_REGISTRY],
    'ffn': feed_forwards(),
    'attention_backend': [{'attention_backend': name} for name in ATTENTION_BACKEND_REGISTRY],
    'norm_position': [{'norm_position': name} for name in NORM_POSITION_REGISTRY],
    'bias': [{'bias': False}, {'bias': True}],
    'weight_tying': [{'weight_tying': False}, {'weight_tying': True}],
    'dropout': [{'dropout': 0.0}, {'dropout': 0.1}],
    'heads': [{'use_gqa': False}, {'use_gqa': True, 'num_kv_heads': 2}],
}


def combinations(*names: str) -> list[dict]:
    """All combinations of the named axes; of all axes when none is named."""
    return [
        {key: value for choice in choices for key, value in choice.items()}
        for choices in itertools.product(*(AXES[name] for name in names or AXES))
    ]


def covering() -> list[dict]:
    """A few combinations in which every two values of different options meet."""
    everything = combinations()
    chosen, met = [], set()
    for combination in random.Random(0).sample(everything, len(everything)):
        pairs = set(itertools.combinations(combination.items(), 2))
        if pairs - met:
            met |= pairs
            chosen.append(combination)
    return chosen


def label(combination: dict) -> str:
    """A test id."""
    return '-'.join(str(value) for value in combination.values())


def lively(config: ModelArchitectureConfig) -> Transformer:
    """A model whose attention is far from uniform and whose gains and biases are not trivial."""
    model = build_model(config, device='cpu', seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            parameter.mul_(10.0 if parameter.dim() > 1 else 1.0).add_(0.1 * noise)
    return model


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def some_tokens(config: ModelArchitectureConfig, batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, config.block_size), generator=generator)
