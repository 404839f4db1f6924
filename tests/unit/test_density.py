"""SolverQuery densities: bounds of one run, the law of an average of probes, the band, deflation, and what follows from it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom

from cases.operators import Job, in_lockstep
from isoflat.core.density import Atoms, Density, Outlier, Quadrature
from isoflat.core.errors import NonFinite, UsageError
from isoflat.core.rng import stream
from isoflat.linalg.density import lanczos as lanczos_module
from isoflat.linalg.density.counts import counted, uniform_error
from isoflat.linalg.density.gauss import JacobiMatrix, pooled
from isoflat.linalg.density.lanczos import StochasticLanczosQuadrature
from isoflat.linalg.density.outliers import Outliers, separated
from isoflat.linalg.krylov.recurrence import Recurrence
from isoflat.linalg.maps import Identity
from isoflat.linalg.operator import Dense, Operator, Pullback
from isoflat.linalg.trace.hutchinson import Hutchinson
from isoflat.linalg.vectors import gaussian

N = 300
SPECTRA = {
    "flat": np.repeat([1.0, 0.0], N // 2),
    "linear": np.linspace(0, 1, N),
    "geometric decay": 0.9 ** np.arange(N),
    "power law": 1.0 / np.arange(1, N + 1) ** 2,
    "outliers and bulk": np.concatenate([[100.0, 50.0, 25.0], np.linspace(0, 1, N - 3)]),
    "indefinite": np.linspace(-1, 1, N),
}
each = pytest.mark.parametrize("name", SPECTRA)


class Diagonal(Operator):
    """A diagonal matrix; the probes look the same in every basis."""

    def __init__(self, values, dtype: torch.dtype = torch.float64) -> None:
        self.values = torch.as_tensor(np.asarray(values, dtype=np.float64))
        self._dtype = dtype

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def matmat(self, vectors):
        return (self.values.to(self._dtype)[:, None] * vectors.to(self._dtype)).double()

    def double(self) -> Diagonal:
        return Diagonal(self.values)


def unit_vectors(n: int, *places: int) -> torch.Tensor:
    columns = torch.zeros(n, len(places), dtype=torch.float64)
    columns[list(places), range(len(places))] = 1
    return columns


def encloses(density: Density, values) -> bool:
    """Whether every eigenvalue lies between its two ends."""
    low, high = (np.repeat(atoms.points, atoms.counts) for atoms in (density.low, density.high))
    return bool((low <= np.sort(values)).all() and (np.sort(values) <= high).all())


def distance(density: Density, values) -> float:
    """The Wasserstein distance of the estimate from a spectrum."""
    points, masses = density.estimate
    cuts = np.unique(np.concatenate([points, values]))
    truth = np.searchsorted(np.sort(values), cuts[:-1], side="right") / len(values)
    seen = np.concatenate([[0.0], np.cumsum(masses)])[np.searchsorted(points, cuts[:-1], side="right")]
    return float(np.abs(truth - seen) @ np.diff(cuts))


# What one run tells


def lanczos(values, start, steps: int) -> JacobiMatrix:
    recurrence = Recurrence(torch.as_tensor(start), torch.float64)
    for _ in range(steps):
        recurrence.extend(Diagonal(values).matmat(recurrence.last)[:, 0])
    scale = recurrence.scale
    return JacobiMatrix(np.array(recurrence.alphas) * scale, np.array(recurrence.betas) * scale, closed=False)


def distribution(values, start, x, strictly: bool = False) -> np.ndarray:
    """`μ(−∞, x]`, or `μ(−∞, x)`, at every x."""
    order = np.argsort(values)
    mass = np.concatenate([[0.0], np.cumsum(start[order] ** 2)])
    return mass[np.searchsorted(values[order], x, side="left" if strictly else "right")]


@given(st.integers(0, 10**6), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_the_distribution_of_a_start_lies_between_the_bounds_everywhere(seed, steps):
    random = np.random.default_rng(seed)
    values = np.sort(random.choice([random.normal(size=40), random.uniform(size=40) ** 4, 1 / random.uniform(size=40)]))
    start = random.normal(size=40)
    start /= np.linalg.norm(start)
    points, least, most = lanczos(values, start, steps).bounds()
    tolerance = 1e-9 * np.abs(values).max()
    assert (distribution(values, start, points + tolerance) >= least - 1e-9).all()
    assert (distribution(values, start, points - tolerance, strictly=True) <= most + 1e-9).all()


def test_the_estimate_alone_is_no_bound():
    """Negative control: the quadrature's own distribution function lies on both sides of the truth."""
    values, start = np.linspace(0, 1, 200), np.full(200, 200**-0.5)
    nodes, weights = lanczos(values, start, 8).gauss()
    ends = np.cumsum(weights)
    between = (nodes[1:] + nodes[:-1]) / 2
    truth = distribution(values, start, between)
    assert (truth > ends[:-1] + 1e-6).any() or (truth < ends[:-1] - 1e-6).any()
    assert (distribution(values, start, nodes) > ends - weights + 1e-3).all()


