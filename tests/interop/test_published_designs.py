"""`like`: the design of a family's released model at its own size and at the user's."""

import json
import re
import sys

import pytest

from common.errors import UserError
from common.pattern_scaling import parts, scaled_pattern
from common.published_designs import PUBLISHED_DESIGNS, design_layer
from configurator import COMMAND_LINE, Layer
from interop.families import TRANSFORMERS
from interop.layers import canonical_options
from model_builder import build_model, count_parameters
from model_config import ModelArchitectureConfig

VOCABULARY = 64
SIZES = {'n_layer': 4, 'n_embd': 64, 'block_size': 64, 'vocab_size': VOCABULARY}
families = pytest.mark.parametrize('family', PUBLISHED_DESIGNS)


def published(family: str) -> dict:
    """Our options of the released model, as `--init_from=hf:` reads its config.json."""
    problems: list[str] = []
    options = TRANSFORMERS[family].read(PUBLISHED_DESIGNS[family].config, problems)
    assert not problems
    return options


@families
def test_at_its_published_size_the_design_is_the_imported_one(family):
    options = published(family)
    imported = ModelArchitectureConfig(**{'arch_preset': 'custom', **options})
    sizes = {k: options[k] for k in ('n_layer', 'n_embd', 'block_size', 'vocab_size')}
    like = ModelArchitectureConfig(like=family, **sizes)
    assert [canonical_options(layer) for layer in like.layers] == [
        canonical_options(layer) for layer in imported.layers
    ]
    assert like.hash == imported.hash
    assert like.to_dict() == imported.to_dict()


@families
@pytest.mark.parametrize('layers, width', [(4, 64), (4, 88), (4, 128), (12, 768), (1, 32)])
def test_a_design_fits_any_size(family, layers, width):
    config = ModelArchitectureConfig(
        like=family, n_layer=layers, n_embd=width, block_size=64, vocab_size=VOCABULARY
    )
    build_model(config, 'meta')
    if layers == 4:
        whole = ModelArchitectureConfig(**{'arch_preset': 'custom', **published(family)})
        if len(whole.kinds) <= 4:
            assert config.kinds.keys() == whole.kinds.keys()  # none of its kinds of layers is lost


