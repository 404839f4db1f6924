"""`isoflat.spectrum` and its verb: against dense Hessians, in every geometry, printed, drawn and read back."""

from __future__ import annotations

import copy
import json
import shlex
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call, hessian
from typer.testing import CliRunner

import isoflat
from isoflat.cli.main import app
from isoflat.core.density import Atoms, Density, Outlier, Quadrature
from isoflat.core.errors import IsoflatError, UsageError
from isoflat.core.estimate import Estimate, Kind
from isoflat.core.record import Point, Record
from isoflat.core.rng import stream
from isoflat.core.spectrum import Spectrum, ends
from isoflat.experiments.data import digits
from isoflat.linalg.operator import Dense
from isoflat.measurement.groups import symmetries_of
from isoflat.measurement.spectrum import VERTICAL, Deflated
from isoflat.measurement.subject import subject
from isoflat.measures.catalogue import find_geometry
from isoflat.report.spectrum import Axis, portrait, smoothed, written

LOSS = nn.CrossEntropyLoss()


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10)).double()


@pytest.fixture(scope="module")
def data():
    x, y = digits().train
    return x[:200].double(), y[:200]


@pytest.fixture(scope="module")
def net(data) -> nn.Module:
    """Trained some way: curvatures of both signs, outliers, and a bulk."""
    model = build()
    descent = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(40):
        descent.zero_grad()
        LOSS(model(data[0]), data[1]).backward()
        descent.step()
    return model


def dense(net: nn.Module, data, geometry: str) -> np.ndarray:
    """Eigenvalues of `Eᵀ H E` from the whole Hessian."""
    target = subject(net, data, LOSS)
    names = list(target.state.parameters)
    shapes = [tensor.shape for tensor in target.state.parameters.values()]

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        tensors = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return LOSS(functional_call(net, tensors, (data[0],)), data[1])

    matrix = hessian(loss)(target.state.vector.detach())
    place = find_geometry(geometry)
    if geometry == "auto":
        place = place.on(symmetries_of(target))
    frame = place.frame(target.state)
    pulled = frame.pull(matrix @ frame.push(torch.eye(frame.columns, dtype=torch.float64)))
    return torch.linalg.eigvalsh((pulled + pulled.T) / 2).numpy()


def encloses(density: Density, values: np.ndarray) -> bool:
    low, high = (np.repeat(atoms.points, atoms.counts) for atoms in (density.low, density.high))
    slop = 1e-10 * np.abs(values).max()
    return bool((low - slop <= values).all() and (values <= high + slop).all())


@pytest.mark.parametrize("geometry", ["auto", "layerwise", "euclidean"])
def test_the_band_holds_the_dense_spectrum_in_every_geometry(net, data, geometry):
    truth = dense(net, data, geometry)
    found = isoflat.spectrum(net, data, LOSS, geometry=geometry, probes=2, steps=40, outliers=12)
    density = found.density
    assert not density.exact
    assert density.n == len(truth) == 385
    assert encloses(density, truth)
    assert 1 <= len(density.outliers) <= 12
    for outlier in density.outliers:
        assert np.abs(truth - outlier.value).min() <= outlier.residual + 1e-10 * density.largest
    rank = truth.sum() ** 2 / (truth**2).sum()
    assert found.effective_rank.lower <= rank <= found.effective_rank.upper
    soft = (truth.clip(0) / (truth.clip(0) + 0.1)).sum()
    assert found.soft_rank(0.1).lower <= soft <= found.soft_rank(0.1).upper


def test_small_networks_are_computed_exactly(net, data):
    found = isoflat.spectrum(net, data, LOSS, geometry="layerwise", probes=8, steps=64)
    truth = dense(net, data, "layerwise")
    assert found.density.exact
    assert found.density.wasserstein < 1e-9 * np.abs(truth).max()
    assert encloses(found.density, truth)
    assert found.effective_rank.cost.products == 385
    assert "385 products give every eigenvalue" in found.effective_rank.notes


def test_what_keeps_the_function_keeps_the_spectrum(net, data):
    """And the plain spectrum moves (negative control)."""
    found = isoflat.symmetries(net, data[0][:2])
    twin = isoflat.reparametrize(net, found, seed=1, spread=2)
    settings = {"probes": 2, "steps": 40, "outliers": 6}
    one, other = (isoflat.spectrum(model, data, LOSS, **settings) for model in (net, twin))
    assert one.group_hash == other.group_hash
    assert one.group == other.group
    assert len(one.density.outliers) == len(other.density.outliers) > 0
    for a, b in zip(one.density.outliers, other.density.outliers, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-8)
    for share in (0.0, 0.05, 0.5, 0.9, 0.99):
        for end in ("lower", "upper"):
            bounds = [getattr(found.density.quantile(share), end) for found in (one, other)]
            assert bounds[0] == pytest.approx(bounds[1], rel=1e-6, abs=1e-7 * one.density.largest)
    plain = [  # negative control
        isoflat.spectrum(model, data, LOSS, geometry="euclidean", **settings).density.largest for model in (net, twin)
    ]
    assert not 0.5 < plain[0] / plain[1] < 2


