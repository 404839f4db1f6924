"""Comparing networks: what an interval may decide, pairing, ties, refusals, and the verb."""

from __future__ import annotations

import inspect
import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import t as student
from scipy.stats import ttest_rel
from torch import nn
from typer.testing import CliRunner

import isoflat
from isoflat.cli.compare import compare as compare_verb
from isoflat.cli.main import app
from isoflat.cli.measure import measure as measure_verb
from isoflat.core.comparison import Basis, Comparison, Difference, Ratio, Verdict
from isoflat.core.errors import IsoflatError, NonFinite, UsageError
from isoflat.core.estimate import Estimate, Kind
from isoflat.core.record import Point, Record
from isoflat.io.several import labels
from isoflat.measurement import compare as module
from isoflat.measurement.compare import contrast, difference

FINITE = st.floats(-1e9, 1e9)


def record(estimate: Estimate, label: str = "a", **changes) -> Record:
    fields = {
        "measure": "quotient_spectral_norm",
        "geometry": "layerwise",
        "group": "positive rescalings",
        "group_hash": "0123456789ab",
        "estimate": estimate,
        "point": Point(0.1, 0.9, 0.02, 0.05, 100, 100.0, 12),
        "label": label,
        "settings": {"seed": 0, "dtype": "float64", "rtol": 1e-3, "probes": 64},
        "model_hash": f"weights of {label}",
        "data_hash": "d",
    }
    return Record(**{**fields, **changes})


def enclosure(lower: float, value: float, upper: float, confidence: float = 0.999) -> Estimate:
    return Estimate(value, lower, upper, confidence, Kind.ENCLOSURE, True)


def sampled(samples, confidence: float = 0.95) -> Estimate:
    """What a trace's solver makes of its samples."""
    samples = np.asarray(samples, dtype=float)
    value, error = float(samples.mean()), float(samples.std(ddof=1) / math.sqrt(len(samples)))
    half = float(student.ppf(0.5 + confidence / 2, len(samples) - 1)) * error
    kept = tuple(samples.tolist())
    return Estimate(
        value, value - half, value + half, confidence, Kind.STANDARD_ERROR, True, standard_error=error, samples=kept
    )


def uncertified(value: float) -> Estimate:
    return Estimate(value, value, math.inf, 0.0, Kind.UNCERTIFIED, True, residual=0.1)


def gap(first: Estimate, second: Estimate, lower_is_flatter: bool = True) -> Difference:
    return difference(record(first, "a"), record(second, "b"), lower_is_flatter)


# What intervals may decide


@st.composite
def enclosed(draw, numbers=FINITE):
    """A number somewhere in an enclosure, and a value somewhere else in it."""
    lower, *between, upper = sorted(draw(st.tuples(numbers, numbers, numbers, numbers)))
    value, truth = draw(st.permutations(between))
    return enclosure(lower, value, upper), truth


@given(enclosed(), enclosed())
def test_the_true_difference_lies_in_the_interval(first, second):
    (a, one), (b, other) = first, second
    found = gap(a, b)
    assert found.lower <= one - other <= found.upper
    assert (found.lower, found.upper) == (a.lower - b.upper, a.upper - b.lower)
    assert found.value == a.value - b.value


@given(enclosed(), enclosed())
def test_a_winner_is_a_winner_wherever_in_their_enclosures_the_numbers_are(first, second):
    (a, one), (b, other) = first, second
    for lower_is_flatter in (True, False):
        winner = gap(a, b, lower_is_flatter).flatter
        if winner is not None:
            assert winner == ("a" if (one < other) == lower_is_flatter else "b")
            assert one != other


@given(enclosed(st.floats(1e-9, 1e9)), enclosed(st.floats(1e-9, 1e9)))
def test_the_true_ratio_lies_in_its_interval(first, second):
    (a, one), (b, other) = first, second
    ratio = gap(a, b).ratio
    assert ratio is not None
    assert ratio.lower <= one / other <= ratio.upper


