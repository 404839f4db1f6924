"""Solvers as coroutines of products: one pass over the data can serve several of them.

A solver never holds an operator. It *asks* for products (`Request`) and is sent them, so that the same code runs alone
(`Solver.__call__`) or in step with others that need the same Hessian through other frames (`products_of`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, TypeVar, final

import torch
from torch import Tensor

from isoflat.core.errors import NonFinite
from isoflat.core.space import largest
from isoflat.linalg.operator import Operator, Parts, Pullback

R = TypeVar("R")


@final
@dataclass(frozen=True)
class Request:
    """Products that a solver waits for.

    Attributes:
        vectors: columns to multiply, shape `(m, k)`.
        double: flag that the products must be computed in float64.
        parts: places of the parts of a sum to multiply with; None for all.
        status: state of the solver in words, for a progress bar.
    """

    vectors: Tensor
    double: bool = False
    status: str = ""
    parts: Parts = None


Steps = Generator[Request, Tensor, R]


@dataclass(frozen=True)
class Domain:
    """Dimension, precision and device of a solver's vectors.

    Attributes:
        n: dimension.
        dtype: precision of the products.
        device: device of the vectors.
        shares: share of each part of the operator in the cost of a product; more than one where it is a sum.
    """

    n: int
    dtype: torch.dtype
    device: torch.device
    shares: tuple[float, ...] = (1.0,)

    @staticmethod
    def of(operator: Operator) -> Domain:
        """Domain of an operator."""
        return Domain(operator.n, operator.dtype, operator.device, operator.shares)

    def share(self, parts: Parts) -> float:
        """The cost of a product with some parts, in products with all.

        >>> Domain(1, torch.float64, torch.device("cpu"), (0.25, 0.75)).share((1,))
        0.75
        """
        return 1.0 if parts is None else math.fsum(self.shares[p] for p in parts)


@dataclass(frozen=True)
class Solver(ABC, Generic[R]):
    """Hyper-parameters of an algorithm; called with an operator and a random stream.

    Attributes:
        label: fixed text from which a measurement seeds the algorithm's random stream: it outlives the name of the class,
            because another label means other numbers.
    """

    label: ClassVar[str]

    @abstractmethod
    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[R]:
        """The algorithm as a coroutine of products."""

    @final
    def __call__(self, operator: Operator, stream: torch.Generator) -> R:
        """Run alone on one operator."""
        steps = self.steps(Domain.of(operator), stream)
        reply: Tensor | None = None
        while True:
            try:
                request = steps.send(reply)  # pyrefly: ignore
            except StopIteration as done:
                return done.value
            source = operator.double() if request.double else operator
            reply = finite(source.some(request.parts).matmat(request.vectors))


@dataclass(frozen=True, eq=False)
class SolverWithVectors(Solver[R], ABC):
    """Solver whose settings hold vectors; two are equal where all settings are and the vectors are the same tensors."""

    @final
    def __eq__(self, other: object) -> bool:
        """Equality of class and settings."""
        return type(other) is type(self) and self._key() == other._key()  # pyrefly: ignore

    @final
    def __hash__(self) -> int:
        """Hash in line with equality."""
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        values = (getattr(self, item.name) for item in fields(self))
        return tuple(id(value) if isinstance(value, Tensor) else value for value in values)


@final
@dataclass(frozen=True, eq=False)
class SingleProduct(Solver[Tensor]):
    """Solver that takes one product with a given vector of shape `(n,)`; returns the product, shape `(n, 1)`.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense
    >>> SingleProduct(torch.tensor([1.0, 2.0]))(Dense(torch.diag(torch.tensor([3.0, 1.0]))), stream(0)).ravel().tolist()
    [3.0, 2.0]
    """

    label: ClassVar[str] = "Probe"

    vector: Tensor

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[Tensor]:
        """Ask for the product."""
        return (
            yield Request(
                self.vector[:, None].to(device=domain.device, dtype=domain.dtype), status="checking the group"
            )
        )


@final
@dataclass(frozen=True, eq=False)
class PendingProduct:
    """Products that are waited for, and the operator that they are of.

    Attributes:
        operator: a pullback of what the data gives; requests for pullbacks of one operator share a pass over the data.
        request: the vectors, in the operator's coordinates.
    """

    operator: Pullback
    request: Request


def products_of(solver: Solver[R], operator: Pullback, stream: torch.Generator) -> Generator[PendingProduct, Tensor, R]:
    """A solver on an operator as a coroutine: what it yields can be served together with what others wait for."""
    steps = solver.steps(Domain.of(operator), stream)
    try:
        request = next(steps)
        while True:
            request = steps.send((yield PendingProduct(operator, request)))
    except StopIteration as done:
        return done.value


def serve(waiting: Sequence[PendingProduct], source: Operator) -> list[Tensor]:
    """Products in one pass over the data, in order.

    Args:
        waiting: all of pullbacks of one operator, and of the same parts of it.
        source: that operator, or its twin in float64.
    """
    pushed = [one.operator.frame.push(one.request.vectors) for one in waiting]
    products = finite(source.some(waiting[0].request.parts).matmat(torch.cat(pushed, dim=1)))
    widths = [one.request.vectors.shape[1] for one in waiting]
    return [_pulled(one, part) for one, part in zip(waiting, products.split(widths, dim=1), strict=True)]


def _pulled(waiting: PendingProduct, products: Tensor) -> Tensor:
    """The products seen through the frame, in float64 where they were asked for so."""
    operator, request = waiting.operator.some(waiting.request.parts), waiting.request
    if request.double and operator.plus is not None:
        operator = Pullback(operator.base, operator.frame, operator.plus.double())
    return finite(operator.pull(products, request.vectors))


@final
@dataclass(frozen=True)
class Outcome:
    """Result of a solver, and its share of the cost.

    Attributes:
        result: result of the solver.
        products: number of products with the whole operator; those with parts count by their share, rounded up.
        seconds: time of its passes over the data, shared passes divided by the columns.
    """

    result: Any
    products: int
    seconds: float


def finite(products: Tensor) -> Tensor:
    """The products, if all are finite.

    Raises:
        NonFinite: a product is NaN or infinite.
    """
    if not math.isfinite(largest(products)):
        raise NonFinite(
            "a Hessian-vector product is NaN or infinite although loss and gradient are finite: second derivatives "
            "overflow in this precision; measure with dtype=float64, or look for sqrt, log or division at 0"
        )
    return products
