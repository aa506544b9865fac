"""Values in the record of a run equal independent computations."""

import json
import math
import re
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import random_tokens, tiny
from helpers.in_process import joined, train_here
from helpers.project import PROJECT, TINY_RUN
from torch.utils.flop_counter import FlopCounterMode

from common import gpu_specs, hardware
from data.dataset import batch_digest, load_dataset
from model_builder import build_model, training_flops
from parallel import strategies
from parallel.strategies import prepare_blocks, recomputed_blocks

pytestmark = pytest.mark.slow

BLOCK, DATA_SEED = TINY_RUN['block_size'], 5
SEQUENCES = 8  # per iteration
PEAK = TINY_RUN['peak_tflops']
MEASURED = {
    'data_seed': DATA_SEED,
    'batch_size': 2,
    'gradient_accumulation_steps': 4,
    'max_iters': 7,
    'eval_interval': 3,
    'log_interval': 1,
    'learning_rate': 1e-2,
    'warmup_iters': 2,
    'eval_iters': 5,
    'attention_backend': 'manual',
    'activation_checkpointing': 'full',
}


@pytest.fixture(scope='module')
def run(tiny_dataset, tmp_path_factory):
    return train_here(tiny_dataset, tmp_path_factory.mktemp('measured'), **MEASURED)


def mean_loss(model, tokens, targets) -> torch.Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def plain_evaluation(model, dataset, split: str, windows: int) -> float:
    """The mean loss of single windows with equally spaced starts."""
    last = dataset.tokens(split) - BLOCK - 1
    starts = [math.floor(i * last / (windows - 1)) for i in range(windows)]
    text = np.frombuffer((dataset.folder / f'{split}.bin').read_bytes(), np.uint8).astype(np.int64)
    losses = []
    for start in starts:
        window = torch.from_numpy(text[start : start + BLOCK + 1])
        losses.append(mean_loss(model, window[None, :-1], window[None, 1:]).item())
    return sum(losses) / windows


@pytest.fixture(scope='module')
def expected(run, tiny_dataset):
    """The same training in a plain loop: whole batches, torch's AdamW, numpy statistics."""
    config, options = run.session.settings.architecture, run.session.settings.run
    dataset = load_dataset(str(tiny_dataset), BLOCK)
    model = build_model(config, device='cpu', seed=options.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{'params': matrices, 'weight_decay': 0.1}, {'params': others, 'weight_decay': 0.0}],
        betas=(0.9, 0.95),
        fused=False,
    )
    losses, gradients, evaluations = [], [], {}
    for step in range(8):
        if step in (0, 3, 6, 7):
            with torch.no_grad():
                evaluations[step] = {
                    split: plain_evaluation(model, dataset, split, 5) for split in ('train', 'val')
                }
        if step == 7:
            break
        order = dataset.order('random', DATA_SEED)
        batch = dataset.batch(order, step * SEQUENCES, SEQUENCES)
        loss = mean_loss(model, *map(torch.from_numpy, batch))
        optimizer.zero_grad()
        loss.backward()
        flat = np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])
        flat = flat.astype(np.float64)
        norm = np.sqrt((flat**2).sum())
        gradients.append({'norm': norm, 'mean': flat.mean(), 'std': flat.std()})
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step < 2:
            rate = 1e-2 * (step + 1) / 3
        else:
            rate = 1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 5))
        for group in optimizer.param_groups:
            group['lr'] = rate
        optimizer.step()
    return SimpleNamespace(losses=losses, gradients=gradients, evaluations=evaluations, model=model)


# --- The loop against a plain one -----------------------------------------------------------------


@pytest.mark.slow
def test_logged_loss_is_mean_over_micro_batches(run, expected):
    assert run.code == 0
    assert run.losses == pytest.approx(expected.losses, rel=1e-4)
    assert expected.losses[-1] < expected.losses[0] - 0.5  # the loss decreases


def test_gradient_statistics_cover_whole_iteration(run, expected):
    statistics = [entry['gradients'] for entry in run.record['training_iterations']]
    for ours, theirs in zip(statistics, expected.gradients, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-6)
    # The first iteration has no accumulated rounding.
    assert statistics[0] == pytest.approx(expected.gradients[0], rel=1e-4)


def test_evaluation_equals_plain_loop(run, expected):
    steps = run.record['eval_steps']
    assert [step['iter'] for step in steps] == [0, 3, 6, 7]
    for step in steps:
        theirs = expected.evaluations[step['iter']]
        assert step['train_loss'] == pytest.approx(theirs['train'], rel=1e-4)
        assert step['val_loss'] == pytest.approx(theirs['val'], rel=1e-4)
        # In this dataset each token is one byte.
        assert step['val_bits_per_byte'] == pytest.approx(step['val_loss'] / math.log(2))


