"""`isoflat attack`: which numbers survive when the weights change and the function does not?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table as Grid

from isoflat.cli import options
from isoflat.cli.deliver import deliver
from isoflat.cli.terminal import plain

if TYPE_CHECKING:
    from isoflat.experiments.attack import AttackResult


def attack(  # noqa: PLR0913
    model: options.Model,
    data: options.Data,
    weights: options.Weights = None,
    loss: options.Loss = "cross_entropy",
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--measure",
            metavar="NAME",
            help="See isoflat measures; can be repeated. Default: quotient_spectral_norm and hessian_spectral_norm.",
        ),
    ] = None,
    geometry: Annotated[
        list[str] | None,
        typer.Option("--geometry", metavar="NAME", help="Can be repeated. Default: auto and layerwise."),
    ] = None,
    params: options.Params = None,
    weights_key: options.WeightsKey = None,
    strip_prefix: options.StripPrefix = None,
    transform: options.Transform = None,
    split: options.Split = None,
    examples: options.Examples = None,
    batch_size: options.BatchSize = 500,
    points: Annotated[int, typer.Option(min=0, help="Random copies.", rich_help_panel=options.HOW)] = 5,
    spread: Annotated[
        float, typer.Option(help="Standard deviation of the logarithms of the factors.", rich_help_panel=options.HOW)
    ] = 3.0,
    search: Annotated[
        int, typer.Option(min=0, help="Steps that try to move each number further.", rich_help_panel=options.HOW)
    ] = 10,
    rtol: options.Rtol = 1e-3,
    confidence: options.Confidence = None,
    certify: options.Certify = True,
    max_products: options.MaxProducts = 300,
    seconds: options.Seconds = None,
    memory: options.Memory = None,
    probes: options.Probes = 64,
    seed: options.Seed = 0,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Change the weights but not the function, and see which numbers survive. Everything is measured in float64.

    Exit code 0: the attack ran, whatever survived. 2: refused, with the reason.
    """
    from isoflat.experiments.attack import attack as attacked
    from isoflat.experiments.numbers import GEOMETRIES, MEASURES
    from isoflat.io.inputs import Inputs, check, device_of, prepare, within_memory
    from isoflat.measures.settings import Budget

    budget = Budget(max_products, seconds, options.bytes_of(memory))
    measures, places = names or list(MEASURES), geometry or list(GEOMETRIES)
    effort = {"rtol": rtol, "confidence": confidence, "certify": certify, "probes": probes, "budget": budget}
    check(measures, places, **effort, seed=seed)
    where = device_of(device)
    inputs = Inputs(
        model=model,
        data=data,
        weights=weights,
        weights_key=weights_key,
        strip_prefix=tuple(strip_prefix or ()),
        split=split,
        transform=transform,
        examples=examples,
        batch_size=batch_size,
        loss=loss,
        seed=seed,
    )
    loaded, _ = prepare(inputs, params or None, None, where)
    with within_memory():
        orbit = attacked(
            loaded.model,
            loaded.batches,
            loaded.loss,
            measures=measures,
            geometry=places,
            points=points,
            search=search,
            spread=spread,
            seed=seed,
            progress=sys.stderr.isatty() and not as_json,
            params=params or None,
            device=where,
            **effort,
        )
    content = {"subject": inputs.described() | {"notes": list(loaded.notes)}, **orbit.to_dict()}
    deliver(content, lambda screen: show(screen, orbit, loaded.notes), as_json)


def show(screen: Console, orbit: AttackResult, notes: tuple[str, ...]) -> None:
    """One line for each number, what happened to the function meanwhile, and the verdict."""
    grid = Grid(header_style="bold")
    for head in ("number", "geometry"):
        grid.add_column(head, overflow="fold")
    for head in ("before", "lowest\nseen", "highest\nseen", "worst\ndrift", "survives"):
        grid.add_column(head, justify="right", no_wrap=True)
    for row in orbit.rows:
        seen = (f"{row.lowest:.6g}", f"{row.highest:.6g}", f"{row.drift:.1e}")
        verdict = plain("yes", style="green") if row.survives else plain("NO", style="bold red")
        grid.add_row(plain(row.before.measure), row.before.geometry, str(row.before.estimate), *seen, verdict)
    screen.print(grid)
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
        screen.print(plain(line))
    for note in notes:
        screen.print(plain(f"note: {note}", style="yellow"), soft_wrap=True)


def verdict_of(orbit: AttackResult) -> str:
    """Which numbers survive, in words."""
    alive = [row.name for row in orbit.rows if row.survives]
    moved = [row.name for row in orbit.rows if not row.survives]
    kept = f"Survives: {_listed(alive)}." if alive else "Nothing survives."
    return f"{kept} Moved, though the function stayed the same: {_listed(moved)}." if moved else kept


def _copies(count: int) -> str:
    return "1 copy" if count == 1 else f"{count} copies"


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
