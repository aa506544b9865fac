"""studies/: grids over layer patterns, and options of kinds of layers by dotted names."""

import pytest
import torch

import study as study_script
from common.errors import UserError
from configurator import flatten, read_command_line
from data.dataset import load_dataset
from model_builder import build_model, training_flops
from studies.grid import folder_names, merged_settings, read_study
from studies.keys import STUDY_KEYS
from studies.overview import describe
from studies.parts import build_parts
from studies.points import arguments, point_labels
from studies.runner import StudyRunner
from studies.state import StudyState
from studies.variants import RunContext
from training_config import load_settings, schema

pytestmark = pytest.mark.usefixtures('one_thread')

KINDS = "layer_kinds = {'L': {'sliding_window': 8}}\narch_preset = 'llama'\n"
PATTERNS = f"{KINDS}sweep = {{'layer_pattern': ['G', 'LG', 'LLLG'], 'seed': [1]}}; n_layer = 4\n"


@pytest.fixture
def read(study_file, tiny_dataset, tmp_path):
    """read('sweep = …', '--n_layer=3') -> the state of the study."""
    context = RunContext(torch.device('cpu'), 'float32', load_dataset(str(tiny_dataset), 32))

    def resolve(text: str, *given: str) -> StudyState:
        path = str(study_file(text))
        command_line = read_command_line([path, *given], study_script.study_schema, STUDY_KEYS)
        study = read_study(command_line)
        runner = StudyRunner(study, tmp_path / 'out', context, 1, set(study_script.OPTIONS))
        return StudyState(study, build_parts(study, context, jobs=1), runner)

    return resolve


def layers(variant, option):
    return [layer.get(option) for layer in variant.settings.architecture.layers]


def labels(state):
    return [variant.label for variant in state.parts[0].variants]


@pytest.mark.parametrize(
    'start, values',
    [('like', ('llama', 'gemma3_text')), ('arch_preset', ('llama', 'gemma3'))],
)
def test_designs_and_presets_bring_their_patterns(read, start, values):
    """Kinds of their letters are no mistake, and are left out of those without them."""
    without, with_kinds = values
    base = f"{start} = 'llama'; n_layer = 4; sweep = {{'{start}': {list(values)}, 'seed': [1]}}\n"
    state = read(f"{base}ablate = {{'layer_kinds.L.sliding_window': [4, 8]}}")
    assert labels(state) == [
        f'{start}={without}',
        f'{start}={with_kinds}',
        *(f'{start}={with_kinds} L.sliding_window={window}' for window in (4, 8)),
    ]
    windows = [layers(v, 'sliding_window')[0] for v in state.parts[0].variants]
    assert windows[0] is None and windows[2:] == [4, 8]
    for pattern in ('', "'layer_pattern': ['LLG'], "):
        with pytest.raises(UserError, match='no layer_pattern of the study has the letter X'):
            read(f"{base}ablate = {{{pattern}'layer_kinds.X.d_ff': [24]}}")


def test_each_run_has_the_layers_of_its_variant(read):
    """The arguments of a run give train.py the settings that the study checked."""
    state = read(
        f"{KINDS}sweep = {{'layer_pattern': ['G', 'LG', 'LLLG'], 'seed': [1],\n"
        "  'layer_kinds.L.sliding_window': [4, None], 'layer_kinds.L.n_head': [1]}; n_layer = 4",
        *('--layer_kinds.L.d_ff=48', '--jobs=1', '--layer_kinds.G.d_ff=24'),
    )
    # Without local layers, the values of their kind are left out.
    assert labels(state) == [
        'layer_pattern=G',
        *(
            f'layer_pattern={pattern} L.sliding_window={window} L.n_head=1'
            for pattern in ('LG', 'LLLG')
            for window in (4, None)
        ),
    ]
    windows = [layers(variant, 'sliding_window') for variant in state.parts[0].variants]
    everywhere = [[None] * 4] * 5
    assert windows[1] == [4, None] * 2 and windows[3] == [4, 4, 4, None]
    assert [windows[n] for n in (0, 2, 4)] == everywhere[:3]
    assert layers(state.parts[0].variants[3], 'd_ff') == [48, 48, 48, 24]
    assert layers(state.parts[0].variants[3], 'n_head') == [1, 1, 1, 2]
    for trial in state.trials()[0].runs:
        argv = state.runner.arguments('runs', trial)[2:]
        settings = load_settings(read_command_line(argv, schema, STUDY_KEYS))
        expected = trial.choice.settings.architecture
        assert settings.architecture.replace(vocab_size=256).hash == expected.hash
        assert settings.run.seed == 1
    again = read_command_line(state.runner.command.split()[3:], study_script.study_schema)
    assert again.layers[-1].values == state.study.command_line.layers[-1].values


