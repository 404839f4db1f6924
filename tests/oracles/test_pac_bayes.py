"""PAC-Bayes bounds against dense Hessians, torch's own divergences, and general minimisers."""

import copy
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributions import Normal, kl_divergence
from typer.testing import CliRunner

import isoflat
from cases.networks import Case, cnn, mlp, scale
from isoflat.cli.main import app
from isoflat.curvature.diagonal import gauss_newton_diagonal
from isoflat.measurement.subject import subject
from isoflat.measures.settings import Settings
from isoflat.symmetry.canonical.representative import install

DOUBLE = torch.float64
EFFECTIVE, POSTERIOR, RESCALED = (
    "pac_bayes_effective_curvature", "pac_bayes_curvature_posterior", "pac_bayes_rescaled",
)  # fmt: skip
AROUND = (EFFECTIVE, POSTERIOR)


def number(case: Case, measure: str, initial=None, **options) -> float:
    return isoflat.measure(case.net, case.data, case.criterion, measure=measure, initial=initial, **options).value


def case_of(seed: int = 3) -> Case:
    return mlp((5, 6, 4, 3), bias=True, seed=seed)


def vector(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in net.parameters()])


def divergence(mean, variances, centre, sigma) -> torch.Tensor:
    """Of two Gaussians with diagonal covariances, by torch."""
    prior = Normal(centre, torch.full_like(mean, sigma))
    return kl_divergence(Normal(mean, variances.sqrt()), prior).sum()


def zeros(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}


def sandwiched(value: float, rows: int, delta: float, beta: float) -> float:
    """The complexity inside a bound of Catoni's kind."""
    return beta * rows * (value - beta / 8) - math.log(1 / delta)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 6.0])
def test_effective_curvature_from_the_dense_hessian(sigma):
    case, start = case_of(), case_of(4).net
    h, rows, delta = case.hessian().diagonal(), len(case.targets), 0.01
    variances = torch.minimum(1 / h.clamp(min=1e-300), torch.tensor(sigma**2))
    exact = divergence(case.weights, variances, vector(start), sigma)
    # K leaves out Σ (s/σ² − 1)/2, which is not positive.
    complexity = float(exact + 0.5 * (1 - variances / sigma**2).sum())
    assert complexity >= float(exact)
    assert bool((h * sigma**2 > 1).any()) is (sigma > 1), "both regimes must be seen"
    found = number(case, f"{EFFECTIVE}(sigma={sigma}, delta={delta})", start)
    truth = math.sqrt((complexity + math.log(2 * math.sqrt(rows) / delta)) / (2 * rows))
    assert found == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("options", [(0.1, 1.0), (2.0, 0.3)])
