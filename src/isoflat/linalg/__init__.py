"""Matrix-free linear algebra: symmetric operators, solvers that see only their products, and certified error bounds.

An `Operator` is a symmetric matrix known by its products `matmat`. A `Solver` is a frozen record of an algorithm's
settings; called with an operator and a random stream it returns a result with an interval. Nothing here knows of networks.
`docs/howto/solvers.md` has more of each.

>>> import torch
>>> from isoflat.linalg import Dense, Diagonal, Pullback, Sum, stream
>>> matrix = torch.diag(torch.cat([torch.tensor([9.0, -7.0]), torch.linspace(0, 1, 198)]).double())
>>> operator = Dense(matrix)

The extreme eigenvalues, enclosed with probability `confidence` over the random start:

>>> from isoflat.linalg import Eigenpairs, Lanczos, PowerMethod, Which
>>> run = Lanczos(which=Which.LARGEST, rtol=1e-6)(operator, stream(0))
>>> lower, upper = run.interval()
>>> lower <= 9 <= upper, upper - lower <= 1e-5
(True, True)

Several eigenpairs at both ends by block Lanczos, with vectors:

>>> pairs = Eigenpairs(largest=2, smallest=1, rtol=1e-6)(operator, stream(0))
>>> [round(pair.value, 4) for pair in (*pairs.largest, *pairs.smallest)]
[9.0, 1.0, -7.0]

The power method of Rangamani et al. (2019), for comparison; it states no error bound:

>>> round(PowerMethod()(operator, stream(0)).wanted.value, 4)
9.0

Traces from random probes, with Student intervals:

>>> from isoflat.linalg import Hutchinson, HutchPlusPlus, XTrace
>>> trace = Hutchinson(probes=16)(operator, stream(0))
>>> round(trace.value, 6)
101.0
>>> for solver in (HutchPlusPlus(sketch=10, probes=20), XTrace(vectors=30)):
...     lower, upper = solver(operator, stream(0)).interval()
...     assert lower <= 101 <= upper

The Frobenius norm, the diagonal, and the whole spectral density:

>>> from isoflat.linalg import DiagonalEstimator, Frobenius, StochasticLanczosQuadrature
>>> lower, upper = Frobenius(probes=32)(operator, stream(0)).interval()
>>> lower <= float(matrix.norm()) <= upper
True
>>> DiagonalEstimator(probes=2)(operator, stream(0)).diagonal[:2].tolist()
[9.0, -7.0]
>>> density = StochasticLanczosQuadrature(probes=2, depth=20)(operator, stream(0))
>>> density.below(0.5).lower <= 101 / 200 <= density.below(0.5).upper
True

Operators combine: a sum whose terms can be multiplied alone, and an operator seen through a linear map E, `Eᵀ A E`:

>>> both = Sum((operator, Dense(torch.eye(200).double())), costs=(1.0, 1.0))
>>> seen = Pullback(both, Diagonal(torch.full((200,), 2.0).double()))
>>> round(Lanczos(which=Which.LARGEST, rtol=1e-6)(seen, stream(0)).top.value, 4)
40.0
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isoflat.core.rng import stream
    from isoflat.linalg.density.lanczos import StochasticLanczosQuadrature
    from isoflat.linalg.eigen.block_lanczos import Eigenpairs
    from isoflat.linalg.eigen.extremes import Which
    from isoflat.linalg.eigen.lanczos import Lanczos
    from isoflat.linalg.eigen.power import PowerMethod
    from isoflat.linalg.maps import Diagonal, Identity, LinearMap
    from isoflat.linalg.operator import Dense, Operator, Pullback, Sum
    from isoflat.linalg.solver import Solver
    from isoflat.linalg.trace.diagonal import DiagonalEstimator
    from isoflat.linalg.trace.frobenius import Frobenius
    from isoflat.linalg.trace.hutchinson import Hutchinson
    from isoflat.linalg.trace.hutchpp import HutchPlusPlus
    from isoflat.linalg.trace.xtrace import XTrace
    from isoflat.linalg.vectors import Distribution

_HOMES = {
    "Dense": "linalg.operator",
    "Diagonal": "linalg.maps",
    "DiagonalEstimator": "linalg.trace.diagonal",
    "Distribution": "linalg.vectors",
    "Eigenpairs": "linalg.eigen.block_lanczos",
    "Frobenius": "linalg.trace.frobenius",
    "HutchPlusPlus": "linalg.trace.hutchpp",
    "Hutchinson": "linalg.trace.hutchinson",
    "Identity": "linalg.maps",
    "Lanczos": "linalg.eigen.lanczos",
    "LinearMap": "linalg.maps",
    "Operator": "linalg.operator",
    "PowerMethod": "linalg.eigen.power",
    "Pullback": "linalg.operator",
    "Solver": "linalg.solver",
    "StochasticLanczosQuadrature": "linalg.density.lanczos",
    "Sum": "linalg.operator",
    "Which": "linalg.eigen.extremes",
    "XTrace": "linalg.trace.xtrace",
    "stream": "core.rng",
}
"""Module of each public name; imported when it is first asked for, so that one solver does not load all."""

__all__ = [
    "Dense",
    "Diagonal",
    "DiagonalEstimator",
    "Distribution",
    "Eigenpairs",
    "Frobenius",
    "HutchPlusPlus",
    "Hutchinson",
    "Identity",
    "Lanczos",
    "LinearMap",
    "Operator",
    "PowerMethod",
    "Pullback",
    "Solver",
    "StochasticLanczosQuadrature",
    "Sum",
    "Which",
    "XTrace",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"isoflat.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