def test_variants_without_attention(read):
    state = read("sweep = {'mixer': ['attention', 'mamba2', 'retnet']}; arch_preset = 'llama'")
    assert labels(state) == [f'mixer={mixer}' for mixer in ('attention', 'mamba2', 'retnet')]


def test_options_of_the_command_line_that_a_variant_cannot_use(read):
    state = read(
        "arch_preset = 'llama'; sweep = {'position_encoding': ['rope', 'none']}",
        '--rope_theta=500',
    )
    with_rope, without = (state.runner.arguments('runs', trial) for trial in state.trials()[0].runs)
    assert '--rope_theta=500.0' in with_rope and '--rope_theta=500.0' not in without
    load_settings(read_command_line(without[2:], schema, STUDY_KEYS))


def test_ablations_of_the_base_and_of_kinds(read):
    """The base has no pattern; a pattern that equals another at this depth is not trained."""
    state = read(
        f"{KINDS}ablate = {{'layer_pattern': ['LG', 'LGL'], 'bias': [False]}}; n_layer = 2\n"
        "baseline = {'layer_pattern': 'LGL'}"
    )
    assert labels(state) == ['base', 'layer_pattern=LG']
    assert [[same.label for same in v.same] for v in state.parts[0].variants] == [
        ['bias=False'],
        ['layer_pattern=LGL'],
    ]
    assert [layers(v, 'sliding_window') for v in state.parts[0].variants] == [[None] * 2, [8, None]]
    assert state.parts[0].baseline.label == 'layer_pattern=LG'
    assert (
        'layer_pattern=LGL: not run, since its settings are those of layer_pattern=LG'
        in describe(state, False)
    )
    for trial in state.trials()[0].runs:
        load_settings(
            read_command_line(state.runner.arguments('runs', trial)[2:], schema, STUDY_KEYS)
        )
    state = read(
        f"{KINDS}layer_pattern = 'LG'; ablate = {{'layer_kinds.L.sliding_window': [4, None],\n"
        "  'layer_kinds.L.n_head': [1], 'layer_kinds': [{'L': {'d_ff': 40, 'n_head': 1}}],\n"
        "  'layer_kinds.L': [{'sliding_window': 2}]}\n"
        "exclude = [{'layer_kinds': {'L': {'n_head': 1}}}]"
    )
    assert labels(state) == [
        *('base', 'L.sliding_window=4', 'L.sliding_window=None'),
        'L.sliding_window=2',
    ]
    assert [layers(v, 'sliding_window')[0] for v in state.parts[0].variants] == [8, 4, None, 2]


@pytest.mark.parametrize(
    ('point', 'label'),
    [
        ("{'layer_pattern': 'G'}", 'layer_pattern=G'),
        (
            "{'layer_pattern': 'LG', 'layer_kinds.L.sliding_window': 4}",
            'layer_pattern=LG L.sliding_window=4',
        ),
        (
            "{'layer_kinds': {'L': {'sliding_window': 8}}}",
            'layer_pattern=LG L.sliding_window=8',
        ),
        ("{'layer_kinds.G.sliding_window': None}", None),
    ],
)
def test_baseline_by_values_of_kinds(read, point, label):
    text = (
        f"{KINDS}sweep = {{'layer_pattern': ['G', 'LG'], 'layer_kinds.L.sliding_window': [4, 8]}}\n"
        f'baseline = {point}'
    )
    if label is None:
        with pytest.raises(UserError, match='matches 3 variants: layer_pattern=G, '):
            read(text)
    else:
        assert read(text).parts[0].baseline.label == label


