"""benchmarks/training_speed.py and scaling.py: contestants, turns and results."""

import contextlib
import io
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import train
from benchmarks import contestants, race_report, scaling
from benchmarks import race as race_module
from benchmarks.race import SHAPES, Result, shape
from benchmarks.training_speed import parse_arguments
from common import hardware
from common.errors import UserError
from model_builder import build_model, count_parameters
from model_config import ModelArchitectureConfig


def result(name: str, seconds: list[float], **start) -> Result:
    """The result of a contestant that makes 2 iterations of 100 tokens per turn."""
    known = {'tokens': 100, 'parameters': 10, 'flops': {'per_token': 5e9}, **start}
    return Result(
        name, 'bfloat16', known, losses=[5.0, 4.0], norms=[1.0, 2.0], steps=2, seconds=seconds
    )


@pytest.mark.slow
def test_turn_has_untimed_then_timed_updates(monkeypatch):
    answers, clock = io.StringIO(), iter(range(1000))
    commands = iter([{'steps': 1}, {'steps': 3}])
    monkeypatch.setattr(contestants, 'listen', lambda: next(commands))
    monkeypatch.setattr(contestants.time, 'perf_counter', lambda: float(next(clock)))
    turns = contestants.Turns(answers)
    turns.device = torch.device('cpu')
    turns.facts = lambda: {'parameters': 7}
    made = []
    with pytest.raises(StopIteration):  # no more commands
        while True:
            turns.before_update()
            next(clock)  # an iteration takes a second
            made.append(len(answers.getvalue().splitlines()))
            turns.measured.append((float(len(made)), 0.0))
    first, short, long = map(json.loads, answers.getvalue().splitlines())
    # The first one, 1 + 1, 1 + 3.
    assert made == [0, 1, 1, 2, 2, 2, 2]
    assert first['parameters'] == 7 and first['first_ended'] >= first['first_began']
    # The clock is read once before and once after, and each update moves it by one.
    assert (short['seconds'], long['seconds']) == (2.0, 4.0)
    assert [loss for loss, _ in long['measured']] == [4.0, 5.0, 6.0, 7.0]
    assert all(answer['peak_gb'] > 0 for answer in (first, short, long))


class Enough(Exception):
    """No more commands."""


@pytest.mark.slow
def test_peers_do_the_same_work(monkeypatch, tmp_path):
    # A peer that is our own model, on the batches that peers are given, with torch's AdamW and
    # clipping, goes through the losses and gradient norms of train.py.
    sizes = {'n_layer': 1, 'n_head': 2, 'n_embd': 16}
    request = {
        'shape': shape('gpt2', 64, 16, 2, **sizes),
        'folder': str(tmp_path),
        'device': 'cpu',
        'dtype': 'float32',
        'peers': ['nanogpt', 'transformers'],
        'mallopt': False,
        'kind': 'mine',
    }

    def answers_of(contestant, *arguments) -> list[dict]:
        """Its answers about set-up and one turn of 3 iterations."""
        answers, commands = io.StringIO(), [{'steps': 3}]

        def listen():
            if not commands:
                raise Enough
            return commands.pop()

        with monkeypatch.context() as patch:
            patch.setattr(contestants, 'listen', listen)
            for name in (
                'run_training',
                'run_iteration',
                'evaluate',
            ):
                patch.setattr(train, name, getattr(train, name))
            patch.setattr(hardware, 'reset_peak_memory', hardware.reset_peak_memory)
            with contextlib.suppress(Enough):
                contestant(request, contestants.Turns(answers), *arguments)
        return list(map(json.loads, answers.getvalue().splitlines()))

    (prepared,) = answers_of(contestants.prepare)
    config = ModelArchitectureConfig(
        arch_preset='legacy', vocab_size=64, block_size=16, dropout=0.0, **sizes
    )
    assert prepared['parameters'] == count_parameters(build_model(config))['total_params']
    assert (prepared['transformers']['model_type'], prepared['d_ff']) == ('gpt2', 64)
    ours = answers_of(contestants.ours)

    def loss(model, tokens, targets):
        total, count, _ = model(tokens, targets)
        return None, total / count

    monkeypatch.setattr(contestants, 'counted_flops', lambda *_: 0.0)  # tested below
    seeded = partial(build_model, config, 'cpu', 1337)
    peer = answers_of(contestants.peer, seeded, contestants.fused_adamw, loss)
    assert (
        [len(answer['measured']) for answer in ours]
        == [1, 4]
        == [len(answer['measured']) for answer in peer]
    )
    for mine, theirs in zip(ours, peer, strict=True):
        torch.testing.assert_close(
            torch.tensor(mine['measured']), torch.tensor(theirs['measured']), rtol=1e-4, atol=0.0
        )
    assert ours[0]['parameters'] == peer[0]['parameters'] == prepared['parameters']
    assert ours[0]['tokens'] == peer[0]['tokens'] == 2 * 16
    assert ours[0]['flops'] == prepared['flops']


