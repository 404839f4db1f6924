"""Checks of a network, its weights and its data, each with a name, an outcome and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from isoflat.cli.load.data import load_data
from isoflat.cli.load.inputs import Inputs, fill, try_forward
from isoflat.cli.load.model import build, find_loss
from isoflat.cli.load.named import reason
from isoflat.core.errors import DataError, IsoflatError, NondeterministicRisk, UnsupportedModel
from isoflat.core.space import norm
from isoflat.core.state import State
from isoflat.core.streams import stream
from isoflat.curvature.hessian import Hessian
from isoflat.measures.base import Subject
from isoflat.measures.prepare import subject
from isoflat.risk.batches import Batches, digest
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.network import Network, exactly
from isoflat.risk.routes.reverse import Rebuilt

T = TypeVar("T")

SYMMETRY = 1e-8
"""Largest `|⟨u, Hv⟩ − ⟨v, Hu⟩|` in units of `‖u‖ ‖Hv‖ + ‖v‖ ‖Hu‖`, in float64."""

AGREEMENT = 1e-4
"""Largest relative difference between a product and a central difference of gradients, in float64."""

STEPS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
"""Relative steps of the differences: the first that agrees is enough, since a network of ReLUs has kinks on the way."""


@final
@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what was checked.
        outcome: "ok", "fail", or "skipped" because an earlier one failed.
        detail: what was found; for a failure, what to do is in it.
    """

    name: str
    outcome: str
    detail: str


def examine(inputs: Inputs, dtype: str | None = None, device: torch.device | None = None) -> tuple[Check, ...]:
    """Every check, in an order in which each needs the earlier ones only.

    Args:
        inputs: what the user named.
        dtype: precision of the loss; the products are always checked in float64.
        device: where to compute; None for where the weights are.
    """
    exam = _Exam()
    loss = exam.check("loss is known", lambda: (find_loss(inputs.loss), inputs.loss))
    model = exam.check("model builds", lambda: _described(build(inputs.model, inputs.seed)))
    exam.check("weights fit", lambda: (True, "; ".join(fill(_sure(model), inputs)) or "every tensor, strictly"))
    exam.check("mode is right", lambda: _mode(_sure(model)))
    data = exam.check(
        "data can be read",
        lambda: _with_notes(load_data(inputs.data, inputs.split, inputs.transform, inputs.examples, inputs.batch_size)),
    )
    exam.check("data is the same at a second pass", lambda: _same_twice(_sure(data).batches))
    target = exam.check(
        "network runs on the data", lambda: _runs(subject(_sure(model), _sure(data).batches, loss, None, dtype, device))
    )
    exam.check("loss is deterministic", lambda: _deterministic(_sure(target)))
    exam.check("loss and gradient are finite", lambda: _finite(_sure(target)))
    point = exam.check("double backward works", lambda: _products(_sure(target)))
    exam.check("products are symmetric", lambda: _symmetric(_sure(point)))
    exam.check("products agree with differences of gradients", lambda: _agrees(_sure(point)))
    return tuple(exam.checks)


class _Exam:
    """Checks done so far; after a failure the rest is skipped."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def check(self, name: str, run: Callable[[], tuple[T, str]]) -> T | None:
        """Run one check; its product, for later ones."""
        if any(check.outcome == "fail" for check in self.checks):
            self.checks.append(Check(name, "skipped", "an earlier check failed"))
            return None
        try:
            product, detail = run()
        except IsoflatError as error:
            self.checks.append(Check(name, "fail", str(error)))
            return None
        except Exception as error:  # noqa: BLE001 — whatever code of the user's raises; a check reports, it never ends the program
            self.checks.append(
                Check(name, "fail", f"{reason(error)}. Correct the network, the loss or the data loader")
            )
            return None
        self.checks.append(Check(name, "ok", detail))
        return product


@final
@dataclass(frozen=True)
class _Point:
    """The Hessian of the first batch's risk in float64, and two random directions with their products."""

    risk: EmpiricalRisk
    state: State
    directions: Tensor
    products: Tensor


def _sure(value: T | None) -> T:
    """What an earlier check left; later ones do not run without it."""
    assert value is not None
    return value


