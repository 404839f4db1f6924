"""Losses as functions of structured outputs, with their Gauss-Newton and Fisher matrices, against dense truths.

The truths are made by torch.func and by closed forms here; none of them shares code with the library.
"""

import copy
import math
from collections import namedtuple
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import isoflat
from isoflat.curvature.diagonal import gauss_newton_diagonal, moment_diagonal
from isoflat.curvature.fisher import empirical_fisher, sampled_fisher
from isoflat.curvature.gauss_newton import gauss_newton
from isoflat.risk.batches import as_batches
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.likelihood import likelihood
from isoflat.risk.likelihood.known import of_criterion
from isoflat.risk.likelihood.records import covariance, spread
from isoflat.risk.losses import as_loss
from isoflat.risk.network import Network

Pair = namedtuple("Pair", ["scores", "value"])


@dataclass
class Record:
    """An output as many libraries return it."""

    logits: Tensor
    value: Tensor | None = None


FORMS = {
    "tuple": (lambda c, r: (c, r), lambda o: (o[0], o[1])),
    "list": (lambda c, r: [c, r], lambda o: (o[0], o[1])),
    "dict": (lambda c, r: {"c": c, "r": r, "n": 3}, lambda o: (o["c"], o["r"])),
    "named tuple": (Pair, lambda o: (o.scores, o.value)),
    "dataclass": (Record, lambda o: (o.logits, o.value)),
    "namespace": (lambda c, r: SimpleNamespace(c=c, r=r), lambda o: (o.c, o.r)),
    "nested": (lambda c, r: {"heads": (c, {"r": r})}, lambda o: (o["heads"][0], o["heads"][1]["r"])),
}


