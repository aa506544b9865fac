"""The short start-up report fits on a screen; the full one is part of the record."""

import io
import json
import re

import pytest
from helpers.loggers import new_output, started_logger
from helpers.sample_run import CONFIG, HEADER, METADATA, NO_PEAK, STARTUP_INFO

from common.console_output import displayed
from model_config import PRESETS, ModelArchitectureConfig
from records.short_report import short_report
from records.startup_report import startup_report
from training.record_header import layer_choices
from training_logger import TrainingLogger


def report_text(**parts):
    """The report as a log file gets it."""
    return displayed(short_report({**HEADER, **parts}, 'out/run_20261129_131508'), io.StringIO())


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('info', [STARTUP_INFO, NO_PEAK], ids=['peak', 'no peak'])
def test_report_of_preset_fits_on_screen(preset, info):
    config = ModelArchitectureConfig(arch_preset=preset, vocab_size=50304)
    architecture = {
        'name': config.name,
        'hash': config.hash,
        'choices': config.to_dict(),
        'layers': layer_choices(config),
    }
    run = {**CONFIG, 'arch_preset': preset, 'eval_interval': 10}
    model = {**info['model'], 'active_params': 123_456_789}
    info = {
        **info,
        'model': model,
        'chosen': {'arch_preset': 'command line', 'eval_interval': 'config/x.py'},
    }
    lines = report_text(architecture=architecture, config=run, startup_info=info).splitlines()
    assert len(lines) <= (24 if config.is_uniform else 26)
    assert max(map(len, lines)) <= 80
    assert config.name in ''.join(line.strip() for line in lines).replace(' ', '')


def test_report_shows_main_figures():
    info = {**STARTUP_INFO, 'chosen': {'qk_norm': 'command line', 'max_iters': 'command line'}}
    report = report_text(config={**CONFIG, 'qk_norm': 'rms'}, startup_info=info)
    for key, value in {
        'MODEL ARCHITECTURE (preset llama, hash 3f9c0a7be21d)': '',
        'Architecture Name': '12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm',
        'Normalization': 'rmsnorm',
        'Position Encoding': 'rope, theta 10,000',
        'Non-default options': 'qk_norm=rms',
        'Parameters': '162,220,800 (123,587,328 non-embedding)',
        'Dataset': 'shakespeare (gpt2), 301,966 training tokens',
        'Iterations': '100 x 4,096 tokens = 409,600 = 1.36 epochs',
        'Optimizer': 'adamw, beta1 0.9, beta2 0.95, decay 0.1, clip 1.0',
        'Device': 'cuda:0 (NVIDIA A100-SXM4-80GB), bfloat16, compiled',
        'Peak': '312.0 TFLOP/s (NVIDIA A100 datasheet, dense bfloat16)',
        'FLOPs per token': '854.7 MFLOPs (full square) | 798.0 MFLOPs (causal)',
        'Attention/FFN ratio': '0.67 (causal) | 182,516 tokens/s expected at 50 % MFU',
        'Run folder': 'out/run_20261129_131508',
        'Seeds': '1 (data order 2) | full report: --report=full',
    }.items():
        assert re.search(rf'{re.escape(key)}: *{re.escape(value)}$', report, re.MULTILINE), key
    words = ' '.join(report.split())
    assert 'Learning rate: 6.00e-04, cosine, warmup_iters 5, lr_decay_iters 100, min_lr 6e-05' in (
        words
    )
    assert not {'Weights:', 'Processes:'} & set(words.split()) and 'active' not in words


@pytest.mark.parametrize(
    'values, line',
    [
        ({}, 'Attention: +standard'),
        ({'mixer': 'mamba2'}, 'Mixer: +mamba2'),
        ({'mixer': 'attention+mamba2'}, 'Mixer: +attention[+]mamba2, standard'),
        (
            {'layer_pattern': 'MA', 'layer_kinds': {'M': {'mixer': 'mamba2'}}},
            'Mixer: +M: mamba2; A: attention, standard',
        ),
    ],
)
def test_report_shows_mixers(values, line):
    config = ModelArchitectureConfig(arch_preset='llama', vocab_size=32, **values)
    architecture = {
        **{'name': config.name, 'hash': config.hash},
        **{'choices': config.to_dict(), 'layers': layer_choices(config)},
    }
    report = report_text(architecture=architecture)
    assert re.search(rf'[├|]─?-? {line}$', report, re.MULTILINE), report


def test_report_shows_pretrained_weights_processes_and_active_parameters():
    metadata = {**METADATA, 'weights_from': {'source': 'gpt2', 'architecture': 'x', 'files': {}}}
    model = {**STARTUP_INFO['model'], 'active_params': 1_000_000}
    hardware = {**STARTUP_INFO['hardware'], 'world_size': 8}
    info = {**STARTUP_INFO, 'model': model, 'hardware': hardware}
    report = report_text(metadata=metadata, startup_info=info)
    assert re.search('^  Processes: +8$', report, re.MULTILINE)
    assert re.search('^  Weights: +gpt2$', report, re.MULTILINE)
    assert '(123,587,328 non-embedding; 1 M active)' in report


@pytest.mark.parametrize('report', ['short', 'full'])
def test_report_is_chosen_by_option(run_folder, report):
    logger = TrainingLogger(run_folder, stream=io.StringIO(), max_iters=100)
    logger.start(**{**HEADER, 'config': {**CONFIG, 'report': report}})
    text = new_output(logger)
    assert 'TRAINING INITIALIZATION' in text
    assert ('OPTIMIZER:' in text) == (report == 'full')


def test_full_report_derives_from_record_alone(run_folder):
    logger = started_logger(run_folder)
    record = json.loads((run_folder / 'record.json').read_text(encoding='utf-8'))
    logger.finish()
    expected = startup_report(HEADER, run_folder)
    assert startup_report(record, run_folder) == expected
    # Every figure is shown with the value that the record has.
    assert len(set(re.findall(r'\d[\d,.]*', expected))) > 40
