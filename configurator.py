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
from typing import Any, NamedTuple

from common import old_imports
from common.errors import UserError, closest_match, did_you_mean
from common.paths import expanded_path
from common.registry import Option, Registry
from common.text_files import decode

Schema = dict[str, dict[str, Option]]

# Origins of the layers above all config files.
CALLER_ORIGINS = COMMAND_LINE, PYTHON_CALL = 'command line', 'train()'
# Arguments that ask for something to be shown -> the field of `CommandLine` that says so.
SHOW_FLAGS = {
    **dict.fromkeys(('--help', '-h'), 'help'),
    **dict.fromkeys(('--print_config', '--print-config'), 'print_config'),
    **dict.fromkeys(('--list_components', '--list-components'), 'list_components'),
}
LIST_FORMATS = ('text', 'markdown')
LIST_OPTIONS = {'format': Option(str, 'text', 'Format of --list_components', choices=LIST_FORMATS)}


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
    extra: dict = field(default_factory=dict)  # what files set under keys that are another script's
    help: bool = False
    print_config: bool = False
    list_components: bool = False
    list_format: str = 'text'  # one of LIST_FORMATS

    def value(self, key: str, schema: Callable[[], Schema]):
        """What `key` is as asked for so far, or its default."""
        for layer in reversed(self.layers):
            if key in layer.values:
                return layer.values[key]
        return flatten(schema())[key].default


def read_command_line(
    argv: list[str], schema: Callable[[], Schema], extra: Iterable[str] = ()
) -> CommandLine:
    """Read config files (arguments that end in .py) and `--key=value` options.

    Also `--key value`, `--flag` and `--no-flag`. Problems are collected, not raised, so that the
    caller can add its own and report all of them at once; but UserError is raised for a file that
    cannot be read or run. Keys of `extra` are kept apart, unread.
    """
    command_line = CommandLine(layers=[])
    for path in filter(_is_config_file, argv):
        values, text = read_config_file(path, command_line.problems)
        command_line.config_files.append({'path': path, 'text': text})
        command_line.extra |= {key: values.pop(key) for key in extra if key in values}
        command_line.layers.append(Layer(path, values))
    if command_line.problems:  # what a file would have registered is unknown: judge no further
        raise UserError(*command_line.problems)
    groups = schema()  # after the files, which may have registered components
    command_line.layers = [
        validate_layer(layer, groups, command_line.problems) for layer in command_line.layers
    ]
    arguments = [argument for argument in argv if not _is_config_file(argument)]
    values = _parse_arguments(arguments, flatten(groups), command_line)
    command_line.layers.append(Layer(COMMAND_LINE, values))
    return command_line


def flatten(schema: Schema) -> dict[str, Option]:
    return {key: option for group in schema.values() for key, option in group.items()}


def _is_config_file(argument: str) -> bool:
    return argument.endswith('.py') and not argument.startswith('-')


def _parse_arguments(
    arguments: list[str], options: dict[str, Option], command_line: CommandLine
) -> dict:
    """The values of the options; what they ask to be shown and what is wrong is noted."""
    values: dict = {}
    lists = any(SHOW_FLAGS.get(argument) == 'list_components' for argument in arguments)
    options = {**options, **LIST_OPTIONS} if lists else options
    while arguments:
        argument = arguments.pop(0)
        if argument in SHOW_FLAGS:
            setattr(command_line, SHOW_FLAGS[argument], True)
        elif argument.startswith('--'):
            try:
                key, value = _parse_option(argument, arguments, options)
                values[key] = value
            except UserError as error:
                command_line.problems.extend(error.problems)
        else:
            command_line.problems.append(_stray_argument_problem(argument, options))
    if lists:
        command_line.list_format = values.pop('format', command_line.list_format)
    return values


def _parse_option(
    argument: str, following: list[str], options: dict[str, Option]
) -> tuple[str, Any]:
    """Key and value of an option, which may take its value from the arguments that follow it.

    Raises UserError.
    """
    key, equals, text = argument[2:].partition('=')
    key = key.replace('-', '_')
    # --no-flag
    if key.startswith('no_') and key not in options and key[3:] in options:
        flag, option = key[3:], options[key[3:]]
        if equals or option.base_type is not bool:
            raise UserError(
                f'{argument}: --no-KEY takes no value and is for flags only; {flag} '
                f'takes {option.allowed()}.'
            )
        return flag, False
    if key not in options:
        raise UserError(f'unknown option --{key}.{did_you_mean(key, options)} See --help.')
    option = options[key]
    # --key=value
    if equals:
        return key, option.parse(key, text)
    # --flag, which takes the next argument only if that is true or false
    if option.base_type is bool and not (following and _is_boolean(following[0])):
        return key, True
    # --key value
    if following and not following[0].startswith('--'):
        return key, option.parse(key, following.pop(0))
    raise UserError(f'--{key} needs a value: {option.allowed()}.')


def _stray_argument_problem(argument: str, options: dict[str, Option]) -> str:
    """What to say of an argument that is neither: dashes are missing, or a file's `.py`."""
    known = [f'--{key}' for key in options]
    known += [f'{argument}.py'] if os.path.isfile(f'{argument}.py') else []
    hint = did_you_mean(argument.partition('=')[0], known)
    return f'{argument!r} is neither an option (--key=value) nor a config file (*.py).{hint}'


def _is_boolean(text: str) -> bool:
    return text.lower() in ('true', 'false')


