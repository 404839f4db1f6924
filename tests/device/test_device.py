"""On an accelerator: the numbers of the CPU, precision as promised, memory as forecast.

Where a tensor is, is tested on a pretend accelerator as well, everywhere; what only hardware does is skipped without it.
"""

import copy
import os
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import isoflat
from cases.elsewhere import pretended
from cases.networks import Case, cnn, mlp
from isoflat.measures.catalogue import measures
from isoflat.risk import network
from isoflat.testing import usable

CUDA = torch.device("cuda")

hardware = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
pretence = pytest.mark.skipif("ISOFLAT_PRETEND" not in os.environ, reason="needs a process of its own: make test")


@pytest.fixture(params=[pytest.param("pretended", marks=pretence), pytest.param("cuda", marks=hardware)])
def place(request, monkeypatch):
    """A context in which there is such a device; the pretended one is slow, also for what runs beside it."""
    if request.param == "cuda":
        return nullcontext(CUDA)
    # Its parameters are of a class of their own, which a network's must not be.
    monkeypatch.setattr(network, "_check_parameter", lambda name, parameter: None)
    return pretended()


class Attention(nn.Module):
    """A transformer's encoder layer and a head."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Recurrent(nn.Module):
    """An LSTM and a head: its fused kernel has no second derivatives on an accelerator."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


def made(build, *shape: int) -> Case:
    torch.manual_seed(0)
    net = build().double().eval()
    return Case(net, torch.randn(10, *shape, dtype=torch.float64), torch.randint(3, (10,)), nn.CrossEntropyLoss())


CASES = {
    "multilayer": lambda: mlp((5, 6, 4, 3), bias=True, seed=3),
    "convolutional": lambda: cnn(3, bias=True, seed=5),
    "normalised": lambda: made(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), 4
    ),
    "attention": lambda: made(Attention, 3, 6),
}


def table(case: Case, entries, **options) -> isoflat.Table:
    return isoflat.measure_all(case.net, case.data, case.criterion, measures=entries, **options)


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_the_cpu(name, place):
    """Every measure on one network; on the others a few."""
    case = CASES[name]()
    few = ("quotient_spectral_norm", "quotient_trace", "minimum_sharpness_unitwise")
    asked = [usable(measure) for measure in (measures() if name == "convolutional" else few)]
    options = {"geometry": ("layerwise", "elementwise", "auto"), "rtol": 0.1, "probes": 2, "budget": 4, "seed": 1}
    here = table(case, asked, **options)
    with place as device:
        there = table(case, asked, **options, device=device)
    assert [(r.measure, r.geometry) for r in here] == [(r.measure, r.geometry) for r in there]
    assert here.omitted == there.omitted
    for a, b in zip(here, there, strict=True):
        for end in ("value", "lower", "upper"):
            found, wanted = (getattr(row.estimate, end) for row in (b, a))
            assert found == pytest.approx(wanted, rel=1e-6), (a.measure, a.geometry, end)
    assert {p.device.type for p in case.net.parameters()} == {"cpu"}


@pytest.mark.parametrize("name", ["convolutional", "attention"])
def test_a_model_that_lives_there(name, place):
    """It is measured where it is, traced there, and left as it was."""
    case = CASES[name]()
    here = isoflat.measure(case.net, case.data, case.criterion, rtol=0.1)
    with place as device:
        moved = copy.deepcopy(case.net).to(device)
        before = {name: tensor.clone() for name, tensor in moved.state_dict().items()}
        there = isoflat.measure(moved, case.data, case.criterion, rtol=0.1)
        assert all(torch.equal(before[name], tensor) for name, tensor in moved.state_dict().items())
    assert there.value == pytest.approx(here.value, rel=1e-8)


def test_symmetries_are_the_same_and_the_function_stays(place):
    case = CASES["attention"]()
    here = isoflat.symmetries(case.net, case.inputs)
    with torch.no_grad():
        truth = case.net(case.inputs)
    with place as device, torch.no_grad():
        moved, inputs = copy.deepcopy(case.net).to(device), case.inputs.to(device)
        there = isoflat.symmetries(moved, inputs)
        assert str(here) == str(there)
        for other in (isoflat.canonicalize(moved, there), isoflat.reparametrize(moved, there, spread=1.0)):
            assert next(other.parameters()).device.type == device.type
            assert torch.allclose(other(inputs).cpu(), truth, rtol=1e-9, atol=1e-9)


def test_spectrum_comparison_and_sampling(place):
    case, other = (mlp((6, 8, 3), bias=True, seed=seed, rows=200) for seed in (3, 4))
    nets, given = {"one": case.net, "other": other.net}, (case.data, case.criterion)
    here = isoflat.spectrum(case.net, *given), isoflat.compare(nets, *given)
    full = isoflat.measure(case.net, *given, rtol=1e-6)
    with place as device:
        there = isoflat.spectrum(case.net, *given, device=device), isoflat.compare(nets, *given, device=device)
        sampled = isoflat.measure(case.net, *given, sample="auto", rtol=0.3, device=device)
    assert there[0].density.largest == pytest.approx(here[0].density.largest, rel=1e-8)
    assert there[0].effective_rank.value == pytest.approx(here[0].effective_rank.value, rel=1e-6)
    assert [gap.verdict for gap in here[1].differences] == [gap.verdict for gap in there[1].differences]
    assert sampled.lower <= full.value <= sampled.upper


