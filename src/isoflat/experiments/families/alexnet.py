"""The smaller convolutional network of the paper's CIFAR-10 experiments."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from isoflat.core.rng import stream
from isoflat.experiments.families import scaled


def build(classes: int = 10, width: float = 1, seed: int = 0) -> nn.Sequential:
    """A small AlexNet for 32 × 32 colour images: two convolutions of 5 × 5, each pooled, then 384 and 192 units.

    The layout is that of Zhang et al. (2017), without their normalisation. Pools of 3 × 3 overlap and halve the image,
    so that 64 · 8 · 8 numbers reach the units. All layers have biases. Initialised as PyTorch does by default; the
    global random state is left as it was.

    Args:
        classes: number of outputs.
        width: number of channels and units, as a multiple of the usual one.
        seed: seed of the initial weights.

    Raises:
        UsageError: the width is not positive.

    >>> tuple(build(width=0.125)(torch.zeros(2, 3, 32, 32)).shape)
    (2, 10)
    """
    channels, first, second = (scaled(count, width) for count in (64, 384, 192))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "alexnet", classes, float(width)).initial_seed())
        return nn.Sequential(
            OrderedDict[str, nn.Module](
                conv1=nn.Conv2d(3, channels, 5, padding=2),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(3, stride=2, padding=1),
                conv2=nn.Conv2d(channels, channels, 5, padding=2),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(3, stride=2, padding=1),
                flatten=nn.Flatten(),
                hidden1=nn.Linear(channels * 8 * 8, first),
                relu3=nn.ReLU(),
                hidden2=nn.Linear(first, second),
                relu4=nn.ReLU(),
                output=nn.Linear(second, classes),
            )
        )
