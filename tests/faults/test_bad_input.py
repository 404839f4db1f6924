"""Bad input: one clear error that names what, where and the remedy. The model comes back bitwise as it was."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import isoflat
from cases.networks import cnn, mlp
from isoflat.measures.catalogue import find_geometry
from isoflat.risk.network import Network


def _measure(net, data, loss, **options):
    return isoflat.measure(net, data, loss, **{"geometry": "layerwise", **options})


def _snapshot(net: nn.Module):
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
    return (
        [
            (
                name,
                t.detach().clone(),
                t.requires_grad,
                None if t.grad is None else t.grad.clone(),
                t._version,
                t.data_ptr(),
            )
            for name, t in tensors
        ],
        [(name, module.training) for name, module in net.named_modules()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].copy(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
    )


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture
def case():
    return mlp((4, 5, 3), bias=True, seed=1)


class Stochastic(nn.Module):
    """Noise that no train flag switches off."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))


class Counting(nn.Module):
    """A forward pass that writes into a buffer."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.net(x)


class Augmenting(IterableDataset):
    def __init__(self, case):
        self.case = case

    def __iter__(self):
        yield self.case.inputs + torch.randn_like(self.case.inputs), self.case.targets


def test_shuffling_loader(case):
    loader = DataLoader(TensorDataset(*case.data), batch_size=4, shuffle=True)
    with pytest.raises(isoflat.DataError, match="shuffle=False"):
        _measure(case.net, loader, case.criterion)


@pytest.mark.parametrize("memory", [1 << 14, 1 << 30])
def test_loader_with_a_random_sampler_of_its_own(case, memory):
    weights = torch.ones(12, dtype=torch.float64)
    sampler = torch.utils.data.WeightedRandomSampler(weights, 12)
    loader = DataLoader(TensorDataset(*case.data), batch_size=4, sampler=sampler)
    with pytest.raises(isoflat.NondeterministicRisk, match=r"batch \d.*shuffle=False"):
        _measure(case.net, loader, case.criterion, budget=isoflat.Budget(memory=memory))


def test_augmenting_loader(case):
    with pytest.raises(isoflat.NondeterministicRisk, match="batch 0"):
        _measure(case.net, DataLoader(Augmenting(case), batch_size=None), case.criterion)


@pytest.mark.parametrize(("later", "message"), [(3, "batch 2"), (1, "number of batches")])
def test_data_that_grow_or_shrink(case, later, message):
    """Trying the network, cutting batches, the probe and the survey read it first; afterwards the data must not change."""
    lengths = itertools.chain([2] * 4, itertools.repeat(later))

    def source():
        return iter([case.data] * next(lengths))

    with pytest.raises(isoflat.NondeterministicRisk, match=message):
        _measure(case.net, source, case.criterion)


def test_one_shot_iterator(case):
    with pytest.raises(isoflat.DataError, match="one-shot iterator"):
        _measure(case.net, iter([case.data]), case.criterion)


@pytest.mark.parametrize("empty", [[], (torch.zeros(0, 4), torch.zeros(0)), lambda: iter([])])
def test_empty_data(case, empty):
    with pytest.raises(isoflat.DataError, match="empty"):
        _measure(case.net, empty, case.criterion)


def test_rows_that_do_not_match(case):
    with pytest.raises(isoflat.DataError, match="same number of rows"):
        _measure(case.net, (case.inputs, case.targets[:5]), case.criterion)


@pytest.mark.parametrize("data", [3, "digits", {"x": 1}, torch.zeros(3)])
def test_data_of_no_known_form(case, data):
    with pytest.raises(isoflat.DataError, match="give a DataLoader"):
        _measure(case.net, data, case.criterion)


def test_batches_that_are_no_pairs(case):
    with pytest.raises(isoflat.DataError, match="BatchLoss"):
        _measure(case.net, [{"x": case.inputs}], case.criterion)


def test_dropout_in_train_mode():
    net = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    data = (torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
    with pytest.raises(isoflat.UnsupportedModel, match=r"'1' \(Dropout\).*model.eval\(\)"):
        _measure(net, data, nn.CrossEntropyLoss())
    assert _measure(net.eval(), data, nn.CrossEntropyLoss()).converged


def test_batchnorm_in_train_mode():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    data = (torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
    with pytest.raises(isoflat.UnsupportedModel, match=r"'1' \(BatchNorm1d\).*train mode.*model.eval\(\)"):
        _measure(net, data, nn.CrossEntropyLoss())
    assert _measure(net.eval(), data, nn.CrossEntropyLoss()).converged
    bare = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False)).eval()
    with pytest.raises(isoflat.UnsupportedModel, match="no running statistics"):
        _measure(bare, data, nn.CrossEntropyLoss())


def test_noise_in_the_forward_pass(case):
    with pytest.raises(isoflat.NondeterministicRisk, match="batch 0 is random"):
        _measure(Stochastic(case.net), case.data, case.criterion)


def test_forward_that_writes_into_a_buffer(case):
    """A counter that the loss does not read is kept from counting; the number is that without it."""
    net = Counting(case.net)
    assert _measure(net, case.data, case.criterion).value == _measure(case.net, case.data, case.criterion).value
    assert float(net.calls) == 0


def test_nan_weights_inputs_and_losses(case):
    broken = copy.deepcopy(case.net)
    with torch.no_grad():
        broken[2].weight[0, 0] = float("nan")
    with pytest.raises(isoflat.NonFinite, match=r"'2.weight' holds 1 NaN"):
        _measure(broken, case.data, case.criterion)
    inputs = case.inputs.clone()
    inputs[7, 0] = float("inf")
    batches = list(zip(inputs.split(4), case.targets.split(4), strict=True))
    with pytest.raises(isoflat.NonFinite, match="loss of batch 1"):
        _measure(case.net, batches, case.criterion)


def test_gradient_that_is_nan_where_the_loss_is_not():
    net = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(net.weight)
    loss = isoflat.BatchLoss(lambda model, batch: (model(batch[0]).abs().sqrt().sum(), 1.0))
    with pytest.raises(isoflat.NonFinite, match="gradient of 'weight' in batch 0"):
        _measure(net, [(torch.ones(1, 2, dtype=torch.float64), torch.zeros(1))], loss)


def test_product_that_is_nan_where_the_gradient_is_not():
    net = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(net.weight)
    loss = isoflat.BatchLoss(lambda model, batch: (model(batch[0]).abs().pow(1.5).sum(), 1.0))
    data = [(torch.ones(1, 2, dtype=torch.float64), torch.zeros(1))]
    with pytest.raises(isoflat.NonFinite, match="product is NaN"):
        _measure(net, data, loss, geometry="euclidean")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), "unreduced"),
        (lambda output, target: nn.functional.cross_entropy(output, target, reduction="none"), "scalar"),
        (lambda output, target: nn.functional.cross_entropy(output, target, reduction="sum"), "not a mean over rows"),
        (lambda output, target: 1.0, "scalar"),
        (nn.CrossEntropyLoss, "pass an instance"),
        ("cross_entropy", r"is a name: .*loss=torch\.nn\.CrossEntropyLoss\(\)"),
        (isoflat.BatchLoss(lambda model, batch: (model(batch[0]), 1)), "scalar"),
        (isoflat.BatchLoss(lambda model, batch: (1, 2, 3)), "tuple of 3"),
        (None, "no loss was given"),
    ],
)
def test_losses_that_are_none(case, loss, message):
    data = [case.inputs] if loss is None else case.data
    with pytest.raises(isoflat.UsageError, match=message):
        _measure(case.net, data, loss)


def test_unknown_names_offer_the_nearest(case):
    with pytest.raises(isoflat.UnknownName, match="quotient_spectral_norm"):
        _measure(case.net, case.data, case.criterion, measure="quotient_norm")
    with pytest.raises(isoflat.UnknownName, match="layerwise"):
        _measure(case.net, case.data, case.criterion, geometry="layer-wise")
    with pytest.raises(isoflat.UsageError, match="epsilon"):
        _measure(case.net, case.data, case.criterion, measure="quotient_sharpness(eps=1)")
    with pytest.raises(isoflat.UsageError, match="cannot read option"):
        _measure(case.net, case.data, case.criterion, measure="quotient_sharpness(epsilon)")


def test_auto_says_what_it_needs(case):
    """A geometry taken from the catalogue by hand knows no network; one that cannot be traced has no symmetries."""
    unbound = find_geometry("auto")
    with pytest.raises(isoflat.NoInvariantGeometry, match="symmetries"):
        unbound.chart(Network(case.net).state())

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = case.net

        def forward(self, x):
            return self.net(x) if float(x.sum()) > 0 else -self.net(x)

    with pytest.raises(isoflat.UnsupportedModel, match=r"traced.*geometry='layerwise'"):
        isoflat.measure(Branching().eval(), case.data, case.criterion)


@pytest.mark.parametrize(
    "options",
    [
        {"rtol": 0.0}, {"rtol": -1e-3}, {"confidence": 1.0}, {"budget": 1}, {"dtype": "float16"},
        {"params": "nothing.*"}, {"sample": 10},
    ],
    ids=str,
)  # fmt: skip
def test_settings_without_meaning(case, options):
    with pytest.raises(isoflat.UsageError):
        _measure(case.net, case.data, case.criterion, **options)


def test_models_that_are_none(case):
    with pytest.raises(isoflat.UsageError, match=r"torch.nn.Module"):
        _measure(lambda x: x, case.data, case.criterion)
    with pytest.raises(isoflat.UnsupportedModel, match="meta"):
        _measure(nn.Linear(4, 3, device="meta"), case.data, case.criterion)
    with pytest.raises(isoflat.UnsupportedModel, match="complex"):
        _measure(nn.Linear(4, 3, dtype=torch.complex64), case.data, case.criterion)
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    shared[1].weight = nn.Parameter(shared[0].weight.detach()[:3])
    with pytest.raises(isoflat.UnsupportedModel, match="share memory"):
        _measure(shared, (torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)), nn.CrossEntropyLoss())


def test_unused_frozen_tied_and_zero_tensors_are_listed(case):
    class Awkward(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4, dtype=torch.float64)
            self.again = nn.Linear(4, 4, dtype=torch.float64)
            self.again.weight = self.first.weight
            self.spare = nn.Linear(7, 7, dtype=torch.float64)
            self.head = nn.Linear(4, 3, dtype=torch.float64)
            self.head.requires_grad_(False)
            nn.init.zeros_(self.again.bias)

        def forward(self, x):
            return self.head(self.again(self.first(x).relu()).relu())

    notes = " | ".join(_measure(Awkward().eval(), case.data, case.criterion).notes)
    assert "does not depend on: spare.bias, spare.weight" in notes
    assert "held fixed: head.bias, head.weight" in notes
    assert "tied, counted once: again.weight" in notes
    assert "invisible to the layerwise metric: again.bias (all zero)" in notes


def test_tied_weights_are_one_block():
    """Tying doubles nothing: the number is that of the dense Hessian in the tied coordinates."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[0.5, -0.2], [0.3, 0.8]], dtype=torch.float64))

        def forward(self, x):
            return (x @ self.weight.T).relu() @ self.weight.T

    net = Tied()
    inputs = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])

    def loss(w):
        w = w.view(2, 2)
        return nn.functional.cross_entropy((inputs @ w.T).relu() @ w.T, targets)

    flat = net.weight.detach().reshape(-1)
    dense = torch.func.hessian(loss)(flat) * float(flat @ flat)
    value = _measure(net, (inputs, targets), nn.CrossEntropyLoss(), rtol=1e-9).value
    assert value == pytest.approx(float(torch.linalg.eigvalsh(dense).abs().max()), rel=1e-9)


