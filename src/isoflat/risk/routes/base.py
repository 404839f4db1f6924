"""Interfaces of a product route, and of the graphs that it goes through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from isoflat.core.space import ParameterSpace
from isoflat.core.state import State
from isoflat.risk.empirical import EmpiricalRisk, differentiate, leaf_state
from isoflat.risk.ranks import BatchSum


@dataclass(frozen=True)
class Graph(ABC):
    """One batch's share of a matrix of the weights, ready to be multiplied.

    The matrix is `Σ_b shares / Σ_b count_b`; which one it is, each kind of graph says.

    Attributes:
        count: number of counted targets, or sum of their weights.
        rules: names of the second-order rules that were applied (`risk.second_order`).
    """

    count: float
    rules: frozenset[str]

    @classmethod
    @abstractmethod
    def build(cls, risk: EmpiricalRisk, state: State, batch: Any) -> Self:
        """Graph up to the vectors: forward, and backward as far as its graph is needed."""

    @abstractmethod
    def products(self, vectors: Sequence[Sequence[Tensor]], last: bool) -> Tensor:
        """Products with vectors given tensor by tensor, shape `(n, k)`; `last` lets the graph go."""


@dataclass(frozen=True)
class Linearisation(ABC):
    """The Hessian of the empirical risk at a state, or another matrix of the weights, as products.

    Attributes:
        risk: empirical risk.
        state: weights and buffers.
    """

    risk: EmpiricalRisk
    state: State

    @property
    @abstractmethod
    def route(self) -> str:
        """Name of the method of the products, for the record."""

    @property
    def exact(self) -> bool:
        """Flag that products are exact up to rounding."""
        return True

    @abstractmethod
    def products(self, vectors: Tensor) -> Tensor:
        """`H V` for V of shape `(n, k)`: shape `(n, k)`, float64."""

    def on(self, risk: EmpiricalRisk) -> Linearisation:
        """The same route over other pieces of the data, with nothing kept."""
        return replace(self, risk=risk)

    def double(self) -> Linearisation:
        """The same in float64, with the memory of one batch; in float32 where the network runs in nothing wider."""
        return replace(self, state=self.risk.network.widest(self.state))


def columns(space: ParameterSpace, vectors: Tensor) -> list[list[Tensor]]:
    """Columns of an `(n, k)` matrix as tensors of the parameters' shapes."""
    return [list(space.unflatten(column).values()) for column in vectors.T.contiguous()]


def gradient(risk: EmpiricalRisk, state: State, batch: Any) -> BatchSum:
    """One batch's summed gradient, shape `(n,)`."""
    leaves = leaf_state(state)
    term = risk.term(leaves, batch)
    parameters = list(leaves.parameters.values())
    return BatchSum(joined(parameters, differentiate(term.total, parameters)), term.count)


def joined(leaves: Sequence[Tensor], parts: Sequence[Tensor | None]) -> Tensor:
    """Tensors of the parameters' shapes as one vector; None counts as zero."""
    return torch.cat(
        [
            torch.zeros_like(leaf).reshape(-1) if part is None else part.reshape(-1)
            for leaf, part in zip(leaves, parts, strict=True)
        ]
    )
