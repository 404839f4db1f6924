"""Names under which files keep inputs and targets, and the pair that is meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, final

from isoflat.core.errors import DataError
from isoflat.core.render import enumerated, some

WHOLE = (("x", "y"), ("inputs", "targets"))
"""Names of inputs and targets where a file has no splits; these are taken before others."""

INPUTS = frozenset({"x", "input", "inputs", "data", "image", "images", "feature", "features"})
TARGETS = frozenset({"y", "target", "targets", "label", "labels", "class", "classes"})
"""Words that tell what an array holds."""

_SAME = {"training": "train", "testing": "test", "val": "validation", "valid": "validation"}
"""Other words for the splits."""


@final
class _Told(NamedTuple):
    """The meaning of a name."""

    name: str
    targets: bool
    split: str


def pair_names(there: Sequence[str], split: str | None, source: str) -> tuple[str, str]:
    """Names of the inputs and the targets of a split.

    Case, order and separators do not matter: `X_train`, `train_x`, `train-images` and `xtrain` are inputs of the split train.

    Args:
        there: names in the file.
        split: name of the split; None for train, or for the whole of a file without splits.
        source: name of the file, for messages.

    Raises:
        DataError: there is no such pair, or there are several.

    >>> pair_names(["train_x", "train_y", "test_x", "test_y"], None, "x.npz")
    ('train_x', 'train_y')
    >>> pair_names(["X", "y"], None, "x.npz")
    ('X', 'y')
    """
    wanted = split or "train"
    usual = [(f"x_{wanted}", f"y_{wanted}"), *(WHOLE if split is None else ())]
    for pair in usual:
        if set(there) >= set(pair):
            return pair
    told = [found for name in there if (found := _told(name))]
    for asked in (_SAME.get(wanted, wanted), *([""] if split is None else [])):
        inputs = [found.name for found in told if found.split == asked and not found.targets]
        targets = [found.name for found in told if found.split == asked and found.targets]
        if len(inputs) == len(targets) == 1:
            return inputs[0], targets[0]
        if inputs and targets:
            several = inputs if len(inputs) > 1 else targets
            raise DataError(
                f"{source}: {enumerated(several)} could each be the {'inputs' if several is inputs else 'targets'}: keep one "
                "pair, or name it x_train and y_train"
            )
    splits = sorted({found.split for found in told if found.split and _is_pair(found.split, told)})
    remedy = f"choose --split {' or '.join(splits)}" if splits else "name them x_train and y_train, or x and y"
    raise DataError(
        f"{source} has no arrays x_{wanted} and y_{wanted}; it holds {some(there, 8) or 'nothing'}: {remedy}"
    )


def _told(name: str) -> _Told | None:
    """The meaning of a name; None where it is neither inputs nor targets."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    if len(words) == 1 and (
        glued := re.fullmatch(r"([xy])(train|test|val|valid)|(train|test|val|valid)([xy])", words[0])
    ):
        words = [part for part in glued.groups() if part]
    roles = [word for word in words if word in INPUTS | TARGETS]
    # "train_data" and "train_labels", but also "data_train": of two such words, "data" is the vaguer one.
    roles = [word for word in roles if word != "data"] or roles
    if len(roles) != 1:
        return None
    rest = [word for word in words if word != roles[0]]
    split = "_".join(_SAME.get(word, word) for word in rest if word != "data")
    return _Told(name, roles[0] in TARGETS, split)


def _is_pair(split: str, told: Sequence[_Told]) -> bool:
    return {found.targets for found in told if found.split == split} == {True, False}
