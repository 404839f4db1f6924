"""Pages and tables of results, whether they are in a folder or at hand."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

from isoflat.core.comparison import Comparison
from isoflat.core.errors import DataError, UsageError
from isoflat.core.record import Record
from isoflat.core.table import Table
from isoflat.experiments.rebuild import rebuild_reproduction, rebuild_study
from isoflat.experiments.recipe import Recipe
from isoflat.experiments.results import Results, StoredComparison, StoredNumber, identity, read_results
from isoflat.integrations.tables import to_csv, to_parquet
from isoflat.io.files import claim, save
from isoflat.report.document import Page, Section
from isoflat.report.html import render
from isoflat.report.pages import records, reproduce, study
from isoflat.report.pages.parts import literally

PAGE = "report.html"
"""Name of the page in a folder, where no other is given."""

AT_HAND = "measurements of this program"
"""Source that is named for numbers that no file holds."""


@final
@dataclass(frozen=True)
class WrittenReport:
    """A page that was written.

    Attributes:
        headline: its first sentence.
        rows: every number as a flat row.
        warnings: texts about what could not be read, or is not to be trusted.
        files: paths of what was written, by `out`, `csv` and `parquet`.
    """

    headline: str
    rows: tuple[Mapping[str, Any], ...]
    warnings: tuple[str, ...]
    files: Mapping[str, Path]


def write_report(
    results: str | Path | Table | Comparison | Iterable[Record],
    path: str | Path | None = None,
    *,
    csv: str | Path | None = None,
    parquet: str | Path | None = None,
    force: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> WrittenReport:
    """Write a page that needs nothing else about results; nothing is measured.

    Args:
        results: what `isoflat.measure_all` or `isoflat.compare` returned, records, or a folder that `isoflat demo`,
            `reproduce` or `study` wrote, with a store or with results of `isoflat measure` and `compare` (*.json). A
            file that is damaged, or was not written by isoflat, is named in a warning and left out.
        path: file of the page; `report.html` in the folder by default.
        csv: a CSV file with a line for each number; None for none.
        parquet: the same as a Parquet file.
        force: replace existing files.
        warn: called with each warning, also where nothing can be shown.

    Returns:
        What the page says in short, and the files.

    Raises:
        UsageError: a file exists already, cannot be written, or would replace a result that is shown.
        DataError: nothing could be read.

    >>> import tempfile, torch
    >>> from isoflat.measurement.run import measure_all
    >>> network, data = torch.nn.Linear(3, 2), [(torch.eye(3), torch.tensor([0, 1, 1]))]
    >>> table = measure_all(network, data, torch.nn.CrossEntropyLoss(), measures=["gradient_norm"], geometry="euclidean")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(table, f"{folder}/report.html").headline
    '1 number of 1 network.'
    """
    folder = Path(results) if isinstance(results, str | Path) else None
    if path is None and folder is None:
        raise UsageError("name the file of the page: write_report(table, 'report.html')")
    target = Path(path) if path is not None else Path(folder or "") / PAGE
    files = {"out": target} | {name: Path(file) for name, file in (("csv", csv), ("parquet", parquet)) if file}
    if path is not None or (folder is not None and folder.is_dir()):  # else reading says what is wrong
        _claim(files, force)
    found = _at_hand(results, target) if folder is None else read_results(folder)  # pyrefly: ignore
    made, warnings = page_of(found, _command(folder, files))
    for text in warnings:
        warn(text)
    if made is None:
        raise DataError(
            f"{folder or AT_HAND}: no result of isoflat in it can be read: expected records.jsonl, result files of isoflat "
            "measure or compare (*.json), or a store of cells"
        )
    _check_apart(files, found)
    rows = records.rows(found)
    makers: dict[str, Callable[..., str | bytes]] = {"csv": to_csv, "parquet": to_parquet}
    contents = {"out": render(made)} | {name: make(rows) for name, make in makers.items() if name in files}
    for name, content in contents.items():
        save(files[name], content, force, f"--{name}")
    return WrittenReport(made.headline, tuple(rows), warnings, files)


def page_of(results: Results, command: str) -> tuple[Page | None, tuple[str, ...]]:
    """The page of results, and warnings about what could not be read; no page where nothing could.

    A folder of `isoflat reproduce` or `study` has the page that these made of it.

    Args:
        results: the results that were read.
        command: the command line that shows them.
    """
    refused = records.refusals(results)
    further: list[str] = []
    rebuilds = [partial(_reproduced, results, each.content) for each in results.reproduced[:1]]
    rebuilds += [partial(_studied, results, each.content) for each in results.studied[:1]]
    for rebuild in rebuilds:
        made, told = rebuild()
        further += told
        if made is not None:
            warnings = (*refused, *further)
            return records.with_warnings(made, warnings), warnings
    if not results.found and not results.comparisons:
        return None, (*refused, *further)
    return records.with_warnings(records.page(results, command), further), (*refused, *further)


def _at_hand(results: Table | Comparison | Iterable[Record], target: Path) -> Results:
    """Results that no file holds; networks without a name are called so."""
    contests = (StoredComparison(results, {}, AT_HAND),) if isinstance(results, Comparison) else ()
    rows = () if isinstance(results, Comparison) else tuple(results)
    found = tuple(StoredNumber(replace(row, label=row.label or "network"), AT_HAND) for row in rows)
    omitted = results.omitted if isinstance(results, Table) else ()
    return Results(target.parent, found, contests, (), (), (), omitted, (), ())


def _reproduced(results: Results, content: Mapping[str, Any]) -> tuple[Page | None, tuple[str, ...]]:
    """The page of a reproduction, if its networks are in the store."""
    found = rebuild_reproduction(content, results.cells)
    if found.result is None:
        return None, (*found.warnings, "The experiment of result.json is shown by its numbers only.")
    with literally():
        made = reproduce.page(found.result, _typed(content, found.result.recipe))
    return _with_others(made, results, found.result.records), found.warnings


def _studied(results: Results, content: Mapping[str, Any]) -> tuple[Page | None, tuple[str, ...]]:
    """The page of a study, if its numbers are in the folder."""
    found = rebuild_study(content, [number.record for number in results.found])
    if found.result is None:
        return None, found.warnings
    command = content.get("command")
    with literally():
        made = study.page(found.result, command if isinstance(command, str) else "isoflat study", found.result.facts)
    return _with_others(made, results, found.result.records), found.warnings


def _with_others(made: Page, results: Results, own: Sequence[Record]) -> Page:
    """The page with a section for further numbers in the folder."""
    known = {identity(record) for record in own}
    others = [number for number in results.found if identity(number.record) not in known]
    if not others:
        return made
    section = Section("Other numbers in this folder", records.measured(records.tamed(others)))
    return replace(made, sections=(*made.sections, section))


def _typed(content: Mapping[str, Any], recipe: Recipe) -> str:
    """Command line that reproduces, or as much of it as the recipe says."""
    if isinstance(content.get("command"), str):
        return content["command"]
    how = ["--scale", str(recipe.scale), "--replicates", str(recipe.replicates), "--seed", str(recipe.seed)]
    return " ".join(["isoflat reproduce", recipe.name, *how])


def _claim(files: Mapping[str, Path], force: bool) -> None:
    """Refuse outputs that could not be written, or would replace each other."""
    taken: dict[Path, str] = {}
    for name, path in files.items():
        claim(path, force, f"--{name}")
        other = taken.setdefault(path.resolve(), name)
        if other != name:
            raise UsageError(f"--{other} and --{name} name the same file, {path}: choose another for one of them")


def _check_apart(files: Mapping[str, Path], results: Results) -> None:
    """Refuse outputs that would replace what was read."""
    used = {path.resolve() for path in results.files}
    for name, path in files.items():
        if path.resolve() in used:
            raise UsageError(f"--{name} {path} would replace a result that is shown: choose another file")


def _command(folder: Path | None, files: Mapping[str, Path]) -> str:
    """Command or call that makes the same page again."""
    if folder is None:
        return f"isoflat.write_report(results, {str(files['out'])!r})"
    asked = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    return shlex.join(["isoflat", "report", str(folder), *asked])
