"""Fully connected networks with batch normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from isoflat.core.rng import stream


def build(widths: Sequence[int] = (64, 64, 64, 10), seed: int = 0) -> nn.Sequential:
    """Linear layers with biases, each hidden one followed by batch normalisation and ReLU; PyTorch's initialisation.

    Args:
        widths: widths of the input, the hidden layers and the output.
        seed: seed of the initial weights.

    >>> [name for name, _ in build((4, 3, 2)).named_parameters()][:4]
    ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "normed", tuple(widths)).initial_seed())
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.BatchNorm1d(fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


def pairs(model: nn.Sequential) -> list[tuple[str, str]]:
    """Names of each bias before a batch normalisation and of the running mean that takes it away again.

    >>> pairs(build((4, 3, 2)))
    [('0.bias', '1.running_mean')]
    """
    norms = [int(name) for name, module in model.named_children() if isinstance(module, nn.BatchNorm1d)]
    return [(f"{place - 1}.bias", f"{place}.running_mean") for place in norms]
