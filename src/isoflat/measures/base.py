"""What a measure is: a record with a formula, its claims, what it needs, and a pure evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.record import Point
from isoflat.core.state import State
from isoflat.curvature.matrix import Matrix
from isoflat.curvature.sweeps import Pass
from isoflat.geometry.base import Chart, Geometry, Invariance
from isoflat.linalg.solver import Outcome, Solver
from isoflat.risk.empirical import EmpiricalRisk, Survey
from isoflat.risk.linearise import ProductCheck


class Direction(StrEnum):
    """Which way a number points."""

    LOWER_IS_FLATTER = "lower is flatter"
    HIGHER_IS_FLATTER = "higher is flatter"


@final
@dataclass(frozen=True)
class Budget:
    """Limits that stop a measurement with a wider enclosure.

    Attributes:
        products: Hessian-vector products per eigenvalue.
        seconds: wall-clock time per eigenvalue; None for no limit.
        memory: bytes that products may take, beyond weights and the solvers' vectors; None for half of what is free.
    """

    products: int = 300
    seconds: float | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        """Refuse budgets too small for any answer."""
        if self.products < 2:
            raise UsageError(f"a budget needs at least 2 products (one to look, one to verify), got {self.products}")
        if self.seconds is not None and not self.seconds > 0:
            raise UsageError(f"a budget of seconds must be positive, got {self.seconds}")


@final
@dataclass(frozen=True)
class Settings:
    """How hard to measure.

    Attributes:
        rtol: relative width of an enclosure to reach.
        confidence: probability that an interval holds; None for 1 − 1e-6 (eigenvalues) and 0.95 (traces).
        certify: False for values with a true residual but no enclosure, at a lower cost.
        probes: random probes of stochastic estimates.
        budget: limits.
        seed: of all random streams.
        check: what happens where products disagree with differences of gradients.
        inside: precision that products may use inside, accumulated in float64; never in a certificate.
        sample: "auto" where a sample of the data may answer, with an interval for what was left out; None for all of it.
    """

    rtol: float = 1e-3
    confidence: float | None = None
    certify: bool = True
    probes: int = 64
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    check: ProductCheck = ProductCheck.REFUSE
    inside: torch.dtype | None = None
    sample: str | None = None

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        if self.inside is not None and self.certify:
            raise UsageError(
                f"{str(self.inside).removeprefix('torch.')} may be used inside products, but never in a certificate: pass "
                "certify=False, or dtype='float32'"
            )
        if self.sample not in (None, "auto"):
            raise UsageError(f"sample must be 'auto', or None for all the data, got {self.sample!r}")
        if self.sample and not self.certify:
            raise UsageError("sample='auto' gives an interval, which certify=False does without: drop one of the two")
        if not 0 < self.rtol < 1:
            raise UsageError(f"rtol must lie between 0 and 1, got {self.rtol}")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise UsageError(f"confidence must lie strictly between 0 and 1, got {self.confidence}")
        if self.probes < 2:
            raise UsageError(f"a standard error needs at least 2 probes, got {self.probes}")


@final
@dataclass(frozen=True)
class SolverQuery:
    """One solver on `Eᵀ A E`, or on the covariant `Eᵀ (A + C) E`, E the geometry's frame.

    Attributes:
        solver: with all its hyper-parameters.
        covariant: whether the connection term of the metric is added.
        matrix: A.
    """

    solver: Solver[Any]
    covariant: bool = False
    matrix: Matrix = Matrix.HESSIAN


@dataclass(frozen=True)
class DataStatistic(ABC):
    """What passes over the data tell without a solver.

    Attributes:
        framed: whether the answer depends on the geometry; if not, all geometries at a point share it.
    """

    framed: ClassVar[bool] = True

    @abstractmethod
    def answer(self, scene: Scene) -> Any:
        """The answer; or a coroutine, which yields other readings and passes over the data and is sent what they give.

        Raises:
            UsageError: there is no such thing for this loss, or with what was given.
            UnsupportedModel: nor for this network.
        """


@final
@dataclass(frozen=True)
class Scene:
    """Where a reading takes place.

    Attributes:
        risk: the empirical risk, its data pinned.
        geometry: in which is measured.
        chart: of the geometry at the point.
        survey: loss and gradient there.
        settings: how hard.
        report: called with a status line at each pass over the data.
        initial: the weights before training, as they were given: shape `(n,)`, float64, in the order of the user's own
            trainable tensors, which are those of `state` in the Euclidean geometry; None where there are none.
    """

    risk: EmpiricalRisk
    geometry: Geometry
    chart: Chart
    survey: Survey
    settings: Settings
    report: Callable[[str], None]
    initial: Tensor | None = None

    @property
    def state(self) -> State:
        """The point."""
        return self.chart.state


Question = SolverQuery | DataStatistic
"""What several measures may share: equal questions in one geometry are asked once."""

T = TypeVar("T")

Asking = Generator[DataStatistic | Pass, Any, T]
"""An answer under way: a reading or a pass over the data is yielded, and what it gives is sent."""


@final
@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        risk: the empirical risk.
        state: the point, in the precision of the products.
        notes: what was found while preparing it.
        initial: the trainable tensors before training, shape `(n,)`, float64; None where they are not known.
    """

    risk: EmpiricalRisk
    state: State
    notes: tuple[str, ...] = ()
    initial: Tensor | None = None


@final
@dataclass(frozen=True)
class Findings:
    """What a measure evaluates: the point, and the answers to its questions in order."""

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
        units: of the number.
        direction: which way it points.
        loss_degree: `measure(c · loss) = c**degree · measure(loss)`; None if it is no power.
        needs: the questions it asks, given the settings and the values of its own parameters.
        evaluate: the number from the findings.
        curvature: the size of the curvature that b is compared with, in the metric's unit; None where there is none.
        geometry: the only geometry it is defined in; None where the user chooses.
        claims: what it is invariant to, or a function of its parameters that says so; None for what the geometry is that
            it is measured in.
        provisional: what is uncertain about the definition; empty where nothing is.
        options: its own parameters with their values.
        pitfalls: what to know before quoting it.
        prior: whether it asks for the weights before training.
        version: raised whenever its numbers change.
    """

    name: str
    formula: str
    definition: str
    reference: str
    units: str
    direction: Direction
    loss_degree: float | None
    needs: Callable[[Settings, Mapping[str, float]], tuple[Question, ...]]
    evaluate: Callable[[Findings], Estimate]
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
        """What it asks.

        Raises:
            UsageError: one of its parameters must be given.
        """
        return self.needs(settings, self.options)

    @property
    def own(self) -> frozenset[Invariance] | None:
        """What it is invariant to in any geometry, with these values of its parameters; None where that decides."""
        return self.claims(self.options) if callable(self.claims) else self.claims

    def claimed(self, geometry: Geometry) -> frozenset[Invariance]:
        """What it is invariant to, measured in a geometry."""
        return geometry.claims if self.own is None else self.own

    @property
    def label(self) -> str:
        """The name, with its options where it has any."""
        if not self.options:
            return self.name
        return f"{self.name}({', '.join(f'{key}={value:g}' for key, value in self.options.items())})"
