"""Learning-rate schedules, by registry, and one guarded update of the weights.

Shapes do not matter here: an update reads gradients, measures them once, clips, and steps.
"""

import math
from typing import ClassVar, NamedTuple

import torch

from common.errors import UserError
from common.registry import Configurable, Option, at_least, between
from optim.optimizers import local
from training_config import SCHEDULE_REGISTRY

# --------------------------------------------------------------------------------------------------
# Learning-rate schedules


class Schedule(Configurable):
    """The learning rate of each update; all of it is in the run's options."""

    @classmethod
    def learning_rate(cls, step: int, run) -> float:
        """Of update `step`, counted from 0."""
        raise NotImplementedError


SCHEDULE_REGISTRY.expect(Schedule, learning_rate=('step', 'run'))


class WarmUp(Schedule):
    """Linear warm-up, as in nanoGPT: rate · (step + 1) / (warmup_iters + 1)."""

    options: ClassVar = {
        'warmup_iters': Option(
            int | None,
            None,
            'Updates of linear warm-up; None: a twentieth of max_iters, at most 2000',
            check=at_least(0),
        )
    }

    @classmethod
    def derived_values(cls, config) -> dict[str, tuple]:
        why = 'max_iters / 20, at most 2000'
        return {'warmup_iters': (min(2000, config.max_iters // 20), why)}

    @classmethod
    def notes(cls, config) -> list[str]:
        if config.warmup_iters < config.max_iters:
            return []
        highest = cls.learning_rate(config.max_iters - 1, config)
        return [
            f'warmup_iters={config.warmup_iters} is not below max_iters={config.max_iters}: the '
            f'run ends in its warm-up, at a learning rate of {highest:.3g}; learning_rate is '
            f'{config.learning_rate:g}.'
        ]

    @classmethod
    def learning_rate(cls, step: int, run) -> float:
        if step < run.warmup_iters:
            return run.learning_rate * (step + 1) / (run.warmup_iters + 1)
        return cls.after_warm_up(step, run)

    @classmethod
    def after_warm_up(cls, step: int, run) -> float:
        raise NotImplementedError


@SCHEDULE_REGISTRY.register('constant', source='Vaswani et al. 2017 for the warm-up')
class Constant(WarmUp):
    """Warm-up, then constant."""

    @classmethod
    def after_warm_up(cls, step: int, run) -> float:
        return run.learning_rate


class Decay(WarmUp):
    """From the highest rate to `min_lr` at `lr_decay_iters`, where it stays, without a jump."""

    options: ClassVar = {
        **WarmUp.options,
        'lr_decay_iters': Option(
            int | None, None, 'Where the decay ends; None: max_iters', check=at_least(1)
        ),
        'min_lr': Option(
            float | None, None, 'What it decays to; None: learning_rate / 10', check=at_least(0)
        ),
    }

    @classmethod
    def derived_values(cls, config) -> dict[str, tuple]:
        tenth = float(f'{config.learning_rate / 10:.12g}')  # 6e-05, not 5.9999999999999995e-05
        return {
            **super().derived_values(config),
            'lr_decay_iters': (config.max_iters, 'max_iters'),
            'min_lr': (tenth, 'learning_rate / 10'),
        }

    @classmethod
    def problems(cls, config) -> list[str]:
        problems, end, warm_up = [], config.lr_decay_iters, config.warmup_iters
        if config.min_lr is not None and config.min_lr > config.learning_rate:
            problems.append(
                f'min_lr={config.min_lr:g} is above learning_rate={config.learning_rate:g}: the '
                f'rate would rise. Lower min_lr, or leave it out for learning_rate / 10.'
            )
        if warm_up is None:
            warm_up, _ = cls.derived_values(config)['warmup_iters']
        if end is not None and end <= warm_up < config.max_iters:
            problems.append(
                f'lr_decay_iters={end} is not above warmup_iters={warm_up}: the rate would fall to '
                f'min_lr in one update. Raise lr_decay_iters, or shorten the warm-up, for example '
                f'to --warmup_iters={end // 20}.'
            )
        return problems

    @classmethod
    def notes(cls, config) -> list[str]:
        notes, end, updates = super().notes(config), config.lr_decay_iters, config.max_iters
        if notes:  # it is never reached
            return notes
        if end < updates:
            notes.append(
                f'lr_decay_iters={end} is below max_iters={updates}: from update {end} on, the '
                f'learning rate stays at min_lr={config.min_lr:g}.'
            )
        elif end > updates:
            last = cls.learning_rate(updates - 1, config)
            notes.append(
                f'lr_decay_iters={end} is above max_iters={updates}: the run ends before its decay '
                f'does, at a learning rate of {last:.3g}; min_lr is {config.min_lr:g}.'
            )
        return notes

    @classmethod
    def after_warm_up(cls, step: int, run) -> float:
        if step >= run.lr_decay_iters:
            return run.min_lr
        begin = max(cls.decay_begins(run), run.warmup_iters)  # from the top, whenever it is reached
        progress = max(0.0, (step - begin) / (run.lr_decay_iters - begin))
        return run.min_lr + cls.height(progress, run) * (run.learning_rate - run.min_lr)

    @classmethod
    def decay_begins(cls, run) -> int:
        """In which update; after the warm-up in any case."""
        return run.warmup_iters

    @classmethod
    def height(cls, progress: float, run) -> float:
        """From 1 at `progress` 0 to 0 at 1."""
        raise NotImplementedError


@SCHEDULE_REGISTRY.register('cosine', source='Loshchilov & Hutter 2017, as in nanoGPT')
class Cosine(Decay):
    """Warm-up, then half a cosine."""

    @classmethod
    def height(cls, progress: float, run) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


@SCHEDULE_REGISTRY.register('linear', source='Devlin et al. 2019')
class Linear(Decay):
    """Warm-up, then a straight line."""

    @classmethod
    def height(cls, progress: float, run) -> float:
        return 1.0 - progress


# Hägele et al. 2024, who found the first to be better.
DECAY_SHAPES = {
    '1-sqrt': lambda progress: 1.0 - math.sqrt(progress),
    'linear': lambda progress: 1.0 - progress,
}


@SCHEDULE_REGISTRY.register('wsd', source='Hu et al. 2024; shapes: Hägele et al. 2024')
class WarmUpStableDecay(Decay):
    """Warm-up, constant for most of the run, and a decay in its last part."""

    options: ClassVar = {
        **Decay.options,
        'decay_fraction': Option(
            float, 0.2, 'Part of lr_decay_iters in which wsd decays', check=between(0, 1)
        ),
        'decay_shape': Option(
            str,
            '1-sqrt',
            'How wsd decays, over the part that has gone by',
            choices=tuple(DECAY_SHAPES),
        ),
    }

    @classmethod
    def problems(cls, config) -> list[str]:
        problems, end, updates = super().problems(config), config.lr_decay_iters, config.max_iters
        reached = end is not None and end < updates and (config.warmup_iters or 0) < updates
        if config.decay_fraction == 0 and reached:
            problems.append(
                f'decay_fraction=0 with lr_decay_iters={end} below max_iters={config.max_iters}: '
                f'the rate would fall to min_lr in one update. Raise decay_fraction, or leave '
                f'lr_decay_iters out for a rate that does not decay.'
            )
        return problems

    @classmethod
    def notes(cls, config) -> list[str]:
        notes, begin = super().notes(config), cls.decay_begins(config)
        if begin < config.warmup_iters < min(config.lr_decay_iters, config.max_iters):
            notes.append(
                f'The warm-up reaches into the decay, which would begin at update {begin}: it '
                f'begins at {config.warmup_iters} instead, and is shorter.'
            )
        return notes

    @classmethod
    def decay_begins(cls, run) -> int:
        return run.lr_decay_iters - max(1, round(run.decay_fraction * run.lr_decay_iters))

    @classmethod
    def height(cls, progress: float, run) -> float:
        return DECAY_SHAPES[run.decay_shape](progress)


def learning_rate_at(step: int, run) -> float:
    """The learning rate of update `step` (from 0); without `decay_lr` the same for all."""
    if not run.decay_lr:
        return run.learning_rate
    schedule = SCHEDULE_REGISTRY[run.lr_schedule]
    rate = schedule.learning_rate(step, run)
    if not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
        raise UserError(
            f'lr_schedule={run.lr_schedule!r}: {schedule.__name__}.learning_rate({step}, run) must '
            f'return a number of at least 0, and returned {rate!r}.'
        )
    return rate


# --------------------------------------------------------------------------------------------------
# One update


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

    def __init__(self, optimizer: torch.optim.Optimizer, run, device: torch.device, parallel):
        self.optimizer, self.grad_clip, self.parallel = optimizer, run.grad_clip, parallel
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == 'float16')
        self.skipped = torch.zeros((), device=device)
        self.gradient_bytes = 0  # on this rank, in the last measured update
        self.parameters = [p for group in optimizer.param_groups for p in group['params']]
        self.elements = sum(p.numel() for p in self.parameters)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's share of the loss; strategies add up the ranks'."""
        self.scaler.scale(loss).backward()

    def update(self, learning_rate: float, loss: torch.Tensor, measured: bool) -> GradientSums:
        """Measure the gradient, clip it, step, and forget it.

        loss: of the whole update; one that is not finite forbids the step. measured: whether the
        sum over all elements is wanted, beside the norm that clipping needs anyway.
        """
        for group in self.optimizer.param_groups:
            group['lr'] = learning_rate * group['lr_scale']
        self.scaler.unscale_(self.optimizer)
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        norm, total = self.parallel.norm(gradients), None
        if measured:
            self.gradient_bytes = sum(gradient.nbytes for gradient in gradients)
            total = self.parallel.sum_of_parts(element_sum(gradients))
        if self.grad_clip:  # as torch.nn.utils.clip_grad_norm_ has it
            torch._foreach_mul_(gradients, (self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
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
        norm = torch.nn.utils.get_total_norm([local(p) for p in self.parameters])
        (broken,) = self.parallel.largest([0.0 if torch.isfinite(norm) else 1.0])
        return not broken

    def statistics(self, norm: float, total: float) -> dict[str, float]:
        """Norm, mean and standard deviation of the gradient's elements, from their sums."""
        mean = total / self.elements
        variance = norm * norm / self.elements - mean * mean
        std = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan
        return {'norm': norm, 'mean': mean, 'std': std}