def validate_layer(layer: Layer, schema: Schema, problems: list[str]) -> Layer:
    """The layer with the values that the schema allows; the others become problems."""
    options, accepted = flatten(schema), {}
    for key, value in layer.values.items():
        if key not in options:
            problems.append(f'{layer.origin}: unknown option {key!r}.{did_you_mean(key, options)}')
            continue
        try:
            accepted[key] = options[key].accept(key, value)
        except UserError as error:
            problems.extend(f'{layer.origin}: {problem}' for problem in error.problems)
    return Layer(layer.origin, accepted)


class MergedOptions(NamedTuple):
    """Values and origins of every option that the choices give a use; what was dropped, and why."""

    values: dict
    origins: dict[str, str]
    dropped: list[str]


def merge(
    core: dict[str, Option], layers: list[Layer], problems: list[str], preset: str | None = None
) -> MergedOptions:
    """Merge accepted values of rising precedence; keys of others are passed over.

    core: the options themselves, without those of the components that they choose among. preset:
    the option that names the first layer, so that what this layer or a default chose counts as
    chosen where the preset was named. A value may be a function of the merged values. An option
    that nothing chosen has a use for is dropped if it stands below the choice; else it is added
    to `problems`.
    """
    options = with_component_options(core)
    # 1. Each option as the highest layer that has it says, or its default.
    merged = _overlay(options, layers, problems)
    # 2. Values that are functions of the others.
    for key, value in list(merged.values.items()):
        if callable(value):
            merged.values[key] = value(merged.values)
    # 3. The options that what is chosen has a use for.
    active = dict.fromkeys(_active_keys(core, merged.values))  # an ordered set
    # 4. Those set without a use. Below the choice that took it away they are left over from what
    #    the choice overrides; beside or above it they are a mistake.
    dropped = []
    for key in options:
        if key in active or merged.level[key] == 0:
            continue
        deciding = dict.fromkeys(_deciding_choices(key, options, active))
        chosen = ', '.join(map(merged.describe, deciding))
        if merged.level[key] < merged.level_chosen_at(deciding, preset):
            dropped.append(f'dropped: {merged.describe(key)}, of no use with {chosen}')
        else:
            belongs = ' or '.join(f'{choice}={name!r}' for choice, name in owners(key, options))
            problems.append(
                f'{merged.describe(key)} has no use here: it belongs to {belongs}, but {chosen} is '
                f'chosen. Choose one of those, or leave {key} out.'
            )
    return MergedOptions(
        {key: merged.values[key] for key in active},
        {key: merged.origins[key] for key in active},
        dropped,
    )


class _Overlay(NamedTuple):
    """By key: the value, the number of the layer that set it (0: none did), and its origin."""

    values: dict
    level: dict[str, int]
    origins: dict[str, str]

    def describe(self, key: str) -> str:
        return f'{key}={self.values[key]!r} ({self.origins[key]})'

    def level_chosen_at(self, choices: Iterable[str], preset: str | None) -> int:
        """The highest level of the choices; those of the preset's layer, the first, and of the
        defaults are made where the preset is named."""
        named_at, preset_level = (self.level[preset], 1) if preset else (0, 0)
        return max(
            self.level[key] if self.level[key] > preset_level else named_at for key in choices
        )


def _overlay(options: dict[str, Option], layers: list[Layer], problems: list[str]) -> _Overlay:
    """The defaults, and over them each layer in its turn."""
    merged = _Overlay(
        {key: option.default for key, option in options.items()},
        dict.fromkeys(options, 0),
        dict.fromkeys(options, 'default'),
    )
    for number, layer in enumerate(layers, start=1):
        for key, value, origin in _resolve_aliases(layer, options, problems):
            merged.values[key], merged.level[key], merged.origins[key] = value, number, origin
    return merged


def _resolve_aliases(
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
                for component_key, component_option in option.choices[name].options.items():
                    add(component_key, component_option, f'{option.choices.option}={name!r}')

    for key, option in core.items():
        add(key, option, 'the core options')
    return options


def chosen_components(core: dict[str, Option], values: dict) -> Iterator[tuple[str, type]]:
    """The option and the class of each component that resolved values choose."""
    for key, option in with_component_options(core).items():
        if key in values and isinstance(option.choices, Registry):
            yield key, option.choices[values[key]]


def _active_keys(core: dict[str, Option], values: dict) -> Iterator[str]:
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
    required = options[key].requires
    if required and required[0] in options:
        return [required]
    return [
        (choice, name)
        for choice, option in options.items()
        if isinstance(option.choices, Registry)
        for name in option.choices
        if key in option.choices[name].options
    ]


def _deciding_choices(key: str, options: dict[str, Option], active: dict) -> Iterator[str]:
    """The choices, themselves in use, that give `key` no use."""
    for choice, _ in owners(key, options):
        if choice in active:
            yield choice
        else:
            yield from _deciding_choices(choice, options, active)


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
            problems.append(f'config file {path} does not exist.{_suggest_file(path, file.parent)}')
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
    # `__name__` makes a component of this file recognizable when the file is read again.
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
    local_kinds = (types.ModuleType, types.FunctionType, type)
    values = {
        key: value
        for key, value in namespace.items()
        if not key.startswith('_')
        and key not in imported - assigned
        and not isinstance(value, local_kinds)
    }
    return values, text


def _message(error: BaseException) -> str:
    """What the error says of itself; the class may be the file's own, and fail at that."""
    kind = type(error).__name__
    try:
        return str(error) if isinstance(error, UserError) else f'{kind}: {error}'
    except Exception:
        return kind


def _suggest_file(path: str, folder: Path) -> str:
    """Which config file may be meant, or which there are."""
    beside = sorted(file.name for file in folder.glob('*.py')) if folder.is_dir() else []
    meant = closest_match(Path(path).name, beside)
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