def test_rules_with_a_chosen_node_halve_the_band():
    """Gauss's nodes alone leave two weights between them; with the further rules it is little more than one."""
    values = np.linspace(0, 1, 2000)
    run = lanczos(values, np.full(2000, 2000**-0.5), 20)
    grid, lower, upper = pooled([run], np.ones(1))
    nodes, weights = run.gauss()
    at = np.linspace(0.1, 0.9, 500)
    tight = upper[np.searchsorted(grid, at)] - lower[np.searchsorted(grid, at) - 1]
    place = np.searchsorted(nodes, at)
    loose = weights[place] + weights[place - 1]
    assert (tight > 0).all()
    assert tight.mean() < 0.7 * loose.mean()


def test_a_closed_run_is_known_exactly():
    run = JacobiMatrix(np.array([1.0, 1.0]), np.array([1.0, 1e-17]), closed=True)
    points, least, most = run.bounds()
    assert points.tolist() == pytest.approx([0.0, 2.0], abs=1e-15)
    assert least.tolist() == pytest.approx([0.5, 1.0], rel=1e-15)
    assert most.tolist() == pytest.approx([0.0, 0.5], rel=1e-15)


# What an average of probes tells about numbers of eigenvalues


def averages(size: int, probes: int, repeats: int) -> np.ndarray:
    """The average at every number of eigenvalues below all, of many runs: shape `(repeats, size − 1)`."""
    draws = np.random.default_rng([size, probes]).chisquare(probes, size=(repeats, size)).cumsum(1)
    return draws[:, :-1] / draws[:, -1:]


@pytest.mark.parametrize(("size", "probes"), [(40, 1), (41, 1), (41, 3), (60, 2), (120, 4), (30, 7)])
@pytest.mark.parametrize("failure", [0.05, 0.5])
def test_the_true_numbers_are_among_the_possible_ones_as_often_as_stated(size, probes, failure):
    repeats = 200
    seen = averages(size, probes, repeats)
    least, most = counted(seen.ravel(), seen.ravel(), size, probes, failure)
    truth = np.tile(np.arange(1, size), repeats)
    hits = ((least <= truth) & (truth <= most)).reshape(repeats, -1).all(1)
    print(f"covers {hits.mean():.3f}")
    assert hits.sum() >= binom.ppf(1e-3, repeats, 1 - failure)


@pytest.mark.parametrize(("size", "probes"), [(40, 1), (41, 1), (60, 2), (200, 4), (2000, 2)])
def test_the_uniform_error_holds_and_half_of_it_does_not(size, probes):
    worst = np.abs(averages(size, probes, 400) - np.arange(1, size) / size).max(1)
    error = uniform_error(size, probes, 0.05)
    assert (worst <= error).sum() >= binom.ppf(1e-3, 400, 0.95)
    assert (worst <= error / 2).mean() < 0.95


