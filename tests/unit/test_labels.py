"""Labels of random streams: fixed text, so that a class can be renamed and every number stays."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import isoflat
from isoflat.experiments.loop import Regime
from isoflat.linalg.density.deflated import Deflated
from isoflat.linalg.density.lanczos import StochasticLanczosQuadrature
from isoflat.linalg.density.outliers import Outliers
from isoflat.linalg.eigen.block_lanczos import Eigenpairs
from isoflat.linalg.eigen.complement import Remainder
from isoflat.linalg.eigen.hard_first import HardFirst
from isoflat.linalg.eigen.lanczos import Lanczos
from isoflat.linalg.eigen.power import PowerMethod
from isoflat.linalg.eigen.recheck import Recheck
from isoflat.linalg.solver import SingleProduct, Solver
from isoflat.linalg.trace.diagonal import DiagonalEstimator
from isoflat.linalg.trace.frobenius import Frobenius
from isoflat.linalg.trace.hutchinson import Hutchinson
from isoflat.linalg.trace.hutchpp import HutchPlusPlus
from isoflat.linalg.trace.xtrace import XTrace
from isoflat.risk.losses import BatchLoss, ModelLoss, TargetLoss
from isoflat.symmetry.groups.declared import UnitScale
from isoflat.symmetry.groups.scaling import LayerScale

# The left side follows a class that is renamed; the right side never changes, because stored numbers depend on it.
LABELS: dict[type[Solver[Any]], str] = {
    Deflated: "Deflated",
    DiagonalEstimator: "Diagonal",
    Eigenpairs: "Eigenpairs",
    Frobenius: "Frobenius",
    HardFirst: "HardFirst",
    HutchPlusPlus: "HutchPlusPlus",
    Hutchinson: "Hutchinson",
    Lanczos: "Lanczos",
    Outliers: "Outliers",
    PowerMethod: "PowerMethod",
    SingleProduct: "Probe",
    Recheck: "Recheck",
    Remainder: "Remainder",
    StochasticLanczosQuadrature: "StochasticLanczosQuadrature",
    XTrace: "XTrace",
}

MEASURES = ("quotient_spectral_norm", "quotient_trace", "quotient_frobenius", "tic_diagonal")


def below(kind: type) -> set[type]:
    return {kind, *(inner for child in kind.__subclasses__() for inner in below(child))}


def solvers() -> set[type]:
    """Every solver of the package that can be made."""
    package = importlib.import_module("isoflat.linalg")
    for info in pkgutil.walk_packages(package.__path__, "isoflat.linalg."):
        importlib.import_module(info.name)
    found = {kind for kind in below(Solver) if not inspect.isabstract(kind)}
    return {kind for kind in found if kind.__module__.partition(".")[0] == "isoflat"}


@contextmanager
def renamed(*kinds: type) -> Iterator[None]:
    """Other names for these classes, for a while."""
    names = [(kind, kind.__name__, kind.__qualname__) for kind in kinds]
    try:
        for place, kind in enumerate(kinds):
            kind.__name__ = kind.__qualname__ = f"Renamed{place}"
        yield
    finally:
        for kind, name, qualified in names:
            kind.__name__, kind.__qualname__ = name, qualified


def numbers() -> list[dict[str, Any]]:
    """Records of a small network by several solvers, with what the clock decides left out."""
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    inputs = torch.randn(20, 4, generator=draw, dtype=torch.float64)
    targets = torch.randint(3, (20,), generator=draw)
    own = UnitScale(("0.weight", "0.bias"), ("2.weight",), 5)
    table = isoflat.measure_all(
        model, (inputs, targets), nn.CrossEntropyLoss(), measures=MEASURES, geometry="layerwise", symmetries=[own]
    )
    rows = [record.to_dict() for record in table]
    for row in rows:
        row["estimate"].pop("cost")
    return rows


def test_every_solver_has_its_label_and_no_two_share_one() -> None:
    assert solvers() == set(LABELS)
    assert {kind: kind.label for kind in LABELS} == LABELS
    assert len(set(LABELS.values())) == len(LABELS)


def test_renaming_classes_changes_no_number() -> None:
    before = numbers()
    assert len(before) == len(MEASURES)
    with renamed(*LABELS, LayerScale, UnitScale):
        assert numbers() == before


def test_numbers_do_depend_on_the_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above could not fail."""
    before = numbers()
    monkeypatch.setattr(Hutchinson, "label", "another")
    assert numbers() != before


@pytest.mark.parametrize(
    "thing, spelled",
    [
        (UnitScale(("a", "b"), ("c",), 2), "UnitScale(rows=('a', 'b'), columns=('c',), units=2)"),
        (LayerScale(("a", "b"), (None, "c")), "LayerScale(weights=('a', 'b'), biases=(None, 'c'))"),
        (
            Regime(16, 0.05, "sgd", 7, 0.1, weight_decay=1e-4, halve_every=3),
            "Regime(batch=16, target=0.05, optimizer='sgd', max_epochs=7, rate=0.1, momentum=0.9, "
            "weight_decay=0.0001, halve_every=3, looks=8)",
        ),
    ],
)
def test_what_is_hashed_is_spelled_out(thing: Any, spelled: str) -> None:
    with renamed(type(thing)):
        assert thing.label == spelled != repr(thing)


def test_losses_keep_what_reasons_call_them() -> None:
    assert [kind.label for kind in (BatchLoss, ModelLoss, TargetLoss)] == ["BatchLoss", "ModelLoss", "TargetLoss"]
