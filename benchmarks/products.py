"""What a Hessian-vector product costs, in gradient passes over the same data in the same batches.

Float32, two threads, networks trained for a few epochs (`benchmarks/problems.py`). Run with `make bench-products`; prints a
Markdown table. Each round runs the gradient pass and all products in turn; times and ratios are medians over the rounds,
because other processes slow some of them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F  # noqa: N812
from problems import PROBLEMS, Case, Product, seconds, source, through, torchs_own, trained

from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.curvature.block_trace import block_traces
from isoflat.curvature.fisher import empirical_fisher, sampled_fisher
from isoflat.curvature.gauss_newton import gauss_newton
from isoflat.risk.empirical import EmpiricalRisk, leaf_state
from isoflat.risk.network import exactly
from isoflat.risk.plan import weigh
from isoflat.risk.routes.reverse import Recomputed
from isoflat.risk.second_order import Trace

ROUNDS, POWER_STEPS = 7, 4


@dataclass(frozen=True)
class Row:
    """One line: a product, what it is compared with in float64, and what was hoped for."""

    name: str
    product: Product
    exact: Product
    target: str
    rules: str
    memory: str


def stock(case: Case) -> Product:
    """Cached graphs as torch makes them."""
    with torchs_own():
        return case.kept()


def other(case: Case, name: str, make: Callable[[EmpiricalRisk, State], Recomputed], target: str = "") -> Row:
    """Another matrix, through graphs that stay."""
    rebuilt = make(case.risk, case.state)
    kept, exact = rebuilt.keep(), rebuilt.double()
    applied = frozenset().union(*(graph.rules for graph in kept.graphs if graph is not None))
    return Row(f"{case.name}, {name}, kept", through(kept), through(exact), target, ", ".join(sorted(applied)), "")


def rules(case: Case) -> str:
    """The rules that apply."""
    with Trace() as trace, exactly(case.state.device):
        case.risk.term(leaf_state(case.state), next(iter(case.risk.batches)))
    return ", ".join(sorted(trace.used))


def mebibytes(case: Case) -> str:
    """What all graphs hold on to."""
    with exactly(case.state.device):
        return f"{sum(weigh(case.risk, case.state, batch).held for batch in case.risk.batches) / 2**20:.0f} MiB"


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


def report_mlp() -> None:
    """Fully connected."""
    case = trained(PROBLEMS["mlp"], PROBLEMS["mlp"].data(), epochs=2)
    exact, applied = case.exact(), rules(case)
    report(
        case,
        [
            Row(f"{case.name}, kept", case.kept(), exact, "1.8", applied, mebibytes(case)),
            Row(f"{case.name}, rebuilt", case.rebuilt(), exact, "2.8", applied, ""),
            other(case, "Gauss-Newton", gauss_newton, "1.5"),
            other(case, "sampled Fisher", partial(sampled_fisher, seed=0)),
            other(case, "empirical Fisher", empirical_fisher),
        ],
    )
    unit = min(seconds(case.gradient) for _ in range(ROUNDS))
    spent = seconds(lambda: block_traces(case.risk, case.state))
    print(f"| {case.name}, all block traces, exact | {1e3 * spent:.0f} | {spent / unit:.2f} | | | | |", flush=True)


def report_lenet() -> None:
    """Convolutional."""
    case = trained(PROBLEMS["lenet"], PROBLEMS["lenet"].data(), epochs=1)
    exact = case.exact()
    report(
        case,
        [
            Row(f"{case.name}, kept", case.kept(), exact, "1.1", rules(case), mebibytes(case)),
            Row(f"{case.name}, rebuilt", case.rebuilt(), exact, "", rules(case), ""),
            other(case, "Gauss-Newton", gauss_newton),
        ],
    )
    # On its own: torch's graphs are large.
    report(case, [Row(f"{case.name}, kept, torch alone", stock(case), exact, "", "", "")])


def report_decoder() -> None:
    """Attention."""
    case = trained(PROBLEMS["decoder"], PROBLEMS["decoder"].data(), epochs=3)
    exact = case.exact()
    report(
        case,
        [
            Row(f"{case.name}, kept", case.kept(), exact, "2.2", rules(case), mebibytes(case)),
            Row(f"{case.name}, kept, torch alone", stock(case), exact, "", "", ""),
            other(case, "Gauss-Newton", gauss_newton),
        ],
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores; {source()}\n")
    print(
        "| product | ms | gradient passes | target | relative error | rules | graphs |\n|---|---|---|---|---|---|---|"
    )
    reports = {"mlp": report_mlp, "lenet": report_lenet, "decoder": report_decoder}
    for network, work in reports.items():
        if options.only in network:
            work()


if __name__ == "__main__":
    main()