def _described(model: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    return model, f"{type(model).__name__} with {sum(p.numel() for p in model.parameters())} entries"


def _with_notes(data: Any) -> tuple[Any, str]:
    return data, "; ".join(data.notes) or "ready"


def _mode(model: torch.nn.Module) -> tuple[bool, str]:
    Network(model).check_mode()
    return True, "evaluation mode, nothing drops or depends on the rest of a batch"


def _same_twice(batches: Batches) -> tuple[bool, str]:
    first, second = ([digest(batch) for batch in batches] for _ in range(2))
    if not first:
        raise DataError("the data gave no batch: is it empty?")
    if first != second:
        raise NondeterministicRisk(
            "two passes over the data differ: build the loader with shuffle=False and without random augmentation, and "
            "keep --transform free of chance"
        )
    return True, f"{len(first)} batches"


def _runs(target: Subject) -> tuple[Subject, str]:
    try_forward(target)
    return target, f"in {str(target.state.dtype).removeprefix('torch.')} on {target.state.device}"


def _deterministic(target: Subject) -> tuple[bool, str]:
    with exactly(target.state.device):
        values = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            values.append(target.risk.value(target.state))
    if abs(values[0] - values[1]) > 1000 * torch.finfo(target.state.dtype).eps * abs(values[0]):
        raise NondeterministicRisk(
            f"the loss is {values[0]:.8g}, then {values[1]:.8g} on the same data and weights: switch off dropout, noise and "
            "sampling in the forward pass"
        )
    return True, "two evaluations agree"


def _finite(target: Subject) -> tuple[bool, str]:
    with exactly(target.state.device):
        survey = target.risk.survey(target.state)
    accuracy = "" if survey.accuracy is None else f", accuracy {survey.accuracy:.4g} (chance {survey.chance:.4g})"
    return True, f"loss {survey.loss:.6g}{accuracy}, gradient norm {norm(survey.gradient):.3g}"


def _products(target: Subject) -> tuple[_Point, str]:
    """Two products on the first batch, in float64: the checks that follow are about formulas, not about data."""
    batch = next(iter(target.risk.batches))
    risk = EmpiricalRisk(target.risk.network, target.risk.loss, Batches(lambda: iter([batch]), volatile=False))
    state = target.state.to(dtype=torch.float64)
    directions = torch.randn(state.space.size, 2, generator=stream(0, "doctor"), dtype=torch.float64).to(state.device)
    try:
        products = Hessian(Rebuilt(risk, state)).matmat(directions)
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedModel(
            f"the gradient cannot be differentiated again: {reason(error)}. Replace the operation named there by one with "
            "a second derivative (for fused kernels, their plain form)"
        ) from error
    if not bool(torch.isfinite(products).all()):
        raise UnsupportedModel("a Hessian-vector product is NaN or infinite: look for sqrt, log or division at 0")
    flat = "; all products vanish: the loss has no curvature here" if not bool(products.any()) else ""
    return _Point(risk, state, directions, products), f"on the first batch, in float64{flat}"


def _symmetric(point: _Point) -> tuple[bool, str]:
    (u, v), (hu, hv) = point.directions.T, point.products.T
    scale = norm(u) * norm(hv) + norm(v) * norm(hu)
    error = abs(float(u @ hv) - float(v @ hu)) / scale if scale else 0.0
    if error > SYMMETRY:
        raise UnsupportedModel(
            f"⟨u, Hv⟩ and ⟨v, Hu⟩ differ by {error:.1e} of their scale: a custom backward is not the derivative of its "
            "forward. Correct it (torch.autograd.gradgradcheck finds it)"
        )
    return True, f"relative difference {error:.1e}"


def _agrees(point: _Point) -> tuple[bool, str]:
    worst = max(_difference(point, k) for k in range(point.directions.shape[1]))
    if worst > AGREEMENT:
        raise UnsupportedModel(
            f"Hessian products differ by {worst:.1e} from central differences of gradients: part of the network is cut out "
            "of the second derivative (detach, no_grad, .item(), .data, or a custom backward). Make it differentiable twice"
        )
    return True, f"relative difference at most {worst:.1e} along two random directions"


def _difference(point: _Point, k: int) -> float:
    """Smallest relative difference over the steps, beyond what rounding of the gradients explains."""
    direction, product, center = point.directions[:, k], point.products[:, k], point.state.vector
    scale = (norm(center) or 1.0) / norm(direction)
    best = float("inf")
    for step in STEPS:
        reach = step * scale
        ends = [_gradient(point, center + sign * reach * direction) for sign in (1, -1)]
        quotient = (ends[0] - ends[1]) / (2 * reach)
        rounding = 10 * torch.finfo(torch.float64).eps * max(map(norm, ends)) / reach
        size = max(norm(product), norm(quotient))
        excess = max(norm(product - quotient) - rounding, 0.0)
        best = min(best, excess / size if size else 0.0)
        if best <= AGREEMENT:
            break
    return best


def _gradient(point: _Point, vector: Tensor) -> Tensor:
    moved = point.state.replace(point.state.space.unflatten(vector))
    with exactly(moved.device):
        return point.risk.survey(moved).gradient
