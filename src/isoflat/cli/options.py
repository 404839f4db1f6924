"""Options that several verbs share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from isoflat.core.errors import UsageError

WHAT, HOW, SHARED, OUT = "What is measured", "How hard", "Several processes", "Output"
"""Panels of the help."""

HEADLINE = "quotient_spectral_norm"
"""Measured where no --measure is given."""

PLACE = "auto"
"""Where it is measured, if no --geometry is given."""

_MODEL = typer.Option(
    "--model",
    metavar="MODULE:FACTORY",
    help="Function without arguments that builds the network; modules in the current folder are found.",
    rich_help_panel=WHAT,
)
Model = Annotated[str, _MODEL]
SomeModel = Annotated[str | None, _MODEL]
"""For verbs that can do without."""
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Weights: .safetensors, its .index.json, or .pt/.pth/.ckpt/.bin, opened without running code from the file. "
        "Default: as the factory builds them.",
        rich_help_panel=WHAT,
    ),
]
Initial = Annotated[
    Path | None,
    typer.Option(
        "--initial",
        metavar="FILE",
        help="Weights before training, for bounds that need them; read as --weights is, with the same --weights-key and "
        "--strip-prefix.",
        rich_help_panel=WHAT,
    ),
]
DATA_HELP = (
    "digits (inside scikit-learn), a .npz file (x_train and y_train, or x and y), Parquet files with images and labels "
    "(a file, folder or glob), a folder with one subfolder of images per class, or module:factory. "
    "Without --transform, integer images become float32 in 0..1 (divided by 255), channels first: (N,H,W) becomes "
    "(N,1,H,W), (N,H,W,C) becomes (N,C,H,W); float arrays are passed as they are."
)
_DATA = typer.Option("--data", metavar="SOURCE", help=DATA_HELP, rich_help_panel=WHAT)
Data = Annotated[str, _DATA]
SomeData = Annotated[str | None, _DATA]
"""For verbs that can do without."""
Loss = Annotated[
    str,
    typer.Option(
        "--loss",
        metavar="NAME",
        help="cross_entropy, mse, model (its output carries its loss), or module:fn with fn(output, target).",
        rich_help_panel=WHAT,
    ),
]
Numbers = Annotated[
    list[str] | None,
    typer.Option("--measure", metavar="NAME", help=f"See isoflat measures; can be repeated. Default: {HEADLINE}."),
]
Geometry = Annotated[
    list[str] | None,
    typer.Option(
        "--geometry",
        metavar="NAME",
        help="auto (proof against every symmetry found), elementwise (entry by entry; names what rotations mix), "
        f"layerwise (the paper's) or euclidean; can be repeated. Default: {PLACE}.",
    ),
]
WeightsKey = Annotated[
    str | None,
    typer.Option(
        "--weights-key",
        metavar="KEY",
        help="Entry of the weights file that holds the weights, with dots for entries in entries. "
        "Default: state_dict, model or model_state_dict, where the file is not flat.",
        rich_help_panel=WHAT,
    ),
]
StripPrefix = Annotated[
    list[str] | None,
    typer.Option(
        "--strip-prefix",
        metavar="PREFIX",
        help="Prefix to remove from the names in the weights file; can be repeated. "
        "module., _orig_mod. and model. are removed by themselves where all names have them.",
        rich_help_panel=WHAT,
    ),
]
Transform = Annotated[
    str | None,
    typer.Option(
        "--transform",
        metavar="MODULE:FN",
        help="fn(raw batch exactly as stored, such as uint8) returns the network's input. It must not be random.",
        rich_help_panel=WHAT,
    ),
]
Split = Annotated[
    str | None, typer.Option("--split", help="Which split of the data. Default: train.", rich_help_panel=WHAT)
]
Examples = Annotated[
    int | None,
    typer.Option("--examples", min=1, help="Take only so many examples, evenly spaced.", rich_help_panel=WHAT),
]
BatchSize = Annotated[
    int,
    typer.Option("--batch-size", min=1, help="Rows at a time; changes memory, never the number.", rich_help_panel=WHAT),
]
Params = Annotated[
    list[str] | None,
    typer.Option(
        "--params",
        metavar="GLOB",
        help="Which parameters count, by name; can be repeated. Default: all.",
        rich_help_panel=WHAT,
    ),
]
Rtol = Annotated[float, typer.Option(help="Relative width of the enclosure to reach.", rich_help_panel=HOW)]
Confidence = Annotated[
    float | None,
    typer.Option(help="That the interval holds. Default: 1 - 1e-6; 0.95 for traces.", rich_help_panel=HOW),
]
Certify = Annotated[
    bool, typer.Option("--certify/--no-certify", help="An enclosure, or a value only.", rich_help_panel=HOW)
]
MaxProducts = Annotated[int, typer.Option(help="Hessian-vector products per eigenvalue.", rich_help_panel=HOW)]
Seconds = Annotated[float | None, typer.Option(help="Time per eigenvalue.", rich_help_panel=HOW)]
Memory = Annotated[
    str | None,
    typer.Option(help="For products, such as 4GB. Default: half of what is free.", rich_help_panel=HOW),
]
Probes = Annotated[int, typer.Option(help="Random probes of traces.", rich_help_panel=HOW)]
Sample = Annotated[
    str | None,
    typer.Option(
        "--sample",
        metavar="auto",
        help="auto: on a sample as large as --rtol needs, with an interval for the rest. Default: on all the data.",
        rich_help_panel=HOW,
    ),
]
Logits = Annotated[
    str | None,
    typer.Option(
        "--logits",
        metavar="normalised|loss=VALUE",
        help="normalised: class scores are centred and divided by their length first. loss=0.1: they are multiplied by what "
        "brings the loss there, so that networks are compared at an equal one. Default: the loss as it is.",
        rich_help_panel=HOW,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of all random numbers.", rich_help_panel=HOW)]
Precision = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32 or float64; bfloat16 with --no-certify. Default: as the weights are.",
        rich_help_panel=HOW,
    ),
]
Check = Annotated[
    str,
    typer.Option(
        "--check",
        metavar="refuse|warn|skip",
        help="Where products disagree with differences of gradients, on a few rows.",
        rich_help_panel=HOW,
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="Such as cpu or cuda. Default: cpu.", rich_help_panel=HOW)]
ReproducibleSum = Annotated[
    bool,
    typer.Option(
        "--reproducible-sum",
        help="Under torchrun: add the batches in the order of the data, so that any number of processes gives the same "
        "bits (with the same number of threads each). Slower: one exchange per batch instead of one per product.",
        rich_help_panel=SHARED,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        min=1.0,
        metavar="SECONDS",
        help="Under torchrun: how long a process waits for the others before all give up.",
        rich_help_panel=SHARED,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Also write the result there, as JSON.", rich_help_panel=OUT),
]
Witness = Annotated[
    bool,
    typer.Option(
        "--witness",
        help="Also write the eigenvectors that carry the numbers, beside --out as .safetensors: isoflat verify checks the "
        "numbers by them.",
        rich_help_panel=OUT,
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE.html", help="Also write a page there that needs nothing else.", rich_help_panel=OUT
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output files.", rich_help_panel=OUT)]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.", rich_help_panel=OUT)
]


def bytes_of(text: str | None) -> int | None:
    """A number of bytes, with a unit or without.

    Raises:
        UsageError: it is no such number.

    >>> bytes_of("4GB"), bytes_of("512MiB"), bytes_of("1000")
    (4000000000, 536870912, 1000)
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not found:
        raise UsageError(f"--memory {text}: expected a number of bytes, for instance 4GB or 512MiB")
    unit = (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " ")
    return int(float(found[1]) * unit)


def typed(context: typer.Context, name: str) -> bool:
    """Whether the user set this option, by the name of its argument."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
