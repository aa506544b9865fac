"""training_config.py: merge, problems, origins, derived values, vocabulary."""

import json
import math
import re
import shlex

import numpy as np
import pytest
import torch
from helpers.project import PROJECT

from common.errors import UserError
from configurator import flatten, read_command_line
from data.dataset import load_dataset
from model_config import ModelArchitectureConfig
from training_config import (
    CPU_COMPILE_FLOPS,
    CUDA_COMPILE_FLOPS,
    TrainingConfig,
    divisors,
    load_settings,
    schema,
)

CPU = torch.device('cpu')


def settings(*argv):
    return load_settings(read_command_line(list(argv), schema))


def resolved(*argv, device=CPU, dataset=None):
    return settings(*argv).resolve(device, 'float32', dataset)


def problems_of(*argv):
    with pytest.raises(UserError) as refused:
        settings(*argv)
    return refused.value.problems


@pytest.fixture
def config(tmp_path):
    """Writes a config file and returns its path."""

    def write(text, name='config.py'):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def dataset(tmp_path):
    """dataset(kind, vocab_size): a dataset with that tokenizer and vocabulary size."""

    def write(kind, vocab_size):
        for split in ('train', 'val'):
            np.arange(40, dtype='<u2').tofile(tmp_path / f'{split}.bin')
        meta = {
            'format_version': 1,
            'tokenizer': {'kind': kind},
            'vocab_size': vocab_size,
            'dtype': 'uint16',
            'splits': {split: {'tokens': 40} for split in ('train', 'val')},
        }
        (tmp_path / 'meta.json').write_text(json.dumps(meta))
        return load_dataset(str(tmp_path), 16)

    return write


# --------------------------------------------------------------------------------------------------
# The merge


def test_precedence_of_layers(config):
    path = config(
        "arch_preset = 'llama'\nnormalization = 'layernorm'\nn_layer = 3\nmax_iters = 70\nseed = 1"
    )
    merged = settings(path, '--n_layer=4', '--seed=2')
    # Beside each: the highest level that sets it.
    assert merged.run.batch_size is None  # default
    assert merged.architecture.ffn_type == 'swiglu'  # preset
    assert merged.architecture.normalization == 'layernorm'  # file over preset
    assert merged.run.max_iters == 70  # file over default
    assert merged.architecture.n_layer == 4  # command line over file
    assert merged.run.seed == 2  # command line over file
    assert merged.run.origins['seed'] == merged.architecture.origins['n_layer'] == 'command line'
    assert merged.run.origins['max_iters'] == merged.architecture.origins['normalization'] == path
    assert merged.run.origins['batch_size'] == 'default'


def test_defaults_equal_schema():
    run = settings().run.to_dict()
    assert run == {key: flatten(schema())[key].default for key in run}
    assert run['learning_rate'] == 6e-4 and run['max_iters'] == 5000


def test_flat_settings():
    flat = settings('--arch_preset=gpt2', '--n_layer=3').to_dict()
    assert flat.keys() <= flatten(schema()).keys()
    assert (flat['arch_preset'], flat['n_layer'], flat['norm_position']) == ('gpt2', 3, 'post')
    assert 'rope_theta' not in flat  # not used by this architecture


@pytest.mark.parametrize('preset', ['gpt2', 'llama', 'team', 'hybrid', 'custom'])
def test_config_file_equals_preset(preset):
    path = str(PROJECT / 'config' / f'arch_{preset}.py')
    architecture = settings(path).architecture
    assert architecture.preset == preset and settings(path).run.out_dir == f'out-{preset}'
    if preset != 'custom':
        assert architecture.hash == ModelArchitectureConfig(arch_preset=preset).hash


