"""The start-up reports show every choice, and figures that add up; a resume, the changes."""

import io
import re

import pytest
from helpers.sample_run import HEADER, STARTUP_INFO

from common.console_output import displayed
from records.startup_report import resume_report, startup_report


def report_text(startup_info=STARTUP_INFO):
    """The full report as a log file gets it."""
    return in_log(startup_report({**HEADER, 'startup_info': startup_info}, 'out/run_1'))


def in_log(text):
    return displayed(text, io.StringIO())


def test_startup_report_shows_choices_and_totals():
    report = report_text()
    for key, value in {
        'Architecture Name': '12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm',
        'Layers': '12',
        'Normalization': 'rmsnorm',
        'Position Encoding': 'rope',
        'RoPE Theta': '10000.0',
        'Use GQA': 'False',
        'FFN Type': 'swiglu',
        'Tokens/iteration': '1 sequence x 4 accumulation x 1,024 tokens = 4,096',
        'Vocabulary': '50,257 data -> 50,304 model',
        'Attention/FFN ratio': '0.67 (causal)',
        'Expected tokens/s': '182,516 at 50 % MFU',
        'Peak': '312.0 TFLOP/s (NVIDIA A100 datasheet, dense bfloat16)',
        'warmup_iters': '5: 5 % of max_iters',
        'Element-wise': '1,234,567 values written per token, forward; not in MFU',
        'Folder': 'out/run_1',
    }.items():
        assert re.search(rf'{re.escape(key)}: +{re.escape(value)}$', report, re.MULTILINE), key
    totals = re.findall(r'^ +total +(.*)$', report, re.MULTILINE)
    assert [total.split() for total in totals] == [
        ['162,220,800', '100.0', '%'],
        ['111', '162,220,800'],
        ['854.7', 'MF', '100.0', '%', '798.0', 'MF', '100.0', '%'],
    ]


@pytest.mark.parametrize(
    'setting, text',
    [('none', None), ('full', 'every block'), (3, 'one block in 3')],
)
def test_startup_report_shows_recomputation_if_any(setting, text):
    info = {
        **STARTUP_INFO,
        'hardware': {**STARTUP_INFO['hardware'], 'activation_checkpointing': setting},
        'flops': {**STARTUP_INFO['flops'], 'recomputed_per_token': 2.5e8 if text else 0.0},
    }
    lines = re.findall(r'^  (Recomput.*?): +(.*)$', report_text(info), re.MULTILINE)
    assert (
        lines
        == [
            ('Recomputation', f'{text} (activation_checkpointing={setting})'),
            ('Recomputed', '250.0 MFLOPs per token (in HFU, not in MFU)'),
        ][: 2 if text else 0]
    )


@pytest.mark.parametrize('part, key', [('model', 'total_params'), ('flops', 'per_token')])
def test_tables_must_add_up(part, key):
    figures = STARTUP_INFO[part]
    with pytest.raises(AssertionError):
        report_text({**STARTUP_INFO, part: {**figures, key: figures[key] + 1000}})


def test_optimizer_table_must_cover_all_parameters():
    optimizer = STARTUP_INFO['optimizer']
    with pytest.raises(AssertionError):
        report_text({**STARTUP_INFO, 'optimizer': {**optimizer, 'groups': optimizer['groups'][:1]}})


def test_resume_report_lists_changes():
    changed = {
        'gradient_accumulation_steps': [4, 8],
        'versions.torch': ['2.12.0', '2.13.0'],
        'git_commit': ['0123456789' * 4, 'abcdef0123' * 4],
        'peak_tflops': [None, 0.5],
    }
    text, unchanged = (
        in_log(resume_report(1500, 'checkpoints/1500', differences, 'out/run_1'))
        for differences in (changed, {})
    )
    assert re.search('RESUMED from checkpoints/1500 at iteration 1,500$', text, re.MULTILINE)
    assert re.search('Folder: +out/run_1$', text, re.MULTILINE)
    assert 'may differ' in text and 'may differ' not in unchanged
    for key, (old, new) in changed.items():
        assert re.search(rf'{key}: +{old} ->\W+{new}$', text, re.MULTILINE), key
    assert max(map(len, text.splitlines())) <= 80
