"""Second-order rules: operations whose own double backward does more than is needed, replaced while a graph is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def second_order() -> Iterator[None]:
    """While a gradient graph is built, operations with a rule of ours are differentiated by it."""
    yield
