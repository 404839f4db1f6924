"""Operations without a forward derivative, and networks that cannot be traced: proved otherwise, or refused in one line."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import isoflat
from isoflat.symmetry.finding import discover
from isoflat.symmetry.finding.bases.rules import RULES

CE = nn.CrossEntropyLoss()


class Around(nn.Module):
    """Two linear maps, which allow every change of basis between them, and an operation after them."""

    def __init__(self, operation, between):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 8), nn.LazyLinear(3)
        self.operation, self.between = operation, between

    def forward(self, x):
        return self.c(self.operation(self.b(self.between(self.a(x)))).flatten(1))


class Bent(torch.autograd.Function):
    """A function whose derivative is written by hand, as activations of old repositories are."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return slope * (1 - x.tanh() ** 2)


def _sampled(y):
    return F.grid_sample(y.view(-1, 2, 2, 2), y.view(-1, 2, 2, 2).tanh(), align_corners=False)


def _distances(y):
    return torch.cdist(y.view(-1, 2, 4), y.view(-1, 2, 4).flip(1) + 1)


WITHOUT = {"grid_sample": _sampled, "cdist": _distances, "autograd.Function": Bent.apply}


def _net(operation, dtype=torch.float64, between=nn.Identity()):  # noqa: B008
    torch.manual_seed(0)
    net = Around(operation, between)
    net(torch.randn(2, 5))
    return net.to(dtype).eval()


def _data(dtype=torch.float64, rows=6):
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, 5, generator=g).to(dtype), torch.randint(0, 3, (rows,), generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WITHOUT)
def test_changes_of_basis_are_proved_by_finite_ones(name, dtype):
    net, (x, _) = _net(WITHOUT[name], dtype), _data(dtype)
    with pytest.raises((RuntimeError, NotImplementedError)):  # the control: there is no forward derivative
        torch.func.jvp(net, (x,), (x,))
    found = isoflat.symmetries(net, x, loss=CE)
    assert found.basis.dimension == 4 * 4 - 4  # off the diagonal; scales of the four units are counted as such
    twin = copy.deepcopy(net)
    g = torch.eye(4) + 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        g = g.to(dtype)
        twin.a.weight.copy_(g @ net.a.weight), twin.a.bias.copy_(g @ net.a.bias)
        twin.b.weight.copy_(net.b.weight @ torch.linalg.inv(g))
        assert torch.allclose(net(x), twin(x), atol=1e-4)
    if name == "autograd.Function":
        a, b = (isoflat.measure(q, _data(dtype), CE, rtol=1e-4, dtype="float64").value for q in (net, twin))
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize("name", WITHOUT)
def test_finite_changes_refuse_a_wrong_candidate(name, monkeypatch):
    """A rule that lets changes of basis through a nonlinearity is found out without forward derivatives too."""
    net, (x, _) = _net(WITHOUT[name], between=nn.ReLU()), _data()
    monkeypatch.setitem(RULES, "aten.relu.default", lambda tensor_axes, node, units: units)
    found = isoflat.symmetries(net, x, loss=CE)
    assert found.basis.dimension == 0
    monkeypatch.setattr(discover, "accepted", lambda basis, *_: basis)
    with pytest.raises(isoflat.SymmetryViolated, match=r"a change of basis of .*a\.weight.*b\.weight"):
        isoflat.symmetries(net, x, loss=CE)


def test_candidates_that_no_number_decides_are_listed():
    """At random weights the logarithm is no number: what it hides is given up, and said."""

    class Log(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.log()

        @staticmethod
        def backward(ctx, slope):
            return slope / ctx.saved_tensors[0]

    class Logs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 4, bias=False)
            with torch.no_grad():
                for map_ in (self.a, self.b):
                    map_.weight.copy_(map_.weight.abs())

        def forward(self, x):
            return Log.apply(self.b(self.a(x)))

    net = Logs().double()
    x = torch.rand(5, 3, dtype=torch.float64) + 0.1
    found = isoflat.symmetries(net, x, verify=False)
    assert found.basis.dimension == 0
    assert any("no numbers" in reason for line in found.report for reason in line.reasons)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 4), Choosing(), nn.Linear(4, 3))

    def forward(self, x):
        return self.inner(x)