def test_all_problems_of_run_and_architecture_at_once(config):
    path = config("arch_preset = 'lama'\nmax_iter = 5\nhelper = 3")
    problems = problems_of(
        path,
        '--learning_rate=1e-4',
        '--min_lr=1e-3',
        '--resume_run=run_1',
        '--n_head=7',
        '--rope_theta=5',
        '--batch=3',
        '--dtype=fp16',
    )
    expected = [
        "arch_preset='lama'",
        "'max_iter'",
        "'helper'",
        'min_lr=0.001',
        "resume_run='run_1'",
        'n_head=7',
        'rope_theta=5.0',
        '--batch',
        "dtype='fp16'",
    ]
    for words in expected:
        assert sum(words in problem for problem in problems) == 1, (words, problems)
    assert len(problems) == len(expected)
    suggested = [re.search(r'Did you mean (\w+)\?', problem) for problem in problems]
    assert {'llama', 'max_iters', 'batch_size'} <= {match[1] for match in suggested if match}


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (['--min_lr=1', '--learning_rate=0.1'], ['min_lr=1', 'learning_rate=0.1']),
        (['--resume_run=run_1'], ['resume_run', '--init_from=resume']),
        (['--beta2=1'], ['beta2', '0.999999']),
        (['--grad_clip=-1'], ['grad_clip', 'at least 0']),
        (['--learning_rate=0'], ['learning_rate', 'above 0']),
        (['--max_iters=0'], ['max_iters', 'at least 1']),
        (['--init_from=gpt3'], ['init_from', "'resume'"]),
        (['--sample_interval=300', '--eval_interval=200'], ['sample_interval=300', '=400']),
        (['--sample_interval=-1'], ['sample_interval', 'at least 0']),
    ],
)
def test_invalid_run_is_refused(argv, words):
    (problem,) = problems_of(*argv)
    assert all(word in problem for word in words), problem


def test_value_types_in_files(config):
    found = settings(
        config('learning_rate = 1\nwarmup_iters = None\ndevice = "cpu"\nuse_fsdp = False')
    ).run
    assert found.learning_rate == 1.0 and type(found.learning_rate) is float
    assert (found.warmup_iters, found.device, found.use_fsdp) == (None, 'cpu', False)


@pytest.mark.parametrize(
    ('argv', 'words'),
    [
        (['--muon_momentum=0.9'], ["optimizer='muon'", "the default is 'adamw'"]),
        (
            ['--lion_beta1=0.9', '--optimizer=muon'],
            ["optimizer='lion'", "the command line sets 'muon'"],
        ),
        (['--beta2=0.9', '--optimizer=lion'], ["optimizer='adamw' or 'muon'"]),
        (['--decay_fraction=0.1'], ["lr_schedule='wsd'", "the default is 'cosine'"]),
        (
            ['--min_lr=0', '--lr_schedule=constant'],
            ["lr_schedule='cosine', 'linear' or 'wsd'"],
        ),
        (
            ['--decay_lr=False', '--lr_schedule=wsd'],
            ['decay_lr=True', 'the command line sets False'],
        ),
        (
            ['--decay_lr=False', '--warmup_iters=3'],
            ["lr_schedule='constant', 'cosine'", 'decay_lr=False'],
        ),
        (['--sample_prompt=A'], ['sample_interval other than 0', 'the default is 0']),
        (['--fsdp_shard_size=2'], ['use_fsdp=True', 'the default is False']),
    ],
)
def test_unused_run_option_is_refused(argv, words):
    (problem,) = problems_of(*argv)
    assert problem.startswith(argv[0][2:].partition('=')[0]) or 'decay_lr' in argv[0]
    assert 'has no effect: it needs ' in problem
    assert all(word in problem for word in words), problem


