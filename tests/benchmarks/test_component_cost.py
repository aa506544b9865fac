"""benchmarks/component_cost.py: every component is measured, with the options it needs."""

import pytest
import torch

from benchmarks.component_cost import activation_bytes, variants
from common.registry import Registry
from model_builder import build_model
from model_config import ModelArchitectureConfig, architecture_options

SHAPE = {'n_layer': 6, 'n_head': 2, 'n_embd': 64, 'block_size': 128, 'vocab_size': 65}


def test_every_component_is_measured():
    options, default = architecture_options(), ModelArchitectureConfig()
    changes = variants(options, default.to_dict())
    assert len({str(change) for change in changes}) == len(changes)
    measured = set()
    for change in changes:
        values = ModelArchitectureConfig(**change).to_dict()
        assert change.items() <= values.items(), change
        measured |= values.items()
    for key, option in options.items():
        if isinstance(option.choices, Registry) and key != 'mixer_backend':  # kernels of CUDA
            assert {(key, name) for name in option.choices} <= measured, key
        if option.base_type is bool:
            assert {(key, False), (key, True)} <= measured, key


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    'choices',
    [
        {'arch_preset': 'legacy'},
        {'arch_preset': 'llama', 'dropout': 0.1, 'attention_backend': 'manual'},
        {'arch_preset': 'gpt2', 'use_gqa': True, 'num_kv_heads': 1, 'dropout': 0.1},
    ],
    ids=lambda choices: choices['arch_preset'],
)
def test_activation_bytes_match_real_forward_pass(choices, dtype):
    architecture = ModelArchitectureConfig(**SHAPE, **choices)
    model = build_model(architecture, 'cpu', 0)
    tokens = torch.zeros((3, architecture.block_size), dtype=torch.long)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()  # kept, so that no address is used twice
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast('cpu', dtype, enabled=dtype != torch.float32),
    ):
        model(tokens, tokens)
    outside, per_block = activation_bytes(architecture, 3, dtype)
    assert outside + SHAPE['n_layer'] * per_block == sum(s.nbytes() for s in saved.values())
