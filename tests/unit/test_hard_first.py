"""Eigenvalues of a sum of parts: right whatever the parts are, and cheap where the first carries most."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor

from cases.operators import Job, in_lockstep
from isoflat.core.rng import stream
from isoflat.linalg.eigen.complement import RitzBasis, StoppingRule, complement_bounds
from isoflat.linalg.eigen.extremes import Which
from isoflat.linalg.eigen.hard_first import HardFirst
from isoflat.linalg.eigen.lanczos import Lanczos
from isoflat.linalg.maps import Identity
from isoflat.linalg.operator import Dense, Pullback, Sum
from isoflat.linalg.solver import Domain
from isoflat.linalg.vectors import sphere
from isoflat.risk.plan import FEWEST, MINORITY, WORTHWHILE, by_hardness


def part(n: int, rank: int, size: float, seed: int, sign: float = 1.0) -> Tensor:
    """A random matrix of so many eigenvalues, decaying from `size`."""
    basis = torch.linalg.qr(torch.randn(n, rank, generator=stream(seed, "part"), dtype=torch.float64))[0]
    return sign * basis @ torch.diag(size * 0.6 ** torch.arange(rank, dtype=torch.float64)) @ basis.T


def parts(n: int = 80, seed: int = 0, sign: float = 1.0) -> tuple[Tensor, ...]:
    """Three parts: heavy and cheap, light, lightest and dearest."""
    return tuple(part(n, 12, size, 3 * seed + k, sign) for k, size in enumerate((1.0, 0.05, 0.003)))


def whole(matrices: tuple[Tensor, ...], dtype: torch.dtype = torch.float64) -> Sum:
    """As an operator, with costs as of hard examples."""
    return Sum(tuple(Dense(matrix.to(dtype)) for matrix in matrices), (1.0, 2.0, 7.0)[: len(matrices)])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("which", [Which.LARGEST, Which.MAGNITUDE, Which.SMALLEST])
def test_encloses(which: Which, sign: float):
    matrices = parts(sign=sign)
    spectrum = torch.linalg.eigvalsh(sum(matrices))
    truth = {
        Which.LARGEST: float(spectrum[-1]),
        Which.SMALLEST: float(spectrum[0]),
        Which.MAGNITUDE: float(spectrum.abs().max()),
    }[which]
    result = HardFirst(Lanczos(which=which, rtol=1e-3))(whole(matrices), stream(0))
    lower, upper = result.interval()
    assert lower <= truth <= upper
    assert not result.reached or upper - lower <= 1e-3 * abs(result.wanted.value) * (1 + 1e-9)
    assert result.bottom.bound <= float(spectrum[0])
    assert result.top.bound >= float(spectrum[-1])
    vector = result.wanted.vector
    assert result.wanted.value == pytest.approx(float(vector @ sum(matrices) @ vector), rel=1e-12, abs=1e-14)


def test_violations_are_rare_enough():
    seeds, failure = 300, 0.3
    wrong = 0
    for seed in range(seeds):
        matrices = parts(40, seed % 5)
        top = float(torch.linalg.eigvalsh(sum(matrices))[-1])
        result = HardFirst(Lanczos(which=Which.LARGEST, rtol=0.2, confidence=1 - failure))(
            whole(matrices), stream(seed)
        )
        wrong += result.top.bound < top * (1 - 1e-12)
    assert wrong <= binom.ppf(0.999, seeds, failure)


def test_cheaper_than_lanczos_on_the_whole():
    matrices = parts()
    for certify, ratio in ((False, 0.7), (True, 0.8)):
        solver = Lanczos(rtol=1e-3, certify=certify)
        plain, mine = solver(whole(matrices), stream(0)), HardFirst(solver)(whole(matrices), stream(0))
        assert mine.reached
        assert mine.products <= ratio * plain.products
        residual = torch.linalg.vector_norm(sum(matrices) @ mine.top.vector - mine.top.value * mine.top.vector)
        assert mine.top.residual == pytest.approx(float(residual), rel=1e-6)
        assert certify or residual <= 1e-3 * mine.top.value


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 0, 2), (2, 0, 1)])
def test_right_where_the_parts_mislead(order: tuple[int, ...]):
    matrices = tuple(parts()[k] for k in order)
    top = float(torch.linalg.eigvalsh(sum(matrices))[-1])
    for certify in (False, True):
        result = HardFirst(Lanczos(rtol=1e-4, certify=certify))(whole(matrices), stream(0))
        assert result.reached
        assert result.top.value == pytest.approx(top, rel=1e-4)
    assert result.interval()[0] <= top <= result.interval()[1]


def test_what_the_first_part_is_blind_to_is_found_by_the_certificate():
    heavy, light = torch.zeros(60, 60, dtype=torch.float64), torch.zeros(60, 60, dtype=torch.float64)
    heavy[:30, :30] = part(30, 10, 1.0, 0)
    light[30:, 30:] = part(30, 10, 2.0, 1)
    matrices = (heavy, light)
    blind = HardFirst(Lanczos(certify=False))(whole(matrices), stream(0))
    assert blind.top.value == pytest.approx(1.0, rel=1e-2)  # an eigenvalue, with a small residual, and the wrong one
    sure = HardFirst(Lanczos())(whole(matrices), stream(0))
    assert sure.reached
    assert sure.top.value == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("budget", [2, 5, 8, 9, 10, 12, 20])
def test_budget_is_kept_with_a_valid_enclosure(budget: int):
    matrices = parts()
    operator = whole(matrices)
    outcome = in_lockstep(
        [Job(Pullback(operator, Identity(operator.n)), HardFirst(Lanczos(rtol=1e-9, max_products=budget)), stream(0))],
    )[0]
    lower, upper = outcome.result.interval()
    assert outcome.products <= budget
    assert outcome.result.products == outcome.products
    assert lower <= float(torch.linalg.eigvalsh(sum(matrices))[-1]) <= upper


@pytest.mark.parametrize("scale", [2.0**-500, 2.0**500])
def test_scale(scale: float):
    matrices = parts()
    run = HardFirst(Lanczos())
    usual = run(whole(matrices), stream(0))
    scaled = run(whole(tuple(matrix * scale for matrix in matrices)), stream(0))
    assert scaled.top.value == usual.top.value * scale
    assert scaled.interval() == pytest.approx(tuple(end * scale for end in usual.interval()), rel=1e-9)
    assert scaled.products == usual.products


def test_float32_carries_its_noise():
    matrices = parts()
    result = HardFirst(Lanczos(rtol=1e-3))(whole(matrices, torch.float32), stream(0))
    truth = float(torch.linalg.eigvalsh(sum(matrix.float().double() for matrix in matrices))[-1])
    assert result.reached
    assert result.noise > 1e-8
    assert result.interval()[0] <= truth <= result.interval()[1]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_tiny_and_empty(n: int):
    zero = torch.zeros(n, n, dtype=torch.float64)
    assert HardFirst(Lanczos())(whole((zero, zero, zero)), stream(0)).interval() == (0.0, 0.0)
    eye = torch.eye(n, dtype=torch.float64)
    assert HardFirst(Lanczos())(whole((eye, eye, eye)), stream(0)).top.value == pytest.approx(3.0, rel=1e-14)


def test_comparison_matrix_bounds_every_eigenvalue():
    matrix = sum(parts(30))
    spectrum = torch.linalg.eigvalsh(matrix).numpy()
    for d in (1, 3):
        basis = torch.linalg.qr(torch.stack([sphere(30, stream(k)) for k in range(d)], dim=1))[0]
        away = torch.eye(30, dtype=torch.float64) - basis @ basis.T
        left = torch.linalg.eigvalsh(away @ matrix @ away)
        trial = RitzBasis.of(list(basis.T), list((matrix @ basis).T))
        upper, lower = trial.bounds(float(left[0]), float(left[-1]))
        assert (upper >= spectrum[-d:] - 1e-12).all()
        assert (lower <= spectrum[:d] + 1e-12).all()
        # Without the price of the residual it would be wrong.
        assert max(float(trial.values[-1]), float(left[-1])) < spectrum[-1]


@pytest.mark.parametrize("bound", [-1.0, 0.3])
def test_comparison_matrix_is_that_of_all_dimensions(bound: float):
    """The small matrix has the ends of `[Θ Rᵀ; R U I]`, which is formed here as `A` with `U I` in place of its complement."""
    n, d = 30, 4
    matrix = part(n, n, 1.0, 5) - part(n, n, 1.0, 6)
    basis = torch.linalg.qr(torch.randn(n, d, generator=stream(0, "trial"), dtype=torch.float64))[0]
    away = torch.eye(n, dtype=torch.float64) - basis @ basis.T
    values = torch.linalg.eigvalsh(matrix - away @ matrix @ away + bound * away).numpy()
    trial = RitzBasis.of(list(basis.T), list((matrix @ basis).T))
    upper, lower = trial.bounds(bound, bound)
    assert upper == pytest.approx(values[-d:], abs=1e-12)
    assert lower == pytest.approx(values[:d], abs=1e-12)
    # Each end depends on its own bound alone.
    assert (trial.bounds(bound, bound + 1)[1] == lower).all() and (trial.bounds(bound - 1, bound)[0] == upper).all()


def test_bounds_on_the_complement_add_up_over_parts():
    """Where two parts have their largest eigenvalue along one direction, the complement's is the sum of both."""
    values = torch.linspace(0, 1, 30, dtype=torch.float64)
    operator = Sum((Dense(torch.diag(values)), Dense(torch.diag(2 * values))), (1.0, 1.0))
    known = torch.eye(30, dtype=torch.float64)[0]
    trial = RitzBasis.of([known], [operator.matmat(known[:, None])[:, 0]])
    aim = StoppingRule(1e-6, lambda left: left.upper <= 3.2, lambda more: more <= 60)
    steps = complement_bounds(trial, Domain.of(operator), stream(0), ((0,), (1,)), aim)
    asked = next(steps)
    try:
        while True:
            asked = steps.send(operator.some(asked.parts).matmat(asked.vectors))
    except StopIteration as ended:
        left = ended.value
    assert left.reached
    assert left.upper >= 3.0
    assert left.top == pytest.approx(3.0, rel=0.01)


