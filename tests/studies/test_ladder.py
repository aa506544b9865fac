"""Ladders in studies: rungs, horizons, mistakes, plans, and the seeds that a precision needs."""

import json
import math
import re

import pytest
import torch
from helpers.architectures import changes_after_updates
from helpers.ladder_records import write_ladder

import study as study_script
from common.errors import UserError
from configurator import read_command_line
from data.dataset import load_dataset
from model_builder import build_model, training_flops
from scaling.noise import seeds_needed
from studies.grid import read_study
from studies.keys import STUDY_KEYS
from studies.ladder import NOT_COUNTED
from studies.overview import describe
from studies.parts import build_parts
from studies.progress import StudyProgress
from studies.run_study import write_study_plan
from studies.runner import StudyRunner
from studies.seeds_needed import describe_seeds
from studies.state import StudyState
from studies.time_estimate import RunTimes, TimeEstimate
from studies.trials import RUNS, TUNING
from studies.variants import RunContext

pytestmark = pytest.mark.usefixtures('one_thread')

SWEEP = "sweep = {'ffn_type': ['standard', 'swiglu'], 'seed': [1, 2]}\n"
SIZES = "ladder = {'n_embd': [16, 32], 'n_head': [1, 2]}; n_layer = 1\n"
HORIZON = "horizon = {'tokens_per_param': 1}\n"
LADDER = SWEEP + SIZES + HORIZON


@pytest.fixture
def read(study_file, tiny_dataset, tmp_path):
    """read('sweep = …', '--n_layer=3') -> the state of the study."""
    context = RunContext(torch.device('cpu'), 'float32', load_dataset(str(tiny_dataset), 32))

    def resolve(text: str, *given: str) -> StudyState:
        # The base of the tests has a number of iterations, which a horizon determines.
        path = str(study_file(f'del max_iters\n{text}' if 'ladder' in text else text))
        command_line = read_command_line([path, *given], study_script.study_schema, STUDY_KEYS)
        study = read_study(command_line)
        runner = StudyRunner(study, tmp_path / 'out', context, 1, set(study_script.OPTIONS))
        return StudyState(study, build_parts(study, context, jobs=1), runner)

    return resolve


def rungs(state):
    return [part.rung for part in state.parts]


def size(part) -> int:
    """Parameters of the baseline, counted by name."""
    model = build_model(part.baseline.settings.architecture)
    tables = ('token_embedding.', 'output_head.', 'position')
    return sum(p.numel() for n, p in model.named_parameters() if not n.startswith(tables))


# --- Rungs ---------------------------------------------------------------------------------------


def test_zipped_lists_with_extra_rung(read):
    state = read(LADDER + "position_encoding = 'learned_absolute'; weight_tying = False")
    assert [rung.label for rung in rungs(state)] == [
        'n_embd=16 n_head=1',
        'n_embd=32 n_head=2',
        'n_embd=64 n_head=4',  # the lists continue at their last ratio
    ]
    assert [rung.extra for rung in rungs(state)] == [False, False, True]
    assert [len(part.variants) for part in state.parts] == [2, 2, 1]
    assert state.parts[2].variants == [state.parts[2].baseline]
    for part in state.parts:
        assert part.rung.params == size(part)
        assert part.rung.budget == {'tokens': part.rung.params}
        for variant in part.variants:
            architecture = variant.settings.architecture.to_dict()
            assert architecture.items() >= part.rung.options.items()
    assert NOT_COUNTED == ('token_embedding', 'output_head', 'position_encoding')


@pytest.mark.parametrize(
    ('extra', 'last'),
    [
        ('0', {'n_embd': 32, 'n_head': 2}),
        ('2', {'n_embd': 128, 'n_head': 8}),
        ("{'n_embd': 48, 'n_head': 3}", {'n_embd': 48, 'n_head': 3}),
    ],
)
def test_extra_rungs(read, extra, last):
    assert rungs(read(LADDER + f'baseline_extra = {extra}'))[-1].options == last


