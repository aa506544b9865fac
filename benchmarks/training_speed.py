"""Training speed beside what a user would take instead: the same work, in turns, in one run.

    python benchmarks/training_speed.py --shape=gpt2-124m --nanogpt=PATH [--json=speed.json]
    python benchmarks/training_speed.py --shape=llama-12l --contestants=ours,transformers/compile
    python benchmarks/training_speed.py --shape=tiny --turns=2 --seconds=1       # a try

Each contestant is a process of its own. They are started one after the other and stay alive, and
then take turns, A B C A B C …, since the speed of a machine drifts: only what ran in the same turn
is compared. A turn is an update that is not timed and then as many as take --seconds; between
turns a contestant waits, without using the processor, and gives back memory that it does not use.

All do the same: model, first weights where they can be carried over, tokens and their order, batch,
precision, AdamW, clipping. The losses and gradient norms of their first updates are compared, and
the FLOPs of a token; a contestant that does not agree makes the exit code 1.

Contestants: ours (train.py) and, each if it is there, nanogpt (a checkout: --nanogpt), transformers
(pip install transformers), x-transformers (pip install x-transformers). nanogpt/cpu-recipe is what
nanoGPT's README runs on a CPU: fp32, not compiled. MFU is against the fastest matrix multiplication
of the same turn, in the contestant's dtype, at several shapes and those of the model; `causal`
counts attention over the half that a causal model needs, the other over the full square.

Options that are not known here are train.py's and go to ours: --attention_backend=manual.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from common import hardware  # noqa: E402
from common.errors import ArgumentParser, UserError, did_you_mean, run_script  # noqa: E402
from common.formatting import table  # noqa: E402

GPT2 = {'arch_preset': 'legacy', 'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'bias': True}
LLAMA = {**GPT2, 'arch_preset': 'llama', 'bias': False}
SMALL = {'n_layer': 2, 'n_head': 2, 'n_embd': 64}


def shape(family: str, vocab_size: int, block_size: int, batch_size: int, **sizes) -> dict:
    """A model and its batch; `options` are train.py's."""
    options = {**{'gpt2': GPT2, 'llama': LLAMA}[family], **sizes, 'dropout': 0.0}
    options |= {'block_size': block_size, 'batch_size': batch_size}
    return {'family': family, 'vocab_size': vocab_size, 'options': options}


SHAPES = {
    'gpt2-124m': shape('gpt2', 50304, 1024, 4),
    'llama-12l': shape('llama', 50304, 1024, 4),
    # nanoGPT's config/train_shakespeare_char.py; its dropout is --dropout=0.2
    'char': shape('gpt2', 65, 256, 64, n_layer=6, n_head=6, n_embd=384),
    'long': shape('gpt2', 50304, 4096, 1),
    'tiny': shape('gpt2', 256, 64, 4, **SMALL),
    'tiny-llama': shape('llama', 256, 64, 4, **SMALL),
}
MODES = {
    'eager': {},
    'compile': {'compile': True},
    'checkpoint': {'checkpoint': True},
    'compile-checkpoint': {'compile': True, 'checkpoint': True},
    'cpu-recipe': {'dtype': 'float32'},
}
OURS = ('eager', 'compile', 'checkpoint', 'compile-checkpoint')
PEERS = {
    'nanogpt': ('eager', 'compile', 'cpu-recipe'),
    'transformers': ('eager', 'compile'),
    'x-transformers': ('eager', 'compile'),
}
# Relative differences that rounding explains: the losses and norms of fp32 agree to 1e-5, and
# bfloat16 has 8 bits.
TOLERANCE = {'loss': 0.01, 'norm': 0.05, 'flops': 0.01}
CHECKED = 4  # updates
SPARE = 1.2  # times the largest peak: memory that must be free to start one more
IDLE = 0.01  # of its waiting time that a contestant may compute


# --- A contestant, from outside -------------------------------------------------------------------


class Lost(Exception):
    """A contestant ended by itself: with what it said last."""


