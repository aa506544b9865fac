"""Read config files and the command line; merge defaults < preset < config file < `--key=value`.

Values are typed and checked. The module is independent of models and training: it takes a schema, a
dict of groups `{'Group title': {key: Option}}`. The schema is passed as a function because a config
file may register components, whose options then belong to the schema.
"""

import ast
import os
import traceback
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from common import old_imports
from common.dict_option import DictOption
from common.errors import UserError, closest_match, did_you_mean
from common.formatting import commented
from common.help_layout import entry, first_paragraph
from common.option_merge import COMMAND_LINE, Layer
from common.paths import expanded_path
from common.registry import Option, Registry
from common.text_files import decode

Schema = dict[str, dict[str, Option]]

PYTHON_CALL = 'train()'
# Origins of the layers above all config files.
CALLER_ORIGINS = COMMAND_LINE, PYTHON_CALL
HELP_FLAGS = ('--help', '-h')
# Arguments that show a text instead of starting a run -> the field of `CommandLine` that they set.
SHOW_FLAGS = {
    **dict.fromkeys(('--print_config', '--print-config'), 'print_config'),
    **dict.fromkeys(('--list_components', '--list-components'), 'list_components'),
}
LIST_FORMATS = ('text', 'markdown')
LIST_OPTIONS = {'format': Option(str, 'text', 'Format of --list_components', choices=LIST_FORMATS)}


@dataclass
class CommandLine:
    """A parsed command line: layers in order of precedence, texts of config files, problems."""

    layers: list[Layer]
    config_files: list[dict] = field(default_factory=list)  # {'path', 'text'}
    problems: list[str] = field(default_factory=list)
    extra: dict = field(default_factory=dict)  # values of config files for another command's keys
    help: str | None = None  # topic of --help; '' for the overview, None without --help
    print_config: bool = False
    list_components: bool = False
    list_format: str = 'text'  # one of LIST_FORMATS

    def value(self, key: str, schema: Callable[[], Schema]):
        """The value of `key` in the highest layer that sets it, or its default."""
        for layer in reversed(self.layers):
            if key in layer.values:
                return layer.values[key]
        return flatten(schema())[key].default


def read_command_line(
    argv: list[str], schema: Callable[[], Schema], extra: Iterable[str] = ()
) -> CommandLine:
    """Read config files (arguments that end in .py) and `--key=value` options.

    Also `--key value`, `--flag` and `--no-flag`. Problems are collected, not raised, so that the
    caller can add its own and report all of them at once. Raises UserError if a file cannot be read
    or run. Values of keys in `extra` are returned unchecked in `CommandLine.extra`.
    """
    command_line = CommandLine(layers=[])
    for path in filter(_is_config_file, argv):
        values, text = read_config_file(path, command_line.problems)
        command_line.config_files.append({'path': path, 'text': text})
        command_line.extra |= {key: values.pop(key) for key in extra if key in values}
        command_line.layers.append(Layer(path, values))
    if command_line.problems:  # its components are unknown, so further checks would mislead
        raise UserError(*command_line.problems)
    groups = schema()  # after the files, which may have registered components
    command_line.layers = [
        validate_layer(layer, groups, command_line.problems) for layer in command_line.layers
    ]
    arguments = [argument for argument in argv if not _is_config_file(argument)]
    command_line.layers.append(
        _parse_arguments(arguments, flatten(groups), command_line, frozenset(extra))
    )
    return command_line


def flatten(schema: Schema) -> dict[str, Option]:
    return {key: option for group in schema.values() for key, option in group.items()}


def _is_config_file(argument: str) -> bool:
    return argument.endswith('.py') and not argument.startswith('-')


