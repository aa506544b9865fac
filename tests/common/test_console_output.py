"""Output of every command: characters, color, and streams that cannot be written."""

import ast
import io
import os
import subprocess
import sys
import unicodedata

import pytest
from helpers.project import PROJECT, TINY_RUN
from helpers.sample_run import Utf8Terminal

from common import console_output
from common.console_output import (
    OutputLost,
    bold,
    displayed,
    plain,
    red,
    visible,
    write_error,
    write_progress,
    write_text,
    yellow,
)
from common.errors import run_script
from configurator import format_components
from training.command_help import training_help
from training_config import schema

NARROW = ('ascii', 'cp1252', 'cp437', 'cp932', 'latin-1')


def stream_on(raw, encoding='utf-8'):
    return io.TextIOWrapper(raw, encoding=encoding)


class Full(io.RawIOBase):
    """A file on a full disk."""

    def writable(self):
        return True

    def write(self, data):
        raise OSError(28, 'No space left on device')


def full():
    return io.TextIOWrapper(io.BufferedWriter(Full()), encoding='utf-8')


# --- What is shown ------------------------------------------------------------------------------


def test_control_characters_are_escaped():
    every = ''.join(map(chr, range(0x3000))) + '\udcff\ud800'
    shown = visible(every)
    unsafe = {c for c in shown if unicodedata.category(c) in ('Cc', 'Cs', 'Zl', 'Zp')}
    assert unsafe == {'\n', '\t'}
    assert not {c for c in shown if unicodedata.bidirectional(c) in ('RLO', 'LRO', 'RLI', 'LRI')}
    # What people write with stays as it is.
    letters = 'naïve שלום می‌خواهم 日本\u3000語 👩‍👩‍👧 ½\n\tx'
    assert visible(letters) == letters
    assert visible('\x1b[2J\r') == r'\x1b[2J\r' and visible('\x9b\u202e') == r'\u009b\u202e'


@pytest.mark.parametrize('encoding', NARROW)
def test_unencodable_characters_are_replaced(encoding, monkeypatch):
    pages = [training_help('').page('all'), format_components(schema())]
    texts = [*pages, '├─ é 日 😀 … ± \udcff']
    raw = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', stream_on(raw, encoding))
    for text in texts:
        write_text(text)
        write_progress(text)
    lines = raw.getvalue().decode(encoding).splitlines()
    assert len(lines) == 2 * sum(text.count('\n') + 1 for text in texts)
    assert lines[-1].startswith('|- ') and r'\udcff' in lines[-1]


def test_encodable_characters_are_kept(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', stream_on(raw, 'cp1252'))
    write_text('± é … ≥ 日')
    assert raw.getvalue().decode('cp1252').strip() == '± é … >= \\u65e5'
    assert plain('🚀 a │ b') == 'a | b'


def test_print_is_safe_in_scripts(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', stream_on(raw, 'ascii'))
    with pytest.raises(SystemExit) as ended:
        run_script(lambda argv: print('é → 日'), [])
    assert ended.value.code == 0 and raw.getvalue() == b'\\xe9 -> \\u65e5\n'


def test_nothing_writes_around_console_output():
    """`print`, and writing to sys.stdout or sys.stderr, happen nowhere else."""
    around = []
    elsewhere = ('.', 'tests', 'benchmarks', 'common/console_output.py')
    for path in PROJECT.rglob('*.py'):
        if path.relative_to(PROJECT).as_posix().startswith(elsewhere):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                *('print', 'sys.stdout.write', 'sys.stderr.write', 'traceback.print_exc'),
            ):
                around.append(f'{path.name}:{node.lineno}')
    assert around == []


@pytest.mark.parametrize(
    ('environment', 'terminal', 'color'),
    [
        ({}, True, True),
        ({}, False, False),
        ({'NO_COLOR': '1'}, True, False),
        ({'NO_COLOR': ''}, True, True),
        ({'TERM': 'dumb'}, True, False),
        ({'FORCE_COLOR': '1'}, False, True),
        ({'CLICOLOR_FORCE': '1'}, False, True),
        ({'FORCE_COLOR': '0'}, False, False),
        ({'FORCE_COLOR': '1', 'NO_COLOR': '1'}, True, False),
    ],
)
def test_color_depends_on_terminal_and_environment(environment, terminal, color, monkeypatch):
    for name in ('NO_COLOR', 'FORCE_COLOR', 'CLICOLOR_FORCE'):
        monkeypatch.delenv(name, raising=False)
    for name, value in {'TERM': 'xterm', **environment}.items():
        monkeypatch.setenv(name, value)
    stream = Utf8Terminal() if terminal else io.StringIO()
    text = displayed(f'{bold("a")} {yellow("b")} {red("c")}', stream)
    expected = '\x1b[1ma\x1b[0m \x1b[33mb\x1b[0m \x1b[31mc\x1b[0m' if color else 'a b c'
    assert text == expected


def test_only_utf8_terminal_gets_emoji_and_rules(monkeypatch):
    monkeypatch.setenv('TERM', 'dumb')
    text, plain_text = f'{bold("🚀 A")} │ ─ → ×', 'A | - -> x'
    latin = Utf8Terminal()
    latin.encoding = 'latin-1'
    assert displayed(text, Utf8Terminal()) == '🚀 A │ ─ → ×'
    assert displayed(text, io.StringIO()) == displayed(text, latin) == plain_text


def test_literal_text_keeps_its_characters(monkeypatch, capsys):
    write_text('🚀 a │ b → c \x1b', literal=True)
    assert capsys.readouterr().out == '🚀 a │ b → c \\x1b\n'


# --- A stream that is gone ------------------------------------------------------------------------


def test_unwritable_results_end_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdout', full())
    with pytest.raises(SystemExit) as ended:
        run_script(lambda argv: write_text('results'), [])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count('\n') == 1 and 'No space left on device' in message


def test_unwritable_progress_is_reported_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdout', full())
    assert 'No space left' in write_progress('one')
    assert write_progress('two') is None
    message = capsys.readouterr().err
    assert message.count('\n') == 1 and 'continues silently' in message


@pytest.mark.parametrize('gone', [None, 'closed'])
def test_closed_stream_raises_no_traceback(gone, monkeypatch):
    stream = gone and stream_on(io.BytesIO())
    if stream:
        stream.close()
    for name in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, name, stream)
    write_error('a')
    write_progress('b')
    monkeypatch.setattr(sys, 'stdout', stream)
    if stream:
        with pytest.raises(OutputLost):
            write_text('c')
    else:
        write_text('c')


