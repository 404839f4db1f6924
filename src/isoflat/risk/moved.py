"""Losses and gradients at other weights, which searches of finite radius and random walks ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.state import State
from isoflat.risk.empirical import EmpiricalRisk, differentiate, leaf_state
from isoflat.risk.network import exactly
from isoflat.risk.ranks import BatchSum
from isoflat.risk.routes.base import joined


@final
@dataclass(frozen=True, eq=False)
class AtWeights:
    """A request for the loss at other weights.

    Attributes:
        risk: the empirical risk.
        state: the weights, in the precision in which the loss is computed.
        gradient: flag that the gradient is asked for as well.
        batch: a batch of the data instead of all of it; every process then computes it by itself.
        status: current activity in words, for a progress bar.
    """

    risk: EmpiricalRisk
    state: State
    gradient: bool = False
    batch: Any = None
    status: str = ""

    def shares_a_pass_with(self, other: AtWeights) -> bool:
        """Test of whether one pass over the data serves both."""
        return self.batch is None and other.batch is None and self.risk is other.risk


class Moved(NamedTuple):
    """The loss at other weights, and its gradient, shape `(n,)`, float64, where it was asked for."""

    loss: float
    gradient: Tensor | None


def evaluate(requests: Sequence[AtWeights]) -> list[Moved]:
    """Losses and gradients in one pass over the data, in order.

    Args:
        requests: all of one risk on all its data; or a single one.
    """
    if requests[0].batch is not None:
        return [_on_batch(request) for request in requests]
    device = requests[0].state.device
    sizes = [1 + request.state.space.size if request.gradient else 1 for request in requests]

    def per_batch(index: int, batch: Any) -> BatchSum:
        found = [_terms(request, batch) for request in requests]
        return BatchSum(torch.cat([total for total, _ in found]), found[0][1])

    with exactly(device):
        like = torch.zeros(sum(sizes), dtype=torch.int8, device=device)
        sums = requests[0].risk.accumulate(per_batch, like).split(sizes)
    return [
        Moved(float(part[0]), part[1:] if request.gradient else None)
        for request, part in zip(requests, sums, strict=True)
    ]


def _on_batch(request: AtWeights) -> Moved:
    """Means over one batch, whatever the loss divides by.

    Raises:
        UsageError: no target counts in it.
    """
    with exactly(request.state.device):
        total, count = _terms(request, request.batch)
    if not count > 0:
        raise UsageError("no target counts in a minibatch: ask for more rows in each")
    return Moved(float(total[0]) / count, total[1:] / count if request.gradient else None)


def _terms(request: AtWeights, batch: Any) -> tuple[Tensor, float]:
    """Summed loss of a batch, and the entries of its gradient behind it, float64; and the count."""
    if not request.gradient:
        term = request.risk.term(request.state, batch)
        return term.total.detach().reshape(1).double(), term.count
    leaves = leaf_state(request.state)
    term = request.risk.term(leaves, batch)
    parameters = list(leaves.parameters.values())
    slope = joined(parameters, differentiate(term.total, parameters))
    return torch.cat([term.total.detach().reshape(1).double(), slope.double()]), term.count