def test_failure_probabilities_add():
    found = gap(enclosure(1, 2, 3, confidence=0.99), enclosure(4, 5, 6, confidence=0.98))
    assert found.confidence == pytest.approx(0.97, rel=1e-12)
    assert found.basis is Basis.INTERVALS


def test_intervals_that_touch_are_a_tie():
    assert gap(enclosure(1, 2, 3), enclosure(3, 4, 5)).verdict is Verdict.TIE
    apart = gap(enclosure(1, 2, 3), enclosure(math.nextafter(3, 4), 4, 5))
    assert (apart.verdict, apart.flatter) == (Verdict.FLATTER, "a")


def test_directions():
    low, high = enclosure(1, 1, 1.1), enclosure(2, 2, 2.1)
    assert gap(low, high, lower_is_flatter=True).flatter == "a"
    assert gap(low, high, lower_is_flatter=False).flatter == "b"


@pytest.mark.parametrize("other", [uncertified(1000.0), enclosure(999, 1000, 1001)])
def test_uncertified_values_never_decide(other):
    for found in (gap(uncertified(1.0), other), gap(other, uncertified(1.0))):
        assert found.verdict is Verdict.NOT_DECIDED
        assert found.flatter is None
        assert (found.lower, found.upper) == (-math.inf, math.inf)
        assert found.ratio is not None
        assert math.isinf(found.ratio.upper)
        assert "certificate" in found.remedy


def test_no_ratio_of_numbers_that_are_not_positive():
    assert gap(enclosure(-2, -1, 1), enclosure(1, 2, 3)).ratio is None
    open_end = gap(enclosure(1, 2, 3), enclosure(-1, 1, 2)).ratio
    assert open_end == Ratio(2.0, -math.inf, math.inf)


# The same probes


@pytest.fixture
def paired():
    """Samples that vary together, and differ by little."""
    rng = np.random.default_rng(0)
    shared = rng.normal(100, 10, 64)
    return shared + rng.normal(0, 0.5, 64) + 1.0, shared


def test_paired_samples_give_the_interval_of_a_paired_t_test(paired):
    found = gap(*map(sampled, paired))
    oracle = ttest_rel(*paired).confidence_interval(0.95)
    assert found.basis is Basis.PROBES
    assert (found.lower, found.upper) == pytest.approx((oracle.low, oracle.high), rel=1e-10)
    assert found.value == pytest.approx(float(np.mean(paired[0] - paired[1])), rel=1e-12)
    assert found.verdict is Verdict.SHARPER


def test_only_the_same_probes_are_paired(paired):
    """Negative control: without pairing, or paired wrongly, the same numbers decide nothing."""
    one, other = map(sampled, paired)
    close = gap(one, other)
    for first, second in (
        (record(one), record(sampled(np.random.default_rng(1).permutation(paired[1])), "b")),
        (record(one), record(replace(other, samples=()), "b")),
        (record(one), record(other, "b", settings={"seed": 1, "rtol": 1e-3, "probes": 64})),
        (record(one), record(other, "b", point=Point(0.1, 0.9, 0.02, 0.05, 100, 100.0, 13))),
    ):
        loose = difference(first, second, True)
        assert loose.verdict is Verdict.TIE
        assert loose.upper - loose.lower > 5 * (close.upper - close.lower)


