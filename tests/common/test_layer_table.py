"""Layer patterns and kinds of layers: what the user's values mean, and what each mistake says."""

import shlex
from typing import ClassVar

import pytest
from helpers.project import PROJECT

from common.architecture_presets import PRESETS
from common.errors import UserError
from common.layer_pattern import compact_pattern, expand_pattern
from components.attention import MultiHeadAttention
from configurator import read_command_line
from model_builder import build_model
from model_config import ATTENTION_REGISTRY, FFN_REGISTRY, ModelArchitectureConfig, schema
from training.load import checked_layers

LLAMA = '--arch_preset=llama --n_layer=4 --n_head=4 --n_embd=32 --block_size=32 --vocab_size=50 '


@pytest.fixture
def resolve(tmp_path, monkeypatch):
    """Resolves a command line, with the text of a config file below it: config and problems."""
    monkeypatch.chdir(tmp_path)

    def resolved(arguments, file=None):
        argv = shlex.split(LLAMA + arguments)
        if file is not None:
            (tmp_path / 'c.py').write_text(file, encoding='utf-8')
            argv.insert(0, 'c.py')
        command_line = read_command_line(argv, schema)
        problems = command_line.problems
        config = ModelArchitectureConfig.resolve(command_line.layers, problems)
        return config, problems

    return resolved


@pytest.fixture
def accepted(resolve):
    """Resolves what has no problems: the config."""

    def config_of(arguments, file=None):
        config, problems = resolve(arguments, file)
        assert problems == []
        return config

    return config_of


# --------------------------------------------------------------------------------------------------
# Patterns


@pytest.mark.parametrize(
    ('pattern', 'layers', 'letters'),
    [
        ('LLLG', 6, 'LLLGLL'),
        ('L', 3, 'LLL'),
        ('D M*', 4, 'DMMM'),
        ('LLG* G', 6, 'LLGLLG'),
        ('LLLG* G', 6, 'LLLGLG'),
        ('DDD MMMA*6', 27, 'DDD' + 'MMMA' * 6),
        ('AB*2 C', 5, 'ABABC'),
        ('D*3 M', 4, 'DDDM'),
        ('D M*', 1, 'D'),
    ],
)
def test_pattern_is_expanded(pattern, layers, letters):
    assert expand_pattern(pattern, layers) == letters


@pytest.mark.parametrize(
    ('letters', 'shown'),
    [
        ('LLLG' * 16, 'LLLG' * 16),
        ('LLLG' * 25, 'LLLG*25'),
        ('LLLG' * 25 + 'LL', 'LLLG*25 LL'),
        ('D' * 3 + 'M' * 97, 'D*3 M*97'),
        ('L' * 10_000, 'L*10000'),
    ],
)
def test_compact_pattern_has_the_same_layers(letters, shown):
    assert compact_pattern(letters) == shown
    assert expand_pattern(shown, len(letters)) == letters


def rows_of_page(name):
    """The cells of a table of docs/layers.md, without backquotes."""
    page = (PROJECT / 'docs/layers.md').read_text(encoding='utf-8')
    table = page.partition(f'<!-- {name} -->\n')[2].partition('<!-- end -->')[0]
    rows = [line.strip('| ').replace('`', '').split(' | ') for line in table.splitlines()]
    return rows[2:]


def test_patterns_of_the_page_are_expanded():
    rows = rows_of_page('patterns')
    assert len(rows) == 5
    for pattern, layers, letters in rows:
        assert expand_pattern(pattern, int(layers)) == letters


def test_mistakes_of_the_page_give_its_messages(resolve):
    rows = rows_of_page('mistakes')
    assert len(rows) == 7
    for arguments, message in rows:
        _, problems = resolve(f'--n_layer=12 --n_head=12 --n_embd=768 {arguments}')
        assert problems == [message]


# --------------------------------------------------------------------------------------------------
# Mistakes: arguments, config file, what the one problem says

