"""The net under a measurement: the user's own model on the very batches measured, beside gradient and products.

`risk.slopes` says what is compared on a batch, `risk.arrivals` what becomes of tensors without a gradient. Here: on which
batches, along which directions, on which process, and what is said about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import IsoflatError, UnsupportedModel
from isoflat.core.raised import first_line, is_out_of_memory
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
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.linearise import ProductCheck, linearise
from isoflat.risk.own import OwnModel, beside
from isoflat.risk.plan import ProductPlan
from isoflat.risk.ranks import Ranks
from isoflat.risk.routes.base import Linearisation
from isoflat.risk.slopes import Audit, BatchVerdict, Directions, Disagreement, Product, held_rows, typical_sizes

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


Lead = Callable[[Audit], tuple[Tensor, float | None]]
"""A function that gives the direction v of a check, of any length, and its curvature at unit length, where that is known."""


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
        notes += _settled(found, check, Matrix.HESSIAN in point.products)
    return tuple(dict.fromkeys(notes))


def first_look(risk: EmpiricalRisk, state: State, loss: float, route: type[Linearisation]) -> tuple[str, ...]:
    """Compare slopes and curvature of the user's own loss with gradients and products, on the first batch at a point.

    Args:
        risk: the empirical risk.
        state: the point.
        loss: the loss there.
        route: how products are made.

    Returns:
        Notes on what could not be seen.

    Raises:
        UnsupportedModel: they disagree.
    """

    def product(audit_state: State) -> Product:
        return lambda one, vector: route(one, audit_state).products(vector[:, None].to(audit_state.dtype))[:, 0]

    def lead(audit: Audit) -> tuple[Tensor, float | None]:
        return (beside(audit.state, 1.0) - audit.state.vector).double(), None

    found = _Check(replace(risk, ranks=Ranks()), state, frozenset({0}), product, lead, loss, 0).outcome()
    return tuple(_settled(found, ProductCheck.REFUSE, True))


def _settled(found: Audited, check: ProductCheck, curved: bool) -> list[str]:
    """Notes on an outcome.

    Raises:
        UnsupportedModel: it is a disagreement, and that is to be refused.
    """
    if found.found is None:
        return _silence(found, curved)
    words = said(found.found)
    if check is ProductCheck.REFUSE:
        raise UnsupportedModel(f"{words}. {REMEDY}")
    return [words]


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
    """The outcome on all processes together."""
    found = min((part.found for part in parts if part.found), key=lambda one: one.batch, default=None)
    spoke = frozenset[str]().union(*(part.spoke for part in parts))
    failed = next((part.failed for part in parts if part.failed), "")
    narrow = next((part.narrow for part in parts if part.narrow), "")
    return Audited(found, spoke, failed, narrow)


def _at(risk: EmpiricalRisk, point: EvaluationPoint, answers: Answers, seed: int, number: int) -> Audited:
    """The check at one point, on the batches of this process."""
    plan = point.products[Matrix.HESSIAN].plan if Matrix.HESSIAN in point.products else None
    product = None if plan is None else lambda state: partial(_product, state, plan)
    random = stream(seed, "audit", "batches", number)
    chosen = _share(_spent(point, answers), point.state, plan is not None, _count(risk, point), random)
    return _Check(
        risk, point.state, chosen, product, partial(_lead, point, answers, seed), point.survey.loss, seed
    ).outcome()


@final
@dataclass(frozen=True)
class _Check:
    """The check on some batches at one point.

    Attributes:
        risk: the empirical risk.
        state: the point.
        chosen: indices of the batches.
        product: maker of products with the Hessian at a state; None where the measurement has none.
        lead: direction that the number hangs on.
        loss: the loss at the point.
        seed: of the random direction.
    """

    risk: EmpiricalRisk
    state: State
    chosen: frozenset[int]
    product: Callable[[State], Product] | None
    lead: Lead
    loss: float
    seed: int

    def outcome(self) -> Audited:
        """The outcome on the batches that are this process's; in the state's precision where float64 fails."""
        narrow = ""
        for dtype in dict.fromkeys((torch.float64, self.state.dtype)):
            try:
                return replace(self._compared(self.state.to(dtype=dtype)), narrow=narrow)
            except IsoflatError:
                raise
            except Exception as error:  # noqa: BLE001 (whatever the user's code raises in float64, or at weights close by)
                narrow = "memory ran out on a whole batch" if is_out_of_memory(error) else first_line(error)
        return Audited(failed=narrow)

    def _compared(self, state: State) -> Audited:
        """The outcome in one precision; whatever the user's code raises passes."""
        audit: Audit | None = None
        along: Directions | None = None
        seen: list[BatchVerdict] = []
        for index, batch in enumerate(self.risk.batches):
            if not (self.risk.ranks.owns(index) and index in self.chosen):
                continue
            if audit is None or along is None:
                own = OwnModel.of(self.risk, state, batch)
                audit = Audit(own, self.risk, None if self.product is None else self.product(state))
                along = _directions(audit, batch, self.lead, self.loss, self.seed)
            # Where kinks silence one batch, they silence the others.
            silenced = audit.own.kinked and any("curvature" not in verdict.spoke for verdict in seen)
            seen.append(audit.compare(index, batch, along, curved=not silenced))
            if seen[-1].found:
                break
        spoke = frozenset[str]().union(*(verdict.spoke for verdict in seen))
        return Audited(next((verdict.found for verdict in seen if verdict.found), None), spoke)