def test_paired_intervals_cover_as_often_as_stated():
    """Difference and ratio; and not for too short an interval."""
    rng, hits = np.random.default_rng(2), np.zeros(3)
    for _ in range(1500):
        shared = rng.normal(10, 3, 12)
        a, b = shared * 1.5 + rng.normal(0, 1, 12), shared + rng.normal(0, 1, 12)
        found = gap(sampled(a), sampled(b))
        narrow = 0.8 * (found.upper - found.value)
        hits += (
            found.lower <= 5.0 <= found.upper,
            found.ratio.lower <= 1.5 <= found.ratio.upper,
            abs(found.value - 5.0) <= narrow,
        )
    difference_, ratio, short = hits / 1500
    assert 0.93 <= difference_ <= 0.97
    assert 0.93 <= ratio <= 0.97
    assert short < 0.92


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=2, max_size=8))
def test_ratio_and_difference_agree_on_who_is_flatter(pairs):
    a, b = zip(*pairs, strict=True)
    found = gap(sampled(a), sampled(b))
    assume(found.basis is Basis.PROBES and math.isfinite(found.ratio.upper))
    assume(min(abs(found.lower), abs(found.upper)) > 1e-6)  # at a tie to the last digit rounding decides
    assert (found.lower <= 0 <= found.upper) == (found.ratio.lower <= 1 <= found.ratio.upper)


def test_rounding_of_products_widens_the_paired_interval(paired):
    one, other = map(sampled, paired)
    noisy = replace(one, lower=one.lower - 0.25, upper=one.upper + 0.25)
    plain, wide = gap(one, other), gap(noisy, other)
    assert wide.upper - plain.upper == pytest.approx(0.25, rel=1e-9)
    assert wide.ratio.upper > plain.ratio.upper


def test_a_mean_that_may_be_zero_has_no_ratio():
    found = gap(sampled([1.0, 2.0, 3.0]), sampled([-5.0, 1.0, 5.0]))
    assert found.ratio is not None
    assert math.isinf(found.ratio.upper)


# Ties and what would decide them


def test_the_remedy_of_a_tie_is_enough():
    a, b = enclosure(1.0, 1.0, 1.001), enclosure(1.0004, 1.0004, 1.0014)
    remedy = gap(a, b).remedy
    tolerance = float(re.search(r"rtol=(\S+) instead of 0.001 ", remedy)[1])
    narrow = [enclosure(e.value, e.value, e.value * (1 + tolerance)) for e in (a, b)]
    assert gap(*narrow).verdict is Verdict.FLATTER
    wide = [enclosure(e.value, e.value, e.value * (1 + 10 * tolerance)) for e in (a, b)]
    assert gap(*wide).verdict is Verdict.TIE