def _parse_arguments(
    arguments: list[str],
    options: dict[str, Option],
    command_line: CommandLine,
    file_keys: frozenset[str],
) -> Layer:
    """The values of the options; sets the help topic, the show flags and the problems.

    file_keys: keys of config files that are no options.
    """
    values: dict = {}
    refused: set[str] = set()
    lists = any(SHOW_FLAGS.get(argument) == 'list_components' for argument in arguments)
    options = {**options, **LIST_OPTIONS} if lists else options
    while arguments:
        argument = arguments.pop(0)
        flag, equals, topic = argument.partition('=')
        if flag in HELP_FLAGS:
            if not equals and arguments and not arguments[0].startswith('-'):
                topic = arguments.pop(0)  # --help TOPIC
            command_line.help = topic
        elif argument in SHOW_FLAGS:
            setattr(command_line, SHOW_FLAGS[argument], True)
        elif (key := _path_of(argument)) in file_keys and argument.startswith('--'):
            command_line.problems.append(
                f'--{key}: {key} is a key of a study file, and no option. Set it in the file.'
            )
            if '=' not in argument and arguments and not arguments[0].startswith('--'):
                arguments.pop(0)  # its value
        elif argument.startswith('--'):
            try:
                key, value = _parse_option(argument, arguments, options)
                option = options[key]
                if isinstance(option, DictOption) and key in values:
                    option.check_order(key, values[key], value)
                    value = option.combined(values[key], value)
                values[key] = value
            except UserError as error:
                command_line.problems.extend(error.problems)
                refused |= meant_keys(_path_of(argument).partition('.')[0], options)
        else:
            command_line.problems.append(_stray_argument_problem(argument, options))
    if lists:
        command_line.list_format = values.pop('format', command_line.list_format)
    return Layer(COMMAND_LINE, values, refused=frozenset(refused))


def _path_of(argument: str) -> str:
    """`layer_kinds.L.n_head` of `--layer-kinds.L.n-head=4`."""
    return argument[2:].partition('=')[0].replace('-', '_')


def meant_keys(name: str, options: dict[str, Option]) -> set[str]:
    """The option of that name, or the closest name if there is none."""
    meant = name if name in options else closest_match(name, options)
    return set() if meant is None else {meant}


def _parse_option(
    argument: str, following: list[str], options: dict[str, Option]
) -> tuple[str, Any]:
    """Key and value of an option; a value after a space is removed from `following`.

    Raises UserError.
    """
    path, (_, equals, text) = _path_of(argument), argument.partition('=')
    key = path.partition('.')[0]
    # --no-flag
    if key.startswith('no_') and key not in options and key[3:] in options:
        path, key = path[3:], key[3:]
        option = _named_option(path, options[key])
        if equals or option.base_type is not bool:
            raise UserError(
                f'{argument}: --no-KEY takes no value and works for flags only; {path} '
                f'takes {option.allowed()}.'
            )
        return key, _parse_value(path, options[key], 'False')
    if key not in options:
        raise UserError(f'unknown option --{key}.{did_you_mean(key, options)} See --help.')
    # --key=value
    if equals:
        return key, _parse_value(path, options[key], text)
    option = _named_option(path, options[key])
    # --flag; the next argument is its value only if it is true or false
    if option.base_type is bool and not (following and _is_boolean(following[0])):
        return key, _parse_value(path, options[key], 'True')
    # --key value
    if following and not following[0].startswith('--'):
        return key, _parse_value(path, options[key], following.pop(0))
    raise UserError(f'--{path} needs a value: {option.allowed()}.')


def _named_option(path: str, option: Option) -> Option:
    """The option that a dotted name means: `option` itself, or one of its entries'.

    Raises UserError.
    """
    if '.' not in path:
        return option
    if not isinstance(option, DictOption):
        key = path.partition('.')[0]
        raise UserError(f'--{path}: {key} has no entries; it takes {option.allowed()}.')
    return option.option_at(path)


def _parse_value(path: str, option: Option, text: str) -> Any:
    """The value that `--PATH=text` gives to the option. Raises UserError."""
    if '.' not in path:
        return option.parse(path, text)
    _named_option(path, option)
    return cast(DictOption, option).parse_path(path, text)