WINDOW = '--layer_kinds.L.sliding_window=8'
PATTERN = '--layer_pattern=LG '
FILE = "layer_pattern = 'LG'\nlayer_kinds = "
TERMS = 'letters, one per layer, in terms separated by spaces; TERM*N repeats a term'
MISTAKES = [
    # The pattern.
    (f'--layer_pattern=LL+G {WINDOW}', None, f"layer_pattern='LL+G': layer_pattern takes {TERMS}"),
    (f'--layer_pattern= {WINDOW}', None, TERMS),
    (f"--layer_pattern='L* G*' {WINDOW}", None, TERMS),
    (f'--layer_pattern=L*0 {WINDOW}', None, TERMS),
    (f'--layer_pattern=L*{10**20} {WINDOW}', None, TERMS),
    ('', 'layer_pattern = 3\nlayer_kinds = {"L": {}}', 'layer_pattern=3: int given'),
    (f"--layer_pattern='LLG LL' {WINDOW}", None, 'has 5 layers, but n_layer=4. Set --n_layer=5,'),
    (f"--layer_pattern='L G' {WINDOW}", None, 'has 2 layers, but n_layer=4. Set --n_layer=2, or'),
    (f"--layer_pattern='LLLLL G*' {WINDOW}", None, 'has at least 5 layers, but n_layer=4.'),
    (
        f'--n_layer=10000 --layer_pattern={"L" * 1000}G*{10**8} {WINDOW}',
        None,
        'has 100,100,000,000 layers, but n_layer=10000. End one term with *',
    ),
    (f'--n_layer=x --layer_pattern="LLG GG" {WINDOW}', None, '--n_layer=x: n_layer takes int'),
    # The letters.
    (f'--layer_pattern=LMG {WINDOW}', None, "(command line): M, G have no entry in layer_kinds, "
     'and only one letter may stand for'),
    ('--layer_pattern=LG', None, 'L, G have no entry in layer_kinds'),
    (WINDOW, None, 'layer_kinds.L (command line) has no effect without layer_pattern, the kind of '
     'each layer. Set it, for example --layer_pattern=L.'),
    (f'{PATTERN}{WINDOW} --layer_kinds.X.n_head=2', None, 'layer_kinds.X (command line): '
     "layer_pattern='LG' has no letter X. Its letters: L, G."),
    (f'{PATTERN}--layer_kinds.l.sliding_window=8', None, 'has no letter l. Did you mean L?'),
    (PATTERN + WINDOW.replace('L', 'LL'), None, "the name 'LL' is not a single letter"),
    (f'{PATTERN}--layer_kinds.=3', None, "the name '' is not a single letter"),
    ('', f'{FILE}{{3: {{}}}}', 'c.py: layer_kinds: the name 3 is not a single letter'),
    ('', f'{FILE}{{None: {{}}}}', 'the name None is not a single letter'),
    ('', f"{FILE}{{'Ł': {{}}}}", "the name 'Ł' is not a single letter"),
    # The options of a kind.
    (f'{PATTERN}--layer_kinds.L.n_embd=8', None, 'layer_kinds.L.n_embd: n_embd is an option of the '
     'whole model, not of some layers. Set n_embd outside layer_kinds.'),
    (f'{PATTERN}--layer_kinds.L.document_mask=True', None, 'an option of the whole model'),
    (f'{PATTERN}--layer_kinds.L.arch_preset=gpt2', None, 'an option of the whole model'),
    (f'{PATTERN}--layer_kinds.L.attention_pattern=LG', None, 'a short form of layer_pattern'),
    (f'{PATTERN}--layer_kinds.L.ffn_typ=glu', None, "layer_kinds.L: unknown option 'ffn_typ'. Did "
     'you mean ffn_type?'),
    (f'{PATTERN}--layer_kinds.L.max_iters=9', None, "'max_iters'. See --help=layer_kinds."),
    (f'{PATTERN}--layer_kinds.L.n_head.x=9', None, "layer_kinds.L: unknown option 'n_head.x'"),
    ('', f"{FILE}{{'L': {{3: 4}}}}", 'c.py: layer_kinds.L: unknown option 3.'),
    ('', f"{FILE}{{'L': {{('a',): 4}}}}", "layer_kinds.L: unknown option ('a',)."),
    (f'--layer_kind.L.n_head=2 {PATTERN}', None, 'unknown option --layer_kind. Did you mean '
     'layer_kinds?'),
    ('--layer_patern=LG --layer_kinds.L.n_head=2', None, 'Did you mean layer_pattern?'),
    ('', "layer_patern = 'LG'\nlayer_kinds = {'L': {}}", 'Did you mean layer_pattern?'),
    ('--n_head.L=3', None, '--n_head.L: n_head has no entries; it takes int'),
    ('--n_haed.L=3', None, 'unknown option --n_haed. Did you mean n_head?'),
    # Values.
    (f'{PATTERN}--layer_kinds.L.sliding_window=x', None, '--layer_kinds.L.sliding_window=x: '
     'layer_kinds.L.sliding_window takes int or None, at least 1.'),
    (f'{PATTERN}--layer_kinds.L.sliding_window=0', None, 'layer_kinds.L.sliding_window=0:'),
    (f'{PATTERN}--layer_kinds.L.ffn_type=swigl', None, "layer_kinds.L.ffn_type='swigl': "),
    (f'{PATTERN}--layer_kinds.L.sliding_window', None, '--layer_kinds.L.sliding_window needs a '
     'value: int or None'),
    (f'{PATTERN}--layer_kinds.L=3', None, "layer_kinds.L='3': layer_kinds.L takes None, which "
     'removes L; set a value with --layer_kinds.L.OPTION=value.'),
    (f'{PATTERN}--layer_kinds.L', None, '--layer_kinds.L needs a value: None, which removes L'),
    (f'{PATTERN}--layer_kinds={{}}', None, '--layer_kinds={}: layer_kinds takes a dict, a single '
     'letter -> {option: value}. On the command line, set one value: '
     '--layer_kinds.LETTER.OPTION=value.'),
    ('', f"{FILE}{{'L': 3}}", 'layer_kinds.L=3: layer_kinds.L takes a dict'),
    ('', f'{FILE}[1]', 'layer_kinds=[1]: layer_kinds takes a dict'),
    ('', f'{FILE}None', 'layer_kinds=None: layer_kinds takes a dict'),
    ('', f"{FILE}{{'L': {{'n_head': True}}}}", 'layer_kinds.L.n_head=True: bool given'),
    ('', f"{FILE}{{'L': {{'n_head': [2]}}}}", 'layer_kinds.L.n_head=[2]: list given'),
    ('', f"{FILE}{{'L': {{'n_head': len}}}}", 'layer_kinds.L.n_head=<built-in function len>:'),
    # Values that contradict others.
    (f'{PATTERN}--layer_kinds.L.position_encoding=sinusoidal', None, 'layer_kinds.L.'
     "position_encoding: position_encoding='sinusoidal' is added to the embedding"),
    (f'{PATTERN}--layer_kinds.L.position_encoding=none --position_encoding=learned_absolute', None,
     "layers G: position_encoding='learned_absolute' is added to the embedding"),
    (f'{PATTERN}--layer_kinds.L.num_experts=4', None, 'layer_kinds.L.num_experts=4 (command line) '
     "has no effect: it needs ffn_type='moe', but preset llama sets 'swiglu'. Remove "
     'layer_kinds.L.num_experts or change layer_kinds.L.ffn_type.'),
    (f'{PATTERN}{WINDOW} --num_experts=4', None, 'num_experts=4 (command line) has no effect: it '
     "needs ffn_type='moe'"),
    (f'{PATTERN}--layer_kinds.L.position_encoding=alibi --layer_kinds.L.rope_theta=9', None,
     "needs position_encoding='rope', but layer_kinds.L sets 'alibi'."),
    (f'{PATTERN}--layer_kinds.L.n_head=5', None, 'layers L: n_head=5 does not divide n_embd=32, '
     'but head_dim is derived as n_embd / n_head. Use the nearest divisor, '
     '--layer_kinds.L.n_head=4'),
    (f'{PATTERN}{WINDOW} --n_head=5', None, 'n_head=5 does not divide n_embd=32, but head_dim is '
     'derived as n_embd / n_head. Use the nearest divisor, --n_head=4'),
    (f'--layer_pattern=LMG {WINDOW} --layer_kinds.M.n_head=4 --n_head=5', None, 'layers L, G: '
     'n_head=5 does not divide n_embd=32, but head_dim is derived as n_embd / n_head. Use the '
     'nearest divisor, --n_head=4'),
    (f'{PATTERN}--layer_kinds.L.activation=glu --layer_kinds.L.ffn_type=geglu', None,
     "layer_kinds.L.activation='glu' (command line) means ffn_type='glu', which contradicts "
     "layer_kinds.L.ffn_type='geglu'."),
    (f'{PATTERN}{WINDOW} --sliding_window=4 --attention_pattern=LG', None, "attention_pattern='LG' "
     "(command line) is a short form of layer_pattern, and layer_pattern='LG' (command line) is"),
    (f'{PATTERN}{WINDOW} --ffn_type=moe --dense_layers=1', None, 'dense_layers=1 (command line) is '
     'a short form of layer_pattern'),
    # Values of the model that no layer follows.
    ('--n_head=8', f"{FILE}{{'L': {{'n_head': 2}}, 'G': {{'n_head': 4}}}}", 'n_head=8 (command '
     'line) has no effect: every layer that could use it has its own n_head, from '
     'layer_kinds.L.n_head (c.py), layer_kinds.G.n_head (c.py). Set --layer_kinds.L.n_head=8'),
    ('--num_experts=8', f"{FILE}{{'L': {{'ffn_type': 'moe', 'num_experts': 4}}}}",
     'num_experts=8 (command line) has no effect: every layer that could use it has its own'),
    # … where the pattern is cut off before the kind that would follow.
    ('--sliding_window=4', "layer_pattern = 'LLLLLLLLLG'\nlayer_kinds = {'L': {'sliding_window': 8}"
     ", 'G': {'n_head': 2}}", 'sliding_window=4 (command line) has no effect: every layer'),
    # Removals.
    (f'{PATTERN}{WINDOW} --layer_kinds.L=None', None, '--layer_kinds.L=None removes L, but'),
    (f'{PATTERN}{WINDOW} --layer_kinds.X=None', None, 'layer_kinds.X=None (command line) removes '
     'nothing'),
]  # fmt: skip