def test_the_number_of_probes_that_would_decide_a_tie_is_enough():
    rng = np.random.default_rng(3)
    shared, noise = rng.normal(100, 10, 5000), rng.normal(0.2, 1, 5000)
    few = gap(sampled((shared + noise)[:16]), sampled(shared[:16]))
    assert few.verdict is Verdict.TIE
    wanted = int(re.search(r"probes=(\d+) instead of 16", few.remedy)[1])
    # That many, if they look like these: as many copies, whose mean and deviation are the same.
    again = [np.tile(samples[:16], -(-wanted // 16)) for samples in (shared + noise, shared)]
    assert gap(*map(sampled, again)).verdict is Verdict.SHARPER


def test_remedies_know_what_no_tolerance_can_do():
    close = enclosure(1.0, 1.0, 1.001), enclosure(1.0 + 1e-6, 1.0 + 1e-6, 1.002)
    single = [
        record(e, label, settings={"dtype": "float32", "rtol": 1e-3}) for e, label in zip(close, "ab", strict=True)
    ]
    assert "float64" in difference(*single, True).remedy
    assert "float64" not in gap(*close).remedy
    same = gap(enclosure(1.0, 1.0, 1.001), enclosure(1.0, 1.0, 1.002))
    assert "to the last digit" in same.remedy
    noisy = [replace(e, lower=e.lower - 0.1, upper=e.upper + 0.1) for e in map(sampled, ([1.0, 3.0], [1.0, 3.001]))]
    assert "agree to rounding" in gap(*noisy).remedy
    budget = replace(close[0], upper=2.0, converged=False)
    assert "not all have converged" in gap(budget, close[1]).remedy
    assert gap(enclosure(1, 1, 1), enclosure(2, 2, 2)).remedy == ""


# Side by side


def table(estimate: Estimate, label: str, **changes) -> isoflat.Table:
    return isoflat.Table((record(estimate, label, **changes),))


@pytest.fixture
def four():
    """One clearly flattest, two that tie, one clearly sharpest; the reference is the second."""
    sizes = {"d": (9, 9, 9.1), "b": (2, 2, 3), "a": (1, 1, 1.1), "c": (2.5, 2.5, 3.5)}
    return contrast([table(enclosure(*ends), label) for label, ends in sizes.items()], reference="b")


def test_ranks_say_what_is_not_decided(four):
    assert four.ranks() == {"d": (4, 4), "b": (2, 3), "a": (1, 1), "c": (2, 3)}
    assert four.flattest() == "a"
    assert "a is flatter than all others" in four.sentence()
    assert "c and b" in four.sentence()


def test_every_pair_is_there_once_and_the_reference_is_never_first(four):
    pairs = [(found.first, found.second) for found in four]
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == 6
    assert all(first != "b" for first, _ in pairs)
    assert four.reference == "b"


def test_differences_can_be_asked_for_either_way_round(four):
    one, other = four.between("a", "d"), four.between("d", "a")
    assert (one.value, one.lower, one.upper) == (-other.value, -other.upper, -other.lower)
    assert one.flatter == other.flatter == "a"
    assert one.ratio.value == pytest.approx(1 / other.ratio.value, rel=1e-15)
    assert one.ratio.lower <= one.ratio.value <= one.ratio.upper
    with pytest.raises(KeyError):
        four.between("a", "e")


def test_printed_in_every_form(four):
    for text in (str(four), four._repr_html_()):
        for words in ("difference to b", "tie", "sharper", "2–3", "is flatter than all others"):
            assert words in text
    rows = [line for line in str(four).splitlines() if re.match(r" *\d(–\d)? +[abcd] ", line)]
    assert [re.search(r"[abcd]", row)[0] for row in rows] == ["a", "b", "c", "d"]


def test_labels_are_no_markup():
    odd = contrast([table(enclosure(1, 1, 1), "[red]x[/]"), table(enclosure(2, 2, 2), "[/bold]")])
    assert "[red]x[/]" in str(odd)
    assert "[/bold]" in str(odd)


def test_json_round_trip_is_exact_and_strict(four):
    rows = [table(estimate, label) for label, estimate in
            (("u", uncertified(3.3)), ("s", sampled([0.1, 0.7, 0.3])), ("t", sampled([0.2, 0.75, 0.35])))]  # fmt: skip
    for found in (four, contrast(rows)):
        text = found.to_json()
        json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))
        assert Comparison.from_json(text) == found
    with pytest.raises(UsageError, match="schema"):
        Comparison.from_dict({**four.to_dict(), "schema": 0})


def test_notes_that_differ_in_numbers_only_are_one_line():
    def noting(label: str, *notes: str) -> isoflat.Table:
        return table(replace(enclosure(1, 1, 1), notes=notes), label)

    two = noting("a", "holds to 2e-09 in 0.weight"), noting("b", "holds to 8e-06 in 0.weight", "at 3 of 4.bias")
    assert contrast(two).remarks == ("holds to 2e-09 to 8e-06 in 0.weight", "b: at 3 of 4.bias")
    assert contrast([*two, noting("c")]).remarks[0] == "a, b: holds to 2e-09 to 8e-06 in 0.weight"
    assert "note: b: at 3 of 4.bias" in str(contrast(two))


def test_unequal_losses_are_warned_about():
    def at(loss: float) -> Point:
        return Point(loss, 0.9, 0.02, 0.05, 100, 100.0, 12)

    for other, warned in ((0.105, False), (0.2, True), (0.0, True)):
        found = contrast([table(enclosure(1, 1, 1), "a"), table(enclosure(2, 2, 2), "b", point=at(other))])
        assert any("losses differ" in note for note in found.notes) == warned


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group_hash": "other"}, "group of layerwise"),
        ({"data_hash": "other"}, "data"),
        ({"settings": {"seed": 0, "dtype": "float32"}}, "precision"),
        ({"settings": {"seed": 1, "dtype": "float64"}}, "seed"),
        ({"settings": {"seed": 0, "dtype": "float64", "logits": "normalised"}}, "logits"),
        ({"point": Point(0.1, 0.9, 0.02, 0.05, 100, 99.0, 12)}, "counted targets"),
        ({"point": Point(0.1, None, 0.02, 0.05, 100, 100.0, 12)}, "accuracy"),
        ({"measure": "quotient_largest_eigenvalue"}, "numbers"),
        ({"versions": {"measure": "2"}}, "version of quotient_spectral_norm"),
    ],
)
def test_what_differs_is_named_and_refused(changes, words):
    estimate = enclosure(1, 1, 1)
    contrast([table(estimate, "a"), table(estimate, "b")])
    with pytest.raises(UsageError, match=rf"b cannot be compared with a: they differ in {words} \("):
        contrast([table(estimate, "a"), table(estimate, "b", **changes)])


