"""The checks that every mixer meets: `check_…(mixer)`, by the name of the mixer."""

import contextlib
import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.backends.registry import lookup_backend
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from components.checks import flops_disagreements
from components.weight_initialization import initial_values
from components.width_rules import mup_problems
from helpers.architectures import (
    changes_after_updates,
    gradients,
    perturbed_model,
    random_tokens,
    tiny,
)
from helpers.mixers import (
    END,
    LENGTH,
    SMALL_CHUNK,
    mixer_config,
    mixer_module,
    random_inputs,
    random_starts,
    small_chunks,
    split_randomly,
    variants,
    with_starts,
)
from inference.generate import generate
from model_builder import (
    build_model,
    count_parameters,
    flops_by_part,
    parameter_groups,
    training_flops,
)
from model_components import AttentionInputs
from model_config import MIXER_REGISTRY
from parallel import strategies
from parallel.autocast import parameters_cast_by_autocast

WIDTH = 16


def both_masks(batch: int, length: int) -> list[torch.Tensor | None]:
    """The starts of documents: without document_mask, and with it."""
    return [None, random_starts(batch, length)]


# --- Values ---------------------------------------------------------------------------------------


@small_chunks()
@torch.no_grad()
def check_causal(mixer):
    """A token changes its own output and that of the next one of its document, and no earlier
    outputs, no other documents and no other sequences."""
    x = random_inputs(1, LENGTH, WIDTH)
    changed = x.repeat(LENGTH, 1, 1)  # row t: token t is changed
    changed[range(LENGTH), range(LENGTH)] += random_inputs(1, LENGTH, WIDTH, seed=1)[0]
    for config in variants(mixer):
        module = mixer_module(config)
        for starts in both_masks(1, LENGTH):
            ids = torch.zeros(LENGTH) if starts is None else starts[0].cumsum(dim=0)
            visible = (ids[:, None] == ids).triu()  # (changed token, token)
            every = None if starts is None else starts.expand(LENGTH, -1)
            expected = module(x, with_starts(starts))
            moved = (module(changed, with_starts(every)) - expected).abs().amax(dim=-1)
            assert moved[~visible].max() < 1e-12, config.name
            assert moved.diagonal().min() > 1e-6, config.name
            assert moved.diagonal(1)[visible.diagonal(1)].min() > 1e-9, config.name


@small_chunks()
@torch.no_grad()
def check_pieces(mixer):
    """Calls with parts of a sequence and a state equal one call with all of it."""
    x = random_inputs(3, LENGTH, WIDTH)
    sizes = [[1] * LENGTH, [1, LENGTH - 1], [LENGTH - 1, 1]]
    sizes += [split_randomly(LENGTH, seed) for seed in range(3)]
    for config in variants(mixer):
        module = mixer_module(config)
        assert module.cacheable
        for starts in both_masks(3, LENGTH):
            expected = module(x, with_starts(starts))
            for split in sizes:
                cache, outputs, begin = module.empty_cache(LENGTH), [], 0
                for size in split:
                    part = slice(begin, begin + size)
                    of_part = with_starts(None if starts is None else starts[:, part], cache)
                    outputs.append(module(x[:, part], of_part))
                    begin += size
                torch.testing.assert_close(
                    torch.cat(outputs, dim=1), expected, rtol=1e-9, atol=1e-10, msg=config.name
                )


@small_chunks()
@torch.no_grad()
def check_documents(mixer):
    """The output of a document is that of the document alone, and that of a sequence is that of
    the sequence alone."""
    x, starts = random_inputs(3, LENGTH, WIDTH), random_starts(3, LENGTH)
    for config in variants(mixer):
        module = mixer_module(config)
        packed = module(x, with_starts(starts))
        for row, row_starts, y in zip(x, starts, packed):
            pairs = itertools.pairwise([*row_starts.nonzero().flatten().tolist(), LENGTH])
            alone = [module(row[None, a:b], AttentionInputs())[0] for a, b in pairs]
            torch.testing.assert_close(torch.cat(alone), y, rtol=1e-9, atol=1e-10, msg=config.name)


@torch.no_grad()
def check_lengths(mixer):
    """A shorter sequence has the first outputs of a longer one, around the real size of chunks."""
    for config in variants(mixer)[:3]:
        module = mixer_module(config)
        x = random_inputs(2, 133, WIDTH)
        starts = random_starts(2, 133)
        whole = module(x, with_starts(starts))
        for length in (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 128):
            part = module(x[:, :length], with_starts(starts[:, :length]))
            torch.testing.assert_close(part, whole[:, :length], rtol=1e-9, atol=1e-10)


