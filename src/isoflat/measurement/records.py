"""Records: every measure evaluated from its answers, and written down with where it comes from."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import IsoflatError, SymmetryViolated
from isoflat.core.estimate import Cost, Kind
from isoflat.core.record import Point, Record
from isoflat.core.render import some
from isoflat.core.space import inner, norm
from isoflat.core.state import State, fingerprint
from isoflat.curvature.matrix import Matrix
from isoflat.geometry.base import Chart, Geometry
from isoflat.geometry.layerwise import stationarity
from isoflat.linalg.eigen.extremes import Extremes
from isoflat.linalg.solver import Outcome, SingleProduct
from isoflat.measurement.subject import Subject
from isoflat.measures.base import Findings, Measure, Question, SolverQuery
from isoflat.measures.point import NOT_APPLICABLE, EvaluationPoint, MatrixProducts
from isoflat.measures.settings import Settings
from isoflat.risk import division
from isoflat.risk.empirical import Survey
from isoflat.risk.plan import peak_memory
from isoflat.symmetry.found import VERSION as RULES

Answers = dict[tuple[Geometry, Question], Outcome | IsoflatError]
"""Outcomes of questions in their geometries, or why there are none."""

ALLOWANCE = 100
"""Roundings of the precision that sums over rows and weights may add up to in a number that nothing else makes uncertain."""


@final
@dataclass(frozen=True)
class Result:
    """A number, and the answers it was evaluated from.

    Attributes:
        record: the row of a table.
        findings: the answers of solvers.
    """

    record: Record
    findings: Findings

    @property
    def witness(self) -> Tensor | None:
        """The vector that the number is the Rayleigh quotient of, shape `(n,)`; None where it is no single eigenvalue."""
        answers = [answer.result for answer in self.findings.answers]
        return answers[0].wanted.vector if len(answers) == 1 and isinstance(answers[0], Extremes) else None


@final
@dataclass(frozen=True)
class Refusal:
    """A measure that does not apply.

    Attributes:
        measure: the measure.
        geometry: the geometry it was asked for in.
        error: why.
    """

    measure: Measure
    geometry: Geometry
    error: IsoflatError


@final
@dataclass(frozen=True)
class RecordWriter:
    """Evaluates measures and writes down where each number comes from.

    Attributes:
        subject: what is measured.
        settings: how the measurement is made.
        label: what the user calls the network.
        points: where each geometry measures.
        answers: to all questions.
        setup: seconds that each number has a share of, its own share.
    """

    subject: Subject
    settings: Settings
    label: str
    points: Mapping[Geometry, EvaluationPoint]
    answers: Mapping[tuple[Geometry, Question], Outcome | IsoflatError]
    setup: float

    def result(self, measure: Measure, geometry: Geometry) -> Result | Refusal:
        """One number, or why there is none."""
        try:
            questions = measure.questions(self.settings)
            # What a measure is refused for is known before its solvers run: their answers may be missing.
            answers = [self.answers.get((geometry, question)) for question in questions]
            if errors := [answer for answer in answers if isinstance(answer, IsoflatError)]:
                return Refusal(measure, geometry, errors[0])
            given = tuple(answer for answer in answers if isinstance(answer, Outcome))
            return self._result(measure, geometry, questions, given)
        except NOT_APPLICABLE as error:
            return Refusal(measure, geometry, error)

    def _result(
        self, measure: Measure, geometry: Geometry, questions: Sequence[Question], answers: tuple[Outcome, ...]
    ) -> Result:
        subject, settings = self.subject, self.settings
        point = self.points[geometry]
        chart, seen = point.chart, point.survey
        where = surveyed_point(subject.state, restricted(seen, point.state, subject.state))
        findings = Findings(where, answers, settings, measure.options)
        estimate = measure.evaluate(findings)
        if estimate.kind is Kind.EXACT:
            estimate = estimate.allowing(ALLOWANCE * torch.finfo(subject.state.dtype).eps)
        seconds = sum(answer.seconds for answer in answers) + self.setup
        cost = Cost(
            products=sum(answer.products for answer in answers),
            gradient_passes=seconds / seen.seconds,
            seconds=seconds,
            peak_memory=peak_memory(subject.state.device),
        )
        size = None if measure.curvature is None else measure.curvature(findings)
        ratio = self._stationarity(geometry) / size if size and not geometry.constant else None
        matrices = list(dict.fromkeys(q.matrix for q in questions if isinstance(q, SolverQuery)))
        used = point.products[matrices[0]] if matrices else None
        notes = self._notes(point, ratio, used)
        if Matrix.HESSIAN in matrices:
            notes += self._checked(geometry, size)
        group, group_hash = group_of(measure, chart)
        record = Record(
            measure=measure.label,
            geometry=geometry.name,
            group=group,
            group_hash=group_hash,
            estimate=replace(estimate, cost=cost).with_notes(*notes),
            point=where,
            stationarity_ratio=ratio,
            label=self.label,
            settings=self._settings(used),
            versions=_versions(measure, geometry),
            model_hash=self._model_hash,
            data_hash=fingerprint(*seen.digests),
        )
        return Result(record, findings)

    @cached_property
    def _model_hash(self) -> str:
        """Hash of all weights and buffers, the same for every number."""
        return self.subject.state.fingerprint()

    @cached_property
    def _initial_hash(self) -> str | None:
        """Hash of the weights before training, made as that of the model."""
        initial = self.subject.initial
        return None if initial is None else State(self.subject.state.space.unflatten(initial)).fingerprint()

    def _stationarity(self, geometry: Geometry) -> float:
        """`max_i ‖W_i‖ ‖∇_i L‖` in the geometry's units: the largest block of `Eᵀ∇L`."""
        point = self.points[geometry]
        slope = point.chart.frame.pull(point.survey.gradient[:, None])[:, 0]
        return float(self.subject.state.space.block_norms(slope).max())

    def _checked(self, geometry: Geometry, size: float | None) -> list[str]:
        """The generator's identities `⟨∇L, Xθ⟩ = 0` and `H Xθ = −Xᵀ∇L`, relative to the curvature along Xθ.

        Raises:
            SymmetryViolated: they do not hold.
        """
        point = self.points[geometry]
        chart, identity = point.chart, point.chart.identity
        if identity is None:
            return []
        answer = next(
            found
            for (g, question), found in self.answers.items()
            if isinstance(found, Outcome)
            if g == geometry and isinstance(question, SolverQuery) and isinstance(question.solver, SingleProduct)
        )
        gradient = point.survey.gradient
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

    def _notes(self, point: EvaluationPoint, ratio: float | None, used: MatrixProducts | None) -> list[str]:
        state, chart, seen = self.subject.state, point.chart, point.survey
        where = surveyed_point(state, restricted(seen, point.state, state))
        risk = point.risk
        notes = [
            *division.told(self.subject.notes, self.subject.risk.loss, risk.loss),
            *division.notes(risk, seen.rows, len(seen.digests)),
            *warnings(where, seen),
        ]
        if chart.unseen:
            reasons: dict[str, list[str]] = {}
            for name, why in chart.unseen:
                reasons.setdefault(why, []).append(name)
            listed = "; ".join(f"{some(names)} ({why})" for why, names in reasons.items())
            notes.append(f"invisible to the {point.geometry.name} metric: {listed}")
        notes += chart.notes
        if used is not None and used.halvings:
            notes.append(f"memory ran out: {used.rows} rows at a time")
        if ratio is not None and ratio > 0.01:
            kind = "a local curvature, no minimum's" if ratio > 1 else "not quite a minimum's"
            notes.append(f"b/value = {ratio:.2g}: {kind} (b bounds the difference to the covariant Hessian)")
        return notes

    def _settings(self, used: MatrixProducts | None) -> dict[str, Any]:
        """Settings of the measurement; those of products only where there are any."""
        settings, state = self.settings, self.subject.state
        made = {} if used is None else _ways(used)
        return {
            "rtol": settings.rtol,
            "certify": settings.certify,
            "probes": settings.probes,
            "sample": settings.sample or "all",
            "logits": self.subject.risk.loss.logits,
            "initial": self._initial_hash,
            "seed": settings.seed,
            "max_products": settings.budget.products,
            "dtype": str(state.dtype).removeprefix("torch."),
            "device": str(state.device),
            **made,
            "autocast": str(settings.inside).removeprefix("torch.") if settings.inside else "off",
            "tf32": "off",
            "threads": torch.get_num_threads(),
            "processes": self.subject.risk.ranks.world,
            "reproducible_sum": self.subject.risk.ranks.ordered,
        }


