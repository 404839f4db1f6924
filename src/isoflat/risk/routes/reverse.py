"""Reverse over reverse: the gradient of `⟨∇L, v⟩`.

The graph of the gradient does not depend on v, so it is kept between products where it fits the memory plan (`Kept`),
and rebuilt for each batch where it does not (`Rebuilt`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from isoflat.core.state import State
from isoflat.risk.empirical import EmpiricalRisk, Part, differentiate, leaf_state
from isoflat.risk.network import exactly
from isoflat.risk.routes.base import Linearisation, columns, joined
from isoflat.risk.second_order import second_order


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
        with second_order():
            term = risk.term(leaves, batch)
        parameters = list(leaves.parameters.values())
        return GradientGraph(tuple(parameters), tuple(differentiate(term.total, parameters, keep=True)), term.count)

    def products(self, vectors: Sequence[Sequence[Tensor]], last: bool) -> Tensor:
        """Summed products with vectors given tensor by tensor; `last` lets the graph go.

        Gradients without a graph of their own (the loss is linear in that tensor) contribute nothing.
        """
        curved = [j for j, gradient in enumerate(self.gradients) if gradient is not None and gradient.requires_grad]
        made = []
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
            made.append(joined(self.leaves, found))
        return torch.stack(made, dim=1)


@final
@dataclass(frozen=True)
class Kept(Linearisation):
    """Graphs of all batches stay in memory: a product costs one backward pass through them."""

    route: ClassVar[str] = "reverse over reverse, graph kept"

    graphs: tuple[GradientGraph, ...] = field(repr=False)

    def products(self, vectors: Tensor) -> Tensor:
        """One backward pass through the kept graphs for each column."""
        wide = columns(self.state.space, vectors)

        def per_batch(index: int, graph: GradientGraph) -> Part:
            return Part(graph.products(wide, last=False), graph.count)

        with exactly(self.state.device):
            return self.risk.accumulate(per_batch, over=self.graphs)


@final
@dataclass(frozen=True)
class Rebuilt(Linearisation):
    """Each product runs forward and backward anew, batch by batch: memory of one batch."""

    route: ClassVar[str] = "reverse over reverse, graph rebuilt"

    def products(self, vectors: Tensor) -> Tensor:
        """Forward, backward, and one more backward for each column."""
        wide = columns(self.state.space, vectors)

        def per_batch(index: int, batch: Any) -> Part:
            graph = GradientGraph.build(self.risk, self.state, batch)
            return Part(graph.products(wide, last=True), graph.count)

        with exactly(self.state.device):
            return self.risk.accumulate(per_batch)
