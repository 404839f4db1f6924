"""The law suite: what every measure claims, attacked; for measures of your own as well.

`drifts` measures small networks before and after edits that keep their function, one kind of edit for each
`Invariance`. A claim holds if no edit of its kind moves the number beyond rounding, or beyond what its random numbers leave
open where the edit deals them out anew (`SCALINGS`); it is tight if what is not claimed does move it.

>>> from isoflat.measures.catalogue import find_measure
>>> found = drifts(find_measure("gradient_norm"), "layerwise")
>>> found[Invariance.LAYERS].inside, found[Invariance.UNITS].inside
(True, False)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import stdev
from typing import Any, final

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from isoflat.core.estimate import Estimate, Kind
from isoflat.core.rng import stream
from isoflat.geometry.base import Geometry, Invariance
from isoflat.geometry.preconditioned import Preconditioned
from isoflat.geometry.traced import Traced
from isoflat.measurement.run import measure_all
from isoflat.measures.base import Measure
from isoflat.measures.catalogue import find_geometry, find_measure, geometries
from isoflat.measures.point import NOT_APPLICABLE
from isoflat.symmetry.finding.discover import symmetries
from isoflat.symmetry.found import Found

ROUNDING = 1e-6
"""Relative drift of a number that is exact or enclosed, below which nothing has moved: the edits reach factors of 100, and
pass through rounding of products, canonical representatives and eigenvalue problems."""

CONFIDENCE = 0.999
"""Of the interval for what an edit does to a number that rests on random ones."""

TOLERANCE = 1e-8
"""Relative width that enclosures are asked for."""

SHORT = {"chains": 8, "draws": 8, "burn": 22, "localisation": 200.0, "rows": 24}
"""Chains that are long enough to tell an edit from none."""

GLANCE = {"chains": 2, "draws": 2, "burn": 2}
"""Chains that are as telling where an edit leaves random numbers where they were (`SCALINGS`)."""

SCALINGS = frozenset({Invariance.LAYERS, Invariance.UNITS, Invariance.NORMS})
"""Edits after which random numbers are where they were: a metric that follows a scaling has the coordinates it had before, so
that a number that rests on the same draws is the same. Other edits deal coordinates out anew."""

ADAPTIVE = "preconditioned_edge_of_stability"
"""The measure whose geometry is an optimiser's (`preconditioned`) and has no name."""

Place = str | Geometry | Callable[[nn.Module], Geometry]
"""A geometry, its name, or what makes one for a network: the edited copy is measured in that of the network itself."""

__all__ = [
    "ARENAS",
    "Arena",
    "Drift",
    "Invariance",
    "Place",
    "batches",
    "check",
    "drifts",
    "drifts_of",
    "preconditioned",
    "usable",
]


@final
@dataclass(frozen=True)
class Arena:
    """A small classifier, and an edit that keeps its function.

    Attributes:
        name: in words.
        invariance: the kind of the edit.
        build: the network in float64, in evaluation mode.
        shape: of one input.
        edit: changes named tensors in place.
    """

    name: str
    invariance: Invariance
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    edit: Callable[[Mapping[str, Tensor]], None]

    def networks(self) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
        """The network, its edited copy, and data.

        Raises:
            AssertionError: the edit changes the function.
        """
        net = _random(self.build().double().eval(), self.name)
        generator = stream(0, "arena", self.name)
        inputs = torch.randn(24, *self.shape, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (24,), generator=generator)
        twin = copy.deepcopy(net)
        with torch.no_grad():
            self.edit({**dict(twin.named_parameters()), **dict(twin.named_buffers())})
            before, after = net(inputs), twin(inputs)
        if not torch.allclose(before, after, rtol=1e-9, atol=1e-9 * float(before.abs().max())):
            raise AssertionError(f"the edit of {self.name!r} changes the network's output")
        return net, twin, (inputs, labels)


@final
@dataclass(frozen=True)
class Drift:
    """Change of a number under the edits of one kind.

    Attributes:
        claimed: whether it was to stay.
        worst: largest change, relative to the smaller of the two values; None where the measure applies to none of the networks.
        inside: whether every change lies within what rounding, or the numbers' intervals, leave open.
        refused: why it did not apply, where it did not.
    """

    claimed: bool
    worst: float | None
    inside: bool
    refused: tuple[str, ...] = ()

    @property
    def true(self) -> bool:
        """Test whether the claim holds, or what is not claimed is seen to fail."""
        return self.worst is None or self.claimed == self.inside

    def __str__(self) -> str:
        """Claim and drift."""
        seen = "does not apply" if self.worst is None else f"{self.worst:.0e}"
        return f"{'claimed' if self.claimed else 'not claimed'}, {seen}"


