"""components/attention_backends.py: the backend of each device, and flex attention's masks."""

import itertools

import pytest
import torch
from helpers.architectures import gradients, perturbed_model, random_tokens, tiny
from helpers.in_process import train_here
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from components import attention_backends
from components.attention_backends import (
    AttentionSpec,
    FlexAttention,
    block_mask,
    fused_attention,
    window_mask,
)
from configurator import read_command_line
from inference.generate import eager_blocks, generate
from inference.sampling import Sampler
from model_builder import build_model
from model_config import PRESETS, ModelArchitectureConfig
from planning.simulation import MemoryCategory, Simulation
from training.load import load_run
from training_config import load_settings, schema

pytestmark = pytest.mark.usefixtures('one_thread')
CPU = torch.device('cpu')


# --- The backend of a device ----------------------------------------------------------------------

# The backend on a CPU and on MPS, and the one on CUDA.
BACKENDS = {
    'gemma2': ('manual', 'flex'),
    'mistral': ('sdpa', 'flex'),
    'gemma3': ('sdpa', 'flex'),
    'olmo3': ('sdpa', 'flex'),
    'gpt_oss': ('manual', 'flex'),
    'llama4': ('sdpa', 'flex'),
    'cohere2': ('sdpa', 'flex'),
    'mamba': (None, None),
    'mamba2': (None, None),
}


@pytest.mark.parametrize('preset', PRESETS)
def test_backend_of_each_preset(preset):
    config = ModelArchitectureConfig(arch_preset=preset, vocab_size=64)
    backends = [config.for_device(kind).get('attention_backend') for kind in ('cpu', 'mps', 'cuda')]
    elsewhere, on_cuda = BACKENDS.get(preset, ('sdpa', 'sdpa'))
    assert backends == [elsewhere, elsewhere, on_cuda]
    assert 'attention_backend' not in PRESETS[preset]


WINDOW, SOFTCAP = {'sliding_window': 4}, {'attention_softcap': 2.0}
DOCUMENTS = {'document_mask': True, 'end_of_text': 3}
DROPOUT, ALIBI = {'attention_dropout': 0.1}, {'position_encoding': 'alibi'}


@pytest.mark.parametrize(
    ('options', 'backend'),
    [
        ({}, 'sdpa'),
        (DROPOUT, 'sdpa'),
        (WINDOW, 'flex'),
        ({'sliding_window': 6}, 'sdpa'),  # of the whole context
        (DOCUMENTS, 'flex'),
        (SOFTCAP, 'flex'),
        ({'attention_type': 'mla', 'qk_nope_head_dim': 16, **WINDOW}, 'flex'),
        (WINDOW | DROPOUT, 'sdpa'),
        (SOFTCAP | DROPOUT, 'manual'),
        (WINDOW | {'head_dim': 8}, 'sdpa'),
        (SOFTCAP | {'head_dim': 8}, 'manual'),
        (ALIBI, 'sdpa'),  # with a bias of all pairs already
        (ALIBI | WINDOW, 'sdpa'),
        (ALIBI | SOFTCAP, 'flex'),
    ],
    ids=str,
)
def test_backend_of_cuda_follows_the_architecture(options, backend):
    sizes = {} if 'attention_type' in options else {'head_dim': 16}
    config = tiny(**sizes | options)
    assert config.for_device('cuda').attention_backend == backend
    assert config.for_device('cuda').origins['attention_backend'] == 'derived: for cuda'
    without_compiler = config.for_device('cuda', compiles=False).attention_backend
    assert without_compiler == ('manual' if 'attention_softcap' in options else 'sdpa')


def test_backend_that_is_set_stays():
    config = tiny(**WINDOW, head_dim=16, attention_backend='manual')
    assert config.for_device('cuda') is config and not config.derives_backend
    assert tiny(attention_backend=None) == tiny(attention_backend='sdpa')
    with pytest.raises(UserError, match="attention_backend='sdpa' does not support softcap"):
        tiny(**SOFTCAP, attention_backend='sdpa')


