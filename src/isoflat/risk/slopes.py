"""Slopes and second differences of the user's own loss, beside the gradient and the products that numbers are made of.

On each batch, with totals T of the user's own model (`risk.own`) at θ, θ ± h v, θ ± h v/2 and θ ± h r,

    D = (T(h) − T(−h)) / 2h   against ⟨g, v⟩ and ⟨g, r⟩,      S = (T(h) − 2 T(0) + T(−h)) / h²   against ⟨v, H v⟩.

A comparison speaks only where rounding, curvature along the step and kinks leave room for it; else it is silent. What it
says against a network must hold at wider steps too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from isoflat.core.space import inner, norm
from isoflat.core.state import State
from isoflat.risk.batches import Batches
from isoflat.risk.empirical import EmpiricalRisk, differentiate, leaf_state
from isoflat.risk.own import AWAY, OwnModel, beside
from isoflat.risk.ranks import Ranks
from isoflat.risk.routes.base import joined

SLOPE = 0.05
"""Largest difference between a slope and the gradient, in units of the larger of `|⟨g, r⟩|` and `‖g‖ ‖r‖ / √n`."""

CURVATURE = 0.03
"""Largest relative difference between a second difference and a product, and between those of two steps."""

ROUNDINGS = 4000
"""Size of `h² |⟨v, H v⟩|` in roundings of the mean loss."""

SURE = 5
"""Number of times that a tolerance must exceed the rounding noise."""

STEADY = 0.002
"""Largest change of a slope from h to h/2, in units of h ⟨v, H v⟩, for second differences of a network with kinks."""

WIDER = {torch.float64: (10.0, 100.0), torch.float32: (3.0,)}
"""Factors of wider steps at which a disagreement must show as well, by precision."""

NARROWER = (1e-2, 1e-4)
"""Factors of smaller steps, as far as rounding leaves room for them."""

SHORT = 1e-2
"""Step of a difference of gradients that hardly any kink lies in, in units of h."""

EXPLAINED = 0.3
"""Share of a disagreement by which that difference may miss the product where kinks explain the disagreement."""

Product = Callable[[EmpiricalRisk, Tensor], Tensor]
"""A function that gives the product of the Hessian of a risk with a vector, shape `(n,)`, float64."""


@final
@dataclass(frozen=True)
class Directions:
    """Directions of unit length in the trainable entries, and the steps along them.

    Attributes:
        found: v, the direction of the number, or a random one; shape `(n,)`, float64.
        random: r, a random one over all trainable entries.
        step: h along v.
        far: h along r.
    """

    found: Tensor
    random: Tensor
    step: float
    far: float


class Disagreement(NamedTuple):
    """A difference between the user's own loss and the derivatives that numbers are made of.

    Attributes:
        kind: "gradient" or "curvature".
        along: direction, in words.
        batch: index of the batch.
        own: slope or curvature of the user's own loss.
        engine: the same by gradient or product.
        tensors: names of the tensors that contribute most.
    """

    kind: str
    along: str
    batch: int
    own: float
    engine: float
    tensors: tuple[str, ...]


class BatchVerdict(NamedTuple):
    """Outcome of the comparisons on one batch.

    Attributes:
        found: first disagreement; None where there is none.
        spoke: comparisons that could speak, of "v", "r" and "curvature".
    """

    found: Disagreement | None
    spoke: frozenset[str]


FOUND, RANDOM = "the direction that was found", "a random direction"


@final
@dataclass(frozen=True)
class Audit:
    """The user's own loss beside the engine's derivatives at one point.

    Attributes:
        own: the user's own model.
        risk: the empirical risk.
        product: products with the Hessian as the number has them; None where it has none.
    """

    own: OwnModel
    risk: EmpiricalRisk
    product: Product | None

    @property
    def state(self) -> State:
        """Weights in the precision of the comparison."""
        return self.own.state

    @property
    def eps(self) -> float:
        """Rounding of that precision."""
        return torch.finfo(self.state.dtype).eps

    def steps(self, curvature: float, loss: float) -> tuple[float, float]:
        """Steps along unit vectors: by curvature and loss along v, by the precision along r.

        Args:
            curvature: `⟨v, H v⟩`; 0 where it is not known.
            loss: the loss, in the same units.
        """
        size = norm(self.state.vector) or 1.0
        far = self.eps ** (1 / 3) * size
        rule = math.sqrt(ROUNDINGS * self.eps * abs(loss / curvature)) if curvature and loss else far
        return min(max(rule, 0.1 * self.eps**0.5 * size), self.eps**0.25 * size), far

    def curvature(self, batch: Any, direction: Tensor) -> float:
        """`⟨v, H v⟩` of a batch's summed loss, by the product."""
        assert self.product is not None
        return float(inner([direction], self.product(self._alone(batch), direction))[0])

    def compare(self, index: int, batch: Any, along: Directions, curved: bool = True) -> BatchVerdict:
        """All comparisons on one batch.

        Args:
            index: index of the batch.
            batch: the batch.
            along: directions and steps.
            curved: flag that second differences are compared too.
        """
        v, h = along.found, along.step
        t0 = self.own.total(batch)
        wide, near = self._ends(batch, v, h), self._ends(batch, v, h / 2)
        g = self.gradient(batch)
        # Third and fourth differences are rounding, but for what is left of the derivatives.
        third = abs(wide.odd - 2 * near.odd) * 2 / math.sqrt(10)
        fourth = abs(2 * wide.even - 8 * near.even + 6 * t0) / math.sqrt(70)
        noise = max(third, fourth, 2 * self.eps * abs(t0))
        if not all(map(math.isfinite, (t0, *wide, *near))):
            return BatchVerdict(None, frozenset())
        spoke = set()
        for name, direction, step, words in (("v", v, h, FOUND), ("r", along.random, along.far, RANDOM)):
            ends = wide if name == "v" else self._ends(batch, direction, step)
            wanted, allowed = float(inner([direction], g)[0]), self._allowed(direction, g)
            slope, doubt = ends.odd / step, SURE * noise / step
            if self.own.kinked:  # one-sided slopes may differ by a kink at the point itself
                doubt += abs(ends.even - t0) / step
            if name == "v":
                doubt += abs(slope - near.odd / (step / 2))
            if not math.isfinite(slope) or (doubt > allowed and abs(slope - wanted) <= allowed + doubt):
                continue
            if abs(slope - wanted) <= allowed + doubt:
                spoke.add(name)
            elif self._holds(batch, direction, step, slope, wanted, noise):
                blamed = self._blamed(batch, direction, step, g)
                return BatchVerdict(
                    Disagreement("gradient", words, index, slope, wanted, blamed), frozenset({*spoke, name})
                )
        if curved and self.product is not None and self._smooth():
            found = self._bent(index, batch, along, (t0, wide, near), noise)
            if found is not None:
                spoke.add("curvature")
                return BatchVerdict(found if isinstance(found, Disagreement) else None, frozenset(spoke))
        return BatchVerdict(None, frozenset(spoke))

    def gradient(self, batch: Any, state: State | None = None) -> Tensor:
        """Gradient of a batch's summed loss as numbers have it, shape `(n,)`, float64."""
        leaves = leaf_state(self.state if state is None else state)
        parameters = list(leaves.parameters.values())
        term = self.risk.term(leaves, batch)
        return joined(parameters, differentiate(term.total, parameters)).double()

    def _smooth(self) -> bool:
        """Flag that second differences can speak at all: not across kinks in float32."""
        return not self.own.kinked or self.state.dtype == torch.float64

    def _bent(
        self, index: int, batch: Any, along: Directions, seen: tuple[float, _Ends, _Ends], noise: float
    ) -> Disagreement | bool | None:
        """The second difference along v: a disagreement, False where there is none, None where it is silent."""
        v, h = along.found, along.step
        t0, wide, near = seen
        coarse, fine = 2 * (wide.even - t0) / h**2, 2 * (near.even - t0) / (h / 2) ** 2
        size = max(abs(coarse), abs(fine))
        if abs(coarse - fine) > CURVATURE * size or SURE * math.sqrt(6) * noise / h**2 > CURVATURE * size:
            return None
        bent = self.curvature(batch, v)
        scale = max(size, abs(bent))
        if self.own.kinked and abs(wide.odd / h - near.odd / (h / 2)) > STEADY * h * scale:
            return None
        if abs(coarse - bent) <= CURVATURE * scale + SURE * math.sqrt(6) * noise / h**2:
            return False
        again = self._ends(batch, v, 2 * h)
        wider = 2 * (again.even - t0) / (2 * h) ** 2
        if abs(wider - coarse) > CURVATURE * max(size, abs(wider)) or (
            self.own.kinked and self._kinks_explain(batch, v, h, coarse, bent)
        ):
            return None
        names = self._largest(norm(part) for part in self._parts(v))
        return Disagreement("curvature", FOUND, index, coarse, bent, names)

    def _kinks_explain(self, batch: Any, v: Tensor, h: float, second: float, bent: float) -> bool:
        """Test of whether gradients bend as the product says, over a step that hardly any kink lies in."""
        ahead, behind = (
            self.gradient(batch, self.state.replace(self._moved(v, sign * h * SHORT))) for sign in (1.0, -1.0)
        )
        quotient = float(inner([v], ahead - behind)[0]) / (2 * h * SHORT)
        return abs(quotient - bent) <= EXPLAINED * abs(second - bent)

    def _holds(self, batch: Any, direction: Tensor, step: float, slope: float, wanted: float, noise: float) -> bool:
        """Test of whether a slope that is not the gradient's is much the same at other steps, and another one beside the point.

        A step may be too wide where tensors are of very different sizes. At the point itself units may sit on their kinks,
        where a gradient is that of one side.
        """
        room = 0.5 * abs(slope - wanted)
        for factor in (*WIDER[self.state.dtype], *NARROWER):
            if SURE * noise > room * factor * step:
                continue
            if abs(self._ends(batch, direction, factor * step).odd / (factor * step) - slope) > room:
                return False
        if not self.own.kinked:
            return True
        near = self.state.replace(self.state.space.unflatten(beside(self.state, AWAY)))
        g, ends = self.gradient(batch, near), self._ends(batch, direction, step, near.vector)
        there, allowed = float(inner([direction], g)[0]), self._allowed(direction, g)
        doubt = abs(ends.even - self.own.total(batch, near.parameters)) / step
        return abs(ends.odd / step - there) > allowed + doubt

    def _allowed(self, direction: Tensor, gradient: Tensor) -> float:
        """Difference that a slope may have from the gradient's."""
        random = norm(gradient) / math.sqrt(len(gradient))
        return SLOPE * max(abs(float(inner([direction], gradient)[0])), random)

    def _blamed(self, batch: Any, direction: Tensor, step: float, gradient: Tensor) -> tuple[str, ...]:
        """Names of the tensors whose part of a direction contributes most to a disagreement."""
        off = []
        space = self.state.space
        for name in space.names:
            part = torch.zeros_like(direction)
            part[space.slices[name]] = direction[space.slices[name]]
            slope = self._ends(batch, part, step).odd / step
            off.append(abs(slope - float(inner([part], gradient)[0])))
        return self._largest(off)

    def _largest(self, sizes: Any) -> tuple[str, ...]:
        """Names of the tensors with the largest sizes: those within a tenth of the largest, five at most."""
        ranked = sorted(zip(sizes, self.state.space.names, strict=True), key=lambda pair: -pair[0])
        return tuple(name for size, name in ranked[:5] if size >= 0.1 * ranked[0][0])

    def _parts(self, vector: Tensor) -> Iterator[Tensor]:
        return iter(vector.split(self.state.space.sizes))

    def _ends(self, batch: Any, direction: Tensor, step: float, center: Tensor | None = None) -> _Ends:
        ahead, behind = (self.own.total(batch, self._moved(direction, sign * step, center)) for sign in (1.0, -1.0))
        return _Ends((ahead - behind) / 2, (ahead + behind) / 2)

    def _moved(self, direction: Tensor, step: float, center: Tensor | None = None) -> Mapping[str, Tensor]:
        start = self.state.vector if center is None else center
        return self.state.space.unflatten((start.double() + step * direction).to(self.state.dtype))

    def _alone(self, batch: Any) -> EmpiricalRisk:
        """The summed loss of one batch as a risk, on this process."""
        return replace(self.risk, batches=Batches(partial(iter, [batch]), volatile=False), ranks=Ranks(), of=1.0)


