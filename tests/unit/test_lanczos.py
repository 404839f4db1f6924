"""Extreme eigenvalues against known spectra, at every scale, in both precisions; and the power method."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from cases.operators import Spectrum, rotated
from isoflat.core import space
from isoflat.core.errors import NonFinite, UsageError
from isoflat.core.rng import stream
from isoflat.linalg.eigen.extremes import Extremes, Which
from isoflat.linalg.eigen.lanczos import Lanczos
from isoflat.linalg.eigen.power import PowerMethod
from isoflat.linalg.krylov.recurrence import Recurrence
from isoflat.linalg.maps import Diagonal
from isoflat.linalg.operator import Dense, Operator, Pullback
from isoflat.linalg.vectors import sphere


def extremes_of(operator: Operator) -> tuple[float, float]:
    """Smallest and largest eigenvalue of an explicit matrix, by LAPACK in float64."""
    if isinstance(operator, Dense):
        values = torch.linalg.eigvalsh(operator.matrix.double())
    else:
        values = operator.entries.double().sort().values
    return float(values[0]), float(values[-1])


def truth(operator: Operator, which: Which) -> float:
    bottom, top = extremes_of(operator)
    return {Which.SMALLEST: bottom, Which.LARGEST: top, Which.MAGNITUDE: max(abs(bottom), abs(top))}[which]


def answer(run: Extremes) -> float:
    return abs(run.wanted.value) if run.which is Which.MAGNITUDE else run.wanted.value


bulk = np.linspace(-1, 1, 60)
KNOWN = {
    "outliers 1e0 to 1e6": np.concatenate([bulk, 10.0 ** np.arange(1, 7)]),
    **{f"cluster of gap {gap:g}": np.concatenate([bulk, 5 + gap * np.arange(4)]) for gap in (1e-2, 1e-4, 1e-8, 1e-12)},
    **{f"multiplicity {m}": np.concatenate([bulk, np.full(m, 3.0)]) for m in (2, 5, 10)},
    "tie": np.concatenate([bulk, [7.0, -7.0]]),
    "tie of multiple ends": np.concatenate([bulk, np.full(4, 7.0), np.full(3, -7.0)]),
    "dominant negative": np.concatenate([bulk, [-40.0]]),
    "all negative": -1 - np.arange(40) / 40,
    "rank one": np.concatenate([[4.0], np.zeros(70)]),
    "rank one, negative": np.concatenate([[-4.0], np.zeros(70)]),
    "rank three": np.concatenate([[4.0, -2.0, 1.0], np.zeros(70)]),
    "identity": np.ones(50),
    "n = 1": np.array([-2.5]),
    "n = 2": np.array([-2.5, 1.0]),
    "n = 2, multiple": np.array([1.5, 1.5]),
    "bulk": np.linspace(0, 1, 80),
    "power law": np.arange(1, 90) ** -1.5,
}


@pytest.mark.parametrize("which", [Which.LARGEST, Which.SMALLEST, Which.MAGNITUDE])
@pytest.mark.parametrize("name", KNOWN)
def test_known_spectra(name, which):
    """The value to 1e-12 of the spectral norm, and the truth inside the enclosure, dense and diagonal alike."""
    for operator in (Spectrum(torch.from_numpy(KNOWN[name])), rotated(KNOWN[name])):
        size = truth(operator, Which.MAGNITUDE)
        run = Lanczos(which=which, rtol=1e-12, max_products=120)(operator, stream(1, name))
        lower, upper = run.interval()
        exact = truth(operator, which)
        assert abs(answer(run) - exact) <= 1e-12 * size
        assert lower <= exact <= upper
        assert lower <= answer(run) <= upper
        assert upper - lower <= 1e-9 * size
        assert run.wanted.residual is not None
        assert run.wanted.residual <= 1e-5 * size


def test_zero_operator():
    for n in (1, 2, 50):
        for dtype in (torch.float32, torch.float64):
            run = Lanczos()(Spectrum(torch.zeros(n, dtype=dtype)), stream(0))
            assert run.interval() == (0.0, 0.0)
            assert run.reached
            assert run.products == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", KNOWN)
def test_recurrence_is_backward_stable(name, dtype):
    """Ratios in the manner of LAPACK's test suite: below 30, with growth in k divided out."""
    operator = rotated(KNOWN[name], seed=5, dtype=dtype)
    matrix, n = operator.matrix.double(), operator.n
    recurrence = Recurrence(sphere(n, stream(2, name)), dtype)
    for _ in range(min(n, 40)):
        recurrence.extend(operator.matvec(recurrence.last[:, 0]))
    k, eps = recurrence.k, torch.finfo(dtype).eps
    q = torch.stack(recurrence._basis[:k]).double().T
    t = np.diag(recurrence.alphas) + np.diag(recurrence.betas[:-1], 1) + np.diag(recurrence.betas[:-1], -1)
    defect = matrix @ q - q @ torch.from_numpy(t) * recurrence.scale
    if not recurrence.exhausted:
        defect[:, -1] -= recurrence.betas[-1] * recurrence.scale * recurrence._basis[k].double()
    size = float(torch.linalg.matrix_norm(matrix, 2))
    assert float(torch.linalg.matrix_norm(defect, 2)) / (size * k * eps) < 30
    assert float(torch.linalg.matrix_norm(q.T @ q - torch.eye(k, dtype=torch.float64), 2)) / (k * eps) < 30


