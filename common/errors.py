"""A user's mistake gets one clear message and exit code 2, never a traceback.

Raise `UserError` for every problem that the user can fix; wrap a script's entry point in
`run_script`. `ArgumentParser` turns argparse's errors into UserErrors.
"""

import argparse
import contextlib
import difflib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from common import console_output, live_region
from common.console_output import OutputLost, red, write_error, write_text
from common.help_layout import parser_help
from common.paths import BadPath, expand_home, expanded_path

GRACE_SECONDS = 10  # seconds that a rank waits for the first one to report a mistake


# Each turns an exception that is a user's mistake into a UserError, and returns None for others.
error_translators: list[Callable[[Exception], 'UserError | None']] = []


class UserError(Exception):
    """One or more problems that the user can fix, each a sentence or two of plain text."""

    exit_code = 2

    def __init__(self, *problems: str):
        self.problems = tuple(problems)
        super().__init__('\n'.join(problems))


class RankFailure(UserError):
    """Another process of the job failed: not a user error, but a traceback would not help."""

    exit_code = 1


class ReportedByOtherRank(Exception):
    """This process of a job ends for a reason that another process reports."""


def did_you_mean(name: str, allowed) -> str:
    """`' Did you mean x?'` with the closest allowed name, or an empty string."""
    candidate = closest_match(name, allowed)
    return '' if candidate is None else f' Did you mean {candidate}?'


def closest_match(name: str, allowed) -> str | None:
    """The allowed name that is closest to `name`; None if none is similar.

    A name that continues `name` by whole words is the closest if it is the only one: for `llama4`,
    that is `llama4_text` and not `llama`.
    """
    folded = {_folded(candidate): candidate for candidate in allowed}
    longer = [candidate for candidate in folded if candidate.startswith(_folded(name) + '_')]
    if _folded(name) not in folded and len(longer) == 1:
        return folded[longer[0]]
    close = difflib.get_close_matches(_folded(name), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def _folded(name: str) -> str:
    return name.lower().replace('-', '_').replace('.', '_')


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with UserErrors, suggestions for unknown options, and our help layout.

    Options and paths may come in any order; nothing is abbreviated. Options of `type=Path`, and
    those of `type=expand_home`, may begin with `~`. `--debug` is for `run_script`.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.register('type', Path, _as_argument(expanded_path))
        self.register('type', expand_home, _as_argument(expand_home))
        self.add_argument(
            '--debug', action='store_true', help="Show the traceback of a user's error"
        )

    def error(self, message: str):
        raise UserError(f'{message}. See --help.')

    def format_help(self) -> str:
        return parser_help(self, self._actions)

    def _get_values(self, action, arg_strings):
        if action.option_strings and action.nargs is None and arg_strings == ['--']:
            # --key=--: argparse would drop this value.
            value = self._get_value(action, '--')
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)

    def _print_message(self, message: str, file=None) -> None:
        write_text(message, end='')  # the text of --help

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """The parsed arguments; argv is that of the command line if None. Raises UserError."""
        options, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            hint = did_you_mean(unknown[0].partition('=')[0], known)
            raise UserError(f'unknown option {unknown[0]}.{hint} See --help.')
        return options


def _as_argument(convert):
    def converted(text: str):
        try:
            return convert(text)
        except BadPath as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return converted


def run_script(main, argv: list[str] | None = None) -> None:
    """Run `main(argv)` as a script and exit: 0, its own code, 2 on a UserError, 130 on Ctrl-C.

    1 if any process of the job failed. 0 if the reader of the output closes it (`| head`): a shell
    with pipefail would report anything else as a failure. `--debug` among the arguments shows the
    traceback of a UserError too.
    """
    console_output.open_streams()
    argv = sys.argv[1:] if argv is None else argv
    try:
        with live_region.closed_at_end(), translated_errors():
            code = main(argv)
    except UserError as error:
        _print_problems(error, debug='--debug' in argv or '--debug=True' in argv)
        exit_process(error.exit_code)
    except ReportedByOtherRank as error:
        _write_torchrun_error(str(error))
        exit_process(1)
    except (OutputLost, BrokenPipeError) as error:
        console_output.flush_streams()
        if isinstance(error, BrokenPipeError) or error.reader_gone:
            exit_process(0)
        write_error(f'{red(f"{_name()}:")} {error}.')
        exit_process(2)
    except KeyboardInterrupt:
        write_error('\ninterrupted')
        exit_process(130)
    except Exception as error:
        if _rank() is None:
            raise
        sys.excepthook(*sys.exc_info())
        _write_torchrun_error(f'{type(error).__name__}: {error}')
        exit_process(1)
    exit_process(code or 0)


def _name() -> str:
    return os.path.basename(sys.argv[0])


def _rank() -> str | None:
    """The rank of this process in its job; None without one (`check_environment`)."""
    return os.environ.get('RANK') if 'WORLD_SIZE' in os.environ else None


def _print_problems(error: UserError, debug: bool) -> None:
    """Show the problems on standard error; in a job the first process reports them for all."""
    if debug:
        write_error(traceback.format_exc(), end='')
    name, rank = _name(), _rank() or '0'
    _write_torchrun_error('\n'.join(error.problems))
    if rank != '0' and not isinstance(error, RankFailure):
        # torchrun ends this process once the first has reported. If that does not happen, the
        # error is this rank's alone.
        time.sleep(GRACE_SECONDS)
    if rank != '0':
        name = f'{name}, rank {rank}'
    console_output.flush_streams()
    if len(error.problems) == 1:
        write_error(f'{red(f"{name}:")} {error.problems[0]}')
    else:
        lines = [red(f'{name}: {len(error.problems)} problems')]
        write_error('\n'.join([*lines, *(f'  - {problem}' for problem in error.problems)]))


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Raise a UserError for every exception that one of the `error_translators` recognizes."""
    try:
        yield
    except (UserError, ReportedByOtherRank, OutputLost, BrokenPipeError):
        raise
    except Exception as error:
        for user_error in filter(None, (translate(error) for translate in error_translators)):
            raise user_error from error
        raise


def _write_torchrun_error(message: str) -> None:
    """Write the message where torchrun looks for the error of this process."""
    path = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if path:
        when = {'py_callstack': message, 'timestamp': str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, 'w', encoding='utf-8') as file:
            json.dump({'message': {'message': message, 'extraInfo': when}}, file)


def exit_process(code: int) -> None:
    """Exit; a process of torchrun skips the shutdown of the interpreter.

    FSDP keeps gloo's threads after `destroy_process_group`, and sometimes one of them aborts the
    process (SIGABRT) during the shutdown, after all work is done.
    """
    console_output.flush_streams()
    if _rank() is not None:
        os._exit(code)
    sys.exit(code)