@families
def test_parameters_shrink_with_the_width_and_the_depth(family):
    """Halving the width and the depth of the released model leaves about an eighth."""
    whole = published(family)
    sizes = {'n_layer': whole['n_layer'] // 2, 'n_embd': whole['n_embd'] // 2}
    half = ModelArchitectureConfig(like=family, block_size=64, vocab_size=VOCABULARY, **sizes)
    full = ModelArchitectureConfig(
        like=family,
        block_size=64,
        vocab_size=VOCABULARY,
        n_layer=whole['n_layer'],
        n_embd=whole['n_embd'],
    )
    counts = [
        count_parameters(build_model(c, 'meta'))['non_embedding_params'] for c in (half, full)
    ]
    assert 0.09 < counts[0] / counts[1] < 0.16


def test_ratios_of_a_known_design():
    """Mistral 7B: 4 query heads share keys and values, FFN 3.5 · n_embd, a window of an eighth."""
    config = ModelArchitectureConfig(
        like='mistral', n_layer=6, n_embd=256, n_head=8, block_size=512, vocab_size=VOCABULARY
    )
    assert (config.num_kv_heads, config.d_ff, config.head_dim) == (2, 896, 32)
    assert config.sliding_window == 64
    assert config.rope_theta == 1e4
    assert config.origins['d_ff'] == 'family mistral, as Mistral 7B v0.1'
    gemma = ModelArchitectureConfig(like='gemma2', **{**SIZES, 'n_embd': 128})
    assert gemma.attention_scale == pytest.approx(gemma.head_dim**-0.5)
    granite = ModelArchitectureConfig(like='granite', **SIZES)
    assert granite.attention_scale == pytest.approx(1 / granite.head_dim)  # as in µP
    assert ModelArchitectureConfig(like='gpt_neo', **SIZES).attention_scale == 1  # not scaled
    minimax = ModelArchitectureConfig(like='minimax', **SIZES)
    assert minimax.deepnorm_ffn_alpha == pytest.approx(8**0.25)  # DeepNorm of 4 layers
    assert minimax.kinds['L'].deepnorm_mixer_alpha == pytest.approx(8**0.25)


def test_single_options_override_a_design():
    config = ModelArchitectureConfig(
        like='gemma3_text', norm_position='post', layer_kinds={'G': {'rope_theta': 5e5}}, **SIZES
    )
    assert config.norm_position == 'post'
    assert config.kinds['G'].rope_theta == 5e5 and config.kinds['L'].rope_theta == 1e4
    assert ''.join(config.layer_letters) == 'LLLG'
    experts = ModelArchitectureConfig(like='mixtral', num_experts=4, **SIZES)
    assert (experts.num_experts, experts.experts_per_token) == (4, 2)
    without = ModelArchitectureConfig(like='deepseek_v2', attention_type='standard', **SIZES)
    assert 'kv_lora_rank' not in without
    assert any('kv_lora_rank' in note and 'family deepseek_v2' in note for note in without.dropped)


def test_a_family_replaces_a_preset_and_refuses_one():
    with pytest.raises(UserError) as refused:
        ModelArchitectureConfig(like='llama', arch_preset='llama', **SIZES)
    (problem,) = refused.value.problems
    assert "like='llama'" in problem and "arch_preset='llama'" in problem
    problems: list[str] = []
    layers = [
        Layer('c.py', {'like': 'llama', **SIZES, 'n_head': 4}),
        Layer(COMMAND_LINE, {'like': None}),
    ]
    config = ModelArchitectureConfig.resolve(layers, problems)
    assert not problems and config.preset == 'legacy'


def test_an_unknown_family_gets_one_line_with_the_closest_name():
    with pytest.raises(UserError) as unknown:
        ModelArchitectureConfig(like='mixtrall', **SIZES)
    (problem,) = unknown.value.problems
    assert 'Did you mean mixtral?' in problem and '--help=like' in problem
    assert '\n' not in problem and len(problem) < 150


def test_replaced_and_saved_designs_stay_the_same(tmp_path):
    config = ModelArchitectureConfig(like='kimi_linear', **SIZES)
    assert config.replace(n_layer=8).hash != config.hash
    assert config.replace(dropout=0.0).hash == config.hash
    config.save(tmp_path / 'architecture.json')
    assert ModelArchitectureConfig.load(tmp_path / 'architecture.json').hash == config.hash
    for layer in config.layers:
        assert layer.replace(dropout=0.0).hash == layer.hash


@pytest.mark.parametrize(
    'letters, layers, expected',
    [
        ('LLLLLG' * 4 + 'LL', 12, 'LLLLLG'),  # its period
        ('LLLLLG' * 4 + 'LL', 4, 'LLLG'),  # does not fit: sampled
        ('LLLLLG' * 4 + 'LL', 2, 'LG'),
        ('D' * 3 + 'M' * 58, 4, 'DMMM'),
        ('D' * 3 + 'M' * 58, 40, 'DD' + 'M' * 38),
        ('D' + 'KKAK' * 6 + 'KA', 8, 'DKKAKKKA'),
        ('MEMEAEME' * 4, 4, 'MEAE'),  # of 12, 16 and 4 layers
        ('R', 7, 'R'),
        ('AB' * 8, 1, 'AB'),  # cut off
    ],
)
def test_patterns_keep_their_period_and_proportions(letters, layers, expected):
    assert scaled_pattern(letters, layers) == expected


def test_parts_of_a_pattern():
    assert parts('D' + 'KKAK' * 6 + 'KA') == ('D', 'KKAK')
    assert parts('ABC') == ('', 'ABC')


@families
def test_defaults_of_a_config_class_are_those_of_transformers(family):
    """Where the source is a config class, each field has its default."""
    design = PUBLISHED_DESIGNS[family]
    named = re.fullmatch(r'the defaults of (\w+)', design.source)
    if named is None:
        assert design.source.startswith('config.json of huggingface.co/')
        return
    transformers = pytest.importorskip('transformers')
    default = getattr(transformers, named[1])()
    assert {key: getattr(default, key) for key in design.config} == design.config
    problems: list[str] = []
    of_class = TRANSFORMERS[family].read(json.loads(default.to_json_string(False)), problems)
    if not problems:
        hashes = {
            ModelArchitectureConfig(**{'arch_preset': 'custom', **options}).hash
            for options in (of_class, published(family))
        }
        assert len(hashes) == 1


def test_transformers_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)  # an import raises
    design_layer.cache_clear()
    config = ModelArchitectureConfig(like='qwen3', **SIZES)
    assert config.name == '4L-4H-64D-HD32-GQA2-QKRMS-RoPE-RMS-SwiGLU-PreNorm'
