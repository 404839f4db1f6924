"""Every measure of the catalogue against dense matrices, closed forms and the ground-truth table."""

import copy
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

import isoflat
from cases.networks import Case, cnn, micro, mlp, scale

DOUBLE = torch.float64


def number(case: Case, measure: str, geometry="euclidean", **options) -> isoflat.Estimate:
    return isoflat.measure(case.net, case.data, case.criterion, measure=measure, geometry=geometry, **options)


def rescaled(column: str) -> Case:
    case = micro()
    if column == "layers":
        scale(case.net, {"0.weight": 5.0, "2.weight": 0.2})
    if column == "units":
        units = torch.tensor([2.0, 0.5, 4.0], dtype=DOUBLE)
        scale(case.net, {"0.weight": units[:, None], "2.weight": 1 / units})
    return case


def jacobian(case: Case) -> torch.Tensor:
    """Of all outputs in all weights: shape `(rows, classes, n)`."""
    names = [name for name, _ in case.net.named_parameters()]
    values = tuple(p.detach() for p in case.net.parameters())

    def output(*tensors):
        return torch.func.functional_call(case.net, dict(zip(names, tensors, strict=True)), (case.inputs,))

    parts = torch.func.jacrev(output, argnums=tuple(range(len(values))))(*values)
    rows, classes = parts[0].shape[:2]
    return torch.cat([part.reshape(rows, classes, -1) for part in parts], dim=2)


