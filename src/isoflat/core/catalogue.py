"""Catalogues that fill themselves: one file, one entry."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any


@cache
def entries(package: str, constant: str) -> dict[str, Any]:
    """Collect what the modules of a package define under one constant, by the entry's `name`.

    Adding an entry is adding a file; nothing else lists it.

    >>> sorted(entries("isoflat.geometry", "GEOMETRY"))
    ['auto', 'elementwise', 'euclidean', 'layerwise']
    """
    found = importlib.import_module(package)
    modules = [importlib.import_module(f"{package}.{info.name}") for info in pkgutil.iter_modules(found.__path__)]
    values = [vars(module)[constant] for module in modules if constant in vars(module)]
    return {value.name: value for value in sorted(values, key=lambda value: value.name)}
