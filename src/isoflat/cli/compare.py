"""`isoflat compare`: which of several checkpoints is flatter?"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer
from rich.console import Console

from isoflat.cli import options
from isoflat.cli.exits import NOT_CONVERGED
from isoflat.cli.options import ComputeOptions, MeasureOptions, NetworkOptions, OutputOptions, takes
from isoflat.cli.processes import sharing
from isoflat.cli.progress import interactive, step
from isoflat.cli.save import claim, deliver, save
from isoflat.cli.terminal import notes, plain
from isoflat.core.render import visible

if TYPE_CHECKING:
    import torch

    from isoflat.core.comparison import Comparison
    from isoflat.io.inputs import Inputs
    from isoflat.risk.batches import Batches

_ENDINGS = (".index.json", ".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Taken off the names of files to make labels, in this order."""


STORED = ("checkpoints", "reference", "names", "geometry", "logits", "out", "report", "force", "as_json")
"""Arguments that have a meaning where nothing is measured."""


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
    from isoflat.io.initial import before
    from isoflat.io.inputs import check as known
    from isoflat.io.inputs import device_of, within_memory
    from isoflat.measurement.compare import compare as compared

    if all(map(holds_results, checkpoints)):
        _stored(context, checkpoints, wanted, output, reference)
        return
    if network.model is None or network.data is None:
        raise UsageError("weights need --model module:factory, and --data that they are measured on")
    inputs, effort, params = network.inputs(compute.seed), wanted.effort(compute.seed), wanted.params or None
    known(wanted.names, wanted.geometry, **effort)
    if len(checkpoints) < 2:
        raise UsageError(f"only {checkpoints[0]} was named: a comparison needs two checkpoints or more")
    files = dict(zip(labels(checkpoints), checkpoints, strict=True))
    base = _chosen(reference, files)
    with sharing(compute.device, compute.timeout) as ranks:
        ranks.on_all_ranks(lambda: claimed(output.out, output.report, output.force) if ranks.first else None)
        where = device_of(compute.device)
        loaded = ranks.on_all_ranks(
            lambda: load(inputs, files, {"params": params, "dtype": compute.dtype, "device": where})
        )
        start, further = ranks.on_all_ranks(lambda: before(inputs, wanted.initial))
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
                dtype=compute.dtype,
                check=compute.check,
                device=where,
                progress=interactive() and not output.as_json and ranks.first,
                reproducible_sum=compute.reproducible_sum,
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
    """Compare what is measured already."""
    from isoflat.core.errors import UsageError
    from isoflat.experiments.stored import Wanted, compared
    from isoflat.measures.catalogue import find_geometry, find_measure

    other = [each.opts[0] for each in context.command.params if each.name and _idle(context, each.name)]
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
    found, subject = compared(paths, asked, reference)

    def shown(screen: Console) -> None:
        screen.print(found)
        notes(screen, subject["notes"])

    _deliver(found, subject, output, shown)


def _idle(context: typer.Context, name: str) -> bool:
    """Whether it was typed, and has no meaning for stored numbers."""
    return name not in STORED and options.typed(context, name)


@final
@dataclass(frozen=True)
class Loaded:
    """What can be compared.

    Attributes:
        models: by label, in evaluation mode, each with its weights.
        batches: the data, for all.
        loss: what `isoflat.compare` takes as loss.
        notes: what was chosen while loading.
    """

    models: Mapping[str, torch.nn.Module]
    batches: Batches
    loss: Any
    notes: tuple[str, ...]


def load(inputs: Inputs, files: Mapping[str, Path], settings: Mapping[str, Any]) -> Loaded:
    """Build and fill every network, read the data once, and see that all run on it.

    Args:
        inputs: what the user named, but for the weights.
        files: weights by label.
        settings: `params`, `dtype` and `device`, as for `isoflat.measure`.

    Raises:
        IsoflatError: something cannot be found, opened or fitted; nothing has been measured then.
    """
    from isoflat.io.data import load_data
    from isoflat.io.inputs import fill, try_forward
    from isoflat.io.model import build, find_loss
    from isoflat.measurement.prepare import subject

    loss = find_loss(inputs.loss)
    models, notes = {}, []
    for label, path in files.items():
        models[label] = build(inputs.model, inputs.seed)
        notes += [f"{label}: {note}" for note in fill(models[label], replace(inputs, weights=path))]
    _check_apart(models, inputs.model)
    data = load_data(inputs.data, inputs.split, inputs.transform, inputs.examples, inputs.batch_size)
    for model in models.values():
        try_forward(subject(model, data.batches, loss, **settings))
    return Loaded(models, data.batches, loss, (*notes, *data.notes))


def _check_apart(models: Mapping[str, torch.nn.Module], factory: str) -> None:
    """Refuse networks that share tensors: the weights loaded last would be in all of them."""
    from isoflat.core.errors import UsageError

    owner: dict[int, str] = {}
    for label, model in models.items():
        for name, tensor in model.state_dict(keep_vars=True).items():
            place = tensor.untyped_storage().data_ptr() if hasattr(tensor, "untyped_storage") else 0
            if place and owner.setdefault(place, label) != label:
                raise UsageError(
                    f"--model {factory}: the networks it builds share the tensor '{name}', so that weights loaded into one "
                    "change the others: build everything anew at each call"
                )


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names for files, each once: the file's, or with its ending or folders where these tell files apart.

    >>> labels([Path("runs/small.safetensors"), Path("runs/large.safetensors")])
    ['small', 'large']
    >>> labels([Path("a/best.pt"), Path("b/best.pt"), Path("last.pt"), Path("last.ckpt"), Path("c.pt"), Path("c.pt")])
    ['a/best', 'b/best', 'last.pt', 'last.ckpt', 'c', 'c (2)']
    """
    short = [_stem(path.name) for path in paths]
    found = list(short)
    for stem in set(short):
        same = [index for index, name in enumerate(short) if name == stem]
        whole = [Path(os.path.abspath(paths[index])) for index in same]  # noqa: PTH100 (links keep their names)
        if len(same) == 1 or len(set(whole)) == 1:
            continue
        if len({path.name for path in whole}) == len(same):
            apart = [path.name for path in whole]
        else:
            common = os.path.commonpath([path.parent for path in whole])
            inside = [path.relative_to(common) for path in whole]
            stems = [(path.parent / _stem(path.name)).as_posix() for path in inside]
            apart = stems if len(set(stems)) == len(set(whole)) else [path.as_posix() for path in inside]
        for index, name in zip(same, apart, strict=True):
            found[index] = name
    unique: list[str] = []
    for name in map(visible, found):
        numbered = (name if count == 1 else f"{name} ({count})" for count in itertools.count(1))
        unique.append(next(label for label in numbered if label not in unique))
    return unique


def _stem(name: str) -> str:
    """A file's name without the endings of weights files.

    >>> _stem("model.safetensors.index.json"), _stem("epoch.3.ckpt"), _stem(".pt")
    ('model', 'epoch.3', '.pt')
    """
    for ending in _ENDINGS:
        name = name.removesuffix(ending) or name
    return name


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
    """Print what was compared, then who is flatter, then how it was loaded."""
    point = comparison.rows[0].point
    screen.print(plain(f"network  {inputs.model}, {point.parameters} trainable entries"))
    screen.print(plain(f"data     {inputs.data}, {point.examples} examples; loss {inputs.loss}"))
    screen.print()
    screen.print(comparison)
    notes(screen, loading)
