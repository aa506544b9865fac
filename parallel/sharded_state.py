"""The weights and the optimizer's state of a run, however they are divided among ranks.

Each rank writes the pieces that it holds: `{'model': {name: tensor}, 'optimizer': {name: {key:
tensor}}, 'offsets': {...}, 'scaler': {...}}`, where an offset says at which element of the
flattened parameter a piece begins. Any strategy reads what any other wrote, parameter by parameter.
"""

from collections.abc import Callable

import torch

from model_builder import Transformer
from optim.optimizers import local
from optim.step import Updater
from parallel.strategies import Piece, SingleProcess


def live(tensor: torch.Tensor, place: tuple[str, str]) -> torch.Tensor:
    """The tensor as it is, to be written before the next update."""
    # Of a part of a buffer the whole buffer would be written.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class HostCopies:
    """Copies in host memory, which training leaves alone; the next ones take the same memory.

    From a GPU they are under way until the device is synchronised.
    """

    def __init__(self, device: torch.device):
        self.pinned = device.type == 'cuda'
        self.buffers: dict[tuple[str, str], torch.Tensor] = {}

    def __call__(self, tensor: torch.Tensor, place: tuple[str, str]) -> torch.Tensor:
        if place not in self.buffers:
            self.buffers[place] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=self.pinned
            )
        return self.buffers[place].copy_(tensor, non_blocking=True)


def collect(
    parallel: SingleProcess,
    model: Transformer,
    updater: Updater,
    kept: Callable[[torch.Tensor, tuple[str, str]], torch.Tensor] = live,
) -> dict:
    """What this rank has to write; `kept` makes of each tensor, by place, what is handed out."""
    saves_weights, saves_optimizer = parallel.saves
    weights = parallel.weights(model) if saves_weights else {}
    optimized = parallel.optimized(model) if saves_optimizer else {}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def stored(name: str, key: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = kept(tensor.detach(), (name, key))
        return tensor.view(shapes[name]) if tensor.numel() == shapes[name].numel() else tensor

    return {
        'model': {name: stored(name, '', piece.tensor) for name, piece in weights.items()},
        'optimizer': {
            name: {
                key: kept(value, (name, key))
                if key == 'step'
                else stored(name, key, local(value).view(-1))
                for key, value in updater.optimizer.state.get(piece.key, {}).items()
            }
            for name, piece in optimized.items()
        },
        'offsets': {
            'model': {name: piece.offset for name, piece in weights.items()},
            'optimizer': {name: piece.offset for name, piece in optimized.items()},
        },
        'scaler': updater.scaler.state_dict(),
    }


class StoredState:
    """What all ranks wrote, to be read a stretch at a time."""

    def __init__(self, files: list[dict]):
        # name -> key -> [(offset, tensor)]; the weights have the key ''.
        self.model = self._pieces(files, 'model', lambda tensor: {'': tensor})
        self.optimizer = self._pieces(files, 'optimizer', dict)
        self.scaler: dict = files[0]['scaler']

    @staticmethod
    def _pieces(files: list[dict], kind: str, by_key) -> dict[str, dict[str, list]]:
        pieces: dict[str, dict[str, list]] = {}
        for file in files:
            for name, value in file[kind].items():
                offset, by_name = file['offsets'][kind][name], pieces.setdefault(name, {})
                for key, tensor in by_key(value).items():
                    by_name.setdefault(key, []).append((offset, tensor))
        return pieces

    def copy_to(self, target: torch.Tensor, pieces: list, offset: int, whole: int) -> None:
        """Fill the 1-D `target` with elements offset … of a parameter of `whole` elements.

        Raises ValueError if the pieces are not those of such a parameter.
        """
        if sum(tensor.numel() for _, tensor in pieces) != whole:
            raise ValueError('a parameter has another shape')
        filled = 0
        for begin, tensor in pieces:
            low, high = max(offset, begin), min(offset + len(target), begin + tensor.numel())
            if low < high:
                target[low - offset : high - offset].copy_(
                    tensor.reshape(-1)[low - begin : high - begin]
                )
                filled += high - low
        if filled != len(target):
            raise ValueError('a parameter is incomplete')


@torch.no_grad()
def load_weights(stored: StoredState, weights: dict[str, Piece]) -> None:
    """Fill what a rank holds of the weights. Raises KeyError or ValueError if they do not fit."""
    if stored.model.keys() != weights.keys():
        names = ', '.join(sorted(stored.model.keys() ^ weights.keys()))
        raise ValueError(f'the parameters are not the same: {names}')
    for name, piece in weights.items():
        stored.copy_to(piece.tensor, stored.model[name][''], piece.offset, piece.key.numel())


@torch.no_grad()
def restore(
    stored: StoredState, parallel: SingleProcess, model: Transformer, updater: Updater
) -> None:
    """Fill weights, optimizer and scaler. Raises KeyError, TypeError or ValueError if unfit."""
    load_weights(stored, parallel.weights(model))
    whole = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, piece in parallel.optimized(model).items():
        state = {}
        for key, pieces in stored.optimizer[name].items():
            # Made here, as the fused kernel trusts them: another shape would write out of bounds.
            if key == 'step':  # the same number with every piece
                number = pieces[0][1].item()
                state[key] = torch.tensor(number, dtype=torch.float32, device=piece.tensor.device)
            else:
                state[key] = torch.zeros_like(piece.key)
                stored.copy_to(local(state[key]).view(-1), pieces, piece.offset, whole[name])
        # None: it never had a gradient, as an expert that no token reached.
        if state and state.keys() != updater.optimizer.state_keys(piece.key):
            raise ValueError(f'the optimizer state has {", ".join(state)}')
        updater.optimizer.state[piece.key] = state
    if updater.scaler.is_enabled() and stored.scaler:  # empty after a run without one
        updater.scaler.load_state_dict(stored.scaler)
