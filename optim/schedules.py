"""Learning-rate schedules, by registry.

Unlike torch.optim.lr_scheduler, they have no state: the learning rate is a function of the
iteration and the run's options, so that nothing has to be saved or restored.
"""

import math
from typing import ClassVar

from common.errors import UserError
from common.registry import Configurable, Option, at_least, between
from training_config import SCHEDULE_REGISTRY, TrainingConfig


class Schedule(Configurable):
    """The learning rate as a function of the iteration and the run's options."""

    @classmethod
    def learning_rate(cls, iteration: int, run: TrainingConfig) -> float:
        """The learning rate of an iteration, counted from 0."""
        raise NotImplementedError


SCHEDULE_REGISTRY.expect(Schedule, learning_rate=('iteration', 'run'))


class WarmUp(Schedule):
    """Linear warm-up, as in nanoGPT: rate · (iteration + 1) / (warmup_iters + 1)."""

    options: ClassVar = {
        'warmup_iters': Option(
            int | None,
            None,
            'Iterations of linear warm-up; None: max_iters / 20, at most 2000',
            check=at_least(0),
        )
    }

    @classmethod
    def derived_values(cls, config: TrainingConfig) -> dict[str, tuple]:
        why = 'max_iters / 20, at most 2000'
        return {'warmup_iters': (min(2000, config.max_iters // 20), why)}

    @classmethod
    def notes(cls, config: TrainingConfig) -> list[str]:
        if config.warmup_iters < config.max_iters:
            return []
        highest = cls.learning_rate(config.max_iters - 1, config)
        return [
            f'warmup_iters={config.warmup_iters} is not below max_iters={config.max_iters}: the '
            f'run ends during warm-up, at a learning rate of {highest:.3g} instead of '
            f'{config.learning_rate:g}.'
        ]

    @classmethod
    def learning_rate(cls, iteration: int, run: TrainingConfig) -> float:
        if iteration < run.warmup_iters:
            return run.learning_rate * (iteration + 1) / (run.warmup_iters + 1)
        return cls.after_warm_up(iteration, run)

    @classmethod
    def after_warm_up(cls, iteration: int, run: TrainingConfig) -> float:
        raise NotImplementedError


@SCHEDULE_REGISTRY.register('constant', source='warm-up: Vaswani et al. 2017')
class Constant(WarmUp):
    """Warm-up, then a constant rate."""

    @classmethod
    def after_warm_up(cls, iteration: int, run: TrainingConfig) -> float:
        return run.learning_rate


class Decay(WarmUp):
    """From the peak rate to `min_lr` at `lr_decay_iters`, then constant; continuous."""

    options: ClassVar = {
        **WarmUp.options,
        'lr_decay_iters': Option(
            int | None,
            None,
            'Iteration at which the decay ends; None: max_iters',
            check=at_least(1),
        ),
        'min_lr': Option(
            float | None, None, 'Final learning rate; None: learning_rate / 10', check=at_least(0)
        ),
    }

    @classmethod
    def derived_values(cls, config: TrainingConfig) -> dict[str, tuple]:
        tenth = float(f'{config.learning_rate / 10:.12g}')  # 6e-05, not 5.9999999999999995e-05
        return {
            **super().derived_values(config),
            'lr_decay_iters': (config.max_iters, 'max_iters'),
            'min_lr': (tenth, 'learning_rate / 10'),
        }

    @classmethod
    def problems(cls, config: TrainingConfig) -> list[str]:
        problems, end, warm_up = [], config.lr_decay_iters, config.warmup_iters
        if config.min_lr is not None and config.min_lr > config.learning_rate:
            problems.append(
                f'min_lr={config.min_lr:g} is above learning_rate={config.learning_rate:g}, so '
                f'that the rate would rise. Lower min_lr, or remove it for learning_rate / 10.'
            )
        if warm_up is None:
            warm_up, _ = cls.derived_values(config)['warmup_iters']
        if end is not None and end <= warm_up < config.max_iters:
            problems.append(
                f'lr_decay_iters={end} is not above warmup_iters={warm_up}: the rate would fall to '
                f'min_lr in one iteration. Raise lr_decay_iters, or shorten the warm-up, for '
                f'example with --warmup_iters={end // 20}.'
            )
        return problems

    @classmethod
    def notes(cls, config: TrainingConfig) -> list[str]:
        notes = super().notes(config)
        end, max_iters = config.lr_decay_iters, config.max_iters
        if notes:  # the decay is never reached
            return notes
        if end < max_iters:
            notes.append(
                f'lr_decay_iters={end} is below max_iters={max_iters}: from iteration {end} on, '
                f'the learning rate stays at min_lr={config.min_lr:g}.'
            )
        elif end > max_iters:
            last = cls.learning_rate(max_iters - 1, config)
            notes.append(
                f'lr_decay_iters={end} is above max_iters={max_iters}: the run ends before the '
                f'decay does, at a learning rate of {last:.3g}; min_lr is {config.min_lr:g}.'
            )
        return notes

    @classmethod
    def after_warm_up(cls, iteration: int, run: TrainingConfig) -> float:
        if iteration >= run.lr_decay_iters:
            return run.min_lr
        begin = max(cls.decay_begins(run), run.warmup_iters)  # after the peak in any case
        progress = max(0.0, (iteration - begin) / (run.lr_decay_iters - begin))
        return run.min_lr + cls.height(progress, run) * (run.learning_rate - run.min_lr)

    @classmethod
    def decay_begins(cls, run: TrainingConfig) -> int:
        """The iteration at which the decay begins, if the warm-up has ended."""
        return run.warmup_iters

    @classmethod
    def height(cls, progress: float, run: TrainingConfig) -> float:
        """The rate between `min_lr` and the peak: from 1 at `progress` 0 to 0 at 1."""
        raise NotImplementedError


@SCHEDULE_REGISTRY.register('cosine', source='Loshchilov & Hutter 2017, as in nanoGPT')
class Cosine(Decay):
    """Warm-up, then half a cosine down to `min_lr`."""

    @classmethod
    def height(cls, progress: float, run: TrainingConfig) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


@SCHEDULE_REGISTRY.register('linear', source='Devlin et al. 2019')
class Linear(Decay):
    """Warm-up, then a straight line down to `min_lr`."""

    @classmethod
    def height(cls, progress: float, run: TrainingConfig) -> float:
        return 1.0 - progress


# Hägele et al. 2024; the first was better there.
DECAY_SHAPES = {
    '1-sqrt': lambda progress: 1.0 - math.sqrt(progress),
    'linear': lambda progress: 1.0 - progress,
}


@SCHEDULE_REGISTRY.register('wsd', source='Hu et al. 2024; shapes: Hägele et al. 2024')
class WarmUpStableDecay(Decay):
    """Warm-up, then a constant rate, then a decay to `min_lr` in the last `decay_fraction`."""

    options: ClassVar = {
        **Decay.options,
        'decay_fraction': Option(
            float, 0.2, 'Fraction of lr_decay_iters in which wsd decays', check=between(0, 1)
        ),
        'decay_shape': Option(
            str,
            '1-sqrt',
            'Shape of the decay of wsd',
            choices=tuple(DECAY_SHAPES),
        ),
    }

    @classmethod
    def problems(cls, config: TrainingConfig) -> list[str]:
        problems, end = super().problems(config), config.lr_decay_iters
        max_iters = config.max_iters
        reached = end is not None and end < max_iters and (config.warmup_iters or 0) < max_iters
        if config.decay_fraction == 0 and reached:
            problems.append(
                f'decay_fraction=0 with lr_decay_iters={end} below max_iters={config.max_iters}: '
                f'the rate would fall to min_lr in one iteration. Raise decay_fraction, or remove '
                f'lr_decay_iters for a rate that does not decay.'
            )
        return problems

    @classmethod
    def notes(cls, config: TrainingConfig) -> list[str]:
        notes, begin = super().notes(config), cls.decay_begins(config)
        if begin < config.warmup_iters < min(config.lr_decay_iters, config.max_iters):
            notes.append(
                f'The warm-up reaches into the decay, which would begin at iteration {begin}: it '
                f'begins at {config.warmup_iters} instead, and is shorter.'
            )
        return notes

    @classmethod
    def decay_begins(cls, run: TrainingConfig) -> int:
        return run.lr_decay_iters - max(1, round(run.decay_fraction * run.lr_decay_iters))

    @classmethod
    def height(cls, progress: float, run: TrainingConfig) -> float:
        return DECAY_SHAPES[run.decay_shape](progress)


def learning_rate_at(iteration: int, run: TrainingConfig) -> float:
    """The learning rate of an iteration, counted from 0; constant without `decay_lr`."""
    if not run.decay_lr:
        return run.learning_rate
    schedule = SCHEDULE_REGISTRY[run.lr_schedule]
    rate = schedule.learning_rate(iteration, run)
    if not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
        raise UserError(
            f'lr_schedule={run.lr_schedule!r}: {schedule.__name__}.learning_rate({iteration}, '
            f'run) must return a number of at least 0, and returned {rate!r}.'
        )
    return rate
