"""`isoflat canonicalize`: the weights that every copy of a network leads back to, up to rotations and order of units."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from isoflat.cli import options
from isoflat.cli.terminal import console, plain
from isoflat.core.errors import UsageError
from isoflat.io.files import claim, save


def canonicalize(  # noqa: PLR0913
    model: options.Model,
    data: options.Data,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The .safetensors file to write.", rich_help_panel=options.OUT)
    ],
    weights: options.Weights = None,
    fixed_epsilon: Annotated[
        bool,
        typer.Option(
            "--fixed-epsilon",
            help="Leave the epsilons of normalisations as they are, so that the file is complete in itself.",
            rich_help_panel=options.OUT,
        ),
    ] = False,
    force: options.Force = False,
    loss: options.Loss = "cross_entropy",
    weights_key: options.WeightsKey = None,
    strip_prefix: options.StripPrefix = None,
    transform: options.Transform = None,
    split: options.Split = None,
    examples: options.Examples = None,
    batch_size: options.BatchSize = 500,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Write the canonical weights: the same function, and the same numbers for every rescaled or shifted copy of it.

    Copies in another basis give the same up to rotations of pairs of linear maps and of streams.

    Exit code 0: written. 2: refused, with the reason; nothing is written.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: expected a name that ends in .safetensors")
    claim(out, force)
    from isoflat.io.canonical import canonical_file
    from isoflat.io.inputs import Inputs, prepare
    from isoflat.measurement.groups import symmetries_of
    from isoflat.symmetry.canonical.representative import Epsilon

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
    loaded, target = prepare(inputs)
    facts, content = canonical_file(loaded, symmetries_of(target), Epsilon.FIXED if fixed_epsilon else Epsilon.MOVED)
    save(out, content, force)
    if as_json:
        described = {"subject": inputs.described() | {"notes": list(loaded.notes)}, "out": str(out), **facts}
        sys.stdout.write(json.dumps(described, allow_nan=False) + "\n")
    else:
        show(console(), out, facts, loaded.notes)


def show(screen: Console, out: Path, facts: dict[str, Any], notes: tuple[str, ...]) -> None:
    """What was written, how well it was checked, and what else belongs to it."""
    before, after, blind = *facts["loss"].values(), facts["loss_ignores_common_score"]
    lines = [
        ("written", f"{out}: {facts['tensors']} tensors in {', '.join(facts['dtype'])}"),
        (
            "outputs",
            f"changed by {facts['output_change']:.0e} of the largest in float64; by {facts['rounding_change']:.0e} "
            f"as written, from rounding{'; a constant on all scores, which the loss ignores, aside' if blind else ''}",
        ),
        ("loss", f"{before:.9g} before, {after:.9g} after"),
        ("group", f"{facts['group_hash']}, rules {facts['rules']}"),
    ]
    for head, text in lines:
        screen.print(plain(f"{head:<9}", style="dim") + plain(text), soft_wrap=True)
    if facts["epsilons"]:
        screen.print(
            plain(
                "The file is the same function only with these attributes of the network's modules. They are in its "
                "metadata, and isoflat sets them; elsewhere set them yourself, or write a file with --fixed-epsilon:",
                style="bold",
            )
        )
        for path, value in facts["epsilons"].items():
            screen.print(plain(f"  {path} = {value['after']!r}  (was {value['before']!r})"), soft_wrap=True)
    for note in notes:
        screen.print(plain(f"note: {note}", style="yellow"), soft_wrap=True)
