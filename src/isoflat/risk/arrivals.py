"""Gradients that never arrive: tensors that the loss depends on, though autograd says that it does not.

A block that recomputes itself in a backward of its own, an adjoint solver or a forward without gradients gives its weights
no gradient, and no curvature. Here such tensors are moved on the user's own model by random relative steps t and t/2. With
the halves of sum and difference of both ends,

    O(t) = (T(t) − T(−t)) / 2,        E(t) = (T(t) + T(−t)) / 2 − T(0),

a slope shows as `O(t) ≈ 2 O(t/2)`. A unit that is dead, or a partner that is zero, shows none; a kink at the point itself
shows as `E(t) ≈ 2 E(t/2)`, and is no slope.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import UnsupportedModel
from isoflat.core.render import some
from isoflat.core.rng import stream
from isoflat.core.space import ParameterSpace, largest
from isoflat.core.state import State
from isoflat.risk.empirical import EmpiricalRisk, Survey
from isoflat.risk.linearise import ProductCheck
from isoflat.risk.own import AWAY, OwnModel, beside, own_model, typical
from isoflat.risk.ranks import Ranks
from isoflat.risk.routes.base import gradient

STEP = {torch.float64: 1e-4, torch.float32: 3e-3}
"""Relative step t, by precision."""

ROUNDINGS = 100
"""Roundings of a batch's loss that are no change of it."""

LIKE = 0.15
"""Relative distance from 2, or from 4, at which a ratio of two steps is taken for it."""

EVEN = 0.02
"""Largest E(t), in units of O(t), that leaves a slope a slope though it does not fall like a second derivative's."""

TIMES = 3
"""Random directions along which a slope must show: on a kink, E(t) may cancel along one of them."""


@final
@dataclass(frozen=True)
class Arrivals:
    """Outcome of moving the tensors that have no gradient.

    Attributes:
        missing: names of those whose gradient never arrives.
        moving: names of the others that the loss changed with.
        still: names of those that it did not change with.
    """

    missing: tuple[str, ...] = ()
    moving: tuple[str, ...] = ()
    still: tuple[str, ...] = ()


def without_gradient(risk: EmpiricalRisk, state: State, seen: Survey, check: ProductCheck) -> tuple[Survey, str]:
    """The survey whose unused tensors are those that the loss was seen not to depend on, and a note.

    Args:
        risk: the empirical risk.
        state: the point of the survey.
        seen: the survey.
        check: reaction to gradients that never arrive.

    Raises:
        UnsupportedModel: the loss changes with tensors that no gradient arrives at.
    """
    if not len(seen.gradient):
        return seen, ""
    blocks = state.space.block_norms(seen.gradient)
    silent = tuple(name for name, size in zip(state.space.names, blocks.tolist(), strict=True) if size == 0)
    if not silent:
        return seen, ""
    unknown = replace(seen, unused=())
    if check is ProductCheck.SKIP:
        return unknown, f"no gradient arrives at: {some(seen.unused)}" if seen.unused else ""
    with risk.ranks.agreeing():
        found, failed = _moved(risk, state, silent, seen.unused)
    parts = risk.ranks.gather((found, failed))
    missing = [name for name in silent if any(name in part.missing for part, _ in parts)]
    moving = [name for name in silent if any(name in part.moving for part, _ in parts)]
    if missing:
        words = (
            f"gradients never arrive at {some(missing)}: the loss changes when they are moved, and autograd says that it "
            "does not (a block that recomputes itself in a backward of its own, an adjoint solver, no_grad, .data, weights "
            "kept in a plain attribute)"
        )
        if check is ProductCheck.REFUSE:
            raise UnsupportedModel(
                f"{words}. Let autograd see them (torch.utils.checkpoint for recomputation, modules for weights)"
            )
        return replace(seen, unused=tuple(name for name in seen.unused if name not in missing)), words
    why = next((why for _, why in parts if why), "")
    if why:
        return unknown, f"no gradient arrives at: {some(silent)}; whether the loss depends on them is not known ({why})"
    return replace(seen, unused=tuple(name for name in seen.unused if name not in moving)), ""


def _moved(risk: EmpiricalRisk, state: State, silent: Sequence[str], unused: Sequence[str]) -> tuple[Arrivals, str]:
    """Statement of this process's batches about tensors without a gradient, or why they make none."""
    batches = [batch for index, batch in enumerate(risk.batches) if risk.ranks.owns(index)]
    if not batches:
        return Arrivals(), ""
    own, failed = own_model(risk, state, batches[0])
    if own is None:
        return Arrivals(), failed
    found = arrivals(own, batches, silent, unused)
    kinked = _arriving(risk, state, batches) & {*found.missing} if found.missing else frozenset[str]()
    missing = tuple(name for name in found.missing if name not in kinked)
    return replace(found, missing=missing, moving=(*found.moving, *kinked)), ""


