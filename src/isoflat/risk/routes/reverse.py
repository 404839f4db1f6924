"""Reverse over reverse: the gradient of `⟨∇L, v⟩`.

The graph of the gradient does not depend on v, so it is kept between products where it fits the memory plan (`Cached`),
and rebuilt for each batch where it does not (`Recomputed`). So are the graphs of other matrices of the weights (`curvature`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from isoflat.core.state import State
from isoflat.risk.empirical import EmpiricalRisk, differentiate, leaf_state
from isoflat.risk.network import exactly
from isoflat.risk.ranks import BatchSum
from isoflat.risk.routes.base import Graph, Linearisation, columns, joined
from isoflat.risk.second_order import Trace


@final
@dataclass(frozen=True)
class GradientGraph(Graph):
    """One batch's gradient with its graph: its share of the Hessian.

    Attributes:
        leaves: trainable tensors as leaves of the graph.
        gradients: node of the graph that each gradient hangs on; None where the loss is linear in the tensor, or does without.
    """

    leaves: tuple[Tensor, ...]
    gradients: tuple[GradientEdge | None, ...]

    @classmethod
    def build(cls, risk: EmpiricalRisk, state: State, batch: Any) -> GradientGraph:
        """Forward and backward with the graph kept; of the gradients themselves only where they hang on the graph."""
        leaves = leaf_state(state)
        with Trace() as trace:
            term = risk.term(leaves, batch)
        parameters = list(leaves.parameters.values())
        edges = tuple(
            get_gradient_edge(gradient) if gradient is not None and gradient.requires_grad else None
            for gradient in differentiate(term.total, parameters, keep=True)
        )
        return cls(term.count, frozenset(trace.used), tuple(parameters), edges)

    def products(self, vectors: Sequence[Sequence[Tensor]], last: bool) -> Tensor:
        """One backward pass through the graph for each vector."""
        edges = [edge for edge in self.gradients if edge is not None]
        made = []
        for k, vector in enumerate(vectors):
            found: Sequence[Tensor | None] = [None] * len(self.leaves)
            if edges:
                found = torch.autograd.grad(
                    edges,
                    self.leaves,
                    [part for part, edge in zip(vector, self.gradients, strict=True) if edge is not None],
                    retain_graph=not last or k + 1 < len(vectors),
                    allow_unused=True,
                )
            made.append(joined(self.leaves, found))
        return torch.stack(made, dim=1)


@final
@dataclass(frozen=True)
class Cached(Linearisation):
    """Route that keeps the graphs of all batches in memory: a product costs one backward pass through them.

    Attributes:
        kind: kind of the graphs.
        graphs: graph of each batch; None for batches of other processes.
    """

    kind: type[Graph]
    graphs: tuple[Graph | None, ...] = field(repr=False)

    @property
    def route(self) -> str:
        """Name of the method, for the record."""
        return "reverse over reverse, graph kept"

    def products(self, vectors: Tensor) -> Tensor:
        """One backward pass through the kept graphs for each column."""
        wide = columns(self.state.space, vectors)

        def per_batch(index: int, graph: Graph) -> BatchSum:
            return BatchSum(graph.products(wide, last=False), graph.count)

        with exactly(self.state.device):
            return self.risk.accumulate(per_batch, vectors, over=self.graphs)

    def on(self, risk: EmpiricalRisk) -> Recomputed:
        """Route over other pieces of the data, without kept graphs."""
        return Recomputed(risk, self.state, self.kind)

    def double(self) -> Linearisation:
        """Route in float64; no graph is kept."""
        return self.on(self.risk).double()


@final
@dataclass(frozen=True)
class Recomputed(Linearisation):
    """Route whose products run forward and backward anew, batch by batch, in the memory of one batch.

    Attributes:
        kind: kind of graph that is built of each batch.
    """

    kind: type[Graph] = GradientGraph

    @property
    def route(self) -> str:
        """Name of the method, for the record."""
        return "reverse over reverse, graph rebuilt"

    def products(self, vectors: Tensor) -> Tensor:
        """Forward, backward, and one more backward for each column."""
        wide = columns(self.state.space, vectors)

        def per_batch(index: int, batch: Any) -> BatchSum:
            graph = self.kind.build(self.risk, self.state, batch)
            return BatchSum(graph.products(wide, last=True), graph.count)

        with exactly(self.state.device):
            return self.risk.accumulate(per_batch, vectors)

    def keep(self) -> Cached:
        """Route that keeps the graphs of all batches in memory."""
        with exactly(self.state.device):
            graphs = tuple(self.risk.own(lambda _, batch: self.kind.build(self.risk, self.state, batch)))
        return Cached(self.risk, self.state, self.kind, graphs)
