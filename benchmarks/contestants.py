"""Who takes part in `benchmarks/peers.py`: a name, a number, and the function that prepares the answer."""

from __future__ import annotations

from answers import PRODUCTS, RESIDUAL, Contestant
from others import curvlinops_top, curvlinops_trace, eigenthings_top, eigenthings_trace, pyhessian_top, pyhessian_trace
from ours import certified, measured, power, traced, true_top, true_trace

from isoflat.linalg.trace.hutchinson import Hutchinson
from isoflat.linalg.trace.hutchpp import HutchPlusPlus
from isoflat.linalg.trace.xtrace import XTrace

STEPS = 20
"""Lanczos steps for hessian-eigenthings where it does not take its own default of two: what eigsh starts with."""

TOP, PAPER, TRACE = "λ_max", "paper's number", "trace"

REFERENCES = {
    TOP: Contestant(TOP, "reference: Rayleigh quotient, float64", true_top("euclidean")),
    PAPER: Contestant(PAPER, "reference: Rayleigh quotient, float64", true_top("layerwise")),
    TRACE: Contestant(TRACE, "reference: block traces, float64", true_trace),
}

COARSE = 0.05
"""Residual that the vector of the hard examples has by itself, where there are such: then one product with all data is enough."""

OURS = (
    Contestant(
        TOP,
        "isoflat, uncertified",
        measured("hessian_spectral_norm", geometry="euclidean", rtol=RESIDUAL, certify=False),
        {"mlp": "≤ 16", "lenet": "≤ 14"},
    ),
    Contestant(
        TOP,
        "isoflat, uncertified, residual 0.05",
        measured("hessian_spectral_norm", geometry="euclidean", rtol=COARSE, certify=False),
        {"mlp": "≤ 8", "lenet": "≤ 7"},
    ),
    Contestant(
        TOP,
        "isoflat, certified, 1 − 1e-6",
        certified("hessian_spectral_norm", "euclidean"),
        {"mlp": "≤ 30", "lenet": "≤ 20", "decoder": "≤ 55, width 0.1"},
    ),
    Contestant(
        TOP,
        "isoflat, certified, 0.999",
        certified("hessian_spectral_norm", "euclidean", 0.999),
        {"mlp": "≤ 24", "lenet": "≤ 17"},
    ),
)

PEERS = (
    Contestant(TOP, "hessian-eigenthings, lanczos(k=1)", eigenthings_top(None)),
    Contestant(TOP, "PyHessian, eigenvalues()", pyhessian_top),
    Contestant(TOP, "curvlinops, eigsh(tol=1e-3)", curvlinops_top),
    Contestant(TOP, f"hessian-eigenthings, lanczos(k=1, max_iter={STEPS})", eigenthings_top(STEPS)),
)

PAPERS = (
    Contestant(PAPER, "isoflat, certified, 1 − 1e-6", certified("quotient_spectral_norm", "layerwise")),
    Contestant(
        PAPER,
        "the paper's power method, tol 1e-8",
        power,
        dict.fromkeys(("mlp", "lenet", "decoder"), "≥ 10 times isoflat's"),
    ),
)

TRACES = (
    Contestant(TRACE, "isoflat, Hutchinson", traced(Hutchinson(probes=PRODUCTS))),
    Contestant(TRACE, "isoflat, XTrace", traced(XTrace(vectors=PRODUCTS // 2))),
    Contestant(TRACE, f"hessian-eigenthings, trace(num_matvecs={PRODUCTS})", eigenthings_trace),
    Contestant(TRACE, "PyHessian, trace()", pyhessian_trace),
    Contestant(TRACE, f"curvlinops, xtrace({PRODUCTS})", curvlinops_trace("xtrace")),
    Contestant(TRACE, "isoflat, Hutch++", traced(HutchPlusPlus(sketch=PRODUCTS // 3, probes=PRODUCTS // 3))),
    Contestant(TRACE, f"curvlinops, hutchinson_trace({PRODUCTS})", curvlinops_trace("hutchinson_trace")),
)

EVERYONE = (*REFERENCES.values(), *OURS, *PEERS, *PAPERS, *TRACES)
