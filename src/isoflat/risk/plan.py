"""Order in which products look at the data, and a plan of them that fits into memory, with its forecast.

An example enters the Hessian through the loss's derivatives in its output, `∂²ℓ/∂z²` and `∂ℓ/∂z`; for softmax
cross-entropy both are small where the prediction p is close to the target y, about `‖p − y‖ = ‖∂ℓ/∂z‖`. What that norm
is called here is the *hardness* of the example. It only decides the order in which data is looked at, those examples
first that carry most of the curvature: nothing that is measured depends on whether it was a good guess.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import psutil
import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from isoflat.core.errors import UsageError
from isoflat.core.state import State
from isoflat.risk.batches import alone, pieces, rows_of, tensors
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.losses import PerBatchLoss, TargetLoss, example_rows, split
from isoflat.risk.network import exactly
from isoflat.risk.routes.base import Graph, Linearisation
from isoflat.risk.routes.reverse import GradientGraph, Recomputed

SAMPLE = 8
"""Rows whose graph is weighed, and twice as many: what grows with the rows is told from what does not."""

IN_FLIGHT = 0.45
"""Peak memory of a product through a graph that is let go, beside the graph and as a share of it: 0.25 to 0.45 was
measured on multilayer perceptrons, convolutional networks and transformers (`tests/laws/test_memory.py`)."""


TAILS = (0.05, 0.005)
"""Shares of the total hardness that the parts after the first carry together, after the second, and so on. On a multilayer
perceptron and a LeNet on MNIST the norm of what was left was about twice that share of the whole."""

MINORITY = 0.35
"""Share of the data that the first part may have; where hard examples are more than that nothing is gained."""

FEWEST = 256
"""Least number of rows of a part: with fewer, what a pass costs does not depend on their number."""

WORTHWHILE = 2048
"""Least number of rows of data for which parts are worth while."""


@final
@dataclass(frozen=True)
class ProductPlan:
    """Plan of how products are computed, with their memory.

    Attributes:
        route: kind of products.
        graph: kind of graph that they go through, on the reverse route.
        rules: names of the second-order rules that apply there.
        kept: flag that gradient graphs stay in memory between products.
        rows: number of rows of a piece that is differentiated at a time.
        whole: flag that batches are taken as they come.
        divisible: flag that batches may be cut, because the loss of a batch is a sum over its rows.
        forecast: peak memory of the products in bytes, beyond weights and the vectors of solvers.
    """

    route: type[Linearisation]
    graph: type[Graph]
    rules: tuple[str, ...]
    kept: bool
    rows: int
    whole: bool
    divisible: bool
    forecast: int

    def __str__(self) -> str:
        """Plan in words, for people."""
        what = "graphs kept" if self.kept else "nothing kept"
        cut = "batches as they come" if self.whole else f"{self.rows} rows at a time"
        return f"{what}, {cut}, {self.forecast / 2**30:.2g} GiB"


@final
@dataclass(frozen=True)
class Weighed:
    """Measured memory of a graph.

    Attributes:
        held: bytes that it holds on to.
        saved: bytes that were saved on the way to it, parts of the forward graph that it does without among them.
        rules: names of the second-order rules in it.
    """

    held: int
    saved: int
    rules: frozenset[str]


@final
@dataclass(frozen=True)
class _Growth:
    """Bytes as a function of rows."""

    fixed: float
    row: float

    @staticmethod
    def through(few: int, more: int, rows: int) -> _Growth:
        """Line through the memory of two graphs, one with twice the rows of the other."""
        row = max(more - few, 0) / rows
        return _Growth(max(few - row * rows, 0.0), row)

    def of(self, rows: float, graphs: int = 1) -> float:
        """Bytes of so many graphs with so many rows in all."""
        return graphs * self.fixed + rows * self.row


def plan(
    risk: EmpiricalRisk,
    state: State,
    route: type[Linearisation],
    rows: int,
    memory: int,
    graph: type[Graph] = GradientGraph,
) -> ProductPlan:
    """Keep the graphs if they fit; else rebuild them, in pieces that fit.

    Args:
        risk: the empirical risk.
        state: the point.
        route: kind of products.
        rows: examples in the data.
        memory: number of bytes that products may take.
        graph: what products go through, on the reverse route.

    Raises:
        UsageError: not even a single row fits, or not a batch whose loss is no sum over its rows.
    """
    with exactly(state.device):
        batch = next(iter(risk.batches))
        count = _examples(risk, batch)
        whole = risk.batches.whole is not None or not separable(risk, state, batch)
        held, saved, rules = _weights(risk, state, batch, graph, whole)
    rules = tuple(sorted(rules)) if route is Recomputed else ()
    # One column under way: going in, coming out by tensor and as one, and summed twice in float64.
    vectors = state.space.size * (3 * state.dtype.itemsize + 2 * 8)
    kept = held.of(rows, -(-rows // count)) + saved.of(count) + vectors
    if route is Recomputed and kept <= memory:
        return ProductPlan(route, graph, rules, True, count, True, not whole, int(kept))
    piece = count
    while piece > 1 and not whole and _passing(saved, piece) + vectors > memory:
        piece = (piece + 1) // 2
    forecast = int(_passing(saved, piece) + vectors)
    if forecast > memory:
        what = "a batch, whose loss is no sum over its rows," if piece > 1 else "a single row"
        raise UsageError(
            f"the memory budget of {memory} bytes is too small: products on {what} take about {forecast}. Raise the "
            f"budget, {'give smaller batches, ' if piece > 1 else ''}or measure fewer tensors with params="
        )
    return ProductPlan(route, graph, rules, False, piece, piece == count, not whole, forecast)


def by_hardness(hardness: Tensor | None) -> tuple[Tensor, ...]:
    """The places of the examples of each part, in the order of the data; a single part where it does not pay.

    Args:
        hardness: hardness of each example, shape `(rows,)`; None if it is not known.

    >>> import torch
    >>> hardness = torch.full((10_000,), 1e-5)
    >>> hardness[::20] = 1.0
    >>> [len(part) for part in by_hardness(hardness)]
    [476, 256, 9268]
    """
    if hardness is None or len(hardness) < WORTHWHILE or not float(hardness.sum()) > 0:
        return ()
    order = hardness.argsort(descending=True, stable=True)
    tail = 1 - hardness[order].double().cumsum(0) / hardness.double().sum()
    cuts = [0]
    for share in TAILS:
        cut = max(int((tail > share).sum()) + 1, cuts[-1] + FEWEST)
        if cut + FEWEST <= len(order):
            cuts.append(cut)
    if len(cuts) == 1 or cuts[1] > MINORITY * len(order):
        return ()
    return tuple(order[a:b].sort().values for a, b in zip(cuts, [*cuts[1:], len(order)], strict=True))


def _examples(risk: EmpiricalRisk, batch: Any) -> int:
    """Rows of a batch, as a survey counts them."""
    if isinstance(risk.loss, TargetLoss | PerBatchLoss):
        return example_rows(*split(alone(batch)))
    return rows_of(batch)


def separable(risk: EmpiricalRisk, state: State, batch: Any) -> bool:
    """Test of whether the loss of a few rows is the sum over two halves of them, counts too: only then may data be cut.

    Where network or loss cannot be called on a part of a batch at all, it may not.
    """
    rows = min(2 * SAMPLE, rows_of(batch))
    if rows < 2:
        return False
    risk = replace(risk, network=replace(risk.network, inside=None))  # a coarser precision would blur the question
    few = next(pieces(batch, rows))
    try:
        whole = risk.term(state, few)
        one, other = (risk.term(state, part) for part in pieces(few, (rows + 1) // 2))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        if isinstance(risk.loss, TargetLoss):  # inputs and targets have rows, so this is no question of cutting
            raise
        return False
    total, first, second = (float(term.total.detach()) for term in (whole, one, other))
    tolerance = 100 * torch.finfo(state.dtype).eps
    counts = abs(whole.count - (one.count + other.count)) <= tolerance * abs(whole.count)
    return counts and abs(total - (first + second)) <= tolerance * (abs(first) + abs(second))


def weigh(risk: EmpiricalRisk, state: State, batch: Any, kind: type[Graph] = GradientGraph) -> Weighed:
    """Memory of one batch's graph, found by building it once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*state.tensors.values(), *tensors(batch))}
    saved: list[tuple[weakref.ref[_Saved], UntypedStorage]] = []

    def pack(tensor: Tensor) -> _Saved:
        # Detached: an operation that saved its own output together with its graph would keep itself alive.
        held = _Saved(tensor.detach())
        saved.extend((weakref.ref(held), part.untyped_storage()) for part in tensors(held.tensor))
        return held

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            graph = kind.build(risk, state, batch)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        with _Allocated() as made:  # a transform of torch.func inside lets nobody look at what is saved
            graph = kind.build(risk, state, batch)
        return Weighed(made.size, made.size, graph.rules)
    sizes = {storage.data_ptr(): storage.nbytes() for _, storage in saved if storage.data_ptr() not in own}
    alive = {storage.data_ptr() for reference, storage in saved if reference() is not None}
    held = sum(size for place, size in sizes.items() if place in alive)
    return Weighed(held, sum(sizes.values()), graph.rules)


