"""A config file that registers its own components works with every script."""

import json
import re
import textwrap

import pytest

pytestmark = pytest.mark.slow

CONFIG = '''
import torch
import torch.nn.functional as F

from model_components import NORM_REGISTRY, POSITION_ENCODING_REGISTRY, AttentionInputs
from model_components import Norm, Option, PositionEncoding, above


@NORM_REGISTRY.register('power_norm', source='made up')
class PowerNorm(Norm):
    """x / (mean |x|^p)^(1/p)."""

    tag = 'Power'
    options = {
        **Norm.options,
        'norm_power': Option(float, 2.0, 'Exponent of the power norm', check=above(0)),
    }

    def __init__(self, config, width):
        super().__init__(config, width)
        self.power = config.norm_power

    def forward(self, x):
        x = x.float()
        mean = x.abs().pow(self.power).mean(-1, keepdim=True) + self.eps
        return self.weight * x / mean.pow(1 / self.power)


@POSITION_ENCODING_REGISTRY.register('slopes', source='Press et al. 2022')
class Slopes(PositionEncoding):
    """Scores fall with the distance, in each head by another slope."""

    tag = 'Slopes'
    has_bias = True

    def __init__(self, config):
        super().__init__(config)
        self.n_head = config.n_head

    def prepare(self, q_positions, k_positions):
        heads = torch.arange(1, self.n_head + 1, device=q_positions.device)
        slopes = 2.0 ** (-8.0 * heads / self.n_head)
        distance = (q_positions[:, None] - k_positions[None, :]).float()
        return AttentionInputs(bias=-slopes[:, None, None] * distance)


arch_preset = 'llama'
normalization = 'power_norm'
position_encoding = 'slopes'
norm_power = 3
out_dir = 'out'
'''
NAME = '2L-2H-32D-Slopes-Power-SwiGLU-PreNorm'


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'own.py'
    path.write_text(CONFIG)
    return path


def record(tmp_path):
    (folder,) = tmp_path.glob('out/run_*')
    return json.loads((folder / 'record.json').read_text())


def test_component_option_in_help(config, run_script):
    overview = run_script('train.py', config, '--help').stdout
    flat = ' '.join(overview.split())
    assert len(re.findall(r'^  --norm_power=float', overview, re.MULTILINE)) == 1
    assert 'Exponent of the power norm (default 2.0)' in flat
    assert ', power_norm]' in flat and ', slopes]' in flat
    page = run_script('train.py', config, '--help=norm_power').stdout
    assert "qk_norm='power_norm', or normalization='power_norm'" in ' '.join(page.split())
    entry = run_script('train.py', config, '--list_components').stdout.partition(' power_norm')[2]
    assert '[Power]' in entry and 'norm_eps, norm_power.' in ' '.join(entry.split())


def test_component_option_is_checked(config, train):
    wrong = train(
        config, '--normalization=rmsnorm', '--norm_power=2', '--norm_powr=2', code=2
    ).stderr
    assert 'unknown option --norm_powr. Did you mean norm_power?' in wrong
    assert 'norm_power=2.0 (command line) has no effect' in wrong
    assert "it needs qk_norm='power_norm', or normalization='power_norm'" in wrong
    changes = 'qk_norm or normalization or embedding_norm'
    assert f'Remove norm_power or change {changes}.' in wrong
    left = train(config, '--normalization=rmsnorm', '--print_config').stdout
    assert f'dropped: norm_power=3.0 ({config})' in left


