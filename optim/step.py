"""The guarded optimizer step: measure and clip the gradient, update the weights if it is finite."""

import math
from typing import NamedTuple

import torch

from common.tensors import local_tensor, storage_of
from optim.strategy import ParallelStrategy
from records.record_types import GradientInfo
from training_config import TrainingConfig


class GradientSums(NamedTuple):
    """Sums over all elements of the gradient, as device scalars."""

    norm: torch.Tensor  # the 2-norm
    total: torch.Tensor | None  # plain sum; None if not measured


# Smaller tensors are copied into one to be summed, by device: for so few elements, a kernel takes
# longer to start than to copy. None on a CPU.
JOINED_ELEMENTS = {'cuda': 2**18}


def element_sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The sum over all elements of all tensors, as a device scalar, by few kernels."""
    flat = whole_buffers(tensors)
    limit = JOINED_ELEMENTS.get(flat[0].device.type, 0)
    parts = [tensor for tensor in flat if tensor.numel() >= limit]
    small = [tensor.reshape(-1) for tensor in flat if tensor.numel() < limit]
    parts += [torch.cat(small)] if small else []
    return torch.stack([part.sum() for part in parts]).sum()


def whole_buffers(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, of which those that fill a buffer, as DDP's gradients do, become one."""
    by_buffer: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_buffer.setdefault(storage_of(tensor), []).append(tensor)
    flat = []
    for views in by_buffer.values():
        first, elements = views[0], sum(view.numel() for view in views)
        if len(views) > 1 and elements * first.itemsize == first.untyped_storage().nbytes():
            views = [first.as_strided((elements,), (1,), 0)]
        flat += views
    return flat


class GuardedOptimizer:
    """Updates the weights from summed gradients, and skips the update if they are not finite.

    A tensor on the device makes the fused optimizer skip, so that no iteration waits for a
    synchronization. `skipped` counts skipped updates, also on the device, until `take_skipped`.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        run: TrainingConfig,
        device: torch.device,
        parallel: ParallelStrategy,
    ):
        self.inner, self.grad_clip, self.parallel = inner, run.grad_clip, parallel
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == 'float16')
        self.skipped = torch.zeros((), device=device)
        self.one = torch.ones((), device=device)
        self.nonfinite = torch.zeros((), device=device, dtype=torch.bool)  # of the last step
        self.gradient_bytes = 0  # on this rank, in the last measured iteration
        self.parameters = [p for group in inner.param_groups for p in group['params']]
        self.elements = sum(p.numel() for p in self.parameters)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's part of the loss; the strategy sums over ranks."""
        self.scaler.scale(loss).backward()

    def step(self, learning_rate: float, loss: torch.Tensor, measured: bool) -> GradientSums:
        """Measure the gradient, clip it, update the weights, and clear the gradient.

        loss: of the whole iteration; if it is not finite, the update is skipped. measured: whether
        to compute the sum over all elements, in addition to the norm for clipping.
        """
        # The learning rate of each group, and the gradients without the fp16 scale.
        for group in self.inner.param_groups:
            group['lr'] = learning_rate * group['lr_scale']
        self.scaler.unscale_(self.inner)
        gradients = [local_tensor(p.grad) for p in self.parameters if p.grad is not None]

        # Measure once, then clip by the same norm, as torch.nn.utils.clip_grad_norm_ does.
        norm, total = self.parallel.norm(gradients), None
        if measured:
            self.gradient_bytes = sum(gradient.nbytes for gradient in gradients)
            total = self.parallel.sum_over_shards(element_sum(gradients))
        if self.grad_clip:
            torch._foreach_mul_(gradients, (self.grad_clip / (norm + 1e-6)).clamp(max=1.0))

        # Skip if loss or gradient is not finite. In fp16, overflowing gradients are normal: the
        # scaler adapts its scale to them, so that only the loss counts as skipped.
        checked = torch.stack([loss, norm])
        bad = checked - checked != 0  # inf - inf and NaN - NaN are NaN
        self.nonfinite = bad.any()
        self.skipped += bad[0] if self.scaler.is_enabled() else self.nonfinite
        # Not scaler.step, which checks only the gradient.
        self.inner.found_inf = self.nonfinite.float()
        self.inner.step()
        self.scaler.update()
        self.parallel.clear_gradients(self.inner)
        return GradientSums(norm, total)

    def take_skipped(self) -> torch.Tensor:
        """The number of updates skipped since the last call, as a device scalar."""
        skipped, self.skipped = self.skipped, torch.zeros_like(self.skipped)
        return skipped

    @property
    def loss_scale(self) -> torch.Tensor | None:
        """The scale of the fp16 scaler, as a device scalar; None without one."""
        # Not scaler.get_scale, which waits for the device.
        return self.scaler.scale(self.one) if self.scaler.is_enabled() else None

    def weights_are_finite(self) -> bool:
        """Whether all parameters are finite; requires a synchronization."""
        norm = torch.nn.utils.get_total_norm([local_tensor(p) for p in self.parameters])
        (nonfinite,) = self.parallel.all_reduce_max([0.0 if torch.isfinite(norm) else 1.0])
        return not nonfinite

    def statistics(self, norm: float, total: float) -> GradientInfo:
        """Norm, mean and standard deviation of the gradient's elements, from their sums."""
        mean = total / self.elements
        variance = norm * norm / self.elements - mean * mean
        std = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan
        return {'norm': norm, 'mean': mean, 'std': std}
