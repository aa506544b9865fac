"""Cost of each component relative to the default: time per iteration and memory.

    python benchmarks/component_cost.py [config.py] [--seconds=240] [--key=value …]

For every component of every registry, every boolean architecture option and a few numeric ones, a
run is set up as in `train.py`: the default with this one change and the options that it needs. Then
each makes one iteration per round, in random order, until the time is over. Options of train.py
apply to all runs.

`× default` is the time per iteration divided by that of the default in the same round: the median
over rounds, with quartiles. `kept` is the memory that the forward pass of a micro-batch saves for
the backward pass; `state` is weights, gradients and optimizer state. Both are exact counts.
"""

import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import train  # noqa: E402
from benchmarks.record_overhead import random_tokens, timed  # noqa: E402
from common import hardware  # noqa: E402
from common.conditions import AnyBut, named_value  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.registry import Option, Registry, owners  # noqa: E402
from common.tensors import storage_of  # noqa: E402
from configurator import flatten  # noqa: E402
from model_builder import Transformer  # noqa: E402
from model_config import ModelArchitectureConfig, architecture_options  # noqa: E402
from training.session import Session  # noqa: E402

SIZES = {
    'n_layer': 2,
    'n_head': 4,
    'n_embd': 256,
    'block_size': 256,
    'vocab_size': 1024,
    'batch_size': 2,
    'gradient_accumulation_steps': 1,
}
# Numeric options that enable a feature.
NUMBERS = (
    {'use_gqa': True, 'num_kv_heads': 1},
    {'sliding_window': 64},
    {'document_mask': True, 'end_of_text': 0},
    {'attention_softcap': 50.0, 'attention_backend': 'manual'},
    {'logit_softcap': 30.0},
    {'z_loss': 1e-4},
    {'ffn_type': 'moe', 'shared_experts': 1},
    {'dropout': 0.1},
)
ROUNDS = 5  # minimum
DEFAULTS = 4  # iterations of the default per round
MARKED = 1.5  # lines with at least this ratio are marked


def variants(options: dict[str, Option], default: dict) -> list[dict]:
    """The changes to measure: key -> value, with the other options that each one needs."""
    numbers = [change for change in NUMBERS if change.keys() <= options.keys()]
    switched = {key for change in numbers for key in change}
    changes = []
    for key, option in options.items():
        if key == 'mixer_backend':  # kernels of CUDA
            continue
        if isinstance(option.choices, Registry):
            values = list(option.choices)
        elif option.base_type is bool and key in architecture_options() and key not in switched:
            values = [False, True]
        else:
            continue
        if key in default:
            changes += [{key: value} for value in values if value != default[key]]
        else:
            needed = companions(key, options, default)
            changes += [{**needed, key: value} for value in values if value != option.default]
    return changes + numbers


def companions(key: str, options: dict[str, Option], default: dict) -> dict:
    """The other options that an option needs to have an effect."""
    choice, value = owners(key, options)[0]
    if isinstance(value, AnyBut):
        others = options[choice].choices or (value.value + 1,)
        value = next(other for other in others if other != value.value)
    needed = {} if choice in default else companions(choice, options, default)
    return {**needed, choice: named_value(value)}


def set_up(arguments: list[str], changes: dict) -> Session:
    """A run as train.py sets it up, after one iteration, so that the optimizer state exists."""
    sessions = []
    train.run_training = lambda session: sessions.append(session) or 0
    changed = [f'--{key}={value}' for key, value in changes.items()]
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        train.main([*arguments, *changed])
    (session,) = sessions
    session.progress.iter = 1  # the first iteration is always logged
    update(session)
    return session


def update(session: Session) -> float:
    """Milliseconds of an iteration."""
    return timed(session.device, train.run_iteration, session, hardware.StepClock(session.device))


def memory(session: Session) -> tuple[float, float]:
    """MB saved by a forward pass; MB of weights, gradients and optimizer state."""
    run, architecture = session.settings.run, session.settings.architecture
    outside, block = activation_bytes(architecture, run.batch_size, getattr(torch, run.dtype))
    state = 2 * sum(p.nbytes for p in session.raw_model.parameters()) + sum(
        value.nbytes
        for state_of_parameter in session.optimizer.inner.state.values()
        for value in state_of_parameter.values()
        if isinstance(value, torch.Tensor)
    )
    return (outside + architecture.n_layer * block) / 1e6, state / 1e6


