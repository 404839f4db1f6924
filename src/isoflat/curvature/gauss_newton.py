"""The Gauss-Newton matrix of the empirical risk, and its kind: matrices `Σ_b J_bᵀ M_b J_b / Σ_b count_b` through the output."""

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
from isoflat.risk.routes.output import OutputGraph, check_output
from isoflat.risk.routes.reverse import Recomputed

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


@final
@dataclass(frozen=True)
class GaussNewton(ThroughOutput):
    """`G = Σ_i J_iᵀ H_i J_i / Σ_i count_i`, with J the Jacobian of the output and H the loss's Hessian in the output.

    Schraudolph 2002. The Hessian without the second derivatives of the network; positive semi-definite where the loss
    is convex in the output. A product with kept graphs costs about 1.3 gradient passes.
    """

    @classmethod
    def between(cls, risk: EmpiricalRisk, output: OutputGraph, batch: Any) -> Middle:
        """The loss's Hessian in the output."""
        return output.curve


def gauss_newton(risk: EmpiricalRisk, state: State) -> Recomputed:
    """Products with the Gauss-Newton matrix at a state; `.keep()` holds its graphs in memory.

    Raises:
        DataError: there is no data.
        UsageError: weights enter the loss other than through the model's output, or the output is not known.

    >>> import torch
    >>> from isoflat.risk.batches import as_batches
    >>> from isoflat.risk.losses import as_loss
    >>> from isoflat.risk.network import Network
    >>> network = Network(torch.nn.Linear(2, 1, bias=False))
    >>> data = as_batches((torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])))
    >>> risk = EmpiricalRisk(network, as_loss(torch.nn.MSELoss()), data)
    >>> gauss_newton(risk, network.state()).products(torch.tensor([[1.0], [0.0]])).tolist()
    [[2.0], [4.0]]
    """
    check_output(risk, state)
    return Recomputed(risk, state, GaussNewton)