def test_tables_need_labels_of_their_own():
    with pytest.raises(UsageError, match="own label"):
        contrast([table(enclosure(1, 1, 1), "a"), table(enclosure(2, 2, 2), "a")])


# Networks


def net(seed: int = 0, activation: type[nn.Module] = nn.ReLU, width: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), activation(), nn.Linear(width, 3)).double()


DATA = (
    torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    torch.arange(40) % 3,
)
BOTH = {"measures": ["quotient_spectral_norm", "quotient_trace"], "probes": 8}


def compared(models, **settings) -> Comparison:
    return isoflat.compare(models, DATA, nn.CrossEntropyLoss(), **settings)


def test_identical_checkpoints_differ_by_exactly_nothing():
    """Check 51, for enclosures and for stochastic numbers, certified or not."""
    for certify, geometry in ((True, "auto"), (False, "layerwise")):
        found = compared({"a": net(), "b": net(), "c": net(1)}, certify=certify, geometry=geometry, **BOTH)
        for number in found.numbers:
            same = found.between("b", "a", number)
            assert (same.value, same.lower, same.upper, same.confidence) == (0.0, 0.0, 0.0, 1.0)
            assert same.ratio == Ratio(1.0, 1.0, 1.0)
            assert same.verdict is Verdict.IDENTICAL
            assert found.ranks(number)["a"] == found.ranks(number)["b"]
            assert found.between("c", "a", number).verdict is not Verdict.IDENTICAL
        assert "Identical weights" in found.sentence()


def test_equal_weights_in_different_networks_are_not_identical():
    found = compared({"relu": net(), "tanh": net(activation=nn.Tanh)}, measures=["hessian_spectral_norm"])
    assert found.rows[0].model_hash == found.rows[1].model_hash
    assert found.between("relu", "tanh").verdict in (Verdict.FLATTER, Verdict.SHARPER)
    assert any("identical weights, but" in note for note in found.notes)


def test_a_number_that_cannot_be_moved_ties_with_itself_and_the_plain_one_does_not():
    model = net()
    twin = isoflat.reparametrize(model, isoflat.symmetries(model, DATA[0]), seed=1, spread=2)
    found = compared({"net": model, "twin": twin}, measures=["quotient_spectral_norm", "hessian_spectral_norm"])
    assert found.between("net", "twin", ("quotient_spectral_norm", "auto")).verdict is Verdict.TIE
    plain = found.between("twin", "net", ("hessian_spectral_norm", "euclidean"))
    assert plain.verdict is Verdict.SHARPER
    assert any("rescaling moves them" in note for note in found.notes)


