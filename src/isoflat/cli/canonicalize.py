"""`isoflat canonicalize`: the weights that every copy of a network leads back to, up to rotations and order of units."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from isoflat.cli import options
from isoflat.cli.deliver import deliver
from isoflat.cli.options import ComputeOptions, NetworkOptions, OutputOptions, takes
from isoflat.cli.terminal import entry, notes
from isoflat.core.errors import UsageError
from isoflat.core.fitted import literal
from isoflat.core.render import WIDTH
from isoflat.io.files import claim, save


@takes(NetworkOptions, "network")
@takes(ComputeOptions, "compute", only=("seed",))
@takes(OutputOptions, "output", only=("force", "as_json"))
def canonicalize(
    network: NetworkOptions,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The .safetensors file to write.", rich_help_panel=options.OUT)
    ],
    fixed_epsilon: Annotated[
        bool,
        typer.Option(
            "--fixed-epsilon",
            help="Leave the epsilons of normalisations as they are, so that the file is complete in itself.",
            rich_help_panel=options.OUT,
        ),
    ] = False,
    *,
    compute: ComputeOptions,
    output: OutputOptions,
) -> None:
    """Write the canonical weights: the same function, and the same numbers for every rescaled or shifted copy of it.

    Copies in another basis give the same up to rotations of pairs of linear maps and of streams.

    Exit code 0: written. 2: refused, with the reason; nothing is written.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: expected a name that ends in .safetensors")
    claim(out, output.force)
    from isoflat.io.canonical import canonical_file
    from isoflat.io.inputs import prepare
    from isoflat.measurement.groups import symmetries_of
    from isoflat.symmetry.canonical.representative import Epsilon

    inputs = network.inputs(compute.seed)
    loaded, target = prepare(inputs)
    facts, content = canonical_file(loaded, symmetries_of(target), Epsilon.FIXED if fixed_epsilon else Epsilon.MOVED)
    save(out, content, output.force)
    result = {"subject": inputs.described() | {"notes": list(loaded.notes)}, "out": str(out), **facts}
    deliver(result, lambda screen: show(screen, out, facts, loaded.notes), output.as_json)


def show(screen: Console, out: Path, facts: dict[str, Any], loading: tuple[str, ...]) -> None:
    """Print the file, how well it was checked, and what else belongs to it."""
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
        entry(screen, head, text, 9)
    if facts["epsilons"]:
        screen.print(
            literal(
                "The file is the same function only with these attributes of the network's modules. They are in its "
                "metadata, and isoflat sets them; elsewhere set them yourself, or write a file with --fixed-epsilon:",
                style="bold",
            )
        )
        for path, value in facts["epsilons"].items():
            screen.print(
                literal(f"  {path} = {value['after']!r}  (was {value['before']!r})"), soft_wrap=screen.width >= WIDTH
            )
    notes(screen, loading)
