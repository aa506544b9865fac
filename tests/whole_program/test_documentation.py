"""Tables of docs/ that are derived from the code, and the options that its pages name."""

import re

import pytest
from helpers.project import PROJECT

from common import gpu_specs
from configurator import flatten
from model_builder import build_model, training_flops
from model_config import ModelArchitectureConfig
from training_config import OPTION_GROUPS, PLAN_GROUP, schema

PAGES = {
    path: path.read_text(encoding='utf-8')
    for path in [
        *PROJECT.glob('*.md'),
        *sorted(PROJECT.glob('docs/*.md')),
        *PROJECT.glob('benchmarks/*.md'),
    ]
}
# Options of other programs that the pages use.
OTHER_PROGRAMS = {
    *('standalone', 'nproc_per_node', 'nnodes', 'rdzv_backend', 'rdzv_endpoint', 'rdzv_id'),
    *('max-restarts', 'shutdown-timeout', 'nodes', 'logdir'),
}


def page(name):
    return PAGES[PROJECT / 'docs' / name]


def test_peaks_table_equals_gpu_specs():
    def cell(peak):
        return '–' if peak == 0 else '?' if peak is None else f'{peak:g}'

    rows = ['| GPU | bf16 | fp16 | tf32 | fp32 | memory |', '| --- | --- | --- | --- | --- | --- |']
    for names, peaks, _ in gpu_specs._PEAKS:
        sizes = [
            ' or '.join(map(str, gpu_specs._MEMORY_OF[name][0]))
            for name in names
            if name in gpu_specs._MEMORY_OF
        ]
        cells = [', '.join(names), *map(cell, peaks[:4]), ' / '.join(dict.fromkeys(sizes))]
        rows.append(f'| {" | ".join(cells)} |')
    derived = '\n'.join([*rows, ''])
    written = page('training.md').partition('<!-- peaks -->\n')[2].partition('<!-- end -->')[0]
    assert written == derived, f'docs/training.md should have this table:\n{derived}'


@pytest.mark.parametrize(('preset', 'elements'), [('gpt2', '533 k'), ('llama', '666 k')])
def test_figures_of_the_design_page_are_counted(preset, elements):
    table = page('design.md').partition('## Figures often quoted')[2]
    config = ModelArchitectureConfig(arch_preset=preset, vocab_size=50304)
    flops = training_flops(build_model(config))
    assert f'{flops["per_token"] / 1e9:.3f} GF each' in table
    assert f'{flops["per_token_causal"] / 1e9:.3f} GF over the causal half' in table
    assert f'{flops["attention_ffn_ratio"]:.2f} for both' in table
    assert f'{flops["elementwise_per_token"] / 1e3:.0f} k' == elements and elements in table
    assert f'{gpu_specs.find_gpu("B200").peak("bfloat16").tflops:g}, dense bf16' in table


def test_every_option_of_a_run_is_documented():
    text = '\n'.join(text for path, text in PAGES.items() if path.parent.name == 'docs')
    options = flatten(OPTION_GROUPS | PLAN_GROUP)
    assert [key for key in options if not re.search(rf'(`|--){key}\b', text)] == []


def without_output(text):
    """A page without the code blocks that have no language: what a command prints."""
    return re.sub(r'^```(\w*)\n.*?^```$', lambda m: m[0] if m[1] else '', text, flags=re.M | re.S)


def test_documented_options_exist():
    known = {*OTHER_PROGRAMS, *flatten(schema()), 'help', 'print_config', 'list_components'}
    folders = [folder for folder in PROJECT.glob('[a-z]*/') if folder.name != 'tests']
    for path in [*PROJECT.glob('*.py'), *(path for f in folders for path in f.rglob('*.py'))]:
        source = path.read_text(encoding='utf-8')
        known |= {
            *re.findall(r"'--(\w+)'", source),
            *re.findall(r"'(\w+)': (?:Argument|Option)\(", source),
        }
    # Of programs in tests/stress; a placeholder.
    known |= {'strategy', 'pairs', 'every', 'values', 'name'}
    unknown = {
        f'{path.name}: --{name}'
        for path, text in PAGES.items()
        if path.parent.name in ('docs', 'benchmarks')
        for name in re.findall(r'(?<![\w-])--([a-zA-Z][\w-]*)', without_output(text))
        if name not in known
    }
    assert unknown == set()
