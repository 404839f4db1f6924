"""The convolutional network of the paper's MNIST experiment."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from isoflat.core.rng import stream
from isoflat.experiments.families import scaled


def build(classes: int = 10, bias: bool = True, seed: int = 0, width: float = 1) -> nn.Sequential:
    """LeNet for one-channel 28 × 28 images: 20 and 50 filters of 5 × 5, each pooled, then 500 units.

    Initialised as PyTorch does by default; the global random state is left as it was.

    Args:
        classes: number of outputs.
        bias: whether the layers have biases.
        seed: seed of the initial weights.
        width: number of channels and units, as a multiple of the usual one.

    Raises:
        UsageError: the width is not positive.

    >>> tuple(build()(torch.zeros(2, 1, 28, 28)).shape)
    (2, 10)
    """
    first, second, units = (scaled(count, width) for count in (20, 50, 500))
    names = () if width == 1 else (float(width),)  # the usual network keeps the initial weights it always had
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "lenet", classes, bias, *names).initial_seed())
        return nn.Sequential(
            OrderedDict[str, nn.Module](
                conv1=nn.Conv2d(1, first, 5, bias=bias),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(first, second, 5, bias=bias),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                hidden=nn.Linear(second * 4 * 4, units, bias=bias),
                relu3=nn.ReLU(),
                output=nn.Linear(units, classes, bias=bias),
            )
        )
