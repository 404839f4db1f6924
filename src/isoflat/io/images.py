"""Images from Parquet files in the Hugging Face layout, and from folders of classes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from isoflat.core.errors import DataError
from isoflat.io.rows import Rows, check_room, evenly, rows

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
"""Formats that are decoded; other decoders are never reached, whatever a file claims to be."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm")

_LABELS = ("label", "labels", "fine_label", "target", "class")


def read_parquet(paths: Sequence[Path], source: str, examples: int | None) -> Rows:
    """Images and labels from Parquet files: a column of encoded images and one of integers.

    Args:
        paths: paths of the files, in order.
        source: name of the data as the user wrote it, for messages.
        examples: number of examples to take; None for all.

    Raises:
        DataError: a file is damaged, the columns are not there, or pyarrow or pillow is not installed.
    """
    parquet = _optional("pyarrow.parquet")
    blobs: list[bytes | None] = []
    labels: list[np.ndarray] = []
    for path in paths:
        try:
            file = parquet.ParquetFile(path)
            image, label = _columns(file.schema_arrow, path)
            check_room(
                sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)), source
            )
            table = file.read(columns=[image, label])
            column = table.column(image).combine_chunks()
            if _is_struct(column.type):
                column = column.field("bytes")
            blobs += column.to_pylist()
            labels.append(table.column(label).to_numpy())
        except DataError:
            raise
        except Exception as error:  # a damaged file may raise anything from within the reader
            raise DataError(f"{path} is truncated, corrupt or no Parquet file ({error}). Fetch it again") from error
    targets = np.concatenate(labels)
    if targets.dtype.kind not in "iu" or (targets.dtype.kind == "i" and targets.size and int(targets.min()) < 0):
        raise DataError(f"{source}: some labels are missing or negative; keep only the examples that have one")
    chosen, notes = evenly(len(blobs), examples, source)
    if empty := [row for row in chosen if blobs[row] is None]:
        raise DataError(f"{source}: the image in row {empty[0]} is not in the file (a path only): embed the bytes")
    pixels = decode([lambda row=row: blobs[row] or b"" for row in chosen], [f"row {row}" for row in chosen], source)
    return rows(pixels, targets[chosen], source, None, (f"{len(paths)} Parquet files",) * (len(paths) > 1) + notes)


def read_folder(folder: Path, examples: int | None) -> Rows:
    """Images in one subfolder per class; classes are numbered in the order of their names.

    Args:
        folder: folder with the subfolders.
        examples: number of examples to take; None for all.

    Raises:
        DataError: there are no classes or images, or one cannot be decoded.
    """
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files: list[Path] = []
    targets: list[int] = []
    for index, place in enumerate(classes):
        found = sorted(entry for entry in place.rglob("*") if entry.suffix.lower() in SUFFIXES and entry.is_file())
        if not found:
            raise DataError(f"{folder}: the class folder {place.name} holds no images ({', '.join(SUFFIXES)})")
        files += found
        targets += [index] * len(found)
    chosen, notes = evenly(len(files), examples, f"{folder} (class subfolders with images)")
    picked = [files[row] for row in chosen]
    pixels = decode(
        [path.read_bytes for path in picked], [str(path.relative_to(folder)) for path in picked], str(folder)
    )
    counted = f"{len(classes)} classes numbered by name: {', '.join(place.name for place in classes[:10])}"
    return rows(pixels, np.array(targets)[chosen], str(folder), None, (counted, *notes))


def decode(read: Sequence[Callable[[], bytes]], names: Sequence[str], source: str) -> np.ndarray:
    """Encoded images of one size as bytes: shape `(N, H, W)` if all are grey, else `(N, H, W, 3)`.

    Sizes are compared before a pixel is decoded, so that an image that claims to be huge costs nothing.

    Args:
        read: functions, one for each image, that return the bytes of its file.
        names: names of the images, for messages.
        source: name of the data, for messages.

    Raises:
        DataError: an image is damaged, of another kind, or of another size than the first.
    """
    image = _optional("PIL.Image")
    grey, size = True, None
    for blob, name in zip(read, names, strict=True):
        with _opened(image, blob(), f"{source}, {name}") as picture:
            size = size or picture.size
            if picture.size != size:
                raise DataError(
                    f"{source}, {name} is {picture.size[0]} × {picture.size[1]} pixels, the first image {size[0]} × "
                    f"{size[1]}: bring all images to one size first"
                )
            grey = grey and picture.mode in ("L", "1")
    width, height = size or (0, 0)
    shape = (len(read), height, width) if grey else (len(read), height, width, 3)
    check_room(int(np.prod(shape, dtype=object)), source)
    pixels = np.empty(shape, dtype=np.uint8)
    for row, (blob, name) in enumerate(zip(read, names, strict=True)):
        with _opened(image, blob(), f"{source}, {name}") as picture:
            try:
                pixels[row] = np.asarray(picture.convert("L" if grey else "RGB"))
            except Exception as error:  # a damaged image may raise anything from within the decoder
                raise DataError(f"{source}, {name} cannot be decoded ({error}): replace or remove it") from error
    return pixels


def _opened(image: ModuleType, blob: bytes, name: str) -> Any:
    """An opened image of which only the header has been read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", image.DecompressionBombWarning)
            picture = image.open(io.BytesIO(blob), formats=FORMATS)
    except Exception as error:  # a damaged header may raise anything from within pillow
        raise DataError(f"{name} is no image of a known kind ({', '.join(FORMATS)}): {error}") from error
    if picture.mode.startswith(("I", "F")):
        raise DataError(
            f"{name} has more than 8 bits per channel: convert it, or give a loader as --data module:factory"
        )
    return picture


def _columns(schema: Any, path: Path) -> tuple[str, str]:
    """Names of the image column and the label column."""
    import pyarrow.types as types

    def encoded(kind: Any) -> bool:
        if _is_struct(kind):
            return any(kind.field(i).name == "bytes" and encoded(kind.field(i).type) for i in range(kind.num_fields))
        return types.is_binary(kind) or types.is_large_binary(kind)

    images = [field.name for field in schema if encoded(field.type)]
    integers = [field.name for field in schema if types.is_integer(field.type)]
    named = [name for name in _LABELS if name in integers] or integers
    if len(images) == 1 and (len(named) == 1 or (named and named[0] in _LABELS)):
        return images[0], named[0]
    there = ", ".join(f"{field.name}: {field.type}" for field in schema)
    raise DataError(
        f"{path}: expected one column of encoded images (bytes, or a struct with bytes) and one of integer labels, got "
        f"{there}. Give other data as --data module:factory"
    )


def _is_struct(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_struct(kind)


def _optional(name: str) -> ModuleType:
    """A module of the extra `images`.

    Raises:
        DataError: the module is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"image data needs {name.partition('.')[0]}: pip install 'isoflat[images]' ({error})"
        ) from error
