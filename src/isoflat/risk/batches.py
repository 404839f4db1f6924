"""Data in a fixed order that can be read again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from isoflat.core.errors import DataError, NondeterministicRisk, UsageError
from isoflat.risk.containers import held, is_object, mapped, zipped
from isoflat.risk.examples import ACCEPTED, Rereader, left_out, one_shot, rows_agree

ROWS = 500
"""Rows per batch where the library cuts the batches itself."""


@final
@dataclass(frozen=True)
class Batches:
    """Batches that come out the same at each pass.

    Attributes:
        source: function that returns a fresh iterator over the batches.
        volatile: flag that the source could give other data at the next pass (a loader), so that passes are compared.
        digests: hash of each batch at the first pass; None before it.
        evenly: function of the number of processes that gives the same rows in batches which they share evenly; None where
            the user made the batches.
        together: function that gives the same rows as a single batch, or refuses to, told why that is wanted; None where
            the user made the batches.
        whole: reason why batches are neither cut nor merged; None where they may be.
        notes: remarks on the data, where a reader must know them.
    """

    source: Callable[[], Iterator[Any]]
    volatile: bool
    digests: tuple[str, ...] | None = None
    evenly: Callable[[int], Batches] | None = None
    together: Callable[[str], Batches] | None = None
    whole: str | None = None
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        """The batches in order; compared with the first pass where the source is volatile."""
        if self.digests is None or not self.volatile:
            yield from self.source()
            return
        count = 0
        for count, batch in enumerate(self.source(), start=1):
            if count > len(self.digests) or digest(batch) != self.digests[count - 1]:
                raise self._differs(f"batch {count - 1}")
            yield batch
        if count != len(self.digests):
            raise self._differs(f"the number of batches ({len(self.digests)} before, {count} now)")

    def pinned(self, digests: Sequence[str]) -> Batches:
        """The same batches, to be compared with these digests from now on."""
        return replace(self, digests=tuple(digests))

    def among(self, world: int) -> Batches:
        """The same data for so many processes: cut evenly where the library cuts it, else as it is."""
        return self if world == 1 or self.evenly is None or self.whole else self.evenly(world)

    def kept(self, why: str) -> Batches:
        """The same data in batches that stay as they are: a single one where the library made them, else the user's own.

        Args:
            why: reason, as the end of a sentence that begins with "because".

        Raises:
            DataError: the data comes in batches of a size that was asked for.
        """
        return replace(self if self.together is None else self.together(why), whole=why)

    def cut(self, rows: int) -> Batches:
        """The same data in pieces of at most so many rows.

        Raises:
            UsageError: batches stay as they are.
        """
        if self.whole:
            raise UsageError(
                f"memory ran out, and batches cannot be cut to {rows} rows, because {self.whole}. Give smaller batches "
                "(their size is part of the number then), or more memory"
            )
        return Batches(
            lambda: (piece for batch in self for piece in pieces(batch, rows)), self.volatile and not self.digests
        )

    def only(self, places: Tensor, rows: int) -> Batches:
        """Subset of the rows, in batches of a given size.

        Args:
            places: places of the rows in the data, ascending, shape `(k,)`.
            rows: number of rows of a batch.

        Raises:
            UsageError: batches stay as they are.
        """
        if self.whole:
            raise UsageError(f"single rows of the data mean nothing by themselves, because {self.whole}")

        def source() -> Iterator[Any]:
            held: list[Any] = []
            first, waiting = 0, 0
            for batch in self:
                count = rows_of(batch)
                low, high = torch.searchsorted(places, torch.tensor([first, first + count])).tolist()
                first += count
                taken = low
                while taken < high:
                    more = min(high - taken, rows - waiting)
                    held.append(chosen(batch, places[taken : taken + more] - (first - count), count))
                    taken, waiting = taken + more, waiting + more
                    if waiting == rows:
                        yield merged(held)
                        held, waiting = [], 0
            if held:
                yield merged(held)

        return Batches(source, self.volatile and not self.digests)

    def numbered(self) -> Batches:
        """The same data, each batch `Beside` the places of its rows in the data."""

        def source() -> Iterator[Beside]:
            first = 0
            for batch in self:
                rows = rows_of(batch)
                yield Beside(batch, torch.arange(first, first + rows))
                first += rows

        return Batches(source, self.volatile and not self.digests, whole=self.whole)

    def beside(self, columns: Sequence[Any]) -> Batches:
        """The same data, each batch `Beside` what was found out about it: tensors with as many rows."""
        return Batches(
            lambda: (Beside(*pair) for pair in zip(self, columns, strict=True)),
            self.volatile and not self.digests,
            whole=self.whole,
        )

    def weighted(self, weights: Sequence[Tensor]) -> Batches:
        """The same data, each batch with weights of its rows."""
        return Batches(
            lambda: (Weighted(*pair) for pair in zip(self, weights, strict=True)),
            self.volatile and not self.digests,
            whole=self.whole,
        )

    @staticmethod
    def _differs(what: str) -> NondeterministicRisk:
        return NondeterministicRisk(
            f"two passes over the data differ in {what}: expected the same batches in the same order. Give a loader "
            "with shuffle=False and without random augmentation, of a dataset that can be read again, or a list of batches"
        )


@final
class Beside(NamedTuple):
    """A batch with what was found out about its rows, so that both are cut alike. The network sees the batch alone."""

    batch: Any
    column: Any


@final
class Weighted(NamedTuple):
    """A batch whose rows count as often as their weights say, shape `(rows,)`, float64."""

    batch: Any
    weights: Tensor


def alone(batch: Any) -> Any:
    """The batch without what is beside it."""
    return batch.batch if isinstance(batch, Beside | Weighted) else batch


def as_batches(data: Any, rows: int = ROWS) -> Batches:
    """Batches from whatever holds the user's data.

    Args:
        data: a loader, a list of batches, a pair of tensors or arrays, a map-style dataset, an iterable that can be
            iterated again, or a function returning a fresh iterator.
        rows: number of rows per batch where the library cuts them itself.

    Raises:
        DataError: the data shuffles, can be read once only, or has no known form.

    >>> x, y = torch.zeros(1100, 3), torch.zeros(1100)
    >>> [len(targets) for inputs, targets in as_batches((x, y), rows=500)]
    [500, 500, 100]
    """
    if isinstance(data, Batches):
        return data
    if isinstance(data, DataLoader):
        return _from_loader(data)
    if (known := _from_batch(data, rows)) is not None:
        return known
    if isinstance(data, list | tuple):
        if not data:
            raise DataError("the data is an empty list: expected at least one batch")
        return Batches(partial(iter, data), volatile=False)
    if isinstance(data, Iterator):
        raise one_shot(type(data).__name__)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return _from_dataset(data, rows)
    if isinstance(data, Iterable) and not isinstance(data, Mapping | Tensor | np.ndarray | str):
        return _again(partial(iter, data))
    if callable(data):
        return _again(lambda: iter(data()))
    return _from_object(data)


def _from_object(data: Any) -> Batches:
    """A single batch that is an object with tensors.

    Raises:
        DataError: there are none in it.
    """
    lone = isinstance(data, Tensor | np.ndarray)
    if not lone and next(tensors(data), None) is not None:
        return Batches(partial(iter, [data]), volatile=False)
    hint = ". A tensor by itself is one batch for a BatchLoss as a list, [tensor]" if lone else ""
    raise DataError(f"cannot read batches from {type(data).__name__}: give {ACCEPTED}{hint}")


def _from_batch(data: Any, rows: int) -> Batches | None:
    """Batches of inputs and targets, or a single one of what looks like several; None for other data.

    Raises:
        DataError: there are further tensors beside them, or numbers of rows differ.
    """
    if _is_batch(data):
        return Batches(partial(iter, [data]), volatile=False)
    if not isinstance(data, tuple):
        return None
    arrays = [isinstance(part, Tensor | np.ndarray) for part in data]
    if len(data) == 2 and all(arrays):
        return _from_pair(torch.as_tensor(data[0]), torch.as_tensor(data[1]), rows)
    if len(data) == 2 and arrays[1] and _is_input(data[0]):
        return _from_columns(data, rows)
    if len(data) > 2 and all(arrays):
        raise DataError(
            f"the data is a tuple of {len(data)} tensors, of which nobody knows which are targets: give ((x, tabular), y) for a "
            "model of several inputs, or a list of batches"
        )
    return None


def _again(source: Callable[[], Iterator[Any]]) -> Batches:
    """Batches of a source that could give others at the next pass."""
    return Batches(Rereader(source, digest, Batches._differs), volatile=True)


def _is_batch(data: Any) -> bool:
    """Test of whether data is a single batch that looks like several: a packed sequence, a graph that can be iterated."""
    return (
        is_object(data) and isinstance(data, tuple | Iterable) and (isinstance(data, tuple) or hasattr(data, "apply"))
    )


def _is_input(part: Any) -> bool:
    """Test of whether something is inputs of a batch by itself: a container or object with tensors."""
    known = isinstance(part, list | tuple | Mapping) and not isinstance(part, Tensor)
    return (known or is_object(part)) and next(tensors(part), None) is not None


def _from_columns(data: tuple[Any, ...], rows: int) -> Batches:
    """Batches of several inputs and their targets; a single one where they do not have the same number of rows."""
    count = data[1].shape[0] if data[1].ndim else 0
    if not rows_agree(data, count):
        return Batches(partial(iter, [data]), volatile=False)
    evenly = lambda world: _from_columns(data, even(count, rows, world))  # noqa: E731
    together = lambda why: _from_columns(data, count)  # noqa: E731
    return Batches(partial(iter, list(pieces(data, rows))), volatile=False, evenly=evenly, together=together)


def _from_loader(loader: DataLoader[Any]) -> Batches:
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    if any(isinstance(sampler, RandomSampler) for sampler in samplers):
        raise DataError("the DataLoader shuffles: each product must see the same batches. Build it with shuffle=False")
    return replace(_again(partial(iter, loader)), notes=left_out(loader))


def _from_pair(inputs: Tensor, targets: Tensor, rows: int) -> Batches:
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets):
        raise DataError(
            f"inputs and targets must have the same number of rows, got shapes {tuple(inputs.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if len(inputs) == 0:
        raise DataError("the data is empty: 0 rows")
    pairs = list(zip(inputs.split(rows), targets.split(rows), strict=True))
    evenly = lambda world: _from_pair(inputs, targets, even(len(inputs), rows, world))  # noqa: E731
    together = lambda why: _from_pair(inputs, targets, len(inputs))  # noqa: E731
    return Batches(partial(iter, pairs), volatile=False, evenly=evenly, together=together)


def _from_dataset(data: Dataset[Any], rows: int) -> Batches:
    evenly = lambda world: _from_dataset(data, even(len(data), rows, world))  # noqa: E731  # pyrefly: ignore
    together = lambda why: _from_dataset(data, len(data))  # noqa: E731  # pyrefly: ignore
    return Batches(lambda: iter(DataLoader(data, batch_size=rows)), volatile=True, evenly=evenly, together=together)


def even(total: int, rows: int, world: int) -> int:
    """Rows per batch, no more than given, that give each of so many processes as many batches.

    >>> even(1100, 500, 2), even(1000, 500, 4), even(3, 500, 4)
    (275, 250, 1)
    """
    rounds = -(-total // (rows * world))
    return -(-total // (rounds * world))


def tensors(batch: Any) -> Iterator[Tensor]:
    """Tensors inside a batch, in order."""
    if isinstance(batch, Tensor):
        yield from [batch] if batch.layout is torch.strided else _dense_parts(batch)
    elif isinstance(batch, np.ndarray):
        yield torch.as_tensor(batch)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from tensors(value)
    else:
        for value in held(batch):
            yield from tensors(value)


def _dense_parts(sparse: Tensor) -> Iterator[Tensor]:
    """Indices and values of a sparse tensor."""
    found = sparse.detach() if sparse.layout is torch.sparse_coo else sparse.detach().to_sparse_coo()
    found = found.coalesce()
    yield from (found.indices(), found.values())


def leading(batch: Any) -> int | None:
    """Rows that the tensors of a batch agree on: their leading dimension; None where they differ, or there are none.

    A leading dimension of one, beside others, is that of something all rows share.

    >>> leading((torch.zeros(5, 2), torch.zeros(5))), leading((torch.zeros(7, 5, 2), torch.zeros(5)))
    (5, None)
    """
    sizes = {tensor.shape[0] for tensor in tensors(batch) if tensor.ndim}
    if len(sizes) > 1:
        sizes.discard(1)
    return sizes.pop() if len(sizes) == 1 else None


def rows_of(batch: Any) -> int:
    """Rows of a batch (`leading`); one where that is not known, so that nothing is cut by a guess."""
    rows = leading(batch)
    return 1 if rows is None else rows


def move(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The batch with its tensors on a device and its floating-point tensors in a precision."""
    if isinstance(batch, np.ndarray):
        batch = torch.as_tensor(batch)
    if isinstance(batch, Tensor):
        return batch.detach().to(device=device, dtype=dtype if batch.is_floating_point() else None)
    if is_object(batch):
        return mapped(batch, lambda part: move(part, device, dtype))
    if isinstance(batch, Mapping):
        moved = {key: move(value, device, dtype) for key, value in batch.items()}
        return moved if type(batch) is dict else _rebuild(batch, moved)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device, dtype) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move(value, device, dtype) for value in batch)
    return mapped(batch, lambda part: move(part, device, dtype))