@pytest.mark.parametrize(
    ('horizon', 'expected'),
    [
        ("{'tokens': 2e4}", [{'tokens': 2e4}] * 3),
        ("{'tokens': [1e4, 2e4]}", [{'tokens': 1e4}, {'tokens': 2e4}, {'tokens': 4e4}]),
        ("{'flops': [1e9, 2e9, 3e9]}", [{'flops': 1e9}, {'flops': 2e9}, {'flops': 3e9}]),
        ("{'tokens_per_param': [1, 2]}", None),
    ],
)
def test_horizon_in_each_unit(read, horizon, expected):
    state = read(SWEEP + SIZES + f'horizon = {horizon}')
    if expected is None:
        expected = [{'tokens': n * size(part)} for n, part in zip((1, 2, 4), state.parts)]
    assert [rung.budget for rung in rungs(state)] == expected
    for trial in state.by_kind()[RUNS]:
        ((kind, amount),) = expected[trial.rung].items()
        done = trial.tokens if kind == 'tokens' else trial.flops
        per_iter = done / trial.overrides['max_iters']
        assert amount - per_iter < done <= amount


@pytest.mark.parametrize('targets', [(1e4, 2e4), (4e4, 6e4)])
def test_params_are_solved_as_by_search(read, targets):
    """The best of all shapes by size and aspect ratio, preferably not below the last rung's."""
    head = aspect = 16
    state = read(
        "sweep = {'bias': [False]}; baseline_extra = 0; arch_preset = 'llama'\n"
        + HORIZON
        + f"ladder = {{'params': {[*targets]}, 'head_size': {head}, 'aspect_ratio': {aspect}}}"
    )

    def count(layers: int, heads: int) -> int:
        # Attention, a gated network whose d_ff is rounded to a multiple of 8, and RMSNorms.
        width = heads * head
        d_ff = max(1, round(8 * width / 3 / 8)) * 8
        return layers * (4 * width**2 + 3 * width * d_ff + 2 * width) + width

    def cost(shape: tuple[int, int], target: float) -> float:
        layers, heads = shape
        off = abs(math.log(count(*shape) / target))
        return 4 * off + abs(math.log(heads * head / layers / aspect))

    grid, falls = [(n, h) for n in range(1, 13) for h in range(1, 13)], []
    layers = heads = 0
    for rung, target in zip(rungs(state), targets, strict=True):
        best = min(grid, key=lambda shape: cost(shape, target))
        larger = [s for s in grid if s[0] >= layers and s[1] >= heads and s != (layers, heads)]
        rising = min(larger, key=lambda shape: cost(shape, target))
        if cost(rising, target) - cost(best, target) < 4 * math.log(1.2):
            best = rising
        falls += [rung.number + 1] * (best[0] < layers)
        layers, heads = best
        assert rung.options == {'n_layer': layers, 'n_embd': heads * head, 'n_head': heads}
        assert (rung.params, rung.target) == (count(layers, heads), target)
    text = ' '.join(describe(state, measure=False).split())
    assert ('a size falls at rung 2 (n_layer)' in text) == (falls == [2])
    far = [r.number + 1 for r in rungs(state) if abs(r.params / r.target - 1) > 0.2]
    notes = re.findall(r'more than 20% at rung (.*?)\. A smaller', text)
    assert [int(n) for note in notes for n in re.findall(r'(\d+) \(', note)] == far


def test_matching_and_tuning_at_each_rung(read):
    state = read(
        LADDER
        + "match = 'params'; match_step = 1; reference = {'ffn_type': 'standard'}\n"
        + "tune = {'learning_rate': [1e-3, 1e-2]}"
    )
    for part in state.parts[:2]:
        standard, gated = (v.settings.architecture for v in part.variants)
        assert standard.d_ff == 4 * standard.n_embd  # follows the size
        per_unit = 3 * standard.n_embd
        sizes = [sum(p.numel() for p in build_model(a).parameters()) for a in (standard, gated)]
        assert abs(sizes[0] - sizes[1]) <= per_unit / 2
    kinds = state.by_kind()
    assert [t.rung for t in kinds[TUNING]] == [0] * 4 + [1] * 4 + [2] * 2
    # From the smallest rung; within a rung seed by seed.
    assert [(t.rung, t.overrides['seed'], t.variant) for t in kinds[RUNS]] == [
        *((r, s, f'ffn_type={f}') for r in (0, 1) for s in (1, 2) for f in ('standard', 'swiglu')),
        *((2, s, 'ffn_type=standard') for s in (1, 2)),
    ]


