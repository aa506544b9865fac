"""study.py and study_points.py: what is run, how variants are made equal, and what survives."""

import json
import random
import re

import pytest
import torch
from conftest import PROJECT, TINY_RUN

import study_points
from benchmarks.study_kills import study_kills
from configurator import read_command_line
from errors import UserError
from model_builder import build_model, training_flops
from study import is_at_edge
from study_points import (
    STUDY_KEYS,
    baseline_of,
    nearest_integer,
    points_of,
    read_study,
    tuning_points,
)
from token_data import load_dataset
from training_config import schema
from training_logger import latest_run, read_record

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def study_file(tmp_path, tiny_dataset):
    """study_file('sweep = …') -> the path of a study of tiny runs."""

    def write(text: str, name: str = 'study.py'):
        settings = {**TINY_RUN, 'dataset': str(tiny_dataset), 'out_dir': str(tmp_path / 'out')}
        lines = [f'{key} = {value!r}' for key, value in settings.items()]
        path = tmp_path / name
        path.write_text('\n'.join([*lines, text]))
        return path

    return write


@pytest.fixture
def read(study_file, tiny_dataset):
    """read('sweep = …', '--n_layer=3') -> the study and its variants."""

    def resolve(text: str, *arguments: str):
        argv = [str(study_file(text)), *arguments]
        study = read_study(read_command_line(argv, schema, aside=STUDY_KEYS))
        dataset = load_dataset(str(tiny_dataset), 32)
        return study, study_points.variants(study, torch.device('cpu'), 'float32', dataset)

    return resolve


# --- What is asked -------------------------------------------------------------------------------


def test_a_grid_with_seeds_is_run_seed_by_seed_and_pairs_the_data(read):
    study, found = read(
        "sweep = {'ffn_type': ['standard', 'swiglu'], 'bias': [True, False], 'seed': [7, 8]}"
    )
    points = points_of(study, found, {})
    assert [p.overrides['seed'] for p in points] == [7] * 4 + [8] * 4
    assert all(p.overrides['data_seed'] == p.overrides['seed'] for p in points)
    assert len({p.folder for p in points}) == 8
    chosen = {(p.overrides['ffn_type'], p.overrides['bias']) for p in points}
    assert len(chosen) == 4
    assert [v.settings.architecture.bias for v in found] == [True, False, True, False]


def test_both_seeds_may_be_varied_by_themselves(read):
    study, found = read("sweep = {'seed': [1, 2], 'data_seed': [3, 4, 5]}")
    points = points_of(study, found, {})
    assert {(p.overrides['seed'], p.overrides['data_seed']) for p in points} == {
        (seed, data) for seed in (1, 2) for data in (3, 4, 5)
    }


def test_ablations_are_single_changes_of_the_base(read):
    _, found = read(
        "ablate = {'ffn_type': ['standard', 'swiglu'], 'normalization': ['rmsnorm']}\n"
        "arch_preset = 'legacy'"
    )
    # The standard FFN is the base itself, and is trained once.
    assert [v.overrides for v in found] == [
        {},
        {'ffn_type': 'swiglu'},
        {'normalization': 'rmsnorm'},
    ]


def test_exclude_leaves_points_out(read):
    _, found = read(
        "sweep = {'position_encoding': ['rope', 'none'], 'n_head': [2, 32]}\n"
        "exclude = [{'position_encoding': 'rope', 'n_head': 32}]"
    )
    assert len(found) == 3
    assert {'position_encoding': 'rope', 'n_head': 32} not in [v.overrides for v in found]


