"""A hundred command lines made wrong at random: exit code 2, one message, nothing written."""

import os
import random
import sys
from itertools import islice

import pytest
from helpers.command_lines import COMMANDS, bad_lines, main_of

from common.errors import run_script

LINES = int(os.environ.get('FUZZ_CASES', '100'))


@pytest.mark.parametrize('command', COMMANDS)
def test_a_wrong_line_has_one_answer(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = bad_lines(command, random.Random(command))
    for line in islice(lines, -(-LINES // len(COMMANDS))):
        monkeypatch.setattr(sys, 'argv', [command, *line])
        with pytest.raises(SystemExit) as ended:
            run_script(main_of(command))
        shown = capsys.readouterr()
        told = f'{line!r}: {shown.err}'
        assert ended.value.code == 2, told
        first, *rest = shown.err.splitlines()
        assert first.startswith(f'{os.path.basename(command)}: ') and shown.out == '', told
        count = int(first.split()[1]) if first.endswith(' problems') else 0
        assert len(rest) == count and all(text.startswith('  - ') for text in rest), told
        assert len(shown.err) < 20_000 and shown.err.isprintable() is not None, told
        assert not list(tmp_path.iterdir()), told