class Choosing(nn.Module):
    def forward(self, x):
        return x.relu() if x.sum() > 0 else x.tanh()


class Record:
    def __init__(self, x):
        self.x = x


class OfRecords(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, record):
        return self.a(record.x)


class Whole(OfRecords):
    def forward(self, x):
        return self.a(x).argmax(1)


class Fields(dict):
    """A mapping of a class of its own, which torch.export does not take apart."""


class OfFields(OfRecords):
    def forward(self, x):
        return Fields(scores=self.a(x))


class Raising(OfRecords):
    def forward(self, x):
        raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("net", "example", "told"),
    [
        (Branching(), torch.randn(4, 5), r"'inner\.1' \(Choosing.*takes the branch.*layerwise"),
        (OfRecords(), Record(torch.randn(4, 5)), "example"),
        (OfRecords(), (Record(torch.randn(4, 5)), torch.randn(4, 5)), "layerwise"),
        (Whole(), torch.randn(4, 5), "wrap it in a module that returns its scores"),
        (OfFields(), torch.randn(4, 5), r"Fields'> in output.*returns a tensor"),
        (Raising(), torch.randn(4, 5), r"Raising \(test_untraceable"),
        (nn.Linear(5, 3), torch.randn(4, 6), "layerwise"),
        (nn.Linear(5, 3), 3, "example"),
    ],
    ids=["branch", "record", "two inputs", "integers", "fields", "raises", "shape", "no tensor"],
)
def test_what_cannot_be_traced_is_named(net, example, told):
    with pytest.raises(isoflat.IsoflatError, match=told) as refused:
        isoflat.symmetries(net, example)
    assert "\n" not in str(refused.value)
    assert "github" not in str(refused.value)


def test_a_network_whose_rows_belong_together_is_traced_on_all_of_them():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x, edges):
            h = torch.relu(self.a(x))
            return self.b(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))

    net = Graph().double()
    x, edges = torch.randn(6, 5, dtype=torch.float64), torch.tensor([[0, 5, 3, 2, 1, 4, 4], [1, 2, 5, 4, 0, 3, 2]])
    found = isoflat.symmetries(net, (x, edges), loss=CE)
    assert found.dimension > 0
    assert len(found.args[0]) == 6


def test_lists_and_records_of_tensors_are_inputs():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, parts):
            return self.b(torch.relu(self.a(parts["left"][0] - parts["right"])))

    x = torch.randn(2, 4, 5)
    found = isoflat.symmetries(Lists(), ({"left": [x[0]], "right": x[1]},), loss=CE)
    assert found.scaling.dimension == 4


def _wrong(net, x):
    """Symmetries of a network whose activation is exchanged afterwards: they were right, and are not any more."""
    found = isoflat.symmetries(net, x)
    found.skeleton[1] = nn.Tanh()
    return found


def test_a_violation_names_group_and_tensors():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with pytest.raises(isoflat.SymmetryViolated, match=r"a scale of 0\.bias, 0\.weight, 2\.weight.*rule") as refused:
        _wrong(net, torch.randn(6, 5)).verify()
    assert "(exact)" in str(refused.value)


def test_numbers_that_are_none_are_not_laid_at_a_rules_door():
    first = []  # kept outside of the network, in which passes leave no traces

    class Narrow(nn.Module):
        """Runs where it was first, and gives NaN elsewhere."""

        def forward(self, x):
            first.append(float(x.square().sum()))
            return x if first[-1] == first[0] else x * torch.nan

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    found = isoflat.symmetries(net, torch.randn(6, 5))
    found.skeleton[1] = nn.Sequential(nn.ReLU(), Narrow())
    with pytest.raises(isoflat.SymmetryViolated, match=r"to NaN.*a scale of 0\.bias") as refused:
        found.verify(spread=3.0)
    assert "rule" not in str(refused.value)
    nothing = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with pytest.raises(isoflat.NonFinite, match="no output"):
        isoflat.symmetries(nothing, torch.full((4, 5), torch.nan, dtype=torch.float64))


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.a, self.b, self.draw = nn.Linear(5, 4), nn.Linear(4, 3), draw

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) + self.draw(x)