def test_without_orthogonalisation_the_ratio_explodes():
    """Negative control for the test above: the plain three-term recurrence loses orthogonality."""
    matrix = rotated(KNOWN["outliers 1e0 to 1e6"], seed=5).matrix
    q = [sphere(len(matrix), stream(2))]
    beta = 0.0
    for k in range(40):
        product = matrix @ q[-1]
        residual = product - (product @ q[-1]) * q[-1] - (beta * q[-2] if k else 0)
        beta = space.norm(residual)
        q.append(residual / beta)
    basis = torch.stack(q[:40])
    defect = torch.linalg.matrix_norm(basis @ basis.T - torch.eye(40, dtype=torch.float64), 2)
    assert float(defect) / (40 * torch.finfo(torch.float64).eps) > 1e6


def _numbers(run: Extremes, scale: float = 1.0) -> list[float]:
    ends = [(end.value, end.bound, end.slack, end.residual or 0.0) for end in (run.bottom, run.top)]
    return [*(number / scale for end in ends for number in end), run.noise / scale, run.products]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-90, -7, 1, 40, 90])
def test_powers_of_two_change_no_bit(dtype, power):
    """Whatever the unit of the loss: values, bounds, residuals, noise and the number of products."""
    operator = rotated(KNOWN["power law"], dtype=dtype)
    scaled = Dense(operator.matrix * 2.0**power)
    for certify in (True, False):
        one, other = (Lanczos(rtol=1e-6, certify=certify)(a, stream(3)) for a in (operator, scaled))
        assert _numbers(one) == _numbers(other, 2.0**power)
        assert one.stopped == other.stopped
        assert torch.equal(one.wanted.vector, other.wanted.vector)


@pytest.mark.parametrize(
    ("dtype", "factor", "tolerance"),
    [(torch.float64, c, 1e-10) for c in (1e-150, 1e-30, 3e-7, 1e30, 1e150)]
    + [(torch.float32, c, 1e-5) for c in (1e-12, 3e-7, 1e12)],
)
def test_scale_equivariance(dtype, factor, tolerance):
    """Value, width and residual scale along: nothing in the library is absolute."""
    operator = rotated(KNOWN["bulk"], dtype=dtype)
    one = Lanczos(rtol=1e-2)(operator, stream(3))
    other = Lanczos(rtol=1e-2)(Dense((operator.matrix.double() * factor).to(dtype)), stream(3))
    widths = [run.interval()[1] - run.interval()[0] for run in (one, other)]
    assert other.products == one.products
    assert other.wanted.value / factor == pytest.approx(one.wanted.value, rel=tolerance)
    assert widths[1] / factor == pytest.approx(widths[0], rel=100 * tolerance)
    assert other.reached
    assert one.reached


