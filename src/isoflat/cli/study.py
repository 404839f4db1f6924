"""`isoflat study`: does flatness predict generalization over many trained networks?"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

import typer

from isoflat.cli import options
from isoflat.cli.deliver import write_folder
from isoflat.cli.exits import NOT_CONVERGED
from isoflat.cli.options import ComputeOptions, MeasureOptions, NetworkOptions, OutputOptions, takes
from isoflat.cli.terminal import console, say, write_json
from isoflat.core.fitted import FittedTable, fact_list, literal

if TYPE_CHECKING:
    from isoflat.experiments.prediction import Prediction

LISTED, TRAINED = "Networks of your own, with --networks", "Networks to train, with --grid"
"""Panels of the help."""

ONLY = {
    "networks": (
        "model", "loss", "params", "weights_key", "strip_prefix", "transform", "split", "examples", "batch_size", "rtol",
        "probes", "max_products", "dtype", "check",
    ),
    "grid": ("scale", "replicates", "jobs"),
}  # fmt: skip
"""Options that belong to one of the two ways in."""


@final
@dataclass(frozen=True)
class StudyOptions:
    """The networks of a study, what is measured of them, and where results go."""

    networks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV with a row, or TOML with a table networks, for each network: weights (a path from there), an outcome (gap, "
            "test_error, test_accuracy or test_loss), and where known train_loss and label; every other column is a "
            "hyper-parameter, but seed and replicate.",
            rich_help_panel=LISTED,
        ),
    ] = None
    grid: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML: a recipe with data, network, training and a table grid of lists. Every combination is trained.",
            rich_help_panel=TRAINED,
        ),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help=f"What is measured on: {options.DATA_HELP} With --grid: a path, where the data does not come with isoflat.",
        ),
    ] = None
    outcome: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="gap, test_error, test_accuracy or test_loss. Default: the one listed; gap with --grid.",
        ),
    ] = None
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--measure",
            metavar="NAME",
            help="See isoflat measures; can be repeated. Default: quotient_spectral_norm (auto and layerwise), "
            "hessian_spectral_norm, relative_flatness, fisher_rao_norm, gradient_norm.",
        ),
    ] = None
    geometry: Annotated[
        list[str] | None,
        typer.Option("--geometry", metavar="NAME", help="With --measure; can be repeated. Default: auto."),
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Seed of all random numbers. Default: 0; the file's with --grid.")
    ] = None
    scale: Annotated[
        str, typer.Option(help="Which table of the file stands over the rest: small or paper.", rich_help_panel=TRAINED)
    ] = "small"
    replicates: Annotated[
        int | None, typer.Option(min=1, help="Networks per combination. Default: the file's.", rich_help_panel=TRAINED)
    ] = None
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes. Default: one for each core; one on a GPU.", rich_help_panel=TRAINED),
    ] = None


@takes(StudyOptions, "asked")
@takes(NetworkOptions, "network", without=("data", "weights"), model=None, data=None)
@takes(MeasureOptions, "wanted", only=("params", "rtol", "probes", "max_products"), rtol=0.01)
@takes(ComputeOptions, "compute", only=("dtype", "check", "device"))
@takes(OutputOptions, "output", only=("as_json",))
def study(
    context: typer.Context,
    asked: StudyOptions,
    network: NetworkOptions,
    wanted: MeasureOptions,
    compute: ComputeOptions,
    output: OutputOptions,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="For report, tables and the store of what is measured.", rich_help_panel=options.OUT
        ),
    ] = Path("isoflat-study"),
) -> None:
    """Does flatness predict generalization? Relates every number to an outcome over many networks, and says how surely.

    Give --networks, a list of checkpoints with what became of them; or --grid, hyper-parameters to train with. What is
    measured is kept in the folder: stopped at any point, the same command goes on.

    Exit code 0: done. 3: a number did not converge. 2: refused, with the reason; bad rows are all named, before anything
    is measured.
    """
    from isoflat.experiments.study import study as related

    if (asked.networks is None) != (asked.grid is None):  # neither or both: refused by the study itself
        _check_options(context, "grid" if asked.grid is None else "networks")
    result = related(
        asked.networks,
        network.model,
        asked.data,
        grid=asked.grid,
        outcome=asked.outcome,
        measures=asked.names,
        geometry=asked.geometry,
        out=out,
        seed=asked.seed,
        device=compute.device,
        progress=not output.as_json,
        scale=asked.scale,
        replicates=asked.replicates,
        jobs=asked.jobs,
        max_products=wanted.max_products,
        rtol=wanted.rtol,
        probes=wanted.probes,
        params=wanted.params or None,
        dtype=compute.dtype,
        check=compute.check,
        **network.reading(),
    )
    write(result, out, _command(context))
    if output.as_json:
        write_json({"subject": result.subject, **result.to_dict()})
    else:
        show(result, out)
    if any(not record.estimate.converged for record in result.records):
        raise typer.Exit(NOT_CONVERGED)


def _check_options(context: typer.Context, other: str) -> None:
    """Refuse options that would be ignored, because they belong to the other way in.

    Args:
        context: the command line that was typed.
        other: the way in that was not taken.
    """
    from isoflat.core.errors import UsageError

    typed = [name for name in ONLY[other] if options.typed(context, name)]
    if typed:
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
        raise UsageError(f"{listed} belongs to --{other}, which was not given: leave it out")


def _command(context: typer.Context) -> str:
    """The command line that was typed, as it can be typed again."""
    words = ["isoflat", "study"]
    for option in context.command.params:
        if option.name and options.typed(context, option.name):
            value = context.params[option.name]
            values = value if isinstance(value, list | tuple) else [value]
            words += [
                part for each in values for part in ([option.opts[0]] if each is True else [option.opts[0], str(each)])
            ]
    return shlex.join(words)


def write(result: Prediction, folder: Path, command: str) -> None:
    """The report, the result and the tables; earlier ones of the same names are replaced, nothing else is touched."""
    from isoflat.report.pages.study import page

    content = {"command": command, "subject": result.subject, **result.to_dict()}
    write_folder(folder, content, result.rows(), result.records, page(result, command, result.facts))


def show(result: Prediction, folder: Path) -> None:
    """Tables and sentences on the terminal."""
    screen = console()
    screen.print(fact_list(result.facts))
    screen.print(_networks(result))
    screen.print(_relations(result))
    first, *others = result.sentences
    screen.print(literal(first, style="bold"), end="\n\n")
    for sentence in others:
        screen.print(literal(sentence), end="\n\n")
    say(screen, f"Report: {folder / 'report.html'}", "bold")


def _networks(result: Prediction) -> FittedTable:
    """One line for each network."""
    from isoflat.experiments.prediction import words

    table = []
    for network in result.networks:
        rows = [number.find(network.table) for number in result.numbers]
        cells = ["–" if row is None else str(row.estimate) for row in rows]
        table.append((network.label, f"{network.outcome:.4g}", f"{network.loss:.4g}", *cells))
    return FittedTable(("network", result.outcome, "training loss", *map(words, result.numbers)), table, "Networks")


def _relations(result: Prediction) -> FittedTable:
    """One line for each number."""
    from isoflat.report.pages.study import line

    rows = [tuple(cells[head] for head in NARROW) for cells in map(line, result.relations)]
    return FittedTable(NARROW, rows, f"Relation to the {result.outcome}")


NARROW = ("number", "τ-b", "interval", "p", "given loss", "Ψ", "sign error", "worst", "where", "K")
"""Columns of the table of relations that a terminal has room for."""
