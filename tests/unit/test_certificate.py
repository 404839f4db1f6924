"""The outer bounds: closed forms, ten thousand spectra, and what happens without a random start."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import betainc
from scipy.stats import binom

from isoflat.core.rng import stream
from isoflat.linalg.certificate import log_overlap, outer_bounds, posterior_bound, prior_bound
from isoflat.linalg.krylov.recurrence import Recurrence
from isoflat.linalg.vectors import sphere

LEVELS = (0.3, 0.1, 0.01, 1e-3)
FAMILIES = ("outliers", "bulk", "power", "clusters", "indefinite", "near multiple", "lonely top", "lonely ends")


def spectrum(family: str, rng: np.random.Generator) -> np.ndarray:
    """A random spectrum of the family, unsorted."""
    n = int(rng.integers(30, 300))
    match family:
        case "outliers":
            return np.concatenate([rng.uniform(0, 1, n - 4), 10.0 ** rng.uniform(0.5, 6, 4)])
        case "bulk":
            return rng.uniform(-1, 1, n) if rng.random() < 0.5 else rng.uniform(0, 1, n)
        case "power":
            return np.arange(1, n + 1) ** -rng.uniform(0.3, 3)
        case "clusters":
            return rng.choice(rng.standard_normal(4), n) + 10.0 ** rng.uniform(-12, -2) * rng.standard_normal(n)
        case "indefinite":
            return rng.standard_normal(n)
        case "near multiple":
            top = 1 + 10.0 ** rng.uniform(-12, -3) * rng.random(5)
            return np.concatenate([rng.uniform(-0.9, 0.9, n - 10), top, -top])
        case "lonely top":  # the bound after one step is sharp here: nothing but the overlap decides
            return np.concatenate([[1.0], np.zeros(n - 1)])
        case _:
            return np.concatenate([[1.0, -1.0], np.zeros(n - 2)])


def grow(spectrum: np.ndarray, steps: int, start: torch.Tensor, dtype: torch.dtype = torch.float64) -> Recurrence:
    """A Lanczos recurrence of a diagonal matrix after some steps."""
    diagonal = torch.from_numpy(spectrum).to(dtype)
    recurrence = Recurrence(start, dtype)
    for _ in range(steps):
        recurrence.extend((diagonal * recurrence.last[:, 0]).double())
    return recurrence


def missed(spectrum: np.ndarray, recurrence: Recurrence, failure: float) -> tuple[bool, bool]:
    """Whether the bound on the bottom and the one on the top are wrong, beyond rounding."""
    ritz, _ = recurrence.ritz()
    lower, upper = outer_bounds(ritz, recurrence.log_couplings, recurrence.n, failure)
    slack = 4 * recurrence.rounding * recurrence.scale
    bottom, top = lower * recurrence.scale - slack, upper * recurrence.scale + slack
    return bottom > spectrum.min(), top < spectrum.max()


@cache
def violations(family: str, runs: int) -> dict[float, int]:
    """How many of so many runs miss the spectrum, by level."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = np.random.default_rng(abs(hash_of(family)))
    wrong = dict.fromkeys(LEVELS, 0)
    for run in range(runs):
        values = spectrum(family, rng)
        steps = 1 if family.startswith("lonely") else int(rng.integers(1, 13))
        recurrence = grow(values, steps, sphere(len(values), stream(run, family)))
        for level in LEVELS:
            wrong[level] += any(missed(values, recurrence, level))
    torch.set_num_threads(threads)
    return wrong


def hash_of(text: str) -> int:
    """A seed that is the same in every process."""
    return int.from_bytes(text.encode()[:6], "little")


@pytest.mark.parametrize("runs", [200, pytest.param(1250, marks=pytest.mark.slow)])
def test_enclosures_fail_no_more_often_than_stated(runs):
    """Of each family of spectra, and of all together: 10 000 of them in the slow test."""
    for level in LEVELS:
        wrong = {family: violations(family, runs)[level] for family in FAMILIES}
        for family, count in wrong.items():
            assert count <= binom.ppf(0.999, runs, level), f"{family}: {count} of {runs} enclosures wrong at {level}"
        assert sum(wrong.values()) <= binom.ppf(0.999, runs * len(FAMILIES), level)