class Two(nn.Module):
    """Two heads on one body, returned in some form."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.c, self.r = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.form = form

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.form(self.c(h), self.r(h))


def _data(rows=11):
    torch.manual_seed(1)
    return torch.randn(rows, 4).double(), torch.randint(0, 3, (rows,)), torch.randn(rows, 1).double()


def _risk(net, loss, batches):
    return EmpiricalRisk(Network(net), as_loss(loss), as_batches(batches))


def _matrix(products):
    size = products.state.space.size
    return products.products(torch.eye(size, dtype=torch.float64))


def _dense(net, outputs, hessians):
    """`Σ_k J_kᵀ H_k J_k` for tensors that `outputs(model)` gives, and their Hessians as square matrices."""
    names = [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]
    vector = torch.cat([p.detach().reshape(-1) for p in net.parameters()])

    def run(vector, k):
        parts = vector.split([math.prod(shape) for shape in shapes])
        named = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(_Use(net, outputs), {f"net.{n}": t for n, t in named.items()}, ())[k].reshape(
            -1
        )

    total = torch.zeros(len(vector), len(vector), dtype=torch.float64)
    for k, hessian in enumerate(hessians):
        jacobian = torch.func.jacrev(lambda v, k=k: run(v, k))(vector)
        total += jacobian.T @ hessian @ jacobian
    return total


class _Use(nn.Module):
    def __init__(self, net, use):
        super().__init__()
        self.net, self.use = net, use

    def forward(self):
        return self.use(self.net)


def _softmax_blocks(scores, weight=1.0):
    """Block-diagonal Hessian of summed cross-entropy in scores of shape (targets, classes)."""
    p = scores.detach().softmax(-1)
    return torch.block_diag(*(weight * (torch.diag(row) - torch.outer(row, row)) for row in p))


@pytest.mark.parametrize("ragged", [False, True], ids=["one batch", "ragged"])
@pytest.mark.parametrize("form", FORMS)
def test_two_heads(form, ragged):
    """Gauss-Newton, Fisher by many draws' records, and row gradients of two heads in one output, of any form."""
    make, read = FORMS[form]
    net = Two(make).double()
    x, y, z = _data()
    before = copy.deepcopy(net.state_dict())

    def loss(output, target):
        scores, value = read(output)
        return F.cross_entropy(scores, target[0]) + 0.5 * F.mse_loss(
            value, target["r"] if isinstance(target, dict) else target[1]
        )

    batches = [(x[i : i + 4], (y[i : i + 4], z[i : i + 4])) for i in range(0, 11, 4)] if ragged else [(x, (y, z))]
    risk = _risk(net, loss, batches)
    state = risk.network.state()
    scores = read(net(x))[0]
    blocks = [_softmax_blocks(scores) / 11, torch.eye(11, dtype=torch.float64) / 11]
    truth = _dense(net, lambda model: read(model(x)), blocks)
    assert torch.allclose(_matrix(gauss_newton(risk, state)), truth, rtol=1e-9, atol=1e-12)
    assert torch.allclose(gauss_newton_diagonal(risk, state), truth.diagonal(), rtol=1e-9, atol=1e-12)

    gradients = []
    for i in range(11):
        row = loss(net(x[i : i + 1]), (y[i : i + 1], z[i : i + 1]))
        gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(row, list(net.parameters()))]))
    moment = torch.stack(gradients).T @ torch.stack(gradients) / 11
    assert torch.allclose(_matrix(empirical_fisher(risk, state)), moment, rtol=1e-9, atol=1e-12)
    assert torch.allclose(moment_diagonal(risk, state), moment.diagonal(), rtol=1e-9, atol=1e-12)
    value = sum(float(loss(net(a), t).detach()) * len(a) for a, t in batches) / 11
    assert risk.value(state) == pytest.approx(value, rel=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_two_heads_in_float32():
    """Loss, gradient and Gauss-Newton products in float32 are those of float64 to 1e-4; the network's kind is kept."""
    net = Two(FORMS["dict"][0])
    x, y, z = (part.float() if part.is_floating_point() else part for part in _data())
    loss = lambda o, t: F.cross_entropy(o["c"], t["y"]) + F.smooth_l1_loss(o["r"], t["z"])  # noqa: E731
    found = []
    for kind in (net, copy.deepcopy(net).double()):
        risk = _risk(kind, loss, [(x, {"y": y, "z": z})])
        state = risk.network.state()
        seen = risk.survey(state)
        found.append((torch.tensor(seen.loss), seen.gradient, _matrix(gauss_newton(risk, state)).double()))
    for narrow, wide in zip(*found, strict=True):
        assert float((narrow - wide).norm() / wide.norm()) < 1e-5
    assert next(net.parameters()).dtype == torch.float32


def test_expected_products_of_drawn_labels_are_the_fisher_matrix():
    """Exactly: the mean of `r̃ r̃ᵀ` over all labels, weighed by their probabilities, is the record's curvature."""
    net = Two(FORMS["tuple"][0]).double()
    x, y, z = _data(3)
    weights = torch.tensor([0.3, 1.0, 2.0]).double()

    def loss(output, target):
        each = F.cross_entropy(output[0], target[0], reduction="none")
        return (each * weights[: len(each)]).sum() / len(each)

    risk = _risk(net, loss, [(x, (y, z))])
    state = risk.network.state()
    p = net(x)[0].detach().softmax(1)
    truth = _dense(
        net,
        lambda model: (model(x)[0],),
        [torch.block_diag(*(w / 3 * (torch.diag(r) - torch.outer(r, r)) for w, r in zip(weights, p, strict=True)))],
    )
    assert torch.allclose(_matrix(gauss_newton(risk, state)), truth, rtol=1e-9, atol=1e-13)
    term = risk.term(state, (x, (y, z)))
    _check_drawn(likelihood(term.loss, term.z, (y, z)), term.z)


def _check_drawn(model, z, atol=0.02):
    """Labels at even steps of their distribution functions have the record's curvature on average."""
    torch.manual_seed(4)
    tangent = torch.randn(z.shape).double()
    truth = model.curvature(z, tangent)
    mean = torch.zeros_like(truth)
    for step in range(1500):
        labels = model.draw(z, torch.full(model.mass.shape, (step + 0.5) / 1500, dtype=torch.float64))
        mean += model.outer(model.residual(z, labels), tangent) / 1500
    assert float((mean - truth).norm() / truth.norm()) < atol


@pytest.mark.parametrize("permute", ["permute", "flatten", "shifted"])
@pytest.mark.parametrize("ragged", [False, True], ids=["one batch", "ragged"])
def test_scores_of_sequences(permute, ragged):
    """Scores `(N, T, V)` as a function of output and target: Gauss-Newton and its diagonal, Fisher drawn row by row."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    tokens, target = torch.randint(0, 5, (5, 6)), torch.randint(0, 4, (5, 6))
    losses = {
        "permute": lambda o, t: F.cross_entropy(o.permute(0, 2, 1), t),
        "flatten": lambda o, t: F.cross_entropy(o.reshape(-1, 4), t.reshape(-1)),
        "shifted": lambda o, t: nn.CrossEntropyLoss()(o[:, :-1].reshape(-1, 4), t[:, 1:].reshape(-1)),
    }
    batches = [(tokens[:2], target[:2]), (tokens[2:], target[2:])] if ragged else [(tokens, target)]
    risk = _risk(net, losses[permute], batches)
    state = risk.network.state()

    def scores(model):
        return (model(tokens)[:, :-1] if permute == "shifted" else model(tokens),)

    count = 25 if permute == "shifted" else 30
    truth = _dense(net, scores, [_softmax_blocks(scores(net)[0].reshape(-1, 4)) / count])
    assert torch.allclose(_matrix(gauss_newton(risk, state)), truth, rtol=1e-9, atol=1e-13)
    assert torch.allclose(gauss_newton_diagonal(risk, state), truth.diagonal(), rtol=1e-9, atol=1e-13)
    drawn = _matrix(sampled_fisher(risk, state, seed=0, draws=30))
    assert float((drawn - truth).norm() / truth.norm()) < 0.5
    whole = _matrix(sampled_fisher(replace(risk, batches=as_batches([(tokens, target)])), state, seed=0, draws=30))
    assert torch.allclose(drawn, whole, rtol=1e-9, atol=1e-13)


class Normal(nn.Module):
    """Mean and variance, in some form."""

    def __init__(self, form=lambda mean, variance: (mean, variance)):
        super().__init__()
        torch.manual_seed(0)
        self.t, self.m, self.s, self.form = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2), form

    def forward(self, x):
        h = torch.tanh(self.t(x))
        return self.form(self.m(h), self.s(h).exp())


def _gaussian_truth(net, x, y):
    """Hessian of the mean of `(log v + (y − μ)²/v)/2` in (μ, v), and its mean over labels, each through the network."""
    mean, v = net(x)
    mean, v = mean.detach().reshape(-1), v.detach().reshape(-1)
    n, far = len(mean), y.reshape(-1) - mean
    names = [name for name, _ in net.named_parameters()]

    def flat(*tensors):
        made = torch.func.functional_call(net, dict(zip(names, tensors, strict=True)), (x,))
        return torch.cat([made[0].reshape(-1), made[1].reshape(-1)])

    blocks = torch.func.jacrev(flat, tuple(range(len(names))))(*(p.detach() for p in net.parameters()))
    jacobian = torch.cat([block.reshape(2 * n, -1) for block in blocks], 1)
    hessian = torch.zeros(2 * n, 2 * n, dtype=torch.float64)
    fisher = hessian.clone()
    for i in range(n):
        hessian[i, i], fisher[i, i] = 1 / v[i], 1 / v[i]
        hessian[i, n + i] = hessian[n + i, i] = far[i] / v[i] ** 2
        hessian[n + i, n + i] = far[i] ** 2 / v[i] ** 3 - 1 / (2 * v[i] ** 2)
        fisher[n + i, n + i] = 1 / (2 * v[i] ** 2)
    return jacobian.T @ hessian @ jacobian / n, jacobian.T @ fisher @ jacobian / n


@pytest.mark.parametrize("function", [False, True], ids=["criterion", "function"])
def test_gaussian_likelihood_of_mean_and_variance(function):
    net = Normal().double()
    torch.manual_seed(2)
    x, y = torch.randn(7, 4).double(), torch.randn(7, 2).double()
    loss = (lambda o, t: F.gaussian_nll_loss(o[0], t, o[1])) if function else nn.GaussianNLLLoss()
    risk = _risk(net, loss, [(x[:3], y[:3]), (x[3:], y[3:])])
    state = risk.network.state()
    truth, fisher = _gaussian_truth(net, x, y)
    assert torch.allclose(_matrix(gauss_newton(risk, state)), truth, rtol=1e-9, atol=1e-12)
    term = risk.term(state, (x, y))
    model = likelihood(term.loss, term.z, y)
    run = lambda tensors: torch.cat(torch.func.functional_call(net, tensors, (x,)), 1)  # noqa: E731
    _, pull = torch.func.vjp(run, dict(state.parameters))
    columns = []
    for unit in torch.eye(state.space.size, dtype=torch.float64):
        z, tangent = torch.func.jvp(run, (dict(state.parameters),), (state.space.unflatten(unit),))
        columns.append(state.space.flatten(pull(model.curvature(z, tangent))[0]) / term.count)
    assert torch.allclose(torch.stack(columns), fisher, rtol=1e-9, atol=1e-12)
    _check_drawn(model, term.z, 0.05)
    drawn = _matrix(sampled_fisher(risk, state, seed=0, draws=60))
    assert float((drawn - fisher).norm() / fisher.norm()) < 0.5
    assert float((truth - fisher).norm() / fisher.norm()) > 0.1  # the two are told apart


@pytest.mark.parametrize(
    "form",
    [lambda m, v: {"mean": m, "var": v}, torch.distributions.Normal, lambda m, v: SimpleNamespace(mean=m, variance=v)],
)
def test_gaussian_criterion_reads_what_is_named(form):
    net = Normal(form).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    risk = _risk(net, nn.GaussianNLLLoss(), [(x, y)])
    made = net(x)
    mean = made["mean"] if isinstance(made, dict) else made.mean
    variance = made["var"] if isinstance(made, dict) else made.variance
    assert risk.value(risk.network.state()) == pytest.approx(
        float(F.gaussian_nll_loss(mean, y, variance).detach()), rel=1e-12
    )


def test_distribution_as_output():
    """A loss that asks a distribution for its log probability, as probabilistic regression does."""
    net = Normal(torch.distributions.Normal).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    risk = _risk(net, lambda o, t: -o.log_prob(t).mean(), [(x, y)])
    state = risk.network.state()

    def mean(z):
        return -torch.distributions.Normal(z[:, :2], z[:, 2:]).log_prob(y).mean()

    made = net(x)
    z = torch.cat([made.loc, made.scale], 1).detach()
    hessian = torch.func.hessian(mean)(z).reshape(24, 24)
    truth = _dense(net, lambda model: (torch.cat([(o := model(x)).loc, o.scale], 1),), [hessian])
    assert torch.allclose(_matrix(gauss_newton(risk, state)), truth, rtol=1e-9, atol=1e-12)


def test_records_with_logits():
    """A function may read `.logits` of a record, or be one of the scores; both are the same loss."""
    net = Two(Record).double()
    x, y, _ = _data()
    numbers = [
        isoflat.measure(net, [(x, y)], loss, measure="gauss_newton_trace", geometry="euclidean").value
        for loss in (
            lambda o, t: F.cross_entropy(o.logits, t),
            lambda o, t: F.cross_entropy(o, t),
            nn.CrossEntropyLoss(),
        )
    ]
    assert numbers[0] == pytest.approx(numbers[2], rel=1e-9)
    assert numbers[1] == pytest.approx(numbers[2], rel=1e-9)


def test_recurrent_state_is_left_out():
    """Tensors of the output that the loss never reads do not enter z, whatever their shape."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x):
            out, last = self.rnn(x)
            return self.head(out[:, -1]), last

    net = Recurrent().double()
    x, y = torch.randn(4, 3, 2).double(), torch.randint(0, 2, (4,))
    risk = _risk(net, lambda o, t: F.cross_entropy(o[0], t), [(x, y)])
    state = risk.network.state()
    assert risk.term(state, (x, y)).z.shape == (4, 2)
    truth = _dense(net, lambda model: (model(x)[0],), [_softmax_blocks(net(x)[0]) / 4])
    assert torch.allclose(_matrix(gauss_newton(risk, state)), truth, rtol=1e-9, atol=1e-12)


CRITERIA: dict[str, tuple[Any, Any, Any]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), lambda z: z, torch.tensor([0, 2, 1])),
    "weighted, smoothed, ignored": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double(), label_smoothing=0.1, ignore_index=2),
        lambda z: z,
        torch.tensor([0, 2, 1]),
    ),
    "nll": (nn.NLLLoss(torch.tensor([1.0, 2.0, 0.5]).double()), lambda z: z.log_softmax(1), torch.tensor([0, 2, 1])),
    "bce with logits": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 1.0, 0.5]).double()),
        lambda z: z,
        torch.tensor([[0.0, 1, 0], [1, 1, 0], [0, 0, 1]]).double(),
    ),
    "bce": (nn.BCELoss(), lambda z: z.sigmoid(), torch.tensor([[0.0, 1, 0], [1, 1, 0], [0, 0, 1]]).double()),
    "squared error": (nn.MSELoss(), lambda z: z, torch.zeros(3, 3).double()),
    "poisson": (nn.PoissonNLLLoss(), lambda z: z, torch.ones(3, 3).double()),
    "poisson rate": (nn.PoissonNLLLoss(log_input=False, eps=0), lambda z: z.exp(), torch.ones(3, 3).double()),
}


