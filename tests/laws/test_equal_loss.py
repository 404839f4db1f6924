"""Scores scaled to a wanted loss: what grows with all weights of a network is taken out of every number."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import isoflat
from cases.networks import Case, cnn, mlp

NUMBERS = (
    "quotient_spectral_norm",
    "quotient_trace",
    "gauss_newton_trace",
    "fisher_trace",
    "tic_diagonal",
    "relative_flatness",
    "relative_flatness_max",
    "neuronwise_flatness",
    "feature_robustness",
    "fisher_rao_norm",
    "gradient_norm",
)
"""In units of the weights' own size. Traces in plain units, such as minimum sharpness, see the size of the weights behind the
scores as well."""


def head_times(case: Case, factor: float) -> nn.Module:
    grown = copy.deepcopy(case.net)
    with torch.no_grad():
        for parameter in grown[-1].parameters():
            parameter.mul_(factor)
    return grown


def table(net: nn.Module, case: Case, criterion=None, **options) -> isoflat.Table:
    criterion = criterion or case.criterion
    return isoflat.measure_all(net, case.data, criterion, rtol=1e-8, budget=60, geometry="auto", **options)


def nearly_right(case: Case) -> Case:
    """Labels are what the network says, but for one row: its loss is below chance, and has a least."""
    with torch.no_grad():
        labels = case.net(case.inputs).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    return Case(case.net, case.inputs, labels, case.criterion)


def small() -> Case:
    return nearly_right(mlp((5, 6, 4, 3), bias=False, seed=3))


CASES = {"multilayer": small, "convolutional": lambda: nearly_right(cnn(3, bias=False, seed=5))}
"""Without biases: then growing the last layer grows all weights of the canonical representative alike."""


def note_of(row) -> float:
    """The factor that a row's notes say."""
    note = next(note for note in row.estimate.notes if "multiplied" in note)
    return float(note.split("multiplied by ")[1].split(",")[0])


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_one_that_was_asked_for(name):
    case = CASES[name]()
    for wanted in (0.9, 1.05):
        (row,) = table(case.net, case, measures=["gradient_norm"], logits=f"loss={wanted}")
        assert row.point.loss == pytest.approx(wanted, rel=1e-13)
        assert row.settings["logits"] == f"loss={wanted}"
        assert note_of(row) > 0


@pytest.mark.parametrize("name", CASES)
def test_growing_the_scores_moves_nothing(name):
    """Granziol's attack: all scores × 3. At the raw loss, the control, every number moves."""
    case = CASES[name]()
    grown = head_times(case, 3.0)
    for options, still in (({"logits": "loss=1"}, True), ({}, False)):
        for a, b in zip(*(table(net, case, measures=NUMBERS, **options) for net in (case.net, grown)), strict=True):
            same = b.estimate.value == pytest.approx(a.estimate.value, rel=1e-6)
            assert same is still, (a.measure, a.estimate.value, b.estimate.value)


def test_numbers_are_those_of_a_head_that_was_scaled_by_hand():
    case = small()
    found = table(case.net, case, measures=NUMBERS, logits="loss=1")
    plain = table(head_times(case, note_of(found[0])), case, measures=NUMBERS)
    for a, b in zip(found, plain, strict=True):
        assert a.estimate.value == pytest.approx(b.estimate.value, rel=2e-5), a.measure  # the note has six digits


class Directions(nn.Module):
    """What logits='normalised' says it does."""

    def forward(self, z):
        z = z - z.mean(1, keepdim=True)
        return z / z.norm(dim=1, keepdim=True)


def test_normalised_numbers_are_those_of_a_network_that_normalises():
    case = mlp((5, 6, 4, 3), bias=True, seed=3)
    names = ["gauss_newton_trace", "fisher_trace", "fisher_rao_norm", "hessian_spectral_norm", "tic_diagonal"]
    options = {"measures": names, "geometry": "euclidean", "rtol": 1e-8}
    ours = isoflat.measure_all(case.net, case.data, case.criterion, logits="normalised", **options)
    theirs = isoflat.measure_all(nn.Sequential(case.net, Directions()), case.data, case.criterion, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert a.estimate.value == pytest.approx(b.estimate.value, rel=1e-9), a.measure


@pytest.mark.parametrize("logits", ["loss=1", "normalised"])
def test_losses_of_log_probabilities_are_the_same(logits):
    case = small()
    log = nn.Sequential(*case.net, nn.LogSoftmax(1))
    ours, theirs = (
        isoflat.measure(net, case.data, criterion, geometry="layerwise", rtol=1e-8, logits=logits)
        for net, criterion in ((case.net, case.criterion), (log, nn.NLLLoss()))
    )
    assert ours.value == pytest.approx(theirs.value, rel=1e-7)


def test_of_two_factors_the_smaller():
    """A network that is wrong and sure: its loss falls from ln 3 and rises again as scores grow."""
    case = small()
    sure = head_times(case, 100.0)
    (row,) = table(sure, case, measures=["gradient_norm"], logits="loss=1")
    (raw,) = table(sure, case, measures=["gradient_norm"])
    assert raw.point.loss > 1
    assert row.point.loss == pytest.approx(1.0, rel=1e-12)
    (same,) = table(case.net, case, measures=["gradient_norm"], logits="loss=1")
    assert note_of(row) == pytest.approx(note_of(same) / 100, rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ("loss=5", "equal scores for all classes have a loss of 1.099"),
        ("loss=1e-9", r"stays at .* or above. Ask for more"),
        ("loss=-1", "a positive number"),
        ("loss=", "a positive number"),
        ("loss=much", "a positive number"),
    ],
)
def test_a_loss_that_cannot_be_had(logits, message):
    case = small()
    with pytest.raises(isoflat.UsageError, match=message):
        isoflat.measure(
            case.net, case.data, case.criterion, measure="gradient_norm", geometry="euclidean", logits=logits
        )


def test_compare_names_the_remedy_and_it_works():
    case = small()
    nets = {"one": head_times(case, 3.0), "grown": case.net}
    found = isoflat.compare(nets, case.data, case.criterion, measures=["gradient_norm"], geometry="layerwise")
    remedy = next(note for note in found.notes if "losses differ" in note).split("logits='")[1].split("'")[0]
    equal = isoflat.compare(
        nets, case.data, case.criterion, measures=["gradient_norm"], geometry="layerwise", logits=remedy
    )
    assert not any("losses differ" in note for note in equal.notes)
    assert equal.between("grown", "one").ratio.value == pytest.approx(1.0, rel=1e-9)


def test_the_page_prints_what_it_says(capsys):
    page = (Path(__file__).parents[2] / "docs/howto/equal-loss.md").read_text(encoding="utf-8")
    code, output = (page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "text"))
    exec(compile(code, "equal-loss.md", "exec"), {})
    assert capsys.readouterr().out == output


def test_a_spectrum_at_an_equal_loss():
    case = small()
    top = isoflat.measure(
        case.net, case.data, case.criterion, measure="quotient_largest_eigenvalue", logits="loss=1", rtol=1e-8
    )
    found = isoflat.spectrum(case.net, case.data, case.criterion, logits="loss=1")
    raw = isoflat.spectrum(case.net, case.data, case.criterion)
    assert found.density.largest == pytest.approx(top.value, rel=1e-7)
    assert raw.density.largest != pytest.approx(top.value, rel=1e-2)
