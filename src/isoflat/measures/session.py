"""One measurement: every question of every measure answered in step, then written down."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, final

import torch

from isoflat.core.errors import SymmetryViolated
from isoflat.core.estimate import Cost
from isoflat.core.fingerprint import fingerprint
from isoflat.core.record import Record
from isoflat.core.space import inner, norm
from isoflat.core.state import State
from isoflat.core.streams import stream
from isoflat.curvature.matrix import Curvature
from isoflat.geometry.base import Chart, Geometry
from isoflat.linalg.maps import Identity as Identical
from isoflat.linalg.operator import Operator, Pullback, Sum
from isoflat.linalg.solver import Job, Outcome, Probe, together
from isoflat.measures.base import Effort, Findings, Measure, Question, Subject
from isoflat.measures.prepare import point, some, warnings
from isoflat.risk.batches import even
from isoflat.risk.empirical import EmpiricalRisk, Survey
from isoflat.risk.linearise import choose, linearise, survey
from isoflat.risk.parts import by_hardness
from isoflat.risk.plan import Plan, available_memory, peak_memory, plan
from isoflat.risk.routes.base import Linearisation
from isoflat.risk.routes.guarded import Guarded
from isoflat.symmetry.found import VERSION as RULES

Answers = dict[tuple[Geometry, Question], Outcome]


@final
@dataclass(frozen=True)
class Result:
    """A number, and what it was evaluated from.

    Attributes:
        record: the row of a table.
        findings: the answers of solvers.
    """

    record: Record
    findings: Findings


@final
@dataclass(frozen=True)
class Session:
    """Measures of one subject that share their passes over the data.

    Attributes:
        subject: what is measured.
        effort: how hard.
        plan: measures, each with the geometry it is measured in.
        label: what the user calls the network.
        route: of products.
        report: called with a status line at each pass over the data.
    """

    subject: Subject
    effort: Effort
    plan: tuple[tuple[Measure, Geometry], ...]
    label: str
    report: Callable[[str], None]

    def results(self) -> tuple[Result, ...]:
        """Chart, survey, linearise, answer, evaluate: one for each entry of the plan."""
        started = time.monotonic()
        # Charts come first: a geometry that refuses must do so before the data is read.
        charts = self.charts()
        read = {id(chart.state): survey(self.subject.risk, chart.state) for chart in charts.values()}
        risk, seen = next(iter(read.values()))
        self.report(f"loss {seen.loss:.4g}")
        chosen, route = self.routed(risk.pinned(seen))
        return chosen.answered(charts, read, route, started)

    def charts(self) -> dict[Geometry, Chart]:
        """Every geometry of the plan, at the point."""
        return {geometry: geometry.chart(self.subject.state) for _, geometry in self.plan}

    def routed(self, risk: EmpiricalRisk) -> tuple[Session, type[Linearisation]]:
        """How products are made, and the session with what follows from it: notes, and what can be certified."""
        choice = risk.ranks.together(
            lambda: choose(risk, self.subject.state, self.effort.check), lambda choice: {"route": choice.route.__name__}
        )
        subject = replace(self.subject, notes=(*self.subject.notes, *choice.notes))
        effort = self.effort if choice.exact else replace(self.effort, certify=False, sample=None)
        return replace(self, subject=subject, effort=effort), choice.route

    def answered(
        self,
        charts: Mapping[Geometry, Chart],
        read: Mapping[int, tuple[EmpiricalRisk, Survey]],
        route: type[Linearisation],
        started: float,
    ) -> tuple[Result, ...]:
        """Every number, by products of one kind.

        Args:
            charts: of every geometry in the plan.
            read: the risk and what the data says, by the place of a chart.
            route: how products are made.
            started: when the measurement began.
        """
        places = {}
        for chart in charts.values():
            risk, seen = read[id(chart.state)]
            places[id(chart.state)] = self.placed(chart.state, risk.pinned(seen), seen, route)
        setup = time.monotonic() - started
        answers: Answers = {}
        for key, place in places.items():
            jobs = self.jobs({g: chart for g, chart in charts.items() if id(chart.state) == key}, place)
            answers |= dict(zip(jobs, together(place.hessian, list(jobs.values()), self.report), strict=True))
        scribe = Scribe(self, charts, places, answers, setup)
        return tuple(scribe.result(measure, geometry) for measure, geometry in self.plan)

    def placed(self, state: State, risk: EmpiricalRisk, seen: Survey, route: type[Linearisation]) -> Place:
        """Products at a state, planned.

        Args:
            state: the point.
            risk: of the data that is multiplied.
            seen: what is known of it: rows, count, hardness.
            route: how products are made.
        """
        budget = self.effort.budget.memory
        memory = risk.ranks.share(available_memory(state.device), state.device) // 2 if budget is None else budget
        inside = replace(risk, network=replace(risk.network, inside=self.effort.inside))
        batches = len(seen.digests)
        own = -(-seen.rows * risk.ranks.most(batches) // batches)
        planned = risk.ranks.together(
            lambda: plan(inside, state, route, own, memory), lambda made: {"plan of products": str(made)}
        )
        self.report(str(planned))
        return Place(seen, planned, tuple(linearise(part, state, planned) for part in _parts(inside, seen, planned)))

    def jobs(self, charts: Mapping[Geometry, Chart], place: Place) -> dict[tuple[Geometry, Question], Job]:
        """Every question in every geometry once, and the checks."""
        asked = [(g, question) for m, g in self.plan if g in charts for question in m.needs(self.effort)]
        jobs = {}
        for geometry, question in dict.fromkeys(asked):
            chart = charts[geometry]
            plus = geometry.connection(chart.state, place.survey.gradient) if question.covariant else None
            random = stream(self.effort.seed, type(question.solver).__name__)
            jobs[geometry, question] = Job(Pullback(place.hessian, chart.frame, plus), question.solver, random)
        return jobs | self.checks(charts, place)

    def checks(self, charts: Mapping[Geometry, Chart], place: Place) -> dict[tuple[Geometry, Question], Job]:
        """A product in each geometry that has a generator of its group to check products with."""
        plain = Pullback(place.hessian, Identical(place.hessian.n))
        asked = {g: Probe(chart.identity.velocity) for g, chart in charts.items() if chart.identity is not None}
        return {(g, Question(probe)): Job(plain, probe, stream(self.effort.seed)) for g, probe in asked.items()}


@final
@dataclass(frozen=True)
class Place:
    """A point with what the data says about it."""

    survey: Survey
    plan: Plan
    products: tuple[Guarded, ...]

    @property
    def hessian(self) -> Operator:
        """As an operator: a sum where the data is in parts."""
        terms = tuple(Curvature(part) for part in self.products)
        if len(terms) == 1:
            return terms[0]
        return Sum(terms, tuple(float(len(places)) for places in by_hardness(self.survey.hardness)))

    @property
    def halvings(self) -> int:
        """How often memory ran out."""
        return sum(part.grain.halvings for part in self.products)

    @property
    def rows(self) -> int:
        """How many are differentiated at a time."""
        return min(part.grain.rows for part in self.products)


def _parts(risk: EmpiricalRisk, seen: Survey, planned: Plan) -> list[EmpiricalRisk]:
    """The risk as a sum of parts, those with the hardest examples first; the whole where that does not pay."""
    places = by_hardness(seen.hardness) if planned.divisible else ()
    if not places:
        return [risk]
    return [
        replace(risk, batches=risk.batches.only(part, even(len(part), planned.rows, risk.ranks.world)), of=seen.count)
        for part in places
    ]


@final
@dataclass(frozen=True)
class Scribe:
    """Evaluates measures and writes down where each number comes from.

    Attributes:
        session: the measurement.
        charts: of every geometry in the plan.
        places: where each chart's state was measured.
        answers: of all solvers.
        setup: seconds that are shared by all numbers.
    """

    session: Session
    charts: Mapping[Geometry, Chart]
    places: dict[int, Place]
    answers: Answers
    setup: float

    def result(self, measure: Measure, geometry: Geometry) -> Result:
        """One number."""
        subject, effort = self.session.subject, self.session.effort
        chart = self.charts[geometry]
        place = self.places[id(chart.state)]
        where = point(subject.state, restricted(place.survey, chart.state, subject.state))
        answers = tuple(self.answers[geometry, question] for question in measure.needs(effort))
        findings = Findings(where, answers, effort, measure.options)
        estimate = measure.evaluate(findings)
        seconds = estimate.cost.seconds + self.setup / len(self.session.plan)
        cost = Cost(
            products=estimate.cost.products,
            gradient_passes=seconds / place.survey.seconds,
            seconds=seconds,
            peak_memory=peak_memory(subject.state.device),
        )
        size = None if measure.curvature is None else measure.curvature(findings)
        ratio = self._stationarity(geometry) / size if size and geometry.name != "euclidean" else None
        notes = [*self._notes(geometry, ratio, place), *self._checked(geometry, size)]
        record = Record(
            measure=measure.label,
            geometry=geometry.name,
            group=chart.group,
            group_hash=chart.group_hash,
            estimate=replace(estimate, cost=cost).with_notes(*notes),
            point=where,
            stationarity_ratio=ratio,
            label=self.session.label,
            settings=self._settings(place),
            versions=_versions(measure, geometry),
            model_hash=subject.state.fingerprint(),
            data_hash=fingerprint(*place.survey.digests),
        )
        return Result(record, findings)

    def _stationarity(self, geometry: Geometry) -> float:
        """`max_i ‖W_i‖ ‖∇_i L‖` in the geometry's units: the largest block of `Eᵀ∇L`."""
        chart = self.charts[geometry]
        slope = chart.frame.pull(self.places[id(chart.state)].survey.gradient[:, None])[:, 0]
        return float(self.session.subject.state.space.block_norms(slope).max())

    def _checked(self, geometry: Geometry, size: float | None) -> list[str]:
        """The generator's identities `⟨∇L, Xθ⟩ = 0` and `H Xθ = −Xᵀ∇L`, relative to the curvature along Xθ.

        Raises:
            SymmetryViolated: they do not hold.
        """
        chart = self.charts[geometry]
        identity = chart.identity
        if identity is None:
            return []
        answer = next(
            self.answers[g, question]
            for g, question in self.answers
            if g == geometry and isinstance(question.solver, Probe)
        )
        place = self.places[id(chart.state)]
        gradient = place.survey.gradient
        moved = (identity.rates * gradient)[:, None]
        image, turned = (chart.frame.pull(part)[:, 0] for part in (answer.result, moved))
        slope = norm(chart.frame.pull(gradient[:, None])[:, 0])
        scale = max(norm(image), norm(turned), (size or 0.0) * identity.length)
        defect = norm(image + turned) / scale if scale else 0.0
        along = abs(float(inner([identity.velocity], gradient)[0]))
        first = along / (slope * identity.length) if slope * identity.length else 0.0
        worst = max(defect, first)
        allowed = 30 * torch.finfo(chart.state.dtype).eps ** 0.5
        if worst > allowed:
            raise SymmetryViolated(
                f"a generator of the group that was found should satisfy ⟨∇L, Xθ⟩ = 0 and H Xθ = −Xᵀ∇L, but is off by "
                f"{worst:.1e} (allowed: {allowed:.1e}): the loss depends on more than the network's output, or its "
                "products are wrong. isoflat doctor checks both"
            )
        return [f"generator identities hold to {worst:.0e}"]

    def _notes(self, geometry: Geometry, ratio: float | None, place: Place) -> list[str]:
        state, chart = self.session.subject.state, self.charts[geometry]
        notes = [
            *self.session.subject.notes,
            *warnings(point(state, restricted(place.survey, chart.state, state)), place.survey),
        ]
        if chart.unseen:
            reasons: dict[str, list[str]] = {}
            for name, why in chart.unseen:
                reasons.setdefault(why, []).append(name)
            listed = "; ".join(f"{some(names)} ({why})" for why, names in reasons.items())
            notes.append(f"invisible to the {geometry.name} metric: {listed}")
        notes += chart.notes
        if place.halvings:
            notes.append(f"memory ran out: {place.rows} rows at a time")
        if ratio is not None and ratio > 0.01:
            kind = "a local curvature, no minimum's" if ratio > 1 else "not quite a minimum's"
            notes.append(f"b/value = {ratio:.2g}: {kind} (b bounds the difference to the covariant Hessian)")
        return notes

    def _settings(self, place: Place) -> dict[str, Any]:
        effort, state = self.session.effort, self.session.subject.state
        return {
            "rtol": effort.rtol,
            "certify": effort.certify,
            "probes": effort.probes,
            "sample": effort.sample or "all",
            "seed": effort.seed,
            "max_products": effort.budget.products,
            "dtype": str(state.dtype).removeprefix("torch."),
            "device": str(state.device),
            "route": place.products[0].route,
            "second_order_rules": list(place.plan.rules),
            "rows_at_a_time": place.rows,
            "parts": [round(share, 6) for share in place.hessian.shares],
            "memory_forecast": place.plan.forecast,
            "autocast": str(effort.inside).removeprefix("torch.") if effort.inside else "off",
            "tf32": "off",
            "threads": torch.get_num_threads(),
            "processes": self.session.subject.risk.ranks.world,
            "reproducible_sum": self.session.subject.risk.ranks.ordered,
        }


def restricted(survey: Survey, place: State, state: State) -> Survey:
    """A survey whose gradient is that of the state's own trainable tensors."""
    if place.parameters.keys() == state.parameters.keys():
        return survey
    parts = place.space.unflatten(survey.gradient)
    return replace(survey, gradient=torch.cat([parts[name].reshape(-1) for name in state.parameters]))


def _versions(measure: Measure, geometry: Geometry) -> dict[str, str]:
    return {
        "isoflat": version("isoflat"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "measure": str(measure.version),
        "geometry": str(geometry.version),
        "rules": str(RULES),
    }
