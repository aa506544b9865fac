"""Stand-ins for the packages with kernels, with their signatures, as plain loops over tokens.

Signatures, layouts and defaults are those of flash-linear-attention 0.6.0 and mamba_ssm 2.3.2. Each
takes only the arguments that it computes with; others of the package are left out, so that passing
one fails. A call is listed in `calls`.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
import torch.nn as nn

from components import mixer_kernels
from components.base import at_least_fp32
from helpers.architectures import perturbed_model, tiny
from helpers.mixers import random_inputs
from model_builder import build_model
from model_config import ModelArchitectureConfig

FUNCTIONS = {}  # (module, name) -> function
calls: list[tuple[str, dict[str, torch.dtype]]] = []  # (name, dtypes of the tensors)


def of_package(module):
    def add(function):
        @functools.wraps(function)
        def listed(*args, **kwargs):
            names = function.__code__.co_varnames
            tensors = {**dict(zip(names, args)), **kwargs}
            dtypes = {k: x.dtype for k, x in tensors.items() if isinstance(x, torch.Tensor)}
            calls.append((function.__name__, dtypes))
            return function(*args, **kwargs)

        FUNCTIONS[module, function.__name__] = listed
        return listed

    return add


def scaled(q, scale):
    return at_least_fp32(q) * (q.size(-1) ** -0.5 if scale is None else scale)


def delta_loop(q, k, v, beta, log_decay):
    """q, k (B, T, H, K), v (B, T, H, V), beta (B, T, H), log_decay (B, T, H, K or 1)."""
    dtype, k, v = v.dtype, at_least_fp32(k), at_least_fp32(v)
    state, outputs = v.new_zeros(v.size(0), v.size(2), k.size(-1), v.size(-1)), []
    for t in range(v.size(1)):
        state = state * log_decay[:, t].exp()[..., None]
        read = torch.einsum('bhk,bhkv->bhv', k[:, t], state)
        new = beta[:, t, :, None] * (v[:, t] - read)
        state = state + torch.einsum('bhk,bhv->bhkv', k[:, t], new)
        outputs.append(torch.einsum('bhk,bhkv->bhv', q[:, t], state))
    return torch.stack(outputs, dim=1).to(dtype)


def decay_loop(q, k, v, log_decay):
    """As `delta_loop`, of a state to which tokens are added."""
    dtype, k, v = v.dtype, at_least_fp32(k), at_least_fp32(v)
    state, outputs = v.new_zeros(v.size(0), v.size(2), k.size(-1), v.size(-1)), []
    for t in range(v.size(1)):
        state = state * log_decay[:, t].exp()[..., None]
        state = state + torch.einsum('bhk,bhv->bhkv', k[:, t], v[:, t])
        outputs.append(torch.einsum('bhk,bhkv->bhv', q[:, t], state))
    return torch.stack(outputs, dim=1).to(dtype)


@of_package('fla.ops.delta_rule')
def chunk_delta_rule(q, k, v, beta, scale=None):
    assert q.dtype == k.dtype == v.dtype and q.shape == k.shape and q.shape[:3] == v.shape[:3]
    return delta_loop(scaled(q, scale), k, v, beta, torch.zeros_like(beta)[..., None]), None


@of_package('fla.ops.gated_delta_rule')
def chunk_gated_delta_rule(q, k, v, g, beta, scale=None):
    assert q.dtype == k.dtype == v.dtype and q.shape == k.shape and q.shape[:3] == v.shape[:3]
    return delta_loop(scaled(q, scale), k, v, beta, g[..., None]), None


@of_package('fla.ops.kda')
def chunk_kda(q, k, v, g, beta, scale=None):
    assert q.shape == k.shape == g.shape and beta.shape == v.shape[:3]
    return delta_loop(scaled(q, scale), k, v, beta, g), None


@of_package('fla.ops.gla')
def chunk_gla(q, k, v, g, scale=None):
    assert q.shape == k.shape == g.shape and v.shape[:3] == q.shape[:3]
    return decay_loop(scaled(q, scale), k, v, g), None


@of_package('fla.ops.simple_gla')
def chunk_simple_gla(q, k, v, g_gamma=None, scale=None):
    assert k.size(-1) % 2 == v.size(-1) % 2 == 0
    heads = v.new_zeros(v.size(2)) if g_gamma is None else g_gamma
    log_decay = heads.expand(v.shape[:3])[..., None]
    return decay_loop(scaled(q, scale), k, v, log_decay), None


@of_package('mamba_ssm.ops.triton.ssd_combined')
def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, seq_idx=None):
    assert x.dtype == B.dtype == C.dtype and A.shape == D.shape == x.shape[2:3]
    batch, tokens, heads, head_dim = x.shape
    dtype, x, B, C = x.dtype, *map(at_least_fp32, (x, B, C))
    keys, queries = (each.repeat_interleave(heads // each.size(2), dim=2) for each in (B, C))
    state, outputs = x.new_zeros(batch, heads, head_dim, B.size(-1)), []
    for t in range(tokens):
        state = state * (dt[:, t] * A).exp()[..., None, None]
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        added = (dt[:, t, :, None] * x[:, t])[..., None] * keys[:, t, :, None]
        state = state + added
        outputs.append((state * queries[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1).to(dtype)


@of_package('mamba_ssm.ops.selective_scan_interface')
def selective_scan_fn(u, delta, A, B, C):
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert u.stride(-1) == delta.stride(-1) == 1 or u.size(-1) == 1
    state, outputs = u.new_zeros(*u.shape[:2], A.size(1)), []  # (B, D, N)
    for t in range(u.size(-1)):
        step = delta[..., t, None]
        state = state * (step * A).exp() + step * u[..., t, None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    return torch.stack(outputs, dim=-1).to(u.dtype)


@contextmanager
def kernels_on_cpu(*dtypes: torch.dtype) -> Iterator[None]:
    """Install the stand-ins, and let mixers use them on a CPU, in these dtypes."""
    modules: dict[str, ModuleType] = {}
    for (path, name), function in FUNCTIONS.items():
        parts = path.split('.')
        for depth in range(1, len(parts) + 1):
            full = '.'.join(parts[:depth])
            module = modules.setdefault(full, ModuleType(full))
            module.__path__ = []
        setattr(modules[path], name, function)
    with pytest.MonkeyPatch.context() as patch:
        for full, module in modules.items():
            patch.setitem(sys.modules, full, module)
        patch.setattr(mixer_kernels, 'DEVICES', ('cpu',))
        patch.setattr(mixer_kernels, 'HALF', dtypes)
        patch.setattr(mixer_kernels, 'installed_version', lambda package: (9, 9))
        calls.clear()
        yield


# --- Mixers with them ----------------------------------------------------------------------------

FLA, MAMBA = 'fla', 'mamba_ssm'
# Mixers with options, and the function of the package that computes them.
CASES = {
    'deltanet': (FLA, {'gdn_negative_eigenvalues': True}, 'chunk_delta_rule'),
    'deltanet, groups': (FLA, {'gdn_heads': 2, 'gdn_value_heads': 4}, 'chunk_delta_rule'),
    'gated_deltanet': (FLA, {'gdn_v_head_dim': 6}, 'chunk_gated_delta_rule'),
    'gated_deltanet, groups': (
        FLA,
        {'gdn_heads': 2, 'gdn_value_heads': 4},
        'chunk_gated_delta_rule',
    ),
    'kda': (FLA, {}, 'chunk_kda'),
    'kda, groups': (FLA, {'gdn_heads': 2, 'gdn_value_heads': 4}, 'chunk_kda'),
    'gla': (FLA, {'gla_conv_size': 3}, 'chunk_gla'),
    'linear_attention': (FLA, {}, 'chunk_simple_gla'),
    'linear_attention, odd': (
        FLA,
        {'linear_normalizer': 'rmsnorm', 'linear_key_dim': 3, 'linear_value_dim': 5},
        'chunk_simple_gla',
    ),
    'retnet': (FLA, {}, 'chunk_simple_gla'),
    'lightning_attention': (FLA, {}, 'chunk_simple_gla'),
    'mamba': (MAMBA, {'mamba_norm': 'weighted', 'mamba_dt_rank': 4}, 'selective_scan_fn'),
    'mamba2': (MAMBA, {'mamba2_groups': 2, 'mamba2_dt_max': 0.05}, 'mamba_chunk_scan_combined'),
}


def both_configs(case: str, **values) -> tuple[ModelArchitectureConfig, ModelArchitectureConfig]:
    """The architecture of plain PyTorch and that with kernels."""
    backend, options, _ = CASES[case]
    options = {'mixer': case.partition(',')[0], 'block_size': 24, **options, **values}
    return tiny(**options), tiny(**options, mixer_backend=backend)


def both_modules(case: str, dtype=torch.float64, **values) -> list[nn.Module]:
    """The mixers, with the same weights that are not the initial ones."""
    plain, kernels = both_configs(case, **values)
    (module,) = perturbed_model(plain, factor=3.0).blocks[0].mixers.values()
    (other,) = build_model(kernels, 'cpu', seed=1).blocks[0].mixers.values()
    other.load_state_dict(module.state_dict())
    if hasattr(module, 'log_decays'):
        other.log_decays.copy_(module.log_decays)
    return [module.to(dtype).eval(), other.to(dtype).eval()]


def results(module, x, inputs):
    x = x.clone().requires_grad_()
    y = module(x, inputs)
    target = random_inputs(*y.shape, seed=1, dtype=y.dtype)
    point = [x, *module.parameters()]
    return y, torch.autograd.grad((y * target).sum(), point, allow_unused=True)
