"""Records the collectives of a rank, in the order in which it issues them."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Collective(NamedTuple):
    """A collective operation on tensors."""

    name: str
    dtype: torch.dtype
    elements: int  # of the whole: what is reduced, gathered, scattered, or sent to all ranks
    bytes_sent: float  # by this rank, with a ring algorithm


# Operation -> (name, argument that is the whole, times that (n - 1) / n of it is sent)
_RING = {
    'c10d::allreduce_': ('all_reduce', 0, 2),
    'c10d::_allgather_base_': ('all_gather', 0, 1),
    'c10d::_reduce_scatter_base_': ('reduce_scatter', 1, 1),
}


class CollectiveRecorder(TorchDispatchMode):
    """A context that records collectives, those of a fake group too."""

    def __init__(self):
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith('c10d::'):
            self.collectives.append(_collective(name, args))
        if name == 'c10d::alltoall_base_' and not args[1].numel():
            # The fake group refuses a rank that receives and sends nothing: let it send as much.
            received, _, group, sizes, _, *others = args
            args = (received, received.clone(), group, sizes, sizes, *others)
        return function(*args, **(kwargs or {}))

    @property
    def bytes_sent(self) -> float:
        return sum(collective.bytes_sent for collective in self.collectives)

    def take(self) -> list[Collective]:
        """The collectives since the last call."""
        taken, self.collectives = self.collectives, []
        return taken


def _collective(name: str, args: tuple) -> Collective:
    groups = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
    group = dist.ProcessGroup.unbox(groups[0])
    if name == 'c10d::alltoall_base_':
        sent, sizes = args[1], args[4]
        own = sizes[group.rank()] if sizes else sent.numel() // group.size()
        elements = sent.numel()
        return Collective(
            'all_to_all', sent.dtype, elements, (elements - own) * sent.element_size()
        )
    label, whole, times = _RING.get(name, (name, 0, 1))
    tensors = args[whole] if isinstance(args[whole], list) else [args[whole]]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    sent_bytes = times * (group.size() - 1) / group.size() * nbytes
    return Collective(label, tensors[0].dtype, sum(t.numel() for t in tensors), sent_bytes)
