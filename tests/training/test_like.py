"""`like` in runs: record, report, print_config, resume, comparison, studies."""

import json

import pytest
import torch
from helpers.bit_equality import bit_differences
from helpers.in_process import session_here, train_here
from helpers.run_records import make_record

import study as study_script
from common.errors import UserError
from comparison.compare import compare
from comparison.load import read_runs
from configurator import read_command_line
from data.dataset import load_dataset
from model_builder import build_model, training_flops
from studies.grid import read_study
from studies.keys import STUDY_KEYS
from studies.variants import RunContext, build_variants
from training_config import load_settings, schema

FEW = {'decay_lr': False, 'eval_interval': 2, 'eval_iters': 1}


def test_a_run_records_its_family_and_resumes_bit_equal(tmp_path, tiny_dataset, capsys):
    """Without naming the family again: the checkpoint has its values."""
    whole = train_here(tiny_dataset, tmp_path / 'whole', **FEW, like='gemma3_text')
    config = whole.record['config']
    assert (config['like'], config['arch_preset']) == ('gemma3_text', 'custom')
    assert config['sliding_window'] == 16 and config['norm_position'] == 'sandwich'
    assert '(family gemma3_text, hash ' in capsys.readouterr().out
    chosen = whole.record['startup_info']['chosen']
    assert chosen['like'] == 'command line' and 'norm_position' not in chosen
    first = train_here(tiny_dataset, tmp_path / 'out', **FEW, like='gemma3_text', max_iters=2)
    again = train_here(tiny_dataset, tmp_path / 'out', init_from='resume', decay_lr=False)
    assert again.folder == first.folder
    assert again.record['config']['like'] == 'gemma3_text'
    assert bit_differences(again.saved_weights(), whole.saved_weights()) == []
    with pytest.raises(UserError, match='another architecture'):
        session_here(tiny_dataset, tmp_path / 'out', init_from='resume', norm_position='post')


def test_printed_config_gives_the_same_run(tmp_path):
    argv = ['--like=lfm2', '--n_layer=5', '--n_embd=64', '--layer_kinds.A.n_head=2']
    settings = load_settings(read_command_line([*argv, '--dataset=x', '--plan'], schema))
    text = settings.explain()
    assert "like = 'lfm2'" in text and 'arch_preset' not in text
    assert 'family lfm2, as LFM2 1.2B' in text
    printed = tmp_path / 'printed.py'
    printed.write_text(text)
    again = load_settings(read_command_line([str(printed), '--plan'], schema))
    assert again.architecture.hash == settings.architecture.hash


def test_a_comparison_looks_at_the_values_and_finds_a_family_by_name(tmp_path):
    """A run of the same options is of the same architecture, whatever names them."""
    for number, config in enumerate(({'like': 'llama'}, {}, {'bias': True, 'like': 'opt'}), 1):
        folder = tmp_path / f'run_20260101_1200{number:02d}'
        folder.mkdir()
        record = make_record(number, seed=number, **config)
        (folder / 'record.json').write_text(json.dumps(record), encoding='utf-8')
    runs = read_runs([tmp_path])[0]
    comparison = compare(runs, 'opt')
    assert [len(group.runs) for group in comparison.groups] == [2, 1]
    assert comparison.baseline.runs[0].config['like'] == 'opt'
    assert not comparison.loss_warnings


def test_a_study_varies_families_at_equal_flops(study_file, tiny_dataset):
    """Matched by the width, each family keeps its ratios."""
    names = ['llama', 'gemma2', 'mixtral', 'bamba']
    path = study_file(
        f"sweep = {{'like': {names}, 'seed': [1]}}; like = 'llama'; n_layer, n_embd = 4, 64\n"
        "match, match_by, match_step = 'flops', 'n_embd', 8; reference = {'like': 'llama'}\n"
    )
    command_line = read_command_line([str(path)], study_script.study_schema, STUDY_KEYS)
    context = RunContext(torch.device('cpu'), 'float32', load_dataset(str(tiny_dataset), 32))
    variants = build_variants(read_study(command_line), context)
    assert [variant.label for variant in variants] == [f'like={name}' for name in names]
    flops = [
        training_flops(build_model(variant.settings.architecture, 'meta'))['per_token_causal']
        for variant in variants
    ]
    assert max(flops) < 1.25 * min(flops)
    widths = [variant.settings.architecture.n_embd for variant in variants]
    assert widths[0] == 64 and widths[2] < 64  # two experts, each wider than Llama's FFN
    assert variants[2].settings.architecture.expert_d_ff == 7 * widths[2] // 2
