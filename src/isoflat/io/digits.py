"""The handwritten digits that come inside scikit-learn: data that needs no network."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SPLIT = 0
"""Seed of the split into training and test rows."""

Pair = tuple[Tensor, Tensor]
"""Inputs and class targets."""


def digits() -> tuple[Pair, Pair]:
    """Training and test rows of 1797 handwritten digits: 8 × 8 pixels, scaled to [0, 1].

    The split is stratified by class and always the same: 1257 rows to train on, 540 to test on.

    >>> (inputs, targets), (others, _) = digits()
    >>> tuple(inputs.shape), tuple(others.shape), float(inputs.max())
    ((1257, 64), (540, 64), 1.0)
    """
    pixels, classes = load_digits(return_X_y=True)
    inputs, rest, targets, others = train_test_split(
        (np.asarray(pixels) / 16).astype(np.float32), classes, test_size=0.3, random_state=SPLIT, stratify=classes
    )
    return _pair(inputs, targets), _pair(rest, others)


def _pair(inputs: np.ndarray, targets: np.ndarray) -> Pair:
    return torch.from_numpy(inputs), torch.from_numpy(targets.astype(np.int64))
