"""Data that needs no network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SPLIT = 0
"""Seed of the one split everybody gets."""


@final
@dataclass(frozen=True)
class Split:
    """Training and test rows, each a pair of inputs (float32) and class targets (int64)."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits() -> Split:
    """The 1797 handwritten digits that come inside scikit-learn: 8 × 8 pixels, scaled to [0, 1].

    The split is stratified by class and always the same: 1257 rows to train on, 540 to test on.

    >>> data = digits()
    >>> tuple(data.train[0].shape), tuple(data.test[0].shape), float(data.train[0].max())
    ((1257, 64), (540, 64), 1.0)
    """
    pixels, classes = load_digits(return_X_y=True)
    inputs, rest, targets, others = train_test_split(
        (np.asarray(pixels) / 16).astype(np.float32), classes, test_size=0.3, random_state=SPLIT, stratify=classes
    )
    return Split("digits", _pair(inputs, targets), _pair(rest, others))


def _pair(inputs: np.ndarray, targets: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(inputs), torch.from_numpy(targets.astype(np.int64))