def test_the_curvature_posterior_is_the_best_one(options):
    """Against a general minimiser over all variances, with torch's divergence."""
    (sigma, beta), delta = options, 0.05
    case, start = case_of(), case_of(4).net
    h, rows, mean, centre = case.hessian().diagonal(), len(case.targets), case.weights, vector(start)

    def cost(logs: torch.Tensor) -> torch.Tensor:
        variances = logs.exp()
        return beta * rows / 2 * (h @ variances) + divergence(mean, variances, centre, sigma)

    def both(logs):
        point = torch.from_numpy(logs).requires_grad_()
        value = cost(point)
        (slope,) = torch.autograd.grad(value, point)
        return float(value.detach()), slope.numpy()

    begin = np.full(len(h), 2 * math.log(sigma))
    best = scipy.optimize.minimize(both, begin, jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9})
    found = number(case, f"{POSTERIOR}(sigma={sigma}, beta={beta}, delta={delta})", start)
    inside = sandwiched(found, rows, delta, beta)
    assert inside == pytest.approx(best.fun, rel=1e-8)
    closed = -(beta * rows * h + 1 / sigma**2).log()
    assert float(cost(closed)) == pytest.approx(inside, rel=1e-9)
    assert np.allclose(best.x, closed.numpy(), atol=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        others = closed + 0.3 * torch.randn(len(h), generator=generator, dtype=DOUBLE)
        assert float(cost(others)) > inside


def rescale(case: Case, logs: torch.Tensor) -> Case:
    """Both hidden layers' units by factors, what reads them divided."""
    net, a, b = copy.deepcopy(case.net), logs[:6].exp(), logs[6:].exp()
    scale(
        net,
        {
            "0.weight": a[:, None],
            "0.bias": a,
            "2.weight": b[:, None] / a,
            "2.bias": b,
            "4.weight": 1 / b,
        },
    )
    return Case(net, *case.data, case.criterion)


@pytest.mark.parametrize("options", [(0.1, 1.0), (2.0, 0.3)])
def test_rescaled_is_the_least_over_all_scales_and_widths(options):
    (sigma, beta), delta = options, 0.05
    case = case_of()
    rows = len(case.targets)
    given = f"(sigma={sigma}, beta={beta}, delta={delta})"
    found = number(case, RESCALED + given)
    # No rescaled network has a smaller bound around zero, and the best of them has the same.
    generator = torch.Generator().manual_seed(0)
    for spread in (0.01, 0.1, 1.0):
        for _ in range(3):
            twin = rescale(case, spread * torch.randn(10, generator=generator, dtype=DOUBLE))
            assert number(twin, POSTERIOR + given, zeros(twin.net)) > found

    h, rates = case.hessian().diagonal(), torch.zeros(len(case.weights), 10, dtype=DOUBLE)
    for k in range(10):
        unit = torch.zeros(10, dtype=DOUBLE)
        unit[k] = 1
        rates[:, k] = (rescale(case, unit).weights / case.weights).log()

    def both(point):
        """Over scales and widths at once, with torch's divergence of what is rescaled."""
        joint = torch.from_numpy(point).requires_grad_()
        factors, variances = (rates @ joint[:10]).exp(), joint[10:].exp()
        moved = divergence(factors * case.weights, factors.square() * variances, torch.zeros_like(h), sigma)
        value = beta * rows / 2 * (h @ variances) + moved
        (slope,) = torch.autograd.grad(value, joint)
        return float(value.detach()), slope.numpy()

    begin = np.concatenate([np.zeros(10), np.full(len(h), 2 * math.log(sigma))])
    best = scipy.optimize.minimize(
        both,
        begin,
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000, "maxfun": 10000},
    )
    assert sandwiched(found, rows, delta, beta) == pytest.approx(best.fun, rel=1e-8)
    there = rescale(case, torch.from_numpy(best.x[:10]))
    assert number(there, POSTERIOR + given, zeros(there.net)) == pytest.approx(found, rel=1e-8)


def normalised() -> Case:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)).double()
    return Case(net, torch.randn(20, 5, dtype=DOUBLE), torch.randint(3, (20,)), nn.CrossEntropyLoss())


@pytest.mark.parametrize("build", [case_of, lambda: cnn(3, bias=True, seed=5), normalised])
def test_rescaled_does_not_move_under_a_wild_rescaling(build):
    """Factors of e^±4 and more; a normalisation's epsilon goes along."""
    case = build()
    found = isoflat.symmetries(case.net, case.inputs)
    element = found.scaling.sample(torch.Generator().manual_seed(1), spread=4.0)
    twin = Case(
        install(case.net, found.scaling.act(found.state(case.net), element)), *case.data, case.criterion
    )  # fmt: skip
    with torch.no_grad():
        assert torch.allclose(twin.net(case.inputs), case.net(case.inputs), rtol=1e-8, atol=1e-8)
    assert float((twin.weights - case.weights).norm()) > 5 * float(case.weights.norm())
    assert number(twin, RESCALED) == pytest.approx(number(case, RESCALED), rel=1e-8)
    start = copy.deepcopy(case.net)
    assert number(twin, POSTERIOR, start) > 2 * number(case, POSTERIOR, start)


