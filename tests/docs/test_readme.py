"""README's first two commands, the gate that reads one of them, its captures and its figures."""

import re
import subprocess

from helpers.documents import README, fences
from helpers.project import PROJECT

from common.published_designs import PUBLISHED_DESIGNS
from model_config import PRESETS, ModelArchitectureConfig

COMMANDS = [fence.text for fence in fences(README, 'sh')]
TEXT = README.read_text(encoding='utf-8')
RESULTS = (PROJECT / 'benchmarks/RESULTS.md').read_text(encoding='utf-8')


def test_the_first_two_commands_do_all_the_set_up_on_one_line_each():
    train, test = COMMANDS[:2]
    for command, requirements in ((train, 'requirements.txt'), (test, 'requirements-test.txt')):
        assert command.count('\n') == 1
        assert command.startswith('python3 -m venv .venv && . .venv/bin/activate && ')
        assert f'pip install -r {requirements} && ' in command
    assert train.rstrip().endswith('&& python train.py config/arch_llama.py --max_iters=100')
    assert test.rstrip().endswith('&& mypy && pytest -n auto')


def test_the_gate_runs_the_readmes_test_command(tmp_path):
    """.ci/run, in a copy where `bash` only prints its argument."""
    (tmp_path / '.ci').mkdir()
    (tmp_path / '.ci/run').write_bytes((PROJECT / '.ci/run').read_bytes())
    (tmp_path / 'README.md').write_text(TEXT, encoding='utf-8')
    (tmp_path / 'bash').write_text('#!/bin/sh\nprintf "command: %s" "$2"\n')
    (tmp_path / 'bash').chmod(0o755)
    out = subprocess.run(
        ['/bin/bash', str(tmp_path / '.ci/run')],
        env={'PATH': f'{tmp_path}:/usr/bin:/bin'},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.partition('command: ')[2].strip() == COMMANDS[1].strip()


def test_first_comparison_trains_three_different_architectures():
    names = re.search(r'^for arch in (.+?);', COMMANDS[2])[1].split()
    configs = [ModelArchitectureConfig(arch_preset=name) for name in names]
    assert len(names) == 3 and len({config.hash for config in configs}) == 3
    before = TEXT.partition(COMMANDS[2])[0]
    assert '`gpt2` is post-norm' in before and '`legacy`' in before


def test_presets_and_families_of_readme_exist():
    paragraph = TEXT.partition('[Presets]')[2].partition('\n\n')[0]
    assert set(re.findall(r'`(\w+)`', paragraph)) <= PRESETS.keys()
    assert re.findall(r'`--like=(\w+)`', paragraph)[0] in PUBLISHED_DESIGNS


def test_study_and_its_verdict_are_those_of_the_project():
    (fence,) = (f for f in fences(README, 'python') if 'sweep = ' in f.text)
    shown, stored = {}, {}
    exec(fence.text, shown)
    exec((PROJECT / 'config/studies/norms.py').read_text(encoding='utf-8'), stored)
    assert len(fence.text.splitlines()) == 6
    shown.pop('__builtins__')
    assert shown == {key: stored[key] for key in shown}
    verdict = TEXT.partition('python study.py config/studies/norms.py')[2].split('```')[2]
    page = (PROJECT / 'docs/comparing.md').read_text(encoding='utf-8')
    assert ' '.join(verdict.split()) in ' '.join(page.split())


def test_speeds_are_those_of_the_results():
    """Each row: tokens/s of ours and of the peer, the ratio and the share of memory."""
    rows = re.findall(r'^\| [^|]+ \| (\d+) \| (\d+) \| ([\d.]+) .*?\| ([\d.]+) × \|$', TEXT, re.M)
    assert len(rows) == 2
    for ours, peer, ratio, memory in rows:
        measured = rf'/compile \| {peer} \[.*\| {ratio} \[[\d., ]+\] \({memory}\)'
        assert f'ours/compile | {ours} [' in RESULTS and re.search(measured, RESULTS)


def test_architectures_page_is_the_output_of_the_command(run_script):
    page = (PROJECT / 'docs/architectures.md').read_text(encoding='utf-8')
    listed = run_script('train.py', '--list_components', '--format=markdown').stdout
    command = 'python train.py --list_components --format=markdown > docs/architectures.md'
    assert page == listed, f'Regenerate the page: {command}'
