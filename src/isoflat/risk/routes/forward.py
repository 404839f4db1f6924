"""Forward over reverse: the derivative of the gradient along v, by dual numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from isoflat.core.state import State
from isoflat.risk.empirical import differentiate
from isoflat.risk.network import exactly
from isoflat.risk.ranks import BatchSum
from isoflat.risk.routes.base import Linearisation, columns, joined


@final
@dataclass(frozen=True)
class Forward(Linearisation):
    """Route whose products run forward and backward on dual numbers, for networks whose backward has no backward.

    Pearlmutter 1994 with the order of differentiation exchanged. Parts of a network that cannot be differentiated
    forward (LSTM, checkpointing) cannot be measured so; they rarely lack a double backward.
    """

    @property
    def route(self) -> str:
        """Name of the method, for the record."""
        return "forward over reverse"

    def products(self, vectors: Tensor) -> Tensor:
        """A dual forward and backward pass for each column."""
        wide = columns(self.state.space, vectors)

        def per_batch(index: int, batch: Any) -> BatchSum:
            parts = [self._derivative(batch, vector) for vector in wide]
            return BatchSum(torch.stack([part.total for part in parts], dim=1), parts[0].count)

        with exactly(self.state.device):
            return self.risk.accumulate(per_batch, vectors)

    def _derivative(self, batch: Any, vector: Sequence[Tensor]) -> BatchSum:
        with forward_ad.dual_level():
            names = list(self.state.parameters)
            leaves = [tensor.detach().requires_grad_(True) for tensor in self.state.parameters.values()]
            dual = [forward_ad.make_dual(leaf, part) for leaf, part in zip(leaves, vector, strict=True)]
            point = State(dict(zip(names, dual, strict=True)), self.state.frozen, self.state.buffers)
            term = self.risk.term(point, batch)
            tangents = [
                None if gradient is None else forward_ad.unpack_dual(gradient).tangent
                for gradient in differentiate(term.total, dual)
            ]
            return BatchSum(joined(leaves, tangents).detach(), term.count)