def pieces(batch: Any, rows: int) -> Iterator[Any]:
    """A batch cut into pieces of at most so many rows: every tensor that has all rows of the batch is cut.

    >>> [len(part["x"]) for part in pieces({"x": torch.zeros(5), "scale": torch.ones(1)}, 2)]
    [2, 2, 1]
    """
    count = rows_of(batch)
    for start in range(0, count, rows):
        yield chosen(batch, slice(start, start + rows), count)


def chosen(batch: Any, rows: slice | Tensor, count: int) -> Any:
    """Some rows of a batch of `count`; what has not as many stays as it is.

    >>> chosen({"x": torch.arange(3), "scale": 2.0}, torch.tensor([2, 0]), 3)
    {'x': tensor([2, 0]), 'scale': 2.0}
    """
    if is_object(batch) or (isinstance(batch, Tensor) and batch.layout is not torch.strided):
        return batch
    if isinstance(batch, Tensor):
        places = rows.to(batch.device) if isinstance(rows, Tensor) else rows
        return batch[places] if batch.ndim and len(batch) == count else batch
    if isinstance(batch, np.ndarray):
        places = rows.numpy() if isinstance(rows, Tensor) else rows
        return batch[places] if batch.ndim and len(batch) == count else batch
    if isinstance(batch, Mapping):
        cut = {key: chosen(value, rows, count) for key, value in batch.items()}
        return cut if type(batch) is dict else _rebuild(batch, cut)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(chosen(value, rows, count) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(chosen(value, rows, count) for value in batch)
    return mapped(batch, lambda part: chosen(part, rows, count))


def merged(pieces: Sequence[Any]) -> Any:
    """Pieces of batches as one: tensors with rows are joined; what has none is that of the first piece."""
    return pieces[0] if len(pieces) == 1 else _joined(pieces, [rows_of(piece) for piece in pieces])


def _joined(pieces: Sequence[Any], counts: Sequence[int]) -> Any:
    first = pieces[0]
    if is_object(first):
        return first
    if isinstance(first, Tensor | np.ndarray):
        whole = all(piece.ndim and len(piece) == count for piece, count in zip(pieces, counts, strict=True))
        if not whole:
            return first
        return torch.cat(list(pieces)) if isinstance(first, Tensor) else np.concatenate(list(pieces))
    if isinstance(first, Mapping):
        made = {key: _joined([piece[key] for piece in pieces], counts) for key in first}
        return made if type(first) is dict else _rebuild(first, made)
    if isinstance(first, list | tuple):
        parts = [_joined(column, counts) for column in zip(*pieces, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return zipped(pieces, lambda parts: _joined(parts, counts))


def _rebuild(batch: Mapping[Any, Any], moved: dict[Any, Any]) -> Any:
    """A mapping of the user's own class, such as a tokenizer's batch; a plain dict where it cannot be rebuilt."""
    try:
        return type(batch)(moved)  # pyrefly: ignore
    except TypeError:
        return moved


def digest(batch: Any) -> str:
    """Hash of types, shapes and bytes of every tensor in a batch."""
    state = hashlib.blake2b(digest_size=16)
    for tensor in tensors(batch):
        state.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return state.hexdigest()
