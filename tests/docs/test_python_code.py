"""Every Python fence of README and docs runs, or is a config file that is accepted."""

import ast

import pytest
from helpers.documents import PAGES, Fence, fences, page_name
from helpers.sandbox import Sandbox

# As study.py does before it starts a run.
READ_STUDY = """
from configurator import read_command_line
from studies.grid import merged_settings, read_study
from studies.keys import STUDY_KEYS
from study import study_schema

arguments = ['config.py', '--dataset=shakespeare']
study = read_study(read_command_line(arguments, study_schema, extra=STUDY_KEYS))
merged_settings(study, {})
"""


def is_config(fence: Fence) -> bool:
    """Whether it is (a part of) a config file: assignments, or classes that register themselves."""
    statements = ast.parse(fence.text).body
    return '.register(' in fence.text or all(isinstance(s, ast.Assign) for s in statements)


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
            code, output = sandbox.execute(READ_STUDY)
        else:
            code, output = sandbox.run('train.py', 'config.py', '--print_config')
        assert code == 0, f'{fence}\n{output}'
