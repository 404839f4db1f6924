"""Checks of a network, its weights and its data, each with a name, an outcome and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar, final

import torch

from isoflat.core.errors import DataError, IsoflatError, NondeterministicRisk, UnsupportedModel
from isoflat.core.render import some
from isoflat.core.space import norm
from isoflat.io.inputs import Inputs, try_forward
from isoflat.io.model import build, fill, find_loss
from isoflat.io.named import reason
from isoflat.measurement.audit import first_look
from isoflat.measurement.subject import Subject, divided, subject
from isoflat.measures.settings import Settings
from isoflat.risk.arrivals import without_gradient
from isoflat.risk.batches import Batches, digest
from isoflat.risk.check import CheckedRows, asymmetry, compared
from isoflat.risk.division import notes
from isoflat.risk.empirical import Survey
from isoflat.risk.foreign import translated
from isoflat.risk.habits import learned
from isoflat.risk.linearise import ProductCheck, choose
from isoflat.risk.linearise import survey as surveyed
from isoflat.risk.network import Network, exactly
from isoflat.risk.routes.base import Linearisation

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        name: the statement that was checked.
        outcome: "ok", "fail", or "skipped" because an earlier one failed.
        detail: the finding; for a failure, with its remedy.
    """

    name: str
    outcome: str
    detail: str


def examine(inputs: Inputs, dtype: str | None = None, device: torch.device | None = None) -> tuple[Finding, ...]:
    """All checks, in an order in which each needs the earlier ones only.

    Args:
        inputs: the network, its weights, its data and its loss, as the user named them.
        dtype: precision of the loss; the products are always checked in float64.
        device: device that computes; None for that of the weights.
    """
    exam = _Exam()
    loss = exam.check("loss is known", lambda: (find_loss(inputs.loss), inputs.loss))
    model = exam.check("model builds", lambda: _described(build(inputs.model, inputs.seed)))
    exam.check("weights fit", lambda: _filled(_sure(model), inputs))
    exam.check("mode is right", lambda: _mode(_sure(model)))
    data = exam.check("data can be read", lambda: _with_notes(inputs))
    exam.check("data is the same at a second pass", lambda: _same_twice(_sure(data)))
    target = exam.check(
        "network runs on the data",
        lambda: _runs(subject(_sure(model), _sure(data), loss, Settings(dtype=dtype, device=device))),
    )
    exam.check("loss is deterministic", lambda: _deterministic(_sure(target)))
    seen = exam.check("loss and gradient are finite", lambda: _finite(_sure(target)))
    target = None if seen is None else seen[0]
    exam.check("gradients arrive everywhere", lambda: _arrives(*_sure(seen)))
    route = exam.check("products can be made", lambda: _products(_sure(target)))
    exam.check("products are symmetric", lambda: _symmetric(_sure(target), _sure(route)))
    exam.check("products agree with differences of gradients", lambda: _agrees(_sure(target), _sure(route)))
    exam.check(
        "gradients and products are those of the loss", lambda: _own(_sure(target), _sure(seen)[1], _sure(route))
    )
    return tuple(exam.checks)


class _Exam:
    """Checks done so far; after a failure the rest is skipped."""

    def __init__(self) -> None:
        self.checks: list[Finding] = []

    def check(self, name: str, run: Callable[[], tuple[T, str]]) -> T | None:
        """Run one check; the value it made, for later ones."""
        if any(check.outcome == "fail" for check in self.checks):
            self.checks.append(Finding(name, "skipped", "an earlier check failed"))
            return None
        try:
            made, detail = run()
        except IsoflatError as error:
            self.checks.append(Finding(name, "fail", str(error)))
            return None
        except Exception as error:  # noqa: BLE001 — whatever code of the user's raises; a check reports, it never ends the program
            told = translated(error) or f"{reason(error)}. Correct the network, the loss or the data loader"
            self.checks.append(Finding(name, "fail", str(told)))
            return None
        self.checks.append(Finding(name, "ok", detail))
        return made


def _sure(value: T | None) -> T:
    """The value that an earlier check made; later ones do not run without it."""
    assert value is not None
    return value


def _described(model: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    return model, f"{type(model).__name__} with {sum(p.numel() for p in model.parameters())} entries"


def _filled(model: torch.nn.Module, inputs: Inputs) -> tuple[bool, str]:
    notes = fill(model, inputs.model, inputs.weights, inputs.weights_key, inputs.strip_prefix, inputs.seed)
    return True, "; ".join(notes) or "every tensor, strictly"


def _with_notes(inputs: Inputs) -> tuple[Batches, str]:
    notes: list[str] = []
    return inputs.read(notes.append), "; ".join(notes) or "ready"


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
    target = replace(target, risk=learned(target.risk, target.state))
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


def _finite(target: Subject) -> tuple[tuple[Subject, Survey], str]:
    with exactly(target.state.device):
        target = divided(target)
        risk, survey = surveyed(target.risk, target.state)
    accuracy = "" if survey.accuracy is None else f", accuracy {survey.accuracy:.4g} (chance {survey.chance:.4g})"
    found = [f"loss {survey.loss:.6g}{accuracy}, gradient norm {norm(survey.gradient):.3g}"]
    found += notes(risk, survey.rows, len(survey.digests))
    return (replace(target, risk=risk), survey), "; ".join(found)


def _arrives(target: Subject, seen: Survey) -> tuple[bool, str]:
    with exactly(target.state.device):
        unused = without_gradient(target.risk, target.state, seen, ProductCheck.REFUSE)[0].unused
    return True, f"the loss does not depend on: {some(unused)}" if unused else "in every tensor that moves the loss"


def _products(target: Subject) -> tuple[type[Linearisation], str]:
    choice = choose(target.risk, target.state, ProductCheck.SKIP)
    return choice.route, "; ".join(choice.notes) or choice.route(target.risk, target.state).route


def _symmetric(target: Subject, route: type[Linearisation]) -> tuple[bool, str]:
    sample = CheckedRows.of(target.risk, target.state)
    error = asymmetry(sample, route)
    allowed = sample.symmetry if route(target.risk, target.state).exact else sample.agreement
    if error > allowed:
        raise UnsupportedModel(
            f"⟨u, Hv⟩ and ⟨v, Hu⟩ differ by {error:.1e} of their scale: a custom backward is not the derivative of its "
            "forward. Correct it (torch.autograd.gradgradcheck finds it)"
        )
    return True, f"relative difference {error:.1e}"


def _agrees(target: Subject, route: type[Linearisation]) -> tuple[bool, str]:
    sample = CheckedRows.of(target.risk, target.state)
    worst = compared(sample, route).apart
    if worst > sample.agreement:
        raise UnsupportedModel(
            f"Hessian products differ by {worst:.1e} from central differences of gradients: part of the network is cut out "
            "of the second derivative (detach, no_grad, .item(), .data, or a custom backward). Make it differentiable twice"
        )
    flat = all(not bool(sample.product(route, sample.direction(k)).any()) for k in range(2))
    found = f"relative difference at most {worst:.1e}" if worst else "no difference beyond rounding"
    detail = f"{found} along a random direction"
    return True, detail + ("; all products vanish: the loss has no curvature here" if flat else "")


def _own(target: Subject, seen: Survey, route: type[Linearisation]) -> tuple[bool, str]:
    with exactly(target.state.device):
        notes = first_look(target.risk, target.state, seen.loss, route)
    return True, "; ".join(notes) or "slopes and second differences of the user's own model agree on the first batch"
