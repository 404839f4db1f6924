"""`isoflat compare`: which of several checkpoints is flatter?"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from isoflat.cli import options
from isoflat.cli.deliver import deliver
from isoflat.cli.exits import NOT_CONVERGED
from isoflat.cli.processes import sharing
from isoflat.cli.terminal import complain, plain
from isoflat.io.files import claim, save

if TYPE_CHECKING:
    from isoflat.core.comparison import Comparison
    from isoflat.io.inputs import Inputs

STORED = ("checkpoints", "reference", "names", "geometry", "logits", "out", "report", "force", "as_json")
"""Arguments that have a meaning where nothing is measured."""


def compare(  # noqa: PLR0913
    context: typer.Context,
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="Weights, two files or more, of the kinds that --weights of isoflat measure takes. Or what is measured "
            "already: results of isoflat measure (*.json), or a folder of isoflat reproduce or study.",
            show_default=False,
        ),
    ],
    model: options.SomeModel = None,
    data: options.SomeData = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="FILE",
            help="The checkpoint, or the name of the stored network, that the others are set against. Default: the first.",
        ),
    ] = None,
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
    seed: options.Seed = 0,
    dtype: options.Precision = None,
    check: options.Check = "refuse",
    device: options.Device = None,
    out: options.Out = None,
    report: options.Report = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
    reproducible_sum: options.ReproducibleSum = False,
    timeout: options.Timeout = 600.0,
) -> None:
    """Say which of several checkpoints is flatter: same samples, same probes, same random starts.

    One is called flatter only where the interval of the difference leaves 0 out; else it is a tie, with what would
    decide it.

    Exit code 0: every value converged, ties or not. 3: measured, but not to --rtol. 2: refused, with the reason, before
    anything is measured where a file is bad. 4: a process is lost.
    """
    from isoflat.core.errors import UsageError
    from isoflat.experiments.stored import holds_results
    from isoflat.io.inputs import Inputs, before, device_of, within_memory
    from isoflat.io.inputs import check as known
    from isoflat.io.several import labels, load_several
    from isoflat.measurement.compare import compare as compared
    from isoflat.measures.settings import Budget

    if all(map(holds_results, checkpoints)):
        _stored(context, checkpoints, reference)
        return
    if model is None or data is None:
        raise UsageError("weights need --model module:factory, and --data that they are measured on")
    inputs = Inputs(
        model=model,
        data=data,
        weights_key=weights_key,
        strip_prefix=tuple(strip_prefix or ()),
        split=split,
        transform=transform,
        examples=examples,
        batch_size=batch_size,
        loss=loss,
        seed=seed,
    )
    effort: dict[str, Any] = {
        "rtol": rtol,
        "confidence": confidence,
        "certify": certify,
        "probes": probes,
        "sample": sample,
        "budget": Budget(max_products, seconds, options.bytes_of(memory)),
        "seed": seed,
    }
    numbers, places = names or [options.HEADLINE], geometry or [options.PLACE]
    known(numbers, places, **effort)
    if len(checkpoints) < 2:
        raise UsageError(f"only {checkpoints[0]} was named: a comparison needs two checkpoints or more")
    files = dict(zip(labels(checkpoints), checkpoints, strict=True))
    base = _chosen(reference, files)
    with sharing(device, timeout) as ranks:
        ranks.on_all_ranks(lambda: claimed(out, report, force) if ranks.first else None)
        where = device_of(device)
        loaded = ranks.on_all_ranks(
            lambda: load_several(inputs, files, {"params": params or None, "dtype": dtype, "device": where})
        )
        start, further = ranks.on_all_ranks(lambda: before(inputs, initial))
        notes = (*loaded.notes, *further)
        with within_memory():
            found = compared(
                loaded.models,
                loaded.batches,
                loaded.loss,
                reference=base,
                measures=numbers,
                geometry=places,
                logits=logits,
                initial=start,
                params=params or None,
                dtype=dtype,
                check=check,
                device=where,
                progress=sys.stderr.isatty() and not as_json and ranks.first,
                reproducible_sum=reproducible_sum,
                **effort,
            )
    if not ranks.first:
        return
    subject = inputs.described() | {"weights": {label: str(path) for label, path in files.items()}}
    subject |= {"initial": None if initial is None else str(initial), "notes": list(notes)}

    def also() -> None:
        if report is not None:
            save(report, written(found, subject), force, "--report")

    content = {"subject": subject, **found.to_dict()}
    deliver(content, lambda screen: show(screen, inputs, found, notes), as_json, out, force, also)
    if not found.converged:
        raise typer.Exit(NOT_CONVERGED)


def _stored(context: typer.Context, paths: Sequence[Path], reference: str | None) -> None:
    """Compare what is measured already."""
    from isoflat.core.errors import UsageError
    from isoflat.experiments.stored import Wanted, compared
    from isoflat.measures.catalogue import find_geometry, find_measure

    given: Mapping[str, Any] = context.params
    other = [each.opts[0] for each in context.command.params if each.name and _idle(context, each.name)]
    if other:
        raise UsageError(
            f"{', '.join(other)}: {', '.join(map(str, paths))} holds numbers that are measured already; leave it out"
        )
    claimed(given["out"], given["report"], given["force"])
    wanted = Wanted(
        tuple(find_measure(name).label for name in given["names"] or ()),
        tuple(find_geometry(name).name for name in given["geometry"] or ()),
        given["logits"] or "raw",
    )
    found, subject = compared(paths, wanted, reference, partial(complain, prefix="warning"))

    def also() -> None:
        if given["report"] is not None:
            save(given["report"], written(found, subject), given["force"], "--report")

    def shown(screen: Console) -> None:
        screen.print(found)
        for note in subject["notes"]:
            screen.print(plain(f"note: {note}", style="yellow"), soft_wrap=True)

    deliver({"subject": subject, **found.to_dict()}, shown, given["as_json"], given["out"], given["force"], also)
    if not found.converged:
        raise typer.Exit(NOT_CONVERGED)


def _idle(context: typer.Context, name: str) -> bool:
    """Whether it was typed, and has no meaning for stored numbers."""
    return name not in STORED and options.typed(context, name)


def _chosen(reference: str | None, files: Mapping[str, Path]) -> str | None:
    """The label of the reference, which may be named by its file."""
    from isoflat.core.errors import UsageError

    if reference is None or reference in files:
        return reference
    found = [label for label, path in files.items() if Path(reference) == path]
    if not found:
        raise UsageError(f"--reference {reference} is none of the checkpoints: {', '.join(map(str, files.values()))}")
    return found[0]


def claimed(out: Path | None, report: Path | None, force: bool) -> None:
    """Refuse outputs that could not be written, or would replace each other, before anything is measured.

    Raises:
        UsageError: as `claim`, or both are the same file.
    """
    from isoflat.core.errors import UsageError

    claim(out, force)
    claim(report, force, "--report")
    if out is not None and report is not None and out.resolve() == report.resolve():
        raise UsageError(f"--out and --report name the same file, {out}: choose another for one of them")


def written(comparison: Comparison, subject: Mapping[str, Any]) -> str:
    """The comparison as a page."""
    from isoflat.report.html import render
    from isoflat.report.pages.compare import page

    return render(page(comparison, subject))


def show(screen: Console, inputs: Inputs, comparison: Comparison, notes: Sequence[str]) -> None:
    """Print what was compared, then who is flatter, then how it was loaded."""
    point = comparison.rows[0].point
    screen.print(plain(f"network  {inputs.model}, {point.parameters} trainable entries"))
    screen.print(plain(f"data     {inputs.data}, {point.examples} examples; loss {inputs.loss}"))
    screen.print()
    screen.print(comparison)
    for note in dict.fromkeys(notes):
        screen.print(plain(f"note: {note}", style="yellow"), soft_wrap=True)
