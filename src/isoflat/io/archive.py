"""Checks of checkpoint files before anything in them is used: sizes, names, checksums."""

from __future__ import annotations

import stat
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from isoflat.core.errors import CheckpointError
from isoflat.io.strict import parse_json

HEADER = 32 << 20
"""Largest number of bytes of the header of a safetensors file."""

ENTRIES = 100_000
"""Largest number of tensors, or members of an archive, in a file."""

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
"""Records at the end of an archive: its end, the place of the 64-bit record, and that record."""

_FULL = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
"""Values of the 32-bit fields that refer to the 64-bit record."""

_AGAIN = "Was the download or the save interrupted? Fetch or save it again"


def regular(path: Path) -> int:
    """Size of a file, which must be a regular file and not empty.

    Raises:
        CheckpointError: the file is missing, a folder, a device, unreadable or empty.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be opened: {error}") from error
    if stat.S_ISDIR(found.st_mode):
        raise CheckpointError(
            f"{path} is a folder: name the file in it, for instance model.safetensors or model.safetensors.index.json"
        )
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is no regular file (a pipe or a device): copy the weights to a file first")
    if found.st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes). {_AGAIN}")
    return found.st_size


def check_safetensors(path: Path) -> None:
    """Check a safetensors file: its header is within limits, names each tensor once, and all bytes it promises are there.

    Raises:
        CheckpointError: one of these does not hold.
    """
    size = regular(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > size - 8:
            raise CheckpointError(f"{path} is truncated or no safetensors file: its header does not fit in. {_AGAIN}")
        if length > HEADER:
            raise CheckpointError(f"{path}: its header takes {length} bytes, more than {HEADER}: refused")
        header = _json(path, file.read(length))
    header.pop("__metadata__", None)
    if len(header) > ENTRIES:
        raise CheckpointError(f"{path} holds {len(header)} tensors, more than {ENTRIES}: refused")
    ends = [entry["data_offsets"][1] for entry in header.values() if _has_offsets(entry)]
    if len(ends) < len(header):
        raise CheckpointError(f"{path}: its header does not say where each tensor lies: corrupt. {_AGAIN}")
    promised = 8 + length + max(ends, default=0)
    if promised != size:
        kind = "truncated" if promised > size else "corrupt"
        raise CheckpointError(f"{path} is {kind}: {promised} bytes expected, {size} there. {_AGAIN}")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file, and its metadata.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}. Fetch or save it again") from error


def read_index(path: Path) -> dict[str, Path]:
    """The path of the shard that holds each tensor, by its name, from a `*.index.json`.

    Raises:
        CheckpointError: the file is no such index, or points outside its own folder.
    """
    if regular(path) > HEADER:
        raise CheckpointError(f"{path} is larger than {HEADER} bytes: no index of weights")
    mapping = _json(path, path.read_bytes()).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise CheckpointError(f"{path} has no 'weight_map' from tensor names to files: no index of sharded weights")
    for name in set(mapping.values()):
        if name != Path(name).name or "\\" in name or ":" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} points to {name!r}: a shard must be a .safetensors file in the same folder as the index"
            )
    return {tensor: path.parent / name for tensor, name in mapping.items()}


def is_zip(file: BinaryIO) -> bool:
    """Tell whether a file begins as torch's archives do; its position is at the start afterwards."""
    start = file.read(4)
    file.seek(0)
    return start == b"PK\x03\x04"


def check_zip(file: BinaryIO, path: Path, size: int) -> None:
    """Check an archive as torch writes it: nothing compressed, no member beyond the file, plain names, right checksums.

    torch itself does not compare checksums: without this, a flipped bit would silently become another weight. Its reader is
    another than the one that checks here, so that a file in which two readers would see two archives is refused first.

    Args:
        file: file opened for reading; its position is at the start afterwards.
        path: path of the file, for messages.
        size: size of the file in bytes.

    Raises:
        CheckpointError: one of these does not hold.
    """
    try:
        count = _check_end(file, path, size)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) != count:
                raise _two_archives(path)
            _check_members(members, path, size)
            broken = archive.testzip()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive raises half a dozen unrelated types
        raise CheckpointError(f"{path} is truncated or corrupt ({type(error).__name__}: {error}). {_AGAIN}") from error
    if broken is not None:
        raise CheckpointError(f"{path} is corrupt: the checksum of its member {broken!r} does not match. {_AGAIN}")
    file.seek(0)


def _check_end(file: BinaryIO, path: Path, size: int) -> int:
    """Number of members that the end of an archive declares, after a check that it leaves readers no choice.

    Readers differ where something precedes or follows an archive, and where its 32-bit and 64-bit records disagree.

    Raises:
        CheckpointError: the file is truncated, or does not end in exactly one such record of the whole file.
    """
    tail = min(size, _END.size + _LOCATOR.size + _END_64.size)
    file.seek(size - tail)
    last = file.read(tail)
    file.seek(0)
    if tail < _END.size or last[-_END.size :][:4] != b"PK\5\6":
        raise CheckpointError(f"{path} is truncated or corrupt: it does not end as an archive does. {_AGAIN}")
    _, disk, first_disk, here, count, length, start, comment = _END.unpack(last[-_END.size :])
    end = size - _END.size
    locator = last[-_END.size - _LOCATOR.size : -_END.size]
    if locator[:4] == b"PK\6\7":
        end -= _LOCATOR.size + _END_64.size
        record = _END_64.unpack(last[: _END_64.size]) if tail == len(last) and end >= 0 else (b"",) * 10
        if record[0] != b"PK\6\6" or record[1] != _END_64.size - 12 or _LOCATOR.unpack(locator)[2] != end:
            raise _two_archives(path)
        wide = record[6:]
        if any(
            small not in (large, limit)
            for small, large, limit in zip((here, count, length, start), wide, _FULL, strict=True)
        ):
            raise _two_archives(path)
        here, count, length, start = wide
    if disk or first_disk or comment or here != count or start + length != end:
        raise _two_archives(path)
    return count


def _two_archives(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} could be read as two different archives: something stands before or after the one that torch.save wrote. "
        "Refused as corrupt or hostile; save it again"
    )


def _check_members(members: Sequence[zipfile.ZipInfo], path: Path, size: int) -> None:
    if len(members) > ENTRIES:
        raise CheckpointError(f"{path} is an archive of {len(members)} members, more than {ENTRIES}: refused")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path} is a compressed archive: torch.save never writes one. Refused; save it again")
    if sum(member.file_size for member in members) > size:
        raise CheckpointError(f"{path} declares more bytes than it holds: refused as corrupt or hostile")
    names = [member.orig_filename for member in members]
    if len({name.casefold() for name in names}) < len(names):
        raise CheckpointError(f"{path} is an archive with two members of one name: refused as corrupt or hostile")
    for name in names:
        if name.startswith("/") or ".." in name.split("/") or any(mark in name for mark in "\\:\0"):
            raise CheckpointError(f"{path} is an archive with a member named {name!r}: refused as hostile")


def _json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object in which no name appears twice."""
    try:
        found = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is corrupt: its header is no plain JSON ({error}). {_AGAIN}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is corrupt: its header is no JSON object. {_AGAIN}")
    return found


def _has_offsets(entry: Any) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)
