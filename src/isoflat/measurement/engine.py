"""The engine: measures of one network, from the geometries' charts to one record each.

Every driver (`measure`, `measure_all`, `spectrum`, `verify`, samples, experiments) takes the same steps: charts, a survey of
the data at each distinct point, the route of products, a plan of products, tasks in lockstep, records. Drivers differ in the
questions that they ask.
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
from isoflat.measurement.audit import audited
from isoflat.measurement.groups import hashes, with_groups
from isoflat.measurement.lockstep import Task, run_in_lockstep, tasks_of
from isoflat.measurement.records import Answers, RecordWriter, Refusal, Result
from isoflat.measurement.subject import Plan, Subject, agreed, at_equal_loss, divided
from isoflat.measures.base import Measure, Question, SolverQuery
from isoflat.measures.point import NOT_APPLICABLE, EvaluationPoint
from isoflat.measures.settings import Settings
from isoflat.modules.private import untouched
from isoflat.risk.arrivals import without_gradient
from isoflat.risk.empirical import EmpiricalRisk, Survey
from isoflat.risk.foreign import told
from isoflat.risk.habits import learned
from isoflat.risk.linearise import Choice, check_gradient, choose, survey
from isoflat.risk.network import exactly
from isoflat.risk.ranks import Ranks
from isoflat.risk.routes.reverse import Recomputed


class FirstPass(Protocol):
    """First pass over the data at a point: it returns the risk with the data as it was read, and a survey."""

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
        settings: the settings of the measurement.
        ranks: the processes.
        label: the user's name of the network.

    Raises:
        IsoflatError: network, data, loss or symmetries are refused.
    """
    target = agreed(ranks, prepare, settings, plan)
    settings.refuse_below_rounding(target.state.dtype)
    hidden = not (settings.progress and ranks.first)
    with (
        tqdm(disable=hidden, unit=" passes", desc=label or "measuring", leave=False) as bar,
        exactly(target.state.device),
        untouched(target.risk.network.module),
    ):
        with ranks.agreeing():
            target = divided(replace(target, risk=learned(target.risk, target.state)))

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
        subject: the network, its data and its loss.
        settings: the settings of the measurement.
        plan: measures, each with the geometry it is measured in.
        label: the user's name of the network.
        report: called with a status line at each pass over the data.
        started: time at which it began, by the monotonic clock, in seconds.
    """

    subject: Subject
    settings: Settings
    plan: tuple[tuple[Measure, Geometry], ...]
    label: str
    report: Callable[[str], None]
    started: float

    def results(self) -> tuple[Result | Refusal, ...]:
        """One number, or why there is none, for each entry of the plan."""
        arrived, points = self.arrived(self.points())
        chosen, points = arrived.routed(points)
        planned = [point.with_products(matrices_of(chosen.asked(point))) for point in points]
        setup = time.monotonic() - self.started
        answers: Answers = {}
        for point in planned:
            answers |= chosen.answered(point)
        started = time.monotonic()
        checked = chosen.audited(planned, answers)
        return checked.written(planned, answers, setup + time.monotonic() - started)

    def points(self, first_pass: FirstPass = survey) -> list[EvaluationPoint]:
        """Every distinct point at which the plan's geometries measure, with its survey.

        Args:
            first_pass: makes the survey.
        """
        # Charts come first: a geometry that refuses must do so before the data is read.
        charts = {geometry: geometry.chart(self.subject.state) for _, geometry in self.plan}
        found: list[EvaluationPoint] = []
        for geometry, chart in charts.items():
            if any(point.state is chart.state for point in found):
                continue
            here = {other: its for other, its in charts.items() if its.state is chart.state}
            risk, seen = first_pass(self.subject.risk, chart.state)
            initial = self.subject.initial
            found.append(
                EvaluationPoint(
                    chart.state, here, geometry, risk.pinned(seen), seen, self.settings, self.report, initial
                )
            )
        self.report(f"loss {found[0].survey.loss:.4g}")
        return found

    def routed(self, points: Sequence[EvaluationPoint]) -> tuple[Measurement, list[EvaluationPoint]]:
        """This measurement and its points, once it is decided how products with the Hessian are made and what can be certified."""
        risk, state, check = points[0].risk, self.subject.state, self.settings.check
        if Matrix.HESSIAN in matrices_of([key for point in points for key in self.asked(point)]):
            with risk.ranks.agreeing() as facts:
                choice = choose(risk, state, check)
                facts["route"] = choice.route.__name__
        else:
            with risk.ranks.agreeing():
                choice = Choice(Recomputed, check_gradient(risk, state, check))
        settings = self.settings if choice.exact else replace(self.settings, certify=False, sample=None)
        routed = [replace(point, settings=settings, route=choice.route) for point in points]
        return replace(self.noted(choice.notes), settings=settings), routed

    def arrived(self, points: Sequence[EvaluationPoint]) -> tuple[Measurement, list[EvaluationPoint]]:
        """Tensors that no gradient arrives at, looked at: notes, and points that name those the loss does not depend on."""
        looked, notes = [], []
        for point in points:
            seen, note = without_gradient(self.subject.risk, point.state, point.survey, self.settings.check)
            looked.append(replace(point, survey=seen))
            notes += [note] * bool(note)
        return self.noted(notes), looked

    def audited(self, points: Sequence[EvaluationPoint], answers: Answers) -> Measurement:
        """The user's own model, compared with what was measured: notes.

        Raises:
            UnsupportedModel: gradients or products are not those of its loss.
        """
        self.report("the user's own model")
        return self.noted(audited(self.subject.risk, points, answers, self.settings.check, self.settings.seed))

    def noted(self, notes: Sequence[str]) -> Measurement:
        """The measurement with further notes beside each number, each once."""
        subject = replace(self.subject, notes=tuple(dict.fromkeys((*self.subject.notes, *notes))))
        return replace(self, subject=subject)

    def asked(self, point: EvaluationPoint) -> tuple[tuple[Geometry, Question], ...]:
        """Every question that the plan asks at a point, with its geometry, each once."""
        keys = [(g, question) for m, g in self.plan if g in point.charts for question in self.questions(m)]
        return tuple(dict.fromkeys(keys))

    def questions(self, measure: Measure) -> tuple[Question, ...]:
        """The questions of a measure; none where it does not apply, which its record will say."""
        try:
            return measure.questions(self.settings)
        except NOT_APPLICABLE:
            return ()

    def answered(self, point: EvaluationPoint) -> Answers:
        """Answers to every question at a point: those without a solver first, so that no solver runs for a refused measure."""
        asked = self.asked(point)
        unsolved = [key for key in asked if not isinstance(key[1], SolverQuery)]
        answers: Answers = dict(zip(unsolved, run_in_lockstep(tasks_of(point, unsolved), self.report), strict=True))
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
            points: the points at which the plan's geometries measure.
            answers: the answers to every question that is asked there.
            setup: seconds that all numbers share.
        """
        where = {geometry: point.within(geometry) for point in points for geometry in point.charts}
        writer = RecordWriter(self.subject, self.settings, self.label, where, answers, setup / len(self.plan))
        return tuple(writer.result(measure, geometry) for measure, geometry in self.plan)

    def _applying(self, answers: Answers) -> Measurement:
        """The measurement without measures that have been refused an answer."""

        def refused(measure: Measure, geometry: Geometry) -> bool:
            return any(isinstance(answers.get((geometry, q)), IsoflatError) for q in self.questions(measure))

        return replace(self, plan=tuple(entry for entry in self.plan if not refused(*entry)))


def generator_checks(point: EvaluationPoint) -> dict[tuple[Geometry, Question], Task]:
    """Tasks that check products: one product with a generator of the group, in each geometry that has one."""
    hessian = point.operator(Matrix.HESSIAN)
    plain = Pullback(hessian, Identity(hessian.n))
    checks: dict[tuple[Geometry, Question], Task] = {}
    for geometry, chart in point.charts.items():
        if chart.identity is not None:
            probe = SingleProduct(chart.identity.velocity)
            checks[geometry, SolverQuery(probe)] = Task.of(probe, plain, stream(point.settings.seed))
    return checks


def matrices_of(keys: Sequence[tuple[Geometry, Question]]) -> tuple[Matrix, ...]:
    """The curvature matrices that questions are about."""
    return tuple(dict.fromkeys(question.matrix for _, question in keys if isinstance(question, SolverQuery)))