def usable(entry: str | Measure) -> Measure:
    """A measure with values for what must be given, and short chains: claims do not depend on them.

    >>> usable("edge_of_stability").label
    'edge_of_stability(learning_rate=0.1, momentum=0)'
    """
    entry = find_measure(entry)
    given = SHORT if "chains" in entry.options else {"learning_rate": 0.1} if "learning_rate" in entry.options else {}
    return entry.with_options(**given)


def preconditioned(net: nn.Module) -> Preconditioned:
    """The metric of Adam's state after a first step with gradients that are drawn; the network is left alone."""
    twin = copy.deepcopy(net)
    adam = torch.optim.Adam(twin.parameters(), lr=0.1)
    for name, parameter in twin.named_parameters():
        drawn = torch.randn(parameter.shape, generator=stream(0, "gradient", name), dtype=torch.float64)
        parameter.grad = drawn.to(parameter)
    adam.step()
    return Preconditioned.of(adam, twin)


def drifts(entry: str | Measure, geometry: Place = "euclidean", seed: int = 0) -> dict[Invariance, Drift]:
    """Distances by which each kind of edit moves a measure.

    Args:
        entry: the measure, or its name.
        geometry: that it is measured in, unless it has its own.
        seed: of random probes and start vectors.
    """
    entry = find_measure(entry)
    return drifts_of([entry], geometry, seed)[entry.label]


def drifts_of(
    entries: Sequence[str | Measure], geometry: Place = "euclidean", seed: int = 0
) -> dict[str, dict[Invariance, Drift]]:
    """The same of several measures at once, which share their passes over the data; by their labels."""
    measures = [find_measure(entry) for entry in entries]
    found: dict[str, dict[Invariance, Drift]] = {entry.label: {} for entry in measures}
    for kind in Invariance:
        for label, drift in _drifts(measures, geometry, kind, seed).items():
            found[label][kind] = drift
    return found


def batches(entries: Iterable[Measure]) -> list[tuple[str, Place, list[Measure]]]:
    """Measures that can be attacked at once, with the geometry and its name: "" where each has its own.

    >>> [(name, len(some)) for name, _, some in batches([find_measure("tic"), find_measure("gradient_norm")])]
    [('', 1), ('auto', 1), ('elementwise', 1), ('euclidean', 1), ('layerwise', 1)]
    """
    made = [usable(entry) for entry in entries]
    own = [entry for entry in made if entry.geometry]
    adaptive = [entry for entry in made if entry.name == ADAPTIVE]
    free = [entry for entry in made if entry not in own and entry not in adaptive]
    found: list[tuple[str, Place, list[Measure]]] = [
        ("", "euclidean", own),
        ("preconditioned", preconditioned, adaptive),
    ]
    found += [(place, place, free) for place in geometries()]
    return [batch for batch in found if batch[2]]


def check(entry: str | Measure, geometry: Place = "euclidean", seed: int = 0) -> dict[Invariance, Drift]:
    """Check that claims hold and are tight.

    Raises:
        AssertionError: one does not, or is not.
    """
    found = drifts(entry, geometry, seed)
    wrong = {kind: drift for kind, drift in found.items() if not drift.true}
    if wrong:
        raise AssertionError("; ".join(f"{kind}: {drift}" for kind, drift in wrong.items()))
    return found


def _drifts(entries: Sequence[Measure], where: Place, kind: Invariance, seed: int) -> dict[str, Drift]:
    changes: dict[str, list[tuple[float, bool]]] = {entry.label: [] for entry in entries}
    refused: dict[str, list[str]] = {entry.label: [] for entry in entries}
    claimed: dict[str, bool] = {}
    asked = {entry.label: _brief(entry, kind) for entry in entries}
    for arena in (arena for arena in ARENAS if arena.invariance is kind):
        net, twin, data = _networks(arena)
        place = where(net) if callable(where) else find_geometry(where)
        before, after = (_numbers(list(asked.values()), model, data, place, arena, seed) for model in (net, twin))
        for label, entry in asked.items():
            claimed[label] = kind in entry.claimed(find_geometry(entry.geometry or place))
            first, second = before[entry.label], after[entry.label]
            if isinstance(first, str):
                refused[label].append(f"{arena.name}: {first}")
            else:  # an edit after which a number is refused has moved it
                changes[label].append((math.inf, False) if isinstance(second, str) else _change(first, second, kind))
    return {label: _drift(claimed[label], changes[label], refused[label]) for label in asked}


