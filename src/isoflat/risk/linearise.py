"""Choice of a product route: the cheapest that works, checked against differences of gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import final

from isoflat.core.errors import UnsupportedModel, UsageError
from isoflat.core.raised import first_line, is_out_of_memory
from isoflat.core.space import norm
from isoflat.core.state import State
from isoflat.risk.batches import rows_of
from isoflat.risk.check import AGREEMENT, ROWS, CheckedRows, Compared, asymmetry, compared
from isoflat.risk.division import MeanProof, undivided
from isoflat.risk.empirical import EmpiricalRisk, Survey
from isoflat.risk.plan import ProductPlan
from isoflat.risk.routes.base import Linearisation
from isoflat.risk.routes.differences import Differences, step_in
from isoflat.risk.routes.forward import Forward
from isoflat.risk.routes.guarded import Grain, Guarded
from isoflat.risk.routes.reverse import Recomputed
from isoflat.risk.separability import NoMeanOverRows

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
    grain = Grain(ROWS)
    while True:
        with grain as rows:
            sample = CheckedRows.of(risk, state, rows)
            choice = _chosen(sample, check)
            notes = () if sample.precise else (_in_single(sample, choice.route),)
            return replace(choice, notes=(*choice.notes, *notes))


def _chosen(sample: CheckedRows, check: ProductCheck) -> Choice:
    risk, state = sample.risk, sample.state
    failures: list[str] = []
    wrong: list[str] = []
    for route in ROUTES:
        name = route(risk, state).route.partition(",")[0]
        if route is Differences and wrong and sample.slope(sample.direction(0)) > sample.agreement:
            raise UnsupportedModel(f"{wrong[0]}; gradients are not those of the loss either. {_REMEDY}")
        try:
            seen = Compared(0.0, 0.0)
            if route is Differences:
                seen = Compared(_unsettled(sample), 0.0 if check is ProductCheck.SKIP else asymmetry(sample, route))
            elif check is ProductCheck.SKIP:
                sample.product(route, sample.direction(0))
            else:
                seen = compared(sample, route)
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            failures.append(f"{name}: {first_line(error)}")
            continue
        fault = _fault(seen, sample.agreement, differences=route is Differences)
        if fault and check is ProductCheck.REFUSE:
            if route is Differences:
                raise UnsupportedModel(f"{fault}. {_REMEDY}")
            wrong.append(fault)
            failures.append(f"{name}: products differ by {max(seen):.1e} from differences of gradients")
            continue
        notes = [f"products by {route(risk, state).route}, because others fail ({'; '.join(failures)})"] * bool(
            failures
        )
        if route is Differences:
            notes.append(
                f"uncertified: differences of gradients are off by about {seen.apart:.0e} of a product, and know no kinks"
            )
        return Choice(route, (*notes, *[fault] * bool(fault)))
    raise UnsupportedModel(
        f"the network cannot be differentiated twice by any route ({'; '.join(failures)}). Replace the operation named "
        "there by one with a second derivative (for fused kernels, their plain form)"
    )


def _fault(seen: Compared, allowed: float, differences: bool) -> str:
    """The fault of products in words; empty where there is none.

    Args:
        seen: what was found about them.
        allowed: largest difference that counts as rounding (`CheckedRows.agreement`).
        differences: flag that they are differences themselves, whose own error is no fault.
    """
    cut = (
        f"Hessian products differ by {seen.apart:.1e} from central differences of gradients: part of the network is cut out "
        "of the second derivative (detach, no_grad, .item(), .data, rounding, or a custom backward)"
    )
    if seen.apart > allowed and not differences:
        return cut
    if seen.skew <= max(allowed, 10 * seen.apart):
        return ""
    return (
        f"Hessian products are not symmetric: ⟨u, Hv⟩ and ⟨v, Hu⟩ differ by {seen.skew:.1e} of their scale, so that the "
        "gradient is no loss's gradient (something is cut out of it, or a hook or a custom backward changes it)"
    )


def _in_single(sample: CheckedRows, route: type[Linearisation]) -> str:
    """Note on a network that runs in float32 only."""
    u, v = (sample.direction(k) for k in range(2))
    whole, one, other = (sample.product(route, direction) for direction in (u + v, u, v))
    noise = norm(whole - one - other) / (norm(whole) or 1.0)
    habits = sample.risk.network.habits
    why = None if habits is None else habits.single
    return (
        f"products, their check and the last product are in float32, where they carry rounding of about {noise:.0e} of a "
        f"product: the network does not run in float64 ({why})"
    )


def check_gradient(risk: EmpiricalRisk, state: State, check: ProductCheck = ProductCheck.REFUSE) -> tuple[str, ...]:
    """Compare the gradient with differences of the loss on a few rows, in float64, where no products with the Hessian are.

    Returns:
        A note, if they disagree and that is to be warned about.

    Raises:
        UnsupportedModel: they disagree, and `check` refuses that.
    """
    worst, allowed, grain = None if check is not ProductCheck.SKIP else 0.0, AGREEMENT, Grain(ROWS)
    while worst is None:
        with grain as rows:
            sample = CheckedRows.of(risk, state, rows)
            direction = sample.direction(0)
            worst, allowed = sample.slope(direction) if bool(direction.any()) else 0.0, sample.agreement
    if worst <= allowed:
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

    Where the loss proves to be no mean over rows, the risk is what a training loop minimises batch by batch.

    Returns:
        The risk as it was read, and the survey.
    """
    try:
        return _surveyed(risk, state)
    except NoMeanOverRows as found:
        return _surveyed(undivided(risk, found), state)