def test_tuning_leaves_out_kinds_that_a_variant_lacks(read):
    state = read(f"{PATTERNS}tune = {{'layer_kinds.L.dropout': [0.0, 0.1]}}")
    tuning = state.trials()[0].tuning
    assert [trial.folder for trial in tuning] == [
        'layer_pattern=G/base',
        *(f'layer_pattern={p}/L.dropout={d}' for p in ('LG', 'LLLG') for d in (0.0, 0.1)),
    ]
    assert [layers(t.choice, 'dropout')[0] for t in tuning] == [0.0, 0.0, 0.1, 0.0, 0.1]
    # A variant whose layers L equal the others at first has its own candidates.
    text = f"layer_pattern = 'LG'; {PATTERNS}tune = {{'layer_kinds.L.dropout': [0.0, 0.1]}}"
    state = read(text.replace('8', 'None'))
    assert [len(variant.choices) for variant in state.parts[0].variants] == [1, 2, 2]


@pytest.mark.parametrize(
    ('text', 'mistake'),
    [
        (
            "sweep = {'layer_kind.L.sliding_window': [4]}",
            "sweep: unknown option 'layer_kind'. Did you mean layer_kinds?",
        ),
        (
            "sweep = {'layer_kinds.LL.sliding_window': [4, 8]}",
            "sweep: layer_kinds: the name 'LL' is not a single letter.",
        ),
        (
            "ablate = {'layer_kinds.L.sliding_windw': [4, 8]}",
            "ablate: layer_kinds.L: unknown option 'sliding_windw'. Did you mean sliding_window?",
        ),
        ("tune = {'d_ff.L': [4]}", 'tune: d_ff.L: d_ff has no entries; it takes '),
        (
            "sweep = {'layer_kinds.L.n_head': ['two']}",
            "sweep: layer_kinds.L.n_head='two'",
        ),
        ("sweep = {'layer_kinds.L': [4]}", 'layer_kinds.L=4: layer_kinds.L takes a dict'),
        ("sweep = {'layer_kinds': [{'L': {}}]}", 'cannot be passed on a command line'),
        (
            "sweep = {'layer_kinds.L.n_layer': [4]}",
            'layer_kinds.L.n_layer: n_layer is an option of the whole model',
        ),
        (
            "sweep = {'layer_kinds': [{'L': {'n_head': 1}}, {'L': {'n_head': 1}}]}",
            "sweep['layer_kinds'] has L.n_head=1 more than once",
        ),
        (
            "sweep = {'layer_kinds.l.n_head': [1]}",
            'no layer_pattern of the study has the letter l. Did you mean L? Remove the kind',
        ),
        (
            "sweep = {'layer_kinds': [{'L': {'n_head': 1}}]}; tune = {'layer_kinds.L': [None]}",
            "'layer_kinds.L' is both in tune and in the grid",
        ),
        (
            "match = 'params'; match_by = 'layer_kinds.L.dff'",
            "match_by='layer_kinds.L.dff': layer_kinds.L: unknown option 'dff'. Did you mean d_ff?",
        ),
        (
            "ablate = {'layer_pattern': ['LG'], 'layer_kinds.L.n_head': [1]}",
            'layer_kinds.L.n_head=1 has no effect, since no layer_pattern that it is combined with '
            'has the letter L. Move layer_pattern to sweep, or set it in the base.',
        ),
        ("match = 'params'; match_by = 'layer_kinds.L'", 'is no single size. Name one'),
        (
            "sweep = {'layer_kinds': [{'L': {'d_ff': 8}}]}\n"
            "match = 'params'; match_by = 'layer_kinds.L.d_ff'",
            "sweep has 'layer_kinds.L.d_ff', which match_by changes",
        ),
        (
            "match = 'params'; match_by = 'layer_kinds.L.d_ff'; reference = {'n_embd': 16}",
            'layer_pattern=G has no layers of kind L. Set match_by to a size that all variants',
        ),
        (
            "match = 'params'; reference = {'n_embd': 16}\n"
            "layer_kinds = {'L': {'d_ff': 8}, 'G': {'d_ff': 16}}",
            "match_by='d_ff' has no effect on layer_pattern=LG: every kind of its layers with a "
            'd_ff sets its own. Set match_by to layer_kinds.L.d_ff or layer_kinds.G.d_ff.',
        ),
    ],
)
def test_each_mistake_is_one_line(read, text, mistake):
    text = text.replace('sweep = {', "sweep = {'layer_pattern': ['LG'], ")
    text = f'{KINDS if "layer_pattern" in text else PATTERNS}{text}'
    with pytest.raises(UserError) as error:
        read(text)
    matching = [problem for problem in error.value.problems if mistake in problem]
    assert len(matching) == 1, error.value.problems