def _enumerated(criterion, z, target):
    """`E r̃ r̃ᵀ` of the summed loss in z, by its own gradients at all labels (normal ones by quadrature), row by row."""
    total = torch.zeros(z.numel(), z.numel(), dtype=torch.float64)
    each = copy.deepcopy(criterion)
    each.reduction = "none"
    if isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss):
        p = z.softmax(1)
        mass = each(z * 0 + (0 if isinstance(criterion, nn.NLLLoss) else 1), target)
        own = torch.ones(3).double() if criterion.weight is None else criterion.weight
        # the loss of equal scores is log 3 for each unit of mass
        mass = own[target] if isinstance(criterion, nn.NLLLoss) else mass / math.log(3)
        log_p = (lambda s: s) if isinstance(criterion, nn.NLLLoss) else (lambda s: s.log_softmax(0))
        for i in range(len(z)):
            for c in range(3):
                g = torch.func.grad(lambda s, c=c: -log_p(s)[c])(z[i])
                block = slice(3 * i, 3 * i + 3)
                total[block, block] += mass[i] * p[i, c] * torch.outer(g, g)
        return total
    flat, labels = z.reshape(-1), target.reshape(-1)
    positive = getattr(criterion, "pos_weight", None)
    for k, value in enumerate(flat):
        if isinstance(criterion, nn.MSELoss):
            total[k, k] = 2.0  # (2(z − y))² over y of variance 1/2
            continue
        if isinstance(criterion, nn.PoissonNLLLoss):
            rate = value.exp() if criterion.log_input else value
            support = torch.arange(80).double()
            chances = (support * rate.log() - rate - torch.lgamma(support + 1)).exp()
            plain = criterion.log_input
            slope = [
                torch.func.grad(lambda s, y=y, plain=plain: s.exp() - y * s if plain else s - y * s.log())(value)
                for y in support
            ]
            total[k, k] = (chances * torch.stack(slope) ** 2).sum()
            continue
        logits = isinstance(criterion, nn.BCEWithLogitsLoss)
        p = value.sigmoid() if logits else value
        mass = 1.0 if positive is None or labels[k] == 0 else float(positive[k % 3])
        plain = F.binary_cross_entropy_with_logits if logits else F.binary_cross_entropy
        for y, chance in ((torch.ones(()).double(), p), (torch.zeros(()).double(), 1 - p)):
            g = torch.func.grad(lambda s, y=y, plain=plain: plain(s, y))(value)
            total[k, k] += mass * chance * g**2
    return total


