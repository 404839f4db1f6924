"""Checks of a network, its weights and its data, each with a name, an outcome and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar, final

import torch

from isoflat.core.errors import DataError, IsoflatError, NondeterministicRisk, UnsupportedModel
from isoflat.core.space import norm
from isoflat.io.inputs import Inputs, try_forward
from isoflat.io.model import build, fill, find_loss
from isoflat.io.named import reason
from isoflat.measurement.subject import Subject, divided, subject
from isoflat.measures.settings import Settings
from isoflat.risk.batches import Batches, digest
from isoflat.risk.check import AGREEMENT, SYMMETRY, CheckedRows, asymmetry, disagreement
from isoflat.risk.division import notes
from isoflat.risk.foreign import translated
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
        name: what was checked.
        outcome: "ok", "fail", or "skipped" because an earlier one failed.
        detail: what was found; for a failure, what to do is in it.
    """

    name: str
    outcome: str
    detail: str


def examine(inputs: Inputs, dtype: str | None = None, device: torch.device | None = None) -> tuple[Finding, ...]:
    """Every check, in an order in which each needs the earlier ones only.

    Args:
        inputs: what the user named.
        dtype: precision of the loss; the products are always checked in float64.
        device: where to compute; None for where the weights are.
    """
    exam = _Exam()
    loss = exam.check("loss is known", lambda: (find_loss(inputs.loss), inputs.loss))
    model = exam.check("model builds", lambda: _described(build(inputs.model, inputs.seed)))
    exam.check("weights fit", lambda: (True, "; ".join(_filled(_sure(model), inputs)) or "every tensor, strictly"))
    exam.check("mode is right", lambda: _mode(_sure(model)))
    data = exam.check(
        "data can be read",
        lambda: _with_notes(inputs),
    )
    exam.check("data is the same at a second pass", lambda: _same_twice(_sure(data)))
    target = exam.check(
        "network runs on the data",
        lambda: _runs(subject(_sure(model), _sure(data), loss, Settings(dtype=dtype, device=device))),
    )
    exam.check("loss is deterministic", lambda: _deterministic(_sure(target)))
    target = exam.check("loss and gradient are finite", lambda: _finite(_sure(target)))
    route = exam.check("products can be made", lambda: _products(_sure(target)))
    exam.check("products are symmetric", lambda: _symmetric(_sure(target), _sure(route)))
    exam.check("products agree with differences of gradients", lambda: _agrees(_sure(target), _sure(route)))
    return tuple(exam.checks)


class _Exam:
    """Checks done so far; after a failure the rest is skipped."""

    def __init__(self) -> None:
        self.checks: list[Finding] = []

    def check(self, name: str, run: Callable[[], tuple[T, str]]) -> T | None:
        """Run one check; its product, for later ones."""
        if any(check.outcome == "fail" for check in self.checks):
            self.checks.append(Finding(name, "skipped", "an earlier check failed"))
            return None
        try:
            product, detail = run()
        except IsoflatError as error:
            self.checks.append(Finding(name, "fail", str(error)))
            return None
        except Exception as error:  # noqa: BLE001 — whatever code of the user's raises; a check reports, it never ends the program
            told = translated(error) or f"{reason(error)}. Correct the network, the loss or the data loader"
            self.checks.append(Finding(name, "fail", str(told)))
            return None
        self.checks.append(Finding(name, "ok", detail))
        return product


def _sure(value: T | None) -> T:
    """Product of an earlier check; later ones do not run without it."""
    assert value is not None
    return value


def _described(model: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    return model, f"{type(model).__name__} with {sum(p.numel() for p in model.parameters())} entries"


def _filled(model: torch.nn.Module, inputs: Inputs) -> tuple[str, ...]:
    return fill(model, inputs.weights, inputs.weights_key, inputs.strip_prefix, inputs.seed)


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


def _finite(target: Subject) -> tuple[Subject, str]:
    with exactly(target.state.device):
        target = divided(target)
        risk, survey = surveyed(target.risk, target.state)
    accuracy = "" if survey.accuracy is None else f", accuracy {survey.accuracy:.4g} (chance {survey.chance:.4g})"
    found = [f"loss {survey.loss:.6g}{accuracy}, gradient norm {norm(survey.gradient):.3g}"]
    found += notes(risk, survey.rows, len(survey.digests))
    return replace(target, risk=risk), "; ".join(found)


def _products(target: Subject) -> tuple[type[Linearisation], str]:
    choice = choose(target.risk, target.state, ProductCheck.SKIP)
    return choice.route, "; ".join(choice.notes) or choice.route(target.risk, target.state).route


def _symmetric(target: Subject, route: type[Linearisation]) -> tuple[bool, str]:
    error = asymmetry(CheckedRows.of(target.risk, target.state), route)
    allowed = SYMMETRY if route(target.risk, target.state).exact else AGREEMENT
    if error > allowed:
        raise UnsupportedModel(
            f"⟨u, Hv⟩ and ⟨v, Hu⟩ differ by {error:.1e} of their scale: a custom backward is not the derivative of its "
            "forward. Correct it (torch.autograd.gradgradcheck finds it)"
        )
    return True, f"relative difference {error:.1e}"


def _agrees(target: Subject, route: type[Linearisation]) -> tuple[bool, str]:
    sample = CheckedRows.of(target.risk, target.state)
    worst = disagreement(sample, route)
    if worst > AGREEMENT:
        raise UnsupportedModel(
            f"Hessian products differ by {worst:.1e} from central differences of gradients: part of the network is cut out "
            "of the second derivative (detach, no_grad, .item(), .data, or a custom backward). Make it differentiable twice"
        )
    flat = all(not bool(sample.product(route, sample.direction(k)).any()) for k in range(2))
    found = f"relative difference at most {worst:.1e}" if worst else "no difference beyond rounding"
    detail = f"{found} along two random directions"
    return True, detail + ("; all products vanish: the loss has no curvature here" if flat else "")
