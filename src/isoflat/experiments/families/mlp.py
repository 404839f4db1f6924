"""Fully connected networks with ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from isoflat.core.errors import UsageError
from isoflat.core.rng import stream


def build(widths: Sequence[int] = (64, 128, 128, 128, 10), bias: bool = False, seed: int = 0) -> nn.Sequential:
    """A chain of linear layers with ReLU in between, with PyTorch's default initialisation.

    The global random state is left as it was.

    Args:
        widths: widths of the input, the hidden layers and the output.
        bias: whether the layers have biases.
        seed: seed of the initial weights.

    Raises:
        UsageError: there are fewer than two widths.

    >>> [tuple(p.shape) for p in build((4, 3, 2)).parameters()]
    [(3, 4), (2, 3)]
    """
    if len(widths) < 2:
        raise UsageError(f"a network needs at least an input and an output width, got {tuple(widths)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "mlp", tuple(widths), bias).initial_seed())
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