def screen(risk: EmpiricalRisk, state: State) -> tuple[EmpiricalRisk, Survey]:
    """The forward pass that tells how important single rows are.

    Returns:
        The risk, and the survey.

    Raises:
        UsageError: rows cannot be taken apart.
    """
    refusal = "sample='auto' draws single rows, and {}: leave sample out"
    if risk.batches.whole is not None:
        raise UsageError(refusal.format(risk.batches.whole))
    try:
        return risk, risk.screen(state, MeanProof.of(risk, state))
    except NoMeanOverRows as found:
        raise UsageError(refusal.format(found)) from found


def _surveyed(risk: EmpiricalRisk, state: State) -> tuple[EmpiricalRisk, Survey]:
    try:
        return risk, risk.survey(state, MeanProof.of(risk, state))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        grain = Grain(rows_of(next(iter(risk.batches))))
        grain.halve(error)
    while True:
        with grain as rows:
            made = replace(risk, batches=risk.batches.cut(rows))
            return made, made.survey(state, MeanProof.of(made, state))


def linearise(risk: EmpiricalRisk, state: State, plan: ProductPlan) -> Guarded:
    """Products as planned; where memory runs out nevertheless, in smaller pieces."""
    grain = Grain(plan.rows)
    if plan.route is Differences:
        state = risk.network.widest(state)
    while True:
        # One process without room makes all of them cut finer, so that they go on cutting alike.
        with grain as rows, risk.ranks.agreeing():
            uncut = plan.whole and not grain.halvings
            made = risk if uncut else replace(risk, batches=risk.batches.cut(rows))
            if plan.route is not Recomputed:
                return Guarded(risk, state, [plan.route(made, state)], grain)
            route = Recomputed(made, state, plan.graph)
            return Guarded(risk, state, [route.keep() if plan.kept and not grain.halvings else route], grain)


def _unsettled(sample: CheckedRows) -> float:
    """Relative difference between differences of gradients of two steps."""
    direction = sample.direction(0)[:, None]
    step = step_in(sample.state.dtype)
    near, far = (Differences(sample.risk, sample.state, h).products(direction) for h in (step, 4 * step))
    return norm(near - far) / (norm(near) or 1.0)
