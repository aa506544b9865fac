"""Every shell command in README.md, CONTRIBUTING.md and docs/ is run at small size, or excepted."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

import pytest
from helpers.command_lines import COMMANDS, options_of
from helpers.documents import ALL_PAGES, PAGES, SHELL, Command, commands, fences, page_name
from helpers.project import PROJECT
from helpers.sandbox import SMALL_RUN, Sandbox

# Commands that are not run, by a pattern of their text, each with the reason. Their files and
# options must exist all the same.
NETWORK = 'downloads'
INSTALLS = 'installs packages'
SEVERAL_MACHINES = 'needs several machines or a cluster'
GPU = 'needs GPUs'
MINUTES = 'measures for minutes; tests/benchmarks has its tests'
GATE = 'is the gate, or a part of it, that runs this test'
ANOTHER_STUDY = 'takes long; config/studies/gated_ffn.py is run, test_python_code reads the others'
PARALLEL = 'is run with FSDP; tests/parallel trains with the other strategies'
EXCEPTIONS = {
    r'^python3 -m venv|^\. \.venv/|^pip install|^git clone': INSTALLS,
    r'^(\.ci/run|(python -m )?pytest|ruff|mypy)\b': GATE,
    r'^python study.py config/(my_\w+.py$|studies/(norms|mixers|families))': ANOTHER_STUDY,
    r'^torchrun .*--nnodes|^sbatch|^srun': SEVERAL_MACHINES,
    r'^torchrun .*--nproc_per_node=8|mixer_backend=fla': GPU,
    r'^torchrun .*--nproc_per_node=2 (?!.*--use_fsdp)': PARALLEL,
    r'^python data/fineweb|--init_from=gpt2|finetune_shakespeare': NETWORK,
    r'^(OMP_NUM_THREADS=1 )?python (benchmarks|tests/stress)/': MINUTES,
}
# An information about options or a plan is given at the documented size.
NOT_SHRUNK = ('--help', '--list_components', '--print_config', '--plan')
# Values above these are lowered. Prepared runs have 4 iterations, so that a resumed one goes on.
CAPS = {'n_layer': 4, 'max_iters': 6, 'eval_iters': 2, 'block_size': 64, 'max_new_tokens': 16}
# Exit codes other than 0 that a command may end with.
EXIT_CODES = {'--fail_unless': (0, 1)}
EVERY_COMMAND = [
    command for page in ALL_PAGES for fence in fences(page, *SHELL) for command in commands(fence)
]


def exceptions_of(command: Command) -> list[str]:
    return [pattern for pattern in EXCEPTIONS if re.search(pattern, command.text)]


# --- Running -------------------------------------------------------------------------------------


def shrunk(command: Command) -> list[str]:
    """The arguments with smaller numbers; tiny sizes where no config file in the copy has them."""
    arguments = [lowered(argument) for argument in command.arguments]
    if any(argument.startswith(NOT_SHRUNK) for argument in arguments):
        return [str(PROJECT / a) if (PROJECT / a).is_file() else a for a in arguments]
    given = {argument.partition('=')[0] for argument in arguments}
    if command.script == 'train.py' and all(a.startswith('--') for a in arguments):
        arguments += [f'--{k}={v}' for k, v in SMALL_RUN.items() if f'--{k}' not in given]
    if command.script == 'export_checkpoint.py':
        arguments += ['--overwrite']  # the sandbox has one
    if command.script == 'sample.py' and '--max_new_tokens' not in given:
        arguments += ['--max_new_tokens=16']
    return arguments


def lowered(argument: str) -> str:
    match = re.fullmatch(r'--(\w+)=(\d+)', argument)
    cap = CAPS.get(match[1]) if match else None
    return f'--{match[1]}={min(cap, int(match[2]))}' if cap else argument


def run(command: Command, sandbox: Sandbox) -> str | None:
    """What is wrong with a run of the command; None if all is well."""
    if command.words[0] == 'torchrun':
        code, output = run_torchrun(command, sandbox)
    else:
        code, output = sandbox.run(command.script, *shrunk(command))
    allowed = next((c for flag, c in EXIT_CODES.items() if flag in command.text), (0,))
    if code in allowed and 'Traceback' not in output:
        return None
    return f'{command}\nexit code {code}\n{output[-2000:]}'


def run_torchrun(command: Command, sandbox: Sandbox) -> tuple[int, str]:
    torchrun = (sys.executable, '-m', 'torch.distributed.run')
    flags = command.words[1 : command.words.index(command.script)]
    done = subprocess.run(
        [*torchrun, *flags, command.script, *shrunk(command)],
        cwd=sandbox.folder,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('page', [page for page in PAGES if fences(page, *SHELL)], ids=page_name)
def test_commands_run(page, sandbox):
    """In the order of the page, so that what one command writes is there for the next."""
    problems = [
        problem
        for command in EVERY_COMMAND
        if command.fence.page == page and not exceptions_of(command)
        if (problem := run(command, sandbox))
    ]
    assert not problems, '\n\n'.join(problems)


# --- Names ---------------------------------------------------------------------------------------


def test_every_command_can_be_run_or_is_excepted():
    runnable = [c for c in EVERY_COMMAND if c.script in COMMANDS or c.script in ('train.py',)]
    left = [str(c) for c in EVERY_COMMAND if c not in runnable and not exceptions_of(c)]
    assert not left


def test_every_exception_matches_a_command():
    used = {pattern for command in EVERY_COMMAND for pattern in exceptions_of(command)}
    assert EXCEPTIONS.keys() - used == set()


@pytest.mark.parametrize('page', ALL_PAGES, ids=page_name)
def test_files_and_options_of_commands_exist(page):
    problems = [
        f'{command}: {problem}'
        for command in EVERY_COMMAND
        if command.fence.page == page
        for problem in missing_names(command)
    ]
    assert not problems, '\n'.join(problems)


def missing_names(command: Command) -> Iterator[str]:
    """Files, extras and options that the project does not have, one line each."""
    if command.words[0] == 'pip':
        yield from missing_requirements(command.words[2:])
    script = command.script
    if script is None or '-m' in command.words:
        return
    if not (PROJECT / script).is_file():
        yield f'no script {script}'
        return
    known = known_options(script)
    for argument in command.arguments:
        path = re.split(r'[.=]', argument, maxsplit=1)[0]  # --layer_kinds of --layer_kinds.L=None
        if argument.startswith('--') and path not in known:
            yield f'no option {path}'
        is_project_file = re.match(r'(config|scripts)/', argument)
        if is_project_file and argument not in YOUR_FILES and not (PROJECT / argument).is_file():
            yield f'no file {argument}'


# Files that a reader writes; the sandbox has them.
YOUR_FILES = {'config/mine.py', 'config/my_study.py', 'config/my_ladder.py'}


def missing_requirements(words: tuple[str, ...]) -> Iterator[str]:
    project = (PROJECT / 'pyproject.toml').read_text(encoding='utf-8')
    known_extras = re.findall(r'^(\w+) = \[', project, flags=re.M)
    for flag, name in pairwise(words):
        if flag == '-r' and not (PROJECT / name).is_file():
            yield f'no file {name}'
    for word in words:
        extras = re.fullmatch(r'\.\[([\w,]+)\]', word)
        for extra in extras[1].split(',') if extras else ():
            if extra not in known_extras:
                yield f'no extra {extra}'


def known_options(script: str) -> set[str]:
    if script in COMMANDS or script.startswith('data/'):
        return {*options_of(script), *NOT_SHRUNK, '--debug'}
    folder = (PROJECT / script).parent
    return {
        name
        for path in (folder.glob('*.py') if folder != PROJECT else [PROJECT / script])
        for name in re.findall(r"'(--\w+)'", path.read_text(encoding='utf-8'))
    }


def test_commands_are_in_shell_fences():
    """Else they would not be run."""
    other = [
        str(fence)
        for page in ALL_PAGES
        for fence in fences(page)
        if fence.language not in SHELL
        and re.search(r'^(\$ )?(python|pip|torchrun) ', fence.text, flags=re.M)
    ]
    assert not other
