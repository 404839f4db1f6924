"""The net: the user's own model is evaluated beside gradients and products, and what differs is refused.

Truths are differences of losses in plain torch. Each kind of wrong gradient is refused, in float32 and float64; ordinary
networks, dead units, zero partners and kinks at the point itself are not.
"""

from __future__ import annotations

import copy
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import isoflat
from isoflat.cli import examine
from isoflat.core.state import State
from isoflat.measurement.audit import SKIPPED
from isoflat.measurement.subject import subject
from isoflat.risk.arrivals import arrivals
from isoflat.risk.batches import as_batches
from isoflat.risk.check import AGREEMENT, Compared
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.linearise import _fault, choose
from isoflat.risk.losses import as_loss
from isoflat.risk.network import Network
from isoflat.risk.own import own_model
from isoflat.risk.rebound import rebound

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
PLAIN = {"geometry": "euclidean"}
DTYPES = (torch.float32, torch.float64)


def _drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def _data(rows=24, dtype=torch.float64, batches=(7, 7, 10)):
    x = torch.randn(rows, 4, generator=_drawn(), dtype=torch.float64).to(dtype)
    y = torch.randint(3, (rows,), generator=_drawn(1))
    if batches is None:
        return x, y
    return list(zip(x.split(batches), y.split(batches), strict=True))


def _pairs(dtype=torch.float64):
    x = torch.randn(20, 4, generator=_drawn(), dtype=torch.float64).to(dtype)
    return [(x[:8], 1 + 0.1 * x[:8]), (x[8:], 1 + 0.1 * x[8:])]


def _seeded(build, dtype):
    torch.manual_seed(0)
    return build().to(dtype).eval()


# Ordinary networks ----------------------------------------------------------------------------------------------------


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.embed(x[..., None])).mean(1))


ORDINARY = {
    "relu": lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)),
    "tanh": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 5, 2, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(5, 3),
    ),
    "attention": _Attention,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_networks_pass_and_keep_their_numbers(name, dtype):
    net = _seeded(ORDINARY[name], dtype)
    before = copy.deepcopy(net.state_dict())
    data = _data(dtype=dtype)
    seen = isoflat.measure(net, data, CE, **PLAIN)
    blind = isoflat.measure(net, data, CE, check="skip", **PLAIN)
    assert (seen.value, seen.lower, seen.upper) == (blind.value, blind.lower, blind.upper)
    assert SKIPPED in blind.notes
    assert SKIPPED not in seen.notes
    assert not any("gradients against" in note or "own precision" in note for note in seen.notes)
    if name == "tanh":
        assert not any("silent" in note for note in seen.notes)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_at_the_canonical_representative_too():
    net = _seeded(ORDINARY["relu"], torch.float64)
    estimate = isoflat.measure(net, _data(), CE)
    assert not any("gradients against" in note for note in estimate.notes)


def test_numbers_without_products_are_checked_too():
    net = _seeded(ORDINARY["tanh"], torch.float64)
    table = isoflat.measure_all(net, _data(), CE, measures=["gradient_norm", "hessian_trace", "fisher_trace"], **PLAIN)
    assert not any("silent" in note for row in table for note in row.estimate.notes)


# Gradients of something else ------------------------------------------------------------------------------------------


class _Hooked(nn.Module):
    """A hook halves a gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: 0.5 * gradient)
        return self.last(hidden)


class _Frequent(nn.Module):
    """An embedding whose gradient is divided by how often each row is used."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.table((x.abs() * 3).long().clamp(max=4)).mean(1)))


class _Implicit(nn.Module):
    """A fixed point, differentiated through one step only."""

    def __init__(self):
        super().__init__()
        self.inside, self.across, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        with torch.no_grad():
            z = torch.zeros(len(x), 6, dtype=x.dtype)
            for _ in range(25):
                z = torch.tanh(0.8 * self.across(z) + self.inside(x))
        return self.last(torch.tanh(0.8 * self.across(z) + self.inside(x)))


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


