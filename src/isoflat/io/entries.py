"""The entry of a checkpoint that holds the weights, among all that training scripts save beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoflat.core.errors import CheckpointError
from isoflat.core.render import enumerated, some
from isoflat.io.checkpoint import SAFE, needs_code
from isoflat.io.standins import StandIn, array_of

NESTED = (
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "network",
    "module",
    "model_state",
    "net_state_dict",
    "weights",
    "params",
)
"""Entries in which training scripts put the weights beside other things, in the order they are looked for."""

AVERAGED = frozenset({"ema", "swa", "averaged", "average", "avg", "shadow", "polyak"})
"""Words in the names of entries that hold averages of the weights over steps of training."""

COUNTER = "n_averaged"
"""Name beside averaged weights: the number of networks averaged, from `torch.optim.swa_utils.AveragedModel`."""

_NO_WEIGHTS = ("optim", "sched", "scaler", "callback", "loops", "metrics", "rng", "averaging")
"""Beginnings of words in the names of entries whose tensors are no weights: moments of optimisers, counters."""

_DEPTH = 3

Named = dict[str, Tensor]


def choose(content: Any, key: str | None, path: Path) -> tuple[Named, tuple[str, ...]]:
    """The tensors by name within a file's content, and notes on where they were found.

    Args:
        content: content of the file.
        key: entry that holds the weights, with dots for entries within entries; None to look in the usual places.
        path: path of the file, for messages.

    Raises:
        CheckpointError: there is no such entry, it holds no tensors, or several entries could be meant.
    """
    if key is not None:
        tensors, left = _flat(_walk(content, key, path), path, f"entry {key}")
        return tensors, (f"weights from the entry {key!r} of {path.name}", *left)
    if isinstance(content, StandIn):
        raise needs_code(path, type(content).__name__)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds one {type(content).__name__}, no tensors by name. {SAFE}")
    found = {} if _is_flat(content) else dict(_state_dicts(content, "", _DEPTH))
    if not found:
        return _flat(content, path, "file")
    chosen = _preferred(found, path)
    note = f"weights from the entry {chosen!r} of {path.name}, found by itself"
    others = [name for name in found if name != chosen]
    return found[chosen], (note, *_told(chosen, others, found, content))


def is_average(name: str, tensors: Mapping[str, Tensor] | None = None) -> bool:
    """Tell whether an entry holds averages of weights, from its name and from what is beside them.

    >>> is_average("model_ema"), is_average("EMA.state_dict"), is_average("schema")
    (True, True, False)
    """
    return bool(AVERAGED & set(_words(name))) or COUNTER in (tensors or {})


def _is_no_network(name: str) -> bool:
    return any(word.startswith(_NO_WEIGHTS) for word in _words(name))


def _words(name: str) -> list[str]:
    """Words of a name, in lower case: at points, underscores and capitals."""
    return re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def _preferred(found: Mapping[str, Named], path: Path) -> str:
    """Name of the entry to take: of the current weights, in the first of the usual places.

    Raises:
        CheckpointError: several could be meant.
    """
    current = [name for name in found if not is_average(name, found[name])] or list(found)
    for place in NESTED:
        usual = [name for name in current if name.partition(".")[0] == place]
        if usual:
            current = usual
            break
    if len(current) > 1:
        raise CheckpointError(
            f"{path} holds several sets of weights, {enumerated([repr(name) for name in current])}: choose one with "
            "--weights-key"
        )
    return current[0]


def _told(chosen: str, others: Sequence[str], found: Mapping[str, Named], content: dict[Any, Any]) -> Iterator[str]:
    """Iterate over notes on the other sets of weights in a file, and on how to take them."""
    averaged = [name for name in others if is_average(name, found[name])]
    plain = [name for name in others if name not in averaged]
    if is_average(chosen, found[chosen]):
        yield f"{chosen!r} holds averaged weights (EMA or SWA); the file has no others that can be read"
    elif "averaging_state" in content:
        yield f"{chosen!r} holds averaged weights (Lightning saves them there)"
    if averaged:
        yield f"averaged weights (EMA or SWA) are also there, not taken: --weights-key {' or '.join(averaged)} takes them"
    if plain:
        yield f"other weights are also there, not taken: --weights-key {' or '.join(plain)} takes them"


def _state_dicts(content: dict[Any, Any], within: str, depth: int) -> Iterator[tuple[str, Named]]:
    """Iterate over the entries that hold tensors by name, with the keys that lead to them."""
    for name, entry in dict.items(content):
        if not isinstance(entry, dict) or not isinstance(name, str) or _is_no_network(name):
            continue
        tensors, others = _parted(entry)
        if tensors and not any(isinstance(other, dict) for other in others.values()):
            yield within + name, tensors
        elif depth > 1:
            yield from _state_dicts(entry, f"{within}{name}.", depth - 1)


def _walk(content: Any, key: str, path: Path) -> Any:
    """The entry that a key with dots leads to; also the tensors whose names begin with it."""
    parts = key.split(".")
    for place, part in enumerate(parts):
        rest = ".".join(parts[place:])
        if isinstance(content, dict) and rest in content:
            return content[rest]
        if isinstance(content, dict) and part in content:
            content = content[part]
            continue
        if isinstance(content, dict) and (inside := _beginning(content, f"{rest}.")):
            return inside
        there = some(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise CheckpointError(f"{path} has no entry {key!r}: at {part!r} there is only {there}. Change --weights-key")
    return content


def _beginning(content: dict[Any, Any], prefix: str) -> dict[str, Any]:
    """Entries whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in dict.items(content) if str(name).startswith(prefix)}


# A file can give its dictionaries attributes that hide their methods: hence `dict.items(content)`.


def _is_flat(content: dict[Any, Any]) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in dict.values(content))


def _parted(content: dict[Any, Any]) -> tuple[Named, dict[Any, Any]]:
    """Tensors by name, and all other entries."""
    tensors: Named = {}
    others: dict[Any, Any] = {}
    for name, value in dict.items(content):
        array = None if isinstance(value, Tensor) else array_of(value)
        if isinstance(name, str) and (isinstance(value, Tensor) or array is not None):
            tensors[name] = value if array is None else as_tensor(array)
        else:
            others[name] = value
    return tensors, others


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor with the numbers of an array, in memory of its own."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _flat(content: Any, path: Path, where: str) -> tuple[Named, tuple[str, ...]]:
    """The tensors of an entry, and notes on what else is in it; that must not be further weights."""
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: the {where} holds no tensors ({type(content).__name__}). {SAFE}")
    tensors, others = _parted(content)
    nested = [str(name) for name, value in others.items() if isinstance(value, dict)]
    if not tensors or any(not isinstance(name, str) for name in others) or nested:
        kinds = [f"{name}: {type(value).__name__}" for name, value in others.items()]
        if built := [
            f"{name} ({type(value).__name__})" for name, value in others.items() if isinstance(value, StandIn)
        ]:
            raise CheckpointError(
                f"{path}: the {where} holds objects that only pickle could rebuild, and pickle can run any code in the file: "
                f"{some(built)}. {SAFE}"
            )
        hint = f"name the entry with --weights-key, one of {', '.join(nested[:6])}" if nested else SAFE
        raise CheckpointError(f"{path}: in the {where}, {some(kinds)} are no tensors; {hint}")
    return tensors, (f"passed over, as no tensors: {some(others)}",) * bool(others)
