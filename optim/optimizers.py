"""Optimizers, by registry: AdamW; Muon for hidden matrices with AdamW for all others; Lion.

Each updates the shards of the parameters on its rank, with the same result as a single process.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby, islice
from typing import Any, ClassVar, NamedTuple

import torch

from common.errors import UserError
from common.registry import Configurable, Option, above, at_least, between
from common.tensors import local_tensor
from model_builder import ParameterGroup
from optim.strategy import ParallelStrategy, PendingExchange
from training_config import OPTIMIZER_REGISTRY, TrainingConfig


class OptimizerComponent(Configurable):
    """Base class of optimizers, besides torch.optim.Optimizer: `Name(groups, run, parallel)`.

    Its `param_groups` are those of `torch_groups`. `found_inf`, a scalar on the device, is set
    before each step. If it is 1, weights and state must not change, without a synchronization of
    the device.
    """

    found_inf: torch.Tensor
    # Whether the learning rates of `initialization='mup'` suit it: its updates of a weight do not
    # depend on the scale of the gradient. A subclass with a `step` of its own must declare it.
    mup_rule: ClassVar[bool] = False
    bytes_sent: float = 0.0  # per rank and iteration, in addition to the strategy's

    def state_keys(self, parameter: torch.Tensor) -> frozenset[str]:
        """Names of the parameter's state; `step` is a number, others have the parameter's shape."""
        raise NotImplementedError


OPTIMIZER_REGISTRY.expect(
    OptimizerComponent,
    torch.optim.Optimizer,
    constructed_with=('groups', 'run', 'parallel'),
    step=(),
    state_keys=('parameter',),
)
DECAY = between(0, 0.999999)  # decay rate of a running average


def torch_groups(
    groups: list[ParameterGroup],
    run: TrainingConfig,
    parallel: ParallelStrategy,
    rule: str,
    lr_scale: float = 1.0,
) -> list[dict]:
    """Parameter groups in torch's form, with the shards that this rank updates.

    rule: name of the update rule, for the console. lr_scale: factor of all learning rates, in
    addition to each group's own.
    """
    return [
        {
            'name': group.name,
            'rule': rule,
            'params': [parallel.shard(p).key for p in group.parameters],
            'weight_decay': run.weight_decay if group.decayed else 0.0,
            'lr_scale': group.lr_scale * lr_scale,
        }
        for group in groups
    ]


def complete_optimizer(
    optimizer: torch.optim.Optimizer, groups: list[ParameterGroup]
) -> torch.optim.Optimizer:
    """The optimizer; UserError if parameters or required keys of its groups are missing."""
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        missing = {'name', 'rule', 'weight_decay', 'lr_scale'} - group.keys()
        if missing:
            raise UserError(
                f'{name}.__init__ must pass torch_groups(groups, run, parallel, rule) to torch: a '
                f'group of parameters lacks {", ".join(sorted(missing))}.'
            )
    taken = sum(len(group['params']) for group in optimizer.param_groups)
    total = sum(len(group.parameters) for group in groups)
    if taken != total:
        raise UserError(f'{name}.__init__ takes {taken} of {total} parameters: it must take all.')
    return optimizer


def zero_unless(finite: torch.Tensor, gradients: list[torch.Tensor]) -> None:
    """Multiply fp32 gradients by `finite`, 1 or 0 on the device, such that 0 · NaN is 0.

    One kernel for all: it multiplies the bits, as integers.
    """
    torch._foreach_mul_([gradient.view(torch.int32) for gradient in gradients], finite.int())


def begin_state(optimizer: torch.optim.Optimizer, *names: str) -> None:
    """Create zero state of those names for each parameter.

    This happens before the first activation, not in the first step, where it would fragment the
    memory of activations on a CPU (0.1 to 0.3 GB at 124M parameters).
    """
    for group in optimizer.param_groups:
        for key in group['params']:
            optimizer.state[key] = {name: torch.zeros_like(key) for name in names}


# --------------------------------------------------------------------------------------------------
# AdamW


IGNORES_FOUND_INF = ('mps',)  # devices whose fused AdamW may do so


@OPTIMIZER_REGISTRY.register('adamw', source='Loshchilov & Hutter 2019')
class AdamW(OptimizerComponent, torch.optim.AdamW):
    """Adam with decoupled weight decay: torch.optim.AdamW with fused kernels."""

    mup_rule = True
    options: ClassVar = {
        'beta1': Option(float, 0.9, "Decay rate of AdamW's first moment", check=DECAY),
        'beta2': Option(float, 0.95, "Decay rate of AdamW's second moment", check=DECAY),
    }

    def __init__(
        self, groups: list[ParameterGroup], run: TrainingConfig, parallel: ParallelStrategy
    ):
        super().__init__(
            torch_groups(groups, run, parallel, 'fused AdamW'),
            lr=0.0,
            betas=(run.beta1, run.beta2),
            fused=True,
        )
        begin_state(self, 'exp_avg', 'exp_avg_sq')
        for key, state in self.state.items():
            state['step'] = torch.zeros((), device=key.device)

    def step(self) -> None:
        # torch's fused kernel for MPS may ignore `found_inf` (pytorch#186360): check it here.
        if self.found_inf.device.type in IGNORES_FOUND_INF and self.found_inf.item():
            return
        super().step()

    def state_keys(self, parameter: torch.Tensor) -> frozenset[str]:
        return frozenset(('step', 'exp_avg', 'exp_avg_sq'))


# --------------------------------------------------------------------------------------------------
# Muon

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: maximal slope at zero
# Elements of the matrices that a rank orthogonalizes at a time, which bounds the memory.
STACKED_ELEMENTS = 2**26

# Factor of the learning rate for a matrix (R, C), whose update has singular values near 1.
LR_ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    # Liu et al. 2025: the RMS of an AdamW update, so that its learning rate and decay fit.
    'match_rms_adamw': lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    # Jordan et al. 2024.
    'original': lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
}


def orthogonalize(matrices: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """(..., R, C) -> approximately U Vᵀ of each matrix U S Vᵀ, with singular values of 0.7 to 1.2.

    Uses the quintic Newton–Schulz iteration of Jordan et al. 2024, in `dtype`.
    """
    a, b, c = NEWTON_SCHULZ
    # Scale singular values to at most 1, and make the shorter side the rows.
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = (matrices / norm.clamp(min=1e-7)).to(dtype).flatten(0, -3)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    # x <- a x + (b x xᵀ + c (x xᵀ)²) x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The items, each of them after the next one has been produced."""
    produced: deque[Any] = deque()
    for item in items:
        produced.append(item)
        del item  # released by the caller alone
        if len(produced) == 2:
            yield produced.popleft()
    yield from produced


