"""`isoflat measure`: how flat is this minimum?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from isoflat.cli import options
from isoflat.cli.deliver import deliver
from isoflat.cli.exits import NOT_CONVERGED, sharing
from isoflat.cli.options import ComputeOptions, MeasureOptions, NetworkOptions, OutputOptions, takes
from isoflat.cli.terminal import interactive, notes, step
from isoflat.core.errors import UsageError
from isoflat.core.fitted import FittedTable, fact_list, literal
from isoflat.io.files import claim, save

if TYPE_CHECKING:
    from torch import Tensor

    from isoflat.core.record import Record
    from isoflat.core.table import Table
    from isoflat.experiments.attack import AttackResult
    from isoflat.io.inputs import Inputs


@takes(NetworkOptions, "network")
@takes(MeasureOptions, "wanted")
@takes(ComputeOptions, "compute")
@takes(OutputOptions, "output", without=("report",))
def measure(
    network: NetworkOptions,
    wanted: MeasureOptions,
    orbit: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="K",
            help="Measure K random copies with the same function too (in float64), and how far they differ.",
            rich_help_panel=options.HOW,
        ),
    ] = 0,
    *,
    compute: ComputeOptions,
    output: OutputOptions,
    witness: Annotated[
        bool,
        typer.Option(
            "--witness",
            help="Also write the eigenvectors that carry the numbers, beside --out as .safetensors: isoflat verify checks "
            "the numbers by them.",
            rich_help_panel=options.OUT,
        ),
    ] = False,
) -> None:
    """Measure how flat a minimum is: values with confidence intervals, loss, accuracy, cost and warnings.

    Several processes share the batches: torchrun --nproc-per-node 4 -m isoflat measure ...

    Exit code 0: every value converged. 3: measured, but not to --rtol. 2: refused, with the reason. 4: a process is lost.
    """
    inputs, (out, force, initial) = network.inputs(compute.seed), (output.out, output.force, wanted.initial)
    beside = witness_path(out, (network.weights, initial)) if witness else None
    kept: list[tuple[Record, Tensor]] = []
    with sharing(compute.device, compute.timeout) as ranks:
        with ranks.agreeing():
            if ranks.first:
                claim(out, force)
                claim(beside, force, "--witness")
        table, loading, over = load_and_measure(
            inputs,
            orbit,
            initial,
            hidden=output.as_json,
            measures=wanted.names,
            geometry=wanted.geometry,
            params=wanted.params or None,
            **wanted.effort(compute.seed),
            logits=wanted.logits,
            **compute.precision(),
            device=compute.device,
            progress=interactive() and not output.as_json and ranks.first,
            keep=(lambda *row: kept.append(row)) if witness else None,
        )
    if not ranks.first:
        return
    content = {
        "subject": inputs.described()
        | {
            "params": wanted.params or None,
            "initial": None if initial is None else str(initial),
            "notes": list(loading),
        },
        **table.to_dict(),
    }
    if over is not None:
        content["orbit"] = over.to_dict()
    packed = b""
    if beside is not None:
        from isoflat.measurement.witnesses import packed_witnesses

        packed = packed_witnesses(kept)
        content["witness"] = {"file": beside.name, "sha256": hashlib.sha256(packed).hexdigest()}

    def also() -> None:
        if beside is not None:
            save(beside, packed, force, "--witness")

    deliver(content, lambda screen: show(screen, inputs, table, loading, over), output.as_json, out, force, also)
    if not all(row.estimate.converged for row in table):
        raise typer.Exit(NOT_CONVERGED)


def witness_path(out: Path | None, used: Sequence[Path | None]) -> Path:
    """Path of the witnesses of a result: beside it.

    Args:
        out: the file of the result.
        used: files that are read, and must not be replaced.

    Raises:
        UsageError: there is no result on disk, or the place is that of another file.

    >>> witness_path(Path("runs/result.json"), []).name
    'result.safetensors'
    """
    if out is None:
        raise UsageError("--witness writes a file beside the result: name the result with --out result.json")
    beside = out.with_suffix(".safetensors")
    if any(beside.absolute() == file.resolve() or beside.resolve() == file.resolve() for file in (out, *used) if file):
        raise UsageError(
            f"--witness would write {beside}, which is another file of this measurement: choose another name for --out"
        )
    return beside


def load_and_measure(
    inputs: Inputs, orbit: int = 0, initial: Path | None = None, hidden: bool = True, **settings: Any
) -> tuple[Table, tuple[str, ...], AttackResult | None]:
    """Load and measure.

    Args:
        inputs: the network, its data and its loss, as the user named them.
        orbit: number of copies with the same function that are measured too.
        initial: a file with the weights before training.
        hidden: True to show no progress.
        **settings: as for `isoflat.measure_all`.

    Returns:
        The table, notes on how the inputs were loaded, and what became of the numbers over the orbit, if asked for.

    Raises:
        IsoflatError: something is refused; names and limits are checked before a file is opened.
    """
    from isoflat.experiments.attack import attack
    from isoflat.io.inputs import check_names, device_of, load_initial, prepare, within_memory
    from isoflat.measurement.groups import symmetries_of
    from isoflat.measurement.run import measure_all
    from isoflat.risk.ranks import Ranks

    effort = ("rtol", "confidence", "certify", "probes", "sample", "budget", "seed")
    check_names(settings["measures"], settings["geometry"], **{key: settings[key] for key in effort})
    settings["device"] = device_of(settings["device"])
    ranks = Ranks.here()
    with ranks.agreeing():
        loaded, target = prepare(inputs, settings["params"], settings["dtype"], settings["device"])
        settings["initial"], further = load_initial(inputs, initial)
    loading = (*loaded.notes, *further)
    hidden = hidden or not ranks.first
    step(f"loaded {inputs.model} and {inputs.data}", hidden)
    with within_memory():
        # Found first: a network without a traceable orbit is refused before the data is read.
        found = symmetries_of(target) if orbit else None
        step(f"measuring {', '.join(settings['measures'])} ({', '.join(settings['geometry'])})", hidden)
        table = measure_all(loaded.model, loaded.batches, loaded.loss, **settings)
        if found is None:
            return table, loading, None
        if not found.dimension:
            return table, (*loading, "no change of these weights that keeps the function: no orbit"), None
        shared = (
            "measures", "geometry", "params", "rtol", "confidence", "certify", "budget", "probes", "seed", "device",
            "reproducible_sum", "logits", "initial",
        )  # fmt: skip
        copies = attack(
            loaded.model,
            loaded.batches,
            loaded.loss,
            points=orbit,
            search=0,
            symmetries=found,
            progress=not hidden,
            **{key: settings[key] for key in shared},
        )
        return table, loading, copies


def show(
    screen: Console, inputs: Inputs, table: Table, loading: tuple[str, ...], orbit: AttackResult | None = None
) -> None:
    """Print values, then what supports them: intervals, invariances, cost and notes."""
    screen.print(_values(table))
    notes(screen, (f"not measured: {part}" for part in table.omitted))
    point = table[0].point
    listed = [
        *inputs.facts(point),
        (
            "stationarity",
            f"{point.stationarity:.4g}: zero at a minimum; bounds the difference to the covariant Hessian",
        ),
        ("peak memory", f"{max(row.estimate.cost.peak_memory for row in table) / 2**20:.0f} MiB"),
    ]
    screen.print(fact_list(listed))
    for number, row in enumerate(table):
        further = [] if orbit is None else [("over the orbit", _spread(orbit, number))]
        screen.print(literal(f"{row.measure} ({row.geometry})", style="bold"))
        screen.print(fact_list([*_row(row), *further]))
    notes(screen, (*loading, *(note for row in table for note in row.estimate.notes)))


def _values(table: Table) -> FittedTable:
    """One line for each number."""
    from isoflat.core.estimate import interval

    return FittedTable(
        ("measure", "geometry", "value", "interval", "converged"),
        [
            (
                row.measure,
                row.geometry,
                str(row.estimate),
                interval(row.estimate),
                "yes" if row.estimate.converged else "NO",
            )
            for row in table
        ],
        words=2,
    )


def _row(row: Record) -> list[tuple[str, str]]:
    """One measured number in words."""
    from isoflat.core.estimate import Kind, interval

    estimate, cost = row.estimate, row.estimate.cost
    asked = f"asked for {row.settings['rtol']:.2g}"
    if estimate.kind is Kind.UNCERTIFIED:
        known = f"none: a value with {interval(estimate)}; nothing is claimed about the upper end"
        width = asked
    elif estimate.kind is Kind.EXACT:
        known, width = f"{interval(estimate)}: exact, but for rounding", "nothing is estimated"
    else:
        name = "certified" if estimate.kind is Kind.ENCLOSURE else "t-interval of a stochastic estimate"
        known = f"{interval(estimate)}, {name} with confidence {estimate.confidence:.7g}"
        width = f"relative width {estimate.relative_width:.2g}, {asked}"
    ratio = row.stationarity_ratio
    return [
        ("value", str(estimate)),
        ("interval", known),
        ("converged", f"{'yes' if estimate.converged else 'NO'} ({width})"),
        ("invariant to", row.group),
        ("stationarity", "not defined here" if ratio is None else f"{ratio:.3g} of the value"),
        (
            "cost",
            f"{cost.products} Hessian-vector products, {cost.gradient_passes:.1f} gradient passes, {cost.seconds:.2f} s",
        ),
    ]


def _spread(orbit: AttackResult, number: int) -> str:
    """One number over the copies, in words."""
    row = orbit.rows[number]
    value, verdict = row.before.estimate.value, "does not move" if row.survives else "MOVES"
    lost = f" ({len(orbit.refused)} more gave no number)" if orbit.refused else ""
    points = "1 orbit point" if len(orbit.measured) == 1 else f"{len(orbit.measured)} orbit points"
    return f"{value:.6g} ± {row.deviation:.2g} over {points}{lost}, float64: {verdict}"
