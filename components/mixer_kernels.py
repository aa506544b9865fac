"""Kernels of other packages for the recurrences of mixers, as a choice of `mixer_backend`.

A mixer names its kernels in `kernels`. Each is called through one custom operator, so that
`torch.compile` sees one node instead of a graph break, and FLOP counters see a formula. The
operator keeps its inputs only: the backward pass computes the kernel's forward pass again, and then
its gradients by the package's own backward pass.

Signatures and layouts are those of flash-linear-attention 0.6.0 and mamba_ssm 2.3.2.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import metadata
from importlib.util import find_spec
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from common.architecture_options import MIXER_BACKEND_REGISTRY, MIXER_REGISTRY
from common.errors import UserError
from common.registry import Option
from components.base import Component
from components.decayed_attention import decayed_attention_flops
from components.delta_rule import chunk_flops
from components.state_space_duality import matrix_flops
from model_config import ModelArchitectureConfig

DEVICES = ('cuda',)  # on which the kernels run
HALF = (torch.bfloat16, torch.float16)
SSD_CHUNK = 256  # tokens, as in the modules of mamba_ssm

# Of every mixer that has kernels.
BACKEND_OPTIONS = {
    'mixer_backend': Option(
        str,
        'torch',
        'Implementation of the recurrence in training: plain PyTorch, or kernels of a package that '
        'is installed',
        choices=MIXER_BACKEND_REGISTRY,
    )
}


# --------------------------------------------------------------------------------------------------
# The kernels. Their first input has the shape and the dtype of the output.


def _delta_rule(v, q, k, beta):
    from fla.ops.delta_rule import chunk_delta_rule

    q, k = _per_value_head(v, q, k)
    return chunk_delta_rule(q=q, k=k, v=v, beta=beta, scale=1.0)[0]


def _gated_delta_rule(v, q, k, beta, log_decay):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k = _per_value_head(v, q, k)
    return chunk_gated_delta_rule(q=q, k=k, v=v, g=log_decay, beta=beta, scale=1.0)[0]


def _kda(v, q, k, beta, log_decay):
    from fla.ops.kda import chunk_kda

    q, k = _per_value_head(v, q, k)
    return chunk_kda(q=q, k=k, v=v, g=log_decay, beta=beta, scale=1.0)[0]


def _per_value_head(v: torch.Tensor, *keys: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries or keys (B, T, Hk, D), repeated for the value heads that they serve."""
    return tuple(x.repeat_interleave(v.size(2) // x.size(2), dim=2) for x in keys)


def _gla(v, q, k, log_decay):
    from fla.ops.gla import chunk_gla

    return chunk_gla(q=q, k=k, v=v, g=log_decay, scale=1.0)[0]


def _simple_gla(v, q, k, log_decay=None):
    """log_decay: (H,)."""
    from fla.ops.simple_gla import chunk_simple_gla

    width = v.size(-1)
    v, q, k = (F.pad(x, (0, x.size(-1) % 2)) for x in (v, q, k))  # it refuses odd sizes
    return chunk_simple_gla(q=q, k=k, v=v, g_gamma=log_decay, scale=1.0)[0][..., :width]


def _state_space_duality(x, steps, rates, keys, queries, skip, documents=None):
    """rates A (H,), negative; documents (B, T): a number of each token's document, int32."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(
        x, steps, rates, keys, queries, chunk_size=SSD_CHUNK, D=skip, seq_idx=documents
    )


def _selective_scan(x, dt, decay, inputs, outputs):
    """As `components.scan.selective_scan`."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, dt, inputs, outputs = (each.mT.contiguous() for each in (x, dt, inputs, outputs))
    return selective_scan_fn(x, dt, decay.mT.contiguous(), inputs, outputs).mT


class Kernel(NamedTuple):
    """run: from the inputs to the output. flops: the FLOPs of its forward pass, from the shapes of
    the inputs. half: computes in half precision only. documents: can keep documents apart.
    """

    run: Callable[..., torch.Tensor]
    flops: Callable[..., float]
    half: bool = True
    documents: bool = False


def _delta_flops(v, q, *_, per_channel: bool = False) -> float:
    batch, tokens, heads, v_dim = v
    return batch * chunk_flops(tokens, q[2], heads, q[3], v_dim, per_channel)


def _decayed_flops(v, q, *_, by_channel: bool = False) -> float:
    batch, tokens, heads, v_dim = v
    return batch * decayed_attention_flops(tokens, heads, q[3], v_dim, by_channel)


def _duality_flops(x, steps, rates, keys, *_) -> float:
    batch, tokens, heads, head_dim = x
    return batch * matrix_flops(tokens, heads, head_dim, keys[2], keys[3], SSD_CHUNK)


def _scan_flops(x, dt, decay, *_) -> float:
    return 2.0 * x[0] * x[1] * decay[0] * decay[1]


KERNELS = {
    'delta_rule': Kernel(_delta_rule, _delta_flops),
    'gated_delta_rule': Kernel(_gated_delta_rule, _delta_flops),
    'kda': Kernel(_kda, partial(_delta_flops, per_channel=True)),
    'gla': Kernel(_gla, partial(_decayed_flops, by_channel=True)),
    'simple_gla': Kernel(_simple_gla, _decayed_flops),
    'state_space_duality': Kernel(_state_space_duality, _duality_flops, documents=True),
    'selective_scan': Kernel(_selective_scan, _scan_flops, half=False),
}


def runs_here(
    kernel: str | None, x: torch.Tensor, cache: object, starts: torch.Tensor | None
) -> bool:
    """Whether a kernel, if there is one, computes a mixer of x, which has the dtype of its matrix
    products.

    Where it cannot, plain PyTorch computes the same: on other devices, in other dtypes, with the
    state of earlier tokens, which no kernel takes here, and with documents.
    """
    if kernel is None or cache is not None or x.device.type not in DEVICES:
        return False
    chosen = KERNELS[kernel]
    return (not chosen.half or x.dtype in HALF) and (starts is None or chosen.documents)


def run_kernel(kernel: str, *inputs: torch.Tensor) -> torch.Tensor:
    """The kernel's output, in the shape and the dtype of the first input."""
    return _mixer_kernel(kernel, inputs)


# --------------------------------------------------------------------------------------------------
# The operator


@torch.library.custom_op('components::mixer_kernel', mutates_args=())
def _mixer_kernel(kernel: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return _call(kernel, inputs)


@_mixer_kernel.register_fake
def _(kernel, inputs):
    return torch.empty_like(inputs[0], memory_format=torch.contiguous_format)


@torch.library.custom_op('components::mixer_kernel_backward', mutates_args=())
def _mixer_kernel_backward(
    kernel: str, grad: torch.Tensor, inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Gradients of the inputs of floating point."""
    keys = torch._C.DispatchKey
    # Operators run below autograd, which the package's own backward pass needs.
    with (
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
        torch.enable_grad(),
    ):
        point = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        y = _call(kernel, point)
        differentiable = [x for x in point if x.requires_grad]
        gradients = torch.autograd.grad(y, differentiable, grad, materialize_grads=True)
    return [gradient.contiguous() for gradient in gradients]


@_mixer_kernel_backward.register_fake
def _(kernel, grad, inputs):
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in inputs
        if x.is_floating_point()
    ]


def _save(ctx, inputs, output):
    ctx.kernel, tensors = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):
    inputs = ctx.saved_tensors
    gradients = iter(_mixer_kernel_backward(ctx.kernel, grad, inputs))
    return None, [next(gradients) if x.is_floating_point() else None for x in inputs]


_mixer_kernel.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.components.mixer_kernel)
def _flops(kernel, shapes, **unused) -> int:
    return int(KERNELS[kernel].flops(*shapes))


@register_flop_formula(torch.ops.components.mixer_kernel_backward)
def _backward_flops(kernel, grad_shape, shapes, **unused) -> int:
    return 2 * int(KERNELS[kernel].flops(*shapes))


def _call(kernel: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The kernel's output, contiguous. Raises UserError if its package refuses the inputs."""
    if torch.are_deterministic_algorithms_enabled():
        raise UserError(
            'deterministic=True: kernels of other packages may add numbers in varying order. Set '
            '--mixer_backend=torch, or remove deterministic.'
        )
    try:
        return KERNELS[kernel].run(*inputs).contiguous()
    except (ImportError, AssertionError, ValueError) as error:
        raise UserError(
            f'The package with the kernel {kernel!r} refuses it: {type(error).__name__}: {error} '
            f'Set --mixer_backend=torch.'
        ) from error


# --------------------------------------------------------------------------------------------------
# The choices


@cache
def installed_version(package: str) -> tuple[int, ...]:
    """Of the project whose package is imported by this name; () if none is installed."""
    if find_spec(package) is None:
        return ()
    projects = metadata.packages_distributions().get(package, [])
    numbers = re.findall(r'\d+', metadata.version(projects[0])) if projects else []
    return tuple(map(int, numbers[:2])) or (0, 0)


def find_kernel(kernels: dict[str, str], config: ModelArchitectureConfig) -> str | None:
    """The kernel of a mixer, of those of all backends; None without one or without its package."""
    name = config.get('mixer_backend')
    kernel = kernels.get(name)
    return kernel if kernel and MIXER_BACKEND_REGISTRY[name].is_installed() else None


def backend_tag(config: ModelArchitectureConfig) -> str:
    """The end of a mixer's part of the architecture's name: '-FLA', or '' for plain PyTorch."""
    tag = MIXER_BACKEND_REGISTRY[config.mixer_backend].tag
    return tag and f'-{tag}'


class MixerBackend(Component):
    """What computes the recurrences of mixers. Never instantiated."""

    package: ClassVar[str] = ''  # that is imported
    project: ClassVar[str] = ''  # under which pip installs it
    least: ClassVar[tuple[int, int]] = (0, 0)  # version; earlier ones have other signatures

    @classmethod
    def is_installed(cls) -> bool:
        return installed_version(cls.package) >= cls.least

    @classmethod
    def kernels_of(cls, config: ModelArchitectureConfig) -> dict[str, str | None]:
        """The kernel of each mixer of a layer, if there is one; without mixers that have none of
        any backend."""
        mixers = MIXER_REGISTRY.components(config.mixer)
        return {
            name: mixer.kernels.get(config.mixer_backend)
            for name, mixer in mixers.items()
            if mixer.kernels
        }

    @classmethod
    def problems(cls, config: ModelArchitectureConfig) -> list[str]:
        if not cls.package:
            return []
        problems, chosen = [], f'mixer_backend={config.mixer_backend!r}'
        for mixer, kernel in cls.kernels_of(config).items():
            if kernel is None:
                able = ' or '.join(('torch', *MIXER_REGISTRY[mixer].kernels))
                problems.append(
                    f'{chosen} has no kernel for mixer={mixer!r}. Set --mixer_backend={able}.'
                )
            elif config.document_mask and not KERNELS[kernel].documents:
                problems.append(
                    f'{chosen} cannot keep documents apart in mixer={mixer!r}. Set '
                    f'--mixer_backend=torch or --document_mask=False.'
                )
        return problems

    @classmethod
    def training_problems(cls, config: ModelArchitectureConfig, device: str) -> list[str]:
        if not cls.package:
            return []
        chosen = f'mixer_backend={config.mixer_backend!r}'
        if device not in DEVICES:
            return [f'{chosen} has kernels for CUDA, not for {device}. Set --mixer_backend=torch.']
        # Without a GPU, training is only planned.
        if cls.is_installed() or not torch.cuda.is_available():
            return []
        least, installed = (
            '.'.join(map(str, v)) for v in (cls.least, installed_version(cls.package))
        )
        return [
            f'{chosen} needs {cls.project} {least} or later, and '
            f'{f"{installed} is" if installed else "it is not"} installed. Run pip install '
            f"'{cls.project}>={least}', or set --mixer_backend=torch."
        ]

    @classmethod
    def dtype_problems(cls, config: ModelArchitectureConfig, dtype: str) -> list[str]:
        kernels = cls.kernels_of(config).values() if cls.package else ()
        if not any(k and KERNELS[k].half for k in kernels) or getattr(torch, dtype) in HALF:
            return []
        return [
            f'mixer_backend={config.mixer_backend!r} computes in bfloat16 or float16, but '
            f'dtype={dtype!r}. Set --dtype=bfloat16 or --mixer_backend=torch.'
        ]


MIXER_BACKEND_REGISTRY.expect(MixerBackend)


@MIXER_BACKEND_REGISTRY.register('torch')
class PlainPyTorch(MixerBackend):
    """Plain PyTorch, on any device, in fp32."""

    tag = ''


@MIXER_BACKEND_REGISTRY.register('fla', source='flash-linear-attention: Yang & Zhang 2024')
class FlashLinearAttention(MixerBackend):
    """Kernels of flash-linear-attention, on CUDA, in half precision with states in fp32."""

    tag, package, project = 'FLA', 'fla', 'flash-linear-attention'
    least = (0, 6)


@MIXER_BACKEND_REGISTRY.register('mamba_ssm', source='Gu & Dao 2023; Dao & Gu 2024')
class MambaKernels(MixerBackend):
    """Kernels of mamba_ssm, on CUDA; those of `mamba2` in half precision with states in fp32."""

    tag, package, project = 'MambaSSM', 'mamba_ssm', 'mamba-ssm'
    least = (2, 3)
