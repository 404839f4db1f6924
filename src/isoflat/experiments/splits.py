"""The data of an experiment: what comes with isoflat, or a file of the user's."""

from __future__ import annotations

import torch
from torch import Tensor

from isoflat.core.errors import DataError, UsageError
from isoflat.experiments import data as own
from isoflat.experiments.data import Split
from isoflat.experiments.recipe import Data
from isoflat.io.data import load_rows
from isoflat.io.rows import Rows, convert

FILES = {
    "mnist": "MNIST as a .npz file with x_train, y_train, x_test and y_test (the Keras layout), or as Parquet files",
    "cifar10": "CIFAR-10 as Parquet files with images and labels (a folder or glob whose file names tell train and test), "
    "or as a .npz file with x_train, y_train, x_test and y_test",
}
"""Data that does not come with isoflat."""


def load_split(spec: Data, source: str | None) -> Split:
    """What a recipe is trained and measured on.

    Args:
        spec: the recipe's.
        source: a path where the data does not come with isoflat; None for none.

    Raises:
        UsageError: a path is missing, or given where there is none to give.
        DataError: the file is missing, damaged, or has too few rows.
    """
    if spec.source in FILES:
        if source is None:
            raise UsageError(f"this recipe needs --data: {FILES[spec.source]}")
        found = Split(spec.source, _pair(load_rows(source, "train"), spec), _pair(load_rows(source, "test"), spec))
        return found.first(spec.train, spec.test)
    if source not in (None, spec.source):
        raise UsageError(
            f"--data {source}: the data of this recipe, {spec.source}, comes with isoflat; leave --data out"
        )
    if spec.source == "digits":
        return own.digits().first(spec.train, spec.test)
    if spec.source == "characters":
        return own.characters(spec.train or 48, spec.context or 32).first(None, spec.test)
    if spec.source == "gaussian":
        return own.gaussian(spec.train or 500, spec.features or 50, spec.classes or 10)
    known = ", ".join(("digits", "characters", "gaussian", *FILES))
    raise UsageError(f"a recipe's data must be one of {known}, got {spec.source!r}")


def _pair(rows: Rows, spec: Data) -> tuple[Tensor, Tensor]:
    """Inputs as the recipe wants them."""
    if rows.targets.is_floating_point():
        raise DataError("the targets of this data are no classes")
    inputs = convert(rows.inputs)
    inputs = inputs * 255 if spec.raw else inputs
    return (inputs.flatten(1) if spec.flat else inputs).to(torch.float32), rows.targets
