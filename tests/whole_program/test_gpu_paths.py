"""What is particular to CUDA and MPS, shown on machines that have neither."""

import math
import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.architectures import tiny
from helpers.optimizer_options import options
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_init import _get_device_from_mesh

from common import hardware
from common.errors import UserError
from components import attention_backends
from components.moe import grouped_mm
from configurator import read_command_line
from inference.sampling import Sampler
from model_builder import build_model, parameter_groups
from optim import optimizers
from optim.step import GuardedOptimizer
from parallel import process_group as groups
from parallel.strategies import ALIGNMENT, DataParallel, SingleProcess, ZeRO1
from studies.runner import visible_gpu
from training_config import load_settings, schema


@pytest.fixture
def eight_gpus(monkeypatch):
    """Pretend eight GPUs; the list of the calls of set_device."""
    calls = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 8)
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', calls.append)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: calls[-1].index if calls else 0)
    before = torch.backends.cuda.matmul.allow_tf32
    yield calls
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def process_group():
    dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_fsdp_takes_the_gpu_of_its_rank(eight_gpus, process_group, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '3')
    device = hardware.select_device('auto')
    hardware.tune(device, deterministic=False)
    mesh = init_device_mesh('cuda', (1,), mesh_dim_names=('shard',))
    assert device == _get_device_from_mesh(mesh) == torch.device('cuda:3')


def test_single_visible_gpu_is_that_of_any_local_rank(eight_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setenv('LOCAL_RANK', '3')
    for name in hardware.VISIBLE_DEVICES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match='cuda:3'):
        hardware.select_device('auto')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '6')
    assert (
        hardware.select_device('auto') == hardware.select_device('cuda') == torch.device('cuda:0')
    )


@pytest.mark.parametrize('shared', [(), (1, 3), (0, 2, 3)])
def test_ranks_that_share_a_gpu_are_refused(shared, eight_gpus, monkeypatch):
    """On every rank, with the same message; as with CUDA_VISIBLE_DEVICES=0 and several ranks."""
    store, messages = dist.HashStore(), set()
    for rank in range(4):
        store.set(f'process {rank}', f'node7 {1000 + rank}')
        store.set(f'gpu {rank}', 'a5' if rank in shared else f'b{rank}')
    for rank in range(4):
        gpu = SimpleNamespace(uuid='a5' if rank in shared else f'b{rank}')
        monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device, gpu=gpu: gpu)
        try:
            groups.refuse_shared_gpus(store, rank, 4, torch.device('cuda:0'))
        except UserError as error:
            messages.add(str(error))
    ranks = ', '.join(map(str, shared))
    assert len(messages) == bool(shared)
    assert all(f'ranks {ranks} use the same GPU on node7 (GPU-a5)' in text for text in messages)


def test_host_group_beside_a_bound_device_is_gloo(eight_gpus, monkeypatch):
    """As on GPUs: the group of all ranks is bound to the GPU; Python values must not use it."""
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('cuda'))
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: 8)
    monkeypatch.setattr(
        torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(uuid='a5')
    )
    monkeypatch.setattr(groups, 'rendezvous', lambda *_, **__: iter([(store, 0, 1)]))
    real = dist.init_process_group
    backends, store = [], dist.HashStore()

    def without_nccl(backend, **options):
        backends.append((backend, options['device_id'], options['timeout']))
        real(backend.replace('nccl', 'gloo'), **options)

    monkeypatch.setattr(dist, 'init_process_group', without_nccl)
    for name in groups.FLIGHT_RECORDER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TORCH_FR_BUFFER_SIZE', '7')  # the user's own
    device, timeout = torch.device('cuda:3'), timedelta(seconds=5)
    try:
        _, host_group = groups.init_process_group(device, timeout)
        assert os.environ['TORCH_NCCL_DUMP_ON_TIMEOUT'] == '1'
        assert os.environ['TORCH_FR_BUFFER_SIZE'] == '7'
        # NCCL's watchdog must come after the report of the host group.
        ((backend, bound, longer),) = backends
        assert (backend, bound) == ('cpu:gloo,cuda:nccl', device) and longer > timeout
        assert dist.get_backend(host_group) == 'gloo'
        group = groups.MultiProcessGroup(store, host_group)
        assert group.all_reduce_max([2.0]) == [2.0] and group.all_gather_object('a') == ['a']
    finally:
        dist.destroy_process_group()


def test_study_runs_share_the_visible_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4, GPU-5a')
    assert [visible_gpu(slot) for slot in range(3)] == ['4', 'GPU-5a', '4']
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    assert [visible_gpu(slot) for slot in range(3)] == ['0', '1', '0']


