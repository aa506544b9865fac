"""README and the repository say what is true."""

import re
import subprocess

import pytest
from helpers.project import PROJECT

from common.registry import Registry
from configurator import flatten, read_config_file
from model_builder import build_model, count_parameters, training_flops
from model_config import PRESETS, ModelArchitectureConfig
from training_config import schema

README = (PROJECT / 'README.md').read_text(encoding='utf-8')


def code_blocks(language):
    return re.findall(rf'^```{language}\n(.*?)^```$', README, flags=re.M | re.S)


def test_the_first_two_commands_do_all_the_set_up_on_one_line_each():
    train, test = code_blocks('sh')[:2]
    for command, requirements in ((train, 'requirements.txt'), (test, 'requirements-test.txt')):
        assert command.count('\n') == 1
        assert command.startswith('python3 -m venv .venv && . .venv/bin/activate && ')
        assert f'pip install -r {requirements} && ' in command
    assert train.rstrip().endswith('&& python train.py config/arch_llama.py --max_iters=100')
    assert test.rstrip().endswith('&& mypy && pytest -n auto')


def test_the_gate_runs_the_readmes_test_command(tmp_path):
    """.ci/run, in a copy where `bash` only prints what it is asked to run."""
    (tmp_path / '.ci').mkdir()
    (tmp_path / '.ci/run').write_bytes((PROJECT / '.ci/run').read_bytes())
    (tmp_path / 'README.md').write_text(README, encoding='utf-8')
    (tmp_path / 'bash').write_text('#!/bin/sh\nprintf "asked: %s" "$2"\n')
    (tmp_path / 'bash').chmod(0o755)
    out = subprocess.run(
        ['/bin/bash', str(tmp_path / '.ci/run')],
        env={'PATH': f'{tmp_path}:/usr/bin:/bin'},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.partition('asked: ')[2].strip() == code_blocks('sh')[1].strip()


def is_ours(component):
    """Whether it comes with the project, and was not registered by a test."""
    return (PROJECT / f'{component.__module__.replace(".", "/")}.py').is_file()


@pytest.mark.slow
def test_the_options_table_lists_every_component_and_option_that_is_listed(run_script):
    """README's table, --list_components and the registries say the same."""
    table = README.partition('| option | choices |')[2].partition('\n\n')[0]
    listed = run_script('train.py', '--list_components').stdout
    parts = dict(re.findall(r'^(\S.*?) \(--.*?\):\n\n(.*?)(?=^\S|\Z)', listed, flags=re.M | re.S))
    for registry in {o.choices for o in flatten(schema()).values()}:
        if not isinstance(registry, Registry):
            continue
        entries = re.split(r'^  (?=\S)', parts[registry.title], flags=re.M)[1:]
        for name, entry in zip([n for n in registry if is_ours(registry[n])], entries, strict=True):
            component, text = registry[name], ' '.join(entry.split())
            assert text.startswith(f'{name} '), name
            assert component.__doc__.split()[0] in text and registry.source(name), name
            assert f'Source: {registry.source(name)}.' in text
            assert f'`{name}`' in table, name
            for option in component.options:
                assert option in text and f'`{option}`' in table, option


@pytest.mark.parametrize('preset', [p for p in PRESETS if p != 'custom'])
def test_the_presets_table_has_the_right_counts(preset):
    config = ModelArchitectureConfig(arch_preset=preset, vocab_size=50304)
    total = count_parameters(build_model(config))['total_params']
    table = README.partition('| preset | what it is')[2].partition('\n\n')[0]
    (row,) = [line for line in table.splitlines() if re.match(rf'\| [^|]*`{preset}`', line)]
    assert f'{total:,}' in row


@pytest.mark.parametrize('preset', [p for p in PRESETS if p not in ('custom', 'legacy')])
def test_every_preset_has_a_config_file_that_counts_right(preset):
    problems = []
    values, text = read_config_file(str(PROJECT / f'config/arch_{preset}.py'), problems)
    assert problems == []
    assert values['arch_preset'] == preset and values['out_dir'] == f'out-{preset}'
    counted = count_parameters(
        build_model(ModelArchitectureConfig(arch_preset=preset, vocab_size=50304))
    )
    comment = ' '.join(line[2:] for line in text.splitlines() if line.startswith('# '))
    told = re.search(r'12 layers × 768 wide: ([\d,]+) parameters', comment)
    if preset != 'team':  # which says that it is llama
        assert told[1] == f'{counted["total_params"]:,}'
        active = re.search(r'a token uses ([\d,]+)', comment) or told
        assert active[1] == f'{counted["active_params"]:,}'


def test_the_figures_against_the_design_document():
    table = README.partition('## Figures in the design document')[2]
    for preset, elements in (('gpt2', '533 k'), ('llama', '666 k')):
        config = ModelArchitectureConfig(arch_preset=preset, vocab_size=50304)
        flops = training_flops(build_model(config))
        assert f'{flops["per_token"] / 1e9:.3f} GF' in table
        assert f'{flops["per_token_causal"] / 1e9:.3f} GF' in table
        assert f'{flops["attention_ffn_ratio"]:.2f} for both' in table
        assert f'{flops["elementwise_per_token"] / 1e3:.0f} k' == elements and elements in table


@pytest.mark.slow
def test_the_readmes_component_trains(train, tmp_path):
    (snippet,) = code_blocks('python')
    assert len([line for line in snippet.splitlines() if line]) < 20
    (tmp_path / 'mine.py').write_text(snippet)
    out = train('mine.py', '--star_scale=0.7').stdout
    assert '2L-2H-32D-AbsPos-LN-StarReLU-PreNorm' in out


def test_documents_name_files_that_exist():
    documents = [
        *PROJECT.glob('*.md'),
        *PROJECT.glob('docs/*.md'),
        *PROJECT.glob('benchmarks/*.md'),
    ]
    paths = {
        path
        for document in documents
        if document.name != 'CHANGELOG.md'
        for path in re.findall(r'`([\w.-]+/[\w./-]+\.\w+)`', document.read_text(encoding='utf-8'))
    }
    made = re.compile(r'^(out|data/\w+/(input|meta|train|val)|runs?/)')
    assert [path for path in sorted(paths) if not made.match(path)] != []
    assert [path for path in paths if not made.match(path) and not (PROJECT / path).exists()] == []