@pytest.mark.parametrize("name", CRITERIA)
def test_records(name):
    """Curvature, square roots and residuals of each known loss are those of its own gradients at all labels."""
    criterion, link, target = CRITERIA[name]
    torch.manual_seed(3)
    z = link(torch.randn(3, 3).double())
    record = of_criterion(criterion, z, target)
    truth = _enumerated(criterion, z, target)
    curved = torch.stack([record.curvature(z, unit.view(3, 3)).reshape(-1) for unit in torch.eye(9).double()])
    assert torch.allclose(curved, truth, rtol=1e-10, atol=1e-14)
    roots = sum(torch.block_diag(*(torch.outer(row, row) for row in factor)) for factor in record.factors(z))
    assert torch.allclose(roots, truth, rtol=1e-10, atol=1e-14)
    summed = copy.deepcopy(criterion)
    summed.reduction = "sum"
    hessian = torch.func.hessian(lambda z: summed(z, target))(z).reshape(9, 9)
    assert record.canonical == torch.allclose(hessian, truth, rtol=1e-10, atol=1e-12)
    draws = ((torch.arange(4000).double() + 0.5) / 4000)[:, None].expand(4000, record.mass.numel())
    mean = torch.zeros(9, 9, dtype=torch.float64)
    for uniform in draws[::8]:
        labels = record.draw(z, uniform.reshape(record.mass.shape))
        residual = record.residual(z, labels)
        unit = torch.ones(3, 3).double()
        assert residual.shape == z.shape
        assert torch.isfinite(record.outer(residual, unit)).all()
        rows = residual.reshape(3, 3)
        if name in ("cross-entropy", "weighted, smoothed, ignored", "nll"):
            mean += torch.block_diag(*(torch.outer(row, row) for row in rows)) / 500
        else:
            mean += torch.diag(rows.reshape(-1) ** 2) / 500
    assert torch.allclose(mean, truth, rtol=0.05, atol=0.02)