def test_plan_file_and_folders(read, tmp_path):
    state = read(LADDER + "match = 'params'; reference = {'ffn_type': 'standard'}")
    trials = state.by_kind()[RUNS]
    write_study_plan(state, trials)
    plan = json.loads((tmp_path / 'out' / 'study.json').read_text())
    assert plan['ladder'].keys() == {'horizon', 'transfer', 'rungs'}
    assert (plan['ladder']['horizon'], plan['ladder']['transfer']) == (
        {'tokens_per_param': 1},
        'none',
    )
    assert [v['matched'] for v in plan['variants']] == [None, None]
    for number, (rung, part) in enumerate(zip(plan['ladder']['rungs'], state.parts)):
        assert rung.keys() == {'label', 'options', 'params', 'extra', 'budget', 'variants'}
        assert (rung['params'], rung['extra']) == (size(part), number == 2)
        for variant, of_rung in zip(rung['variants'], part.variants):
            assert (variant['label'], variant['matched']) == (of_rung.label, of_rung.matched)
    assert plan['points'][0]['folder'] == 'runs/n_embd=16_n_head=1/ffn_type=standard/seed=1'
    assert [point['rung'] for point in plan['points']] == [trial.rung for trial in trials]
    assert len({point['folder'] for point in plan['points']}) == 10

    # Without a ladder, the plan has the keys that it always had.
    state = read(SWEEP)
    write_study_plan(state, state.by_kind()[RUNS])
    plain = json.loads((tmp_path / 'out' / 'study.json').read_text())
    assert plain['ladder'] is None and plain.keys() == plan.keys()
    assert plain['points'][0].keys() == {'folder', 'variant', 'command'}


def test_added_rung_keeps_other_folders(read):
    """Also if an option that was the same at all rungs changes at the new one."""
    before = read(
        SWEEP + HORIZON + "ladder = {'n_embd': [16, 32], 'n_head': [2, 2]}; baseline_extra = 0"
    )
    after = read(SWEEP + HORIZON + "ladder = {'n_embd': [16, 32, 64], 'n_head': [2, 2, 4]}")
    old = [(t.folder, t.overrides) for t in before.by_kind()[RUNS]]
    assert old == [(t.folder, t.overrides) for t in after.by_kind()[RUNS]][: len(old)]


