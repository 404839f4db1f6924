"""`isoflat compare`: which of several checkpoints is flatter?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from isoflat.cli import options
from isoflat.cli.deliver import deliver
from isoflat.cli.exits import NOT_CONVERGED, sharing
from isoflat.cli.options import ComputeOptions, MeasureOptions, NetworkOptions, OutputOptions, takes
from isoflat.cli.terminal import complain, interactive, notes, step
from isoflat.core.fitted import literal
from isoflat.io.files import claim, save

if TYPE_CHECKING:
    from isoflat.core.comparison import Comparison
    from isoflat.io.inputs import Inputs

STORED = ("checkpoints", "reference", "names", "geometry", "logits", "out", "report", "force", "as_json")
"""Arguments that count where numbers are measured already; the others are refused there."""


@takes(NetworkOptions, "network", without=("weights",), model=None, data=None)
@takes(MeasureOptions, "wanted")
@takes(ComputeOptions, "compute")
@takes(OutputOptions, "output")
def compare(
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
    network: NetworkOptions,
    wanted: MeasureOptions,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="FILE",
            help="The checkpoint, or the name of the stored network, that the others are set against. Default: the first.",
        ),
    ] = None,
    *,
    compute: ComputeOptions,
    output: OutputOptions,
) -> None:
    """Say which of several checkpoints is flatter: same samples, same probes, same random starts.

    One is called flatter only where the interval of the difference leaves 0 out; else it is a tie, with what would
    decide it.

    Exit code 0: every value converged, ties or not. 3: measured, but not to --rtol. 2: refused, with the reason, before
    anything is measured where a file is bad. 4: a process is lost.
    """
    from isoflat.core.errors import UsageError
    from isoflat.experiments.stored import holds_results
    from isoflat.io.inputs import check_names, device_of, load_initial, within_memory
    from isoflat.io.several import labels, load_several
    from isoflat.measurement.compare import compare as compared

    if all(map(holds_results, checkpoints)):
        _stored(context, checkpoints, wanted, output, reference)
        return
    if network.model is None or network.data is None:
        raise UsageError("weights need --model module:factory, and --data that they are measured on")
    inputs, effort, params = network.inputs(compute.seed), wanted.effort(compute.seed), wanted.params or None
    check_names(wanted.names, wanted.geometry, **effort)
    if len(checkpoints) < 2:
        raise UsageError(f"only {checkpoints[0]} was named: a comparison needs two checkpoints or more")
    files = dict(zip(labels(checkpoints), checkpoints, strict=True))
    base = _chosen(reference, files)
    with sharing(compute.device, compute.timeout) as ranks:
        with ranks.agreeing():
            if ranks.first:
                claimed(output.out, output.report, output.force)
        where = device_of(compute.device)
        with ranks.agreeing():
            loaded = load_several(inputs, files, {"params": params, "dtype": compute.dtype, "device": where})
            start, further = load_initial(inputs, wanted.initial)
        loading = (*loaded.notes, *further)
        hidden = output.as_json or not ranks.first
        step(f"loaded {', '.join(files)}, and {inputs.data}", hidden)
        step(f"measuring {', '.join(wanted.names)} ({', '.join(wanted.geometry)})", hidden)
        with within_memory():
            found = compared(
                loaded.models,
                loaded.batches,
                loaded.loss,
                reference=base,
                measures=wanted.names,
                geometry=wanted.geometry,
                logits=wanted.logits,
                initial=start,
                params=params,
                device=where,
                progress=interactive() and not hidden,
                **compute.precision(),
                **effort,
            )
    if not ranks.first:
        return
    subject = inputs.described() | {"weights": {label: str(path) for label, path in files.items()}}
    subject |= {"initial": None if wanted.initial is None else str(wanted.initial), "notes": list(loading)}
    _deliver(found, subject, output, lambda screen: show(screen, inputs, found, loading))


def _deliver(
    found: Comparison, subject: Mapping[str, Any], output: OutputOptions, shown: Callable[[Console], None]
) -> None:
    """Write and print a comparison; end with an exit code of its own where a value did not converge."""

    def also() -> None:
        if output.report is not None:
            save(output.report, written(found, subject), output.force, "--report")

    deliver({"subject": subject, **found.to_dict()}, shown, output.as_json, output.out, output.force, also)
    if not found.converged:
        raise typer.Exit(NOT_CONVERGED)


def _stored(
    context: typer.Context,
    paths: Sequence[Path],
    wanted: MeasureOptions,
    output: OutputOptions,
    reference: str | None,
) -> None:
    """Compare numbers that are measured already."""
    from isoflat.core.errors import UsageError
    from isoflat.experiments.stored import Wanted, compare_stored
    from isoflat.measures.catalogue import find_geometry, find_measure

    idle = {each.name: each.opts[0] for each in context.command.params if each.name and each.name not in STORED}
    other = [option for name, option in idle.items() if options.typed(context, name)]
    if other:
        raise UsageError(
            f"{', '.join(other)}: {', '.join(map(str, paths))} holds numbers that are measured already; leave it out"
        )
    claimed(output.out, output.report, output.force)
    names = wanted.names if options.typed(context, "names") else ()
    places = wanted.geometry if options.typed(context, "geometry") else ()
    asked = Wanted(
        tuple(find_measure(name).label for name in names),
        tuple(find_geometry(place).name for place in places),
        wanted.logits or "raw",
    )
    found, subject = compare_stored(paths, asked, reference, partial(complain, prefix="warning"))

    def shown(screen: Console) -> None:
        screen.print(found)
        notes(screen, subject["notes"])

    _deliver(found, subject, output, shown)


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


def show(screen: Console, inputs: Inputs, comparison: Comparison, loading: Sequence[str]) -> None:
    """Print network and data, then which is flatter, then notes on how they were loaded."""
    point = comparison.rows[0].point
    screen.print(literal(f"network  {inputs.model}, {point.parameters} trainable entries"))
    screen.print(literal(f"data     {inputs.data}, {point.examples} examples; loss {inputs.loss}"))
    screen.print()
    screen.print(comparison)
    notes(screen, loading)
