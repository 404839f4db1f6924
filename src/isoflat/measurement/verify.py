"""Stored numbers checked again by the vectors that carry them: two products each, instead of a measurement.

With a unit vector x, the *witness* of a stored eigenvalue, and one product `A x` in float64, whoever made the file,

    ρ = ⟨x, A x⟩ ≤ λ_max(A),   ‖A x‖ ≤ ‖A‖,   and an eigenvalue lies in [ρ − r, ρ + r],   r = ‖A x − ρ x‖.

A second product, with a random y orthogonal to x, gives the best bounds that both vectors allow: the Ritz values of their
span, and the norm of A on it. What exceeds the stored upper end proves it wrong. What does not proves no more: that end rests
on the certificate's probability (`linalg.certificate`), which two products cannot confirm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, Unpack, final

import torch
from torch import Tensor

from isoflat.core.errors import UnknownName, UsageError
from isoflat.core.estimate import Estimate, interval
from isoflat.core.plain import attributes
from isoflat.core.record import Point, Record
from isoflat.core.rng import stream
from isoflat.core.state import fingerprint
from isoflat.curvature.matrix import Matrix
from isoflat.geometry.base import Geometry
from isoflat.geometry.layerwise import stationarity
from isoflat.geometry.traced import Traced
from isoflat.linalg.eigen.extremes import End, Extremes, Which
from isoflat.linalg.eigen.hard_first import HardFirst
from isoflat.linalg.eigen.lanczos import Lanczos
from isoflat.linalg.eigen.recheck import Recheck, RecheckResult
from isoflat.linalg.operator import Pullback
from isoflat.linalg.solver import Outcome
from isoflat.measurement.engine import Measurement, opened
from isoflat.measurement.lockstep import Task, outcomes
from isoflat.measurement.records import ALLOWANCE, group_of, restricted, surveyed_point
from isoflat.measurement.subject import Subject, subject
from isoflat.measures.base import Findings, Measure, SolverQuery
from isoflat.measures.catalogue import find_geometry, find_measure
from isoflat.measures.point import EvaluationPoint
from isoflat.measures.settings import Keywords, Settings, takes_settings
from isoflat.risk.ranks import Ranks
from isoflat.symmetry.found import VERSION

SHARE = 0.01
"""Share of an interval's width by which a value may be off for harmless reasons, such as the rounding of another machine."""

SAME_LOSS = 30
"""Square roots of the precision by which the loss may differ: another loss function is off by more."""

_FIXED = tuple(
    item.name for item in fields(Settings) if item.name not in ("params", "symmetries", "device", "seed", "check")
)
"""Settings that a check takes from the records, or does not use."""

Rows = Sequence[tuple[Record, Tensor | None]]
"""Stored numbers, each with its witness, if it has one."""


class RecordVerdict(StrEnum):
    """Outcome of checking a stored number."""

    HOLDS = "holds"
    FALSE = "does not hold"
    REFUSED = "refused"
    UNCHECKED = "can only be measured again"


@final
@dataclass(frozen=True)
class RecordCheck:
    """A stored number, checked.

    Attributes:
        measure: name of the number.
        geometry: name of the geometry in which it was measured.
        verdict: outcome of the check.
        sentence: reason for the verdict, in words.
        stored: the stored number.
        value: the same number from the witness, in the same units; None where no product was made.
        residual: residual of the witness, in these units.
        contains: an interval that certainly contains an eigenvalue (in these units), whatever is stored.
        reach: a bound that two products prove the number to reach.
    """

    measure: str
    geometry: str
    verdict: RecordVerdict
    sentence: str
    stored: Estimate
    value: float | None = None
    residual: float | None = None
    contains: tuple[float, float] | None = None
    reach: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return attributes(self)


def checkable(measure: Measure) -> SolverQuery | None:
    """The question of a measure that is one extreme eigenvalue, up to a factor; None for all others."""
    questions = measure.questions(Settings())
    if len(questions) != 1 or not isinstance(questions[0], SolverQuery):
        return None
    return questions[0] if isinstance(questions[0].solver, HardFirst | Lanczos) else None


def carried(record: Record) -> bool:
    """Test whether numbers of this name come with a witness."""
    try:
        return checkable(find_measure(record.measure)) is not None
    except UsageError:
        return False


