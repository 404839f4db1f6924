"""`isoflat measure`: how flat is this minimum?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as Grid

from isoflat.cli import options
from isoflat.cli.exits import NOT_CONVERGED
from isoflat.cli.save import claim, save
from isoflat.cli.terminal import console, plain

if TYPE_CHECKING:
    from isoflat.cli.load.inputs import Inputs
    from isoflat.core.record import Record
    from isoflat.core.table import Table

HEADLINE = "quotient_spectral_norm"
"""Measured where no --measure is given."""


def measure(  # noqa: PLR0913
    model: options.Model,
    data: options.Data,
    weights: options.Weights = None,
    loss: options.Loss = "cross_entropy",
    names: Annotated[
        list[str] | None,
        typer.Option("--measure", metavar="NAME", help=f"See isoflat measures; can be repeated. Default: {HEADLINE}."),
    ] = None,
    geometry: Annotated[
        list[str] | None, typer.Option("--geometry", metavar="NAME", help="Can be repeated. Default: layerwise.")
    ] = None,
    params: options.Params = None,
    weights_key: options.WeightsKey = None,
    strip_prefix: options.StripPrefix = None,
    transform: options.Transform = None,
    split: options.Split = None,
    examples: options.Examples = None,
    batch_size: options.BatchSize = 500,
    rtol: Annotated[
        float, typer.Option(help="Relative width of the enclosure to reach.", rich_help_panel=options.HOW)
    ] = 1e-3,
    confidence: Annotated[
        float | None,
        typer.Option(help="That the interval holds. Default: 1 - 1e-6; 0.95 for traces.", rich_help_panel=options.HOW),
    ] = None,
    certify: Annotated[
        bool, typer.Option("--certify/--no-certify", help="An enclosure, or a value only.", rich_help_panel=options.HOW)
    ] = True,
    max_products: Annotated[
        int, typer.Option(help="Hessian-vector products per eigenvalue.", rich_help_panel=options.HOW)
    ] = 300,
    seconds: Annotated[float | None, typer.Option(help="Time per eigenvalue.", rich_help_panel=options.HOW)] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="For kept graphs, such as 4GB. Default: half of what is free.", rich_help_panel=options.HOW),
    ] = None,
    probes: Annotated[int, typer.Option(help="Random probes of traces.", rich_help_panel=options.HOW)] = 64,
    seed: options.Seed = 0,
    dtype: options.Precision = None,
    device: options.Device = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the result there, as JSON.", rich_help_panel=options.OUT),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing --out file.", rich_help_panel=options.OUT)
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure how flat a minimum is: values with enclosures, loss, accuracy, cost and warnings.

    Exit code 0: every value converged. 3: measured, but not to --rtol. 2: refused, with the reason.
    """
    claim(out, force)
    from isoflat.cli.load.inputs import Inputs
    from isoflat.measures.base import Budget

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
    table, notes = evaluate(
        inputs,
        measures=names or [HEADLINE],
        geometry=geometry or ["layerwise"],
        params=params or None,
        rtol=rtol,
        confidence=confidence,
        certify=certify,
        budget=Budget(max_products, seconds, options.bytes_of(memory)),
        probes=probes,
        seed=seed,
        dtype=dtype,
        device=device,
        progress=sys.stderr.isatty() and not as_json,
    )
    text = json.dumps({"subject": inputs.described() | {"notes": list(notes)}, **table.to_dict()}, allow_nan=False)
    try:
        if out is not None:
            save(out, f"{text}\n", force)
    finally:  # where the disk refuses, the numbers still reach the user
        if as_json:
            sys.stdout.write(f"{text}\n")
        else:
            show(console(), inputs, table, notes)
    if not all(row.estimate.converged for row in table):
        raise typer.Exit(NOT_CONVERGED)


def evaluate(inputs: Inputs, **settings: Any) -> tuple[Table, tuple[str, ...]]:
    """Load and measure.

    Args:
        inputs: what is measured.
        **settings: as for `isoflat.measure_all`.

    Returns:
        The table, and notes on how the inputs were loaded.

    Raises:
        IsoflatError: something is refused; names and limits are checked before a file is opened.
    """
    import torch

    from isoflat.cli.load.inputs import device_of, load, try_forward
    from isoflat.measures.base import Effort
    from isoflat.measures.catalogue import find_geometry, find_measure
    from isoflat.measures.prepare import subject
    from isoflat.measures.run import measure_all

    for name in settings["measures"]:
        find_measure(name)
    for name in settings["geometry"]:
        find_geometry(name)
    effort = ("rtol", "confidence", "certify", "probes", "budget", "seed")
    Effort(**{key: settings[key] for key in effort})
    device = device_of(settings.pop("device"))
    loaded = load(inputs)
    try:
        try_forward(subject(loaded.model, loaded.batches, loaded.loss, settings["params"], settings["dtype"], device))
        table = measure_all(loaded.model, loaded.batches, loaded.loss, device=device, **settings)
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error
    return table, loaded.notes


def show(screen: Console, inputs: Inputs, table: Table, notes: tuple[str, ...]) -> None:
    """Print values, then what is needed to trust them."""
    screen.print(table)
    point = table[0].point
    accuracy = "" if point.accuracy is None else f", accuracy {point.accuracy:.4g} (chance {point.chance:.4g})"
    facts = [
        ("network", f"{inputs.model}, {point.parameters} trainable entries"),
        ("weights", "as built by the factory" if inputs.weights is None else str(inputs.weights)),
        ("data", f"{inputs.data}, {point.examples} examples"),
        ("loss", f"{point.loss:.6g} ({inputs.loss}){accuracy}"),
        ("gradient norm", f"{point.gradient_norm:.4g}"),
        ("b", f"{point.stationarity:.4g} (zero at a minimum; bounds the difference to the covariant Hessian)"),
        ("peak memory", f"{max(row.estimate.cost.peak_memory for row in table) / 2**20:.0f} MiB"),
    ]
    _facts(screen, "", facts)
    for row in table:
        _facts(screen, f"{row.measure} ({row.geometry})", _row(row))
    for note in dict.fromkeys((*notes, *(note for row in table for note in row.estimate.notes))):
        screen.print(plain(f"note: {note}", style="yellow"), soft_wrap=True)


def _row(row: Record) -> list[tuple[str, str]]:
    """One measured number in words."""
    from isoflat.core.estimate import Kind
    from isoflat.core.table import interval

    estimate, cost = row.estimate, row.estimate.cost
    asked = f"asked for {row.settings['rtol']:.2g}"
    if estimate.kind is Kind.UNCERTIFIED:
        known = f"none: a value with {interval(estimate)}; nothing is claimed about the upper end"
        width = asked
    else:
        name = "enclosure" if estimate.kind is Kind.ENCLOSURE else "t-interval of a stochastic estimate"
        known = f"{interval(estimate)}, {name} with confidence {estimate.confidence:.7g}"
        width = f"relative width {estimate.relative_width:.2g}, {asked}"
    return [
        ("value", str(estimate)),
        ("enclosure", known),
        ("converged", f"{'yes' if estimate.converged else 'NO'} ({width})"),
        ("invariant to", row.group),
        ("b/value", "not defined here" if row.stationarity_ratio is None else f"{row.stationarity_ratio:.3g}"),
        ("cost", f"{cost.products} products, {cost.gradient_passes:.1f} gradient passes, {cost.seconds:.2f} s"),
    ]


def _facts(screen: Console, title: str, facts: list[tuple[str, str]]) -> None:
    """Names and values in two columns."""
    grid = Grid.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(plain(name), plain(value))
    screen.print(plain(title, style="bold"))
    screen.print(grid)
