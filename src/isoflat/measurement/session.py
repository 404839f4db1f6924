"""One measurement: every question of every measure answered in step, then written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

from isoflat.core.errors import IsoflatError
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.curvature.matrix import Matrix
from isoflat.geometry.base import Chart, Geometry
from isoflat.linalg.maps import Identity as Identical
from isoflat.linalg.operator import Pullback
from isoflat.linalg.solver import Job, SingleProduct, run_in_lockstep
from isoflat.measurement.asking import answered
from isoflat.measurement.place import Place, Products
from isoflat.measurement.scribe import NOT_APPLICABLE, Answers, Refusal, Result, Scribe, matrices_of
from isoflat.measures.base import DataStatistic, Measure, Question, Scene, Settings, SolverQuery, Subject
from isoflat.risk.batches import even
from isoflat.risk.empirical import EmpiricalRisk, Survey
from isoflat.risk.linearise import Choice, check_gradient, choose, linearise, survey
from isoflat.risk.parts import by_hardness
from isoflat.risk.plan import ProductPlan, available_memory, plan
from isoflat.risk.routes.base import Linearisation
from isoflat.risk.routes.reverse import Recomputed


@final
@dataclass(frozen=True)
class Session:
    """Measures of one subject that share their passes over the data.

    Attributes:
        subject: what is measured.
        settings: how hard.
        plan: measures, each with the geometry it is measured in.
        label: what the user calls the network.
        report: called with a status line at each pass over the data.
    """

    subject: Subject
    settings: Settings
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
            return measure.questions(self.settings)
        except NOT_APPLICABLE:
            return ()

    def routed(self, risk: EmpiricalRisk) -> tuple[Session, type[Linearisation]]:
        """How products with the Hessian are made, and the session with what follows: notes, and what can be certified."""
        state, check = self.subject.state, self.settings.check
        if Matrix.HESSIAN not in matrices_of(self.asked({geometry for _, geometry in self.plan})):
            choice = Choice(Recomputed, risk.ranks.on_all_ranks(lambda: check_gradient(risk, state, check)))
        else:
            choice = risk.ranks.on_all_ranks(
                lambda: choose(risk, state, check), lambda choice: {"route": choice.route.__name__}
            )
        subject = replace(self.subject, notes=(*self.subject.notes, *choice.notes))
        settings = self.settings if choice.exact else replace(self.settings, certify=False, sample=None)
        return replace(self, subject=subject, settings=settings), choice.route

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
            matrices = matrices_of(self.asked(here[key]))
            places[key] = self.placed(state, risk.pinned(seen), seen, route, matrices)
        setup = time.monotonic() - started
        answers: Answers = {}
        for key, place in places.items():
            answers |= self._readings(here[key], place)
            for geometry, question in self.asked(here[key]):
                if isinstance(question, SolverQuery) and question.matrix in place.refused:
                    answers[geometry, question] = place.refused[question.matrix]
            left = self._applying(answers)
            for matrix, products in place.products.items():
                jobs = left.jobs(here[key], place, matrix)
                answers |= dict(
                    zip(jobs, run_in_lockstep(products.operator, list(jobs.values()), self.report), strict=True)
                )
        scribe = Scribe(self.subject, self.settings, self.label, charts, places, answers, setup / len(self.plan))
        return tuple(scribe.result(measure, geometry) for measure, geometry in self.plan)

    def _applying(self, answers: Answers) -> Session:
        """What is left once measures that have been refused an answer are out: no solver runs for them."""
        refused = {key for key, answer in answers.items() if isinstance(answer, IsoflatError)}
        plan = ((m, g) for m, g in self.plan if not any((g, question) in refused for question in self.questions(m)))
        return replace(self, plan=tuple(plan))

    def _readings(self, charts: Mapping[Geometry, Chart], place: Place) -> Answers:
        """Answers that need no solver."""
        scenes = {
            geometry: Scene(place.risk, geometry, chart, place.survey, self.settings, self.report, self.subject.initial)
            for geometry, chart in charts.items()
        }
        asked = [
            (geometry, question) for geometry, question in self.asked(charts) if isinstance(question, DataStatistic)
        ]
        found = answered([(scenes[geometry], question) for geometry, question in asked])
        return dict(zip(asked, found, strict=True))

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
        budget = self.settings.budget.memory
        memory = risk.ranks.share(available_memory(state.device), state.device) // 2 if budget is None else budget
        inside = replace(risk, network=replace(risk.network, inside=self.settings.inside))
        batches = len(seen.digests)
        own = -(-seen.rows * risk.ranks.most(batches) // batches)
        made: dict[Matrix, Products] = {}
        refused: dict[Matrix, IsoflatError] = {}
        for matrix in matrices:
            try:
                whole, graph = risk.ranks.on_all_ranks(partial(matrix.over, inside, state))
            except NOT_APPLICABLE as error:
                refused[matrix] = error
                continue
            way = route if matrix is Matrix.HESSIAN else Recomputed
            planned = risk.ranks.on_all_ranks(
                partial(plan, whole, state, way, own, memory // len(matrices), graph),
                lambda made: {"plan of products": str(made)},
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
            if not isinstance(question, SolverQuery) or question.matrix is not matrix:
                continue
            chart = charts[geometry]
            plus = geometry.connection(chart.state, place.survey.gradient) if question.covariant else None
            random = stream(self.settings.seed, question.solver.label)
            jobs[geometry, question] = Job(Pullback(base, chart.frame, plus), question.solver, random)
        return (jobs | self.checks(charts, place)) if matrix is Matrix.HESSIAN else jobs

    def checks(self, charts: Mapping[Geometry, Chart], place: Place) -> dict[tuple[Geometry, Question], Job]:
        """A product in each geometry that has a generator of its group to check products with."""
        plain = Pullback(place.hessian, Identical(place.hessian.n))
        asked = {g: SingleProduct(chart.identity.velocity) for g, chart in charts.items() if chart.identity is not None}
        return {(g, SolverQuery(probe)): Job(plain, probe, stream(self.settings.seed)) for g, probe in asked.items()}


def _parts(risk: EmpiricalRisk, seen: Survey, planned: ProductPlan) -> list[EmpiricalRisk]:
    """The risk as a sum of parts, those with the hardest examples first; the whole where that does not pay."""
    places = by_hardness(seen.hardness) if planned.divisible else ()
    if not places:
        return [risk]
    return [
        replace(risk, batches=risk.batches.only(part, even(len(part), planned.rows, risk.ranks.world)), of=seen.count)
        for part in places
    ]