@pytest.mark.parametrize(('arguments', 'file', 'words'), MISTAKES)
def test_mistake_gives_one_problem(resolve, arguments, file, words):
    _, problems = resolve(arguments, file)
    assert len(problems) == 1 and words in problems[0], problems


def test_mistakes_in_two_kinds_are_both_named(resolve):
    _, problems = resolve(f'{PATTERN}--layer_kinds.L.n_head=5 --layer_kinds.G.n_head=3')
    assert [problem.partition(',')[0] for problem in problems] == [
        'layers L: n_head=5 does not divide n_embd=32',
        'layers G: n_head=3 does not divide n_embd=32',
    ]
    assert '--layer_kinds.L.n_head=4' in problems[0] and '--layer_kinds.G.n_head=2' in problems[1]


def test_all_mistakes_in_a_file_are_reported_at_once(resolve):
    kinds = "{'G': {'n_head': 'x'}, 'L': {'n_embd': 2, 'n_haed': 2}, 'LL': {}}"
    _, problems = resolve('', FILE + kinds)
    assert len(problems) == 4


# --------------------------------------------------------------------------------------------------
# Meaning


def own(config):
    return config.to_dict()['layer_kinds']


def test_dotted_names_take_dashes_spaces_and_flags(accepted):
    plain = accepted(f'{PATTERN}{WINDOW} --layer_kinds.L.bias=True --layer_kinds.G.bias=False')
    dashed = accepted(
        '--layer-pattern LG --layer-kinds.L.sliding-window 8 --layer_kinds.L.bias '
        '--no-layer_kinds.G.bias'
    )
    assert plain == dashed and plain.kinds['L'].bias and not plain.kinds['G'].bias


