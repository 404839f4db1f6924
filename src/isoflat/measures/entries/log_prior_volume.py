"""The prior's density at the function: how likely random weights are to label the data as the network does."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.geometry.base import Invariance
from isoflat.measures.base import DataStatistic, Direction, Findings, Measure, Question
from isoflat.measures.entries.stochastic import mean_of
from isoflat.measures.point import EvaluationPoint
from isoflat.measures.settings import Settings
from isoflat.risk.batches import move
from isoflat.risk.losses import call, split
from isoflat.risk.network import Network, exactly

MOST = 2000
"""Examples at most: the determinant's cost grows with their cube, and there are eleven of them."""

GROUPS = 10
"""Groups of draws, which are left out in turn to see what the draws leave open."""


@final
@dataclass(frozen=True)
class PriorKernels:
    """Kernels that random weights give of the data.

    Attributes:
        kernels: `Σ_c f_c(x_i) f_c(x_j)` as a mean over the draws of each group: shape `(groups, N, N)`, float64.
        labels: the classes that the network predicts, shape `(N,)`.
        classes: number of classes.
    """

    kernels: Tensor
    labels: Tensor
    classes: int


@final
@dataclass(frozen=True)
class _Prior(DataStatistic):
    """The kernel of the architecture's own initialisation, and what the network predicts.

    Attributes:
        draws: number of draws of all weights.
    """

    framed = False

    draws: int

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> PriorKernels:
        """One forward pass for the network as it is, and one for each draw."""
        if point.survey.accuracy is None:
            raise UsageError(
                "log_prior_volume is about the classes that a network predicts: it needs a torch.nn criterion of class scores, "
                "with class indices as targets"
            )
        if point.survey.rows > MOST:
            raise UsageError(
                f"log_prior_volume takes the determinant of a matrix with a row for each example, at a cost that grows with "
                f"their cube: give a fixed part of the data, at most {MOST} of the {point.survey.rows} examples"
            )
        state = point.state.to(dtype=torch.float64)
        with exactly(state.device), torch.no_grad():
            scores = _scores(point, point.risk.network, state)
            kernels = torch.zeros(GROUPS, len(scores), len(scores), dtype=torch.float64, device=state.device)
            # On the CPU and in float64, so that weights are the same whatever the device and the precision.
            twin = copy.deepcopy(point.risk.network.module).to(device="cpu", dtype=torch.float64).eval()
            random = stream(point.settings.seed, "prior")
            for draw in range(self.draws):
                point.report(f"draw {draw + 1} of {self.draws}")
                drawn = _drawn(twin, random).to(device=state.device)
                outputs = _scores(point, replace(point.risk.network, module=twin), drawn)
                kernels[draw % GROUPS] += outputs @ outputs.T / (self.draws / GROUPS)
        return PriorKernels(kernels, scores.argmax(1), scores.shape[1])


def _scores(point: EvaluationPoint, network: Network, state: State) -> Tensor:
    """Scores of all examples: shape `(N, classes)`."""
    found = []
    for batch in point.risk.batches:
        inputs: Any = split(move(batch, state.device, state.dtype))[0]
        found.append(network(state, lambda model, inputs=inputs: call(model, inputs)))
    if any(part.ndim != 2 for part in found):
        raise UsageError(
            f"log_prior_volume needs one row of class scores for each example, got outputs of shape {tuple(found[0].shape)}"
        )
    return torch.cat(found)