def test_the_uniform_error_is_half_of_what_failures_of_all_numbers_add_up_to():
    """Chen, Trogdon and Ubaru: `2n exp(−(n + 2) m t²)`."""
    size, probes = 10**6, 2
    added = math.sqrt(math.log(2 * size / 0.05) / (probes * (size + 2)))
    assert uniform_error(size, probes, 0.05) < 0.5 * added


@pytest.mark.parametrize(("size", "probes"), [(25, 1), (60, 4), (400, 2)])
def test_bisection_finds_what_looking_everywhere_does(size, probes):
    """The possible numbers are an interval, whatever mass was seen."""
    failure = 0.05
    numbers = np.arange(1, size)
    near = np.minimum(numbers, size - numbers)
    tolerated = failure / 8 / (near * (near + 1))
    law = beta(numbers * probes / 2, (size - numbers) * probes / 2)
    wide = uniform_error(size, probes, failure / 2)
    for mass in (1e-9, 1e-4, 0.01, 0.2, 0.5, 0.9, 0.99, 1 - 1e-6):
        least, most = (int(found[0]) for found in counted(np.array([mass]), np.array([mass]), size, probes, failure))
        high = numbers[(law.sf(mass) >= tolerated) & (numbers >= size * (mass - wide))]
        low = numbers[(law.cdf(mass) >= tolerated) & (numbers <= size * (mass + wide))]
        assert least == (high[0] if len(high) else size)
        assert most == (low[-1] if len(low) else 0)


def test_few_eigenvalues_are_counted_to_a_few_in_a_million():
    least, most = counted(np.array([20e-6]), np.array([20e-6]), 10**6, 4, 0.05)
    assert 5 <= least[0] < 20 < most[0] <= 50
    assert 10**6 * uniform_error(10**6, 4, 0.05) > 900


# The band


