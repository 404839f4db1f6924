"""Training to a given loss, or for a given time: minima are compared at the same height, or as the paper reached them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from isoflat.core.errors import DataError, NonFinite, UnknownName, UsageError
from isoflat.core.rng import stream
from isoflat.core.state import fingerprint
from isoflat.experiments.checkpoint import Checkpoint, Keeper, TrainingProgress, content_of

VERSION = 2
"""Version of training; raised whenever the same regime no longer gives the same weights."""

OPTIMIZERS: Mapping[str, Callable[[Iterator[nn.Parameter], Regime], torch.optim.Optimizer]] = MappingProxyType(
    {
        "sgd": lambda parameters, regime: torch.optim.SGD(
            parameters, lr=regime.rate or 0.02, momentum=regime.momentum, weight_decay=regime.weight_decay
        ),
        "adam": lambda parameters, regime: torch.optim.Adam(
            parameters, lr=regime.rate or 1e-3, weight_decay=regime.weight_decay
        ),
    }
)
"""Functions by name that make an optimizer from parameters and a regime."""

MOMENTUM = 0.9
"""Momentum of "sgd" where none is given."""

CLOSE = 1.5
"""Multiple of the target below which the training loss is evaluated after every step."""

ROWS = 2000
"""Largest number of rows that are evaluated at a time."""

PIECE = 500
"""Largest number of rows of a step that go through the network at a time on a processor: what they need fits its caches,
and the allocator hands no memory back between steps. A LeNet's step on 5 000 rows takes half the time."""


@final
@dataclass(frozen=True)
class Regime:
    """Settings of a training.

    Attributes:
        batch: number of rows per step; None for all of them.
        target: loss over the whole training set, as evaluated, at which training stops; None to train all epochs.
        optimizer: "sgd" (step 0.02) or "adam" (step 0.001).
        max_epochs: passes over the data after which training stops anyway.
        rate: learning rate; None for the optimizer's own.
        momentum: momentum of "sgd".
        weight_decay: multiple of the weights that is added to their gradient.
        halve_every: number of epochs after which the learning rate is halved, again and again; None to keep it.
        looks: number of evaluations of the training loss per epoch, far from the target; below 1 for one in several
            epochs. Near the target there is one after every step, without a target one per epoch. Each costs as much as
            a third of an epoch.
    """

    batch: int | None
    target: float | None = 0.01
    optimizer: str = "adam"
    max_epochs: int = 4000
    rate: float | None = None
    momentum: float = MOMENTUM
    weight_decay: float = 0.0
    halve_every: int | None = None
    looks: float = 8

    def __post_init__(self) -> None:
        """Refuse regimes without meaning."""
        if self.optimizer not in OPTIMIZERS:
            raise UnknownName("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("batch", "max_epochs", "halve_every"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise UsageError(f"{name} must be at least 1, got {number}")
        if self.target is not None and not 0 < self.target < math.inf:
            raise UsageError(f"target must be positive, or None to train all epochs, got {self.target}")
        if not 0 < self.looks < math.inf:
            raise UsageError(f"looks at the loss per epoch must be positive, got {self.looks}")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise UsageError(f"a learning rate must be positive, got {self.rate}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum must be at least 0 and less than 1, got {self.momentum}")
        if self.optimizer != "sgd" and self.momentum != MOMENTUM:
            raise UsageError(f"momentum is set for sgd only, got {self.momentum} with {self.optimizer}: leave it out")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"weight_decay must not be negative, got {self.weight_decay}")

    @property
    def label(self) -> str:
        """All settings in a fixed spelling: a checkpoint of a training holds it, and is resumed by the same one only."""
        return (
            f"Regime(batch={self.batch!r}, target={self.target!r}, optimizer={self.optimizer!r}, "
            f"max_epochs={self.max_epochs!r}, rate={self.rate!r}, momentum={self.momentum!r}, "
            f"weight_decay={self.weight_decay!r}, halve_every={self.halve_every!r}, looks={self.looks!r})"
        )


