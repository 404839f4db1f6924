"""The network and the loss, named on the command line."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from isoflat.core.errors import UsageError
from isoflat.io.named import function, named, reason

LOSSES = ("cross_entropy", "mse", "model")
"""Losses that need no code of the user's own; `model`: the model's output carries its loss."""


def build(spec: str, seed: int) -> nn.Module:
    """The network that the factory `module:factory` builds, in evaluation mode.

    Args:
        spec: `module:factory`; the factory is called without arguments.
        seed: of torch's random numbers while it builds, so that fresh weights are the same at each run.

    Raises:
        UsageError: the factory cannot be found, fails, or returns something else.
    """
    factory = named(spec, "--model")
    if isinstance(factory, nn.Module):
        raise UsageError(f"--model {spec} is a network already: name a function that builds one, without arguments")
    if not callable(factory):
        raise UsageError(f"--model {spec}: expected a function that builds a network, got {type(factory).__name__}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = factory()
        except Exception as error:
            raise UsageError(
                f"--model {spec}: the factory, called without arguments, failed: {reason(error)}"
            ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model {spec} returned {type(model).__name__}: expected a torch.nn.Module")
    return model.eval()


def find_loss(spec: str) -> Any:
    """A loss by name, or the user's own as `module:name`.

    Raises:
        UsageError: no such loss.
    """
    if spec == "cross_entropy":
        return nn.CrossEntropyLoss()
    if spec == "mse":
        return nn.MSELoss()
    if spec == "model":
        return None
    if ":" not in spec:
        raise UsageError(f"--loss {spec}: expected one of {', '.join(LOSSES)}, or module:name for your own")
    return function(spec, "--loss")
