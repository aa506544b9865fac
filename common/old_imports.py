"""Import paths of earlier versions, for users' config files: today's modules, with a note.

Installed when a config file is read. `registry` and `components.contract` were modules until 0.1.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

from common.console_output import write_progress

MOVED = {'registry': 'common.registry', 'components.contract': 'components.base'}


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `MOVED`: each is the same object as the module that replaced it."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec) -> ModuleType:
        new = MOVED[spec.name]
        write_progress(
            f'note: the module {spec.name} is now {new}. Import what a component needs from '
            'model_components; the old name will be removed.'
        )
        module = importlib.import_module(new)
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own_spec  # the import system has replaced it


def allow() -> None:
    """Make the old paths importable from now on."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