class _StraightThrough(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(_Rounded.apply(torch.tanh(self.first(x))))


class _Forces(nn.Module):
    """Forces as derivatives of an energy, whose graph is kept in training only."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        with torch.enable_grad():
            x = x.clone().requires_grad_(True)
            energy = self.energy(x).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=self.training, retain_graph=True)
        return torch.cat([self.scale * self.energy(x), -force], dim=1)[:, :4]


def _detached_term(model, batch):
    out = model(batch[0])
    return (F.mse_loss(out, batch[1][:, :3]) + 0.5 * (out.detach() ** 2).mean()) * len(out), len(out)


def _ctc(scores, target):
    lengths = torch.full((len(target),), 4), torch.full((len(target),), 1)
    return F.ctc_loss(scores.reshape(len(target), 4, 3).transpose(0, 1), 1 + target[:, None] % 2, *lengths)


ELSEWHERE = {
    "hook": (_Hooked, _data, CE),
    "frequency": (_Frequent, _data, CE),
    "one-step implicit layer": (_Implicit, _data, CE),
    "straight-through": (_StraightThrough, _data, CE),
    "forces": (_Forces, _pairs, MSE),
    "detached term": (lambda: nn.Linear(4, 3), _pairs, isoflat.BatchLoss(fn=_detached_term)),
    "CTC on raw scores": (lambda: nn.Linear(4, 12), _data, _ctc),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ELSEWHERE)
def test_gradients_of_something_else_are_refused(name, dtype):
    build, data, loss = ELSEWHERE[name]
    net = _seeded(build, dtype)
    for measure in ("hessian_spectral_norm", "gradient_norm"):
        with pytest.raises(isoflat.IsoflatError, match=r"gradient|arrive|symmetric|Hessian products"):
            isoflat.measure(net, data(dtype=dtype), loss, measure=measure, **PLAIN)


def test_a_warning_is_a_note_and_names_what_differs():
    net = _seeded(_Hooked, torch.float64)
    estimate = isoflat.measure(net, _data(), CE, check="warn", **PLAIN)
    (note,) = (note for note in estimate.notes if "the gradient is not that of the loss" in note)
    assert "first." in note
    assert "last." not in note


def test_products_of_another_function_are_refused_though_the_gradient_is_right(monkeypatch):
    """The third derivative of the loss is wrong in the product only: planted."""
    from isoflat.measurement import audit

    whole = audit._product
    monkeypatch.setattr(audit, "_product", lambda *args: 1.1 * whole(*args))
    for name in ("tanh", "relu"):
        net = _seeded(ORDINARY[name], torch.float64)
        with pytest.raises(isoflat.UnsupportedModel, match="second difference"):
            isoflat.measure(net, _data(), CE, **PLAIN)


# Gradients that never arrive ------------------------------------------------------------------------------------------


class _Again(torch.autograd.Function):
    """A block that recomputes itself in its backward, weights among its arguments."""

    @staticmethod
    def forward(ctx, block, x, *weights):
        ctx.block, ctx.x, ctx.weights = block, x, weights
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            out = ctx.block(ctx.x)
        return None, None, *torch.autograd.grad(out, ctx.weights, gradient, allow_unused=True)


class _Reentrant(torch.autograd.Function):
    """The same, whose backward writes into the weights' own gradients."""

    @staticmethod
    def forward(ctx, block, x):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            out = ctx.block(x)
        torch.autograd.backward(out, gradient)
        return None, x.grad


class _Block(nn.Module):
    def __init__(self, apply):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.block = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)
        self.apply_block = apply

    def forward(self, x):
        return self.head(self.apply_block(self.block, self.first(x)))


