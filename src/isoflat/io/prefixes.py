"""Prefixes that wrappers of a network put before the names of its tensors, found and removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from isoflat.core.errors import CheckpointError
from isoflat.core.render import enumerated, some
from isoflat.io.entries import COUNTER, is_average
from isoflat.io.weights import Weights

WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""Prefixes that data parallelism, compilation and the habits of Lightning's users put before every name."""


@final
@dataclass(frozen=True)
class NetworkNames:
    """Names that a network has.

    Attributes:
        names: names of its tensors.
        tied: groups of names that one tensor has; a file may hold it under one of them only.
    """

    names: frozenset[str]
    tied: Sequence[Sequence[str]]

    def met_by(self, tensors: Mapping[str, Tensor]) -> bool:
        """True if each name of the network is among those of the tensors, and no other name is."""
        there = tensors.keys()
        tied = {name for names in self.tied if any(name in there for name in names) for name in names}
        counters = {name for name in self.names if name.endswith("num_batches_tracked")}
        return there <= self.names and self.names <= there | tied | counters


def rename(weights: Weights, wanted: NetworkNames, prefixes: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under the names that the network has for them, as far as prefixes are the difference, and notes.

    Args:
        weights: weights from `read_weights`.
        wanted: names that the network has.
        prefixes: prefixes that the user asks to remove, in this order.

    Raises:
        CheckpointError: no name begins with such a prefix, names would collide, or several groups of names fit.
    """
    tensors, notes = dict(weights.tensors), []
    for prefix in prefixes:
        part = _below(tensors, prefix)
        if not part:
            raise CheckpointError(
                f"{weights.source}: no tensor's name begins with --strip-prefix {prefix!r}; there are {some(tensors)}"
            )
        if len(part) < len(tensors) and wanted.met_by(_unwrapped(part, wanted)[0]):
            notes += _left(tensors, [prefix], weights)
            tensors = part
        else:
            tensors = _stripped(tensors, prefix, weights)
    best, removed = _unwrapped(tensors, wanted)
    if not (prefixes or wanted.met_by(best)):
        common, path = _common(tensors)
        if chosen := _group(common, path, wanted, weights):
            best, removed = chosen
            notes += _left(common, list(_fitting(common, wanted)), weights)
            notes += _others(common, path, removed, wanted)
    if COUNTER in tensors and COUNTER not in best:
        notes.append(
            f"averaged weights: the mean of {_count(tensors[COUNTER])} networks, as torch.optim.swa_utils saves it"
        )
    if removed:
        notes.append(f"the prefix {removed!r} was removed from the names in {weights.source.name}")
    return best, notes


def _unwrapped(tensors: dict[str, Tensor], wanted: NetworkNames) -> tuple[dict[str, Tensor], str]:
    """Tensors without the prefixes of wrappers where that fits the network better, and what was removed."""
    candidate, path = _without_counter(tensors, wanted), ""
    best, removed = candidate, path
    while candidate.keys() != wanted.names and (prefix := _shared(candidate)):
        candidate, path = _below(candidate, prefix), path + prefix
        if len(candidate.keys() & wanted.names) > len(best.keys() & wanted.names):
            best, removed = candidate, path
    return best, removed


def _common(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Tensors without the prefixes of wrappers that all names have, and what was removed."""
    path = ""
    while prefix := _shared(tensors):
        tensors, path = _below(tensors, prefix), path + prefix
    return tensors, path


def _group(
    tensors: dict[str, Tensor], path: str, wanted: NetworkNames, weights: Weights
) -> tuple[dict[str, Tensor], str] | None:
    """The one group of tensors under a wrapper's prefix that is the network, and the prefix; averages are taken last.

    Raises:
        CheckpointError: there are several.
    """
    groups = _fitting(tensors, wanted)
    current = [prefix for prefix in groups if not is_average(prefix)] or list(groups)
    if len(current) > 1:
        names = [f"{path}{prefix}" for prefix in current]
        raise CheckpointError(
            f"{weights.source}: the tensors under each of {enumerated(names)} fit the network: choose with --strip-prefix"
        )
    return (groups[current[0]][0], path + current[0] + groups[current[0]][1]) if current else None


def _fitting(tensors: dict[str, Tensor], wanted: NetworkNames) -> dict[str, tuple[dict[str, Tensor], str]]:
    """Groups of tensors under a wrapper's prefix that are the network, by the prefix, with what else was removed."""
    heads = dict.fromkeys(f"{name.partition('.')[0]}." for name in tensors)
    parts = {head: _unwrapped(_below(tensors, head), wanted) for head in heads if head in WRAPPERS or is_average(head)}
    return {head: found for head, found in parts.items() if wanted.met_by(found[0])}


def _others(tensors: dict[str, Tensor], path: str, taken: str, wanted: NetworkNames) -> Iterator[str]:
    """Iterate over notes on other groups that fit, and on how to take them."""
    for head in _fitting(tensors, wanted):
        if not taken.startswith(path + head):
            kind = "averaged weights (EMA or SWA)" if is_average(head) else "weights"
            yield f"{kind} are also there, not taken: --strip-prefix {path}{head} takes them"


def _left(tensors: Mapping[str, Tensor], heads: Sequence[str], weights: Weights) -> Iterator[str]:
    """Iterate over notes on tensors that belong to no network taken: those of losses and metrics, for instance."""
    if others := [name for name in tensors if not name.startswith(tuple(heads))]:
        yield f"left out, as no part of the network: {some(others)} in {weights.source.name}"


def _shared(tensors: Mapping[str, Tensor]) -> str | None:
    """The prefix of a wrapper that all names have."""
    return next((head for head in WRAPPERS if tensors and all(name.startswith(head) for name in tensors)), None)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _without_counter(tensors: dict[str, Tensor], wanted: NetworkNames) -> dict[str, Tensor]:
    """Tensors without the counter that stands beside averaged weights, where the network has none."""
    rest = {name: tensor for name, tensor in tensors.items() if name != COUNTER}
    averaged = len(rest) < len(tensors) and COUNTER not in wanted.names
    return rest if averaged and all(name.startswith("module.") for name in rest) else tensors


def _count(counter: Tensor) -> str:
    return str(int(counter)) if counter.numel() == 1 else "several"


def _stripped(tensors: Mapping[str, Tensor], prefix: str, weights: Weights) -> dict[str, Tensor]:
    renamed = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise CheckpointError(f"{weights.source}: without the prefix {prefix!r}, two tensors would have one name")
    return renamed