class Contestant:
    """A process that is told what to do and answers."""

    def __init__(self, name: str, told: dict, log: Path, environment: dict | None = None):
        self.name, self.log = name, log
        self.began = time.time()
        environment = {**os.environ, **(environment or {})}
        if 'cache' in told:
            environment['TORCHINDUCTOR_CACHE_DIR'] = told['cache']
        script = PROJECT / 'benchmarks' / 'contestants.py'
        with open(log, 'w') as file:
            self.process = subprocess.Popen(
                [sys.executable, script, json.dumps({'project': str(PROJECT), **told})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def answer(self) -> dict:
        """What it says next. Raises Lost."""
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            last = self.log.read_text(errors='replace').strip().splitlines()[-12:]
            raise Lost(f'{self.name} ended with exit code {code}:\n  ' + '\n  '.join(last))
        return json.loads(line)

    def tell(self, **command) -> None:
        with contextlib.suppress(BrokenPipeError):  # that there is no answer tells why
            self.process.stdin.write(json.dumps(command) + '\n')
            self.process.stdin.flush()

    def ask(self, **command) -> dict:
        """What it answers to a command. Raises Lost."""
        self.tell(**command)
        return self.answer()

    def processor_seconds(self) -> float:
        """That it has computed, with the processes that it started."""
        process = psutil.Process(self.process.pid)
        seconds = sum(process.cpu_times()[:2])
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end at any time
                seconds += sum(child.cpu_times()[:2])
        return seconds

    def end(self) -> None:
        """With whatever it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Result:
    """What was found of one contestant."""

    name: str
    dtype: str
    start: dict = field(default_factory=dict)  # seconds; parameters; FLOPs
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    steps: int = 1  # a turn
    seconds: list[float] = field(default_factory=list)  # of each turn
    peak_gb: float = 0.0
    waited: float = 0.0
    computed_waiting: float = 0.0

    def note(self, answer: dict) -> None:
        self.losses += [loss for loss, _ in answer['measured']]
        self.norms += [norm for _, norm in answer['measured']]
        self.peak_gb = max(self.peak_gb, answer['peak_gb'] or 0.0)

    @property
    def speeds(self) -> list[float]:
        """Tokens/s of each turn."""
        return [self.start['tokens'] * self.steps / seconds for seconds in self.seconds]

    @property
    def kind(self) -> str:
        return self.name.partition('/')[0]

    @property
    def is_peer(self) -> bool:
        return self.kind in PEERS


# --- Who takes part -------------------------------------------------------------------------------


def chosen(options: argparse.Namespace, device: str) -> tuple[dict[str, dict], list[str]]:
    """Contestant -> what is particular to it; and who is left out, a sentence each."""
    modes = {'ours': options.ours, **({'other': options.ours} if options.other else {}), **PEERS}
    problems = {
        'nanogpt': 'name a checkout with --nanogpt=PATH' * (not options.nanogpt),
        'transformers': missing('transformers', 'transformers'),
        'x-transformers': missing('x_transformers', 'x-transformers'),
    }
    if SHAPES[options.shape]['family'] == 'llama':
        problems['nanogpt'] = 'it has no Llama'
    everyone = [f'{kind}/{mode}' for kind in modes for mode in modes[kind]]
    for wanted in options.contestants:
        if wanted not in modes and wanted not in everyone:
            hint = did_you_mean(wanted, [*modes, *everyone])
            raise UserError(
                f'--contestants={wanted}: there are {", ".join(modes)}, and each of '
                f'{", ".join(everyone)}.{hint}'
            )
    found, left_out = {}, []
    for name in everyone:
        kind, _, mode = name.partition('/')
        if options.contestants and not {kind, name} & set(options.contestants):
            continue
        if mode == 'cpu-recipe' and device != 'cpu':
            continue
        if problems.get(kind):
            if f'{kind}: {problems[kind]}' not in left_out:
                left_out.append(f'{kind}: {problems[kind]}')
            continue
        found[name] = {'kind': kind, **MODES[mode]}
    if not found:
        raise UserError('Nobody takes part.', *left_out)
    return found, left_out


def missing(module: str, package: str) -> str:
    return '' if find_spec(module) else f'pip install {package}'


def product_shapes(shape: dict, d_ff: int) -> list[list[int]]:
    """(rows, inner, columns) of the matrix multiplications to try: squares, and the model's."""
    sizes = shape['options']
    tokens, width = sizes['batch_size'] * sizes['block_size'], sizes['n_embd']
    return [
        *([size] * 3 for size in (1024, 2048, 4096)),
        [tokens, width, 3 * width],
        [tokens, width, d_ff],
        [tokens, d_ff, width],
        [d_ff, tokens, width],
        [tokens, width, shape['vocab_size']],
    ]


# --- The race -------------------------------------------------------------------------------------


def seconds_left(began: float, done: int, of_all: int) -> float:
    """For the rest of equal parts, of which so many are done since `began` (time.monotonic())."""
    return (time.monotonic() - began) / done * (of_all - done)


class Race:
    """The contestants, and what has been found of them."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.began = time.monotonic()
        self.device = hardware.select_device(options.device)
        self.shape = copy.deepcopy(SHAPES[options.shape])
        for key in ('batch_size', 'dropout', 'bias'):
            if getattr(options, key) is not None:
                self.shape['options'][key] = getattr(options, key)
        self.contestants, self.left_out = chosen(options, self.device.type)
        self.running: dict[str, Contestant] = {}
        self.results: dict[str, Result] = {}
        self.products: list[dict] = []  # of each turn: dtype -> tflops and shape
        self.prepared: dict = {}

    def told(self, name: str) -> dict:
        """What a contestant needs to know."""
        own, options = self.contestants.get(name, {}), self.options
        kind = own.get('kind', name)
        told = {
            'kind': kind,
            'shape': self.shape,
            'folder': str(self.folder),
            'device': str(self.device),
            'dtype': options.dtype,
            'mallopt': options.peers_mallopt,
            'given': options.given,
            **own,
        }
        if kind == 'other':
            told['project'] = str(Path(options.other).resolve())
        if kind == 'nanogpt':
            told['nanogpt'] = str(Path(options.nanogpt).resolve())
        if kind in PEERS:
            told |= {'fields': self.prepared['transformers'], 'd_ff': self.prepared['d_ff']}
        if own.get('compile'):
            told['cache'] = str(self.folder / 'cache' / name.replace('/', '-'))
        return told

    def launch(self, name: str, **more) -> Contestant:
        log = self.folder / f'{name.replace("/", "-")}.log'
        self.running[name] = Contestant(name, {**self.told(name), **more}, log)
        return self.running[name]

    def run(self) -> None:
        """Prepare, start everybody, and let them take turns."""
        peers = sorted({own['kind'] for own in self.contestants.values()} & PEERS.keys())
        self.say('tokens, batches and first weights')
        self.prepared = self.launch('prepare', peers=peers).answer()
        self.running.pop('prepare').end()
        if problem := self.prepared.get('transformers_problem'):
            self.leave_out('transformers', problem)
        for name in list(self.contestants):
            self.attempt(name, self.start)
        if not self.results:
            raise UserError('Nobody is left.', *self.left_out)
        dtypes = sorted({result.dtype for result in self.results.values()})
        shapes = product_shapes(self.shape, self.prepared['d_ff'])
        probe = self.launch('products', products=shapes, dtypes=dtypes)
        probe.answer()  # a warm-up
        self.waiting_since = {name: self.clocks(name) for name in self.results}
        began, done = time.monotonic(), 0
        for turn in range(1, self.options.turns + 1):
            for name in list(self.results):
                self.attempt(name, self.turn)
                if name in self.results:
                    done += 1
                    left = seconds_left(began, done, self.options.turns * len(self.results))
                    self.say(
                        f'turn {turn}/{self.options.turns} {name}: '
                        f'{self.results[name].speeds[-1]:,.0f} tokens/s | about {left:.0f} s left'
                    )
            self.products.append(probe.ask())

    def attempt(self, name: str, action) -> None:
        """Do it; a contestant that fails is left out, and told of."""
        try:
            action(name)
        except Lost as lost:
            self.running.pop(name).end()
            self.results.pop(name, None)
            self.left_out.append(str(lost))
            self.say(self.left_out[-1])

    def leave_out(self, kind: str, why: str) -> None:
        self.left_out.append(f'{kind}: {why}')
        for name in [n for n, own in self.contestants.items() if own['kind'] == kind]:
            del self.contestants[name]

    def start(self, name: str) -> None:
        """Start it, twice if it compiles: with an empty cache, then with what is in it."""
        own = self.contestants[name]
        largest = max((r.peak_gb for r in self.results.values()), default=0.0)
        available = psutil.virtual_memory().available / hardware.GB
        if self.device.type == 'cpu' and available < SPARE * largest:
            self.left_out.append(
                f'{name}: {available:.1f} GB are free beside those who wait, and a turn takes up '
                f'to {largest:.1f} GB. Choose fewer with --contestants.'
            )
            return
        result = Result(name, own.get('dtype', self.options.dtype))
        compiled = own.get('compile', False)
        starts = self.options.starts if compiled else 1
        for number in range(starts):
            self.say(f'starting {name}' + (', with a warm cache' if number else ''))
            contestant = self.launch(name)
            first = contestant.answer()
            times = {
                'set_up_seconds': first['first_began'] - contestant.began,
                'first_update_seconds': first['first_ended'] - first['first_began'],
            }
            if compiled:
                result.start['cold' if number == 0 else 'warm'] = times
            if number < starts - 1:
                self.running.pop(name).end()
        result.start |= {**times, **{k: first[k] for k in ('parameters', 'flops', 'tokens')}}
        result.start['threads'] = first['threads']
        result.note(first)
        for _ in range(2):  # the second one is settled
            answer = contestant.ask(steps=1)
            result.note(answer)
        result.start['update_seconds'] = answer['seconds']
        wanted = math.ceil(self.options.seconds / answer['seconds'])
        result.steps = self.options.steps or max(1, wanted)
        self.results[name] = result

    def clocks(self, name: str) -> tuple[float, float]:
        return time.monotonic(), self.running[name].processor_seconds()

    def turn(self, name: str) -> None:
        """So many updates, timed; and what it did since its last turn."""
        result = self.results[name]
        then, before = self.waiting_since[name]
        now, computed = self.clocks(name)
        result.waited += now - then
        result.computed_waiting += computed - before
        answer = self.running[name].ask(steps=result.steps)
        result.note(answer)
        result.seconds.append(answer['seconds'])
        self.waiting_since[name] = self.clocks(name)

    def end(self) -> None:
        for contestant in self.running.values():
            contestant.end()

    def say(self, text: str) -> None:
        spent = time.monotonic() - self.began
        print(f'{spent:6.0f} s  {text}', file=sys.stderr, flush=True)


# --- What is made of it ---------------------------------------------------------------------------


def spread(values: list[float]) -> dict[str, float]:
    return {'median': statistics.median(values), 'least': min(values), 'most': max(values)}


def ratios(mine: list[float], theirs: list[float]) -> dict[str, float]:
    """Of the same turn, one by the other."""
    return spread([one / other for one, other in zip(mine, theirs, strict=True)])


def mfu(result: Result, flops: dict, products: list[dict]) -> dict[str, dict]:
    """Percent of the fastest matrix multiplication of the same turn, in both conventions."""
    peaks = [turn[result.dtype]['tflops'] * 1e12 for turn in products]
    return {
        key: spread([100 * s * flops[key] / p for s, p in zip(result.speeds, peaks, strict=True)])
        for key in ('per_token', 'per_token_causal')
    }


def difference(one: list[float], other: list[float]) -> float:
    """The largest relative difference of the first updates."""
    pairs = list(zip(one, other))[:CHECKED]
    return max(abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs)


def agreement(results: dict[str, Result], prepared: dict, comparable: bool) -> dict[str, dict]:
    """How far each contestant's work is from that of the first one that starts alike.

    `loss` and `norm` where both began with the same weights (and nothing is dropped at random);
    `flops` always. `problems` are those beyond TOLERANCE.
    """
    reference = next((r for r in results.values() if r.kind != 'x-transformers'), None)
    found = {}
    for name, result in results.items():
        flops = result.start['flops']['per_token'] / prepared['flops']['per_token'] - 1.0
        found[name] = {
            'parameters': result.start['parameters'],
            'first_loss': result.losses[0],
            'first_norm': result.norms[0],
            'flops': abs(flops),
        }
        if comparable and reference and result.kind != 'x-transformers':
            found[name] |= {
                'loss': difference(result.losses, reference.losses),
                'norm': difference(result.norms, reference.norms),
            }
        found[name]['problems'] = [
            key for key, most in TOLERANCE.items() if not found[name].get(key, 0.0) <= most
        ]
        alike = found[name]['parameters'] == prepared['parameters']
        if result.kind != 'x-transformers' and not alike:
            found[name]['problems'].append('parameters')
    return found


def summary(race: Race) -> dict:
    """Everything, for --json and the tables."""
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
    found = {}
    for package in ('transformers', 'x-transformers'):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def best_peer(contestants: dict[str, dict]) -> str | None:
    """The peer with the most tokens/s, by the median."""
    peers = [name for name in contestants if name.partition('/')[0] in PEERS]
    return max(peers, key=lambda n: contestants[n]['tokens_per_sec']['median'], default=None)


def report(found: dict) -> str:
    """Everything that is shown."""
    return '\n\n'.join(
        [heading(found), speeds(found), against(found), same_work(found), *remarks(found)]
    )


def heading(found: dict) -> str:
    """Where it ran, and what."""
    shape = found['shape']
    sizes, flops = shape['options'], found['flops']
    versions = ', '.join(f'{name} {value}' for name, value in found['versions'].items() if value)
    products = ', '.join(
        f'{shown(values, 3)} TFLOP/s {dtype}'
        for dtype, values in found['best_product_tflops'].items()
    )
    alike = ", the peers' processes set up like ours" if found['peers_mallopt'] else ''
    return (
        f'{found["device"]}, {found["threads"]} threads, {found["memory_gb"]:.0f} GB; {versions}; '
        f'commit {str(found["git_commit"])[:9]}{"" if found["git_clean"] else " with changes"}\n'
        f'{shape["name"]}: {sizes["n_layer"]}L-{sizes["n_head"]}H-{sizes["n_embd"]}D, vocabulary '
        f'{shape["vocab_size"]:,}, dropout {sizes["dropout"]:g}; {sizes["batch_size"]} × '
        f'{sizes["block_size"]} tokens an update; {flops["per_token"] / 1e9:.3f} GFLOP a token '
        f'({flops["per_token_causal"] / 1e9:.3f} causal)\n'
        f'fastest matrix multiplication: {products}\n'
        f'Medians [least, most] of {found["turns"]} turns{alike}.'
    )


def speeds(found: dict) -> str:
    """Each contestant by itself."""
    titles = 'dtype tokens/s MFU_% causal peak_GB set-up_s first_update_s compile_s warm'
    rows = [('', *(title.replace('_', ' ') for title in titles.split()))]
    for name, entry in found['contestants'].items():
        shares, compiled = entry['mfu_percent'], entry['compile_seconds']
        rows.append(
            (
                name,
                entry['dtype'],
                shown(entry['tokens_per_sec'], 0),
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
        f'Set-up: from the command to the beginning of the first update, no evaluation before it.\n'
        f'Compile: what the first update takes beyond a later one, with an empty cache and with a '
        f'warm one.'
    )


def against(found: dict) -> str:
    """Ours against everybody, in turns."""
    contestants, best = found['contestants'], best_peer(found['contestants'])
    ours = [name for name in contestants if name.partition('/')[0] not in PEERS]
    rows = [('tokens/s (memory) against', *ours)]
    for name, entry in contestants.items():
        cells = [''] * len(ours)
        for column, mine in enumerate(ours):
            if ratio := entry['against'].get(mine):
                cells[column] = shown(ratio['speed'], 2)
                cells[column] += f' ({ratio["memory"]:.2f})' if ratio['memory'] else ''
        rows.append((name, *cells, '← the best peer' if name == best else ''))
    return padded_table(rows)


def same_work(found: dict) -> str:
    """Whether all did the same."""
    rows = [('same work?', 'parameters', 'FLOPs', 'first loss', 'norm', 'loss', 'norm', '')]
    for name, entry in found['agreement'].items():
        rows.append(
            (
                name,
                f'{entry["parameters"]:,}',
                f'{entry["flops"]:.1e}',
                f'{entry["first_loss"]:.4f}',
                f'{entry["first_norm"]:.4f}',
                *(f'{entry[key]:.1e}' if key in entry else '' for key in ('loss', 'norm')),
                f'NOT THE SAME: {", ".join(entry["problems"])}' if entry['problems'] else '',
            )
        )
    return (
        f'{padded_table(rows)}\n'
        f'FLOPs, and loss and norm on the right: relative differences, these of the first '
        f'{CHECKED} updates;\nempty where the first weights could not be made equal.'
    )


def remarks(found: dict) -> list[str]:
    """What should be known beside the figures."""
    busy = [
        f'warning: {name} used {100 * entry["computed_while_waiting"]:.1f} % of a core in waiting'
        for name, entry in found['contestants'].items()
        if entry['computed_while_waiting'] > IDLE
    ]
    return busy + [f'left out: {why}' for why in found['left_out']]


def shown(values: dict, digits: int) -> str:
    middle, least, most = (f'{values[k]:,.{digits}f}' for k in ('median', 'least', 'most'))
    return f'{middle} [{least}, {most}]'


def padded_table(rows: list[tuple]) -> str:
    """A table of rows that may lack cells on the right."""
    most = max(map(len, rows))
    return table([(*row, *[''] * (most - len(row))) for row in rows], '<' * most)


# --- The command line -----------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; those of train.py in `given`. Raises UserError."""
    parser = ArgumentParser(
        prog='training_speed.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--shape', choices=SHAPES, default='gpt2-124m', help='default gpt2-124m')
    add('--contestants', type=words, default=[], help='kinds or kind/mode, with commas; all')
    add('--ours', type=words, default=[*OURS], help=f'modes of ours: {",".join(OURS)}')
    add('--nanogpt', help='a checkout of nanoGPT')
    add('--other', help='another checkout of this project, to take part as other/…')
    add('--turns', type=int, default=5, help='default 5')
    add('--seconds', type=float, default=10.0, help='of a turn, at least (default 10)')
    add('--steps', type=int, help='updates of a turn, instead of --seconds')
    add('--starts', type=int, choices=(1, 2), default=2, help='of those that compile: 2 (default) '
        'measures a warm cache too')  # fmt: skip
    add('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    add('--dtype', choices=('bfloat16', 'float32'), default='bfloat16', help='default bfloat16')
    add('--batch_size', type=int, help="sequences an update; the shape's")
    add('--dropout', type=float, help='default 0; with it losses are not compared')
    add('--bias', type=truth, help="False: without biases, which transformers' GPT-2 cannot")
    add('--peers_mallopt', type=truth, nargs='?', const=True, default=False,
        help="True: the peers' processes are set up like ours (hardware.tune)")  # fmt: skip
    add('--json', type=Path, help='write everything that was measured here')
    options, options.given = parser.parse_known_args(argv)
    unknown = [mode for mode in options.ours if mode not in OURS]
    if unknown:
        raise UserError(f'--ours={",".join(unknown)}: there are {", ".join(OURS)}.')
    for key in ('nanogpt', 'other'):
        path, needed = getattr(options, key), {'nanogpt': 'model.py', 'other': 'train.py'}[key]
        if path and not Path(path, needed).is_file():
            raise UserError(f'--{key}={path}: there is no {needed} in it.')
    for key in ('turns', 'steps', 'batch_size'):
        if getattr(options, key) is not None and getattr(options, key) < 1:
            raise UserError(f'--{key} must be at least 1.')
    return options


def truth(text: str) -> bool:
    if text not in ('True', 'False'):
        raise argparse.ArgumentTypeError(f'{text!r} is neither True nor False')
    return text == 'True'


def words(text: str) -> list[str]:
    return [word for word in text.split(',') if word]


def main(argv: list[str]) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory(
        prefix='training_speed_', ignore_cleanup_errors=True
    ) as folder:
        race = Race(options, Path(folder))
        try:
            race.run()
        except Lost as lost:
            raise UserError(str(lost)) from lost
        finally:
            race.end()
    found = summary(race)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + '\n')
    print(report(found))
    return int(any(entry['problems'] for entry in found['agreement'].values()))


if __name__ == '__main__':
    run_script(main)
