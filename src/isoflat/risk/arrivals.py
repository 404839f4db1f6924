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
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.rng import stream
from isoflat.core.space import ParameterSpace, largest
from isoflat.risk.own import OwnModel, typical

STEP = 1e-4
"""Relative step t."""

ROUNDINGS = 100
"""Roundings of a batch's loss that are no change of it."""

LIKE = 0.15
"""Relative distance from 2, or from 4, at which a ratio of two steps is taken for it."""


@final
@dataclass(frozen=True)
class Arrivals:
    """What became of tensors without a gradient when they were moved.

    Attributes:
        missing: names of those whose gradient never arrives.
        moving: names of the others that the loss changed with.
        still: names of those that it did not change with.
    """

    missing: tuple[str, ...] = ()
    moving: tuple[str, ...] = ()
    still: tuple[str, ...] = ()


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
        if any(look.slope or (look.bend and name in unused) for look in looks):
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

    @property
    def slope(self) -> bool:
        """Flag that the loss has a slope, which no kink explains."""
        kink = abs(self.even[0]) > self.noise and abs(self.even[0]) > LIKE * abs(self.odd[0]) and not self._doubles(4)
        return abs(self.odd[1]) > self.noise and self._doubles(2) and not kink

    @property
    def bend(self) -> bool:
        """Flag that the loss has a second derivative."""
        return abs(self.even[1]) > self.noise and self._doubles(4)

    def _doubles(self, ratio: int) -> bool:
        far, near = self.odd if ratio == 2 else self.even
        return abs(far - ratio * near) <= LIKE * abs(ratio * near)


def _look(own: OwnModel, batch: Any, names: Sequence[str]) -> _Look:
    direction = _direction(own.state.space, own.state.vector, names)
    term = own.term(batch)
    t0 = float(term.total.detach().double())
    odd, even = [], []
    for step in (STEP, STEP / 2):
        ahead, behind = (
            own.total(batch, own.state.space.unflatten(own.state.vector + sign * step * direction)) for sign in (1, -1)
        )
        odd.append((ahead - behind) / 2)
        even.append((ahead + behind) / 2 - t0)
    size = abs(t0) if term.z is None else max(abs(t0), largest(term.z.detach()))
    noise = ROUNDINGS * torch.finfo(own.state.dtype).eps * size
    return _Look((odd[0], odd[1]), (even[0], even[1]), noise)


def _direction(space: ParameterSpace, center: Tensor, names: Sequence[str]) -> Tensor:
    """Random numbers in the places of some tensors, of the size of each: shape `(n,)`."""
    direction = torch.zeros_like(center)
    scales = typical(space, center)
    for name in names:
        place = space.slices[name]
        drawn = torch.randn(
            place.stop - place.start, generator=stream(0, "arrivals", name), dtype=torch.float64
        )
        direction[place] = (scales[place] * drawn.to(center.device)).to(center.dtype)
    return direction
