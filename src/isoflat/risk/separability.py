"""Experiments on whether a loss is a weighted mean over rows: the loss of a batch against those of parts of it.

Writing every row twice changes no ratio, so that it tells nothing about weights that depend on the batch; mixed parts of
unequal size do. Derivatives are compared beside the losses: where all rows have the same loss, as behind a last layer of
zeros, only they differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from isoflat.core.errors import DataError, IsoflatError, UsageError
from isoflat.core.precision import unrounded
from isoflat.core.raised import first_line, is_out_of_memory
from isoflat.core.rng import stream
from isoflat.risk.batches import chosen, leading, merged, move, tensors

REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""Errors of a user's loss or network on rows that it cannot do with."""

KEPT = 2
"""Rows of each batch that are set beside those of others: where the rows of a batch have equal weights, any two of them
stand for all."""

GROUP = 256
"""Rows of several batches that are compared at a time."""


class NoMeanOverRows(IsoflatError):
    """Signal that a loss is no weighted mean over rows; the message is the end of a sentence that begins with "because"."""


class SumOverRows(NoMeanOverRows):
    """Signal that a loss that should be a mean adds its rows up."""


@final
@dataclass(frozen=True)
class Share:
    """Contribution of some rows to a loss.

    Attributes:
        total: summed loss; of a mean, that times the weight.
        weight: divisor.
        slopes: derivatives of the total, shape `(m,)`, float64; None where only values are compared.
    """

    total: float
    weight: float
    slopes: Tensor | None = None

    @property
    def mean(self) -> float:
        """Mean over the weight."""
        return self.total / self.weight if self.weight else math.nan


def tolerance(dtype: torch.dtype) -> float:
    """Relative distance of two sums of the same terms in another order that counts as rounding."""
    return torch.finfo(dtype).eps ** (2 / 3)


def distance(whole: Share, parts: Sequence[Share]) -> float:
    """Relative distance of a batch's total, weight and slopes from the sums of its parts'; infinite where one is no number."""
    totals = _relative(whole.total, [part.total for part in parts])
    weights = _relative(whole.weight, [part.weight for part in parts])
    found = max(totals, weights)
    if whole.slopes is not None:
        slopes = [part.slopes for part in parts if part.slopes is not None]
        scale = max(float(slope.abs().max()) for slope in (whole.slopes, *slopes))
        gap = float((whole.slopes - torch.stack(slopes).sum(0)).abs().max())
        found = max(found, gap / scale if scale else 0.0) if math.isfinite(gap) else math.inf
    return found


def adds(whole: Share, parts: Sequence[Share], allowed: float) -> bool:
    """Test of whether the losses as they were returned are sums over rows, no means."""
    return _relative(whole.mean, [part.mean for part in parts]) <= allowed


def _relative(whole: float, parts: Sequence[float]) -> float:
    scale = sum(map(abs, parts))
    gap = abs(whole - sum(parts))
    if not math.isfinite(gap):
        return math.inf
    return gap / scale if scale else gap