def _sure(gap):
    """Scores of a network that is sure of its classes."""
    z = torch.tensor([[gap, 0.0, -1.0], [0.5, gap, 0.0]]).double()
    return z, torch.tensor([0, 1])


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 80.0])
def test_nothing_cancels_where_a_network_is_sure(gap):
    """`p`, `1 − p` and `p (1 − p)` against mpmath-free closed forms: sums of small exponentials."""
    z, target = _sure(gap)
    record = of_criterion(nn.CrossEntropyLoss(), z, target)
    left = torch.stack([(z[i] - z[i, i]).exp()[[c for c in range(3) if c != i]].sum() for i in range(2)])
    rest = left / (1 + left)  # 1 − p of the likeliest class
    residual = record.residual(z, target)
    assert torch.allclose(residual[[0, 1], [0, 1]], -rest, rtol=1e-12, atol=0)
    unit = torch.eye(3).double()[:2]
    curved = record.curvature(z, unit)[[0, 1], [0, 1]]
    assert torch.allclose(curved, rest / (1 + left), rtol=1e-12, atol=0)
    naive = (1 - z.softmax(1)[[0, 1], [0, 1]]) * z.softmax(1)[[0, 1], [0, 1]]
    if gap > 36:
        assert not torch.allclose(naive, rest / (1 + left), rtol=1e-3, atol=0)  # the test bites
    odds = torch.tensor([[gap], [-gap]]).double()
    record = of_criterion(nn.BCEWithLogitsLoss(), odds, torch.tensor([[1.0], [0.0]]).double())
    small = math.exp(-gap) / (1 + math.exp(-gap))
    assert record.residual(odds, torch.tensor([[1], [0]])).tolist() == [
        [pytest.approx(-small, rel=1e-12)],
        [pytest.approx(small, rel=1e-12)],
    ]
    assert record.curvature(odds, torch.ones(2, 1).double()).reshape(-1).tolist() == pytest.approx(
        [small * (1 - small)] * 2, rel=1e-12
    )
    weight = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]]).double()
    p = z.softmax(1)
    pairs = [(0, 1), (0, 2), (1, 2)]
    exact = [sum(p[i, a] * p[i, b] * (weight[a] - weight[b]).square().sum() for a, b in pairs) for i in range(2)]
    assert spread(p, weight).tolist() == pytest.approx([float(value) for value in exact], rel=1e-11)
    difference = [weight[a] - weight[b] for a, b in pairs]
    exact = torch.stack(
        [
            sum(p[i, a] * p[i, b] * torch.outer(d, d) for (a, b), d in zip(pairs, difference, strict=True))
            for i in range(2)
        ]
    )
    assert torch.allclose(covariance(p, weight), exact, rtol=1e-10, atol=0)


