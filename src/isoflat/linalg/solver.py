"""Solvers as coroutines of products: one pass over the data can serve several of them.

A solver never holds an operator. It *asks* for products (`Request`) and is sent them, so that the same code runs alone
(`Solver.__call__`) or in step with others that need the same Hessian through other frames (`run_in_lockstep`).
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
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
@dataclass(frozen=True)
class Job:
    """One solver on one pullback of the shared base."""

    operator: Pullback
    solver: Solver[Any]
    stream: torch.Generator


@final
@dataclass(frozen=True)
class Outcome:
    """What a job returned, and its share of the bill.

    Attributes:
        result: of the solver.
        products: with all of the operator; those with parts of a sum count by their share of the cost, rounded up.
        seconds: shared passes divided by the columns.
    """

    result: Any
    products: int
    seconds: float


def run_in_lockstep(
    base: Operator, jobs: Sequence[Job], report: Callable[[str], None] = lambda _: None
) -> list[Outcome]:
    """Run jobs in step: each round asks the base for all their vectors in one pass over the data.

    Products that must be in float64 wait until no others are asked for, so that they share a pass too; where the base
    is in float64 itself, they join the others. Of products with parts of the base the cheapest come first, so that
    those who fall behind catch up with the others before these ask for more.

    Args:
        base: the operator that every job's `operator.base` is.
        jobs: solvers with the pullback each works on.
        report: called with a status line once a round.

    Returns:
        One outcome per job, in order. Seconds are shared by the number of columns.

    >>> from isoflat.linalg.maps import Diagonal, Identity
    >>> from isoflat.linalg.operator import Dense
    >>> from isoflat.linalg.eigen.lanczos import Lanczos
    >>> from isoflat.core.rng import stream
    >>> base = Dense(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)))
    >>> half = Diagonal(torch.tensor([1.0, 2.0], dtype=torch.float64))
    >>> jobs = [Job(Pullback(base, e), Lanczos(), stream(0)) for e in (Identity(2), half)]
    >>> [round(outcome.result.top.value, 12) for outcome in run_in_lockstep(base, jobs)]
    [3.0, 4.0]
    """
    runs = [_Run(job) for job in jobs]
    precise: Operator | None = None
    for run in runs:
        run.advance(None)
    while waiting := [run for run in runs if run.request is not None]:
        if precise is None and any(run.request and run.request.double for run in waiting):
            precise = base.double()
        wants = {run: (run.wide and precise is not base, run.share, run.parts) for run in waiting}
        first = min(wants.values(), key=lambda want: want[:2])
        group = [run for run, want in wants.items() if want == first]
        report("; ".join(dict.fromkeys(run.request.status for run in group if run.request and run.request.status)))
        source = precise if first[0] and precise is not None else base
        _serve(group, source.some(first[2]))
    # Shares of a sum add up to one but for rounding.
    return [Outcome(run.result, math.ceil(round(run.products, 9)), run.seconds) for run in runs]


class _Run:
    """A job under way."""

    def __init__(self, job: Job) -> None:
        self.operator = job.operator
        self.domain = Domain.of(job.operator)
        self.steps = job.solver.steps(self.domain, job.stream)
        self.request: Request | None = None
        self.result: Any = None
        self.products = 0.0
        self.seconds = 0.0

    @property
    def wide(self) -> bool:
        """Whether it waits for products in float64."""
        return self.request is not None and self.request.double

    @property
    def parts(self) -> Parts:
        """Of what it waits for products."""
        return None if self.request is None else self.request.parts

    @property
    def share(self) -> float:
        """What one of the products it waits for costs."""
        return self.domain.share(self.parts)

    def advance(self, reply: Tensor | None) -> None:
        """Send products in; take the next request, or the result."""
        start = time.monotonic()
        try:
            self.request = self.steps.send(reply)  # pyrefly: ignore
        except StopIteration as done:
            self.request, self.result = None, done.value
        self.seconds += time.monotonic() - start

    def pull(self, products: Tensor, request: Request) -> Tensor:
        """Finish the products of a request, in float64 where it asks for that."""
        operator = self.operator.some(request.parts)
        if request.double and operator.plus is not None:
            operator = Pullback(operator.base, operator.frame, operator.plus.double())
        return finite(operator.pull(products, request.vectors))


def _serve(group: Sequence[_Run], base: Operator) -> None:
    """One pass over the data for every request of the group."""
    requests = [run.request for run in group if run.request is not None]
    widths = [request.vectors.shape[1] for request in requests]
    start = time.monotonic()
    pushed = [run.operator.frame.push(request.vectors) for run, request in zip(group, requests, strict=True)]
    products = finite(base.matmat(torch.cat(pushed, dim=1)))
    share = (time.monotonic() - start) / sum(widths)
    for run, request, columns in zip(group, requests, products.split(widths, dim=1), strict=True):
        run.products += request.vectors.shape[1] * run.share
        run.seconds += share * request.vectors.shape[1]
        run.advance(run.pull(columns, request))


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
