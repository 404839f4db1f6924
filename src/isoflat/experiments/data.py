"""The data of an experiment: what comes with isoflat, or a file of the user's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import final

import torch
from torch import Tensor

from isoflat.core.errors import DataError, UsageError
from isoflat.core.rng import stream
from isoflat.core.state import fingerprint
from isoflat.experiments.recipe import DataSpec
from isoflat.io.data import load_rows
from isoflat.io.digits import digits as stored_digits
from isoflat.io.rows import Rows, convert

TOPICS = ("while", "for", "with", "try")
"""Pages of Python's `help()` on statements: a dictionary of strings, there with every CPython, also under -OO."""

LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz ,.")
"""Characters that are kept of a text in lower case."""


@final
@dataclass(frozen=True)
class Split:
    """Training and test rows, each a pair of inputs (float32, or int64 if they are characters) and class targets (int64).

    Attributes:
        name: name of the data set.
        train: rows to train on.
        test: rows that are held out.
        vocabulary: the character that each class stands for; empty where classes are no characters.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    vocabulary: str = ""

    @cached_property
    def hash(self) -> str:
        """Hash of everything in it."""
        tensors = (*self.train, *self.test)
        return fingerprint(
            self.name, *(part for t in tensors for part in (repr((t.dtype, t.shape)), t.cpu().numpy().tobytes()))
        )

    def first(self, train: int | None, test: int | None) -> Split:
        """The same data set with its first rows only.

        Args:
            train: number of training rows; None for all.
            test: number of held-out rows; None for all.

        Raises:
            DataError: there are fewer.
        """
        for what, wanted, there in (("training", train, self.train), ("held-out", test, self.test)):
            if wanted is not None and wanted > len(there[1]):
                raise DataError(f"{self.name} has {len(there[1])} {what} rows, {wanted} are asked for")
        (inputs, targets), (others, rest) = self.train, self.test
        return replace(self, train=(inputs[:train], targets[:train]), test=(others[:test], rest[:test]))

    def to(self, device: torch.device | str) -> Split:
        """The same rows on a device."""
        (inputs, targets), (others, rest) = self.train, self.test
        return replace(self, train=(inputs.to(device), targets.to(device)), test=(others.to(device), rest.to(device)))


def gaussian(rows: int, features: int, classes: int, seed: int = 0) -> Split:
    """Independent normal inputs with labels that have nothing to do with them: binomial with an even chance.

    >>> data = gaussian(500, 50, 10)
    >>> tuple(data.train[0].shape), int(data.train[1].max()) < 10, len(data.test[1])
    ((500, 50), True, 0)
    """
    drawing = stream(seed, "gaussian", rows, features, classes)
    inputs = torch.randn(rows, features, generator=drawing)
    targets = torch.randint(2, (rows, classes - 1), generator=drawing).sum(1)
    return Split("Gaussian inputs, binomial labels", (inputs, targets), (inputs[:0], targets[:0]))


def digits() -> Split:
    """The 1797 handwritten digits that come inside scikit-learn: 8 × 8 pixels, scaled to [0, 1].

    The split is stratified by class and always the same: 1257 rows to train on, 540 to test on.

    >>> data = digits()
    >>> tuple(data.train[0].shape), tuple(data.test[0].shape), float(data.train[0].max())
    ((1257, 64), (540, 64), 1.0)
    """
    return Split("digits", *stored_digits())


def characters(windows: int = 48, context: int = 32) -> Split:
    """Python's own `help()` texts about loops, `with` and `try`, cut into windows; the target is the next character.

    Small letters, full stops, commas and single spaces are kept. The first windows are trained on, all later ones are
    held out. The text is the same wherever the version of Python is, and changes little between versions.

    Args:
        windows: number of windows to train on.
        context: number of characters in a window.

    Raises:
        UsageError: a window without characters, or none to train on.
        DataError: this Python came without its documentation, or the text is too short.

    >>> data = characters(windows=4, context=16)
    >>> "".join(data.vocabulary[i] for i in data.train[0][0]), "".join(data.vocabulary[i] for i in data.train[1][0])
    ('the while statem', 'he while stateme')
    """
    if min(windows, context) < 1:
        raise UsageError(f"windows and context must be positive, got {windows} and {context}")
    text = _help()
    vocabulary = "".join(sorted(set(text)))
    codes = torch.tensor([vocabulary.index(character) for character in text], dtype=torch.int64)
    count = max(0, len(text) - 1) // context
    if count <= windows:
        raise DataError(
            f"the text has {len(text)} characters, {count} windows of {context}: too few to train on {windows} and to "
            "hold some out; take fewer or shorter ones"
        )
    inputs, targets = (codes[start : start + count * context].view(count, context) for start in (0, 1))
    train, rest = ((inputs[part], targets[part]) for part in (slice(windows), slice(windows, None)))
    return Split("Python's help texts", train, rest, vocabulary)


def _help() -> str:
    """The text of Python's help pages, reduced to few characters.

    Raises:
        DataError: they are missing.
    """
    try:
        pages = import_module("pydoc_data.topics").topics
        text = " ".join(pages[topic] for topic in TOPICS)
    except (ImportError, KeyError) as error:
        raise DataError(
            f"this Python came without its help texts (pydoc_data.topics: {error}): install its standard library in full"
        ) from error
    return "".join(letter for letter in " ".join(text.lower().split()) if letter in LETTERS)


FILES = {
    "mnist": "MNIST as a .npz file with x_train, y_train, x_test and y_test (the Keras layout), or as Parquet files",
    "cifar10": "CIFAR-10 as Parquet files with images and labels (a folder or glob whose file names tell train and test), "
    "or as a .npz file with x_train, y_train, x_test and y_test",
}
"""Data sets that do not come with isoflat, and the files that hold them."""


def load_split(spec: DataSpec, source: str | None) -> Split:
    """Load the rows that a recipe is trained and measured on.

    Args:
        spec: description of the data in the recipe.
        source: path of the data, where it does not come with isoflat; None for none.

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
        return digits().first(spec.train, spec.test)
    if spec.source == "characters":
        return characters(spec.train or 48, spec.context or 32).first(None, spec.test)
    if spec.source == "gaussian":
        return gaussian(spec.train or 500, spec.features or 50, spec.classes or 10)
    known = ", ".join(("digits", "characters", "gaussian", *FILES))
    raise UsageError(f"a recipe's data must be one of {known}, got {spec.source!r}")


def _pair(rows: Rows, spec: DataSpec) -> tuple[Tensor, Tensor]:
    """Inputs and targets in the form that the recipe wants."""
    if rows.targets.is_floating_point():
        raise DataError("the targets of this data are no classes")
    inputs = convert(rows.inputs)
    inputs = inputs * 255 if spec.raw else inputs
    return (inputs.flatten(1) if spec.flat else inputs).to(torch.float32), rows.targets
