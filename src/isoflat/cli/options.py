"""Options that several verbs share, as frozen dataclasses, and the decorator that gives them to a verb."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final, get_type_hints

import typer

from isoflat.core.errors import UsageError

if TYPE_CHECKING:
    from isoflat.io.inputs import Inputs
    from isoflat.measures.settings import Budget

WHAT, HOW, SHARED, OUT = "What is measured", "How hard", "Several processes", "Output"
"""Panels of the help."""

HEADLINE = "quotient_spectral_norm"
"""Measure that is taken where no --measure is given."""

PLACE = "auto"
"""Geometry that is measured in where no --geometry is given."""

DATA_HELP = (
    "digits (inside scikit-learn), a .npz file (x_train and y_train, or x and y), a .csv file (a header; the column y, target, "
    "label or class holds the targets), a .pt file of tensors (x, y), Parquet files with images and labels "
    "(a file, folder or glob), a folder with one subfolder of images per class, or module:factory. "
    "Without --transform, integer images become float32 in 0..1 (divided by 255), channels first: (N,H,W) becomes "
    "(N,1,H,W), (N,H,W,C) becomes (N,C,H,W); float arrays are passed as they are."
)

Verb = Callable[..., None]


def takes(
    group: type, name: str, *, only: Collection[str] | None = None, without: Collection[str] = (), **defaults: Any
) -> Callable[[Verb], Verb]:
    """Decorator that replaces one parameter of a verb by an option for each field of a frozen dataclass.

    Typer reads the merged signature, so that `--help` shows every option, with its default, where the parameter stood.

    Args:
        group: a frozen dataclass whose fields are annotated with `typer.Option`.
        name: the parameter of the verb that receives it.
        only: fields that become options; None for all.
        without: fields that do not. What is no option keeps the default.
        **defaults: other defaults than the dataclass has.

    >>> @takes(OutputOptions, "output", only=("as_json",))
    ... def verb(output: OutputOptions) -> None:
    ...     print(output.as_json, output.out)
    >>> verb(as_json=True)
    True None
    >>> list(inspect.signature(verb).parameters)
    ['as_json']
    """
    kinds = _kinds(group)
    chosen = [part for part in fields(group) if part.name not in without and (only is None or part.name in only)]
    made = [
        inspect.Parameter(
            part.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(part.name, _default(part)),
            annotation=kinds[part.name],
        )
        for part in chosen
    ]

    def decorate(verb: Verb) -> Verb:
        merged: list[inspect.Parameter] = []
        for known, parameter in inspect.signature(verb, eval_str=True).parameters.items():
            merged += made if known == name else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]

        @functools.wraps(verb)
        def call(**given: Any) -> None:
            own = {part.name: given.pop(part.name) for part in chosen if part.name in given}
            verb(**{name: group(**{**defaults, **own})}, **given)

        call.__signature__ = inspect.Signature(merged)  # pyrefly: ignore
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in merged}
        return call

    return decorate


@functools.cache
def _kinds(group: type) -> dict[str, Any]:
    """Types of the fields with their options: the same objects in every verb."""
    return get_type_hints(group, include_extras=True)


def _default(part: Any) -> Any:
    """Default of a dataclass field in the words of a signature."""
    if part.default_factory is not MISSING:
        return part.default_factory()
    return inspect.Parameter.empty if part.default is MISSING else part.default


def typed(context: typer.Context, name: str) -> bool:
    """True where the user set this option, given by the name of its argument."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@final