class _Ends(NamedTuple):
    """Totals at both ends of a step: half of their difference, and their mean."""

    odd: float
    even: float


def typical_sizes(state: State) -> Tensor:
    """Typical size of the entries of each tensor, spread over its entries, shape `(n,)`: a tensor moves in units of its norm.

    Far out on an orbit tensors have sizes that lie decades apart: a step that is short for one is long for another. Tensors
    of zeros have no size of their own: they get the smallest that another has.
    """
    space = state.space
    sizes = torch.tensor(space.sizes, dtype=torch.float64)
    typical = space.block_norms(state.vector).cpu().double() / sizes.clamp(min=1).sqrt()
    some = typical[typical > 0]
    least = some.min() if some.numel() else torch.tensor(1.0, dtype=torch.float64)
    return space.spread(torch.where(typical > 0, typical, least).to(state.device))


def held_rows(module: nn.Module, state: State) -> Tensor:
    """Zero for the entries that a module holds by intent, rows of padding of an embedding; one for the others: `(n,)`."""
    free = {name: torch.ones(tensor.shape, dtype=torch.float64) for name, tensor in state.parameters.items()}
    names = {id(tensor): name for name, tensor in module.named_parameters()}
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.padding_idx is not None:
            name = names.get(id(part.weight))
            if name in free:
                free[name][part.padding_idx] = 0
    return torch.cat([tensor.reshape(-1) for tensor in free.values()]).to(state.device)
