"""`isoflat report`: a page, and tables, of what is in a folder already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from isoflat.cli.terminal import complain, console, say, write_json
from isoflat.core.fitted import literal

TOLD = 20
"""Refused files that are named on standard error; the page names more."""


def report(  # noqa: PLR0913
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Written by isoflat demo, reproduce or study, a store of cells, or with results of measure and compare "
            "(*.json).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.html", help="The page. Default: report.html in the folder."),
    ] = None,
    as_csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Also write every number there, one in each line.")
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", help="The same as a Parquet file.")
    ] = None,
    mlflow: Annotated[
        str | None, typer.Option("--mlflow", metavar="EXPERIMENT", help="Also log every number as a run of MLflow.")
    ] = None,
    trackio: Annotated[
        str | None, typer.Option("--trackio", metavar="PROJECT", help="Also log every number as a run of Trackio.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")] = False,
) -> None:
    """Show what a folder holds on one page that needs nothing else; nothing is measured.

    A file that is damaged, or was not written by isoflat, is named and left out; the rest is shown.

    Exit code 0: shown. 2: refused, or nothing could be read.
    """
    from isoflat.report.write import write_report

    told: list[str] = []
    try:
        written = write_report(folder, out, csv=as_csv, parquet=parquet, force=force, warn=told.append)
    finally:  # also where nothing could be read
        _warn(told)
    _log(written.rows, mlflow, trackio)
    if as_json:
        content = {
            "headline": written.headline,
            "numbers": len(written.rows),
            "warnings": list(written.warnings),
            "files": {name: str(path) for name, path in written.files.items()},
        }
        write_json(content)
    else:
        screen = console()
        screen.print(literal(written.headline))
        say(screen, f"Report: {written.files['out']}", "bold")


def _warn(texts: Sequence[str]) -> None:
    for text in texts[:TOLD]:
        complain(text, "warning")
    if len(texts) > TOLD:
        complain(f"{len(texts) - TOLD} more, which the page names", "warning")


def _log(rows: Sequence[Mapping[str, Any]], experiment: str | None, project: str | None) -> None:
    from isoflat.integrations import mlflow, trackio

    if experiment is not None:
        mlflow.log(rows, experiment)
    if project is not None:
        trackio.log(rows, project)