def test_kinds_are_merged_by_letter_and_option(accepted, monkeypatch):
    monkeypatch.setitem(
        PRESETS,
        'team',
        {
            **PRESETS['llama'],
            'layer_pattern': 'LG',
            'layer_kinds': {
                'L': {'sliding_window': lambda values: values['block_size'] // 2, 'n_head': 2}
            },
        },
    )
    preset = '--arch_preset=team '
    config = accepted(preset)
    assert (config.kinds['L'].sliding_window, config.kinds['G'].sliding_window) == (16, None)
    assert accepted(f'{preset}--block_size=64').kinds['L'].sliding_window == 32
    # A file adds an option, the command line changes one and removes another.
    file = "layer_kinds = {'L': {'d_ff': 40, 'dropout': 0.1}, 'G': {'d_ff': 24}}"
    config = accepted(
        f'{preset}--layer_kinds.L.sliding_window=None --layer_kinds.L.n_head=None '
        '--layer_kinds.G.d_ff=48',
        file,
    )
    dropouts = dict.fromkeys(('attention_dropout', 'dropout', 'residual_dropout'), 0.1)
    assert own(config) == {'L': {'d_ff': 40, **dropouts}, 'G': {'d_ff': 48}}
    # Without the kind, all its options are the model's; a note names what the pattern replaces.
    assert own(accepted(f'{preset}--layer_kinds.L=None', "layer_kinds = {'G': {}}")) == {'G': {}}
    without = accepted(f'{preset}--layer_pattern=GD --layer_kinds.D.d_ff=8')
    assert own(without) == {'D': {'d_ff': 8}}
    assert "dropped: layer_kinds.L (preset team): layer_pattern='GD' has no letter L" in (
        without.dropped
    )
    uniform = accepted(f'{preset}--layer_pattern=None')
    assert uniform.is_uniform and uniform.dropped == [
        'dropped: layer_kinds (preset team): no effect with layer_pattern=None (command line)'
    ]


def test_partly_followed_values_are_noted(accepted):
    file = f"{FILE}{{'L': {{'n_head': 2}}}}"
    (note,) = accepted('', file).dropped
    assert note == (
        'n_head=4 (command line) does not apply to all layers: there is layer_kinds.L.n_head (c.py)'
    )
    # The norm before the head follows the model's own value.
    norms = "{'L': {'normalization': 'layernorm'}, 'G': {'normalization': 'layernorm'}}"
    config = accepted('--n_head=4 --normalization=rmsnorm', FILE + norms)
    assert config.normalization == 'rmsnorm' and 'normalization' in config.dropped[0]


def test_options_that_only_some_layers_use_are_no_mistake(accepted):
    config = accepted(f'{PATTERN}--layer_kinds.L.ffn_type=moe --num_experts=4')
    assert config.dropped == [] and config.kinds['L'].num_experts == 4
    file = "ffn_type = 'moe'\nnum_experts = 6\nlayer_pattern = 'LG'\n"
    config = accepted('--ffn_type=swiglu --layer_kinds.L.ffn_type=moe', file)
    assert config.kinds['L'].num_experts == 6
    assert not any('num_experts' in note for note in config.dropped)
    config = accepted('--ffn_type=swiglu --layer_kinds.L.n_head=2', file)
    (note,) = [note for note in config.dropped if 'num_experts' in note]
    assert note.startswith('dropped: num_experts=6 (c.py): no effect with ffn_type=')


def test_kind_that_the_depth_cuts_off_is_noted(accepted):
    kinds = '--layer_kinds.L.d_ff=8 --layer_kinds.G.d_ff=16'
    config = accepted(f'--layer_pattern=LLLG --n_layer=3 {kinds}')
    assert config.is_uniform and list(config.kinds) == ['L']
    assert config.dropped == ['no layer is of kind G: the pattern is cut off at n_layer=3']
    again = ModelArchitectureConfig.from_dict(config.to_dict())
    assert again == config and again.replace(n_layer=4).kinds['G'].d_ff == 16


def test_ten_thousand_layers_share_the_config_of_their_kind(accepted):
    config = accepted(f"--n_layer=10000 --layer_pattern='L*2500 LG*' {WINDOW}")
    assert len(config.layers) == 10_000 and len({id(layer) for layer in config.layers}) == 2
    assert ''.join(config.layer_letters).count('G') == 3750
    assert ModelArchitectureConfig.from_dict(config.to_dict()).hash == config.hash


def test_replace_merges_kinds_above_the_others(accepted):
    config = accepted(f'{PATTERN}{WINDOW} --layer_kinds.L.n_head=2')
    changed = config.replace(layer_kinds={'L': {'n_head': None}, 'G': {'d_ff': 8}})
    assert own(changed) == {'L': {'sliding_window': 8}, 'G': {'d_ff': 8}}
    assert own(config)['L']['head_dim'] == 16  # the original is unchanged
    values = {'L': {'sliding_window': 8}}
    sizes = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'vocab_size': 50}
    from_python = ModelArchitectureConfig(layer_pattern='LG', layer_kinds=values,
                                          position_encoding='rope', **sizes)  # fmt: skip
    own(from_python)['L']['sliding_window'] = 3
    values['L']['sliding_window'] = 3
    assert from_python.kinds['L'].sliding_window == own(from_python)['L']['sliding_window'] == 8