def test_a_loss_linear_in_the_weights_has_no_curvature():
    net = nn.Linear(4, 1, dtype=torch.float64)
    loss = isoflat.BatchLoss(lambda model, batch: (model(batch[0]).sum(), len(batch[0])))
    estimate = _measure(net, [(torch.randn(5, 4, dtype=torch.float64), torch.zeros(5))], loss)
    assert (estimate.value, estimate.lower, estimate.upper) == (0, 0, 0)
    assert any("no curvature" in note for note in estimate.notes)


def test_chance_level_is_pointed_out(case):
    net = copy.deepcopy(case.net)
    with torch.no_grad():
        net[2].weight.mul_(0.01)
        net[2].bias.copy_(torch.tensor([-5.0, 0.0, 0.0]))
    notes = _measure(net, case.data, case.criterion).notes
    assert any("chance level" in note for note in notes)


def test_half_precision_is_promoted_and_said(case):
    net = copy.deepcopy(case.net).to(torch.bfloat16)
    estimate = _measure(net, case.data, case.criterion)
    same = _measure(copy.deepcopy(net).float(), case.data, case.criterion)
    assert estimate.value == same.value
    assert any("bfloat16" in note for note in estimate.notes)
    assert next(net.parameters()).dtype == torch.bfloat16


def test_budget_gives_a_wide_but_valid_enclosure():
    case = mlp((6, 8, 8, 3), bias=True, seed=3, rows=40)
    truth = _measure(case.net, case.data, case.criterion, rtol=1e-9).value
    for products in (2, 3, 5):
        estimate = _measure(case.net, case.data, case.criterion, rtol=1e-9, budget=products)
        assert not estimate.converged
        assert estimate.cost.products <= products
        assert estimate.lower <= truth <= estimate.upper
        assert any("budget" in note for note in estimate.notes)
    timed = _measure(case.net, case.data, case.criterion, rtol=1e-9, budget=isoflat.Budget(seconds=1e-9))
    assert not timed.converged
    assert timed.lower <= truth <= timed.upper


