"""Every claim of invariance in the catalogue holds, and what is not claimed is seen to fail."""

from dataclasses import replace
from functools import cache
from itertools import cycle

import pytest

from isoflat.measures.catalogue import find_measure, geometries, measures
from isoflat.testing import ARENAS, Invariance, check, drifts, preconditioned, usable

QUICK = ("euclidean", "auto")

PAIRS = [
    pytest.param(name, place, marks=() if entry.geometry or place in QUICK else pytest.mark.slow)
    for name, entry in measures().items()
    for place in ([entry.geometry] if entry.geometry else geometries())
    if name != "preconditioned_edge_of_stability"
]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *PAIRS,
        ("preconditioned_edge_of_stability", preconditioned),
        ("relative_flatness(normalised=0)", "euclidean"),
        ("relative_flatness_max(normalised=0)", "euclidean"),
    ],
)
def test_claims_hold_and_are_tight(name, place):
    found = check(usable(name), place)
    assert any(drift.worst is not None for drift in found.values()), "applies to no network at all"
    silent = [kind for kind, drift in found.items() if drift.worst is None and drift.claimed]
    assert not silent, f"claims what no network can refute: {silent}"


def test_every_kind_of_edit_has_an_arena():
    assert {arena.invariance for arena in ARENAS} == set(Invariance)


@cache
def _false():
    """Negative controls, both ways: what is claimed too much, and what is claimed too little."""
    too_much = replace(find_measure("hessian_spectral_norm"), claims=frozenset(Invariance))
    too_little = replace(find_measure("fisher_rao_norm"), claims=frozenset())
    return drifts(too_much), drifts(too_little)


@pytest.mark.parametrize("kind", Invariance)
def test_a_false_claim_is_refused(kind):
    too_much, too_little = _false()
    assert too_much[kind].true is (kind is Invariance.ORDER)
    assert too_little[kind].true is False


def test_a_false_claim_is_an_error():
    with pytest.raises(AssertionError, match="not claimed"):
        check(replace(find_measure("relative_flatness"), claims=frozenset()))


def test_random_numbers_hide_no_drift_under_scalings():
    """A drift far inside the interval is seen where an edit leaves the draws alone, and is not told from them elsewhere."""
    trace, factors = find_measure("quotient_trace"), cycle((1.0, 1.001))  # before an edit, and after it
    moved = replace(trace, evaluate=lambda findings: trace.evaluate(findings).scaled(next(factors)))
    found = drifts(moved, "layerwise")
    assert found[Invariance.LAYERS].claimed
    assert not found[Invariance.LAYERS].true
    assert found[Invariance.ORDER].true
