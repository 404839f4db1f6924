"""The deeper convolutional network of the paper's CIFAR-10 experiments."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

from isoflat.core.errors import UsageError
from isoflat.core.rng import stream
from isoflat.experiments.families import scaled

STAGES: Mapping[int, tuple[tuple[int, ...], ...]] = MappingProxyType(
    {
        11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
        16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    }
)
"""Channels of the convolutions before each pool, by depth: configurations A and D of Simonyan and Zisserman (2015)."""

HEAD = (512, 240)
"""Units of the two hidden layers that follow the convolutions."""


def build(classes: int = 10, width: float = 1, depth: int = 16, seed: int = 0) -> nn.Sequential:
    """A VGG for 32 × 32 colour images: convolutions of 3 × 3 in five stages, each pooled, then 512 and 240 units.

    Each of the two hidden layers is followed by dropout of one half. There is no normalisation, and all layers have
    biases. Initialised as PyTorch does by default; the global random state is left as it was.

    Args:
        classes: number of outputs.
        width: number of channels and units, as a multiple of the usual one.
        depth: number of layers with weights: 16, or 11.
        seed: seed of the initial weights.

    Raises:
        UsageError: the width is not positive, or there is no VGG of this depth.

    >>> tuple(build(width=0.125, depth=11)(torch.zeros(2, 3, 32, 32)).shape)
    (2, 10)
    """
    if depth not in STAGES:
        raise UsageError(f"expected a VGG of depth {' or '.join(map(str, STAGES))}, got {depth}")
    layers = OrderedDict[str, nn.Module]()
    fan_in, number = 3, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "vgg", classes, float(width), depth).initial_seed())
        for stage, counts in enumerate(STAGES[depth], 1):
            for channels in (scaled(count, width) for count in counts):
                number += 1
                layers[f"conv{number}"] = nn.Conv2d(fan_in, channels, 3, padding=1)
                layers[f"relu{number}"] = nn.ReLU()
                fan_in = channels
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        layers["flatten"] = nn.Flatten()
        for place, units in enumerate((scaled(count, width) for count in HEAD), 1):
            layers[f"hidden{place}"] = nn.Linear(fan_in, units)
            layers[f"relu{number + place}"] = nn.ReLU()
            layers[f"dropout{place}"] = nn.Dropout(0.5)
            fan_in = units
        layers["output"] = nn.Linear(fan_in, classes)
    return nn.Sequential(layers)
