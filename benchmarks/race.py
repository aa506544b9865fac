"""The contestants of a speed benchmark, one process each, and their turns.

Used by `training_speed.py`, `process_speed.py` and `scaling.py`.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import psutil

from common import hardware
from common.errors import UserError, did_you_mean

PROJECT = Path(__file__).resolve().parent.parent
GPT2 = {'arch_preset': 'legacy', 'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'bias': True}
LLAMA = {**GPT2, 'arch_preset': 'llama', 'bias': False}
SMALL = {'n_layer': 2, 'n_head': 2, 'n_embd': 64}


def shape(family: str, vocab_size: int, block_size: int, batch_size: int, **sizes) -> dict:
    """A model and its batch; `options` are those of train.py."""
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
CHECKED = 4  # iterations whose losses are compared
SPARE = 1.2  # free memory needed to start one more, as a multiple of the largest peak


class ContestantLost(Exception):
    """A contestant ended unexpectedly; the message has its last output."""


class Contestant:
    """A process that receives commands and sends answers."""

    def __init__(self, name: str, request_for: dict, log: Path, environment: dict | None = None):
        self.name, self.log = name, log
        self.began = time.time()
        environment = {**os.environ, **(environment or {})}
        if 'cache' in request_for:
            environment['TORCHINDUCTOR_CACHE_DIR'] = request_for['cache']
        # Another checkout runs its own contestants.py, since its modules may have other names.
        project = Path(request_for.get('project', PROJECT))
        script = project / 'benchmarks' / 'contestants.py'
        with open(log, 'w') as file:
            self.process = subprocess.Popen(
                [sys.executable, script, json.dumps({**request_for, 'project': str(project)})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def answer(self) -> dict:
        """Its next answer. Raises ContestantLost."""
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            last = self.log.read_text(errors='replace').strip().splitlines()[-12:]
            raise ContestantLost(
                f'{self.name} ended with exit code {code}:\n  ' + '\n  '.join(last)
            )
        return json.loads(line)

    def tell(self, **command) -> None:
        with contextlib.suppress(BrokenPipeError):  # the missing answer is handled below
            self.process.stdin.write(json.dumps(command) + '\n')
            self.process.stdin.flush()

    def ask(self, **command) -> dict:
        """Its answer to a command. Raises ContestantLost."""
        self.tell(**command)
        return self.answer()

    def processor_seconds(self) -> float:
        """CPU seconds used so far, including its child processes."""
        process = psutil.Process(self.process.pid)
        seconds = sum(process.cpu_times()[:2])
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended
                seconds += sum(child.cpu_times()[:2])
        return seconds

    def end(self) -> None:
        """Kill the process and its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Result:
    """The measurements of one contestant."""

    name: str
    dtype: str
    start: dict = field(default_factory=dict)  # start-up times, parameters, FLOPs
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    steps: int = 1  # per turn
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
        """Tokens/s in each turn."""
        return [self.start['tokens'] * self.steps / seconds for seconds in self.seconds]

    @property
    def kind(self) -> str:
        return self.name.partition('/')[0]

    @property
    def is_peer(self) -> bool:
        return self.kind in PEERS


def choose_contestants(
    options: argparse.Namespace, device: str
) -> tuple[dict[str, dict], list[str]]:
    """The settings of each contestant; and one sentence for each that is left out."""
    modes = {'ours': options.ours, **({'other': options.ours} if options.other else {}), **PEERS}
    problems = {
        'nanogpt': 'name a checkout with --nanogpt=PATH' * (not options.nanogpt),
        'transformers': missing('transformers', 'transformers'),
        'x-transformers': missing('x_transformers', 'x-transformers'),
    }
    if SHAPES[options.shape]['family'] == 'llama':
        problems['nanogpt'] = 'it has no Llama'
    everyone = [f'{kind}/{mode}' for kind in modes for mode in modes[kind]]
    for name in options.contestants:
        if name not in modes and name not in everyone:
            hint = did_you_mean(name, [*modes, *everyone])
            raise UserError(
                f'--contestants={name}: choose from {", ".join(modes)}, or one of '
                f'{", ".join(everyone)}.{hint}'
            )
    contestants, left_out = {}, []
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
        contestants[name] = {'kind': kind, **MODES[mode]}
    if not contestants:
        raise UserError('No contestant is available.', *left_out)
    return contestants, left_out


def missing(module: str, package: str) -> str:
    return '' if find_spec(module) else f'pip install {package}'


