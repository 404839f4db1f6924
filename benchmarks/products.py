"""What a Hessian-vector product costs, in gradient passes over the same data in the same batches.

Float32, two threads, networks trained for a few epochs. `ISOFLAT_DATA` is a folder that holds `mnist.npz`; without it
the digits of scikit-learn are enlarged to 28 × 28. Run with `make bench-products`; prints a Markdown table. Each round
runs the gradient pass and all products in turn; times and ratios are medians over the rounds, because other processes
slow some of them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from isoflat.core.state import State
from isoflat.core.streams import stream
from isoflat.curvature.block_trace import block_traces
from isoflat.curvature.fisher import empirical_fisher, sampled_fisher
from isoflat.curvature.gauss_newton import gauss_newton
from isoflat.experiments.data import characters, digits
from isoflat.experiments.families import decoder, lenet, mlp
from isoflat.experiments.loop import Recipe, train
from isoflat.risk.batches import as_batches
from isoflat.risk.empirical import EmpiricalRisk, leaf_state
from isoflat.risk.losses import as_loss
from isoflat.risk.network import Network, exactly
from isoflat.risk.plan import weigh
from isoflat.risk.routes.base import Linearisation, gradient
from isoflat.risk.routes.reverse import Rebuilt
from isoflat.risk.second_order import second_order
from isoflat.risk.second_order.rule import Trace

ROUNDS, POWER_STEPS = 7, 4

Pair = tuple[Tensor, Tensor]
Product = Callable[[Tensor], Tensor]


def through(route: Linearisation) -> Product:
    """One vector at a time."""
    return lambda vector: route.products(vector[:, None])[:, 0]


@dataclass(frozen=True)
class Case:
    """A trained network on its data."""

    name: str
    risk: EmpiricalRisk
    state: State

    @staticmethod
    def trained(name: str, model: nn.Module, data: Pair, rows: int, recipe: Recipe) -> Case:
        """Trained on all of the data, which is then cut into batches of so many rows."""
        train(model, data, recipe, stream(0, "products", name))
        network = Network(model)
        risk = EmpiricalRisk(network, as_loss(nn.CrossEntropyLoss()), as_batches(data, rows))
        return Case(name, risk, network.state())

    def gradient(self) -> Tensor:
        """One plain gradient pass over the data."""
        with exactly(self.state.device):
            return self.risk.accumulate(lambda _, batch: gradient(self.risk, self.state, batch), self.state.vector)

    def kept(self) -> Product:
        """Products through graphs that stay."""
        return through(Rebuilt(self.risk, self.state).keep())

    def rebuilt(self) -> Product:
        """Products through graphs that go."""
        return through(Rebuilt(self.risk, self.state))

    def stock(self) -> Product:
        """Kept graphs as torch makes them."""
        with mock.patch("isoflat.risk.routes.reverse.second_order", _no_rules):
            return self.kept()

    def other(self, name: str, make: Callable[[EmpiricalRisk, State], Rebuilt], target: str = "") -> Row:
        """Another matrix, through graphs that stay."""
        rebuilt = make(self.risk, self.state)
        kept, exact = rebuilt.keep(), rebuilt.double()
        rules = frozenset().union(*(graph.rules for graph in kept.graphs if graph is not None))
        return Row(f"{self.name}, {name}, kept", through(kept), through(exact), target, ", ".join(sorted(rules)), "")

    def rules(self) -> str:
        """The rules that apply."""
        with second_order() as trace, exactly(self.state.device):
            self.risk.term(leaf_state(self.state), next(iter(self.risk.batches)))
        return ", ".join(sorted(trace.used))

    def mebibytes(self) -> str:
        """What all graphs hold on to."""
        with exactly(self.state.device):
            return f"{sum(weigh(self.risk, self.state, batch).held for batch in self.risk.batches) / 2**20:.0f} MiB"


@contextmanager
def _no_rules() -> Iterator[Trace]:
    yield Trace()


@dataclass(frozen=True)
class Row:
    """One line: a product, what it is compared with in float64, and what was hoped for."""

    name: str
    product: Product
    exact: Product
    target: str
    rules: str
    memory: str


def images(rows: int) -> tuple[str, Tensor, Tensor]:
    """So many images of 28 × 28 pixels, or as many as there are."""
    if folder := os.environ.get("ISOFLAT_DATA"):
        with np.load(Path(folder) / "mnist.npz", allow_pickle=False) as archive:
            pixels = torch.from_numpy(archive["x_train"][:rows].astype(np.float32) / 255)
            return "MNIST", pixels[:, None], torch.from_numpy(archive["y_train"][:rows].astype(np.int64))
    small, classes = digits().train
    large = F.interpolate(small.view(-1, 1, 8, 8), (28, 28), mode="bilinear")
    return "digits of scikit-learn, enlarged (ISOFLAT_DATA is not set)", large[:rows], classes[:rows]


def seconds(work: Callable[[], object]) -> float:
    """Duration of one run."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def report(case: Case, rows: list[Row]) -> None:
    """Measure in turn, and print the lines."""
    vector = torch.randn(case.state.space.size, generator=stream(0, "products", "direction"))
    for _ in range(POWER_STEPS):
        vector = F.normalize(rows[0].product(vector).float(), dim=0)
    works = [case.gradient, *(lambda row=row: row.product(vector) for row in rows)]
    times = torch.tensor([[seconds(work) for work in works] for _ in range(ROUNDS + 1)][1:])
    certain = {exact: exact(vector.double()) for exact in {row.exact for row in rows}}
    for k, row in enumerate(rows, start=1):
        exact = certain[row.exact]
        error = float((row.product(vector) - exact).norm() / exact.norm())
        ratio = median((times[:, k] / times[:, 0]).tolist())
        print(
            f"| {row.name} | {1e3 * median(times[:, k].tolist()):.0f} | {ratio:.2f} | {row.target} | {error:.0e} "
            f"| {row.rules} | {row.memory} |",
            flush=True,
        )