def test_the_same_numbers_as_measured_alone_and_the_same_probes():
    models = {"a": net(), "b": net(1)}
    found = compared(models, reference="b", seed=3, **BOTH)
    for label, model in models.items():
        alone = isoflat.measure_all(model, DATA, nn.CrossEntropyLoss(), seed=3, **BOTH)
        for mine, theirs in zip(found[label], alone, strict=True):
            assert replace(mine.estimate, cost=theirs.estimate.cost) == theirs.estimate
    trace = found.between("a", "b", ("quotient_trace", "auto"))
    assert trace.basis is Basis.PROBES
    assert [(gap.first, gap.second) for gap in found] == [("a", "b")] * 2
    assert all(len(found[label]["quotient_trace"].estimate.samples) == 8 for label in models)
    with pytest.raises(KeyError):
        found["c"]


def test_following_the_advice_decides_a_tie():
    close = net()
    with torch.no_grad():
        close[0].weight *= 1 + 2e-4
        close[2].bias += 2e-4
    models = {"net": net(), "close": close}
    loose = compared(models, rtol=0.05, geometry="layerwise")
    assert loose.between("close", "net").verdict is Verdict.TIE
    tolerance = float(re.search(r"rtol=(\S+) ", loose.between("close", "net").remedy)[1])
    tight = compared(models, rtol=tolerance, geometry="layerwise")
    assert tight.between("close", "net").flatter is not None
    assert tight.flattest() == tight.between("close", "net").flatter


def test_numbers_of_other_groups_are_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(module, "tabulate", lambda *_, **__: pytest.fail("measured"))
    models = {"narrow": net(), "wide": net(width=6)}
    for geometry in ("auto", "layerwise"):
        with pytest.raises(UsageError, match="wide cannot be compared with narrow") as caught:
            compared(models, geometry=geometry)
        assert "euclidean" in str(caught.value)
    with pytest.raises(UsageError, match=r"differ in group \("):
        compared({"relu": net(), "tanh": net(activation=nn.Tanh)})
    with pytest.raises(UsageError, match=r"differ in precision \(float32 against float64\)"):
        compared({"double": net(), "single": net().float()}, geometry="layerwise")
    with pytest.raises(UsageError, match="differ in trainable tensors"):
        frozen = net()
        frozen[0].weight.requires_grad_(False)
        compared({"whole": net(), "frozen": frozen})
    poisoned = net()
    with torch.no_grad():
        poisoned[2].weight[0, 0] = math.nan
    with pytest.raises(NonFinite, match=r"^bad: .*2\.weight"):
        compared({"good": net(), "bad": poisoned})


def test_plain_numbers_of_any_two_networks_are_compared_with_a_warning():
    found = compared({"narrow": net(), "wide": net(width=6)}, measures=["hessian_spectral_norm"])
    assert found.between("narrow", "wide").basis is Basis.INTERVALS
    assert any("not even have the same tensors" in note for note in found.notes)


def test_networks_of_different_size_have_no_common_probes():
    sizes = {"narrow": net(), "wide": net(width=6)}
    found = compared(sizes, measures=["quotient_trace"], geometry="euclidean", probes=4)
    assert found.between("narrow", "wide").basis is Basis.INTERVALS


def test_data_that_changes_between_networks_is_refused_at_once(monkeypatch):
    class Drifting:
        """Repeats itself for one measurement, and gives other rows to the next network."""

        first = True

        def __iter__(self):
            yield (DATA[0] + (0.0 if self.first else 1.0), DATA[1])

    data, measured = Drifting(), []

    tabulate = module.tabulate

    def spoiled(model, data_, loss, plan, settings, label):
        measured.append(label)
        found = tabulate(model, data_, loss, plan, settings, label)
        data.first = False
        return found

    monkeypatch.setattr(module, "tabulate", spoiled)
    three = {"a": net(), "b": net(1), "c": net(2)}
    with pytest.raises(UsageError, match="b cannot be compared with a: they differ in data"):
        isoflat.compare(three, data, nn.CrossEntropyLoss(), geometry="layerwise")
    assert measured == ["a", "b"]


