"""Every claim of invariance in the catalogue holds, and what is not claimed is seen to fail."""

from dataclasses import replace

import pytest

from isoflat.measures.catalogue import find_measure, geometries, measures
from isoflat.testing import ARENAS, Invariance, check, drifts, usable

QUICK = ("euclidean", "auto")

PAIRS = [
    pytest.param(name, place, marks=() if entry.geometry or place in QUICK else pytest.mark.slow)
    for name, entry in measures().items()
    for place in ([entry.geometry] if entry.geometry else geometries())
]


@pytest.mark.parametrize(
    ("name", "place"),
    [*PAIRS, ("relative_flatness(normalised=0)", "euclidean"), ("relative_flatness_max(normalised=0)", "euclidean")],
)
def test_claims_hold_and_are_tight(name, place):
    found = check(usable(name), place)
    assert any(drift.worst is not None for drift in found.values()), "applies to no network at all"
    silent = [kind for kind, drift in found.items() if drift.worst is None and drift.claimed]
    assert not silent, f"claims what no network can refute: {silent}"


def test_every_kind_of_edit_has_an_arena():
    assert {arena.invariance for arena in ARENAS} == set(Invariance)


@pytest.mark.parametrize("kind", Invariance)
def test_a_false_claim_is_refused(kind):
    """Negative control, both ways: what is claimed too much, and what is claimed too little."""
    too_much = replace(find_measure("hessian_spectral_norm"), claims=frozenset(Invariance))
    too_little = replace(find_measure("tic"), claims=frozenset())
    assert drifts(too_much)[kind].true is (kind is Invariance.ORDER)
    assert drifts(too_little)[kind].true is False
    with pytest.raises(AssertionError, match="not claimed"):
        check(too_little)