def test_weights_equal_plain_loop(run, expected):
    for name, parameter in expected.model.named_parameters():
        torch.testing.assert_close(run.weights()[name], parameter.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_bits_per_byte_follow_bytes_per_token(run, tiny_dataset, tmp_path):
    """The same tokens, with 2.5 bytes per token in the metadata."""
    for split in ('train', 'val'):
        (tmp_path / f'{split}.bin').write_bytes((tiny_dataset / f'{split}.bin').read_bytes())
    meta = json.loads((tiny_dataset / 'meta.json').read_text())
    meta['splits']['val']['bytes'] = int(2.5 * meta['splits']['val']['tokens'])
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    entry = train_here(tmp_path, tmp_path / 'out', **MEASURED, eval_only=True).record['eval_steps'][
        0
    ]
    before = run.record['eval_steps'][0]
    assert entry['val_loss'] == before['val_loss']
    assert entry['val_bits_per_byte'] == pytest.approx(before['val_bits_per_byte'] / 2.5)


# --- Speed ----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def counted(run):
    """FLOPs per token of a training step counted by torch: total, causal, with recomputation."""
    config = run.session.settings.architecture
    tokens = torch.zeros((1, BLOCK), dtype=torch.long)

    def count(model) -> tuple[float, float]:
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens)[0].backward()
        # In this model only the attention scores are batched products.
        scores = counter.get_flop_counts()['Global'][torch.ops.aten.bmm]
        return counter.get_total_flops() / BLOCK, scores / BLOCK

    total, scores = count(build_model(config, 'cpu', 0))
    with_recomputation, _ = count(run.session.model)
    assert with_recomputation > total
    return total, total - scores / 2, with_recomputation


def test_mfu_follows_from_iteration_time(run, counted):
    total, causal, with_recomputation = counted
    iterations = run.record['training_iterations']
    for entry in iterations:
        tokens_per_second = SEQUENCES * BLOCK / (entry['time_ms'] / 1e3)
        per_flop = 100 * tokens_per_second / (PEAK * 1e12)
        assert entry['tokens_per_sec'] == pytest.approx(tokens_per_second)
        assert entry['tokens_seen'] == (entry['iter'] + 1) * SEQUENCES * BLOCK
        assert entry['mfu'] == pytest.approx(
            {
                'mfu_percent': total * per_flop,
                'mfu_causal_percent': causal * per_flop,
                'hfu_percent': with_recomputation * per_flop,
                'achieved_tflops': total * tokens_per_second / 1e12,
                'hardware_peak_tflops': PEAK,
                'flops_per_token': total,
                'architecture': run.record['architecture']['name'],
            }
        )
    summary = run.record['summary']
    assert summary['total_tokens'] == 7 * SEQUENCES * BLOCK
    assert summary['epochs'] == 7 * SEQUENCES * BLOCK / 30_000
    assert summary['total_flops'] == pytest.approx(summary['total_tokens'] * total)
    info = run.record['startup_info']['hardware']
    tokens_per_second = 0.5 * PEAK * 1e12 / total
    assert info['expected_tokens_per_sec_at_50_mfu'] == pytest.approx(tokens_per_second)


@pytest.mark.parametrize(
    ('choice', 'blocks'), [('none', []), ('full', [0, 1, 2]), ('1', [0, 1, 2]), ('2', [1])]
)
def test_recomputed_blocks(choice, blocks):
    assert recomputed_blocks(choice, n_layer=3) == blocks


@pytest.mark.slow
@pytest.mark.parametrize(
    ('norm_position', 'recomputed'), [('pre', [0, 1, 2]), ('pre', [1]), ('post', [0, 1, 2])]
)
def test_recomputed_flops_equal_torch_counter(norm_position, recomputed):
    """The last product of a pre-norm block is not recomputed, because its output is not needed."""
    config = tiny(n_layer=3, attention_backend='manual', norm_position=norm_position)
    tokens, totals = random_tokens(config, batch=1), []
    for numbers in (recomputed, []):
        model = build_model(config, 'cpu', 0)
        prepare_blocks(model, numbers, compiled=False)
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens)[0].backward()
        totals.append(counter.get_total_flops())
    flops = training_flops(build_model(config), recomputed)
    assert flops['recomputed_per_token'] * config.block_size == totals[0] - totals[1]
    assert flops['per_token'] * config.block_size == totals[1]


