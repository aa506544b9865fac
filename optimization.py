"""Learning-rate schedule, optimizer, and one guarded update of the weights.

Shapes do not matter here: an update reads gradients, measures them once, clips, and steps.
"""

import math
from typing import NamedTuple

import torch

from model_builder import ParameterGroup


def learning_rate_at(step: int, run) -> float:
    """The learning rate of update `step` (from 0): linear warm-up, then a cosine to `min_lr`.

    As in nanoGPT: rate · (step + 1) / (warmup_iters + 1) during warm-up, constant `min_lr` from
    `lr_decay_iters` on; without `decay_lr` the rate is constant.
    """
    if not run.decay_lr:
        return run.learning_rate
    if step < run.warmup_iters:
        return run.learning_rate * (step + 1) / (run.warmup_iters + 1)
    if step >= run.lr_decay_iters:
        return run.min_lr
    progress = (step - run.warmup_iters) / (run.lr_decay_iters - run.warmup_iters)
    return run.min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (
        run.learning_rate - run.min_lr
    )


def build_optimizer(groups: list[ParameterGroup], run) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with fused kernels, over decayed and undecayed groups."""
    return torch.optim.AdamW(
        [
            {'params': g.parameters, 'weight_decay': run.weight_decay if g.decayed else 0.0}
            for g in groups
        ],
        lr=run.learning_rate,
        betas=(run.beta1, run.beta2),
        fused=True,
    )


class GradientSums(NamedTuple):
    """Sums over every element of the gradient, as device scalars."""

    norm: torch.Tensor  # the 2-norm
    total: torch.Tensor | None  # plain sum; None where it was not asked for


def element_sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The sum over every element of all of them, as a device scalar."""
    return torch.stack([tensor.sum() for tensor in tensors]).sum()


class Updater:
    """Turns summed gradients into one update of the weights, and skips it if they are not finite.

    The guard lives on the device: the fused optimizer is told to skip by a tensor, so no update
    waits for a synchronisation. `skipped` counts such updates, on the device too.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, run, device: torch.device):
        self.optimizer, self.grad_clip = optimizer, run.grad_clip
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == 'float16')
        self.skipped = torch.zeros((), device=device)
        self.parameters = [p for group in optimizer.param_groups for p in group['params']]
        self.elements = sum(p.numel() for p in self.parameters)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's share of the loss."""
        self.scaler.scale(loss).backward()

    def update(self, learning_rate: float, loss: torch.Tensor, measured: bool) -> GradientSums:
        """Measure the gradient, clip it, step, and forget it.

        loss: of the whole update; one that is not finite forbids the step. measured: whether the
        sum over all elements is wanted, beside the norm that clipping needs anyway.
        """
        for group in self.optimizer.param_groups:
            group['lr'] = learning_rate
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        total = element_sum(gradients) if measured else None
        if self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
        lost = ~torch.isfinite(loss)
        broken = lost | ~torch.isfinite(norm)
        # An overflowing gradient is how the scaler finds its scale; only a lost loss counts there.
        self.skipped += lost if self.scaler.is_enabled() else broken
        # Not by scaler.step, which would look at the gradient alone.
        self.optimizer.found_inf = broken.float()
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return GradientSums(norm, total)

    @property
    def loss_scale(self) -> float | None:
        """The fp16 scaler's; None without one."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else None

    def weights_are_finite(self) -> bool:
        """Whether every parameter is, at the price of a synchronisation."""
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(self.parameters)))

    def statistics(self, norm: float, total: float) -> dict[str, float]:
        """Norm, mean and standard deviation of the gradient's elements, from their sums."""
        mean = total / self.elements
        variance = norm * norm / self.elements - mean * mean
        std = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan
        return {'norm': norm, 'mean': mean, 'std': std}

    def state_dict(self) -> dict:
        return {'optimizer': self.optimizer.state_dict(), 'scaler': self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict()`, with the options of this run: they may have changed.

        Raises KeyError, TypeError, ValueError and the like if the state is not of this optimizer.
        """
        options = [
            {key: value for key, value in group.items() if key != 'params'}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state['optimizer'])
        for group, ours in zip(self.optimizer.param_groups, options):
            group.update(ours)  # loading overwrites them with the saved ones
        for parameter in self.parameters:
            # The fused kernel trusts these shapes: a wrong one would write out of bounds.
            state_of = self.optimizer.state[parameter]
            moments = state_of['exp_avg'], state_of['exp_avg_sq']
            layouts = {(moment.shape, moment.is_contiguous()) for moment in moments}
            if layouts != {(parameter.shape, parameter.is_contiguous())}:
                raise ValueError('the optimizer state has other shapes')
            if state_of['step'].shape != ():
                raise ValueError('the optimizer state has no number of steps')
        if self.scaler.is_enabled() and state['scaler']:  # empty after a run without one
            self.scaler.load_state_dict(state['scaler'])
