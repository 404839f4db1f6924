"""`isoflat measure`: how flat is this minimum?"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from isoflat.cli import options
from isoflat.cli.exits import NOT_CONVERGED
from isoflat.cli.processes import sharing
from isoflat.cli.save import claim, deliver, save
from isoflat.cli.terminal import facts, plain
from isoflat.core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from isoflat.core.record import Record
    from isoflat.core.table import Table
    from isoflat.experiments.orbit import Orbit
    from isoflat.io.inputs import Inputs


def measure(  # noqa: PLR0913
    model: options.Model,
    data: options.Data,
    weights: options.Weights = None,
    initial: options.Initial = None,
    loss: options.Loss = "cross_entropy",
    names: options.Numbers = None,
    geometry: options.Geometry = None,
    params: options.Params = None,
    weights_key: options.WeightsKey = None,
    strip_prefix: options.StripPrefix = None,
    transform: options.Transform = None,
    split: options.Split = None,
    examples: options.Examples = None,
    batch_size: options.BatchSize = 500,
    rtol: options.Rtol = 1e-3,
    confidence: options.Confidence = None,
    certify: options.Certify = True,
    max_products: options.MaxProducts = 300,
    seconds: options.Seconds = None,
    memory: options.Memory = None,
    probes: options.Probes = 64,
    sample: options.Sample = None,
    logits: options.Logits = None,
    orbit: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="K",
            help="Measure K random copies with the same function too (float64), and how far they differ.",
            rich_help_panel=options.HOW,
        ),
    ] = 0,
    seed: options.Seed = 0,
    dtype: options.Precision = None,
    check: options.Check = "refuse",
    device: options.Device = None,
    out: options.Out = None,
    witness: options.Witness = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
    reproducible_sum: options.ReproducibleSum = False,
    timeout: options.Timeout = 600.0,
) -> None:
    """Measure how flat a minimum is: values with enclosures, loss, accuracy, cost and warnings.

    Several processes share the batches: torchrun --nproc-per-node 4 -m isoflat measure ...

    Exit code 0: every value converged. 3: measured, but not to --rtol. 2: refused, with the reason. 4: a process is lost.
    """
    from isoflat.io.inputs import Inputs
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
    beside = witness_path(out, (weights, initial)) if witness else None
    kept: list[tuple[Record, Tensor]] = []

    def keep(record: Record, vector: Tensor) -> None:
        kept.append((record, vector))

    def claimed() -> None:
        claim(out, force)
        claim(beside, force, "--witness")

    with sharing(device, timeout) as ranks:
        ranks.on_all_ranks(lambda: claimed() if ranks.first else None)
        table, notes, over = evaluate(
            inputs,
            orbit,
            initial,
            measures=names or [options.HEADLINE],
            geometry=geometry or [options.PLACE],
            params=params or None,
            rtol=rtol,
            confidence=confidence,
            certify=certify,
            budget=Budget(max_products, seconds, options.bytes_of(memory)),
            probes=probes,
            sample=sample,
            logits=logits,
            seed=seed,
            dtype=dtype,
            check=check,
            device=device,
            progress=sys.stderr.isatty() and not as_json and ranks.first,
            reproducible_sum=reproducible_sum,
            keep=keep if witness else None,
        )
    if not ranks.first:
        return
    content = {
        "subject": inputs.described()
        | {"params": params or None, "initial": None if initial is None else str(initial), "notes": list(notes)},
        **table.to_dict(),
    }
    if over is not None:
        content["orbit"] = over.to_dict()
    packed = b""
    if beside is not None:
        from isoflat.measurement.sealed import packed as pack

        packed = pack(kept)
        content["witness"] = {"file": beside.name, "sha256": hashlib.sha256(packed).hexdigest()}

    def also() -> None:
        if beside is not None:
            save(beside, packed, force, "--witness")

    deliver(content, lambda screen: show(screen, inputs, table, notes, over), as_json, out, force, also)
    if not all(row.estimate.converged for row in table):
        raise typer.Exit(NOT_CONVERGED)


def witness_path(out: Path | None, used: Sequence[Path | None]) -> Path:
    """Where the witnesses of a result go: beside it.

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


