"""`--list_components --format=markdown`: the page is complete, correct and well formed."""

import inspect
import re

import pytest
from helpers.project import PROJECT

from common.architecture_options import architecture_options, refused_in_kind
from common.architecture_presets import PRESET_DESCRIPTIONS, PRESETS
from common.registry import Registry
from configurator import flatten, read_command_line
from model_builder import build_model, count_parameters
from model_config import CORE_OPTIONS, ModelArchitectureConfig
from training.component_reference import component_page, list_components
from training_config import schema


@pytest.fixture(scope='module')
def page():
    return component_page()


def sections(page: str) -> dict[str, str]:
    return dict(re.findall(r'^## (.*?)\n(.*?)(?=^## |\Z)', page, re.MULTILINE | re.DOTALL))


def rows(section: str) -> dict[str, list[str]]:
    """The cells of each table row of a section, by the name in its first cell."""
    return {
        cells[0].strip('`'): cells
        for line in section.splitlines()
        if line.startswith('| `')
        for cells in [re.split(r' (?<!\\)\| ', line[2:-2])]
    }


def is_from_project(component: type) -> bool:
    """Whether the component comes with the project, and was not registered by a test."""
    return (PROJECT / f'{component.__module__.replace(".", "/")}.py').is_file()


def test_page_describes_every_component_with_its_options(page):
    registries = {o.choices for o in flatten(schema()).values() if isinstance(o.choices, Registry)}
    assert len(registries) >= 12
    for registry in registries:
        section = sections(page)[registry.title]
        for name in filter(lambda name: is_from_project(registry[name]), registry):
            component = registry[name]
            assert f'`{name}`' in section
            if registry.title == 'Expert of a mixture':  # described as feed-forward networks
                continue
            entry = rows(section)[name]
            assert ' '.join(inspect.getdoc(component).partition('\n\n')[0].split()) == entry[1]
            assert registry.source(name) == entry[3]
            for key, option in component.options.items():
                cells = rows(section)[key]
                assert cells[2] == f'`{option.default}`'
                assert f'`{name}`' in cells[3] or cells[3] == 'all'
                assert option.help in cells[4]


def test_page_lists_every_preset_with_its_parameters(page):
    assert list(PRESET_DESCRIPTIONS) == list(PRESETS)
    described, changed = re.split(r'^Options that', sections(page)['Presets'], flags=re.MULTILINE)
    assert list(rows(described)) == list(rows(changed)) == list(PRESETS)
    for preset, (_, description, total, active) in rows(described).items():
        config = ModelArchitectureConfig(arch_preset=preset, vocab_size=50304)
        counts = count_parameters(build_model(config))
        assert description == PRESET_DESCRIPTIONS[preset]
        assert total == f'{counts["total_params"]:,}'
        assert active == f'{counts["active_params"]:,}'


def test_changed_options_of_a_preset_rebuild_it(page):
    changed = sections(page)['Presets'].partition('Options that')[2]
    for preset, (_, cells) in rows(changed).items():
        settings = [f'--{setting}' for setting in re.findall(r'`(.*?)`', cells)]
        line = read_command_line(['--arch_preset=custom', *settings], schema)
        rebuilt = ModelArchitectureConfig.resolve(line.layers, line.problems)
        assert line.problems == []
        config = ModelArchitectureConfig(arch_preset=preset)
        assert rebuilt.layers == config.layers and rebuilt.hash == config.hash, preset
        own = [{**c.to_dict(), 'layer_kinds': None} for c in (rebuilt, config)]
        assert own[0] == own[1], preset


def test_page_lists_the_options_of_the_whole_model(page):
    """A kind of layers may have all options but those."""
    paragraph = next(line for line in page.splitlines() if line.startswith('Layers may differ'))
    of_model, short_forms = (re.findall(r'`(\w+)`', part) for part in paragraph.split('. ')[1:3])
    for key in architecture_options():
        refused = refused_in_kind(key, None)
        assert (key in of_model) == (refused is not None and 'the whole model' in refused)
        assert (key in short_forms) == (refused is not None and 'short form' in refused)


def test_page_lists_options_that_belong_to_no_component(page):
    others = [k for k, option in CORE_OPTIONS.items() if not isinstance(option.choices, Registry)]
    assert list(rows(sections(page)['Other options'])) == others


def test_tables_and_links_of_the_page_are_well_formed(page):
    for table in re.findall(r'(?:^\|.*\n)+', page + '\n', re.MULTILINE):
        widths = {len(re.split(r'(?<!\\)\|', line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    headings = {title.lower().replace(' ', '-') for title in re.findall('^#+ (.*)', page, re.M)}
    links = re.findall(r'\]\(#(.*?)\)', page)
    assert len(links) > 15 and set(links) <= headings
    assert '``' not in page and page == page.strip()


def test_page_has_components_of_a_config_file(run_script, tmp_path):
    config = tmp_path / 'c.py'
    config.write_text(
        'import torch\n'
        'from model_components import ACTIVATION_REGISTRY, Activation, Option\n'
        "@ACTIVATION_REGISTRY.register('halved', source='A | B')\n"
        'class Halved(Activation):\n'
        '    """x / 2 | x."""\n'
        "    options = {'halved_by': Option(float, 2.0, 'Divisor')}\n"
        '    def forward(self, x):\n'
        '        return x / 2\n'
    )
    output = run_script('train.py', str(config), '--list_components', '--format', 'markdown').stdout
    section = sections(output)['Activation']
    assert rows(section)['halved'][1:] == [r'x / 2 \| x.', '', r'A \| B']
    assert rows(section)['halved_by'][1:] == ['float', '`2.0`', '`halved`', 'Divisor']


@pytest.mark.parametrize(
    ('argument', 'problem'),
    [
        ('--format=html', "format='html': format takes one of 'text', 'markdown'."),
        ('--format', "--format needs a value: one of 'text', 'markdown'."),
    ],
)
def test_wrong_format_is_a_user_error(run_script, argument, problem):
    result = run_script('train.py', '--list_components', argument, code=2)
    assert result.stderr == f'train.py: {problem}\n' and result.stdout == ''


def test_text_is_the_default_format(run_script):
    output = run_script('train.py', '--list_components').stdout
    assert output == run_script('train.py', '--list_components', '--format=text').stdout
    assert not output.startswith('#') and 'Normalization (--qk_norm' in output
    assert list_components('text').startswith('Optimizer (--optimizer):')
