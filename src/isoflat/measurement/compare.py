"""`compare`: several networks on the same samples, with the same probes and random starts."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Unpack

import torch
from tqdm.auto import tqdm

from isoflat.core.comparison import Basis, Comparison, Difference, Ratio, Verdict
from isoflat.core.errors import IsoflatError, UsageError
from isoflat.core.estimate import Estimate, Kind
from isoflat.core.record import Record
from isoflat.core.table import Table
from isoflat.geometry.base import Geometry, tensors_hash
from isoflat.geometry.euclidean import GEOMETRY as PLAIN
from isoflat.geometry.traced import Traced
from isoflat.linalg.trace.base import deviation, mean, quantile
from isoflat.measurement.groups import symmetries_of
from isoflat.measurement.run import planned, tabulate
from isoflat.measurement.subject import Subject, subject
from isoflat.measures.base import Direction, Measure
from isoflat.measures.catalogue import find_measure
from isoflat.measures.settings import Keywords, Settings, takes_settings
from isoflat.risk.forms import batches_of
from isoflat.risk.losses import as_loss
from isoflat.risk.network import exactly
from isoflat.risk.ranks import Ranks
from isoflat.symmetry.found import Found
from isoflat.symmetry.groups.base import Symmetry

UNEQUAL = 0.1
"""Share of the larger loss beyond which a difference of losses is warned about."""

_NOISY = 100 * torch.finfo(torch.float32).eps
"""Relative width below which float64 is advised."""

_UNBOUNDED = (-math.inf, math.inf)

_REMEDIES = {
    "group": "numbers invariant to different groups have no common scale: compare networks of one architecture "
    "(geometry='euclidean' takes any two, by plain numbers, which rescaling moves)",
    "trainable": "compare networks of one architecture, with the same params "
    "(geometry='euclidean' takes any two, by plain numbers, which rescaling moves)",
    "logits": "pass the same logits= for all",
    "precision": "pass one dtype for all",
    "data": "all must be measured on the same samples: give data that comes out the same each time it is read",
    "counted": "the losses do not count the same targets: all need one loss",
    "accuracy": "the losses are not of one kind: all need one loss",
}
"""Remedies by the first word of the fact that differs; the first that applies is said."""


@takes_settings(
    initial="weights before training, the same for all networks, as for `isoflat.measure`.",
    budget="number of products for each network, or a `Budget`; None for the default one.",
    symmetries="groups you claim for every one of these networks.",
    progress="whether a progress bar, and a line for each network that is done, are written on standard error.",
)
def compare(
    models: Mapping[str, torch.nn.Module],
    data: Any,
    loss: Any = None,
    *,
    reference: str | None = None,
    measures: Sequence[str | Measure] = ("quotient_spectral_norm",),
    geometry: str | Geometry | Sequence[str | Geometry] = "auto",
    **settings: Unpack[Keywords],
) -> Comparison:
    """Tell which network is flatter: all are measured on the same samples with the same random numbers.

    Differences come with intervals: a network is called flatter only where the interval leaves 0 out. Before anything
    is measured, all networks are seen to have the same groups; numbers that are invariant to different groups are not
    compared. Plain numbers (`geometry="euclidean"`) have no group, and a note says what they are worth.

    Args:
        models: networks by label, at least two; they are not changed.
        data: as for `isoflat.measure`; the same for all.
        loss: as for `isoflat.measure`; the same for all.
        reference: label of the network that the others are printed against; the first by default.
        measures: names in the catalogue.
        geometry: as for `isoflat.measure_all`.
        **settings: the fields of `isoflat.Settings`.

    Returns:
        The comparison; print it, or ask it for `flattest()`, `between("b", "a")`, `ranks()`.

    Raises:
        UsageError: fewer than two networks, or they cannot be compared; the message names what differs.
        IsoflatError: one of them cannot be measured; its label stands in front.

    >>> from isoflat import compare
    >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    >>> nets = {"one": torch.nn.Linear(1, 1, bias=False).double(), "two": torch.nn.Linear(1, 1, bias=False).double()}
    >>> for size, net in enumerate(nets.values(), start=1):
    ...     _ = torch.nn.init.constant_(net.weight, size)
    >>> found = compare(nets, (x, x), torch.nn.MSELoss(), geometry="layerwise")  # w² · 2 E x²
    >>> found.flattest(), round(found.between("two", "one").value, 12), round(found.between("two", "one").ratio.value, 12)
    ('one', 15.0, 4.0)
    """
    if len(models) < 2 or not all(isinstance(label, str) and label for label in models):
        raise UsageError(f"expected at least two networks, each with its own label, got {', '.join(map(str, models))}")
    if reference is not None and reference not in models:
        raise UsageError(f"reference {reference!r} is none of the networks: {', '.join(models)}")
    chosen = Settings(**settings)  # pyrefly: ignore
    declared = chosen.symmetries
    if isinstance(declared, Found):
        raise UsageError(
            "what isoflat.symmetries found belongs to one network: leave it out, and each network's own are found"
        )
    entries = [find_measure(name) for name in measures]
    plan = planned(entries, [geometry] if isinstance(geometry, str | Geometry) else list(geometry))
    places = {place for _, place in plan}
    batches, ranks = batches_of(data, as_loss(loss)), Ranks.here()

    def prepare(model: torch.nn.Module) -> Subject:
        return subject(model, batches, loss, replace(chosen, initial=None))

    with ranks.agreeing():
        known = _alike(models, prepare, places, declared or ())
    tables: dict[str, Table] = {}
    for label, model in models.items():
        with _about(label, but=UsageError):
            own = replace(chosen, symmetries=known.get(label, declared))
            tables[label] = tabulate(model, batches, loss, plan, own, label)
            if omitted := tables[label].omitted:
                raise UsageError(f"{omitted[0]}. Leave the measure out to compare the others")
        agree({name: _seen(table) for name, table in tables.items()})
        if chosen.progress and ranks.first:
            tqdm.write(_done(label, tables[label], len(tables), len(models)), file=sys.stderr)
    found = contrast(list(tables.values()), reference, entries)
    carried = () if loss is not None else ("each network carries its own loss: that all are the same is not checked",)
    return replace(found, notes=(*found.notes, *carried))


def contrast(
    tables: Sequence[Table], reference: str | None = None, measures: Sequence[str | Measure] = ()
) -> Comparison:
    """The comparison of networks that have been measured already, such as tables read from files.

    Args:
        tables: one for each network, with its label, and with the same numbers in each.
        reference: label of the network that the others are printed against; the first by default.
        measures: measures of your own, which are not in the catalogue.

    Raises:
        UsageError: there are fewer than two, two have one label, or they cannot be compared; the message says why.
    """
    named = {table[0].label: table for table in tables}
    if len(named) < 2 or len(named) < len(tables):
        raise UsageError(f"expected at least two tables, each with its own label, got {', '.join(named) or 'none'}")
    agree({label: _seen(table) for label, table in named.items()})
    reference = reference or next(iter(named))
    rows = tuple(row for table in named.values() for row in table)
    order = [reference, *(label for label in named if label != reference)]
    own = {entry.label: entry for entry in measures if isinstance(entry, Measure)}
    differences = []
    for row in named[order[0]]:
        entry = own.get(row.measure) or find_measure(row.measure)
        points = [named[label][row.measure, row.geometry] for label in order]
        pairs = [(first, second) for index, second in enumerate(points) for first in points[index + 1 :]]
        differences += [difference(*pair, entry.direction is Direction.LOWER_IS_FLATTER) for pair in pairs]
    return Comparison(rows, tuple(differences), reference, _notes(rows, differences))


def agree(facts: Mapping[str, Mapping[str, str]]) -> None:
    """See that networks can be compared.

    Args:
        facts: for each label, facts by name that must be the same for all.

    Raises:
        UsageError: a network's facts differ from those of the first; all that differ are named.

    >>> agree({"a": {"precision": "float32"}, "b": {"precision": "float64"}})
    Traceback (most recent call last):
    isoflat.core.errors.UsageError: b cannot be compared with a: they differ in precision (float64 against float32); pass ...
    """
    first, *others = facts
    for label in others:
        own, theirs = facts[label], facts[first]
        names = [name for name in {**theirs, **own} if own.get(name) != theirs.get(name)]
        if names:
            listed = ", ".join(f"{name} ({own.get(name)} against {theirs.get(name)})" for name in names)
            kinds = [name.split()[0] for name in names]
            remedy = next((f"; {words}" for kind, words in _REMEDIES.items() if kind in kinds), "; measure both alike")
            raise UsageError(f"{label} cannot be compared with {first}: they differ in {listed}{remedy}")


def difference(first: Record, second: Record, lower_is_flatter: bool) -> Difference:
    """One number of two networks, the first minus the second.

    Enclosures are set against each other: the difference lies in `[l₁ − u₂, u₁ − l₂]`, and their failure probabilities
    add, because both rest on one random start vector. Where both numbers are means over the same random probes, the
    differences probe by probe are averaged instead: what both networks share in a probe then cancels (Student's
    t-interval for the difference, Fieller's (1954) for the ratio).

    Args:
        first: the number of the network that comes with a plus.
        second: the same number of the other one.
        lower_is_flatter: True where lower values mean flatter.
    """
    a, b = first.estimate, second.estimate
    basis, found = _basis(first, second), _set_against(a, b)
    if basis is Basis.IDENTICAL:
        found = _Gap((0.0, 0.0, 0.0), 1.0, 0.0, (1.0, 1.0))
    elif basis is Basis.UNCERTIFIED:
        found = _Gap((a.value - b.value, *_UNBOUNDED), 0.0)
    elif basis is Basis.PROBES:
        found = _paired(a, b, min(a.confidence, b.confidence))
    value, lower, upper = found.interval
    ratio = Ratio(a.value / b.value, *_around(a.value / b.value, found.ratio)) if min(a.value, b.value) > 0 else None
    gap = Difference(
        measure=first.measure,
        geometry=first.geometry,
        lower_is_flatter=lower_is_flatter,
        first=first.label,
        second=second.label,
        value=value,
        lower=lower,
        upper=upper,
        confidence=found.confidence,
        basis=basis,
        standard_error=found.standard_error,
        ratio=ratio,
    )
    return replace(gap, remedy=_remedy(gap, first, second))


class _Gap(NamedTuple):
    """A difference of two numbers: value, lower and upper end; and the ends of the interval of their ratio."""

    interval: tuple[float, float, float]
    confidence: float
    standard_error: float | None = None
    ratio: tuple[float, float] = _UNBOUNDED


def _basis(first: Record, second: Record) -> Basis:
    if identical(first, second):
        return Basis.IDENTICAL
    if Kind.UNCERTIFIED in (first.estimate.kind, second.estimate.kind):
        return Basis.UNCERTIFIED
    shared = (first.settings.get("seed"), first.point.parameters) == (
        second.settings.get("seed"),
        second.point.parameters,
    )
    counts = {len(first.estimate.samples), len(second.estimate.samples)}
    return Basis.PROBES if shared and len(counts) == 1 and min(counts) > 1 else Basis.INTERVALS


def identical(first: Record, second: Record) -> bool:
    """Test whether both have the same weights, the same loss and gradient there, and the same number, to the last bit.

    Weights alone do not tell: two networks may hold the same tensors and compute different functions.
    """
    kept = ("value", "lower", "upper", "kind", "samples")
    return (
        (first.model_hash, first.group_hash, first.point) == (second.model_hash, second.group_hash, second.point)
        and bool(first.model_hash)
        and all(getattr(first.estimate, name) == getattr(second.estimate, name) for name in kept)
    )


def _set_against(a: Estimate, b: Estimate) -> _Gap:
    """Two intervals that fail with probabilities that add, whatever they share."""
    ratio = (a.lower / b.upper, a.upper / b.lower) if min(a.lower, b.lower) > 0 else _UNBOUNDED
    confidence = max(0.0, 1 - ((1 - a.confidence) + (1 - b.confidence)))
    return _Gap((a.value - b.value, a.lower - b.upper, a.upper - b.lower), confidence, None, ratio)


def _paired(a: Estimate, b: Estimate, confidence: float) -> _Gap:
    """Mean difference of paired samples with Student's interval, and their ratio with Fieller's."""
    gaps = [one - other for one, other in zip(a.samples, b.samples, strict=True)]
    value, error, wide = mean(gaps), _error(gaps), quantile(confidence, len(gaps) - 1)
    noise = _rounding(a), _rounding(b)
    half = wide * error + sum(noise)
    return _Gap((value, value - half, value + half), confidence, error, _fieller(a.samples, b.samples, wide, noise))


def _fieller(
    first: Sequence[float], second: Sequence[float], wide: float, noise: tuple[float, float]
) -> tuple[float, float]:
    """Every r for which the t-interval of the mean of `a − r b` contains 0; unbounded if the mean of b may be zero.

    Written for r = r₀ + δ around the ratio r₀ of the means, so that no digits cancel where a and b are nearly in
    proportion: with e = a − r₀ b, `δ² (1 − k s_bb) + 2 δ k s_eb − k s_ee ≤ 0` in units of the mean of b, k = q²/m.

    Args:
        first: samples of a.
        second: samples of b, as many.
        wide: q, the t-quantile.
        noise: errors of the two means by rounding, at most.
    """
    unit = mean(second)
    if not unit > noise[1]:
        return _UNBOUNDED
    below = [value / unit for value in second]
    centre = mean(first) / unit
    rest = [a / unit - centre * b for a, b in zip(first, below, strict=True)]
    k = wide**2 / len(second)
    leading = 1 - k * _covariance(below, below)
    if not leading > 0:
        return _UNBOUNDED
    half, constant = k * _covariance(rest, below), k * _covariance(rest, rest)
    root = math.sqrt(half**2 + leading * constant)
    slack = (noise[0] + abs(centre) * noise[1]) / (unit - noise[1])
    return centre - (half + root) / leading - slack, centre + (root - half) / leading + slack


def _rounding(estimate: Estimate) -> float:
    """Half width that the interval of an estimate has beyond Student's, for the rounding of its products."""
    sampling = quantile(estimate.confidence, len(estimate.samples) - 1) * _error(estimate.samples)
    return max(0.0, estimate.upper - estimate.value - sampling)


def _error(samples: Sequence[float]) -> float:
    """Standard error of the mean."""
    return deviation(samples) / math.sqrt(len(samples))


def _covariance(first: Sequence[float], second: Sequence[float]) -> float:
    """Covariance of samples, over one less than their number."""
    one, other = mean(first), mean(second)
    return math.fsum((a - one) * (b - other) for a, b in zip(first, second, strict=True)) / (len(first) - 1)


def _around(value: float, ends: tuple[float, float]) -> tuple[float, float]:
    """An interval that contains its value in spite of the last digit's rounding."""
    return min(ends[0], value), max(ends[1], value)


def _remedy(gap: Difference, first: Record, second: Record) -> str:
    """Advice on what would decide a pair that is not decided."""
    if gap.verdict is Verdict.NOT_DECIDED:
        return "an uncertified value decides nothing; measure with a certificate (certify=True)"
    if gap.verdict is not Verdict.TIE:
        return ""
    size = abs(gap.value)
    if size == 0:
        return "their values agree to the last digit, and no tolerance tells them apart"
    estimates, single = (first.estimate, second.estimate), first.settings.get("dtype") != "float64"
    if any(estimate.kind is Kind.STANDARD_ERROR for estimate in estimates):
        used = len(first.estimate.samples) or int(first.settings["probes"])
        half = gap.value - gap.lower if gap.value > 0 else gap.upper - gap.value
        noise = sum(map(_rounding, estimates)) if gap.basis is Basis.PROBES else 0.0
        if noise >= size:
            return _rounded(single)
        wanted = 1.2 * used * ((half - noise) / (size - noise)) ** 2
        return f"as far as these values show, probes={_leading(wanted, 2, up=True):.0f} instead of {used} would tell them apart"
    tolerance = _leading(size / sum(abs(estimate.value) for estimate in estimates) / 2, 1, up=False)
    if not all(estimate.converged for estimate in estimates):
        return f"relative widths of {tolerance:g} would tell them apart, as far as these values show, but not all have converged"
    if tolerance < torch.finfo(torch.float32 if single else torch.float64).eps:
        return _rounded(single)
    precise = " and dtype='float64'" if tolerance < _NOISY and single else ""
    asked = f"rtol={tolerance:g} instead of {first.settings['rtol']:g}{precise}"
    return f"as far as these values show, {asked} would tell them apart"


def _rounded(single: bool) -> str:
    """Why no tolerance tells two values apart."""
    return f"their values agree to rounding{', and only float64 can tell them apart' if single else ''}"


def _leading(value: float, digits: int, up: bool) -> float:
    """Rounded to so many digits, always up or always down.

    >>> _leading(0.00374, 1, up=False), _leading(812.3, 2, up=True)
    (0.003, 820.0)
    """
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{(math.ceil if up else math.floor)(value / unit) * unit:.{digits}g}")


def _alike(
    models: Mapping[str, torch.nn.Module],
    prepare: Callable[[torch.nn.Module], Subject],
    places: set[Geometry],
    declared: Sequence[Symmetry],
) -> dict[str, Found]:
    """See that networks can be compared before any of them is measured.

    Returns:
        The symmetries of each network, to be used again; none where they are not needed, or where some were declared
        (which `measure_all` verifies by itself).

    Raises:
        UsageError: they cannot.
        IsoflatError: one of them cannot be measured.
    """
    facts: dict[str, dict[str, str]] = {}
    known: dict[str, Found] = {}
    for label, model in models.items():
        with _about(label):
            target = prepare(model)
            state = target.state
            facts[label] = {"precision": str(state.dtype).removeprefix("torch.")}
            if any(place.name != PLAIN.name for place in places):
                shown = f"{state.space.size} entries in {len(state.parameters)}, hash {tensors_hash('', 0, state)}"
                facts[label]["trainable tensors"] = shown
            if any(isinstance(place, Traced) and place.found is None for place in places):
                with exactly(state.device):
                    found = symmetries_of(target, declared)
                facts[label]["group"] = f"{found.dimension} dimensions, hash {found.hash}"
                if not declared:
                    known[label] = found
    agree(facts)
    return known


@contextmanager
def _about(label: str, but: type[Exception] | tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Context whose errors begin with the label of a network, except for those about what all networks have in common."""
    try:
        yield
    except IsoflatError as error:
        if not isinstance(error, but):
            error.args = (f"{label}: {error}",)
        raise


def _seen(table: Table) -> dict[str, str]:
    """Facts that measured networks must have in common, by name."""
    row = table[0]
    facts = {
        "data": f"hash {row.data_hash}",
        "counted targets": f"{row.point.targets:.12g}",
        "accuracy": "defined" if row.point.accuracy is not None else "not defined",
        "logits": str(row.settings.get("logits", "raw")),
        "precision": f"{row.settings.get('dtype')}, autocast {row.settings.get('autocast')}",
        "seed": str(row.settings.get("seed")),
        "numbers": "; ".join(f"{row.measure} ({row.geometry})" for row in table),
    }
    for row in table:
        facts[f"version of {row.measure}"] = row.versions.get("measure", "")
        facts[f"version of {row.geometry}"] = row.versions.get("geometry", "")
        if row.geometry != PLAIN.name:
            # A measure with claims of its own has another group than its geometry.
            hashes = dict.fromkeys(r.group_hash for r in table if r.geometry == row.geometry)
            facts[f"group of {row.geometry}"] = f"hash {', '.join(hashes)}"
    return facts


def _notes(rows: Sequence[Record], differences: Sequence[Difference]) -> tuple[str, ...]:
    """Warnings to read before a comparison is believed."""
    notes = []
    losses = {row.label: row.point.loss for row in rows}
    low, high = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    if losses[high] - losses[low] > UNEQUAL * max(abs(losses[low]), abs(losses[high])):
        classes = all(row.point.accuracy is not None for row in rows)
        scaled = (
            f", or pass logits='loss={losses[high]:.4g}', which scales their scores to an equal one" if classes else ""
        )
        notes.append(
            f"losses differ ({losses[low]:.4g} for {low}, {losses[high]:.4g} for {high}): numbers at unequal loss are "
            f"not comparable one to one, because curvature changes with the loss. Compare networks trained to the same loss{scaled}"
        )
    plain = [row for row in rows if row.geometry == PLAIN.name]
    if plain:
        many = (
            "; these networks do not even have the same tensors" if len({row.group_hash for row in plain}) > 1 else ""
        )
        notes.append(f"plain numbers ({PLAIN.name}) compare weights, not minima: rescaling moves them at will{many}")
    found = {(row.label, row.measure, row.geometry): row for row in rows}
    for gap in differences:
        first, second = (found[label, gap.measure, gap.geometry] for label in (gap.first, gap.second))
        if first.model_hash and first.model_hash == second.model_hash and gap.verdict is not Verdict.IDENTICAL:
            notes.append(
                f"{gap.first} and {gap.second} have identical weights, but not the same loss, gradient and "
                f"{gap.measure}: the networks differ in more than weights, or this device does not repeat itself"
            )
    stochastic = {row.estimate.confidence for row in rows if row.estimate.kind is Kind.STANDARD_ERROR}
    if stochastic and len(losses) > 2:
        notes.append(
            f"each interval of a stochastic number holds with its own confidence ({min(stochastic):g} for values), not "
            "all of them together"
        )
    return tuple(dict.fromkeys(notes))


def _done(label: str, table: Table, number: int, total: int) -> str:
    """A line that says that a network is measured, and at what cost."""
    products = sum(row.estimate.cost.products for row in table)
    seconds = sum(row.estimate.cost.seconds for row in table)
    return f"{number} of {total}: {label}, loss {table[0].point.loss:.6g}, {products:g} Hessian-vector products, {seconds:.1f} s"
