"""Losses as a sum over counted targets, so that the batching never changes the risk.

The base form is `loss(model, batch) -> Term`; a criterion, a function of output and target, and a model that computes
its own loss are adapters to it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from isoflat.core.errors import DataError, UsageError
from isoflat.risk import confident
from isoflat.risk.arguments import as_one, check_arguments, check_batch_loss, no_loss
from isoflat.risk.batches import leading, rows_of
from isoflat.risk.outputs import Layout, described, mapped
from isoflat.risk.separability import check_shapes, scalar
from isoflat.risk.tokens import LabelCount


@final
@dataclass(frozen=True)
class Term:
    """Contribution of one batch to the empirical risk `Σ total / Σ count`.

    Attributes:
        total: summed loss, a scalar with a graph.
        count: number of counted targets, or sum of their weights; the divisor of a mean.
        rows: number of rows of data.
        output: predictions, where accuracy is defined.
        target: class indices that count, aligned with `output`'s rows.
        z: output of the model with its graph, where the loss is a function of it; None where that is not known.
        mean: flag that the total is a mean of the user's own times the count, which is to prove right (`risk.division`).
        loss: the loss as a function of z; None where that is not known.
    """

    total: Tensor
    count: float
    rows: int
    output: Tensor | None = None
    target: Tensor | None = None
    z: Tensor | None = None
    mean: bool = False
    loss: TargetLoss | None = None


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """A loss in the base form.

    Attributes:
        averages: flag that the risk is `Σ total / Σ count`; False for `Σ total`.
        logits: transformation of the scores before the loss; "raw" for none.
        notes: remarks on how batches are weighted, where a reader must know it.
        label: fixed name in reasons of a result, whatever the class is named.
    """

    label: ClassVar[str]
    averages: bool = True
    logits: str = "raw"
    notes: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, model: Callable[..., Any], batch: Any) -> Term:
        """The contribution of one batch."""


@final
@dataclass(frozen=True)
class BatchLoss(Loss):
    """A loss of the user's own on whole batches.

    `fn(model, batch)` returns `(sum, count)`: the summed loss and what it is to be divided by. A function that
    returns a mean is accepted too; it is then weighted by the rows of the batch, where it proves to be a mean over them.

    Attributes:
        fn: the function.
        equally: flag that it returns a mean that is none over rows: every batch counts the same.

    >>> loss = BatchLoss(lambda model, batch: (model(batch["x"]).square().sum(), len(batch["x"])))
    >>> loss(lambda x: 2 * x, {"x": torch.ones(3)}).total.item()
    12.0
    """

    label: ClassVar[str] = "BatchLoss"
    fn: Callable[[Any, Any], Any]
    equally: bool = False

    def __call__(self, model: Callable[..., Any], batch: Any) -> Term:
        """Call the user's function."""
        result = self.fn(model, batch)
        if isinstance(result, tuple):
            if len(result) != 2:
                raise UsageError(f"a BatchLoss must return (sum, count) or a mean, got a tuple of {len(result)}")
            return Term(scalar(result[0], "sum"), float(result[1]), rows_of(batch))
        rows = rows_of(batch)
        if self.equally:
            return Term(scalar(result, "mean"), 1.0, rows)
        return Term(scalar(result, "mean") * rows, rows, rows, mean=True)


