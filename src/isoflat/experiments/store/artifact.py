"""Files of finished cells: read with suspicion, written as text that can be checked."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from isoflat.core.errors import DataError, UsageError
from isoflat.io.strict import address, canonical_json, flattened, is_address, parse_json, short_hash

SCHEMA = 1
"""Version of the layout; raised whenever a field changes its meaning."""

LARGEST = 64 << 20
"""Largest number of bytes of the JSON of a cell."""

_FIELDS = {"schema": int, "address": str, "settings": dict, "result": dict, "weights": (str, type(None)), "check": str}

_AGAIN = "remove it, and the cell is computed again"


@final
@dataclass(frozen=True)
class Artifact:
    """A finished cell, as it was read from its file.

    Attributes:
        address: hash of the settings.
        settings: everything that decides the result.
        result: result of the computation.
        weights: path of the safetensors file; None where the cell has no weights.
        sha256: SHA-256 of that file when it was written; None where the cell has no weights.
    """

    address: str
    settings: dict[str, Any]
    result: dict[str, Any]
    weights: Path | None
    sha256: str | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name; empty where the cell has none.

        Raises:
            DataError: the file is missing, or is not the one that was written.
        """
        if self.weights is None:
            return {}
        try:
            content = self.weights.read_bytes()
        except OSError as error:
            raise DataError(f"{self.weights} cannot be read ({error.strerror or error}): {_forget(self)}") from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise DataError(
                f"{self.weights} is truncated or corrupt: it is not what was written. To mend: {_forget(self)}"
            )
        try:
            return safetensors.torch.load(content)
        except SafetensorError as error:
            raise DataError(f"{self.weights} is no safetensors file ({error}): {_forget(self)}") from error

    def row(self) -> dict[str, Any]:
        """Flat row of the cell: address, settings and numbers under dotted names; lists among the settings as JSON.

        >>> Artifact("0a", {"widths": [4, 2]}, {"loss": {"train": 0.5}, "curve": [3, 1]}, None).row()
        {'address': '0a', 'settings.widths': '[4,2]', 'result.loss.train': 0.5}
        """
        settings, result = flattened(self.settings, "settings"), flattened(self.result, "result")
        return {
            "address": self.address,
            **{
                name: canonical_json(value, name) if isinstance(value, list) else value
                for name, value in settings.items()
            },
            **{name: value for name, value in result.items() if not isinstance(value, list)},
        }


@final
@dataclass(frozen=True)
class Refused:
    """A file that was refused: it is damaged, or isoflat did not write it.

    Attributes:
        path: path of the file.
        why: line that names the file and says why it was refused, and what to do.
    """

    path: Path
    why: str


def read(path: Path) -> Artifact | None:
    """Read a cell from its JSON file; None if there is no such file.

    Raises:
        DataError: the file is damaged, foreign, of another schema or under a wrong name, or its weights are missing.
    """
    if not is_address(path.stem) or path.suffix != ".json":
        raise DataError(f"{path} is no cell of this store: expected a name of 24 hex digits and .json; move it away")
    try:
        found = _parsed(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    _check(path, found)
    weights = None if found["weights"] is None else path.with_suffix(".safetensors")
    if weights is not None and not weights.is_file():
        raise DataError(f"{path} is there, but its weights {weights.name} are missing: {_AGAIN}")
    return Artifact(found["address"], found["settings"], found["result"], weights, found["weights"])


def write(settings: Mapping[str, Any], result: Mapping[str, Any], weights: bytes | None) -> tuple[str, bytes]:
    """The address of a cell and the content of its JSON file.

    Raises:
        UsageError: JSON cannot hold the settings or the result as they are.
    """
    content = {
        "schema": SCHEMA,
        "address": address(settings),
        "settings": settings,
        "result": result,
        "weights": None if weights is None else hashlib.sha256(weights).hexdigest(),
    }
    check = short_hash(canonical_json(content, "cell"))
    text = canonical_json({**content, "check": check}, "cell").encode() + b"\n"
    if len(text) > LARGEST:
        raise UsageError(f"a cell may take {LARGEST} bytes without its weights, this one takes {len(text)}")
    return content["address"], text


def packed(weights: Mapping[str, Tensor]) -> bytes:
    """Tensors as a safetensors file; weights that share memory are each written in full.

    Raises:
        UsageError: one is no dense tensor, or of a kind that such a file cannot hold.
    """
    try:
        own = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in weights.items()
        }
        return safetensors.torch.save(own)
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"weights must be dense tensors under text names: {error}") from error


def _parsed(path: Path) -> Any:
    found = path.stat(follow_symlinks=False)
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path} is no plain file (a folder, a link or a device): move it away")
    if found.st_size > LARGEST:
        raise DataError(f"{path} takes {found.st_size} bytes, more than {LARGEST}: no cell of this store; move it away")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is truncated or no strict JSON ({error}): {_AGAIN}") from error


def _check(path: Path, found: Any) -> None:
    if not isinstance(found, dict) or "schema" not in found:
        raise DataError(f"{path} is JSON of another kind, no cell of this store: move it away")
    if found["schema"] != SCHEMA:
        raise DataError(f"{path}: expected a cell of schema {SCHEMA}, got {found['schema']!r}: {_AGAIN}")
    if found.keys() != _FIELDS.keys() or not all(isinstance(found[name], kind) for name, kind in _FIELDS.items()):
        raise DataError(f"{path} lacks a field of a cell, or has one too many: {_AGAIN}")
    try:
        check = short_hash(canonical_json({name: value for name, value in found.items() if name != "check"}, "cell"))
        own = address(found["settings"])
    except UsageError as error:
        raise DataError(f"{path} holds what no cell holds ({error}): {_AGAIN}") from error
    if check != found["check"]:
        raise DataError(f"{path} is corrupt or was edited: its content is not what was written. To mend: {_AGAIN}")
    if not own == found["address"] == path.stem:
        raise DataError(f"{path} was renamed: by its settings it is {own}; give it that name back")


def _forget(cell: Artifact) -> str:
    return f"remove it and {cell.address}.json, and the cell is computed again"
