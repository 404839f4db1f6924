"""`isoflat verify`: do stored numbers hold?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from isoflat.cli import options
from isoflat.cli.exits import DOES_NOT_HOLD, REFUSED
from isoflat.cli.options import ComputeOptions, MeasureOptions, NetworkOptions, OutputOptions, takes
from isoflat.cli.terminal import complain, console, write_json
from isoflat.core.errors import IsoflatError
from isoflat.core.fitted import fact_list, literal

if TYPE_CHECKING:
    from isoflat.io.verify import VerifiedFile

_RECORDED = "Default: as the result says."


@takes(NetworkOptions, "network", without=("loss", "batch_size"))
@takes(MeasureOptions, "wanted", only=("params",))
@takes(ComputeOptions, "compute", only=("seed", "check", "device"))
@takes(OutputOptions, "output", only=("as_json",))
def verify(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT", help="Results of isoflat measure --out ... --witness, one or more.", show_default=False
        ),
    ],
    network: NetworkOptions,
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss",
            metavar="NAME",
            help=f"As for isoflat measure. {_RECORDED} Code of your own (module:fn) must be named again: a file names none.",
            rich_help_panel=options.WHAT,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help=f"Rows at a time. {_RECORDED}", rich_help_panel=options.WHAT),
    ] = None,
    *,
    wanted: MeasureOptions,
    compute: ComputeOptions,
    output: OutputOptions,
) -> None:
    """Check stored eigenvalues by their eigenvectors: two Hessian-vector products each, instead of a measurement.

    Loss, precision and how the data was read are taken from the result; options that are given must agree with it.

    Exit code 0: all numbers that were stored with an eigenvector hold. 5: a stored number does not hold. 2: refused, or
    nothing could be checked.
    """
    from isoflat.io.inputs import device_of
    from isoflat.io.verify import VerifiedFile, verify_named

    where = device_of(compute.device)
    own = {"loss": loss, "params": wanted.params or None, "strip_prefix": network.strip_prefix or None}
    given = network.reading() | own | {"batch_size": batch_size}
    settings = {"device": where, "seed": compute.seed, "check": compute.check}
    found: list[VerifiedFile] = []
    for path in files:
        try:
            found.append(verify_named(path, str(network.model), str(network.data), network.weights, given, settings))
        except IsoflatError as error:
            found.append(VerifiedFile(path, (), str(error)))
    if output.as_json:
        write_json({"files": [_plain(part) for part in found]})
    else:
        for part in found:
            _show(console(), part)
    for part in found:
        if part.refused is not None:
            complain(f"{part.path}: {part.refused}")
    if code := max(map(_code, found)):
        raise typer.Exit(code)


def _code(part: VerifiedFile) -> int:
    """Exit code of one file."""
    from isoflat.measurement.verify import RecordVerdict

    verdicts = {check.verdict for check in part.checks}
    if RecordVerdict.FALSE in verdicts:
        return DOES_NOT_HOLD
    return 0 if RecordVerdict.HOLDS in verdicts and RecordVerdict.REFUSED not in verdicts else REFUSED


def _plain(part: VerifiedFile) -> dict[str, Any]:
    """Plain values that JSON can hold."""
    rows = [check.to_dict() for check in part.checks]
    return {"file": str(part.path), "rows": rows, "refused": part.refused, "code": _code(part)}


def _show(screen: Console, part: VerifiedFile) -> None:
    """Print the verdicts of a file, each with its grounds."""
    from isoflat.core.estimate import interval

    for check in part.checks:
        screen.print(literal(f"{part.path}: {check.measure} ({check.geometry}): {check.verdict}", style="bold"))
        listed = [("stored", f"{check.stored} in {interval(check.stored)}"), ("finding", check.sentence)]
        if check.contains is not None and check.residual is not None:
            low, high = check.contains
            listed.append(("certain", f"an eigenvalue lies in [{low:.10g}, {high:.10g}], whatever is stored"))
            listed.append(("residual", f"{check.residual:.3g}"))
            listed.append(("two products reach", f"{check.reach:.10g}"))
        screen.print(fact_list(listed))