def _count(risk: EmpiricalRisk, point: EvaluationPoint) -> int:
    """Number of the user's own batches; the survey knows it where it read them as they are."""
    if risk.batches.digests is not None:
        return len(risk.batches.digests)
    whole = point.risk.batches.source is risk.batches.source
    return len(point.survey.digests) if whole else sum(1 for _ in risk.batches)


def _product(state: State, plan: ProductPlan, risk: EmpiricalRisk, vector: Tensor) -> Tensor:
    """The product of a batch's Hessian with a vector, by the route that was planned, with no graph kept."""
    return linearise(risk, state, replace(plan, kept=False)).products(vector[:, None].to(state.dtype))[:, 0]


def _directions(audit: Audit, batch: Any, lead: Lead, loss: float, seed: int) -> Directions:
    """The direction that leads, and a random one in all entries, with steps along them."""
    state = audit.state
    drawn = torch.randn(state.space.size, generator=stream(seed, "audit", "random"), dtype=torch.float64)
    random = drawn.to(state.device) * held_rows(audit.own.model, state) * typical_sizes(state)
    random /= norm(random) or 1.0
    v, value = lead(audit)
    v = v.to(state.device) / norm(v) if norm(v) else random
    if value is None and audit.product is not None:
        value, loss = audit.curvature(batch, v), audit.own.total(batch)
    step, far = audit.steps(value or 0.0, loss)
    return Directions(v, random, step, far)


def _lead(point: EvaluationPoint, answers: Answers, seed: int, audit: Audit) -> tuple[Tensor, float | None]:
    """The direction that was found; a random one in the geometry's units where there is none."""
    v, value = found_direction(point, answers)
    if v is not None:
        return v, value
    frame = point.chart.frame
    inside = torch.randn(frame.columns, generator=stream(seed, "audit", "inside"), dtype=torch.float64)
    return frame.push(inside.to(point.state.device)[:, None])[:, 0].double(), None


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
    here = [
        found for (geometry, _), found in answers.items() if geometry in point.charts and isinstance(found, Outcome)
    ]
    return SETUP + PRODUCTS * sum(outcome.products for outcome in here)


def _share(spent: float, state: State, curved: bool, total: int, random: torch.Generator) -> frozenset[int]:
    """Indices of the batches that are looked at: all, or as many as keep the check's share of the cost small."""
    wide = 1 if state.dtype == torch.float64 else 2
    cost = wide * (7 * FORWARD + 1 + (REBUILT if curved else 0))
    count = min(max(math.ceil(SHARE * spent / cost * total), 1), total)
    return frozenset(torch.randperm(total, generator=random)[:count].tolist())
