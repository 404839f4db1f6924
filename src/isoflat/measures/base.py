"""Measures as records: each one with a formula, its claims, what it needs, and a pure evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar, TypeVar, final

from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.record import Point
from isoflat.core.rng import stream
from isoflat.curvature.matrix import Matrix
from isoflat.curvature.sweeps import Pass
from isoflat.geometry.base import Geometry, Invariance
from isoflat.linalg.operator import Pullback
from isoflat.linalg.solver import Outcome, PendingProduct, Solver, products_of
from isoflat.measures.point import EvaluationPoint
from isoflat.measures.settings import Settings
from isoflat.risk.moved import AtWeights

T = TypeVar("T")


class Direction(StrEnum):
    """Direction in which a number means a flatter minimum."""

    LOWER_IS_FLATTER = "lower is flatter"
    HIGHER_IS_FLATTER = "higher is flatter"


Steps = Generator[PendingProduct | Pass | AtWeights, Any, T]
"""Coroutine that yields requests, is sent what each of them gives, and returns an answer."""


@dataclass(frozen=True)
class Question(ABC):
    """Question that a measure asks about a point, and others may ask too: equal ones in one geometry are answered once.

    Attributes:
        framed: True where the answer depends on the geometry; else all geometries at a point share it.
    """

    framed: ClassVar[bool] = True

    def requires(self, point: EvaluationPoint) -> tuple[Question, ...]:
        """Questions whose answers this one is made of: none, unless a question says otherwise.

        Raises:
            UsageError: there is no answer for this loss, or with what was given.
            UnsupportedModel: nor for this network.
        """
        return ()

    @abstractmethod
    def steps(self, point: EvaluationPoint, *found: Any) -> Steps[Any]:
        """The answer as a coroutine of requests.

        Args:
            point: the point in weight space, in the geometry that is asked about.
            *found: the answers to what it requires, in order.

        Raises:
            UsageError: there is no answer for this loss, or with what was given.
            UnsupportedModel: nor for this network.
        """


Needs = Callable[[Settings, Mapping[str, float]], tuple[Question, ...]]
"""Function from the settings and the values of a measure's own parameters to the questions that it asks."""


@final
@dataclass(frozen=True)
class SolverQuery(Question):
    """One solver on `Eᵀ A E`, or on the covariant `Eᵀ (A + C) E`, E the geometry's frame.

    Attributes:
        solver: the solver, with all its hyper-parameters.
        covariant: whether C, the connection term of the metric, is added.
        matrix: the curvature matrix A.
    """

    solver: Solver[Any]
    covariant: bool = False
    matrix: Matrix = Matrix.HESSIAN

    def steps(self, point: EvaluationPoint, *found: Any) -> Steps[Any]:
        """The solver's requests for products."""
        plus = point.geometry.connection(point.state, point.survey.gradient) if self.covariant else None
        pulled = Pullback(point.operator(self.matrix), point.chart.frame, plus)
        return products_of(self.solver, pulled, stream(point.settings.seed, self.solver.label))


@dataclass(frozen=True)
class DataStatistic(Question):
    """Statistic that needs one pass over the data, or none where earlier answers are enough."""

    def sweep(self, point: EvaluationPoint, *found: Any) -> Pass | None:
        """Sum over the data that is asked for; None, unless a statistic says otherwise.

        Args:
            point: the point in weight space.
            *found: the answers to what it requires, in order.
        """
        return None

    @abstractmethod
    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> Any:
        """The answer.

        Args:
            point: the point in weight space.
            total: the sum that `sweep` asked for, float64; None where it asked for none.
            *found: the answers to what it requires, in order.
        """

    @final
    def steps(self, point: EvaluationPoint, *found: Any) -> Steps[Any]:
        """One request at most."""
        wanted = self.sweep(point, *found)
        total = None if wanted is None else (yield wanted)
        return self.finish(point, total, *found)


@final
@dataclass(frozen=True)
class Findings:
    """Everything a measure is evaluated from: the point, and the answers to its questions in order."""

    point: Point
    answers: tuple[Outcome, ...]
    settings: Settings
    options: Mapping[str, float]


@final
@dataclass(frozen=True)
class Measure:
    """One entry of the catalogue.

    Attributes:
        name: catalogue name.
        formula: LaTeX.
        definition: plain words.
        reference: BibTeX key and arXiv number.
        needs: the questions it asks, or a function that makes them.
        evaluate: the number from the findings.
        units: units of the number.
        direction: the direction in which the number means flatter.
        loss_degree: `measure(c · loss) = c**degree · measure(loss)`; None if it is no power.
        curvature: the size of the curvature that b is compared with, in the metric's unit; None where there is none.
        geometry: the only geometry it is defined in; None where the user chooses.
        claims: edits of the weights that it is invariant to, or a function that makes them from its own parameters; None
            for those of the geometry it is measured in.
        provisional: doubts about the definition; empty where there are none.
        options: its own parameters with their values.
        pitfalls: warnings for those who quote it.
        prior: whether it needs the weights before training.
        version: raised whenever its numbers change.
    """

    name: str
    formula: str
    definition: str
    reference: str
    needs: tuple[Question, ...] | Needs
    evaluate: Callable[[Findings], Estimate]
    units: str = "loss"
    direction: Direction = Direction.LOWER_IS_FLATTER
    loss_degree: float | None = 1
    curvature: Callable[[Findings], float] | None = None
    geometry: str | None = None
    claims: frozenset[Invariance] | Callable[[Mapping[str, float]], frozenset[Invariance]] | None = None
    provisional: str = ""
    options: Mapping[str, float] = field(default_factory=dict)
    pitfalls: str = ""
    prior: bool = False
    version: int = 1

    def with_options(self, **options: float) -> Measure:
        """The same measure with other values of its own parameters.

        Raises:
            UsageError: it has no such parameter.
        """
        unknown = set(options) - set(self.options)
        if unknown:
            known = ", ".join(self.options) or "none"
            raise UsageError(f"{self.name} has no option {', '.join(sorted(unknown))}; its options: {known}")
        return replace(self, options={**self.options, **options})

    def questions(self, settings: Settings) -> tuple[Question, ...]:
        """Questions that it asks.

        Raises:
            UsageError: one of its parameters must be given.
        """
        return self.needs(settings, self.options) if callable(self.needs) else self.needs

    @property
    def own_claims(self) -> frozenset[Invariance] | None:
        """Edits it is invariant to in any geometry, for these values of its own parameters; None where the geometry decides."""
        return self.claims(self.options) if callable(self.claims) else self.claims

    def claimed(self, geometry: Geometry) -> frozenset[Invariance]:
        """Edits it is invariant to, measured in a geometry."""
        return geometry.claims if self.own_claims is None else self.own_claims

    @property
    def label(self) -> str:
        """The name, with its options where it has any."""
        if not self.options:
            return self.name
        return f"{self.name}({', '.join(f'{key}={value:g}' for key, value in self.options.items())})"