def test_illegal_points_are_all_told_before_anything_runs(read):
    with pytest.raises(UserError) as error:
        read("sweep = {'position_encoding': ['rope', 'none'], 'n_head': [2, 3, 5]}")
    text = str(error.value)
    for n_head in (3, 5):
        assert f'position_encoding=rope n_head={n_head}: n_head={n_head} does not divide' in text
    assert 'exclude = ' in text


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'asks nothing'),
        ("sweep = {'ffn_typ': ['swiglu']}", 'Did you mean ffn_type?'),
        ("sweep = {'ffn_type': 'swiglu'}", 'sweep takes a dict of lists'),
        ("sweep = {'ffn_type': ['swiglo']}", 'Did you mean swiglu?'),
        ("sweep = {'bias': [True]}; match = 'size'", "match='size'"),
        ("sweep = {'bias': [True]}; match = 'params'; match_by = 'dff'", 'Did you mean d_ff?'),
        ("sweep = {'bias': [True]}; budget = {'token': 5}", 'iterations, tokens, flops, seconds'),
        ("sweep = {'bias': [True]}; exclude = [{'bais': True}]", 'Did you mean bias?'),
        ("sweep = {'bias': [True]}; exclude = [{'bias': True}]", 'leaves no point'),
    ],
)
def test_mistakes_in_a_study(read, text, message):
    with pytest.raises(UserError) as error:
        read(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ('text', 'label'),
    [
        ("sweep = {'bias': [True, False]}", 'bias=True'),
        ("sweep = {'bias': [True, False]}; baseline = {'bias': False}", 'bias=False'),
        ("sweep = {'bias': [True, False]}; reference = {'bias': False}", 'bias=False'),
        ("sweep = {'bias': [True, False]}; reference = {'n_layer': 7}", 'bias=True'),
        ("ablate = {'bias': [False], 'n_layer': [3]}; arch_preset = 'legacy'", 'base'),
        (
            "ablate = {'bias': [False], 'n_layer': [3]}; baseline = {'n_layer': 3}\n"
            "arch_preset = 'legacy'",
            'n_layer=3',
        ),
        (  # what the ablations leave alone need not be said
            "sweep = {'n_head': [1, 2]}; ablate = {'n_layer': [3]}; baseline = {'n_head': 2}",
            'n_head=2',
        ),
        (
            "sweep = {'n_head': [1, 2]}; ablate = {'n_layer': [3]}\n"
            "baseline = {'n_head': 2, 'n_layer': 3}",
            'n_head=2 n_layer=3',
        ),
    ],
)
def test_the_baseline_is_a_point_else_the_reference_else_the_first(read, text, label):
    assert baseline_of(*read(text)).label == label


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ("sweep = {'n_head': [1, 2]}; baseline = {'n_head': 4}", 'none of the variants'),
        (
            "sweep = {'n_head': [1, 2], 'bias': [True, False]}; baseline = {'bias': True}",
            'fits 2 variants: n_head=1 bias=True, n_head=2 bias=True',
        ),
        ("sweep = {'bias': [True]}; baseline = {'bais': True}", 'Did you mean bias?'),
        ("sweep = {'bias': [True]}; baseline = 'bias'", 'baseline takes a dict of options'),
    ],
)
def test_a_baseline_that_is_no_single_variant_is_refused(read, text, message):
    with pytest.raises(UserError) as error:
        baseline_of(*read(text))
    assert message in str(error.value)


# --- Fair sizes and budgets ----------------------------------------------------------------------


def test_the_nearest_integer():
    for target in (0.2, 1, 7.4, 7.6, 1000):
        expected = min(range(1, 2000), key=lambda n: abs(3 * n + 0.5 - target))
        assert nearest_integer(lambda n: 3 * n + 0.5, target) == expected


def test_a_size_without_effect_is_refused(read):
    with pytest.raises(UserError, match="match_by='block_size' has no effect on params"):
        read(
            "arch_preset = 'llama'; sweep = {'bias': [True]}; match = 'params'\n"
            "match_by = 'block_size'; match_step = 1; reference = {'n_layer': 3}"
        )


def params(variant):
    model = build_model(variant.settings.architecture)
    return sum(parameter.numel() for parameter in model.parameters())


def test_matching_parameters_by_d_ff_comes_as_near_as_any_step(read):
    _, found = read(
        "arch_preset = 'legacy'; sweep = {'ffn_type': ['standard', 'swiglu']}; match = 'params'"
    )
    standard, swiglu = found
    assert standard.matched == {'value': 128, 'was': 128, 'mismatch': 0.0}
    target = params(standard)
    assert swiglu.matched['mismatch'] == pytest.approx(params(swiglu) / target - 1)

    def off(d_ff):
        architecture = swiglu.settings.architecture.replace(d_ff=d_ff)
        return abs(sum(p.numel() for p in build_model(architecture).parameters()) - target)

    assert min(range(8, 400, 8), key=off) == swiglu.matched['value']
    assert swiglu.settings.architecture.d_ff == swiglu.matched['value']