def _ways(used: MatrixProducts) -> dict[str, Any]:
    return {
        "route": used.parts[0].route,
        "second_order_rules": list(used.plan.rules),
        "rows_at_a_time": used.rows,
        "parts": [round(share, 6) for share in used.operator.shares],
        "memory_forecast": used.plan.forecast,
    }


def group_of(measure: Measure, chart: Chart) -> tuple[str, str]:
    """Group that a number is invariant to, in words and as a hash: the geometry's, unless the measure claims its own."""
    if measure.own is None:
        return chart.group, chart.group_hash
    words = ", ".join(sorted(measure.own)) or "none"
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


def surveyed_point(state: State, survey: Survey) -> Point:
    """The point on the loss surface, as records have it."""
    return Point(
        loss=survey.loss,
        accuracy=survey.accuracy,
        gradient_norm=float(torch.linalg.vector_norm(survey.gradient)),
        stationarity=stationarity(state, survey.gradient),
        examples=survey.rows,
        targets=survey.count,
        parameters=state.space.size,
        chance=survey.chance,
    )


def warnings(where: Point, survey: Survey) -> tuple[str, ...]:
    """Warnings from the survey that a reader must know."""
    notes = []
    if survey.unused:
        notes.append(f"the loss does not depend on: {some(survey.unused)} (zero curvature)")
    if where.accuracy is not None and where.chance is not None:
        # Two standard errors of a binomial share: a network that has learned anything lies far above.
        error = (where.chance * (1 - where.chance) / max(where.targets, 1)) ** 0.5
        if where.accuracy <= where.chance + 2 * error:
            notes.append(
                f"accuracy {where.accuracy:.3f} is at chance level ({where.chance:.3f}): untrained weights, the wrong "
                "checkpoint, or inputs preprocessed differently than in training?"
            )
    return tuple(notes)