def _arriving(risk: EmpiricalRisk, state: State, batches: Sequence[Any]) -> frozenset[str]:
    """Names of tensors that a gradient arrives at beside the point: at the point itself units may sit on their kinks."""
    near = state.replace(state.space.unflatten(beside(state, AWAY)))
    found: set[str] = set()
    for batch in batches:
        total = gradient(replace(risk, ranks=Ranks()), near, batch).total
        sizes = state.space.block_norms(total).tolist()
        found |= {name for name, size in zip(state.space.names, sizes, strict=True) if size > 0}
    return frozenset(found)


def arrivals(own: OwnModel, batches: Sequence[Any], silent: Sequence[str], unused: Sequence[str]) -> Arrivals:
    """Move tensors without a gradient, all at once, then each by itself where the loss changes.

    Args:
        own: the user's own model.
        batches: batches of the data.
        silent: names of tensors whose gradient is zero on all the data.
        unused: those of them to which no gradient came, because there is no path to them.
    """
    if not batches or not any(_look(own, batch, silent).changed for batch in batches):
        return Arrivals(still=tuple(silent))
    missing, moving, still = [], [], []
    for name in silent:
        looks = [_look(own, batch, [name]) for batch in batches]
        pathless = name in unused
        shown = next((batch for batch, look in zip(batches, looks, strict=True) if look.shows(pathless)), None)
        if shown is not None and all(_look(own, shown, [name], k).shows(pathless) for k in range(1, TIMES)):
            missing.append(name)
        else:
            (moving if any(look.changed for look in looks) else still).append(name)
    return Arrivals(tuple(missing), tuple(moving), tuple(still))


@final
@dataclass(frozen=True)
class _Look:
    """Changes of a batch's loss with a step and half of it.

    Attributes:
        odd: O(t), O(t/2).
        even: E(t), E(t/2).
        noise: what rounding may change.
    """

    odd: tuple[float, float]
    even: tuple[float, float]
    noise: float

    @property
    def changed(self) -> bool:
        """Flag that the loss is another at one of the four ends."""
        return max(map(abs, (*self.odd, *self.even))) > self.noise

    def shows(self, pathless: bool) -> bool:
        """Test of whether the loss depends on what was moved in a way that a gradient would show.

        Args:
            pathless: flag that autograd knows no path to it, so that a second derivative is enough.
        """
        kink = abs(self.even[0]) > max(self.noise, EVEN * abs(self.odd[0])) and not self._doubles(4)
        slope = abs(self.odd[1]) > self.noise and self._doubles(2) and not kink
        return slope or (pathless and abs(self.even[1]) > self.noise and self._doubles(4))

    def _doubles(self, ratio: int) -> bool:
        far, near = self.odd if ratio == 2 else self.even
        return abs(far - ratio * near) <= LIKE * abs(ratio * near)


def _look(own: OwnModel, batch: Any, names: Sequence[str], k: int = 0) -> _Look:
    """The loss of a batch, where tensors are moved along the k-th of their random directions."""
    direction = _direction(own.state.space, own.state.vector, names, k)
    term = own.term(batch)
    t0 = float(term.total.detach().double())
    odd, even = [], []
    for step in (STEP[own.state.dtype], STEP[own.state.dtype] / 2):
        ahead, behind = (
            own.total(batch, own.state.space.unflatten(own.state.vector + sign * step * direction)) for sign in (1, -1)
        )
        odd.append((ahead - behind) / 2)
        even.append((ahead + behind) / 2 - t0)
    size = abs(t0) if term.z is None else max(abs(t0), largest(term.z.detach()))
    noise = ROUNDINGS * torch.finfo(own.state.dtype).eps * size
    return _Look((odd[0], odd[1]), (even[0], even[1]), noise)


def _direction(space: ParameterSpace, center: Tensor, names: Sequence[str], k: int) -> Tensor:
    """Random numbers in the places of some tensors, of the size of each: shape `(n,)`."""
    direction = torch.zeros_like(center)
    scales = typical(space, center)
    for name in names:
        place = space.slices[name]
        drawn = torch.randn(place.stop - place.start, generator=stream(0, "arrivals", name, k), dtype=torch.float64)
        direction[place] = (scales[place] * drawn.to(center.device)).to(center.dtype)
    return direction