def activation_bytes(
    architecture: ModelArchitectureConfig, batch_size: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes that the forward pass of a micro-batch saves for the backward pass, outside the blocks
    and in each block, without parameters. Measured with fake tensors."""
    one, two = (saved_bytes(architecture.replace(n_layer=n), batch_size, dtype) for n in (1, 2))
    return one - (two - one), two - one


def saved_bytes(architecture: ModelArchitectureConfig, batch_size: int, dtype: torch.dtype) -> int:
    with FakeTensorMode(), torch.device('cpu'):
        model = Transformer(architecture)
        tokens = torch.zeros((batch_size, architecture.block_size), dtype=torch.long)
        saved = SavedBytes(model)
        with saved, torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            model(tokens, tokens)
    return saved.bytes


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Sums the storages that autograd saves, each once, without those of parameters."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(self._pack, lambda tensor: tensor)
        self.bytes = 0
        self.seen = {storage_of(p) for p in model.parameters()}

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = storage_of(tensor)
        if storage not in self.seen:
            self.seen.add(storage)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


def measure(sessions: dict[str, Session], seconds: float) -> dict[str, list[float]]:
    """Milliseconds per iteration of each run, by round; for the default ('') the median."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    shuffle, began = random.Random(0).shuffle, time.monotonic()
    done = 0
    while done < ROUNDS or time.monotonic() - began < seconds:
        turn = [*sessions, *[''] * (DEFAULTS - 1)]
        shuffle(turn)
        of_default = []
        for name in turn:
            (of_default if name == '' else times[name]).append(update(sessions[name]))
        times[''].append(statistics.median(of_default))
        done += 1
        spent = time.monotonic() - began
        left = max(seconds, ROUNDS * spent / done) - spent
        print(f'\rround {done}, about {max(left, 0):.0f} s left ', end='', file=sys.stderr)
    print(file=sys.stderr)
    return times


def report(sessions: dict[str, Session], times: dict[str, list[float]]) -> None:
    """Print one line per change."""
    print(f'{"changed":<52} {"ms":>8} {"× default":>20} {"kept MB":>9} {"state MB":>9}')
    for name, session in sessions.items():
        ratios = [mine / base for mine, base in zip(times[name], times[''], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method='inclusive')
        activation_mb, state_mb = memory(session)
        print(
            f'{name or "(the default)":<52} {statistics.median(times[name]):8.1f} '
            f'{middle:6.2f} [{low:.2f}, {high:.2f}] {activation_mb:9.1f} {state_mb:9.1f}'
            + (' ◀' if middle >= MARKED else '')
        )


def main(argv: list[str]) -> None:
    seconds = [a.partition('=')[2] for a in argv if a.startswith('--seconds=')]
    given = [a for a in argv if not a.startswith('--seconds=')]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            *(a for a in given if a.endswith('.py')),
            f'--dataset={random_tokens(Path(folder), vocab_size=SIZES["vocab_size"])}',
            f'--out_dir={folder}/out',
            '--peak_tflops=1',
            '--max_iters=1000000',
            '--log_interval=1000000',
            *(f'--{key}={value}' for key, value in SIZES.items()),
            *(a for a in given if not a.endswith('.py')),
        ]
        sessions = {'': set_up(arguments, {})}
        default = sessions[''].settings.to_dict()
        changes = variants(flatten(train.schema()), default)
        refused = {}
        for number, change in enumerate(changes, start=1):
            name = ' '.join(f'{key}={value}' for key, value in change.items())
            print(f'\rsetting up {number}/{len(changes)} ', end='', file=sys.stderr)
            try:
                sessions[name] = set_up(arguments, change)
            except UserError as error:
                refused[name] = str(error)
        print(file=sys.stderr)
        times = measure(sessions, float(seconds[-1]) if seconds else 240.0)
        device = sessions[''].device
        print(
            f'torch {torch.__version__}, {hardware.device_name(device)}, '
            f'{torch.get_num_threads()} threads, {len(times[""])} rounds; the default is '
            f'{sessions[""].settings.architecture.name}, {sessions[""].tokens_per_iter} tokens'
        )
        report(sessions, times)
        for name, why in refused.items():
            print(f'not measured: {name}: {why}')


if __name__ == '__main__':
    main(sys.argv[1:])
