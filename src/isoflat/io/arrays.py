"""NumPy archives (`.npz`), read without pickle."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from isoflat.core.errors import DataError
from isoflat.io.pairs import pair_names
from isoflat.io.rows import Rows, check_room, rows


def read_npz(path: Path, split: str | None, examples: int | None) -> Rows:
    """Inputs and targets from an archive of arrays.

    Args:
        path: path of the file with `x_train, y_train, x_test, y_test` (the Keras layout), `x, y`, or other names that
            `pair_names` knows.
        split: name of the split; None for train, or for the whole of a file without splits.
        examples: number of examples to take; None for all.

    Raises:
        DataError: the file is damaged, holds objects, or has no such arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {member.filename.removesuffix(".npy"): member.file_size for member in archive.infolist()}
        x, y = pair_names(list(sizes), split, str(path))
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