SURE = {
    "classes": (nn.CrossEntropyLoss(), 3),
    "weights and an ignored class": (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), ignore_index=2), 3),
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), 3),
    "shares": (nn.CrossEntropyLoss(), 3),
    "odds": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0])), 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SURE)
@pytest.mark.parametrize("gap", [25.0, 45.0])
def test_hessian_of_sure_networks(gap, name, dtype):
    """The whole Hessian, against a dense one of the loss written as log1p of sums of small exponentials."""
    criterion, classes = SURE[name]
    torch.manual_seed(0)
    x = torch.randn(8, 2)
    y = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]) if classes == 3 else torch.tensor([[0.0], [1.0]] * 4)
    sign = 1.0 if classes == 3 else -1.0
    x[:, 0] = sign * torch.tensor([1.0, -1.0] * 4)
    net = nn.Linear(2, classes).to(dtype)
    with torch.no_grad():
        net.weight.mul_(0.1)
        net.bias.zero_()
        net.weight[0, 0] += gap
    labels = F.one_hot(y, 3).to(dtype) if name == "shares" else y
    net64 = copy.deepcopy(net).double()
    found = isoflat.measure(
        net, [(x.to(dtype), labels)], criterion, measure="hessian_spectral_norm", geometry="euclidean", dtype="float64"
    )
    weight = getattr(criterion, "weight", None)

    def mean(w, b):
        z = x.double() @ w.T + b
        if classes == 1:
            odds = torch.where(y > 0, z, -z)
            return (torch.where(y > 0, 2.0, 1.0) * torch.log1p((-odds).exp())).mean()
        own = torch.ones(8).double() if weight is None else weight.double()[y]
        apart = torch.stack([z[i, [c for c in range(3) if c != y[i]]] - z[i, y[i]] for i in range(8)])
        total = (own * torch.log1p(apart.exp().sum(1))).sum()
        return total if criterion.reduction == "sum" else total / own.sum()

    w, b = net64.weight.detach(), net64.bias.detach()
    flat = torch.cat([w.reshape(-1), b])
    hessian = torch.func.hessian(lambda v: mean(v[: w.numel()].view_as(w), v[w.numel() :]))(flat)
    truth = float(torch.linalg.eigvalsh(hessian / hessian.abs().max())[-1] * hessian.abs().max())
    assert found.lower * (1 - 1e-9) <= truth <= found.upper * (1 + 1e-9)
    assert found.value == pytest.approx(truth, rel=1e-3)


