"""Weights from a file, without ever running code that the file holds.

Files are safetensors, single or sharded, or torch's own checkpoints, which its restricted reader (`weights_only=True`) opens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import Tensor

from isoflat.core.errors import CheckpointError
from isoflat.core.render import some
from isoflat.io.archive import read_index, read_safetensors, regular
from isoflat.io.checkpoint import SAFE, TORCH_SUFFIXES, doubts, read_checkpoint
from isoflat.io.entries import choose


@final
@dataclass(frozen=True)
class Weights:
    """Named tensors from a file.

    Attributes:
        tensors: tensors by their names in the file.
        source: path of the file, for messages.
        notes: lines that say what was chosen while reading.
        epsilons: epsilons of normalisations that belong to these weights, by the path of the module's attribute;
            `isoflat canonicalize` writes them.
    """

    tensors: Mapping[str, Tensor]
    source: Path
    notes: tuple[str, ...] = ()
    epsilons: Mapping[str, float] = field(default_factory=dict)


def read_weights(path: Path, key: str | None = None) -> Weights:
    """Read every tensor in a weights file.

    Args:
        path: path of a file: `.safetensors`, a `.safetensors.index.json`, or `.pt`, `.pth`, `.ckpt`, `.bin` written by `torch.save`.
        key: entry that holds the weights, with dots for entries within entries; None to look in the usual places.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, needs code to be run, or holds no such entry.
    """
    regular(path)
    metadata: Mapping[str, str] = {}
    passed: tuple[str, ...] = ()
    if path.name.endswith(".index.json"):
        content: Any = _sharded(path)
    elif path.suffix == ".safetensors":
        content, metadata = read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        content, passed = read_checkpoint(path)
    else:
        raise CheckpointError(
            f"{path}: unknown kind of weights file; expected .safetensors, .safetensors.index.json or one of "
            f"{', '.join(TORCH_SUFFIXES)}"
        )
    tensors, notes = choose(content, key, path)
    for name, tensor in tensors.items():
        _check_memory(name, tensor, path)
    return Weights(tensors, path, (*notes, *passed), _epsilons(metadata, path))


def _epsilons(metadata: Mapping[str, str], path: Path) -> dict[str, float]:
    """Epsilons from the metadata of a file; empty if it has none.

    Raises:
        CheckpointError: the entry is no table of positive numbers.
    """
    text = metadata.get("epsilons")
    if text is None:
        return {}
    try:
        found = {str(name): float(value) for name, value in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its metadata hold epsilons that cannot be read ({error}); write it again"
        ) from error
    if not all(0 < value < math.inf for value in found.values()):
        raise CheckpointError(f"{path}: its metadata hold epsilons that are no positive numbers; write it again")
    return found


def _sharded(path: Path) -> dict[str, Tensor]:
    """Tensors of sharded weights, each from the shard that the index names."""
    places = read_index(path)
    found: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if not shard.is_file():
            raise CheckpointError(
                f"{path} names the shard {shard.name}, which is missing: fetch all shards into one folder"
            )
        tensors, _ = read_safetensors(shard)
        absent = [name for name, place in places.items() if place == shard and name not in tensors]
        if absent:
            raise CheckpointError(f"{shard} lacks tensors that {path.name} says it holds: {some(absent)}")
        found |= {name: tensor for name, tensor in tensors.items() if places.get(name) == shard}
    return found


def _check_memory(name: str, tensor: Tensor, path: Path) -> None:
    """Refuse tensors that claim more entries than the file gave them memory for."""
    reason = next(doubts(tensor), None)
    if reason:
        raise CheckpointError(f"{path}: tensor {name!r} {reason}. Save contiguous, dense tensors: {SAFE}")
