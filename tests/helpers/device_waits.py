"""What would make the host wait for a GPU, seen on a CPU."""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result, or the shape of it, the host must read. (`index` with a mask is one too.)
READ_BY_HOST = {
    *('_local_scalar_dense', 'equal', 'is_nonzero', 'nonzero', 'nonzero_numpy', 'argwhere'),
    *('masked_select', '_unique', '_unique2', 'unique_dim', 'unique_consecutive', 'bincount'),
    *('repeat_interleave', 'histogram', 'linalg_lstsq', 'linalg_inv', 'linalg_solve'),
}
INDEXING = {'index', 'index_put', 'index_put_', '_index_put_impl_'}
# Calls that copy between host and device. On a CPU these copy nothing, so that no operation shows.
COPIES = {
    *('torch.Tensor.item', 'torch.Tensor.tolist', 'torch.Tensor.numpy', 'torch.Tensor.cpu'),
    *('torch.Tensor.__bool__', 'torch.Tensor.__float__', 'torch.Tensor.__int__'),
    *('torch.Tensor.__index__', 'torch.Tensor.__array__', 'torch.tensor', 'torch.as_tensor'),
}
# Operations without a kernel, besides views.
WITHOUT_KERNEL = {
    *('detach', '_unsafe_view', 'empty', 'empty_like', 'empty_strided', 'new_empty', 'alias'),
    *('new_empty_strided', 'lift_fresh'),
}


class Operations(TorchDispatchMode):
    """Counts operations by name: those with a kernel, and those that wait for the device."""

    def __init__(self):
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.calls = _Calls(self.waits)

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function._schema.name.rpartition('::')
        if namespace == 'aten' and (name in READ_BY_HOST or (name in INDEXING and _mask_in(args))):
            self.waits[name] += 1
        if not function.is_view and name not in WITHOUT_KERNEL:
            self.kernels[name] += 1
        return function(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Counts calls that copy between host and device."""

    def __init__(self, waits: Counter[str]):
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = resolve_name(function)
        if name in COPIES:
            self.waits[name] += 1
        return function(*args, **(kwargs or {}))


def _mask_in(arguments: tuple) -> bool:
    """Whether a tensor is indexed with a mask, whose number of elements the host must read."""
    indices = arguments[1] if len(arguments) > 1 else ()
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in indices)
