"""Training to a given loss: minima are compared at the same height."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from isoflat.core.errors import NonFinite, UnknownName, UsageError

OPTIMIZERS: Mapping[str, Callable[[Iterator[nn.Parameter], float | None], torch.optim.Optimizer]] = MappingProxyType(
    {
        "sgd": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate or 0.02, momentum=0.9),
        "adam": lambda parameters, rate: torch.optim.Adam(parameters, lr=rate or 1e-3),
    }
)
"""By name: made from the parameters and a learning rate, or the usual one."""

CLOSE = 1.5
"""Within this multiple of the target the training loss is looked at after every step."""

LOOKS = 8
"""Before that, so many times per epoch."""


@final
@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        batch: rows per step; None for all of them.
        target: loss over the whole training set at which training stops.
        optimizer: "sgd" (step 0.02, momentum 0.9) or "adam" (step 0.001).
        max_epochs: passes over the data after which training stops anyway.
        rate: another step than the optimizer's own.
    """

    batch: int | None
    target: float = 0.01
    optimizer: str = "adam"
    max_epochs: int = 4000
    rate: float | None = None

    def __post_init__(self) -> None:
        """Refuse recipes without meaning."""
        if self.optimizer not in OPTIMIZERS:
            raise UnknownName("optimizer", self.optimizer, OPTIMIZERS)
        if (self.batch is not None and self.batch < 1) or self.max_epochs < 1 or not self.target > 0:
            raise UsageError(f"batch, max_epochs and target must be positive, got {self}")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise UsageError(f"a learning rate must be positive, got {self.rate}")


@final
@dataclass(frozen=True)
class Training:
    """How a training went.

    Attributes:
        loss: mean cross-entropy over the whole training set at the end.
        reached: whether that is at or below the target; a network that misses it is reported, not hidden.
        steps: updates made.
        epochs: passes over the data, in rows seen.
        seconds: wall-clock time.
    """

    loss: float
    reached: bool
    steps: int
    epochs: float
    seconds: float


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    recipe: Recipe,
    shuffling: torch.Generator,
    progress: Callable[[float], None] = lambda share: None,
) -> Training:
    """Train in place until the loss over the whole training set, as evaluated, is at or below the target.

    The model ends in evaluation mode. The loss is checked often enough that training stops just below it. The global
    random state is not touched.

    Args:
        model: changed in place.
        data: inputs and class targets, one per row or one per place of a row.
        recipe: how.
        shuffling: draws the order of the rows.
        progress: told the share of the way to the target, on a logarithmic scale, at each look.

    Raises:
        NonFinite: the training diverged.
    """
    started = time.monotonic()
    inputs, targets = data
    rows = len(targets)
    batch = min(recipe.batch or rows, rows)
    optimizer = OPTIMIZERS[recipe.optimizer](model.parameters(), recipe.rate)
    look = max(1, math.ceil(rows / batch) // LOOKS)
    first = loss = full_loss(model, data)
    steps = seen = 0
    for chosen in _order(rows, batch, recipe.max_epochs, shuffling):
        if loss <= recipe.target:
            break
        optimizer.zero_grad(set_to_none=True)
        model.train()
        F.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
        steps, seen = steps + 1, seen + len(chosen)
        if loss <= CLOSE * recipe.target or steps % look == 0:
            loss = full_loss(model, data)
            progress(_share(first, loss, recipe.target))
    loss = full_loss(model, data)
    progress(1.0)
    return Training(loss, loss <= recipe.target, steps, seen / rows, time.monotonic() - started)


def full_loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Mean cross-entropy over all rows; the model is put in evaluation mode.

    Raises:
        NonFinite: it is NaN or infinite.
    """
    model.eval()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(data[0]), data[1]))
    if not math.isfinite(loss):
        raise NonFinite(f"the training loss is {loss}: the training diverged; take a smaller step")
    return loss


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of targets at which the largest output is."""
    with torch.no_grad():
        return float((model(data[0]).argmax(dim=1) == data[1]).double().mean())


def _order(rows: int, batch: int, epochs: int, shuffling: torch.Generator) -> Iterator[Tensor]:
    """Rows of each step: every epoch in a new order, the last batch as long as what is left; all rows unshuffled."""
    for _ in range(epochs):
        whole = batch == rows
        yield from (torch.arange(rows) if whole else torch.randperm(rows, generator=shuffling)).split(batch)


def _share(first: float, loss: float, target: float) -> float:
    if first <= target or loss >= first:
        return 0.0
    return min(1.0, math.log(first / loss) / math.log(first / target))
