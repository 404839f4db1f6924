"""`isoflat attack`: which numbers survive when the weights change and the function does not?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from isoflat.cli import options
from isoflat.cli.deliver import deliver
from isoflat.cli.options import ComputeOptions, MeasureOptions, NetworkOptions, OutputOptions, takes
from isoflat.cli.terminal import notes, say, step
from isoflat.core.fitted import FittedTable, literal
from isoflat.core.render import enumerated

if TYPE_CHECKING:
    from isoflat.experiments.attack import AttackResult


NUMBERS = ["quotient_spectral_norm", "hessian_spectral_norm"]
"""Measures that `isoflat.attack` attacks by default; written out here so that the help needs no torch."""

PLACES = ["auto", "layerwise"]
"""Geometries in which it does."""


@takes(NetworkOptions, "network")
@takes(
    MeasureOptions,
    "wanted",
    without=("initial", "sample", "logits"),
    names=NUMBERS,
    geometry=PLACES,
)
@takes(ComputeOptions, "compute", only=("seed", "device"))
@takes(OutputOptions, "output", only=("as_json",))
def attack(
    network: NetworkOptions,
    points: Annotated[
        int, typer.Option(min=0, help="Random copies with the same function.", rich_help_panel=options.HOW)
    ] = 5,
    spread: Annotated[
        float,
        typer.Option(help="Standard deviation of the logarithms of the random factors.", rich_help_panel=options.HOW),
    ] = 3.0,
    search: Annotated[
        int, typer.Option(min=0, help="Steps that try to move each number further.", rich_help_panel=options.HOW)
    ] = 10,
    *,
    wanted: MeasureOptions,
    compute: ComputeOptions,
    output: OutputOptions,
) -> None:
    """Change the weights but not the function, and see which numbers survive. Everything is measured in float64.

    Exit code 0: the attack ran, whatever survived. 2: refused, with the reason.
    """
    from isoflat.experiments.attack import attack as attacked
    from isoflat.io.inputs import check_names, device_of, prepare, within_memory

    seed, as_json = compute.seed, output.as_json
    effort = {key: value for key, value in wanted.effort(seed).items() if key != "sample"}
    check_names(wanted.names, wanted.geometry, **effort)
    params, where, inputs = wanted.params or None, device_of(compute.device), network.inputs(seed)
    loaded, _ = prepare(inputs, params, None, where)
    step(f"loaded {inputs.model} and {inputs.data}", as_json)
    with within_memory():
        orbit = attacked(
            loaded.model,
            loaded.batches,
            loaded.loss,
            measures=wanted.names,
            geometry=wanted.geometry,
            points=points,
            search=search,
            spread=spread,
            progress=not as_json,
            params=params,
            device=where,
            **effort,
        )
    content = {"subject": inputs.described() | {"notes": list(loaded.notes)}, **orbit.to_dict()}
    deliver(content, lambda screen: show(screen, orbit, loaded.notes), as_json)


def show(screen: Console, orbit: AttackResult, loading: tuple[str, ...]) -> None:
    """One line for each number, what happened to the function meanwhile, and the verdict."""
    rows = [
        (
            row.before.measure,
            row.before.geometry,
            str(row.before.estimate),
            f"{row.lowest:.6g}",
            f"{row.highest:.6g}",
            f"{row.drift:.1e}",
            literal("yes", style="green") if row.survives else literal("NO", style="bold red"),
        )
        for row in orbit.rows
    ]
    heads = ("number", "geometry", "before", "lowest seen", "highest seen", "worst drift", "survives")
    screen.print(FittedTable(heads, rows, words=2))
    examples = orbit.rows[0].before.point.examples
    outputs, change = (f"{value:.0e}" if value else "0" for value in (orbit.output_change, orbit.loss_change))
    aside = " (a constant on all scores, which the loss ignores, aside)" if orbit.blind else ""
    lines = [
        f"{_copies(len(orbit.measured))} from a group of {orbit.dimension} dimensions changed the network's outputs by at "
        f"most {outputs} of the largest{aside}, and the loss on {examples} examples by {change} of its value."
    ]
    if orbit.refused:
        first = orbit.refused[0]
        lines.append(f"{_copies(len(orbit.refused))} more gave no number; {first.label}: {first.refused}")
    for line in (*lines, verdict_of(orbit)):
        say(screen, line)
    notes(screen, loading)


def verdict_of(orbit: AttackResult) -> str:
    """Sentence that names the numbers that survive, and those that moved."""
    alive = [row.name for row in orbit.rows if row.survives]
    moved = [row.name for row in orbit.rows if not row.survives]
    kept = f"Survives: {enumerated(alive)}." if alive else "Nothing survives."
    return f"{kept} Moved, though the function stayed the same: {enumerated(moved)}." if moved else kept


def _copies(count: int) -> str:
    return "1 copy" if count == 1 else f"{count} copies"