def _drift(claimed: bool, changes: Sequence[tuple[float, bool]], refused: Sequence[str]) -> Drift:
    if not changes:
        return Drift(claimed, None, True, tuple(refused))
    return Drift(claimed, max(change for change, _ in changes), all(inside for _, inside in changes), tuple(refused))


def _brief(entry: Measure, kind: Invariance) -> Measure:
    return entry.with_options(**GLANCE) if kind in SCALINGS and "chains" in entry.options else entry


def _numbers(
    entries: Sequence[Measure], model: nn.Module, data: Any, place: Geometry, arena: Arena, seed: int
) -> dict[str, Estimate | str]:
    """The number of each measure, or why it does not apply."""
    traced = any(isinstance(find_geometry(entry.geometry or place), Traced) for entry in entries)
    start = _start(arena) if any(entry.prior for entry in entries) else None
    known = replace(_found(arena), model=model) if traced else None
    loss = nn.CrossEntropyLoss()
    options: dict[str, Any] = {
        "geometry": place,
        "symmetries": known,
        "rtol": TOLERANCE,
        "seed": seed,
        "initial": start,
    }
    try:
        table = measure_all(model, data, loss, measures=list(entries), **options)
    except NOT_APPLICABLE as error:
        return {entry.label: str(error) for entry in entries}
    numbers: dict[str, Estimate | str] = {row.measure: row.estimate for row in table}
    return numbers | {omission.measure: omission.reason for omission in table.omitted}


def _change(before: Estimate, after: Estimate, kind: Invariance) -> tuple[float, bool]:
    size = max(abs(before.value), abs(after.value))
    gap = abs(after.value - before.value)
    allowed = ROUNDING * size
    if Kind.STANDARD_ERROR in (before.kind, after.kind) and kind not in SCALINGS:
        allowed += _left_open(before, after)
    least = min(abs(before.value), abs(after.value))
    return gap / least if least else (math.inf if gap else 0.0), gap <= allowed


def _left_open(before: Estimate, after: Estimate) -> float:
    """Allowance for random numbers dealt out anew, which may move a number that an edit does not.

    Both rest on the same draws, so that samples are compared one by one (Student's paired t), where there are any.
    """
    if not before.samples or len(before.samples) != len(after.samples):
        return (before.upper - before.lower + after.upper - after.lower) / 2
    differences = [b - a for a, b in zip(before.samples, after.samples, strict=True)]
    tail = float(student.isf((1 - CONFIDENCE) / 2, len(differences) - 1))
    return tail * stdev(differences) / math.sqrt(len(differences))


@cache
def _networks(arena: Arena) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    return arena.networks()


@cache
def _start(arena: Arena) -> nn.Module:
    """Weights before training; the edit is of the trained network alone, so that these stay where they are."""
    return _random(arena.build().double().eval(), f"{arena.name}, before training")


@cache
def _found(arena: Arena) -> Found:
    """The symmetries of an arena's networks, which have one architecture."""
    net, _, data = _networks(arena)
    return symmetries(net, data[0], loss=nn.CrossEntropyLoss())


def _random(net: nn.Module, name: str) -> nn.Module:
    """Weights and statistics of the usual size, none of them trivial."""
    generator = stream(0, "weights", name)
    with torch.no_grad():
        for key, tensor in (*net.named_parameters(), *net.named_buffers()):
            if not tensor.is_floating_point():
                continue
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            fan = tensor[0].numel() if tensor.ndim > 1 else 4
            tensor.copy_(drawn.abs() + 0.5 if key.endswith("running_var") else drawn * math.sqrt(2 / fan))
    return net