def test_a_spectrum_says_what_it_is_and_reads_back(net, data):
    settings = {"probes": 2, "steps": 20, "outliers": 4, "geometry": "layerwise"}
    before = copy.deepcopy(net.state_dict())
    found = isoflat.spectrum(net, data, LOSS, **settings, label="mine", seed=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    again = isoflat.spectrum(net, data, LOSS, **settings, label="mine", seed=3)
    assert again.density == found.density
    assert isoflat.spectrum(net, data, LOSS, **settings, seed=4).density != found.density
    assert Spectrum.from_json(found.to_json()) == found
    assert Spectrum.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(UsageError, match="schema"):
        Spectrum.from_dict({**found.to_dict(), "schema": 0})
    measured = isoflat.measure_all(net, data, LOSS, measures=["quotient_spectral_norm"], geometry="layerwise")[0]
    assert (found.group, found.group_hash) == (measured.group, measured.group_hash)
    assert measured.estimate.lower <= found.density.largest * (1 + 1e-9)
    assert found.record.measure == "spectrum(outliers=4, probes=2, steps=20)"
    assert found.record.settings["confidence"] == 0.95
    assert VERTICAL in found.effective_rank.notes
    assert any("4 outliers were taken out" in note for note in found.effective_rank.notes)
    text = str(found)
    for part in ("mine (layerwise): 385 eigenvalues", "outlier", "99 %", "near zero", "effective rank", "products"):
        assert part in text
    assert found.density.products == found.effective_rank.cost.products == 64
    assert len(repr(found)) < 20000
    assert "<pre" in found._repr_html_()


def test_the_loss_scales_the_spectrum(net, data):
    def scaled(output, target):
        return 2.0**20 * nn.functional.cross_entropy(output, target)

    settings = {"geometry": "layerwise", "probes": 2, "steps": 20}
    one, other = (isoflat.spectrum(net, data, loss, **settings).density for loss in (LOSS, scaled))
    assert len(one.outliers) == len(other.outliers)
    assert other.wasserstein == pytest.approx(2.0**20 * one.wasserstein, rel=1e-6)
    assert other.participation().value == pytest.approx(one.participation().value, rel=1e-6)


def test_budgets_and_refusals(net, data):
    short = isoflat.spectrum(net, data, LOSS, geometry="euclidean", probes=2, steps=40, budget=30)
    assert short.density.products <= 30
    assert not short.density.reached
    assert not short.effective_rank.converged
    assert any("budget of" in note for note in short.effective_rank.notes)
    quick = isoflat.spectrum(net, data, LOSS, geometry="euclidean", probes=2, budget=isoflat.Budget(300, seconds=1e-6))
    assert quick.density.products == 3
    for settings, words in (
        ({"probes": 0}, "probes"),
        ({"outliers": -1}, "outliers"),
        ({"steps": 1}, "steps"),
        ({"budget": 5}, "10 products"),
        ({"confidence": 1.0}, "confidence"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"geometry": "flat"}, "flat"),
        ({"check": "maybe"}, "check"),
    ):
        with pytest.raises(IsoflatError, match=words):
            isoflat.spectrum(net, data, LOSS, **settings)


class Once(torch.autograd.Function):
    """tanh that can be differentiated once."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).double()

    def forward(self, x):
        return Once.apply(self.linear(x))


def test_differences_of_gradients_certify_nothing():
    x = torch.randn(10, 3, generator=stream(0), dtype=torch.float64)
    found = isoflat.spectrum(Single(), (x, x[:, :2]), nn.MSELoss(), geometry="euclidean")
    assert "certainty       none: products are differences of gradients" in str(found)
    assert "exact up to rounding" in str(replace(found, record=replace(found.record, settings={})))


def test_budgets_of_every_size_end_with_a_band():
    values = torch.linspace(-1, 1, 300, dtype=torch.float64)
    operator = Dense(torch.diag(torch.cat([values, torch.tensor([50.0, 60.0], dtype=torch.float64)])))
    for budget in (10, 11, 20, 47, 120):
        density = Deflated(outliers=5, probes=4, depth=40, max_products=budget)(operator, stream(0))
        assert density.products <= budget
        assert encloses(density, np.sort(operator.matrix.diagonal().numpy()))
        assert not density.reached
    none = Deflated(outliers=0, probes=4, depth=10)(operator, stream(0))
    assert (none.products, none.outliers, none.reached) == (40, (), True)


# Words and drawings


def test_ends_are_rounded_outwards():
    def shown(lower, value, upper):
        return ends(Estimate(value, lower, upper, 0.95, Kind.ENCLOSURE, True))

    assert shown(0.0, 0.0, 0.0) == "[0, 0]"
    assert shown(1.0, 1.2345, 1.9999) == "[1, 2]"
    assert shown(-0.12345, 0.0, 0.12345) == "[-0.124, 0.124]"
    assert shown(99.95, 100.0, 100.05) == "[99.95, 100.05]"
    assert shown(5.0 - 1.5e-8, 5.0, 5.0) == "[4.99999, 5]"


def case(values, outliers=(), width: float = 0.0) -> Spectrum:
    """A drawing's subject."""
    values = np.sort(np.asarray(values, dtype=float))
    every = np.concatenate([values, outliers])
    ones = np.ones(len(every), dtype=np.int64)
    probe = Quadrature(tuple(values.tolist()), (1 / len(values),) * len(values), 1.0)
    density = Density(
        n=len(every),
        probes=(probe,),
        outliers=tuple(Outlier(float(value), 0.0) for value in outliers),
        low=Atoms.of(every - width, ones),
        high=Atoms.of(every + width, ones),
        confidence=0.95,
        slack=0.0,
        products=1,
        exact=not width,
        reached=True,
        stopped="",
    )
    point = Point(0.1, None, 0.0, 0.0, 1, 1.0, density.n)
    return Spectrum(Record("spectrum", "auto", "none", "0", density.participation(), point), density)