def test_ratios_use_same_turn():
    ours, peer = result('ours/eager', [1.0, 2.0, 4.0]), result('nanogpt/eager', [2.0, 5.0, 4.0])
    assert ours.speeds == [200.0, 100.0, 50.0]
    ratios = race_report.ratios(ours.speeds, peer.speeds)
    assert ratios == {'median': 2.0, 'least': 1.0, 'most': 2.5}
    # 5 GFLOP a token: 1, 0.5 and 0.25 TFLOP/s, of 2, 1 and 1.
    products = [{'bfloat16': {'tflops': tflops}} for tflops in (2.0, 1.0, 1.0)]
    flops = {'per_token': 5e9, 'per_token_causal': 4e9}
    shares = race_report.mfu(ours, flops, products)
    assert shares['per_token'] == {'median': 50.0, 'least': 25.0, 'most': 50.0}
    assert shares['per_token_causal']['median'] == pytest.approx(40.0)


@pytest.mark.parametrize(
    'change, problem',
    [
        ({}, None),
        ({'losses': [5.0, 4.1]}, 'loss'),
        ({'losses': [5.0, float('nan')]}, 'loss'),
        ({'norms': [1.0, 2.2]}, 'norm'),
        ({'parameters': 11}, 'parameters'),
        ({'flops': {'per_token': 5.2e9}}, 'flops'),
    ],
)
def test_differing_work_is_detected(change, problem):
    peer = result('transformers/eager', [1.0])
    for key, value in change.items():
        if hasattr(peer, key):
            setattr(peer, key, value)
        else:
            peer.start[key] = value
    results = {r.name: r for r in (result('ours/eager', [1.0]), peer)}
    prepared = {'parameters': 10, 'flops': {'per_token': 5e9}}
    agreement = race_report.agreement(results, prepared, comparable=True)
    assert agreement['ours/eager']['problems'] == []
    assert agreement['transformers/eager']['problems'] == [problem] * (problem is not None)
    # Where something is dropped at random, losses say nothing.
    agreement = race_report.agreement(results, prepared, comparable=False)['transformers/eager']
    assert not {'loss', 'norm'} & agreement.keys() and 'loss' not in agreement['problems']


def test_report_shows_summary():
    times = {'set_up_seconds': 3.0, 'first_update_seconds': 9.0}
    start = {**times, 'update_seconds': 1.5, 'threads': 2}
    warm = {**times, 'first_update_seconds': 4.5}
    results = [
        result('ours/compile', [1.0, 1.0, 2.0], **start, cold=times, warm=warm),
        result('nanogpt/eager', [3.0, 2.0, 8.0], **start),
        result('transformers/eager', [4.0, 4.0, 4.0], **start),
    ]
    for contestant, peak in zip(results, (2.0, 4.0, 5.0)):
        contestant.peak_gb = peak
    results[1].waited, results[1].computed_waiting = 100.0, 7.0
    race = SimpleNamespace(
        options=SimpleNamespace(shape='tiny', turns=3, peers_mallopt=False),
        device=torch.device('cpu'),
        shape=SHAPES['tiny'],
        results={contestant.name: contestant for contestant in results},
        products=[{'bfloat16': {'tflops': 1.0, 'shape': [1, 1, 1]}}] * 3,
        prepared={'parameters': 10, 'flops': {'per_token': 5e9, 'per_token_causal': 4e9}},
        left_out=['x-transformers: pip install x-transformers'],
    )
    summary = json.loads(json.dumps(race_report.race_summary(race)))
    ours = summary['contestants']['ours/compile']
    # 1.5 s is a later update: 7.5 s of the first one are compiling, 3 with a warm cache.
    assert ours['compile_seconds'] == {'cold': 7.5, 'warm': 3.0}
    ratio = summary['contestants']['nanogpt/eager']['against']['ours/compile']
    assert ratio == {'speed': {'median': 3.0, 'least': 2.0, 'most': 4.0}, 'memory': 0.5}
    lines = race_report.report_text(summary).splitlines()
    (best,) = [line for line in lines if '← the best peer' in line]
    # The median of 67, 100 and 25 tokens/s is above that of 50, 50 and 50.
    assert best.startswith('nanogpt/eager') and '3.00 [2.00, 4.00] (0.50)' in best
    assert any('nanogpt/eager used 7.0 % of a core' in line for line in lines)
    assert 'left out: x-transformers: pip install x-transformers' in lines


