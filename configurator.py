"""Merge defaults < preset < config file < `--key=value`, typed and strict; explain; `--help`.

Knows nothing of models or training: it is handed a schema, which is a dict of groups,
`{'Group title': {key: Option}}`, as a function, since a config file may register components
whose options join the schema.
"""

import ast
import inspect
import os
import shutil
import textwrap
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common import old_imports
from common.errors import UserError, closest, nearest
from common.paths import expanded_path
from common.registry import Option, Registry
from common.text_files import decode

Schema = dict[str, dict[str, Option]]

COMMAND_LINE = 'command line'


@dataclass(frozen=True)
class Layer:
    """Values from one place: a preset, a config file, the command line. Later layers win."""

    origin: str
    values: dict


@dataclass
class CommandLine:
    """What was asked for: the layers in rising order, the files' texts, and the problems so far."""

    layers: list[Layer]
    config_files: list[dict] = field(default_factory=list)  # {'path', 'text'}
    problems: list[str] = field(default_factory=list)
    aside: dict = field(default_factory=dict)  # what files set under keys that are another script's
    help: bool = False
    print_config: bool = False
    list_components: bool = False

    def value(self, key: str, schema: Callable[[], Schema]):
        """What `key` is as asked for so far, or its default."""
        for layer in reversed(self.layers):
            if key in layer.values:
                return layer.values[key]
        return flatten(schema())[key].default


def read_command_line(
    argv: list[str], schema: Callable[[], Schema], aside: Iterable[str] = ()
) -> CommandLine:
    """Read config files (arguments that end in .py) and `--key=value` options.

    Also `--key value`, `--flag` and `--no-flag`. Problems are collected, not raised, so that the
    caller can add its own and report all of them at once; but UserError is raised for a file that
    cannot be read or run. Keys of `aside` are put aside, unread.
    """
    asked = CommandLine(layers=[])
    for path in filter(_is_config_file, argv):
        values, text = read_config_file(path, asked.problems)
        asked.config_files.append({'path': path, 'text': text})
        asked.aside |= {key: values.pop(key) for key in aside if key in values}
        asked.layers.append(Layer(path, values))
    if asked.problems:  # what a file would have registered is unknown: the rest cannot be judged
        raise UserError(*asked.problems)
    found = schema()  # after the files, which may have registered components
    asked.layers = [accept_layer(layer, found, asked.problems) for layer in asked.layers]
    asked.layers.append(Layer(COMMAND_LINE, _parse_options(argv, flatten(found), asked)))
    return asked


def flatten(schema: Schema) -> dict[str, Option]:
    return {key: option for group in schema.values() for key, option in group.items()}


def _is_config_file(argument: str) -> bool:
    return argument.endswith('.py') and not argument.startswith('-')


def _parse_options(argv: list[str], options: dict[str, Option], asked: CommandLine) -> dict:
    values = {}
    arguments = [argument for argument in argv if not _is_config_file(argument)]
    while arguments:
        argument = arguments.pop(0)
        if argument in ('--help', '-h'):
            asked.help = True
            continue
        if argument in ('--print_config', '--print-config'):
            asked.print_config = True
            continue
        if argument in ('--list_components', '--list-components'):
            asked.list_components = True
            continue
        if not argument.startswith('--'):
            known = [f'--{key}' for key in options]
            known += [f'{argument}.py'] if os.path.isfile(f'{argument}.py') else []
            name, equals, text = argument.partition('=')
            asked.problems.append(
                f'{argument!r} is neither an option (--key=value) nor a config file (*.py).'
                f'{nearest(name, known)}'
            )
            continue
        key, equals, text = argument[2:].partition('=')
        key = key.replace('-', '_')
        negated = key[3:] if key.startswith('no_') and key not in options else None
        option = options.get(negated or key)
        try:
            if option is None:
                raise UserError(f'unknown option --{key}.{nearest(key, options)} See --help.')
            if negated:
                if equals or option.base_type is not bool:
                    raise UserError(
                        f'{argument}: --no-KEY takes no value and is for flags only; {negated} '
                        f'takes {option.allowed()}.'
                    )
                values[negated] = False
            elif equals:
                values[key] = option.parse(key, text)
            elif option.base_type is bool and not (arguments and _is_boolean(arguments[0])):
                values[key] = True
            elif arguments and not arguments[0].startswith('--'):
                values[key] = option.parse(key, arguments.pop(0))
            else:
                raise UserError(f'--{key} needs a value: {option.allowed()}.')
        except UserError as error:
            asked.problems.extend(error.problems)
    return values


def _is_boolean(text: str) -> bool:
    return text.lower() in ('true', 'false')


def accept_layer(layer: Layer, schema: Schema, problems: list[str]) -> Layer:
    """The layer with the values that the schema allows; the others become problems."""
    options, accepted = flatten(schema), {}
    for key, value in layer.values.items():
        if key not in options:
            problems.append(f'{layer.origin}: unknown option {key!r}.{nearest(key, options)}')
            continue
        try:
            accepted[key] = options[key].accept(key, value)
        except UserError as error:
            problems.extend(f'{layer.origin}: {problem}' for problem in error.problems)
    return Layer(layer.origin, accepted)


