"""Old names that keep working: the `__getattr__` of a module whose names have moved."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module: gives what a name stands for now, with a warning that says what to write.

    Args:
        module: Name of the module.
        names: For each old name the place of what it stands for, as dotted words from the package on.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        room, _, new = names[name].rpartition(".")
        warnings.warn(f"{module}.{name} is now {names[name]}: the old name will go.", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(room), new)

    return get
