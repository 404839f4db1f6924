"""What a whole answer is in `benchmarks/peers.py`, and the meter that it runs on.

A whole answer is everything from a trained network and its batches to a number: setting up, checks of the tool's own,
graphs, products. Tools are imported beforehand.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from problems import Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

R = TypeVar("R")

RESIDUAL = 1e-3
"""What an eigenvalue is asked for: this true residual, or this width of the enclosure, in units of the value."""

PRODUCTS = 12
"""For a trace; a multiple of 6, so that Hutch++ can cut it in three and XTrace in two."""


class TimeUp(Exception):
    """An answer took too long."""


class Meter:
    """Counts products, and ends an answer whose time is up before the next one.

    Attributes:
        products: so far.
        limit: seconds from `start` on.
    """

    def __init__(self, limit: float) -> None:
        self.products = 0
        self.limit = limit
        self._deadline = math.inf

    def start(self) -> None:
        """Anew."""
        self.products, self._deadline = 0, time.perf_counter() + self.limit

    def count(self, products: int = 1, status: str = "") -> None:
        """So many products are about to be made; the status is told if there is no time for them.

        Raises:
            TimeUp: no more.
        """
        if time.perf_counter() > self._deadline:
            raise TimeUp("; ".join(filter(None, (f"no answer after {self.limit:.0f} s", status))))
        self.products += products

    def counted(self, product: Callable[..., R]) -> Callable[..., R]:
        """The same function, counted."""

        def work(*args: Any) -> R:
            self.count()
            return product(*args)

        return work


@dataclass(frozen=True)
class Answer:
    """What a tool says.

    Attributes:
        value: the number.
        vector: the eigenvector that goes with it, of any length, shape `(n,)`; its residual is taken afterwards.
        residual: `‖A x − value x‖ / ‖x‖`, if the tool has taken it by a product of its own.
        lower: end of an interval.
        upper: end of an interval.
        products: Hessian-vector products, if the tool counts them itself: parts of the data count as parts.
        note: in words.
    """

    value: float
    vector: Tensor | None = None
    residual: float | None = None
    lower: float = -math.inf
    upper: float = math.inf
    products: float | None = None
    note: str = ""


Work = Callable[[], Answer]


@dataclass(frozen=True)
class Contestant:
    """A tool at a task.

    Attributes:
        task: which number; those of one task are compared.
        name: of the tool, and how it is asked.
        prepare: imports the tool and returns the work that is timed.
        targets: gradient passes that were aimed at, by key of the problem.
    """

    task: str
    name: str
    prepare: Callable[[Case, Meter], Work]
    targets: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def plain() -> Iterator[None]:
    """Attention by its plain kernel, for the peers too: without it none of them can differentiate the decoder twice."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