def flops(settings):
    return training_flops(build_model(settings.architecture))['per_token_causal']


def test_matched_flops_of_mixed_models(read):
    """`d_ff` resizes the layers that follow the model's, and a dotted name those of its kind."""
    text = (
        f"{KINDS}sweep = {{'layer_pattern': ['G', 'LG', 'SG']}}; n_layer = 4; match = 'flops'\n"
        "layer_kinds['S'] = {'d_ff': 16}; match_step = 1; reference = {'layer_pattern': 'G'}\n"
    )
    state = read(text)
    target = flops(merged_settings(state.study, {'layer_pattern': 'G', 'vocab_size': 256}))
    model_d_ff = state.parts[0].variants[0].settings.architecture.d_ff
    for variant, fixed in zip(state.parts[0].variants, ([], [], [0, 2])):
        sizes = layers(variant, 'd_ff')
        assert [n for n in range(4) if sizes[n] == 16] == fixed
        (size,) = {size for n, size in enumerate(sizes) if n not in fixed}
        assert variant.matched['value'] == size and variant.matched['was'] == model_d_ff
        assert variant.matched['mismatch'] == pytest.approx(flops(variant.settings) / target - 1)
        assert abs(variant.matched['mismatch']) < 0.01
    assert [v.matched['value'] > model_d_ff for v in state.parts[0].variants] == [False, True, True]

    # G has no layers to resize and needs none; in the others the layers of kind L change.
    state = read(text.replace("'SG'", "'LSG'") + "match_by = 'layer_kinds.L.d_ff'")
    assert state.parts[0].variants[0].matched == {'value': None, 'was': None, 'mismatch': 0.0}
    for variant in state.parts[0].variants[1:]:
        sizes = layers(variant, 'd_ff')
        assert sizes[0] == variant.matched['value'] > model_d_ff
        assert sizes[1] in (16, model_d_ff)
    (row,) = [
        line for line in describe(state, False).splitlines() if line.startswith('layer_pattern=G ')
    ]
    assert row.split()[1:3] == ['-', '+0.000%']

    # Layers of different width become alike.
    state = read(
        "arch_preset = 'llama'; layer_pattern = 'AB'\n"
        "layer_kinds = {'A': {'ffn_type': 'standard'}}\n"
        "sweep = {'layer_kinds.A.activation': ['gelu', 'relu']}; match = 'params'; match_step = 1\n"
        "reference = {'n_embd': 48}"
    )
    for variant in state.parts[0].variants:
        (size,) = set(layers(variant, 'd_ff'))
        assert variant.matched['value'] == size and len(variant.matched['was']) == 2
    assert f'{size} (was 128 and ' in describe(state, False)


def test_labels_and_folders_of_kinds():
    points = [
        {'layer_pattern': 'DDD MMMA*6'},
        {'layer_kinds.L.sliding_window': 4},
        {'layer_kinds': {'L': {'sliding_window': 8, 'n_head': 2}, 'G': None}},
        {'layer_kinds': {}},
        {'layer_kinds': {'L': {'sliding_window': 4}}},
    ]
    texts = point_labels(points[:4])
    assert texts == [
        'layer_pattern=DDD MMMA*6',
        'L.sliding_window=4',
        'L.sliding_window=8 L.n_head=2 G=None',
        'layer_kinds={}',
    ]
    assert len(set(folder_names(texts))) == 4
    options = flatten(schema())
    for point in points:
        texts = arguments(point, options)
        assert texts is not None
        parsed = read_command_line(texts, schema)
        assert not parsed.problems
    assert texts == ['--layer_kinds.L.sliding_window=4']