def _drawn(twin: nn.Module, random: torch.Generator) -> State:
    """The architecture's own initialisation, drawn anew from a stream; torch's own generator comes back."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(random.get_state())
        for name, module in reversed(list(twin.named_modules())):  # what holds others may draw theirs as well
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if reset is not None:
                reset()
            elif next(module.parameters(recurse=False), None) is not None:
                raise UsageError(
                    f"log_prior_volume draws weights anew, and '{name or type(module).__name__}' ({type(module).__name__}) "
                    "holds parameters without saying how: give it a method reset_parameters()"
                )
        random.set_state(torch.get_rng_state())
    parameters = {name: tensor.detach().clone() for name, tensor in twin.named_parameters()}
    return State(parameters, {}, {name: tensor.clone() for name, tensor in twin.named_buffers()})


def log_density(kernel: Tensor, labels: Tensor, classes: int, noise: float) -> float:
    """Log marginal likelihood of labels as the values of independent Gaussian processes, in nats.

    Labels are the corners of a simplex in `classes − 1` dimensions, of mean square 1 in each (±1 for two classes), so that
    no dimension says what the others have said. The kernel is divided by the mean of its diagonal.

    Args:
        kernel: shape `(N, N)`, float64.
        labels: class indices, shape `(N,)`.
        classes: number of classes.
        noise: variance added to the kernel's diagonal.
    """
    rows = len(labels)
    corners = nn.functional.one_hot(labels, classes).to(kernel) - 1 / classes
    covariance = kernel / kernel.diagonal().mean() + noise * torch.eye(rows, dtype=kernel.dtype, device=kernel.device)
    factor = torch.linalg.cholesky(covariance)
    # A change of basis in label space keeps the sum of squares, so the corners stay in their `classes` dimensions.
    fit = classes * float(torch.linalg.solve_triangular(factor, corners, upper=False).square().sum())
    return -fit / 2 - (classes - 1) * (float(factor.diagonal().log().sum()) + rows / 2 * math.log(2 * math.pi))


def _needs(settings: Settings, options: Mapping[str, float]) -> tuple[Question, ...]:
    draws, noise = options["draws"], options["noise"]
    if draws < GROUPS or draws % GROUPS or not noise > 0:
        raise UsageError(
            f"log_prior_volume takes draws in multiples of {GROUPS} and a positive noise, got {dict(options)}"
        )
    return (_Prior(int(draws)),)


def _evaluate(findings: Findings) -> Estimate:
    prior: PriorKernels = findings.answers[0].result
    draws, noise = int(findings.options["draws"]), findings.options["noise"]
    total = prior.kernels.sum(0)

    def density(kernel: Tensor) -> float:
        return log_density(kernel, prior.labels, prior.classes, noise)

    # The jackknife's pseudo-values: their mean lacks the bias of first order that a kernel of few draws has.
    whole = GROUPS * density(total)
    samples = [whole - (GROUPS - 1) * density(total - kernel) for kernel in prior.kernels]
    rows, rank = len(prior.labels), draws * prior.classes
    short = (
        f"the kernel has rank {rank} at most, of {rows} examples: the noise stands for the rest; raise the option draws"
    )
    return mean_of(findings, samples, *([short] if rank < rows else []), remedy="raise the option draws")


MEASURE = Measure(
    name="log_prior_volume",
    formula=r"\sum_{c=1}^{C-1} \ln \mathcal{N}(y_c;\, 0,\, K / \bar k + \sigma^2 I), \quad K = \mathbb{E}_\theta\, f f^\top",
    definition="How likely the network's labels of the data are under random weights, as Gaussian processes have it.",
    reference="zhang2021, arXiv:2103.06219",
    units="nat (log of a density)",
    direction=Direction.HIGHER_IS_FLATTER,
    loss_degree=0,
    needs=_needs,
    evaluate=_evaluate,
    geometry="euclidean",
    claims=frozenset(Invariance),
    provisional=(
        "The likelihood is ours. The paper has the probability of binary labels under a Gaussian process, by expectation "
        "propagation; here it is the density of regression on labels, in closed form and for any number of classes. The "
        "two rank functions alike at best. The kernel is divided by its mean diagonal, so that the initialisation's scale "
        "does not count."
    ),
    options={"draws": 100, "noise": 0.1},
    pitfalls=(
        "A property of the labels and of the architecture: weights count by what they predict only. Compare equal data and "
        "equal noise; a density may exceed 1. Weights are drawn by each module's reset_parameters, all tensors and those "
        "held fixed as well, in evaluation mode: batch normalisation then has no statistics, and changes nothing. The "
        "interval is that of the draws, not of how wide the network is."
    ),
)
