"""Hyper-parameters to train with: a recipe with a table of lists."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isoflat.core.errors import DataError, UnknownName
from isoflat.experiments.recipe import Asks, Recipe, Scale, parse


def read_grid(
    path: Path,
    scale: str,
    asked: Sequence[tuple[str, str]],
    default: Sequence[tuple[str, str]],
    changes: Mapping[str, Any],
) -> Recipe:
    """The recipe in a file, with what a grid needs not say.

    Args:
        path: of the file.
        scale: whose table stands over the rest.
        asked: measures with their geometries; none for the file's.
        default: measured where neither says what.
        changes: fields that the user sets differently; None for none.

    Raises:
        DataError: there is no such file, or no grid in it.
        UsageError: something in it is missing, unknown or without meaning.
    """
    if scale not in list(Scale):
        raise UnknownName("scale", scale, list(Scale))
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = tomllib.loads(text)
    except OSError as error:
        raise DataError(f"--grid {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"--grid {path} is no TOML: {error}") from error
    over = content.get(scale, {})
    there = content.keys() | (over.keys() if isinstance(over, dict) else set())
    axes = content.get("grid", over.get("grid") if isinstance(over, dict) else None)
    if "arms" in there or not isinstance(axes, dict) or not axes:
        raise DataError(f"--grid {path}: expected a table [grid] of lists, such as batch = [16, 64], and no arms")
    usual = {
        "title": f"Grid {path.stem}",
        "question": "Does flatness predict generalization?",
        "reference": path.name,
        "orbit": 0,  # every network once: its functions are not at stake here
    }
    further: dict[str, Any] = {name: value for name, value in usual.items() if name not in there} | {
        "asks": Asks.RELATION
    }
    if asked or "numbers" not in there:
        further["numbers"] = [{"measure": name, "geometry": place} for name, place in asked or default]
    return parse(text, path.stem, Scale(scale), **{**further, **changes})
