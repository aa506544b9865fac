"""Handmade records of a ladder: several variants at several sizes with several seeds."""

import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from comparison.study_plan import read_study_plan
from helpers.run_records import make_record

TOKENS_PER_PARAM, TOKENS_PER_ITER, EVALUATIONS = 20, 4096, 10
FULL_SQUARE = 1.25  # FLOPs with attention over the full square, over those of the causal half
FLOPS_PER_SECOND = 1e9
START = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Curve(NamedTuple):
    """The mean loss of a variant, E + A · C^-α, and its FLOPs relative to 6 N per token."""

    irreducible: float
    scale: float
    exponent: float
    cost: float = 1.0

    def loss(self, flops: float) -> float:
        return self.irreducible + self.scale * flops**-self.exponent

    def flops_per_token(self, params: int) -> float:
        return 6 * params * self.cost


STANDARD = Curve(1.5, 90.0, 0.15)
# Baseline first; the other reaches the same loss with 1 / 1.3 of the FLOPs at every size.
CURVES = {'ffn_type=standard': STANDARD, 'ffn_type=swiglu': Curve(1.5, 90.0 / 1.3**0.15, 0.15)}
PARAMS = (100_000, 200_000, 400_000, 800_000)


class Place(NamedTuple):
    """Where a run stands in a ladder."""

    variant: str
    rung: int  # from 0
    seed: int


def rung_options(rung: int) -> dict[str, int]:
    return {'n_layer': rung + 2, 'n_embd': 64 * (rung + 1), 'n_head': rung + 1}


def rung_label(rung: int) -> str:
    return ' '.join(f'{key}={value}' for key, value in rung_options(rung).items())


def tokens_of(params: int) -> int:
    return _iterations(params) * TOKENS_PER_ITER


def _iterations(params: int) -> int:
    return round(TOKENS_PER_PARAM * params / TOKENS_PER_ITER)


def write_ladder(
    folder: Path,
    curves: Mapping[str, Curve] = CURVES,
    *,
    params: Sequence[int] = PARAMS,
    seeds: Sequence[int] = (1, 2, 3),
    noise: float | Sequence[float] = 0.004,
    extra: int = 1,
    draw: int = 0,
    change: Callable[[dict, Place], object] = lambda record, place: None,
    **plan,
) -> Path:
    """Write the records of a ladder and its study.json. The first of `curves` is the baseline.

    params: at each rung that all variants train; each of `extra` rungs doubles the last one.
    noise: standard deviation of a loss over seeds, or one for each rung. Half of the variance is
    an effect that all variants share with equal seeds.
    draw: of the random numbers.
    change: edits a record before it is written; with the result False, the run is left out.
    plan: overrides of keys of study.json.
    """
    params = [*params, *(params[-1] * 2**step for step in range(1, extra + 1))]
    baseline = next(iter(curves))
    points = []
    for rung, size in enumerate(params):
        deviation = noise if isinstance(noise, int | float) else noise[rung]
        variants = [baseline] if rung >= len(params) - extra else curves
        for place, of_all, own in _places(variants, rung, seeds, draw):
            curve = curves[place.variant]
            flops = curve.flops_per_token(size) * tokens_of(size)
            loss = curve.loss(flops) + deviation * math.sqrt(0.5) * (of_all + own)
            record = ladder_record(place, size, curve, loss, number=len(points))
            of_rung, of_variant = map(_folder_name, (rung_label(rung), place.variant))
            trial = f'runs/{of_rung}/{of_variant}/seed={place.seed}'
            points.append({'folder': trial, 'variant': place.variant, 'rung': rung})
            if change(record, place) is not False:
                run = folder / trial / record['run_name']
                run.mkdir(parents=True)
                (run / 'record.json').write_text(json.dumps(record), encoding='utf-8')
    content = ladder_plan(curves, params, extra) | {'points': points} | plan
    (folder / 'study.json').write_text(json.dumps(content), encoding='utf-8')
    read_study_plan.cache_clear()
    return folder


def _folder_name(label: str) -> str:
    return re.sub(r'[^\w.=+-]+', '_', label)