def test_architecture_is_the_same_on_every_device():
    """Its hash, which is that of older versions, in which presets named the backend."""
    config = ModelArchitectureConfig(arch_preset='gemma2', vocab_size=64)
    on_cuda = config.for_device('cuda')
    assert on_cuda.hash == config.hash == config.replace(attention_backend='manual').hash
    assert on_cuda.hash != config.replace(attention_backend='flex').hash
    assert on_cuda.for_device('cpu') == config != on_cuda
    # Other changes keep the device.
    longer = on_cuda.replace(block_size=256)
    assert longer.attention_backend == 'flex' and longer.derives_backend


def pretend_that_flex_trains_on_cpus(patch):
    """As the best backend there; in short sequences, as here, it computes like `manual`."""
    patch.setattr(FlexAttention, 'best_for', {'cpu': FlexAttention.supports})
    patch.setattr(FlexAttention, 'training_problems', lambda config, device: [])


def test_derived_backend_follows_the_device_of_a_later_process(tiny_dataset, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        pretend_that_flex_trains_on_cpus(patch)
        options = {'arch_preset': 'gemma2', 'sliding_window': 8}
        began = train_here(tiny_dataset, tmp_path, **options, max_iters=2)
    assert began.record['architecture']['choices']['attention_backend'] == 'flex'
    assert began.record['startup_info']['derived']['attention_backend'] == 'flex (for cpu)'
    assert load_run(tmp_path, device='cpu').config.attention_backend == 'manual'
    went_on = train_here(tiny_dataset, tmp_path, init_from='resume', max_iters=4)
    assert went_on.code == 0 and went_on.record['config']['attention_backend'] == 'manual'
    (resumed,) = went_on.events('resume')
    assert resumed['changed']['attention_backend'] == ['flex', 'manual']


def test_backend_that_is_set_stays_in_checkpoints(tiny_dataset, tmp_path):
    began = train_here(tiny_dataset, tmp_path, attention_backend='manual', max_iters=2)
    assert began.code == 0
    assert load_run(tmp_path, device='cpu').config.attention_backend == 'manual'
    went_on = train_here(tiny_dataset, tmp_path, init_from='resume', max_iters=4)
    assert went_on.record['config']['attention_backend'] == 'manual'
    other = {'init_from': 'resume', 'attention_backend': 'sdpa'}
    went_on = train_here(tiny_dataset, tmp_path, **other, max_iters=6)
    assert went_on.events('resume')[-1]['changed']['attention_backend'] == ['manual', 'sdpa']


@pytest.mark.parametrize('backend', [None, 'manual'])
def test_planned_gpu_holds_no_scores(backend):
    """The activations of a micro-batch grow with its tokens, not with the pairs of its tokens."""
    activations = []
    argv = ['--plan', '--dataset=missing', '--dtype=bfloat16']
    run = load_settings(read_command_line(argv, schema)).run
    for length, batch in ((512, 4), (1024, 2)):
        sizes = {'n_layer': 2, 'n_head': 4, 'n_embd': 64, 'vocab_size': 64, 'block_size': length}
        config = ModelArchitectureConfig(arch_preset='gemma2', **sizes, attention_backend=backend)
        simulated = Simulation(run, config.for_device('cuda'), on_gpu=True)
        snapshots = simulated.micro_step(batch, [], accumulates=True)
        activations.append(max(s.bytes_by_category[MemoryCategory.ACTIVATIONS] for s in snapshots))
    assert bool(activations[1] < 1.05 * activations[0]) is (backend is None), activations


def test_plan_takes_flex_for_a_gpu_only():
    argv = ['--plan', '--dataset=missing', '--attention_backend=flex', '--n_layer=1']
    assert load_settings(read_command_line([*argv, '--gpu=B200'], schema))
    with pytest.raises(UserError, match='no backward pass on cpu'):
        load_settings(read_command_line([*argv, '--device=cpu'], schema))


# --- Block masks ----------------------------------------------------------------------------------


def random_documents(batch, length):
    ends = torch.rand(batch, length, generator=torch.Generator().manual_seed(0)) < 0.02
    ends[0] = False  # a single document
    return ends.long().cumsum(1)


@pytest.mark.parametrize('queries', [128, 300, 512])
@pytest.mark.parametrize('window', [None, 1, 50, 128, 130, 300])
def test_block_mask_equals_that_of_all_pairs(queries, window):
    """All lists of partial and whole blocks, also with keys before the first query."""
    for before, masks_documents in itertools.product((0, 37, 128, 212), (False, True)):
        keys, documents = queries + before, ()
        if masks_documents:
            k_documents = random_documents(3, keys)
            documents = k_documents[:, before:], k_documents
        mask = block_mask(window, queries, keys, CPU, *documents)
        batch = 3 if masks_documents else None
        expected = torch_flex.create_block_mask(
            mask.mask_mod, batch, None, queries, keys, device='cpu'
        )
        for side, part in itertools.product(('kv', 'q'), ('', 'full_')):
            for name in ('num_blocks', 'indices'):
                of_mask, right = (getattr(m, f'{part}{side}_{name}') for m in (mask, expected))
                assert torch.equal(of_mask, right) and of_mask.dtype == right.dtype
                assert of_mask.is_contiguous()
        # The same pairs as the mask of `manual`.
        spec = AttentionSpec(1.0, window=window, documents=masks_documents)
        positions = torch.arange(keys)
        dense = attention_backends.additive_mask(
            spec, None, positions[before:], positions, *documents
        )
        axes = (torch.arange(n) for n in (batch or 1, 1, queries, keys))
        visible = mask.mask_mod(*torch.meshgrid(*axes, indexing='ij'))
        assert torch.equal(visible, dense == 0)


class Counter(TorchDispatchMode):
    """Counts operations that are no views, and the bytes that they write."""

    operations = written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            self.written += sum(x.nbytes for x in outputs if isinstance(x, torch.Tensor))
        return result


@pytest.mark.parametrize(('masks_documents', 'operations'), [(False, 33), (True, 45)])
def test_block_mask_has_no_tensor_of_all_pairs(masks_documents, operations):
    length = 8192
    documents = (random_documents(4, length),) * 2 if masks_documents else ()
    with Counter() as counter:
        block_mask(length // 2, length, length, CPU, *documents)
    assert counter.operations <= operations
    assert counter.written < 0.01 * length**2 * (4 if masks_documents else 1)


def test_mask_of_a_sample_can_be_trained_with():
    """Generation runs in inference mode, whose tensors no backward pass may use."""
    window_mask.cache_clear()
    config = tiny(**WINDOW, block_size=130, attention_backend='flex')
    model = build_model(config, CPU, 1).eval()
    prompt = random_tokens(config, batch=1)
    list(generate(model, prompt[:, :129], 1, choose=Sampler(11, temperature=0)))
    assert window_mask.cache_info().currsize == 1
    mask = window_mask(4, 129, 129, CPU)
    assert window_mask.cache_info().hits == 1
    assert not any(x.is_inference() for x in mask.as_tuple() if isinstance(x, torch.Tensor))


# --- Flex attention -------------------------------------------------------------------------------

CASES = {
    'window': {**WINDOW, 'sliding_window': 140, 'attention_pattern': 'LG'},
    'documents': DOCUMENTS,
    'window in documents': {**DOCUMENTS, 'sliding_window': 20},
    'softcap': {**SOFTCAP, 'use_gqa': True, 'num_kv_heads': 2},
    'latents': {'attention_type': 'mla', 'v_head_dim': 5, **SOFTCAP, 'sliding_window': 3},
    'bias': {**ALIBI, **SOFTCAP, 'sliding_window': 150},
}


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_flex_equals_manual(case, monkeypatch):
    """Logits and gradients; the backward pass is that of torch's reference for its kernels."""
    monkeypatch.setattr(torch_flex, '_validate_device', lambda *tensors: None)
    # Without tracing, which is slow.
    monkeypatch.setattr(torch_flex, '_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG', True)
    called = []
    real = fused_attention
    monkeypatch.setattr(
        attention_backends, 'fused_attention', lambda *a: called.append(a) or real(*a)
    )
    results = []
    for backend in ('flex', 'manual'):
        config = tiny(**case, block_size=260, attention_backend=backend)
        model, tokens = perturbed_model(config), random_tokens(config, batch=2)
        with torch.no_grad():
            logits = model.eval()(tokens)
        loss, *_ = model(tokens, tokens.roll(-1, 1))
        loss.backward()
        results.append((logits, loss, gradients(model)))
    assert len(called) == 2 * config.n_layer
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_flex_is_compiled_on_cuda(monkeypatch):
    """Alone, if its block is not; the tensors are fake."""
    compiled = []
    monkeypatch.setattr(
        attention_backends,
        'compiled_flex',
        lambda: lambda q, k, v, **options: compiled.append(options) or q,
    )
    with FakeTensorMode():
        q = torch.empty(1, 2, 128, 16, device='cuda')
        spec = AttentionSpec(0.25, softcap=2.0)
        assert fused_attention(q, q, q, None, None, spec) is q
    ((options,),) = [compiled]
    assert options['scale'] == 0.25 and options['score_mod'] is not None


def test_flex_refuses_to_add_up_a_learned_bias_in_varying_order():
    positions = torch.arange(128)
    bias = torch.zeros(1, 128, 128, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        FlexAttention.mask(AttentionSpec(1.0, bias=True), bias.detach(), positions, positions)
        with pytest.raises(UserError, match='attention_backend=manual'):
            FlexAttention.mask(AttentionSpec(1.0, bias=True), bias, positions, positions)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_compiled_block_returns_the_gradient_of_a_learned_bias(monkeypatch):
    """In a graph with torch's own autograd, as on CUDA."""
    monkeypatch.setattr(torch_flex, '_validate_device', lambda *tensors: None)
    torch.compiler.reset()
    results = []
    for backend in ('flex', 'manual'):
        bias = {'position_encoding': 't5_relative', **SOFTCAP}
        config = tiny(**bias, n_layer=1, block_size=130, attention_backend=backend)
        model, tokens = perturbed_model(config), random_tokens(config, batch=2)
        model.blocks[0].compile(fullgraph=True, dynamic=False, backend='aot_eager')
        loss, *_ = model(tokens, tokens)
        loss.backward()
        results.append(gradients(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize(('case', 'kinds'), [('window', 2), ('documents', 1)])
def test_compiled_blocks_have_a_graph_per_kind(case, kinds, monkeypatch):
    """In evaluation and in training, whatever the documents of a batch."""
    monkeypatch.setattr(torch_flex, '_validate_device', lambda *tensors: None)
    config = tiny(**CASES[case], n_layer=3, block_size=130, attention_backend='flex')
    model, recorder = perturbed_model(config), EagerAndRecordGraphs()

    torch.compiler.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=recorder)
    for seed in range(2):
        tokens = random_tokens(config, batch=2, seed=seed)
        with torch.no_grad():
            model.eval()(tokens)
        assert len(recorder.graphs) == kinds * (2 if seed else 1)
        loss, *_ = model.train()(tokens, tokens)
        loss.backward()
        assert len(recorder.graphs) == kinds * 2
    torch.compiler.reset()


def test_eager_blocks_keep_their_graphs():
    """Samples and diagnostics run them with other lengths and hooks in between."""
    config = tiny(block_size=8)
    model, recorder = perturbed_model(config).eval(), EagerAndRecordGraphs()

    torch.compiler.reset()
    for block in model.blocks:
        block.compile(dynamic=False, backend=recorder)
    tokens = random_tokens(config, batch=2)
    with torch.no_grad():
        expected = model(tokens)
        with eager_blocks(model):
            handle = model.blocks[0].register_forward_hook(lambda *_: None)
            torch.testing.assert_close(model(tokens), expected)
            model(tokens[:, :3])
            handle.remove()
        assert len(recorder.graphs) == 1
        torch.testing.assert_close(model(tokens), expected)
    assert len(recorder.graphs) == 1
    torch.compiler.reset()