def shell(program, redirections, tmp_path):
    """The Python `program` under bash's `redirections`."""
    (tmp_path / 'program.py').write_text(program)
    return subprocess.run(
        ['bash', '-c', f'"$0" "$1" {redirections}', sys.executable, tmp_path / 'program.py'],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(PROJECT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


NATIVE = """
import os
from common import console_output
console_output.open_streams()
with open('checkpoint', 'wb'):
    for descriptor in 1, 2:
        os.write(descriptor, b'a warning of a library')
    print('x')
"""


@pytest.mark.skipif(os.name != 'posix', reason='descriptors of POSIX')
def test_files_do_not_reuse_closed_stream_descriptors(tmp_path):
    assert shell(NATIVE, '<&- >&- 2>&-', tmp_path).returncode == 0
    assert (tmp_path / 'checkpoint').read_bytes() == b''


LONG = """
from common.errors import run_script
from common.console_output import write_progress
run_script(lambda argv: write_progress('x' * 100_000) and 0)
"""


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a device of Linux')
def test_unflushed_buffer_is_no_error_at_exit(tmp_path):
    done = shell(LONG, '>/dev/full', tmp_path)
    assert done.returncode == 0 and done.stderr.count('\n') == 1, done.stderr
    assert shell(LONG, '>/dev/full 2>&1', tmp_path).returncode == 0


def test_run_continues_without_console(tiny_dataset, tmp_path, monkeypatch, capsys):
    """It trains to its end, with one message on standard error and an event in the record."""
    import train
    from records.record import read_record
    from records.run_folders import latest_run

    values = {**TINY_RUN, 'dataset': tiny_dataset, 'out_dir': tmp_path, 'max_iters': 2}
    monkeypatch.setattr(sys, 'stdout', full())
    with pytest.raises(SystemExit) as ended:
        run_script(train.main, [f'--{key}={value}' for key, value in values.items()])
    message = capsys.readouterr().err
    assert ended.value.code == 0 and message.count('\n') == 1, message
    record = read_record(latest_run(tmp_path))
    assert record['status'] == 'finished' and record['summary']['final_iter'] == 2
    (event,) = (e for e in record['events'] if e['event'] == 'console_lost')
    assert 'No space left on device' in event['message']


def test_silence_affects_one_stream(monkeypatch):
    stream, raw = full(), io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', stream)
    monkeypatch.setattr(sys, 'stderr', stream_on(raw))
    console_output.silence(stream)
    assert sys.stdout is not stream
    write_error('still here')
    assert raw.getvalue() == b'still here\n'