@each
@pytest.mark.parametrize("repeats", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_the_band_holds_everywhere_as_often_as_stated(name, repeats):
    """And the distance from the truth is below its bound (check 48)."""
    held, near, ratios = 0, 0, []
    for seed in range(repeats):
        probes, depth = (2, 16) if seed % 2 else (3, 12)
        density = StochasticLanczosQuadrature(probes, depth)(Diagonal(SPECTRA[name]), stream(seed, name))
        assert not density.exact
        held += encloses(density, SPECTRA[name])
        ratios.append(distance(density, SPECTRA[name]) / density.wasserstein)
        near += ratios[-1] <= 1
    print(f"band {held / repeats:.3f}, distance {near / repeats:.3f}, median ratio {np.median(ratios):.2f}")
    assert min(held, near) >= math.ceil(0.95 * repeats)


def test_a_band_of_more_probes_than_were_drawn_fails(monkeypatch):
    """Negative control: the law of the average matters."""

    def confident(lower, upper, size, probes, failure):
        return counted(lower, upper, size, 50 * probes, failure)

    monkeypatch.setattr(lanczos_module, "counted", confident)
    runs = [StochasticLanczosQuadrature(2, 6)(Diagonal(SPECTRA["flat"]), stream(seed)) for seed in range(40)]
    assert sum(encloses(run, SPECTRA["flat"]) for run in runs) < 20


@each
def test_mass_and_moments(name):
    """The probes' quadratures share the moments of their distributions, and these average to the spectrum's."""
    solver, n = StochasticLanczosQuadrature(probes=8, depth=12), N
    density = solver(Diagonal(SPECTRA[name]), stream(0, name))
    masses = density.estimate[1]
    assert masses.sum() == pytest.approx(1, abs=1e-12)
    assert all(math.fsum(probe.weights) == pytest.approx(1, abs=1e-12) for probe in density.probes)
    random = stream(0, name)
    draws = [gaussian(n, 1, random)[:, 0].numpy() for _ in range(8)]
    for power in range(4):
        directly = sum(draw @ (SPECTRA[name] ** power * draw) for draw in draws) / sum(draw @ draw for draw in draws)
        assert density.moment(power) == pytest.approx(directly, rel=1e-10, abs=1e-12)
        error = density.moment_error(power)
        assert abs(density.moment(power) - (SPECTRA[name] ** power).mean()) <= 3 * error + 1e-12
        assert (error == pytest.approx(0, abs=1e-14)) == (power == 0)


def test_blocks_and_company_do_not_matter():
    operator = Diagonal(SPECTRA["indefinite"])
    alone = StochasticLanczosQuadrature(probes=4, depth=10)(operator, stream(0))
    narrow = StochasticLanczosQuadrature(probes=4, depth=10, block=1)(operator, stream(0))
    assert alone == narrow
    jobs = [
        Job(Pullback(operator, Identity(N)), StochasticLanczosQuadrature(probes=4, depth=10), stream(0)),
        Job(Pullback(operator, Identity(N)), Hutchinson(probes=8), stream(1)),
    ]
    assert in_lockstep(jobs)[0].result == alone


@pytest.mark.parametrize("probes", [1, 2])
def test_zero_matrix(probes):
    density = StochasticLanczosQuadrature(probes, 1)(Diagonal(np.zeros(50)), stream(0))
    assert (density.low, density.high) == (Atoms((0.0,), (50,)), Atoms((0.0,), (50,)))
    assert (density.slack, density.wasserstein, density.products) == (0.0, 0.0, probes)
    assert density.participation().upper == 0
    assert density.soft_rank(1.0).upper == 0
    assert density.count(0.0).upper == 0


def test_one_and_two_eigenvalues():
    one = StochasticLanczosQuadrature(1, 1)(Diagonal([-3.0]), stream(0))
    assert one.exact
    assert one.low.points[0] <= -3.0 <= one.high.points[0]
    assert one.participation().value == pytest.approx(1, rel=1e-12)
    pair = StochasticLanczosQuadrature(1, 1)(Diagonal([-3.0, 1.0]), stream(0))
    assert not pair.exact
    assert encloses(pair, [-3.0, 1.0])
    deflated = StochasticLanczosQuadrature(1, 1, directions=unit_vectors(2, 0))(Diagonal([-3.0, 1.0]), stream(0))
    assert deflated.outliers == (Outlier(-3.0, 0.0),)
    assert deflated.high.points == pytest.approx((-3.0, 1.0), rel=1e-12)
    nothing_left = StochasticLanczosQuadrature(1, 1, directions=unit_vectors(2, 0, 1))
    assert nothing_left(Diagonal([-3.0, 1.0]), stream(0)).low == Atoms((-3.0, 1.0), (1, 1))


@pytest.mark.parametrize(
    "values",
    [
        [5.0] + [0.0] * 199,
        [-7.0] * 4 + [7.0] * 4 + [0.0] * 192,
        np.repeat([1.0, 2.0, 2.0 + 1e-12, 3.0], 50),
        np.repeat(np.linspace(-1, 1, 8), 25),
    ],
    ids=["rank one", "ties", "cluster", "multiplicities"],
)
def test_few_different_eigenvalues(values):
    """Places are known to rounding, numbers as well as chance allows.

    Of eight different eigenvalues at most: the Krylov space of twenty closes up to a coupling of many roundings, and whether
    that is noticed depends on the processor.
    """
    density = StochasticLanczosQuadrature(4, 40)(Diagonal(values), stream(0))
    assert encloses(density, values)
    assert density.reached
    different = np.unique(np.round(values, 9))
    for atoms in (density.low, density.high):
        outermost = [point for point, count in zip(atoms.points, atoms.counts, strict=True) if count > 5]
        assert np.abs(np.subtract.outer(outermost, different)).min(1).max() < 1e-9


def test_runs_end_where_their_krylov_spaces_close():
    density = StochasticLanczosQuadrature(4, 40)(Diagonal([-7.0] * 4 + [7.0] * 4 + [0.0] * 192), stream(0))
    assert density.products == 12
    assert density.reached


def test_everything_is_computed_where_that_costs_no_more():
    matrix = torch.randn(40, 40, generator=stream(0), dtype=torch.float64)
    matrix = matrix + matrix.T
    density = StochasticLanczosQuadrature(4, 10)(Dense(matrix.float().double()), stream(0))
    assert (density.exact, density.products, density.outliers) == (True, 40, ())
    truth = np.linalg.eigvalsh(matrix.float().double().numpy())
    assert encloses(density, truth)
    assert density.wasserstein < 1e-12
    assert not StochasticLanczosQuadrature(3, 13)(Dense(matrix), stream(0)).exact


@each
@pytest.mark.parametrize("exponent", [40, -40])
def test_powers_of_two_scale_bit_by_bit(name, exponent):
    factor = 2.0**exponent
    solver = StochasticLanczosQuadrature(2, 12)
    plain, scaled = (solver(Diagonal(SPECTRA[name] * c), stream(0)) for c in (1.0, factor))
    for one, other in ((plain.low, scaled.low), (plain.high, scaled.high)):
        assert one.counts == other.counts
        assert tuple(point * factor for point in one.points) == other.points
    assert plain.slack * factor == scaled.slack
    assert plain.participation() == scaled.participation()


@pytest.mark.parametrize("factor", [1e150, 1e-150])
@pytest.mark.parametrize("spike", [(), (1e4,)])
def test_scales_near_the_ends_of_the_range(factor, spike):
    values = np.concatenate([np.linspace(-1, 1, 400), spike])
    solver = StochasticLanczosQuadrature(2, 16, directions=unit_vectors(len(values), 400) if spike else None)
    plain, scaled = (solver(Diagonal(values * c), stream(0)) for c in (1.0, factor))
    assert scaled.wasserstein == pytest.approx(plain.wasserstein * factor, rel=1e-10)
    assert scaled.quantile(0.3).upper == pytest.approx(plain.quantile(0.3).upper * factor, rel=1e-10)
    assert scaled.participation().upper == pytest.approx(plain.participation().upper, rel=1e-10)
    assert scaled.soft_rank(0.1 * factor).value == pytest.approx(plain.soft_rank(0.1).value, rel=1e-10)
    assert len(scaled.outliers) == len(spike)


def test_float32_widens_the_band_by_its_rounding():
    values = np.concatenate([[50.0], np.linspace(0, 1, N)])
    low, high = (
        StochasticLanczosQuadrature(2, 16)(Diagonal(values, t), stream(0)) for t in (torch.float32, torch.float64)
    )
    assert 1e-7 < low.slack < 1e-3
    assert high.slack < 1e-11
    assert encloses(low, values)


# Deflation


def test_an_outlier_far_away_makes_the_band_useless_until_it_is_taken_out():
    """Negative control: in absolute units, the error is in units of the range."""
    values = np.append(np.linspace(0, 1, 2000), 1e6)
    solver = StochasticLanczosQuadrature(2, 24)
    blind = solver(Diagonal(values), stream(0))
    found = Outliers(depth=24)(Diagonal(values), stream(1))
    clear = replace(solver, directions=found.directions)(Diagonal(values), stream(0))
    assert blind.wasserstein > 100
    assert clear.wasserstein < 0.1
    assert [outlier.value for outlier in clear.outliers] == pytest.approx([1e6], rel=1e-12)
    assert clear.outliers[0].residual < 1e-6
    assert encloses(clear, values)
    assert encloses(blind, values)
    coarse = solver(Diagonal(values, torch.float32), stream(0))
    fine = replace(solver, directions=found.directions)(Diagonal(values, torch.float32), stream(0))
    assert coarse.slack > 0.1
    assert fine.slack < 1e-4


def test_directions_that_are_no_eigenvectors_cost_sharpness_and_not_the_truth():
    values = np.sort(np.append(np.linspace(0, 1, N - 2), [8.0, 9.0]))
    exact = unit_vectors(N, N - 1, N - 2)
    noise = torch.randn(N, 2, generator=stream(3), dtype=torch.float64)
    slacks, defects = [], []
    for size in (0.0, 1e-3, 0.05, 10.0):
        directions = torch.linalg.qr(exact + size * noise)[0]
        for seed in range(4):
            density = StochasticLanczosQuadrature(2, 16, directions=directions)(Diagonal(values), stream(seed))
            assert encloses(density, values)
        slacks.append(density.slack)
        defects.append(max(outlier.residual for outlier in density.outliers))
    assert defects[0] < 1e-14 < 0.1 < defects[1] < defects[2]
    assert slacks[0] < 1e-13 < slacks[1] < 1e-2 < min(slacks[2:])
    assert slacks[1] < 0.05 * defects[1]  # behind a gap the price of a residual is quadratic


@pytest.mark.parametrize(
    ("spikes", "taken"),
    [
        ((), (0, 0)),
        ((30.0,), (0, 1)),
        ((-30.0, 20.0, 30.0), (1, 2)),
        ((30.0, 30.0 + 1e-7), (0, 2)),
        ((1e9, 5.0), (0, 2)),
    ],
)
def test_outliers_are_found_and_nothing_else(spikes, taken):
    """A continuum has no outliers; close neighbours are taken together; nothing depends on the unit."""
    values = np.concatenate([np.cos(np.linspace(0, np.pi, 400)), spikes])
    for factor in (1.0, 1e150, 1e-150):
        found = Outliers(depth=40)(Diagonal(values * factor), stream(0))
        assert (0 if found.directions is None else found.directions.shape[1]) == sum(taken)
        assert found.products == 40
    if spikes:
        places = found.directions[400:].square().sum(0)
        assert places.tolist() == pytest.approx([1.0] * sum(taken), abs=1e-6)


def test_zeros_and_noise_are_no_outliers():
    for dtype in (torch.float64, torch.float32):
        found = Outliers(depth=20)(Diagonal([5.0] + [0.0] * 199, dtype), stream(0))
        assert found.directions is not None
        assert found.directions.shape == (200, 1)
    assert Outliers(depth=20)(Diagonal(np.zeros(200)), stream(0)).directions is None
    assert Outliers(depth=20)(Diagonal(np.ones(200)), stream(0)).directions is None


def test_the_rule_takes_whole_groups_up_to_the_limit():
    values = np.array([0.0, 0.3, 0.6, 1.0, 5.0, 5.001, 9.0])
    residuals = np.array([0.2, 0.3, 0.3, 0.2, 1e-3, 1e-3, 1e-9])
    masses = np.array([0.2, 0.2, 0.3, 0.2, 0.03, 0.03, 0.04])
    assert separated(values, residuals, masses, 5, 1e-15) == (0, 3)
    assert separated(values, residuals, masses, 2, 1e-15) == (0, 1)  # two of the three are told apart by too little
    assert separated(values, np.full(7, 0.3), masses, 5, 1e-15) == (0, 0)
    assert separated(values, residuals, masses, 5, 1.0) == (0, 0)  # nothing is known beyond rounding
    assert separated(values, residuals, masses[::-1], 5, 1e-15) == (0, 1)  # most eigenvalues are among the three


# Settings, budgets


def test_settings_without_meaning_are_refused():
    for settings_ in ({"probes": 0}, {"depth": 0}, {"confidence": 1.0}, {"block": 0}, {"max_products": 3}):
        with pytest.raises(UsageError):
            StochasticLanczosQuadrature(**settings_)
    with pytest.raises(UsageError, match="orthonormal"):
        solver = StochasticLanczosQuadrature(1, 1, directions=torch.ones(5, 2, dtype=torch.float64))
        solver(Diagonal(np.ones(5)), stream(0))
    for settings_ in ({"limit": 0}, {"depth": 1}):
        with pytest.raises(UsageError):
            Outliers(**settings_)


def test_budgets_are_kept_and_said():
    operator = Diagonal(SPECTRA["linear"])
    asked = StochasticLanczosQuadrature(2, 30, max_products=21, directions=unit_vectors(N, N - 1))
    density = asked(operator, stream(0))
    assert (density.products, density.reached) == (21, False)
    assert density.stopped == "budget of 21 products spent: 2 probes, 10 steps instead of 30"
    assert not density.count(0.5).converged
    hurried = StochasticLanczosQuadrature(4, 30, block=2, seconds=1e-9)(operator, stream(0))
    assert (hurried.products, len(hurried.probes)) == (2, 2)
    assert "1e-09 seconds" in hurried.stopped
    assert encloses(hurried, SPECTRA["linear"])


# What follows from two spectra around one


@st.composite
def enclosed(draw):
    """A spectrum, and a density that encloses it."""
    values = np.sort(draw(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12)))
    n = len(values)
    below, above = (np.array(draw(st.lists(st.floats(0, 3, width=32), min_size=n, max_size=n))) for _ in range(2))
    low, high = np.minimum.accumulate((values - below)[::-1])[::-1], np.maximum.accumulate(values + above)
    seen = np.sort(draw(st.lists(st.floats(-12, 12, width=32), min_size=1, max_size=5)))
    probe = Quadrature(tuple(seen.tolist()), (1 / len(seen),) * len(seen), 1.0)
    ones = np.ones(n, dtype=np.int64)
    return values, Density(n, (probe,), (), Atoms.of(low, ones), Atoms.of(high, ones), 0.95, 0.0, 1, False, True, "")