def test_units_that_count_for_nothing_cost_nothing():
    """Without outgoing weights, a unit's own shrink away: the bound is that of the network without it."""
    case = case_of()
    with torch.no_grad():
        case.net[2].weight[:, 1] = 0
    bare = nn.Sequential(
        nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
    ).double()  # fmt: skip
    kept = [0, 2, 3, 4, 5]
    with torch.no_grad():
        bare[0].weight.copy_(case.net[0].weight[kept])
        bare[0].bias.copy_(case.net[0].bias[kept])
        bare[2].weight.copy_(case.net[2].weight[:, kept])
        bare[2].bias.copy_(case.net[2].bias)
        bare[4].load_state_dict(case.net[4].state_dict())
    truth = number(Case(bare, *case.data, case.criterion), RESCALED)
    assert number(case, RESCALED) == pytest.approx(truth, rel=1e-8)


def test_more_confidence_costs_more_and_a_wider_prior_costs_more_where_it_is_not_left():
    case = case_of()
    start = copy.deepcopy(case.net)
    for name in (*AROUND, RESCALED):
        values = [number(case, f"{name}(delta={delta})", start) for delta in (0.5, 0.05, 0.005)]
        assert values == sorted(values)
        assert values[0] < values[2]
    for name in AROUND:  # no distance: only the widths count
        values = [number(case, f"{name}(sigma={sigma})", start) for sigma in (0.1, 1.0, 10.0)]
        assert values[0] < values[1] < values[2] or (name == EFFECTIVE and values[0] <= values[1] < values[2])
    # Away from the start a narrow prior is left soonest.
    far = [number(case, f"{EFFECTIVE}(sigma={sigma})", case_of(4).net) for sigma in (0.01, 0.1, 1.0)]
    assert far == sorted(far, reverse=True)


def test_weights_before_training_come_as_a_network_wrapped_or_not_or_by_name():
    case, start = case_of(), case_of(4).net
    truth = number(case, POSTERIOR, start)
    named = dict(reversed(start.state_dict().items()))
    frozen = copy.deepcopy(start).requires_grad_(False)
    for given in (start.state_dict(), named, torch.compile(start), frozen):
        assert number(case, POSTERIOR, given) == truth
    assert number(case, POSTERIOR, copy.deepcopy(start).float()) == pytest.approx(truth, rel=1e-6)
    wrapped = Case(torch.compile(case.net), *case.data, case.criterion)
    assert number(wrapped, POSTERIOR, torch.compile(start)) == truth


def test_a_selection_of_tensors_takes_the_same_of_the_start():
    case, start = case_of(), case_of(4).net
    gap = float((case.net[2].weight - start[2].weight).detach().square().sum())
    h = case.hessian().diagonal().split(case.sizes)[2]
    rows = len(case.targets)
    for given in (start, {"2.weight": start[2].weight}):
        found = number(case, f"{POSTERIOR}(sigma=1)", given, params="2.weight")
        truth = float(0.5 * (rows * h).log1p().sum()) + gap / 2
        assert sandwiched(found, rows, 0.05, 1.0) == pytest.approx(truth, rel=1e-9)


def test_tied_weights_count_once():
    torch.manual_seed(0)

    def build():
        net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 3))
        net[2].weight = net[0].weight
        return net.double()

    net, start = build(), build()
    data = torch.randn(10, 4, dtype=DOUBLE), torch.randint(3, (10,))
    values = {
        isoflat.measure(net, data, nn.CrossEntropyLoss(), measure=EFFECTIVE, initial=given).value
        for given in (start, start.state_dict())
    }
    gap = float((vector(net) - vector(start)).square().sum())
    (value,) = values
    assert value == pytest.approx(math.sqrt((50 * gap + math.log(2 * math.sqrt(10) / 0.05)) / 20), rel=1e-9)


