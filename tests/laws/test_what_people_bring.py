"""Losses, batches and precisions as people bring them: each combination is measured right, or refused in one line.

The truth is torch's own: the loss that the combination stands for, on a float64 copy of the network, with its gradient and
its dense Hessian by two passes of autograd. `make forms` tries thousands of combinations, the quick suite some dozens.
"""

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import isoflat
from isoflat.core.estimate import Estimate
from isoflat.curvature.matrix import Matrix
from isoflat.linalg.solver import SingleProduct
from isoflat.measures.base import SolverQuery

CASES = int(os.environ.get("ISOFLAT_CASES", "40"))

ROWS, WIDTH, CLASSES, STEPS = 24, 4, 3, 5

Batch = tuple[Tensor, Tensor]
Whole = Callable[[nn.Module, Batch], tuple[Tensor, float]]
"""Summed loss of a batch, and what it is to be divided by."""


@dataclass(frozen=True)
class LossForm:
    """A loss as somebody writes it, beside the same in torch's own words.

    Attributes:
        targets: kind of targets: "classes", "numbers", "signs" or "tokens".
        given: what is passed as the loss, from the precision.
        truth: summed loss and divisor of a batch.
        averages: flag that sums are divided by the sum of the divisors.
        rows: flag that the loss is a weighted mean over rows; else it is a per-batch loss.
        form: what a batch looks like: "pair" or "mapping".
        accepted: flag that the form may not be refused.
    """

    targets: str
    given: Callable[[torch.dtype], Any]
    truth: Whole
    averages: bool = True
    rows: bool = True
    form: str = "pair"
    accepted: bool = True


def mean_of(loss: Callable[[Tensor, Tensor], Tensor], count: Callable[[Tensor], float] = len) -> Whole:
    """A truth from a mean over rows."""

    def whole(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        divisor = float(count(batch[1]))
        return loss(model(batch[0]), batch[1]) * divisor, divisor

    return whole


def batchwise(loss: Callable[[Tensor, Tensor], Tensor]) -> Whole:
    """A truth from a loss of whole batches, each of which counts the same."""
    return lambda model, batch: (loss(model(batch[0]), batch[1]), 1.0)


WEIGHTS = torch.tensor([1.0, 7.0, 0.5], dtype=torch.float64)


def weighted(output: Tensor, target: Tensor) -> Tensor:
    """Weighted cross-entropy as a function: a ratio."""
    return F.cross_entropy(output, target, weight=WEIGHTS.to(output))


def weighted_sum(output: Tensor, target: Tensor) -> Tensor:
    """The same, summed."""
    return F.cross_entropy(output, target, weight=WEIGHTS.to(output), reduction="sum")


def masked(output: Tensor, target: Tensor) -> Tensor:
    """A mean over tokens that are not masked."""
    return F.cross_entropy(output, target, ignore_index=-100)


def dice(output: Tensor, target: Tensor) -> Tensor:
    """Dice over all rows of a batch: a ratio of sums."""
    p = output.sigmoid()
    return 1 - 2 * (p * target).sum() / (p.sum() + target.sum())


def balanced(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy weighted by the classes' frequencies in the batch."""
    found = target.bincount(minlength=CLASSES).to(output) + 1
    return F.cross_entropy(output, target, weight=found.reciprocal())


def contrast(output: Tensor, target: Tensor) -> Tensor:
    """Every row against all others of its batch."""
    z = F.normalize(output, dim=1)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)))


def focal(output: Tensor, target: Tensor) -> Tensor:
    """A mean over rows that torch has no criterion for."""
    log = output.log_softmax(1).gather(1, target[:, None])[:, 0]
    return -((1 - log.exp()) ** 2 * log).mean()


def counted(target: Tensor) -> float:
    """Targets that are not masked."""
    return float((target != -100).sum())


