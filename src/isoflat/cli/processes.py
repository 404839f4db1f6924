"""A verb under torchrun: every process runs it, the first one speaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from isoflat.cli.exits import REFUSED
from isoflat.core.errors import IsoflatError, RankLost

if TYPE_CHECKING:
    from isoflat.risk.ranks import Ranks


@contextmanager
def sharing(device: str | None, timeout: float) -> Iterator[Ranks]:
    """The processes that torchrun started, for as long as the block runs; a single one without it.

    What is refused is refused by all, and said by rank 0. That a process was lost is said by all that are left, because
    rank 0 may be the lost one.

    Args:
        device: as given by the user.
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
