"""studies/: the trials of a study, matched sizes and budgets, labels and folders."""

import re

import pytest
import torch
from helpers.ladder_records import write_ladder

from common.errors import UserError
from configurator import flatten, read_command_line
from data.dataset import load_dataset
from model_builder import build_model, training_flops
from studies import grid, points
from studies.grid import read_study
from studies.keys import STUDY_KEYS
from studies.run_study import print_comparison
from studies.state import is_at_edge
from studies.trials import StudyTrials
from studies.variants import (
    baseline_variant,
    budgeted_iterations,
    build_variants,
    nearest_integer,
)
from training_config import schema

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def read(study_file, tiny_dataset):
    """read('sweep = …', '--n_layer=3') -> the study and its variants."""

    def resolve(text: str, *arguments: str):
        argv = [str(study_file(text)), *arguments]
        study = read_study(read_command_line(argv, schema, extra=STUDY_KEYS))
        dataset = load_dataset(str(tiny_dataset), 32)
        return study, build_variants(study, (torch.device('cpu'), 'float32', dataset))

    return resolve


# --- Points and seeds ----------------------------------------------------------------------------


def test_trials_run_seed_by_seed_with_paired_data(read):
    study, variants = read(
        "sweep = {'ffn_type': ['standard', 'swiglu'], 'bias': [True, False], 'seed': [7, 8]}"
    )
    trials = StudyTrials(study, variants).runs
    assert [p.overrides['seed'] for p in trials] == [7] * 4 + [8] * 4
    assert all(p.overrides['data_seed'] == p.overrides['seed'] for p in trials)
    assert len({p.folder for p in trials}) == 8
    chosen = {(p.overrides['ffn_type'], p.overrides['bias']) for p in trials}
    assert len(chosen) == 4
    assert [v.settings.architecture.bias for v in variants] == [True, False, True, False]


def test_seeds_can_vary_independently(read):
    study, variants = read("sweep = {'seed': [1, 2], 'data_seed': [3, 4, 5]}")
    trials = StudyTrials(study, variants).runs
    assert {(p.overrides['seed'], p.overrides['data_seed']) for p in trials} == {
        (seed, data) for seed in (1, 2) for data in (3, 4, 5)
    }


def test_ablations_are_single_changes(read):
    _, variants = read(
        "ablate = {'ffn_type': ['standard', 'swiglu'], 'normalization': ['rmsnorm']}\n"
        "arch_preset = 'legacy'"
    )
    # The standard FFN is the base, which is trained once.
    assert [v.overrides for v in variants] == [
        {},
        {'ffn_type': 'swiglu'},
        {'normalization': 'rmsnorm'},
    ]


def test_exclude_drops_points(read):
    _, variants = read(
        "sweep = {'position_encoding': ['rope', 'none'], 'n_head': [2, 32]}\n"
        "exclude = [{'position_encoding': 'rope', 'n_head': 32}]"
    )
    assert len(variants) == 3
    assert {'position_encoding': 'rope', 'n_head': 32} not in [v.overrides for v in variants]