@small_chunks()
def check_gradients_of_values(mixer):
    """Gradients of the input and all weights equal differences, in random directions."""
    x = random_inputs(2, LENGTH, WIDTH).requires_grad_()
    inputs, step = with_starts(random_starts(2, LENGTH)), 1e-6
    for config in variants(mixer):
        module = mixer_module(config)
        names = [name for name, _ in module.named_parameters()]
        point = [x, *module.parameters()]

        def value(x, *weights, module=module, names=names):
            y = functional_call(module, dict(zip(names, weights)), (x, inputs))
            return (y * random_inputs(2, LENGTH, WIDTH, seed=5)).sum()

        actual = torch.autograd.grad(value(*point), point)
        assert all(gradient.dtype == torch.float64 for gradient in actual)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in point]
            with torch.no_grad():
                ahead, behind = (
                    value(*(p + sign * step * way for p, way in zip(point, ways)))
                    for sign in (1, -1)
                )
            expected = sum((gradient * way).sum() for gradient, way in zip(actual, ways))
            torch.testing.assert_close(
                (ahead - behind) / (2 * step), expected, rtol=1e-5, atol=1e-6, msg=config.name
            )


# --- Precision ------------------------------------------------------------------------------------


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def check_float32(mixer):
    """Outputs and gradients in fp32 are close to those in double precision, in chunks of the real
    size."""
    x, starts = random_inputs(2, 150, WIDTH), random_starts(2, 150)
    for config in variants(mixer):
        results = []
        for dtype in (torch.float32, torch.float64):
            module, own_x = mixer_module(config, dtype), x.to(dtype).requires_grad_()
            y = module(own_x, with_starts(starts))
            assert y.dtype == dtype
            weights = random_inputs(*y.shape, seed=1, dtype=dtype)
            actual = torch.autograd.grad(y, [own_x, *module.parameters()], weights)
            results.append([y.detach(), *actual])
        for single, double in zip(*results):
            assert relative_error(single.double(), double) < 2e-4, config.name


@small_chunks()
@torch.no_grad()
def check_bfloat16(mixer):
    """Autocast gives bfloat16 close to fp32, with an fp32 state (convolutions: inputs)."""
    for config in variants(mixer):
        module = mixer_module(config, torch.float32)
        x = random_inputs(2, 40, WIDTH, dtype=torch.float32)
        expected = module(x, AttentionInputs())
        cache = module.empty_cache(40)
        with torch.autocast('cpu', torch.bfloat16):
            y = module(x, AttentionInputs())
            pieces = [module(each, with_starts(None, cache)) for each in x.split([5, 1, 34], dim=1)]
        assert y.dtype == pieces[0].dtype == torch.bfloat16
        assert relative_error(y, expected) < 0.03, config.name
        assert relative_error(torch.cat(pieces, dim=1), expected) < 0.03, config.name
        wrong = {n for n, each in cache.tensors.items() if each.dtype != torch.float32}
        assert all('conv' in name for name in wrong), wrong


