"""Wrappers that other tools put around a network."""

from __future__ import annotations

import sys

from torch import nn

_BY_NAME = {"_FabricModule": "Lightning Fabric"}
"""Classes that hold the network as `.module`, by name, because their packages may be absent; and whose they are."""


def unwrapped(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The network inside its wrappers, and what they were, from outside in.

    Data-parallel wrappers and compiled code have no second derivative; the network inside has the same weights.

    >>> unwrapped(nn.DataParallel(nn.Linear(1, 1)))
    (Linear(in_features=1, out_features=1, bias=True), ('DataParallel',))
    """
    removed = []
    while (inside := _inside(module)) is not None:
        module, what = inside
        removed.append(what)
    return module, tuple(removed)


def compiled(module: nn.Module) -> bool:
    """Test of whether a part of a network is compiled, in place or in a wrapper."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and any(
        part._compiled_call_impl is not None or isinstance(part, compiler.OptimizedModule) for part in module.modules()
    )


def _inside(module: nn.Module) -> tuple[nn.Module, str] | None:
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return module.module, type(module).__name__
    # A compiled module exists only where its class has been loaded; loading it takes seconds.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        return module._orig_mod, "torch.compile"
    name, held = _BY_NAME.get(type(module).__name__), getattr(module, "module", None)
    return (held, name) if name is not None and isinstance(held, nn.Module) else None