class _MatrixStack(NamedTuple):
    """Matrices of the same shape, orthogonalized together."""

    group: int  # index of the parameter group
    keys: list[torch.Tensor]  # the shard of each that this rank updates
    shape: torch.Size  # of each whole matrix
    rows: tuple[int, ...]  # rows of the matrices stacked in each
    numbers: range  # indices of the matrices in the exchange


@OPTIMIZER_REGISTRY.register('muon', source='Jordan et al. 2024; Liu et al. 2025')
class Muon(OptimizerComponent, torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum for hidden matrices, fused AdamW for all others.

    Matrices that share a parameter (queries, keys and values; experts) are orthogonalized
    separately. The iteration runs in bfloat16 if the run's matrix multiplications do.

    Not torch.optim.Muon, which takes whole 2-D parameters on one device. Here several matrices may
    be stacked in one parameter, which may be sharded, and a step can be skipped on the device.
    """

    options: ClassVar = {
        **AdamW.options,
        'muon_momentum': Option(float, 0.95, "Momentum of Muon's matrices", check=DECAY),
        'muon_ns_steps': Option(
            int, 5, 'Number of Newton–Schulz iterations in Muon', check=at_least(1, at_most=100)
        ),
        'muon_adjust_lr_fn': Option(
            str,
            'match_rms_adamw',
            "Scaling of Muon's learning rate by matrix shape. match_rms_adamw: updates as large as "
            "AdamW's, so that its learning_rate and weight_decay fit; original: as in Jordan et "
            'al. (learning rate about 0.02)',
            choices=tuple(LR_ADJUSTMENTS),
        ),
        'muon_learning_rate': Option(
            float | None,
            None,
            "Peak learning rate of Muon's matrices; None: learning_rate",
            check=above(0),
        ),
    }
    param_groups: list[dict]

    def __init__(
        self, groups: list[ParameterGroup], run: TrainingConfig, parallel: ParallelStrategy
    ):
        matrices = [group for group in groups if group.rows is not None]
        rest = [group for group in groups if group.rows is None]
        lr_scale = run.muon_learning_rate / run.learning_rate
        super().__init__(torch_groups(matrices, run, parallel, 'Muon', lr_scale), {'lr': 0.0})
        begin_state(self, 'momentum_buffer')
        self.momentum, self.ns_steps = run.muon_momentum, run.muon_ns_steps
        self.adjustment = LR_ADJUSTMENTS[run.muon_adjust_lr_fn]
        self.dtype = torch.bfloat16 if run.dtype == 'bfloat16' else torch.float32
        self.stacks, ordered = self._stack_by_shape(matrices, parallel)
        self.exchange = parallel.matrix_exchange(ordered, self.dtype)
        self.bytes_sent = self.exchange.bytes_sent
        self.matrices = frozenset(key for stack in self.stacks for key in stack.keys)

        self.rest = AdamW(rest, run, parallel)
        self.state.update(self.rest.state)
        self.rest.state = self.state
        self.param_groups = [*self.param_groups, *self.rest.param_groups]

    def _stack_by_shape(
        self, groups: list[ParameterGroup], parallel: ParallelStrategy
    ) -> tuple[list[_MatrixStack], list[torch.Tensor]]:
        """The stacks of matrices by shape, and all matrices in the order of their numbers."""
        stacks: list[_MatrixStack] = []
        ordered: list[torch.Tensor] = []
        for group, matrices in enumerate(groups):
            by_shape: dict[tuple, list[torch.Tensor]] = {}
            for parameter, rows in zip(matrices.parameters, matrices.rows or []):
                by_shape.setdefault((parameter.shape, rows), []).append(parameter)
            # Stacks of one shape, as large as the memory of the ranks permits.
            for (shape, rows), parameters in by_shape.items():
                stack_size = max(1, parallel.world_size * STACKED_ELEMENTS // shape.numel())
                for first in range(0, len(parameters), stack_size):
                    stacked = parameters[first : first + stack_size]
                    numbers = range(len(ordered), len(ordered) + len(stacked))
                    keys = [parallel.shard(p).key for p in stacked]
                    stacks.append(_MatrixStack(group, keys, shape, rows, numbers))
                    ordered += stacked
        return stacks, ordered

    @torch.no_grad()
    def step(self) -> None:
        # Exchanges run while the device computes: a stack's gather while the previous stack is
        # orthogonalized, and its scatter while the next one is.
        skip = self.found_inf > 0
        gathers = one_ahead(self._start_gather(stack, skip) for stack in self.stacks)
        scatters = one_ahead(self._start_scatter(stack, gathers) for stack in self.stacks)
        rates = [self._rate_and_decay(group) for group in self.param_groups]
        for stack in self.stacks:
            self._update(stack, next(scatters).wait(), *rates[stack.group])
        self.rest.found_inf = self.found_inf
        self.rest.step()

    def _rate_and_decay(self, group: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Learning rate, and factor of the weights: 0 and 1 if the gradient is not finite."""
        rate = group['lr'] * (1.0 - self.found_inf)
        return rate, 1.0 - rate * group['weight_decay']

    def _start_gather(self, stack: _MatrixStack, skip: torch.Tensor) -> PendingExchange:
        """Update the momentum of this rank's shards, and gather the Nesterov momentum."""
        momenta = [local_tensor(self.state[key]['momentum_buffer']).view(-1) for key in stack.keys]
        gradients = [  # every rank exchanges every matrix, also one without gradient
            torch.zeros_like(momentum) if key.grad is None else local_tensor(key.grad).reshape(-1)
            for key, momentum in zip(stack.keys, momenta)
        ]
        # The momentum takes the place of a gradient that is not finite, and so does not change.
        gradient = torch.where(skip, torch.cat(momenta), torch.cat(gradients))
        shards = list(gradient.split([len(momentum) for momentum in momenta]))
        torch._foreach_lerp_(momenta, shards, 1.0 - self.momentum)
        torch._foreach_lerp_(shards, momenta, self.momentum)
        # All-to-all: shards of every matrix -> the whole matrices that this rank owns.
        return self.exchange.start_gather(stack.numbers, shards)

    def _start_scatter(
        self, stack: _MatrixStack, gathers: Iterator[PendingExchange]
    ) -> PendingExchange:
        """Orthogonalize the matrices that this rank owns, and scatter their update directions."""
        directions = self._directions(next(gathers).wait(), stack)
        # Back: update directions of every rank -> those of this rank's shards.
        return self.exchange.start_scatter_back(stack.numbers, directions)

    def _directions(self, matrices: list[torch.Tensor], stack: _MatrixStack) -> list[torch.Tensor]:
        """Whole matrices, flattened -> their update directions, flattened."""
        if not matrices:
            return []
        stacked = torch.stack([matrix.view(stack.shape) for matrix in matrices])  # (N, …, R, C)
        del matrices  # releases their memory
        columns = stack.shape[-1]
        # The matrices inside a parameter (q, k and v) separately, each with its own factor;
        # neighbors of the same shape in one batch: (N, …, matrices, rows, C).
        batches = [(rows, len(list(equal))) for rows, equal in groupby(stack.rows)]
        parts = stacked.split([rows * count for rows, count in batches], dim=-2)
        directions = [
            orthogonalize(part.unflatten(-2, (count, rows)), self.ns_steps, self.dtype)
            .mul_(self.adjustment(rows, columns))
            .flatten(-3, -2)
            for part, (rows, count) in zip(parts, batches)
        ]
        whole = directions[0] if len(directions) == 1 else torch.cat(directions, dim=-2)
        return list(whole.flatten(1))

    def _update(
        self,
        stack: _MatrixStack,
        directions: list[torch.Tensor],
        rate: torch.Tensor,
        decay: torch.Tensor,
    ) -> None:
        """Decoupled weight decay of this rank's shards, then the step."""
        weights = [local_tensor(key).view(-1) for key in stack.keys]
        steps = torch.cat(directions).float().mul_(rate)
        torch._foreach_mul_(weights, decay)
        torch._foreach_sub_(weights, steps.split([len(weight) for weight in weights]))

    @classmethod
    def derived_values(cls, config: TrainingConfig) -> dict[str, tuple]:
        return {'muon_learning_rate': (config.learning_rate, 'learning_rate')}

    def state_keys(self, parameter: torch.Tensor) -> frozenset[str]:
        matrix = parameter in self.matrices
        return frozenset(('momentum_buffer',)) if matrix else self.rest.state_keys(parameter)


# --------------------------------------------------------------------------------------------------
# Lion


# Elements that Lion updates at a time, which bounds the memory of their signs.
STEP_ELEMENTS = 2**28


@OPTIMIZER_REGISTRY.register('lion', source='Chen et al. 2023')
class Lion(OptimizerComponent, torch.optim.Optimizer):
    """Updates each weight by the sign of an average of gradient and momentum."""

    mup_rule = True
    options: ClassVar = {
        'lion_beta1': Option(
            float, 0.9, 'Weight of the momentum in the average whose sign Lion takes', check=DECAY
        ),
        'lion_beta2': Option(float, 0.99, "Decay rate of Lion's momentum", check=DECAY),
    }

    def __init__(
        self, groups: list[ParameterGroup], run: TrainingConfig, parallel: ParallelStrategy
    ):
        super().__init__(torch_groups(groups, run, parallel, 'Lion'), {'lr': 0.0})
        begin_state(self, 'exp_avg')
        self.beta1, self.beta2 = run.lion_beta1, run.lion_beta2

    @torch.no_grad()
    def step(self) -> None:
        finite = 1.0 - self.found_inf  # 1, or 0 if nothing may change
        share = (1.0 - self.beta2) * finite
        for by_rates in self._parts():
            keys = list(chain.from_iterable(by_rates.values()))
            gradients = [local_tensor(key.grad) for key in keys]
            momenta = [local_tensor(self.state[key]['exp_avg']) for key in keys]
            zero_unless(finite, gradients)
            # The signs of an average of gradient and momentum.
            signs = torch._foreach_lerp(gradients, momenta, self.beta1)
            torch._foreach_sign_(signs)
            torch._foreach_mul_(signs, finite)
            # Decoupled weight decay, then the step.
            remaining = iter(signs)
            for (rate, weight_decay), keys in by_rates.items():
                weights = [local_tensor(key) for key in keys]
                if weight_decay:
                    torch._foreach_mul_(weights, 1.0 - rate * finite * weight_decay)
                torch._foreach_add_(weights, list(islice(remaining, len(keys))), alpha=-rate)
            # The momentum.
            torch._foreach_mul_(momenta, 1.0 - share)
            torch._foreach_mul_(gradients, share)
            torch._foreach_add_(momenta, gradients)

    def _parts(self) -> Iterator[dict[tuple[float, float], list[torch.Tensor]]]:
        """The parameters with a gradient, by learning rate and weight decay, in few parts of up to
        STEP_ELEMENTS elements."""
        part: dict[tuple[float, float], list[torch.Tensor]] = {}
        elements = 0
        for group in self.param_groups:
            for key in group['params']:
                if key.grad is None:
                    continue
                size = local_tensor(key).numel()
                if part and elements + size > STEP_ELEMENTS:
                    yield part
                    part, elements = {}, 0
                part.setdefault((group['lr'], group['weight_decay']), []).append(key)
                elements += size
        if part:
            yield part

    def state_keys(self, parameter: torch.Tensor) -> frozenset[str]:
        return frozenset(('exp_avg',))
