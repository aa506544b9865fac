"""Handmade records, and helpers to read the output of a comparison."""

import json
import math
import re
import types
from pathlib import Path

from comparison.answer import compare_runs
from comparison.groups import Group
from comparison.load import read_runs
from comparison.runs import run_from_record
from comparison.study_plan import read_study_plan

GPT2, LLAMA = '12L-12H-768D-AbsPos-LN-NB-GELU-PostNorm', '12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm'


def make_record(number=1, *, loss=5.0, status='finished', done=100, architecture=GPT2, **config):
    """A record as training writes it. `number` orders the runs in time; `config` overrides keys."""
    choices = {'n_layer': 12, 'bias': False, 'ffn_type': 'standard'}
    choices |= {key: config[key] for key in choices.keys() & config.keys()}
    config = {
        'out_dir': f'out-{number}',
        'dataset': 'shakespeare',
        'batch_size': 4,
        'gradient_accumulation_steps': 4,
        'max_iters': 100,
        'optimizer': 'adamw',
        'learning_rate': 6e-4,
        'decay_lr': True,
        'lr_schedule': 'cosine',
        'warmup_iters': 5,
        'lr_decay_iters': 100,
        'min_lr': 6e-5,
        'device': 'auto',
        'seed': 1337,
        'data_seed': 1337,
        'log_style': 'auto',
        'log_interval': 1,
        'arch_preset': 'custom',
        **choices,
        **config,
    }
    evaluations = [(0, 10.9)] + ([(done // 2, loss + 0.5), (done, loss)] if loss else [])
    return {
        'schema_version': 1,
        'run_name': f'run_20260101_1200{number:02d}',
        'start_time': f'2026-01-01T12:00:{number:02d}+00:00',
        'end_time': None,
        'status': status,
        'config': config,
        'architecture': {
            'name': architecture,
            'hash': f'{architecture}{sorted(choices.items())}',
            'choices': choices,
        },
        'metadata': {
            'seed': config['seed'],
            'data_seed': config['data_seed'],
            'strategy': 'single',
            'world_size': 1,
        },
        'startup_info': {
            'model': {'total_params': 123_550_464},
            'flops': {'per_token': 854_654_976, 'per_token_causal': 798_031_872},
            'hardware': {
                'device': 'cpu',
                'device_name': 'Some CPU',
                'world_size': 1,
                'dtype': 'bfloat16',
                'threads': 2,
                'compile': False,
            },
            'data': {
                'dataset': config['dataset'],
                'tokenizer': 'gpt2',
                'vocab_size': 50257,
                'model_vocab_size': 50304,
                'train_sha256': 'ab' * 32,
                'val_sha256': 'cd' * 32,
                'batch_size': config['batch_size'],
                'block_size': 256,
                'tokens_per_iter': 4096,
                'eval_windows': {'train': 50, 'val': 50},
            },
        },
        'training_iterations': [],
        'eval_steps': [
            {'iter': i, 'train_loss': value, 'val_loss': value, 'val_bits_per_byte': value * 0.4}
            for i, value in evaluations
        ],
        'checkpoints': [],
        'events': [],
        'summary': {
            'total_iterations': config['max_iters'],
            'final_iter': done,
            'best_val_loss': loss,
            'avg_mfu': 31.234,
            'avg_time_ms': 2412.34,
            'total_tokens': done * 4096,
            'wall_seconds': 431.2,
            'peak_memory_gb': 3.2149,
        },
    }


def write(folder: Path, *records) -> list[Path]:
    """Write each record into its own run folder below its out_dir."""
    paths = []
    for record in records:
        path = folder / record['config']['out_dir'] / record['run_name']
        path.mkdir(parents=True)
        (path / 'record.json').write_text(json.dumps(record), encoding='utf-8')
        paths.append(path)
    return paths


def section(text: str, title: str) -> list[str]:
    """The lines of the block that starts with `title`, without it."""
    for block in text.split('\n\n'):
        if block.startswith(title):
            return block.splitlines()[1:]
    return []


def rows(text: str, title: str) -> list[dict[str, str]]:
    """A block's table as dicts. Columns are two or more spaces apart."""
    lines = section(text, title)
    start = next(
        i for i, line in enumerate(lines) if line.startswith(('#  ', 'rung ', 'trend ', 'option '))
    )
    header, *body = [re.split(r' {2,}', line.strip()) for line in lines[start:]]
    return [dict(zip(header, row, strict=True)) for row in body]


def warned(text: str, about: str) -> set[str]:
    """The keys listed in WARNINGS below the heading that starts with `about`."""
    keys, inside = set(), False
    for line in section(text, 'WARNINGS'):
        if not line.startswith(' '):
            inside = line.startswith(about)
        elif inside and re.match(r'  \w', line):
            keys.add(line.split()[0])
    return keys


def replicated(losses: dict[str, list[float]], **extra) -> list[dict]:
    """Records of architectures that differ in `ffn_type`, with seeds 1, 2, …"""
    return [
        make_record(10 * n + seed, loss=loss, seed=seed, ffn_type=ffn, architecture=ffn, **extra)
        for n, (ffn, values) in enumerate(losses.items())
        for seed, loss in enumerate(values, 1)
    ]


def run_rows(records):
    return [
        run_from_record(record, Path('out', record['run_name'], 'record.json'))
        for record in records
    ]


STUDY = {
    'question': 'Gated?',
    'command': 'python study.py gated.py',
    'budget': {},
    'tuned': ['learning_rate'],
    'variants': [
        {'label': f'ffn_type={ffn} bias={bias}', 'asked': {'ffn_type': ffn, 'bias': bias}}
        for ffn in ('standard', 'swiglu')
        for bias in (True, False)
    ],
}


def decaying(n: int, seed: int) -> list[float]:
    """Ten validation losses of variant `n`."""
    return [3 + 4 * math.exp(-i / 30) + 0.1 * n + 0.01 * seed * (n + 1) for i in range(10, 101, 10)]


def study_record(n: int, seed: int, losses: list, options: dict | None = None) -> dict:
    """A record of variant `n` with these losses, one at each tenth of its iterations."""
    options = options or {}
    record = make_record(seed, seed=seed, data_seed=seed, architecture=f'a{n}', **options)
    record['architecture']['hash'] = f'a{n}'
    record['run_name'] = f'run_20260101_12{n:02d}{seed:02d}'
    record['start_time'] = f'2026-01-01T12:{n:02d}:{seed:02d}+00:00'
    record['eval_steps'] = [
        {'iter': 10 * i, 'val_loss': loss, 'train_loss': 3.0, 'val_bits_per_byte': 1.0}
        | {'train_seconds': float(i)}
        for i, loss in enumerate([10.9, *losses])
    ]
    record['summary'] |= {'total_flops': 1e15 * (1 + n), 'peak_memory_gb': 1.0 + n}
    record['startup_info']['flops'] = dict.fromkeys(
        ('per_token', 'per_token_causal'), 1e9 * (1 + n)
    )
    return record


def write_study(folder: Path, variants: list[dict], records: list[list[dict]], **plan) -> Path:
    """Write a study's folder: its plan, and the records of every variant and seed."""
    points = []
    for n, (variant, of_variant) in enumerate(zip(variants, records, strict=True)):
        for record in of_variant:
            point = f'runs/{n}/seed={record["config"]["seed"]}'
            run = folder / point / record['run_name']
            run.mkdir(parents=True)
            (run / 'record.json').write_text(json.dumps(record))
            points.append({'folder': point, 'variant': variant['label']})
    plan = {**STUDY, 'variants': variants, 'points': points, **plan}
    (folder / 'study.json').write_text(json.dumps(plan))
    read_study_plan.cache_clear()
    return folder


def compared(folder: Path, **options):
    return compare_runs(*read_runs([folder])[:1], **options)


def fake_run(seeds, loss, outcome='finished'):
    config = {'seed': seeds[0], 'data_seed': seeds[1]}
    blown_up = outcome == 'diverged'
    return types.SimpleNamespace(
        config=config, val_loss=loss, outcome=outcome, blown_up=blown_up, start=0
    )


def fake_group(losses, **others):
    """A group of finished runs with these losses by seed, and one run for each other outcome."""
    runs = [fake_run(seeds, loss) for seeds, loss in losses.items()]
    runs += [fake_run((99, outcome), None, outcome) for outcome in others]
    return Group(runs)