@pytest.mark.parametrize("factor", [1e-320, 5e307])
def test_ends_of_the_floating_point_range(factor):
    run = Lanczos()(Spectrum(torch.tensor([1.0, 0.5, -0.5], dtype=torch.float64) * factor), stream(0))
    assert run.top.value == pytest.approx(factor, rel=1e-2)
    assert run.interval()[0] <= factor


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=25),
    st.sampled_from(list(Which)),
    st.integers(2, 30),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_enclosures_hold_for_any_spectrum_and_budget(values, which, budget, seed, narrow):
    """The exact number lies inside, the value too, the budget is kept, and `reached` is what it says."""
    operator = Spectrum(torch.tensor(values, dtype=torch.float32 if narrow else torch.float64))
    run = Lanczos(which=which, rtol=1e-4, max_products=budget)(operator, stream(seed))
    lower, upper = run.interval()
    exact = truth(operator, which)
    assert lower <= exact <= upper
    assert lower <= answer(run) <= upper
    assert run.products <= budget
    assert run.reached is (upper - lower <= 1e-4 * abs(run.wanted.value))
    assert run.bottom.bound <= run.bottom.value <= run.top.bound
    assert run.bottom.bound <= run.top.value <= run.top.bound


def test_independent_seeds_intersect_and_hold_the_truth():
    for name in ("bulk", "power law", "outliers 1e0 to 1e6", "tie"):
        operator = rotated(KNOWN[name])
        exact = truth(operator, Which.MAGNITUDE)
        ends = [Lanczos(rtol=1e-3)(operator, stream(seed, name)).interval() for seed in range(20)]
        assert max(lower for lower, _ in ends) <= exact <= min(upper for _, upper in ends)


def test_lower_end_rises_and_upper_end_falls_with_the_number_of_products():
    """Interlacing makes the Ritz value monotone; the width shrinks from step to step on a uniform bulk."""
    operator = Spectrum(torch.linspace(0, 1, 400, dtype=torch.float64))
    runs = [Lanczos(rtol=1e-12, max_products=budget)(operator, stream(4)) for budget in range(2, 60, 3)]
    lowers, uppers = zip(*(run.interval() for run in runs), strict=True)
    assert all(a <= b + 1e-13 for a, b in itertools.pairwise(lowers))
    assert all(a >= b for a, b in itertools.pairwise(uppers))
    assert not any(run.reached for run in runs)


def test_tolerance_is_met_and_is_not_free():
    operator = rotated(KNOWN["bulk"])
    runs = [Lanczos(rtol=rtol)(operator, stream(0)) for rtol in (0.3, 0.03, 1e-3, 1e-6)]
    widths = [(run.interval()[1] - run.interval()[0]) / answer(run) for run in runs]
    assert all(
        run.reached and width <= rtol for run, width, rtol in zip(runs, widths, (0.3, 0.03, 1e-3, 1e-6), strict=True)
    )
    assert [run.products for run in runs] == sorted({run.products for run in runs})


def test_more_confidence_costs_products():
    operator = Spectrum(torch.linspace(0, 1, 2000, dtype=torch.float64))
    runs = [Lanczos(rtol=0.05, confidence=1 - failure)(operator, stream(0)) for failure in (0.1, 1e-3, 1e-6, 1e-12)]
    assert [run.products for run in runs] == sorted({run.products for run in runs})


def test_tolerance_below_the_noise_is_not_called_reached():
    """Float32 products cannot give 1e-12; the run ends by itself, early, and says so."""
    run = Lanczos(rtol=1e-12)(rotated(KNOWN["outliers 1e0 to 1e6"], dtype=torch.float32), stream(0))
    lower, upper = run.interval()
    assert not run.reached
    assert run.products < 60
    assert run.noise / 1e6 > 1e-8
    assert upper - lower < 1e-4 * run.wanted.value