def test_experts_without_tokens_have_gradient_zero(monkeypatch):
    real = F.grouped_mm

    def careless(a, b, *, offs):
        product = real(a, b, offs=offs)
        if b.dim() == 2:
            product[offs.diff(prepend=offs.new_zeros(1)) == 0] = math.nan
        return product

    ends = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    a, b = torch.randn(7, 8), torch.randn(4, 8, 8, requires_grad=True)
    monkeypatch.setattr(F, 'grouped_mm', careless)
    grouped_mm(a, b, ends).sum().backward()
    expected = torch.zeros_like(b)
    expected[1], expected[3] = (
        a[rows].sum(0)[:, None].expand(8, 8) for rows in (slice(3), slice(3, 7))
    )
    torch.testing.assert_close(b.grad, expected)


def test_zero1_parameters_are_aligned(monkeypatch):
    monkeypatch.setattr(DataParallel, 'wrap', lambda self, model: model)
    model = build_model(tiny(normalization='dyt'), torch.device('cpu'), 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    strategy = ZeRO1.__new__(ZeRO1)
    strategy.rank, strategy.world_size, strategy.device = 1, 3, torch.device('cpu')
    strategy.wrap(model)
    assert any(p.numel() % 4 for p in model.parameters())
    begin = strategy.flat.data_ptr()
    assert all((p.data_ptr() - begin) % ALIGNMENT == 0 for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_deterministic_sampling_avoids_cumsum_on_the_device(monkeypatch):
    """As on CUDA, where a floating-point `cumsum` raises then; 'meta' stands in for it."""
    moved = []
    real = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda self: moved.append(self.shape) or real(self))
    logits = torch.randn(2, 10)
    sampler = Sampler(10, top_p=0.9, generator=torch.Generator().manual_seed(1))
    free = sampler(logits)
    assert not moved
    torch.use_deterministic_algorithms(True)
    try:
        sampler.generator.manual_seed(1)
        assert torch.equal(sampler(logits), free) and moved
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_nonfinite_update_is_skipped_where_fused_adamw_ignores_it(optimizer, monkeypatch):
    """The kernel is made to ignore `found_inf`, as MPS's may."""
    real = torch.optim.AdamW.step

    def careless(self):
        self.found_inf = torch.zeros(())
        real(self)

    monkeypatch.setattr(torch.optim.AdamW, 'step', careless)
    monkeypatch.setattr(optimizers, 'IGNORES_FOUND_INF', ('cpu',))
    run = options(optimizer=optimizer)
    device = torch.device('cpu')
    model = build_model(tiny(), device, 1)
    strategy = SingleProcess(run, device)
    guarded = GuardedOptimizer(
        strategy.build_optimizer(parameter_groups(model), run), run, device, strategy
    )
    before = [p.detach().clone() for p in model.parameters()]
    for value, changes in ((math.nan, False), (1.0, True)):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        guarded.step(0.1, torch.zeros(()), measured=False)
        same = all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
        assert same is not changes


def test_compile_is_derived_for_cuda_alone():
    for kind, compiled in (('cuda', True), ('mps', False)):
        settings = load_settings(read_command_line([], schema))
        assert settings.resolve(torch.device(kind), 'float32', None).run.compile is compiled


@pytest.mark.usefixtures('flex_of_few_queries')
def test_flex_makes_its_masks_once(monkeypatch):
    """One for each set of visible tokens, whatever the batch; with documents one in every forward
    pass, which kinds of layers that differ in something else share."""
    made = []
    real = attention_backends.block_mask
    monkeypatch.setattr(
        attention_backends,
        'block_mask',
        lambda *arguments: made.append(arguments) or real(*arguments),
    )
    attention_backends.window_mask.cache_clear()
    layers = {'attention_backend': 'flex', 'head_dim': 16, 'n_layer': 4}
    windows = {'sliding_window': 3, 'attention_pattern': 'LG'}
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    # Global layers find the mask of the first case.
    documents = {'document_mask': True, 'end_of_text': 1}
    kinds = {'L': {'sliding_window': 3}, 'G': {'n_head': 2, 'head_dim': 32}}
    mixed = {'layer_pattern': 'LGM', 'layer_kinds': kinds | {'M': {'attention_softcap': 9.0}}}
    cases = (({}, 1), (windows, 1), (mixed, 0), (documents, 2), ({**mixed, **documents}, 4))
    for kinds, masks in cases:
        made.clear()
        model = build_model(tiny(**layers, **kinds), torch.device('cpu'), 1)
        with torch.no_grad():
            for batch in (tokens, tokens[:1]):
                model(batch)
        assert len(made) == masks
