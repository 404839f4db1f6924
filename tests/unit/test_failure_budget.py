"""The failure probabilities of all certificates of one run add up to one minus its confidence.

By the union bound they hold together then: both ways to a certificate, the parts of a sum, and repeated attempts.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from isoflat.core.rng import stream
from isoflat.linalg.certificate import outer_bounds
from isoflat.linalg.eigen import complement, lanczos
from isoflat.linalg.eigen.block_lanczos import Eigenpairs
from isoflat.linalg.eigen.hard_first import HardFirst
from isoflat.linalg.eigen.lanczos import Lanczos
from isoflat.linalg.operator import Dense, Sum

CONFIDENCE = 0.9


@pytest.fixture
def spent(monkeypatch) -> list[float]:
    """The failure probability of each Lanczos run with a certificate: told when it has its first Ritz value."""
    found: list[float] = []

    def noted(ritz: NDArray[np.float64], log_couplings: float, n: int, failure: float) -> tuple[float, float]:
        if len(ritz) == 1:
            found.append(failure)
        return outer_bounds(ritz, log_couplings, n, failure)

    for module in (lanczos, complement):
        monkeypatch.setattr(module, "outer_bounds", noted)
    return found


def _diagonal(values: torch.Tensor) -> Dense:
    return Dense(torch.diag(values.double()))


def test_parts_and_the_fallback_share_one_budget(spent):
    """Parts whose bounds add up to too much, so that a run on the whole has to follow: four runs in all."""
    up = torch.linspace(0, 1, 60, dtype=torch.float64)
    parts = (_diagonal(up**4), _diagonal(0.9 * (1 - up)), _diagonal(torch.full((60,), 1e-4)))
    HardFirst(Lanczos(confidence=CONFIDENCE, rtol=1e-6))(Sum(parts, (1.0, 3.0, 6.0)), stream(0))
    assert len(spent) == len(parts) + 1
    assert math.fsum(spent) == pytest.approx(1 - CONFIDENCE, rel=1e-12)


def test_attempts_share_one_budget(spent):
    """A sixfold eigenvalue, which one start vector finds once: each further copy takes a further certificate."""
    values = torch.cat([torch.full((6,), 5.0), torch.linspace(0, 1, 80)])
    run = Eigenpairs(largest=6, block=1, confidence=CONFIDENCE, rtol=1e-6)(_diagonal(values), stream(0))
    assert run.reached
    assert len(spent) > 2
    assert math.fsum(spent) <= 1 - CONFIDENCE