def product_shapes(shape: dict, d_ff: int) -> list[list[int]]:
    """(rows, inner, columns) of the matrix products to time: squares, and those of the model."""
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


def seconds_left(began: float, done: int, of_all: int) -> float:
    """Estimated seconds left if `done` of `total` equal parts took the time since `began`."""
    return (time.monotonic() - began) / done * (of_all - done)


class Race:
    """The contestants and their results."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder = options, folder
        self.began = time.monotonic()
        self.device = hardware.select_device(options.device)
        self.shape = copy.deepcopy(SHAPES[options.shape])
        for key in ('batch_size', 'dropout', 'bias'):
            if getattr(options, key) is not None:
                self.shape['options'][key] = getattr(options, key)
        self.contestants, self.left_out = choose_contestants(options, self.device.type)
        self.running: dict[str, Contestant] = {}
        self.results: dict[str, Result] = {}
        self.products: list[dict] = []  # for each turn: dtype -> tflops and shape
        self.prepared: dict = {}

    def request_for(self, name: str) -> dict:
        """The start message of a contestant."""
        mode, options = self.contestants.get(name, {}), self.options
        kind = mode.get('kind', name)
        request = {
            'kind': kind,
            'shape': self.shape,
            'folder': str(self.folder),
            'device': str(self.device),
            'dtype': options.dtype,
            'mallopt': options.peers_mallopt,
            'given': options.given,
            **mode,
        }
        if kind == 'other':
            request['project'] = str(Path(options.other).resolve())
        if kind == 'nanogpt':
            request['nanogpt'] = str(Path(options.nanogpt).resolve())
        if kind in PEERS:
            request |= {'fields': self.prepared['transformers'], 'd_ff': self.prepared['d_ff']}
        if mode.get('compile'):
            request['cache'] = str(self.folder / 'cache' / name.replace('/', '-'))
        return request

    def launch(self, name: str, **more) -> Contestant:
        log = self.folder / f'{name.replace("/", "-")}.log'
        self.running[name] = Contestant(name, {**self.request_for(name), **more}, log)
        return self.running[name]

    def run(self) -> None:
        """Prepare the data, start all contestants and run the turns."""
        peers = sorted({mode['kind'] for mode in self.contestants.values()} & PEERS.keys())
        self.say('tokens, batches and first weights')
        self.prepared = self.launch('prepare', peers=peers).answer()
        self.running.pop('prepare').end()
        if problem := self.prepared.get('transformers_problem'):
            self.leave_out('transformers', problem)
        for name in list(self.contestants):
            self.attempt(name, self.start)
        if not self.results:
            raise UserError('No contestant is left.', *self.left_out)
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
        """Run the action; a contestant that fails is left out with a message."""
        try:
            action(name)
        except ContestantLost as lost:
            self.running.pop(name).end()
            self.results.pop(name, None)
            self.left_out.append(str(lost))
            self.say(self.left_out[-1])

    def leave_out(self, kind: str, why: str) -> None:
        self.left_out.append(f'{kind}: {why}')
        for name in [n for n, mode in self.contestants.items() if mode['kind'] == kind]:
            del self.contestants[name]

    def start(self, name: str) -> None:
        """Start a contestant; one that compiles twice, with an empty and with a warm cache."""
        mode = self.contestants[name]
        largest = max((r.peak_gb for r in self.results.values()), default=0.0)
        available = psutil.virtual_memory().available / hardware.GB
        if self.device.type == 'cpu' and available < SPARE * largest:
            self.left_out.append(
                f'{name}: only {available:.1f} GB of memory are free while the others wait, and a '
                f'turn takes up to {largest:.1f} GB. Choose fewer with --contestants.'
            )
            return
        result = Result(name, mode.get('dtype', self.options.dtype))
        compiled = mode.get('compile', False)
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
        for _ in range(2):  # the second measurement counts
            answer = contestant.ask(steps=1)
            result.note(answer)
        result.start['update_seconds'] = answer['seconds']
        steps = math.ceil(self.options.seconds / answer['seconds'])
        result.steps = self.options.steps or max(1, steps)
        self.results[name] = result

    def clocks(self, name: str) -> tuple[float, float]:
        return time.monotonic(), self.running[name].processor_seconds()

    def turn(self, name: str) -> None:
        """Run one timed turn, and add its losses and CPU time to the result."""
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


def words(text: str) -> list[str]:
    return [word for word in text.split(',') if word]
