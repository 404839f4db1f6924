"""`isoflat demo`: the claim, the attack and a report, offline and in a minute or two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isoflat.cli.terminal import console, say, write_json
from isoflat.core.fitted import FittedTable, literal

if TYPE_CHECKING:
    from isoflat.experiments.demonstration import DemoResult
    from isoflat.experiments.ladders import Ladder

NETWORKS = ("mlp", "transformer")
"""Names that --network takes; the first is the default."""


def demo(
    network: Annotated[
        str,
        typer.Option(
            help="mlp: digits, small against large batches. transformer: Python's help texts, small against large steps."
        ),
    ] = NETWORKS[0],
    seeds: Annotated[int, typer.Option(min=2, help="Networks for each of the two ways of training.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers: the same gives the same.")] = 0,
    optimizer: Annotated[
        str,
        typer.Option(
            help="mlp only: adam (step 0.001) or sgd (step 0.02, momentum 0.9; about five times as many passes)."
        ),
    ] = "adam",
    out: Annotated[Path, typer.Option(help="Folder for report.html, records.jsonl and records.csv.")] = Path(
        "isoflat-demo"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Are large-batch minima sharper, large-step minima flatter? Train, measure, attack, report; nothing is downloaded."""
    from isoflat.core.errors import UnknownName
    from isoflat.experiments import transformer
    from isoflat.experiments.demo import MlpPlan, demonstrate
    from isoflat.io.files import make_folder

    if network not in NETWORKS:
        raise UnknownName("network", network, NETWORKS)
    kind = transformer.TransformerPlan if network == "transformer" else MlpPlan
    plan = kind(seeds=seeds, seed=seed, optimizer=optimizer)
    make_folder(out)
    result = demonstrate(plan, progress=True)
    which = "" if network == NETWORKS[0] else f" --network {network}"
    report = write(result, out, f"isoflat demo{which} --seeds {seeds} --seed {seed} --optimizer {optimizer}")
    if as_json:
        write_json({**result.to_dict(), "report": str(report)})
    else:
        show(result, report)


def write(result: DemoResult, folder: Path, command: str) -> Path:
    """Write the report and the records; earlier ones of the same names are replaced, nothing else is touched.

    Args:
        result: the demonstration's result.
        folder: an existing folder for the files.
        command: the command line that was typed.

    Returns:
        The report's path.
    """
    from isoflat.integrations.tables import to_csv
    from isoflat.io.files import save
    from isoflat.report.html import render
    from isoflat.report.pages.demo import page
    from isoflat.report.tables import flat

    further = {
        network.label: {
            "arm": network.arm.name,
            "network_seed": network.seed,
            "test_accuracy": network.test_accuracy,
            "steps": network.training.steps,
            "epochs": network.training.epochs,
            "reached": network.training.reached,
        }
        for network in result.networks
    }
    save(folder / "records.jsonl", "".join(f"{record.to_json()}\n" for record in result.records), force=True)
    rows = [{**flat(record), **further.get(record.label, {})} for record in result.records]
    save(folder / "records.csv", to_csv(rows), force=True)
    save(folder / "report.html", render(page(result, command)), force=True)
    return folder / "report.html"


def show(result: DemoResult, report: Path) -> None:
    """Print tables and sentences."""
    screen = console()
    screen.print(everything(result) if result.setting.together else networks(result))
    for sentence in result.comparison:
        screen.print(literal(sentence), end="\n\n")
    for ladder in () if result.setting.together else result.ladders:
        screen.print(rungs(ladder))
    for sentence in result.manipulation:
        screen.print(literal(sentence), end="\n\n")
    say(screen, f"{result.seconds:.0f} s. Report: {report}", "bold")


def networks(result: DemoResult) -> FittedTable:
    """One line per network: every number over its interval."""
    from isoflat.core.estimate import value_over_interval
    from isoflat.experiments.numbers import NUMBERS

    rows, sections = [], []
    for place, network in enumerate(result.networks):
        if place and result.networks[place - 1].arm != network.arm:
            sections.append(place - 1)
        loss = f"{network.training.loss:.5f}" + ("" if network.training.reached else " missed")
        slope = f"{network.table[0].point.gradient_norm:.2g}"
        cells = [value_over_interval(network.estimate(number)) for number in NUMBERS]
        rows.append((network.label, loss, slope, f"{network.test_accuracy:.3f}", *cells))
    heads = ("network", "training loss", "|gradient|", "test accuracy", *(number.words for number in NUMBERS))
    return FittedTable(heads, rows, "Minima at equal training loss", sections=frozenset(sections))


def rungs(ladder: Ladder) -> FittedTable:
    """One line per amount of an edit: every number over its interval."""
    from isoflat.core.estimate import value_over_interval
    from isoflat.experiments.numbers import NUMBERS

    rows = []
    for rung in ladder.rungs:
        cells = [value_over_interval(rung.records[number.name].estimate) for number in NUMBERS]
        rows.append((f"{rung.amount:g}", f"{rung.output_change:.0e}" if rung.output_change else "0", *cells))
    heads = (ladder.name, "outputs change by", *(number.words for number in NUMBERS))
    return FittedTable(heads, rows, f"{ladder.title}, the same function ({ladder.label})", words=0)


def everything(result: DemoResult) -> FittedTable:
    """One line per network, as trained or edited: every number over its interval, and how far the edit moved it."""
    from isoflat.core.estimate import value_over_interval
    from isoflat.experiments.numbers import NUMBERS

    rows, sections = [], []
    for group in result.lines:
        for line in group:
            moved = "" if line.output_change is None else f"{line.output_change:.0e}"
            cells = [
                value_over_interval(line.records[number.name].estimate)
                + (f"\nchanges by {line.changes[number.name]:.0e}" if line.changes else "")
                for number in NUMBERS
            ]
            rows.append((line.label, f"{line.loss:.5f}", moved or "–", *cells))
        sections.append(len(rows) - 1)
    title = "Minima at equal training loss; then two of them edited by random symmetries (changes relative to before)"
    heads = ("network", "training loss", "outputs change by", *(number.words for number in NUMBERS))
    return FittedTable(heads, rows, title, sections=frozenset(sections))