def test_the_record_says_which_weights_before_training():
    case, (one, other) = case_of(), (case_of(4).net, case_of(5).net)
    names = ["gradient_norm", EFFECTIVE]

    def hashes(initial):
        table = isoflat.measure_all(
            case.net, case.data, case.criterion, measures=names, geometry="euclidean", initial=initial
        )
        assert isoflat.Table.from_json(table.to_json()) == table
        return {row.settings["initial"] for row in table}

    assert hashes(None) == {None}
    assert hashes(one) == hashes(one.state_dict()) == hashes(copy.deepcopy(one))
    assert hashes(one).isdisjoint(hashes(other))
    assert len(hashes(one)) == 1


def test_without_weights_before_training_the_rest_is_measured():
    case = case_of()
    table = isoflat.measure_all(case.net, case.data, case.criterion, measures=[*AROUND, RESCALED, "gradient_norm"])
    assert {row.measure.partition("(")[0] for row in table} == {RESCALED, "gradient_norm"}
    assert {part.measure.partition("(")[0] for part in table.omitted} == set(AROUND)
    assert all("pass initial=" in part.reason and "\n" not in part.reason for part in table.omitted)
    with pytest.raises(isoflat.UsageError, match="pass initial="):
        number(case, EFFECTIVE)


def test_weights_before_training_that_do_not_fit_are_refused():
    case, state = case_of(), case_of(4).net.state_dict()
    missing = {name: tensor for name, tensor in state.items() if name != "2.weight"}
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    wrong = {
        "missing 2.weight": missing,
        r"missing .*unknown module.0.bias": wrapped,
        r"2.weight expected in shape \(4, 6\), got \(6, 4\)": {**state, "2.weight": state["2.weight"].T},
        "2.weight expected in shape .* got list": {**state, "2.weight": [1.0]},
        "2.weight expected in shape .* got ndarray": {**state, "2.weight": state["2.weight"].numpy()},
        "2.weight has no values": {**state, "2.weight": state["2.weight"].to("meta")},
        "unknown 6.weight": {**state, "6.weight": state["4.weight"]},
        "expected in shape": mlp((5, 7, 4, 3), bias=True, seed=3).net,
        "missing 4.bias": mlp((5, 6, 3), bias=True, seed=3).net,
        "got str": "start.pt",
    }
    for words, given in wrong.items():
        with pytest.raises(isoflat.UsageError, match=words) as caught:
            number(case, "gradient_norm", given, geometry="euclidean")
        assert "\n" not in str(caught.value)
    with pytest.raises(isoflat.NonFinite, match=r"NaN or infinite entries in 2\.weight"):
        number(case, POSTERIOR, {**state, "2.weight": state["2.weight"] * math.nan})


def test_what_no_bound_is_known_for_is_refused():
    case, start = case_of(), case_of(4).net
    for name in (*AROUND, RESCALED):
        for options in ("sigma=0", "delta=0", "delta=1", "sigma=-1"):
            with pytest.raises(isoflat.UsageError, match="needs sigma > 0"):
                number(case, f"{name}({options})", start)
        with pytest.raises(isoflat.UsageError, match="reduction='mean'"):
            number(Case(case.net, *case.data, nn.CrossEntropyLoss(reduction="sum")), name, start)
        square = Case(case.net, case.inputs, torch.zeros(12, 3, dtype=DOUBLE), nn.MSELoss())
        with pytest.raises(isoflat.UsageError, match="softmax"):
            number(square, name, start)
    with pytest.raises(isoflat.UsageError, match="beta"):
        number(case, f"{RESCALED}(beta=0)")


def test_the_network_before_training_is_left_alone():
    case, start = case_of(), case_of(4).net
    before = copy.deepcopy(start.state_dict())
    number(case, POSTERIOR, start)
    assert all(torch.equal(before[name], tensor) for name, tensor in start.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in start.parameters())


NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
"""


def test_a_second_file_on_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "bound_nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "bound_nets", raising=False)
    from bound_nets import build

    torch.manual_seed(0)
    net, start = build(), build()
    save_file(net.state_dict(), tmp_path / "best.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in start.state_dict().items()}}, tmp_path / "start.ckpt")

    def run(*words):
        fixed = ("measure", "--model", "bound_nets:build", "--data", "digits", "--weights", "best.safetensors")
        return CliRunner().invoke(app, [*fixed, "--measure", POSTERIOR, "--geometry", "euclidean", *words])

    result = run("--initial", "start.ckpt", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    (row,) = told["rows"]
    assert told["subject"]["initial"] == "start.ckpt"
    assert any("module." in note for note in told["subject"]["notes"])
    from isoflat.experiments.data import digits

    known = isoflat.measure_all(net, digits().train, nn.CrossEntropyLoss(), measures=[POSTERIOR], initial=start)[0]
    assert row["estimate"]["value"] == pytest.approx(known.estimate.value, rel=1e-5)
    assert row["settings"]["initial"] == known.settings["initial"]
    over = run("--initial", "start.ckpt", "--orbit", "1")
    assert over.exit_code == 0, over.output
    assert "MOVES" in over.output
    bare = run()
    assert bare.exit_code == 2
    assert "pass initial=" in bare.output.replace("\n", " ")
    (tmp_path / "other.pt").write_bytes(b"")
    refused = run("--initial", "other.pt")
    assert refused.exit_code == 2
    assert "empty" in refused.output


def test_the_page_about_bounds_runs():
    page = (Path(__file__).parents[2] / "docs/howto/pac-bayes.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in page.split("```python\n")[1:]:
        exec(compile(block.partition("```")[0], "pac-bayes.md", "exec"), names)
    assert [row.measure.partition("(")[0] for row in names["table"]] == [*AROUND, RESCALED]


def test_fixed_tensors_that_the_frame_reaches_have_no_prior():
    """A normalisation's shift may go into the next bias, which is held fixed: it is reached, and costs nothing."""
    rough = normalised()
    case = Case(nn.Sequential(rough.net[0], rough.net[1], rough.net[3]), *rough.data, rough.criterion)
    with torch.no_grad():
        case.net[1].bias.normal_()
        case.net[2].bias.fill_(3.0)
    estimate = isoflat.measure(case.net, case.data, case.criterion, measure=RESCALED, params="*weight")
    assert any("reaches fixed tensors" in note and "2.bias" in note for note in estimate.notes)
    target = subject(case.net, case.data, case.criterion, Settings(params="*weight"))
    h = target.state.space.unflatten(gauss_newton_diagonal(target.risk, target.state))
    tensors = {e.name: e for e in isoflat.symmetries(case.net, case.inputs).scaling.tensors if e.name in h}
    assert set(tensors) == set(h) == {"0.weight", "1.weight", "2.weight"}
    rows, size = len(case.targets), next(iter(tensors.values())).first.shape[1]

    def cost(z):
        total = 0.0
        for name, e in tensors.items():
            d = e.log(torch.from_numpy(z)).exp().square()
            squares = (target.state.parameters[name].square() / 0.01).reshape(e.view)
            total += 0.5 * float((d * squares + (rows * 0.01 * h[name].reshape(e.view) / d).log1p()).sum())
        return total

    best = scipy.optimize.minimize(cost, np.zeros(size), method="BFGS", options={"gtol": 1e-6})
    assert sandwiched(estimate.value, rows, 0.05, 1.0) == pytest.approx(best.fun, rel=1e-7)


def test_bounds_of_several_networks_from_one_start():
    case = mlp((5, 6, 4, 3), bias=True, seed=3)
    start, far = copy.deepcopy(case.net), copy.deepcopy(case.net)
    with torch.no_grad():
        for parameter in far.parameters():
            parameter.mul_(3.0)
    name = "pac_bayes_curvature_posterior"
    found = isoflat.compare(
        {"near": case.net, "far": far}, case.data, case.criterion, measures=[name], geometry="euclidean", initial=start
    )
    alone = [isoflat.measure(net, case.data, case.criterion, measure=name, initial=start) for net in (case.net, far)]
    assert [found[label][0].estimate.value for label in ("near", "far")] == [row.value for row in alone]
