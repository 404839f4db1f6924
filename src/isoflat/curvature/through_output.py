"""Curvature that the weights have through the model's output: `Σ_b J_bᵀ M_b J_b / Σ_b count_b`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor

from isoflat.core.state import State
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.routes.base import Graph
from isoflat.risk.routes.output import OutputGraph

Middle = Callable[[Tensor], Tensor]
"""A symmetric map M between tensors of the output's shape."""


@dataclass(frozen=True)
class ThroughOutput(Graph):
    """Share `Jᵀ M J` of one batch; what is summed is divided by the counts, unless the loss is a sum.

    Attributes:
        output: output of the network with its Jacobian J.
        middle: symmetric map M.
    """

    output: OutputGraph
    middle: Middle

    @classmethod
    @abstractmethod
    def between(cls, risk: EmpiricalRisk, output: OutputGraph, batch: Any) -> Middle:
        """M of one batch."""

    @classmethod
    @final
    def build(cls, risk: EmpiricalRisk, state: State, batch: Any) -> Self:
        """Forward, with the graphs of the Jacobian from both sides."""
        output = OutputGraph.build(risk, state, batch)
        return cls(output.count, output.rules, output, cls.between(risk, output, batch))

    @final
    def products(self, vectors: Sequence[Sequence[Tensor]], last: bool) -> Tensor:
        """Three reverse passes for each vector."""
        made = [self.output.pull(self.middle(self.output.push(vector))) for vector in vectors]
        return torch.stack(made, dim=1)