def test_the_stated_failure_is_not_vacuous():
    """Where the bound is sharp the enclosures do fail, about as often as stated: halving the threshold would show."""
    runs = 1250
    wrong = violations("lonely top", runs)[0.3]
    assert binom.ppf(0.001, runs, 0.9 * 0.3 / 2) <= wrong <= binom.ppf(0.999, runs, 0.3 / 2)


@pytest.mark.parametrize("family", ["outliers", "bulk", "indefinite", "lonely top", "lonely ends"])
def test_bounds_hold_for_all_steps_at_once(family):
    """A run that fails at any of its steps counts once; the rate stays below the stated one."""
    rng = np.random.default_rng(7)
    levels = (0.3, 0.1)
    wrong = dict.fromkeys(levels, 0)
    runs = 75
    for run in range(runs):
        values = spectrum(family, rng)
        diagonal = torch.from_numpy(values)
        recurrence = Recurrence(sphere(len(values), stream(run, "all", family)), torch.float64)
        failed = dict.fromkeys(levels, False)
        for _ in range(8):
            recurrence.extend(diagonal * recurrence.last[:, 0])
            for level in levels:
                failed[level] |= any(missed(values, recurrence, level))
        for level in levels:
            wrong[level] += failed[level]
    for level in levels:
        assert wrong[level] <= binom.ppf(0.999, runs, level)


def test_both_bounds_follow_from_the_overlaps_alone():
    """Never wrong where both overlaps reach c, at any step: the statement behind the probability."""
    rng = np.random.default_rng(3)
    failure = 0.5
    for run in range(60):
        values = np.sort(spectrum(FAMILIES[run % 6], rng))
        n = len(values)
        start = sphere(n, stream(run, "overlap"))
        threshold = math.exp(log_overlap(n, failure / 2))
        if min(abs(float(start[0])), abs(float(start[-1]))) < threshold:
            continue
        for steps in range(1, 10):
            recurrence = grow(values, steps, start)
            ritz, _ = recurrence.ritz()
            slack = 4 * recurrence.rounding
            top = values[-1] / recurrence.scale - slack
            assert posterior_bound(ritz, recurrence.log_couplings, n, failure / 2) >= top
            assert prior_bound(ritz, n, failure) >= top


@pytest.mark.parametrize("n", [2, 3, 10, 300, 10**6])
@pytest.mark.parametrize("failure", [0.3, 1e-3, 1e-9])
def test_overlap_threshold_against_the_exact_distribution(n, failure):
    """A squared coordinate of a uniform unit vector is Beta(1/2, (n−1)/2)."""
    c = math.exp(log_overlap(n, failure))
    exact = betainc(0.5, (n - 1) / 2, c * c)
    assert exact <= failure * (1 + 1e-9)
    assert exact >= (0.97 if n >= 300 else 0.55) * failure


def test_start_orthogonal_to_the_top_makes_the_bound_wrong():
    """Negative control: the promise is about random starts; a start chosen by an adversary voids it."""
    values = np.concatenate([[10.0], np.linspace(0, 1, 99)])
    start = sphere(100, stream(0))
    blind = start.clone()
    blind[0] = 0
    blind /= blind.norm()
    assert missed(values, grow(values, 12, blind), 1e-6) == (False, True)
    assert missed(values, grow(values, 12, start), 1e-6) == (False, False)


def test_start_that_depends_on_the_operator_fails_far_more_often_than_stated():
    """Negative control: a start filtered by the operator itself hides the top."""
    rng = np.random.default_rng(0)
    wrong = 0
    for run in range(50):
        values = rng.uniform(1, 10, 80)
        start = sphere(80, stream(run, "warm")) * torch.from_numpy(values) ** -30.0
        wrong += any(missed(values, grow(values, 3, start / start.norm()), 1e-3))
    assert wrong > 25