def test_uncertified_is_cheaper_and_says_so(case):
    certified = _measure(case.net, case.data, case.criterion)
    quick = _measure(case.net, case.data, case.criterion, certify=False)
    assert quick.kind is isoflat.Kind.UNCERTIFIED
    assert quick.upper == float("inf")
    assert quick.cost.products <= certified.cost.products
    assert quick.residual <= 1e-3 * quick.value
    assert quick.value == pytest.approx(certified.value, rel=1e-3)
    assert "uncertified" in str(quick)
    assert any("uncertified" in note for note in quick.notes)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("make", [lambda: mlp((4, 5, 3), True, 0), lambda: cnn(2, True, 0)])
def test_the_model_comes_back_bitwise_as_it_was(make, broken):
    case = make()
    net = nn.Sequential(case.net, nn.Dropout(0.1).eval(), nn.BatchNorm1d(3, dtype=torch.float64).eval())
    case.criterion(net(case.inputs), case.targets).backward()  # grads of the user's own
    before = _snapshot(net)
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        if broken and calls > 4:
            raise RuntimeError("planted")
        return case.criterion(model(batch[0]), batch[1]) * len(batch[1]), len(batch[1])

    loader = DataLoader(TensorDataset(*case.data), batch_size=5)
    if broken:
        with pytest.raises(RuntimeError, match="planted"):
            _measure(net, loader, isoflat.BatchLoss(loss))
    else:
        _measure(net, loader, isoflat.BatchLoss(loss))
    assert _same(before, _snapshot(net))


