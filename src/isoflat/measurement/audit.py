"""The net under a measurement: the user's own model on the very batches measured, beside gradient and products.

`risk.slopes` says what is compared on a batch, `risk.arrivals` what becomes of tensors without a gradient. Here: on which
batches, along which directions, on which process, and what is said about it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import UnsupportedModel
from isoflat.core.render import some
from isoflat.core.rng import stream
from isoflat.core.space import norm
from isoflat.core.state import State
from isoflat.curvature.matrix import Matrix
from isoflat.geometry.base import Geometry
from isoflat.linalg.eigen.extremes import Extremes
from isoflat.linalg.eigen.pairs import Pairs
from isoflat.linalg.solver import Outcome
from isoflat.measurement.records import Answers
from isoflat.measures.base import SolverQuery
from isoflat.measures.point import EvaluationPoint
from isoflat.risk.arrivals import Arrivals, arrivals
from isoflat.risk.empirical import EmpiricalRisk, Survey
from isoflat.risk.linearise import ProductCheck, linearise
from isoflat.risk.own import OwnModel
from isoflat.risk.plan import ProductPlan
from isoflat.risk.routes.guarded import first_line, is_out_of_memory
from isoflat.risk.slopes import FOUND, Audit, Directions, Disagreement, Product, Verdict, held_rows

SHARE = 0.1
"""Largest share of a measurement that its check may cost, where data comes in more than one batch."""

FORWARD = 1 / 3
"""Cost of a forward pass, in gradient passes."""

PRODUCTS = 2
"""Cost of a product in the course of a measurement, in gradient passes."""

REBUILT = 3
"""Cost of a product whose graph is built for it."""

SETUP = 10
"""Cost of what comes before the first product and beside them, in gradient passes."""

SKIPPED = "the loss's own slopes were not compared with gradients and products (check='skip')"


@final
@dataclass(frozen=True)
class Audited:
    """Outcome of the check at one point, on this process or on all.

    Attributes:
        found: first disagreement; None where there is none.
        spoke: comparisons that could speak on some batch: "v", "r", "curvature".
        failed: why the user's own model could not be evaluated; empty where it could.
        narrow: why it was not evaluated in float64; empty where it was.
    """

    found: Disagreement | None = None
    spoke: frozenset[str] = frozenset()
    failed: str = ""
    narrow: str = ""


def without_gradient(risk: EmpiricalRisk, state: State, seen: Survey, check: ProductCheck) -> tuple[Survey, str]:
    """The survey whose unused tensors are those that the loss was seen not to depend on, and a note.

    Args:
        risk: the empirical risk.
        state: the point of the survey.
        seen: the survey.
        check: reaction to gradients that never arrive.

    Raises:
        UnsupportedModel: the loss changes with tensors that no gradient arrives at.
    """
    if not len(seen.gradient):
        return seen, ""
    blocks = state.space.block_norms(seen.gradient)
    silent = tuple(name for name, size in zip(state.space.names, blocks.tolist(), strict=True) if size == 0)
    if not silent:
        return seen, ""
    unknown = replace(seen, unused=())
    if check is ProductCheck.SKIP:
        return unknown, f"no gradient arrives at: {some(seen.unused)}" if seen.unused else ""
    with risk.ranks.agreeing():
        found, failed = _moved(risk, state, silent, seen.unused)
    parts = risk.ranks.gather((found, failed))
    missing = [name for name in silent if any(name in part.missing for part, _ in parts)]
    moving = [name for name in silent if any(name in part.moving for part, _ in parts)]
    if missing:
        words = (
            f"gradients never arrive at {some(missing)}: the loss changes when they are moved, and autograd says that it "
            "does not (a block that recomputes itself in a backward of its own, an adjoint solver, no_grad, .data, weights "
            "kept in a plain attribute)"
        )
        if check is ProductCheck.REFUSE:
            raise UnsupportedModel(
                f"{words}. Let autograd see them (torch.utils.checkpoint for recomputation, modules for weights)"
            )
        return replace(seen, unused=tuple(name for name in seen.unused if name not in missing)), words
    why = next((why for _, why in parts if why), "")
    if why:
        return unknown, f"no gradient arrives at: {some(silent)}; whether the loss depends on them is not known ({why})"
    return replace(seen, unused=tuple(name for name in seen.unused if name not in moving)), ""


def _moved(
    risk: EmpiricalRisk, state: State, silent: Sequence[str], unused: Sequence[str]
) -> tuple[Arrivals, str]:
    """What this process's batches say about tensors without a gradient, or why they say nothing."""
    batches = [batch for index, batch in enumerate(risk.batches) if risk.ranks.owns(index)]
    if not batches:
        return Arrivals(), ""
    own, failed = own_model(risk, state, batches[0])
    return (Arrivals(), failed) if own is None else (arrivals(own, batches, silent, unused), "")