@pytest.mark.parametrize(
    ("models", "settings", "words"),
    [
        ({"a": net()}, {}, "at least two networks"),
        ({}, {}, "at least two networks"),
        ({"a": net(), "": net()}, {}, "own label"),
        ({"a": net(), "b": net()}, {"reference": "c"}, "none of the networks"),
        ({"a": net(), "b": net()}, {"measures": ["quotient_norm"]}, "unknown measure"),
        ({"a": net(), "b": net()}, {"rtol": 2.0, "geometry": "layerwise"}, "^rtol must lie"),
        ({"a": net(), "b": net()}, {"measures": []}, "at least one measure"),
        ({"a": net(), "b": nn.Identity()}, {}, "^b: "),
    ],
)
def test_wrong_arguments_are_refused(models, settings, words):
    with pytest.raises(IsoflatError, match=words):
        compared(models, **settings)


def test_losses_that_networks_carry_cannot_be_checked():
    class Carrying(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x, labels):
            return {"loss": nn.functional.cross_entropy(self.inner(x), labels), "logits": self.inner(x)}

    models = {"a": Carrying(net()), "b": Carrying(net(1))}
    batches = [{"x": DATA[0], "labels": DATA[1]}]
    found = isoflat.compare(models, batches, geometry="layerwise", measures=["quotient_spectral_norm"])
    assert any("its own loss" in note for note in found.notes)
    assert not any("its own loss" in note for note in compared({"a": net(), "b": net(1)}, geometry="layerwise").notes)


def test_symmetries_of_one_network_are_not_those_of_another():
    with pytest.raises(UsageError, match="belongs to one network"):
        compared({"a": net(), "b": net(1)}, symmetries=isoflat.symmetries(net(), DATA[0]))


def test_networks_are_not_changed_and_one_may_be_given_twice():
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = compared({"once": model, "again": model}, geometry="layerwise")
    assert found.between("again", "once").verdict is Verdict.IDENTICAL
    assert found.flattest() is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# The verb