def splits(batch: Any, rows: int, *labels: object, many: int = 2) -> Iterator[tuple[Any, Any]]:
    """Ways to part a batch in two, its rows mixed: a third of them and the rest, then halves."""
    for size in list(dict.fromkeys((max(1, rows // 3), rows // 2)))[:many]:
        order = torch.randperm(rows, generator=stream(0, "parts", size, *labels))
        yield chosen(batch, order[:size], rows), chosen(batch, order[size:], rows)


def spread(batch: Any, rows: int, few: int, *labels: object) -> Any:
    """A few rows from all over a batch, in mixed order; all of them where it has no more."""
    places = torch.arange(min(rows, few)) * rows // min(rows, few)
    return chosen(batch, places[torch.randperm(len(places), generator=stream(0, "spread", *labels))], rows)


@final
@dataclass(frozen=True)
class Judge:
    """Evaluation of a loss on some rows, and what counts as rounding in it.

    Attributes:
        reckon: evaluates the loss.
        dtype: precision that it is evaluated in.
        finer: judge in float64, which is asked where this one sees a difference; None where there is none.
    """

    reckon: Callable[[Any], Share]
    dtype: torch.dtype
    finer: Judge | None = None

    def compared(self, batch: Any, rows: int, *labels: object, many: int = 2) -> None:
        """Compare the loss of a batch with those of parts of it.

        Args:
            batch: the batch.
            rows: number of its rows, two or more.
            *labels: of the random order of the rows.
            many: ways to part the batch.

        Raises:
            NoMeanOverRows: the loss is no weighted mean over the rows.
        """
        allowed = tolerance(self.dtype)
        try:
            self._compared(allowed, batch, rows, *labels, many=many)
        except NoMeanOverRows:
            if self.finer is None:
                raise
            try:
                self.finer.compared(batch, rows, *labels, many=many)
            except REFUSALS as error:  # the network or the loss runs in this precision only
                reraise_unrelated(error)
                self._compared(torch.finfo(self.dtype).eps ** 0.5, batch, rows, *labels, many=many)

    def _compared(self, allowed: float, batch: Any, rows: int, *labels: object, many: int) -> None:
        whole = self.reckon(batch)
        for pair in splits(batch, rows, *labels, many=many):
            try:
                parts = [self.reckon(part) for part in pair]
            except REFUSALS as error:
                reraise_unrelated(error)
                raise NoMeanOverRows(
                    f"the loss cannot be evaluated on some rows of a batch without the others ({first_line(error)})"
                ) from error
            if distance(whole, parts) <= allowed:
                continue
            numbers = " and ".join(f"{part.mean:.6g}" for part in parts)
            if adds(whole, parts, allowed):
                raise SumOverRows(f"it adds them up ({whole.mean:.6g} on {rows} rows, {numbers} on two parts of them)")
            raise NoMeanOverRows(
                f"the loss of {rows} rows ({whole.mean:.6g}) is no mean of the losses of two parts of them ({numbers})"
            )


def reraise_unrelated(error: Exception) -> None:
    """Raise an error again that says nothing about rows: a refusal of the library's, or a lack of memory."""
    if isinstance(error, IsoflatError) or is_out_of_memory(error):
        raise error


@final
class MeanTest:
    """Test of a loss over a whole pass: every batch against parts of it, and rows of all batches against each other.

    Attributes:
        kept: rows of the batches so far, by their form.
    """

    def __init__(self) -> None:
        self.kept: dict[str, list[Any]] = {}

    def batch(self, index: int, batch: Any, rows: int, judge: Judge, many: int = 2) -> None:
        """Compare a batch with its parts, and keep some rows of it.

        Raises:
            NoMeanOverRows: the loss is no mean over them.
        """
        if rows > 1:
            _compared(judge, batch, rows, index, many=many)
        held = self.kept.setdefault(_form(batch, rows), [])
        held.append(spread(batch, rows, KEPT, index))
        if KEPT * len(held) >= GROUP:
            _mixed(held, judge)
            del held[KEPT:]

    def finish(self, kept: Sequence[dict[str, list[Any]]], judge: Judge, alike: bool) -> None:
        """Compare rows of all batches with each other.

        Args:
            kept: what was kept by each process.
            judge: evaluates the loss.
            alike: flag that batches of unlike shapes cannot be weighed against each other.

        Raises:
            NoMeanOverRows: the loss is no mean over them.
        """
        groups: dict[str, list[Any]] = {}
        for own in kept:
            for form, held in own.items():
                groups.setdefault(form, []).extend(held)
        for held in groups.values():
            _mixed(held, judge)
        if alike and len(groups) > 1:
            raise NoMeanOverRows(
                f"rows of unlike shapes have weights that cannot be told ({'; '.join(list(groups)[:2])})"
            )


def _compared(judge: Judge, batch: Any, rows: int, *labels: object, many: int = 2) -> None:
    """Compare a batch with its parts; outputs that are compared with the targets of other rows are refused."""
    try:
        judge.compared(batch, rows, *labels, many=many)
    except NoMeanOverRows:
        if isinstance(judge.reckon, OfOutputs):
            check_broadcast(judge.reckon.function, *batch[:2])
        raise


def _mixed(held: list[Any], judge: Judge) -> None:
    if len(held) < 2:
        return
    mixed = merged(held)
    try:
        _compared(judge, mixed, _rows(mixed), "mixed", len(held))
    except SumOverRows:
        raise
    except NoMeanOverRows as found:
        raise NoMeanOverRows(f"over rows of {len(held)} batches {found}") from found


def _rows(batch: Any) -> int:
    rows = leading(batch)
    assert rows is not None  # its parts had rows
    return rows


def _form(batch: Any, rows: int) -> str:
    """Shapes and types of a batch's tensors, without the rows."""
    return ", ".join(
        f"{tuple(part.shape[1:] if part.ndim and len(part) == rows else part.shape)} {part.dtype}".replace("torch.", "")
        for part in tensors(batch)
    )


@final
@dataclass(frozen=True)
class OfOutputs:
    """A function of output and target on some rows: its value, and its derivative along random changes of the output.

    Attributes:
        function: the user's loss.
        dtype: precision that it is evaluated in.
    """

    function: Callable[[Any, Any], Tensor]
    dtype: torch.dtype

    @staticmethod
    def of(function: Callable[[Any, Any], Tensor], rows: Any, dtype: torch.dtype) -> OfOutputs:
        """The function in float64 where it takes that, else in the given precision."""
        try:
            OfOutputs(function, torch.float64)(rows)
        except REFUSALS as error:
            reraise_unrelated(error)
            return OfOutputs(function, dtype)
        return OfOutputs(function, torch.float64)

    @property
    def judge(self) -> Judge:
        """Judge by this evaluation."""
        return Judge(self, self.dtype)

    def __call__(self, rows: Any) -> Share:
        """Share of some rows: output, target and change of the output (`with_change`)."""
        count = _rows(rows)
        device = next(tensors(rows)).device
        output, target, change = (move(part, device, self.dtype) for part in rows)
        pairs = [
            (part.requires_grad_(True), along)
            for part, along in zip(tensors(output), tensors(change), strict=True)
            if part.is_floating_point()
        ]
        # What a loss makes or holds in float32 follows, as it does under products.
        with torch.enable_grad(), unrounded(self.dtype, torch.float32):
            # Like the output of a network the copy is no leaf, so that it may be changed in place.
            value = scalar(self.function(tree_map_only(Tensor, Tensor.clone, output), target), "loss")
        slope = 0.0
        if value.requires_grad and pairs:
            slopes = torch.autograd.grad(value, [part for part, _ in pairs], allow_unused=True)
            for (_, along), part in zip(pairs, slopes, strict=True):
                slope += 0.0 if part is None else float((part.double() * along.double()).sum())
        return Share(float(value.detach()) * count, float(count), torch.tensor([slope * count], dtype=torch.float64))


def with_change(output: Any, target: Any, *labels: object) -> tuple[Any, Any, Any]:
    """Output and target, with a random change of the output beside them, so that all three are cut alike."""
    random = stream(0, "change", *labels)

    def drawn(part: Any) -> Any:
        if isinstance(part, Tensor):
            return torch.randn(part.shape, generator=random, dtype=torch.float64).to(part.device)
        if isinstance(part, Mapping):
            return {key: drawn(value) for key, value in part.items()}
        return [drawn(value) for value in part] if isinstance(part, list | tuple) else part

    return output, target, drawn(output)


def scalar(value: Any, what: str) -> Tensor:
    """The value, if it is a scalar tensor.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"the {what} must be one number (a scalar tensor), got {came}: is the loss unreduced?")
    return value.reshape(())


def check_broadcast(function: Callable[[Any, Any], Tensor], output: Any, target: Any) -> None:
    """Refuse a loss of `(N, 1)` outputs against `(N,)` targets that compares every output with every target.

    Permuting such targets alone changes nothing, though other targets would.

    Raises:
        DataError: it does.
    """
    if not (isinstance(output, Tensor) and isinstance(target, Tensor) and broadcasts(output, target)):
        return
    with torch.no_grad():
        here, turned, mirrored, same = (
            float(function(output, other))
            for other in (target, target.roll(1, 0), target.flip(0), target[:1].expand_as(target))
        )
    allowed = tolerance(output.dtype) * abs(here)
    if max(abs(here - turned), abs(here - mirrored)) <= allowed < abs(here - same):
        raise DataError(_broadcast(output, target))


def broadcasts(output: Tensor, target: Tensor) -> bool:
    """Test of whether output and target differ in dimensions of length one only, of which one has more than the other.

    >>> broadcasts(torch.zeros(5, 1), torch.zeros(5)), broadcasts(torch.zeros(5, 3), torch.zeros(5))
    (True, False)
    """
    if output.ndim == target.ndim or not output.ndim or not target.ndim or len(output) != len(target):
        return False
    return [n for n in output.shape[1:] if n > 1] == [n for n in target.shape[1:] if n > 1]


def check_shapes(output: Tensor, target: Tensor) -> None:
    """Refuse targets of an elementwise loss that have other dimensions than the output: broadcasting would mix rows.

    Raises:
        DataError: they have.
    """
    if output.ndim != target.ndim and target.ndim:
        raise DataError(_broadcast(output, target))
    if output.ndim and target.ndim and len(output) != len(target):
        raise DataError(
            f"expected a target for each row of the output, got {len(target)} targets for {len(output)} rows (shapes "
            f"{tuple(target.shape)} and {tuple(output.shape)})"
        )


def _broadcast(output: Tensor, target: Tensor) -> str:
    shapes = f"output and targets have shapes {tuple(output.shape)} and {tuple(target.shape)}"
    if not broadcasts(output, target):
        return f"{shapes}: this loss compares them entry by entry. Give both one shape, or choose a loss of classes"
    longer, shorter = ("output", "targets") if output.ndim > target.ndim else ("targets", "output")
    return (
        f"{shapes}: every output would be compared with every target. Give both one shape: {shorter}.unsqueeze(1), or "
        f"{longer}.squeeze(1)"
    )