def test_other_random_numbers_are_not_laid_at_a_rules_door():
    with pytest.raises(isoflat.NondeterministicRisk, match="random") as refused:
        isoflat.symmetries(Noisy(lambda x: float(np.random.default_rng().standard_normal())), torch.randn(4, 5))
    assert "rule" not in str(refused.value)
    assert isoflat.symmetries(Noisy(lambda x: torch.randn(len(x), 3).to(x)), torch.randn(4, 5)).dimension == 4


class Counting(nn.Module):
    """Writes into buffers, of whole and of other numbers, and into an attribute, at every pass."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(4))
        self.last = None

    def forward(self, x):
        h = torch.relu(self.n(self.a(x)))
        self.calls += 1
        self.seen.add_(h.detach().mean(0))
        return self.b(h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_the_users_network_is_left_as_it_was(dtype, training):
    torch.manual_seed(0)
    net = Counting().to(dtype).train(training)
    x = (torch.randn(8, 5) + 3).to(dtype)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    versions = {name: tensor._version for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = isoflat.symmetries(net, x, loss=CE)
    assert found.dimension > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert versions == {name: tensor._version for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    assert net.training is training
    assert net.n.training is training
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])


class Looked(nn.Module):
    """A table that is looked up in one of three ways."""

    def __init__(self, how, sparse):
        super().__init__()
        self.how, self.sparse = how, sparse
        self.e = nn.EmbeddingBag(9, 4, mode="sum", sparse=sparse) if how == "bag" else nn.Embedding(9, 4, sparse=sparse)
        self.h = nn.Linear(4, 3)

    def forward(self, ids):
        if self.how == "function":
            return self.h(F.embedding(ids, self.e.weight, None, None, 2.0, False, self.sparse).tanh().sum(1))
        return self.h(self.e(ids) if self.how == "bag" else self.e(ids).tanh().sum(1))


def _dense_curvature(net, ids, target):
    """Largest eigenvalue of the Hessian, written with one-hot vectors: it shares no code with tables or isoflat."""
    flat = torch.cat([p.detach().reshape(-1) for p in (net.e.weight, net.h.weight, net.h.bias)])

    def loss(vector):
        table, weight, bias = vector.split([36, 12, 3])
        rows = F.one_hot(ids, 9).double() @ table.view(9, 4)
        rows = rows if net.how == "bag" else rows.tanh()
        return CE(rows.sum(1) @ weight.view(3, 4).T + bias, target)

    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat)).abs().max())


@pytest.mark.parametrize("how", ["module", "function", "bag"])
@pytest.mark.parametrize("ragged", [False, True])
def test_sparse_gradients_become_dense(how, ragged):
    torch.manual_seed(0)
    net = Looked(how, True).double()
    ids, target = torch.randint(0, 9, (8, 4)), torch.randint(0, 3, (8,))
    CE(net(ids), target).backward()
    assert net.e.weight.grad.is_sparse  # the control: such gradients are what the network gives
    net.zero_grad()
    data = [(ids[:5], target[:5]), (ids[5:], target[5:])] if ragged else (ids, target)
    made = isoflat.measure(net, data, CE, geometry="euclidean", rtol=1e-6)
    assert made.value == pytest.approx(_dense_curvature(net, ids, target), rel=1e-5)
    assert net.e.sparse
    assert net.e.weight.grad is None
    assert isoflat.measure(net, data, CE, rtol=1e-2).value > 0
