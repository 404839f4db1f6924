"""Networks, data and losses that the command line names, loaded together."""

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
from isoflat.io.libraries import own_weights
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
    """Names of network, data and loss, as the user gave them; nothing is opened yet.

    Attributes:
        model: name of the factory, `module:factory`; `hf:FOLDER` or `timm:NAME`.
        data: name of the data, as for `isoflat.load_data`.
        weights: path of a weights file; None for the weights that the factory builds.
        weights_key: entry of the file that holds the weights; None to look in the usual places.
        strip_prefix: prefixes removed from the names in the file.
        split: name of the split; None for train.
        transform: name `module:fn` of a function that prepares inputs; None for the usual conversion.
        examples: number of examples; None for all.
        batch_size: number of rows per batch.
        loss: name of the loss, or `module:fn`.
        seed: seed of the weights that the factory builds.
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
        """The network with its weights, from `load_model`."""
        return load_model(
            self.model,
            self.weights,
            key=self.weights_key,
            strip_prefix=self.strip_prefix,
            seed=self.seed,
            note=note,
        )

    def read(self, note: Callable[[str], None] = lambda text: None) -> Batches:
        """The data in batches, from `load_data`."""
        return load_data(
            self.data,
            self.split,
            transform=self.transform,
            examples=self.examples,
            batch_size=self.batch_size,
            note=note,
        )

    def facts(self, point: Point) -> list[tuple[str, str]]:
        """Names and values that tell a reader what was measured.

        Args:
            point: loss, gradient norm and size of the network on the data.
        """
        accuracy = "" if point.accuracy is None else f", accuracy {point.accuracy:.4g} (chance {point.chance:.4g})"
        return [
            ("network", f"{self.model}, {point.parameters} trainable entries"),
            ("weights", str(self.weights or own_weights(self.model) or "as built by the factory")),
            ("data", f"{self.data}, {point.examples} examples"),
            ("loss", f"{point.loss:.6g} ({self.loss}){accuracy}"),
            ("gradient norm", f"{point.gradient_norm:.4g}"),
        ]

    def described(self) -> dict[str, Any]:
        """Names and options that tell what was measured, as plain values for a result."""
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
    """A network with the data and the loss that it is measured with.

    Attributes:
        model: the network, in evaluation mode, with its weights.
        batches: the data in batches.
        loss: loss function, as for `isoflat.measure`.
        notes: lines that say what was chosen while loading.
    """

    model: torch.nn.Module
    batches: Batches
    loss: Any
    notes: tuple[str, ...]


def load(inputs: Inputs) -> Loaded:
    """Build the network, load its weights and read the data; whatever is refused cheaply is refused first.

    Raises:
        IsoflatError: something cannot be found, opened or fitted.
    """
    notes: list[str] = []
    loss = find_loss(inputs.loss)
    model = inputs.network(notes.append)
    return Loaded(model, inputs.read(notes.append), loss, tuple(notes))


def check_names(measures: list[str], geometry: list[str], **settings: Any) -> None:
    """Check names and settings before a file is opened.

    Args:
        measures: names of measures in the catalogue.
        geometry: names of geometries in the catalogue.
        **settings: fields of `isoflat.measures.settings.Settings`.

    Raises:
        UsageError: a name is unknown, or a setting has no meaning.
    """
    for name in measures:
        find_measure(name)
    for name in geometry:
        find_geometry(name)
    Settings(**settings)


def prepare(
    inputs: Inputs, params: list[str] | None = None, dtype: str | None = None, device: torch.device | None = None
) -> tuple[Loaded, Subject]:
    """Load a network and its data, and check that the network runs on them.

    Args:
        inputs: names of network, data and loss.
        params: names of the parameters that count; None for all.
        dtype: precision of the Hessian-vector products; None for that of the weights.
        device: device to compute on; None for that of the weights.

    Raises:
        IsoflatError: something cannot be found, opened or fitted.
    """
    loaded = load(inputs)
    target = subject(loaded.model, loaded.batches, loaded.loss, Settings(params=params, dtype=dtype, device=device))
    try_forward(target)
    return loaded, target


@contextmanager
def within_memory() -> Iterator[None]:
    """Turn an accelerator's lack of memory into a MemoryError, as the machine's is."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error


def device_of(name: str | None) -> torch.device | None:
    """The device of a name; of several processes on a machine each takes the accelerator of its own number.

    Raises:
        UsageError: there is no such kind of device, or this machine has none.
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
    """Run the network on the first batch, so that a misfit is reported before anything is measured.

    Raises:
        UsageError: network, inputs, targets and loss do not fit together.
        DataError: there is no batch.
    """
    batch = next(iter(target.risk.batches), None)
    if batch is None:
        raise DataError("the data is empty: it gave no batch")
    try:
        with exactly(target.state.device):
            target.risk.term(target.state, batch)
    except IsoflatError:
        raise
    except Exception as error:  # the user's network and loss may raise anything on data of the wrong form
        shapes = ", ".join(f"{tuple(part.shape)} {part.dtype}".replace("torch.", "") for part in tensors(batch))
        raise UsageError(
            f"network and loss fail on the first batch (tensors {shapes}): {reason(error)}. Bring the inputs into the "
            "form the network was trained on with --transform module:fn, and check --loss and the number of classes"
        ) from error


def load_initial(inputs: Inputs, file: Path | None) -> tuple[torch.nn.Module | None, tuple[str, ...]]:
    """The network before training, for bounds whose prior is centred there, and notes on how it was loaded.

    Args:
        inputs: names of network, data and loss.
        file: path of the weights before training; None for no such network.
    """
    if file is None:
        return None, ()
    notes: list[str] = []
    return replace(inputs, weights=file).network(notes.append), tuple(notes)
