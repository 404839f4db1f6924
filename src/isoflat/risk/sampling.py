"""Samples of the data with known inclusion probabilities, and estimates of sums over all of it.

Of a trained classifier's examples few carry nearly all of the curvature, and which ones is known from the network's
outputs: an example enters the Hessian through `∂²ℓ/∂z²` and `∂ℓ/∂z` (`losses.importance`). So each is drawn with a chance
`π_i = min(1, c s_i)` in proportion to its importance s_i, those with π = 1 for certain, and counts `1/π_i` times: sums over
the sample are then unbiased for sums over the data (Horvitz and Thompson, JASA 47, 1952). Nothing that is stated depends
on the importance having been a good guess; only how much a sample tells does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.state import State
from isoflat.risk.batches import even
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.rows import derivative

EVEN = 0.02
"""Share of the draws that goes to all examples alike, so that no weight exceeds `rows / (EVEN · size)`."""


@final
@dataclass(frozen=True)
class Sample:
    """Sample of the rows of the data.

    Attributes:
        places: places of the rows in the data, ascending, shape `(m,)`.
        chances: inclusion probability of each, shape `(m,)`, float64; 1 for rows that are in it for certain.
    """

    places: Tensor
    chances: Tensor

    @property
    def size(self) -> int:
        """Number of rows m."""
        return len(self.places)

    @property
    def certain(self) -> int:
        """Number of rows that are in it for certain."""
        return int((self.chances == 1).sum())

    @property
    def drawn(self) -> Sample:
        """Sample of the rows that chance decided about."""
        open_ = self.chances < 1
        return Sample(self.places[open_], self.chances[open_])

    @staticmethod
    def of(chances: Tensor, stream: torch.Generator) -> Sample:
        """Draw without replacement with given inclusion probabilities, shape `(rows,)`: systematically, in a random order.

        >>> from isoflat.core.rng import stream
        >>> sample = Sample.of(torch.tensor([1.0, 0.5, 0.5, 0.0], dtype=torch.float64), stream(0))
        >>> len(sample.places), sample.places[0].item(), sample.chances.tolist()
        (2, 0, [1.0, 0.5])
        """
        order = torch.randperm(len(chances), generator=stream)
        reached = (chances[order].cumsum(0) - torch.rand((), generator=stream, dtype=torch.float64)).floor()
        hit = reached > torch.cat([reached.new_full((1,), -1.0), reached[:-1]])
        hit[chances[order] == 1] = True  # rounding in the sums must not lose one
        places = order[hit].sort().values
        return Sample(places, chances[places])

    def beyond(self, chances: Tensor) -> Sample:
        """Sample of all rows that are certain under other chances, and of the rest those drawn here, with their chances."""
        certain = (chances == 1).nonzero()[:, 0]
        others = chances[self.places] < 1
        places = torch.cat([certain, self.places[others]])
        own = torch.cat([torch.ones(len(certain), dtype=torch.float64), self.chances[others]])
        order = places.argsort()
        return Sample(places[order], own[order])

    def risk(self, risk: EmpiricalRisk, of: float, rows: int) -> EmpiricalRisk:
        """The risk as this sample has it: unbiased, and so are its derivatives.

        Args:
            risk: empirical risk of all the data.
            of: divisor of a mean over all the data.
            rows: number of rows of a batch.
        """
        rows = even(self.size, rows, risk.ranks.world)
        weights = (1 / self.chances).split(rows)
        return replace(risk, batches=risk.batches.only(self.places, rows).weighted(weights), of=of)

    def scatter(self, values: Tensor) -> tuple[float, float]:
        """Standard error of the total `Σ values/π`, and degrees of freedom of the estimate of its square.

        Hájek's (1964) approximation for samples of fixed size and high entropy. The degrees of freedom are Satterthwaite's:
        few, where few examples make most of it. What is certain does not scatter.

        Args:
            values: value of each row that was drawn, shape `(drawn.size,)`.
        """
        chances = self.drawn.chances
        left, y = 1 - chances, values.double().cpu() / chances
        count = len(y)
        if count < 2:
            return 0.0, 1.0
        squares = left * (y - (left * y).sum() / left.sum()) ** 2
        total = float(squares.sum())
        spread = float(((squares - squares.mean()) ** 2).sum())
        freedom = 2 * total**2 / spread if spread else float(count)
        return math.sqrt(total * count / (count - 1)), min(max(freedom, 1.0), count - 1.0)

    def forecast(self, values: Tensor, chances: Tensor) -> float:
        """The standard error that a sample with other chances would have, as this one sees it.

        Args:
            values: value of each row of this sample, shape `(m,)`.
            chances: inclusion probabilities of all rows, shape `(rows,)`.
        """
        q, others = values.double().cpu(), chances[self.places]
        left = (1 - others) / self.chances
        centre = float((left * q).sum() / (left * others).sum()) if bool((others < 1).any()) else 0.0
        return math.sqrt(float((left / others * (q - centre * others) ** 2).sum()))


def inclusion(scores: Tensor, size: float) -> Tensor:
    """Chances `min(1, c s_i)` that add up to a size, shape `(rows,)`, float64; a small part of it to all alike.

    Args:
        scores: importance of each row, not negative, shape `(rows,)`.
        size: expected size of the sample, at most the number of rows.

    >>> inclusion(torch.tensor([8.0, 1.0, 1.0, 0.0]), 2).mul(100).round().div(100).tolist()
    [1.0, 0.49, 0.49, 0.02]
    """
    scores = scores.double()
    total = float(scores.sum())
    shares = (1 - EVEN) * scores / total + EVEN / len(scores) if total > 0 else torch.full_like(scores, 1 / len(scores))
    certain = torch.zeros(len(shares), dtype=torch.bool)
    while True:
        left = size - int(certain.sum())
        chances = torch.where(certain, 1.0, shares * (left / float(shares[~certain].sum())) if left > 0 else 0.0)
        over = chances >= 1
        if torch.equal(over, certain) or bool(over.all()):
            return chances.clamp_(max=1.0)
        certain = over


def curvatures(risk: EmpiricalRisk, state: State, one: Tensor, other: Tensor) -> Tensor:
    """`dᵀ ∇²ℓ_i e` of each row's loss ℓ_i by two forward derivatives, shape `(rows,)`, on the CPU; no weight applied.

    Args:
        risk: empirical risk with a loss of output and target.
        state: weights and buffers.
        one: direction d, shape `(n,)`.
        other: direction e, shape `(n,)`.

    Raises:
        UnsupportedModel: an operation of the network has no forward derivative.
    """

    def per_batch(_: int, batch: Any) -> Tensor:
        return derivative(risk, state, batch, one, other).cpu()

    own = {index: rows for index, rows in enumerate(risk.own(per_batch)) if rows is not None}
    found = {index: rows for part in risk.ranks.gather(own) for index, rows in part.items()}
    return torch.cat([found[index] for index in sorted(found)])