class _Attention(nn.Module):
    """One head over four positions, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).mT / math.sqrt(3)).softmax(-1)
        return self.head(torch.relu(self.out(weights @ self.value(x))).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    )


def _pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 2),
        nn.ReLU(),
        nn.Conv2d(6, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


def _normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def _pair() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4, bias=False), nn.Linear(4, 3))


def _layers(tensors: Mapping[str, Tensor], weights: tuple[str, ...]) -> None:
    """Layers × 7, × 9 and / 63; biases with the product so far."""
    product = 1.0
    for name, factor in zip(weights, (7.0, 9.0, 1 / 63), strict=True):
        product *= factor
        tensors[f"{name}.weight"].mul_(factor)
        tensors[f"{name}.bias"].mul_(product)


def _units(tensors: Mapping[str, Tensor], first: str, second: str, group: int = 1) -> None:
    """Units × 100, / 50, × 20, …; of the next layer each unit has a group of columns."""
    weight, after = tensors[f"{first}.weight"], tensors[f"{second}.weight"]
    factors = torch.tensor([100.0, 0.02, 20.0, 0.1, 5.0, 1.0], dtype=torch.float64)[: len(weight)]
    weight.mul_(factors.view(-1, *[1] * (weight.ndim - 1)))
    tensors[f"{first}.bias"].mul_(factors)
    after.div_(factors.repeat_interleave(group).view(1, -1, *[1] * (after.ndim - 2)))


def _channels(tensors: Mapping[str, Tensor]) -> None:
    """Channels that go into a batch normalisation, rescaled with its statistics; epsilon stays."""
    factors = torch.tensor([0.02, 3.0, 0.05, 20.0, 0.03, 1.0], dtype=torch.float64)
    tensors["0.weight"].mul_(factors[:, None])
    tensors["0.bias"].mul_(factors)
    tensors["1.running_mean"].mul_(factors)
    variance, epsilon = tensors["1.running_var"], nn.BatchNorm1d(1).eps
    variance.copy_((variance + epsilon) * factors.square() - epsilon)


def _order(tensors: Mapping[str, Tensor]) -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    tensors["0.weight"].copy_(tensors["0.weight"][order])
    tensors["0.bias"].copy_(tensors["0.bias"][order])
    tensors["2.weight"].copy_(tensors["2.weight"][:, order])


def _mixed(size: int) -> Tensor:
    """An invertible matrix far from orthogonal: condition number about 100."""
    drawn = torch.randn(size, size, generator=stream(0, "mixed", size), dtype=torch.float64)
    left, _, right = torch.linalg.svd(drawn)
    return left @ torch.diag(torch.logspace(-1, 1, size, dtype=torch.float64)) @ right


def _head(tensors: Mapping[str, Tensor]) -> None:
    """A basis between query and key, and one between value and output."""
    for first, second, matrix in (("query", "key", _mixed(3)), ("value", "out", _mixed(3).T)):
        for part in ("weight", "bias"):
            tensors[f"{first}.{part}"].copy_(matrix @ tensors[f"{first}.{part}"])
        inverse = torch.linalg.inv(matrix)
        if second == "key":
            for part in ("weight", "bias"):
                tensors[f"key.{part}"].copy_(inverse.T @ tensors[f"key.{part}"])
        else:
            tensors["out.weight"].copy_(tensors["out.weight"] @ inverse)


def _between(tensors: Mapping[str, Tensor]) -> None:
    """A basis between two linear maps."""
    matrix = _mixed(4)
    tensors["2.weight"].copy_(matrix @ tensors["2.weight"])
    tensors["3.weight"].copy_(tensors["3.weight"] @ torch.linalg.inv(matrix))


ARENAS = (
    Arena("multilayer perceptron, whole layers", Invariance.LAYERS, _mlp, (5,), lambda t: _layers(t, ("0", "2", "4"))),
    Arena("convolutions, whole layers", Invariance.LAYERS, _cnn, (1, 8, 8), lambda t: _layers(t, ("0", "3", "6"))),
    Arena("multilayer perceptron, units", Invariance.UNITS, _mlp, (5,), lambda t: _units(t, "0", "2")),
    Arena("convolutions, filters", Invariance.UNITS, _cnn, (1, 8, 8), lambda t: _units(t, "3", "6", group=4)),
    Arena("mean pooling, whole layers", Invariance.LAYERS, _pooled, (1, 4, 4), lambda t: _layers(t, ("0", "2", "6"))),
    Arena("mean pooling, filters", Invariance.UNITS, _pooled, (1, 4, 4), lambda t: _units(t, "0", "2")),
    Arena("batch normalisation, channels", Invariance.NORMS, _normalised, (5,), _channels),
    Arena("attention, bases of a head", Invariance.BASES, _Attention, (4, 5), _head),
    Arena("two linear maps, the basis between", Invariance.BASES, _pair, (5,), _between),
    Arena("multilayer perceptron, order of units", Invariance.ORDER, _mlp, (5,), _order),
    Arena("mean pooling, order of filters", Invariance.ORDER, _pooled, (1, 4, 4), _order),
)
"""Networks and edits of the law suite."""
