"""`--list_components`: all components with their sources, as text or as a page in Markdown.

The page also has every option of the components, the presets with their parameter counts, and the
remaining options of the architecture. All of it derives from the registries and the presets:

    python train.py --list_components --format=markdown > docs/architectures.md

A test that compares a saved page with this one must run the command, not call `component_page()`:
in the process of the tests, the registries may also hold components of other tests.
"""

from collections.abc import Iterable, Iterator

from common.architecture_options import architecture_options, layer_options
from common.architecture_presets import PRESET_DESCRIPTIONS, PRESETS
from common.conditions import AnyBut, named_value
from common.formatting import markdown_anchor, markdown_table
from common.help_layout import first_paragraph
from common.registry import Option, Registry
from configurator import flatten, format_components
from model_builder import build_model, count_parameters
from model_config import (
    CORE_OPTIONS,
    PRESET_OPTION,
    REGISTRIES,
    ModelArchitectureConfig,
)
from model_config import schema as architecture_schema
from training_config import run_schema, schema

VOCAB_SIZE = 50304  # of the parameter counts: GPT-2's tokens, padded to a multiple of 64


def list_components(form: str) -> str:
    """The list in the given form, one of `configurator.LIST_FORMATS`."""
    return component_page() if form == 'markdown' else format_components(schema())


def component_page() -> str:
    """The page in Markdown, without a line feed at its end."""
    options = flatten({**architecture_schema(), **run_schema()})
    used_by: dict[Registry, list[str]] = {}  # registry -> the options whose choices it holds
    for key, option in options.items():
        if isinstance(option.choices, Registry):
            used_by.setdefault(option.choices, []).append(key)
    ordered = [registry for registry in REGISTRIES if registry in used_by]
    ordered += [registry for registry in used_by if registry not in ordered]
    supersets = {registry: _superset(registry, ordered) for registry in ordered}
    position = {registry: index for index, registry in enumerate(ordered)}
    ordered.sort(key=lambda registry: position[supersets[registry] or registry])  # subsets behind

    titles = ['Presets', *(registry.title for registry in ordered), 'Other options']
    lines = [
        '# Components and presets',
        '',
        'An architecture is a choice of one component of each kind. Set the options below on the '
        'command line (`--normalization=rmsnorm`) or in a config file '
        "(`normalization = 'rmsnorm'`). This page is the output of "
        '`python train.py --list_components --format=markdown`.',
        '',
        _layers(),
        '',
        *(f'- {_link(title)}' for title in titles),
        '',
    ]
    lines += _presets()
    for registry in ordered:
        superset = supersets[registry]
        lines += _head(registry, used_by[registry], options)
        lines += _reference(registry, superset) if superset else _components(registry)
    return '\n'.join([*lines, *_other_options()]).rstrip()


def _layers() -> str:
    """The options in which layers may not differ."""
    options = architecture_options()
    short_forms = [key for key, option in options.items() if option.scope == 'pattern']
    of_model = [key for key in options if key not in [*layer_options(), *short_forms]]
    names_of_model, names_of_forms = (
        ', '.join(f'`{key}`' for key in keys) for keys in (of_model, short_forms)
    )
    return (
        'Layers may differ, by `layer_pattern` and `layer_kinds` ([Layers](layers.md)). These '
        f'options are those of the whole model: {names_of_model}. Short forms of a layer pattern '
        f'are {names_of_forms}. All other options of the architecture may differ from layer to '
        'layer.'
    )


def _head(registry: Registry, keys: list[str], options: dict[str, Option]) -> Iterator[str]:
    """The heading of a kind of component, and the options that choose one."""
    yield f'## {registry.title}'
    yield ''
    flags = (f'`--{key}` (default {_code(options[key].default)})' for key in keys)
    yield f'Set by {", ".join(flags)}.'
    yield ''


def _reference(registry: Registry, superset: Registry) -> Iterator[str]:
    """The names of components that another section describes."""
    names = ', '.join(f'`{name}`' for name in registry)
    yield f'Choices: {names}. See {_link(superset.title)}.'
    yield ''


def _components(registry: Registry) -> Iterator[str]:
    """The components of one kind, and their options."""
    yield from _table(
        ('Name', 'Description', 'In run names', 'Source'),
        (
            (
                f'`{name}`',
                first_paragraph(registry[name]),
                f'`{registry[name].tag}`' if registry[name].tag not in ('', name) else '',
                registry.source(name),
            )
            for name in registry
        ),
    )
    options = {key: option for name in registry for key, option in registry[name].options.items()}
    if options:
        yield 'Options of these components:'
        yield ''
        yield from _table(
            ('Option', 'Values', 'Default', 'Components', 'Description'),
            (
                (*_option_cells(key, option)[:3], _owners(key, registry), _description(option))
                for key, option in options.items()
            ),
        )


