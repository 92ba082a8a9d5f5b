"""Packages that only the views need."""

import importlib
from types import ModuleType

from twister_jax.errors import UserError


def require(module: str, extra: str, what: str) -> ModuleType:
    """A module of an optional package.

    Raises:
      UserError: it is not installed; the message has the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{what} needs {error.name or module}: pip install 'twister_jax[{extra}]'") from None
