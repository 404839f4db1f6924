"""Rows as a file stores them, and the batches a network is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import psutil
import torch
from torch import Tensor

from isoflat.core.errors import DataError
from isoflat.io.named import reason
from isoflat.risk.batches import Batches, even

CHANNELS = (1, 3, 4)
"""Numbers of colour channels that tell where in an array of images they lie."""


@final
@dataclass(frozen=True)
class Rows:
    """Inputs and targets, row by row.

    Attributes:
        inputs: as stored; images stay in bytes until a batch is made.
        targets: class indices as int64, or real targets.
        notes: what was read, for the reader of the result.
    """

    inputs: Tensor
    targets: Tensor
    notes: tuple[str, ...] = ()

    def batches(self, size: int, transform: Callable[[Tensor], Any] | None = None) -> Batches:
        """Batches in the stored order, converted as they are read.

        Args:
            size: rows per batch.
            transform: from the raw rows of a batch to the network's input; None for the convention of `convert`.
        """

        def once() -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, len(self.targets), size):
                raw = self.inputs[start : start + size]
                yield transformed(transform, raw), self.targets[start : start + size]

        def evenly(world: int) -> Batches:
            return replace(self.batches(even(len(self.targets), size, world), transform), together=together)

        def together(why: str) -> Batches:
            if size < (total := len(self.targets)):
                raise DataError(
                    f"batches of {size} rows (--batch-size) would change the number, because {why}. Take all rows at once "
                    f"with --batch-size {total}, or give batches of your own through --data module:factory"
                )
            return self.batches(size, transform)

        # Code of the user's may be random: the library then compares each pass with the first.
        return Batches(once, volatile=transform is not None, evenly=evenly, together=together)


def transformed(transform: Callable[[Tensor], Any] | None, raw: Tensor) -> Tensor:
    """One batch's input.

    Raises:
        DataError: the transform fails, or does not return a tensor with one row for each row.
    """
    if transform is None:
        return convert(raw)
    given = f"a {str(raw.dtype).removeprefix('torch.')} tensor of shape {tuple(raw.shape)}"
    try:
        result = transform(raw.clone())
    except Exception as error:
        raise DataError(f"--transform failed on {given}: {reason(error)}") from error
    if not isinstance(result, Tensor) or result.ndim == 0 or len(result) != len(raw):
        came = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise DataError(f"--transform got {given} and returned {came}: expected a tensor with one row for each row")
    return result


def convert(raw: Tensor) -> Tensor:
    """The convention without a transform: images of integers become float32 in [0, 1], channels first.

    Every array of bytes (uint8), and every array of integers with three or four dimensions, counts as images: it is
    divided by 255; `(N, H, W)` becomes `(N, 1, H, W)`, and `(N, H, W, C)` becomes `(N, C, H, W)` for C in 1, 3, 4.
    Everything else is passed as it is.

    Raises:
        DataError: the channels cannot be told from the shape, or a value is no byte.

    >>> convert(torch.full((2, 5, 7, 3), 255, dtype=torch.uint8)).shape
    torch.Size([2, 3, 5, 7])
    """
    if raw.is_floating_point() or raw.is_complex() or raw.dtype is torch.bool:
        return raw
    if raw.dtype is not torch.uint8 and raw.ndim not in (3, 4):
        return raw
    if raw.dtype is not torch.uint8 and (int(raw.min()) < 0 or int(raw.max()) > 255):
        raise DataError(
            f"the inputs of shape {tuple(raw.shape)} hold integers from {int(raw.min())} to {int(raw.max())}, no pixels "
            "from 0 to 255: say with --transform module:fn what the network is to be given"
        )
    pixels = raw.to(torch.float32) / 255
    if raw.ndim == 3:
        return pixels[:, None]
    if raw.ndim == 4 and raw.shape[3] in CHANNELS:
        return pixels.permute(0, 3, 1, 2).contiguous()
    if raw.ndim == 4 and raw.shape[1] not in CHANNELS:
        raise DataError(
            f"images of shape {tuple(raw.shape)} have their channels neither last nor first (1, 3 or 4 of them): say "
            "with --transform module:fn what the network is to be given"
        )
    return pixels


def rows(
    inputs: np.ndarray, targets: np.ndarray, source: str, examples: int | None, notes: tuple[str, ...] = ()
) -> Rows:
    """Rows from two arrays of a file, whole or in part.

    Args:
        inputs: one row for each example.
        targets: one row for each example.
        source: the file, for messages.
        examples: how many to take, evenly spaced; None for all.
        notes: kept.

    Raises:
        DataError: there are none, their numbers differ, or they hold no numbers.
    """
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets):
        raise DataError(
            f"{source}: inputs of shape {inputs.shape} and targets of shape {targets.shape} differ in their number of "
            "rows: write one target for each input"
        )
    chosen, note = evenly(len(inputs), examples, source)
    labels = numbers(targets if examples is None else targets[chosen], f"{source}: the targets")
    if not labels.is_floating_point() and labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype is not torch.int64 and not labels.is_floating_point():
        labels = labels.to(torch.int64)
    data = numbers(inputs if examples is None else inputs[chosen], f"{source}: the inputs")
    return Rows(data, labels, (*notes, *note))


def evenly(total: int, examples: int | None, source: str) -> tuple[list[int], tuple[str, ...]]:
    """Places of the rows to take: all, or some evenly spaced, so that data sorted by class keeps every class.

    Raises:
        DataError: there are no rows.

    >>> evenly(10, 4, "x.npz")
    ([0, 2, 5, 7], ('4 of 10 examples, evenly spaced',))
    """
    if total == 0:
        raise DataError(f"{source} is empty: 0 examples. Choose another file or --split")
    if examples is None or examples >= total:
        return list(range(total)), ()
    return [i * total // examples for i in range(examples)], (f"{examples} of {total} examples, evenly spaced",)


def numbers(array: np.ndarray, what: str) -> Tensor:
    """A numeric array as a tensor.

    Raises:
        DataError: it holds text, dates or objects.
    """
    if array.dtype.kind not in "biuf":
        raise DataError(f"{what} are of type {array.dtype}, no plain numbers: save them as integers or floats")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    if array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def check_room(size: int, source: str) -> None:
    """Refuse to decode more than fits.

    Raises:
        DataError: what the file declares would not fit into the free memory.
    """
    free = psutil.virtual_memory().available
    if size > free:
        raise DataError(
            f"{source} declares {size / 2**30:.1f} GiB of data, more than the {free / 2**30:.1f} GiB of free memory: take "
            "a part with --examples, or give a loader as --data module:factory"
        )