@final
@dataclass(frozen=True)
class ModelLoss(Loss):
    """Loss of models whose output carries it as `.loss`: a mean, weighted by what it is a mean over.

    Attributes:
        count: number of labels of a batch that the mean is over (`risk.tokens`); None for its rows.
        rivals: rules that fit as well on the first batch.
    """

    label: ClassVar[str] = "ModelLoss"
    count: LabelCount | None = None
    rivals: tuple[LabelCount | None, ...] = ()

    def __call__(self, model: Callable[..., Any], batch: Any) -> Term:
        """Call the model on the batch and take its loss."""
        output = model(**batch) if isinstance(batch, Mapping) else model(batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise UsageError(
                f"no loss was given and the model's output ({type(output).__name__}) has none: pass a torch.nn "
                "criterion, a function of output and target, or an isoflat.BatchLoss"
            )
        rows = rows_of(batch)
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        z = logits if isinstance(logits, Tensor) else None
        mean, count = scalar(loss, "model's loss"), rows if self.count is None else self.count(batch)
        # A mean over no labels is NaN.
        return Term(mean * count if count else torch.zeros_like(mean), count, rows, z=z, mean=True)


@final
@dataclass(frozen=True)
class PerBatchLoss(Loss):
    """A function of output and target that is no mean over rows: what a training loop minimises, batch by batch.

    Attributes:
        function: the user's loss; every batch counts the same.
        scores: as for `TargetLoss`.
    """

    label: ClassVar[str] = "a loss of whole batches"
    function: Callable[[Tensor, Tensor], Tensor]
    scores: Callable[[Tensor], Tensor] | None = None

    def __call__(self, model: Callable[..., Any], batch: Any) -> Term:
        """Apply the model to the inputs and the loss to its output."""
        inputs, target = split(batch)
        whole = TargetLoss(self.summed, lambda output, target: 1.0, scores=self.scores, whole=True)
        return whole.of(whole.output(model, inputs), target, example_rows(inputs, target))

    def summed(self, output: Tensor, target: Tensor) -> Tensor:
        """The batch's loss."""
        return scalar(self.function(output, target), "loss")


@final
@dataclass(frozen=True)
class TargetLoss(Loss):
    """A loss of output and target, for batches `(inputs, targets)`.

    Attributes:
        summed: loss `f(output, target)`, summed over counted targets.
        count: divisor `f(output, target)` of the mean.
        classes: mask of the targets whose predictions count towards accuracy; None if undefined.
        claimed_mean: user's function that must prove to be a mean over rows (`risk.division`).
        criterion: torch criterion that it was made from; None for a user's function.
        scores: map from the model's output to the `output` that the loss is a function of; None for the identity.
        gain: factor that the map multiplies by; None where it is no single number.
        wanted: target value of the loss once scores are scaled (`risk.temperature`); None to leave it.
        whole: flag that `output` may be of several tensors; else it is one, the `.logits` where the model returns a record.
    """

    label: ClassVar[str] = "TargetLoss"
    summed: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor, Tensor], float]
    classes: Callable[[Tensor, Tensor], Tensor] | None = None
    claimed_mean: Callable[[Tensor, Tensor], Tensor] | None = None
    criterion: nn.Module | None = None
    scores: Callable[[Tensor], Tensor] | None = None
    gain: float | None = 1.0
    wanted: float | None = None
    whole: bool = False

    def __call__(self, model: Callable[..., Any], batch: Any) -> Term:
        """Apply the model to the inputs and the loss to its output."""
        inputs, target = split(batch)
        return self.of(self.output(model, inputs), target, example_rows(inputs, target))

    def output(self, model: Callable[..., Any], inputs: Any) -> Any:
        """The model's output on its inputs, as the loss takes it."""
        return call(model, inputs, self.scores, self.whole)

    def packed(self, output: Any, target: Any) -> tuple[TargetLoss, Tensor]:
        """An output as one tensor, and the loss as a function of that; both as they are where it is one already."""
        if isinstance(output, Tensor):
            return self, output
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and not _takes(self.summed, output, target):
            return replace(self, whole=False), logits
        layout = Layout.of(output, lambda output: self.summed(output, target))

        def through(function: Callable[[Any, Any], Any]) -> Callable[[Tensor, Any], Any]:
            return lambda z, target: function(layout.unpack(z), target)

        mean = None if self.claimed_mean is None else through(self.claimed_mean)
        summed, count = through(self.summed), through(self.count)
        inside = replace(self, summed=summed, count=count, claimed_mean=mean, criterion=None, whole=False)
        return inside, layout.pack()

    def of(self, output: Any, target: Any, rows: int) -> Term:
        """The contribution of so many rows, from `output`."""
        if not isinstance(output, Tensor):
            inside, z = self.packed(output, target)
            return inside.of(z, target, rows)
        total = scalar(self.summed(output, target), "summed loss")
        count = self.count(output, target)
        if self.classes is None or not _are_classes(output, target):
            return Term(total, count, rows, z=output, loss=self)
        # Class scores lie along dimension 1 (dimension 0 for a single example), as in torch.nn.CrossEntropyLoss.
        scores = output.detach().movedim(1, -1) if output.ndim > 1 else output.detach()[None]
        counted = self.classes(output, target).reshape(-1)
        scored = scores.reshape(-1, scores.shape[-1])[counted]
        return Term(total, count, rows, scored, target.reshape(-1)[counted], output, loss=self)

    def by_row(self, output: Any, target: Any) -> Tensor:
        """The summed loss of each row by itself, shape `(rows,)`."""
        if not isinstance(output, Tensor):
            inside, z = self.packed(output, target)
            return inside.by_row(z, target)
        if self.criterion is None:
            return torch.func.vmap(lambda z, y: self.summed(z[None], mapped(y, _lifted)))(output, target)
        each = _like(self.criterion, output)
        each.reduction = "none"
        return confident.applied(each, output, target).reshape(len(output), -1).sum(1)

    def row_counts(self, output: Tensor, target: Tensor) -> Tensor:
        """Divisor `count` of each row by itself, shape `(rows,)`, float64, on the CPU."""
        rows = len(output)
        if self.classes is None or not _are_classes(output, target):
            # Every row has as many entries.
            return torch.full((rows,), self.count(output, target) / rows, dtype=torch.float64)
        if self.criterion is None:
            each = [self.count(output[i : i + 1], target[i : i + 1]) for i in range(rows)]
            return torch.tensor(each, dtype=torch.float64)
        counted: Tensor = self.classes(output, target)
        weight: Tensor | None = getattr(self.criterion, "weight", None)
        sizes = counted if weight is None else weight.to(target.device)[target * counted] * counted
        return sizes.double().reshape(rows, -1).sum(1).cpu()

    def weighted(self, weights: Tensor) -> TargetLoss:
        """The loss of rows that count as often as their weights say, shape `(rows,)`."""

        def summed(output: Tensor, target: Tensor) -> Tensor:
            return (self.by_row(output, target) * weights.to(output)).sum()

        return replace(self, summed=summed, criterion=None)

    def normalised(self) -> TargetLoss:
        """The loss of scores that are centred and divided by their length, example by example.

        Growing all weights of a network that separates its classes lowers loss and curvature together (Granziol 2020);
        directions of scores do not grow. The form is that of Andriushchenko et al. 2023, section 3.

        Raises:
            UsageError: the loss is not one of class scores.
        """
        self._of_scores("normalised")
        return replace(
            self,
            scores=self._before(_directions_of),
            gain=None,
            logits="normalised",
            notes=(*self.notes, "scores were normalised"),
        )

    def at(self, wanted: float) -> TargetLoss:
        """The loss of scores that are yet to be scaled, so that it becomes what is wanted (`risk.temperature`).

        Raises:
            UsageError: the loss is not one of class scores.
        """
        self._of_scores(f"loss={wanted:g}")
        return replace(self, logits=f"loss={wanted:g}", wanted=wanted)

    def scaled(self, factor: float) -> TargetLoss:
        """The loss of scores times a factor."""
        return replace(self, scores=self._before(lambda scores: factor * scores), gain=factor)

    def _before(self, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A change of scores, which for a loss of log-probabilities are brought to such again."""
        if not isinstance(self.criterion, nn.NLLLoss):
            return change
        return lambda scores: change(scores).log_softmax(class_axis(scores))

    def _of_scores(self, logits: str) -> None:
        if self.classes is None:
            raise UsageError(
                f"logits='{logits}' scales class scores, and needs torch.nn.CrossEntropyLoss or NLLLoss: leave logits out"
            )


def _directions_of(scores: Tensor) -> Tensor:
    """Centred, of length one; classes lie along dimension 1 (dimension 0 of a single example).

    Scores that are all equal have no direction: they become zeros, as if they were constants.
    """
    axis = class_axis(scores)
    centred = scores - scores.mean(axis, keepdim=True)
    square = centred.square().sum(axis, keepdim=True)
    some = square > 0
    return torch.where(some, centred / torch.where(some, square, 1).sqrt(), 0)


def _lifted(tensor: Tensor) -> Tensor:
    return tensor[None]


def _takes(function: Callable[[Any, Any], Any], output: Any, target: Any) -> bool:
    """Test of whether a loss is a function of a record of outputs; it is one of the scores in it where it fails so."""
    try:
        with torch.no_grad():
            function(output, target)
    except (TypeError, AttributeError):
        return False
    return True


def importance(total: Tensor, z: Tensor, stream: torch.Generator, mixed: bool = False) -> Tensor:
    """Importance of each row for the curvature, `‖∂ℓ/∂z‖ + tr ∂²ℓ/∂z²`: shape `(rows,)`, on the CPU.

    Args:
        total: summed loss with a graph.
        z: output that it is a function of, shape `(rows, …)`, outputs along dimension 1.
        stream: random stream of signs that stand for the outputs where these are many.
        mixed: flag that outputs may lie along the other dimensions too.
    """
    slope = torch.autograd.grad(total, z, create_graph=True)[0]
    found = slope.detach().reshape(len(z), -1).norm(dim=1)
    if slope.requires_grad:
        trace = torch.zeros_like(found)
        directions = _directions(z, stream, mixed and z.ndim > 2)
        for direction in directions:
            image = torch.autograd.grad(slope, z, direction, retain_graph=True)[0]
            trace += (image * direction).reshape(len(z), -1).sum(1)
        signs = z.ndim > 1 and (z.shape[1] > SIGNS or (mixed and z.ndim > 2))
        found = found + trace.abs() / (len(directions) if signs else 1)
    return found.double().cpu()


SIGNS = 64
"""Largest number of directions in which a loss's curvature in its output is taken."""


def _directions(z: Tensor, stream: torch.Generator, mixed: bool) -> list[Tensor]:
    """Directions in the output: the unit vectors, or random signs where there are many."""
    if z.ndim == 1:
        return [torch.ones_like(z)]
    if mixed or z.shape[1] > SIGNS:
        return [2.0 * torch.randint(2, z.shape, generator=stream).to(z) - 1 for _ in range(SIGNS)]
    found = [torch.zeros_like(z) for _ in range(z.shape[1])]
    for place, direction in enumerate(found):
        direction[:, place] = 1
    return found


def as_loss(loss: Any) -> Loss:
    """A loss in the base form from a criterion, a function, a `BatchLoss`, or None (the model computes its own).

    Raises:
        UsageError: the criterion does not reduce, or the object is no loss.

    >>> F.cross_entropy in _CRITERIA and isinstance(as_loss(nn.MSELoss()), TargetLoss)
    True
    """
    if loss is None:
        return ModelLoss(notes=("the model's own mean loss is weighted by the rows of each batch",))
    if isinstance(loss, BatchLoss):
        check_batch_loss(loss.fn)
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        raise UsageError(f"got the class {loss.__name__} as loss: pass an instance, {loss.__name__}()")
    loss = next((make() for function, make in _CRITERIA.items() if function is loss), loss)
    if isinstance(loss, nn.Module) and getattr(loss, "reduction", "mean") == "none":
        raise UsageError(
            f"the loss {type(loss).__name__} is unreduced (reduction='none'): use reduction='mean' or 'sum'"
        )
    if isinstance(loss, nn.GaussianNLLLoss):
        return _from_gaussian(loss)
    if _is_known(loss):
        return _from_criterion(loss)
    if callable(loss):
        check_arguments(loss)
        return _from_function(loss)
    raise no_loss(loss)


def example_rows(inputs: Any, target: Any) -> int:
    """Rows of a batch: those of its targets; of its inputs, where these have none."""
    rows = leading(target)
    return rows_of(inputs) if rows is None else rows


def split(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch.

    Raises:
        DataError: the batch is not a pair.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], _long(batch[1])
    came = f"{type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, list | tuple | dict) else "")
    several = "Give several inputs as ((a, b), targets). " if isinstance(batch, list | tuple) and len(batch) > 2 else ""
    raise DataError(
        f"expected batches (inputs, targets), got {came}. {several}For other batches pass "
        "isoflat.BatchLoss(fn) with fn(model, batch) -> (sum, count) as the loss"
    )


def _long(target: Any) -> Any:
    """Classes in the type that torch's losses take, where they come in a shorter one."""
    short = isinstance(target, Tensor) and target.dtype in (torch.int8, torch.int16, torch.int32)
    return target.long() if short else target


def call(
    model: Callable[..., Any], inputs: Any, scores: Callable[[Tensor], Tensor] | None = None, whole: bool = False
) -> Any:
    """The model's output on its inputs, after a map of it.

    Args:
        model: the model.
        inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments; a container as it is, where the model
            takes it as its only argument.
        scores: the map (`TargetLoss.scores`); None for the identity.
        whole: flag that outputs of several tensors are given as they are (`TargetLoss.whole`).

    Raises:
        UsageError: the output is not a tensor, and one is wanted.
    """
    if isinstance(inputs, Mapping | list | tuple) and as_one(model, inputs):
        output = model(inputs)
    elif isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, list | tuple):
        output = model(*inputs)
    else:
        output = model(inputs)
    if whole and not isinstance(output, Tensor):
        return output
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise UsageError(
            f"the model returned {described(output)}, not a tensor: pass a function of output and target as the loss, "
            "such as lambda output, target: F.cross_entropy(output[0], target), or an isoflat.BatchLoss"
        )
    return output if scores is None else scores(output)