class RoundedProducts(TorchFunctionMode):
    """Rounds operands and results of products with parameters to bfloat16, and nothing else."""

    PRODUCTS = F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in self.PRODUCTS or not any(isinstance(x, nn.Parameter) for x in args):
            return func(*args, **(kwargs or {}))
        return self.rounded(func(*map(self.rounded, args), **(kwargs or {})))

    @staticmethod
    def rounded(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.bfloat16().float()


def check_bfloat16_gradients(mixer):
    """Gradients under autocast are as close to those in fp32 as if only the products with weights
    were rounded.

    How close that is depends on the mixer: a norm of heads or keys near 0 magnifies all errors. So
    the errors are compared, by the median of three inputs; those of a single rounding do not count.
    """
    ratios = []
    for config in variants(mixer):
        module = mixer_module(config, torch.float32)
        errors = [errors_of_gradients(module, seed) for seed in range(3)]
        actual, unavoidable = torch.tensor(errors).median(dim=0).values.clamp(min=2**-9)
        assert (actual < 4 * unavoidable).all(), (config.name, actual, unavoidable)
        ratios.append(actual / unavoidable)
    assert torch.cat(ratios).log().mean().exp() < 1.25


def errors_of_gradients(module: nn.Module, seed: int) -> list[list[float]]:
    """Relative errors of the gradients of the input and each parameter: under autocast, and with
    rounded products."""
    results = []
    autocast = torch.autocast('cpu', torch.bfloat16)
    for context in (contextlib.nullcontext(), autocast, RoundedProducts()):
        x = random_inputs(2, 40, WIDTH, seed, torch.float32).requires_grad_()
        with context:
            y = module(x, AttentionInputs())
        results.append(torch.autograd.grad(y.float().square().mean(), [x, *module.parameters()]))
    expected, *others = results
    return [[relative_error(a, b) for a, b in zip(other, expected)] for other in others]


def check_parameters_in_bfloat16(mixer):
    """Under autocast, hidden matrices and biases of their products are rounded, and vectors of the
    state and of norms are not."""
    config = mixer_config(mixer)
    model, cast = build_model(config), parameters_cast_by_autocast(config)
    matrices = {id(p) for p in parameter_groups(model)[0].parameters}
    for name, parameter in model.blocks[0].mixers.named_parameters():
        is_cast = f'blocks.0.mixers.{name}' in cast
        assert is_cast or id(parameter) not in matrices, name
        assert not is_cast or parameter.dim() > 1 or name.endswith('bias'), name


@small_chunks()
def check_extremes(mixer):
    """Finite outputs and gradients of inputs fifty times as large."""
    for config in variants(mixer):
        module = mixer_module(config, torch.float32)
        x = (50 * random_inputs(2, 40, WIDTH, dtype=torch.float32)).requires_grad_()
        for autocast in (False, True):
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                y = module(x, with_starts(random_starts(2, 40)))
            actual = torch.autograd.grad(y.float().square().mean(), [x, *module.parameters()])
            assert all(each.isfinite().all() for each in (y, *actual)), config.name


# --- The whole model ------------------------------------------------------------------------------


@small_chunks()
def check_gradients(mixer):
    """Every parameter has a finite gradient that is not zero."""
    for config in variants(mixer):
        model, tokens = perturbed_model(config, factor=3.0), random_tokens(config, batch=4)
        loss, count, _ = model(tokens, tokens.roll(-1, dims=1))
        (loss / count).backward()
        for name, gradient in gradients(model).items():
            assert gradient is not None and gradient.isfinite().all(), name
            assert gradient.count_nonzero(), (name, config.name)


@small_chunks()
@torch.no_grad()
def check_generation(mixer):
    """Text with a cache equals text without, also beyond the context; the cache's bytes are those
    that its tensors hold, as many after one token as after all."""
    config = mixer_config(mixer)
    model, length = perturbed_model(config, factor=3.0).eval(), config.block_size
    tokens = random_tokens(config, batch=3)
    assert (tokens == END).any(dim=1).any()
    assert model.uncacheable == []
    expected = model(tokens)
    for seed in range(2):
        cache, numbers, logits = model.empty_cache(length), set(), []
        for piece in tokens.split(split_randomly(length, seed), dim=1):
            logits.append(model(piece, cache=cache))
            held = [tensor for state in states_of(cache) for tensor in state.tensors.values()]
            numbers.add(cache.nbytes)
            assert cache.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in held)
        assert len(numbers) == 1
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)
    texts = [
        torch.stack(list(generate(model, tokens[:, :4], 26, choose=sampler(), cache=cached)))
        for cached in (True, False)
    ]
    assert torch.equal(*texts) and len(texts[0].unique()) > 1


def states_of(cache) -> list:
    return [state for states in cache.layers for state in states.values()]


def sampler():
    """Draws tokens, the same ones in each text. (Those of the largest logits may all be alike.)"""
    generator = torch.Generator().manual_seed(0)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        gumbel = -torch.rand(logits.shape, generator=generator).log().neg().log()
        return (logits + gumbel).argmax(dim=-1)

    return choose


def check_flops(mixer):
    """FLOPs equal PyTorch's count, and those of the recurrent form grow with the length."""
    for number, config in enumerate(variants(mixer)):
        model = build_model(config)
        (module,) = model.blocks[0].mixers.values()
        for length in (65,) if number else (1, 5, 63, 64, 65, 150):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                module(torch.empty(1, length, WIDTH, device='meta'), AttentionInputs())
            counted = counter.get_total_flops()
            declared = sum(module.flops(length, False).values())
            assert declared == pytest.approx(counted, rel=0.03), (config.name, length)
            recurrent, of_one = module.flops(length, True), module.flops(1, True)
            assert recurrent == pytest.approx({k: v * length for k, v in of_one.items()})
            assert recurrent.keys() <= {'mixer_projections', 'mixer_states'}
        assert flops_disagreements(model) == []


def check_counts(mixer):
    """Parameters and FLOPs add up over the parts."""
    for config in variants(mixer):
        model = build_model(config)
        info, flops = count_parameters(model), training_flops(model)
        of_mixers = sum(p.numel() for b in model.blocks for p in b.mixers.parameters())
        assert info['components']['mixer'] == of_mixers
        assert 'other' not in info['components'] and 'attention' not in info['components']
        assert sum(flops['breakdown'].values()) == flops['per_token']
        assert flops['breakdown_causal'].get('mixer_projections')
        parts = flops_by_part(model, True)
        assert parts == flops['breakdown_causal'] and 'other' not in parts
        assert flops['elementwise_per_token'] > 0


