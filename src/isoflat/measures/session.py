"""One measurement: every question of every measure answered in step, then written down."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, final

import torch

from isoflat.core.errors import IsoflatError, SymmetryViolated, UnsupportedModel, UsageError
from isoflat.core.estimate import Cost, Kind
from isoflat.core.fingerprint import fingerprint
from isoflat.core.record import Record
from isoflat.core.space import inner, norm
from isoflat.core.state import State
from isoflat.core.streams import stream
from isoflat.curvature.matrix import Curvature, Matrix
from isoflat.geometry.base import Chart, Geometry
from isoflat.linalg.maps import Identity as Identical
from isoflat.linalg.operator import Operator, Pullback, Sum
from isoflat.linalg.solver import Job, Outcome, Probe, together
from isoflat.measures.base import Effort, Findings, Measure, Question, Reading, Scene, Spectral, Subject
from isoflat.measures.prepare import point, some, warnings
from isoflat.risk.batches import even
from isoflat.risk.empirical import EmpiricalRisk, Survey
from isoflat.risk.linearise import choose, linearise, survey
from isoflat.risk.parts import by_hardness
from isoflat.risk.plan import Plan, available_memory, peak_memory, plan
from isoflat.risk.routes.base import Linearisation
from isoflat.risk.routes.guarded import Guarded
from isoflat.risk.routes.reverse import Rebuilt
from isoflat.symmetry.found import VERSION as RULES

Outcomes = dict[tuple[Geometry, Question], Outcome]
"""What was found out."""

Answers = dict[tuple[Geometry, Question], Outcome | IsoflatError]
"""What was found out, or why it could not be."""

NOT_APPLICABLE = (UsageError, UnsupportedModel)
"""What a measure raises where it does not apply; the others are measured nevertheless."""


ALLOWANCE = 100
"""Roundings of the precision that sums over rows and weights may add up to in a number that nothing else makes uncertain."""


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
class Refusal:
    """A number that does not apply.

    Attributes:
        measure: which.
        geometry: in which.
        error: why.
    """

    measure: Measure
    geometry: Geometry
    error: IsoflatError


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

    def results(self) -> tuple[Result | Refusal, ...]:
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

    def asked(self, geometries: Collection[Geometry]) -> tuple[tuple[Geometry, Question], ...]:
        """Every question in every one of these geometries, once."""
        keys = [(g, question) for m, g in self.plan if g in geometries for question in self.questions(m)]
        return tuple(dict.fromkeys(keys))

    def questions(self, measure: Measure) -> tuple[Question, ...]:
        """What a measure asks; nothing where it does not apply, which the scribe will say."""
        try:
            return measure.questions(self.effort)
        except NOT_APPLICABLE:
            return ()

    def routed(self, risk: EmpiricalRisk) -> tuple[Session, type[Linearisation]]:
        """How products with the Hessian are made, and the session with what follows: notes, and what can be certified."""
        if Matrix.HESSIAN not in _matrices(self.asked({geometry for _, geometry in self.plan})):
            return self, Rebuilt
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
    ) -> tuple[Result | Refusal, ...]:
        """Every number, by products of one kind.

        Args:
            charts: of every geometry in the plan.
            read: the risk and what the data says, by the place of a chart.
            route: how products with the Hessian are made.
            started: when the measurement began.
        """
        here = {key: {g: c for g, c in charts.items() if id(c.state) == key} for key in read}
        places = {}
        for key, (risk, seen) in read.items():
            state = next(iter(here[key].values())).state
            matrices = _matrices(self.asked(here[key]))
            places[key] = self.placed(state, risk.pinned(seen), seen, route, matrices)
        setup = time.monotonic() - started
        answers: Answers = {}
        for key, place in places.items():
            for matrix, products in place.products.items():
                jobs = self.jobs(here[key], place, matrix)
                answers |= dict(zip(jobs, together(products.operator, list(jobs.values()), self.report), strict=True))
            for geometry, question in self.asked(here[key]):
                if isinstance(question, Spectral) and question.matrix in place.refused:
                    answers[geometry, question] = place.refused[question.matrix]
            made: dict[tuple[Geometry | None, Reading], Any] = {}
            for geometry, chart in here[key].items():
                answers |= self._readings(geometry, chart, place, made)
        scribe = Scribe(self, charts, places, answers, setup)
        return tuple(scribe.result(measure, geometry) for measure, geometry in self.plan)

    def _readings(
        self, geometry: Geometry, chart: Chart, place: Place, made: dict[tuple[Geometry | None, Reading], Any]
    ) -> Answers:
        """Answers that need no solver, each made once; what several of them need is billed to the first."""

        def ask(question: Reading) -> Any:
            key = (geometry if question.framed else None, question)
            if key not in made:
                made[key] = question.answer(scene)
            return made[key]

        scene = Scene(place.risk, geometry, chart, place.survey, self.effort, self.report, ask)
        answers: Answers = {}
        for _, question in self.asked({geometry}):
            if isinstance(question, Reading):
                started = time.monotonic()
                try:
                    answers[geometry, question] = Outcome(ask(question), 0, time.monotonic() - started)
                except NOT_APPLICABLE as error:
                    answers[geometry, question] = error
        return answers

    def placed(
        self,
        state: State,
        risk: EmpiricalRisk,
        seen: Survey,
        route: type[Linearisation],
        matrices: Sequence[Matrix] = (Matrix.HESSIAN,),
    ) -> Place:
        """Products at a state, planned.

        Args:
            state: the point.
            risk: of the data that is multiplied.
            seen: what is known of it: rows, count, hardness.
            route: how products with the Hessian are made; others go through their graphs.
            matrices: of what.
        """
        budget = self.effort.budget.memory
        memory = risk.ranks.share(available_memory(state.device), state.device) // 2 if budget is None else budget
        inside = replace(risk, network=replace(risk.network, inside=self.effort.inside))
        batches = len(seen.digests)
        own = -(-seen.rows * risk.ranks.most(batches) // batches)
        made: dict[Matrix, Products] = {}
        refused: dict[Matrix, IsoflatError] = {}
        for matrix in matrices:
            try:
                whole, graph = risk.ranks.together(partial(matrix.over, inside, state))
            except NOT_APPLICABLE as error:
                refused[matrix] = error
                continue
            way, room = route if matrix is Matrix.HESSIAN else Rebuilt, memory // len(matrices)
            planned = risk.ranks.together(
                partial(plan, whole, state, way, own, room, graph), lambda made: {"plan of products": str(made)}
            )
            self.report(str(planned))
            parts = _parts(whole, seen, planned)
            costs = tuple(float(len(part)) for part in by_hardness(seen.hardness))
            made[matrix] = Products(planned, tuple(linearise(part, state, planned) for part in parts), costs)
        return Place(risk, seen, made, refused)

    def jobs(
        self, charts: Mapping[Geometry, Chart], place: Place, matrix: Matrix
    ) -> dict[tuple[Geometry, Question], Job]:
        """Every question about a matrix in every geometry once, and the checks of the Hessian."""
        base = place.products[matrix].operator
        jobs: dict[tuple[Geometry, Question], Job] = {}
        for geometry, question in self.asked(charts):
            if not isinstance(question, Spectral) or question.matrix is not matrix:
                continue
            chart = charts[geometry]
            plus = geometry.connection(chart.state, place.survey.gradient) if question.covariant else None
            random = stream(self.effort.seed, type(question.solver).__name__)
            jobs[geometry, question] = Job(Pullback(base, chart.frame, plus), question.solver, random)
        return (jobs | self.checks(charts, place)) if matrix is Matrix.HESSIAN else jobs

    def checks(self, charts: Mapping[Geometry, Chart], place: Place) -> dict[tuple[Geometry, Question], Job]:
        """A product in each geometry that has a generator of its group to check products with."""
        plain = Pullback(place.hessian, Identical(place.hessian.n))
        asked = {g: Probe(chart.identity.velocity) for g, chart in charts.items() if chart.identity is not None}
        return {(g, Spectral(probe)): Job(plain, probe, stream(self.effort.seed)) for g, probe in asked.items()}


def _matrices(keys: Sequence[tuple[Geometry, Question]]) -> tuple[Matrix, ...]:
    """What is asked about."""
    return tuple(dict.fromkeys(question.matrix for _, question in keys if isinstance(question, Spectral)))


@final
@dataclass(frozen=True)
class Products:
    """Products with one matrix at a point.

    Attributes:
        plan: how they were planned.
        parts: by parts of the data.
        costs: of the parts, where there are several.
    """

    plan: Plan
    parts: tuple[Guarded, ...]
    costs: tuple[float, ...]

    @property
    def operator(self) -> Operator:
        """The matrix: a sum where the data is in parts."""
        terms = tuple(Curvature(part) for part in self.parts)
        return terms[0] if len(terms) == 1 else Sum(terms, self.costs)

    @property
    def halvings(self) -> int:
        """How often memory ran out."""
        return sum(part.grain.halvings for part in self.parts)

    @property
    def rows(self) -> int:
        """How many are differentiated at a time."""
        return min(part.grain.rows for part in self.parts)


@final
@dataclass(frozen=True)
class Place:
    """A point with what the data says about it.

    Attributes:
        risk: of the data, pinned.
        survey: loss and gradient.
        products: with each matrix that is asked about.
        refused: those of which there are none, and why.
    """

    risk: EmpiricalRisk
    survey: Survey
    products: Mapping[Matrix, Products]
    refused: Mapping[Matrix, IsoflatError]

    @property
    def hessian(self) -> Operator:
        """As an operator."""
        return self.products[Matrix.HESSIAN].operator


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
    answers: Mapping[tuple[Geometry, Question], Outcome | IsoflatError]
    setup: float

    def result(self, measure: Measure, geometry: Geometry) -> Result | Refusal:
        """One number, or why there is none."""
        try:
            answers = [self.answers[geometry, question] for question in measure.questions(self.session.effort)]
            if errors := [answer for answer in answers if isinstance(answer, IsoflatError)]:
                return Refusal(measure, geometry, errors[0])
            return self._result(measure, geometry, tuple(a for a in answers if isinstance(a, Outcome)))
        except NOT_APPLICABLE as error:
            return Refusal(measure, geometry, error)

    def _result(self, measure: Measure, geometry: Geometry, answers: tuple[Outcome, ...]) -> Result:
        subject, effort = self.session.subject, self.session.effort
        chart = self.charts[geometry]
        place = self.places[id(chart.state)]
        where = point(subject.state, restricted(place.survey, chart.state, subject.state))
        questions = measure.questions(effort)
        findings = Findings(where, answers, effort, measure.options)
        estimate = measure.evaluate(findings)
        if estimate.kind is Kind.EXACT:
            estimate = estimate.allowing(ALLOWANCE * torch.finfo(subject.state.dtype).eps)
        seconds = sum(answer.seconds for answer in answers) + self.setup / len(self.session.plan)
        cost = Cost(
            products=sum(answer.products for answer in answers),
            gradient_passes=seconds / place.survey.seconds,
            seconds=seconds,
            peak_memory=peak_memory(subject.state.device),
        )
        size = None if measure.curvature is None else measure.curvature(findings)
        ratio = self._stationarity(geometry) / size if size and geometry.name != "euclidean" else None
        matrices = _matrices([(geometry, question) for question in questions])
        used = place.products[matrices[0]] if matrices else None
        notes = self._notes(geometry, ratio, place, used)
        if Matrix.HESSIAN in matrices:
            notes += self._checked(geometry, size)
        group, group_hash = _group(measure, chart)
        record = Record(
            measure=measure.label,
            geometry=geometry.name,
            group=group,
            group_hash=group_hash,
            estimate=replace(estimate, cost=cost).with_notes(*notes),
            point=where,
            stationarity_ratio=ratio,
            label=self.session.label,
            settings=self._settings(used),
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
            found
            for (g, question), found in self.answers.items()
            if isinstance(found, Outcome)
            if g == geometry and isinstance(question, Spectral) and isinstance(question.solver, Probe)
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

    def _notes(self, geometry: Geometry, ratio: float | None, place: Place, used: Products | None) -> list[str]:
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
        if used is not None and used.halvings:
            notes.append(f"memory ran out: {used.rows} rows at a time")
        if ratio is not None and ratio > 0.01:
            kind = "a local curvature, no minimum's" if ratio > 1 else "not quite a minimum's"
            notes.append(f"b/value = {ratio:.2g}: {kind} (b bounds the difference to the covariant Hessian)")
        return notes

    def _settings(self, used: Products | None) -> dict[str, Any]:
        """How it was measured; what concerns products only where there are any."""
        effort, state = self.session.effort, self.session.subject.state
        made = {} if used is None else _ways(used)
        return {
            "rtol": effort.rtol,
            "certify": effort.certify,
            "probes": effort.probes,
            "sample": effort.sample or "all",
            "seed": effort.seed,
            "max_products": effort.budget.products,
            "dtype": str(state.dtype).removeprefix("torch."),
            "device": str(state.device),
            **made,
            "autocast": str(effort.inside).removeprefix("torch.") if effort.inside else "off",
            "tf32": "off",
            "threads": torch.get_num_threads(),
            "processes": self.session.subject.risk.ranks.world,
            "reproducible_sum": self.session.subject.risk.ranks.ordered,
        }


def _ways(used: Products) -> dict[str, Any]:
    return {
        "route": used.parts[0].route,
        "second_order_rules": list(used.plan.rules),
        "rows_at_a_time": used.rows,
        "parts": [round(share, 6) for share in used.operator.shares],
        "memory_forecast": used.plan.forecast,
    }


def _group(measure: Measure, chart: Chart) -> tuple[str, str]:
    """What a number is invariant to, in words and as a hash: as the geometry is, unless the measure claims its own."""
    if measure.claims is None:
        return chart.group, chart.group_hash
    words = ", ".join(sorted(measure.claims)) or "none"
    space = chart.state.space
    return words, fingerprint(measure.name, str(measure.version), words, repr(space.names), repr(space.shapes))


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