def verify(
    record: Record,
    vector: Tensor | None,
    model: torch.nn.Module,
    data: Any,
    loss: Any = None,
    **settings: Any,
) -> RecordCheck:
    """Check a stored number by its witness.

    Args:
        record: the number, as `measure_all` wrote it.
        vector: its witness (`measure_all(..., keep=...)`), in the coordinates of its geometry.
        model: the network with the weights that were measured.
        data: the data, in the same order and batches.
        loss: as it was measured with.
        **settings: as for `verify_all`.

    Raises:
        IsoflatError: the network cannot be measured.

    >>> from isoflat import measure_all
    >>> net, kept = torch.nn.Linear(3, 1), []
    >>> data = torch.eye(3), torch.ones(3, 1)
    >>> _ = measure_all(net, data, torch.nn.MSELoss(), keep=lambda *row: kept.append(row))
    >>> str(verify(*kept[0], net, data, torch.nn.MSELoss()).verdict)
    'holds'
    """
    return verify_all([(record, vector)], model, data, loss, **settings)[0]


@takes_settings(*_FIXED)
def verify_all(
    rows: Rows, model: torch.nn.Module, data: Any, loss: Any = None, **settings: Unpack[Keywords]
) -> tuple[RecordCheck, ...]:
    """Check stored numbers of one network by their witnesses, with shared passes over the data.

    Precision and what becomes of scores are taken from the records.

    Args:
        rows: the numbers with their witnesses.
        model: as for `verify`.
        data: as for `verify`.
        loss: as for `verify`.
        **settings: the fields of `isoflat.Settings` that a check has.

    Returns:
        One check for each row, in order.

    Raises:
        IsoflatError: the network cannot be measured, or a record does not say how it was.
    """
    chosen = Settings(**settings)  # pyrefly: ignore
    found: dict[int, RecordCheck] = {}
    for made in dict.fromkeys(_Made.of(record) for record, _ in rows):
        cases: list[_Case] = []
        target: Subject | None = None
        for number, (record, vector) in enumerate(rows):
            if _Made.of(record) != made:
                continue
            case = _case(number, record, vector)
            if isinstance(case, _Case):
                target = target or made.subject(model, data, loss, chosen)
                case = _same(case, target.state.fingerprint())
            if isinstance(case, _Case):
                cases.append(case)
            else:
                found[number] = case
        if target is not None and cases:
            found |= _checked(cases, target, chosen)
    return tuple(found[number] for number in range(len(rows)))


@final
@dataclass(frozen=True)
class _Case:
    """A number that can be checked.

    Attributes:
        number: place among the rows.
        record: the stored number.
        witness: the vector stored with it.
        measure: the measure that the record names.
        geometry: the geometry that the record names; `_checked` gives it the network's symmetries.
        question: the one question of the measure.
    """

    number: int
    record: Record
    witness: Tensor
    measure: Measure
    geometry: Geometry
    question: SolverQuery

    @property
    def which(self) -> Which:
        """The end of the spectrum."""
        solver = self.question.solver
        assert isinstance(solver, HardFirst | Lanczos)
        return solver.whole.which if isinstance(solver, HardFirst) else solver.which

    def refused(self, sentence: str) -> RecordCheck:
        """Verdict that something is not what the record says, so that nothing is checked."""
        return _said(self.record, RecordVerdict.REFUSED, sentence)


def _said(record: Record, verdict: RecordVerdict, sentence: str) -> RecordCheck:
    return RecordCheck(record.measure, record.geometry, verdict, sentence, record.estimate)


@final
@dataclass(frozen=True)
class _Made:
    """Conditions of a measurement: precision, what was done to scores, and number of processes that shared the data."""

    dtype: str
    logits: str
    processes: int

    @staticmethod
    def of(record: Record) -> _Made:
        """Conditions that a record names."""
        dtype, logits, processes = (record.settings.get(key) for key in ("dtype", "logits", "processes"))
        if dtype in ("float32", "float64") and isinstance(logits, str) and isinstance(processes, int) and processes > 0:
            return _Made(dtype, logits, processes)
        raise UsageError(
            f"the record of {record.measure} does not say how it was measured (dtype {dtype!r}, logits {logits!r}, "
            f"processes {processes!r}): measure again"
        )

    def subject(self, model: Any, data: Any, loss: Any, settings: Settings) -> Subject:
        """The subject, prepared as it was then."""
        logits = None if self.logits == "raw" else self.logits
        target = subject(model, data, loss, replace(settings, dtype=self.dtype, logits=logits))
        return replace(target, risk=replace(target.risk, batches=target.risk.batches.among(self.processes)))


