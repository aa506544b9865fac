"""A hundred random wrong command lines: exit code 2, one message, nothing written."""

import os
import random
import sys
from itertools import islice

import pytest
from helpers.command_lines import COMMANDS, bad_lines, main_of

from common.errors import run_script

LINES = int(os.environ.get('FUZZ_CASES', '100'))


@pytest.mark.parametrize('command', COMMANDS)
def test_wrong_command_line_gives_one_message(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = bad_lines(command, random.Random(command))
    for line in islice(lines, -(-LINES // len(COMMANDS))):
        monkeypatch.setattr(sys, 'argv', [command, *line])
        with pytest.raises(SystemExit) as ended:
            run_script(main_of(command))
        shown = capsys.readouterr()
        details = f'{line!r}: {shown.err}'
        assert ended.value.code == 2, details
        first, *rest = shown.err.splitlines()
        assert first.startswith(f'{os.path.basename(command)}: ') and shown.out == '', details
        count = int(first.split()[1]) if first.endswith(' problems') else 0
        assert len(rest) == count and all(text.startswith('  - ') for text in rest), details
        assert len(shown.err) < 20_000 and shown.err.isprintable() is not None, details
        assert not list(tmp_path.iterdir()), details