# --- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('text', 'mistake'),
    [
        ('ladder = [1, 2]', 'ladder takes a dict such as'),
        ("ladder = {'n_embd': 16}", 'ladder takes a dict such as'),
        ('ladder = {1: [16, 32]}', 'ladder takes a dict such as'),
        ("ladder = {'params': [1e4, float('nan')]}", 'ladder takes a dict such as'),
        ("ladder = {'params': [1e4, float('inf')]}", 'ladder takes a dict such as'),
        ("ladder = {'params': [1e4, 10**400]}", 'ladder takes a dict such as'),
        ("ladder = {'params': [1e4, True]}", 'ladder takes a dict such as'),
        ("ladder = {'params': [-1e4, 1e4]}", 'ladder takes a dict such as'),
        ("ladder = {'n_emd': [16, 32]}", "unknown option 'n_emd'. Did you mean n_embd?"),
        ("ladder = {'parms': [1e4, 2e4]}", "unknown option 'parms'. Did you mean params?"),
        ("ladder = {'n_embd': [15, 32]}", 'rung n_embd=15: n_head=2 does not divide'),
        ("ladder = {'params': [1e4, 1e30]}", 'params=1e+30 of ladder would need more than 10,000'),
        ("ladder = {'n_embd': [16, 'wide']}", "n_embd='wide'"),
        ("ladder = {'n_embd': [16, True]}", 'n_embd=True'),
        (
            "ladder = {'n_embd': [16, 32], 'n_head': [1]}",
            '(n_embd 2, n_head 1). Make them equal',
        ),
        ("ladder = {'n_embd': [16]}", 'ladder has 1 rung. Give'),
        ("ladder = {'n_embd': []}", 'ladder has 0 rungs'),
        ("ladder = {'n_embd': [16] * 21}", 'between 2 and 20'),
        ("ladder = {'n_embd': [32, 16]}", 'is not larger than rung 1'),
        ("ladder = {'n_embd': [32, 32]}; baseline_extra = 0", 'is not larger than rung 1'),
        ("ladder = {'params': [4e4, 2e4]}", 'not in increasing order'),
        ("ladder = {'params': [2e4, 2.01e4]}", 'is not larger than rung 1'),
        ("ladder = {'params': [2e4, 4e4], 'n_layer': [1, 2]}", 'params determines'),
        ("ladder = {'params': [2e4, 4e4]}; d_ff = 64", 'd_ff=64 is set'),
        ("ladder = {'params': [2e4, 4e4], 'head_size': 0.5}", 'not a whole number'),
        ("ladder = {'n_embd': [16, 32], 'aspect_ratio': 16}", 'only applies to params'),
        ("ladder = {'n_embd': [16, 33]}", 'rung n_embd=33: n_head=2 does not divide'),
        ("ladder = {'n_embd': [16, 24], 'n_head': [2, 4]}; baseline_extra = 4", 'from 0 to 3'),
        ("ladder = {'n_embd': [16, 20]}", 'continues the lists of ladder'),
        ("ladder = {'n_embd': [16, 32], 'bias': [True, False]}", 'has no continuation'),
        (SIZES + "baseline_extra = {'n_embd': 48}", 'give a value for each of n_embd, n_head'),
        (SIZES + "baseline_extra = {'n_embd': 16, 'n_head': 1}", 'is not larger than rung 2'),
        (SIZES + 'baseline_extra = True', 'baseline_extra takes'),
        (SIZES + 'horizon = {}', 'a ladder needs a horizon'),
        (SIZES + "horizon = {'iterations': 5}", 'horizon takes'),
        (SIZES + "horizon = {'tokens': [1e4, 2e4, 3e4, 4e4]}", 'horizon has 4 values of tokens'),
        (SIZES + "horizon = {'tokens': float('nan')}", 'horizon takes'),
        (SIZES + "horizon = {'tokens': 10}", 'horizon, here 10 tokens, is too small'),
        (SIZES + "horizon = {'tokens': 1e300}", 'Decrease it'),
        (SIZES + "budget = {'tokens': 1e4}", 'horizon and budget both'),
        (SIZES + '\nmax_iters = 4', 'max_iters is set, which horizon determines'),
        (
            SIZES + "sweep = {'n_embd': [16], 'seed': [1]}",
            "'n_embd' is both in ladder and in sweep",
        ),
        (SIZES + "ablate = {'n_embd': [16]}", "'n_embd' is both in ladder and in ablate"),
        (SIZES + "tune = {'n_head': [1]}", "'n_head' is both in ladder and in tune"),
        (SIZES + "tune = {'max_iters': [1]}", 'tune has max_iters'),
        ("ladder = {'n_embd': [16, 32], 'max_iters': [2, 4]}", 'max_iters is set'),
        ("ladder = {'n_embd': [16, 32], 'out_dir': ['a', 'b']}", 'study.py sets itself'),
        (SIZES + "transfer = 'up'", "transfer takes one of ['none', 'mup']"),
        ("transfer = 'mup'", 'horizon needs a ladder'),
        (
            SIZES + "baseline_extra = 0; transfer = 'mup'; initialization = 'gpt2'",
            'sets initialization',
        ),
        (
            SIZES + "baseline_extra = 0; transfer = 'mup'; optimizer = 'muon'",
            "optimizer='muon' states no rule",
        ),
        (
            SIZES
            + "baseline_extra = 0; transfer = 'mup'; ffn_type = 'moe'; sweep = {'bias': [True]}",
            "ffn_type='moe' states no rule",
        ),
        (
            SIZES + "baseline_extra = 0; transfer = 'mup'; attention_type = 'mla'",
            "attention_type='mla' states no rule",
        ),
        (
            SIZES + "baseline_extra = 0; transfer = 'mup'; d_ff = 64",
            'the inputs of blocks.0.ffn.down.weight',
        ),
        (
            SIZES + "baseline_extra = 0; transfer = 'mup'; scale_embeddings = True",
            'scale_embeddings=True makes',
        ),
        (
            "ladder = {'n_embd': [16, 32]}; transfer = 'mup'",
            'size of a query head grows from 8 to 16',
        ),
        ("ladder = {'n_layer': [1, 2]}; transfer = 'mup'", 'the same n_embd'),
    ],
    ids=str,
)
def test_each_mistake_is_one_line(read, text, mistake):
    with pytest.raises(UserError) as refused:
        read(SWEEP + HORIZON + text)
    assert mistake in str(refused.value)
    assert all(len(problem) < 420 for problem in refused.value.problems)


