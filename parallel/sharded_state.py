"""Saving and restoring weights and optimizer state, independent of how they are sharded.

Each rank writes its shards: `{'model': {name: tensor}, 'optimizer': {name: {key: tensor}},
'offsets': {...}, 'scaler': {...}}`, where an offset is the first element of the shard in the
flattened parameter. Every strategy can read the shards of every other, parameter by parameter.
"""

from collections.abc import Callable

import torch

from common.tensors import local_tensor
from model_builder import Transformer
from optim.step import GuardedOptimizer
from parallel.strategies import ParamShard, SingleProcess


def no_copy(tensor: torch.Tensor, key: tuple[str, str]) -> torch.Tensor:
    """The tensor itself, for writing before the next iteration."""
    # A part of a buffer is cloned, since torch.save would write the whole buffer.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class HostStaging:
    """Copies in host memory, which training does not change; later copies reuse the memory.

    Copies from a GPU are complete when the device has been synchronized.
    """

    def __init__(self, device: torch.device):
        self.pinned = device.type == 'cuda'
        self.buffers: dict[tuple[str, str], torch.Tensor] = {}

    def __call__(self, tensor: torch.Tensor, key: tuple[str, str]) -> torch.Tensor:
        if key not in self.buffers:
            self.buffers[key] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=self.pinned
            )
        return self.buffers[key].copy_(tensor, non_blocking=True)


def collect(
    parallel: SingleProcess,
    model: Transformer,
    optimizer: GuardedOptimizer,
    snapshot: Callable[[torch.Tensor, tuple[str, str]], torch.Tensor] = no_copy,
) -> dict:
    """The state that this rank writes, of tensors copied by `snapshot(tensor, key)`."""
    saves_weights, saves_optimizer = parallel.saves
    weights = parallel.weight_shards(model) if saves_weights else {}
    optimized = parallel.optimizer_shards(model) if saves_optimizer else {}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def stored(name: str, key: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = snapshot(tensor.detach(), (name, key))
        return tensor.view(shapes[name]) if tensor.numel() == shapes[name].numel() else tensor

    return {
        'model': {name: stored(name, '', shard.tensor) for name, shard in weights.items()},
        'optimizer': {
            name: {
                key: snapshot(value, (name, key))
                if key == 'step'
                else stored(name, key, local_tensor(value).view(-1))
                for key, value in optimizer.inner.state.get(shard.key, {}).items()
            }
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
    load_weights(stored, parallel.weight_shards(model))
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
