"""components/layer_counts.py: parameters and FLOPs of each kind, counted from uniform models."""

import pytest

from model_builder import build_model, count_parameters, flops_by_part, training_flops
from model_config import ModelArchitectureConfig

TINY = {'n_layer': 5, 'n_head': 2, 'n_embd': 16, 'block_size': 8, 'vocab_size': 32}
MIXED = {
    'arch_preset': 'llama',
    'layer_pattern': 'LGLLM',
    'layer_kinds': {
        'L': {'sliding_window': 3, 'd_ff': 24},
        'M': {'ffn_type': 'moe', 'num_experts': 4, 'experts_per_token': 2, 'shared_experts': 1},
    },
}


def block_of(kind, count):
    """A count of one block: of two such layers less of one."""
    two, one = (
        build_model(ModelArchitectureConfig.from_dict({**kind.to_dict(), 'n_layer': layers}))
        for layers in (2, 1)
    )
    return count(two) - count(one)


@pytest.mark.parametrize(
    'options',
    [
        MIXED,
        {'arch_preset': 'deepseek', 'dense_layers': 2},
        {'arch_preset': 'llama'},
    ],
)
def test_counts_by_kind_are_those_of_uniform_models(options):
    config = ModelArchitectureConfig(**{**TINY, **options})
    model = build_model(config)
    counts, flops = count_parameters(model), training_flops(model)
    assert [kind['kind'] for kind in counts['by_kind']] == [*config.kinds]
    assert [kind['kind'] for kind in flops['by_kind']] == [*config.kinds]
    for (letter, kind), of_kind, kind_flops in zip(
        config.kinds.items(), counts['by_kind'], flops['by_kind'], strict=True
    ):
        layers = config.layer_letters.count(letter)
        expected = {
            key: layers * block_of(kind, lambda m, key=total: count_parameters(m)[key])
            for key, total in (('params', 'total_params'), ('active_params', 'active_params'))
        }
        assert of_kind == {'kind': letter, 'layers': layers, **expected}
        for key, causal in (('per_token', False), ('per_token_causal', True)):
            per_block = block_of(kind, lambda m, c=causal: sum(flops_by_part(m, c).values()))
            assert kind_flops[key] == pytest.approx(layers * per_block, rel=1e-12)
    # The rest of the model is embedding, head and the norm before it.
    outside = counts['total_params'] - sum(kind['params'] for kind in counts['by_kind'])
    tables = 1 if config.weight_tying else 2
    assert outside == tables * 32 * 16 + 16
