"""The engine: measures of one network, from the geometries' charts to one record each.

Every driver (`measure`, `measure_all`, `spectrum`, `verify`, samples, experiments) takes the same way: charts, a survey of the
data at each distinct point, a product route, products planned, tasks in lockstep, records. They differ in what they ask for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, final

from tqdm.auto import tqdm

from isoflat.core.errors import IsoflatError
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.curvature.matrix import Matrix
from isoflat.geometry.base import Geometry
from isoflat.linalg.maps import Identity
from isoflat.linalg.operator import Pullback
from isoflat.linalg.solver import SingleProduct
from isoflat.measurement.groups import hashes, with_groups
from isoflat.measurement.lockstep import Task, run_in_lockstep, tasks_of
from isoflat.measurement.records import Answers, RecordWriter, Refusal, Result
from isoflat.measurement.subject import Plan, Subject, agreed, at_equal_loss, divided
from isoflat.measures.base import Measure, Question, SolverQuery
from isoflat.measures.point import NOT_APPLICABLE, EvaluationPoint
from isoflat.measures.settings import Settings
from isoflat.risk.empirical import EmpiricalRisk, Survey
from isoflat.risk.foreign import told
from isoflat.risk.linearise import Choice, check_gradient, choose, survey
from isoflat.risk.network import exactly
from isoflat.risk.ranks import Ranks
from isoflat.risk.routes.reverse import Recomputed


class Look(Protocol):
    """A first pass over the data at a point: the risk as it was read, and what it told."""

    def __call__(self, risk: EmpiricalRisk, state: State, /) -> tuple[EmpiricalRisk, Survey]:
        """Read the data once."""
        ...


@told
@contextmanager
def opened(
    prepare: Callable[[], Subject], plan: Plan, settings: Settings, ranks: Ranks, label: str = ""
) -> Iterator[Measurement]:
    """A measurement with all symmetries proved, under a progress bar, in exact arithmetic as far as the device has it.

    Args:
        prepare: makes the subject, on every process that shares the measurement.
        plan: measures, each with the geometry it is measured in.
        settings: how the measurement is made.
        ranks: the processes.
        label: what the user calls the network.

    Raises:
        IsoflatError: network, data, loss or symmetries are refused.
    """
    target = agreed(ranks, prepare, settings, plan)
    settings.refuse_below_rounding(target.state.dtype)
    hidden = not (settings.progress and ranks.first)
    with (
        tqdm(disable=hidden, unit=" passes", desc=label or "measuring", leave=False) as bar,
        exactly(target.state.device),
    ):
        with ranks.agreeing():
            target = divided(target)

        def report(status: str) -> None:
            bar.set_postfix_str(status, refresh=False)
            bar.update()

        started = time.monotonic()
        with ranks.agreeing() as facts:
            bound = with_groups(plan, target, settings)
            facts |= hashes(bound)
        yield Measurement(at_equal_loss(target), settings, tuple(bound), label, report, started)


@final
@dataclass(frozen=True)
class Measurement:
    """Measures of one subject that share their passes over the data.

    Attributes:
        subject: what is measured.
        settings: how the measurement is made.
        plan: measures, each with the geometry it is measured in.
        label: what the user calls the network.
        report: called with a status line at each pass over the data.
        started: when it began, by the monotonic clock, in seconds.
    """

    subject: Subject
    settings: Settings
    plan: tuple[tuple[Measure, Geometry], ...]
    label: str
    report: Callable[[str], None]
    started: float

    def results(self) -> tuple[Result | Refusal, ...]:
        """One number, or why there is none, for each entry of the plan."""
        chosen, points = self.routed(self.points())
        planned = [point.with_products(matrices_of(chosen.asked(point))) for point in points]
        setup = time.monotonic() - self.started
        answers: Answers = {}
        for point in planned:
            answers |= chosen.answered(point)
        return chosen.written(planned, answers, setup)

    def points(self, look: Look = survey) -> list[EvaluationPoint]:
        """Every distinct point at which the plan's geometries measure, with what a first pass over the data tells there.

        Args:
            look: the first pass.
        """
        # Charts come first: a geometry that refuses must do so before the data is read.
        charts = {geometry: geometry.chart(self.subject.state) for _, geometry in self.plan}
        found: list[EvaluationPoint] = []
        for geometry, chart in charts.items():
            if any(point.state is chart.state for point in found):
                continue
            here = {other: its for other, its in charts.items() if its.state is chart.state}
            risk, seen = look(self.subject.risk, chart.state)
            initial = self.subject.initial
            found.append(
                EvaluationPoint(
                    chart.state, here, geometry, risk.pinned(seen), seen, self.settings, self.report, initial
                )
            )
        self.report(f"loss {found[0].survey.loss:.4g}")
        return found

    def routed(self, points: Sequence[EvaluationPoint]) -> tuple[Measurement, list[EvaluationPoint]]:
        """The way products with the Hessian are made, written into points and settings: notes, and what can be certified."""
        risk, state, check = points[0].risk, self.subject.state, self.settings.check
        if Matrix.HESSIAN in matrices_of([key for point in points for key in self.asked(point)]):
            with risk.ranks.agreeing() as facts:
                choice = choose(risk, state, check)
                facts["route"] = choice.route.__name__
        else:
            with risk.ranks.agreeing():
                choice = Choice(Recomputed, check_gradient(risk, state, check))
        subject = replace(self.subject, notes=(*self.subject.notes, *choice.notes))
        settings = self.settings if choice.exact else replace(self.settings, certify=False, sample=None)
        routed = [replace(point, settings=settings, route=choice.route) for point in points]
        return replace(self, subject=subject, settings=settings), routed

    def asked(self, point: EvaluationPoint) -> tuple[tuple[Geometry, Question], ...]:
        """Every question in every geometry of a point, once."""
        keys = [(g, question) for m, g in self.plan if g in point.charts for question in self.questions(m)]
        return tuple(dict.fromkeys(keys))

    def questions(self, measure: Measure) -> tuple[Question, ...]:
        """The questions of a measure; none where it does not apply, which its record will say."""
        try:
            return measure.questions(self.settings)
        except NOT_APPLICABLE:
            return ()

    def answered(self, point: EvaluationPoint) -> Answers:
        """Answers to all that is asked at a point: first what needs no solver, so that no solver runs for a refused measure."""
        asked = self.asked(point)
        told = [key for key in asked if not isinstance(key[1], SolverQuery)]
        answers: Answers = dict(zip(told, run_in_lockstep(tasks_of(point, told), self.report), strict=True))
        for geometry, question in asked:
            if isinstance(question, SolverQuery) and question.matrix in point.refused:
                answers[geometry, question] = point.refused[question.matrix]
        left = self._applying(answers)
        for matrix in point.products:
            solved = [(g, q) for g, q in left.asked(point) if isinstance(q, SolverQuery) and q.matrix is matrix]
            tasks = dict(zip(solved, tasks_of(point, solved), strict=True))
            if matrix is Matrix.HESSIAN:
                tasks |= generator_checks(point)
            answers |= dict(zip(tasks, run_in_lockstep(list(tasks.values()), self.report), strict=True))
        return answers

    def written(
        self, points: Sequence[EvaluationPoint], answers: Answers, setup: float
    ) -> tuple[Result | Refusal, ...]:
        """Every measure evaluated from answers, and written down.

        Args:
            points: of all geometries of the plan.
            answers: to all that they ask.
            setup: seconds that all numbers share.
        """
        where = {geometry: point.within(geometry) for point in points for geometry in point.charts}
        writer = RecordWriter(self.subject, self.settings, self.label, where, answers, setup / len(self.plan))
        return tuple(writer.result(measure, geometry) for measure, geometry in self.plan)

    def _applying(self, answers: Answers) -> Measurement:
        """The measurement without measures that have been refused an answer."""
        refused = {key for key, answer in answers.items() if isinstance(answer, IsoflatError)}
        plan = ((m, g) for m, g in self.plan if not any((g, question) in refused for question in self.questions(m)))
        return replace(self, plan=tuple(plan))


def generator_checks(point: EvaluationPoint) -> dict[tuple[Geometry, Question], Task]:
    """A product in each geometry that has a generator of its group to check products with."""
    hessian = point.operator(Matrix.HESSIAN)
    plain = Pullback(hessian, Identity(hessian.n))
    asked = {
        g: SingleProduct(chart.identity.velocity) for g, chart in point.charts.items() if chart.identity is not None
    }
    return {(g, SolverQuery(probe)): Task.of(probe, plain, stream(point.settings.seed)) for g, probe in asked.items()}


def matrices_of(keys: Sequence[tuple[Geometry, Question]]) -> tuple[Matrix, ...]:
    """The curvature matrices that questions are about."""
    return tuple(dict.fromkeys(question.matrix for _, question in keys if isinstance(question, SolverQuery)))
