"""Exit codes, and how a refusal becomes one line on standard error, of one process or of many under torchrun."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import typer

from isoflat.cli.terminal import complain
from isoflat.core.errors import IsoflatError, RankLost

if TYPE_CHECKING:
    from isoflat.risk.ranks import Ranks

REFUSED = 2
"""A wrong argument, or anything isoflat refuses."""

NOT_CONVERGED = 3
"""Measured, but not to the tolerance asked for within the budget."""

LOST = 4
"""One of the processes that share a measurement ended, or hangs."""

DOES_NOT_HOLD = 5
"""A stored number or result does not hold."""


def refusing(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, whose refusals end it with one line on standard error and exit code 2; lost processes with 4."""

    @wraps(verb)
    def call(*arguments: Any, **options: Any) -> None:
        try:
            verb(*arguments, **options)
        except IsoflatError as error:
            complain(str(error))
            raise typer.Exit(LOST if isinstance(error, RankLost) else REFUSED) from None
        except MemoryError as error:
            line = (str(error).splitlines() or ["no memory left"])[0]
            complain(f"out of memory ({line}): lower --memory, --batch-size or --examples")
            raise typer.Exit(REFUSED) from None

    return call


@contextmanager
def sharing(device: str | None, timeout: float) -> Iterator[Ranks]:
    """The processes that torchrun started, for as long as the block runs; a single one without it.

    What is refused is refused by all, and said by rank 0. That a process was lost is said by all that are left, because
    rank 0 may be the lost one.

    Args:
        device: the device that the user named; None for the default.
        timeout: seconds that a process waits for the others.

    Raises:
        IsoflatError: as raised in the block.
        typer.Exit: in its place, on all ranks but the first.
    """
    from isoflat.io.inputs import device_of
    from isoflat.risk.ranks import Ranks, joined

    with joined(device_of(device), timeout):
        ranks = Ranks.here()
        try:
            yield ranks
        except RankLost:
            raise
        except IsoflatError:
            if ranks.first:
                raise
            raise typer.Exit(REFUSED) from None