def test_tensors_of_two_places_do_not_mix(place):
    """The negative control of all of the above."""
    with place as device, pytest.raises(RuntimeError, match=r"tensors on|same device"):
        torch.ones(2, device=device) + torch.ones(2)


@hardware
def test_recurrent_networks():
    """Their fused kernels have no second derivatives there; which measures apply depends on the kernels."""
    case = made(Recurrent, 3, 4)
    asked = [usable(measure) for measure in measures()]
    here, there = (table(case, asked, geometry="layerwise", rtol=0.1, budget=12, device=d) for d in (None, "cuda"))
    known = {row.measure: row.estimate for row in there}
    shared = [row for row in here if row.measure in known]
    assert {"hessian_spectral_norm", "gauss_newton_trace", "gradient_norm"} <= {row.measure for row in shared}
    for row in shared:
        other = known[row.measure]
        if row.measure == "critical_sharpness":  # ends of a bracket, chosen by losses that rounding tells apart
            assert other.lower <= row.estimate.upper
            assert row.estimate.lower <= other.upper
        else:
            assert other.value == pytest.approx(row.estimate.value, rel=1e-6), row.measure


def allowing(switch):
    """What a user may have set before, in torch's older or newer way, or both."""
    backends = torch.backends
    if "older" in switch:
        backends.cuda.matmul.allow_tf32 = True
    if "all" in switch:
        torch.set_float32_matmul_precision("high")
    if "newer" in switch:
        backends.cuda.matmul.fp32_precision = backends.mkldnn.matmul.fp32_precision = "tf32"
    if "benchmark" in switch:
        backends.cudnn.benchmark = True


def switches():
    """What torch says of each kernel, and of all of them where it says it."""
    older = (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32)
    singles = [torch._C._get_fp32_precision_getter(*kernel) for kernel in network.KERNELS]
    return singles, [network._readable(switch) for switch in older], torch.backends.cudnn.benchmark


@pytest.mark.parametrize("switch", ["", "older", "all", "newer", "older newer benchmark", "all older"])
def test_shorter_float32_is_off_inside_and_comes_back(switch):
    start = switches()
    try:
        allowing(switch)
        before = switches()
        assert switch == "" or before != start
        with network.full_precision():
            singles, older, benchmark = switches()
            assert set(singles) == {"ieee"}
            assert not benchmark
            assert None in before[1] or older == ["highest", False]
        assert switches() == before
    finally:
        torch.backends.cudnn.benchmark = False
        torch.set_float32_matmul_precision("highest")
        for kernel, value in zip(network.KERNELS, start[0], strict=True):
            torch._C._set_fp32_precision_setter(*kernel, value)


@hardware
@pytest.mark.parametrize("name", ["convolutional", "attention"])
def test_float32_is_float32(name):
    """Where the user allows TF32, products would be off by 1e-3; they are not, and the setting is left as it was."""
    case = CASES[name]()
    truth = isoflat.measure(case.net, case.data, case.criterion, rtol=1e-8)
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        found = isoflat.measure(case.net, case.data, case.criterion, rtol=1e-4, dtype="float32", device="cuda")
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    assert found.lower <= truth.upper
    assert truth.lower <= found.upper
    assert found.value == pytest.approx(truth.value, rel=1e-4)


@hardware
def test_tf32_would_be_seen():
    """The negative control of the test above: the hardware does round to ten bits when it may."""
    a = torch.randn(64, 64, device=CUDA)
    exact = (a.double() @ a.double()).float()
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        rounded = a @ a
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert float((rounded - exact).norm() / exact.norm()) > 1e-5
    assert float((a @ a - exact).norm() / exact.norm()) < 1e-6


@hardware
def test_bfloat16_products():
    case = mlp((20, 30, 30, 5), bias=True, seed=3, rows=64)
    truth = isoflat.measure(case.net, case.data, case.criterion, rtol=1e-6)
    options = {"dtype": "bfloat16", "certify": False, "rtol": 0.05, "device": "cuda"}
    assert isoflat.measure(case.net, case.data, case.criterion, **options).value == pytest.approx(truth.value, rel=0.1)


@hardware
@pytest.mark.parametrize("tight", [False, True])
def test_memory_stays_within_the_plan(tight):
    """What products take there against what they were allowed to."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)).to(CUDA)
    data = (torch.randn(60_000, 256), torch.randint(10, (60_000,)))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    allowed = 400 * 2**20 if tight else None
    budget = isoflat.Budget(products=4, memory=allowed)
    isoflat.measure(net, data, nn.CrossEntropyLoss(), geometry="layerwise", rtol=0.5, budget=budget)
    taken = torch.cuda.max_memory_allocated() - before
    vectors = 12 * 8 * sum(p.numel() for p in net.parameters())
    limit = (allowed or torch.cuda.mem_get_info()[0] / 2) + vectors
    assert 0 < taken < limit, f"{taken / 2**20:.0f} MiB of {limit / 2**20:.0f}"
