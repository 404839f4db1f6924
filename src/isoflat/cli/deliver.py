"""Delivery of a result: printed, and written to the files that were asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from isoflat.cli.terminal import console
from isoflat.io.files import save

if TYPE_CHECKING:
    from isoflat.core.record import Record
    from isoflat.report.document import Page


def deliver(
    content: dict[str, Any],
    show: Callable[[Console], None],
    as_json: bool,
    out: Path | None = None,
    force: bool = False,
    also: Callable[[], None] = lambda: None,
) -> None:
    """Write a result to the files that were asked for, and print it.

    Args:
        content: the result, as JSON.
        show: prints it for people.
        as_json: print the JSON instead.
        out: a file for the JSON; None for none.
        force: True to replace an existing file.
        also: writes further files.

    Raises:
        UsageError: the disk refuses; the result has been printed all the same.
    """
    text = f"{json.dumps(content, allow_nan=False)}\n"
    try:
        if out is not None:
            save(out, text, force)
        also()
    finally:  # where the disk refuses, the numbers still reach the user
        if as_json:
            sys.stdout.write(text)
        else:
            show(console())


def write_folder(
    folder: Path, content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], records: Iterable[Record], page: Page
) -> None:
    """Write the files of an experiment; earlier ones of the same names are replaced, nothing else is touched.

    Args:
        folder: an existing folder.
        content: the result, as JSON.
        rows: a flat row for each network and number.
        records: every number.
        page: the report.
    """
    from isoflat.integrations.tables import to_csv
    from isoflat.report.html import render

    save(folder / "result.json", json.dumps(content, allow_nan=False, indent=1) + "\n", force=True)
    save(folder / "networks.csv", to_csv(rows), force=True)
    save(folder / "records.jsonl", "".join(f"{record.to_json()}\n" for record in records), force=True)
    save(folder / "report.html", render(page), force=True)