def test_jobs_share_passes_over_parts():
    operator = whole(parts())
    passes: list[int] = []
    jobs = [Job(Pullback(operator, Identity(operator.n)), HardFirst(Lanczos()), stream(k)) for k in range(2)]
    in_lockstep(jobs, lambda status: passes.append(1))
    alone: list[int] = []
    in_lockstep(jobs[:1], lambda status: alone.append(1))
    assert len(passes) < 1.5 * len(alone)


def test_parts_of_a_pullback_add_up_to_it():
    """Whatever is added beside the parts counts once."""
    operator = Pullback(whole(parts(20)), Identity(20), Dense(torch.eye(20, dtype=torch.float64)))
    vectors = torch.randn(20, 2, generator=stream(0, "vectors"), dtype=torch.float64)
    added = sum(operator.some((p,)).matmat(vectors) for p in range(3))
    assert torch.allclose(added, operator.matmat(vectors), rtol=1e-12, atol=1e-14)


def test_shares():
    domain = Domain.of(whole(parts()))
    assert domain.share(None) == 1.0
    assert domain.share((0, 2)) == pytest.approx(0.8)


@given(st.integers(WORTHWHILE, 4 * WORTHWHILE), st.floats(0.01, 0.6), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_parts_are_a_partition_by_hardness(rows: int, share: float, seed: int):
    hardness = torch.rand(rows, generator=stream(seed)) ** 3 * 1e-3
    hardness[torch.randperm(rows, generator=stream(seed, "places"))[: int(share * rows)]] += 1.0
    found = by_hardness(hardness)
    if not found:
        assert share > MINORITY - 0.05
        return
    assert torch.equal(torch.cat(found).sort().values, torch.arange(rows))
    assert all(torch.equal(places, places.sort().values) for places in found)
    assert all(len(places) >= FEWEST for places in found)
    for harder, easier in itertools.pairwise(found):
        assert hardness[harder].min() >= hardness[easier].max()
    again = by_hardness(hardness * 2.0**-30)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_no_parts_where_they_do_not_pay():
    assert by_hardness(None) == ()
    assert by_hardness(torch.ones(10 * WORTHWHILE)) == ()
    assert by_hardness(torch.zeros(10 * WORTHWHILE)) == ()
    few = torch.zeros(WORTHWHILE - 1)
    few[0] = 1.0
    assert by_hardness(few) == ()
    assert math.isclose(sum(len(places) for places in by_hardness(torch.cat([few, few]))), 2 * len(few))