def test_ladder_options_on_command_line_are_refused(read):
    for option in ('--n_embd=32', '--n_head=2'):
        with pytest.raises(UserError, match=r'the ladder of .* sets n_') as refused:
            read(LADDER + 'n_head = 3', option)
        assert len(refused.value.problems) == 1
    assert len(rungs(read(LADDER + 'n_head = 3; n_embd = 32'))) == 3  # sizes that no run has
    with pytest.raises(UserError, match='max_iters is set'):
        read(LADDER, '--max_iters=3')
    with pytest.raises(UserError, match='--ladder: ladder is a key of a study file') as refused:
        read(LADDER, '--ladder', '{}')
    assert len(refused.value.problems) == 1
    assert {a.n_layer for a in architectures(read(LADDER, '--n_layer=3'))} == {3}


def architectures(state):
    return [v.settings.architecture for part in state.parts for v in part.variants]


def test_mup_options_of_each_rung(read):
    state = read(LADDER + "transfer = 'mup'; arch_preset = 'llama'")
    chosen = {(a.initialization, a.mup_base_width) for a in architectures(state)}
    assert chosen == {('mup', 16)}
    assert rungs(state)[1].label == 'n_embd=32 n_head=2'  # which the transfer is no part of
    assert 'a rule for the width' not in describe(state, measure=False)


def test_updates_do_not_grow_over_rungs_with_mup(read):
    """The coordinate check of Yang et al. 2022, appendix D.1, at the rungs of a ladder."""
    sizes = (
        "sweep = {'bias': [False]}; arch_preset = 'llama'; baseline_extra = 0; n_layer = 1\n"
        "ladder = {'n_embd': [32, 256], 'n_head': [2, 16]}\n"
    )
    scaled, unscaled = read(f"{sizes}{HORIZON}transfer = 'mup'"), read(sizes + HORIZON)
    small, large = map(changes_after_updates, architectures(scaled))
    _, plain = map(changes_after_updates, architectures(unscaled))
    for at_base, under_mup, without in zip(small, large, plain):
        assert 0.5 * at_base < under_mup < 2 * at_base
        assert without > 3 * at_base


# --- Plan and seeds ------------------------------------------------------------------------------