def _adjoint(block, x):
    """An adjoint solver: the state's gradient is integrated, that of the weights is left out."""

    class Solve(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            with torch.no_grad():
                for _ in range(4):
                    x = x + 0.25 * block(x)
            return x

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                x = start = x.detach().requires_grad_(True)
                for _ in range(4):
                    x = x + 0.25 * block(x)
                return torch.autograd.grad(x, start, gradient)

    return Solve.apply(x)


class _Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    @torch.no_grad()
    def forward(self, x):
        return self.net(x)


NEVER = {
    "recomputed": (lambda: _Block(lambda block, x: _Again.apply(block, x, *block.parameters())), "block.0"),
    "reentrant": (lambda: _Block(_Reentrant.apply), "block.0"),
    "adjoint": (lambda: _Block(_adjoint), "block.0"),
    "no_grad": (_Silent, "net."),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NEVER)
def test_gradients_that_never_arrive_are_refused_and_named(name, dtype):
    build, named = NEVER[name]
    net = _seeded(build, dtype)
    for measure in ("hessian_spectral_norm", "gradient_norm"):
        with pytest.raises(isoflat.UnsupportedModel, match=f"never arrive at {named}"):
            isoflat.measure(net, _data(dtype=dtype), CE, measure=measure, **PLAIN)


def _still(net, data, loss=CE):
    """Names that move no loss, and all that have no gradient."""
    risk = EmpiricalRisk(Network(net), as_loss(loss), as_batches(data))
    state = risk.network.state().to(dtype=torch.float64)
    seen = risk.survey(state)
    blocks = state.space.block_norms(seen.gradient).tolist()
    silent = [name for name, size in zip(state.space.names, blocks, strict=True) if size == 0]
    own, _ = own_model(risk, state, data[0])
    return arrivals(own, data, silent, seen.unused), silent


def test_dead_units_and_kinks_at_the_point_show_no_slope():
    net = _seeded(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), DTYPES[1]
    )
    with torch.no_grad():
        net[0].bias.fill_(-1e3)
    found, silent = _still(net, _data())
    assert {"0.weight", "0.bias"} <= set(silent)
    assert found.missing == ()
    assert {"0.weight", "0.bias"} <= set(found.still)
    with torch.no_grad():  # every unit sits on its kink
        net[0].weight.zero_()
        net[0].bias.zero_()
    assert {"0.weight", "0.bias"} <= set(_still(net, _data())[1])
    isoflat.measure(net, _data(), CE, **PLAIN)


def test_zero_partners_show_no_slope():
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    net = _seeded(Adapter, torch.float64)
    with torch.no_grad():
        net.b.weight.zero_()
    found, silent = _still(net, _data())
    assert (silent, found.still) == (["a.weight"], ("a.weight",))
    with torch.no_grad():
        net.a.weight.zero_()
    assert _still(net, _data())[0].missing == ()


def test_what_is_not_used_is_said_only_where_the_loss_does_not_change():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare, self.used = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    net = _seeded(Spare, torch.float64)
    words = "the loss does not depend on: spare.bias, spare.weight (zero curvature)"
    assert words in isoflat.measure(net, _data(), CE, **PLAIN).notes
    assert words not in isoflat.measure(net, _data(), CE, check="skip", **PLAIN).notes


# The user's own model -------------------------------------------------------------------------------------------------


def _own(net, loss, batch, dtype=torch.float64):
    risk = EmpiricalRisk(Network(net), as_loss(loss), as_batches([batch]))
    return own_model(risk, risk.network.state().to(dtype=dtype), batch)


def test_penalties_that_reach_for_the_users_model_reach_for_the_copy():
    net = _seeded(ORDINARY["tanh"], torch.float64)

    def penalised(model, batch):
        penalty = 0.1 * sum(parameter.square().sum() for parameter in net.parameters())
        return (CE(net(batch[0]), batch[1]) + penalty) * len(batch[1]), len(batch[1])

    loss = isoflat.BatchLoss(fn=penalised)
    seen = isoflat.measure(net, _data(), loss, **PLAIN)
    assert not any("gradients against" in note for note in seen.notes)
    batch = _data()[0]
    own, _ = _own(net, loss, batch)
    moved = {name: 1.01 * tensor for name, tensor in own.state.parameters.items()}
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.01)
        penalty = 0.1 * sum(parameter.square().sum() for parameter in twin.parameters())
        wanted = float((CE(twin(batch[0]), batch[1]) + penalty) * len(batch[1]))
    assert own.total(batch, moved) == pytest.approx(wanted, rel=1e-12)


def test_what_reaches_for_nothing_is_left_alone():
    net, other = nn.Linear(1, 1), nn.Linear(1, 1)
    memo = {}
    copy.deepcopy(net, memo)
    for value in (CE, lambda x: other(x), [other], {"a": other}, F.cross_entropy):
        assert rebound(value, memo) is value


def test_models_that_keep_something_between_calls_get_fresh_copies():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head, self.cache = nn.Linear(4, 4), nn.Linear(4, 3), None

        def forward(self, x):
            if self.cache is None:
                self.cache = self.inner.weight.detach() @ self.inner.weight.detach().T
            return self.head(torch.tanh(self.inner(x) @ self.cache))

    net, batch = _seeded(Cached, torch.float64), _data()[0]
    own, _ = _own(net, CE, batch)
    assert own.fresh
    moved = {name: 1.5 * tensor for name, tensor in own.state.parameters.items()}
    twin = _seeded(Cached, torch.float64)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        wanted = float(F.cross_entropy(twin(batch[0]), batch[1], reduction="sum"))
    assert own.total(batch, moved) == pytest.approx(wanted, rel=1e-12)
    assert not _own(_seeded(ORDINARY["attention"], torch.float64), CE, batch)[0].fresh


