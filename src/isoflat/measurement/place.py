"""A point with what the data says about it, and products with the matrices that are asked about there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from isoflat.core.errors import IsoflatError
from isoflat.curvature.matrix import Curvature, Matrix
from isoflat.linalg.operator import Operator, Sum
from isoflat.risk.empirical import EmpiricalRisk, Survey
from isoflat.risk.plan import ProductPlan
from isoflat.risk.routes.guarded import Guarded


@final
@dataclass(frozen=True)
class Products:
    """Products with one matrix at a point.

    Attributes:
        plan: how they were planned.
        parts: by parts of the data.
        costs: of the parts, where there are several.
    """

    plan: ProductPlan
    parts: tuple[Guarded, ...]
    costs: tuple[float, ...]

    @property
    def operator(self) -> Operator:
        """The matrix: a sum where the data is in parts."""
        terms = tuple(Curvature(part) for part in self.parts)
        return terms[0] if len(terms) == 1 else Sum(terms, self.costs)

    @property
    def halvings(self) -> int:
        """How often memory ran out."""
        return sum(part.grain.halvings for part in self.parts)

    @property
    def rows(self) -> int:
        """How many are differentiated at a time."""
        return min(part.grain.rows for part in self.parts)


@final
@dataclass(frozen=True)
class Place:
    """A point with what the data says about it.

    Attributes:
        risk: of the data, pinned.
        survey: loss and gradient.
        products: with each matrix that is asked about.
        refused: those of which there are none, and why.
    """

    risk: EmpiricalRisk
    survey: Survey
    products: Mapping[Matrix, Products]
    refused: Mapping[Matrix, IsoflatError]

    @property
    def hessian(self) -> Operator:
        """As an operator."""
        return self.products[Matrix.HESSIAN].operator
