"""Proof of a group on the real network: outputs before and after a random element; and, where they differ, what moved them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from isoflat.core.errors import NondeterministicRisk, NonFinite, SymmetryViolated
from isoflat.core.render import some
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.symmetry.groups.base import Symmetry

TOLERANCE = 1e-9
"""Relative change of outputs in float64 up to which a symmetry counts as proved."""

SINGLE_TOLERANCE = 1e-4
"""The same in float32, for networks that run in nothing wider: still far below what a wrong rule changes."""

SHARES = (1.0, 0.1, 0.01)
"""Shares of a random element that are tried: what a wrong rule changes shrinks with it; what rounding does, far out on an
orbit, faster."""

Output = Callable[[State], Tensor]
"""A network's output as one float64 vector, as a function of its tensors."""


@final
@dataclass(frozen=True)
class Part:
    """One group of those that an element is made of.

    Attributes:
        kind: what it does, in words.
        symmetry: the group.
    """

    kind: str
    symmetry: Symmetry


@final
@dataclass(frozen=True)
class Proof:
    """Groups, applied one after the other, that are claimed to keep a network's output.

    Attributes:
        group: name of the whole, in words.
        parts: the groups in their order.
        start: where they are applied.
        output: the network's output.
    """

    group: str
    parts: Sequence[Part]
    start: State
    output: Output

    @property
    def allowed(self) -> float:
        """Relative change of outputs up to which the groups count as proved, in the precision of the start."""
        return TOLERANCE if self.start.dtype == torch.float64 else SINGLE_TOLERANCE

    def worst(self, draw: Callable[[torch.Generator, float], Sequence[Tensor]], how: tuple[float, int, int]) -> float:
        """Largest relative change of the outputs under random elements.

        Args:
            draw: a random element of each part, from randomness and spread.
            how: spread, number of elements and seed.

        Raises:
            SymmetryViolated: an output changed by more than the tolerance.
            NondeterministicRisk: outputs differ where nothing was moved.
            NonFinite: no output is a number.
        """
        spread, samples, seed = how
        before = self.before()
        worst = 0.0
        for attempt in range(samples):
            change, element = math.inf, tuple[Tensor, ...]()
            for share in SHARES:
                element = tuple(draw(stream(seed, "verify", self.group, attempt), share * spread))
                change = self.change(before, element)
                if change <= self.allowed:
                    break
            worst = max(worst, change)
            if not change <= self.allowed:
                raise self._violated(before, element, change)
        return worst

    def before(self) -> Tensor:
        """The outputs where nothing is moved.

        Raises:
            NonFinite: no output is a number.
        """
        before = self.output(self.start)
        if before.numel() and not bool(torch.isfinite(before).any()):
            raise NonFinite(
                "no output of the network is a finite number on the example, so that its symmetries cannot be proved: look "
                "for NaN in the inputs and for rows of attention that are masked whole, or give another example"
            )
        return before

    def change(self, before: Tensor, element: Sequence[Tensor]) -> float:
        """Relative change of the outputs that an element makes."""
        return changed(before, self.output(self._moved(element)))

    def _moved(self, element: Sequence[Tensor]) -> State:
        state = self.start
        for part, coordinates in zip(self.parts, element, strict=True):
            state = part.symmetry.act(state, coordinates)
        return state

    def _violated(self, before: Tensor, element: Sequence[Tensor], change: float) -> Exception:
        """The error that names what changed the outputs."""
        if (again := changed(before, self.output(self.start))) > self.allowed:
            return NondeterministicRisk(
                f"the network's output is random: two passes over the same inputs with the same weights differ by {again:.2e} of "
                "its size, so that no symmetry can be proved. Call model.eval(), and draw noise outside the network"
            )
        where = self._culprit(before, element)
        if not math.isfinite(change):
            return SymmetryViolated(
                f"the symmetries found ({self.group}) change the network's output to NaN or infinity: {where}. A number in "
                "the network, such as a mask's, leaves no room for others there, or the weights lie far out on their "
                "orbit; geometry='layerwise' needs no symmetries"
            )
        return SymmetryViolated(
            f"the symmetries found ({self.group}) change the network's output by {change:.2e} of its size "
            f"(allowed: {self.allowed:g}): {where}. A rule for one of its operations is wrong, its forward pass depends "
            "on the values of its weights, or they lie so far out on their orbit that rounding decides; measure "
            "isoflat.canonicalize's copy of a network that was reparametrised, and report the others"
        )

    def _culprit(self, before: Tensor, element: Sequence[Tensor]) -> str:
        """The one coordinate of the one group that changes the outputs most, in words."""
        still = [torch.zeros_like(part) for part in element]

        def alone(place: int, coordinates: Tensor) -> float:
            found = self.change(before, [*still[:place], coordinates, *still[place + 1 :]])
            return found if math.isfinite(found) else math.inf

        alones = [alone(place, part) for place, part in enumerate(element)]
        place = max(range(len(alones)), key=alones.__getitem__)
        if not alones[place] > self.allowed:
            return "no group of them does so alone"
        single = _bisected(element[place], lambda coordinates: alone(place, coordinates), self.allowed)
        moved = self._moved([*still[:place], single, *still[place + 1 :]])
        names = [name for name, tensor in moved.tensors.items() if not _same(tensor, self.start.tensors[name])]
        return f"a {self.parts[place].kind} of {some(names)}" if names else f"a {self.parts[place].kind}"


def changed(before: Tensor, after: Tensor) -> float:
    """Largest change relative to the largest output; infinite where what is no number becomes one, or the other way round."""
    known = torch.isfinite(before)
    if not bool(known.all()):
        odd, now = before[~known], after[~known]
        if not bool(((odd == now) | (odd.isnan() & now.isnan())).all()):
            return math.inf
        before, after = before[known], after[known]
    if not before.numel():
        return 0.0
    change = float((after - before).abs().max()) / (float(before.abs().max()) or 1.0)
    return change if math.isfinite(change) else math.inf


def _bisected(element: Tensor, change: Callable[[Tensor], float], allowed: float) -> Tensor:
    """The element with one coordinate left, among those that change the outputs."""
    places = torch.nonzero(element).reshape(-1)
    while len(places) > 1:
        halves = places.tensor_split(2)
        sizes = [change(_only(element, half)) for half in halves]
        if not max(sizes) > allowed:  # they do so together only
            break
        places = halves[0] if sizes[0] >= sizes[1] else halves[1]
    return _only(element, places)


def _only(element: Tensor, places: Tensor) -> Tensor:
    made = torch.zeros_like(element)
    made[places] = element[places]
    return made


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)
