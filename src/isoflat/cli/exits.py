"""Exit codes, and how a refusal becomes one line on standard error."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from isoflat.cli.terminal import complain
from isoflat.core.errors import IsoflatError, RankLost

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
        except RankLost as error:
            complain(str(error))
            raise typer.Exit(LOST) from None
        except IsoflatError as error:
            complain(str(error))
            raise typer.Exit(REFUSED) from None
        except MemoryError as error:
            line = (str(error).splitlines() or ["no memory left"])[0]
            complain(f"out of memory ({line}): lower --memory, --batch-size or --examples")
            raise typer.Exit(REFUSED) from None

    return call
