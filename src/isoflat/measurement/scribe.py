"""From answers to numbers: every measure evaluated, and written down with where it comes from."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import IsoflatError, SymmetryViolated, UnsupportedModel, UsageError
from isoflat.core.estimate import Cost, Kind
from isoflat.core.fingerprint import fingerprint
from isoflat.core.record import Record
from isoflat.core.space import inner, norm
from isoflat.core.state import State
from isoflat.curvature.matrix import Matrix
from isoflat.geometry.base import Chart, Geometry
from isoflat.linalg.eigen.extremes import Extremes
from isoflat.linalg.solver import Outcome, SingleProduct
from isoflat.measurement.place import Place, Products
from isoflat.measurement.prepare import point, some, warnings
from isoflat.measures.base import Findings, Measure, Question, Settings, SolverQuery, Subject
from isoflat.risk.empirical import Survey
from isoflat.risk.plan import peak_memory
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

    @property
    def witness(self) -> Tensor | None:
        """The vector that the number is the Rayleigh quotient of, shape `(n,)`; None where it is no single eigenvalue."""
        answers = [answer.result for answer in self.findings.answers]
        return answers[0].wanted.vector if len(answers) == 1 and isinstance(answers[0], Extremes) else None


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
class Scribe:
    """Evaluates measures and writes down where each number comes from.

    Attributes:
        subject: what is measured.
        settings: how hard.
        label: what the user calls the network.
        charts: of every geometry in the plan.
        places: where each chart's state was measured.
        answers: to all questions.
        setup: seconds that each number has a share of, its own share.
    """

    subject: Subject
    settings: Settings
    label: str
    charts: Mapping[Geometry, Chart]
    places: dict[int, Place]
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
        chart = self.charts[geometry]
        place = self.places[id(chart.state)]
        where = point(subject.state, restricted(place.survey, chart.state, subject.state))
        findings = Findings(where, answers, settings, measure.options)
        estimate = measure.evaluate(findings)
        if estimate.kind is Kind.EXACT:
            estimate = estimate.allowing(ALLOWANCE * torch.finfo(subject.state.dtype).eps)
        seconds = sum(answer.seconds for answer in answers) + self.setup
        cost = Cost(
            products=sum(answer.products for answer in answers),
            gradient_passes=seconds / place.survey.seconds,
            seconds=seconds,
            peak_memory=peak_memory(subject.state.device),
        )
        size = None if measure.curvature is None else measure.curvature(findings)
        ratio = self._stationarity(geometry) / size if size and not geometry.constant else None
        matrices = matrices_of([(geometry, question) for question in questions])
        used = place.products[matrices[0]] if matrices else None
        notes = self._notes(geometry, ratio, place, used)
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
            data_hash=fingerprint(*place.survey.digests),
        )
        return Result(record, findings)

    @cached_property
    def _model_hash(self) -> str:
        """Of all weights and buffers: the same for every number."""
        return self.subject.state.fingerprint()

    @cached_property
    def _initial_hash(self) -> str | None:
        """Of the weights before training, made as that of the model."""
        initial = self.subject.initial
        return None if initial is None else State(self.subject.state.space.unflatten(initial)).fingerprint()

    def _stationarity(self, geometry: Geometry) -> float:
        """`max_i ‖W_i‖ ‖∇_i L‖` in the geometry's units: the largest block of `Eᵀ∇L`."""
        chart = self.charts[geometry]
        slope = chart.frame.pull(self.places[id(chart.state)].survey.gradient[:, None])[:, 0]
        return float(self.subject.state.space.block_norms(slope).max())

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
            if g == geometry and isinstance(question, SolverQuery) and isinstance(question.solver, SingleProduct)
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
        state, chart = self.subject.state, self.charts[geometry]
        notes = [
            *self.subject.notes,
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


def _ways(used: Products) -> dict[str, Any]:
    return {
        "route": used.parts[0].route,
        "second_order_rules": list(used.plan.rules),
        "rows_at_a_time": used.rows,
        "parts": [round(share, 6) for share in used.operator.shares],
        "memory_forecast": used.plan.forecast,
    }


def group_of(measure: Measure, chart: Chart) -> tuple[str, str]:
    """What a number is invariant to, in words and as a hash: as the geometry is, unless the measure claims its own."""
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


def matrices_of(keys: Sequence[tuple[Geometry, Question]]) -> tuple[Matrix, ...]:
    """What is asked about."""
    return tuple(dict.fromkeys(question.matrix for _, question in keys if isinstance(question, SolverQuery)))
