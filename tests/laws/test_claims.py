"""Every claim of invariance in the catalogue holds, and what is not claimed is seen to fail."""

from dataclasses import replace
from functools import cache
from itertools import cycle

import pytest

from isoflat import testing
from isoflat.measures.catalogue import find_measure, geometries, measures
from isoflat.testing import ARENAS, Invariance, batches, check, drifts, drifts_of

SLOW = ("layerwise", "elementwise")

KINDS = ("mean pooling", "batch normalisation", "two linear maps")
LEAST = tuple(arena for arena in ARENAS if arena.name.startswith(KINDS))
"""One network for each kind of edit, enough that every claim of a measure in a geometry is tight."""

FEW = (*LEAST, *(arena for arena in ARENAS if arena.name == "convolutions, filters"))
"""One more, without which a measure that has its own geometry would pass for proof against single units."""

UNNORMALISED = ["relative_flatness(normalised=0)", "relative_flatness_max(normalised=0)"]
BATCHES = [*batches(measures().values()), ("without normalisation", "euclidean", UNNORMALISED)]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Whatever is attacked meets some networks only, unless a test says otherwise."""
    monkeypatch.setattr(testing, "ARENAS", LEAST)


@pytest.mark.parametrize(
    ("entries", "place", "arenas"),
    [
        pytest.param(entries, place, arenas, id=f"{name or 'own'}-{words}", marks=pytest.mark.slow if slow else ())
        for words in ("few", "all")
        for name, place, entries in BATCHES
        for slow in (name in SLOW or words == "all",)
        for arenas in (ARENAS if words == "all" else LEAST if name in geometries() else FEW,)
    ],
)
def test_claims_hold_and_are_tight(entries, place, arenas, monkeypatch):
    monkeypatch.setattr(testing, "ARENAS", arenas)
    if (
        arenas is LEAST and place == "auto"
    ):  # nothing moves there; long chains, which tell a drift more sharply, are slow
        monkeypatch.setattr(testing, "_brief", lambda entry, kind: _short(entry))
    for label, found in drifts_of(entries, place).items():
        wrong = {str(kind): str(drift) for kind, drift in found.items() if not drift.true}
        assert not wrong, f"{label}: {wrong}"
        assert any(drift.worst is not None for drift in found.values()), f"{label} applies to no network at all"
        silent = [str(kind) for kind, drift in found.items() if drift.worst is None and drift.claimed]
        assert not silent, f"{label} claims what no network can refute: {silent}"


def _short(entry):
    return entry.with_options(**testing.GLANCE) if "chains" in entry.options else entry


def test_every_measure_is_attacked():
    assert {entry.name for _, _, entries in batches(measures().values()) for entry in entries} == set(measures())


def test_several_at_once_drift_as_they_do_alone():
    together = drifts_of(["gradient_norm", "hessian_trace", "fisher_rao_norm"], "euclidean")
    for label in ("gradient_norm", "fisher_rao_norm"):
        assert drifts(label) == together[label]


def test_every_kind_of_edit_has_an_arena():
    assert {arena.invariance for arena in ARENAS} == {arena.invariance for arena in LEAST} == set(Invariance)


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
