"""Gauss-Newton, Fisher and exact block traces against dense Jacobians and Hessians of torch.func, in float64."""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import isoflat
from cases.networks import cnn, mlp
from isoflat.core.space import ParameterSpace
from isoflat.curvature.block_trace import block_traces
from isoflat.curvature.fisher import empirical_fisher, sampled_fisher
from isoflat.curvature.gauss_newton import GaussNewton, gauss_newton
from isoflat.curvature.matrix import Curvature
from isoflat.risk.batches import Beside, as_batches
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.likelihood import Bernoulli, Categorical, likelihood
from isoflat.risk.linearise import linearise
from isoflat.risk.losses import TargetLoss, as_loss
from isoflat.risk.network import Network
from isoflat.risk.plan import plan
from isoflat.risk.routes.base import Linearisation
from isoflat.risk.routes.output import OutputGraph
from isoflat.risk.routes.reverse import Cached, Recomputed

WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """A network, batches of different sizes, a criterion, and which targets count."""

    net: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    criterion: nn.Module

    @property
    def network(self):
        return Network(self.net)

    @property
    def state(self):
        return self.network.state()

    @property
    def risk(self):
        return EmpiricalRisk(self.network, as_loss(self.criterion), as_batches(self.batches))

    @property
    def whole(self) -> tuple[Tensor, Tensor]:
        inputs, targets = zip(*self.batches, strict=True)
        return torch.cat(inputs), torch.cat(targets)

    @property
    def mean(self):
        """The criterion's own mean over all data, for one that averages."""
        return lambda z: self.criterion(z, self.whole[1])

    @property
    def space(self) -> ParameterSpace:
        names, parameters = zip(*self.net.named_parameters(), strict=True)
        return ParameterSpace(names, tuple(tuple(parameter.shape) for parameter in parameters))

    def output(self, vector: Tensor) -> Tensor:
        named = self.space.unflatten(vector)
        return torch.func.functional_call(self.net, dict(named), (self.whole[0],))

    def jacobian(self) -> Tensor:
        """Shape `(*z, n)`."""
        return torch.func.jacrev(self.output)(self.state.vector)

    def dense(self) -> Tensor:
        """`Jᵀ (∂²L/∂z²) J`."""
        z, jacobian = self.output(self.state.vector), self.jacobian()
        jacobian = jacobian.reshape(z.numel(), -1)
        return jacobian.T @ torch.func.hessian(self.mean)(z).reshape(z.numel(), -1) @ jacobian

    def hessian(self) -> Tensor:
        return torch.func.hessian(lambda vector: self.mean(self.output(vector)))(self.state.vector)


class Tokens(nn.Module):
    """Embedding, one attention head, a normalisation, a GELU block: scores of shape `(rows, classes, positions)`."""

    def __init__(self, seed: int):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.qkv = nn.Linear(4, 12, bias=False)
        self.norm = nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)
        generator = torch.Generator().manual_seed(seed)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64) + 0.1)

    def forward(self, tokens):
        x = self.table(tokens)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x).transpose(1, 2)


def _cut(inputs, targets, sizes):
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def _tokens(criterion) -> Problem:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(0, 5, (5, 4), generator=generator)
    targets = torch.randint(0, 3, (5, 4), generator=generator)
    targets[torch.rand(5, 4, generator=generator) < 0.3] = -100
    targets[1] = -100
    return Problem(Tokens(0), _cut(inputs, targets, [2, 2, 1]), criterion)


def _problem(kind: str) -> Problem:
    if kind == "tokens":
        return _tokens(nn.CrossEntropyLoss(weight=WEIGHTS))
    if kind == "tokens, smoothed":
        return _tokens(nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2))
    if kind == "convolution":
        case = cnn(2, True, 1)
        return Problem(case.net, _cut(*case.data, [4, 2]), case.criterion)
    case = mlp((4, 5, 3), True, 2, rows=11, activation=nn.Tanh)
    sizes, generator = [5, 5, 1], torch.Generator().manual_seed(1)
    real = torch.rand(11, 3, generator=generator, dtype=torch.float64)
    if kind == "squared error":
        return Problem(case.net, _cut(case.inputs, real, sizes), nn.MSELoss())
    if kind == "binary":
        criterion = nn.BCEWithLogitsLoss(weight=WEIGHTS, pos_weight=WEIGHTS.flip(0))
        return Problem(case.net, _cut(case.inputs, real.round(), sizes), criterion)
    if kind == "soft targets":
        return Problem(case.net, _cut(case.inputs, real / real.sum(1, keepdim=True), sizes), nn.CrossEntropyLoss())
    return Problem(case.net, _cut(*case.data, sizes), nn.CrossEntropyLoss(weight=WEIGHTS))