@pytest.mark.parametrize(
    "spectrum",
    [
        case([0.0]),
        case([3.0]),
        case(np.zeros(50)),
        case(np.linspace(-1, 2, 60), [50.0, 1e4], width=0.1),
        case(-1e-150 * np.geomspace(1e-6, 1, 80), width=1e-152),
        case(1e150 * np.linspace(-1, 1, 40), [9e151], width=1e148),
    ],
)
def test_every_spectrum_can_be_drawn_and_printed(spectrum):
    assert written(portrait(spectrum), ".png").startswith(b"\x89PNG")
    svg = written(portrait(spectrum), ".svg").decode()
    assert "<svg" in svg
    assert "nan" not in svg
    assert str(spectrum.density.n) in str(spectrum)


def test_the_smoothed_density_is_of_the_bulk_and_has_its_mass():
    spectrum = case(np.linspace(-1, 1, 200), [1e3], width=0.01)
    axis = Axis(0.1)
    at = np.linspace(-3, 3, 4001)
    assert smoothed(spectrum.density, axis, at).sum() * (at[1] - at[0]) == pytest.approx(200, rel=1e-3)
    assert axis.values(axis.decades(np.array([-5.0, 0.0, 0.01]))) == pytest.approx([-5.0, 0.0, 0.01])
    with pytest.raises(UsageError, match="png"):
        written(Figure(), ".pdf")


# The verb

NETS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10)).double()
"""

VERB = "spectrum --model spectrum_nets:build --data digits --examples 100 --probes 2 --steps 12 --outliers 5"


@pytest.fixture
def folder(tmp_path, monkeypatch, net):
    (tmp_path / "spectrum_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("spectrum_nets", None)
    save_file(net.state_dict(), tmp_path / "best.safetensors")
    return tmp_path


def run(arguments: str):
    return CliRunner().invoke(app, shlex.split(f"{VERB} {arguments}"))


def test_the_verb_prints_json_that_reads_back_and_draws(folder):
    result = run("--weights best.safetensors --json --out found.json --plot found.png")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content == json.loads((folder / "found.json").read_text())
    found = Spectrum.from_dict(content)
    assert found.density.n == 385
    assert found.record.geometry == "auto"
    assert (folder / "found.png").read_bytes().startswith(b"\x89PNG")
    assert run("--geometry layerwise --plot found.svg").exit_code == 0
    assert "<svg" in (folder / "found.svg").read_text()


def test_the_verb_prints_for_people(folder):
    result = run("--geometry layerwise --plot found.png")
    assert result.exit_code == 0, result.output
    for part in ("385 eigenvalues", "outlier", "residual", "50 %", "near zero", "soft rank", "digits", "found.png"):
        assert part in result.stdout


def test_the_verbs_exit_codes(folder):
    assert run("--geometry euclidean --max-products 20").exit_code == 3
    for arguments, words in (
        ("--plot found.pdf", ".png or .svg"),
        ("--plot nowhere/found.png", "--plot"),
        ("--plot same.png --out same.png", "same.png"),
        ("--geometry flat", "flat"),
        ("--confidence 2", "confidence"),
        ("--max-products 3", "6 products"),
        ("--dtype bfloat16", "bfloat16"),
        ("--weights missing.safetensors", "missing"),
    ):
        result = run(arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert words in result.stderr
        *steps, refusal = result.stderr.splitlines()  # what was done before is told where there is no terminal
        assert refusal.startswith("error: ") and not any(line.startswith("error: ") for line in steps)
        assert result.stdout == ""
    (folder / "found.png").write_bytes(b"mine")
    assert run("--plot found.png").exit_code == 2
    assert (folder / "found.png").read_bytes() == b"mine"
    assert run("--geometry layerwise --plot found.png --force").exit_code == 0
    assert (folder / "found.png").read_bytes() != b"mine"