def check_initialization(mixer):
    """Every tensor is initialized, the same in two builds; every parameter is in one group."""
    for config in variants(mixer):
        model, again = (build_model(config, 'cpu', seed=1) for _ in range(2))
        parameters = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        assert set(initial_values(model)) == {*parameters, *buffers}
        for tensors, others in (
            (parameters, again.named_parameters()),
            (buffers, again.named_buffers()),
        ):
            assert all(torch.equal(tensors[name], other) for name, other in others)
            assert all(tensor.isfinite().all() for tensor in tensors.values())
        grouped = [id(p) for group in parameter_groups(model) for p in group.parameters]
        assert sorted(grouped) == sorted(id(p) for p in parameters.values())
        (module,) = model.blocks[0].mixers.values()
        written = {id(weight) for weight in module.residual_weights()}
        assert written and written <= {id(p) for p in module.parameters()}
        linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
        assert linear <= {id(p) for p in parameter_groups(model)[0].parameters}


def check_mup(mixer):
    """The coordinate check of Yang et al. 2022, appendix D.1, if the mixer states the rule."""
    if not MIXER_REGISTRY[mixer].mup_rule:
        return
    narrow, wide = 32, 256
    values = {'mixer': mixer, 'arch_preset': 'llama', 'block_size': 16, 'vocab_size': 64}
    mup = {'initialization': 'mup', 'mup_base_width': narrow}
    for heads in (wide // 16, narrow // 16):  # as many of the same size, or as few that grow
        configs = (
            tiny(**values, n_head=narrow // 16, n_embd=narrow),
            tiny(**values, n_head=heads, n_embd=wide, **mup),
        )
        if not (problems := mup_problems(*map(build_model, configs))):
            break
    assert not problems
    for at_base, under_mup in zip(*map(changes_after_updates, configs)):
        assert 1 / 3 < under_mup / at_base < 3


@small_chunks()
@torch.no_grad()
def check_beside_attention(mixer):
    """Mixers in parallel are added, and have the weights that they have alone, except for the scale
    of what is written into the residual stream."""
    model, alone = (
        build_model(mixer_config(name), 'cpu', seed=1) for name in (f'attention+{mixer}', mixer)
    )
    block, module = model.blocks[0], alone.blocks[0].mixers[mixer]
    written = {id(weight) for weight in module.residual_weights()}
    for name, parameter in module.named_parameters():
        if id(parameter) not in written:
            assert torch.equal(block.mixers[mixer].get_parameter(name), parameter), name
    x = random_inputs(2, LENGTH, WIDTH, dtype=torch.float32)
    inputs = model.attention_inputs(torch.arange(LENGTH))[0]
    expected = block.attention(x, inputs) + block.mixers[mixer](x, AttentionInputs())
    torch.testing.assert_close(block.mix(x, inputs), expected)
    block.mixers[mixer].load_state_dict(module.state_dict())
    torch.testing.assert_close(
        block.mix(x, inputs) - block.attention(x, inputs), module(x, AttentionInputs())
    )


@small_chunks()
@torch.no_grad()
def check_dropout(mixer):
    """Dropout acts on what the mixer adds to the residual stream, in training only."""
    config = mixer_config(mixer, ffn_type='none', residual_dropout=0.5)
    block = perturbed_model(config).blocks[0]
    x = random_inputs(2, LENGTH, WIDTH, dtype=torch.float32)
    full = block.eval()(x, AttentionInputs())[0] - x
    torch.manual_seed(0)
    dropped = block.train()(x, AttentionInputs())[0] - x
    is_zero = dropped == 0
    assert 0.3 < is_zero.float().mean() < 0.7
    torch.testing.assert_close(dropped, full.where(~is_zero, 0) * 2, rtol=1e-3, atol=1e-4)


@small_chunks()
def check_compiles(mixer):
    """Equal layers share one graph without breaks, and give eager gradients."""
    config = mixer_config(mixer, n_layer=3, block_size=SMALL_CHUNK + 2)
    plain, model = (perturbed_model(config, factor=3.0) for _ in range(2))
    graphs, aot_eager, compile_module = [], lookup_backend('aot_eager'), nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    tokens = random_tokens(config, batch=2)
    with pytest.MonkeyPatch.context() as patch:
        compiled = {'backend': backend, 'fullgraph': True}
        patch.setattr(nn.Module, 'compile', lambda s, **kw: compile_module(s, **kw, **compiled))
        torch.compiler.reset()
        with torch._dynamo.config.patch(optimize_ddp=True):
            strategies.prepare_blocks(model, [], compiled=True)
            model.output_head.compiled = False
            for one in (plain, model):
                one(tokens).square().mean().backward()
        torch.compiler.reset()
    assert len(graphs) == 1
    expected = gradients(plain)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])
