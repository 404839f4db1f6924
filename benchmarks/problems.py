"""The networks that benchmarks measure, each with its data, and how they are trained; float32 on the CPU.

`ISOFLAT_DATA` names a folder that holds `mnist.npz`; without it the digits of scikit-learn are enlarged to 28 × 28.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.experiments.data import characters, digits
from isoflat.experiments.families import decoder, lenet, mlp
from isoflat.experiments.loop import full_loss
from isoflat.risk.batches import as_batches
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.losses import as_loss
from isoflat.risk.network import Network, exactly
from isoflat.risk.routes.base import Linearisation, gradient
from isoflat.risk.routes.reverse import Recomputed
from isoflat.risk.second_order import Trace

CRITERION = nn.CrossEntropyLoss()

Pair = tuple[Tensor, Tensor]
Product = Callable[[Tensor], Tensor]


def source() -> str:
    """What images are taken from."""
    return "MNIST" if os.environ.get("ISOFLAT_DATA") else "digits of scikit-learn, enlarged (ISOFLAT_DATA is not set)"


def images(rows: int) -> Pair:
    """So many images of 28 × 28 pixels with their classes, or as many as there are."""
    if folder := os.environ.get("ISOFLAT_DATA"):
        with np.load(Path(folder) / "mnist.npz", allow_pickle=False) as archive:
            pixels = torch.from_numpy(archive["x_train"][:rows].astype(np.float32) / 255)
            return pixels[:, None], torch.from_numpy(archive["y_train"][:rows].astype(np.int64))
    small, classes = digits().train
    large = F.interpolate(small.view(-1, 1, 8, 8), (28, 28), mode="bilinear")
    return large[:rows], classes[:rows]


def flat_images(rows: int) -> Pair:
    """The same with the pixels in one dimension."""
    pixels, classes = images(rows)
    return pixels.flatten(1), classes


@dataclass(frozen=True)
class Problem:
    """A network to be trained on some data.

    Attributes:
        name: for tables.
        build: the network as it is initialised.
        data: inputs and classes.
        rows: of a batch that is measured on.
        step: rows of a training step.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], Pair]
    rows: int
    step: int


def small_decoder() -> nn.Module:
    """Four layers of attention over characters."""
    return decoder.build(len(characters().vocabulary), context=32, width=128, heads=4, layers=4)


PROBLEMS: Mapping[str, Problem] = {
    "mlp": Problem(
        "MLP 784-512×5-10", lambda: mlp.build((784, *[512] * 5, 10)), lambda: flat_images(10_000), rows=1000, step=100
    ),
    "lenet": Problem("LeNet", lenet.build, lambda: images(5000), rows=500, step=100),
    "decoder": Problem(
        "decoder, 4 layers of 128", small_decoder, lambda: characters(windows=256).train, rows=64, step=16
    ),
}


def fit(problem: Problem, data: Pair, epochs: int, target: float = 0.0) -> nn.Module:
    """A network trained by Adam (step 0.001), for so many epochs or until one ends at or below the target loss.

    The loss is looked at once an epoch: looking as often as `isoflat.experiments.loop` does would take longer than the
    training.
    """
    model, (inputs, targets) = problem.build(), data
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = stream(0, "products", problem.name)
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(len(targets), generator=order).split(problem.step):
            optimizer.zero_grad(set_to_none=True)
            CRITERION(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
        if target and full_loss(model, data) <= target:
            break
    return model.eval()


@dataclass(frozen=True)
class Case:
    """A trained network on its data."""

    name: str
    risk: EmpiricalRisk
    state: State

    @staticmethod
    def of(problem: Problem, model: nn.Module, data: Pair) -> Case:
        """The network as it is, on the data in batches."""
        network = Network(model)
        risk = EmpiricalRisk(network, as_loss(CRITERION), as_batches(data, problem.rows))
        return Case(problem.name, risk, network.state())

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.risk.network.module

    @property
    def data(self) -> list[Pair]:
        """In batches."""
        return list(self.risk.batches)

    def gradient(self) -> Tensor:
        """One plain gradient pass over the data."""
        with exactly(self.state.device):
            return self.risk.accumulate(lambda _, batch: gradient(self.risk, self.state, batch), self.state.vector)

    def kept(self) -> Product:
        """Products through graphs that stay."""
        return through(Recomputed(self.risk, self.state).keep())

    def rebuilt(self) -> Product:
        """Products through graphs that go."""
        return through(Recomputed(self.risk, self.state))

    def double(self) -> Case:
        """The same in float64."""
        return Case(self.name, self.risk, self.state.to(dtype=torch.float64))

    def exact(self) -> Product:
        """The Hessian in float64, as torch differentiates it."""
        product = self.double().rebuilt()

        def by_torch(vector: Tensor) -> Tensor:
            with torchs_own(), exactly(self.state.device):
                return product(vector)

        return by_torch


def trained(problem: Problem, data: Pair, epochs: int, target: float = 0.0) -> Case:
    """A network trained on all of the data, which is then cut into batches."""
    return Case.of(problem, fit(problem, data, epochs, target), data)


def through(route: Linearisation) -> Product:
    """One vector at a time."""
    return lambda vector: route.products(vector[:, None])[:, 0]


@contextmanager
def torchs_own() -> Iterator[None]:
    """Gradient graphs as torch makes them, without rules of ours."""
    with mock.patch("isoflat.risk.routes.reverse.Trace", _no_rules):
        yield


@contextmanager
def _no_rules() -> Iterator[Trace]:
    yield Trace()


def seconds(work: Callable[[], object]) -> float:
    """Duration of one run."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
