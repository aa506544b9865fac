"""The report of a race: ratios of speeds in the same turns, and checks for equal work.

Used by `training_speed.py` and `process_speed.py`.
"""

import math
import shlex
import statistics
import sys
from importlib.metadata import PackageNotFoundError, version

import psutil

from benchmarks.race import CHECKED, PEERS, PROJECT, Race, Result
from common import hardware
from common.formatting import table

# Relative differences due to rounding: losses and norms agree to 1e-5 in fp32, and bfloat16 has 8
# bits.
TOLERANCE = {'loss': 0.01, 'norm': 0.05, 'flops': 0.01}


IDLE_SHARE = 0.01  # allowed CPU use of a waiting contestant


def spread(values: list[float]) -> dict[str, float]:
    return {'median': statistics.median(values), 'least': min(values), 'most': max(values)}


def ratios(mine: list[float], theirs: list[float]) -> dict[str, float]:
    """The ratios of two speeds in the same turns."""
    return spread([one / other for one, other in zip(mine, theirs, strict=True)])


def mfu(result: Result, flops: dict, products: list[dict]) -> dict[str, dict]:
    """MFU in percent of the fastest matrix product of the same turn, full square and causal."""
    peaks = [turn[result.dtype]['tflops'] * 1e12 for turn in products]
    return {
        key: spread([100 * s * flops[key] / p for s, p in zip(result.speeds, peaks, strict=True)])
        for key in ('per_token', 'per_token_causal')
    }


def relative_difference(one: list[float], other: list[float]) -> float:
    """The largest relative difference over the first iterations."""
    pairs = list(zip(one, other))[:CHECKED]
    return max(abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs)


def agreement(results: dict[str, Result], prepared: dict, comparable: bool) -> dict[str, dict]:
    """How far the work of each contestant differs from the first one with equal initial weights.

    `loss` and `norm` if both have the same initial weights and no dropout; `flops` always.
    `problems` lists differences above TOLERANCE.
    """
    reference = next((r for r in results.values() if r.kind != 'x-transformers'), None)
    by_contestant = {}
    for name, result in results.items():
        flops = result.start['flops']['per_token'] / prepared['flops']['per_token'] - 1.0
        by_contestant[name] = {
            'parameters': result.start['parameters'],
            'first_loss': result.losses[0],
            'first_norm': result.norms[0],
            'flops': abs(flops),
        }
        if comparable and reference and result.kind != 'x-transformers':
            by_contestant[name] |= {
                'loss': relative_difference(result.losses, reference.losses),
                'norm': relative_difference(result.norms, reference.norms),
            }
        by_contestant[name]['problems'] = [
            key for key, most in TOLERANCE.items() if not by_contestant[name].get(key, 0.0) <= most
        ]
        same_parameters = by_contestant[name]['parameters'] == prepared['parameters']
        if result.kind != 'x-transformers' and not same_parameters:
            by_contestant[name]['problems'].append('parameters')
    return by_contestant


def race_summary(race: Race) -> dict:
    """All results, for --json and the tables."""
    flops, results = race.prepared['flops'], race.results
    ours = [r for r in results.values() if not r.is_peer]
    rated = {}
    for name, result in results.items():
        start = result.start
        rated[name] = {
            'dtype': result.dtype,
            'tokens_per_sec': spread(result.speeds),
            'mfu_percent': mfu(result, flops, race.products),
            'peak_gb': result.peak_gb,
            **start,
            'compile_seconds': {
                key: start[key]['first_update_seconds'] - start['update_seconds']
                for key in ('cold', 'warm')
                if key in start
            },
            'steps_a_turn': result.steps,
            'seconds_of_turns': result.seconds,
            'losses': result.losses,
            'gradient_norms': result.norms,
            'computed_while_waiting': result.computed_waiting / max(result.waited, 1e-9),
            'against': {
                mine.name: {
                    'speed': ratios(mine.speeds, result.speeds),
                    'memory': mine.peak_gb / result.peak_gb if result.peak_gb else None,
                }
                for mine in ours
                if mine is not result
            },
        }
    dtypes = sorted({result.dtype for result in results.values()})
    commit, clean = hardware.git_state(PROJECT)
    return {
        'command': shlex.join(['python', *sys.argv]),
        'device': hardware.device_name(race.device),
        'threads': next(iter(results.values())).start['threads'],
        'memory_gb': psutil.virtual_memory().total / hardware.GB,
        'versions': {**hardware.versions(), **peers_versions()},
        'git_commit': commit,
        'git_clean': clean,
        'shape': {'name': race.options.shape, **race.shape},
        'tokens_per_update': next(iter(results.values())).start['tokens'],
        'flops': flops,
        'turns': race.options.turns,
        'peers_mallopt': race.options.peers_mallopt,
        'products': race.products,
        'best_product_tflops': {
            dtype: spread([turn[dtype]['tflops'] for turn in race.products]) for dtype in dtypes
        },
        'contestants': rated,
        'agreement': agreement(results, race.prepared, not race.shape['options']['dropout']),
        'left_out': race.left_out,
    }


def peers_versions() -> dict[str, str]:
    versions = {}
    for package in ('transformers', 'x-transformers'):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def best_peer(contestants: dict[str, dict]) -> str | None:
    """The peer with the highest median tokens/s."""
    peers = [name for name in contestants if name.partition('/')[0] in PEERS]
    return max(peers, key=lambda n: contestants[n]['tokens_per_sec']['median'], default=None)