NETS = """
import torch
from torch import nn

calls = []

def build():
    return nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))

shared = build()

def cached():
    return shared

def rows():
    calls.append(1)
    generator = torch.Generator().manual_seed(0)
    return torch.rand(60, 64, generator=generator), torch.arange(60) % 10
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "compare_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")  # heads of tables in one line
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("compare_nets", None)
    import compare_nets

    for seed, name in enumerate(("small", "large")):
        torch.manual_seed(seed)
        save_file(compare_nets.build().state_dict(), tmp_path / f"{name}.safetensors")
    save_file({"0.weight": torch.zeros(3, 3)}, tmp_path / "wrong.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "small.safetensors").read_bytes()[:200])
    return tmp_path


def run(*arguments, model: str = "compare_nets:build"):
    named = ("compare", "--model", model, "--data", "compare_nets:rows")
    return CliRunner().invoke(app, [*named, *arguments])


def test_the_verb_prints_who_is_flatter_and_reads_the_data_once(folder):
    result = run("small.safetensors", "large.safetensors")
    assert result.exit_code == 0, result.output
    assert "is flatter than" in result.stdout
    assert "difference to small" in " ".join(result.stdout.split())
    assert len(sys.modules["compare_nets"].calls) == 1


def test_json_is_strict_and_reads_back(folder):
    result = run(
        "small.safetensors", "large.safetensors", "--reference", "large.safetensors", "--json", "--out", "o.json"
    )
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert json.loads((folder / "o.json").read_text()) == content
    found = Comparison.from_dict(content)
    assert found.reference == "large"
    assert found.between("small", "large").flatter == content["ranks"][0]["flattest"]
    assert content["subject"]["weights"] == {"small": "small.safetensors", "large": "large.safetensors"}
    assert content["differences"][0]["first"] == "small"


def test_what_did_not_converge_ends_with_3(folder):
    result = run("small.safetensors", "large.safetensors", "--max-products", "3", "--geometry", "layerwise")
    assert result.exit_code == 3
    assert "not converged" in result.stdout


def test_a_bad_checkpoint_is_one_line_before_anything_is_measured(folder, monkeypatch):
    monkeypatch.setattr(module, "tabulate", lambda *_, **__: pytest.fail("measured"))
    for arguments, words in (
        (("small.safetensors", "absent.safetensors"), "absent.safetensors"),
        (("small.safetensors", "wrong.safetensors"), "wrong.safetensors"),
        (("cut.safetensors", "small.safetensors"), "cut.safetensors"),
        (("small.safetensors",), "two checkpoints or more"),
        (("small.safetensors", "large.safetensors", "--reference", "other"), "--reference other"),
        (("small.safetensors", "large.safetensors", "--measure", "quotient_norm"), "quotient_spectral_norm"),
        (("small.safetensors", "large.safetensors", "--rtol", "2"), "rtol"),
        (("small.safetensors", "large.safetensors", "--out", "small.safetensors"), "--force"),
    ):
        result = run(*arguments, "--out", "out.json") if "--out" not in arguments else run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""
        assert not (folder / "out.json").exists()


def test_a_factory_that_returns_one_network_again_is_refused(folder):
    result = run("small.safetensors", "large.safetensors", model="compare_nets:cached")
    assert result.exit_code == 2
    assert "anew at each call" in result.stderr


def test_the_same_file_twice_is_identical(folder):
    result = run("small.safetensors", "small.safetensors", "--geometry", "layerwise")
    assert result.exit_code == 0, result.output
    assert "small (2)" in result.stdout
    assert "Identical weights, a difference of exactly 0" in " ".join(result.stdout.split())


def test_the_verb_has_the_options_of_measure():
    """All of them, by the same definitions; orbits and witnesses are measure's own, checkpoints and a report compare's."""
    own, theirs = (inspect.signature(verb).parameters for verb in (compare_verb, measure_verb))
    for name in theirs.keys() - {"model", "data", "weights", "orbit", "witness"}:
        assert own[name].annotation == theirs[name].annotation
        assert own[name].default == theirs[name].default
    assert own.keys() - theirs.keys() == {"context", "checkpoints", "reference", "report"}


def test_labels_tell_files_apart(tmp_path):
    assert labels([tmp_path / "x/best.pt", tmp_path / "y/best.pt"]) == ["x/best", "y/best"]
    assert labels([tmp_path / "x/m.pt", tmp_path / "x/m.ckpt", tmp_path / "y/m.pt"]) == ["x/m.pt", "x/m.ckpt", "y/m.pt"]
    odd = labels([tmp_path / "a\x1b[31m.pt", tmp_path / "a\x1b[31m.pt"])
    assert len(set(odd)) == 2
    assert not any("\x1b" in label for label in odd)


@pytest.mark.slow
def test_the_commands_of_the_guide_run(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[2] / "docs/howto/compare-checkpoints.md").read_text(encoding="utf-8")
    blocks = [code for _, code in re.findall(r"^```(\w*)\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)]
    (module_,) = (code for code in blocks if "def build" in code)
    (usage,) = (code for code in blocks if "isoflat.compare(" in code)
    (shell,) = (code for code in blocks if code.startswith("python nets.py"))
    (later,) = (code for code in blocks if code.startswith("mkdir runs"))
    (tmp_path / "nets.py").write_text(module_, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    train, command = shell.splitlines()
    assert train == "python nets.py"
    subprocess.run([sys.executable, "nets.py"], check=True)
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert "small is flatter than large" in result.stdout
    (tmp_path / "runs").mkdir()
    for line in later.splitlines()[1:4]:  # the last line needs an experiment of minutes
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, (line, result.output)
    assert "small is flatter than large" in result.stdout
    names = {"small": net(), "large": net(1), "data": DATA, "loss": nn.CrossEntropyLoss(), "isoflat": isoflat}
    exec(usage, names)
    assert names["found"].numbers[1] == ("quotient_trace", "auto")
