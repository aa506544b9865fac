"""A user's mistake gets one clear message and exit code 2, never a traceback.

Raise `UserError` wherever the person at the keyboard can mend the matter; wrap a script's entry
point in `run_script`. `ArgumentParser` turns argparse's complaints into such errors.
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
from common.console_output import OutputLost, write_error, write_text
from common.help_layout import parser_help
from common.paths import BadPath, expand_home, expanded_path

GRACE_SECONDS = 10  # seconds that a rank waits for the first one to report a mistake


# Each turns an exception that is a user's mistake into a UserError, and returns None for others.
error_translators: list[Callable[[Exception], 'UserError | None']] = []


class UserError(Exception):
    """One or more problems that the user can mend, each a sentence or two of plain text."""

    exit_code = 2

    def __init__(self, *problems: str):
        self.problems = tuple(problems)
        super().__init__('\n'.join(problems))


class RankFailure(UserError):
    """Another process of the job was lost: nobody's mistake, and no traceback would help."""

    exit_code = 1


class ReportedByOtherRank(Exception):
    """This process of a job ends for a reason that another one tells."""


def did_you_mean(name: str, allowed) -> str:
    """`' Did you mean x?'` for the closest_match allowed name, or an empty string."""
    candidate = closest_match(name, allowed)
    return '' if candidate is None else f' Did you mean {candidate}?'


def closest_match(name: str, allowed) -> str | None:
    """The allowed name that is nearest to `name`; None where none is near."""
    allowed = list(allowed)
    folded = {candidate.lower().replace('-', '_'): candidate for candidate in allowed}
    close = difflib.get_close_matches(name.lower().replace('-', '_'), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with UserErrors for complaints, near names for unknown options, and our layout.

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
            # --key=--: a value like any other, which argparse would drop.
            value = self._get_value(action, '--')
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)

    def _print_message(self, message: str, file=None) -> None:
        write_text(message, end='')  # of --help

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """The arguments, of the command line if None. Raises UserError."""
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

    1 where a process of the job failed, be it this one or another. 0 where the reader of the output
    has read enough (`| head`): a shell's pipefail would take anything else for a failure. `--debug`
    among the arguments shows the traceback of a UserError too.
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
        write_error(f'{_name()}: {error}.')
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
    """This process's number in its job; None where it is in none (`check_environment`)."""
    return os.environ.get('RANK') if 'WORLD_SIZE' in os.environ else None


def _print_problems(error: UserError, debug: bool) -> None:
    """Show the problems on standard error; of a job's processes the first one says it for all."""
    if debug:
        write_error(traceback.format_exc(), end='')
    name, rank = _name(), _rank() or '0'
    _write_torchrun_error('\n'.join(error.problems))
    if rank != '0' and not isinstance(error, RankFailure):
        # torchrun ends this process when the first has spoken. If that does not happen, the
        # mistake is this rank's alone.
        time.sleep(GRACE_SECONDS)
    if rank != '0':
        name = f'{name}, rank {rank}'
    console_output.flush_streams()
    if len(error.problems) == 1:
        write_error(f'{name}: {error.problems[0]}')
    else:
        lines = [f'{name}: {len(error.problems)} problems']
        write_error('\n'.join([*lines, *(f'  - {problem}' for problem in error.problems)]))


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Raise a UserError for every exception that one of the `error_translators` recognizes."""
    try:
        yield
    except (UserError, ReportedByOtherRank, OutputLost, BrokenPipeError):
        raise
    except Exception as error:
        for mistake in filter(None, (explain(error) for explain in error_translators)):
            raise mistake from error
        raise


def _write_torchrun_error(message: str) -> None:
    """Let torchrun, which started this process, end its report with the message."""
    path = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if path:
        when = {'py_callstack': message, 'timestamp': str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, 'w', encoding='utf-8') as file:
            json.dump({'message': {'message': message, 'extraInfo': when}}, file)


def exit_process(code: int) -> None:
    """End the process; one of torchrun's without Python's own end.

    FSDP keeps gloo's threads beyond `destroy_process_group`, and now and then one of them would
    abort the process (SIGABRT) while the interpreter is taken down, after all work was done.
    """
    console_output.flush_streams()
    if _rank() is not None:
        os._exit(code)
    sys.exit(code)
