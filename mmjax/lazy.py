"""Re-exports that are imported on first use, so that a room costs only what is used of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def attach(
    package: str, homes: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The module functions `__getattr__` and `__dir__` for a package's `__init__`.

    Args:
        package: the package's `__name__`.
        homes: submodule, below the package, to the names that it gives. A submodule without names is
            itself a name.

    >>> get, names = attach("mmjax", {"errors": ("MmjaxError",)})
    >>> get("MmjaxError").__name__, names()
    ('MmjaxError', ['MmjaxError'])
    """
    home_of = {name: home for home, names in homes.items() for name in names or (home,)}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{home_of[name]}")
        return getattr(module, name) if homes[home_of[name]] else module

    return get, lambda: sorted(home_of)
