"""What FSDP gathers, in which dtype and order, and what it keeps: one rank of a simulated group."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from helpers.collective_recorder import Collective, CollectiveRecorder
from helpers.fake_ranks import fake_group

from common import hardware
from common.errors import UserError
from common.parallel_options import derived_fsdp_options
from components.base import AuxOutput
from components.feed_forward import FeedForward
from model_builder import build_model
from model_config import FFN_REGISTRY, ModelArchitectureConfig
from parallel.autocast import parameters_cast_by_autocast
from parallel.fully_sharded import FullySharded
from parallel.shard_units import shard_units

CPU = torch.device('cpu')
N_LAYER = 4
SIZES = {'n_layer': N_LAYER, 'n_head': 4, 'n_embd': 64, 'block_size': 32, 'vocab_size': 512}
# Blocks of different sizes, and two biases of attention scores, of two and four heads.
MIXED = {
    'n_layer': 3,
    'layer_pattern': 'GHM',
    'layer_kinds': {
        'G': {'sliding_window': 8, 'd_ff': 40},
        'H': {'position_encoding': 't5_relative', 'n_head': 2},
        'M': {'position_encoding': 't5_relative', 'ffn_type': 'moe', 'num_experts': 3},
    },
}
RANKS = 8
EVERY = {'fsdp_reduce_every_micro_step': True}


def architecture(preset: str, **options) -> ModelArchitectureConfig:
    return ModelArchitectureConfig(arch_preset=preset, **{**SIZES, **options})


def train(config: ModelArchitectureConfig, micro_steps: int, prepare=lambda block: None, **options):
    """An iteration as the first of eight ranks. Returns the strategy, the model and the
    collectives, with marks at the end of each block's pass and of forward and backward passes.

    prepare: called with each block before the iteration.
    """
    run = SimpleNamespace(
        **{
            'seed': 1,
            'distributed_timeout': 10,
            'reduce_dtype': 'float32',
            'fsdp_param_dtype': 'bfloat16',
            'fsdp_reshard_after_forward': True,
            'fsdp_reduce_every_micro_step': False,
            'fsdp_shard_size': None,
            **options,
        }
    )
    strategy = FullySharded(run, CPU)
    raw_model, model = strategy.build(config, [], False)
    recorder, log = CollectiveRecorder(), []

    def mark(event: str) -> None:
        log.extend([*recorder.take(), event])

    for number, block in enumerate(raw_model.blocks):
        prepare(block)
        block.register_forward_hook(lambda *_, n=number: mark(f'forward {n}'))
        block.register_full_backward_hook(lambda *_, n=number: mark(f'backward {n}'))
    tokens = torch.zeros((1, config.block_size), dtype=torch.long)
    with recorder:
        for number in range(micro_steps):
            with strategy.micro_step(model, last=number == micro_steps - 1):
                with hardware.autocast(CPU, 'bfloat16'):
                    loss, _, auxiliary = model(tokens, tokens)
                mark('loss')
                (loss + auxiliary.loss).backward()
                mark('end')
    return strategy, raw_model, log


def collectives(log: list) -> list[Collective]:
    return [entry for entry in log if isinstance(entry, Collective)]


@pytest.fixture
def group():
    """This process is the first of eight, whose collectives return at once."""
    with fake_group(RANKS):
        yield


def order(log: list) -> list[str]:
    """Collectives by their dtype, with marks: 'all_gather bfloat16', 'forward 0', …"""
    return [
        f'{entry.name} {str(entry.dtype).removeprefix("torch.")}'
        if isinstance(entry, Collective)
        else entry
        for entry in log
    ]


GATHER, GATHER_FP32 = 'all_gather bfloat16', 'all_gather float32'
REDUCE = 'reduce_scatter float32'
FORWARD = [
    *(GATHER_FP32, GATHER_FP32),  # gains; embedding
    *(entry for n in range(N_LAYER) for entry in (GATHER, f'forward {n}')),
    *(GATHER, 'loss'),  # output head
]


@pytest.mark.parametrize('reshard', [True, False])
def test_order_of_collectives(group, reshard):
    """Each block is gathered while the one before it computes; none is gathered needlessly."""
    _, _, log = train(architecture('llama'), 2, fsdp_reshard_after_forward=reshard)
    entries = order(log)
    middle = entries.index('end') + 1
    # In the backward pass block 3 is still gathered, and block 2 is gathered before 3 computes.
    ahead = [GATHER] * reshard
    first = [*FORWARD, *ahead, 'backward 3', *ahead, 'backward 2', *ahead, 'backward 1']
    assert entries[:middle] == [*first, 'backward 0', 'end']
    # In the last micro-step each unit is reduced as soon as its gradients are complete.
    last = [*FORWARD, REDUCE]
    last += [entry for n in (3, 2, 1) for entry in (*ahead, f'backward {n}', REDUCE)]
    assert entries[middle:] == [*last, 'backward 0', REDUCE, REDUCE, REDUCE, 'end']


def test_tied_table_is_gathered_once_in_float32(group):
    _, _, log = train(architecture('gpt2'), 1)
    loss = log.index('loss')
    gathers, later = collectives(log[:loss]), collectives(log[loss:])
    table = [each for each in gathers if each.elements == 512 * 64]
    assert [(each.name, each.dtype) for each in table] == [('all_gather', torch.float32)]
    assert len(gathers) == 2 + N_LAYER  # and positions and gains
    assert [each.name for each in later].count('all_gather') == N_LAYER - 1


@pytest.mark.parametrize(
    ('micro_steps', 'options'),
    [
        (1, {}),
        (2, {}),
        (2, {'fsdp_reshard_after_forward': False}),
        (2, {'fsdp_param_dtype': 'float32'}),
        (2, {**EVERY, 'reduce_dtype': 'bfloat16'}),
        (1, {'fsdp_shard_size': 4}),
        (2, {**EVERY, 'fsdp_shard_size': 4}),
        (2, {**EVERY, 'fsdp_shard_size': 4, 'reduce_dtype': 'bfloat16'}),
    ],
)
def test_bytes_sent_equal_collectives(group, micro_steps, options):
    for config in (
        architecture('gpt2', n_layer=2, vocab_size=500),  # shards of unequal size
        architecture('mixtral', n_layer=2),
        architecture('llama', normalization='none', n_layer=1),  # the root has no parameters
        architecture('llama', **MIXED),
    ):
        strategy, model, log = train(config, micro_steps, **options)
        sent = sum(each.bytes_sent for each in collectives(log))
        assert strategy.bytes_sent(model, micro_steps) == pytest.approx(sent), config.name
        # A ring of n ranks sends (n - 1) / n of what it gathers, or twice that.
        fractions = {
            each.name: each.bytes_sent / each.elements / each.dtype.itemsize
            for each in collectives(log)
        }
        if 'fsdp_shard_size' in options:
            assert fractions == dict.fromkeys(fractions, 3 / 4) | {'all_reduce': 2 / 2}
        else:
            assert fractions == dict.fromkeys(('all_gather', 'reduce_scatter'), 7 / 8)


@pytest.mark.parametrize('every', [False, True])
def test_unsharded_gradients_do_not_accumulate(group, every):
    strategy, model, log = train(architecture('llama'), 2, fsdp_reduce_every_micro_step=every)
    reductions = [each for each in collectives(log) if each.name == 'reduce_scatter']
    assert len(reductions) == (2 if every else 1) * len(strategy.units)
    for parameter in model.parameters():
        assert parameter.grad.dtype == parameter.dtype == torch.float32


# --- Which parameters -----------------------------------------------------------------------------


def in_fp32(config: ModelArchitectureConfig) -> set[str]:
    """The kinds of parameters that stay fp32, by the last parts of their names."""
    cast = parameters_cast_by_autocast(config)
    names = {name for name, _ in build_model(config).named_parameters()}
    assert cast < names
    return {name.split('.', 2)[2] if 'blocks.' in name else name for name in names - cast}


@pytest.mark.parametrize(
    ('preset', 'options', 'expected'),
    [
        ('llama', {}, {'attention_norm.weight', 'ffn_norm.weight'}),
        ('pythia', {}, {f'{n}_norm.{p}' for n in ('attention', 'ffn') for p in ('weight', 'bias')}),
        ('mixtral', {}, {'attention_norm.weight', 'ffn_norm.weight', 'ffn.router.weight'}),
        ('qwen3', {}, {f'{n}_norm.weight' for n in ('attention', 'ffn')}
         | {f'attention.{n}_norm.weight' for n in 'qk'}),
        ('deepseek', {'ffn_type': 'swiglu'},
         {'attention_norm.weight', 'ffn_norm.weight', 'attention.kv_norm.weight'}),
        ('llama', {'normalization': 'dyt'},
         {f'{n}_norm.{p}' for n in ('attention', 'ffn') for p in ('weight', 'bias', 'alpha')}),
    ],
)  # fmt: skip
def test_only_multiplied_parameters_are_converted(preset, options, expected):
    config = architecture(preset, n_layer=1, **options)
    final = {'final_norm.' + name.rpartition('.')[2] for name in expected if 'ffn_norm' in name}
    assert in_fp32(config) == {*expected, *final, 'token_embedding.weight'}


def test_units_of_different_blocks():
    """Biases of position encodings, and the router that one block has, are in the root's unit."""
    model = build_model(architecture('llama', **MIXED))
    root, embedding, *blocks, head = shard_units(model, 'bfloat16', True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = {name for name in names.values() if 'norm' in name}
    expected |= {'blocks.2.ffn.router.weight'}
    expected |= {f'{n}.table.weight' for n in ('position_encoding', 'more_position_encodings.0')}
    assert {names[parameter] for parameter in root.parameters} == expected
    assert [unit.modules[0] for unit in blocks] == list(model.blocks)
    assert len({unit.elements(RANKS) for unit in blocks}) == 3
    assert (len(embedding.parameters), len(head.parameters)) == (1, 1)


class Selective(FeedForward):
    """A user's network with a linear layer computed in fp32, and a table that is looked up."""

    def __init__(self, config, layer):
        super().__init__()
        self.exact = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.down = nn.Linear(config.n_embd, config.n_embd)
        self.table = nn.Embedding(config.vocab_size, config.n_embd)

    @classmethod
    def default_d_ff(cls, config):
        return config.n_embd

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            y = self.exact(x.float())
        return self.down(y + self.table.weight[0]), AuxOutput(0.0, {})


def test_custom_component_needs_no_declaration(group, register):
    register(FFN_REGISTRY, 'selective', Selective)
    config = architecture('llama', n_layer=2, ffn_type='selective')
    assert {'ffn.exact.weight', 'ffn.table.weight'} < in_fp32(config)
    # Its table is larger than all matrices of the block, which therefore is gathered in fp32.
    model = build_model(config)
    units = {unit.modules[0]: unit for unit in shard_units(model, 'bfloat16', True)}
    for block in model.blocks:
        assert units[block].dtype == torch.float32
        assert set(units[block].parameters) == set(block.parameters())
    assert units[model].parameters == list(model.final_norm.parameters())
    train(config, 1)


@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
    ('preset', 'options'), [('gpt2', {}), ('llama', {}), ('mixtral', {}), ('llama', MIXED)]
)
def test_every_parameter_is_in_one_unit(preset, options, param_dtype):
    model = build_model(architecture(preset, **options))
    parameters = [p for unit in shard_units(model, param_dtype, True) for p in unit.parameters]
    assert len(parameters) == len({*parameters}) == len(list(model.parameters()))