class Merged(NamedTuple):
    """Values and origins of every option that the choices give a use; what was dropped, and why."""

    values: dict
    origins: dict[str, str]
    dropped: list[str]


def merge(
    core: dict[str, Option], layers: list[Layer], problems: list[str], preset: str | None = None
) -> Merged:
    """Merge accepted values of rising precedence; keys of others are passed over.

    core: the options themselves, without those of the components that they choose among. preset:
    the option that names the first layer, so that what this layer or a default chose counts as
    chosen where the preset was named. A value may be a function of the merged values. An option
    that nothing chosen has a use for is dropped if it stands beneath the choice; else it is added
    to `problems`.
    """
    options = with_component_options(core)
    values = {key: option.default for key, option in options.items()}
    level = dict.fromkeys(options, 0)
    origins = dict.fromkeys(options, 'default')
    for number, layer in enumerate(layers, start=1):
        for key, value, origin in _spelt_out(layer, options, problems):
            values[key], level[key], origins[key] = value, number, origin
    for key, value in list(values.items()):
        if callable(value):
            values[key] = value(values)

    used = dict.fromkeys(_used(core, values))  # an ordered set
    named_at, beneath = (level[preset], 1) if preset else (0, 0)
    dropped = []
    for key in options:
        if key in used or level[key] == 0:
            continue
        belongs = ' or '.join(f'{choice}={name!r}' for choice, name in owners(key, options))
        deciding = dict.fromkeys(_deciding_choices(key, options, used))
        chosen = ', '.join(f'{c}={values[c]!r} ({origins[c]})' for c in deciding)
        chosen_at = max(level[c] if level[c] > beneath else named_at for c in deciding)
        what = f'{key}={values[key]!r} ({origins[key]})'
        if level[key] >= chosen_at:
            problems.append(
                f'{what} has no use here: it belongs to {belongs}, but {chosen} is '
                f'chosen. Choose one of those, or leave {key} out.'
            )
        else:
            dropped.append(f'dropped: {what}, of no use with {chosen}')
    kept = {key: values[key] for key in used}
    return Merged(kept, {key: origins[key] for key in used}, dropped)


def _spelt_out(
    layer: Layer, options: dict[str, Option], problems: list[str]
) -> Iterator[tuple[str, object, str]]:
    """Key, value and origin of the layer's options; an alias as the option that it stands for."""
    for key, value in layer.values.items():
        if key not in options:
            continue
        if value not in options[key].aliases:
            yield key, value, layer.origin
            continue
        meant_key, meant = options[key].aliases[value]
        if layer.values.get(meant_key, meant) != meant:
            problems.append(
                f'{key}={value!r} ({layer.origin}) is another way to say {meant_key}={meant!r}, '
                f'but {meant_key}={layer.values[meant_key]!r} stands beside it. Leave one out.'
            )
        yield meant_key, meant, f'{layer.origin}: {key}={value!r}'


def with_component_options(core: dict[str, Option]) -> dict[str, Option]:
    """The options, each followed by those of the components that it chooses among.

    An option that several components share is listed once; they must mean the same by it.
    """
    options: dict[str, Option] = {}

    def add(key: str, option: Option, owner: str) -> None:
        if key in options:
            if options[key] != option:
                raise UserError(f'{owner}: the option {key!r} exists already with another meaning.')
            return
        options[key] = option
        if isinstance(option.choices, Registry):
            for name in option.choices:
                for own_key, own in option.choices[name].options.items():
                    add(own_key, own, f'{option.choices.option}={name!r}')

    for key, option in core.items():
        add(key, option, 'the core options')
    return options


def chosen_components(core: dict[str, Option], values: dict) -> Iterator[tuple[str, type]]:
    """The option and the class of each component that resolved values choose."""
    for key, option in with_component_options(core).items():
        if key in values and isinstance(option.choices, Registry):
            yield key, option.choices[values[key]]


def _used(core: dict[str, Option], values: dict) -> Iterator[str]:
    """Keys that the choices give a use: the core, and what each chosen component adds."""
    queue = list(core.items())
    seen = set()
    while queue:
        key, option = queue.pop(0)
        if key in seen or not option.is_active(values):
            continue
        seen.add(key)
        yield key
        if isinstance(option.choices, Registry):
            queue[:0] = option.choices[values[key]].options.items()


def owners(key: str, options: dict[str, Option]) -> list[tuple[str, object]]:
    """The (option, value) pairs that give `key` a use."""
    if options[key].requires and options[key].requires[0] in options:
        return [options[key].requires]
    return [
        (choice, name)
        for choice, option in options.items()
        if isinstance(option.choices, Registry)
        for name in option.choices
        if key in option.choices[name].options
    ]


def _deciding_choices(key: str, options: dict[str, Option], used: dict) -> Iterator[str]:
    """The choices, themselves in use, that give `key` no use."""
    for choice, _ in owners(key, options):
        if choice in used:
            yield choice
        else:
            yield from _deciding_choices(choice, options, used)


