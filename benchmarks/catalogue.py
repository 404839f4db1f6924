"""What measures cost alone and together, in gradient passes over the same data: what they share is computed once.

Float32, two threads, networks of `benchmarks/problems.py`. Run with `make bench-catalogue`; prints a Markdown table.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from statistics import median

import torch
from problems import CRITERION, PROBLEMS, Case, seconds, source, trained

import isoflat

CHEAP = (
    "gradient_norm",
    "fisher_rao_norm",
    "relative_flatness",
    "relative_flatness_max",
    "feature_robustness",
    "fisher_trace",
    "minimum_sharpness",
    "neuronwise_flatness",
    "normalized_sharpness",
    "tic_diagonal",
    "tic_trace_ratio",
    "critical_sharpness",
    "pac_bayes_effective_curvature",
    "pac_bayes_curvature_posterior",
)
"""Measures without eigenvalues; of these the ten that prove cheapest are measured together."""

TEN = 10

ROUNDS = 3


def before(case: Case) -> torch.nn.Module:
    """Weights that bounds have their prior around: what they are does not change the cost."""
    return copy.deepcopy(case.model)


def passes(case: Case, names: Sequence[str]) -> float:
    """Of a whole call, median over the rounds."""
    found = []
    for _ in range(ROUNDS):
        unit = seconds(case.gradient)
        spent = seconds(
            lambda: isoflat.measure_all(
                case.model,
                case.data,
                CRITERION,
                measures=list(names),
                geometry="layerwise",
                rtol=1e-2,
                initial=before(case),
            )
        )
        found.append(2 * spent / (unit + seconds(case.gradient)))
    return median(found)


def main() -> None:
    """Alone, then together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    print(f"{torch.get_num_threads()} threads, float32; {source()}\n")
    print("| network | measure | gradient passes |\n|---|---|---|", flush=True)
    for key in ("mlp", "lenet"):
        case = trained(PROBLEMS[key], PROBLEMS[key].data(), epochs=3)
        alone = {}
        for name in CHEAP:
            try:
                alone[name] = passes(case, [name])
            except isoflat.IsoflatError as error:
                print(f"| {case.name} | {name} | does not apply: {str(error).splitlines()[0]} |", flush=True)
            else:
                print(f"| {case.name} | {name} | {alone[name]:.1f} |", flush=True)
        ten = sorted(alone, key=alone.__getitem__)[:TEN]
        together, most = passes(case, ten), max(alone[name] for name in ten)
        print(
            f"| {case.name} | the ten cheapest together ({', '.join(ten)}) | {together:.1f}: {together / most:.2f} times the most "
            f"expensive of them, {sum(alone[name] for name in ten):.1f} one by one |",
            flush=True,
        )


if __name__ == "__main__":
    main()