def report_text(summary: dict) -> str:
    """The report as text."""
    return '\n\n'.join(
        [heading(summary), speeds(summary), against(summary), same_work(summary), *remarks(summary)]
    )


def heading(summary: dict) -> str:
    """The machine, versions and model."""
    shape = summary['shape']
    sizes, flops = shape['options'], summary['flops']
    versions = ', '.join(f'{name} {value}' for name, value in summary['versions'].items() if value)
    products = ', '.join(
        f'{spread_text(values, 3)} TFLOP/s {dtype}'
        for dtype, values in summary['best_product_tflops'].items()
    )
    commit = str(summary['git_commit'])[:9] + ('' if summary['git_clean'] else ' with changes')
    alike = ", the peers' processes set up like ours" if summary['peers_mallopt'] else ''
    return (
        f'{summary["device"]}, {summary["threads"]} threads, {summary["memory_gb"]:.0f} GB; '
        f'{versions}; commit {commit}\n'
        f'{shape["name"]}: {sizes["n_layer"]}L-{sizes["n_head"]}H-{sizes["n_embd"]}D, vocabulary '
        f'{shape["vocab_size"]:,}, dropout {sizes["dropout"]:g}; {sizes["batch_size"]} × '
        f'{sizes["block_size"]} tokens per iteration; {flops["per_token"] / 1e9:.3f} GFLOP '
        f'per token ({flops["per_token_causal"] / 1e9:.3f} causal)\n'
        f'fastest matrix multiplication: {products}\n'
        f'Medians [minimum, maximum] of {summary["turns"]} turns{alike}.'
    )


def speeds(summary: dict) -> str:
    """The table of contestants."""
    titles = 'dtype tokens/s MFU_% causal peak_GB set-up_s first_update_s compile_s warm'
    rows = [('', *(title.replace('_', ' ') for title in titles.split()))]
    for name, entry in summary['contestants'].items():
        shares, compiled = entry['mfu_percent'], entry['compile_seconds']
        rows.append(
            (
                name,
                entry['dtype'],
                spread_text(entry['tokens_per_sec'], 0),
                f'{shares["per_token"]["median"]:.1f}',
                f'{shares["per_token_causal"]["median"]:.1f}',
                f'{entry["peak_gb"]:.2f}',
                f'{entry["set_up_seconds"]:.1f}',
                f'{entry["first_update_seconds"]:.1f}',
                *(f'{compiled[key]:.1f}' if key in compiled else '' for key in ('cold', 'warm')),
            )
        )
    return (
        f'{padded_table(rows)}\n'
        f'Set-up: from the command to the first iteration, without evaluation.\n'
        f'Compile: what the first update takes beyond a later one, with an empty cache and with a '
        f'warm one.'
    )


def against(summary: dict) -> str:
    """The table of ratios of ours to every peer."""
    contestants, best = summary['contestants'], best_peer(summary['contestants'])
    ours = [name for name in contestants if name.partition('/')[0] not in PEERS]
    rows = [('tokens/s (memory) against', *ours)]
    for name, entry in contestants.items():
        cells = [''] * len(ours)
        for column, mine in enumerate(ours):
            if ratio := entry['against'].get(mine):
                cells[column] = spread_text(ratio['speed'], 2)
                cells[column] += f' ({ratio["memory"]:.2f})' if ratio['memory'] else ''
        rows.append((name, *cells, '← the best peer' if name == best else ''))
    return padded_table(rows)


def same_work(summary: dict) -> str:
    """The table of checks for equal work."""
    rows = [('same work?', 'parameters', 'FLOPs', 'first loss', 'norm', 'loss', 'norm', '')]
    for name, entry in summary['agreement'].items():
        rows.append(
            (
                name,
                f'{entry["parameters"]:,}',
                f'{entry["flops"]:.1e}',
                f'{entry["first_loss"]:.4f}',
                f'{entry["first_norm"]:.4f}',
                *(f'{entry[key]:.1e}' if key in entry else '' for key in ('loss', 'norm')),
                f'DIFFERS: {", ".join(entry["problems"])}' if entry['problems'] else '',
            )
        )
    return (
        f'{padded_table(rows)}\n'
        f'FLOPs, and loss and norm on the right: relative differences, these of the first '
        f'{CHECKED} updates;\nempty where the first weights could not be made equal.'
    )


def remarks(summary: dict) -> list[str]:
    """Warnings, and contestants that were left out."""
    busy = [
        f'warning: {name} used {100 * entry["computed_while_waiting"]:.1f} % of a core '
        f'while waiting'
        for name, entry in summary['contestants'].items()
        if entry['computed_while_waiting'] > IDLE_SHARE
    ]
    return busy + [f'left out: {why}' for why in summary['left_out']]


def spread_text(values: dict, digits: int) -> str:
    middle, least, most = (f'{values[k]:,.{digits}f}' for k in ('median', 'least', 'most'))
    return f'{middle} [{least}, {most}]'


def padded_table(rows: list[tuple]) -> str:
    """A table whose rows may have missing cells on the right."""
    most = max(map(len, rows))
    return table([(*row, *[''] * (most - len(row))) for row in rows], '<' * most)