def evaluate(
    inputs: Inputs, orbit: int = 0, initial: Path | None = None, **settings: Any
) -> tuple[Table, tuple[str, ...], Orbit | None]:
    """Load and measure.

    Args:
        inputs: what is measured.
        orbit: how many copies with the same function are measured too.
        initial: a file with the weights before training.
        **settings: as for `isoflat.measure_all`.

    Returns:
        The table, notes on how the inputs were loaded, and what became of the numbers over the orbit, if asked for.

    Raises:
        IsoflatError: something is refused; names and limits are checked before a file is opened.
    """
    from isoflat.cli.attack import watched
    from isoflat.experiments.orbit import Plan
    from isoflat.io.initial import before
    from isoflat.io.inputs import check, device_of, prepare, within_memory
    from isoflat.measurement.prepare import symmetries_of
    from isoflat.measurement.run import measure_all
    from isoflat.risk.ranks import Ranks

    effort = ("rtol", "confidence", "certify", "probes", "sample", "budget", "seed")
    check(settings["measures"], settings["geometry"], **{key: settings[key] for key in effort})
    settings["device"] = device_of(settings["device"])
    loaded, target = Ranks.here().on_all_ranks(
        lambda: prepare(inputs, settings["params"], settings["dtype"], settings["device"])
    )
    settings["initial"], further = Ranks.here().on_all_ranks(lambda: before(inputs, initial))
    notes = (*loaded.notes, *further)
    with within_memory():
        # Found first: a network without a traceable orbit is refused before the data is read.
        found = symmetries_of(target) if orbit else None
        table = measure_all(loaded.model, loaded.batches, loaded.loss, **settings)
        if found is None:
            return table, notes, None
        if not found.dimension:
            return table, (*notes, "no change of these weights that keeps the function: no orbit"), None
        shared = {
            key: settings[key]
            for key in (
                "params", "rtol", "confidence", "certify", "budget", "probes", "device", "reproducible_sum", "logits",
                "initial",
            )
        }  # fmt: skip
        names, places = tuple(settings["measures"]), tuple(settings["geometry"])
        plan = Plan(names, places, points=orbit, search=0, seed=settings["seed"], settings=shared)
        return table, notes, watched(loaded, found, plan, hidden=not settings["progress"])


def show(screen: Console, inputs: Inputs, table: Table, notes: tuple[str, ...], orbit: Orbit | None = None) -> None:
    """Print values, then what is needed to trust them."""
    screen.print(table)
    point = table[0].point
    listed = [
        *inputs.facts(point),
        ("b", f"{point.stationarity:.4g} (zero at a minimum; bounds the difference to the covariant Hessian)"),
        ("peak memory", f"{max(row.estimate.cost.peak_memory for row in table) / 2**20:.0f} MiB"),
    ]
    screen.print(facts(listed))
    for number, row in enumerate(table):
        further = [] if orbit is None else [("over the orbit", _spread(orbit, number))]
        screen.print(plain(f"{row.measure} ({row.geometry})", style="bold"))
        screen.print(facts([*_row(row), *further]))
    for note in dict.fromkeys((*notes, *(note for row in table for note in row.estimate.notes))):
        screen.print(plain(f"note: {note}", style="yellow"), soft_wrap=True)


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


def _spread(orbit: Orbit, number: int) -> str:
    """One number over the copies, in words."""
    row = orbit.rows[number]
    value, verdict = row.before.estimate.value, "does not move" if row.survives else "MOVES"
    lost = f" ({len(orbit.refused)} more gave no number)" if orbit.refused else ""
    points = "1 orbit point" if len(orbit.measured) == 1 else f"{len(orbit.measured)} orbit points"
    return f"{value:.6g} ± {row.deviation:.2g} over {points}{lost}, float64: {verdict}"
