"""The command line.

Exit codes of every verb:

| code | meaning |
|---|---|
| 0 | done; every measured value converged, every check passed |
| 1 | a defect of isoflat itself, with a traceback |
| 2 | a wrong argument, or anything isoflat refuses: one line on standard error says why and what to do |
| 3 | measured, but not to the tolerance asked for within the budget |
| 4 | one of the processes that share a measurement ended, or hangs |
| 5 | a stored number or result does not hold (verify, reproduce --check) |
| 130 | interrupted from the keyboard |

With `--json`, standard output holds strict JSON and nothing else; it is empty where the exit code is 2 and the verb had
nothing to report.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from isoflat.cli.attack import attack
from isoflat.cli.canonicalize import canonicalize
from isoflat.cli.compare import compare
from isoflat.cli.demo import demo
from isoflat.cli.doctor import doctor
from isoflat.cli.exits import refusing
from isoflat.cli.measure import measure
from isoflat.cli.measures import measures
from isoflat.cli.report import report
from isoflat.cli.reproduce import reproduce
from isoflat.cli.spectrum import spectrum
from isoflat.cli.study import study
from isoflat.cli.symmetries import symmetries
from isoflat.cli.verify import verify

app = typer.Typer(name="isoflat", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def isoflat(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Measure how flat a minimum is, when nobody can cheat: rescaling-invariant flatness with certified intervals."""
    if version:
        from importlib import metadata

        typer.echo(f"isoflat {metadata.version('isoflat')}")
        raise typer.Exit


for verb in (
    demo,
    reproduce,
    study,
    measure,
    verify,
    compare,
    spectrum,
    attack,
    symmetries,
    canonicalize,
    report,
    measures,
    doctor,
):
    app.command(verb.__name__)(refusing(verb))


def run() -> None:
    """Entry point of the command `isoflat`: lines leave at once, also into a file or a pipe."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    app(prog_name="isoflat")