def own_model(risk: EmpiricalRisk, state: State, batch: Any) -> tuple[OwnModel | None, str]:
    """The user's own model in float64, or in the state's precision; and why not in float64, or not at all."""
    why = ""
    for dtype in dict.fromkeys((torch.float64, state.dtype)):
        wide = state.to(dtype=dtype)
        try:
            own = OwnModel.of(risk, wide, batch)
            Audit(own, risk, None).gradient(batch)
        except Exception as error:  # noqa: BLE001 (whatever the user's code raises in a precision that it was not written for)
            why = "memory ran out" if is_out_of_memory(error) else first_line(error)
            continue
        return own, why
    return None, why


def audited(
    risk: EmpiricalRisk, points: Sequence[EvaluationPoint], answers: Answers, check: ProductCheck, seed: int
) -> tuple[str, ...]:
    """Compare slopes and curvature of the user's own loss with gradients and products, at each point.

    Args:
        risk: the empirical risk, on the user's own batches.
        points: where numbers were measured, with their products.
        answers: to what was asked there.
        check: reaction to a disagreement.
        seed: of the random directions and of the share of batches.

    Returns:
        Notes that a reader must know.

    Raises:
        UnsupportedModel: they disagree.
    """
    if check is ProductCheck.SKIP:
        return (SKIPPED,)
    notes: list[str] = []
    for number, point in enumerate(points):
        with risk.ranks.agreeing():
            mine = _at(risk, point, answers, seed, number)
        found = _joined(risk.ranks.gather(mine))
        if found.found is not None:
            words = said(found.found)
            if check is ProductCheck.REFUSE:
                raise UnsupportedModel(f"{words}. {REMEDY}")
            notes.append(words)
        else:
            notes += _silence(found, Matrix.HESSIAN in point.products)
    return tuple(dict.fromkeys(notes))


REMEDY = (
    "Something in model or loss is cut out of the derivative (detach, no_grad, .item(), .data, a hook, a custom backward), or "
    "not the function that it seems: make it differentiable; check='warn' measures nevertheless"
)


def said(found: Disagreement) -> str:
    """A disagreement in words."""
    names = f", mostly in {some(found.tensors)}" if found.tensors else ""
    if found.kind == "gradient":
        return (
            f"the gradient is not that of the loss: on batch {found.batch} the user's own model has the slope "
            f"{found.own:.4g} along {found.along}, the gradient says {found.engine:.4g}{names}"
        )
    return (
        f"Hessian products are not those of the loss: on batch {found.batch} the user's own model has the second difference "
        f"{found.own:.4g} along {found.along}, the product says {found.engine:.4g}{names}"
    )


def _silence(found: Audited, curved: bool) -> list[str]:
    """Notes on what the check could not see."""
    if found.failed:
        return [f"the check against the user's own model was silent: {found.failed}"]
    notes = []
    if found.narrow:
        notes.append(f"checked against the user's own model in its own precision, not in float64: {found.narrow}")
    if not found.spoke & {"v", "r"}:
        notes.append("the check of gradients against the loss's own slopes was silent: rounding or kinks forbid it")
    if curved and "curvature" not in found.spoke:
        notes.append("the check of products against the loss's own curvature was silent: rounding or kinks forbid it")
    return notes


def _joined(parts: Sequence[Audited]) -> Audited:
    """What all processes have seen."""
    found = min((part.found for part in parts if part.found), key=lambda one: one.batch, default=None)
    spoke = frozenset[str]().union(*(part.spoke for part in parts))
    failed, narrow = (next((why for why in whys if why), "") for whys in zip(*((p.failed, p.narrow) for p in parts)))
    return Audited(found, spoke, failed, narrow)