def test_train_resume_and_compare_custom_components(config, train, run_script, tmp_path):
    train(config, '--norm_power=2.5')
    run = record(tmp_path)
    assert run['status'] == 'finished' and run['summary']['final_iter'] == 4
    assert run['architecture']['name'] == NAME
    choices = run['architecture']['choices']
    assert (choices['normalization'], choices['norm_power']) == ('power_norm', 2.5)
    assert run['config']['norm_power'] == 2.5 and run['config']['position_encoding'] == 'slopes'
    assert run['metadata']['config_files'][0]['text'] == CONFIG
    # Five norms with 32 weights; an encoding without parameters.
    assert run['startup_info']['model']['components']['normalization'] == 5 * 32
    losses = [entry['loss'] for entry in run['training_iterations']]
    assert len(losses) == 4 and losses[-1] < losses[0]

    # A checkpoint contains no code: without the file, the message names what is missing.
    refused = train('--init_from=resume', '--max_iters=6', code=2).stderr
    assert "normalization='power_norm'" in refused and 'norm_power=2.5' in refused
    assert 'contains no code' in refused and str(config) in refused
    assert 'Traceback' not in refused

    train(config, '--norm_power=2.5', '--init_from=resume', '--max_iters=6')
    resumed = record(tmp_path)
    assert [entry['iter'] for entry in resumed['training_iterations']] == list(range(6))
    assert resumed['training_iterations'][:4] == run['training_iterations']
    assert resumed['architecture'] == run['architecture']

    # The encoding has an effect: without it, the same initial weights give another loss.
    train(config, '--norm_power=2.5', '--position_encoding=none', '--out_dir=unplaced')
    (path,) = tmp_path.glob('unplaced/run_*/record.json')
    unplaced = json.loads(path.read_text())['training_iterations'][0]['loss']
    assert abs(unplaced - losses[0]) > 1e-5

    exported = run_script('export_checkpoint.py', config, '--out_dir=out').stdout
    assert NAME in exported and (tmp_path / 'model.pt').stat().st_size > 0

    config.unlink()  # reading a record needs only the record
    listed = run_script('compare_architectures.py', 'out').stdout
    assert NAME in listed


def test_config_file_twice_is_allowed_duplicate_name_is_not(config, train, tmp_path):
    assert 'slopes' in train(config, config, '--print_config').stdout
    other = tmp_path / 'other.py'
    other.write_text(CONFIG)
    refused = train(config, other, '--print_config', code=2).stderr
    assert "normalization='power_norm' is registered twice" in refused and str(other) in refused


def test_options_of_replaced_component_are_dropped(train, tmp_path):
    """Through two options: the attention has use_gqa, which num_kv_heads needs."""
    path = tmp_path / 'attention.py'
    path.write_text(
        textwrap.dedent(
            """
            from model_components import MultiHeadAttention
            from model_config import ATTENTION_REGISTRY


            @ATTENTION_REGISTRY.register('plain')
            class PlainAttention(MultiHeadAttention):
                options = {
                    key: option
                    for key, option in MultiHeadAttention.options.items()
                    if key not in ('use_gqa', 'num_kv_heads')
                }

                @classmethod
                def name_tag(cls, config):
                    return 'Plain'

                @classmethod
                def problems(cls, config):
                    return []

                @staticmethod
                def kv_heads(config):
                    return config.n_head


            use_gqa = True
            num_kv_heads = 1
            """
        )
    )
    shown = train(path, '--attention_type=plain', '--print_config').stdout
    assert '-Plain-' in shown and 'num_kv_heads =' not in shown
    for key in ('use_gqa=True', 'num_kv_heads=1'):
        assert f"dropped: {key} ({path}): no effect with attention_type='plain'" in shown
    refused = train(path, '--attention_type=plain', '--num_kv_heads=2', code=2).stderr
    assert 'num_kv_heads=2 (command line) has no effect' in refused


def test_sampling_uncacheable_attention_prints_note(train, run_script, tmp_path):
    path = tmp_path / 'attention.py'
    path.write_text(
        textwrap.dedent(
            """
            from model_components import MultiHeadAttention
            from model_config import ATTENTION_REGISTRY


            @ATTENTION_REGISTRY.register('halved')
            class HalvedAttention(MultiHeadAttention):
                def forward(self, x, positions):
                    return super().forward(x, positions) / 2
            """
        )
    )
    train(path, '--attention_type=halved', '--max_iters=1')
    arguments = ('--out_dir=out', '--start=the', '--num_samples=1', '--max_new_tokens=40')
    note = 'No KV cache: HalvedAttention does not set'
    uncached = run_script('sample.py', path, *arguments).stdout
    path.write_text(path.read_text() + '    cacheable = True\n')
    cached = run_script('sample.py', path, *arguments).stdout
    assert note in uncached and note not in cached

    def text(output):
        return output.split('-' * 80)[1]

    assert text(uncached) == text(cached) and len(text(cached)) > 40
