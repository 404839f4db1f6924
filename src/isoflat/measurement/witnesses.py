"""Witnesses in a file of their own, each sealed with the record that it was written for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.record import Record


def seal(record: Record) -> str:
    """Hash of a record as it is written, to tell whether it was edited since."""
    return hashlib.sha256(json.dumps(record.to_dict(), sort_keys=True, allow_nan=False).encode()).hexdigest()


@final
@dataclass(frozen=True)
class SealedWitness:
    """A witness from a file.

    Attributes:
        vector: the witness, shape `(n,)`.
        seal: `seal` of the record that it was written for.
    """

    vector: Tensor
    seal: str


def packed_witnesses(rows: Sequence[tuple[Record, Tensor]]) -> bytes:
    """Witnesses as a safetensors file, by measure and geometry; its metadata has the seals of their records."""
    vectors = {_key(record): vector.detach().cpu().clone() for record, vector in rows}
    return save(vectors, metadata={_key(record): seal(record) for record, _ in rows})


def unpacked_witnesses(content: bytes, records: Sequence[Record]) -> tuple[SealedWitness | None, ...]:
    """Witness of each record, as `packed_witnesses` wrote it for one of its name; None where there is none.

    Raises:
        UsageError: these are no witnesses, or not all of a file of them.
    """
    try:
        found = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"the witnesses cannot be read ({error}): the file is cut off, or of another kind") from error
    seals = header.get("__metadata__", {})
    keys = [_key(record) for record in records]
    return tuple(SealedWitness(found[key], seals.get(key, "")) if key in found else None for key in keys)


def _key(record: Record) -> str:
    return f"{record.measure} in {record.geometry}"
