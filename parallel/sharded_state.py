"""Saving and restoring weights and optimizer state, independent of how they are sharded.

Each rank writes its shards: `{'model': {name: tensor}, 'optimizer': {name: {key: tensor}},
'offsets': {...}, 'scaler': {...}}`, where an offset is the first element of the shard in the
flattened parameter. Every strategy can read the shards of every other, parameter by parameter.
"""

import contextlib
import weakref
from collections.abc import Callable
from itertools import accumulate

import torch

from common.tensors import local_tensor
from components.base import saved_tensors
from model_builder import Transformer
from optim.step import GuardedOptimizer
from parallel.strategies import ParamShard, SingleProcess, buffer_shards


def no_copy(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors themselves, for writing before the next iteration."""
    # A part of a buffer is cloned, since torch.save would write the whole buffer.
    return [t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for t in tensors]


class HostStaging:
    """Copies in host memory, which training does not change; later copies reuse the memory.

    All are cut from one buffer, which is pinned for a GPU: allocations of torch's own pinned
    memory are rounded up to powers of two. Copies from a GPU are complete when the device has been
    synchronized.
    """

    alignment = 64  # bytes; a cache line

    def __init__(self, device: torch.device, report: Callable[[str], None]):
        """report: called with a note if the memory cannot be pinned."""
        self.device, self.report = device, report
        self.layout: list[tuple[torch.dtype, torch.Size]] = []
        self.copies: list[torch.Tensor] = []

    def __call__(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """A copy of each tensor. All calls but the first usually have the same sizes."""
        layout = [(tensor.dtype, tensor.shape) for tensor in tensors]
        if layout != self.layout:
            self._allocate(tensors)
            self.layout = layout
        for copy, tensor in zip(self.copies, tensors):
            copy.copy_(tensor, non_blocking=True)
        return self.copies

    def _allocate(self, tensors: list[torch.Tensor]) -> None:
        ends = list(accumulate(-(-t.nbytes // self.alignment) * self.alignment for t in tensors))
        buffer = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8)
        if self.device.type == 'cuda' and buffer.nbytes:
            self._pin(buffer)
        # By numpy, so that each has a storage of its own size: torch.save writes whole storages.
        content, begins = buffer.numpy(), [0, *ends]
        self.copies = [
            torch.from_numpy(content[begin : begin + tensor.nbytes])
            .view(tensor.dtype)
            .view(tensor.shape)
            for begin, tensor in zip(begins, tensors)
        ]

    def _pin(self, buffer: torch.Tensor) -> None:
        """Pin the buffer until it is freed; without success, the copies wait for the device."""
        cuda, address = torch.cuda.cudart(), buffer.data_ptr()
        error = int(cuda.cudaHostRegister(address, buffer.nbytes, 0))
        if error == 0:
            unpin = weakref.finalize(buffer.untyped_storage(), cuda.cudaHostUnregister, address)
            unpin.atexit = False  # the driver may be gone by then
            return
        # The next kernel would report the error as its own: launch one here.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.device)
        self.report(
            f'async_save: {buffer.nbytes / 1e9:.1f} GB of host memory for copies of checkpoints '
            f'could not be pinned (CUDA error {error}), so that training stops longer for them.'
        )


def collect(
    parallel: SingleProcess,
    model: Transformer,
    optimizer: GuardedOptimizer,
    snapshot: Callable[[list[torch.Tensor]], list[torch.Tensor]] = no_copy,
) -> dict:
    """The state that this rank writes, of tensors copied by `snapshot`."""
    saves_weights, saves_optimizer = parallel.saves
    weights = parallel.weight_shards(model) if saves_weights else {}
    weights |= buffer_shards(model) if parallel.is_main else {}  # each rank has them whole
    optimized = parallel.optimizer_shards(model) if saves_optimizer else {}
    shapes = {name: tensor.shape for name, tensor in saved_tensors(model).items()}

    def shaped(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(shapes[name]) if tensor.numel() == shapes[name].numel() else tensor

    tensors = {(name, ''): shaped(name, shard.tensor.detach()) for name, shard in weights.items()}
    for name, shard in optimized.items():
        for key, value in optimizer.inner.state.get(shard.key, {}).items():
            value = value.detach()
            is_step = key == 'step'  # a number, which is not sharded
            tensors[name, key] = value if is_step else shaped(name, local_tensor(value).view(-1))
    copies = dict(zip(tensors, snapshot(list(tensors.values()))))
    return {
        'model': {name: copies[name, ''] for name in weights},
        'optimizer': {
            name: {key: copies[name, key] for key in optimizer.inner.state.get(shard.key, {})}
            for name, shard in optimized.items()
        },
        'offsets': {
            'model': {name: shard.offset for name, shard in weights.items()},
            'optimizer': {name: shard.offset for name, shard in optimized.items()},
        },
        'scaler': optimizer.scaler.state_dict(),
    }


class StoredState:
    """The state that all ranks wrote, read in ranges of elements."""

    def __init__(self, files: list[dict]):
        # name -> key -> [(offset, tensor)]; the weights have the key ''.
        self.model = self._shards(files, 'model', lambda tensor: {'': tensor})
        self.optimizer = self._shards(files, 'optimizer', dict)
        self.scaler: dict = files[0]['scaler']

    @staticmethod
    def _shards(files: list[dict], kind: str, by_key) -> dict[str, dict[str, list]]:
        shards: dict[str, dict[str, list]] = {}
        for file in files:
            for name, value in file[kind].items():
                offset, by_name = file['offsets'][kind][name], shards.setdefault(name, {})
                for key, tensor in by_key(value).items():
                    by_name.setdefault(key, []).append((offset, tensor))
        return shards

    def copy_to(self, target: torch.Tensor, shards: list, offset: int, whole: int) -> None:
        """Fill the 1-D `target` with elements offset … of a parameter of `whole` elements.

        Raises ValueError if the shards are not those of such a parameter.
        """
        if sum(tensor.numel() for _, tensor in shards) != whole:
            raise ValueError('a parameter has a different shape')
        filled = 0
        for begin, tensor in shards:
            low, high = max(offset, begin), min(offset + len(target), begin + tensor.numel())
            if low < high:
                target[low - offset : high - offset].copy_(
                    tensor.reshape(-1)[low - begin : high - begin]
                )
                filled += high - low
        if filled != len(target):
            raise ValueError('a parameter is incomplete')


@torch.no_grad()
def load_weights(stored: StoredState, weights: dict[str, ParamShard]) -> None:
    """Fill a rank's shards of the weights. Raises KeyError or ValueError if they do not match."""
    if stored.model.keys() != weights.keys():
        names = ', '.join(sorted(stored.model.keys() ^ weights.keys()))
        raise ValueError(f'the parameters are not the same: {names}')
    for name, shard in weights.items():
        stored.copy_to(shard.tensor, stored.model[name][''], shard.offset, shard.key.numel())


@torch.no_grad()
def restore(
    stored: StoredState, parallel: SingleProcess, model: Transformer, optimizer: GuardedOptimizer
) -> None:
    """Fill weights, optimizer and scaler. Raises KeyError, TypeError or ValueError on mismatch."""
    load_weights(stored, parallel.weight_shards(model) | buffer_shards(model))
    whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, shard in parallel.optimizer_shards(model).items():
        state = {}
        for key, shards in stored.optimizer[name].items():
            # Created here, since fused kernels do not check shapes and could write out of bounds.
            if key == 'step':  # the same number with every shard
                number = shards[0][1].item()
                state[key] = torch.tensor(number, dtype=torch.float32, device=shard.tensor.device)
            else:
                state[key] = torch.zeros_like(shard.key)
                stored.copy_to(local_tensor(state[key]).view(-1), shards, shard.offset, whole[name])
        # Empty if it never had a gradient, like an expert without tokens.
        if state and state.keys() != optimizer.inner.state_keys(shard.key):
            raise ValueError(f'the optimizer state has {", ".join(state)}')
        optimizer.inner.state[shard.key] = state
    if optimizer.scaler.is_enabled() and stored.scaler:  # empty if saved without a scaler
        optimizer.scaler.load_state_dict(stored.scaler)