def _case(number: int, record: Record, vector: Tensor | None) -> _Case | RecordCheck:
    """Case that can be checked, as far as the row tells; else why it cannot."""
    try:
        measure, geometry = find_measure(record.measure), find_geometry(record.geometry)
        question = checkable(measure)
    except UnknownName as error:
        return _said(record, RecordVerdict.UNCHECKED, f"cannot be checked by name alone: {error}")
    except UsageError as error:
        return _said(record, RecordVerdict.REFUSED, f"the name of the number makes no sense: {error}")
    if question is None:
        return _said(
            record, RecordVerdict.UNCHECKED, "this is no single extreme eigenvalue: there is no vector to check it by"
        )
    if measure.geometry not in (None, record.geometry):
        words = f"{measure.name} is defined in the {measure.geometry} geometry, not in {record.geometry}"
        return _said(record, RecordVerdict.REFUSED, words)
    if vector is None:
        return _said(record, RecordVerdict.UNCHECKED, "it was stored without a witness")
    if (
        vector.ndim != 1
        or not vector.is_floating_point()
        or not bool(vector.isfinite().all())
        or not bool(vector.any())
    ):
        words = "the witness is no vector of finite numbers that are not all zero: it was damaged or replaced"
        return _said(record, RecordVerdict.REFUSED, words)
    return _Case(number, record, vector, measure, geometry, question)


def _same(case: _Case, model_hash: str) -> _Case | RecordCheck:
    """The case, if the network and the versions of its number are what they were."""
    record = case.record
    if model_hash != record.model_hash:
        return case.refused(
            f"this is another network: the weights have the fingerprint {model_hash}, the record's {record.model_hash}"
        )
    now = {"measure": str(case.measure.version), "geometry": str(case.geometry.version)}
    if isinstance(case.geometry, Traced):
        now["rules"] = str(VERSION)
    for what, version in now.items():
        if (then := record.versions.get(what)) != version:
            return case.refused(
                f"it was measured by version {then} of the {what}, and this isoflat has {version}: measure again"
            )
    return case


def _checked(cases: Sequence[_Case], target: Subject, settings: Settings) -> dict[int, RecordCheck]:
    """Checks of cases that need products."""
    found: dict[int, RecordCheck] = {}
    plan = tuple((case.measure, case.geometry) for case in cases)
    with opened(lambda: target, plan, settings, Ranks.here()) as measurement:
        points = measurement.points()
        at = {geometry: point for point in points for geometry in point.charts}
        left: list[_Case] = []
        for case, (_, geometry) in zip(cases, measurement.plan, strict=True):
            ready = _fitting(replace(case, geometry=geometry), at[geometry].within(geometry))
            if isinstance(ready, RecordCheck):
                found[case.number] = ready
            else:
                left.append(ready)
        if not left:
            return found
        remaining = replace(measurement, plan=tuple((case.measure, case.geometry) for case in left))
        chosen, points = remaining.routed(points)
        if not chosen.settings.certify:  # differences of gradients: their products are not exact
            inexact = [case for case in left if case.question.matrix is Matrix.HESSIAN]
            words = "its products are differences of gradients here, which are not exact: a fresh one proves nothing"
            found |= {case.number: _said(case.record, RecordVerdict.UNCHECKED, words) for case in inexact}
            left = [case for case in left if case.number not in found]
        for point in points:
            here = [case for case in left if case.geometry in point.charts]
            for matrix in dict.fromkeys(case.question.matrix for case in here):
                group = [case for case in here if case.question.matrix is matrix]
                found |= _multiplied(group, matrix, chosen, point.with_products([matrix]))
    return found


def _fitting(case: _Case, point: EvaluationPoint) -> _Case | RecordCheck:
    """The case, if data, group, loss and witness are what they were."""
    record, chart, seen = case.record, point.chart, point.survey
    if (came := fingerprint(*seen.digests)) != record.data_hash:
        return case.refused(
            f"this is other data, or the same in other batches: its fingerprint is {came}, the record's {record.data_hash}"
        )
    if (came := group_of(case.measure, chart)[1]) != record.group_hash:
        return case.refused(
            f"the {record.geometry} geometry has another group on this network ({came}) than the record says "
            f"({record.group_hash}): other trainable tensors (params), or another architecture"
        )
    apart = SAME_LOSS * torch.finfo(chart.state.dtype).eps ** 0.5
    if not math.isclose(seen.loss, record.point.loss, rel_tol=apart, abs_tol=0.0):
        return case.refused(
            f"the loss here is {seen.loss:.8g}, and the record says {record.point.loss:.8g}: another loss function, or a "
            "record that was edited"
        )
    if len(case.witness) != chart.frame.columns:
        return case.refused(
            f"the witness has {len(case.witness)} entries, and the {record.geometry} geometry {chart.frame.columns} "
            "coordinates: it was cut off or replaced"
        )
    return case


