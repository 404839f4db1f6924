"""NumPy archives (`.npz`), read without pickle."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from isoflat.core.errors import DataError
from isoflat.io.rows import Rows, check_room, rows

WHOLE = (("x", "y"), ("inputs", "targets"))
"""Names of the two arrays where a file has no splits."""


def read_npz(path: Path, split: str | None, examples: int | None) -> Rows:
    """Inputs and targets from an archive of arrays.

    Args:
        path: path of the file with `x_train, y_train, x_test, y_test` (the Keras layout), `x, y`, or `inputs, targets`.
        split: name of the split; None for train, or for the whole of a file without splits.
        examples: number of examples to take; None for all.

    Raises:
        DataError: the file is damaged, holds objects, or has no such arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {member.filename.removesuffix(".npy"): member.file_size for member in archive.infolist()}
        x, y = _names(sizes, split, path)
        check_room(sizes[x] + sizes[y], str(path))
        with np.load(path, allow_pickle=False) as archive:
            inputs, targets = archive[x], archive[y]
    except DataError:
        raise
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"{path} holds Python objects, which only pickle could rebuild: refused. Save plain arrays of numbers"
            ) from error
        raise DataError(f"{path} cannot be read: {error}. Save it again with numpy.savez_compressed") from error
    except Exception as error:  # a damaged archive raises half a dozen unrelated types
        raise DataError(
            f"{path} is truncated, corrupt or no .npz file ({type(error).__name__}: {error}). Fetch or save it again"
        ) from error
    return rows(inputs, targets, str(path), examples, (f"arrays {x} and {y}",))


def _names(there: dict[str, int], split: str | None, path: Path) -> tuple[str, str]:
    """Names of the arrays to read."""
    wanted = split or "train"
    if {f"x_{wanted}", f"y_{wanted}"} <= there.keys():
        return f"x_{wanted}", f"y_{wanted}"
    if split is None:
        for names in WHOLE:
            if there.keys() >= set(names):
                return names
    splits = sorted(name.removeprefix("x_") for name in there if name.startswith("x_") and f"y_{name[2:]}" in there)
    remedy = f"choose --split {' or '.join(splits)}" if splits else "name them x_train and y_train, or x and y"
    raise DataError(
        f"{path} has no arrays x_{wanted} and y_{wanted}; it holds {', '.join(sorted(there)[:8]) or 'nothing'}: {remedy}"
    )
