"""tests/stress/round_trips.py: a damaged export is detected."""

import pytest
import torch
from stress import round_trips

pytestmark = pytest.mark.usefixtures('one_thread')
SIZES = ['--n_layer=1', '--n_embd=32', '--block_size=8']


def test_damaged_export_fails(capsys, monkeypatch):
    assert round_trips.main(['gpt2', 'speedrun', *SIZES]) == 0
    header, gpt2, speedrun = capsys.readouterr().out.splitlines()
    assert header.split() == ['preset', 'in', 'transformers', 'export', 'import']
    assert gpt2.split()[:2] == ['gpt2', 'OPTForCausalLM']
    assert all(float(value) < 1e-5 for value in gpt2.split()[2:])
    assert 'logit_softcap' in speedrun and speedrun.split()[-2:] == ['-', '-']

    export = round_trips.interop.export

    def damaged(config, weights, folder):
        changed = {name: tensor.clone() for name, tensor in weights.items()}
        changed['blocks.0.ffn.down.weight'] *= 1.01
        export(config, changed, folder)

    monkeypatch.setattr(round_trips.interop, 'export', damaged)
    assert round_trips.main(['gpt2', *SIZES]) == 1
    export_difference, import_difference = map(float, capsys.readouterr().out.split()[-2:])
    assert export_difference > 1e-4 > import_difference
    assert round_trips.difference(torch.tensor([1.0, -4.5]), torch.tensor([1.0, -4.0])) == 0.125
