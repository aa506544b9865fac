"""examples/quickstart.ipynb runs from top to bottom, and is stored without outputs."""

import json

import pytest
from helpers.project import PROJECT

NOTEBOOK = json.loads((PROJECT / 'examples/quickstart.ipynb').read_text(encoding='utf-8'))
CODE_CELLS = [''.join(c['source']) for c in NOTEBOOK['cells'] if c['cell_type'] == 'code']
# Runs cells as a kernel does: one namespace, the value of a last expression shown.
RUNNER = """
import ast

namespace = {'__name__': '__main__'}
for number, source in enumerate(CELLS):
    *statements, last = ast.parse(source).body
    shown = isinstance(last, ast.Expr)
    body = ast.Module(statements if shown else [*statements, last], [])
    exec(compile(body, f'cell {number}', 'exec'), namespace)
    if shown:
        print(repr(eval(compile(ast.Expression(last.value), f'cell {number}', 'eval'), namespace)))
"""


def test_notebook_is_stored_without_outputs():
    assert (NOTEBOOK['nbformat'], NOTEBOOK['nbformat_minor']) == (4, 5)
    for cell in NOTEBOOK['cells']:
        assert cell['cell_type'] in ('code', 'markdown') and cell['id'] and cell['source']
        if cell['cell_type'] == 'code':
            assert cell['outputs'] == [] and cell['execution_count'] is None
    assert len({cell['id'] for cell in NOTEBOOK['cells']}) == len(NOTEBOOK['cells'])


@pytest.mark.slow
def test_notebook_runs_in_its_folder(sandbox, monkeypatch):
    monkeypatch.setenv('MPLBACKEND', 'agg')
    cells = ["import os; os.chdir('examples')", *CODE_CELLS]
    code, output = sandbox.execute(f'CELLS = {cells!r}\n{RUNNER}')
    assert code == 0, output
    assert '162,220,800 parameters' in output and '124,475,904 parameters' in output
    assert 'finished 100' in output and 'ROMEO:' in output
    assert '2L-4H-64D-RoPE-RMS-SwiGLU-PreNorm' in output and "'not tested'" in output
    runs = list((sandbox.folder / 'out-notebook').glob('run_*/record.json'))
    assert len(runs) == 2
