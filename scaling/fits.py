"""Least-squares fits of L(C) = E + A · C^-α to losses at several costs, for many draws at once.

E is the irreducible loss. A fit is found in two steps. First a grid over E: for a fixed E,
ln(L - E) is a straight line in ln C, weighted so that it approximates least squares in the loss.
Then the Levenberg-Marquardt method from the best point of the grid, with bounds as an active set.
Its normal equations are block-diagonal but for the shared E, so each step is solved in closed form,
for all draws together.
"""

from dataclasses import dataclass

import numpy as np

MIN_EXPONENT = 1e-6  # of α; a curve that does not fall ends here
MAX_EXPONENT = 10.0  # published exponents of the loss are below 1
BELOW_MINIMUM = 1e-9  # E stays below the smallest loss by at least this share of it
GRID = 1 - np.geomspace(1, 1e-3, 10)  # of E, as a share of the smallest loss
MAX_STEPS = 200
NO_PROGRESS = 1e-10  # relative decrease of the squared error at which a fit has converged
EXACT = 1e-29  # squared error, relative to the squared losses, that is rounding
TINY = 1e-100  # instead of 0 in a denominator


@dataclass(frozen=True)
class Curves:
    """Curves L(C) = E + A · C^-α. Each array has the shape [..., variants]."""

    irreducible: np.ndarray  # E
    log_scale: np.ndarray  # ln A
    exponent: np.ndarray  # α

    def loss(self, costs: np.ndarray) -> np.ndarray:
        """The losses at these costs, which broadcast to the result [..., variants, points]."""
        log_reducible = self.log_scale[..., None] - self.exponent[..., None] * np.log(costs)
        return self.irreducible[..., None] + np.exp(log_reducible)

    @property
    def scale(self) -> np.ndarray:
        """A, in units of loss · cost^α."""
        return np.exp(self.log_scale)


def fit_curves(
    costs: np.ndarray,
    losses: np.ndarray,
    shared: bool = True,
    irreducible: float | np.ndarray | None = None,
) -> Curves:
    """The curves with the least squared error, with 0 <= E < smallest loss, A > 0 and α > 0.

    costs [variants, rungs] and losses [..., variants, rungs] are nan where there is no run. A
    variant with fewer than two rungs has no curve (nan).

    shared: one E for all variants, or else one for each.
    irreducible: a fixed E, which broadcasts to [..., variants] and makes `shared` irrelevant.
    """
    costs, losses = np.asarray(costs, float), np.asarray(losses, float)
    shape = losses.shape[:-1]
    separate = not shared or irreducible is not None
    # Each problem of the batch has one E: [problems, variants with this E, rungs].
    grouped = (-1, 1, losses.shape[-1]) if separate else (-1, *losses.shape[-2:])
    problem_losses = losses.reshape(grouped)
    problem_costs = np.broadcast_to(costs, losses.shape).reshape(grouped)
    fixed = None if irreducible is None else np.broadcast_to(irreducible, shape).reshape(-1)
    problems = _problems(problem_costs, problem_losses, fixed)
    e, height, exponent = _improve(problems, *_start(problems))
    parameters = e[:, None], height + exponent * problems.center, exponent
    return Curves(*(np.where(problems.fitted, each, np.nan).reshape(shape) for each in parameters))


def fit_lines(costs: np.ndarray, values: np.ndarray) -> Curves:
    """Straight lines through ln(value) against ln(cost), by least squares: curves with E = 0.

    costs [variants, points] and positive values [..., variants, points]; nan where one is missing.
    α is below 0 where the values rise. A variant needs two points.
    """
    used = np.isfinite(costs) & np.isfinite(values)
    used &= used.sum(axis=-1, keepdims=True) >= 2
    x = np.log(np.where(used, costs, 1.0))
    y = np.log(np.where(used, values, 1.0))
    count = np.where(used.any(axis=-1), used.sum(axis=-1), np.nan)
    mean_x, mean_y = (z.sum(axis=-1) / count for z in (x, y))
    deviation = np.where(used, x - mean_x[..., None], 0.0)
    spread = np.where(used.any(axis=-1), (deviation**2).sum(axis=-1), np.nan)
    exponent = -(deviation * y).sum(axis=-1) / spread
    return Curves(np.zeros(y.shape[:-1]), mean_y + exponent * mean_x, exponent)


