"""Curvature that the weights have through the model's output: `Σ_b J_bᵀ M_b J_b / Σ_b count_b`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self, final

import torch
from torch import Tensor

from isoflat.core.state import State
from isoflat.linalg.operator import Operator
from isoflat.risk.empirical import EmpiricalRisk, Part
from isoflat.risk.network import exactly
from isoflat.risk.routes.base import columns
from isoflat.risk.routes.output import OutputGraph

Middle = Callable[[Tensor], Tensor]
"""A symmetric map M between tensors of the output's shape."""


@dataclass(frozen=True)
class ThroughOutput(Operator):
    """A matrix `Σ_b J_bᵀ M_b J_b / Σ_b count_b`; without the division where the loss is a sum.

    Without kept graphs each product runs the network anew, with the memory of one batch.

    Attributes:
        risk: the empirical risk, a function of the model's output (`check_output`).
        state: the point.
        kept: graph and M of every batch, None for batches of other processes; None to build them for each product.
    """

    risk: EmpiricalRisk
    state: State
    kept: tuple[tuple[OutputGraph, Middle] | None, ...] | None = field(default=None, repr=False, kw_only=True)

    @abstractmethod
    def middle(self, graph: OutputGraph, index: int) -> Middle:
        """M of one batch, from its graph and place in the data."""

    @property
    def n(self) -> int:
        """Number of trainable entries."""
        return self.state.space.size

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the products."""
        return self.state.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.state.device

    @final
    def matmat(self, vectors: Tensor) -> Tensor:
        """One pass over the data for all columns; three reverse passes for each."""
        wide = columns(self.state.space, vectors.to(self.dtype))

        def per_batch(index: int, item: Any) -> Part:
            graph, middle = item if self.kept is not None else self._build(index, item)
            made = [graph.pull(middle(graph.push(vector))) for vector in wide]
            return Part(torch.stack(made, dim=1), graph.count)

        with exactly(self.device):
            return self.risk.accumulate(per_batch, vectors, over=self.kept)

    @final
    def keep(self) -> Self:
        """The same map with the graphs of all batches in memory."""
        with exactly(self.device):
            return replace(self, kept=tuple(self.risk.own(self._build)))

    @final
    def double(self) -> Self:
        """The same map in float64, its graphs rebuilt for each product; itself if it is in float64 already."""
        if self.dtype == torch.float64:
            return self
        return replace(self, state=self.state.to(dtype=torch.float64), kept=None)

    def _build(self, index: int, batch: Any) -> tuple[OutputGraph, Middle]:
        graph = OutputGraph.build(self.risk, self.state, batch)
        return graph, self.middle(graph, index)