def test_matching_flops_by_depth_against_a_named_reference(read):
    study, found = read(
        "sweep = {'n_embd': [16, 32]}; match = 'flops'; match_by = 'n_layer'; match_step = 1\n"
        "reference = {'n_embd': 32, 'n_layer': 4}"
    )
    target = training_flops(
        build_model(
            study_points.settings_of(study, study.reference).architecture.replace(vocab_size=256)
        )
    )['per_token']
    for variant in found:
        flops = training_flops(build_model(variant.settings.architecture))['per_token']
        assert variant.matched['mismatch'] == pytest.approx(flops / target - 1)
    assert found[1].settings.architecture.n_layer == 4
    assert found[0].settings.architecture.n_layer > 8


def test_a_size_that_a_variant_lacks_is_refused(read):
    with pytest.raises(UserError, match='has no size'):
        read(
            "sweep = {'bias': [True, False]}; match = 'params'; match_by = 'multiple_of'\n"
            "reference = {'n_layer': 3}"
        )


@pytest.mark.parametrize(
    ('budget', 'expected'),
    [
        ("{'iterations': 7}", 7),
        ("{'tokens': 1000}", 1000 // 128),
        ("{'seconds': 3}", 6),
        ('{}', None),
    ],
)
def test_budgets(read, budget, expected):
    study, (variant,) = read(f"sweep = {{'bias': [True]}}; budget = {budget}")
    assert study_points.iterations(study, variant, seconds_per_update=0.5) == expected


def test_a_budget_of_flops_buys_each_its_own_number_of_tokens(read):
    study, found = read("sweep = {'n_layer': [1, 4]}; budget = {'flops': 1e9}")
    for variant in found:
        per_token = training_flops(build_model(variant.settings.architecture))['per_token']
        expected = int(1e9 / (per_token * 128))
        assert study_points.iterations(study, variant, None) == expected
    study, (variant,) = read("sweep = {'bias': [True]}; budget = {'flops': 10}")
    with pytest.raises(UserError, match='no update'):
        study_points.iterations(study, variant, None)


def test_tuning_has_a_seed_apart(read):
    study, found = read(
        "sweep = {'bias': [True, False], 'seed': [1, 2]}; tune = {'learning_rate': [1e-3, 1e-2]}"
    )
    points = tuning_points(study, found, {})
    assert [(p.overrides['bias'], p.overrides['learning_rate']) for p in points] == [
        (bias, rate) for bias in (True, False) for rate in (1e-3, 1e-2)
    ]
    assert {p.overrides['seed'] for p in points} == {0}


@pytest.mark.parametrize(
    'text',
    [
        "'seed': [0, 1, 2]}",
        "'data_seed': [5, 0]}",
        "'seed': [1], 'data_seed': [0]}",
        '}; seed = 0',  # no seed is swept: the runs have the base's
        '}; data_seed = 0',
        "'seed': [3, 4]}; tune_seed = 4",
    ],
)
def test_a_run_that_tunes_shares_no_seed_with_the_runs_themselves(read, text):
    with pytest.raises(UserError, match='tune_seed=') as error:
        read(f"tune = {{'learning_rate': [1e-3, 1e-2]}}; sweep = {{'bias': [True], {text}")
    unused = str(error.value).partition('Set tune_seed = ')[2].rstrip('.')
    read(
        f"tune = {{'learning_rate': [1e-3, 1e-2]}}; sweep = {{'bias': [True], {text}\n"
        f'tune_seed = {unused}'
    )


@pytest.mark.parametrize('key', ['seed', 'data_seed'])
@pytest.mark.parametrize('name', ['ablate', 'tune', 'exclude'])
def test_seeds_stand_in_the_sweep_alone(read, name, key):
    value = f"[{{'{key}': 3}}]" if name == 'exclude' else f"{{'{key}': [3, 4]}}"
    with pytest.raises(UserError, match=f"{name} has '{key}'"):
        read(f"sweep = {{'bias': [True, False]}}; {name} = {value}")


def test_the_end_of_a_list_is_its_least_or_largest_number():
    assert is_at_edge(3e-3, [1e-3, 3e-3]) and is_at_edge(1, [4, 1, 2])
    assert not is_at_edge(2, [4, 1, 2]) and not is_at_edge(1, [1])
    assert not is_at_edge('lion', ['adamw', 'lion']) and not is_at_edge(True, [False, True])


# --- Running it ----------------------------------------------------------------------------------

SMALL = (
    "max_iters = 3; eval_iters = 2; sweep = {'ffn_type': ['standard', 'swiglu'], 'seed': [1, 2]}"
)


def losses(out):
    """Final validation loss by folder of the point."""
    plan = json.loads((out / 'study.json').read_text())
    return {
        point['folder']: read_record(latest_run(out / point['folder']))['summary']['final_val_loss']
        for point in plan['points']
    }


def test_a_study_from_the_command_line(study_file, run_script, tmp_path):
    path = study_file(SMALL + "; question = 'Gated?'")
    plan = run_script('study.py', path, '--plan_only').stdout
    assert 'Gated?' in plan and '2 variants, 2 seeds of each' in plan
    assert not (tmp_path / 'out').exists()

    out = run_script('study.py', path, '--jobs=2').stdout
    assert '[4/4]' in out and 'RANKING' in out
    found = losses(tmp_path / 'out')
    assert len(found) == 4 and None not in found.values()
    plan = json.loads((tmp_path / 'out/study.json').read_text())
    assert plan['question'] == 'Gated?'
    for point in plan['points']:
        record = read_record(latest_run(tmp_path / 'out' / point['folder']))
        assert record['config']['concurrent_runs'] == 2
        assert record['config']['seed'] == record['config']['data_seed']

    # What is complete is not run again, and a study that has changed does not mix with it.
    again = run_script('study.py', path).stdout
    assert '4 of 4 runs are complete already' in again and losses(tmp_path / 'out') == found
    assert len(list((tmp_path / 'out').rglob('run_*'))) == 4
    changed = run_script('study.py', path, '--learning_rate=0.01', code=2).stderr
    assert 'learning_rate=0.0006 (now 0.01)' in changed and 'Traceback' not in changed


def test_a_point_that_fails_does_not_stop_the_others(study_file, run_script, tmp_path):
    (tmp_path / 'out/runs/ffn_type=standard').mkdir(parents=True)
    (tmp_path / 'out/runs/ffn_type=standard/seed=1').mkdir()
    (tmp_path / 'out/runs/ffn_type=standard/seed=1/run_20260101_000000').write_text('in the way')
    text = SMALL.replace('[1, 2]', '[1]') + "; on_nonfinite = 'stop'"
    path = study_file(text.replace("'standard'", "'standard', 'broken'"))
    broken = """
import torch
from model_components import FeedForward
from model_config import FFN_REGISTRY

@FFN_REGISTRY.register('broken')
class Broken(FeedForward):
    tag = 'Broken'

    def __init__(self, config, layer):
        super().__init__()
        self.down = torch.nn.Linear(config.n_embd, config.n_embd)

    @classmethod
    def default_d_ff(cls, config):
        return 8

    def forward(self, x):
        return self.down(x) * float('inf'), 0.0
"""
    path.write_text(broken + path.read_text())
    out = run_script('study.py', path, code=1).stdout
    assert 'failed: ffn_type=broken/seed=1' in out and 'console.txt' in out
    assert 'ffn_type=swiglu/seed=1: validation loss' in out


def test_a_study_killed_at_random_ends_as_one_left_alone(tmp_path, capsys):
    code = study_kills(tmp_path, kills=2, seeds=1, updates=12, rng=random.Random(3))
    assert code == 0, capsys.readouterr().out


def test_train_py_trains_the_base_of_a_study_and_says_so(study_file, run_script):
    out = run_script('train.py', study_file(SMALL)).stdout
    assert 'holds a study' in out


def test_jobs_must_be_a_number(study_file, run_script):
    error = run_script('study.py', study_file(SMALL), '--jobs=0', code=2).stderr
    assert 'at least 1' in error


@pytest.mark.parametrize(
    'path', sorted((PROJECT / 'config/studies').glob('*.py')), ids=lambda p: p.stem
)
def test_the_projects_own_studies_can_be_run(path, run_script, tiny_dataset, tmp_path):
    out = run_script('study.py', path, f'--dataset={tiny_dataset}', '--plan_only').stdout
    assert int(re.search(r'(\d+) seeds of each', out)[1]) >= 3 and '?' in out.splitlines()[0]