def test_all_illegal_points_are_reported_at_once(read):
    with pytest.raises(UserError) as error:
        read("sweep = {'position_encoding': ['rope', 'none'], 'n_head': [2, 3, 5]}")
    text = str(error.value)
    for n_head in (3, 5):
        assert f'position_encoding=rope n_head={n_head}: n_head={n_head} does not divide' in text
    assert 'exclude = ' in text


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'defines no runs'),
        ("sweep = {'ffn_typ': ['swiglu']}", 'Did you mean ffn_type?'),
        ("sweep = {'ffn_type': 'swiglu'}", 'sweep takes a dict of lists'),
        ("sweep = {'ffn_type': ['swiglo']}", 'Did you mean swiglu?'),
        ("sweep = {'bias': [True]}; match = 'size'", "match='size'"),
        ("sweep = {'bias': [True]}; match = 'params'; match_by = 'dff'", 'Did you mean d_ff?'),
        ("sweep = {'bias': [True]}; budget = {'token': 5}", 'iterations, tokens, flops, seconds'),
        ("sweep = {'bias': [True]}; exclude = [{'bais': True}]", 'Did you mean bias?'),
        ("sweep = {'bias': [True]}; exclude = [{'bias': True}]", 'leaves no runs'),
    ],
)
def test_mistakes_in_study(read, text, message):
    with pytest.raises(UserError) as error:
        read(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        *(
            (f"sweep = {{'bias': [True]}}; budget = {{'tokens': {amount}}}", 'a finite amount')
            for amount in ("float('inf')", "float('nan')", '-1', '0', 'True', "'1e6'", '10**400')
        ),
        ("sweep = {'bias': [True]}; budget = {'tokens': 1, 'flops': 1}", 'a dict of one of'),
        ("sweep = {'learning_rate': [1e-3, float('inf')]}", 'not a finite number'),
        ("sweep = {'bias': [True]}; tune = {'learning_rate': [float('nan')]}", 'not a finite'),
        ("sweep = {'bias': []}", "sweep['bias'] is empty"),
        ("sweep = {'bias': [True]}; tune = {'learning_rate': ()}", "tune['learning_rate'] is"),
        ("sweep = {'bias': [True, False, True]}", "sweep['bias'] has True more than once"),
        ("sweep = {'bias': [True], 'seed': [1, 2, 1]}", "sweep['seed'] has 1 more than once"),
        ("ablate = {'weight_decay': [0, 0.0]}", "ablate['weight_decay'] has 0 more than once"),
        ("sweep = {'ffn_type': [['standard']]}", 'list given'),
        ("sweep = {'ffn_type': [{}]}", 'dict given'),
        ("sweep = {'n_layer': [1, True]}", 'bool given'),
        ("sweep = {'bias': [True]}; match = ['params']", 'match takes one of'),
        ('sweep = {3: [True]}', 'sweep takes a dict of lists'),
        ('sweep = [1] * 10**6', 'sweep takes a dict of lists'),
        ("sweep = {'sample_prompt': ['a\\0b'], 'sample_interval': [2000]}", 'cannot be passed'),
        (
            "sweep = {'sample_prompt': ['\\ud800'], 'sample_interval': [2000]}",
            'cannot be passed',
        ),
        ("sweep = {'out_dir': ['a', 'b']}", "'out_dir', which study.py sets"),
        ("sweep = {'bias': [True]}; init_from = 'resume'", 'a study trains from scratch'),
        ("sweep = {'bias': [True]}; plan = True", 'Use --plan_only'),
        (
            "sweep = {'max_iters': [1, 2]}; budget = {'tokens': 1e4}",
            'max_iters, which budget determines',
        ),
        (
            "sweep = {'d_ff': [64, 128]}; match = 'params'",
            "sweep has 'd_ff', which match_by changes",
        ),
        ("sweep = {'bias': [True]}; tune = {'bias': [True]}", 'both in tune and in the grid'),
        ("sweep = {'n_head': [1, 2]}; exclude = [{'n_head': 4}]", 'not in the grid'),
        (
            "sweep = {'bias': [True]}; tune = {'n_layer': [1, 2]}; budget = {'seconds': 1}",
            'tune changes the cost of an iteration',
        ),
        (
            "sweep = {'bias': [True]}; tune = {'n_layer': [1, 2]}; match = 'params'",
            'tune changes the params, which match makes equal',
        ),
        ("sweep = {'bias': [True]}; tune = {'n_head': [2, 5]}", 'bias=True, n_head=5: n_head=5'),
    ],
)
def test_mistakes_in_values_and_contradicting_keys(read, text, message):
    with pytest.raises(UserError) as error:
        read(text)
    assert message in str(error.value)
    assert len(str(error.value)) < 2000