def in_double(case: Case) -> Product:
    """The Hessian in float64, as torch differentiates it."""
    double = Case(case.name, case.risk, case.state.to(dtype=torch.float64))
    product = double.rebuilt()

    def exact(vector: Tensor) -> Tensor:
        with mock.patch("isoflat.risk.routes.reverse.second_order", _no_rules):
            return product(vector)

    return exact


def report_mlp(pixels: Tensor, classes: Tensor) -> None:
    """Fully connected."""
    data = (pixels.flatten(1), classes)
    case = Case.trained("MLP 784-512×5-10", mlp.build((784, *[512] * 5, 10)), data, 1000, Recipe(100, max_epochs=2))
    exact, rules = in_double(case), case.rules()
    report(
        case,
        [
            Row(f"{case.name}, kept", case.kept(), exact, "1.8", rules, case.mebibytes()),
            Row(f"{case.name}, rebuilt", case.rebuilt(), exact, "2.8", rules, ""),
            case.other("Gauss-Newton", gauss_newton, "1.5"),
            case.other("sampled Fisher", partial(sampled_fisher, seed=0)),
            case.other("empirical Fisher", empirical_fisher),
        ],
    )
    unit = min(seconds(case.gradient) for _ in range(ROUNDS))
    spent = seconds(lambda: block_traces(case.risk, case.state))
    print(f"| {case.name}, all block traces, exact | {1e3 * spent:.0f} | {spent / unit:.2f} | | | | |", flush=True)


def report_lenet(pixels: Tensor, classes: Tensor) -> None:
    """Convolutional."""
    case = Case.trained("LeNet", lenet.build(), (pixels, classes), 500, Recipe(100, max_epochs=1))
    exact = in_double(case)
    report(
        case,
        [
            Row(f"{case.name}, kept", case.kept(), exact, "1.1", case.rules(), case.mebibytes()),
            Row(f"{case.name}, rebuilt", case.rebuilt(), exact, "", case.rules(), ""),
            case.other("Gauss-Newton", gauss_newton),
        ],
    )
    # On its own: torch's graphs are large.
    report(case, [Row(f"{case.name}, kept, torch alone", case.stock(), exact, "", "", "")])


def report_decoder() -> None:
    """Attention."""
    data = characters(windows=256)
    model = decoder.build(len(data.vocabulary), context=32, width=128, heads=4, layers=4)
    case = Case.trained("decoder, 4 layers of 128", model, data.train, 64, Recipe(16, max_epochs=3))
    exact = in_double(case)
    report(
        case,
        [
            Row(f"{case.name}, kept", case.kept(), exact, "2.2", case.rules(), case.mebibytes()),
            Row(f"{case.name}, kept, torch alone", case.stock(), exact, "", "", ""),
            case.other("Gauss-Newton", gauss_newton),
        ],
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name, pixels, classes = images(10_000)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores; {name}\n")
    print(
        "| product | ms | gradient passes | target | relative error | rules | graphs |\n|---|---|---|---|---|---|---|"
    )
    reports = {
        "mlp": lambda: report_mlp(pixels, classes),
        "lenet": lambda: report_lenet(pixels[:5000], classes[:5000]),
        "decoder": report_decoder,
    }
    for network, work in reports.items():
        if options.only in network:
            work()


if __name__ == "__main__":
    main()
