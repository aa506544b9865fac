"""Optional packages, imported where they are used."""

import importlib
from types import ModuleType

from common.errors import UserError


def optional_package(name: str, purpose: str) -> ModuleType:
    """The module `name`. Raises UserError with the command to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'{purpose} need the package {name}: pip install {name}') from None