def test_all_study_mistakes_are_reported_at_once(read):
    with pytest.raises(UserError) as error:
        read(
            "sweep = {'ffn_typ': ['swiglu'], 'seed': [0, 1]}; budget = {'tokens': float('nan')}\n"
            "tune = {'learning_rate': [1e-3]}; dropuot = 0.1; n_head = 5",
            '--n_lyer=3',
            '--batch_size=0',
        )
    text = '\n'.join(error.value.problems)
    for message in (
        *('ffn_type?', 'budget takes', 'tune_seed=0', 'dropout?', 'n_layer?'),
        *('batch_size takes', 'n_head=5 does not divide'),
    ):
        assert text.count(message) == 1, message


def test_unreadable_config_is_the_only_problem(tmp_path):
    path = tmp_path / 'broken.py'
    for text in ('sweep = {', 'raise ValueError', ''):
        path.write_text(text)
        with pytest.raises(UserError) as error:
            read_study(read_command_line([str(path)], schema, extra=STUDY_KEYS))
        assert len([p for p in error.value.problems if str(path) in p]) == 1


@pytest.mark.parametrize(
    ('text', 'count'),
    [
        (f'sweep = {{{", ".join(f"{key!r}: [0.1] * 10" for key in "abcdef")}}}', '1,000,000 runs'),
        ("sweep = {'seed': [*range(10**6)]}", '1,000,000 runs'),
        (f'sweep = {{{", ".join(f"{str(k)!r}: [1] * 10" for k in range(300))}}}', 'about 1e300'),
        (
            "sweep = {'bias': [True, False]}; tune = {'learning_rate': [1e-3] * 9999}",
            '= 20,000 runs',
        ),
        ("ablate = {'learning_rate': [1e-3] * 10**4}", '= 10,001 runs'),
    ],
)
def test_huge_grid_is_refused_by_count(read, monkeypatch, text, count):
    monkeypatch.setattr(grid, 'grid', lambda choices: pytest.fail('was multiplied out'))
    with pytest.raises(UserError, match='a study has at most 10,000') as error:
        read(text)
    assert count in str(error.value) and len(str(error.value)) < 2000


def test_impossible_budget_is_refused_early(read):
    with pytest.raises(UserError, match='budget='):
        read("sweep = {'bias': [True]}; budget = {'iterations': 1e300}")


def test_token_budget_holds_for_tuned_settings(read):
    study, variants = read(
        "sweep = {'bias': [True]}; tune = {'batch_size': [1, 2, 4]}; budget = {'tokens': 4096}"
    )
    trials = StudyTrials(study, variants).tuning
    assert [p.overrides['max_iters'] for p in trials] == [64, 32, 16]
    assert {p.tokens for p in trials} == {4096}


# --- Names ---------------------------------------------------------------------------------------


def test_labels_and_folders_are_unique_and_short():
    values = ['a/b', 'a_b', 'a b', 'a:b', 'A_B', 'x' * 300, 'x' * 301, 'ä' * 200, 'ä' * 201, '/']
    values += [None, 'None', '', "'", 'x bias=True', 'a/b-0123', '..', '\n', '\t']
    trials = [{'sample_prompt': value} for value in values]
    trials += [{'sample_prompt': 'x', 'bias': True}]
    labels = points.point_labels(trials)
    assert len(set(labels)) == len(trials)
    names = grid.folder_names(labels)
    assert len({name.casefold() for name in names}) == len(trials)
    assert max(len(name.encode()) for name in names) <= 255
    assert not any('/' in name or name in ('.', '..') for name in names)
    # The name of a folder does not depend on the order or on other folders.
    assert dict(zip(labels, names))['sample_prompt=a_b'] == 'sample_prompt=a_b'
    assert grid.folder_names([*labels, 'new=1'])[:-1] == names


def test_plain_labels_keep_their_folders():
    labels = ['base', 'ffn_type=swiglu', 'norm_position=pre warmup_iters=0', 'learning_rate=1e-05']
    labels += ['dataset=data/shakespeare', 'n_layer=2 bias=True', 'seed=1 data_seed=2']
    assert grid.folder_names(labels) == [re.sub(r'[^\w.=+-]+', '_', x) for x in labels]


