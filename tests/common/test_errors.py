"""A user's mistake ends a script with a message and exit code 2, without a traceback."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from helpers.project import PROJECT

from common.errors import UserError, did_you_mean, run_script


def outcome(main, argv=()):
    with pytest.raises(SystemExit) as ended:
        run_script(main, list(argv))
    return ended.value.code


def fail(*problems):
    def main(argv):
        raise UserError(*problems)

    return main


def test_a_script_ends_with_its_own_code():
    assert outcome(lambda argv: None) == 0
    assert outcome(lambda argv: 0) == 0
    assert outcome(lambda argv: len(argv), ['a', 'b', 'c']) == 3


@pytest.mark.parametrize('problems', [['one thing'], ['one thing', 'another', 'a third']])
def test_every_problem_is_shown_and_the_code_is_2(problems, capsys):
    assert outcome(fail(*problems)) == 2
    shown = capsys.readouterr()
    assert all(problem in shown.err for problem in problems)
    assert 'Traceback' not in shown.err and shown.out == ''


@pytest.mark.parametrize('flag', ['--debug', '--debug=True'])
def test_debug_shows_the_traceback_too(flag, capsys):
    assert outcome(fail('one thing'), [flag]) == 2
    shown = capsys.readouterr().err
    assert 'Traceback' in shown and shown.rstrip().endswith('one thing')


def test_ctrl_c_ends_with_130(capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert outcome(main) == 130
    assert 'Traceback' not in capsys.readouterr().err


def test_ctrl_c_while_modules_are_imported(tmp_path):
    (tmp_path / 'project/common').mkdir(parents=True)
    (tmp_path / 'project/data/corpus').mkdir(parents=True)
    shutil.copy(PROJECT / 'common/first_import.py', tmp_path / 'project/common')

    def interrupt(program: str) -> tuple[int, str]:
        code = 'import common.first_import\n\nraise KeyboardInterrupt  # in an import'
        (tmp_path / program).write_text(code)
        done = subprocess.run(
            [sys.executable, tmp_path / program],
            env={**os.environ, 'PYTHONPATH': str(tmp_path / 'project')},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stderr

    for command in ('project/command.py', 'project/data/corpus/prepare.py'):
        assert interrupt(command) == (130, '\ninterrupted\n')
    assert 'Traceback' in interrupt('program_of_a_user.py')[1]


def test_every_command_imports_first_import_first():
    commands = [
        path
        for path in [*PROJECT.glob('*.py'), *PROJECT.glob('data/**/*.py')]
        if '\n    run_script(main' in path.read_text(encoding='utf-8')
    ]
    assert len(commands) >= 13
    for path in commands:
        body = ast.parse(path.read_text(encoding='utf-8')).body
        imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [getattr(node, 'module', None) or node.names[0].name for node in imports]
        ours = [name for name in names if name.partition('.')[0] not in sys.stdlib_module_names]
        assert ours[0] == 'common.first_import', path


def test_a_fault_of_the_program_keeps_its_traceback():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_script(main, [])


def test_closed_pipe_is_not_an_error():
    program = (
        'from common.errors import run_script\n'
        "run_script(lambda argv: print(*range(10**5), sep='\\n', flush=True), [])"
    )
    writer = subprocess.Popen(
        [sys.executable, '-c', program],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with writer:
        writer.stdout.readline()
        writer.stdout.close()
        assert writer.stderr.read() == ''
        assert writer.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('n_layers', ' Did you mean n_layer?'),
        ('N-LAYER', ' Did you mean n_layer?'),
        ('rms_norm', ' Did you mean RMSNorm?'),
        ('zzz', ''),
        ('llama4', ' Did you mean llama4_text?'),
        ('qwen3.5', ' Did you mean qwen3_5_text?'),
        ('n', ''),  # both n_layer and n_head continue it
        ('Llama', ' Did you mean llama?'),
    ],
)
def test_did_you_mean_suggests_only_similar_names(name, expected):
    allowed = ['n_layer', 'n_head', 'RMSNorm', 'llama', 'llama4_text', 'qwen3', 'qwen3_5_text']
    assert did_you_mean(name, allowed) == expected
