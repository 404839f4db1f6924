"""`measure` and `measure_all`: from a user's model to numbers, sharing every pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.record import Record
from isoflat.core.table import Omission, Table
from isoflat.geometry.base import Geometry
from isoflat.measurement.engine import opened
from isoflat.measurement.records import Refusal, Result
from isoflat.measurement.sample import from_sample
from isoflat.measurement.subject import Plan, subject
from isoflat.measures.base import Measure
from isoflat.measures.catalogue import find_geometry, find_measure
from isoflat.measures.settings import Keywords, Settings, takes_settings
from isoflat.risk.ranks import Ranks


@takes_settings()
def measure(
    model: torch.nn.Module,
    data: Any,
    loss: Any = None,
    *,
    measure: str | Measure = "quotient_spectral_norm",
    geometry: str | Geometry = "auto",
    **settings: Unpack[Keywords],
) -> Estimate:
    """Measure how flat a minimum is: one number with its interval. The model is not changed.

    Args:
        model: any `torch.nn.Module` without randomness in its forward pass (`model.eval()`).
        data: a loader without shuffling, a list of batches, a pair (inputs, targets), a map-style dataset, or a
            function returning a fresh iterator. It is read several times and must come out the same.
        loss: a `torch.nn` criterion, a function of output and target, or an `isoflat.BatchLoss`; left out if the
            model's output carries `.loss`.
        measure: name in the catalogue (`isoflat measures`), with options in brackets: `quotient_sharpness(epsilon=1)`.
        geometry: "auto" (at the canonical representative: nothing that keeps the function moves it), "elementwise"
            (each entry in units of its own size there), "layerwise" (the paper's metric) or "euclidean".
        **settings: the fields of `isoflat.Settings`.

    Returns:
        The estimate; print it, or read `value`, `lower`, `upper`, `converged`, `cost`, `notes`.

    Raises:
        IsoflatError: something cannot be measured; the message says what to do.

    >>> from isoflat import measure
    >>> x, y = torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    >>> net = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    >>> torch.nn.init.ones_(net.weight).requires_grad
    True
    >>> round(measure(net, (x, y), torch.nn.MSELoss(), geometry="layerwise").value, 12)  # ‖w‖² · 2 E x² = 5
    5.0
    """
    chosen = Settings(**settings)  # pyrefly: ignore
    return tabulate(model, data, loss, planned([measure], [geometry]), chosen).rows[0].estimate


@takes_settings()
def measure_all(
    model: torch.nn.Module,
    data: Any,
    loss: Any = None,
    *,
    measures: Sequence[str | Measure] = ("quotient_spectral_norm", "hessian_spectral_norm"),
    geometry: str | Geometry | Sequence[str | Geometry] = "auto",
    label: str = "",
    keep: Callable[[Record, torch.Tensor], None] | None = None,
    **settings: Unpack[Keywords],
) -> Table:
    """Measure several numbers in several geometries with shared passes over the data.

    Args:
        model: as for `isoflat.measure`; it is not changed.
        data: as for `isoflat.measure`.
        loss: as for `isoflat.measure`.
        measures: names in the catalogue.
        geometry: one or several; a measure that is defined in one geometry only is measured in that one, once.
        label: name of this network in tables.
        keep: called with each record that is one extreme eigenvalue and with its eigenvector, by which
            `isoflat.verify` checks it again.
        **settings: the fields of `isoflat.Settings`.

    Returns:
        One record per measure and geometry; a measure that does not apply is listed with the reason.

    Raises:
        IsoflatError: as for `isoflat.measure`, or none of the measures applies.
        UsageError: no measure was asked for, or a setting has no meaning.

    >>> x = torch.eye(2, dtype=torch.float64)
    >>> net = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    >>> table = measure_all(net, (x, x[:, :1]), torch.nn.MSELoss(), measures=["hessian_trace"], geometry="euclidean")
    >>> [(row.measure, row.geometry) for row in table]
    [('hessian_trace', 'euclidean')]
    """
    chosen = Settings(**settings)  # pyrefly: ignore
    plan = planned(measures, [geometry] if isinstance(geometry, str | Geometry) else geometry)
    return tabulate(model, data, loss, plan, chosen, label, keep)


def tabulate(
    model: torch.nn.Module,
    data: Any,
    loss: Any,
    plan: Plan,
    settings: Settings,
    label: str = "",
    keep: Callable[[Record, torch.Tensor], None] | None = None,
) -> Table:
    """Measure a plan: one record for each entry, or the reason why there is none.

    Args:
        model: as for `isoflat.measure`.
        data: as for `isoflat.measure`.
        loss: as for `isoflat.measure`.
        plan: measures, each with the geometry it is measured in.
        settings: the settings of the measurement.
        label: name of this network in tables.
        keep: as for `measure_all`.

    Raises:
        IsoflatError: as for `isoflat.measure`, or none of the measures applies.
    """
    ranks = Ranks.here(settings.reproducible_sum)
    with opened(lambda: subject(model, data, loss, settings), plan, settings, ranks, label) as measurement:
        found = from_sample(measurement) if settings.sample else measurement.results()
        rows = tuple(result.record for result in found if isinstance(result, Result))
        refused = [result for result in found if isinstance(result, Refusal)]
        if not rows:
            raise refused[0].error
        for result in found:
            if keep is not None and isinstance(result, Result) and result.witness is not None:
                keep(result.record, result.witness)
        omitted = tuple(Omission(r.measure.label, r.geometry.name, str(r.error), label) for r in refused)
        # Costs are measured on each process, and differ: all return those of the first.
        return ranks.from_first(Table(rows, omitted))


def planned(measures: Sequence[str | Measure], geometries: Sequence[str | Geometry]) -> Plan:
    """Every measure in every geometry it is defined in, once.

    Raises:
        UsageError: nothing was asked for, or a name is unknown.
    """
    if not measures or not geometries:
        raise UsageError("expected at least one measure and one geometry")
    chosen = [find_geometry(name) for name in geometries]
    rows: list[tuple[Measure, Geometry]] = []
    for entry in map(find_measure, measures):
        for geometry in [find_geometry(entry.geometry)] if entry.geometry else chosen:
            if not any(entry.label == old.label and geometry == place for old, place in rows):
                rows.append((entry, geometry))
    return tuple(rows)