def test_override_drops_unused_run_option_with_note(config):
    path = config("optimizer = 'muon'\nmuon_ns_steps = 6\nlr_schedule = 'wsd'\nmin_lr = 1e-5")
    unchanged, dropped = (
        resolved(path),
        resolved(path, '--optimizer=lion', '--lr_schedule=constant'),
    )
    assert (unchanged.run.muon_ns_steps, unchanged.run.min_lr) == (6, 1e-5)
    assert 'muon_ns_steps' not in dropped.run and dropped.run.lion_beta2 == 0.99
    assert 'min_lr' not in dropped.to_dict() and dropped.run.warmup_iters == 250
    notes = [line for line in dropped.explain().splitlines() if line.startswith('# dropped')]
    assert len(notes) == 2 and 'muon_ns_steps=6 (' in notes[0] and 'min_lr=1e-05' in notes[1]
    shown = printed(dropped.explain())
    assert shown['optimizer'] == ("'lion'", 'command line') and 'muon_momentum' not in shown


# --------------------------------------------------------------------------------------------------
# --print_config


def printed(text):
    """{key: (value as printed, origin)} of a `--print_config` text."""
    lines = re.findall(r'^(\w+) = (.*?) +# (.*)$', text, re.MULTILINE)
    return {key: (value, origin) for key, value, origin in lines}


def test_printed_config_shows_origins(config):
    path = config("arch_preset = 'gpt2'\nmax_iters = 40\nactivation = 'relu'")
    done = resolved(path, '--ffn_type=swiglu', '--seed=3')
    text = done.explain()
    shown = printed(text)
    assert shown.keys() == done.to_dict().keys()
    assert {key: value for key, (value, _) in shown.items()} == {
        key: repr(value) for key, value in done.to_dict().items()
    }
    expected = {
        'arch_preset': path,
        'max_iters': path,
        'ffn_type': 'command line',
        'seed': 'command line',
        'normalization': 'preset gpt2',
        'n_layer': 'default',
        'd_ff': 'derived: default of swiglu',
        'warmup_iters': 'derived: max_iters / 20, at most 2000',
        'eval_interval': 'derived: max_iters / 10, from 20 to 2000',
    }
    assert {key: shown[key][1] for key in expected} == expected
    assert done.architecture.name in text
    (note,) = [line for line in text.splitlines() if 'dropped' in line]
    assert "activation='relu'" in note and path in note and "ffn_type='swiglu'" in note


WINDOWS = '--layer_pattern=LLG --layer_kinds.L.sliding_window=8'
MIXTURE = "--layer_pattern='D M*' --layer_kinds.M.ffn_type=moe --layer_kinds.M.num_experts=4"


@pytest.mark.parametrize(
    'options',
    [
        '--arch_preset=llama',
        '--arch_preset=gemma2',  # short forms
        '--arch_preset=deepseek',
        f'--arch_preset=llama {WINDOWS} --layer_kinds.L.n_head=2 --layer_kinds.G.dropout=0.1',
        '--arch_preset=gemma2 --layer_pattern=LLG --layer_kinds.L.sliding_window=None',
        f'--arch_preset=llama {MIXTURE} --expert_ffn=geglu --layer_kinds.D.d_ff=24',
        '--arch_preset=llama --layer_pattern=AB --layer_kinds.A.normalization=layernorm '
        '--layer_kinds.B.normalization=layernorm_nobias --norm_eps=0.1',
        '--arch_preset=smollm3',
        '--arch_preset=smollm3 --layer_kinds.N.position_encoding=None',
        '--arch_preset=smollm3 --layer_kinds.N=None --layer_kinds.R.d_ff=40',
        '--arch_preset=smollm3 --layer_pattern=None',
        '--arch_preset=olmo3 --layer_kinds.L.sliding_window=None',
    ],
)
def test_printed_config_gives_the_same_architecture(config, options):
    done = resolved(
        *shlex.split(options), '--n_layer=12', '--n_head=4', '--n_embd=32', '--vocab_size=50'
    )
    again = resolved(config(done.explain()))
    assert again.architecture == done.architecture
    assert again.architecture.hash == done.architecture.hash
    assert again.architecture.preset == done.architecture.preset
    for letter, kind in done.architecture.kinds.items():
        assert again.architecture.kinds[letter] == kind
    assert again.run == done.run