def test_ordinary_networks_keep_torchs_arithmetic():
    """Loss and gradient of a network that is not sure are those of the criterion, to the last bit."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3), torch.randn(9, 4), torch.randint(0, 3, (9,))
    loss = as_loss(nn.CrossEntropyLoss())
    z = net(x).detach().requires_grad_()
    term = loss.of(z, y, 9)
    plain = F.cross_entropy(z, y, reduction="sum")
    assert torch.equal(term.total, plain)
    assert torch.equal(torch.autograd.grad(term.total, z)[0], torch.autograd.grad(plain, z)[0])


def test_what_is_refused_says_what_to_do():
    x, y, z = _data()
    net = Two(FORMS["tuple"][0]).double()
    with pytest.raises(isoflat.UsageError, match=r"tuple of shapes .*pass a function of output and target"):
        isoflat.measure(net, [(x, y)], nn.CrossEntropyLoss())
    single = nn.Linear(4, 2).double()
    with pytest.raises(isoflat.UsageError, match=r"needs a model that returns \(mean, variance\)"):
        isoflat.measure(single, [(x, z)], nn.GaussianNLLLoss())
    with pytest.raises(isoflat.UsageError, match="in the shape of the mean"):
        isoflat.measure(Normal().double(), [(x, z)], nn.GaussianNLLLoss())
    with pytest.raises(isoflat.IsoflatError, match="BatchLoss"):
        isoflat.measure(single, [(x, y, z)], nn.CrossEntropyLoss())
    risk = _risk(single, lambda o, t: (o.log_softmax(1)[:, 0] * t.squeeze()).mean(), [(x, z)])
    with pytest.raises(isoflat.UsageError, match="labels cannot be drawn"):
        sampled_fisher(risk, risk.network.state(), seed=0)
    mixed = _risk(single, lambda o, t: F.cross_entropy(o, t) ** 2, [(x, y % 2)])
    with pytest.raises(isoflat.UsageError, match="labels cannot be drawn"):
        sampled_fisher(mixed, mixed.network.state(), seed=0)
    penalised = _risk(single, lambda o, t: F.cross_entropy(o, t) + o.square().mean(), [(x, y % 2)])
    with pytest.raises(isoflat.UsageError, match="labels cannot be drawn"):
        sampled_fisher(penalised, penalised.network.state(), seed=0)


@pytest.mark.parametrize("flat", [True, False], ids=["(N,)", "(N, 1)"])
def test_binary_scores(flat):
    """Scores `(N,)` and `(N, 1)` of binary classification: all matrices and diagonals."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1), *([nn.Flatten(0)] if flat else [])).double()
    x = torch.randn(9, 3).double()
    y = (x[:, 0] > 0).double()
    y = y if flat else y[:, None]
    risk = _risk(net, nn.BCEWithLogitsLoss(), [(x[:4], y[:4]), (x[4:], y[4:])])
    state = risk.network.state()
    p = net(x).detach().sigmoid().reshape(-1)
    truth = _dense(net, lambda model: (model(x),), [torch.diag(p * (1 - p)) / 9])
    assert torch.allclose(_matrix(gauss_newton(risk, state)), truth, rtol=1e-9, atol=1e-13)
    assert torch.allclose(gauss_newton_diagonal(risk, state), truth.diagonal(), rtol=1e-9, atol=1e-13)
    moment = _dense(net, lambda model: (model(x),), [torch.diag((p - y.reshape(-1)) ** 2) / 9])
    assert torch.allclose(_matrix(empirical_fisher(risk, state)), moment, rtol=1e-9, atol=1e-13)
    assert torch.allclose(moment_diagonal(risk, state), moment.diagonal(), rtol=1e-9, atol=1e-13)