def test_measuring_under_no_grad_and_inference_mode(case):
    truth = _measure(case.net, case.data, case.criterion).value
    with torch.no_grad():
        assert _measure(case.net, case.data, case.criterion).value == truth
        assert not torch.is_grad_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _measure(case.net, case.data, case.criterion).value == truth
        assert torch.is_autocast_enabled("cpu")


def test_fused_attention_is_measured_through_the_math_kernel():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 12, dtype=torch.float64)
            self.head = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, x):
            q, k, v = self.project(x).chunk(3, -1)
            return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean(1))

    net = Attention()
    inputs = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate = _measure(net, (inputs, torch.tensor([0, 1, 2, 0, 1, 2])), nn.CrossEntropyLoss())
    assert estimate.converged


@pytest.mark.parametrize("geometry", ["auto", "layerwise"])
def test_a_module_that_is_used_twice_comes_back_as_it_was(case, geometry):
    """`functional_call` swaps a shared module's tensors once per path; its parameters must still be parameters."""
    shared = nn.Linear(4, 4, dtype=torch.float64)
    first = nn.Linear(case.net[0].out_features, 4).double()
    net = nn.Sequential(case.net[0], nn.ReLU(), first, shared, nn.ReLU(), shared)
    before = {name: (p, p.detach().clone()) for name, p in net.named_parameters()}
    isoflat.measure(net, case.data, case.criterion, geometry=geometry, rtol=0.5)
    assert dict(net.named_parameters()).keys() == before.keys()
    for name, p in net.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