KINDS = ["classes", "soft targets", "binary", "squared error", "convolution", "tokens", "tokens, smoothed"]


def _matrix(route: Linearisation) -> Tensor:
    return Curvature(route).matmat(torch.eye(route.state.space.size, dtype=torch.float64))


def _close(found: Tensor, truth: Tensor, rtol: float = 1e-12) -> None:
    assert float((found - truth).abs().max()) <= rtol * float(truth.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_gauss_newton_is_the_dense_product(kind):
    problem = _problem(kind)
    ggn = gauss_newton(problem.risk, problem.state)
    found, truth = _matrix(ggn), problem.dense()
    _close(found, truth)
    _close(found, found.T)
    _close(_matrix(ggn.keep()), found, rtol=1e-14)
    assert float(torch.linalg.eigvalsh(found)[0]) >= -1e-13 * float(torch.linalg.eigvalsh(found)[-1])


@pytest.mark.parametrize("kind", ["classes", "binary", "squared error"])
def test_gauss_newton_is_the_hessian_of_models_linear_in_their_weights(kind):
    problem = _problem(kind)
    linear = Problem(nn.Linear(4, 3, dtype=torch.float64), problem.batches, problem.criterion)
    truth = linear.hessian()
    _close(_matrix(gauss_newton(linear.risk, linear.state)), truth)
    _close(_matrix(Recomputed(linear.risk, linear.state)), truth)


def test_gauss_newton_of_sums_and_of_functions():
    problem = _problem("squared error")
    total = Problem(problem.net, problem.batches, nn.MSELoss(reduction="sum"))
    _close(_matrix(gauss_newton(total.risk, total.state)), total.dense())
    function = Problem(problem.net, problem.batches, lambda z, y: (z - y).pow(4).mean())  # type: ignore
    _close(_matrix(gauss_newton(function.risk, function.state)), function.dense())
    compared = Problem(  # a layer of the loss whose both factors are outputs
        problem.net,
        [problem.whole],
        lambda z, y: nn.functional.linear(z, z).logsumexp(1).mean(),  # type: ignore
    )
    _close(_matrix(gauss_newton(compared.risk, compared.state)), compared.dense())
    absolute = Problem(problem.net, problem.batches, nn.L1Loss())
    assert float(_matrix(gauss_newton(absolute.risk, absolute.state)).abs().max()) == 0


def test_single_precision_is_that_of_double_and_doubles():
    problem = _problem("classes")
    single = problem.state.to(dtype=torch.float32)
    ggn = gauss_newton(problem.risk, single).keep()
    assert Curvature(ggn).dtype == torch.float32
    exact = gauss_newton(problem.risk, single.to(dtype=torch.float64))
    _close(_matrix(ggn), _matrix(exact), rtol=1e-5)
    _close(_matrix(ggn.double()), _matrix(exact), rtol=1e-14)
    assert not isinstance(ggn.double(), Cached)
    made = Curvature(exact)
    assert made.double() is made


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_of_drawn_labels_have_the_losses_hessian_for_their_second_moment(kind):
    """Labels are enumerated; for squared error, two standardised labels -1 and 1 have the normal's variance."""
    problem = _problem(kind)
    generator = torch.Generator().manual_seed(0)
    for batch in problem.batches:
        graph = OutputGraph.build(problem.risk, problem.state, batch)
        model = likelihood(problem.risk.loss, graph.z, graph.target)
        z = graph.z.detach()
        tangent = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        if isinstance(model, Categorical):
            chances = [(c, z.softmax(1)[:, c].unsqueeze(1)) for c in range(3)]
        elif isinstance(model, Bernoulli):
            chances = [(0, 1 - z.sigmoid()), (1, z.sigmoid())]
        else:
            chances = [(-1, 0.5), (1, 0.5)]
        expected = torch.zeros_like(z)
        for label, chance in chances:
            residual = model.residual(z, torch.full(model.mass.shape, label))
            expected += chance * model.outer(residual, tangent)
        _close(expected, graph.curve(tangent))


@pytest.mark.parametrize("kind", ["classes", "tokens", "binary", "squared error"])
def test_a_sampled_fisher_is_the_sum_over_targets(kind):
    problem = _problem(kind)
    risk, state = problem.risk, problem.state
    fisher = sampled_fisher(risk, state, seed=1, draws=2)
    z, target = problem.output(state.vector), problem.whole[1]
    jacobian = problem.jacobian()
    if kind in ("classes", "tokens"):
        jacobian = jacobian.movedim(1, -2).reshape(-1, 3, state.space.size)
        scores, target = z.movedim(1, -1).reshape(-1, 3), target.reshape(-1)
        mass = torch.where(target >= 0, WEIGHTS[target.clamp(min=0)], 0.0)
    else:
        jacobian, scores = jacobian.reshape(-1, 1, state.space.size), z.reshape(-1, 1)
        mass = torch.ones(len(scores), dtype=torch.float64)
    if kind == "binary":
        mass = (WEIGHTS * (WEIGHTS.flip(0) * target + 1 - target)).reshape(-1)
    truth = torch.zeros(())
    for draw in range(2):
        labels = torch.cat([batch.column[..., draw].reshape(-1) for batch in fisher.risk.batches])
        if kind in ("classes", "tokens"):
            residual = scores.softmax(1) - nn.functional.one_hot(labels, 3)
        elif kind == "binary":
            residual = scores.sigmoid() - labels[:, None].double()
        else:
            residual = 2**0.5 * labels[:, None]
        rows = torch.einsum("tcn,tc,t->tn", jacobian, residual, mass.sqrt())
        truth = truth + rows.T @ rows / 2
    count = float(mass.sum()) if kind in ("classes", "tokens") else z.numel()
    _close(_matrix(fisher), truth / count)
    _close(_matrix(fisher.keep()), truth / count)


@pytest.mark.parametrize("kind", ["classes", "tokens", "binary", "squared error"])
def test_the_mean_of_sampled_fishers_approaches_gauss_newton(kind):
    problem = _problem(kind)
    risk, state = problem.risk, problem.state
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(state.space.size, 3, generator=generator, dtype=torch.float64)
    truth = (directions * gauss_newton(risk, state).products(directions)).sum(0)
    kept = [graph.output for graph in gauss_newton(risk, state).keep().graphs]
    fishers = sampled_fisher(risk, state, seed=2, draws=400)
    labels = [batch.column for batch in fishers.risk.batches]
    squares = torch.zeros(400, 3, dtype=torch.float64)
    for index, graph in enumerate(kept):
        model = likelihood(risk.loss, graph.z, graph.target)
        tangents = [graph.push(list(state.space.unflatten(v).values())) for v in directions.T]
        for draw in range(400):
            residual = model.residual(graph.z, labels[index][..., draw])
            for k, tangent in enumerate(tangents):
                squares[draw, k] += (tangent * model.outer(residual, tangent)).sum().detach()
    squares /= sum(graph.count for graph in kept)
    error = squares.std(0) / 400**0.5
    assert bool(((squares.mean(0) - truth).abs() <= 4 * error).all())
    assert float(error.max()) > 0
    _close((directions * fishers.products(directions)).sum(0), squares.mean(0))


@pytest.mark.parametrize("kind", ["classes", "tokens", "binary", "squared error"])
def test_labels_depend_on_the_seed_and_not_on_the_batches(kind):
    problem = _problem(kind)
    inputs, targets = problem.whole
    first = sampled_fisher(problem.risk, problem.state, seed=1, draws=2)
    other = Problem(problem.net, _cut(inputs, targets, 3), problem.criterion)
    again = sampled_fisher(other.risk, other.state, seed=1, draws=2)
    labels = _labels(first)
    assert torch.equal(labels, _labels(again))
    assert not torch.equal(labels[..., 0], labels[..., 1])
    _close(_matrix(again), _matrix(first))
    changed = sampled_fisher(problem.risk, problem.state, seed=2, draws=2)
    assert not torch.equal(labels, _labels(changed))


def _labels(fisher: Linearisation) -> Tensor:
    return torch.cat([batch.column for batch in fisher.risk.batches])


@pytest.mark.parametrize("make", [gauss_newton, empirical_fisher, partial(sampled_fisher, seed=1, draws=2)])
@pytest.mark.parametrize("kind", ["classes", pytest.param("tokens", marks=pytest.mark.slow), "convolution"])
def test_rows_may_be_cut_and_memory_may_run_out(make, kind, monkeypatch):
    """Labels and counts go with their rows."""
    problem = _problem(kind)
    route = make(problem.risk, problem.state)
    truth, identity = _matrix(route), torch.eye(problem.state.space.size, dtype=torch.float64)
    _close(_matrix(replace(route, risk=replace(route.risk, batches=route.risk.batches.cut(1)))), truth)
    planned = plan(route.risk, problem.state, Recomputed, len(problem.whole[0]), 1 << 30, route.kind)
    assert planned.kept
    build = route.kind.build

    def limited(risk, state, batch):
        if len(batch.column if isinstance(batch, Beside) else batch[0]) > 1:
            raise torch.OutOfMemoryError("planted")
        return build(risk, state, batch)

    monkeypatch.setattr(route.kind, "build", limited)
    made = linearise(route.risk, problem.state, planned)
    assert made.grain.halvings > 0
    _close(made.products(identity), truth)


def test_other_matrices_are_planned_like_the_hessian():
    problem = _problem("convolution")
    rows, kind = len(problem.whole[0]), gauss_newton(problem.risk, problem.state).kind
    roomy = plan(problem.risk, problem.state, Recomputed, rows, 1 << 30, kind)
    assert roomy.kept
    assert roomy.graph is GaussNewton
    assert roomy.rules == ("convolution", "linear", "pooling", "relu")
    tight = plan(problem.risk, problem.state, Recomputed, rows, roomy.forecast - 1, kind)
    assert not tight.kept
    assert tight.forecast < roomy.forecast


@pytest.mark.parametrize("kind", KINDS)
def test_the_empirical_fisher_is_the_sum_over_rows(kind):
    problem = _problem(kind)
    state, (inputs, targets) = problem.state, problem.whole
    truth, total = torch.zeros(()), 0.0
    for row, target in zip(inputs, targets, strict=True):
        one = problem.risk.term(state, (row[None], target[None]))
        if one.count == 0:
            continue

        def own(vector, row=row, target=target):
            named = dict(problem.space.unflatten(vector))
            output = torch.func.functional_call(problem.net, named, (row[None],))
            return as_loss(problem.criterion).summed(output, target[None])

        gradient = torch.func.grad(own)(state.vector) / one.count
        truth, total = truth + one.count * torch.outer(gradient, gradient), total + one.count
    moment = empirical_fisher(problem.risk, state)
    _close(_matrix(moment), truth / total)
    _close(_matrix(moment.keep()), truth / total)


def test_class_weights_count_as_copies_of_rows_in_all_three():
    case = mlp((4, 5, 3), bias=True, seed=1)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    repeats = weights.long()[case.targets]
    copies = (case.inputs.repeat_interleave(repeats, 0), case.targets.repeat_interleave(repeats))
    weighted = Problem(case.net, _cut(*case.data, 5), nn.CrossEntropyLoss(weight=weights))
    copied = Problem(case.net, _cut(*copies, 7), nn.CrossEntropyLoss())
    for make in (gauss_newton, empirical_fisher):
        _close(_matrix(make(weighted.risk, weighted.state)), _matrix(make(copied.risk, copied.state)))


class WithLoss(nn.Module):
    """A model that computes its own mean loss, in the manner of transformers."""

    def __init__(self, net, penalty=0.0, logits="logits", copied=False):
        super().__init__()
        self.net, self.penalty, self.logits, self.copied = net, penalty, logits, copied

    def forward(self, x, labels):
        z = self.net(x)
        loss = nn.functional.cross_entropy(z, labels) + self.penalty * self.net[0].weight.square().sum()
        return SimpleNamespace(loss=loss, **{self.logits: z.clone() if self.copied else z})


def test_models_with_a_loss_of_their_own():
    problem = _problem("classes")
    plain = Problem(problem.net, problem.batches, nn.CrossEntropyLoss())
    batches = [{"x": x, "labels": y} for x, y in problem.batches]

    def risk(**options):
        return EmpiricalRisk(Network(WithLoss(problem.net, **options)), as_loss(None), as_batches(batches))

    own = risk()
    state = own.network.state()
    _close(_matrix(gauss_newton(own, state)), plain.dense())
    _close(_matrix(gauss_newton(own, state).keep()), plain.dense())
    _close(_matrix(empirical_fisher(own, state)), _matrix(empirical_fisher(plain.risk, plain.state)))
    with pytest.raises(isoflat.UsageError, match="other than through the model's output"):
        gauss_newton(risk(penalty=0.1), state)
    with pytest.raises(isoflat.UsageError, match="other than through the model's output"):
        empirical_fisher(risk(copied=True), state)
    with pytest.raises(isoflat.UsageError, match="does not say what the model's output is"):
        gauss_newton(risk(logits="scores"), state)
    with pytest.raises(isoflat.UsageError, match="labels cannot be drawn"):
        sampled_fisher(own, state, seed=0)


def test_refusals():
    problem = _problem("classes")
    network, state, batches = problem.network, problem.state, as_batches(problem.batches)
    user = isoflat.BatchLoss(lambda model, batch: (model(batch[0]).square().sum(), len(batch[0])))
    with pytest.raises(isoflat.UsageError, match=r"pass a torch\.nn criterion"):
        gauss_newton(EmpiricalRisk(network, as_loss(user), batches), state)
    with pytest.raises(isoflat.UsageError, match="labels cannot be drawn"):
        sampled_fisher(EmpiricalRisk(network, as_loss(lambda z, y: z.mean()), batches), state, seed=0)
    with pytest.raises(isoflat.UsageError, match="draws must be at least 1"):
        sampled_fisher(problem.risk, state, seed=0, draws=0)
    with pytest.raises(isoflat.DataError, match="empty"):
        gauss_newton(EmpiricalRisk(network, as_loss(nn.CrossEntropyLoss()), as_batches([])), state)
    wide = Network(nn.Sequential(problem.net, nn.Flatten(0)))
    squares = TargetLoss(lambda z, y: z.square().sum(), lambda z, y: float(len(y)))
    with pytest.raises(isoflat.UsageError, match="no gradient of each row"):
        empirical_fisher(EmpiricalRisk(wide, squares, batches), wide.state())


def _block_traces(problem: Problem) -> dict[str, float]:
    diagonal = problem.hessian().diagonal()
    return {name: float(diagonal[part].sum()) for name, part in problem.state.space.slices.items()}


def _piecewise(kind: str) -> Problem:
    if kind == "convolutions":
        case = cnn(3, True, 2)
        return Problem(case.net, _cut(*case.data, [4, 2]), nn.CrossEntropyLoss(weight=WEIGHTS))
    if kind == "positions":
        generator = torch.Generator().manual_seed(4)
        net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 1)).double()
        targets = torch.randint(0, 3, (5, 4), generator=generator)
        targets[0, 1:] = -100
        inputs = torch.randn(5, 2, 6, generator=generator, dtype=torch.float64)
        return Problem(net, _cut(inputs, targets, 2), nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1))
    case = mlp((4, 5, 5, 3), kind != "no bias", 2, rows=11)
    weight = WEIGHTS if kind == "weights" else None
    return Problem(case.net, _cut(*case.data, [5, 5, 1]), nn.CrossEntropyLoss(weight=weight))