def _at(risk: EmpiricalRisk, point: EvaluationPoint, answers: Answers, seed: int, number: int) -> Audited:
    """The check at one point, on the batches of this process."""
    plan = point.products[Matrix.HESSIAN].plan if Matrix.HESSIAN in point.products else None
    total = _count(risk, point)
    chosen = _share(_spent(point, answers), point.state, plan is not None, total, stream(seed, "audit", "batches", number))
    audit: Audit | None = None
    along: Directions | None = None
    seen: list[Verdict] = []
    narrow = ""
    for index, batch in enumerate(risk.batches):
        if not (risk.ranks.owns(index) and index in chosen):
            continue
        try:
            if audit is None or along is None:
                own, narrow = own_model(risk, point.state, batch)
                if own is None:
                    return Audited(failed=narrow)
                audit = Audit(own, risk, None if plan is None else partial(_product, own.state, plan))
                along = _directions(audit, point, answers, batch, seed)
            seen.append(audit.compare(index, batch, along))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return Audited(failed="memory ran out on a whole batch", narrow=narrow)
        if seen[-1].found:
            break
    spoke = frozenset[str]().union(*(verdict.spoke for verdict in seen))
    return Audited(next((verdict.found for verdict in seen if verdict.found), None), spoke, narrow=narrow)


def _count(risk: EmpiricalRisk, point: EvaluationPoint) -> int:
    """Number of the user's own batches; the survey knows it where it read them as they are."""
    if risk.batches.digests is not None:
        return len(risk.batches.digests)
    whole = point.risk.batches.source is risk.batches.source
    return len(point.survey.digests) if whole else sum(1 for _ in risk.batches)


def _product(state: State, plan: ProductPlan, risk: EmpiricalRisk, vector: Tensor) -> Tensor:
    """The product of a batch's Hessian with a vector, by the route that was planned, with no graph kept."""
    return linearise(risk, state, replace(plan, kept=False)).products(vector[:, None].to(state.dtype))[:, 0]


def _directions(audit: Audit, point: EvaluationPoint, answers: Answers, batch: Any, seed: int) -> Directions:
    """The direction that was found, or a random one in a geometry's units; and a random one in all entries."""
    n = point.state.space.size
    drawn = torch.randn(n, generator=stream(seed, "audit", "random"), dtype=torch.float64).to(point.state.device)
    random = drawn * held_rows(audit.own.model, point.state)
    v, value = found_direction(point, answers)
    if v is None:
        frame = point.chart.frame
        inside = torch.randn(frame.columns, generator=stream(seed, "audit", "inside"), dtype=torch.float64)
        v = frame.push(inside.to(point.state.device)[:, None])[:, 0].double()
    v = v / norm(v) if norm(v) else random / norm(random)
    if value is None and audit.product is not None:
        term = audit.own.term(batch)
        value = audit.curvature(batch, v)
        loss = float(term.total.detach().double())
    else:
        value, loss = value or 0.0, point.survey.loss
    step, far = audit.steps(value, loss)
    return Directions(v, random / norm(random), step, far)


def found_direction(point: EvaluationPoint, answers: Answers) -> tuple[Tensor | None, float | None]:
    """The vector of weights that a number of the Hessian hangs on, shape `(n,)`, and its curvature in units of its length."""
    for (geometry, question), outcome in answers.items():
        if geometry not in point.charts or not isinstance(outcome, Outcome):
            continue
        if not isinstance(question, SolverQuery) or question.matrix is not Matrix.HESSIAN:
            continue
        inside, value = _vector(outcome.result)
        if inside is None:
            continue
        vector = point.charts[geometry].frame.push(inside.to(point.state.device)[:, None])[:, 0].double()
        if size := norm(vector):
            return vector, None if question.covariant or value is None else value / size**2
    return None, None


def _vector(result: Any) -> tuple[Tensor | None, float | None]:
    """The extreme eigenvector in a solver's result, and its value; None where there is none."""
    if isinstance(result, Extremes):
        end = result.wanted
        return (end.vector.double(), end.value) if end.vector.numel() else (None, None)
    if isinstance(result, Pairs) and (pairs := [*result.largest[:1], *result.smallest[:1]]):
        top = max(pairs, key=lambda pair: abs(pair.value))
        return top.vector.double(), top.value
    return None, None


def _spent(point: EvaluationPoint, answers: Mapping[tuple[Geometry, Any], Any]) -> float:
    """Cost of the measurement at a point, in gradient passes."""
    here = [found for (geometry, _), found in answers.items() if geometry in point.charts and isinstance(found, Outcome)]
    return SETUP + PRODUCTS * sum(outcome.products for outcome in here)


def _share(spent: float, state: State, curved: bool, total: int, random: torch.Generator) -> frozenset[int]:
    """Indices of the batches that are looked at: all, or as many as keep the check's share of the cost small."""
    wide = 1 if state.dtype == torch.float64 else 2
    cost = wide * (7 * FORWARD + 1 + (REBUILT if curved else 0))
    count = min(max(math.ceil(SHARE * spent / cost * total), 1), total)
    return frozenset(torch.randperm(total, generator=random)[:count].tolist())