def _from_criterion(criterion: Any) -> TargetLoss:
    """A known criterion: its sum, and exactly what its mean divides by."""
    summed = copy.copy(criterion)
    summed.reduction = "sum"
    count = next(rule for kind, rule in _COUNTS.items() if isinstance(criterion, kind))
    by_class = isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss)
    classes = (lambda output, target: target != criterion.ignore_index) if by_class else None
    elementwise = count in (_element_count, _divergence_count)

    def total(output: Tensor, target: Tensor) -> Tensor:
        if elementwise:
            check_shapes(output, target)
        return confident.applied(_like(summed, output), output, target)

    if criterion.reduction == "sum":
        rows = lambda output, target: float(len(target))  # noqa: E731
        note = "the loss is a sum over the data, no mean"
        return TargetLoss(total, rows, classes, criterion=criterion, averages=False, notes=(note,))
    return TargetLoss(total, partial(count, criterion), classes, criterion=criterion)


def _is_known(loss: Any) -> bool:
    """Test of whether a criterion computes what torch's own of its kind does, and is reduced."""
    kinds = [kind for kind in _COUNTS if isinstance(loss, kind)]
    return (
        bool(kinds)
        and loss.reduction in ("mean", "sum")
        and type(loss).forward is kinds[0].forward
        and not (loss._forward_hooks or loss._forward_pre_hooks or "forward" in vars(loss))
    )