@pytest.mark.slow
def test_iteration_time_excludes_evaluation(tiny_dataset, tmp_path, monkeypatch):
    """The clock advances only in the model: 1 s per training call, 100 s per evaluation call."""
    now = 0.0

    def tick(module, arguments):
        nonlocal now
        now += 1.0 if module.training else 100.0

    monkeypatch.setattr(hardware, 'time', SimpleNamespace(perf_counter=lambda: now))
    build = strategies.build_model

    def build_ticking(*arguments):
        model = build(*arguments)
        model.register_forward_pre_hook(tick)
        return model

    monkeypatch.setattr(strategies, 'build_model', build_ticking)
    record = train_here(
        tiny_dataset, tmp_path, **{**MEASURED, 'max_iters': 9, 'log_interval': 4}
    ).record
    entries = record['training_iterations']
    assert [(e['iter'], e['steps'], e['time_ms']) for e in entries] == [
        (0, 1, 4000.0),
        (4, 4, 4000.0),
        (8, 4, 4000.0),
    ]
    assert {e['tokens_per_sec'] for e in entries} == {SEQUENCES * BLOCK / 4.0}
    assert record['summary']['avg_time_ms'] == 4000.0


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_cpu_peak_is_measured_in_matmul_dtype(tiny_dataset, tmp_path, dtype):
    options = {'max_iters': 1, 'eval_iters': 1, 'dtype': dtype, 'peak_tflops': None}
    record = train_here(tiny_dataset, tmp_path, **options).record
    info, entry = record['startup_info']['hardware'], record['training_iterations'][0]['mfu']
    assert re.search(rf'measured.* {dtype} matrix multiplication', info['peak_source'])
    assert info['dtype'] == dtype
    assert info['peak_tflops'] == entry['hardware_peak_tflops'] > 0
    achieved = entry['achieved_tflops']
    assert entry['mfu_percent'] == pytest.approx(100 * achieved / info['peak_tflops'])


def test_given_peak_is_used_and_unknown_peak_leaves_mfu_empty(
    run, tiny_dataset, tmp_path, monkeypatch
):
    info = run.record['startup_info']['hardware']
    assert (info['peak_tflops'], info['peak_source']) == (PEAK, '--peak_tflops')
    unknown = gpu_specs.Peak(None, 'unknown', measured=False)
    monkeypatch.setattr(hardware, 'peak_flops', lambda *arguments: unknown)
    record = train_here(tiny_dataset, tmp_path, max_iters=1).record
    mfu = record['training_iterations'][0]['mfu']
    relative = ('mfu_percent', 'mfu_causal_percent', 'hfu_percent', 'hardware_peak_tflops')
    assert {mfu[key] for key in relative} == {None}
    assert mfu['achieved_tflops'] > 0
    assert record['summary']['avg_mfu'] is None


# --- Equal data of different runs -----------------------------------------------------------------


@pytest.mark.slow
def test_accumulation_splits_same_sequences(run, tiny_dataset, tmp_path):
    for batch_size, micro_steps in ((1, 8), (4, 2), (8, 1)):
        batch = {'batch_size': batch_size, 'gradient_accumulation_steps': micro_steps}
        options = {**MEASURED, **batch, 'activation_checkpointing': 'none'}
        other = train_here(tiny_dataset, tmp_path / str(batch_size), **options)
        assert other.trained_on[0][0].shape == (batch_size, BLOCK)
        assert torch.equal(joined(other.trained_on), joined(run.trained_on))
        assert torch.equal(joined(other.evaluated_on), joined(run.evaluated_on))
        assert other.losses == pytest.approx(run.losses, rel=1e-4)
        assert data_hashes(other) == data_hashes(run)
        for ours, theirs in zip(other.record['eval_steps'], run.record['eval_steps'], strict=True):
            assert ours['val_loss'] == pytest.approx(theirs['val_loss'], rel=1e-4)


def data_hashes(run):
    return [step['data_hash'] for step in run.record['eval_steps']]


def test_data_hash_follows_global_order(run, tiny_dataset):
    dataset = load_dataset(str(tiny_dataset), BLOCK)
    per_iteration = MEASURED['batch_size'] * MEASURED['gradient_accumulation_steps']
    for step in run.record['eval_steps']:
        sequences = step['iter'] * per_iteration
        order = dataset.order('random', run.record['config']['data_seed'])
        tokens, _ = dataset.batch(order, 0, sequences)
        assert step['data_hash'] == (f'{batch_digest(0, tokens):016x}' if sequences else None)
    assert len(set(data_hashes(run))) == len(data_hashes(run)) > 2


