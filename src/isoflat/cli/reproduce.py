"""`isoflat reproduce`: experiments of the literature, one command each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

import typer

from isoflat.cli.deliver import write_folder
from isoflat.cli.exits import DOES_NOT_HOLD, NOT_CONVERGED, sharing
from isoflat.cli.options import ComputeOptions, OutputOptions, takes
from isoflat.cli.terminal import console, say, write_json
from isoflat.core.fitted import FittedTable, item, literal

if TYPE_CHECKING:
    from isoflat.experiments.checking import ReproductionCheck
    from isoflat.experiments.recipe import Recipe
    from isoflat.experiments.reproduction import Reproduction

WHERE = "Where it runs"
"""Panel of the help."""

PATIENCE = 3600.0
"""Seconds that a process waits for the others: they train apart, and one may go on from a checkpoint that others lack."""


@final
@dataclass(frozen=True)
class RecipeOptions:
    """A recipe, and what is changed in it."""

    scale: Annotated[
        str,
        typer.Option(
            help="small: minutes on two processor cores. paper: as published, unattended on a GPU; it goes on where it "
            "was stopped."
        ),
    ] = "small"
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="SOURCE", help="The recipe's data, where it does not come with isoflat: a path."
        ),
    ] = None
    replicates: Annotated[int | None, typer.Option(min=1, help="Networks per arm. Default: the recipe's.")] = None
    names: Annotated[
        list[str] | None,
        typer.Option("--measure", metavar="NAME", help="Instead of the recipe's numbers; can be repeated."),
    ] = None
    geometry: Annotated[
        list[str] | None,
        typer.Option("--geometry", metavar="NAME", help="With --measure; can be repeated. Default: auto."),
    ] = None
    orbit: Annotated[
        int | None,
        typer.Option(min=0, help="Random copies of each network with the same function. Default: the recipe's."),
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Seed of all random numbers: the same gives the same. Default: the recipe's.")
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For report, tables and the store of networks. Default: isoflat-NAME."),
    ] = None


@takes(RecipeOptions, "asked")
@takes(ComputeOptions, "compute", only=("device", "timeout"), timeout=PATIENCE)
@takes(OutputOptions, "output", only=("as_json",))
def reproduce(
    asked: RecipeOptions,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A recipe. Without one, all are listed.", show_default=False)
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Compare with a stored result.json, within stated tolerances; its recipe is followed."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes. Default: one for each core; one on a GPU.", rich_help_panel=WHERE),
    ] = None,
    submit: Annotated[
        str | None,
        typer.Option(
            metavar="slurm|local",
            help="Hand --jobs workers to Slurm, or to processes of this machine, and wait (pip install 'isoflat[slurm]').",
            rich_help_panel=WHERE,
        ),
    ] = None,
    *,
    compute: ComputeOptions,
    output: OutputOptions,
) -> None:
    """Train, measure, compare, and say what came out: the paper's experiments, and those that question them.

    Every network is kept in the folder as soon as it is there: stopped at any point, the same command goes on. The same
    command on another machine that shares the folder helps. Several processes share each network's measurement: torchrun
    --nproc-per-node 2 -m isoflat reproduce ...

    Exit code 0: done. 3: a number did not converge. 5: --check found a difference. 4: a process is lost.
    """
    from isoflat.experiments import checking
    from isoflat.experiments.reproduce import reproduce as followed

    with sharing(compute.device, compute.timeout) as ranks:
        if name is None and check is None:
            if ranks.first:
                listing(output.as_json)
            return
        with ranks.agreeing():
            stored = None if check is None else checking.read_stored(check)
        result = followed(
            name or "" if stored is None else checking.stored_recipe(stored, name),
            asked.data,
            out=asked.out,
            scale=asked.scale,
            replicates=asked.replicates,
            measures=asked.names,
            geometry=asked.geometry,
            orbit=asked.orbit,
            seed=asked.seed,
            jobs=jobs,
            device=compute.device,
            submit=submit,
            progress=True,
        )
    recipe = result.recipe
    folder = asked.out or Path(f"isoflat-{recipe.name}")
    if not ranks.first:
        return
    write(result, folder, _command(recipe, asked.data))
    verdict = None if stored is None else checking.check_against(stored, result)
    if output.as_json:
        extra = {} if verdict is None else {"check": verdict.to_dict()}
        write_json({**result.to_dict(), **extra})
    else:
        show(result, folder)
        if verdict is not None:
            show_check(verdict)
    if verdict is not None and not verdict.holds:
        raise typer.Exit(DOES_NOT_HOLD)
    if any(not record.estimate.converged for record in result.records):
        raise typer.Exit(NOT_CONVERGED)


def _command(recipe: Recipe, data: str | None) -> str:
    parts = ["isoflat reproduce", recipe.name, "--scale", str(recipe.scale), "--replicates", str(recipe.replicates)]
    return " ".join([*parts, "--seed", str(recipe.seed), *(["--data", data] if data else [])])


def write(result: Reproduction, folder: Path, command: str) -> None:
    """The report, the result and the tables; earlier ones of the same names are replaced, nothing else is touched."""
    from isoflat.report.pages.reproduce import page

    content = {**result.to_dict(), "command": command}
    write_folder(folder, content, result.rows(), result.records, page(result, command))


def listing(as_json: bool) -> None:
    """All recipes with their questions."""
    from isoflat.experiments.recipe import read_recipe, recipes

    found = [read_recipe(name) for name in recipes()]
    if as_json:
        write_json([recipe.model_dump(mode="json") for recipe in found])
        return
    screen = console()
    for recipe in found:
        screen.print(item(recipe.name, f"{recipe.title}. {recipe.question}", f"data: {recipe.data.source}"))


def show(result: Reproduction, folder: Path) -> None:
    """Tables and sentences on the terminal."""
    screen = console()
    recipe = result.recipe
    screen.print(literal(f"{recipe.title}, scale {recipe.scale}. {recipe.question}", style="bold"))
    if recipe.differs:
        screen.print(literal(f"Not as in {recipe.reference}: {recipe.differs}"))
    screen.print(_networks(result))
    screen.print(_summaries(result))
    for sentence in result.sentences:
        screen.print(literal(sentence), end="\n\n")
    spent = f"{result.seconds:.0f} s; training and measuring these networks took {result.cost:.0f} s in all"
    say(screen, f"{spent}. Report: {folder / 'report.html'}", "bold")


def _networks(result: Reproduction) -> FittedTable:
    """One line for each network: every number over its interval."""
    from isoflat.core.estimate import value_over_interval

    table, sections = [], []
    for arm in result.recipe.arms:
        for network in result.arm(arm, all_of_them=True):
            loss, epochs = f"{network.training.loss:.4g}", f"{network.training.epochs:.4g}"
            if network.diverged:
                loss, epochs = "diverged", "–"
            elif not network.training.reached:
                loss += " missed"
            error = "–" if network.test_error is None else f"{100 * network.test_error:.2f} %"
            rows = [number.find(network.table) for number in result.numbers]
            cells = ["–" if row is None else value_over_interval(row.estimate) for row in rows]
            table.append((network.label, loss, epochs, error, *cells))
        sections.append(len(table) - 1)
    heads = ("network", "training loss", "epochs", "test error", *(number.words for number in result.numbers))
    return FittedTable(heads, table, "Networks", sections=frozenset(sections))


def _summaries(result: Reproduction) -> FittedTable:
    """Mean and standard error over the networks of each arm."""
    rows = []
    for arm in result.recipe.arms:
        found = {summary.number: summary.words for summary in result.summaries if summary.arm == arm.name}
        rows.append((arm.name, *(found.get(number.name, "–") for number in result.numbers)))
    heads = ("arm", *(number.words for number in result.numbers))
    return FittedTable(heads, rows, "Mean ± standard error over networks")


def show_check(checked: ReproductionCheck) -> None:
    """Print what differs from a stored result, and the sentence."""
    screen = console()
    for line in checked.lines:
        if not line.holds:
            say(screen, f"{line.what}: stored {line.stored}, found {line.found}; allowed: {line.allowed}", "red")
    say(screen, checked.sentence, "bold")