# --- What is kept ---------------------------------------------------------------------------------


def shapes_saved(block: nn.Module) -> set[torch.Size]:
    """Watches a block. Returns the shapes, to be filled, of the tensors that its forward pass keeps
    for the backward pass, parameters and views of them excepted."""
    shapes: set[torch.Size] = set()
    forward = block.forward

    def watched(*arguments):
        saved: list[torch.Tensor] = []

        def save(tensor):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            output = forward(*arguments)
        own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        shapes.update(t.shape for t in saved if t.untyped_storage().data_ptr() not in own)
        return output

    block.forward = watched
    return shapes


@pytest.mark.parametrize('preset', ['gpt2', 'llama', 'deepseek', 'mixtral'])
def test_no_copy_of_weights_is_saved(group, preset):
    config = architecture(preset, n_layer=2, block_size=17)  # no size of a matrix
    copies = {}
    for param_dtype in ('float32', 'bfloat16'):
        watched: list[set] = []
        _, model, _ = train(
            config,
            1,
            prepare=lambda block, to=watched: to.append(shapes_saved(block)),
            fsdp_param_dtype=param_dtype,
        )
        weights = {p.shape for p in model.blocks[-1].parameters() if p.dim() > 1}
        weights |= {shape[:-2] + shape[:-3:-1] for shape in weights}
        assert watched[-1]
        copies[param_dtype] = watched[-1] & weights
    assert copies['float32'], 'autocast makes copies'
    assert not copies['bfloat16']


# --- Options --------------------------------------------------------------------------------------


def derived(device='cuda', ranks=8, elements=8_000_000_000, memory=180e9, **run) -> dict:
    run = {'dtype': 'bfloat16', 'gradient_accumulation_steps': 40, 'reduce_dtype': 'float32', **run}
    options = derived_fsdp_options(run, device, ranks, elements, memory)
    return {key: value for key, (value, _) in options.items()}


def test_derived_options():
    on_gpu = {'fsdp_param_dtype': 'bfloat16', 'fsdp_reduce_every_micro_step': True}
    assert derived() == on_gpu
    assert derived(device='cpu') == dict(zip(on_gpu, ('float32', False)))
    assert derived(dtype='float16')['fsdp_param_dtype'] == 'float32'
    for other in ({'gradient_accumulation_steps': 8}, {'elements': 124_000_000}, {'memory': None}):
        assert derived(**other) == {**on_gpu, 'fsdp_reduce_every_micro_step': False}
    with pytest.raises(UserError, match=r'needs dtype=.bfloat16.*--fsdp_param_dtype=float32'):
        derived(dtype='float32', fsdp_param_dtype='bfloat16')
