"""Trying a network before it is traced: what it has made of its weights before must not be traced as a constant."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from isoflat.core.errors import UnsupportedModel
from isoflat.core.rng import stream
from isoflat.core.state import everywhere
from isoflat.modules.caches import Cache, emptied, filled, stale
from isoflat.modules.private import (
    Copies,
    differs,
    held_fixed,
    own_precision,
    private,
    reassigned,
    registered,
    untouched,
    writes_into,
)

AWAY = 0.03
"""Relative distance of the other weights at which a network is tried."""


def caches_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Cache, ...]:
    """Caches of a network that hold what its weights gave.

    Args:
        model: the network.
        args: positional inputs.
        kwargs: keyword inputs.

    Raises:
        UnsupportedModel: its forward pass writes into its parameters, or takes for a constant what other weights gave.
    """
    own = {id(tensor) for _, tensor in registered(model)}
    precision = own_precision(model)
    args, kwargs = tree_map_only(
        Tensor, lambda t: t.to(precision) if t.is_floating_point() else t, (args, dict(kwargs))
    )
    parameters = dict(model.named_parameters())
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}

    def run(tensors: Mapping[str, Tensor], caches: tuple[Cache, ...], read: Callable[[], Any]) -> Any:
        copied = {name: tensor.detach().clone().requires_grad_(name in trainable) for name, tensor in tensors.items()}
        copies = Copies(lambda tensor: True)
        call = _EmptiedForward(model, caches, read)
        with (
            private(model, lambda tensor: tensor if id(tensor) in own else copies(tensor)),
            torch.random.fork_rng(devices=[]),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # torch's tracing of branches warns of stand-ins that are no leaves

            given = {name: held_fixed(t) if name in parameters else t for name, t in copied.items()}
            swapped = {f"model.{name}": tensor for name, tensor in everywhere(model, given).items()}
            put = dict(swapped)
            try:
                found = torch.func.functional_call(call, swapped, args, dict(kwargs), tie_weights=False)
            except TypeError as error:
                raise reassigned(error) or error from None
        if replaced := [name for name in parameters if swapped[f"model.{name}"] is not put[f"model.{name}"]]:
            raise writes_into(replaced)
        if written := [name for name in parameters if copied[name]._version or differs(copied[name], tensors[name])]:
            raise writes_into(written)
        return found

    here = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    away = {name: _moved(name, tensor) if name in parameters else tensor for name, tensor in here.items()}
    for tensors in (here, away):
        run(tensors, (), lambda: None)
    if not any(filled(model, lambda tensor: id(tensor) in own)):
        return ()
    apart = {name: (away if name in trainable else here)[name] for name in here}
    return stale(
        model,
        lambda tensor: id(tensor) in own,
        lambda caches, read: run(here, caches, read),
        lambda caches, read: run(away, caches, read),
        lambda caches, read: run(apart, caches, read),
    )


@contextmanager
def traceable(model: nn.Module, caches: tuple[Cache, ...]) -> Iterator[None]:
    """A network whose caches are empty, until the end.

    Raises:
        UnsupportedModel: one of them is filled by a change of mode, which no trace can show.
    """
    if lasting := [cache for cache in caches if cache.how == "mode"]:
        raise UnsupportedModel(
            f"'{lasting[0]}' is computed from the weights by model.eval(), so that no trace of the forward pass shows how the "
            "output depends on them. geometry='layerwise' needs no tracing; or compute it in the forward pass"
        )
    with untouched(model):
        emptied(model, caches)
        yield


class _EmptiedForward(nn.Module):
    """A forward pass with some caches emptied before it, after which something is read."""

    def __init__(self, model: nn.Module, caches: tuple[Cache, ...], read: Callable[[], Any]) -> None:
        super().__init__()
        self.model = model
        self.caches = caches
        self.read = read

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        emptied(self.model, self.caches)
        self.model(*args, **kwargs)
        return self.read()


def _moved(name: str, tensor: Tensor) -> Tensor:
    """Another tensor, not far."""
    if not tensor.is_floating_point():
        return tensor
    drawn = torch.randn(tensor.shape, generator=stream(0, "away", name)).to(tensor)
    size = float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
    return tensor + AWAY * (size or 1.0) * drawn