def test_smallest_of_a_singular_operator_ends_without_spending_the_budget():
    """A relative tolerance on zero cannot be reached; the run stops where rounding makes more products useless."""
    run = Lanczos(which=Which.SMALLEST, rtol=1e-3)(rotated(KNOWN["rank one"]), stream(0))
    assert not run.reached
    assert run.products < 40
    assert run.interval()[0] <= 0 <= run.interval()[1] + 1e-14
    assert run.interval()[1] - run.interval()[0] < 1e-11


@dataclass(frozen=True)
class Coarse(Operator):
    """Products that are too small by a thousandth, unless they are in float64."""

    exact: Dense

    @property
    def n(self) -> int:
        return self.exact.n

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.exact.device

    def matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.exact.matmat(vectors) * (1 - 1e-3)

    def double(self) -> Operator:
        return self.exact


def test_what_products_are_off_by_is_noise_and_widens_the_interval():
    """The fresh product tells that all others were too small; the bound, which they gave, must make up for it."""
    run = Lanczos(rtol=1e-2)(Coarse(Dense(torch.diag(torch.linspace(0, 5, 40, dtype=torch.float64)))), stream(0))
    lower, upper = run.interval()
    assert run.noise == pytest.approx(1e-3 * 5, rel=0.01)
    assert lower <= 5 <= upper
    assert run.top.bound - run.top.value > 0.5 * run.noise


def test_small_overlaps_in_float32_do_not_break_the_promise():
    """μ I plus a rank-one part: couplings sink below rounding with a probability far above the stated one."""
    n = 4000
    operator = Spectrum(torch.cat([torch.tensor([1.001]), torch.ones(n - 1)]))
    wrong = sunk = 0
    for seed in range(150):
        start = sphere(n, stream(seed, "Lanczos"))
        sunk += abs(float(start[0])) * 1e-3 < torch.finfo(torch.float32).eps
        lower, upper = Lanczos(rtol=1e-4, max_products=12)(operator, stream(seed, "Lanczos")).interval()
        wrong += not lower <= float(operator.entries[0]) <= upper
    assert sunk > 0, "no seed exercises the case"
    assert wrong == 0


def test_float32_run_certified_in_float64_agrees_with_float64():
    """The final product recovers what float32 lost; the enclosures never part."""
    for name in ("outliers 1e0 to 1e6", "power law", "dominant negative", "rank three", "identity"):
        narrow = rotated(KNOWN[name], dtype=torch.float32)
        one, other = Lanczos(rtol=1e-4)(narrow, stream(0)), Lanczos(rtol=1e-10)(narrow.double(), stream(0))
        assert one.wanted.value == pytest.approx(other.wanted.value, rel=1e-9)
        assert max(one.interval()[0], other.interval()[0]) <= min(one.interval()[1], other.interval()[1])
        assert one.interval()[0] <= truth(narrow, Which.MAGNITUDE) <= one.interval()[1]


def test_recurrence_residual_is_far_too_optimistic_in_float32():
    """Why a fresh product is worth its cost: the recurrence claims what only exact arithmetic would give."""
    operator = rotated(KNOWN["outliers 1e0 to 1e6"], dtype=torch.float32)
    recurrence = Recurrence(sphere(operator.n, stream(0)), torch.float32)
    for _ in range(14):
        recurrence.extend(operator.matvec(recurrence.last[:, 0]))
    _, coefficients = recurrence.ritz()
    claimed = recurrence.betas[-1] * abs(coefficients[-1, -1]) * recurrence.scale
    vector = recurrence.combine(coefficients[:, -1])
    product = operator.double().matvec(vector)
    true = space.norm(product - float(vector @ product) * vector)
    assert claimed < 1e-4 * true
    reported = Lanczos(rtol=1e-4)(operator, stream(0)).wanted.residual
    assert reported is not None
    assert reported > 0.01 * true