def _places(variants, rung, seeds, draw):
    """Each run of a rung with the random effect of its seed and its own."""
    for seed in seeds:
        of_all = random.Random(f'{draw} {rung} {seed}').gauss(0, 1)
        for variant in variants:
            own = random.Random(f'{draw} {rung} {seed} {variant}').gauss(0, 1)
            yield Place(variant, rung, seed), of_all, own


def ladder_plan(curves: Mapping[str, Curve], params: Sequence[int], extra: int) -> dict:
    """study.json without its points."""
    variants = [
        {
            'label': label,
            'asked': dict(part.split('=', 1) for part in label.split()),
            'matched': None,
            'tuned': {},
            'tuned_at_edge': [],
        }
        for label in curves
    ]
    return {
        'question': 'Gated?',
        'command': 'python study.py ladder.py',
        'budget': {},
        'tuned': [],
        'baseline': variants[0]['label'],
        'variants': variants,
        'ladder': {
            'horizon': {'tokens_per_param': TOKENS_PER_PARAM},
            'transfer': 'none',
            'rungs': [
                {
                    'label': rung_label(rung),
                    'options': rung_options(rung),
                    'params': size,
                    'extra': rung >= len(params) - extra,
                    'budget': {'tokens': float(tokens_of(size))},
                    'variants': variants[:1] if rung >= len(params) - extra else variants,
                }
                for rung, size in enumerate(params)
            ],
        },
    }


def ladder_record(place: Place, params: int, curve: Curve, loss: float, number: int = 0) -> dict:
    """A record of a finished run with this final loss. `number` orders the runs in time."""
    iterations, tokens = _iterations(params), tokens_of(params)
    per_token = curve.flops_per_token(params)
    flops = per_token * tokens
    options = dict(part.split('=', 1) for part in place.variant.split()) | rung_options(place.rung)
    record = make_record(
        loss=loss, seed=place.seed, data_seed=place.seed, max_iters=iterations, **options
    )
    start = START + timedelta(seconds=number)
    record |= {'run_name': f'run_{start:%Y%m%d_%H%M%S}', 'start_time': start.isoformat()}
    record['config'] |= {'warmup_iters': 0, 'lr_decay_iters': iterations}
    record['architecture'] = {
        'name': f'{place.rung + 2}L {place.variant}',
        'hash': f'{place.rung} {place.variant}',
        'choices': options,
    }
    record['startup_info']['model']['total_params'] = params
    record['startup_info']['flops'] = {
        'per_token': FULL_SQUARE * per_token,
        'per_token_causal': per_token,
    }
    record['eval_steps'] = [
        {
            'iter': done,
            'train_loss': value,
            'val_loss': value,
            'val_bits_per_byte': value * 0.4,
            'tokens_seen': done * TOKENS_PER_ITER,
            'train_seconds': flops / FLOPS_PER_SECOND * done / iterations,
        }
        for done, value in _evaluations(curve, flops, loss, iterations)
    ]
    record['summary'] |= {
        'final_iter': iterations,
        'total_iterations': iterations,
        'total_tokens': tokens,
        'total_flops': FULL_SQUARE * flops,
        'train_seconds': flops / FLOPS_PER_SECOND,
        'best_val_loss': loss,
        'final_val_loss': loss,
    }
    return record


def _evaluations(
    curve: Curve, flops: float, loss: float, iterations: int
) -> list[tuple[int, float]]:
    """(iteration, loss): the untrained model, and EVALUATIONS losses that fall to the last."""
    reducible = curve.scale * flops**-curve.exponent
    shares = [step / EVALUATIONS for step in range(1, EVALUATIONS + 1)]
    return [
        (0, 10.9),
        *((round(share * iterations), loss + reducible * (share**-0.5 - 1)) for share in shares),
    ]


def diverge(record: dict) -> None:
    """Make the run one that diverged."""
    record['status'] = 'failed'
    record['events'] = [{'event': 'nonfinite', 'iter': 7}, {'event': 'failed', 'iter': 7}]


def interrupt(record: dict) -> None:
    """Make the run one that stopped in the middle."""
    record['status'] = 'interrupted'
    half = len(record['eval_steps']) // 2
    record['eval_steps'] = record['eval_steps'][:half]
    record['summary']['final_iter'] = record['eval_steps'][-1]['iter']