@final
class _Allocated(TorchDispatchMode):
    """Bytes of everything that operations make: no less than what a graph of them holds."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operation, with what it makes counted."""
        found = func(*args, **(kwargs or {}))
        self.size += sum(tensor.nbytes for tensor in tensors(found))
        return found


@final
@dataclass(eq=False)
class _Saved:
    """Placeholder of a tensor in a graph, alive as long as the graph needs it."""

    tensor: Tensor


def _weights(
    risk: EmpiricalRisk, state: State, batch: Any, kind: type[Graph], whole: bool
) -> tuple[_Growth, _Growth, frozenset[str]]:
    """Memory held by a graph and saved on the way to it, and its rules; of the whole batch where that cannot be cut."""
    if whole:
        made, rows = weigh(risk, state, batch, kind), _examples(risk, batch)
        return _Growth(0.0, made.held / rows), _Growth(0.0, made.saved / rows), made.rules
    rows = min(SAMPLE, rows_of(batch) // 2)
    few, more = (weigh(risk, state, next(pieces(batch, count)), kind) for count in (rows, 2 * rows))
    held, saved = _Growth.through(few.held, more.held, rows), _Growth.through(few.saved, more.saved, rows)
    return held, saved, few.rules


def _passing(saved: _Growth, rows: int) -> float:
    """Peak memory of a product through a graph that is let go after it."""
    return (1 + IN_FLIGHT) * saved.of(rows)


def available_memory(device: torch.device) -> int:
    """Free memory of the device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_memory(device: torch.device) -> int:
    """High-water mark of this process, or of the accelerator's allocations, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    info = psutil.Process().memory_info()
    # Linux and macOS keep the mark in the kernel; Windows reports it here.
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource
    import sys

    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return mark if sys.platform == "darwin" else mark * 1024
