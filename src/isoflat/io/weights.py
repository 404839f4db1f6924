"""Weights from a file, without ever running code that the file holds.

Files are safetensors, single or sharded, or torch's own checkpoints, which its restricted reader (`weights_only=True`) opens.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import CheckpointError
from isoflat.core.render import some
from isoflat.io.archive import check_zip, is_zip, read_index, read_safetensors, regular

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
"""Endings of files that `torch.save` writes."""

NESTED = ("state_dict", "model", "model_state_dict")
"""Entries in which training scripts put the weights beside other things, in the order they are looked for."""

_SAFE = (
    "Where it was made, save the weights alone: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors'), "
    "or torch.save(model.state_dict(), 'weights.pt')"
)


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
    if path.name.endswith(".index.json"):
        content: Any = _sharded(path)
    elif path.suffix == ".safetensors":
        content, metadata = read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        content = _checkpoint(path)
    else:
        raise CheckpointError(
            f"{path}: unknown kind of weights file; expected .safetensors, .safetensors.index.json or one of "
            f"{', '.join(TORCH_SUFFIXES)}"
        )
    tensors, notes = _choose(content, key, path)
    for name, tensor in tensors.items():
        _check_memory(name, tensor, path)
    return Weights(tensors, path, notes, _epsilons(metadata, path))


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


def _checkpoint(path: Path) -> Any:
    """Content of a file of `torch.save`, from the reader that builds tensors and plain containers and nothing else."""
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 10):
        raise CheckpointError(
            f"{path}: torch {torch.__version__} reads such files with known holes; update to torch 2.10 or later, or "
            "convert the weights to safetensors"
        )
    archived = False
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            archived = is_zip(file)
            if archived:
                check_zip(file, path, regular(path))
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile file may raise anything from within the reader
        raise _refused(path, error, archived=archived) from error


def _refused(path: Path, error: Exception, archived: bool) -> CheckpointError:
    """An error that says why torch's restricted reader stopped, without its advice to switch the restriction off."""
    text = str(error)
    if named := re.search(r"GLOBAL ([\w.]+)", text):
        return CheckpointError(
            f"{path} needs pickle to rebuild {named[1]}, and pickle can run any code in the file: refused. {_SAFE}"
        )
    if type(error).__name__ == "UnpicklingError" and archived:
        return CheckpointError(f"{path} needs pickle, which can run any code in the file: refused. {_SAFE}")
    if "TorchScript" in text:
        return CheckpointError(f"{path} is a TorchScript program, no file of weights: refused. {_SAFE}")
    line = " ".join(text.split())[:160]
    return CheckpointError(
        f"{path} cannot be read without running what it says: it needs pickle, or is truncated or corrupt "
        f"({type(error).__name__}: {line}). {_SAFE}"
    )


def _choose(content: Any, key: str | None, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors by name within a file's content, and notes on where they were found."""
    if key is not None:
        return _flat(_walk(content, key, path), path, f"entry {key}"), (
            f"weights from the entry {key!r} of {path.name}",
        )
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds one {type(content).__name__}, no tensors by name. {_SAFE}")
    if not _is_flat(content):
        for candidate in NESTED:
            if isinstance(content.get(candidate), Mapping):
                note = f"weights from the entry {candidate!r} of {path.name}, found by itself"
                return _flat(content[candidate], path, f"entry {candidate}"), (note,)
    return _flat(content, path, "file"), ()


def _walk(content: Any, key: str, path: Path) -> Any:
    """The entry that a key with dots leads to."""
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            there = some(content) if isinstance(content, Mapping) else f"a {type(content).__name__}"
            raise CheckpointError(
                f"{path} has no entry {key!r}: at {part!r} there is only {there}. Change --weights-key"
            )
        content = content[part]
    return content


def _is_flat(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in content.values())


def _flat(content: Any, path: Path, where: str) -> dict[str, Tensor]:
    """The entry, if it is a non-empty dictionary of tensors by name."""
    if isinstance(content, Mapping) and _is_flat(content) and all(isinstance(name, str) for name in content):
        return dict(content)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: the {where} holds no tensors ({type(content).__name__}). {_SAFE}")
    others = [f"{name}: {type(value).__name__}" for name, value in content.items() if not isinstance(value, Tensor)]
    nested = [str(name) for name, value in content.items() if isinstance(value, Mapping)]
    hint = f"name the entry with --weights-key, one of {', '.join(nested[:6])}" if nested else _SAFE
    raise CheckpointError(f"{path}: in the {where}, {some(others)} are no tensors; {hint}")


def _check_memory(name: str, tensor: Tensor, path: Path) -> None:
    """Refuse tensors that claim more entries than the file gave them memory for."""
    reason = next(_doubts(tensor), None)
    if reason:
        raise CheckpointError(f"{path}: tensor {name!r} {reason}. Save contiguous, dense tensors: {_SAFE}")


def _doubts(tensor: Tensor) -> Iterator[str]:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        yield f"is {tensor.layout}, quantised or without values, not plain and dense"
        return
    if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
        yield f"repeats its memory (stride 0) to fill the shape {tuple(tensor.shape)}"
    claimed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > held:
        yield f"claims {claimed} bytes in a storage of {held}"