def test_trial_folders_are_unique(read):
    study, variants = read(
        "sample_interval = 2000; sweep = {'sample_prompt': ['a/b', 'a_b', 'x' * 300]}\n"
        "tune = {'weight_decay': [0, 0.1]}; budget = {'seconds': 1}"
    )
    layout = StudyTrials(study, variants, seconds=dict.fromkeys((v.label for v in variants), 0.1))
    for trials in layout.by_kind().values():
        assert len({trial.folder for trial in trials}) == len(trials) > 0
        assert max(len(part) for p in trials for part in p.folder.split('/')) <= 255


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('sample_prompt', "'quoted'"),
        ('sample_prompt', '"quoted"'),
        ('sample_prompt', ' two words\n'),
        ('sample_prompt', '--n_layer=3'),
        ('wandb_run_name', 'None'),
        ('wandb_run_name', None),
        ('learning_rate', 1 / 3),
        ('weight_decay', 0),
        ('bias', False),
    ],
)
def test_argument_round_trips_value(key, value):
    texts = points.arguments({key: value}, flatten(schema()))
    command_line = read_command_line(texts, schema)
    assert not command_line.problems and command_line.layers[-1].values == {key: value}


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
        (  # options that the ablations do not change can be omitted
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
def test_baseline_is_point_then_reference_then_first(read, text, label):
    assert baseline_variant(*read(text)).label == label


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ("sweep = {'n_head': [1, 2]}; baseline = {'n_head': 4}", 'matches no variant'),
        (
            "sweep = {'n_head': [1, 2], 'bias': [True, False]}; baseline = {'bias': True}",
            'matches 2 variants: n_head=1 bias=True, n_head=2 bias=True',
        ),
        ("sweep = {'bias': [True]}; baseline = {'bais': True}", 'Did you mean bias?'),
        ("sweep = {'bias': [True]}; baseline = 'bias'", 'baseline takes a dict of options'),
    ],
)
def test_ambiguous_baseline_is_refused(read, text, message):
    with pytest.raises(UserError) as error:
        baseline_variant(*read(text))
    assert message in str(error.value)


# --- Matched sizes and budgets -------------------------------------------------------------------


def test_nearest_integer():
    for target in (0.2, 1, 7.4, 7.6, 1000):
        expected = min(range(1, 2000), key=lambda n: abs(3 * n + 0.5 - target))
        assert nearest_integer(lambda n: 3 * n + 0.5, target) == expected


def test_match_by_without_effect_is_refused(read):
    with pytest.raises(UserError, match="match_by='block_size' has no effect on params"):
        read(
            "arch_preset = 'llama'; sweep = {'bias': [True]}; match = 'params'\n"
            "match_by = 'block_size'; match_step = 1; reference = {'n_layer': 3}"
        )


def params(variant):
    model = build_model(variant.settings.architecture)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_match_params_by_d_ff_is_nearest_step(read):
    _, variants = read(
        "arch_preset = 'legacy'; sweep = {'ffn_type': ['standard', 'swiglu']}; match = 'params'"
    )
    standard, swiglu = variants
    assert standard.matched == {'value': 128, 'was': 128, 'mismatch': 0.0}
    target = params(standard)
    assert swiglu.matched['mismatch'] == pytest.approx(params(swiglu) / target - 1)

    def off(d_ff):
        architecture = swiglu.settings.architecture.replace(d_ff=d_ff)
        return abs(sum(p.numel() for p in build_model(architecture).parameters()) - target)

    assert min(range(8, 400, 8), key=off) == swiglu.matched['value']
    assert swiglu.settings.architecture.d_ff == swiglu.matched['value']


