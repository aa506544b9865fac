"""The layout in docs/design.md: import directions, and limits on the length of modules."""

import ast
import subprocess
import sys

import pytest
from helpers.project import PROJECT

ROOT_MODULES = {
    *('train', 'study', 'compare_architectures', 'sample', 'evaluate', 'export_checkpoint'),
    *('model_config', 'model_components', 'model_builder', 'training_config', 'configurator'),
    'training_logger',
}
LINES_OF_A_MODULE = 500
LINES_OF_A_FUNCTION = 60
WITHOUT_TORCH = [
    *('common', 'records', 'comparison', 'configurator', 'model_config', 'training_logger'),
    'compare_architectures',
]
WITH_TORCH = {'common/hardware.py', 'common/cpu_peak.py', 'common/tensors.py'}

NOT_THE_PROGRAM = ('.', 'tests/', 'benchmarks/', 'config/', 'build/')
SOURCES = {
    path.relative_to(PROJECT).as_posix(): ast.parse(path.read_text(encoding='utf-8'))
    for path in PROJECT.rglob('*.py')
    if not path.relative_to(PROJECT).as_posix().startswith(NOT_THE_PROGRAM)
}


def unit_of(path: str) -> str:
    """A root module or a package: `train.py` is train, `data/order.py` is data."""
    return path.partition('/')[0].removesuffix('.py')


def imported_modules(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def import_directions() -> list[tuple[str, list[str]]]:
    """Every unit with the units that it imports, in an order without forward imports."""
    imports: dict[str, set[str]] = {unit_of(path): set() for path in SOURCES}
    for path, tree in SOURCES.items():
        unit = unit_of(path)
        names = {name.partition('.')[0] for name in imported_modules(tree)}
        imports[unit] |= (names & imports.keys()) - {unit}
    ordered: list[str] = []
    while len(ordered) < len(imports):
        free = sorted(u for u in imports if u not in ordered and imports[u] <= {*ordered})
        assert free, f'These import one another: {sorted(imports.keys() - {*ordered})}'
        ordered += free
    return [(unit, sorted(imports[unit], key=ordered.index)) for unit in ordered]


def test_import_directions_match_design_page():
    text = (PROJECT / 'docs/design.md').read_text(encoding='utf-8')
    written = text.partition('<!-- imports -->\n')[2].partition('<!-- end -->')[0]
    rows = [
        f'| `{unit}` | {", ".join(f"`{name}`" for name in names) or "–"} |'
        for unit, names in import_directions()
    ]
    derived = '\n'.join(['| Unit | Imports |', '| --- | --- |', *rows, ''])
    assert written == derived, f'docs/design.md should have this table:\n{derived}'


def test_root_has_twelve_modules():
    assert {path.stem for path in PROJECT.glob('*.py')} == ROOT_MODULES


@pytest.mark.slow
def test_comparison_and_records_import_no_torch():
    """Nor any package of an optional extra."""
    modules = [
        path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
        for path in SOURCES
        if unit_of(path) in WITHOUT_TORCH and path not in WITH_TORCH
    ]
    code = (
        f'import sys, {", ".join(modules)}\n'
        'sys.exit(bool({"torch", "tensorboard", "wandb", "matplotlib"} & set(sys.modules)))'
    )
    subprocess.run([sys.executable, '-c', code], cwd=PROJECT, check=True)


@pytest.mark.slow
def test_scripts_import_no_compiler_and_no_fsdp():
    """Both import SymPy, which takes longer than all our modules."""
    scripts = sorted(ROOT_MODULES - {'compare_architectures'})
    code = f'import sys, {", ".join(scripts)}\nsys.exit("sympy" in sys.modules)'
    subprocess.run([sys.executable, '-c', code], cwd=PROJECT, check=True)


def test_module_length_limit():
    lengths = {
        path: len((PROJECT / path).read_text(encoding='utf-8').splitlines()) for path in SOURCES
    }
    assert {path: n for path, n in lengths.items() if n > LINES_OF_A_MODULE} == {}
    assert lengths['train.py'] < 400


def test_function_length_limit():
    functions = {
        f'{path}:{node.lineno} {node.name}': node.end_lineno - node.lineno + 1
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: n for name, n in functions.items() if n > LINES_OF_A_FUNCTION} == {}