def test_unique_tokens_estimate_is_close_to_count(run, tiny_dataset):
    data = run.record['startup_info']['data']
    first, last = run.record['eval_steps'][0], run.record['eval_steps'][-1]
    assert (first['epochs'], first['unique_tokens']) == (0, 0)
    text = (tiny_dataset / 'train.bin').read_bytes()
    starts = [text.index(bytes(row)) for row in joined(run.trained_on)[0].tolist()]
    distinct = len({token for start in starts for token in range(start, start + BLOCK)})
    assert abs(last['unique_tokens'] - distinct) < 3 * BLOCK  # overlaps of windows vary
    assert last['unique_tokens'] == data['planned_unique_tokens'] < 7 * SEQUENCES * BLOCK
    assert last['epochs'] == data['planned_epochs'] and data['windows_per_epoch'] is None


@pytest.mark.slow
def test_architectures_see_same_data(run, tiny_dataset, tmp_path):
    options = {key: value for key, value in MEASURED.items() if key != 'attention_backend'}
    other = {'arch_preset': 'llama', 'n_layer': 1, 'n_embd': 16, 'dropout': 0.2, 'seed': 99}
    other = train_here(tiny_dataset, tmp_path / 'other', **options, **other)
    assert other.record['architecture']['hash'] != run.record['architecture']['hash']
    assert torch.equal(joined(other.trained_on), joined(run.trained_on))
    assert torch.equal(joined(other.evaluated_on), joined(run.evaluated_on))
    # Another data_seed gives other data.
    options |= {'data_seed': DATA_SEED + 1, 'max_iters': 1}
    other = train_here(tiny_dataset, tmp_path / 'reseeded', **options)
    first = slice(0, SEQUENCES)
    assert not torch.equal(joined(other.trained_on), joined(run.trained_on)[:, first])


@pytest.mark.slow
@pytest.mark.parametrize('choice', ['full', '2'])
def test_activation_checkpointing_is_bit_equal(tiny_dataset, tmp_path, choice):
    options = {'n_layer': 3, 'dropout': 0.2, 'dtype': 'bfloat16', 'max_iters': 3, 'eval_iters': 1}
    plain, recomputed = (
        train_here(tiny_dataset, tmp_path / kind, **options, activation_checkpointing=kind)
        for kind in ('none', choice)
    )
    assert recomputed.losses == plain.losses
    for ours, theirs in zip(
        recomputed.record['training_iterations'], plain.record['training_iterations'], strict=True
    ):
        assert ours['gradients'] == theirs['gradients']
    for name, weight in plain.weights().items():
        assert torch.equal(recomputed.weights()[name], weight), name


# --- Recorded iterations and options --------------------------------------------------------------


@pytest.mark.parametrize(
    ('max_iters', 'log_interval', 'eval_interval', 'logged', 'evaluated'),
    [
        (6, 4, 4, [0, 4, 5], [0, 4, 6]),
        (5, 2, 5, [0, 2, 4], [0, 5]),
        (3, 10, 10, [0, 2], [0, 3]),
        (1, 1, 1, [0], [0, 1]),
    ],
)
def test_first_and_last_iteration_are_logged(
    tiny_dataset, tmp_path, max_iters, log_interval, eval_interval, logged, evaluated
):
    record = train_here(
        tiny_dataset,
        tmp_path,
        max_iters=max_iters,
        log_interval=log_interval,
        eval_interval=eval_interval,
        eval_iters=1,
        n_layer=1,
    ).record
    entries = record['training_iterations']
    assert [e['iter'] for e in entries] == logged
    assert [e['steps'] for e in entries] == [1, *np.diff(logged)]
    assert [e['iter'] for e in record['eval_steps']] == evaluated
    assert record['summary']['final_iter'] == max_iters


def test_deterministic_option_is_set_and_recorded(run, tiny_dataset, tmp_path):
    assert run.record['metadata']['deterministic'] is False
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        record = train_here(tiny_dataset, tmp_path, max_iters=1, deterministic=True).record
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert record['metadata']['deterministic'] is True


def test_fp16_scale_is_recorded(run, tiny_dataset, tmp_path):
    assert {entry['loss_scale'] for entry in run.record['training_iterations']} == {None}
    record = train_here(tiny_dataset, tmp_path, dtype='float16', max_iters=2).record
    entries = record['training_iterations']
    assert [entry['loss_scale'] for entry in entries] == [2.0**16, 2.0**16]


@pytest.mark.parametrize('changed', [{}, {'dtype': 'float16', 'diagnostics': True}])
def test_record_follows_schema(run, tiny_dataset, tmp_path, changed):
    schema = json.loads((PROJECT / 'records/record_schema.json').read_text())
    record = (
        train_here(tiny_dataset, tmp_path, max_iters=2, **changed).record if changed else run.record
    )
    jsonschema.validate(record, schema)
