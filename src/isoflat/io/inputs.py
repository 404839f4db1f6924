"""Everything a verb measures, loaded from what the command line names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch

from isoflat.core.errors import DataError, IsoflatError, UsageError
from isoflat.core.plain import attributes
from isoflat.core.raised import first_line
from isoflat.core.record import Point
from isoflat.io.data import load_data
from isoflat.io.model import find_loss, load_model
from isoflat.io.named import reason
from isoflat.measurement.subject import Subject, subject
from isoflat.measures.catalogue import find_geometry, find_measure
from isoflat.measures.settings import Settings
from isoflat.risk.batches import Batches, tensors
from isoflat.risk.network import exactly
from isoflat.risk.ranks import own_device


@final
@dataclass(frozen=True)
class Inputs:
    """Names that the user gave; nothing is opened yet.

    Attributes:
        model: `module:factory`.
        weights: a weights file; None for the weights that the factory builds.
        weights_key: the entry of the file that holds the weights; None to look in the usual places.
        strip_prefix: prefixes removed from the names in the file.
        data: a data source.
        split: which split; None for train.
        transform: `module:fn` that prepares inputs.
        examples: how many; None for all.
        batch_size: rows per batch.
        loss: name or `module:fn`.
        seed: of fresh weights.
    """

    model: str
    data: str
    weights: Path | None = None
    weights_key: str | None = None
    strip_prefix: tuple[str, ...] = ()
    split: str | None = None
    transform: str | None = None
    examples: int | None = None
    batch_size: int = 500
    loss: str = "cross_entropy"
    seed: int = 0

    def network(self, note: Callable[[str], None] = lambda text: None) -> torch.nn.Module:
        """The network with its weights; see `load_model`."""
        return load_model(
            self.model,
            self.weights,
            key=self.weights_key,
            strip_prefix=self.strip_prefix,
            seed=self.seed,
            note=note,
        )

    def read(self, note: Callable[[str], None] = lambda text: None) -> Batches:
        """The data; see `load_data`."""
        return load_data(
            self.data,
            self.split,
            transform=self.transform,
            examples=self.examples,
            batch_size=self.batch_size,
            note=note,
        )

    def facts(self, point: Point) -> list[tuple[str, str]]:
        """Names and values that tell people what was measured.

        Args:
            point: loss, gradient and size as they were found.
        """
        accuracy = "" if point.accuracy is None else f", accuracy {point.accuracy:.4g} (chance {point.chance:.4g})"
        return [
            ("network", f"{self.model}, {point.parameters} trainable entries"),
            ("weights", "as built by the factory" if self.weights is None else str(self.weights)),
            ("data", f"{self.data}, {point.examples} examples"),
            ("loss", f"{point.loss:.6g} ({self.loss}){accuracy}"),
            ("gradient norm", f"{point.gradient_norm:.4g}"),
        ]

    def described(self) -> dict[str, Any]:
        """The choices that tell what was measured, for a result."""
        return {
            "model": self.model,
            "weights": None if self.weights is None else str(self.weights),
            **attributes(
                self, "weights_key", "strip_prefix", "data", "split", "transform", "examples", "batch_size", "loss"
            ),
        }


@final
@dataclass(frozen=True)
class Loaded:
    """A network with what it is measured on.

    Attributes:
        model: the network, in evaluation mode, with its weights.
        batches: the data.
        loss: what `isoflat.measure` takes as loss.
        notes: what was chosen while loading.
    """

    model: torch.nn.Module
    batches: Batches
    loss: Any
    notes: tuple[str, ...]


def load(inputs: Inputs) -> Loaded:
    """Build, fill, read: cheap refusals first.

    Raises:
        IsoflatError: something cannot be found, opened or fitted.
    """
    notes: list[str] = []
    loss = find_loss(inputs.loss)
    model = inputs.network(notes.append)
    return Loaded(model, inputs.read(notes.append), loss, tuple(notes))


def check(measures: list[str], geometry: list[str], **settings: Any) -> None:
    """Names and limits, before a file is opened.

    Args:
        measures: names in the catalogue.
        geometry: names of metrics.
        **settings: as for `isoflat.measures.settings.Settings`.

    Raises:
        UsageError: one of them is unknown or has no meaning.
    """
    for name in measures:
        find_measure(name)
    for name in geometry:
        find_geometry(name)
    Settings(**settings)


def prepare(
    inputs: Inputs, params: list[str] | None = None, dtype: str | None = None, device: torch.device | None = None
) -> tuple[Loaded, Subject]:
    """Load, and see that the network runs on the data.

    Args:
        inputs: what the user named.
        params: which parameters count, by name; None for all.
        dtype: precision of the products; None for the weights' own.
        device: where to compute; None for where the weights are.

    Raises:
        IsoflatError: something cannot be found, opened or fitted.
    """
    loaded = load(inputs)
    target = subject(loaded.model, loaded.batches, loaded.loss, Settings(params=params, dtype=dtype, device=device))
    try_forward(target)
    return loaded, target


@contextmanager
def within_memory() -> Iterator[None]:
    """An accelerator without memory is refused like a machine without."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error


def device_of(name: str | None) -> torch.device | None:
    """A device that is there; of several processes on a machine each takes the accelerator of its own number.

    Raises:
        UsageError: no such kind of device, or this machine has none.
    """
    if name is None:
        return None
    try:
        device = own_device(torch.device(name))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name} cannot be used here: {first_line(error)}. Try cpu or cuda") from error
    return device


def try_forward(target: Subject) -> None:
    """Run the network on the first batch, so that what does not fit is said in words.

    Raises:
        UsageError: network, inputs, targets and loss do not fit together.
        DataError: there is no batch.
    """
    batch = next(iter(target.risk.batches), None)
    if batch is None:
        raise DataError("the data is empty: it gave no batch")
    try:
        with exactly(target.state.device), torch.no_grad():
            target.risk.term(target.state, batch)
    except IsoflatError:
        raise
    except Exception as error:  # whatever the user's network and loss raise on data of the wrong form
        shapes = ", ".join(f"{tuple(part.shape)} {part.dtype}".replace("torch.", "") for part in tensors(batch))
        raise UsageError(
            f"network and loss fail on the first batch (tensors {shapes}): {reason(error)}. Bring the inputs into the "
            "form the network was trained on with --transform module:fn, and check --loss and the number of classes"
        ) from error


def before(inputs: Inputs, file: Path | None) -> tuple[torch.nn.Module | None, tuple[str, ...]]:
    """The network before training, for bounds whose prior is centred there, and what a reader must know of it.

    Args:
        inputs: what the user named.
        file: the weights before training; None for none.
    """
    if file is None:
        return None, ()
    notes: list[str] = []
    return replace(inputs, weights=file).network(notes.append), tuple(notes)