def test_small_overlap_in_float32_is_not_taken_for_an_invariant_space():
    """An overlap far above the threshold leaves a coupling below rounding: the bound must not collapse."""
    n = 2000
    values = np.ones(n)
    values[0] = 1.001
    threshold = math.exp(log_overlap(n, 5e-7))
    start = sphere(n, stream(0))
    start[0] = 100 * threshold
    start /= start.norm()
    recurrence = grow(values, 1, start, torch.float32)
    assert recurrence.betas[-1] < recurrence.rounding
    assert missed(values, recurrence, 1e-6) == (False, False)


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40),
    st.floats(-400, 60),
    st.integers(2, 10**9),
    st.floats(1e-15, 0.9),
)
def test_posterior_bound_solves_its_equation(values, log_couplings, n, failure):
    ritz = np.sort(np.array(values))
    bound = posterior_bound(ritz, log_couplings, n, failure)
    assert bound >= ritz[-1]
    gaps = bound - ritz
    if gaps[-1] > 1e-6 * (1 + abs(bound)):  # otherwise the subtraction loses the gap
        residue = float(np.log(gaps).sum()) - log_couplings + log_overlap(n, failure)
        assert -1e-9 * len(values) <= residue <= 1e-4 * len(values)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.floats(-100, 30), st.integers(2, 10**8))
def test_more_confidence_means_wider(values, log_couplings, n):
    ritz = np.sort(np.array(values))
    ends = [outer_bounds(ritz, log_couplings, n, failure) for failure in (0.3, 0.01, 1e-6)]
    assert all(wide[0] <= tight[0] and wide[1] >= tight[1] for tight, wide in itertools.pairwise(ends))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.floats(-100, 30), st.integers(2, 10**8))
def test_bounds_mirror_with_the_spectrum(values, log_couplings, n):
    ritz = np.sort(np.array(values))
    lower, upper = outer_bounds(ritz, log_couplings, n, 1e-3)
    assert outer_bounds(-ritz[::-1], log_couplings, n, 1e-3) == (-upper, -lower)


def test_prior_bound_reaches_published_step_counts():
    """Products for a relative error ε at n = 10⁶, 10⁻⁶ per end, from `ln(1.648 √n/δ) = (2k − 1) √ε`: no more here."""
    for steps, epsilon in ((35, 0.1), (48, 0.05), (107, 0.01), (337, 0.001)):
        ritz = np.linspace(0.0, 1.0, steps)
        assert prior_bound(ritz, 10**6, 2e-6) - 1 <= epsilon / (1 - 2 * epsilon) * 1.01
    assert prior_bound(np.linspace(0.0, 1.0, 5), 10**6, 2e-6) == math.inf


def test_the_whole_space_leaves_nothing_to_bound():
    values = np.array([3.0, -1.0, 0.5])
    recurrence = grow(values, 3, sphere(3, stream(0)))
    assert recurrence.exhausted
    lower, upper = outer_bounds(recurrence.ritz()[0], recurrence.log_couplings, 3, 1e-12)
    assert lower * recurrence.scale == pytest.approx(-1, rel=1e-14)
    assert upper * recurrence.scale == pytest.approx(3, rel=1e-14)


@pytest.mark.parametrize("k", [20, 60, 200])
@pytest.mark.parametrize("failure", [0.3, 1e-6])
def test_the_prior_bound_solves_its_equation(k, failure, n=300):
    """`c² sinh²((2k − 1) artanh √ε) = 1 − c²`, ε the bound's distance from the Ritz values beside that of both bounds."""
    ritz = np.linspace(-1.0, 3.0, k)
    above = prior_bound(ritz, n, failure) - 3.0
    epsilon = above / (4.0 + 2 * above)  # the lower bound lies as far below
    overlap = math.exp(log_overlap(n, failure / 2))
    found = overlap * math.sinh((2 * k - 1) * math.atanh(math.sqrt(epsilon)))
    # ln(2/c) stands for arcosh(1/c), which is smaller by c²/4 at most.
    assert math.sqrt(1 - overlap**2) * (1 - 1e-9) <= found <= 1 + 1e-9


@pytest.mark.parametrize("failure", [0.3, 1e-6])
def test_each_end_has_half_of_the_failure_probability(failure, n=300):
    """After one step the spectrum lies within `β / c` of the Ritz value, c the overlap that each end misses by half."""
    theta, beta = 2.0, 0.7
    lower, upper = outer_bounds(np.array([theta]), math.log(beta), n, failure)
    reach = beta / math.exp(log_overlap(n, failure / 2))
    assert upper - theta == pytest.approx(reach, rel=1e-9)
    assert theta - lower == pytest.approx(reach, rel=1e-9)