def _stray_argument_problem(argument: str, options: dict[str, Option]) -> str:
    """The problem of an argument that is no option and no config file, with the likely fix."""
    known = [f'--{key}' for key in options]
    known += [f'{argument}.py'] if os.path.isfile(f'{argument}.py') else []
    hint = did_you_mean(argument.partition('=')[0], known)
    return f'{argument!r} is neither an option (--key=value) nor a config file (*.py).{hint}'


def _is_boolean(text: str) -> bool:
    return text.lower() in ('true', 'false')


def validate_layer(layer: Layer, schema: Schema, problems: list[str]) -> Layer:
    """The layer with its valid values only; each invalid one adds to `problems`."""
    options, accepted = flatten(schema), {}
    refused: set[str] = set()
    for key, value in layer.values.items():
        try:
            if key not in options:
                raise UserError(f'unknown option {key!r}.{did_you_mean(key, options)}')
            accepted[key] = options[key].accept(key, value)
        except UserError as error:
            problems.extend(f'{layer.origin}: {problem}' for problem in error.problems)
            refused |= meant_keys(key, options)
    return Layer(layer.origin, accepted, refused=frozenset(refused))


def read_config_file(path: str, problems: list[str]) -> tuple[dict, str]:
    """Run a Python config file; return the options that it sets, and its text.

    Imports, functions, classes and names that start with `_` are no options.
    """
    try:
        file = expanded_path(path)
        if file.is_dir():
            problems.append(f'config file {path} is a folder. Name a Python file in it.')
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
    except (
        OSError,
        ValueError,
        MemoryError,
        RecursionError,
    ) as error:  # RecursionError: deep nesting
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
    """Type and text of the error. `str` may fail: the class may be defined in the file."""
    kind = type(error).__name__
    try:
        return str(error) if isinstance(error, UserError) else f'{kind}: {error}'
    except Exception:
        return kind


def _suggest_file(path: str, folder: Path) -> str:
    """A hint: the config file that is probably meant, or those in the folder."""
    beside = sorted(file.name for file in folder.glob('*.py')) if folder.is_dir() else []
    meant = closest_match(Path(path).name, beside)
    if meant is not None:
        return f' Did you mean {folder / meant}?'
    return f' Files in {folder}: {", ".join(beside)}.' if beside else ''


def format_components(schema: Schema) -> str:
    """All components by registry: name, tag, description, source and options."""
    chosen_by: dict[Registry, list[str]] = {}
    for key, option in flatten(schema).items():
        if isinstance(option.choices, Registry):
            chosen_by.setdefault(option.choices, []).append(f'--{key}')
    lines = []
    for registry, flags in chosen_by.items():
        lines += [f'{registry.title} ({", ".join(flags)}):', '']
        for name in registry:
            component = registry[name]
            tag = '' if component.tag == name else f'[{component.tag}]' if component.tag else ''
            source = registry.source(name)
            details = [first_paragraph(component), source and f'Source: {source}.']
            if component.options:
                details.append(f'Options: {", ".join(component.options)}.')
            lines += entry(f'{name:<17} {tag}'.rstrip(), ' '.join(filter(None, details)), 37)
        lines.append('')
    return '\n'.join(lines).rstrip()


def format_config(
    groups: dict[str, dict],
    origins: dict[str, str],
    notes: list[str],
    longer: dict[str, list[str]] | None = None,
) -> str:
    """Each resolved value and its origin, by group, as a config file; then the notes.

    longer: the lines of keys that take more than one.
    """
    lines = []
    for title, values in groups.items():
        lines.append(f'# {title}')
        for key, value in values.items():
            one_line = commented(f'{key} = {value!r}', origins[key])
            lines += (longer or {}).get(key, [one_line])
        lines.append('')
    return '\n'.join(lines + [f'# {note}' for note in notes]).rstrip()
