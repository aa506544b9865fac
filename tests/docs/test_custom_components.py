"""The components of README and docs/custom-components.md are trained, sampled from and compared."""

import pytest
from helpers.documents import README, Fence, fences
from helpers.project import PROJECT
from helpers.sandbox import SMALL_RUN

from records.record import read_record
from records.run_folders import latest_run

PAGE = PROJECT / 'docs/custom-components.md'
SIZES = [f'--{key}={value}' for key, value in SMALL_RUN.items()]


def component(page, text: str) -> Fence:
    (fence,) = (fence for fence in fences(page, 'python') if text in fence.text)
    return fence


# The class, options for the command line, what the name of the architecture has, the option that
# chooses it, and parameters that the record counts under a heading.
CASES = {
    'readme': (
        component(README, 'class StarReLU'),
        ['--star_scale=0.7'],
        ('star_relu', {'activation': 'star_relu', 'star_scale': 0.7}),
        None,
    ),
    'activation': (
        component(PAGE, 'class StarReLU'),
        [],
        ('StarReLU', {'activation': 'star_relu', 'star_scale': 0.8944}),
        None,
    ),
    'norm': (
        component(PAGE, 'class ScaleNorm'),
        ['--scale_norm_eps=1e-6'],
        ('ScaleNorm', {'normalization': 'scale_norm', 'scale_norm_eps': 1e-6}),
        {'normalization': 5},  # one gain in each of two norms of two blocks, and in the last norm
    ),
    'attention': (
        component(PAGE, 'class GatedAttention'),
        ['--optimizer=muon'],
        ('Gated', {'attention_type': 'gated'}),
        {'attention': 2 * (3 * 32 * 32 + 32 * 2 + 32 * 32)},
    ),
    'mixer': (
        component(PAGE, 'class TokenShift'),
        ['--shift_size=3', '--optimizer=muon'],
        ('Shift', {'mixer': 'token_shift', 'shift_size': 3}),
        {'mixer': 2 * (3 * 32 * 32 + 3 * 32)},
    ),
    'optimizer': (
        component(PAGE, 'class Signum'),
        ['--signum_momentum=0.8'],
        ('', {'optimizer': 'signum', 'signum_momentum': 0.8}),
        None,
    ),
}


def test_readme_component_is_short():
    lines = [line for line in CASES['readme'][0].text.splitlines() if line]
    assert len(lines) <= 14 and sum('import' in line for line in lines) == 2
    assert 'def initial_values(self)' in CASES['readme'][0].text


def test_every_component_of_the_page_is_covered():
    registered = [fence for fence in fences(PAGE, 'python') if '.register(' in fence.text]
    assert registered == [case[0] for name, case in CASES.items() if name != 'readme']


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_documented_component_trains(case, sandbox):
    fence, options, (tag, values), parameters = CASES[case]
    (sandbox.folder / 'own.py').write_text(fence.text, encoding='utf-8')
    out = ('--out_dir=out-own', '--max_iters=4')
    sandbox.must_run('train.py', 'own.py', *SIZES, *options, *out)
    folder = latest_run(sandbox.folder / 'out-own')
    record = read_record(folder)
    assert tag in record['architecture']['name'].split('-') or not tag
    assert values.items() <= record['config'].items()
    assert parameters is None or (
        parameters.items() <= record['startup_info']['model']['components'].items()
    )
    losses = [entry['loss'] for entry in record['training_iterations']]
    assert len(losses) == 4 and losses[-1] < losses[0]
    # No note that flops() differs from PyTorch's count, nor any other.
    assert [event for event in record['events'] if event['event'] == 'note'] == []

    continued = (*out[:1], '--max_iters=6', '--init_from=resume')
    sandbox.must_run('train.py', 'own.py', *SIZES, *options, *continued)
    assert read_record(folder)['summary']['final_iter'] == 6


@pytest.mark.slow
@pytest.mark.parametrize('case', ['attention', 'mixer'])
def test_documented_component_generates_with_a_cache(case, sandbox):
    fence, options, *_ = CASES[case]
    (sandbox.folder / 'own.py').write_text(fence.text, encoding='utf-8')
    sandbox.must_run('train.py', 'own.py', *SIZES, *options, '--out_dir=out-own')
    program = """
import torch
from training.load import load_run
run = load_run('out-own', config='own.py', device='cpu')
assert run.model.uncacheable == []
tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
cache = run.model.empty_cache(12)
with torch.no_grad():
    whole = run.model(tokens)
    parts = [run.model(part, cache=cache) for part in tokens.split((5, 1, 1, 5), dim=1)]
torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
"""
    code, output = sandbox.execute(program)
    assert code == 0, output