def read_config_file(path: str, problems: list[str]) -> tuple[dict, str]:
    """Run a Python config file; return the options that it sets, and its text.

    Imports, functions, classes and names that start with `_` are the file's own.
    """
    try:
        file = expanded_path(path)
        if file.is_dir():
            problems.append(f'config file {path} is a folder: give a Python file in it.')
            return {}, ''
        if not file.is_file():
            problems.append(f'config file {path} does not exist.{_instead(path, file.parent)}')
            return {}, ''
        text = decode(file.read_bytes())
        tree = ast.parse(text, filename=path)
    except SyntaxError as error:
        where = f', line {error.lineno}' if error.lineno else ''
        problems.append(f'config file {path}{where}: {error.msg}.')
        return {}, ''
    except (OSError, ValueError, MemoryError, RecursionError) as error:  # the latter: nested deeply
        problems.append(f'config file {path} cannot be read: {error or type(error).__name__}.')
        return {}, ''
    # `__name__` makes a component of this file recognisable when the file is read again.
    namespace = {'__name__': f'config:{file.resolve()}', '__file__': str(file.resolve())}
    old_imports.allow()
    try:
        exec(compile(tree, path, 'exec'), namespace)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: a config file must not end the program
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f', line {lines[-1]}' if lines else ''
        problems.append(f'config file {path}{where}: {_message(error)}')
        return {}, text
    imported, assigned = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported |= {alias.asname or alias.name.partition('.')[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assigned.add(node.id)
    own = (types.ModuleType, types.FunctionType, type)
    values = {
        key: value
        for key, value in namespace.items()
        if not key.startswith('_') and key not in imported - assigned and not isinstance(value, own)
    }
    return values, text


def _message(error: BaseException) -> str:
    """What the error says of itself; the class may be the file's own, and fail at that."""
    kind = type(error).__name__
    try:
        return str(error) if isinstance(error, UserError) else f'{kind}: {error}'
    except Exception:
        return kind


def _instead(path: str, folder: Path) -> str:
    """Which config file may be meant, or which there are."""
    beside = sorted(file.name for file in folder.glob('*.py')) if folder.is_dir() else []
    meant = closest(Path(path).name, beside)
    if meant is not None:
        return f' Did you mean {folder / meant}?'
    return f' In {folder} there are: {", ".join(beside)}.' if beside else ''


def format_help(usage: str, schema: Schema) -> str:
    """Every option by group: key, type, default, what is allowed, help."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    lines = [usage.strip(), '']
    for title, options in schema.items():
        if not options:
            continue
        lines.append(f'{title}:')
        for key, option in options.items():
            default = '' if option.default is None else f' (default {option.default})'
            about = f'{option.help}{default}'
            if option.choices is not None:
                about += f' [{" | ".join(option.choices)}]'
            head = f'  --{key}={option.type_name().replace(" or None", "?")}'
            lines += textwrap.wrap(
                about,
                width=width,
                initial_indent=f'{head:<36}' if len(head) < 35 else f'{head}  ',
                subsequent_indent=' ' * 36,
            )
        lines.append('')
    lines += textwrap.wrap(
        'A type that ends in ? also takes None: derived, or off. --flag and --no-flag set a bool. '
        'A file sets the same keys as Python assignments.',
        width=width,
        break_on_hyphens=False,
    )
    return '\n'.join(lines)


def format_components(schema: Schema) -> str:
    """Every component that an option of the schema may choose: name, tag, what it is, its source
    and its options, by registry."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    chosen_by: dict[Registry, list[str]] = {}
    for key, option in flatten(schema).items():
        if isinstance(option.choices, Registry):
            chosen_by.setdefault(option.choices, []).append(f'--{key}')
    lines = []
    for registry, flags in chosen_by.items():
        lines += [f'{registry.title} ({", ".join(flags)}):', '']
        for name in registry:
            component = registry[name]
            tag = '' if component.tag == name else component.tag
            about = ' '.join((inspect.getdoc(component) or '').partition('\n\n')[0].split())
            details = [about, registry.source(name) and f'Source: {registry.source(name)}.']
            if component.options:
                details.append(f'Options: {", ".join(component.options)}.')
            lines += textwrap.wrap(
                ' '.join(filter(None, details)),
                width=width,
                initial_indent=f'  {name:<17} {tag and f"[{tag}]":<16} ',
                subsequent_indent=' ' * 37,
                break_on_hyphens=False,
            )
        lines.append('')
    return '\n'.join(lines).rstrip()


def format_config(groups: dict[str, dict], origins: dict[str, str], notes: list[str]) -> str:
    """Each resolved value and where it came from, by group; then what was left out, and why."""
    lines = []
    for title, values in groups.items():
        lines.append(f'# {title}')
        for key, value in values.items():
            assignment = f'{key} = {value!r}'
            lines.append(f'{assignment:<48}  # {origins[key]}')
        lines.append('')
    return '\n'.join(lines + [f'# {note}' for note in notes]).rstrip()
