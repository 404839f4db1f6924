"""`sample="auto"`: extreme eigenvalues of all the data from some of it, with an interval for what was left out.

One forward pass over all the data says how important each example is (`losses.importance`). With H_S the weighted Hessian of
a sample, unbiased for the Hessian H of all data,

1. a *pilot* shows about where the eigenvalue is, how the curvature along its vector is spread over examples, and so how many
   of them the tolerance needs. Where that is a good part of all, all are measured;
2. a *witness* w is found on the examples that the sample will hold for certain and, weighted, the pilot's others;
3. one product with a fresh sample gives `θ = ⟨w, H_S w⟩` and `r = ‖(I − w wᵀ) H_S w‖`; and a second small sample says how
   much there is on the complement of w: at most U. Then, since `E ⟨w, H_S w⟩ = ⟨w, H w⟩`, and the expectations of a norm and
   of a largest eigenvalue are no smaller than those of the expectation (Jensen),

       θ ≤ λ_max(H) ≤ (θ + U)/2 + √((θ − U)²/4 + r²) ≈ θ + r²/(θ − U)

   up to the errors of θ, r and U, which the examples' own curvatures tell (`risk.sampling`). A sandwich, as any minibatch
   has it: what it gives away on the upper side is of second order, so that the few examples of U are enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.rng import stream
from isoflat.core.space import inner, norm
from isoflat.curvature.matrix import Matrix
from isoflat.geometry.base import Geometry
from isoflat.linalg.eigen.block_lanczos import Eigenpairs
from isoflat.linalg.eigen.complement import ComplementBounds, Remainder
from isoflat.linalg.eigen.extremes import REACHED, End, Extremes, Which
from isoflat.linalg.eigen.hard_first import HardFirst
from isoflat.linalg.eigen.lanczos import Lanczos
from isoflat.linalg.operator import Pullback
from isoflat.linalg.solver import Outcome, SingleProduct, Solver
from isoflat.measurement.engine import Measurement, generator_checks
from isoflat.measurement.lockstep import Task, outcomes
from isoflat.measurement.records import Answers, Refusal, Result
from isoflat.measures.base import Question, SolverQuery
from isoflat.measures.point import EvaluationPoint
from isoflat.risk.batches import ROWS
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.linearise import screen
from isoflat.risk.sampling import Sample, curvatures, inclusion

CONFIDENCE = 0.95
"""Where none is asked for: intervals over random examples, as those over random probes."""

PILOT = 1024
"""Examples of the pilot."""

COARSE = 0.03
"""Relative residual that is enough for the pilot."""

MOST = 0.3
"""Share of the data beyond which a sample saves too little, and all is measured."""

ROUNDS = 3
"""Samples at most: further ones where the pilot misjudged what is enough, or the witness was the wrong one."""

GROWTH = 2.0
"""By how much more exact the next one may be made at once."""

ERRORS = 10.0
"""Standard errors in the tolerance: two on each side, and more for the price of the residual."""

BOUND = 2048
"""Examples that say what is left on the complement of a witness."""

THETA, RESIDUAL, REST = 0.5, 0.1, 0.4
"""How the failure probability of the upper side is shared by its three parts."""

CERTAIN = 0.01
"""Share of the failure probability that the certificate of U has."""

Key = tuple[Geometry, Question]


def from_sample(measurement: Measurement) -> tuple[Result | Refusal, ...]:
    """Every number of a measurement, from a sample where there is a way; one for each entry of the plan.

    Raises:
        UsageError: the loss does not tell how important examples are.
        IsoflatError: as for `Measurement.results`.
    """
    asked = [measurement.questions(measure) for measure, _ in measurement.plan]
    fit = [bool(questions) and all(map(_has_sampled_form, questions)) for questions in asked]
    some, others = (
        replace(
            measurement, plan=tuple(entry for entry, can in zip(measurement.plan, fit, strict=True) if can is wanted)
        )
        for wanted in (True, False)
    )
    found = iter(_results(some) if some.plan else ())
    whole = iter(
        _on_all(others, "measured on all the data: there is no sampled form of it").results() if others.plan else ()
    )
    return tuple(next(found) if can else next(whole) for can in fit)


def _has_sampled_form(question: Question) -> bool:
    return (
        isinstance(question, SolverQuery)
        and isinstance(question.solver, HardFirst)
        and not question.covariant
        and question.matrix is Matrix.HESSIAN
    )


def _on_all(measurement: Measurement, note: str) -> Measurement:
    subject = replace(measurement.subject, notes=(*measurement.subject.notes, note))
    return replace(measurement, settings=replace(measurement.settings, sample=None), subject=subject)


def _results(measurement: Measurement) -> tuple[Result | Refusal, ...]:
    started = time.monotonic()
    points = measurement.points(screen)
    rows = points[0].survey.rows
    if MOST * rows < PILOT:
        return _on_all(measurement, f"{rows} examples are too few to sample from: all were measured").results()
    chosen, points = measurement.routed(points)
    if chosen.settings.sample is None:
        words = "products are not exact, and give no interval on a sample: all were measured"
        return _on_all(measurement, words).results()
    found: list[_Sampled] = []
    for point in points:
        part, size = _Sampler(chosen, point).answered()
        if part is None:
            words = f"the tolerance needs {min(size, rows)} of {rows} examples or more: all were measured"
            spent = f"{words} ({time.monotonic() - started:.1f} s went to finding that out)"
            return _on_all(measurement, spent).results()
        found.append(part)
    answers: Answers = {key: outcome for part in found for key, outcome in part.answers.items()}
    spent = sum(outcome.seconds for part in found for outcome in part.answers.values())
    notes = (*chosen.subject.notes, *dict.fromkeys(part.note for part in found))
    told = replace(chosen, subject=replace(chosen.subject, notes=notes))
    return told.written([part.point for part in found], answers, time.monotonic() - measurement.started - spent)


@final
@dataclass(frozen=True)
class _Sampled:
    """Answers from a sample, and the point with the sample's products.

    Attributes:
        point: with the survey of all data but for the gradient, which is the sample's.
        answers: by geometry and question.
        sample: the rows that were drawn.
        better: vectors of complements that carry more than the witnesses do, so that these were the wrong ones.
    """

    point: EvaluationPoint
    answers: Mapping[Key, Outcome]
    sample: Sample
    better: Mapping[Key, Tensor]

    @property
    def note(self) -> str:
        """Note that a reader must know."""
        return (
            f"sampled: {self.sample.size} of {self.point.survey.rows} examples ({self.sample.certain} for certain); the "
            "interval says what that leaves open, and the gradient is the sample's"
        )


@final
@dataclass(frozen=True)
class _Pilot:
    """First look at a small sample.

    Attributes:
        sample: its examples.
        ends: about where the eigenvalues are, with vectors in the coordinates of their frames.
        forms: the curvature of each example along these vectors, over what totals are divided by.
    """

    sample: Sample
    ends: Mapping[Key, End]
    forms: Mapping[Key, Tensor]

    def error(self, key: Key, chances: Tensor) -> float:
        """The relative standard error that a sample with other chances would have."""
        size = abs(self.ends[key].value)
        return self.sample.forecast(self.forms[key], chances) / size if size else math.inf


class _Sampler:
    """The steps at one point.

    Attributes:
        measurement: what is asked for.
        whole: the point, with all of the data as the forward pass told.
        products: spent for each number so far, in products with all the data.
        seconds: spent for each number in solvers.
    """

    def __init__(self, measurement: Measurement, whole: EvaluationPoint) -> None:
        self.measurement, self.whole = measurement, whole
        self.settings, self.seen, self.state = measurement.settings, whole.survey, whole.state
        self.keys: tuple[Key, ...] = measurement.asked(whole)
        self.confidence = CONFIDENCE if self.settings.confidence is None else self.settings.confidence
        self.started = time.monotonic()
        self.products, self.seconds = dict.fromkeys(self.keys, 0.0), dict.fromkeys(self.keys, 0.0)

    def pilot(self) -> _Pilot:
        """A look at a few examples."""
        sample = self._drawn(PILOT, "pilot")
        found = self._solved(sample, {key: replace(_solver(key), rtol=COARSE, certify=False) for key in self.keys})
        ends = {key: result.wanted for key, result in found.items()}
        forms = {key: self._forms(sample, key, end.vector) / self._unit for key, end in ends.items()}
        return _Pilot(sample, ends, forms)

    def needed(self, pilot: _Pilot, width: float) -> int:
        """Number of examples that a relative width needs, as the pilot sees it; more than `MOST` of them where it is too many."""
        size = PILOT // 2
        while size <= MOST * self.seen.rows:
            chances = self._chances(size)
            if all(ERRORS * pilot.error(key, chances) <= width for key in self.keys):
                break
            size = math.ceil(1.1 * size)
        return size

    def answered(self) -> tuple[_Sampled | None, int]:
        """From a sample that is as large as it must be, and how large; None where that is too large."""
        few, width = BOUND, self.settings.rtol
        pilot = self.pilot()
        size = self.needed(pilot, width)
        starts = {key: end.vector[:, None] for key, end in pilot.ends.items()}
        for number in range(ROUNDS):
            if size > MOST * self.seen.rows:
                break
            found = self._measured(pilot, starts, size, min(few, size), number)
            wide = max(_width(found.answers[key].result) for key in self.keys) / self.settings.rtol
            if wide <= 1 or self._spent():
                return found, size
            if not found.better:
                few, width = math.ceil(GROWTH * few), width / (1.2 * min(wide, GROWTH))
                size = max(self.needed(pilot, width), size)
            starts |= {key: torch.stack([vector, starts[key][:, 0]], dim=1) for key, vector in found.better.items()}
        return None, size

    def _measured(self, pilot: _Pilot, starts: Mapping[Key, Tensor], size: int, few: int, number: int) -> _Sampled:
        """Witnesses, then the samples, which are drawn after them."""
        witnesses = self._witnesses(pilot, starts, pilot.sample.beyond(self._chances(size)))
        inside, budget = 1 - CERTAIN * (1 - self.confidence), self.settings.budget.products
        small, sample = self._drawn(few, "complement", number), self._drawn(size, "sample", number)
        left = self._solved(small, {key: Remainder(found, inside, budget) for key, found in witnesses.items()})
        survey = self._risk(sample).survey(self.state)
        scale = self.seen.rows / sample.size
        seen = replace(self.seen, gradient=survey.gradient, unused=survey.unused, seconds=survey.seconds * scale)
        point = replace(self._point(sample), survey=replace(seen, hardness=None))
        tasks = {key: self._task(key, point, SingleProduct(witness)) for key, witness in witnesses.items()}
        checks = generator_checks(point)
        done = outcomes([*tasks.values(), *checks.values()], self.measurement.report)
        answers: dict[Key, Outcome] = dict(zip(checks, done[len(tasks) :], strict=True))
        better: dict[Key, Tensor] = {}
        for key, outcome in zip(tasks, done, strict=False):
            self._tally(key, sample, outcome)
            image, rest = outcome.result[:, 0], left[key]
            theta = float(inner([witnesses[key]], image)[0])
            top = self._at_top(key, pilot.ends[key].value)
            if beyond := rest.beyond(-math.inf, theta)[-1:] if top else rest.beyond(theta, math.inf)[:1]:
                better[key] = beyond[0]
            result = self._enclosed(key, sample, witnesses[key], image, self._rest(key, small, rest))
            spent = math.ceil(self.products[key])
            answers[key] = Outcome(replace(result, products=spent), spent, self.seconds[key])
        return _Sampled(point, answers, sample, better)

    def _witnesses(self, pilot: _Pilot, starts: Mapping[Key, Tensor], known: Sample) -> dict[Key, Tensor]:
        """Vectors close to those wanted, by the pilot's examples and those that the sample will have for certain."""
        fine, budget = math.sqrt(self.settings.rtol) / 4, self.settings.budget.products
        searches = {}
        for key, end in pilot.ends.items():
            top = self._at_top(key, end.value)
            searches[key] = Eigenpairs(
                int(top), int(not top), start=starts[key], rtol=fine, certify=False, max_products=budget
            )
        return {
            key: (found.largest or found.smallest)[0].vector for key, found in self._solved(known, searches).items()
        }

    def _solved(self, sample: Sample, solvers: Mapping[Key, Solver[Any]]) -> dict[Key, Any]:
        """Results of solvers on a sample, run in lockstep."""
        point = self._point(sample)
        tasks = [self._task(key, point, solver) for key, solver in solvers.items()]
        found = dict(zip(solvers, outcomes(tasks, self.measurement.report), strict=True))
        for key, outcome in found.items():
            self._tally(key, sample, outcome)
        return {key: outcome.result for key, outcome in found.items()}

    def _tally(self, key: Key, sample: Sample, outcome: Outcome) -> None:
        self.products[key] += outcome.products * sample.size / self.seen.rows
        self.seconds[key] += outcome.seconds

    def _spent(self) -> bool:
        """Test whether a budget forbids another sample."""
        budget = self.settings.budget
        late = budget.seconds is not None and time.monotonic() - self.started > budget.seconds
        return late or max(self.products.values()) > budget.products

    def _rest(self, key: Key, small: Sample, left: ComplementBounds) -> tuple[float, float]:
        """Where the spectrum on a complement lies, for all data."""
        (run,) = left.runs
        turns = run.ritz()[1]
        low, high = (self._error(small, key, run.combine(turns[:, j]), share=REST / 2) for j in (0, -1))
        return left.lower - low, left.upper + high

    def _enclosed(
        self, key: Key, sample: Sample, witness: Tensor, product: Tensor, rest: tuple[float, float]
    ) -> Extremes:
        """The sandwich."""
        theta = float(inner([witness], product)[0])
        residual = torch.sub(product, witness, alpha=theta)
        size = norm(residual)
        coupling = size + (self._error(sample, key, witness, residual / size, share=RESIDUAL) if size else 0.0)
        near, far = self._error(sample, key, witness), self._error(sample, key, witness, share=THETA)
        top, which = self._at_top(key, theta), _solver(key).which

        def outer(sign: float) -> float:
            """Bound that the spectrum does not pass on one side."""
            mine, others = sign * theta + far, max(sign * end for end in rest)
            return sign * ((mine + others) / 2 + math.hypot((mine - others) / 2, coupling))

        inside, outside = (theta - near, outer(1.0)) if top else (theta + near, outer(-1.0))
        value = (inside + outside) / 2
        wanted = End(value, outside, abs(value - inside), None, witness)
        # Of the other end only the bound is news.
        other = End(math.copysign(min(abs(theta), abs(value)), theta), outer(-1.0 if top else 1.0), 0.0, None, witness)
        bottom, top_ = (other, wanted) if top else (wanted, other)
        found = Extremes(bottom, top_, which, False, self.confidence, 0.0, 0, "")
        low, high = found.interval()
        reached = high - low <= self.settings.rtol * abs(value)
        left = (
            f"{sample.size} examples leave a relative width of {(high - low) / abs(value):.2g}"
            if value
            else "no curvature"
        )
        return replace(found, reached=reached, stopped=REACHED if reached else left)

    def _error(self, sample: Sample, key: Key, one: Tensor, other: Tensor | None = None, share: float = 1.0) -> float:
        """Bound on how much a form in two vectors may differ from that of all data, with a share of one side's probability."""
        from scipy.stats import t as student

        tail = share * (1 - CERTAIN) * (1 - self.confidence) / 2
        scatter, freedom = sample.scatter(self._forms(sample.drawn, key, one, other))
        return float(student.isf(tail, freedom)) * scatter / self._unit

    def _forms(self, sample: Sample, key: Key, one: Tensor, other: Tensor | None = None) -> Tensor:
        """The form of each example of a sample in vectors of a frame's coordinates; in one of them twice."""
        frame = self.whole.charts[key[0]].frame
        first = frame.push(one[:, None])[:, 0]
        second = first if other is None else frame.push(other[:, None])[:, 0]
        return curvatures(self._risk(sample), self.state, first, second)

    def _at_top(self, key: Key, value: float) -> bool:
        """Test whether the eigenvalue that is asked for is at the upper end."""
        which = _solver(key).which
        return which is Which.LARGEST or (which is Which.MAGNITUDE and value >= 0)

    def _chances(self, size: int) -> Tensor:
        assert self.seen.hardness is not None
        return inclusion(self.seen.hardness, size)

    def _drawn(self, size: int, *labels: object) -> Sample:
        return Sample.of(self._chances(size), stream(self.settings.seed, *labels))

    def _risk(self, sample: Sample) -> EmpiricalRisk:
        return sample.risk(self.whole.risk, self.seen.count, ROWS)

    def _point(self, sample: Sample) -> EvaluationPoint:
        """The point with products on a sample."""
        return self.whole.on(sample, ROWS).with_products([Matrix.HESSIAN])

    def _task(self, key: Key, point: EvaluationPoint, solver: Solver[Any]) -> Task:
        pulled = Pullback(point.operator(Matrix.HESSIAN), point.charts[key[0]].frame)
        return Task.of(solver, pulled, stream(self.settings.seed, solver.label))

    @property
    def _unit(self) -> float:
        """Divisor of totals over the data."""
        return self.seen.count if self.whole.risk.loss.averages else 1.0


def _solver(key: Key) -> Lanczos:
    assert isinstance(key[1], SolverQuery) and isinstance(key[1].solver, HardFirst)
    return key[1].solver.whole


def _width(found: Extremes) -> float:
    """Width of the interval, relative to the value."""
    low, high = found.interval()
    size = abs(found.wanted.value)
    return (high - low) / size if size else math.inf
