"""Models, weights, data and symmetries from files: read without ever running what they say, and written whole or not at all."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isoflat.io.data import load_data
    from isoflat.io.model import load_model
    from isoflat.io.symmetries import load_symmetries, save_symmetries

__all__ = ["load_data", "load_model", "load_symmetries", "save_symmetries"]

_PLACES = {
    "load_data": "data",
    "load_model": "model",
    "load_symmetries": "symmetries",
    "save_symmetries": "symmetries",
}


def __getattr__(name: str) -> Any:
    """A public function, imported when it is first asked for: each brings libraries that the others do without."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