def test_uncertified_runs_are_cheaper_and_claim_less():
    operator = rotated(KNOWN["power law"])
    full, cheap = (Lanczos(rtol=1e-3, certify=certify)(operator, stream(0)) for certify in (True, False))
    assert cheap.products < full.products
    assert cheap.confidence == 0
    assert cheap.interval()[1] == math.inf
    assert cheap.interval()[0] <= truth(operator, Which.MAGNITUDE)
    assert cheap.reached
    assert cheap.wanted.residual is not None
    assert cheap.wanted.residual <= 1e-3 * abs(cheap.wanted.value)


@pytest.mark.parametrize("certify", [True, False])
def test_ties_report_the_end_that_was_verified(certify):
    """±λ: whichever end rounding prefers afterwards, the one that had a product of its own is the answer."""
    for seed in range(12):
        run = Lanczos(rtol=1e-6, certify=certify)(rotated(KNOWN["tie"], seed), stream(seed))
        assert run.wanted.residual is not None
        assert run.reached
        assert abs(run.wanted.value) == pytest.approx(7, rel=1e-12 if certify else 1e-9)


def test_budgets():
    operator = Spectrum(torch.linspace(0, 1, 300, dtype=torch.float64))
    assert Lanczos(rtol=1e-9, max_products=2)(operator, stream(0)).products == 2
    assert "7 products" in Lanczos(rtol=1e-9, max_products=7)(operator, stream(0)).stopped
    assert "seconds" in Lanczos(rtol=1e-9, seconds=1e-9)(operator, stream(0)).stopped


@pytest.mark.parametrize(
    "settings", [{"confidence": 1.0}, {"confidence": 0.0}, {"rtol": -1.0}, {"rtol": math.nan}, {"max_products": 1}]
)
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(UsageError):
        Lanczos(**settings)


def test_nan_never_reaches_a_result():
    broken = Spectrum(torch.tensor([1.0, math.nan, 2.0], dtype=torch.float64))
    for solver in (Lanczos(), PowerMethod()):
        with pytest.raises(NonFinite):
            solver(broken, stream(0))


def test_recurrence_restarts_in_the_complement():
    """A start inside an invariant subspace: the basis stays orthonormal and goes on to find the rest."""
    start = torch.zeros(20, dtype=torch.float64)
    start[3] = 1
    operator = Spectrum(torch.arange(20, dtype=torch.float64))
    recurrence = Recurrence(start, torch.float64)
    for _ in range(20):
        recurrence.extend(operator.matvec(recurrence.last[:, 0]))
    assert recurrence.exhausted
    assert recurrence.betas[0] == 0
    assert np.allclose(recurrence.ritz()[0] * recurrence.scale, np.arange(20), atol=1e-12)


# The power method


def test_power_method_keeps_the_sign_of_a_dominant_negative_eigenvalue():
    run = PowerMethod()(rotated([-3.0, 2.0, 1.0, 0.5]), stream(0))
    assert run.reached
    assert run.wanted is run.bottom
    assert run.wanted.value == pytest.approx(-3, rel=1e-12)
    assert run.products < 200


def test_comparing_iterates_without_the_sign_never_stops():
    """Negative control: the published stopping rule, applied to the same iterates."""
    matrix = rotated([-3.0, 2.0, 1.0, 0.5]).matrix
    u = sphere(4, stream(0))
    for _ in range(200):
        following = matrix @ u / space.norm(matrix @ u)
        change, u = space.norm(following - u), following
    assert change > 1.9


@pytest.mark.parametrize("name", ["outliers 1e0 to 1e6", "dominant negative", "rank one, negative", "rank three"])
def test_power_method_agrees_with_lanczos(name):
    operator = rotated(KNOWN[name])
    power, lanczos = PowerMethod()(operator, stream(0)), Lanczos(rtol=1e-10)(operator, stream(0))
    assert power.reached
    assert power.wanted.value == pytest.approx(lanczos.wanted.value, rel=1e-8)
    assert lanczos.interval()[0] * (1 - 1e-8) <= abs(power.wanted.value) <= lanczos.interval()[1] * (1 + 1e-8)


