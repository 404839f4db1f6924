"""Data that `torch.save` wrote, read without running code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoflat.core.errors import CheckpointError, DataError
from isoflat.core.render import some
from isoflat.io.checkpoint import doubts, read_checkpoint
from isoflat.io.pairs import pair_names
from isoflat.io.rows import Rows, evenly, indices
from isoflat.io.standins import StandIn, array_of

_FORMS = (
    "expected a pair (inputs, targets) of tensors, a dictionary with x and y or x_train and y_train, a TensorDataset of two "
    "tensors, or a list of examples (input, class)"
)


def read_saved(path: Path, split: str | None, examples: int | None) -> Rows:
    """Inputs and targets from a file of `torch.save`.

    Args:
        path: path of the file with a pair of tensors, a dictionary of them, a `TensorDataset`, or a list of examples.
        split: name of the split; None for train, or for the whole of a file without splits.
        examples: number of examples to take; None for all.

    Raises:
        DataError: the file is damaged, would have to run code, or has another form.
    """
    try:
        content, _ = read_checkpoint(path)
    except CheckpointError as error:
        raise DataError(
            str(error).partition(" Where it was made")[0] + " Save tensors alone: torch.save((x, y), 'data.pt')"
        ) from error
    inputs, targets, what = _pair(content, split, path)
    for tensor in (inputs, targets):
        if reason := next(doubts(tensor), None):
            raise DataError(f"{path}: a tensor {reason}. Save dense, contiguous tensors")
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets):
        raise DataError(
            f"{path}: inputs of shape {tuple(inputs.shape)} and targets of shape {tuple(targets.shape)} differ in their "
            "number of rows: save one target for each input"
        )
    chosen, note = evenly(len(inputs), examples, str(path))
    if note:
        inputs, targets = inputs[chosen], targets[chosen]
    return Rows(inputs.detach(), indices(targets.detach()), (*what, *note))


def _pair(content: Any, split: str | None, path: Path, inside: bool = False) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Inputs and targets within a file's content, or within the entry of a split, and notes on where they were found."""
    if isinstance(content, StandIn) and isinstance(content.state, dict):  # a data set, such as a TensorDataset
        state = content.state
        content = dict.get(state, "tensors", state if any(map(_is_array, dict.values(state))) else content)
    if isinstance(content, dict):
        return _by_name(content, split, path, inside)
    if split is not None:
        raise DataError(f"{path} has no splits: leave out --split {split}, or name the file of that split")
    parts = list(content) if isinstance(content, list | tuple) else []
    if len(parts) == 2 and all(_is_array(part) for part in parts):
        return _tensor(parts[0]), _tensor(parts[1]), ()
    if parts and all(_is_example(part) for part in parts):
        return _stacked(parts, path), torch.tensor([_number(part[1]) for part in parts]), ("a list of examples",)
    raise DataError(f"{path} holds {_form(content)}: {_FORMS}")


def _by_name(
    content: dict[Any, Any], split: str | None, path: Path, inside: bool
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    wanted = split or "train"
    inner = None if inside else dict.get(content, wanted)
    if isinstance(inner, dict | list | tuple | StandIn) and not _is_array(inner):
        inputs, targets, what = _pair(inner, None, path, inside=True)
        return inputs, targets, (f"entry {wanted}", *what)
    arrays = [name for name, value in dict.items(content) if isinstance(name, str) and _is_array(value)]
    x, y = pair_names(arrays, split, str(path))
    return _tensor(content[x]), _tensor(content[y]), (f"tensors {x} and {y}",)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or array_of(value) is not None


def _tensor(value: Any) -> Tensor:
    array = array_of(value)
    return value if array is None else torch.from_numpy(array.copy())


def _is_example(part: Any) -> bool:
    """True for a pair of an input and one number."""
    if not isinstance(part, list | tuple) or len(part) != 2 or not isinstance(part[0], Tensor):
        return False
    if isinstance(part[1], int):
        return abs(part[1]) < 1 << 63
    return isinstance(part[1], float) or (isinstance(part[1], Tensor) and part[1].ndim == 0)


def _number(value: Any) -> int | float:
    return value.item() if isinstance(value, Tensor) else value


def _stacked(parts: Sequence[Any], path: Path) -> Tensor:
    shapes = {(tuple(part[0].shape), part[0].dtype) for part in parts}
    if len(shapes) > 1:
        raise DataError(f"{path}: its examples differ in shape or type ({some(shapes, 3)}): bring them into one form")
    if reason := next((text for part in parts for text in doubts(part[0])), None):
        raise DataError(f"{path}: a tensor {reason}. Save dense, contiguous tensors")
    return torch.stack([part[0].detach() for part in parts])


def _form(content: Any) -> str:
    """The content of a file in a few words."""
    if isinstance(content, Tensor):
        return f"one tensor of shape {tuple(content.shape)} and no targets"
    if isinstance(content, list | tuple):
        return f"a {type(content).__name__} of {len(content)}: {some({type(part).__name__ for part in content})}"
    return f"an object of {type(content).__name__}"
