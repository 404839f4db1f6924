"""One measurement: every question of every measure answered in step, then written down."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, final

import torch

from isoflat.core.estimate import Cost
from isoflat.core.fingerprint import fingerprint
from isoflat.core.record import Record
from isoflat.core.streams import stream
from isoflat.core.table import Table
from isoflat.curvature.hessian import Hessian
from isoflat.geometry.base import Geometry
from isoflat.linalg.operator import Pullback
from isoflat.linalg.solver import Job, Outcome, together
from isoflat.measures.base import Effort, Findings, Measure, Question, Subject
from isoflat.measures.prepare import point, warnings
from isoflat.risk.empirical import Survey
from isoflat.risk.linearise import available_memory, linearise, peak_memory

Answers = dict[tuple[Geometry, Question], Outcome]


@final
@dataclass(frozen=True)
class Session:
    """Measures of one subject that share their passes over the data.

    Attributes:
        subject: what is measured.
        effort: how hard.
        plan: measures, each with the geometry it is measured in.
        label: what the user calls the network.
        report: called with a status line at each pass over the data.
    """

    subject: Subject
    effort: Effort
    plan: tuple[tuple[Measure, Geometry], ...]
    label: str
    report: Callable[[str], None]

    def table(self) -> Table:
        """Survey, linearise, answer, evaluate."""
        started = time.monotonic()
        state = self.subject.state
        # Frames come first: a geometry that refuses must do so before the data is read.
        frames = {geometry: geometry.frame(state) for _, geometry in self.plan}
        survey = self.subject.risk.survey(state)
        self.report(f"loss {survey.loss:.4g}")
        budget = self.effort.budget.memory
        memory = available_memory(state.device) // 2 if budget is None else budget
        hessian = Hessian(linearise(self.subject.risk.pinned(survey), state, survey.rows, memory))
        asked = [(geometry, question) for measure, geometry in self.plan for question in measure.needs(self.effort)]
        jobs = {}
        for geometry, question in dict.fromkeys(asked):
            plus = geometry.connection(state, survey.gradient) if question.covariant else None
            random = stream(self.effort.seed, type(question.solver).__name__)
            jobs[geometry, question] = Job(Pullback(hessian, frames[geometry], plus), question.solver, random)
        setup = time.monotonic() - started
        answers = dict(zip(jobs, together(hessian, list(jobs.values()), self.report), strict=True))
        scribe = _Scribe(self, survey, answers, setup, hessian.linearisation.route)
        return Table(tuple(scribe.record(measure, geometry) for measure, geometry in self.plan))


@final
@dataclass(frozen=True)
class _Scribe:
    """Evaluates measures and writes down where each number comes from."""

    session: Session
    survey: Survey
    answers: Answers
    setup: float
    route: str

    def record(self, measure: Measure, geometry: Geometry) -> Record:
        """One row."""
        subject, effort = self.session.subject, self.session.effort
        where = point(subject.state, self.survey)
        answers = tuple(self.answers[geometry, question] for question in measure.needs(effort))
        findings = Findings(where, answers, effort, measure.options)
        estimate = measure.evaluate(findings)
        seconds = estimate.cost.seconds + self.setup / len(self.session.plan)
        cost = Cost(
            products=estimate.cost.products,
            gradient_passes=seconds / self.survey.seconds,
            seconds=seconds,
            peak_memory=peak_memory(subject.state.device),
        )
        ratio = None
        if measure.curvature is not None and geometry.name != "euclidean" and (size := measure.curvature(findings)):
            ratio = where.stationarity / size
        return Record(
            measure=measure.label,
            geometry=geometry.name,
            group=geometry.group,
            group_hash=geometry.group_hash(subject.state),
            estimate=replace(estimate, cost=cost).with_notes(*self._notes(geometry, ratio)),
            point=where,
            stationarity_ratio=ratio,
            label=self.session.label,
            settings=self._settings(),
            versions=_versions(measure, geometry),
            model_hash=subject.state.fingerprint(),
            data_hash=fingerprint(*self.survey.digests),
        )

    def _notes(self, geometry: Geometry, ratio: float | None) -> list[str]:
        state = self.session.subject.state
        notes = [*self.session.subject.notes, *warnings(point(state, self.survey), self.survey)]
        if unseen := geometry.degenerate(state):
            notes.append(f"all zero, invisible to the {geometry.name} metric: {', '.join(unseen)}")
        if ratio is not None and ratio > 0.01:
            kind = "a local curvature, no minimum's" if ratio > 1 else "not quite a minimum's"
            notes.append(f"b/value = {ratio:.2g}: {kind} (b bounds the difference to the covariant Hessian)")
        return notes

    def _settings(self) -> dict[str, Any]:
        effort, state = self.session.effort, self.session.subject.state
        return {
            "rtol": effort.rtol,
            "certify": effort.certify,
            "probes": effort.probes,
            "seed": effort.seed,
            "max_products": effort.budget.products,
            "dtype": str(state.dtype).removeprefix("torch."),
            "device": str(state.device),
            "route": self.route,
            "threads": torch.get_num_threads(),
        }


def _versions(measure: Measure, geometry: Geometry) -> dict[str, str]:
    return {
        "isoflat": version("isoflat"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "measure": str(measure.version),
        "geometry": str(geometry.version),
    }