def test_power_method_claims_nothing_about_the_other_end():
    """All eigenvalues positive: the untouched end must not read as an eigenvalue at zero."""
    for sign in (1, -1):
        run = PowerMethod()(rotated(sign * np.array([4.0, 2.0, 1.0])), stream(0))
        lower, upper = min(sign * 4.0, sign * 1.0), max(sign * 4.0, sign * 1.0)
        assert run.bottom.bound == -math.inf
        assert run.top.bound == math.inf
        assert run.bottom.value >= lower - 1e-12
        assert run.top.value <= upper + 1e-12
        assert run.confidence == 0
        assert run.interval()[1] == math.inf


def test_power_method_stops_in_the_coordinates_of_the_weights():
    """The paper compares tangent vectors; a frame that magnifies the slow coordinates must delay the stop."""
    values, frame = torch.tensor([1.0, 0.9, 0.5], dtype=torch.float64), torch.tensor([1e-3, 1e3, 1.0])
    plain, pushed = (PowerMethod(frame=f)(Spectrum(values), stream(0)) for f in (None, Diagonal(frame.double())))
    assert plain.reached
    assert pushed.reached
    assert pushed.products > plain.products + 50
    u = sphere(3, stream(0))
    changes = []
    for _ in range(pushed.products - 1):
        following = values * u / space.norm(values * u)
        changes.append(space.norm(frame * (following - u)) / space.norm(frame * u))
        u = following
    assert changes[-1] < 1e-8 <= min(changes[:-1])


def test_power_method_on_the_zero_operator_and_out_of_budget():
    zero = PowerMethod()(Spectrum(torch.zeros(5, dtype=torch.float64)), stream(0))
    assert (zero.wanted.value, zero.reached, zero.products) == (0.0, True, 1)
    assert zero.stopped == "every product vanished"
    slow = PowerMethod(max_products=5)(Spectrum(torch.linspace(0.9, 1, 50, dtype=torch.float64)), stream(0))
    assert (slow.reached, slow.products) == (False, 5)


def test_pullback_spectrum():
    """`Eᵀ A E` for a diagonal frame with a zero block, against the explicit matrix."""
    operator = rotated(KNOWN["power law"])
    entries = torch.rand(operator.n, generator=stream(0), dtype=torch.float64)
    entries[:5] = 0
    explicit = Dense(entries[:, None] * operator.matrix * entries)
    run = Lanczos(rtol=1e-8)(Pullback(operator, Diagonal(entries)), stream(1))
    assert run.wanted.value == pytest.approx(truth(explicit, Which.MAGNITUDE), rel=1e-12)
    assert run.interval()[0] <= truth(explicit, Which.MAGNITUDE) <= run.interval()[1]


def test_start_is_uniform_on_the_sphere():
    """Squared coordinates are Beta(1/2, (n−1)/2): the share below a threshold is what the certificate assumes."""
    n, draws, level = 50, 4000, 0.1
    first = np.array([float(sphere(n, stream(seed))[0]) for seed in range(draws)])
    below = int((abs(first) <= level * math.sqrt(math.pi / (2 * n))).sum())
    assert binom.ppf(0.001, draws, 0.97 * level) <= below <= binom.ppf(0.999, draws, level)
    assert abs(first.mean()) < 4 / math.sqrt(n * draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_coupling_counts_as_no_smaller_than_rounding(dtype):
    """A start that is an eigenvector has a coupling of zero, and what the certificate takes it for is still known rounding."""
    values = torch.linspace(1, 2, 20, dtype=torch.float64)
    run = Recurrence(torch.eye(20, dtype=torch.float64)[3], dtype)
    run.extend(values * run.last[:, 0].double())
    assert run.betas == [0.0] and not run.exhausted
    assert run.log_couplings == math.log(run.rounding)
    assert run.rounding >= torch.finfo(dtype).eps * abs(run.alphas[0])