@dataclass(frozen=True)
class NetworkOptions:
    """The network, its weights, its data and its loss, as the command line names them."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODULE:FACTORY",
            help="Function without arguments that builds the network; modules in the current folder are found. Or "
            "hf:FOLDER, which Hugging Face's save_pretrained wrote, or timm:NAME, such as timm:resnet18,num_classes=10.",
            rich_help_panel=WHAT,
        ),
    ]
    data: Annotated[str | None, typer.Option("--data", metavar="SOURCE", help=DATA_HELP, rich_help_panel=WHAT)]
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            metavar="FILE",
            help="Weights: .safetensors, its .index.json, or .pt/.pth/.ckpt/.bin, opened without running code from the "
            "file. Default: as the factory builds them.",
            rich_help_panel=WHAT,
        ),
    ] = None
    loss: Annotated[
        str,
        typer.Option(
            "--loss",
            metavar="NAME",
            help="cross_entropy, mse, model (its output carries its loss), or module:fn with fn(output, target).",
            rich_help_panel=WHAT,
        ),
    ] = "cross_entropy"
    weights_key: Annotated[
        str | None,
        typer.Option(
            "--weights-key",
            metavar="KEY",
            help="Entry of the weights file that holds the weights, with dots for entries in entries. "
            "Default: found in the usual places (state_dict, model, net and others); averaged weights (EMA) only if named.",
            rich_help_panel=WHAT,
        ),
    ] = None
    strip_prefix: Annotated[
        list[str] | None,
        typer.Option(
            "--strip-prefix",
            metavar="PREFIX",
            help="Prefix to remove from the names in the weights file; can be repeated. "
            "module., _orig_mod., model., net. and network. are removed by themselves where that fits.",
            rich_help_panel=WHAT,
        ),
    ] = None
    transform: Annotated[
        str | None,
        typer.Option(
            "--transform",
            metavar="MODULE:FN",
            help="fn(raw batch exactly as stored, such as uint8) returns the network's input. It must not be random.",
            rich_help_panel=WHAT,
        ),
    ] = None
    split: Annotated[
        str | None,
        typer.Option("--split", help="Part of the data to use, such as test. Default: train.", rich_help_panel=WHAT),
    ] = None
    examples: Annotated[
        int | None,
        typer.Option("--examples", min=1, help="Take only so many examples, evenly spaced.", rich_help_panel=WHAT),
    ] = None
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", min=1, help="Rows at a time; changes memory, never the number.", rich_help_panel=WHAT
        ),
    ] = 500

    def inputs(self, seed: int) -> Inputs:
        """The same choices as `Inputs`, which can be loaded.

        Args:
            seed: seed of the weights that the factory draws.

        Raises:
            UsageError: the network or the data is not named.
        """
        from isoflat.io.inputs import Inputs

        if self.model is None or self.data is None:
            raise UsageError("name the network with --model module:factory, and its data with --data")
        return Inputs(model=self.model, data=self.data, weights=self.weights, seed=seed, **self.reading())

    def reading(self) -> dict[str, Any]:
        """Keywords that say how weights and data are read, and which loss is taken."""
        return {
            "loss": self.loss,
            "weights_key": self.weights_key,
            "strip_prefix": tuple(self.strip_prefix or ()),
            "transform": self.transform,
            "split": self.split,
            "examples": self.examples,
            "batch_size": self.batch_size,
        }


@final
@dataclass(frozen=True)
class MeasureOptions:
    """The numbers that are measured, where, and how closely."""

    names: Annotated[
        list[str], typer.Option("--measure", metavar="NAME", help="See isoflat measures; can be repeated.")
    ] = field(default_factory=lambda: [HEADLINE])
    geometry: Annotated[
        list[str],
        typer.Option(
            "--geometry",
            metavar="NAME",
            help="auto (proof against every symmetry found), elementwise (entry by entry; names what rotations mix), "
            "layerwise (the paper's) or euclidean; can be repeated.",
        ),
    ] = field(default_factory=lambda: [PLACE])
    initial: Annotated[
        Path | None,
        typer.Option(
            "--initial",
            metavar="FILE",
            help="Weights before training, for bounds that need them; read as --weights is, with the same --weights-key "
            "and --strip-prefix.",
            rich_help_panel=WHAT,
        ),
    ] = None
    params: Annotated[
        list[str] | None,
        typer.Option(
            "--params",
            metavar="GLOB",
            help="Names of the parameters that count, with * and ?; can be repeated. Default: all.",
            rich_help_panel=WHAT,
        ),
    ] = None
    rtol: Annotated[
        float,
        typer.Option("--rtol", help="Width of the interval to reach, relative to the value.", rich_help_panel=HOW),
    ] = 1e-3
    confidence: Annotated[
        float | None,
        typer.Option(
            "--confidence",
            help="Probability that the interval contains the true value. Default: 1 - 1e-6; 0.95 for traces.",
            rich_help_panel=HOW,
        ),
    ] = None
    certify: Annotated[
        bool,
        typer.Option(
            "--certify/--no-certify",
            help="Give an interval that contains the true value; or only a value, with fewer Hessian-vector products.",
            rich_help_panel=HOW,
        ),
    ] = True
    max_products: Annotated[
        int,
        typer.Option(
            "--max-products", help="Most Hessian-vector products to spend on one eigenvalue.", rich_help_panel=HOW
        ),
    ] = 300
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds", help="Most seconds to spend on one eigenvalue. Default: no limit.", rich_help_panel=HOW
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            help="Memory that Hessian-vector products may take, such as 4GB. Default: half of what is free.",
            rich_help_panel=HOW,
        ),
    ] = None
    probes: Annotated[
        int, typer.Option("--probes", help="Random vectors that estimate a trace.", rich_help_panel=HOW)
    ] = 64
    sample: Annotated[
        str | None,
        typer.Option(
            "--sample",
            metavar="auto",
            help="auto: measure on a random sample of the data, as large as --rtol needs, with an interval for all of it. "
            "Default: on all the data.",
            rich_help_panel=HOW,
        ),
    ] = None
    logits: Annotated[
        str | None,
        typer.Option(
            "--logits",
            metavar="normalised|loss=VALUE",
            help="normalised: class scores are centred and divided by their length first. loss=0.1: they are multiplied by "
            "what brings the loss there, so that networks are compared at an equal one. Default: the loss as it is.",
            rich_help_panel=HOW,
        ),
    ] = None

    @property
    def budget(self) -> Budget:
        """Limits of the measurement of one number."""
        from isoflat.measures.settings import Budget

        return Budget(self.max_products, self.seconds, bytes_of(self.memory))

    def effort(self, seed: int) -> dict[str, Any]:
        """Keywords of `isoflat.measure` that say how closely to measure.

        Args:
            seed: seed of all random numbers.
        """
        return {
            "rtol": self.rtol,
            "confidence": self.confidence,
            "certify": self.certify,
            "probes": self.probes,
            "sample": self.sample,
            "budget": self.budget,
            "seed": seed,
        }


@final
@dataclass(frozen=True)
class ComputeOptions:
    """Random numbers, precision, checks, the device and the processes that compute."""

    seed: Annotated[
        int,
        typer.Option("--seed", help="Seed of all random numbers: the same gives the same.", rich_help_panel=HOW),
    ] = 0
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Precision: float32 or float64; bfloat16 with --no-certify. Default: as the weights are.",
            rich_help_panel=HOW,
        ),
    ] = None
    check: Annotated[
        str,
        typer.Option(
            "--check",
            metavar="refuse|warn|skip",
            help="What to do where Hessian-vector products disagree with differences of gradients, tried on a few rows.",
            rich_help_panel=HOW,
        ),
    ] = "refuse"
    device: Annotated[
        str | None,
        typer.Option("--device", help="Where to compute, such as cpu or cuda. Default: cpu.", rich_help_panel=HOW),
    ] = None
    reproducible_sum: Annotated[
        bool,
        typer.Option(
            "--reproducible-sum",
            help="Under torchrun: add the batches in the order of the data, so that any number of processes gives the same "
            "bits (with the same number of threads each). Slower: one exchange per batch instead of one per product.",
            rich_help_panel=SHARED,
        ),
    ] = False
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            min=1.0,
            metavar="SECONDS",
            help="Under torchrun: how long a process waits for the others before all give up.",
            rich_help_panel=SHARED,
        ),
    ] = 600.0

    def precision(self) -> dict[str, Any]:
        """Keywords of `isoflat.measure` that say in which precision products are made, checked and added."""
        return {"dtype": self.dtype, "check": self.check, "reproducible_sum": self.reproducible_sum}


@final
@dataclass(frozen=True)
class OutputOptions:
    """Files that are written, and what is printed."""

    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Also write the result there, as JSON.", rich_help_panel=OUT),
    ] = None
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE.html",
            help="Also write a page there that needs nothing else.",
            rich_help_panel=OUT,
        ),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace existing output files.", rich_help_panel=OUT)] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.", rich_help_panel=OUT)
    ] = False


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