def test_contestant_selection():
    def names(*argv: str, device: str = 'cpu') -> list[str]:
        return list(race_module.choose_contestants(parse_arguments(list(argv)), device)[0])

    assert names('--contestants=ours', '--ours=eager,compile') == ['ours/eager', 'ours/compile']
    assert names('--contestants=ours/compile') == ['ours/compile']
    _, left_out = race_module.choose_contestants(parse_arguments([]), 'cpu')
    assert 'nanogpt: name a checkout with --nanogpt=PATH' in left_out
    with pytest.raises(UserError, match=r'Did you mean transformers/compile\?'):
        names('--contestants=transformer/compile')
    with pytest.raises(UserError, match=r'has no model\.py'):
        names('--nanogpt=/nowhere')
    with pytest.raises(UserError, match='--turns must be at least 1'):
        names('--turns=0')
    # What is not known here is train.py's.
    assert parse_arguments(['--attention_backend=manual']).given == ['--attention_backend=manual']


def test_flops_are_counted_without_computing():
    def attention(model, tokens, targets):
        x = model[0](tokens)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True), None

    def build():
        return torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 10))

    # Forward pass: two products of (16, 8) and (8, 16) with attention, one of (16, 8) and (8, 10).
    with_attention = contestants.counted_flops(
        build, lambda model, *data: attention(model, *data)[0][None], 16
    )
    assert with_attention == 3 * 2 * (2 * 16 * 16 * 8) / 16
    assert contestants.counted_flops(build, lambda m, t, _: m(t), 16) == 3 * 2 * (16 * 8 * 10) / 16


def test_shapes_match_their_models():
    expected = {'gpt2-124m': 124_475_904, 'llama-12l': 162_220_800}
    for name, parameters in expected.items():
        sizes = {**SHAPES[name]['options'], 'vocab_size': SHAPES[name]['vocab_size']}
        del sizes['batch_size']
        model = build_model(ModelArchitectureConfig(**sizes))
        assert count_parameters(model)['total_params'] == parameters


def test_sweep_varies_one_size_at_a_time():
    wide = scaling.point(scaling.BASE, 'n_embd', 2048, 4096)['options']
    long = scaling.point(scaling.BASE, 'block_size', 8192, 4096)['options']
    assert wide['n_head'] == 32 and wide['block_size'] * wide['batch_size'] == 4096
    assert long['n_embd'] == scaling.BASE['n_embd'] and long['batch_size'] == 1
    rows = [
        {'tokens_per_sec': 10.0, 'flops_per_token': 2.0},
        {'tokens_per_sec': 5.0, 'flops_per_token': 3.0},
    ]
    assert scaling.times_arithmetic(rows) == [1.0, pytest.approx(4 / 3)]


def test_sweep_point_is_measured_against_its_product(monkeypatch):
    first = {
        'parameters': 7,
        'tokens': 64,
        'flops': {'per_token': 1e9, 'per_token_causal': 5e8},
        'peak_gb': 1.0,
    }
    commands, ended = [], []

    class Process:
        def __init__(self, name, request, log):
            self.kind = request['kind']

        def answer(self):
            return first

        def ask(self, **command):
            commands.append((self.kind, command))
            if self.kind == 'products':
                return {'float32': {'tflops': 2.0}}
            return {'seconds': 0.5 * command['steps'], 'peak_gb': 3.0}

        def end(self):
            ended.append(self.kind)

    monkeypatch.setattr(scaling, 'Contestant', Process)
    request = {'shape': scaling.point(scaling.QUICK_BASE, 'n_embd', 64, 64), 'dtype': 'float32'}
    row = scaling.measure(request, seconds=1.6, name='n_embd=64')
    # Half a second per iteration: 4 fill 1.6 s; 128 tokens/s of 1 GFLOP are 6.4 % of 2 TFLOP/s.
    assert commands[:2] == [('ours', {'steps': 1}), ('ours', {'steps': 4})]
    assert (row['ms_an_update'], row['tokens_per_sec']) == (500.0, 128.0)
    assert row['mfu_percent'] == pytest.approx(6.4)
    assert row['mfu_causal_percent'] == pytest.approx(3.2)
    assert row['peak_gb'] == 3.0 and ended == ['ours', 'products']