@dataclass(frozen=True)
class _Problems:
    """A batch of least-squares problems, each with one E and several variants."""

    losses: np.ndarray  # [problems, variants, rungs]
    weight: np.ndarray  # the same shape: 1, or 0 without a run
    x: np.ndarray  # the same shape: ln(cost) minus the center
    center: np.ndarray  # [problems, variants]
    fitted: np.ndarray  # [problems, variants]: whether a variant has a curve
    low: np.ndarray  # [problems]: bounds of E
    high: np.ndarray
    grid: np.ndarray  # [problems, points]: values of E to start from

    def part(self, index: np.ndarray) -> '_Problems':
        """The problems with these indices."""
        return _Problems(*(array[index] for array in vars(self).values()))


def _problems(costs: np.ndarray, losses: np.ndarray, fixed: np.ndarray | None) -> _Problems:
    """costs and losses [problems, variants, rungs]; fixed: E [problems]."""
    used = np.isfinite(costs) & np.isfinite(losses)
    used &= used.sum(axis=-1, keepdims=True) >= 2
    log_costs = np.log(np.where(used, costs, 1.0))
    # Centered costs: the curve's level at the center and its slope are then uncorrelated.
    center = log_costs.sum(axis=-1) / np.maximum(used.sum(axis=-1), 1)
    smallest = np.where(used, losses, np.inf).min(axis=(-1, -2))
    smallest = np.where(np.isfinite(smallest), smallest, 1.0)
    return _Problems(
        losses=np.where(used, losses, 0.0),
        weight=used.astype(float),
        x=np.where(used, log_costs - center[..., None], 0.0),
        center=center,
        fitted=used.any(axis=-1),
        low=np.zeros_like(smallest) if fixed is None else fixed,
        high=smallest * (1 - BELOW_MINIMUM) if fixed is None else fixed,
        grid=smallest[:, None] * GRID if fixed is None else fixed[:, None],
    )


def _start(problems: _Problems) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best point of the grid over E: E, the height ln(L - E) at the center, and α.

    Or a constant loss, if that is better.
    """
    e = problems.grid[:, 0].copy()
    count = np.maximum(problems.weight.sum(axis=-1), 1)
    mean = problems.losses.sum(axis=-1) / count
    height = np.log(np.maximum(mean - e[:, None], BELOW_MINIMUM))
    exponent = np.full(height.shape, MIN_EXPONENT)
    best = _squared_error(problems, e, height, exponent)
    for trial in problems.grid.T:
        trial_height, trial_exponent = _line(problems, trial)
        error = _squared_error(problems, trial, trial_height, trial_exponent)
        better = error < best
        best[better], e[better] = error[better], trial[better]
        height[better], exponent[better] = trial_height[better], trial_exponent[better]
    return e, height, exponent


def _line(problems: _Problems, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weighted straight line through ln(L - E): its height at the center, and α."""
    reducible = np.maximum(problems.losses - e[:, None, None], BELOW_MINIMUM)
    # The error of a logarithm is that of the loss, divided by L - E.
    weight = problems.weight * reducible**2
    y = np.log(reducible)
    total = np.maximum(weight.sum(axis=-1), TINY)
    mean_x, mean_y = ((weight * z).sum(axis=-1) / total for z in (problems.x, y))
    deviation = problems.x - mean_x[..., None]
    spread = np.maximum((weight * deviation**2).sum(axis=-1), TINY)
    slope = (weight * deviation * y).sum(axis=-1) / spread
    exponent = np.clip(-slope, MIN_EXPONENT, MAX_EXPONENT)
    return mean_y + exponent * mean_x, exponent


def _squared_error(
    problems: _Problems, e: np.ndarray, height: np.ndarray, exponent: np.ndarray
) -> np.ndarray:
    """The sums of squared residuals, [problems]."""
    with np.errstate(over='ignore'):  # far from the losses; infinitely bad
        power = np.exp(height[..., None] - exponent[..., None] * problems.x)
        residual = (e[:, None, None] + power - problems.losses) * problems.weight
        return (residual**2).sum(axis=(-1, -2))