@given(enclosed(), st.floats(-12, 12), st.floats(0.01, 10), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_whatever_lies_between_has_its_functionals_in_the_enclosures(pair, x, mu, share):
    values, density = pair
    n = len(values)

    def check(found, truth):
        slop = 1e-9 * max(abs(truth), 1)
        assert found.lower - slop <= truth <= found.upper + slop

    check(density.below(x), (values <= x).mean())
    check(density.count(x), (values > x).sum())
    check(density.between(-mu, mu), (np.abs(values) <= mu).mean())
    check(density.quantile(share), values[max(math.ceil(share * n), 1) - 1])
    check(density.soft_rank(mu), (values.clip(0) / (values.clip(0) + mu)).sum())
    square = (values**2).sum()
    check(density.participation(), values.sum() ** 2 / square if square else 0.0)
    assert distance(density, values) <= density.wasserstein * (1 + 1e-9) + 1e-12
    assert Density.from_dict(json.loads(json.dumps(density.to_dict()))) == density


def test_enclosures_are_no_wider_than_they_must_be():
    """Both ends are reached by the two spectra themselves."""
    low, high = np.array([-1.0, 0.5, 2.0]), np.array([0.0, 1.0, 4.0])
    ones = np.ones(3, dtype=np.int64)
    probe = Quadrature((0.0, 3.0), (0.5, 0.5), 1.0)
    density = Density(3, (probe,), (), Atoms.of(low, ones), Atoms.of(high, ones), 0.95, 0.0, 1, False, True, "")
    soft = density.soft_rank(1.0)
    assert soft.lower == pytest.approx((low.clip(0) / (low.clip(0) + 1)).sum())
    assert soft.upper == pytest.approx((high / (high + 1)).sum())
    assert (density.count(0.75).lower, density.count(0.75).upper) == (1, 2)
    assert (density.quantile(0.5).lower, density.quantile(0.5).upper) == (0.5, 1.0)
    assert density.quantile(0.0).lower == -1
    assert density.participation().upper <= 3


def test_densities_refuse_what_makes_no_sense():
    atoms, probe = Atoms((0.0,), (2,)), Quadrature((0.0,), (1.0,), 1.0)
    density = Density(2, (probe,), (), atoms, atoms, 0.95, 0.0, 1, False, True, "")
    with pytest.raises(UsageError, match="2 eigenvalues"):
        replace(density, low=Atoms((0.0,), (1,)))
    with pytest.raises(NonFinite):
        replace(density, high=Atoms((math.inf,), (2,)))
    with pytest.raises(UsageError, match="positive"):
        density.soft_rank(0.0)
    with pytest.raises(UsageError, match="share"):
        density.quantile(1.5)
    with pytest.raises(UsageError, match="2 probes"):
        density.moment_error(1)
