"""Product routes: how the Hessian of the empirical risk is multiplied with vectors.

Reverse over reverse: the gradient of `⟨∇L, v⟩`. The graph of the gradient does not depend on v, so it is kept between
products where it fits the memory budget (`Kept`), and rebuilt for each batch where it does not (`Rebuilt`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import psutil
import torch
from torch import Tensor

from isoflat.core.space import ParameterSpace
from isoflat.core.state import State
from isoflat.risk.batches import rows_of
from isoflat.risk.empirical import EmpiricalRisk, Part, differentiate, leaf_state
from isoflat.risk.network import exactly


@dataclass(frozen=True)
class Linearisation(ABC):
    """The Hessian of the empirical risk at a state, as products.

    Attributes:
        route: how the products are computed, for the record.
        risk: the empirical risk.
        state: the point.
    """

    route: ClassVar[str]

    risk: EmpiricalRisk
    state: State

    @abstractmethod
    def products(self, vectors: Tensor) -> Tensor:
        """`H V` for V of shape `(n, k)`: shape `(n, k)`, float64."""


@final
@dataclass(frozen=True)
class GradientGraph:
    """One batch's gradient with its graph."""

    leaves: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]
    count: float

    @staticmethod
    def build(risk: EmpiricalRisk, state: State, batch: Any) -> GradientGraph:
        """Forward and backward with the graph kept."""
        leaves = leaf_state(state)
        term = risk.term(leaves, batch)
        parameters = list(leaves.parameters.values())
        return GradientGraph(tuple(parameters), tuple(differentiate(term.total, parameters, keep=True)), term.count)

    def products(self, vectors: Sequence[Sequence[Tensor]], last: bool) -> Tensor:
        """Summed products with vectors given tensor by tensor; `last` lets the graph go.

        Gradients without a graph of their own (the loss is linear in that tensor) contribute nothing.
        """
        curved = [j for j, gradient in enumerate(self.gradients) if gradient is not None and gradient.requires_grad]
        columns = []
        for k, vector in enumerate(vectors):
            found: Sequence[Tensor | None] = [None] * len(self.leaves)
            if curved:
                found = torch.autograd.grad(
                    [g for g in self.gradients if g is not None and g.requires_grad],
                    self.leaves,
                    [vector[j] for j in curved],
                    retain_graph=not last or k + 1 < len(vectors),
                    allow_unused=True,
                )
            parts = [
                torch.zeros_like(leaf).reshape(-1) if product is None else product.reshape(-1)
                for leaf, product in zip(self.leaves, found, strict=True)
            ]
            columns.append(torch.cat(parts))
        return torch.stack(columns, dim=1)


@final
@dataclass(frozen=True)
class Kept(Linearisation):
    """Graphs of all batches stay in memory: a product costs one backward pass through them."""

    route: ClassVar[str] = "reverse over reverse, graph kept"

    graphs: tuple[GradientGraph, ...] = field(repr=False)

    def products(self, vectors: Tensor) -> Tensor:
        """One backward pass through the kept graphs for each column."""
        columns = _columns(self.state.space, vectors)

        def per_batch(index: int, graph: GradientGraph) -> Part:
            return Part(graph.products(columns, last=False), graph.count)

        with exactly(self.state.device):
            return self.risk.accumulate(per_batch, over=self.graphs)


@final
@dataclass(frozen=True)
class Rebuilt(Linearisation):
    """Each product runs forward and backward anew, batch by batch: memory of one batch."""

    route: ClassVar[str] = "reverse over reverse, graph rebuilt"

    def products(self, vectors: Tensor) -> Tensor:
        """Forward, backward, and one more backward for each column."""
        columns = _columns(self.state.space, vectors)

        def per_batch(index: int, batch: Any) -> Part:
            graph = GradientGraph.build(self.risk, self.state, batch)
            return Part(graph.products(columns, last=True), graph.count)

        with exactly(self.state.device):
            return self.risk.accumulate(per_batch)


def linearise(risk: EmpiricalRisk, state: State, rows: int, memory: int) -> Linearisation:
    """The cheapest route that fits the memory budget.

    Args:
        risk: the empirical risk.
        state: the point.
        rows: examples in the data.
        memory: bytes that kept graphs may take.
    """
    with exactly(state.device):
        first = next(iter(risk.batches))
        forecast = graph_bytes(risk, state, first) * rows / max(rows_of(first), 1)
        if forecast > memory:
            return Rebuilt(risk, state)
        graphs = [GradientGraph.build(risk, state, batch) for batch in risk.batches]
    return Kept(risk, state, tuple(graphs))


def graph_bytes(risk: EmpiricalRisk, state: State, batch: Any) -> int:
    """Memory that one batch's gradient graph holds on to, measured by building it once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in state.tensors.values()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = GradientGraph.build(risk, state, batch)
    gradients = sum(g.numel() * g.element_size() for g in graph.gradients if g is not None)
    return sum(held.values()) + gradients


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


def _columns(space: ParameterSpace, vectors: Tensor) -> list[list[Tensor]]:
    """Each column of `(n, k)` as tensors of the parameters' shapes."""
    return [list(space.unflatten(column).values()) for column in vectors.T.contiguous()]
