"""Tables and flat rows of records, for every kind of report."""

from __future__ import annotations

from collections.abc import Sequence

from isoflat.core.estimate import interval
from isoflat.core.plain import attributes
from isoflat.core.record import Record
from isoflat.report.document import Grid

_HEADS = (
    "network",
    "value",
    "interval",
    "confidence",
    "converged",
    "stationarity",
    "Hessian-vector products",
    "gradient passes",
    "seconds",
    "seed",
)


def measurements(records: Sequence[Record], caption: str) -> tuple[Grid, ...]:
    """Every number with its interval, confidence and cost: one grid per measure, geometry and group."""
    kinds = dict.fromkeys((record.measure, record.geometry, record.group) for record in records)
    grids = []
    for measure, geometry, group in kinds:
        rows = [r for r in records if (r.measure, r.geometry, r.group) == (measure, geometry, group)]
        title = f"{caption}: {measure}, {geometry} metric. Invariant to: {group}."
        grids.append(Grid(title, _HEADS, tuple(_row(record) for record in rows)))
    return tuple(grids)


def _row(record: Record) -> tuple[str, ...]:
    estimate, cost = record.estimate, record.estimate.cost
    return (
        record.label or "–",
        str(estimate),
        interval(estimate),
        f"{estimate.confidence:.10g}",
        "yes" if estimate.converged else "no",
        "–" if record.stationarity_ratio is None else f"{record.stationarity_ratio:.2g}",
        str(cost.products),
        f"{cost.gradient_passes:.1f}",
        f"{cost.seconds:.2f}",
        str(record.settings.get("seed", "–")),
    )


def network_notes(records: Sequence[Record]) -> tuple[str, ...]:
    """Notes of the records, each once, with the networks it is about."""
    about: dict[str, list[str]] = {}
    for record in records:
        for note in record.estimate.notes:
            about.setdefault(note, []).append(f"{record.label or 'network'} ({record.measure})")
    return tuple(f"{', '.join(dict.fromkeys(names))}: {note}" for note, names in about.items())


def versions(records: Sequence[Record]) -> tuple[tuple[str, str], ...]:
    """Versions of isoflat, torch, Python, measures and geometries that made the records."""
    found: dict[str, list[str]] = {}
    for record in records:
        for what, version in record.versions.items():
            of = {"measure": record.measure, "geometry": f"{record.geometry} geometry"}.get(what, what)
            found.setdefault(of, []).append(version)
    return tuple((what, ", ".join(dict.fromkeys(each))) for what, each in sorted(found.items()))


def flat(record: Record) -> dict[str, object]:
    """A record as one row for spreadsheets; numbers in full."""
    estimate = record.estimate
    return {
        **attributes(record, "label", "measure", "geometry", "group"),
        **attributes(estimate, "value", "lower", "upper", "confidence", "kind", "converged"),
        "stationarity_ratio": "" if record.stationarity_ratio is None else record.stationarity_ratio,
        **attributes(estimate.cost, "products", "gradient_passes", "seconds"),
        "loss": record.point.loss,
        "accuracy": "" if record.point.accuracy is None else record.point.accuracy,
        "gradient_norm": record.point.gradient_norm,
        **{name: record.settings.get(name, "") for name in ("seed", "dtype")},
        **attributes(record, "model_hash", "data_hash"),
        "notes": "; ".join(estimate.notes),
    }
