"""Probabilistic outer bounds on extreme eigenvalues from one Lanczos run with a random start.

The start q₁ is uniform on the unit sphere of ℝⁿ and independent of the operator; the only randomness is its overlap
with extreme eigenvectors. Both bounds fail on the same event, that an overlap is below `overlap`, whatever the number
of steps: they hold together and for all k at once, so that a run may look at them after each step and stop when it
likes. `docs/concepts/certificate.md`, "One event behind both upper bounds", has the proofs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def outer_bounds(ritz: NDArray[np.float64], log_couplings: float, n: int, failure: float) -> tuple[float, float]:
    """An interval that contains the whole spectrum, except with probability `failure`.

    Each end has half of the failure probability and takes the better of the a-posteriori and the a-priori bound.

    Args:
        ritz: Ritz values after k steps, ascending, shape `(k,)`.
        log_couplings: sum `Σ_j ln β_j` over the k couplings, the last one included; −inf if the Krylov space is all of ℝⁿ.
        n: dimension.
        failure: probability that an end lies inside the true spectrum.

    Returns:
        Lower bound on λ_min and upper bound on λ_max.

    >>> outer_bounds(np.array([1.0, 2.0]), -math.inf, n=2, failure=1e-6)
    (1.0, 2.0)
    """
    upper = min(posterior_bound(ritz, log_couplings, n, failure / 2), prior_bound(ritz, n, failure))
    mirrored = -ritz[::-1]
    lower = -min(posterior_bound(mirrored, log_couplings, n, failure / 2), prior_bound(mirrored, n, failure))
    return lower, upper


def log_overlap(n: int, failure: float) -> float:
    """`ln c` with `P(|⟨v, q₁⟩| ≤ c) ≤ failure` for a unit vector v and q₁ uniform on the sphere of ℝⁿ.

    The density of one coordinate of q₁ is at most `√(n/(2π))`, so that `c = failure · √(π/(2n))`.
    """
    return math.log(failure) + 0.5 * math.log(math.pi / (2 * n))


def posterior_bound(ritz: NDArray[np.float64], log_couplings: float, n: int, failure: float) -> float:
    """A-posteriori upper bound on λ_max, from the run itself (van Dorsselaer, Hochstenbach, van der Vorst, SIMAX 22, 2000).

    The Lanczos polynomial obeys `χ_k(A) q₁ = (Π β_j) q_{k+1}`; projected on a top eigenvector v,
    `χ_k(λ_max) |⟨v, q₁⟩| ≤ Π β_j`.

    Args:
        ritz: Ritz values, ascending.
        log_couplings: sum `Σ_j ln β_j`.
        n: dimension.
        failure: probability that the bound is wrong.

    Returns:
        U ≥ max(ritz) with `Σ_j ln(U − θ_j) = Σ_j ln β_j − ln c`.
    """
    top = float(ritz[-1])
    if log_couplings == -math.inf or n == 1:
        return top
    target = log_couplings - log_overlap(n, failure)
    with np.errstate(divide="ignore"):
        logs = np.log(top - ritz)
    # In t = ln(U − top) the left side is convex with a slope between 1 and k: Newton from the right stays right of
    # the root, so that every iterate is a bound, and the last one is.
    t = target / len(ritz)
    for _ in range(100):
        terms = np.logaddexp(logs, t)
        step = (float(terms.sum()) - target) / float(np.exp(t - terms).sum())
        t -= step
        if step <= 1e-12:
            break
    return top + math.exp(t + 1e-11)


def prior_bound(ritz: NDArray[np.float64], n: int, failure: float) -> float:
    """A-priori upper bound on λ_max, known before the run (after Kuczyński and Woźniakowski, SIMAX 13, 1992).

    Where the overlap with a top eigenvector is at least c,
    `(λ_max − θ_max)/(λ_max − λ_min) ≤ ε = tanh²(arcosh(1/c)/(2k − 1))` for all k, whatever the gaps. Applied to both
    ends, with half of the failure probability each.

    Args:
        ritz: Ritz values, ascending.
        n: dimension.
        failure: probability that the bound is wrong.

    Returns:
        The bound; infinite while k is too small for it to say anything.
    """
    k = len(ritz)
    # arcosh(1/c) ≤ ln(2/c)
    epsilon = math.tanh((math.log(2) - log_overlap(n, failure / 2)) / (2 * k - 1)) ** 2
    if epsilon >= 0.5:
        return math.inf
    return float(ritz[-1]) + epsilon * float(ritz[-1] - ritz[0]) / (1 - 2 * epsilon)