def _superset(registry: Registry, registries: list[Registry]) -> Registry | None:
    """A registry that has all components of `registry`, and more."""
    components = {registry[name] for name in registry}
    for other in registries:
        if components < {other[name] for name in other}:
            return other
    return None


def _owners(key: str, registry: Registry) -> str:
    """The components of a registry that have the option."""
    names = [name for name in registry if key in registry[name].options]
    return 'all' if names == list(registry) else ', '.join(f'`{name}`' for name in names)


def _other_options() -> Iterator[str]:
    yield '## Other options'
    yield ''
    yield 'Options of the architecture that belong to no component:'
    yield ''
    yield from _table(
        ('Option', 'Values', 'Default', 'Description'),
        (
            _option_cells(key, option)
            for key, option in CORE_OPTIONS.items()
            if not isinstance(option.choices, Registry)
        ),
    )


def _option_cells(key: str, option: Option) -> tuple[str, str, str, str]:
    return f'`{key}`', _values(option), _code(option.default), _description(option)


def _values(option: Option) -> str:
    """What the option may be set to."""
    if isinstance(option.choices, Registry):
        return _link(option.choices.title)
    if option.choices is not None and not option.about:
        return ', '.join(_code(name) for name in option.choices) + ' or None' * option.optional
    return option.allowed()


def _description(option: Option) -> str:
    if option.requires is None:
        return option.help
    key, value = option.requires
    condition = f'`{key}{"≠" if isinstance(value, AnyBut) else "="}{named_value(value)}`'
    return f'{option.help} (with {condition})'


# --------------------------------------------------------------------------------------------------
# Presets


def _presets() -> Iterator[str]:
    sizes = ModelArchitectureConfig(vocab_size=VOCAB_SIZE)
    yield '## Presets'
    yield ''
    yield (
        f'`--arch_preset=NAME` (default {_code(PRESET_OPTION.default)}) sets several options at '
        f'once. Single options override it: `--arch_preset=llama --norm_position=post`. Parameters '
        f'are those of {sizes.n_layer} layers, {sizes.n_head} heads, n_embd={sizes.n_embd}, '
        f'block_size={sizes.block_size} and a vocabulary of {VOCAB_SIZE:,} tokens; active ones are '
        f'used for each token.'
    )
    yield ''
    configs = {
        name: ModelArchitectureConfig(arch_preset=name, vocab_size=VOCAB_SIZE) for name in PRESETS
    }
    yield from _table(
        ('Preset', 'Description', 'Parameters', 'Active'), map(_preset_cells, configs.values())
    )
    yield 'Options that each preset sets to something else than the default, at these sizes:'
    yield ''
    yield from _table(
        ('Preset', 'Options'), ((f'`{name}`', _changes(config)) for name, config in configs.items())
    )


def _preset_cells(config: ModelArchitectureConfig) -> tuple[str, str, str, str]:
    counts = count_parameters(build_model(config))
    return (
        f'`{config.preset}`',
        PRESET_DESCRIPTIONS[config.preset],
        f'{counts["total_params"]:,}',
        f'{counts["active_params"]:,}',
    )


def _changes(config: ModelArchitectureConfig) -> str:
    """The options that the preset sets to something else than their defaults."""
    (options,) = architecture_schema().values()
    values = config.to_dict()
    changed = {key: values[key] for key in PRESETS[config.preset] if key in values}
    kinds = changed.pop('layer_kinds', {})
    shown = [f'`{key}={value}`' for key, value in changed.items() if value != options[key].default]
    shown += [
        f'`layer_kinds.{letter}.{key}={value}`'
        for letter, own in kinds.items()
        for key, value in own.items()
    ]
    return ', '.join(shown) or '–'


# --------------------------------------------------------------------------------------------------
# Markdown


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """The lines of a table, an empty one included."""
    yield from markdown_table(head, ([_cell(text) for text in row] for row in rows))
    yield ''


def _cell(text: str) -> str:
    return ' '.join(text.replace('|', '\\|').split())


def _code(value: object) -> str:
    return f'`{value}`' if str(value).strip() else f'`{value!r}`'


def _link(title: str) -> str:
    """A link to the section of that title."""
    return f'[{title}](#{markdown_anchor(title)})'
