"""The edge of stability of adaptive optimisers, against torch's own steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import isoflat
from cases.networks import Case, mlp
from isoflat.cli.main import app
from isoflat.measurement import lockstep

DOUBLE = torch.float64
NAME = "preconditioned_edge_of_stability"
PAGE = Path(__file__).parents[2] / "docs" / "howto" / "edge-of-stability.md"


def number(case: Case, geometry, **options) -> isoflat.Estimate:
    return isoflat.measure(case.net, case.data, case.criterion, measure=NAME, geometry=geometry, **options)


def _stepped(net, optimizer, steps=5):
    """Steps along gradients that are drawn; the change of all weights by the last one."""
    generator = torch.Generator().manual_seed(1)
    before = []
    for _ in range(steps):
        before = [p.detach().clone() for p in net.parameters()]
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=DOUBLE)
        optimizer.step()
    return [old - p.detach() for old, p in zip(before, net.parameters(), strict=True)]


STEPPERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3),
    "Adam, largest squares": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.9), amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "RMSprop, centred": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.8, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.3),
}


@pytest.mark.parametrize("name", STEPPERS)
def test_the_preconditioner_is_what_the_step_divides_by(name):
    net = mlp((5, 4, 3), bias=True, seed=0).net
    optimizer = STEPPERS[name](net.parameters())
    change = _stepped(net, optimizer)
    metric = isoflat.Preconditioned.of(optimizer, net)
    for (key, p), moved in zip(net.named_parameters(), change, strict=True):
        direction = optimizer.state[p].get("exp_avg", p.grad)
        torch.testing.assert_close(moved, metric.rate * direction / metric.preconditioner[key], rtol=1e-9, atol=1e-15)


def test_the_value_is_the_largest_eigenvalue_of_the_preconditioned_hessian_over_the_limit():
    case = mlp((5, 4, 3), bias=True, seed=0)
    adam = torch.optim.Adam(case.net.parameters(), lr=0.02)
    _stepped(case.net, adam)
    metric = isoflat.Preconditioned.of(adam, case.net)
    assert metric.limit == pytest.approx(38 / 0.02)
    scale = torch.cat([metric.preconditioner[name].reshape(-1) for name, _ in case.net.named_parameters()])
    top = float(torch.linalg.eigvals(case.hessian() / scale[:, None]).real.max())
    assert number(case, metric, rtol=1e-9).value == pytest.approx(top * 0.02 / 38, rel=1e-8)


def _parabola() -> Case:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(20, k, generator=generator, dtype=DOUBLE) for k in (4, 1))
    return Case(nn.Linear(4, 1, bias=False, dtype=DOUBLE), inputs, targets, nn.MSELoss())


LARGE = 1e12
"""An ε before which squared gradients count for nothing: torch's own optimisers with a preconditioner that stands still."""

STILL = {
    "Adam": (38, lambda p, lr: torch.optim.Adam(p, lr=lr, eps=LARGE)),
    "AdamW": (6, lambda p, lr: torch.optim.AdamW(p, lr=lr, betas=(0.5, 0.999), eps=LARGE, weight_decay=0.0)),
    "RMSprop": (2, lambda p, lr: torch.optim.RMSprop(p, lr=lr, eps=LARGE)),
    "RMSprop with momentum": (3, lambda p, lr: torch.optim.RMSprop(p, lr=lr, eps=LARGE, momentum=0.5)),
    "Adagrad": (2, lambda p, lr: torch.optim.Adagrad(p, lr=lr, eps=LARGE)),
}


def _settled(net, optimizer):
    """The optimiser's state as if it had seen zero gradients for long: past what bias corrections do at first."""
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].fill_(1e6)


@pytest.mark.parametrize("name", STILL)
@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_one_is_where_training_diverges(name, factor):
    case = _parabola()
    edge, make = STILL[name]
    top = float(torch.linalg.eigvalsh(case.hessian())[-1])
    optimizer = make(case.net.parameters(), factor * edge * LARGE / top)
    _settled(case.net, optimizer)
    start = least = last = float(case.loss(case.weights))
    for _ in range(800):
        optimizer.zero_grad()
        loss = case.criterion(case.net(case.inputs), case.targets)
        loss.backward()
        optimizer.step()
        last = float(loss.detach())
        least = min(least, last)
        if last > 1e6 * start:
            break
    assert (last > 1e6 * start) is (factor > 1)
    assert factor > 1 or last == pytest.approx(least, rel=1e-3)
    metric = isoflat.Preconditioned.of(optimizer, case.net)
    assert number(case, metric, rtol=1e-9).value == pytest.approx(factor, rel=1e-6)


def test_other_geometries_are_an_omission_and_the_rest_comes_out():
    case = mlp((5, 4, 3), bias=True, seed=0)
    adam = torch.optim.Adam(case.net.parameters(), weight_decay=0.1)
    _stepped(case.net, adam)
    metric = isoflat.Preconditioned.of(adam, case.net)
    table = isoflat.measure_all(
        case.net, case.data, case.criterion,
        measures=[NAME, "quotient_spectral_norm"], geometry=["euclidean", metric],
    )  # fmt: skip
    assert [(row.measure, row.geometry) for row in table] == [
        (NAME, "preconditioned"), ("quotient_spectral_norm", "euclidean"), ("quotient_spectral_norm", "preconditioned"),
    ]  # fmt: skip
    assert table.rows[0].group == "none"
    assert any("weight decay" in note for note in table.rows[0].estimate.notes)
    (left,) = table.omitted
    assert (left.measure, left.geometry) == (NAME, "euclidean")
    assert "geometry=isoflat.Preconditioned.of(optimizer, model)" in left.reason
    with pytest.raises(isoflat.UsageError, match=r"pass geometry=isoflat\.Preconditioned\.of"):
        number(case, "auto")