def matrices(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Newton matrix and second moment of the gradients, from the Jacobian: another route than the library's."""
    with torch.no_grad():
        p = case.net(case.inputs).softmax(1)
    jacobians = jacobian(case)
    curve = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    residual = p - nn.functional.one_hot(case.targets, p.shape[1])
    gradients = torch.einsum("ncp,nc->np", jacobians, residual)
    rows = len(p)
    return torch.einsum("ncp,ncd,ndq->pq", jacobians, curve, jacobians) / rows, gradients.T @ gradients / rows


TABLE = {
    # The ground-truth table of the 2-3-2 network: as given, layers × 5 and / 5, units × 2, ½ and 4.
    "minimum_sharpness": (0.817303275725, 0.817303275725, 2.450273721638),
    "minimum_sharpness_unitwise": (0.805803652186,) * 3,
    "fisher_rao_norm": (0.102735262193,) * 3,
    "relative_flatness(normalised=0)": (1.765234229012, 1.765234229012, 18.475814577276),
}


@pytest.mark.parametrize("measure", TABLE)
def test_the_ground_truth_table(measure):
    for column, truth in zip(("base", "layers", "units"), TABLE[measure], strict=True):
        found = number(rescaled(column), measure, geometry="auto")
        assert found.value == pytest.approx(truth, rel=1e-9), column
        assert found.kind is isoflat.Kind.EXACT


def test_tables_entries_from_their_definitions():
    """Independent of the library: block traces of the dense Hessian, and Euler's identity for the radial slope."""
    case = micro()
    first, second = (float(block.trace()) for block in (case.hessian()[:6, :6], case.hessian()[6:, 6:]))
    assert 2 * math.sqrt(first * second) == pytest.approx(TABLE["minimum_sharpness"][0], rel=1e-9)
    diagonal = case.hessian().diagonal()
    ins, outs = diagonal[:6].view(3, 2).sum(1), diagonal[6:].view(2, 3).sum(0)
    assert float(2 * (ins * outs).sqrt().sum()) == pytest.approx(TABLE["minimum_sharpness_unitwise"][0], rel=1e-9)
    with torch.no_grad():
        z = case.net(case.inputs)
    slopes = (z.softmax(1) * z).sum(1) - z.gather(1, case.targets[:, None])[:, 0]
    assert float(4 * slopes.square().mean()) == pytest.approx(TABLE["fisher_rao_norm"][0], rel=1e-9)


CASES = {
    "multilayer": lambda: mlp((5, 6, 4, 3), bias=True, seed=3),
    "smooth": lambda: mlp((4, 5, 3), bias=True, seed=4, activation=nn.Tanh),
    "convolutional": lambda: cnn(3, bias=True, seed=5),
}


@pytest.mark.parametrize("name", CASES)
def test_traces_norms_and_eigenvalues_of_every_matrix(name):
    case = CASES[name]()
    hessian, (newton, moment) = case.hessian(), matrices(case)
    truths = {
        "hessian_trace": hessian.trace(),
        "hessian_frobenius": hessian.norm(),
        "gauss_newton_trace": newton.trace(),
        "gauss_newton_spectral_norm": torch.linalg.eigvalsh(newton)[-1],
        "fisher_spectral_norm": torch.linalg.eigvalsh(moment)[-1],
        "fisher_trace": moment.trace(),
        "gradient_norm": case.gradient().norm(),
    }
    table = isoflat.measure_all(
        case.net, case.data, case.criterion, measures=list(truths), geometry="euclidean", confidence=1 - 1e-6, rtol=1e-8
    )
    assert len(table) == len(truths)
    for row, truth in zip(table, truths.values(), strict=True):
        slack = 1e-9 * float(truth)
        assert row.estimate.lower - slack <= float(truth) <= row.estimate.upper + slack, row.measure
        if row.estimate.kind is isoflat.Kind.EXACT:
            assert row.estimate.value == pytest.approx(float(truth), rel=1e-9), row.measure


@pytest.mark.parametrize("name", CASES)
def test_in_units_of_whole_tensors(name):
    """The same in the paper's metric: every matrix through the frame."""
    case = CASES[name]()
    frame, (newton, moment) = case.frame(), matrices(case)
    truths = {
        "gauss_newton_spectral_norm": torch.linalg.eigvalsh(frame[:, None] * newton * frame)[-1],
        "fisher_trace": (frame[:, None] * moment * frame).trace(),
        "gradient_norm": (frame * case.gradient()).norm(),
    }
    for measure, truth in truths.items():
        assert number(case, measure, "layerwise", rtol=1e-8).value == pytest.approx(float(truth), rel=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_takeuchis_criterion_in_three_forms(name):
    case = CASES[name]()
    newton, moment = matrices(case)
    rows = len(case.targets)
    inverse = torch.linalg.pinv(newton, hermitian=True, rtol=1e-10)
    diagonal, squares = newton.diagonal(), moment.diagonal()
    alive = diagonal > 0
    truths = {
        "tic": (inverse @ moment).trace() / rows,
        "tic_diagonal": (squares[alive] / diagonal[alive]).sum() / rows,
        "tic_trace_ratio": squares.sum() / diagonal.sum() / rows,
    }
    for measure, truth in truths.items():
        assert number(case, measure).value == pytest.approx(float(truth), rel=1e-6), measure


def test_minimum_sharpness_with_biases_is_the_least_of_all_rescalings():
    """Against a general minimiser, and the closed form L·(∏ t)^(1/L) where there are no biases."""
    case = mlp((5, 6, 4, 3), bias=True, seed=3)
    diagonal = case.hessian().diagonal().split(case.sizes)
    w, b = [float(part.sum()) for part in diagonal[::2]], [float(part.sum()) for part in diagonal[1::2]]

    def trace(z):
        logs = [z[0], z[1] - z[0], -z[1]]
        ups = [z[0], z[1], 0.0]
        return sum(t * np.exp(-2 * a) for t, a in zip(w, logs, strict=True)) + sum(
            t * np.exp(-2 * a) for t, a in zip(b, ups, strict=True)
        )

    least = scipy.optimize.minimize(trace, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-12, "fatol": 1e-14})
    assert number(case, "minimum_sharpness").value == pytest.approx(least.fun, rel=1e-9)
    bare = mlp((5, 6, 4, 3), bias=False, seed=3)
    traces = [float(part.sum()) for part in bare.hessian().diagonal().split(bare.sizes)]
    assert number(bare, "minimum_sharpness").value == pytest.approx(3 * math.prod(traces) ** (1 / 3), rel=1e-9)


def test_normalized_sharpness_is_the_least_over_rows_and_columns():
    case = mlp((3, 4, 2), bias=True, seed=6)
    diagonal = case.hessian().diagonal().split(case.sizes)
    total, floor = 0.0, 0.0
    for h, weight in zip(diagonal[::2], (case.net[0].weight, case.net[2].weight), strict=True):
        h, w = h.view_as(weight).numpy(), weight.detach().square().numpy()
        rows, columns = h.shape

        def cost(x, h=h, w=w, rows=rows):
            scales = np.exp(x[:rows])[:, None] * np.exp(x[rows:])[None]
            return float((h * scales + w / scales).sum())

        total += scipy.optimize.minimize(cost, np.zeros(rows + columns), method="BFGS", tol=1e-10).fun
        floor += 2 * float(np.sqrt(h * w).sum())
    found = number(case, "normalized_sharpness").value
    assert found == pytest.approx(total, rel=1e-6)
    assert found >= floor


def test_relative_flatness_from_the_blocks_of_the_hessian():
    """One by one: `Σ ⟨w_s, w_s'⟩ tr H_ss'` and `Σ ‖w_s‖² λ_max(H_ss)`, features normalised and not."""
    case = mlp((5, 6, 4, 3), bias=True, seed=3)
    with torch.no_grad():  # a feature that never changes: it counts as a bias does
        case.net[2].weight[1] = 0
        case.net[2].bias[1] = 2.5
        features = case.net[:4](case.inputs)
    alive = features.var(0) > 1e-20
    assert int(alive.sum()) == 3
    for normalised in (0, 1):
        twin, columns = copy.deepcopy(case.net), torch.ones(4, dtype=torch.bool)
        if normalised:
            factors, columns = torch.where(alive, features.std(0, correction=0), 1.0), alive
            scale(twin, {"2.weight": 1 / factors[:, None], "2.bias": 1 / factors, "4.weight": factors})
        twin = Case(twin, *case.data, case.criterion)
        start = sum(twin.sizes[:4])
        weight = twin.net[4].weight.detach()
        classes, width = weight.shape
        block = twin.hessian()[start : start + weight.numel(), start : start + weight.numel()]
        block = block.view(classes, width, classes, width)[:, columns][:, :, :, columns]
        weight = weight[:, columns]
        trace = float(torch.einsum("sj,tj,siti->", weight, weight, block))
        tops = [float(torch.linalg.eigvalsh(block[s, :, s])[-1]) for s in range(classes)]
        largest = float(weight.square().sum(1) @ torch.tensor(tops, dtype=DOUBLE))
        flat = number(case, f"relative_flatness(normalised={normalised})")
        assert flat.value == pytest.approx(trace, rel=1e-9)
        assert any("never change" in note for note in flat.notes) is bool(normalised)
        assert number(case, f"relative_flatness_max(normalised={normalised})").value == pytest.approx(largest, rel=1e-9)


def _regression() -> Case:
    """A quadratic loss: all second derivatives are constant."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(20, k, generator=generator, dtype=DOUBLE) for k in (4, 1))
    return Case(nn.Linear(4, 1, bias=False, dtype=DOUBLE), inputs, targets, nn.MSELoss())


@pytest.mark.parametrize("geometry", ["euclidean", "layerwise"])
def test_critical_sharpness_of_a_parabola_is_the_curvature_along_the_step(geometry):
    case = _regression()
    unit = float(case.weights.norm()) if geometry == "layerwise" else 1.0
    slope = unit * case.gradient()
    truth = float(slope @ (unit**2 * case.hessian()) @ slope / (slope @ slope))
    found = number(case, "critical_sharpness", geometry, rtol=1e-6)
    assert found.lower <= truth <= found.upper
    assert found.relative_width <= 1e-6


def test_the_edge_of_stability_is_where_descent_diverges():
    case = _regression()
    top = float(torch.linalg.eigvalsh(case.hessian())[-1])
    found = number(case, f"edge_of_stability(learning_rate={2 / top})", rtol=1e-9)
    assert found.value == pytest.approx(1.0, rel=1e-9)
    for factor, grows in ((0.99, False), (1.01, True)):
        point = case.weights.clone()
        start = float(case.loss(point))
        for _ in range(2000):
            point = point - factor * 2 / top * torch.func.grad(case.loss)(point)
        assert (float(case.loss(point)) > start) is grows
    with pytest.raises(isoflat.UsageError, match="learning rate of training"):
        number(case, "edge_of_stability")


def test_effective_rank_from_all_eigenvalues():
    case = mlp((5, 6, 4, 3), bias=True, seed=3)
    values = torch.linalg.eigvalsh(case.hessian())
    truth = float(values.sum() ** 2 / values.square().sum())
    found = number(case, "quotient_effective_rank")
    assert found.lower <= truth * (1 + 1e-9)
    assert truth <= found.upper * (1 + 1e-9)


def test_what_does_not_apply_is_listed_and_the_rest_is_measured():
    case = _regression()
    table = isoflat.measure_all(
        case.net, case.data, case.criterion,
        measures=["minimum_sharpness", "edge_of_stability", "gradient_norm"], geometry="euclidean",
    )  # fmt: skip
    assert [row.measure for row in table] == ["gradient_norm"]
    reasons = {part.measure.partition("(")[0]: part.reason for part in table.omitted}
    assert set(reasons) == {"minimum_sharpness", "edge_of_stability"}
    assert "two layers" in reasons["minimum_sharpness"]
    assert "learning_rate=0.1" in reasons["edge_of_stability"]
    assert "not measured: edge_of_stability" in str(table)
    assert isoflat.Table.from_json(table.to_json()) == table
    huber = Case(case.net, case.inputs, case.targets, nn.HuberLoss())
    with pytest.raises(isoflat.UsageError, match="labels cannot be drawn"):
        number(huber, "tic_diagonal")


class _Cut(nn.Module):
    """Part of its first derivative is cut out."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4, dtype=DOUBLE), nn.Linear(4, 3, dtype=DOUBLE)

    def forward(self, x):
        hidden = self.first(x)
        return self.second(hidden * hidden.detach())


def test_gradients_that_are_not_the_losss_are_refused_without_any_product():
    case = mlp((5, 6, 4, 3), bias=True, seed=3)
    for measure in ("gradient_norm", "fisher_rao_norm", "gauss_newton_trace"):
        with pytest.raises(isoflat.UnsupportedModel, match=r"gradients differ .* from central differences of losses"):
            isoflat.measure(_Cut(), case.data, case.criterion, measure=measure, geometry="euclidean")
    warned = isoflat.measure(
        _Cut(), case.data, case.criterion, measure="gradient_norm", geometry="euclidean", check="warn"
    )
    assert any("cut out of the first derivative" in note for note in warned.notes)
    whole = number(case, "gradient_norm")
    assert not any("cut out" in note for note in whole.notes)


EXACT = (
    "gradient_norm", "fisher_trace", "fisher_rao_norm", "minimum_sharpness", "minimum_sharpness_unitwise",
    "normalized_sharpness", "relative_flatness", "relative_flatness_max", "tic_diagonal", "tic_trace_ratio",
)  # fmt: skip


def test_what_is_called_exact_is_so_up_to_the_rounding_it_allows_for():
    """Float32 against float64, on two thousand rows in batches."""
    case = mlp((20, 32, 16, 5), bias=True, seed=3, rows=2000)
    narrow = copy.deepcopy(case.net).float()
    wide = copy.deepcopy(narrow).double()
    data = case.inputs.float(), case.targets
    single, double = (
        isoflat.measure_all(n, d, case.criterion, measures=EXACT, geometry="layerwise")
        for n, d in ((narrow, data), (wide, (data[0].double(), data[1])))
    )
    for one, other in zip(single, double, strict=True):
        assert one.estimate.kind is isoflat.Kind.EXACT
        assert one.estimate.lower <= other.estimate.value <= one.estimate.upper, one.measure
        assert other.estimate.relative_width < 1e-6 * one.estimate.relative_width


def test_fisher_trace_at_the_representative_is_that_of_the_network_there():
    """Through a frame that is not diagonal, and at a copy that has been moved."""
    case = mlp((5, 6, 4, 3), bias=True, seed=3)
    found = isoflat.symmetries(case.net, case.inputs, loss=case.criterion)
    there = Case(isoflat.canonicalize(case.net, found), *case.data, case.criterion)
    assert number(case, "fisher_trace", "auto").value == pytest.approx(
        number(there, "fisher_trace", "layerwise").value, rel=1e-9
    )


def test_relative_flatness_does_not_depend_on_batches_or_on_what_the_loss_divides_by():
    case = mlp((5, 6, 4, 3), bias=True, seed=3)
    targets = case.targets.clone()
    targets[:3] = -100  # counted in one batch only, were features averaged as the loss is
    whole, cut = (case.inputs, targets), [(case.inputs[:4], targets[:4]), (case.inputs[4:], targets[4:])]
    for measure in ("relative_flatness", "relative_flatness_max"):
        one, other, total = (
            isoflat.measure(case.net, data, nn.CrossEntropyLoss(reduction=kind), measure=measure).value
            for data, kind in ((whole, "mean"), (cut, "mean"), (whole, "sum"))
        )
        assert other == pytest.approx(one, rel=1e-12)
        assert total == pytest.approx(9 * one, rel=1e-12)


def test_critical_sharpness_near_a_minimum_in_float32():
    """The whole fall along the step is far below what float32 resolves of the loss."""
    case = _regression()
    with torch.no_grad():
        best = torch.linalg.lstsq(case.inputs, case.targets).solution.T
        case.net.weight.copy_(best + 1e-5)
    narrow = case.net.float()
    slope = Case(
        copy.deepcopy(narrow).double(), case.inputs.float().double(), case.targets.float().double(), case.criterion
    )
    g, h = slope.gradient(), slope.hessian()
    truth = float(g @ h @ g / (g @ g))
    fall = float(g @ g) / truth / 2
    assert fall < 0.1 * torch.finfo(torch.float32).eps * float(slope.loss(slope.weights))
    found = isoflat.measure(
        narrow, (case.inputs.float(), case.targets.float()), case.criterion,
        measure="critical_sharpness", geometry="euclidean",
    )  # fmt: skip
    assert found.lower <= truth <= found.upper
    assert found.converged
    # Closer still, rounding decides before the tolerance is reached, or before there is a fall at all: both are said.
    with torch.no_grad():
        slope.net.weight.copy_(torch.linalg.lstsq(slope.inputs, slope.targets).solution.T + 5e-7)
    coarse = number(slope, "critical_sharpness", rtol=1e-6)
    assert not coarse.converged
    assert any("below rounding" in note for note in coarse.notes)
    with torch.no_grad():
        slope.net.weight.copy_(torch.linalg.lstsq(slope.inputs, slope.targets).solution.T)
    with pytest.raises(isoflat.UsageError, match="this is a minimum"):
        number(slope, "critical_sharpness")


def dense(product, n: int) -> torch.Tensor:
    return torch.stack([torch.as_tensor(product(row)).double().reshape(-1) for row in torch.eye(n, dtype=DOUBLE)], 1)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["curvlinops", "hessian_eigenthings"])
