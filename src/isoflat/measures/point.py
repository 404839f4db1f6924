"""The point in weight space at which measures are evaluated: weights, geometries, data, and products with its matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import final

from torch import Tensor

from isoflat.core.errors import IsoflatError, UnsupportedModel, UsageError
from isoflat.core.state import State
from isoflat.curvature.matrix import Curvature, Matrix
from isoflat.geometry.base import Chart, Geometry
from isoflat.linalg.operator import Operator, Sum
from isoflat.measures.settings import Settings
from isoflat.risk.batches import even
from isoflat.risk.empirical import EmpiricalRisk, Survey
from isoflat.risk.linearise import linearise
from isoflat.risk.plan import ProductPlan, available_memory, by_hardness, plan
from isoflat.risk.routes.base import Linearisation
from isoflat.risk.routes.guarded import Guarded
from isoflat.risk.routes.reverse import Recomputed
from isoflat.risk.sampling import Sample

NOT_APPLICABLE = (UsageError, UnsupportedModel)
"""Errors that a measure raises where it does not apply; the others are measured nevertheless."""


@final
@dataclass(frozen=True)
class MatrixProducts:
    """Products with one curvature matrix at a point.

    Attributes:
        plan: the plan of the products.
        parts: products with each part of the data.
        costs: cost of each part, where there are several.
    """

    plan: ProductPlan
    parts: tuple[Guarded, ...]
    costs: tuple[float, ...]

    @cached_property
    def operator(self) -> Operator:
        """The matrix, always the same object: a sum where the data is in parts."""
        terms = tuple(Curvature(part) for part in self.parts)
        return terms[0] if len(terms) == 1 else Sum(terms, self.costs)

    @property
    def halvings(self) -> int:
        """Number of times that memory ran out."""
        return sum(part.grain.halvings for part in self.parts)

    @property
    def rows(self) -> int:
        """Number of rows that are differentiated at a time."""
        return min(part.grain.rows for part in self.parts)


@final
@dataclass(frozen=True)
class EvaluationPoint:
    """A point in weight space, in one geometry, with everything that measures evaluate.

    Geometries that measure at the same weights share one point; `within` gives it in another of them.

    Attributes:
        state: the weights, in the precision of the products.
        charts: the chart of each geometry that measures here.
        geometry: the geometry that is asked about, one of them.
        risk: the empirical risk, its data pinned.
        survey: loss and gradient.
        settings: the settings of the measurement.
        report: called with a status line at each pass over the data.
        initial: the weights before training, as they were given: shape `(n,)`, float64, in the order of the user's own
            trainable tensors, which are those of `state` in the Euclidean geometry; None where there are none.
        route: the way in which products with the Hessian are made.
        products: products with each matrix that is asked about.
        refused: for each matrix without products, the reason.
    """

    state: State
    charts: Mapping[Geometry, Chart]
    geometry: Geometry
    risk: EmpiricalRisk
    survey: Survey
    settings: Settings
    report: Callable[[str], None]
    initial: Tensor | None = None
    route: type[Linearisation] = Recomputed
    products: Mapping[Matrix, MatrixProducts] = field(default_factory=dict)
    refused: Mapping[Matrix, IsoflatError] = field(default_factory=dict)

    @property
    def chart(self) -> Chart:
        """The chart of the geometry that is asked about."""
        return self.charts[self.geometry]

    def within(self, geometry: Geometry) -> EvaluationPoint:
        """The same point in another of its geometries."""
        return replace(self, geometry=geometry)

    def operator(self, matrix: Matrix) -> Operator:
        """A curvature matrix as an operator.

        Raises:
            UsageError: there are no products with it, for this loss.
            UnsupportedModel: nor for this network.
        """
        if matrix in self.refused:
            raise self.refused[matrix]
        return self.products[matrix].operator

    def on(self, sample: Sample, rows: int) -> EvaluationPoint:
        """The same point on a sample of its data, weighted to be unbiased for all of it; of the survey, only the rows change.

        Args:
            sample: the rows that were drawn.
            rows: rows of a batch.
        """
        seen = replace(self.survey, rows=sample.size, hardness=None)
        return replace(self, risk=sample.risk(self.risk, self.survey.count, rows), survey=seen)

    def with_products(self, matrices: Sequence[Matrix]) -> EvaluationPoint:
        """The same point with products planned; a matrix of which there are none is refused when it is asked for.

        Args:
            matrices: the matrices that will be asked about.
        """
        risk, state, seen = self.risk, self.state, self.survey
        budget = self.settings.budget.memory
        memory = risk.ranks.share(available_memory(state.device), state.device) // 2 if budget is None else budget
        inside = replace(risk, network=replace(risk.network, inside=self.settings.inside))
        batches = len(seen.digests)
        own = -(-seen.rows * risk.ranks.most(batches) // batches)
        made: dict[Matrix, MatrixProducts] = {}
        refused: dict[Matrix, IsoflatError] = {}
        for matrix in matrices:
            try:
                with risk.ranks.agreeing():
                    whole, graph = matrix.over(inside, state)
            except NOT_APPLICABLE as error:
                refused[matrix] = error
                continue
            way = self.route if matrix is Matrix.HESSIAN else Recomputed
            with risk.ranks.agreeing() as facts:
                planned = plan(whole, state, way, own, memory // len(matrices), graph)
                facts["plan of products"] = str(planned)
            self.report(str(planned))
            parts = _parts(whole, seen, planned)
            costs = tuple(float(len(part)) for part in by_hardness(seen.hardness))
            made[matrix] = MatrixProducts(planned, tuple(linearise(part, state, planned) for part in parts), costs)
        return replace(self, products=made, refused=refused)


def _parts(risk: EmpiricalRisk, seen: Survey, planned: ProductPlan) -> list[EmpiricalRisk]:
    """The risk as a sum of parts, those with the hardest examples first; the whole where that does not pay."""
    places = by_hardness(seen.hardness) if planned.divisible else ()
    if not places:
        return [risk]
    return [
        replace(risk, batches=risk.batches.only(part, even(len(part), planned.rows, risk.ranks.world)), of=seen.count)
        for part in places
    ]