@final
@dataclass(frozen=True)
class Training:
    """Outcome of a training.

    Attributes:
        loss: mean cross-entropy over the whole training set at the end.
        reached: whether the loss is at or below the target; True where there is no target.
        steps: number of steps taken.
        epochs: number of passes over the data: rows seen over rows there are.
        seconds: wall-clock time of all calls that had a part in the training.
        history: epochs with the loss after each; empty where there is a target.
    """

    loss: float
    reached: bool
    steps: int
    epochs: float
    seconds: float
    history: tuple[tuple[int, float], ...] = ()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread while the block runs.

    Small networks gain nothing from threads, suffer where cores are shared, and owe them their last digits.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    regime: Regime,
    shuffling: torch.Generator,
    progress: Callable[[float], None] = lambda share: None,
    checkpoint: Checkpoint | None = None,
) -> Training:
    """Train in place until the loss over the whole training set, as evaluated, is at or below the target.

    The model ends in evaluation mode. The loss is checked often enough that training stops just below the target; where
    there is none, all epochs are trained. The global random state is not touched and plays no part: dropout draws from
    a stream of its own that follows from `shuffling`.

    Where a checkpoint is there, training goes on from it. On a CPU, a training that was killed, started again with the
    same arguments and so ended gives bit for bit what it would have given undisturbed, but for the seconds.

    Args:
        model: changed in place; on the device of the data.
        data: inputs and class targets, one per row or one per place of a row.
        regime: settings of the training.
        shuffling: a CPU generator that draws the order of the rows.
        progress: function that is told the share that is done: of the way to the target, on a logarithmic scale, or of the
            epochs.
        checkpoint: file to save to on the way; None for none.

    Raises:
        NonFinite: the training diverged.
        DataError: there is nothing to train on; or the checkpoint is damaged or another training's, and then neither
            the file nor the model is changed.
        UsageError: the checkpoint cannot be written.

    >>> data = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    >>> training = train(nn.Linear(2, 2), data, Regime(1, None, "sgd", max_epochs=3), torch.Generator().manual_seed(0))
    >>> training.steps, training.epochs, [epoch for epoch, _ in training.history]
    (6, 3.0, [1, 2, 3])
    """
    started = time.monotonic()
    rows = len(data[1])
    if not rows:
        raise DataError("training needs at least one row, got none")
    batch = min(regime.batch or rows, rows)
    epoch = math.ceil(rows / batch)
    target = -math.inf if regime.target is None else regime.target
    look = epoch if regime.target is None else max(1, int(epoch / regime.looks))
    origin = fingerprint(shuffling.get_state().numpy().tobytes())
    optimizer = OPTIMIZERS[regime.optimizer](model.parameters(), regime)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, regime.halve_every or regime.max_epochs + 1, gamma=0.5)
    with _dropout(_device(model), stream(0, "dropout", origin).initial_seed()):
        first = full_loss(model, data)
        way, keeper = TrainingProgress(first, first), None
        if checkpoint is not None:
            identity = _identity(model, data, regime, origin)
            keeper = Keeper(checkpoint, identity, model, optimizer, schedule, shuffling)
            way = keeper.resume() or way
        before = way.seconds
        for chosen in _order(rows, batch, regime.max_epochs - way.steps // epoch, shuffling, data[0].device):
            if way.loss <= target:
                break
            _step(model, (data[0][chosen], data[1][chosen]), optimizer)
            way.steps, way.seen = way.steps + 1, way.seen + len(chosen)
            done, rest = divmod(way.steps, epoch)
            if way.loss <= CLOSE * target or way.steps % look == 0:
                way.loss = full_loss(model, data)
                progress(_share(way, regime.target, done / regime.max_epochs))
            if rest:
                continue
            schedule.step()
            if regime.target is None:
                way.history.append((done, way.loss))
            if keeper is not None and done % keeper.checkpoint.every == 0:
                way.seconds = before + time.monotonic() - started
                keeper.save(way)
    loss = full_loss(model, data)
    progress(1.0)
    reached = regime.target is None or loss <= regime.target
    seconds = before + time.monotonic() - started
    return Training(loss, reached, way.steps, way.seen / rows, seconds, tuple(way.history))


def _step(model: nn.Module, rows: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Take one step; the gradient of the mean over all rows is summed piece by piece where that changes no output."""
    inputs, targets = rows
    model.train()
    optimizer.zero_grad(set_to_none=True)
    size = PIECE if inputs.device.type == "cpu" and not _mixes_rows(model) else len(inputs)
    for some, wanted in zip(inputs.split(size), targets.split(size), strict=True):
        (F.cross_entropy(model(some), wanted) * (len(some) / len(inputs))).backward()
    optimizer.step()


def _mixes_rows(model: nn.Module) -> bool:
    """True if the output of a row depends on the other rows of its batch, as it does where batches are normalised."""
    return any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for module in model.modules())


def full_loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Mean cross-entropy over all rows, a piece at a time; the model is put in evaluation mode.

    Raises:
        NonFinite: the loss is NaN or infinite.

    >>> round(full_loss(nn.Identity(), (torch.zeros(5, 10), torch.arange(5))), 4)  # log 10
    2.3026
    """
    rows = len(data[1])
    pieces = [(float(F.cross_entropy(scores, targets)), len(targets)) for scores, targets in _evaluated(model, data)]
    if not all(math.isfinite(loss) for loss, _ in pieces):
        raise NonFinite(
            f"the training loss is {sum(loss for loss, _ in pieces)}: the training diverged; take a smaller step"
        )
    return math.fsum(loss * (count / rows) for loss, count in pieces)


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of rows whose largest output is that of the target; the model is put in evaluation mode.

    >>> accuracy(nn.Identity(), (torch.eye(4), torch.tensor([0, 1, 2, 0])))
    0.75
    """
    right = sum(int((scores.argmax(dim=1) == targets).sum()) for scores, targets in _evaluated(model, data))
    return right / data[1].numel()


def _evaluated(model: nn.Module, data: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over outputs and targets, a piece of the rows at a time."""
    model.eval()
    for inputs, targets in zip(data[0].split(ROWS), data[1].split(ROWS), strict=True):
        with torch.no_grad():
            yield model(inputs), targets


def _order(rows: int, batch: int, epochs: int, shuffling: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Iterate over the rows of each step: every epoch in a new order, unshuffled where one step takes all rows."""
    for _ in range(epochs):
        order = torch.arange(rows) if batch == rows else torch.randperm(rows, generator=shuffling)
        yield from order.to(device).split(batch)


def _share(way: TrainingProgress, target: float | None, epochs: float) -> float:
    """Share of the way to the target that is done; share of the epochs where there is no target."""
    if target is None:
        return epochs
    if way.first <= target or way.loss >= way.first:
        return 0.0
    return min(1.0, math.log(way.first / way.loss) / math.log(way.first / target))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _dropout(device: torch.device, seed: int) -> Iterator[None]:
    """Let dropout draw from a stream of its own; afterwards the global random state is as it was."""
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cards):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed cards that nobody restores
        for card in cards:
            with torch.cuda.device(card):
                torch.cuda.manual_seed(seed)
        yield


def _identity(model: nn.Module, data: tuple[Tensor, Tensor], regime: Regime, origin: str) -> dict[str, str]:
    """Identity of a training: everything that it depends on."""
    return {
        "version": str(VERSION),
        "regime": regime.label,
        "data": content_of({"inputs": data[0], "targets": data[1]}),
        "initial weights": content_of(model.state_dict()),
        "order of the rows": origin,
        "device": _device(model).type,
    }
