"""Data that comes as single examples, as columns, or once only: brought into batches, or refused with the form to use."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from numbers import Number
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from isoflat.core.errors import DataError, IsoflatError

ACCEPTED = (
    "a DataLoader without shuffling, a list of batches, a pair (inputs, targets) of tensors, a map-style dataset, "
    "or a function that returns a fresh iterator"
)
"""Forms of data."""


def one_shot(kind: str) -> DataError:
    """The refusal of data that can be read once only."""
    return DataError(f"the data is a one-shot iterator ({kind}), but each product reads it anew: give {ACCEPTED}")


@final
class Rereader:
    """Source of fresh iterators over the same data, which notices data that cannot be read again.

    A loss is probed on the first batch before all are read, so that a source which goes on where it stopped would lose
    that batch. Later passes are compared by their hashes.

    >>> source = iter([1, 2])
    >>> list(Rereader(lambda: source, str, ValueError)())
    [1, 2]
    """

    def __init__(
        self, source: Callable[[], Iterator[Any]], digest: Callable[[Any], str], differs: Callable[[str], IsoflatError]
    ) -> None:
        self._source, self._digest, self._differs = source, digest, differs
        self._first: str | None = None
        self._complete = False
        self._last: Callable[[], Any] = lambda: None

    def __call__(self) -> Iterator[Any]:
        """The batches in order.

        Raises:
            DataError: they came already, and come once only.
            IsoflatError: others come first than did before.
        """
        iterator = self._source()
        kind = type(iterator).__name__
        if self._last() is iterator:
            raise one_shot(kind)
        try:
            self._last = weakref.ref(iterator)
        except TypeError:  # iterators of built-in containers
            self._last = lambda: iterator
        count = 0
        for count, batch in enumerate(iterator, start=1):
            if count == 1 and not self._complete:
                self._compare(self._digest(batch))
            yield batch
        if not count and self._first is not None:
            raise one_shot(kind)
        self._complete = True

    def _compare(self, found: str) -> None:
        if self._first is not None and found != self._first:
            raise self._differs("batch 0")
        self._first = found


def gathered(data: Any, rows: int) -> Any:
    """Single examples put together; any other data as it is.

    Args:
        data: as the user gave it.
        rows: number of examples of a batch, where they come in a stream.

    >>> inputs, targets = gathered([(torch.zeros(3), 0), (torch.ones(3), 1)], 2)
    >>> tuple(inputs.shape), targets.tolist()
    ((2, 3), [0, 1])
    """
    if isinstance(data, list | tuple) and data and all(map(_is_example, data)):
        inputs, targets = ([torch.as_tensor(example[k]) for example in data] for k in (0, 1))
        if len({part.shape for part in inputs}) == 1:
            return torch.stack(inputs), default_collate(targets)
        return [(one[None], target[None]) for one, target in zip(inputs, targets, strict=True)]
    if isinstance(data, IterableDataset):
        return _streamed(data, rows)
    return data


def _streamed(data: IterableDataset[Any], size: int) -> Any:
    """A stream of examples, by torch's convention, in batches; a stream of batches as it is.

    Raises:
        DataError: it cannot be told which of both it is, or it can be read once only.
    """
    first, again = next(iter(data), None), next(iter(data), None)
    if first is not None and again is None:
        raise one_shot(type(data).__name__)
    if _is_example(first):
        return DataLoader(data, batch_size=size)
    if isinstance(first, list | tuple) and len(first) == 2 and all(isinstance(p, Tensor | np.ndarray) for p in first):
        rows = [part.shape[0] for part in first if part.ndim]
        if len(rows) == 2 and rows[0] != rows[1]:
            raise DataError(
                f"the IterableDataset gives pairs of shapes {tuple(first[0].shape)} and {tuple(first[1].shape)}: give "
                "DataLoader(dataset, batch_size=...) where these are examples, batch_size=None where they are batches"
            )
    return data


def _is_example(item: Any) -> bool:
    """Test of whether an item is an input and a target without rows."""
    if not isinstance(item, list | tuple) or len(item) != 2 or hasattr(item, "_fields"):
        return False
    inputs, target = item
    if not isinstance(inputs, Tensor | np.ndarray) or not inputs.ndim:
        return False
    single = isinstance(target, Number | np.generic) or (isinstance(target, Tensor | np.ndarray) and target.ndim == 0)
    return bool(single)


def left_out(loader: DataLoader[Any]) -> tuple[str, ...]:
    """Note on examples that a loader drops because they do not fill a batch."""
    sampler = loader.batch_sampler
    if not (loader.drop_last or getattr(sampler, "drop_last", False)):
        return ()
    size = loader.batch_size or getattr(sampler, "batch_size", None)
    examples: Any = getattr(sampler, "sampler", loader.sampler)
    if isinstance(loader.dataset, IterableDataset) or not isinstance(size, int) or not hasattr(examples, "__len__"):
        return ("the loader has drop_last=True: examples that do not fill a batch are left out",)
    left = len(examples) % size
    return (f"the loader has drop_last=True: {left} of {len(examples)} examples are left out",) if left else ()


def rows_agree(parts: Any, rows: int) -> bool:
    """Test of whether all tensors in containers have so many rows.

    >>> rows_agree({"a": torch.zeros(2), "b": [torch.zeros(2, 1)]}, 2), rows_agree([torch.zeros(3)], 2)
    (True, False)
    """
    if isinstance(parts, Tensor | np.ndarray):
        return parts.ndim > 0 and len(parts) == rows
    if isinstance(parts, Mapping):
        return all(rows_agree(part, rows) for part in parts.values())
    return isinstance(parts, list | tuple) and all(rows_agree(part, rows) for part in parts)