def _multiplied(
    group: Sequence[_Case], matrix: Matrix, measurement: Measurement, point: EvaluationPoint
) -> dict[int, RecordCheck]:
    """Cases of one matrix at one point, by two products each in two passes over the data."""
    state, seen = point.state, point.survey
    if matrix in point.refused:
        error = point.refused[matrix]
        return {case.number: case.refused(str(error)) for case in group}
    tasks = []
    for case in group:
        plus = case.geometry.connection(state, seen.gradient) if case.question.covariant else None
        random = stream(measurement.settings.seed, "verify", case.record.measure, case.record.geometry)
        pulled = Pullback(point.operator(matrix), point.charts[case.geometry].frame, plus)
        tasks.append(Task.of(Recheck(case.witness), pulled, random))
    own = measurement.subject.state
    where = surveyed_point(own, restricted(seen, state, own))
    # The connection term is made of the gradient, which is as exact as the precision of the survey.
    loose = ALLOWANCE * torch.finfo(state.dtype).eps * stationarity(state, seen.gradient)
    found = outcomes(tasks, measurement.report)
    return {
        case.number: judged(case, outcome.result, where, loose if case.question.covariant else 0.0)
        for case, outcome in zip(group, found, strict=True)
    }


def judged(case: _Case, seen: RecheckResult, where: Point, loose: float) -> RecordCheck:
    """Verdict of two products on a stored number.

    Args:
        case: the stored number.
        seen: the products.
        where: the point, with its loss.
        loose: error that the operator itself may have.
    """
    record, which = case.record, case.which
    factor = _factor(case.measure, where)
    if factor is None:
        return _said(
            record, RecordVerdict.UNCHECKED, "it is no multiple of an eigenvalue: there is nothing to check it by"
        )
    stored = record.estimate
    sign = -1.0 if which is Which.SMALLEST else 1.0
    value = sign * stored.value
    near, far = (stored.lower, stored.upper) if sign > 0 else (-stored.upper, -stored.lower)
    if not all(map(math.isfinite, (value, near, stored.residual or 0.0))):
        return case.refused("value, residual or the end next to it are not finite: no measurement writes that")
    came = factor * (abs(seen.rayleigh) if which is Which.MAGNITUDE else sign * seen.rayleigh)
    residual, reach = factor * seen.residual, sign * factor * seen.proved(which)
    eps = torch.finfo(getattr(torch, record.settings["dtype"])).eps
    fine = factor * (seen.rounding + loose)
    width = far - near if math.isfinite(far - near) else (stored.residual or 0.0)
    scale = max(factor * seen.length, abs(value))
    coarse = max(ALLOWANCE * eps * scale, SHARE * width) + fine
    end = "lower" if sign < 0 else "upper"
    sampled = record.settings.get("sample") == "auto"
    told = f"the witness's Rayleigh quotient is {sign * came:.10g}"
    verdict = RecordVerdict.FALSE
    if came > far + fine:
        sentence = f"{told}, beyond the stored {end} end {sign * far:.10g}: the interval is proved wrong"
    elif came < near - coarse:
        sentence = (
            f"{told}, which does not reach the stored interval {interval(stored)}: the number was edited, or this is the "
            "witness of another one"
        )
    elif not sampled and abs(came - value) > coarse:
        sentence = f"{told}, and the stored value is {stored.value:.10g}: it was edited"
    elif stored.residual is not None and residual > stored.residual + coarse:
        sentence = (
            f"the witness's residual is {residual:.4g}, larger than the stored {stored.residual:.4g}: it was edited, or "
            "this is the witness of another number"
        )
    elif reach > far + fine:
        sentence = (
            f"two products prove that the number reaches {sign * reach:.10g}, beyond the stored {end} end "
            f"{sign * far:.10g}: the interval is proved wrong"
        )
    else:
        verdict = RecordVerdict.HOLDS
        rests = (
            f"the {end} end rests on the measurement's probability ({stored.confidence:.7g}), which two products cannot "
            "confirm"
            if math.isfinite(far)
            else f"nothing is claimed about the {end} end"
        )
        agrees = "in the interval" if sampled else "as stored"
        sentence = f"{told}, {agrees}, and a random vector contradicts nothing; {rests}"
    spread = factor * (seen.residual + seen.rounding + loose)
    return RecordCheck(
        measure=record.measure,
        geometry=record.geometry,
        verdict=verdict,
        sentence=sentence,
        stored=stored,
        value=sign * came,
        residual=residual,
        contains=(factor * seen.rayleigh - spread, factor * seen.rayleigh + spread),
        reach=sign * reach,
    )


def _factor(measure: Measure, where: Point) -> float | None:
    """Factor by which a measure multiplies its eigenvalue; None where it does something else with it."""

    def at(value: float) -> float:
        end = End(value, value, 0.0, 0.0, torch.empty(0))
        answer = Extremes(end, end, Which.LARGEST, True, 1.0, 0.0, 2, "")
        return measure.evaluate(Findings(where, (Outcome(answer, 2, 0.0),), Settings(), measure.options)).value

    one, two = at(1.0), at(2.0)
    return one if one > 0 and math.isclose(two, 2 * one, rel_tol=ALLOWANCE * torch.finfo(torch.float64).eps) else None