def _from_gaussian(criterion: nn.GaussianNLLLoss) -> TargetLoss:
    """Gaussian negative log likelihood of outputs (mean, variance): its sum, and what its mean divides by."""

    def summed(output: Any, target: Any) -> Tensor:
        mean, variance = _moments(output, target)
        made = nn.GaussianNLLLoss(full=criterion.full, eps=criterion.eps, reduction="sum")
        return made(mean, target, variance)

    def count(output: Any, target: Any) -> float:
        return float(_moments(output, target)[0].numel())

    if criterion.reduction == "sum":
        note = "the loss is a sum over the data, no mean"
        rows = lambda output, target: float(len(target))  # noqa: E731
        return TargetLoss(summed, rows, criterion=criterion, averages=False, notes=(note,), whole=True)
    return TargetLoss(summed, count, criterion=criterion, whole=True)


def _moments(output: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance that a model returned for a target.

    Raises:
        UsageError: it returned something else.
    """
    pair: Any = output
    if isinstance(output, Mapping):
        pair = (output.get("mean"), output.get("var", output.get("variance")))
    elif not isinstance(output, list | tuple | Tensor):
        pair = (getattr(output, "mean", None), getattr(output, "var", getattr(output, "variance", None)))
    if isinstance(pair, Tensor) or len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        raise UsageError(
            f"GaussianNLLLoss needs a model that returns (mean, variance), got {described(output)}. Return both, or pass a "
            "function of output and target: lambda output, target: F.gaussian_nll_loss(output[:, :1], target, "
            "output[:, 1:].exp())"
        )
    if not isinstance(target, Tensor) or target.shape != pair[0].shape:
        raise UsageError(
            f"GaussianNLLLoss needs targets in the shape of the mean, {tuple(pair[0].shape)}, got {described(target)}: "
            "reshape one of them"
        )
    return pair[0], pair[1]


def _from_function(function: Callable[[Tensor, Tensor], Tensor]) -> TargetLoss:
    """A function of output and target, taken for a mean over rows; a survey sees whether it is (`risk.division`)."""

    def rows(output: Any, target: Any) -> float:
        return float(example_rows(output, target))

    def summed(output: Any, target: Any) -> Tensor:
        return scalar(function(output, target), "loss") * int(rows(output, target))

    return TargetLoss(summed, rows, claimed_mean=function, notes=(BY_ROWS,), whole=True)


BY_ROWS = "the loss function's mean is weighted by the rows of each batch"
"""Note on a function that is a mean over rows."""


def _like(criterion: Any, output: Tensor) -> Any:
    """A copy of a criterion whose weights have the output's precision and place; the user's own is left alone."""
    return copy.deepcopy(criterion).to(output.device, output.dtype if output.is_floating_point() else None)


def class_axis(z: Tensor) -> int:
    """Dimension of the classes, by the convention of torch.nn.CrossEntropyLoss."""
    return 1 if z.ndim > 1 else 0


def _are_classes(output: Tensor, target: Tensor) -> bool:
    return not target.is_floating_point() and output.ndim == target.ndim + 1


def _class_count(criterion: Any, output: Tensor, target: Tensor) -> float:
    """Counted class targets, or the sum of their weights; rows × positions for class probabilities."""
    if not _are_classes(output, target):
        return target.numel() / target.shape[1 if target.ndim > 1 else 0]
    counted = target[target != criterion.ignore_index]
    if criterion.weight is None:
        return float(counted.numel())
    return float(criterion.weight.to(counted.device)[counted].double().sum())


def _element_count(criterion: Any, output: Tensor, target: Tensor) -> float:
    return float(torch.broadcast_shapes(output.shape, target.shape).numel())


def _divergence_count(criterion: Any, output: Tensor, target: Tensor) -> float:
    return float(output.numel())


def divisor(criterion: nn.Module, output: Tensor, target: Tensor) -> float:
    """Number that the mean of a known criterion divides by; for GaussianNLLLoss from the pairs of mean and variance."""
    if isinstance(criterion, nn.GaussianNLLLoss):
        return float(target.numel())
    return next(rule for kind, rule in _COUNTS.items() if isinstance(criterion, kind))(criterion, output, target)


_COUNTS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], float]] = {
    nn.CrossEntropyLoss: _class_count,
    nn.NLLLoss: _class_count,
    nn.MSELoss: _element_count,
    nn.L1Loss: _element_count,
    nn.SmoothL1Loss: _element_count,
    nn.HuberLoss: _element_count,
    nn.BCELoss: _element_count,
    nn.BCEWithLogitsLoss: _element_count,
    nn.PoissonNLLLoss: _element_count,
    nn.SoftMarginLoss: _element_count,
    nn.KLDivLoss: _divergence_count,
}

_CRITERIA: dict[Any, Callable[[], nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
    F.gaussian_nll_loss: nn.GaussianNLLLoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}