def test_plan_has_sizes_costs_and_time_by_rung(read, monkeypatch, tmp_path):
    state = read(LADDER + 'warmup_iters = 1; d_ff = 64; learning_rate = 1e-3')
    times = TimeEstimate(90.0, 'as tested', {0: 20.0, 1: 70.0}, {0: 0, 1: 0, 2: 0})
    monkeypatch.setattr('studies.overview.estimate_time', lambda *_: times)
    text = describe(state, measure=True)
    lines = [line.split() for line in text.splitlines()]
    total = 0.0
    for part, seconds in zip(state.parts, ('20.0s', '1m 10s', 'unknown')):
        flops = {
            v.label: training_flops(build_model(v.settings.architecture))['per_token_causal']
            for v in part.variants
        }
        tokens = part.rung.params // 128 * 128
        of_rung = 2 * tokens * sum(flops.values())
        total += of_rung
        mark = f'{part.rung.number + 1}{"*" * part.rung.extra}'
        (row,) = [row for row in lines if row and row[:2] == [mark, part.rung.label.split()[0]]]
        run = tokens * flops[part.baseline.label]
        assert row[1:] == [
            *part.rung.label.split(),
            *(f'{size(part):,}', f'{tokens:,}', f'{tokens / 30_000:.2f}', f'{run:.3g}'),
            *(str(2 * len(part.variants)), f'{of_rung:.3g}', *seconds.split()),
        ]
        for variant in part.variants:  # whose FLOPs differ
            assert any(
                variant.label in row and row[-1] == f'{tokens * flops[variant.label]:.3g}'
                for row in lines
            )
    assert f'{total:.3g} training FLOPs' in text and '10 runs, 0 complete' in text
    flat = ' '.join(text.split())
    assert '* only the baseline trains rung 3' in flat
    assert "learning_rate=0.001 (transfer='mup' or tune would adapt it)" in flat
    assert 'd_ff=64 (by default 64 to 256)' in flat
    assert 'the speed of rung 1 is assumed for rung 2, 3' in flat
    assert max(map(len, text.splitlines()[1:])) <= 110  # without the path


def test_time_left_weights_rungs_by_their_speed(read):
    """The first run, with few FLOPs, takes as long as one at the top."""
    state = read(LADDER)
    times, trials = RunTimes(state), state.by_kind()[RUNS]
    assert times.expected(trials[0]) is None
    speeds = [1e-6, 2e-7, 1e-7]  # seconds per FLOP
    times.recorded = {(t.rung, t.variant): [speeds[t.rung]] for t in trials}
    times.starts = [1.0, 3.0]
    seconds = {t: 2.0 + t.flops * speeds[t.rung] for t in trials}
    with StudyProgress(state.runner, state.by_kind(), times) as progress:
        progress.begin(RUNS, trials, trials)
        assert progress.seconds_left() is None
        progress.ended_trials.add(trials[0])
        progress.began -= 1000.0
        rest = sum(seconds.values()) - seconds[trials[0]]
        expected = 1000.0 * rest / seconds[trials[0]]
        assert progress.seconds_left() == pytest.approx(expected, rel=0.05)
    by_flops = sum(t.flops for t in trials) / trials[0].flops - 1
    assert 1000.0 * by_flops > 2 * expected

    # The speed of a rung without a run is that of the nearest one.
    times.recorded = {(0, trials[0].variant): [1e-6]}
    assert times.expected(trials[-1]).speed_of == 0
    assert times.expected(trials[-1]).left(0.5) == pytest.approx(2 + trials[-1].flops * 1e-6 / 2)


def test_seeds_by_noise_of_another_study(read, tmp_path):
    folder = write_ladder(
        tmp_path / 'other', noise=[0.02, 0.015, 0.01, 0.0075, 0.005], seeds=range(6)
    )
    state = read(LADDER)
    assert describe_seeds(state, None, None) == []
    (hint,) = describe_seeds(state, 0.01, None)
    assert '--noise_from=FOLDER' in hint
    table, legend = describe_seeds(state, 0.01, str(folder))
    rows = [line.split() for line in table.splitlines()[1:]]
    assert [row[0] for row in rows] == ['1', '2']  # the third has only the baseline
    for row, part in zip(rows, state.parts):
        runs = [t for t in state.by_kind()[RUNS] if t.rung == part.rung.number]
        flops = sum(t.flops for t in runs) / len(runs)
        noise = float(row[2])
        assert row[1] == f'{flops:.3g}' and noise > 0
        assert abs(int(row[3].replace(',', '')) - seeds_needed(noise, 0.01)) <= 1
        assert row[4] == '2' and float(row[5]) > 2 * noise
    assert float(rows[0][2]) > float(rows[1][2])  # noise falls with cost
    assert f'runs in {folder}' in ' '.join(legend.split())
    assert '> 1,000,000' in describe_seeds(state, 1e-300, str(folder))[0]
    for wrong in (tmp_path / 'nothing', write_ladder(tmp_path / 'single', seeds=[1])):
        with pytest.raises(UserError, match=re.escape('noise_from=')):
            describe_seeds(state, 0.01, str(wrong))