def test_numbers_of_other_libraries(library):
    """Every matrix that they have, as they compute it, and the numbers that follow from it."""
    theirs = pytest.importorskip(library, reason="run by `make test-oracles`")
    case = mlp((6, 8, 8, 3), bias=True, seed=7, rows=40)
    batches = [(case.inputs[:20], case.targets[:20]), (case.inputs[20:], case.targets[20:])]
    parameters, n = list(case.net.parameters()), sum(case.sizes)
    if library == "curvlinops":
        kinds = {"hessian": "Hessian", "gauss_newton": "GGN", "fisher": "EF"}
        made = {
            name: getattr(theirs, f"{kind}LinearOperator")(case.net, case.criterion, parameters, batches).__matmul__
            for name, kind in kinds.items()
        }
    else:
        loss = theirs.supervised_loss(case.criterion)
        made = {"hessian": theirs.HessianOperator(case.net, batches, loss).matvec}
    for name, product in made.items():
        matrix = dense(product, n)
        truths = {
            f"{name}_trace": float(matrix.trace()),
            f"{name}_spectral_norm": float(torch.linalg.eigvalsh((matrix + matrix.T) / 2).abs().max()),
        }
        if name == "hessian":
            truths["hessian_frobenius"] = float(matrix.norm())
        for measure, truth in truths.items():
            found = number(case, measure, rtol=1e-8)
            slack = 1e-6 * truth
            assert found.lower - slack <= truth <= found.upper + slack, (measure, truth, found)
