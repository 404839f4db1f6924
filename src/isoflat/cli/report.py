"""`isoflat report`: a page, and tables, of what is in a folder already."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isoflat.cli.terminal import complain, console, plain
from isoflat.io.files import claim, save

if TYPE_CHECKING:
    from isoflat.core.record import Record
    from isoflat.experiments.recipe import Recipe
    from isoflat.experiments.results import Results
    from isoflat.report.document import Page

PAGE = "report.html"
"""Where the page goes, if no --out is given."""

TOLD = 20
"""Refused files that are named on the standard error; the page names more."""


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
        typer.Option("--out", metavar="FILE.html", help=f"The page. Default: {PAGE} in the folder."),
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
    target = out if out is not None else folder / PAGE
    wanted = [("--out", target), ("--csv", as_csv), ("--parquet", parquet)]
    files = {option: path for option, path in wanted if path is not None}
    if out is not None or folder.is_dir():  # else reading says what is wrong
        _claim(files, force)

    from isoflat.experiments.results import read
    from isoflat.report.html import render

    results = read(folder)
    made, warnings = shown(results, _command(folder, files))
    _warn(warnings)
    if made is None:
        from isoflat.core.errors import DataError

        raise DataError(
            f"{folder}: no result of isoflat in it can be read: expected records.jsonl, result files of isoflat measure or "
            "compare (*.json), or a store of cells"
        )
    _apart(files, results)
    rows = _rows(results)
    for option, content in {"--out": render(made), **_tables(rows, files)}.items():
        save(files[option], content, force, option)
    _log(rows, mlflow, trackio)
    if as_json:
        told = {
            "headline": made.headline,
            "numbers": len(rows),
            "warnings": list(warnings),
            "files": {option.removeprefix("--"): str(path) for option, path in files.items()},
        }
        sys.stdout.write(f"{json.dumps(told, allow_nan=False)}\n")
    else:
        console().print(plain(made.headline))
        console().print(plain(f"Report: {target}", style="bold"))


def _warn(texts: Sequence[str]) -> None:
    for text in texts[:TOLD]:
        complain(text, "warning")
    if len(texts) > TOLD:
        complain(f"{len(texts) - TOLD} more, which the page names", "warning")


def _tables(rows: Sequence[Mapping[str, Any]], files: Mapping[str, Path]) -> dict[str, str | bytes]:
    """Contents of the tables that are asked for; all are made before any is written."""
    from isoflat.integrations.tables import to_csv, to_parquet

    makers: dict[str, Callable[..., str | bytes]] = {"--csv": to_csv, "--parquet": to_parquet}
    return {option: make(rows) for option, make in makers.items() if option in files}


def _log(rows: Sequence[Mapping[str, Any]], experiment: str | None, project: str | None) -> None:
    from isoflat.integrations import mlflow, trackio

    if experiment is not None:
        mlflow.log(rows, experiment)
    if project is not None:
        trackio.log(rows, project)


def shown(results: Results, command: str) -> tuple[Page | None, tuple[str, ...]]:
    """The page of a folder, and what could not be read in it; no page where nothing could.

    A folder of `isoflat reproduce` or `study` has the page that these made of it.

    Args:
        results: what was read.
        command: what was typed to show it.
    """
    from isoflat.report.pages.records import page, refusals, with_warnings

    warnings = list(refusals(results))
    again = [partial(_reproduced, results, each.content) for each in results.reproduced[:1]]
    again += [partial(_studied, results, each.content) for each in results.studied[:1]]
    for attempt in again:
        made, told = attempt()
        warnings += told
        if made is not None:
            return with_warnings(made, warnings), tuple(warnings)
    if not results.found and not results.contests:
        return None, tuple(warnings)
    return with_warnings(page(results, command), warnings[len(refusals(results)) :]), tuple(warnings)


def _reproduced(results: Results, content: Mapping[str, Any]) -> tuple[Page | None, tuple[str, ...]]:
    """The page of a reproduction, if its networks are in the store."""
    from isoflat.experiments.rebuild import rebuild_reproduction
    from isoflat.report.pages.parts import literally
    from isoflat.report.pages.reproduce import page

    found = rebuild_reproduction(content, results.cells)
    if found.result is None:
        return None, (*found.warnings, "The experiment of result.json is shown by its numbers only.")
    with literally():
        made = page(found.result, _typed(content, found.result.recipe))
    return _with_others(made, results, found.result.records), found.warnings


def _studied(results: Results, content: Mapping[str, Any]) -> tuple[Page | None, tuple[str, ...]]:
    """The page of a study, if its numbers are in the folder."""
    from isoflat.experiments.rebuild import rebuild_study
    from isoflat.report.pages.parts import literally
    from isoflat.report.pages.study import page

    found = rebuild_study(content, [number.record for number in results.found])
    if found.result is None:
        return None, found.warnings
    command = content.get("command")
    with literally():
        made = page(found.result, command if isinstance(command, str) else "isoflat study", found.result.facts)
    return _with_others(made, results, found.result.records), found.warnings


def _with_others(made: Page, results: Results, own: Sequence[Record]) -> Page:
    """The page, with the numbers of the folder that are not its own."""
    from dataclasses import replace

    from isoflat.experiments.results import identity
    from isoflat.report.document import Section
    from isoflat.report.pages.records import measured, tamed

    known = {identity(record) for record in own}
    others = [number for number in results.found if identity(number.record) not in known]
    if not others:
        return made
    section = Section("Other numbers in this folder", measured(tamed(others)))
    return replace(made, sections=(*made.sections, section))


def _typed(content: Mapping[str, Any], recipe: Recipe) -> str:
    """What was typed to reproduce, or as much of it as the recipe says."""
    if isinstance(content.get("command"), str):
        return content["command"]
    how = ["--scale", str(recipe.scale), "--replicates", str(recipe.replicates), "--seed", str(recipe.seed)]
    return " ".join(["isoflat reproduce", recipe.name, *how])


def _rows(results: Results) -> list[dict[str, Any]]:
    from isoflat.report.pages.records import rows

    return rows(results)


def _claim(files: Mapping[str, Path], force: bool) -> None:
    """Refuse outputs that could not be written, or would replace each other."""
    from isoflat.core.errors import UsageError

    taken: dict[Path, str] = {}
    for option, path in files.items():
        claim(path, force, option)
        other = taken.setdefault(path.resolve(), option)
        if other != option:
            raise UsageError(f"{other} and {option} name the same file, {path}: choose another for one of them")


def _apart(files: Mapping[str, Path], results: Results) -> None:
    """Refuse outputs that would replace what was read."""
    from isoflat.core.errors import UsageError

    used = {path.resolve() for path in results.files}
    for option, path in files.items():
        if path.resolve() in used:
            raise UsageError(f"{option} {path} would replace a result that is shown: choose another file")


def _command(folder: Path, files: Mapping[str, Path]) -> str:
    return shlex.join(["isoflat", "report", str(folder), *(part for item in files.items() for part in map(str, item))])
