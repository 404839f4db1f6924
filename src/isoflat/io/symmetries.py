"""Files of symmetries: tracing a large network takes long, and the symmetries it finds belong to the architecture.

The file is safetensors: arrays, and in the metadata one line of strict JSON that says how they belong together. Nothing in
it is run. Symmetries from a file are proved on the network again before they are returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as pack
from scipy import sparse
from torch import Tensor, nn

from isoflat.core.errors import UsageError
from isoflat.io import files
from isoflat.io.archive import read_safetensors
from isoflat.io.strict import canonical_json, parse_json
from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.finding.graph import skeleton
from isoflat.symmetry.found import VERSION, Found
from isoflat.symmetry.groups.basis import BasisChange, Family, Piece, Side
from isoflat.symmetry.groups.translation import Centre, CommonVector, Offset, Translation
from isoflat.symmetry.motions import Absorbed, Additive, Average, Field, Mean, Norm, Running
from isoflat.symmetry.relations import Relations, Solution
from isoflat.symmetry.report import SymmetryLine

FORMAT = 1
"""Version of the layout; raised whenever a field changes its meaning."""

UNCLAIMED = "not claimed"
"""Kind of the lines of a report that name what is no symmetry."""

NAME = "isoflat.symmetries"
"""Entry of the metadata that holds the JSON."""

KINDS: Mapping[str, type] = {
    "absorbed": Absorbed,
    "additive": Additive,
    "average": Average,
    "basis": BasisChange,
    "centre": Centre,
    "common": CommonVector,
    "family": Family,
    "field": Field,
    "constraints": Constraints,
    "line": SymmetryLine,
    "mean": Mean,
    "norm": Norm,
    "offset": Offset,
    "piece": Piece,
    "relations": Relations,
    "running": Running,
    "side": Side,
    "solution": Solution,
    "translation": Translation,
}
"""Classes that a file may hold beside plain values and arrays, by names that stay when classes are renamed."""

MODULES = ("model", "skeleton")
"""Fields of `Found` that hold the network itself, which no file holds."""

WALKING = ("where", "epsilon_of", "centred", "pending", "forgets", "normalised", "varies")
"""Fields of `Constraints` that only serve while a network is traced."""

SELDOM = ("averages", "counted", "left_out")
"""Fields that most symmetries have nothing in: such a file does not name them."""


def save_symmetries(found: Found, path: Path | str, *, force: bool = False) -> None:
    """Write symmetries to a file, to be read by `load_symmetries`.

    Args:
        found: symmetries from `isoflat.symmetries`.
        path: path of the file, which ends in `.safetensors`.
        force: whether an existing file may be replaced.

    Raises:
        UsageError: the path is taken or cannot be written, or a part cannot be stored.

    >>> import tempfile
    >>> from isoflat import symmetries
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> found = symmetries(net, torch.ones(2, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_symmetries(found, f"{folder}/symmetries.safetensors")
    ...     again = load_symmetries(f"{folder}/symmetries.safetensors", net)
    >>> again.hash == found.hash, again.dimension
    (True, 3)
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise UsageError(f"{target}: expected a name that ends in .safetensors")
    arrays: dict[str, Tensor] = {}
    parts = {name: _plain(part, arrays) for name, part in _parts(found).items() if name not in MODULES}
    content = {
        "format": FORMAT,
        "rules": VERSION,
        "group_hash": found.hash,
        "network": _network(found.model),
        "found": parts,
    }
    files.save(target, pack(arrays, {NAME: canonical_json(content, "symmetries")}), force, "the path")


def load_symmetries(path: Path | str, model: nn.Module) -> Found:
    """Read symmetries from a file and prove them on a network: no tracing, a few forward passes.

    Args:
        path: path of a file that `save_symmetries` wrote.
        model: network of the architecture that the symmetries were found on, with any weights.

    Returns:
        The symmetries of this network, for `isoflat.measure(..., symmetries=found)`; numbers are as without a file.

    Raises:
        UsageError: the file is damaged, of another kind or other rules, or its network has other tensors.
        SymmetryViolated: the symmetries change this network's output.
    """
    source = Path(path)
    content, arrays = _read(source)
    if content.get("format") != FORMAT or content.get("rules") != VERSION:
        raise UsageError(
            f"{source}: expected symmetries of format {FORMAT} and rules {VERSION}, got {content.get('format')!r} and "
            f"{content.get('rules')!r}: find them again with isoflat.symmetries"
        )
    if content.get("network") != _network(model):
        raise UsageError(
            f"{source} holds the symmetries of another architecture: the tensors of {type(model).__name__} have other names "
            "or shapes. Find its own with isoflat.symmetries"
        )
    try:
        parts = {name: _restored(part, arrays) for name, part in content["found"].items()}
        found = Found(model=model, skeleton=skeleton(model), **parts)
        same = found.hash == content["group_hash"]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, RecursionError) as error:
        raise UsageError(f"{source} holds no symmetries that can be read ({type(error).__name__}: {error})") from error
    if not same:
        raise UsageError(f"{source} was edited: the group in it has another hash than it says")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    found = replace(found, args=_moved(found.args, device), kwargs=_moved(found.kwargs, device))
    found.verify()
    return found


def described(found: Found, verified: float) -> dict[str, Any]:
    """Symmetries as plain values that JSON can hold.

    Args:
        found: the symmetries.
        verified: largest relative change of an output by a random element.
    """
    claimed = [line for line in found.report if line.kind != UNCLAIMED]
    shifts = found.translation.dimension + found.common.dimension
    return {
        "dimension": {
            "exact": found.dimension,
            "without_epsilon": found.free.dimension + found.basis.dimension + shifts,
        },
        "groups": [{"kind": line.kind, "dimension": line.dimension, "tensors": list(line.tensors)} for line in claimed],
        "not_claimed": [
            {"units": line.dimension, "tensors": list(line.tensors), "reasons": list(line.reasons)}
            for line in found.report
            if line.kind == UNCLAIMED
        ],
        "epsilons": found.constants(found.model),
        "loss_ignores_common_score": found.blind,
        "verified": verified,
        "group_hash": found.hash,
        "rules": VERSION,
    }


def _network(model: nn.Module) -> dict[str, list[int]]:
    """Names and shapes of all tensors."""
    return {name: list(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    arrays, metadata = read_safetensors(source)
    try:
        content = parse_json(metadata.get(NAME, "null").encode())
    except ValueError as error:
        raise UsageError(f"{source} cannot be read ({error}): write it again with save_symmetries") from error
    if not isinstance(content, dict):
        raise UsageError(f"{source} holds no symmetries: expected a file of isoflat.io.save_symmetries")
    return content, arrays


def _plain(value: Any, arrays: dict[str, Tensor]) -> Any:
    """A value as strict JSON; arrays go into a dictionary, and are replaced by their names there.

    Plain scalars are themselves; everything else is a list that begins with what it is.
    """
    label = next((name for name, kind in KINDS.items() if type(value) is kind), None)
    if label is not None:
        return [label, {name: _plain(part, arrays) for name, part in _parts(value).items()}]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Fraction):
        return ["fraction", value.numerator, value.denominator]
    if isinstance(value, Tensor):
        return ["tensor", _kept(value.detach(), arrays)]
    if isinstance(value, np.ndarray):
        return ["array", _kept(torch.from_numpy(value), arrays)]
    if isinstance(value, sparse.csr_matrix):
        parts = (value.data, value.indices, value.indptr)
        return ["sparse", list(value.shape), *(_kept(torch.from_numpy(part), arrays) for part in parts)]
    if isinstance(value, Mapping):
        return ["map", *([_plain(key, arrays), _plain(part, arrays)] for key, part in value.items())]
    for name, kind in _CONTAINERS.items():
        if isinstance(value, kind):
            ordered: Iterable[Any] = sorted(value) if kind in (set, frozenset) else value
            return [name, *(_plain(part, arrays) for part in ordered)]
    raise UsageError(f"symmetries with a part of type {type(value).__name__} cannot be stored")


def _restored(value: Any, arrays: Mapping[str, Tensor]) -> Any:
    """The value that `_plain` wrote down."""
    if not isinstance(value, list):
        return value
    label, *rest = value
    if label in KINDS:
        return _built(KINDS[label], {name: _restored(part, arrays) for name, part in rest[0].items()})
    if label in _CONTAINERS:
        return _CONTAINERS[label](_restored(part, arrays) for part in rest)
    return _READERS[label](rest, arrays)


def _sparse(rest: list[Any], arrays: Mapping[str, Tensor]) -> sparse.csr_matrix:
    shape, *names = rest
    data, indices, indptr = (arrays[name].numpy() for name in names)
    made = sparse.csr_matrix((data, indices, indptr), shape=tuple(shape))
    made.check_format()
    return made


def _map(rest: list[Any], arrays: Mapping[str, Tensor]) -> dict[Any, Any]:
    return {_restored(key, arrays): _restored(part, arrays) for key, part in rest}


_CONTAINERS: Mapping[str, type] = {"tuple": tuple, "list": list, "set": set, "frozenset": frozenset}

_READERS: Mapping[str, Callable[[list[Any], Mapping[str, Tensor]], Any]] = {
    "fraction": lambda rest, arrays: Fraction(*rest),
    "tensor": lambda rest, arrays: arrays[rest[0]],
    "array": lambda rest, arrays: arrays[rest[0]].numpy(),
    "sparse": _sparse,
    "map": _map,
}


def _parts(value: Any) -> dict[str, Any]:
    """Attributes that make up a value."""
    if not is_dataclass(value):
        return vars(value)
    names = [part.name for part in fields(value) if not (isinstance(value, Constraints) and part.name in WALKING)]
    return {name: getattr(value, name) for name in names if name not in SELDOM or getattr(value, name)}


def _built(kind: type, parts: Mapping[str, Any]) -> Any:
    """A value from its attributes."""
    if kind is not Relations:
        return kind(**parts)
    made = Relations()
    if parts.keys() != vars(made).keys():
        raise ValueError("relations with other parts")
    vars(made).update(parts)
    return made


def _kept(tensor: Tensor, arrays: dict[str, Tensor]) -> str:
    name = f"{len(arrays)}"
    arrays[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    return name


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    return type(value)(_moved(part, device) for part in value) if isinstance(value, list | tuple) else value