@pytest.mark.parametrize("kind", ["bias", "no bias", "weights", "convolutions", "positions"])
def test_block_traces_are_those_of_the_dense_hessian(kind):
    problem = _piecewise(kind)
    found = block_traces(problem.risk, problem.state)
    assert list(found) == list(problem.state.parameters)
    assert found == pytest.approx(_block_traces(problem), rel=1e-10)
    last = list(found)[-1:]
    assert block_traces(problem.risk, problem.state, last, memory=1) == pytest.approx({last[0]: found[last[0]]})


class Twice(nn.Module):
    """One square matrix in a row (not linear), or side by side (linear, though no layer's own)."""

    def __init__(self, stacked: bool):
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(a, b, dtype=torch.float64) for a, b in [(4, 5), (5, 5), (5, 3)])
        self.stacked = stacked

    def forward(self, x):
        x = self.first(x).relu()
        both = self.middle(self.middle(x).relu()) if self.stacked else self.middle(x) + x @ self.middle.weight
        return self.last(both.relu())


@pytest.mark.parametrize("stacked", [True, False])
def test_block_traces_of_a_matrix_that_is_used_twice(stacked):
    torch.manual_seed(0)
    problem = Problem(Twice(stacked), _problem("classes").batches, nn.CrossEntropyLoss())
    risk, state, truth = problem.risk, problem.state, _block_traces(problem)
    if stacked:
        with pytest.raises(isoflat.UnsupportedModel, match=r"not linear in middle\.weight by itself"):
            block_traces(risk, state)
        del truth["middle.weight"]
    assert block_traces(risk, state, list(truth)) == pytest.approx(truth, rel=1e-10)