def test_networks_that_run_in_float32_only_are_checked_there():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            assert x.dtype == torch.float32, "float32 only"
            return self.last(torch.tanh(self.first(x)))

    net = _seeded(Narrow, torch.float32)
    own, why = _own(net, CE, _data(dtype=torch.float32)[0], torch.float32)
    assert own.state.dtype == torch.float32
    assert "float32 only" in why


@pytest.mark.parametrize("dtype", DTYPES)
def test_sure_networks_are_no_wrong_ones(dtype):
    """Losses near zero, made of numbers next to one: slopes are rounding."""
    net = _seeded(ORDINARY["tanh"], dtype)
    x = torch.cat([inputs for inputs, _ in _data(dtype=dtype)])
    with torch.no_grad():
        net[2].bias.zero_()
        net[2].weight.mul_(2e3)
        scores = net(x)
    estimate = isoflat.measure(net, (x, scores.argmax(1)), CE, **PLAIN)
    assert math.isfinite(estimate.value)


def test_minima_are_no_wrong_gradients():
    x = torch.randn(30, 4, generator=_drawn(), dtype=torch.float64)
    y = x @ torch.randn(4, 2, generator=_drawn(2), dtype=torch.float64) + 0.1 * torch.randn(30, 2, generator=_drawn(3))
    net = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    for targets in (y, x @ net.weight.detach().T):  # with a loss left, and without
        assert isoflat.measure(net, (x, targets), MSE, **PLAIN).value > 0


def test_rows_of_padding_are_held_by_intent():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 3)
            with torch.no_grad():
                self.table.weight[0] = 1.0

        def forward(self, x):
            return self.head(torch.tanh(self.table((x.abs() * 3).long().clamp(max=4)).mean(1)))

    estimate = isoflat.measure(_seeded(Padded, torch.float64), _data(), CE, **PLAIN)
    assert not any("not that of the loss" in note for note in estimate.notes)


def test_memory_that_runs_out_is_silence_not_an_error():
    net = _seeded(ORDINARY["tanh"], torch.float64)
    with mock.patch("isoflat.risk.slopes.Audit.compare", side_effect=torch.OutOfMemoryError("planted")):
        notes = isoflat.measure(net, _data(), CE, **PLAIN).notes
    assert any("silent: memory ran out" in note for note in notes)


def test_the_state_of_the_copy_is_that_of_the_point():
    net = _seeded(ORDINARY["convolution"], torch.float32)
    own, _ = _own(net, CE, _data(dtype=torch.float32)[0], torch.float64)
    assert isinstance(own.state, State)
    assert own.kinked
    assert next(net.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["hook", "recomputed"])
def test_doctor_checks_the_same(name):
    build, data, loss = ELSEWHERE.get(name) or (NEVER[name][0], _data, CE)
    right, wrong = (subject(_seeded(make, torch.float64), data(), loss) for make in (ORDINARY["tanh"], build))
    seen, _ = examine._finite(right)
    route, _ = examine._products(right)
    assert examine._arrives(*seen)[0]
    assert "agree on the first batch" in examine._own(right, seen[1], route)[1]
    with pytest.raises(isoflat.UnsupportedModel, match=r"never arrive|not that of the loss"):
        examine._arrives(*(seen := examine._finite(wrong)[0])), examine._own(wrong, seen[1], route)


def test_a_product_that_is_not_symmetric_is_called_that():
    """A dual forward pass differentiates the gradient as it is: here one whose derivative is not symmetric."""
    net = _seeded(_Hooked, torch.float64)
    risk = EmpiricalRisk(Network(net), as_loss(CE), as_batches(_data()))
    with pytest.raises(isoflat.UnsupportedModel, match=r"not symmetric|differ by"):
        choose(risk, risk.network.state())
    assert "not symmetric" in _fault(Compared(1e-9, 0.1), AGREEMENT, differences=False)
    assert "not symmetric" in _fault(Compared(1e-9, 0.1), AGREEMENT, differences=True)
    assert not _fault(Compared(1e-9, 1e-12), AGREEMENT, differences=False)
