"""Choice of a product route: the cheapest that works, checked against differences of gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import final

import torch

from isoflat.core.errors import UnsupportedModel
from isoflat.core.space import norm
from isoflat.core.state import State
from isoflat.risk.batches import rows_of
from isoflat.risk.check import AGREEMENT, ROWS, CheckedRows, disagreement
from isoflat.risk.empirical import EmpiricalRisk, Survey
from isoflat.risk.plan import ProductPlan
from isoflat.risk.routes.base import Linearisation
from isoflat.risk.routes.differences import STEP, Differences
from isoflat.risk.routes.forward import Forward
from isoflat.risk.routes.guarded import Grain, Guarded, is_out_of_memory, retry_smaller
from isoflat.risk.routes.reverse import Recomputed

_REMEDY = "Make it differentiable; check='warn' measures nevertheless"

ROUTES: tuple[type[Linearisation], ...] = (Recomputed, Forward, Differences)
"""Routes in the order in which they are tried; the first also stands for graphs that are kept."""


class ProductCheck(StrEnum):
    """Reaction to products that disagree with differences of gradients."""

    REFUSE = "refuse"
    """An error."""
    WARN = "warn"
    """A note beside the number."""
    SKIP = "skip"
    """Nothing: they are not compared."""


@final
@dataclass(frozen=True)
class Choice:
    """A route, and what a reader must know about it."""

    route: type[Linearisation]
    notes: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Flag that its products are exact up to rounding."""
        return self.route is not Differences


def choose(risk: EmpiricalRisk, state: State, check: ProductCheck = ProductCheck.REFUSE) -> Choice:
    """The first route that works on a few rows, in float64.

    Raises:
        UnsupportedModel: none does; or products disagree with differences of gradients, these with those of the loss, and
            `check` refuses that.
    """
    return retry_smaller(Grain(ROWS), lambda rows: _chosen(CheckedRows.of(risk, state, rows), check))


def _chosen(sample: CheckedRows, check: ProductCheck) -> Choice:
    risk, state = sample.risk, sample.state
    failures: list[str] = []
    wrong: list[str] = []
    for route in ROUTES:
        name = route(risk, state).route.partition(",")[0]
        if route is Differences and wrong and sample.slope(sample.direction(0)) > AGREEMENT:
            raise UnsupportedModel(f"{wrong[0]}, and out of the first. {_REMEDY}")
        try:
            worst = _tried(sample, route, check)
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            failures.append(f"{name}: {_first_line(error)}")
            continue
        cut = (
            f"Hessian products differ by {worst:.1e} from central differences of gradients: part of the network is cut out "
            "of the second derivative (detach, no_grad, .item(), .data, rounding, or a custom backward)"
        )
        if route is not Differences and worst > AGREEMENT and check is ProductCheck.REFUSE:
            wrong.append(cut)
            failures.append(f"{name}: products differ by {worst:.1e} from differences of gradients")
            continue
        notes = [f"products by {route(risk, state).route}, because others fail ({'; '.join(failures)})"] * bool(
            failures
        )
        if route is Differences:
            notes.append(
                f"uncertified: differences of gradients are off by about {worst:.0e} of a product, and know no kinks"
            )
        elif worst > AGREEMENT:
            notes.append(cut)
        return Choice(route, tuple(notes))
    raise UnsupportedModel(
        f"the network cannot be differentiated twice by any route ({'; '.join(failures)}). Replace the operation named "
        "there by one with a second derivative (for fused kernels, their plain form)"
    )


def check_gradient(risk: EmpiricalRisk, state: State, check: ProductCheck = ProductCheck.REFUSE) -> tuple[str, ...]:
    """Compare the gradient with differences of the loss on a few rows, in float64, where no products with the Hessian are.

    Returns:
        A note, if they disagree and that is to be warned about.

    Raises:
        UnsupportedModel: they disagree, and `check` refuses that.
    """

    def slope(rows: int) -> float:
        sample = CheckedRows.of(risk, state, rows)
        direction = sample.direction(0)
        return sample.slope(direction) if bool(direction.any()) else 0.0

    worst = 0.0 if check is ProductCheck.SKIP else retry_smaller(Grain(ROWS), slope)
    if worst <= AGREEMENT:
        return ()
    cut = (
        f"gradients differ by {worst:.1e} from central differences of losses: part of the network is cut out of the first "
        "derivative (detach, no_grad, .item(), .data, rounding, or a custom backward)"
    )
    if check is ProductCheck.REFUSE:
        raise UnsupportedModel(f"{cut}. {_REMEDY}")
    return (cut,)


def survey(risk: EmpiricalRisk, state: State) -> tuple[EmpiricalRisk, Survey]:
    """The plain gradient pass; where memory runs out, over the data in smaller pieces.

    Returns:
        The risk as it was read, and the survey.
    """
    try:
        return risk, risk.survey(state)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        grain = Grain(rows_of(next(iter(risk.batches))))
        grain.halve(error)

    def work(rows: int) -> tuple[EmpiricalRisk, Survey]:
        made = replace(risk, batches=risk.batches.cut(rows))
        return made, made.survey(state)

    return retry_smaller(grain, work)


def linearise(risk: EmpiricalRisk, state: State, plan: ProductPlan) -> Guarded:
    """Products as planned; where memory runs out nevertheless, in smaller pieces."""
    grain = Grain(plan.rows)
    if plan.route is Differences:
        state = state.to(dtype=torch.float64)

    def cut(rows: int) -> EmpiricalRisk:
        uncut = plan.whole and not grain.halvings
        return risk if uncut else replace(risk, batches=risk.batches.cut(rows))

    def keep(rows: int) -> Linearisation:
        # One process without room makes all of them cut finer, so that they go on cutting alike.
        with risk.ranks.agreeing():
            made = cut(rows)
            if plan.route is not Recomputed:
                return plan.route(made, state)
            route = Recomputed(made, state, plan.graph)
            return route.keep() if plan.kept and not grain.halvings else route

    return Guarded(risk, state, [retry_smaller(grain, keep)], grain)


def _tried(sample: CheckedRows, route: type[Linearisation], check: ProductCheck) -> float:
    """Distance of a route's products from differences of gradients, or of these from those of another step.

    Raises:
        RuntimeError: the route does not work on this network.
    """
    if route is Differences:
        direction = sample.direction(0)
        near, far = (
            Differences(sample.risk, sample.state, step).products(direction[:, None]) for step in (STEP, 4 * STEP)
        )
        return norm(near - far) / (norm(near) or 1.0)
    if check is ProductCheck.SKIP:
        sample.product(route, sample.direction(0))
        return 0.0
    return disagreement(sample, route)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
