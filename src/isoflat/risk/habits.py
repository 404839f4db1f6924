"""Habits of a network beside computing its output, found out by trying before anything is measured.

Every forward pass begins with the attributes that the module was given with, and ends with them (`modules.private`), so that
most of what a network keeps between passes cannot matter. What remains is tried on copies: which tensors it writes into,
which constants it has made of its weights before, whether it runs in float64, and whether its loss differentiates by the
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from isoflat.core.errors import DataError, IsoflatError, UnsupportedModel
from isoflat.core.raised import first_line, is_out_of_memory
from isoflat.core.rng import stream
from isoflat.core.space import norm
from isoflat.core.state import State
from isoflat.modules.caches import Cache, stale
from isoflat.modules.private import differs, own_precision, registered, writes_into
from isoflat.risk.batches import alone, move, pieces
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.losses import Loss, TargetLoss
from isoflat.risk.network import Habits, Network, exactly

AWAY = 0.03
"""Relative distance of the other weights at which a network is tried."""

ROWS = 4
"""Rows that are enough to see what a forward pass does."""

_FAILURES = (RuntimeError, NotImplementedError, TypeError, ValueError, LookupError, AttributeError)


@final
@dataclass(frozen=True)
class _Trial:
    """A network that is tried on a batch.

    Attributes:
        network: the network.
        loss: the loss.
        batch: a batch, or some rows of it.
    """

    network: Network
    loss: Loss
    batch: Any

    def run(
        self, state: State, caches: tuple[Cache, ...] = (), read: Callable[[], Any] = lambda: None, leaves: bool = False
    ) -> tuple[Any, frozenset[str], frozenset[int]]:
        """A pass on copies of everything.

        Args:
            state: weights and buffers.
            caches: what is emptied before it.
            read: function of what the module holds at its end.
            leaves: flag that the weights require gradients.

        Returns:
            What was read, the names of what the pass wrote into, and the identities of further tensors that it did.
        """
        own = {name: tensor.detach().clone() for name, tensor in state.tensors.items()}
        network = replace(self.network, habits=Habits(caches=caches, leaves=leaves))
        held = network.copies(state.dtype, every=True)
        moved = move(alone(self.batch), state.device, state.dtype)

        def use(model: Any) -> Any:
            self.loss(model, moved)
            return read()

        found = network(state.replace(own), use, held)
        written = {name for name, tensor in own.items() if tensor._version or differs(tensor, state.tensors[name])}
        if changed := [name for name in state.parameters if name in written]:
            raise writes_into(changed)
        return found, frozenset(written), held.written()


def learned(risk: EmpiricalRisk, state: State) -> EmpiricalRisk:
    """The risk of the same network, once that has been tried on some rows.

    Raises:
        DataError: there is no data.
        UnsupportedModel: the forward pass writes into weights, or takes for constants what it made of them before; or the
            network does not run in the precision that was asked for.
    """
    batch = next(iter(risk.batches), None)
    if batch is None:
        raise DataError("the data is empty: the loader gave no batch")
    with exactly(state.device):
        trial, leaves, first = _works(risk, state, batch)
        away, known = _away(state), {id(tensor) for _, tensor in registered(risk.network.module)}
        writes = [first]
        try:
            writes.append(trial.run(away, leaves=leaves)[1:])
        except _FAILURES as error:  # these weights are none that it was made for
            if is_out_of_memory(error):
                raise
        caches: tuple[Cache, ...] = ()
        if len(writes) > 1:
            caches = stale(
                risk.network.module,
                lambda tensor: id(tensor) in known,
                lambda caches, read: trial.run(state, caches, read, leaves=True)[0],
                lambda caches, read: trial.run(away, caches, read, leaves)[0],
                lambda caches, read: trial.run(replace(away, frozen=state.frozen), caches, read, leaves)[0],
            )
        written, held = (frozenset[Any]().union(*parts) for parts in zip(*writes, strict=True))
        habits = Habits(written, held, caches, _single(trial, state, leaves), leaves)
    return replace(risk, network=replace(risk.network, habits=habits))


def _works(risk: EmpiricalRisk, state: State, batch: Any) -> tuple[_Trial, bool, tuple[frozenset[str], frozenset[int]]]:
    """The first way of trying a network that works: on a few rows, if the loss can be told of a few.

    Raises:
        UnsupportedModel: it does not run in this precision, but in its own.
        Exception: whatever it raises on the whole batch.
    """
    trials = [_Trial(risk.network, risk.loss, part) for part in (*_few(risk, batch), batch)]
    failure: Exception | None = None
    for leaves in (False, True):
        for trial in trials:
            try:
                return trial, leaves, trial.run(state, leaves=leaves)[1:]
            except UnsupportedModel:
                raise
            except (IsoflatError, *_FAILURES) as error:
                if is_out_of_memory(error):
                    raise
                failure = failure or (error if trial is trials[-1] else None)
    assert failure is not None
    if state.dtype == torch.float64 and own_precision(risk.network.module) != torch.float64:
        try:
            trials[-1].run(state.to(dtype=torch.float32))
        except (IsoflatError, *_FAILURES):
            raise failure from None
        raise UnsupportedModel(
            f"the network does not run in float64 ({first_line(failure)}), though it does in float32: leave dtype out"
        ) from failure
    raise failure


def _few(risk: EmpiricalRisk, batch: Any) -> Iterator[Any]:
    """A few rows of a batch, where rows have losses of their own."""
    if isinstance(risk.loss, TargetLoss):
        try:
            yield next(pieces(alone(batch), ROWS))
        except DataError:  # nothing in it has rows
            return


def _away(state: State) -> State:
    """Other weights, not far: every floating-point parameter is moved in proportion to its size."""
    tensors = {name: t for name, t in (*state.parameters.items(), *state.frozen.items()) if t.is_floating_point()}
    total = sum(tensor.numel() for tensor in tensors.values()) or 1
    typical = (sum(norm(tensor) ** 2 for tensor in tensors.values()) / total) ** 0.5 or 1.0
    moved = {}
    for name, tensor in tensors.items():
        drawn = torch.randn(tensor.shape, generator=stream(0, "away", name), dtype=tensor.dtype).to(tensor.device)
        moved[name] = tensor + AWAY * (norm(tensor) / max(tensor.numel(), 1) ** 0.5 or typical) * drawn
    return state.replace(moved)


def _single(trial: _Trial, state: State, leaves: bool) -> str | None:
    """Why the network does not run in float64; None if it does."""
    if state.dtype == torch.float64:
        return None
    try:
        trial.run(state.to(dtype=torch.float64), leaves=leaves)
    except _FAILURES as error:
        if is_out_of_memory(error):
            raise
        return first_line(error)
    return None
