"""The store of cells, which several processes may share: finished ones, and those that a process has claimed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from isoflat.core.errors import DataError, UsageError
from isoflat.experiments.store import index
from isoflat.experiments.store.artifact import SCHEMA, Artifact, Refused, packed, read, write
from isoflat.io import files
from isoflat.io.strict import canonical_json, flattened, is_address, parse_json

MARKER = "isoflat-store.json"


@final
@dataclass(frozen=True)
class Store:
    """Finished cells in a folder that several processes may share.

    A process killed at any point leaves every cell whole or absent, and nothing that keeps others waiting. One cell is
    computed once if everybody claims it first, and then looks once more whether it has been finished meanwhile:

    ```python
    with store.claim(where) as mine:
        if mine and store.get(where) is None:
            store.put(settings, compute(store.scratch(where)), weights)
    ```

    Attributes:
        folder: folder of the store.
    """

    folder: Path

    @staticmethod
    def open(folder: Path) -> Store:
        """The store in a folder, which is made if need be.

        Raises:
            UsageError: the folder cannot be made, is a file, or holds a store of another schema; or it is Windows.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = Store.open(Path(folder))
        ...     where = store.put({"seed": 0}, {"loss": 0.1}, None).address
        ...     store.get(where).result, store.rows()
        ({'loss': 0.1}, [{'address': 'bd0488843468e63c62bb6d1d', 'settings.seed': 0, 'result.loss': 0.1}])
        """
        files.check_locks()
        store, marker = Store(folder), folder / MARKER
        with files.as_usage_errors(folder, "making a store"):
            if folder.exists() and not folder.is_dir():
                raise UsageError(f"{folder} is a file: a store of cells needs a folder")
            folder.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                (folder / "locks").mkdir(exist_ok=True)
                with store._writing():
                    files.write(marker, canonical_json({"schema": SCHEMA}, MARKER).encode() + b"\n", alone=True)
            content = marker.read_bytes()
        try:
            found = parse_json(content)
        except ValueError as error:
            raise UsageError(f"{marker} is damaged ({error}): is {folder} a store? If so, remove this file") from error
        if found != {"schema": SCHEMA}:
            raise UsageError(
                f"{folder} holds a store that this version cannot read: expected schema {SCHEMA}, {marker.name} says "
                f"{canonical_json(found, MARKER)}; take another folder"
            )
        store._tidy()
        return store

    def get(self, address: str) -> Artifact | None:
        """A finished cell; None if it is not there.

        Raises:
            UsageError: the text is no address.
            DataError: the cell is damaged.
        """
        return read(self._json(address))

    def put(
        self, settings: Mapping[str, Any], result: Mapping[str, Any], weights: Mapping[str, Tensor] | None
    ) -> Artifact:
        """Finish a cell: its weights are written first, then its JSON in one step, and its scratch folder goes.

        The same once more changes nothing. A damaged cell is written anew.

        Args:
            settings: everything that decides the result.
            result: the result as plain JSON; numbers return bit for bit.
            weights: tensors by name; None for none.

        Returns:
            The cell as it is read from the disk.

        Raises:
            UsageError: JSON cannot hold it as it is, the disk refuses, or the cell is finished with another result.
        """
        content = None if weights is None else packed(weights)
        where, text = write(settings, result, content)
        path = self._json(where)
        with self._writing(), files.as_usage_errors(path, "writing a cell"):
            if self._whole(path):
                if path.read_bytes() != text:
                    raise UsageError(
                        f"{path} is finished already, with another result: its settings leave out something that decides "
                        "it, or it was computed without a claim. To replace it, remove it first"
                    )
            else:
                self._write(path, text, content)
            cell = read(path)
            if cell is None:
                raise UsageError(f"{path} was removed while it was written: leave a store alone while a sweep runs")
            index.note(self.folder / "index.sqlite", cell, path)
            if self._scratch(where).exists():
                shutil.rmtree(self._scratch(where))
        return cell

    def claim(self, address: str) -> AbstractContextManager[bool]:
        """Claim a cell until the block ends; `False` where another process has claimed it.

        The claim of a process that is killed ends with it. A child made by fork holds it as well, as long as it lives.

        Raises:
            UsageError: the text is no address, or the disk has no locks.
        """
        return files.locked(self.folder / "locks" / f"{_checked(address)}.lock", wait=False)

    def scratch(self, address: str) -> Path:
        """The folder for a cell's own checkpoints while it is under way; made if need be, removed by `put`.

        Raises:
            UsageError: the text is no address, or the disk refuses.
        """
        place = self._scratch(address)
        with files.as_usage_errors(place, "making a folder"):
            place.mkdir(parents=True, exist_ok=True)
        return place

    def cells(self) -> tuple[tuple[Artifact, ...], tuple[Refused, ...]]:
        """All readable cells in the order of their addresses, and the files that were refused."""
        found: list[Artifact] = []
        refused: list[Refused] = []
        for path in self._files():
            try:
                cell = read(path)
            except DataError as error:
                refused.append(Refused(path, str(error)))
            else:
                found += [cell] if cell is not None else []
        return tuple(found), tuple(refused)

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows, one per readable cell: its address, `settings.…` and the numbers and texts of `result.…`."""
        return [cell.row() for cell in self.cells()[0]]

    def find(self, where: Mapping[str, Any]) -> tuple[Artifact, ...]:
        """Readable cells with these settings, by dotted names: `{"net.width": 16}`.

        The index says where to look; the cells themselves decide.
        """
        wanted = {f"settings.{name}": canonical_json(value, name) for name, value in where.items()}
        place = self.folder / "index.sqlite"
        if os.access(self.folder, os.W_OK):
            with self._writing():
                known = index.settings(place, self.folder / "cells")
        else:
            known = index.settings(None, self.folder / "cells")
        found = (index.readable(self._json(name)) for name, settings in known.items() if _has(settings, wanted))
        return tuple(cell for cell in found if cell is not None and _has(cell.settings, wanted))

    def _files(self) -> list[Path]:
        """Files in the folder of cells but for weights, which belong to a cell or to one that was never finished."""
        folder = self.folder / "cells"
        there = sorted(folder.iterdir()) if folder.is_dir() else []
        weights = {path for path in there if path.suffix == ".safetensors" and is_address(path.stem)}
        return [path for path in there if path not in weights and not path.name.startswith(".")]

    def _whole(self, path: Path) -> bool:
        """True if a cell is finished, weights and all."""
        try:
            cell = read(path)
            if cell is not None:
                cell.tensors()
        except DataError:
            return False
        return cell is not None

    def _write(self, path: Path, text: bytes, weights: bytes | None) -> None:
        """Write weights and JSON, in this order: without the JSON, weights are no cell yet."""
        path.parent.mkdir(exist_ok=True)
        if weights is None:
            path.with_suffix(".safetensors").unlink(missing_ok=True)
        else:
            files.write(path.with_suffix(".safetensors"), weights, alone=True)
        files.write(path, text, alone=True)

    def _tidy(self) -> None:
        """Remove scratch folders of finished cells: a process was killed before it could."""
        place = self.folder / "under-way"
        if not place.is_dir() or not os.access(place, os.W_OK):
            return
        with self._writing(), files.as_usage_errors(place, "tidying up"):
            for path in place.iterdir():
                if is_address(path.name) and self._whole(self._json(path.name)):
                    shutil.rmtree(path)

    def _writing(self) -> AbstractContextManager[bool]:
        """Lock for writing, which one process has at a time: writing takes little, beside what computing takes."""
        return files.locked(self.folder / "locks" / "writing.lock", wait=True)

    def _json(self, address: str) -> Path:
        return self.folder / "cells" / f"{_checked(address)}.json"

    def _scratch(self, address: str) -> Path:
        return self.folder / "under-way" / _checked(address)


def _checked(address: str) -> str:
    if not is_address(address):
        raise UsageError(
            f"{address!r} is no address of a cell: expected 24 lower-case hex digits, as `address` gives them"
        )
    return address


def _has(settings: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    there = flattened(settings, "settings")
    return all(name in there and canonical_json(there[name], name) == value for name, value in wanted.items())
