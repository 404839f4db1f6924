"""`isoflat spectrum`: all curvatures of a minimum at once, printed and drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

import typer
from rich.console import Console

from isoflat.cli import options
from isoflat.cli.deliver import deliver
from isoflat.cli.exits import NOT_CONVERGED, sharing
from isoflat.cli.options import ComputeOptions, MeasureOptions, NetworkOptions, OutputOptions, takes
from isoflat.cli.terminal import interactive, step
from isoflat.core.errors import UsageError
from isoflat.core.fitted import fact_list, literal
from isoflat.io.files import claim, save

if TYPE_CHECKING:
    from isoflat.core.spectrum import Spectrum
    from isoflat.io.inputs import Inputs


@final
@dataclass(frozen=True)
class DensityOptions:
    """The geometry in which a spectrum is measured, and how closely."""

    geometry: Annotated[
        str,
        typer.Option(
            "--geometry",
            metavar="NAME",
            help="auto (proof against every symmetry found), elementwise, layerwise (the paper's) or euclidean.",
        ),
    ] = options.PLACE
    outliers: Annotated[
        int,
        typer.Option(min=0, help="Most separated eigenvalues that are taken out first.", rich_help_panel=options.HOW),
    ] = 24
    probes: Annotated[
        int, typer.Option(min=1, help="Random vectors that see the rest.", rich_help_panel=options.HOW)
    ] = 4
    steps: Annotated[
        int, typer.Option(min=2, help="Hessian-vector products for each of them.", rich_help_panel=options.HOW)
    ] = 64
    confidence: Annotated[
        float,
        typer.Option(
            help="Probability that the band contains the true distribution everywhere.", rich_help_panel=options.HOW
        ),
    ] = 0.95
    max_products: Annotated[
        int | None,
        typer.Option(
            help="Most Hessian-vector products in all. Default: what all steps take.", rich_help_panel=options.HOW
        ),
    ] = None
    seconds: Annotated[
        float | None, typer.Option(help="Most seconds in all. Default: no limit.", rich_help_panel=options.HOW)
    ] = None


@takes(NetworkOptions, "network")
@takes(DensityOptions, "wanted")
@takes(MeasureOptions, "further", only=("params", "memory", "logits"))
@takes(ComputeOptions, "compute")
@takes(OutputOptions, "output", without=("report",))
def spectrum(
    network: NetworkOptions,
    wanted: DensityOptions,
    further: MeasureOptions,
    compute: ComputeOptions,
    output: OutputOptions,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw it there, as .png or .svg.", rich_help_panel=options.OUT),
    ] = None,
) -> None:
    """All Hessian eigenvalues at once: outliers, quantiles, shares and ranks, each with an interval, and a drawing.

    Exit code 0: done. 3: a budget ended it before all steps were taken. 2: refused, with the reason. 4: a process is lost.
    """
    from isoflat.io.inputs import device_of, prepare, within_memory
    from isoflat.measurement.spectrum import Deflated
    from isoflat.measurement.spectrum import spectrum as measured
    from isoflat.measures.catalogue import find_geometry
    from isoflat.measures.settings import Budget

    inputs, out, force = network.inputs(compute.seed), output.out, output.force
    find_geometry(wanted.geometry)
    price = Deflated.price(wanted.outliers, wanted.probes, wanted.steps, wanted.max_products)
    budget = Budget(price, wanted.seconds, options.bytes_of(further.memory))
    with sharing(compute.device, compute.timeout) as ranks:
        with ranks.agreeing():
            if ranks.first:
                _claim(out, plot, force)
        where, params = device_of(compute.device), further.params or None
        with ranks.agreeing():
            loaded, _ = prepare(inputs, params, compute.dtype, where)
        hidden = output.as_json or not ranks.first
        step(f"loaded {inputs.model} and {inputs.data}", hidden)
        step(f"measuring the spectrum ({wanted.geometry})", hidden)
        with within_memory():
            found = measured(
                loaded.model,
                loaded.batches,
                loaded.loss,
                geometry=wanted.geometry,
                outliers=wanted.outliers,
                probes=wanted.probes,
                steps=wanted.steps,
                confidence=wanted.confidence,
                params=params,
                budget=budget,
                logits=further.logits,
                seed=compute.seed,
                device=where,
                progress=interactive() and not hidden,
                **compute.precision(),
            )
    if not ranks.first:
        return

    def draw() -> None:
        if plot is not None:
            from isoflat.report.spectrum import portrait, written

            save(plot, written(portrait(found), plot.suffix.lower()), force, "--plot")

    content = {"subject": inputs.described() | {"notes": list(loaded.notes)}, **found.to_dict()}
    deliver(content, lambda screen: show(screen, inputs, loaded.notes, found, plot), output.as_json, out, force, draw)
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
    """Print outliers and quantiles, then what supports them: errors, cost and notes."""
    listed = [
        *inputs.facts(found.record.point),
        ("peak memory", f"{found.effective_rank.cost.peak_memory / 2**20:.0f} MiB"),
        *found.facts(),
        *(("note", note) for note in notes),
        *([] if plot is None else [("drawing", str(plot))]),
    ]
    screen.print(literal(found.title, style="bold"))
    screen.print(*found.grids(), sep="\n")
    screen.print(fact_list(listed))
