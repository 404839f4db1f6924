"""Printed numbers: a value lies inside its printed interval, which contains the stored one."""

from __future__ import annotations

import math
import re
from decimal import Decimal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from isoflat.core.render import bounds, concise, estimated, outwards, significant, some, visible

FLOATS = st.floats(allow_nan=False, allow_infinity=False) | st.floats(-10, 10) | st.integers(-20000, 20000).map(float)


@st.composite
def intervals(draw):
    """A value in an interval: wide, narrow, one-sided, degenerate, of any magnitude and sign."""
    value = draw(FLOATS)
    reach = st.sampled_from([0.0, 1e-15, 1e-9, 1e-3, 0.02, 0.3, 5.0]) | st.floats(0, 2)
    below, above = draw(reach), draw(reach)
    size = abs(value) or draw(st.sampled_from([1.0, 1e-9, 1e7]))
    lower, upper = value - below * size, value + above * size
    assume(math.isfinite(lower) and math.isfinite(upper))
    return lower, value, upper


def _ends(text):
    match = re.fullmatch(r"\[(\S+), (\S+)\]", text)
    assert match, text
    return Decimal(match[1]), Decimal(match[2])


def _centre(text):
    """The number before the brackets, with its power of ten."""
    match = re.fullmatch(r"(-?[\d.]+)(?:\([\d]+\))?(e[+-]\d+)?(?:\(inf\))?", text)
    assert match, text
    return Decimal(match[1] + (match[2] or ""))


@given(intervals())
def test_values_lie_inside_printed_intervals_and_these_contain_the_stored_ones(given):
    lower, value, upper = given
    least, most = _ends(bounds(lower, upper))
    assert float(least) <= lower
    assert float(most) >= upper
    for text in (concise(value, lower, upper), estimated(value, lower, upper), significant(value, lower, upper, 6)):
        if lower < upper or abs(value) > 1e-300:
            assert least <= _centre(text) <= most, text


@given(intervals())
def test_a_printed_value_is_near_the_stored_one(given):
    """By a unit of the digit in brackets at most, which is no more than the distance to the farther end allows."""
    lower, value, upper = given
    assume(lower < upper)
    text = concise(value, lower, upper)
    uncertainty = max(Decimal(upper) - Decimal(value), Decimal(value) - Decimal(lower))
    assert abs(_centre(text) - Decimal(value)) <= uncertainty * Decimal("1.0001") + Decimal(math.ulp(value))
    bracket = re.search(r"\((\d+)\)", text)
    digits = len(text.partition("(")[0].partition(".")[2])
    exponent = int(text.partition("e")[2] or 0)
    reach = Decimal(bracket[1]).scaleb(exponent - digits)
    assert reach >= uncertainty * Decimal("0.9999") - Decimal(math.ulp(value))
    assert reach <= 2 * uncertainty * Decimal("1.0001") + Decimal(math.ulp(value))


@given(intervals(), st.sampled_from([1, 100]), st.integers(2, 6))
def test_shares_in_any_unit(given, unit, digits):
    lower, value, upper = given
    assume(lower < upper and abs(value) < 1e300 and max(abs(lower), abs(upper)) < 1e300)
    text = significant(value, lower, upper, digits, unit)
    low, high = outwards(lower, digits, -1, unit=unit), outwards(upper, digits, 1, unit=unit)
    assert Decimal(low) <= Decimal(text) <= Decimal(high)


@given(FLOATS)
def test_a_number_without_uncertainty_reads_back_to_twelve_digits(value):
    assume(not value or abs(value) > 1e-300)
    assert float(concise(value, value, value)) == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize(
    ("lower", "value", "upper", "shown", "interval"),
    [
        (12121.3, 12121.3, 12418.0, "12200(300)", "[12121.3, 12418.0]"),
        (0.0, 0.0, 0.0, "0", "[0, 0]"),
        (0.0, 0.0, 3e-9, "0(3)e-09", "[0.00000, 3.00000e-09]"),
        (-0.877, -0.8731, -0.8692, "-0.873(4)", "[-0.877000, -0.869200]"),
        (1 / 3, 1 / 3, 1 / 3, "0.333333333333", "[0.333333333333, 0.333333333334]"),
        (0.1234567891, 0.1234567891, math.inf, "0.123457(inf)", "[0.123456, inf]"),
        (-math.inf, 2.0, math.inf, "2(inf)", "[-inf, inf]"),
        (9.9865, 9.996, 10.0055, "10.00(1)", "[9.98650, 10.0055]"),
        (9.996, 9.996, 9.9997, "9.996(4)", "[9.99600, 9.99970]"),
        (0.996, 0.9961, 0.9963, "0.9961(2)", "[0.996000, 0.996300]"),
        (9991.0, 9991.0, 9999.9, "9991(9)", "[9991.00, 9999.90]"),
    ],
)
def test_by_hand(lower, value, upper, shown, interval):
    assert concise(value, lower, upper) == shown
    assert bounds(lower, upper) == interval


def test_a_difference_that_excludes_zero_is_never_shown_as_zero():
    assert estimated(0.0004, 0.0001, 0.02) not in ("0", "0.0", "0.00", "0.000")
    assert float(estimated(0.0004, 0.0001, 0.02)) > 0


def test_lists_are_cut_short():
    assert some([]) == ""
    assert some(["a"]) == "a"
    assert some(range(9), most=3) == "0, 1, 2 and 6 more"
    assert some(["x" * 90]) == "x" * 77 + "..."
    assert visible("a\x1b[1mb") == "a\\x1b[1mb"
