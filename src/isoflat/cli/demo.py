"""`isoflat demo`: the claim, the attack and a report, offline and in a minute or two."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from isoflat.core.estimate import Estimate
    from isoflat.experiments import transformer
    from isoflat.experiments.attack import Ladder
    from isoflat.experiments.demo import Plan
    from isoflat.experiments.outcome import DemoResult

NETWORKS = ("mlp", "transformer")
"""What --network takes; the first is the default."""


def demo(
    network: Annotated[
        str,
        typer.Option(
            help="mlp: digits, small against large batches. transformer: Python's help texts, small against large steps."
        ),
    ] = NETWORKS[0],
    seeds: Annotated[int, typer.Option(min=2, help="Networks per arm.")] = 5,
    seed: Annotated[int, typer.Option(help="All randomness follows from it.")] = 0,
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
    from isoflat.experiments.demo import Plan

    if network not in NETWORKS:
        raise UnknownName("network", network, NETWORKS)
    kind = transformer.Plan if network == "transformer" else Plan
    plan = kind(seeds=seeds, seed=seed, optimizer=optimizer)
    prepare(out)
    result = watched(plan, hidden=not sys.stderr.isatty())
    which = "" if network == NETWORKS[0] else f" --network {network}"
    report = write(result, out, f"isoflat demo{which} --seeds {seeds} --seed {seed} --optimizer {optimizer}")
    if as_json:
        sys.stdout.write(json.dumps({**result.to_dict(), "report": str(report)}, allow_nan=False) + "\n")
    else:
        show(result, report)


def prepare(folder: Path) -> None:
    """Make the folder before anything is computed.

    Raises:
        UsageError: it cannot be made.
    """
    from isoflat.core.errors import UsageError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made ({error.strerror}): give the name of a folder") from error


def watched(plan: Plan | transformer.Plan, hidden: bool) -> DemoResult:
    """Run the demonstration under a progress bar.

    Args:
        plan: what to do.
        hidden: show nothing.
    """
    from tqdm import tqdm

    from isoflat.experiments import demo, transformer
    from isoflat.experiments.data import characters, digits

    layout = "{desc:<34} {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left"
    with tqdm(total=plan.work, disable=hidden, bar_format=layout, leave=False, smoothing=0.1) as bar:

        def report(text: str, done: float) -> None:
            bar.set_description_str(text, refresh=False)
            bar.update(done)

        if isinstance(plan, transformer.Plan):
            return transformer.run(characters(plan.windows, plan.context), plan, report)
        return demo.run(digits(), plan, report)


def write(result: DemoResult, folder: Path, command: str) -> Path:
    """Write the report and the records; earlier ones of the same names are replaced, nothing else is touched.

    Args:
        result: what was found.
        folder: where; it exists.
        command: what was typed.

    Returns:
        The report's path.
    """
    from isoflat.cli.save import save
    from isoflat.integrations.tables import to_csv
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
    """Tables and sentences on the terminal."""
    from isoflat.cli.terminal import console, plain

    screen = console()
    screen.print(everything(result) if result.setting.together else networks(result))
    for sentence in result.comparison:
        screen.print(plain(sentence), end="\n\n")
    for ladder in () if result.setting.together else result.ladders:
        screen.print(rungs(ladder))
    for sentence in result.manipulation:
        screen.print(plain(sentence), end="\n\n")
    screen.print(plain(f"{result.seconds:.0f} s. Report: {report}", style="bold"))


def networks(result: DemoResult) -> RichTable:
    """One line per network: every number over its enclosure."""
    from rich.table import Table as RichTable

    from isoflat.experiments.numbers import NUMBERS

    grid = RichTable(title="Minima at equal training loss", title_justify="left", header_style="bold")
    for head in ("network", "training loss", "|gradient|", "test accuracy", *(number.words for number in NUMBERS)):
        grid.add_column(head, justify="left" if head == "network" else "right", no_wrap=True)
    for before, network in zip((None, *result.networks), result.networks, strict=False):
        if before is not None and before.arm != network.arm:
            grid.add_section()
        loss = f"{network.training.loss:.5f}" + ("" if network.training.reached else " missed")
        slope = f"{network.table[0].point.gradient_norm:.2g}"
        cells = [enclosed(network.estimate(number)) for number in NUMBERS]
        grid.add_row(network.label, loss, slope, f"{network.test_accuracy:.3f}", *cells)
    return grid


def rungs(ladder: Ladder) -> RichTable:
    """One line per amount of an edit: every number over its enclosure."""
    from rich.table import Table as RichTable

    from isoflat.experiments.numbers import NUMBERS

    title = f"{ladder.title}, the same function ({ladder.label})"
    grid = RichTable(title=title, title_justify="left", header_style="bold")
    for head in (ladder.name, "outputs change by", *(number.words for number in NUMBERS)):
        grid.add_column(head, justify="right", no_wrap=True)
    for rung in ladder.rungs:
        cells = [enclosed(rung.records[number.name].estimate) for number in NUMBERS]
        grid.add_row(f"{rung.amount:g}", f"{rung.output_change:.0e}" if rung.output_change else "0", *cells)
    return grid


def everything(result: DemoResult) -> RichTable:
    """One line per network, as trained or edited: every number over its enclosure, and how far the edit moved it."""
    from rich.table import Table as RichTable

    from isoflat.experiments.numbers import NUMBERS

    title = "Minima at equal training loss; then two of them edited by random symmetries (changes relative to before)"
    grid = RichTable(title=title, title_justify="left", header_style="bold")
    for head in ("network", "training loss", "outputs change by", *(number.words for number in NUMBERS)):
        grid.add_column(head, justify="left" if head == "network" else "right", no_wrap=True)
    for group in result.lines:
        for line in group:
            moved = "" if line.output_change is None else f"{line.output_change:.0e}"
            cells = [
                enclosed(line.records[number.name].estimate)
                + (f"\nchanges by {line.changes[number.name]:.0e}" if line.changes else "")
                for number in NUMBERS
            ]
            grid.add_row(line.label, f"{line.loss:.5f}", moved, *cells)
        grid.add_section()
    return grid


def enclosed(estimate: Estimate) -> str:
    """A value, and its enclosure below."""
    from isoflat.core.estimate import interval

    return f"{estimate}\n{interval(estimate)}"