def test_printed_kinds_show_origins_and_layers(config):
    path = config("arch_preset = 'llama'\nlayer_kinds = {'L': {'n_head': 2, 'd_ff': 40}}")
    sizes = '--n_layer=12', '--n_embd=32', '--n_head=4'
    text = resolved(path, *WINDOWS.split(), '--layer_kinds.L.d_ff=None', *sizes).explain()
    _, _, kinds = text.partition('layer_pattern = ')
    lines = [re.sub('  +', '  ', line) for line in kinds.splitlines()]
    assert lines == [
        "'LLG'  # command line",
        '# layers: LLGLLGLLGLLG',
        'layer_kinds = {',
        "  'L': {  # 8 layers",
        f"  'n_head': 2,  # {path}",
        "  'd_ff': 88,  # derived: default of swiglu",
        "  'sliding_window': 8,  # command line",
        "  'head_dim': 16,  # derived: n_embd / n_head",
        "  'value_head_dim': 16,  # derived: head_dim",
        "  'attention_scale': 0.25,  # derived: 1 / sqrt(dimensions of a query head)",
        '  },',
        '}',
        "# G: 4 layers with the model's own options",
        '',
        f'# n_head=4 (command line) does not apply to all layers: there is layer_kinds.L.n_head '
        f'({path})',
    ]
    deep = '--n_layer=100', *sizes[1:], '--arch_preset=llama'
    assert '# layers: LLG*33 L\n' in resolved(*WINDOWS.split(), *deep).explain()
    dense = '--layer_pattern=D*3 M*', '--layer_kinds.D.d_ff=8'
    assert '# layers: D*3 M*97\n' in resolved(*dense, *deep).explain()


# --------------------------------------------------------------------------------------------------
# Derived values


@pytest.mark.parametrize(
    ('max_iters', 'warmup'), [(1, 0), (19, 0), (20, 1), (100, 5), (5000, 250), (600_000, 2000)]
)
def test_derived_schedule(config, max_iters, warmup):
    # Derived from the merged values: the file's max_iters is overridden.
    path = config('max_iters = 777\nlearning_rate = 3e-3')
    done = resolved(path, f'--max_iters={max_iters}')
    assert (done.run.warmup_iters, done.run.lr_decay_iters) == (warmup, max_iters)
    assert done.run.min_lr == pytest.approx(3e-4)
    for key in ('warmup_iters', 'lr_decay_iters', 'min_lr'):
        assert done.run.origins[key].startswith('derived: ') and key in done.derived
    assert resolved(path, '--optimizer=muon').run.muon_learning_rate == 3e-3


@pytest.mark.parametrize(
    ('max_iters', 'interval'),
    [(1, 20), (100, 20), (300, 30), (5000, 500), (20_000, 2000), (600_000, 2000)],
)
def test_derived_eval_interval(config, max_iters, interval):
    path = config('max_iters = 777')
    done = resolved(path, f'--max_iters={max_iters}')
    assert done.run.eval_interval == interval
    assert done.run.origins['eval_interval'] == 'derived: max_iters / 10, from 20 to 2000'
    assert done.derived['eval_interval'].startswith(f'{interval:,} (max_iters / 10')


@pytest.mark.parametrize(('sample_interval', 'interval'), [(1000, 500), (500, 500), (300, 300)])
def test_eval_interval_follows_sample_interval(sample_interval, interval):
    done = resolved('--max_iters=5000', f'--sample_interval={sample_interval}')
    assert done.run.eval_interval == interval
    assert done.run.sample_interval % interval == 0
    (problem,) = problems_of('--sample_interval=300', '--eval_interval=500')
    assert 'eval_interval=500' in problem