def test_what_has_no_preconditioner_is_refused():
    case = mlp((5, 4, 3), bias=True, seed=0)
    of, net = isoflat.Preconditioned.of, case.net
    with pytest.raises(isoflat.UsageError, match=r"SGD is not known; known are those of torch\.optim's Adam, AdamW"):
        of(torch.optim.SGD(net.parameters(), lr=0.1), net)
    for fresh in (torch.optim.Adam(net.parameters()), torch.optim.Adagrad(net.parameters())):
        with pytest.raises(isoflat.UsageError, match="has taken no step"):
            of(fresh, net)
    two = torch.optim.Adam([{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.5}], lr=0.1)
    _stepped(net, two)
    with pytest.raises(isoflat.UsageError, match=r"learning rates 0\.1, 0\.5"):
        of(two, net)
    zero = torch.optim.RMSprop(net.parameters(), eps=0.0)
    _stepped(net, zero)
    zero.state[net[0].weight]["square_avg"][0, 0] = 0
    with pytest.raises(isoflat.UsageError, match=r"'0\.weight' has entries that are not positive"):
        of(zero, net)
    with pytest.raises(isoflat.UsageError, match="maximize=False"):
        climbs = torch.optim.Adam(net.parameters(), maximize=True)
        _stepped(net, climbs)
        of(climbs, net)
    still = torch.optim.Adam(net.parameters(), lr=0.0)
    _stepped(net, still)
    with pytest.raises(isoflat.UsageError, match="positive learning rate"):
        of(still, net)


def test_tensors_that_the_optimiser_does_not_train_must_not_be_measured():
    case = mlp((5, 4, 3), bias=True, seed=0)
    half = torch.optim.Adam(case.net[0].parameters())
    _stepped(case.net, half)
    metric = isoflat.Preconditioned.of(half, case.net)
    with pytest.raises(isoflat.UsageError, match=r"no preconditioner of 2\.weight, 2\.bias"):
        number(case, metric)
    assert number(case, metric, params="0.*").value > 0


def test_geometries_are_equal_where_their_content_is():
    case = mlp((5, 4, 3), bias=True, seed=0)
    adam = torch.optim.Adam(case.net.parameters())
    _stepped(case.net, adam)
    one, same = (isoflat.Preconditioned.of(adam, case.net) for _ in range(2))
    kept = {name: tensor.clone() for name, tensor in one.preconditioner.items()}
    _stepped(case.net, adam, steps=1)
    later = isoflat.Preconditioned.of(adam, case.net)
    assert one == same
    assert hash(one) == hash(same)
    assert one != later
    # Of the state as it was: a further step writes into the optimiser's tensors.
    assert all(torch.equal(one.preconditioner[name], tensor) for name, tensor in kept.items())


def test_the_command_line_says_that_it_has_no_optimiser(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("edge_nets.py").write_text(
        "import torch\n\n\ndef build():\n    torch.manual_seed(0)\n    return torch.nn.Linear(3, 2)\n", encoding="utf-8"
    )
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    np.savez("data.npz", x=x, y=np.arange(8) % 2)
    command = ["measure", "--model", "edge_nets:build", "--data", "data.npz"]
    answer = CliRunner().invoke(app, [*command, "--measure", NAME])
    assert answer.exit_code == 2
    line = answer.output.strip().splitlines()[-1]  # behind what tells how far it has come
    assert line.endswith("pass geometry=isoflat.Preconditioned.of(optimizer, model)")


def test_the_page_runs():
    names: dict[str, object] = {}
    for block in PAGE.read_text(encoding="utf-8").split("```python\n")[1:]:
        exec(compile(block.partition("```")[0], PAGE.name, "exec"), names)
    assert 0.8 < names["edge"].value < 1.2


def test_no_solver_runs_for_what_is_refused(monkeypatch):
    """Without an optimiser's metric the number is refused before its eigenvalue is sought."""

    def never(*args):
        raise AssertionError("a solver ran")

    monkeypatch.setattr(lockstep, "serve", never)
    case = mlp((4, 5, 3), bias=True, seed=1)
    table = isoflat.measure_all(
        case.net, case.data, case.criterion, measures=[NAME, "gradient_norm"], geometry="euclidean"
    )
    assert [row.measure for row in table] == ["gradient_norm"]
    assert "Preconditioned.of" in table.omitted[0].reason
    with pytest.raises(isoflat.UserCodeError, match="a solver ran"):
        isoflat.measure(case.net, case.data, case.criterion, measure="hessian_spectral_norm", geometry="euclidean")


def test_a_metric_that_stands_still_has_no_covariant_hessian():
    case = mlp((4, 5, 3), bias=True, seed=1)
    adam = torch.optim.Adam(case.net.parameters(), lr=0.01)
    case.criterion(case.net(case.inputs), case.targets).backward()
    adam.step()
    (row,) = isoflat.measure_all(
        case.net, case.data, case.criterion, measures=[NAME], geometry=isoflat.Preconditioned.of(adam, case.net)
    )
    assert row.stationarity_ratio is None
    assert not any("b/value" in note for note in row.estimate.notes)
