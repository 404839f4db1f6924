"""Takeuchi's information criterion with diagonals: invariant to the scale of every weight."""

import torch

from isoflat.core.estimate import Estimate
from isoflat.geometry.base import Invariance
from isoflat.measures.base import Findings, Measure
from isoflat.measures.entries.statistics import GaussNewtonDiagonal, RowMoments


def _evaluate(findings: Findings) -> Estimate:
    moments, diagonal = (answer.result for answer in findings.answers)
    flat = diagonal <= 0
    total = float(torch.where(flat, 0.0, moments / torch.where(flat, 1.0, diagonal)).sum())
    notes = [f"{int(flat.sum())} weights without curvature are left out"] if bool(flat.any()) else []
    return Estimate.exact(total / findings.point.examples, *notes)


MEASURE = Measure(
    name="tic_diagonal",
    formula=r"\frac{1}{N} \sum_j C_{jj} / G_{jj}",
    definition="Second moment of the gradients over curvature, weight by weight: what the training loss hides of the test loss.",
    reference="thomas2020, arXiv:1906.07774; naganuma2026, arXiv:2602.23219",
    needs=(RowMoments(), GaussNewtonDiagonal()),
    evaluate=_evaluate,
    geometry="euclidean",
    claims=frozenset({Invariance.LAYERS, Invariance.UNITS, Invariance.NORMS, Invariance.ORDER}),
    pitfalls=(
        "Weights without curvature (C_jj is zero there too) are left out and counted; Cockpit adds 1e-7 below, which breaks "
        "the invariance, and leaves 1/N out. It tracks the generalisation gap near the kernel regime, and loses it outside."
    ),
)
