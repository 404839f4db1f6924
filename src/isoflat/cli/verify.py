"""`isoflat verify`: do stored numbers hold?"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import typer
from rich.console import Console

from isoflat.cli import options
from isoflat.cli.exits import DOES_NOT_HOLD, REFUSED
from isoflat.cli.terminal import complain, console, facts, plain
from isoflat.core.errors import IsoflatError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from isoflat.core.record import Record
    from isoflat.measurement.sealed import Kept
    from isoflat.measurement.witness import Check

_RECORDED = "Default: as the result says."


def verify(  # noqa: PLR0913
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT", help="Results of isoflat measure --out ... --witness, one or more.", show_default=False
        ),
    ],
    model: options.Model,
    data: options.Data,
    weights: options.Weights = None,
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss",
            metavar="NAME",
            help=f"As for isoflat measure. {_RECORDED} Code of your own (module:fn) must be named again: a file names none.",
            rich_help_panel=options.WHAT,
        ),
    ] = None,
    params: options.Params = None,
    weights_key: options.WeightsKey = None,
    strip_prefix: options.StripPrefix = None,
    transform: options.Transform = None,
    split: options.Split = None,
    examples: options.Examples = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help=f"Rows at a time. {_RECORDED}", rich_help_panel=options.WHAT),
    ] = None,
    seed: options.Seed = 0,
    check: options.Check = "refuse",
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> None:
    """Check stored numbers by their witnesses, with two products each instead of a measurement.

    Loss, precision and how the data was read are taken from the result; options that are given must agree with it.

    Exit code 0: all numbers that have a witness hold. 5: a stored number does not hold. 2: refused, or nothing could be
    checked.
    """
    from isoflat.io.inputs import device_of

    where = device_of(device)
    given = {
        "loss": loss,
        "params": params or None,
        "weights_key": weights_key,
        "strip_prefix": strip_prefix or None,
        "transform": transform,
        "split": split,
        "examples": examples,
        "batch_size": batch_size,
    }
    named = _Named(model, data, weights, given)
    found: list[_Checked] = []
    for path in files:
        try:
            found.append(_checked(path, named, {"device": where, "seed": seed, "check": check}))
        except IsoflatError as error:
            found.append(_Checked(path, (), str(error)))
    if as_json:
        sys.stdout.write(f"{json.dumps({'files': [part.to_dict() for part in found]}, allow_nan=False)}\n")
    else:
        for part in found:
            _show(console(), part)
    for part in found:
        if part.refused is not None:
            complain(f"{part.path}: {part.refused}")
    if code := max(part.code for part in found):
        raise typer.Exit(code)


@final
@dataclass(frozen=True)
class _Named:
    """What the user named.

    Attributes:
        model: `module:factory`.
        data: a data source.
        weights: a weights file.
        given: options that are taken from the result where they are None.
    """

    model: str
    data: str
    weights: Path | None
    given: Mapping[str, Any]


@final
@dataclass(frozen=True)
class _Stored:
    """A result on disk.

    Attributes:
        rows: its numbers, each with its witness.
        edited: whether a number is not as it was when its witness was written, or its witness is gone.
        subject: how it was made.
    """

    rows: tuple[tuple[Record, Tensor | None], ...]
    edited: tuple[bool, ...]
    subject: Mapping[str, Any]


@final
@dataclass(frozen=True)
class _Checked:
    """What became of a file.

    Attributes:
        path: of the file.
        checks: of its numbers.
        refused: why it was not looked at; None where it was.
    """

    path: Path
    checks: tuple[Check, ...]
    refused: str | None = None

    @property
    def code(self) -> int:
        """The exit code."""
        from isoflat.measurement.witness import Verdict

        verdicts = {check.verdict for check in self.checks}
        if Verdict.FALSE in verdicts:
            return DOES_NOT_HOLD
        return 0 if Verdict.HOLDS in verdicts and Verdict.REFUSED not in verdicts else REFUSED

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "file": str(self.path),
            "rows": [check.to_dict() for check in self.checks],
            "refused": self.refused,
            "code": self.code,
        }


def _checked(path: Path, named: _Named, settings: Mapping[str, Any]) -> _Checked:
    """Read a result, load what it was measured on, and check its numbers."""
    from isoflat.io.inputs import Inputs, load, within_memory
    from isoflat.measurement.witness import verify_all

    stored = _read(path)
    chosen = {name: _agreed(name, value, stored.subject.get(name)) for name, value in named.given.items()}
    params = chosen.pop("params")
    chosen = {name: value for name, value in chosen.items() if value is not None}
    chosen |= {"strip_prefix": tuple(chosen.get("strip_prefix", ()))}
    seed = next((record.settings.get("seed") for record, _ in stored.rows), 0)
    if not isinstance(seed, int):
        raise UsageError(f"the result was measured with the seed {seed!r}, which is none: it was damaged")
    loaded = load(Inputs(named.model, named.data, named.weights, seed=seed, **chosen))
    with within_memory():
        checks = verify_all(stored.rows, loaded.model, loaded.batches, loaded.loss, params=params, **settings)
    return _Checked(
        path, tuple(_told(check, edited, named) for check, edited in zip(checks, stored.edited, strict=True))
    )


def _told(check: Check, edited: bool, named: _Named) -> Check:
    """What two products cannot know: whether the number is the one that was written, and how to measure it again."""
    from isoflat.measurement.witness import Verdict

    if check.verdict is Verdict.UNCHECKED and edited:
        words = "its witness is missing from the file of witnesses, which was edited"
        return replace(check, verdict=Verdict.REFUSED, sentence=words)
    if check.verdict is Verdict.UNCHECKED:
        return replace(check, sentence=f"{check.sentence}. {_again(check, named)}")
    if check.verdict is Verdict.HOLDS and edited:
        words = f"its record was edited since it was written with its witness; for the rest, {check.sentence}"
        return replace(check, verdict=Verdict.REFUSED, sentence=words)
    return check


def _again(check: Check, named: _Named) -> str:
    """How to measure a number that cannot be checked."""
    weights = [] if named.weights is None else ["--weights", str(named.weights)]
    command = ["isoflat", "measure", "--model", named.model, *weights, "--data", named.data]
    return f"Measure again: {shlex.join([*command, '--measure', check.measure, '--geometry', check.geometry])}"


_KINDS: Mapping[str, tuple[type, ...]] = {
    "examples": (int,),
    "batch_size": (int,),
    "params": (list,),
    "strip_prefix": (list,),
}
"""What options are in a result; text, where it is not said."""


def _agreed(name: str, given: Any, recorded: Any) -> Any:
    """An option from the command line, or from the result.

    Raises:
        UsageError: they differ, or the result names code to run that the user did not name.
    """
    option = f"--{name.replace('_', '-')}"
    kinds = _KINDS.get(name, (str,))
    if recorded is not None and (not isinstance(recorded, kinds) or isinstance(recorded, bool)):
        raise UsageError(f"the result gives {recorded!r} for {option}, which is none: it was damaged")
    if isinstance(recorded, list) and not all(isinstance(item, str) for item in recorded):
        raise UsageError(f"the result gives {recorded!r} for {option}, which is none: it was damaged")
    if given is None:
        if name in ("loss", "transform") and recorded is not None and ":" in recorded:
            raise UsageError(
                f"it was measured with {option} {recorded}, and code that a file names is not run: name it yourself, with "
                f"{option} {recorded}, if you trust it"
            )
        return recorded
    if recorded not in (None, [], given):
        raise UsageError(f"it was measured with {option} {recorded}, not {given}: leave {option} out")
    return given


def _read(path: Path) -> _Stored:
    """A result and its witnesses.

    Raises:
        UsageError: it is no result of `isoflat measure`, was edited without care, or its witnesses are not its own.
    """
    from isoflat.measurement.sealed import seal
    from isoflat.measurement.witness import carried

    what = "is no result of isoflat measure"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"it cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"it {what}, or was cut off: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list) or "differences" in content:
        raise UsageError(f"it {what}: expected a JSON object with rows, written by isoflat measure --out")
    subject = content.get("subject", {})
    rows = [(row, _record(row)) for row in content["rows"]]
    if not rows or not isinstance(subject, dict):
        raise UsageError(f"it {what}: it has no rows, or does not say what was measured")
    for row, record in rows:
        _consistent(row, record)
    records = [record for _, record in rows]
    kept = _witnesses(path, content["witness"], records) if "witness" in content else (None,) * len(records)
    pairs = list(zip(records, kept, strict=True))
    return _Stored(
        rows=tuple((record, None if own is None else own.vector) for record, own in pairs),
        edited=tuple(
            own.seal != seal(record) if own else "witness" in content and carried(record) for record, own in pairs
        ),
        subject=subject,
    )


def _record(row: Any) -> Record:
    """A record with every field of its type.

    Raises:
        UsageError: it is none.
    """
    from pydantic import TypeAdapter, ValidationError

    from isoflat.core.record import Record
    from isoflat.measurement.sealed import seal

    try:
        record = TypeAdapter(Record).validate_python(asdict(Record.from_dict(row)))
        seal(record)  # no infinity or NaN where JSON has none
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(f"it holds no valid record: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except IsoflatError as error:
        raise UsageError(f"it holds no valid record: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        words = " ".join(str(error).split())
        raise UsageError(
            f"it is no result of isoflat measure, or was damaged: {type(error).__name__} {words}"
        ) from error
    return record


def _consistent(row: Mapping[str, Any], record: Record) -> None:
    """Refuse a record whose parts contradict each other.

    Raises:
        UsageError: the relative width is not that of the interval.
    """
    if row["estimate"].get("relative_width") != record.estimate.to_dict()["relative_width"]:
        raise UsageError(
            f"{record.measure} ({record.geometry}) was edited: its relative width "
            f"{row['estimate'].get('relative_width')} is not that of its interval, {record.estimate.relative_width}"
        )


def _witnesses(path: Path, named: Any, records: Sequence[Record]) -> tuple[Kept | None, ...]:
    """The vectors of the file beside the result.

    Raises:
        UsageError: it is not there, is another file, or cannot be read.
    """
    from isoflat.measurement.sealed import unpacked

    name, expected = (named.get(key) for key in ("file", "sha256")) if isinstance(named, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(expected, str) or Path(name).name != name:
        raise UsageError("it names its witnesses in no way that can be followed: expected the name of a file beside it")
    beside = path.parent / name
    try:
        content = beside.read_bytes()
    except OSError as error:
        raise UsageError(f"its witnesses, {beside}, cannot be read: {error.strerror}") from error
    if (came := hashlib.sha256(content).hexdigest()) != expected:
        raise UsageError(
            f"{beside} is not the file that was written with the result: its SHA-256 is {came}, the result's {expected}"
        )
    return unpacked(content, records)


def _show(screen: Console, part: _Checked) -> None:
    """A file's verdicts, each with what it rests on."""
    from isoflat.core.estimate import interval

    for check in part.checks:
        screen.print(plain(f"{part.path}: {check.measure} ({check.geometry}): {check.verdict}", style="bold"))
        listed = [("stored", f"{check.stored} in {interval(check.stored)}"), ("finding", check.sentence)]
        if check.contains is not None and check.residual is not None:
            low, high = check.contains
            listed.append(("certain", f"an eigenvalue lies in [{low:.10g}, {high:.10g}], whatever is stored"))
            listed.append(("residual", f"{check.residual:.3g}"))
            listed.append(("two products reach", f"{check.reach:.10g}"))
        screen.print(facts(listed))