def _improve(
    problems: _Problems, e: np.ndarray, height: np.ndarray, exponent: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The Levenberg-Marquardt method from a start, until no problem improves."""
    error = _squared_error(problems, e, height, exponent)
    damping = np.full(len(e), 1e-3)
    exact = EXACT * (problems.losses**2).sum(axis=(-1, -2))
    active = np.flatnonzero(error > exact)
    for _ in range(MAX_STEPS):
        if not len(active):
            break
        part = problems.part(active)
        after = _step(part, e[active], height[active], exponent[active], damping[active])
        new_error, old_error = _squared_error(part, *after), error[active]
        better = new_error <= old_error
        index = active[better]
        for array, values in zip((e, height, exponent), after):
            array[index] = values[better]
        error[index] = new_error[better]
        damping[active] *= np.where(better, 0.1, 10.0)
        converged = better & (old_error - new_error <= NO_PROGRESS * old_error)
        finished = converged | (error[active] <= exact[active]) | (damping[active] > 1e12)
        active = active[~finished]
    return e, height, exponent


def _step(
    part: _Problems,
    e: np.ndarray,
    height: np.ndarray,
    exponent: np.ndarray,
    damping: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parameters after a damped Gauss-Newton step.

    The step is in E and, for each variant, the curve's level and slope at the center: E + p and
    α · p for the power term p. E then means only the curvature, so that the parameters are nearly
    uncorrelated, and a poorly identified E moves along a straight valley. The system has the shape
    of an arrow: a 2 × 2 block for each variant, and a border for E. It is solved by the Schur
    complement of the blocks. A parameter at a bound that the gradient pushes outwards stays.
    """
    at_center = np.exp(height)
    decline = exponent[..., None] * part.x
    shape = np.exp(-decline) * part.weight
    residual = (e[:, None, None] + at_center[..., None] * shape - part.losses) * part.weight
    # Derivatives of the curve [problems, variants, rungs].
    by_level = shape * (1 + decline)
    by_slope = -part.x * shape
    by_e = part.weight - by_level
    gradient_e = (by_e * residual).sum(axis=(-1, -2))
    gradient_level = (by_level * residual).sum(axis=-1)
    gradient_slope = (by_slope * residual).sum(axis=-1)
    e_stays = ((e <= part.low) & (gradient_e >= 0)) | ((e >= part.high) & (gradient_e <= 0))
    stays = (exponent <= MIN_EXPONENT) & (gradient_slope >= 0)
    stays |= (exponent >= MAX_EXPONENT) & (gradient_slope <= 0)
    moves = np.where(stays, 0.0, 1.0)
    gradient_slope = gradient_slope * moves
    # The blocks [[a, b], [b, d]], and their borders with E.
    increase = 1 + damping[:, None]
    a = np.maximum((by_level**2).sum(axis=-1), TINY) * increase
    b = (by_level * by_slope).sum(axis=-1) * moves
    d = np.maximum((by_slope**2).sum(axis=-1), TINY) * increase
    determinant = np.maximum(a * d - b * b, TINY)
    border_level = (by_e * by_level).sum(axis=-1)
    border_slope = (by_e * by_slope).sum(axis=-1) * moves

    def solved(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (d * u - b * v) / determinant, (a * v - b * u) / determinant

    solved_level, solved_slope = solved(border_level, border_slope)
    complement = (by_e**2).sum(axis=(-1, -2)) * (1 + damping)
    complement -= (border_level * solved_level + border_slope * solved_slope).sum(axis=-1)
    reduced = (solved_level * gradient_level + solved_slope * gradient_slope).sum(axis=-1)
    e_step = np.where(e_stays, 0.0, (reduced - gradient_e) / np.maximum(complement, TINY))
    new_e = np.clip(e + e_step, part.low, part.high)
    e_step = new_e - e
    level_step, slope_step = solved(
        -gradient_level - border_level * e_step[:, None],
        -gradient_slope - border_slope * e_step[:, None],
    )
    # The curve must stay above E, and a step must not lead too far.
    power = np.clip(
        at_center + level_step - e_step[:, None], 0.01 * at_center + TINY, 100 * at_center + TINY
    )
    new_exponent = (exponent * at_center + slope_step) / power
    return new_e, np.log(power), np.clip(new_exponent, MIN_EXPONENT, MAX_EXPONENT)
