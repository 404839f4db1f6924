"""Results of `isoflat measure`, read from a file with their witnesses and checked on the network that was measured."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from pydantic import ValidationError
from torch import Tensor

from isoflat.core.errors import IsoflatError, UsageError
from isoflat.core.plain import adapter, first_fault
from isoflat.core.record import Record
from isoflat.io.inputs import Inputs, load, within_memory
from isoflat.measurement.verify import RecordCheck, RecordVerdict, carried, verify_all
from isoflat.measurement.witnesses import SealedWitness, seal, unpacked_witnesses


@final
@dataclass(frozen=True)
class StoredResult:
    """A result that was read from a file.

    Attributes:
        rows: record of each number, with its witness or None.
        edited: whether each number was changed since its witness was written, or its witness is missing.
        subject: names of what was measured, and how it was loaded.
    """

    rows: tuple[tuple[Record, Tensor | None], ...]
    edited: tuple[bool, ...]
    subject: Mapping[str, Any]


@final
@dataclass(frozen=True)
class VerifiedFile:
    """The outcome of checking a file.

    Attributes:
        path: path of the file.
        checks: outcome for each number of the file.
        refused: reason why the file was not checked; None where it was.
    """

    path: Path
    checks: tuple[RecordCheck, ...]
    refused: str | None = None


def verify(
    stored: Path | str | Sequence[tuple[Record, Tensor | None]],
    model: torch.nn.Module,
    data: Any,
    loss: Any = None,
    **settings: Any,
) -> tuple[RecordCheck, ...]:
    """Check stored numbers of a network by their witnesses, with two Hessian-vector products each instead of a measurement.

    Args:
        stored: path of a result of `isoflat measure --out ... --witness`; or records, each with its witness or None, as
            `measure_all(..., keep=...)` hands them out.
        model: network with the weights that were measured.
        data: data that was measured on, in the same order and batches.
        loss: loss that was measured with.
        **settings: `params`, `symmetries`, `device`, `seed` and `check`, as for `isoflat.measure_all`.

    Returns:
        Outcomes, one for each number in order; the `verdict` of each says whether the number holds.

    Raises:
        UsageError: the file is no such result, or is damaged.
        IsoflatError: the network cannot be measured.

    >>> from isoflat import measure_all
    >>> net, kept = torch.nn.Linear(3, 1), []
    >>> data, loss = (torch.eye(3), torch.ones(3, 1)), torch.nn.MSELoss()
    >>> _ = measure_all(net, data, loss, measures=["quotient_spectral_norm"], keep=lambda *row: kept.append(row))
    >>> [str(check.verdict) for check in verify(kept, net, data, loss)]
    ['holds']
    """
    if not isinstance(stored, Path | str):
        return verify_all(stored, model, data, loss, **settings)
    found = read_result(Path(stored))
    checks = verify_all(found.rows, model, data, loss, **settings)
    return tuple(_told(check, edited) for check, edited in zip(checks, found.edited, strict=True))


def verify_named(
    path: Path, model: str, data: str, weights: Path | None, given: Mapping[str, Any], settings: Mapping[str, Any]
) -> VerifiedFile:
    """Check the numbers of a file on a named network, which is loaded as the file says that it was.

    Args:
        path: path of a result of `isoflat measure --out ... --witness`.
        model: name of the factory, `module:factory`.
        data: name of the data, as for `isoflat.load_data`.
        weights: path of a weights file; None for the weights that the factory builds.
        given: options of loading by name, and `params`; where one is None the file decides.
        settings: `device`, `seed` and `check` of the Hessian-vector products.

    Raises:
        UsageError: the file is no such result, is damaged, or was measured with other options than are given.
        IsoflatError: something cannot be found, opened, fitted or measured.
    """
    stored = read_result(path)
    chosen = {name: agreed(name, value, stored.subject.get(name)) for name, value in given.items()}
    params = chosen.pop("params")
    chosen = {name: value for name, value in chosen.items() if value is not None}
    chosen |= {"strip_prefix": tuple(chosen.get("strip_prefix", ()))}
    seed = next((record.settings.get("seed") for record, _ in stored.rows), 0)
    if not isinstance(seed, int):
        raise UsageError(f"the result was measured with the seed {seed!r}, which is none: it was damaged")
    loaded = load(Inputs(model, data, weights, seed=seed, **chosen))
    with within_memory():
        checks = verify_all(stored.rows, loaded.model, loaded.batches, loaded.loss, params=params, **settings)
    command = [
        "isoflat",
        "measure",
        "--model",
        model,
        *(["--weights", str(weights)] if weights else []),
        "--data",
        data,
    ]
    told = tuple(_told(check, edited, command) for check, edited in zip(checks, stored.edited, strict=True))
    return VerifiedFile(path, told)


def _told(check: RecordCheck, edited: bool, command: Sequence[str] = ()) -> RecordCheck:
    """Add to a check whether the record was edited since it was written, and the command that measures it again."""
    if check.verdict is RecordVerdict.UNCHECKED and edited:
        words = "its witness is missing from the file of witnesses, which was edited"
        return replace(check, verdict=RecordVerdict.REFUSED, sentence=words)
    if check.verdict is RecordVerdict.UNCHECKED:
        again = shlex.join([*command, "--measure", check.measure, "--geometry", check.geometry])
        return replace(check, sentence=f"{check.sentence}. Measure again: {again}") if command else check
    if check.verdict is RecordVerdict.HOLDS and edited:
        words = f"its record was edited since it was written with its witness; for the rest, {check.sentence}"
        return replace(check, verdict=RecordVerdict.REFUSED, sentence=words)
    return check


_KINDS: Mapping[str, tuple[type, ...]] = {
    "examples": (int,),
    "batch_size": (int,),
    "params": (list,),
    "strip_prefix": (list,),
}
"""Types of the options in a result that are no text."""


def agreed(name: str, given: Any, recorded: Any) -> Any:
    """The value of an option from the command line, or else from the result.

    Args:
        name: name of the option.
        given: value from the command line; None for none.
        recorded: value from the result; None for none.

    Raises:
        UsageError: the two differ, or the result names code to run that the user did not name.
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