def test_given_values_are_not_derived():
    asked = {
        'eval_interval': 7,
        'warmup_iters': 7,
        'lr_decay_iters': 30,
        'min_lr': 0.0,
        'batch_size': 5,
        'gradient_accumulation_steps': 3,
        'eval_iters': 9,
        'compile': True,
        'd_ff': 99,
    }
    done = resolved(*(f'--{key}={value}' for key, value in asked.items()))
    assert {key: done.to_dict()[key] for key in asked} == asked
    assert not done.derived.keys() & asked.keys()


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
@pytest.mark.parametrize('argv', [[], ['--batch_size=4'], ['--batch_size=1000']])
def test_derived_batch(device, argv):
    done = resolved(*argv, device=torch.device(device))
    run = done.run
    assert run.batch_size >= 1 and run.gradient_accumulation_steps >= 1
    if argv:
        assert run.origins['batch_size'] == 'command line'
    if device == 'cuda' and argv != ['--batch_size=1000']:
        # nanoGPT's iteration of 12 × 40 sequences, however they are split.
        assert run.batch_size * run.gradient_accumulation_steps == 480
    if device == 'cpu':
        assert run.gradient_accumulation_steps == 1
    assert (run.device, run.dtype) == (device, 'float32')


TOKENS_FOR_COMPILE = CPU_COMPILE_FLOPS / 854_654_976  # of GPT-2 124M, by hand: README's table


@pytest.mark.parametrize(
    ('argv', 'compiled'),
    [
        ([f'--max_iters={math.floor(TOKENS_FOR_COMPILE / 1024)}'], False),
        ([f'--max_iters={math.ceil(TOKENS_FOR_COMPILE / 1024)}'], True),
        ([f'--max_iters={math.ceil(TOKENS_FOR_COMPILE / 4096)}', '--batch_size=4'], True),
        (['--max_iters=1000000000', '--eval_only=True'], False),
        (['--max_iters=1000000000', '--compile=False'], False),
        (['--max_iters=1', '--compile=True'], True),
    ],
)
def test_long_cpu_runs_are_compiled(dataset, argv, compiled):
    done = resolved('--arch_preset=gpt2', *argv, dataset=dataset('gpt2', 50257))
    assert done.run.compile is compiled
    assert ('compile' in done.derived) == (not any('compile' in argument for argument in argv))


FLOPS_OF_GPU_UPDATE = 480 * 1024 * 854_654_976  # the same model


@pytest.mark.parametrize(
    ('argv', 'compiled'),
    [
        ([f'--max_iters={math.floor(CUDA_COMPILE_FLOPS / FLOPS_OF_GPU_UPDATE)}'], False),
        ([f'--max_iters={math.ceil(CUDA_COMPILE_FLOPS / FLOPS_OF_GPU_UPDATE)}'], True),
        (['--max_iters=1000000000', '--eval_only=True'], False),
        (['--max_iters=1', '--compile=True'], True),
    ],
)
@pytest.mark.parametrize('prepared', [True, False])
def test_long_gpu_runs_are_compiled(dataset, argv, compiled, prepared):
    """Without data, the vocabulary is assumed to be the same."""
    data = dataset('gpt2', 50257) if prepared else None
    done = resolved('--arch_preset=gpt2', *argv, device=torch.device('cuda'), dataset=data)
    assert done.run.compile is compiled
    assert resolved(*argv[:1], device=torch.device('mps')).run.compile is False