def test_block_traces_of_tied_tensors_are_refused():
    net = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.ReLU(), nn.Linear(3, 3, dtype=torch.float64))
    net[2].weight = net[0].weight
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = Problem(net, [(inputs, torch.arange(6) % 3)], nn.CrossEntropyLoss())
    with pytest.raises(isoflat.UnsupportedModel, match=r"not linear in 0\.weight by itself"):
        block_traces(problem.risk, problem.state)
    truth = _block_traces(problem)
    free = ["0.bias", "2.bias"]
    assert block_traces(problem.risk, problem.state, free) == pytest.approx({name: truth[name] for name in free})


def test_block_traces_behind_a_smooth_nonlinearity_are_refused():
    case = mlp((4, 5, 3), True, 2, rows=11, activation=nn.GELU)
    problem = Problem(case.net, _cut(*case.data, 4), nn.CrossEntropyLoss())
    with pytest.raises(isoflat.UnsupportedModel, match=r"not linear in 0\.weight, 0\.bias by itself"):
        block_traces(problem.risk, problem.state)
    truth = _block_traces(problem)
    found = block_traces(problem.risk, problem.state, ["2.weight", "2.bias"])
    assert found == pytest.approx({name: truth[name] for name in found}, rel=1e-10)


def test_block_traces_refuse_other_losses_and_names():
    problem = _problem("squared error")
    with pytest.raises(isoflat.UsageError, match="softmax cross-entropy"):
        block_traces(problem.risk, problem.state)
    with pytest.raises(isoflat.UsageError, match=r"no trainable tensor named 9\.weight"):
        block_traces(_problem("classes").risk, problem.state, ["9.weight"])


@pytest.mark.slow
def test_curvatures_against_curvlinops():
    """Products with three matrices, as another library computes them."""
    curvlinops = pytest.importorskip("curvlinops", reason="run by `make test-oracles`")
    case = mlp((6, 8, 8, 3), True, 7, rows=40)
    problem = Problem(case.net, _cut(*case.data, 16), nn.CrossEntropyLoss())
    parameters = [parameter for parameter in problem.net.parameters() if parameter.requires_grad]
    vectors = torch.randn(problem.state.space.size, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = [
        (curvlinops.GGNLinearOperator, gauss_newton(problem.risk, problem.state)),
        (curvlinops.EFLinearOperator, empirical_fisher(problem.risk, problem.state)),
        (curvlinops.HessianLinearOperator, Recomputed(problem.risk, problem.state)),
    ]
    for theirs, ours in pairs:
        operator = theirs(problem.net, problem.criterion, parameters, problem.batches)
        _close(ours.products(vectors), torch.as_tensor(operator @ vectors).double(), rtol=1e-10)