def read_result(path: Path) -> StoredResult:
    """Read a result of `isoflat measure` and its witnesses.

    Raises:
        UsageError: the file is no such result, was edited or damaged, or its witnesses belong to another result.
    """
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
        width = row["estimate"].get("relative_width")
        if width != record.estimate.to_dict()["relative_width"]:
            raise UsageError(
                f"{record.measure} ({record.geometry}) was edited: its relative width {width} is not that of its interval, "
                f"{record.estimate.relative_width}"
            )
    records = [record for _, record in rows]
    kept = _witnesses(path, content["witness"], records) if "witness" in content else (None,) * len(records)
    pairs = list(zip(records, kept, strict=True))
    return StoredResult(
        rows=tuple((record, None if own is None else own.vector) for record, own in pairs),
        edited=tuple(
            own.seal != seal(record) if own else "witness" in content and carried(record) for record, own in pairs
        ),
        subject=subject,
    )


def _record(row: Any) -> Record:
    """Read a record, and check that every field has its type.

    Raises:
        UsageError: this is no record.
    """
    try:
        record = adapter(Record).validate_python(asdict(Record.from_dict(row)))
        seal(record)  # refuses NaN and infinity, which JSON does not have
    except ValidationError as error:
        raise UsageError(f"it holds no valid record: {first_fault(error)}") from error
    except IsoflatError as error:
        raise UsageError(f"it holds no valid record: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        words = " ".join(str(error).split())
        raise UsageError(
            f"it is no result of isoflat measure, or was damaged: {type(error).__name__} {words}"
        ) from error
    return record


def _witnesses(path: Path, named: Any, records: Sequence[Record]) -> tuple[SealedWitness | None, ...]:
    """Read the witnesses from the file beside a result.

    Raises:
        UsageError: the file is not there, is another one, or cannot be read.
    """
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
    return unpacked_witnesses(content, records)
