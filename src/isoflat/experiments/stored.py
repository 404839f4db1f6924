"""A comparison of networks whose numbers are stored: nothing is loaded, and nothing measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from isoflat.core.comparison import Comparison
from isoflat.core.errors import DataError, UsageError
from isoflat.core.record import Record
from isoflat.core.render import visible
from isoflat.core.table import Table
from isoflat.experiments.results import Results, StoredNumber, read_results, read_results_file
from isoflat.measurement.compare import contrast

Warn = Callable[[str], None]
"""A function that is called with a line for each thing that is left out."""

SUFFIXES = (".json", ".jsonl")
"""Endings of files with results."""


@final
@dataclass(frozen=True)
class Wanted:
    """Choice of the stored numbers that are compared.

    Attributes:
        measures: names of measures in the catalogue; none for all that every network has.
        geometries: names of geometries in the catalogue; none for all that every network has.
        logits: what the network's scores became before the loss; "raw" for nothing.
    """

    measures: tuple[str, ...] = ()
    geometries: tuple[str, ...] = ()
    logits: str = "raw"

    def __contains__(self, record: Record) -> bool:
        """Tell whether a record is to be compared."""
        return (
            (not self.measures or record.measure in self.measures)
            and (not self.geometries or record.geometry in self.geometries)
            and record.settings.get("logits", "raw") == self.logits
        )


def holds_results(path: Path) -> bool:
    """Tell by its kind whether a path holds stored numbers; weights have other endings.

    >>> holds_results(Path("runs/small.json")), holds_results(Path("small.safetensors.index.json"))
    (True, False)
    """
    return path.is_dir() or (path.suffix in SUFFIXES and not path.name.endswith(".index.json"))


def compare_stored(
    paths: Sequence[Path], wanted: Wanted, reference: str | None, warn: Warn = lambda text: None
) -> tuple[Comparison, dict[str, Any]]:
    """The networks in folders and files, set against each other by the numbers that all of them have.

    Args:
        paths: folders of `isoflat reproduce`, `study` or `demo`, stores, and results of `isoflat measure`.
        wanted: choice of the numbers.
        reference: label of the network that the others are set against; None for the first.
        warn: function that is called with a line for each damaged file of a folder, which is left out.

    Returns:
        The comparison, and what was compared.

    Raises:
        DataError: a file is damaged, or there are no two networks with a number in common.
        UsageError: two cannot be compared, or there is no network of this label.
    """
    networks, notes = _networks(paths, wanted, warn)
    if len(networks) < 2:
        there = f"only {next(iter(networks))}" if networks else "no network"
        raise DataError(
            f"{', '.join(map(str, paths))}: {there} with a number to compare, expected two or more; name several results of "
            "isoflat measure, or a folder of isoflat reproduce or study"
        )
    if reference is not None and reference not in networks:
        raise UsageError(f"--reference {reference} is none of the networks: {', '.join(networks)}")
    common = [key for key in next(iter(networks.values())) if all(key in rows for rows in networks.values())]
    every = dict.fromkeys(key for rows in networks.values() for key in rows)
    if not common:
        raise DataError(
            f"no number is known of all {len(networks)} networks: measure all alike, or choose with --measure"
        )
    if missing := [f"{measure} ({geometry})" for measure, geometry in every if (measure, geometry) not in common]:
        notes.append(f"not known of all networks, and left out: {', '.join(missing)}")
    tables = [Table(tuple(replace(rows[key], label=label) for key in common)) for label, rows in networks.items()]
    return contrast(tables, reference), {"stored": [str(path) for path in paths], "notes": notes}


def _networks(
    paths: Sequence[Path], wanted: Wanted, warn: Warn
) -> tuple[dict[str, dict[tuple[str, str], Record]], list[str]]:
    """Numbers of each network by its label, at its own weights; those at other points of its orbit are left out and counted."""
    sources = [(path, [number for number in _numbers(path, warn) if number.record in wanted]) for path in paths]
    owners: dict[str, set[int]] = {}
    for place, (_, found) in enumerate(sources):
        for number in found:
            owners.setdefault(number.label, set()).add(place)
    networks: dict[str, dict[tuple[str, str], Record]] = {}
    weights: dict[str, str] = {}
    others: set[str] = set()
    for path, found in sources:
        for number in found:
            record = number.record
            label = visible(number.label if len(owners[number.label]) == 1 else f"{path}: {number.label}")
            if weights.setdefault(label, record.model_hash) == record.model_hash:
                networks.setdefault(label, {}).setdefault((record.measure, record.geometry), record)
            else:
                others.add(record.model_hash)
    note = "other weights of the same networks, such as at random points of their orbits, are left out"
    return networks, [f"{len(others)} {note}"] * bool(others)


def _numbers(path: Path, warn: Warn) -> list[StoredNumber]:
    """Numbers at a path: those that are stored by themselves, and those of comparisons."""
    results = _read(path, warn)
    others = [StoredNumber(row, contest.source) for contest in results.comparisons for row in contest.comparison.rows]
    return [*results.found, *others]


def _read(path: Path, warn: Warn) -> Results:
    """Read what is stored there; in a folder a damaged file is named and left out, a damaged file by itself is refused."""
    if path.is_dir():
        results = read_results(path)
        for refused in results.refused:
            warn(refused.why)
        return results
    results = read_results_file(path)
    if results.refused:
        raise DataError(results.refused[0].why)
    return results