def summed_pair(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """A sum and a count, as a `BatchLoss` returns them."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def ce(**options: Any) -> Callable[[torch.dtype], nn.Module]:
    """A criterion of cross-entropy."""
    return lambda dtype: nn.CrossEntropyLoss(**options)


def function(loss: Callable[..., Any]) -> Callable[[torch.dtype], Any]:
    """A function as it stands."""
    return lambda dtype: loss


LOSSES = {
    "cross-entropy": LossForm("classes", ce(), mean_of(F.cross_entropy)),
    "cross-entropy, summed": LossForm("classes", ce(reduction="sum"), mean_of(F.cross_entropy), averages=False),
    "cross-entropy, smoothed": LossForm(
        "classes", ce(label_smoothing=0.1), mean_of(partial(F.cross_entropy, label_smoothing=0.1))
    ),
    "cross-entropy, weighted": LossForm(
        "classes",
        lambda dtype: nn.CrossEntropyLoss(weight=WEIGHTS.to(dtype)),
        lambda model, batch: (weighted_sum(model(batch[0]), batch[1]), float(WEIGHTS[batch[1]].sum())),
    ),
    "cross-entropy of tokens": LossForm("tokens", ce(), mean_of(masked, counted)),
    "torch's function": LossForm("classes", function(F.cross_entropy), mean_of(F.cross_entropy)),
    "a function, mean over rows": LossForm("classes", function(focal), mean_of(focal)),
    "a function, weighted": LossForm("classes", function(weighted), batchwise(weighted), rows=False),
    "a function, balanced": LossForm("classes", function(balanced), batchwise(balanced), rows=False),
    "a function, masked tokens": LossForm("tokens", function(masked), batchwise(masked), rows=False),
    "a function of pairs of rows": LossForm("classes", function(contrast), batchwise(contrast), rows=False),
    "a function, summed": LossForm(
        "classes", function(partial(F.cross_entropy, reduction="sum")), mean_of(F.cross_entropy), accepted=False
    ),
    "squares": LossForm("numbers", lambda dtype: nn.MSELoss(), mean_of(F.mse_loss)),
    "squares, summed": LossForm(
        "numbers",
        lambda dtype: nn.MSELoss(reduction="sum"),
        lambda m, b: (F.mse_loss(m(b[0]), b[1], reduction="sum"), 1),
        False,
    ),
    "squares as a function": LossForm(
        "numbers", function(lambda output, target: (output - target).square().mean()), mean_of(F.mse_loss)
    ),
    "Huber": LossForm("numbers", lambda dtype: nn.HuberLoss(), mean_of(F.huber_loss)),
    "binary": LossForm("signs", lambda dtype: nn.BCEWithLogitsLoss(), mean_of(F.binary_cross_entropy_with_logits)),
    "Dice": LossForm("signs", function(dice), batchwise(dice), rows=False),
    "BatchLoss, sum and count": LossForm("classes", function(isoflat.BatchLoss(summed_pair)), mean_of(F.cross_entropy)),
    "BatchLoss, mean": LossForm(
        "classes", function(isoflat.BatchLoss(lambda m, b: F.cross_entropy(m(b[0]), b[1]))), mean_of(F.cross_entropy)
    ),
    "BatchLoss on mappings": LossForm(
        "classes",
        function(isoflat.BatchLoss(lambda m, b: summed_pair(m, (b["x"], b["y"])))),
        mean_of(F.cross_entropy),
        form="mapping",
    ),
}

CUTS = {"one batch": [ROWS], "equal batches": [8, 8, 8], "ragged batches": [11, 2, 7, 4], "single rows": [1] * 5 + [19]}

HOLDERS = ("pair", "list", "loader", "dataset", "function")


@dataclass(frozen=True)
class Case:
    """A combination, and the seed of its numbers."""

    loss: str
    cut: str
    holder: str
    dtype: torch.dtype
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Combinations of a loss, batches, what holds them, and a precision."""
    holder = draw(st.sampled_from(HOLDERS))
    return Case(
        draw(st.sampled_from(sorted(LOSSES))),
        "one batch" if holder in ("pair", "dataset") else draw(st.sampled_from(sorted(CUTS))),
        holder,
        draw(st.sampled_from([torch.float32, torch.float64])),
        draw(st.integers(0, 2**16)),
    )


class Tokens(nn.Module):
    """Scores for every token, classes on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded, self.head = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedded(x).tanh()).transpose(1, 2)


def problem(case: Case) -> tuple[nn.Module, Batch]:
    """A network and all of its rows, in the precision of the case."""
    rng = torch.Generator().manual_seed(case.seed)
    torch.manual_seed(case.seed)
    kind = LOSSES[case.loss].targets
    outputs = 1 if kind == "signs" else CLASSES
    net = Tokens() if kind == "tokens" else nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, outputs))
    if kind == "tokens":
        x = torch.randint(7, (ROWS, STEPS), generator=rng)
        y = torch.randint(CLASSES, (ROWS, STEPS), generator=rng)
        y[:, 1:][torch.rand(ROWS, STEPS - 1, generator=rng) < 0.4] = -100
        return net.to(case.dtype).eval(), (x, y)
    x = torch.randn(ROWS, WIDTH, generator=rng, dtype=torch.float64).to(case.dtype)
    if kind == "classes":
        y = torch.randint(CLASSES, (ROWS,), generator=rng)
    elif kind == "numbers":
        y = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64).to(case.dtype)
    else:
        y = torch.randint(2, (ROWS, 1), generator=rng).to(case.dtype)
    return net.to(case.dtype).eval(), (x, y)


def held(case: Case, whole: Batch) -> tuple[Any, list[Batch]]:
    """What is passed as the data, and its batches."""
    sizes = CUTS[case.cut]
    pairs = list(zip(*(part.split(sizes) for part in whole), strict=True))
    if LOSSES[case.loss].form == "mapping":
        return [{"x": x, "y": y} for x, y in pairs], pairs
    if case.holder == "pair":
        return whole, pairs
    if case.holder == "dataset":
        return TensorDataset(*whole), pairs
    if case.holder == "loader" and len(set(sizes)) == 1:
        return DataLoader(TensorDataset(*whole), batch_size=sizes[0]), pairs
    if case.holder == "function":
        return lambda: iter(pairs), pairs
    return pairs, pairs


@dataclass(frozen=True)
class Truth:
    """Loss, gradient and Hessian by plain autograd, in float64."""

    loss: float
    gradient: Tensor
    hessian: Tensor


def truth(case: Case, net: nn.Module, batches: list[Batch]) -> Truth:
    """The truth of a case."""
    form, exact = LOSSES[case.loss], copy.deepcopy(net).double()
    wide = [tuple(part.double() if part.is_floating_point() else part for part in batch) for batch in batches]
    terms = [form.truth(exact, batch) for batch in wide]
    total = torch.stack([term for term, _ in terms]).sum()
    loss = total / sum(count for _, count in terms) if form.averages else total
    weights = list(exact.parameters())
    gradient = _flat(torch.autograd.grad(loss, weights, create_graph=True))
    rows = [_flat(torch.autograd.grad(entry, weights, retain_graph=True)) for entry in gradient]
    return Truth(float(loss.detach()), gradient.detach(), torch.stack(rows))


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def product(direction: Tensor, answers: list[Tensor]) -> isoflat.Measure:
    """A measure that takes one product with a direction and hands it out."""

    def evaluate(findings: Any) -> Estimate:
        answers.append(findings.answers[0].result[:, 0].double())
        return Estimate.exact(0.0)

    return isoflat.Measure(
        name="one_product",
        formula="H r",
        definition="One product.",
        reference="this test",
        needs=(SolverQuery(SingleProduct(direction), Matrix.HESSIAN),),
        evaluate=evaluate,
    )


def outcome(case: Case) -> str:
    """Measure a case beside its truth, and say what came of it.

    Raises:
        AssertionError: a number is wrong, or a form that is accepted was refused.
    """
    net, whole = problem(case)
    data, batches = held(case, whole)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    known = truth(case, net, batches)
    direction = torch.randn(
        len(known.gradient), generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64
    )
    answers: list[Tensor] = []
    try:
        table = isoflat.measure_all(
            net,
            data,
            LOSSES[case.loss].given(case.dtype),
            measures=["hessian_spectral_norm", "gradient_norm", product(direction, answers)],
            geometry="euclidean",
        )
    except isoflat.IsoflatError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        assert not LOSSES[case.loss].accepted, f"{case} was refused: {error}"
        return "refused"
    finally:
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    allowed = 1e-6 if case.dtype == torch.float64 else 1e-4
    (norm, slope, _) = table.rows
    size = float(torch.linalg.matrix_norm(known.hessian, 2))
    assert abs(norm.point.loss - known.loss) <= allowed * abs(known.loss), (case, norm.point.loss, known.loss)
    assert abs(norm.point.gradient_norm - float(known.gradient.norm())) <= allowed * (
        float(known.gradient.norm()) + size
    )
    assert float((answers[0] - known.hessian @ direction).norm()) <= allowed * size * float(direction.norm()), case
    estimate = norm.estimate
    assert estimate.lower - allowed * size <= size <= estimate.upper + allowed * size, (case, estimate, size)
    assert abs(slope.estimate.value - float(known.gradient.norm())) <= allowed * (float(known.gradient.norm()) + size)
    if not LOSSES[case.loss].rows and len(batches) > 1:
        assert any("per-batch loss" in note for note in estimate.notes), (case, estimate.notes)
        return "a per-batch loss"
    return "right"


def test_every_combination_is_right_or_refused() -> None:
    """And most are accepted: what is refused is the form that is marked so."""
    counted: Counter[str] = Counter()

    @settings(
        max_examples=CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=cases())
    def tried(case: Case) -> None:
        counted[outcome(case)] += 1

    tried()
    total = sum(counted.values())
    print(f"\n{total} combinations: " + ", ".join(f"{count} {name}" for name, count in counted.most_common()))
    assert counted["right"] + counted["a per-batch loss"] >= 0.9 * total


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A loss whose truth is another one."""
    monkeypatch.setitem(LOSSES, "wrong", LossForm("classes", function(focal), mean_of(F.cross_entropy)))
    yield


def test_a_wrong_number_is_noticed(wrong: None) -> None:
    with pytest.raises(AssertionError):
        outcome(Case("wrong", "equal batches", "list", torch.float64, 0))
