"""A number with its interval: refusals, scaling, printing, round trips."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from isoflat.core.errors import NonFinite, UsageError
from isoflat.core.estimate import Cost, Estimate, Kind, interval
from isoflat.core.render import concise

FINITE = st.floats(allow_nan=False, allow_infinity=False)
"""Subnormal and huge numbers included."""


def estimate(lower: float, value: float, upper: float, kind: Kind = Kind.ENCLOSURE, **more) -> Estimate:
    return Estimate(value, lower, upper, confidence=0.999, kind=kind, converged=True, **more)


@st.composite
def estimates(draw, numbers=FINITE):
    return estimate(*sorted(draw(st.tuples(numbers, numbers, numbers))))


@given(
    estimates(),
    st.none() | FINITE,
    st.none() | FINITE,
    st.lists(st.text(max_size=8), max_size=2),
    st.lists(FINITE, max_size=3),
)
def test_json_round_trip_is_exact(plain, residual, error, notes, samples):
    cost = Cost(products=3, gradient_passes=9.25, seconds=0.1, peak_memory=1 << 40)
    given = Estimate(
        plain.value,
        plain.lower,
        plain.upper,
        1 - 1e-6,
        Kind.ENCLOSURE,
        False,
        cost,
        residual,
        error,
        tuple(notes),
        tuple(samples),
    )
    text = json.dumps(given.to_dict(), allow_nan=False)
    back = Estimate.from_dict(json.loads(text))
    assert back == given
    assert math.copysign(1, back.value) == math.copysign(1, given.value)


def test_infinite_ends_survive_strict_json():
    given = estimate(1.0, 2.0, math.inf, Kind.UNCERTIFIED)
    assert Estimate.from_dict(json.loads(json.dumps(given.to_dict(), allow_nan=False))) == given
    assert given.relative_width == math.inf


@pytest.mark.parametrize("place", range(3))
def test_nan_is_refused(place):
    numbers = [1.0, 2.0, 3.0]
    numbers[place] = math.nan
    with pytest.raises(NonFinite):
        estimate(*numbers)


@given(FINITE, FINITE, FINITE)
def test_values_outside_their_interval_are_refused(lower, value, upper):
    assume(not lower <= value <= upper)
    with pytest.raises(UsageError):
        estimate(lower, value, upper)


@given(estimates(st.floats(-1e100, 1e100)), st.floats(1e-200, 1e200))
def test_scaling_scales_everything_or_refuses(given, factor):
    scaled = given.scaled(factor)
    assert (scaled.lower, scaled.value, scaled.upper) == tuple(
        factor * x for x in (given.lower, given.value, given.upper)
    )
    assert (scaled.confidence, scaled.kind, scaled.converged) == (given.confidence, given.kind, given.converged)


def test_scaling_reaches_residual_and_standard_error():
    scaled = estimate(1.0, 2.0, 3.0, residual=0.5, standard_error=0.25).scaled(4.0)
    assert (scaled.residual, scaled.standard_error) == (2.0, 1.0)


def test_scaling_reaches_the_samples_whose_mean_the_value_is():
    scaled = estimate(1.0, 2.0, 3.0, samples=(1.5, 2.5)).scaled(4.0)
    assert scaled.samples == (6.0, 10.0)
    assert sum(scaled.samples) / 2 == scaled.value


def test_records_from_before_there_were_samples_can_be_read():
    data = estimate(1.0, 2.0, 3.0).to_dict()
    del data["samples"]
    assert Estimate.from_dict(data) == estimate(1.0, 2.0, 3.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_are_finite(bad):
    with pytest.raises(NonFinite):
        estimate(1.0, 2.0, 3.0, samples=(2.0, bad))


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan])
def test_only_positive_factors(factor):
    with pytest.raises(UsageError):
        estimate(1.0, 2.0, 3.0).scaled(factor)


def test_notes_are_kept_once_in_order():
    assert estimate(1.0, 1.0, 1.0, notes=("a",)).with_notes("b", "a", "c", "b").notes == ("a", "b", "c")


def test_relative_width_of_zero():
    assert estimate(0.0, 0.0, 0.0).relative_width == 0
    assert estimate(0.0, 0.0, 1e-9).relative_width == math.inf
    assert estimate(-3.0, -2.0, -1.0).relative_width == 1


@given(st.floats(1e-300, 1e300) | st.floats(-1e300, -1e-300), st.floats(1e-9, 10))
def test_concise_notation_covers_value_and_uncertainty(value, relative):
    """`m(u)e±x`: the bracket is no smaller than asked, and the centre within half a digit of it."""
    uncertainty = abs(value) * relative
    match = re.fullmatch(
        r"(-?\d+(?:\.(\d+))?)\((\d+)\)(?:e([+-]\d+))?", concise(value, value - uncertainty, value + uncertainty)
    )
    assert match
    exponent = int(match[4] or 0)
    unit = 10.0 ** -len(match[2] or "") * 10.0**exponent
    bracket = int(match[3]) * unit
    assert bracket >= uncertainty * (1 - 1e-9)
    assert bracket <= 2.0001 * uncertainty + (10 * unit if bracket >= 10 * unit else 0)
    # Rounding moves the centre by half a unit of the digit in brackets at most.
    digit = 10.0 ** math.floor(math.log10(bracket) + 1e-9)
    assert abs(float(match[1]) * 10.0**exponent - value) <= 0.5000001 * digit


@pytest.mark.parametrize(
    ("value", "uncertainty", "text"),
    [
        (0.8731, 0.0039, "0.873(4)"),
        (0.8731, 0.0040001, "0.873(5)"),
        (-0.8731, 0.0039, "-0.873(4)"),
        (9.996, 0.0095, "9.996(10)"),
        (0.0, 0.03, "0.00(3)"),
        (0.0, 3e-9, "0(3)e-09"),
        (12345678.0, 12.0, "1.234568(2)e+07"),
        (1.0, math.inf, "1(inf)"),
    ],
)
def test_concise_notation_by_hand(value, uncertainty, text):
    if text == "9.996(10)":  # a bracket of ten becomes one of the digit before
        text = "10.00(1)"
    assert concise(value, value - uncertainty, value + uncertainty) == text


def test_uncertified_prints_no_uncertainty():
    assert str(estimate(1.0, 2.0, math.inf, Kind.UNCERTIFIED)) == "2 (uncertified)"


ENDS = re.compile(r"\[(\S+), (\S+)\]")


@given(estimates(st.floats(-1e300, 1e300, allow_subnormal=False)))
def test_printed_intervals_contain_the_true_ones(given):
    assume(given.upper > given.lower and min(abs(given.lower) or 1, abs(given.upper) or 1) > 1e-290)
    match = ENDS.fullmatch(interval(given))
    assert match
    assert float(match[1]) <= given.lower
    assert float(match[2]) >= given.upper


@given(st.floats(1e-6, 1e6), st.floats(1e-12, 1e-2))
def test_printed_intervals_of_narrow_enclosures_stay_narrow(value, relative):
    given = estimate(value, value, value * (1 + relative))
    assume(given.upper > given.lower)
    match = ENDS.fullmatch(interval(given))
    assert match
    assert float(match[1]) <= given.lower
    assert float(match[2]) >= given.upper
    assert float(match[2]) - float(match[1]) <= 2 * (given.upper - given.lower) + 1e-5 * value
