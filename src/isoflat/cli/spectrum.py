"""`isoflat spectrum`: all curvatures of a minimum at once, printed and drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from isoflat.cli import options
from isoflat.cli.deliver import deliver
from isoflat.cli.exits import NOT_CONVERGED
from isoflat.cli.processes import sharing
from isoflat.cli.terminal import facts, plain
from isoflat.core.errors import UsageError
from isoflat.io.files import claim, save

if TYPE_CHECKING:
    from isoflat.core.spectrum import Spectrum
    from isoflat.io.inputs import Inputs


def spectrum(  # noqa: PLR0913
    model: options.Model,
    data: options.Data,
    weights: options.Weights = None,
    loss: options.Loss = "cross_entropy",
    geometry: Annotated[
        str,
        typer.Option(
            "--geometry",
            metavar="NAME",
            help="auto (proof against every symmetry found), elementwise, layerwise (the paper's) or euclidean.",
        ),
    ] = options.PLACE,
    params: options.Params = None,
    weights_key: options.WeightsKey = None,
    strip_prefix: options.StripPrefix = None,
    transform: options.Transform = None,
    split: options.Split = None,
    examples: options.Examples = None,
    batch_size: options.BatchSize = 500,
    outliers: Annotated[
        int,
        typer.Option(min=0, help="Take out at most so many separated eigenvalues.", rich_help_panel=options.HOW),
    ] = 24,
    probes: Annotated[int, typer.Option(min=1, help="Random probes.", rich_help_panel=options.HOW)] = 4,
    steps: Annotated[int, typer.Option(min=2, help="Products per probe.", rich_help_panel=options.HOW)] = 64,
    confidence: Annotated[
        float, typer.Option(help="That the band holds everywhere.", rich_help_panel=options.HOW)
    ] = 0.95,
    max_products: Annotated[
        int | None,
        typer.Option(
            help="Budget of Hessian-vector products in all. Default: what all steps take.", rich_help_panel=options.HOW
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Time in all.", rich_help_panel=options.HOW)] = None,
    memory: options.Memory = None,
    logits: options.Logits = None,
    seed: options.Seed = 0,
    dtype: options.Precision = None,
    check: options.Check = "refuse",
    device: options.Device = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw it there, as .png or .svg.", rich_help_panel=options.OUT),
    ] = None,
    out: options.Out = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace existing --out and --plot files.", rich_help_panel=options.OUT)
    ] = False,
    as_json: options.AsJson = False,
    reproducible_sum: options.ReproducibleSum = False,
    timeout: options.Timeout = 600.0,
) -> None:
    """All Hessian eigenvalues at once: outliers, quantiles, shares and ranks, each with an interval, and a drawing.

    Exit code 0: done. 3: a budget ended it before all steps were taken. 2: refused, with the reason. 4: a process is lost.
    """
    from isoflat.io.inputs import Inputs, device_of, prepare, within_memory
    from isoflat.measurement.spectrum import Deflated
    from isoflat.measurement.spectrum import spectrum as measured
    from isoflat.measures.catalogue import find_geometry
    from isoflat.measures.settings import Budget

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
    find_geometry(geometry)
    budget = Budget(Deflated.price(outliers, probes, steps, max_products), seconds, options.bytes_of(memory))
    with sharing(device, timeout) as ranks:
        ranks.on_all_ranks(lambda: _claim(out, plot, force) if ranks.first else None)
        where = device_of(device)
        loaded, _ = ranks.on_all_ranks(lambda: prepare(inputs, params or None, dtype, where))
        with within_memory():
            found = measured(
                loaded.model,
                loaded.batches,
                loaded.loss,
                geometry=geometry,
                outliers=outliers,
                probes=probes,
                steps=steps,
                confidence=confidence,
                params=params or None,
                budget=budget,
                logits=logits,
                seed=seed,
                dtype=dtype,
                device=where,
                progress=sys.stderr.isatty() and not as_json and ranks.first,
                check=check,
                reproducible_sum=reproducible_sum,
            )
    if not ranks.first:
        return

    def draw() -> None:
        if plot is not None:
            from isoflat.report.spectrum import portrait, written

            save(plot, written(portrait(found), plot.suffix.lower()), force, "--plot")

    content = {"subject": inputs.described() | {"notes": list(loaded.notes)}, **found.to_dict()}
    deliver(content, lambda screen: show(screen, inputs, loaded.notes, found, plot), as_json, out, force, draw)
    if not found.density.reached:
        raise typer.Exit(NOT_CONVERGED)


def _claim(out: Path | None, plot: Path | None, force: bool) -> None:
    """Refuse output paths that could not be written later."""
    claim(out, force)
    if plot is None:
        return
    from isoflat.report.spectrum import FORMATS

    if plot.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {plot}: expected a file name that ends in {' or '.join(FORMATS)}")
    if out is not None and plot.absolute() == out.absolute():
        raise UsageError(f"--plot and --out both name {out}: give each a file of its own")
    claim(plot, force, "--plot")


def show(screen: Console, inputs: Inputs, notes: tuple[str, ...], found: Spectrum, plot: Path | None = None) -> None:
    """Print outliers and quantiles, then what is needed to trust them."""
    listed = [
        *inputs.facts(found.record.point),
        ("peak memory", f"{found.effective_rank.cost.peak_memory / 2**20:.0f} MiB"),
        *found.facts(),
        *(("note", note) for note in notes),
        *([] if plot is None else [("drawing", str(plot))]),
    ]
    screen.print(plain(found.title, style="bold"))
    for grid in found.grids():
        screen.print(grid)
    screen.print(facts(listed))