@pytest.mark.parametrize('ranks', [1, 2, 3, 5, 7, 8, 16, 24, 64, 96])
def test_gpus_share_the_sequences_of_an_iteration(ranks):
    """Whatever micro-batch suits their memory; 480 of them if the ranks divide that."""
    planned, device = settings('--plan', f'--world_size={ranks}'), torch.device('cuda')
    run = planned.resolve(device, 'float32', None).run
    sequences = run.batch_size * run.gradient_accumulation_steps
    assert run.batch_size <= 12 and run.gradient_accumulation_steps % ranks == 0
    assert sequences == 480 if 480 % ranks == 0 else 480 < sequences < 480 + 12 * ranks
    for size in divisors(sequences // ranks):
        done = planned.resolve(device, 'float32', None, (size, 'as a test has it')).run
        assert done.batch_size == size
        assert done.origins['batch_size'] == 'derived: as a test has it'
        assert done.gradient_accumulation_steps * size == sequences
        assert done.gradient_accumulation_steps % ranks == 0


@pytest.mark.parametrize(('share', 'compiled'), [(1.01, True), (0.51, False)])
def test_compile_depends_on_flops_per_rank(dataset, monkeypatch, share, compiled):
    torchrun = {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2'}
    for key, value in {**torchrun, 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '1'}.items():
        monkeypatch.setenv(key, value)
    updates = math.ceil(share * TOKENS_FOR_COMPILE / 1024)  # with one sequence per rank
    data = dataset('gpt2', 50257)
    done = resolved('--arch_preset=gpt2', f'--max_iters={updates}', dataset=data)
    assert done.run.gradient_accumulation_steps == 2 and done.run.compile is compiled


def test_resolved_settings_leave_nothing_open(dataset):
    done = resolved('--arch_preset=llama', dataset=dataset('byte', 256))
    left = [key for key, value in done.to_dict().items() if value in (None, 'auto')]
    off = {'attention_softcap', 'logit_softcap', 'sliding_window', 'layer_pattern'}
    off |= {'canon', 'qkv_clip', 'query_scale_growth', 'attention_chunk'}
    off |= {'wandb_project', 'wandb_run_name'}
    assert set(left) <= off | {'resume_run', 'peak_tflops', 'log_style'}


@pytest.mark.parametrize(
    ('kind', 'vocab_size', 'rows'),
    [('byte', 256, 256), ('char', 65, 65), ('gpt2', 50257, 50304), ('gpt2', 50304, 50304)],
)
def test_vocabulary_of_dataset(dataset, kind, vocab_size, rows):
    done = resolved('--arch_preset=llama', dataset=dataset(kind, vocab_size))
    assert done.architecture.vocab_size == rows
    assert done.architecture.origins['vocab_size'] == 'dataset'
    assert f'{rows:,}' in done.derived['vocab_size']
    # All other options are unchanged.
    without = settings('--arch_preset=llama').architecture
    assert {**done.architecture.to_dict(), 'vocab_size': None} == without.to_dict()
    assert done.architecture.preset == 'llama'


@pytest.mark.parametrize('rows', [50257, 50300, 60000])
def test_larger_vocabulary_is_allowed(dataset, rows):
    done = resolved(f'--vocab_size={rows}', dataset=dataset('gpt2', 50257))
    assert done.architecture.vocab_size == rows and 'vocab_size' not in done.derived


def test_smaller_vocabulary_is_refused(dataset):
    with pytest.raises(UserError) as refused:
        resolved('--vocab_size=50256', dataset=dataset('gpt2', 50257))
    (problem,) = refused.value.problems
    assert all(words in problem for words in ('50256', '50257', '50304'))


# --------------------------------------------------------------------------------------------------
# From Python


def test_training_config_from_dict_restores_it():
    run = TrainingConfig.from_dict({'max_iters': 7, 'optimizer': 'muon', 'lr_schedule': 'wsd'})
    assert (run.max_iters, run.muon_ns_steps, run.decay_shape) == (7, 5, '1-sqrt')
    again = TrainingConfig.from_dict(run.to_dict())
    assert again == run and hash(again) == hash(run) and 'max_iters=7' in repr(run)


@pytest.mark.parametrize(
    ('values', 'problem'),
    [
        ({'max_iter': 7}, "from_dict(): unknown option 'max_iter'. Did you mean max_iters?"),
        ({'max_iters': 0.5}, 'max_iters=0.5: float given, but max_iters takes int, at least 1.'),
        ({'lion_beta1': 0.9}, 'lion_beta1=0.9'),
    ],
)
def test_training_config_from_dict_explains_wrong_values(values, problem):
    with pytest.raises(UserError) as raised:
        TrainingConfig.from_dict(values)
    assert len(raised.value.problems) == 1 and problem in raised.value.problems[0]
    with pytest.raises(UserError, match='takes a dict'):
        TrainingConfig.from_dict(None)
