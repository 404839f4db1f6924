"""The user's own model as an evaluator that shares nothing with the products: a copy, called as it is written.

Products go through a functional call in which tensors stand in for the module's own, checkpoints are left out, batches may
be cut and operations are differentiated by rules of ours. Here the module is copied, values are written into the copy's own
parameters, and loss and model are called plainly. What the two disagree in is a defect of either.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from isoflat.core.precision import unrounded
from isoflat.core.raised import first_line, is_out_of_memory
from isoflat.core.rng import stream
from isoflat.core.space import ParameterSpace, norm
from isoflat.core.state import State
from isoflat.modules.caches import Cache, emptied
from isoflat.modules.private import own_precision
from isoflat.risk.batches import alone, move
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.kinks import Kinks
from isoflat.risk.losses import Loss, Term
from isoflat.risk.network import compiled
from isoflat.risk.rebound import rebound

SAME = 1000
"""Roundings within which two evaluations at the same weights agree."""

AWAY = 1e-3
"""Relative distance from a point at which units do not sit on their kinks."""

NARROW = 1e-2
"""Relative change of the loss beyond which casts inside a network do more than round."""


@final
@dataclass(frozen=True)
class OwnModel:
    """A copy of the user's model at weights that are written into it, with the user's loss.

    Attributes:
        pristine: copy that is never run.
        given: loss as the user gave it; where it reaches for the user's model by itself, it reaches for that copy.
        model: copy that is run.
        loss: the same loss, reaching for the copy that is run.
        state: weights in the precision of the copy.
        own: precision of the user's module itself.
        caches: what the module has made of its weights before; emptied before each evaluation, as it is under products.
        casts: flag that casts to narrower types inside the network are left out, as products in float64 do.
        fresh: flag that each evaluation needs a copy of its own, because the model keeps something between calls.
        kinked: flag that the network has operations without a second derivative at some inputs.
    """

    pristine: nn.Module
    given: Loss
    model: nn.Module
    loss: Loss
    state: State
    own: torch.dtype = torch.float64
    caches: tuple[Cache, ...] = ()
    casts: bool = False
    fresh: bool = False
    kinked: bool = False

    @staticmethod
    def of(risk: EmpiricalRisk, state: State, batch: Any) -> OwnModel:
        """The model at a state, in the state's precision, tried on a batch.

        Args:
            risk: the empirical risk.
            state: weights.
            batch: a batch of the data.

        Raises:
            Exception: whatever copying the model, or calling it in this precision, raises.
        """
        pristine, memo = _copied(risk.network.module)
        pristine.to(device=state.device, dtype=state.dtype)
        given = rebound(risk.loss, memo)
        habits = risk.network.habits
        precision, caches = own_precision(risk.network.module), () if habits is None else habits.caches
        own = OwnModel(pristine, given, pristine, given, state, precision, caches)._again()
        with Kinks() as kinks:
            first = own.total(batch)
        own = replace(own, kinked=kinks.seen)
        if state.dtype == torch.float64 and kinks.narrow:
            own = own._without_casts(batch, first)
        return own._kept_nothing(batch)

    def total(self, batch: Any, parameters: Mapping[str, Tensor] | None = None) -> float:
        """Summed loss of a batch.

        Args:
            batch: a batch of the data.
            parameters: values of the trainable tensors; None for those of the state.
        """
        return float(self.term(batch, parameters).total.detach().double())

    def term(self, batch: Any, parameters: Mapping[str, Tensor] | None = None) -> Term:
        """Contribution of a batch to the empirical risk; arguments as for `total`."""
        if self.fresh:
            return replace(self._again(), fresh=False).term(batch, parameters)
        _write(self.model, self.state.tensors if parameters is None else {**self.state.tensors, **parameters})
        moved = move(alone(batch), self.state.device, self.state.dtype)
        with ExitStack() as stack:
            # Torch's shortcut for inference passes over whatever stands in the place of a layer's parts, such as adapters.
            before = torch.backends.mha.get_fastpath_enabled()
            stack.callback(torch.backends.mha.set_fastpath_enabled, before)
            torch.backends.mha.set_fastpath_enabled(False)
            emptied(self.model, self.caches)
            if compiled(self.model):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self.own != torch.float64:  # what it makes or holds in float32 follows, as it does under products
                stack.enter_context(unrounded(self.state.dtype, self.own))
            elif self.casts:
                stack.enter_context(unrounded(self.state.dtype))
            return self.loss(self.model, moved)

    def _again(self) -> OwnModel:
        """The same with another copy to run."""
        model, memo = _copied(self.pristine)
        return replace(self, model=model, loss=rebound(self.given, memo))

    def _without_casts(self, batch: Any, plain: float) -> OwnModel:
        """The same without casts to narrower types, where these are there and only round."""
        bare = replace(self, casts=True)
        apart = abs(bare.total(batch) - plain)
        rounds = SAME * torch.finfo(torch.float64).eps * abs(plain) < apart <= NARROW * abs(plain)
        return bare if rounds else self

    def _kept_nothing(self, batch: Any) -> OwnModel:
        """The same, with a copy for each evaluation where a model that has run gives another loss at other weights."""
        moved = self.state.space.unflatten(beside(self.state, torch.finfo(self.state.dtype).eps ** 0.25))
        used, unused = self.total(batch, moved), self._again().total(batch, moved)
        allowed = SAME * torch.finfo(self.state.dtype).eps * max(abs(used), abs(unused))
        return self if abs(used - unused) <= allowed else replace(self, fresh=True)


def own_model(risk: EmpiricalRisk, state: State, batch: Any) -> tuple[OwnModel | None, str]:
    """The user's own model in float64, or in the state's precision; and why not in float64, or not at all.

    Args:
        risk: the empirical risk.
        state: weights.
        batch: a batch to try it on.
    """
    why = ""
    for dtype in dict.fromkeys((torch.float64, state.dtype)):
        wide = state.to(dtype=dtype)
        try:
            own = OwnModel.of(risk, wide, batch)
        except Exception as error:  # noqa: BLE001 (whatever the user's code raises in a precision that it was not written for)
            why = "memory ran out" if is_out_of_memory(error) else first_line(error)
            continue
        return own, why
    return None, why


def _copied(module: nn.Module) -> tuple[nn.Module, dict[int, Any]]:
    """A deep copy of a module, and what became of its parts, by their `id`.

    Tensors with a history, such as weights that a hook derives from others, cannot be copied by torch: their values are.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo), memo


def _write(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write values into a module's own tensors, those that have others."""
    held: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, value in tensors.items():
            own = held[name].data
            if not own.is_quantized and not _equal(own, value):
                own.copy_(value)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def typical(space: ParameterSpace, center: Tensor) -> Tensor:
    """Root mean square of the tensor that each entry is in, that of all entries where a tensor is zero: shape `(n,)`."""
    sizes = torch.tensor(space.sizes, dtype=torch.float64).clamp(min=1).sqrt()
    own = space.block_norms(center) / sizes
    whole = norm(center) / space.size**0.5
    return space.spread(torch.where(own > 0, own, whole or 1.0).to(center.device))


def beside(state: State, distance: float) -> Tensor:
    """Trainable entries close to a point, all of them moved: shape `(n,)`.

    Args:
        state: the point.
        distance: how far, in units of each tensor's size.
    """
    center, space = state.vector, state.space
    drawn = torch.randn(space.size, generator=stream(0, "own", "beside"), dtype=torch.float64)
    return center + (distance * typical(space, center) * drawn.to(center.device)).to(center.dtype)