OWN_FFN = """
from components.feed_forward import StandardFeedForward
from model_components import FFN_REGISTRY, Option, above


@FFN_REGISTRY.register('power', source='made up')
class PowerFFN(StandardFeedForward):
    tag = 'Power'
    options = {
        **StandardFeedForward.options,
        'ffn_power': Option(float, 2.0, 'Exponent of the power FFN', check=above(0)),
    }


layer_pattern = 'PS'
layer_kinds = {'P': {'ffn_type': 'power', 'ffn_power': 3}}
"""


def test_component_of_a_config_file_in_some_layers(resolve, accepted, monkeypatch):
    components = {name: FFN_REGISTRY[name] for name in FFN_REGISTRY}
    monkeypatch.setattr(FFN_REGISTRY, '_components', {**components})
    config = accepted('--layer_kinds.P.activation=relu', OWN_FFN)
    assert own(config)['P']['ffn_power'] == 3.0 and own(config)['P']['activation'] == 'relu'
    assert accepted('--layer_kinds.P.ffn_power=2.5', OWN_FFN).kinds['P'].ffn_power == 2.5
    names = [type(block.ffn).__name__ for block in build_model(config).blocks]
    assert names == ['PowerFFN', 'SwiGLU'] * 2
    assert 'P(Power+ReLU)' in config.name or 'P(ReLU+Power)' in config.name
    assert ModelArchitectureConfig.from_dict(config.to_dict()) == config
    mistakes = {
        '--layer_kinds.S.ffn_power=2': "has no effect: it needs ffn_type='power'",
        '--layer_kinds.P.ffn_powr=2': 'Did you mean ffn_power?',
        '--layer_kinds.P.ffn_power=0': 'layer_kinds.P.ffn_power takes float, above 0',
        '--ffn_power=2': 'Set --layer_kinds.P.ffn_power=2.0 instead.',
    }
    for arguments, words in mistakes.items():
        _, (problem,) = resolve(arguments, OWN_FFN)
        assert words in problem
    # A checkpoint contains no code: without the file, the message names what is missing.
    monkeypatch.setattr(FFN_REGISTRY, '_components', components)
    index = {'architecture': config.to_dict(), 'config_files': ['own.py']}
    with pytest.raises(UserError) as refused:
        checked_layers(index, {'architecture': 'iter_00000004'})
    (problem,) = refused.value.problems
    assert "layer_kinds.P.ffn_type='power', layer_kinds.P.ffn_power=3.0. " in problem
    assert 'own.py' in problem and 'activation' not in problem


def test_option_of_the_model_that_one_kind_has_is_the_models(register):
    class WithoutDocuments(MultiHeadAttention):
        options: ClassVar = {
            key: option
            for key, option in MultiHeadAttention.options.items()
            if key not in ('document_mask', 'end_of_text')
        }

    register(ATTENTION_REGISTRY, 'without_documents', WithoutDocuments)
    kinds = {'S': {'attention_type': 'standard'}}
    config = ModelArchitectureConfig(
        attention_type='without_documents', layer_pattern='S', layer_kinds=kinds
    )
    assert config.document_mask is False
    masked = config.replace(document_mask=True, end_of_text=3)
    assert (masked.end_of_text, masked.layers[0].end_of_text) == (3, 3)
