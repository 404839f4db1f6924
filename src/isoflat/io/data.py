"""Data from a file, a folder, a name or a factory."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoflat.core.errors import DataError
from isoflat.io.arrays import read_npz
from isoflat.io.images import read_folder, read_parquet
from isoflat.io.named import function, named, reason
from isoflat.io.rows import Rows, evenly, rows
from isoflat.io.saved import read_saved
from isoflat.io.tables import read_csv
from isoflat.risk.batches import Batches, as_batches

SPLITS = ("train", "test", "validation", "valid", "val")
"""Words in a file's name that tell which split it holds."""

_KNOWN = "digits, a .npz, .csv or .pt file, Parquet files, a folder of images by class, or module:factory"


def load_data(
    spec: str,
    split: str | None = None,
    *,
    transform: str | None = None,
    examples: int | None = None,
    batch_size: int = 500,
    note: Callable[[str], None] = lambda text: None,
) -> Batches:
    """Batches from a named source, as `--data` of the command line takes it.

    Args:
        spec: name of the source: `digits`, a path, a glob of Parquet files, or `module:factory`.
        split: name of the split; None for train where there are several.
        transform: name `module:fn` of a function from a batch's raw inputs to the network's; None for the convention of
            `rows.convert`.
        examples: number of examples to take, evenly spaced; None for all.
        batch_size: number of rows per batch.
        note: function that is called with a line for each choice that was made while the data was read.

    Returns:
        Batches that come out the same at each pass, as `isoflat.measure` takes them.

    Raises:
        DataError: the data is missing, damaged, empty or of an unknown kind.
        UsageError: `module:name` cannot be found.

    >>> [tuple(inputs.shape) for inputs, _ in load_data("digits", "test", examples=100, batch_size=60)]
    [(60, 64), (40, 64)]
    """
    apply = None if transform is None else function(transform, "--transform")
    found = _found(spec, split, examples)
    if isinstance(found, Rows):
        for text in (*found.notes, *_conversion(found, transform)):
            note(text)
        return found.batches(batch_size, apply)
    if apply is not None:
        raise DataError(f"--transform does not apply to the batches of --data {spec}: transform them in the factory")
    return as_batches(found, batch_size)


def load_rows(source: str, split: str) -> Rows:
    """All rows of a split, as the file stores them.

    Raises:
        DataError: the data is missing, damaged, empty or of an unknown kind, or the source gives batches.
    """
    found = _found(source, split, None)
    if not isinstance(found, Rows):
        raise DataError(f"--data {source} gives batches, and rows are wanted here: name a file")
    return found


def _found(source: str, split: str | None, examples: int | None) -> Any:
    """Rows from a source, or the batches that a factory makes."""
    path = Path(source)
    if source == "digits":
        return _digits(split, examples)
    if path.suffix == ".npz":
        return read_npz(_file(path), split, examples)
    if path.suffix == ".csv":
        return read_csv(_file(path), split, examples)
    if path.suffix in (".pt", ".pth"):
        return read_saved(_file(path), split, examples)
    if path.suffix == ".parquet" or path.is_dir():
        return _images(source, path, split, examples)
    if ":" in source and not path.exists():
        return _made(source, split, examples)
    if path.exists():
        raise DataError(f"{path}: unknown kind of data {path.suffix!r}; expected {_KNOWN}")
    raise DataError(f"--data {source}: no such data; expected {_KNOWN}")


def _digits(split: str | None, examples: int | None) -> Rows:
    if split not in (None, "train", "test"):
        raise DataError(f"digits has no split {split!r}: choose --split train or test")
    from isoflat.io.digits import digits  # imports scikit-learn, which other data does without

    inputs, targets = digits()[split == "test"]
    return _part(inputs, targets, "digits", examples, (f"digits, {split or 'train'} split",))


def _made(source: str, split: str | None, examples: int | None) -> Any:
    """Data that a factory of the user's returns; a pair of tensors is cut like the rows of a file."""
    if split is not None:
        raise DataError(f"--split does not apply to --data {source}: choose the split in the factory")
    made = named(source, "--data")
    if callable(made) and not isinstance(made, torch.utils.data.Dataset | torch.utils.data.DataLoader):
        try:
            made = made()
        except Exception as error:
            raise DataError(
                f"--data {source}: the factory, called without arguments, failed: {reason(error)}"
            ) from error
    if isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in made):
        return _part(torch.as_tensor(made[0]), torch.as_tensor(made[1]), source, examples)
    if examples is not None:
        raise DataError(f"--examples does not apply to the batches of --data {source}: take fewer in the factory")
    return made


def _part(inputs: Tensor, targets: Tensor, source: str, examples: int | None, notes: tuple[str, ...] = ()) -> Rows:
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets):
        return rows(inputs.numpy(), targets.numpy(), source, None)
    if targets.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        targets = targets.to(torch.int64)  # as losses want class indices
    chosen, note = evenly(len(inputs), examples, source)
    return Rows(inputs[chosen], targets[chosen], (*notes, *note)) if note else Rows(inputs, targets, notes)


def _images(source: str, path: Path, split: str | None, examples: int | None) -> Rows:
    """Rows of a split from Parquet files or from a folder of classes."""
    if path.is_dir() and not any(path.rglob("*.parquet")):
        inside = {entry.name: entry for entry in path.iterdir() if entry.is_dir()}
        if split is None and not inside.keys() & set(SPLITS):
            return read_folder(path, examples)
        if (split or "train") not in inside:
            raise DataError(
                f"{path} has no folder {split or 'train'}; it holds {', '.join(sorted(inside)[:8]) or 'none'}"
            )
        return read_folder(inside[split or "train"], examples)
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
    elif glob.has_magic(source):
        files = sorted(map(Path, glob.glob(source)))  # noqa: PTH207 (a pattern may be absolute)
    else:
        files = [_file(path)]
    if not files:
        raise DataError(f"--data {source}: no Parquet file of that name")
    return read_parquet(_of_split(files, split, source), source, examples)


def _of_split(files: Sequence[Path], split: str | None, source: str) -> list[Path]:
    """Files whose names tell that they belong to the split; all files where no name tells."""
    told = {
        file: next((word for word in re.split(r"[^a-z]+", file.stem.lower()) if word in SPLITS), None) for file in files
    }
    if split is None and (len(files) == 1 or not any(told.values())):
        return list(files)
    chosen = [file for file in files if told[file] == (split or "train")]
    if not chosen:
        there = ", ".join(sorted({word for word in told.values() if word})) or "none that tells its split"
        raise DataError(f"--data {source}: no file of the split {split or 'train'}; there are files of: {there}")
    return chosen


def _conversion(found: Rows, transform: str | None) -> tuple[str, ...]:
    """A note on how rows become the network's inputs."""
    if transform is not None:
        return (f"inputs prepared by {transform}",)
    if found.inputs.is_floating_point() or (found.inputs.dtype is not torch.uint8 and found.inputs.ndim not in (3, 4)):
        return ()
    return ("pixels divided by 255, channels first (no --transform was given)",)


def _file(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"--data {path}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes): fetch or save it again")
    return path
