"""Every strategy gives the results of a single process: on CPUs with gloo, many runs per group.

`rank_driver.py` runs `PLAN` once; the tests check the results of its ranks.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.bit_equality import bit_differences
from helpers.event_files import assert_holds
from helpers.project import PROJECT, TINY_RUN

import export_checkpoint
from model_builder import build_model
from model_config import ModelArchitectureConfig
from records.record import read_record
from records.run_folders import latest_run
from training.checkpoint import list_checkpoints, load_latest, load_state, read_index

fcntl = pytest.importorskip('fcntl', reason='ranks are forked')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.multi_process,
    pytest.mark.skipif(sys.platform != 'linux', reason='ranks are forked'),
]

VOCABULARY = 67  # not divisible by the number of ranks
BASE = {
    **TINY_RUN,
    'n_embd': 16,
    'block_size': 16,
    'vocab_size': VOCABULARY,
    'gradient_accumulation_steps': 4,
    'max_iters': 20,
    'learning_rate': 0.01,
    'warmup_iters': 2,
    'lr_decay_iters': 20,
    'eval_interval': 10,
    'eval_iters': 5,
    'keep_last': 9,
    'log_style': 'line',
}
ALONE = {'use_fsdp': False, 'use_zero1': False}  # else a resumed run keeps it
STRATEGIES = {
    'ddp': {},
    'zero1': {'use_zero1': True},
    'fsdp': {'use_fsdp': True},
}
VARIANTS = {
    'gathered': {'use_fsdp': True, 'fsdp_reshard_after_forward': False},
    'unsharded': {'use_fsdp': True, 'fsdp_shard_size': 1},
}
GPT2 = {'arch_preset': 'gpt2'}  # tied, learned positions
SAMPLES = {'sample_interval': 10, 'sample_prompt': 'AB', 'sample_tokens': 20}
LLAMA = {'arch_preset': 'llama'}
# Parameters with four rows: the last of three ranks has none of them.
SIX = {
    **GPT2,
    'batch_size': 1,
    'gradient_accumulation_steps': 6,
    'max_iters': 10,
    'learning_rate': 0.003,
    'lr_decay_iters': 10,
    'eval_interval': 2,
}
NARROW = {**SIX, **LLAMA, 'n_embd': 4, 'n_layer': 1}
TEN = {**LLAMA, 'max_iters': 10, 'eval_interval': 5}
FEW = {**LLAMA, 'max_iters': 6, 'eval_interval': 3}

# Layers with different heads, windows, networks and position encodings, two of them with tables,
# then layers with other mixers, two in parallel, and layers without one of the sublayers.
MIXED = {
    'n_layer': 7,
    'layer_pattern': 'LTMDSRF',
    'layer_kinds.D.mixer': 'gated_deltanet',
    'layer_kinds.S.mixer': 'attention+mamba2',
    'layer_kinds.S.mamba2_head_dim': 8,
    'layer_kinds.S.ffn_type': 'none',
    'layer_kinds.R.mixer': 'retnet+rg_lru',
    'layer_kinds.F.mixer': 'none',
    'layer_kinds.L.sliding_window': 5,
    'layer_kinds.L.d_ff': 24,
    'layer_kinds.L.canon': 'ABCD',
    'layer_kinds.T.position_encoding': 't5_relative',
    'layer_kinds.T.norm_position': 'sandwich',
    'layer_kinds.M.position_encoding': 't5_relative',
    'layer_kinds.M.n_head': 4,
    'layer_kinds.M.ffn_type': 'moe',
    'layer_kinds.M.num_experts': 3,
    **{'layer_kinds.L.attention_gate': 'head', 'layer_kinds.T.value_residual': 'learned'},
    **{'layer_kinds.T.residual': 'x0_lambdas', 'layer_kinds.M.residual': 'layer_scale'},
}
# Besides AdamW. ZeRO-1 splits some matrices, FSDP all of them.
OPTIMIZERS = {
    'muon': {'optimizer': 'muon', **MIXED},
    'lion': {'optimizer': 'lion', 'learning_rate': 0.003, 'weight_decay': 1.0},
}

OTHER_PRESETS = ('qwen3', 'gemma2', 'olmo2', 'pythia', 'deepseek')

# Cases in which each strategy with two ranks is compared with a single process.
CASES = {
    **{name: {**TEN, **options} for name, options in OPTIMIZERS.items()},
    'gpt2': {**GPT2, **SAMPLES},
    'llama': {**LLAMA},
    'dropout': {
        **TEN,
        **{'dropout': 0.1, 'layer_pattern': 'LG', 'layer_kinds.G.attention_dropout': 0.0},
        **{'residual': 'x0_lambdas', 'value_residual': 'learned'},
        **{'head_bias': True, 'embedding_norm': 'layernorm', 'qkv_clip': 1.0},
        **{'qk_norm': 'layernorm', 'qk_norm_scope': 'each_head'},
        **{'query_scale_growth': 0.5, 'query_scale_length': 4},
    },
    'bfloat16': {**TEN, 'dtype': 'bfloat16'},
    'float16': {**TEN, 'dtype': 'float16'},
    # Its stacks of three are sharded unevenly, and metrics of a layer are summed over ranks.
    'mixture': {
        **TEN,
        **{'ffn_type': 'moe', 'num_experts': 3, 'experts_per_token': 1, 'dense_layers': 1},
        **{'router_normalize': False, 'shared_experts': 1, 'log_interval': 3},
        'capacity_factor': 1.1,
    },
    'diagnostics': {**GPT2, 'max_iters': 4, 'eval_interval': 2, 'diagnostics': True},
    # Under FSDP alone, which shards each module. Between them, they have the parts that the cases
    # above lack: windows and caps, sandwich and reordered norms, norms of queries and keys,
    # parallel branches, latent attention. At ten times this learning rate, rounding errors of
    # OLMo 2 grow a thousandfold in ten updates.
    **{p: {**TEN, 'learning_rate': 0.001, 'arch_preset': p} for p in OTHER_PRESETS},
}
# FSDP with matrices in bfloat16; a single process whose matrices are rounded is the reference.
ROUNDED = {
    'tied': {**FEW, **GPT2, **SAMPLES, 'sample_interval': 3, 'diagnostics': True},
    'untied': {**CASES['mixture'], 'optimizer': 'muon', 'max_iters': 6},
}
for case in ROUNDED.values():
    case |= {'dtype': 'bfloat16', 'learning_rate': 0.002}
IN_BFLOAT16 = {'use_fsdp': True, 'fsdp_param_dtype': 'bfloat16'}
EVERY = {'fsdp_reduce_every_micro_step': True}
BESIDE = {'async_save': True}
RECOMPUTED = {**CASES['dropout'], 'activation_checkpointing': 'full'}
MIXTURE_RECOMPUTED = {**CASES['mixture'], 'activation_checkpointing': 'full'}
COMPILED = {**GPT2, 'max_iters': 3, 'eval_interval': 3, 'compile': True}

# (ranks, options, words of the message)
REFUSED = {
    'fsdp alone': (1, {'use_fsdp': True}, 'torchrun'),
    'zero1 alone': (1, {'use_zero1': True}, 'torchrun'),
    'shards of nothing': (1, {'fsdp_shard_size': 2}, 'use_fsdp=True'),
    'unused option': (2, {'fsdp_reshard_after_forward': False}, 'use_fsdp=True'),
    'both': (2, {'use_fsdp': True, 'use_zero1': True}, 'Remove one of them'),
    'accumulation': (2, {'gradient_accumulation_steps': 3}, '--gradient_accumulation_steps=4'),
    'shards': (2, {'use_fsdp': True, 'fsdp_shard_size': 3}, 'fsdp_shard_size=3'),
}

# Checkpoints between strategies: ranks, options, and the iteration that each continues to.
JOURNEY = [
    (2, STRATEGIES['fsdp'], 2),
    (1, ALONE, 4),
    (2, ALONE, 6),
    (3, STRATEGIES['fsdp'], 8),
    (2, {'use_fsdp': False, 'use_zero1': True}, 10),
]


def planned() -> list[tuple[int, list[dict]]]:
    """The stages of `rank_driver.py`; a run has `out` if it continues another run."""

    def run(name, *options, out=None, special=None):
        values = {key: value for some in options for key, value in some.items()}
        values |= {'init_from': 'resume'} if out else {}
        extra = {'special': special} if special else {}
        return {'name': name, 'options': values, 'out': out or name, **extra}

    def refused(ranks):
        return [run(n, GPT2, options) for n, (size, options, _) in REFUSED.items() if size == ranks]

    sixes = {'adamw': SIX, **{name: {**SIX, **LLAMA, **o} for name, o in OPTIMIZERS.items()}}

    def leg(number):
        ranks, options, updates = JOURNEY[number]
        out = 'journey 0' if number else None
        return ranks, [
            run(
                f'{optimizer} journey {number}',
                six,
                options,
                {'max_iters': updates},
                out=out and f'{optimizer} {out}',
            )
            for optimizer, six in sixes.items()
        ]

    def late(name, options):
        twelve = {'max_iters': 12}
        return [
            run(f'{name} late', GPT2, options, BESIDE, twelve, special='written_late'),
            run(f'{name} late resumed', GPT2, options, out=f'{name} late'),
        ]

    single = [run(f'single {name}', options) for name, options in CASES.items()]
    single += [
        *late('single', ALONE),
        *(run(f'single six {optimizer}', six) for optimizer, six in sixes.items()),
        run('single narrow', NARROW),
        *(run(f'single {n} rounded', case, special='rounded') for n, case in ROUNDED.items()),
        run('single lost_loss', FEW, {'on_nonfinite': 'skip'}, special='lost_loss'),
        run('single overflow', FEW, {'dtype': 'float16'}, special='overflow'),
        *refused(1),
    ]
    two = refused(2)
    for name, options in {**STRATEGIES, **VARIANTS}.items():
        cases = set(CASES) if name == 'fsdp' else set(CASES) - set(OTHER_PRESETS)
        cases = cases if name in STRATEGIES else {'gpt2'}
        two += [run(f'{name} {case}', CASES[case], options) for case in CASES if case in cases]
    for name, options in STRATEGIES.items():
        two += [
            run(f'{name} recomputed', RECOMPUTED, options),
            run(f'{name} mixture recomputed', MIXTURE_RECOMPUTED, options),
            run(f'{name} half', GPT2, {'max_iters': 10}, options),
            run(f'{name} resumed', GPT2, options, out=f'{name} half'),
            run(f'{name} lost_loss', FEW, {'on_nonfinite': 'skip'}, options, special='lost_loss'),
            run(f'{name} overflow', FEW, {'dtype': 'float16'}, options, special='overflow'),
            run(f'{name} short', TEN, {'reduce_dtype': 'bfloat16'}, options),
            run(f'{name} full_disk', FEW, options, special='full_disk'),
            run(f'{name} full_disk beside', FEW, options, BESIDE, special='full_disk'),
            run(f'{name} signal_in_update', FEW, options, special='signal_in_update'),
            run(f'{name} signal beside', FEW, options, BESIDE, special='signal_in_update'),
            *late(name, options),
        ]
        for optimizer in OPTIMIZERS:
            case, half = CASES[optimizer], f'{name} {optimizer} half'
            two += [
                run(half, case, {'max_iters': 5}, options),
                run(f'{name} {optimizer} resumed', case, options, out=half),
            ]
    tied, untied = ROUNDED['tied'], ROUNDED['untied']
    recomputed = {'activation_checkpointing': 'full'}
    two += [
        run('ddp compiled', COMPILED),
        run('zero1 compiled', COMPILED, STRATEGIES['zero1']),
        run('fsdp tied rounded', tied, IN_BFLOAT16, EVERY, recomputed),
        run('fsdp untied rounded', untied, IN_BFLOAT16, {'fsdp_reshard_after_forward': False}),
        run('fsdp untied rounded half', untied, IN_BFLOAT16, {'max_iters': 3}),
        run('fsdp untied rounded resumed', untied, IN_BFLOAT16, out='fsdp untied rounded half'),
        run('fsdp tied rounded compiled', tied, IN_BFLOAT16, {'max_iters': 3, 'compile': True}),
        run('ddp signal_while_agreeing', FEW, special='signal_while_agreeing'),
    ]
    fsdp, hybrid = STRATEGIES['fsdp'], {'use_fsdp': True, 'fsdp_shard_size': 2}
    three = [
        run(f'{name} six {optimizer}', six, options)
        for name, options in STRATEGIES.items()
        for optimizer, six in sixes.items()
    ]
    three.append(run('fsdp narrow', NARROW, fsdp, {'max_iters': 4}))
    four = [
        run('hybrid half', GPT2, hybrid, EVERY, {'max_iters': 10}),
        run('hybrid few', FEW, hybrid, EVERY),
        run('hybrid rounded', ROUNDED['untied'], hybrid, IN_BFLOAT16, EVERY),
    ]
    after = [
        run('single narrow resumed', NARROW, ALONE, out='fsdp narrow'),
        run('single hybrid resumed', GPT2, ALONE, out='hybrid half'),
    ]
    return [
        (1, single),
        (2, [*two, *leg(0)[1]]),
        leg(1),
        leg(2),
        (3, [*leg(3)[1], *three]),
        leg(4),
        (4, four),
        (1, after),
    ]


# --- What the ranks left --------------------------------------------------------------------------


class Left:
    """Results of one run, by rank."""

    def __init__(self, folder: Path, name: str, ranks: int):
        files = [folder / f'{name}.{rank}.pt' for rank in range(ranks)]
        self.ranks = [torch.load(file, weights_only=True) for file in files]
        problems = [left['error'] for left in self.ranks if 'error' in left]
        assert not problems, problems[0]
        self.main = self.ranks[0]

    @property
    def folder(self) -> Path:
        return Path(self.main['folder'])

    @property
    def record(self) -> dict:
        return read_record(self.folder)

    def curve(self, key: str, *, below: str | None = None) -> torch.Tensor:
        """A value of every iteration: loss, loss_scale, or one in `gradients`."""
        entries = self.record['training_iterations']
        return torch.tensor(
            [(entry[below] if below else entry)[key] for entry in entries], dtype=torch.float64
        )

    def evaluations(self) -> torch.Tensor:
        keys = ('train_loss', 'val_loss')
        return torch.tensor([[e[key] for key in keys] for e in self.record['eval_steps']])

    def checkpoints(self) -> list[int]:
        """The iterations of published checkpoints; each is read and verified."""
        checkpoints = map(read_index, list_checkpoints(self.folder / 'checkpoints'))
        return [checkpoint.iter for checkpoint in checkpoints if load_state(checkpoint)]


@pytest.fixture(scope='module')
def left(tmp_path_factory):
    """left(name): results of a planned run. The first pytest worker runs all of them."""
    common = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        common = common.parent
    folder, plan = common / 'ranks', planned()
    with open(common / 'ranks.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            go_through(plan, folder)
    ranks = {run['name']: size for size, runs in plan for run in runs}
    return lambda name: Left(folder, name, ranks[name])


def go_through(plan: list[tuple[int, list[dict]]], folder: Path) -> None:
    dataset = folder / 'data'
    write_dataset(dataset)
    for _, runs in plan:
        for run in runs:
            places = {'dataset': str(dataset), 'out_dir': str(folder / run.pop('out'))}
            run['options'] = {**BASE, **places, **run['options']}
    (folder / 'plan.json').write_text(json.dumps(plan))
    subprocess.run(
        [sys.executable, PROJECT / 'tests/helpers/rank_driver.py', folder / 'plan.json', folder],
        env={
            **os.environ,
            'OMP_NUM_THREADS': '1',
            'PYTHONPATH': str(PROJECT),
            'TORCHINDUCTOR_COMPILE_THREADS': '1',  # no process pool per rank
        },
        check=True,
        timeout=600,
    )


def write_dataset(folder: Path) -> None:
    """Tokens below 67, each determined by the previous one and a random bit."""
    folder.mkdir()
    splits = {}
    for split, count in (('train', 8000), ('val', 2000)):
        tokens, choose = [0], random.Random(split).choice
        while len(tokens) < count:
            tokens.append((tokens[-1] * 3 + choose((1, 5))) % VOCABULARY)
        content = bytes(tokens)
        (folder / f'{split}.bin').write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        splits[split] = {'tokens': count, 'bytes': count, 'sha256': digest}
    tokenizer = {'kind': 'char', 'characters': [chr(ord('0') + n) for n in range(VOCABULARY)]}
    meta = {'tokenizer': tokenizer, 'vocab_size': VOCABULARY, 'dtype': 'uint8'}
    (folder / 'meta.json').write_text(json.dumps({'format_version': 1, **meta, 'splits': splits}))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    return (a - b).abs().max().item()


def weight_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(difference(a[name], b[name]) for name in a)


def differences(run: Left, reference: Left) -> dict[str, float]:
    """Value -> the largest difference between two runs with equally many iterations."""
    largest = {
        'loss': difference(run.curve('loss'), reference.curve('loss')),
        'evaluations': difference(run.evaluations(), reference.evaluations()),
        'weights': weight_difference(run.main['weights'], reference.main['weights']),
    }
    for key in ('norm', 'mean', 'std'):
        mine, theirs = (each.curve(key, below='gradients') for each in (run, reference))
        largest[f'gradient {key}'] = difference(mine, theirs)
    return largest


# --- The same training ----------------------------------------------------------------------------

FULL_PRECISION = [
    *(
        (strategy, case)
        for strategy in STRATEGIES
        for case in ('gpt2', 'llama', 'dropout', *OPTIMIZERS)
    ),
    *(('fsdp', case) for case in OTHER_PRESETS),
    *((variant, 'gpt2') for variant in VARIANTS),
]


@pytest.mark.parametrize(('strategy', 'case'), FULL_PRECISION)
def test_strategies_equal_single_process(left, strategy, case):
    run, reference = left(f'{strategy} {case}'), left(f'single {case}')
    assert max(differences(run, reference).values()) < 1e-5
    for rank in run.ranks:
        assert weight_difference(rank['weights'], run.main['weights']) == 0
        for name, initial in reference.main['initial'].items():
            assert torch.equal(rank['initial'][name], initial), name
    losses = reference.curve('loss')
    assert losses[-1] < losses[0] - 0.02, 'nothing was learned, so nothing was compared'
    name = 'fsdp' if strategy in VARIANTS else strategy
    metadata = run.record['metadata']
    assert (metadata['strategy'], metadata['world_size']) == (name, 2)


@pytest.mark.parametrize('optimizer', ['adamw', *OPTIMIZERS])
@pytest.mark.parametrize('strategy', STRATEGIES)
def test_uneven_shards_on_three_ranks(left, strategy, optimizer):
    run, reference = left(f'{strategy} six {optimizer}'), left(f'single six {optimizer}')
    assert max(differences(run, reference).values()) < 1e-5
    hashes, expected = (
        [step['data_hash'] for step in r.record['eval_steps']] for r in (run, reference)
    )
    assert hashes == expected and hashes[-1] is not None


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_activation_checkpointing_under_strategies(left, strategy):
    """Includes dropout of 0.1, whose masks are drawn again."""
    run, reference = left(f'{strategy} recomputed'), left('single dropout')
    assert max(differences(run, reference).values()) < 1e-5


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_within_noise(left, strategy, dtype):
    run, reference, exact = (
        left(f'{strategy} {dtype}'),
        left(f'single {dtype}'),
        left('single llama'),
    )
    losses, expected = run.curve('loss'), reference.curve('loss')
    noise = difference(expected, exact.curve('loss')[: len(expected)])
    assert noise > 1e-5, 'autocast was off'
    assert abs(losses[0] - expected[0]) < 1e-6  # the first forward pass has no rounding differences
    assert difference(losses, expected) < noise
    # After one more update than the losses that noise is of: two runs, each so far from the exact.
    assert difference(run.evaluations(), reference.evaluations()) < 2 * noise


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_bfloat16_gradient_reduction(left, strategy):
    norms, expected = (
        left(name).curve('norm', below='gradients')
        for name in (f'{strategy} short', 'single llama')
    )
    error = abs(norms[0] / expected[0] - 1)
    assert 0 < error < 2**-8  # half a unit in the last place of bfloat16 is 2^-9 of a value
    losses = left(f'{strategy} short').curve('loss')
    assert difference(losses, left('single llama').curve('loss')[: len(losses)]) < 0.02


@pytest.mark.parametrize(
    ('name', 'reference'),
    [
        ('fsdp tied rounded', 'single tied rounded'),
        ('fsdp untied rounded', 'single untied rounded'),
        ('fsdp tied rounded compiled', 'single tied rounded'),
        ('hybrid rounded', 'single untied rounded'),
    ],
)
def test_matrices_in_bfloat16_equal_rounded_matrices(left, name, reference):
    """With tied and separate tables, mixture, Muon, recomputation, and reduced micro-steps."""
    run, reference = left(name), left(reference)
    assert run.record['config']['fsdp_param_dtype'] == 'bfloat16'
    losses = run.curve('loss')
    assert difference(losses, reference.curve('loss')[: len(losses)]) < 1e-4
    for rank in run.ranks:
        assert weight_difference(rank['weights'], run.main['weights']) == 0
        assert {weight.dtype for weight in rank['weights'].values()} == {torch.float32}
    if 'compiled' in name:
        if run.record['startup_info']['hardware']['compile']:
            assert all(rank['compiled_frames'] > 0 for rank in run.ranks)
        return
    assert difference(run.evaluations(), reference.evaluations()) < 1e-4
    assert losses[-1] < losses[0] - 0.02


def test_resume_with_matrices_in_bfloat16(left):
    """Bit-equal, also to a run whose blocks are not gathered again."""
    whole, resumed = left('fsdp untied rounded'), left('fsdp untied rounded resumed')
    assert weight_difference(whole.main['weights'], resumed.main['weights']) == 0


@pytest.mark.parametrize('strategy', ['ddp', 'zero1'])  # FSDP: with matrices in bfloat16
def test_compiled_blocks(left, strategy):
    run = left(f'{strategy} compiled')
    if not run.record['startup_info']['hardware']['compile']:
        pytest.skip('there is no compiler')
    assert all(rank['compiled_frames'] > 0 for rank in run.ranks)
    assert difference(run.curve('loss'), left('single gpt2').curve('loss')[:3]) < 1e-5


@pytest.mark.parametrize('how', ['mixture', 'mixture recomputed'])
@pytest.mark.parametrize('strategy', STRATEGIES)
def test_moe_under_strategies(left, strategy, how):
    run, reference = left(f'{strategy} {how}'), left('single mixture')
    assert max(differences(run, reference).values()) < 1e-5
    entries = run.record['training_iterations'], reference.record['training_iterations']
    readings = [[entry['readings'] for entry in each] for each in entries]
    assert [entry['iter'] for entry in entries[0]] == [0, 3, 6, 9]
    for mine, theirs in zip(*readings, strict=True):
        assert len(theirs) == 7 and mine == pytest.approx(theirs, rel=1e-5)
    assert any(reading['busiest_expert'] > 1 for reading in readings[1])
    assert any(reading['dropped_share'] > 0 for reading in readings[1])


@pytest.mark.parametrize('strategy', [*STRATEGIES, *VARIANTS])
def test_samples_equal_single_process(left, strategy):
    run, reference = (
        {entry['iter']: entry['sample']['text'] for entry in left(name).record['eval_steps']}
        for name in (f'{strategy} gpt2', 'single gpt2')
    )
    assert run == reference and list(run) == [0, 10, 20]
    assert all(len(text) == 20 for text in run.values()) and len({*run.values()}) == 3


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_diagnostics_equal_single_process(left, strategy):
    """Diagnostics of gradient, update and all windows, which two ranks split unevenly."""

    def figures(entry: dict) -> list[float]:
        diagnostics = entry['diagnostics']
        return [
            *(value for layer in diagnostics['layers'] for value in layer.values()),
            *diagnostics['update_to_weight'].values(),
            *(stretch['loss'] for stretch in diagnostics['val_loss_by_position']),
        ]

    run, reference = (left(f'{name} diagnostics') for name in (strategy, 'single'))
    pairs = list(zip(run.record['eval_steps'], reference.record['eval_steps'], strict=True))
    assert len(pairs) == 3
    for mine, theirs in pairs:
        assert figures(mine) == pytest.approx(figures(theirs), rel=1e-4)
    assert len(figures(pairs[-1][1])) == 2 * 4 + 3 + 5
    # Diagnostics do not change the training.
    assert weight_difference(run.main['weights'], reference.main['weights']) < 1e-5


# --- Each is what it says -------------------------------------------------------------------------


def test_sharded_memory_per_rank(left):
    whole = left('single gpt2').main
    for strategy in (*STRATEGIES, *VARIANTS):
        ranks = left(f'{strategy} gpt2').ranks
        for key, divided in (
            ('parameter_bytes', strategy in ('fsdp', 'gathered')),
            ('optimizer_bytes', strategy in ('zero1', 'fsdp', 'gathered')),
        ):
            share = [rank[key] / whole[key] for rank in ranks]
            assert max(share) == pytest.approx(0.5 if divided else 1, rel=0.02), (strategy, key)


def test_memory_footprint_is_recorded(left):
    for strategy in ('single', *STRATEGIES, *VARIANTS):
        run = left(f'{strategy} gpt2')
        footprint = run.record['startup_info']['parallel']
        for key in ('parameter_bytes', 'optimizer_bytes'):
            assert footprint[key] == max(rank[key] for rank in run.ranks), (strategy, key)
        gradients = [
            sum(g.nbytes for g in rank['gradients'][-1] if g is not None) for rank in run.ranks
        ]
        assert footprint['gradient_bytes'] == max(gradients), strategy


@pytest.mark.parametrize(
    'name',
    [
        *(f'{strategy} {case}' for strategy in STRATEGIES for case in ('gpt2', 'llama')),
        *(f'{variant} gpt2' for variant in VARIANTS),
        *(
            f'{strategy} {kind}'
            for strategy in STRATEGIES
            for kind in ('six adamw', 'short', 'recomputed')
        ),
        'hybrid few',
        'single gpt2',
    ],
)
def test_bytes_sent_are_recorded(left, name):
    """The bytes sent per iteration are those of the collectives, without Python values."""
    run = left(name)
    record, config = run.record, run.record['config']
    sent = record['startup_info']['parallel']['bytes_sent_per_update']
    # Of FSDP's units, those that are not freed after a forward pass are still gathered from an
    # evaluation, unless a checkpoint follows. Shards of one rank are not gathered.
    is_gathered = record['metadata']['strategy'] == 'fsdp' and name != 'unsharded gpt2'
    for rank in run.ranks:
        assert len(rank['sent']) == config['max_iters']
        for iter, sent_by_rank in enumerate(rank['sent']):
            if is_gathered and iter == 0:
                assert sent_by_rank < sent
            elif is_gathered and iter % config['eval_interval'] == 0:
                assert sent_by_rank < sent * (1 + 1e-9)
            else:
                assert sent_by_rank == pytest.approx(sent, rel=1e-9)


@pytest.mark.parametrize('ranks', ['', 'six '])
@pytest.mark.parametrize('strategy', STRATEGIES)
def test_bytes_sent_by_matrix_exchange_are_recorded(left, strategy, ranks):
    """On average, since it depends on the owner of each matrix."""
    run = left(f'{strategy} {ranks}muon')
    recorded = run.record['startup_info']['parallel']['bytes_sent_per_update']
    sent = torch.tensor([rank['sent'] for rank in run.ranks], dtype=torch.float64)
    after_first = sent.mean(dim=0).tolist()[1:]
    assert after_first == pytest.approx([recorded] * len(after_first), rel=1e-9)


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_gradients_are_reduced_once_per_iteration(left, strategy):
    """Before the last of two micro-batches, a rank has at most its own gradient."""
    single = left('single gpt2').main['gradients']  # sums of one, two, three and four micro-batches
    ranks = [rank['gradients'] for rank in left(f'{strategy} gpt2').ranks]
    for number, whole in enumerate(single[-1]):
        first, last = ([rank[step][number] for rank in ranks] for step in (0, 1))
        if strategy == 'fsdp':
            assert first == [None, None]
            torch.testing.assert_close(torch.cat(last), whole)
            continue
        torch.testing.assert_close(first[0], single[0][number])
        torch.testing.assert_close(first[1], single[1][number] - single[0][number])
        assert torch.equal(*last)
        torch.testing.assert_close(last[0], whole)


# --- Values that are not finite -------------------------------------------------------------------


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_nonfinite_loss_of_one_rank_is_skipped_by_all(left, strategy):
    run, reference = left(f'{strategy} lost_loss'), left('single lost_loss')
    kinds = [[e['event'] for e in each.record['events']] for each in (run, reference)]
    assert kinds[0] == kinds[1] and 'nonfinite' in kinds[0]
    mine, theirs = (each.record['training_iterations'] for each in (run, reference))
    assert [e['loss'] is None for e in mine] == [e['iter'] == 2 for e in mine]
    assert mine[-1]['loss'] == pytest.approx(theirs[-1]['loss'], abs=1e-5)
    assert weight_difference(run.main['weights'], reference.main['weights']) < 1e-5


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_overflow_on_one_rank_is_skipped_by_all(left, strategy):
    run, reference = left(f'{strategy} overflow'), left('single overflow')
    scales = reference.curve('loss_scale')
    assert scales[2] == scales[1] / 2, 'nothing overflowed'
    assert torch.equal(run.curve('loss_scale'), scales)
    assert [rank['scale'] for rank in run.ranks] == [scales[-1], scales[-1]]
    assert difference(run.curve('loss'), reference.curve('loss')) < 1e-3
    # All ranks skipped the update: the next iteration starts from the same weights.
    assert weight_difference(run.ranks[1]['weights'], run.main['weights']) == 0


# --- Checkpoints ----------------------------------------------------------------------------------


RESUMED = [
    *((f'{name} gpt2', f'{name} resumed') for name in STRATEGIES),
    *((f'{name} {o}', f'{name} {o} resumed') for name in STRATEGIES for o in OPTIMIZERS),
]


@pytest.mark.parametrize(('whole', 'resumed'), RESUMED)
def test_resume_under_strategies_is_bit_equal(left, whole, resumed):
    whole, resumed = left(whole), left(resumed)
    assert resumed.checkpoints() == whole.checkpoints() and len(whole.checkpoints()) == 2
    assert torch.equal(whole.curve('loss'), resumed.curve('loss'))
    assert weight_difference(whole.main['weights'], resumed.main['weights']) == 0


@pytest.mark.parametrize('strategy', (*STRATEGIES, *VARIANTS))
def test_checkpoint_holds_final_weights(left, strategy):
    """Each element is saved once, by any rank, and equals the one in training."""
    run = left(f'{strategy} gpt2')
    _, files = load_latest(run.folder / 'checkpoints', print)
    for name, weight in run.main['weights'].items():
        pieces = [
            (file['offsets']['model'][name], file['model'][name].reshape(-1))
            for file in files
            if name in file['model']
        ]
        pieces.sort(key=lambda piece: piece[0])
        assert torch.equal(torch.cat([piece for _, piece in pieces]), weight.reshape(-1)), name


@pytest.mark.parametrize('strategy', ('single', *STRATEGIES))
def test_async_checkpoint_equals_saved_state(left, strategy):
    """It is written two iterations later, and a resumed run ends bit-identical."""
    late, whole = left(f'{strategy} late'), left(f'{strategy} gpt2')
    after_ten = [run.folder / 'checkpoints' / 'iter_00000010' for run in (late, whole)]
    mine, theirs = map(read_index, after_ten)
    assert mine.index['progress'] == theirs.index['progress']
    assert bit_differences(*map(load_state, (mine, theirs))) == []
    journal = (late.folder / 'journal.jsonl').read_text().splitlines()
    entries = [(line['kind'], line.get('iter')) for line in map(json.loads, journal)]
    assert entries.index(('checkpoint', 10)) > entries.index(('iteration', 11))

    resumed = left(f'{strategy} late resumed')
    (resume,) = (event for event in resumed.record['events'] if event['event'] == 'resume')
    assert resume['iter'] == 12 and resumed.checkpoints() == [20, 12, 10]
    assert torch.equal(whole.curve('loss'), resumed.curve('loss'))
    assert weight_difference(whole.main['weights'], resumed.main['weights']) == 0


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_export_of_any_strategys_checkpoint(left, strategy, tmp_path):
    run, output = left(f'{strategy} gpt2'), tmp_path / 'model.pt'
    export_checkpoint.main([f'--run={run.folder}', f'--output={output}'])
    exported = torch.load(output, weights_only=True)
    config = ModelArchitectureConfig.from_dict(exported['config']['architecture'])
    models = build_model(config, 'cpu', seed=1), build_model(config, 'cpu', seed=2)
    models[0].load_state_dict(exported['model'])
    models[1].load_state_dict(run.main['weights'], strict=False)  # the tied name is left out
    with torch.no_grad():
        logits = [model.eval()(torch.arange(16).view(2, 8)) for model in models]
    assert torch.equal(*logits)


@pytest.mark.parametrize('optimizer', ['adamw', *OPTIMIZERS])
def test_resume_across_strategies(left, optimizer):
    end, reference = (
        left(f'{optimizer} journey {len(JOURNEY) - 1}'),
        left(f'single six {optimizer}'),
    )
    changes = [event['changed'] for event in end.record['events'] if event['event'] == 'resume']
    assert [change['strategy'][1] for change in changes] == ['single', 'ddp', 'fsdp', 'zero1']
    assert [change['world_size'][1] for change in changes] == [1, 2, 3, 2]
    assert max(differences(end, reference).values()) < 1e-5


@pytest.mark.parametrize(
    ('resumed', 'reference'),
    [('single narrow resumed', 'single narrow'), ('single hybrid resumed', 'single gpt2')],
)
def test_ranks_with_empty_or_replicated_shards(left, resumed, reference):
    """Three ranks, one without rows; and two shards in each of two replicas."""
    assert max(differences(left(resumed), left(reference)).values()) < 1e-5


# --- Endings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'updates'),
    [
        *((f'{strategy} signal_in_update', 3) for strategy in STRATEGIES),
        *((f'{strategy} signal beside', 3) for strategy in STRATEGIES),
        ('ddp signal_while_agreeing', 2),
    ],
)
def test_signal_to_one_rank_stops_all(left, name, updates):
    run = left(name)
    assert [rank['code'] for rank in run.ranks] == [143, 143]
    assert run.record['status'] == 'interrupted'
    assert run.record['summary']['final_iter'] == updates
    assert updates in run.checkpoints() and len(set(run.checkpoints())) == len(run.checkpoints())


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('special', ['full_disk', 'full_disk beside'])
def test_rank_that_cannot_write_stops_all(left, strategy, special):
    run = left(f'{strategy} {special}')
    assert [rank['code'] for rank in run.ranks] == [2, 2]
    (problem,) = run.main['problems']
    assert run.ranks[1]['problems'] == (problem,) and os.strerror(28) in problem
    assert run.record['status'] == 'failed'
    assert not list((run.folder / 'checkpoints').iterdir())


@pytest.mark.parametrize('name', REFUSED)
def test_invalid_strategy_options_are_refused(left, name):
    run, (_, _, words) = left(name), REFUSED[name]
    assert {rank['code'] for rank in run.ranks} == {2}
    assert words in run.main['stderr']
    assert all(len(rank['problems']) == 1 for rank in run.ranks)
    assert not any('folder' in rank for rank in run.ranks)


def test_torchrun_command_of_readme(tmp_path, tiny_dataset):
    options = {**TINY_RUN, 'dataset': tiny_dataset, 'out_dir': 'out', 'use_fsdp': True}
    options |= {'tensorboard_log': True}
    subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
        + [str(PROJECT / 'train.py'), str(PROJECT / 'config/arch_llama.py')]
        + [f'--{key}={value}' for key, value in options.items()],
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    folder = latest_run(tmp_path / 'out')
    record = read_record(folder)
    assert record['status'] == 'finished'
    assert record['metadata']['strategy'] == 'fsdp' and record['metadata']['world_size'] == 2
    assert len(list(folder.glob('events*'))) == 1
    assert_holds(folder, record)


MISTAKEN = """
import os, time
from common import errors
from common.errors import UserError, run_script

errors.GRACE_SECONDS = 3

def main(argv):
    rank = os.environ['RANK']
    if rank == '0':
        time.sleep({delay})
    if rank in '{ranks}':
        raise UserError('a mistake')
    time.sleep(60)

run_script(main)
"""


@pytest.mark.parametrize(
    ('ranks', 'delay', 'expected'),
    [('01', 1, 'script.py: a mistake'), ('1', 0, 'script.py, rank 1: a mistake')],
)
def test_user_error_under_torchrun_is_reported_once(tmp_path, ranks, delay, expected):
    """Also if the first rank is the last to fail, and if only another rank fails."""
    script = tmp_path / 'script.py'
    script.write_text(MISTAKEN.format(ranks=ranks, delay=delay))
    result = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            script,
        ],
        env={**os.environ, 'PYTHONPATH': str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if 'a mistake' in line]
    # By one rank, and by torchrun in its final report.
    assert [line for line in lines if not line.startswith('  traceback : ')] == [expected]
    assert lines[-1] == '  traceback : a mistake'
