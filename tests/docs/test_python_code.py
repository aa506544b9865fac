"""Every Python fence of README and docs runs, or is a config file that is accepted."""

import ast

import pytest
from helpers.documents import PAGES, Fence, fences, page_name
from helpers.sandbox import SMALL_RUN, Sandbox

SIZES = [f'--{key}={value}' for key, value in SMALL_RUN.items() if key != 'dataset']


def is_config(fence: Fence) -> bool:
    """Whether it is (a part of) a config file: assignments, or classes that register themselves."""
    statements = ast.parse(fence.text).body
    assignments = (ast.Assign, ast.Expr) if 'sweep' in fence.text else ast.Assign
    return '.register(' in fence.text or all(isinstance(s, assignments) for s in statements)


def is_study(fence: Fence) -> bool:
    return any(f'{key} = {{' in fence.text for key in ('sweep', 'ablate'))


def programs(page) -> list[Fence]:
    return [fence for fence in fences(page, 'python') if not is_config(fence)]


def configs(page) -> list[Fence]:
    return [fence for fence in fences(page, 'python') if is_config(fence)]


@pytest.mark.slow
@pytest.mark.parametrize('page', [page for page in PAGES if programs(page)], ids=page_name)
def test_programs_run(page, sandbox: Sandbox):
    """All programs of a page one after the other, as a reader pastes them into one session."""
    code, output = sandbox.execute('\n'.join(fence.text for fence in programs(page)))
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.parametrize('page', [page for page in PAGES if configs(page)], ids=page_name)
def test_config_files_are_accepted(page, sandbox: Sandbox):
    for fence in configs(page):
        (sandbox.folder / 'config.py').write_text(fence.text, encoding='utf-8')
        if is_study(fence):
            arguments = ('study.py', 'config.py', '--plan_only', *SIZES, '--dataset=shakespeare')
        else:
            arguments = ('train.py', 'config.py', '--print_config')
        code, output = sandbox.run(*arguments)
        assert code == 0, f'{fence}\n{output}'