@pytest.mark.slow
def test_match_flops_by_depth_to_reference(read):
    study, variants = read(
        "sweep = {'n_embd': [16, 32]}; match = 'flops'; match_by = 'n_layer'; match_step = 1\n"
        "reference = {'n_embd': 32, 'n_layer': 4}"
    )
    target = training_flops(
        build_model(
            grid.merged_settings(study, study.reference).architecture.replace(vocab_size=256)
        )
    )['per_token_causal']
    for variant in variants:
        flops = training_flops(build_model(variant.settings.architecture))['per_token_causal']
        assert variant.matched['mismatch'] == pytest.approx(flops / target - 1)
    assert variants[1].settings.architecture.n_layer == 4
    assert variants[0].settings.architecture.n_layer > 8


def test_match_by_missing_size_is_refused(read):
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
    assert budgeted_iterations(study, '', variant.choices[0], seconds_per_iter=0.5) == expected


def test_flop_budget_sets_iterations_per_variant(read):
    study, variants = read("sweep = {'n_layer': [1, 4]}; budget = {'flops': 1e9}")
    for variant in variants:
        per_token = training_flops(build_model(variant.settings.architecture))['per_token_causal']
        expected = int(1e9 / (per_token * 128))
        assert budgeted_iterations(study, '', variant.choices[0], None) == expected
    with pytest.raises(UserError, match='is too small for'):
        read("sweep = {'bias': [True]}; budget = {'flops': 10}")


def test_tuning_uses_separate_seed(read):
    study, variants = read(
        "sweep = {'bias': [True, False], 'seed': [1, 2]}; tune = {'learning_rate': [1e-3, 1e-2]}"
    )
    trials = StudyTrials(study, variants).tuning
    assert [(p.overrides['bias'], p.overrides['learning_rate']) for p in trials] == [
        (bias, rate) for bias in (True, False) for rate in (1e-3, 1e-2)
    ]
    assert {p.overrides['seed'] for p in trials} == {0}


@pytest.mark.parametrize(
    'text',
    [
        "'seed': [0, 1, 2]}",
        "'data_seed': [5, 0]}",
        "'seed': [1], 'data_seed': [0]}",
        '}; seed = 0',  # without a sweep of seeds the runs use that of the base
        '}; data_seed = 0',
        "'seed': [3, 4]}; tune_seed = 4",
    ],
)
def test_tune_seed_must_not_be_a_sweep_seed(read, text):
    with pytest.raises(UserError, match='tune_seed=') as error:
        read(f"tune = {{'learning_rate': [1e-3, 1e-2]}}; sweep = {{'bias': [True], {text}")
    unused = str(error.value).partition('Set tune_seed = ')[2].rstrip('.')
    read(
        f"tune = {{'learning_rate': [1e-3, 1e-2]}}; sweep = {{'bias': [True], {text}\n"
        f'tune_seed = {unused}'
    )


@pytest.mark.parametrize('key', ['seed', 'data_seed'])
@pytest.mark.parametrize('name', ['ablate', 'tune', 'exclude'])
def test_seeds_only_in_sweep(read, name, key):
    value = f"[{{'{key}': 3}}]" if name == 'exclude' else f"{{'{key}': [3, 4]}}"
    with pytest.raises(UserError, match=f"{name} has '{key}'"):
        read(f"sweep = {{'bias': [True, False]}}; {name} = {value}")


def test_is_at_edge():
    assert is_at_edge(3e-3, [1e-3, 3e-3]) and is_at_edge(1, [4, 1, 2])
    assert not is_at_edge(2, [4, 1, 2]) and not is_at_edge(1, [1])
    assert not is_at_edge('lion', ['adamw', 'lion']) and not is_at_edge(True, [False, True])


def test_a_study_prints_the_comparison_of_its_ladder(tmp_path, capsys):
    write_ladder(tmp_path, params=[100_000, 200_000], extra=0)
    print_comparison(tmp_path / 'runs')
    text = ' '.join(capsys.readouterr().out.split())
    assert text.startswith('At the top rung (200.00K parameters,') and 'COMPUTE GAIN' in text
