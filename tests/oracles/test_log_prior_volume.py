"""The prior's density at the function against closed forms of kernels and densities."""

import copy
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import isoflat
from cases.networks import Case, mlp
from isoflat.measures.entries import log_prior_volume
from isoflat.measures.entries.log_prior_volume import log_density

DOUBLE = torch.float64


def number(case: Case, options: str = "", **further) -> isoflat.Estimate:
    measure = f"log_prior_volume({options})"
    return isoflat.measure(case.net, case.data, case.criterion, measure=measure, geometry="euclidean", **further)


class Gaussian(nn.Linear):
    """Weights of variance `gain / width`, without bias."""

    def __init__(self, rows: int, columns: int, gain: float):
        self.gain = gain
        super().__init__(rows, columns, bias=False, dtype=DOUBLE)

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=math.sqrt(self.gain / self.in_features))


def arc_cosine(inputs: torch.Tensor) -> torch.Tensor:
    """The kernel of a wide layer of rectified units, weights of variance 2 and 1 over width (Cho and Saul 2009)."""
    norms = inputs.norm(dim=1)
    angle = (inputs @ inputs.T / torch.outer(norms, norms)).clamp(-1, 1).arccos()
    return torch.outer(norms, norms) / inputs.shape[1] * (angle.sin() + (math.pi - angle) * angle.cos()) / math.pi


def test_the_kernel_of_a_wide_layer_is_the_arc_cosine_one():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(6, 3, generator=generator, dtype=DOUBLE), torch.tensor([0, 1, 0, 1, 1, 0])
    torch.manual_seed(0)
    net = nn.Sequential(Gaussian(3, 400, 2.0), nn.ReLU(), Gaussian(400, 40, 1.0))
    case = Case(net, inputs, targets, nn.CrossEntropyLoss())
    truth = arc_cosine(inputs)
    with torch.no_grad():
        labels = net(inputs).argmax(1)
    wanted = log_density(truth, labels, 40, 0.1)
    found = number(case, "draws=300")
    assert found.value == pytest.approx(wanted, abs=4 * found.standard_error)
    assert found.standard_error < 0.01 * abs(wanted)
    # A kernel that is another one is told from it.
    assert abs(found.value - log_density(inputs @ inputs.T, labels, 40, 0.1)) > 20 * found.standard_error


@pytest.mark.parametrize("classes", [2, 5])
def test_the_density_is_that_of_independent_gaussian_numbers(classes):
    """By scipy, in an orthonormal basis of label space across the constants."""
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(12, 15, generator=generator, dtype=DOUBLE)
    labels = torch.randint(classes, (12,), generator=generator)
    kernel = factor @ factor.T
    covariance = kernel / kernel.diagonal().mean() + 0.3 * torch.eye(12, dtype=DOUBLE)
    basis = scipy.linalg.null_space(np.ones((1, classes)))
    corners = math.sqrt(classes) * np.eye(classes)[labels] @ basis
    assert (corners**2).sum(1) == pytest.approx(classes - 1)
    truth = sum(scipy.stats.multivariate_normal.logpdf(column, cov=covariance.numpy()) for column in corners.T)
    assert log_density(kernel, labels, classes, 0.3) == pytest.approx(truth, rel=1e-10)


def test_simple_functions_are_more_probable():
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(40, 3, generator=generator, dtype=DOUBLE)
    kernel = arc_cosine(inputs)
    constant = torch.zeros(40, dtype=torch.int64)
    linear = (inputs[:, 0] > 0).long()
    shuffled = linear[torch.randperm(40, generator=generator)]
    simple, straight, rough = (log_density(kernel, labels, 2, 0.1) for labels in (constant, linear, shuffled))
    assert simple > straight > rough


def test_it_depends_on_predictions_only_and_leaves_everything_as_it_was():
    case = mlp((5, 8, 3), bias=True, seed=3, rows=30)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    case = Case(net, *case.data, case.criterion)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    one, same, other = (number(case, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert one.samples == same.samples != other.samples
    with torch.no_grad():
        net[3].weight.mul_(3)
        net[3].bias.mul_(3)  # other scores, the same order
    assert number(case).value == one.value
    single = Case(copy.deepcopy(net).float(), case.inputs.float(), case.targets, case.criterion)
    assert number(single).value == pytest.approx(one.value, rel=1e-6)
    assert one.lower <= number(case, "draws=1000", seed=7).value <= one.upper


def test_batches_do_not_matter_and_a_kernel_of_few_draws_is_said_to_be_one():
    case = mlp((5, 8, 3), bias=True, seed=3, rows=40)
    whole = number(case, "draws=10")
    cut = [(case.inputs[:15], case.targets[:15]), (case.inputs[15:], case.targets[15:])]
    parts = isoflat.measure(case.net, cut, case.criterion, measure="log_prior_volume(draws=10)", geometry="euclidean")
    assert parts.value == pytest.approx(whole.value, rel=1e-9)
    assert any("rank 30 at most, of 40 examples" in note for note in whole.notes)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(5, dtype=DOUBLE)), nn.Linear(5, 3, dtype=DOUBLE)

    def forward(self, x):
        return self.head(self.scale * x)


def test_attention_is_drawn_too():
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))

    case = Case(
        Attention().double().eval(), torch.randn(8, 3, 4, dtype=DOUBLE), torch.arange(8) % 3, nn.CrossEntropyLoss()
    )
    assert math.isfinite(number(case).value)


def test_what_has_no_such_number_is_refused(monkeypatch):
    case = mlp((5, 8, 3), bias=True, seed=3)
    with pytest.raises(isoflat.UsageError, match=r"'Own' \(Own\) holds parameters"):
        number(Case(Own(), *case.data, case.criterion))
    nested = nn.Sequential(nn.Flatten(), Own())
    with pytest.raises(isoflat.UsageError, match=r"'1' \(Own\) .* reset_parameters\(\)"):
        number(Case(nested, *case.data, case.criterion))
    with pytest.raises(isoflat.UsageError, match="class indices"):
        number(Case(case.net, case.inputs, torch.zeros(12, 3, dtype=DOUBLE), nn.MSELoss()))
    for options in ("draws=15", "draws=0", "noise=0"):
        with pytest.raises(isoflat.UsageError, match="multiples of 10"):
            number(case, options)
    monkeypatch.setattr(log_prior_volume, "MOST", 11)
    with pytest.raises(isoflat.UsageError, match="at most 11 of the 12 examples"):
        number(case)
