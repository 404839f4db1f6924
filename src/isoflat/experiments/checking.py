"""Check of a stored result: does the experiment, run again, find the same?

Weights that are trained on another processor, or by another version, differ from the first rounding on, and rounding grows
in training. So two things are checked. Networks with the same weights, bit for bit, must have numbers whose confidence
intervals overlap. Over all networks means must agree within their standard errors, and verdicts must be the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from pydantic import ValidationError

from isoflat.core.errors import DataError, UsageError
from isoflat.core.plain import attributes, first_fault

if TYPE_CHECKING:
    from isoflat.experiments.recipe import Recipe
    from isoflat.experiments.reproduction import Reproduction

ERRORS = 4.0
"""Standard errors up to which chance explains a difference of means: that of a few networks may lie this far off."""


@final
@dataclass(frozen=True)
class CheckLine:
    """One thing that was compared.

    Attributes:
        what: name of what was compared.
        stored: value or finding in the stored result.
        found: value or finding now.
        allowed: largest difference that is allowed, in words.
        holds: whether the difference is allowed.
    """

    what: str
    stored: str
    found: str
    allowed: str
    holds: bool


@final
@dataclass(frozen=True)
class ReproductionCheck:
    """The outcome of a comparison with a stored result.

    Attributes:
        lines: everything that was compared.
        same: number of networks that have the same weights as then, bit for bit.
        networks: number of networks of the experiment.
    """

    lines: tuple[CheckLine, ...]
    same: int
    networks: int

    @property
    def holds(self) -> bool:
        """True if everything was found again."""
        return all(line.holds for line in self.lines)

    @property
    def sentence(self) -> str:
        """The outcome in a sentence."""
        failed = sum(not line.holds for line in self.lines)
        told = "everything was found again" if not failed else f"{failed} of {len(self.lines)} were not found again"
        return f"Compared with the stored result: {told}; {self.same} of {self.networks} networks have the same weights, bit for bit."

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return attributes(self, "holds", "sentence", "lines")


def read_stored(path: Path) -> dict[str, Any]:
    """The content of a stored result.

    Raises:
        DataError: the file is missing, damaged, or no result of `isoflat reproduce`.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"--check {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"--check {path} is no JSON ({error}): fetch or write it again") from error
    if (
        not isinstance(stored, dict)
        or not {"recipe", "summaries", "verdicts", "relations", "networks"} <= stored.keys()
    ):
        raise DataError(f"--check {path} is no result.json of isoflat reproduce")
    return stored


def stored_recipe(stored: Mapping[str, Any], name: str | None) -> Recipe:
    """The recipe that a stored result followed.

    Args:
        stored: content of the result.
        name: name that the recipe must have; None for any.

    Raises:
        UsageError: the recipe has another name, or this version cannot read it.
    """
    from isoflat.experiments.recipe import Recipe

    try:
        found = Recipe.model_validate(stored["recipe"])
    except ValidationError as error:
        raise UsageError(f"the stored recipe is none of this version: {first_fault(error)}") from error
    if name not in (None, found.name):
        raise UsageError(f"--check names a result of the recipe {found.name}, not {name}")
    return found


def check_against(stored: Mapping[str, Any], result: Reproduction) -> ReproductionCheck:
    """Compare a reproduction with a stored result, line by line.

    Args:
        stored: content of the stored result.
        result: the reproduction.
    """
    before = {_key(row): row for row in stored["networks"]}
    after = {_key(row): row for row in result.rows()}
    same = {key for key in before.keys() & after.keys() if _weights(before[key]) == _weights(after[key])}
    lines = [*_numbers(before, after, same), *_means(stored, result), *_verdicts(stored, result)]
    networks = {(key[0], key[1]) for key in after}
    return ReproductionCheck(tuple(lines), len({(key[0], key[1]) for key in same}), len(networks))


def _weights(row: Mapping[str, Any]) -> object:
    """Hash of a network's weights; a training that diverged has none, and is the same as no other."""
    return row["model_hash"] or object()


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("arm", "replicate", "point", "measure", "geometry", "logits"))


def _numbers(before: Mapping[Any, Any], after: Mapping[Any, Any], same: set[Any]) -> Iterator[CheckLine]:
    """Comparison of the numbers of networks with the same weights."""
    for key in after:
        if key in same:
            old, new = before[key], after[key]
            ends = [(row["lower"], row["upper"]) for row in (old, new)]
            if any(end is None for pair in ends for end in pair):  # no interval is known
                continue
            holds = ends[0][0] <= ends[1][1] and ends[1][0] <= ends[0][1]
            first, second = (f"[{row['lower']:.6g}, {row['upper']:.6g}]" for row in (old, new))
            what = f"{key[3]} ({key[4]}) of {key[0]} {key[1]}, point {key[2]}"
            yield CheckLine(what, first, second, "confidence intervals overlap", holds)


def _means(stored: Mapping[str, Any], result: Reproduction) -> Iterator[CheckLine]:
    before = {(row["arm"], row["number"]): row for row in stored["summaries"]}
    for summary in result.summaries:
        old = before.get((summary.arm, summary.number))
        what = f"mean of {summary.number} over {summary.arm}"
        if old is None:
            yield CheckLine(what, "none", f"{summary.mean:.4g}", "both there", False)
            continue
        error = math.hypot(old["error"] or 0.0, summary.error or 0.0)
        # Widths of confidence intervals count as well: the numbers are known no better.
        room = ERRORS * error + old["width"] * abs(old["mean"]) + summary.width * abs(summary.mean)
        holds = abs(old["mean"] - summary.mean) <= room
        allowed = f"{room:.2g} apart ({ERRORS:g} standard errors, and widths of confidence intervals)"
        yield CheckLine(what, f"{old['mean']:.4g}", f"{summary.mean:.4g}", allowed, holds)


def _verdicts(stored: Mapping[str, Any], result: Reproduction) -> Iterator[CheckLine]:
    for name, verdict in result.verdicts().items():
        old = stored["verdicts"].get(name, {}).get("finding", "none")
        yield CheckLine(f"verdict by {name}", old, str(verdict.finding), "the same", old == str(verdict.finding))
    before = {(row["measure"], row["outcome"]): row["finding"] for row in stored["relations"]}
    for relation in result.relations:
        old = before.get((relation.measure, relation.outcome), "none")
        what = f"relation of the {relation.measure} to the {relation.outcome}"
        yield CheckLine(what, old, relation.finding, "the same", old == relation.finding)
