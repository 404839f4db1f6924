"""Batches of whatever holds the user's data, as the loss needs them: a loss of output and target takes no single examples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from isoflat.risk.batches import ROWS, Batches, as_batches
from isoflat.risk.examples import gathered
from isoflat.risk.losses import Loss, TargetLoss


def batches_of(data: Any, loss: Loss) -> Batches:
    """Batches for a loss (`as_batches`); single examples are put together for one of output and target.

    Raises:
        DataError: the data shuffles, can be read once only, or has no known form.
    """
    read = gathered(data, ROWS) if isinstance(loss, TargetLoss) else data
    batches = as_batches(read)
    return batches if read is data else replace(batches, notes=("single examples were put together in batches",))
