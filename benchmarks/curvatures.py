"""What a product with each curvature matrix costs, in gradient passes over the same data.

`ISOFLAT_DATA` is a folder that holds `mnist.npz`. A network 784-512×5-10, float32, two threads, 10 000 digits in
batches of 500; prints a Markdown table of the fastest of several rounds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from isoflat.curvature.block_trace import block_traces
from isoflat.curvature.fisher import empirical_fisher, sampled_fisher
from isoflat.curvature.gauss_newton import gauss_newton
from isoflat.risk.batches import as_batches
from isoflat.risk.empirical import EmpiricalRisk, Part, differentiate, leaf_state
from isoflat.risk.losses import as_loss
from isoflat.risk.network import Network, exactly
from isoflat.risk.routes.base import joined

ROWS, ROUNDS = 10_000, 5


def seconds(work: Callable[[], object]) -> float:
    """Duration of one run."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Print the table."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    with np.load(Path(os.environ["ISOFLAT_DATA"]) / "mnist.npz", allow_pickle=False) as archive:
        inputs = torch.from_numpy(archive["x_train"][:ROWS].astype(np.float32) / 255).flatten(1)
        targets = torch.from_numpy(archive["y_train"][:ROWS].astype(np.int64))
    layers: list[nn.Module] = []
    for a, b in pairwise([784, *[512] * 5, 10]):
        layers += [nn.Linear(a, b), nn.ReLU()]
    network = Network(nn.Sequential(*layers[:-1]))
    state = network.state()
    risk = EmpiricalRisk(network, as_loss(nn.CrossEntropyLoss()), as_batches((inputs, targets)))
    vector = torch.randn(state.space.size)

    ggn, fisher, moment = gauss_newton(risk, state), sampled_fisher(risk, state, seed=0), empirical_fisher(risk, state)
    kept = [("Gauss-Newton", ggn.keep()), ("sampled Fisher", fisher.keep()), ("empirical Fisher", moment.keep())]
    works: dict[str, Callable[[], object]] = {f"{name}, kept": lambda m=made: m.matvec(vector) for name, made in kept}
    works["Gauss-Newton, rebuilt"] = lambda: ggn.matvec(vector)
    works["empirical Fisher, rebuilt"] = lambda: moment.matvec(vector)
    works["all block traces, exact"] = lambda: block_traces(risk, state)

    def per_batch(index: int, batch: Any) -> Part:
        leaves = leaf_state(state)
        term = risk.term(leaves, batch)
        parameters = list(leaves.parameters.values())
        return Part(joined(parameters, differentiate(term.total, parameters)), term.count)

    def gradient() -> None:
        with exactly(state.device):
            risk.accumulate(per_batch, vector)

    # In turn, and the fastest of each: another process slows some of the rounds, and seldom all.
    rounds = [[seconds(work) for work in (gradient, *works.values())] for _ in range(ROUNDS)]
    unit, *fastest = map(min, zip(*rounds, strict=True))
    print(f"A gradient pass takes {unit:.3f} s.\n\n| product | gradient passes |\n|---|---|")
    for name, own in zip(works, fastest, strict=True):
        print(f"| {name} | {own / unit:.2f} |")


if __name__ == "__main__":
    main()
