"""`measure` and `measure_all`: from a user's model to numbers, sharing every pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm

from isoflat.core.errors import SymmetryViolated, UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.record import Record
from isoflat.core.rng import stream
from isoflat.core.table import Omission, Table
from isoflat.geometry.base import Geometry
from isoflat.geometry.traced import Traced
from isoflat.measurement.prepare import at_equal_loss, outputs, subject, symmetries_of
from isoflat.measurement.sampled import results
from isoflat.measurement.scribe import Refusal, Result
from isoflat.measurement.session import Session
from isoflat.measurement.shared import agreed
from isoflat.measures.base import Budget, Measure, Settings, Subject
from isoflat.measures.catalogue import find_geometry, find_measure
from isoflat.risk.linearise import ProductCheck
from isoflat.risk.network import Selector, exactly
from isoflat.risk.ranks import Ranks
from isoflat.symmetry.found import Found
from isoflat.symmetry.groups.base import Symmetry, verify

Bound = tuple[tuple[Measure, Geometry], ...]


def measure(  # noqa: PLR0913
    model: torch.nn.Module,
    data: Any,
    loss: Any = None,
    *,
    measure: str | Measure = "quotient_spectral_norm",
    geometry: str | Geometry = "auto",
    params: Selector = None,
    symmetries: Found | Sequence[Symmetry] | None = None,
    rtol: float = 1e-3,
    confidence: float | None = None,
    certify: bool = True,
    sample: str | None = None,
    logits: str | None = None,
    initial: torch.nn.Module | Mapping[str, torch.Tensor] | None = None,
    budget: Budget | int | None = None,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    check: ProductCheck | str = ProductCheck.REFUSE,
    reproducible_sum: bool = False,
) -> Estimate:
    """How flat is this minimum? One number with its enclosure. The model is not changed.

    Args:
        model: any `torch.nn.Module` without randomness in its forward pass (`model.eval()`).
        data: a loader without shuffling, a list of batches, a pair (inputs, targets), a map-style dataset, or a
            function returning a fresh iterator. It is read several times and must come out the same.
        loss: a `torch.nn` criterion, a function of output and target, or an `isoflat.BatchLoss`; left out if the
            model's output carries `.loss`.
        measure: name in the catalogue (`isoflat measures`), with options in brackets: `quotient_sharpness(epsilon=1)`.
        geometry: "auto" (at the canonical representative: nothing that keeps the function moves it), "elementwise"
            (each entry in units of its own size there), "layerwise" (the paper's metric) or "euclidean".
        params: which tensors count: a glob, several, or a predicate of name and tensor.
        symmetries: groups you claim for this network; each is verified on the first batch before anything is measured,
            and a `UnitScale` joins the group of "auto". Or what `isoflat.symmetries` found on this network, for
            instance with rules of your own: it is proved again and used as it is.
        rtol: relative width of the enclosure to reach.
        confidence: probability that the interval holds; default 1 − 1e-6 for eigenvalues, 0.95 for traces.
        certify: False for a cheaper value with a true residual but no enclosure.
        sample: "auto" for a sample of the data that is as large as `rtol` needs, examples drawn by how much curvature they
            may carry, with an interval (confidence 0.95 by default) that says what the sample leaves open; all the data is
            used where that is little more, and for numbers without such a form. None for all the data.
        logits: "normalised" for the loss of class scores that are centred and divided by their length, so that growing
            all weights of a network does not make it look flatter; "loss=0.1" for scores multiplied by what brings the
            loss there, so that networks are compared at an equal one; None for the loss as it is.
        initial: weights before training, for bounds whose prior is centred there: a network of the same architecture or
            its state_dict.
        budget: number of products, or a `Budget`.
        seed: of the random start vectors and probes.
        dtype: "float32" or "float64"; default the weights' own. "bfloat16" for products by autocast, with the value from
            a last product in float64, and without a certificate.
        device: where to compute; default where the weights are.
        progress: show a progress bar.
        check: products are compared with differences of gradients on a few rows, gradients with differences of losses where
            there are no products; "refuse" raises where they disagree, "warn" notes it beside the number, "skip" does not
            compare.
        reproducible_sum: in a process group of torch.distributed, which is used where there is one, add the batches'
            parts in the order of the data, so that every number of processes gives the same bits; slower.

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
    table = measure_all(
        model,
        data,
        loss,
        measures=[measure],
        geometry=geometry,
        params=params,
        symmetries=symmetries,
        rtol=rtol,
        confidence=confidence,
        certify=certify,
        sample=sample,
        logits=logits,
        initial=initial,
        budget=budget,
        seed=seed,
        dtype=dtype,
        device=device,
        progress=progress,
        check=check,
        reproducible_sum=reproducible_sum,
    )
    return table.rows[0].estimate


def measure_all(  # noqa: PLR0913
    model: torch.nn.Module,
    data: Any,
    loss: Any = None,
    *,
    measures: Sequence[str | Measure] = ("quotient_spectral_norm", "hessian_spectral_norm"),
    geometry: str | Geometry | Sequence[str | Geometry] = "auto",
    params: Selector = None,
    symmetries: Found | Sequence[Symmetry] | None = None,
    rtol: float = 1e-3,
    confidence: float | None = None,
    certify: bool = True,
    probes: int = 64,
    sample: str | None = None,
    logits: str | None = None,
    initial: torch.nn.Module | Mapping[str, torch.Tensor] | None = None,
    budget: Budget | int | None = None,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    check: ProductCheck | str = ProductCheck.REFUSE,
    reproducible_sum: bool = False,
    label: str = "",
    keep: Callable[[Record, torch.Tensor], None] | None = None,
) -> Table:
    """Several measures in several geometries with shared passes over the data; arguments as for `measure`.

    Args:
        model: as for `measure`.
        data: as for `measure`.
        loss: as for `measure`.
        measures: names in the catalogue.
        geometry: one or several; a measure that is defined in one geometry only is measured in that one, once.
        params: as for `measure`.
        symmetries: as for `measure`.
        rtol: as for `measure`.
        confidence: as for `measure`.
        certify: as for `measure`.
        probes: random probes of stochastic estimates.
        sample: as for `measure`.
        logits: as for `measure`.
        initial: as for `measure`.
        budget: as for `measure`.
        seed: as for `measure`.
        dtype: as for `measure`.
        device: as for `measure`.
        progress: as for `measure`.
        check: as for `measure`.
        reproducible_sum: as for `measure`.
        label: what to call this network in tables.
        keep: called with each record that is one extreme eigenvalue and with the vector that carries it, by which
            `isoflat.measurement.witness.verify` checks it again.

    Returns:
        One record per measure and geometry; a measure that does not apply is listed with the reason.

    Raises:
        IsoflatError: as for `measure`, or none of the measures applies.
        UsageError: no measure was asked for, or a setting has no meaning.
    """
    limits = Budget(products=budget) if isinstance(budget, int) else (budget or Budget())
    low = dtype in (torch.bfloat16, "bfloat16")
    inside = torch.bfloat16 if low else None
    settings = Settings(rtol, confidence, certify, probes, limits, seed, checked(check), inside, sample)
    plan = planned(measures, [geometry] if isinstance(geometry, str | Geometry) else geometry)
    ranks = Ranks.here(reproducible_sum)

    def prepare() -> Subject:
        return subject(model, data, loss, params, dtype, device, logits, initial)

    with opened(prepare, plan, settings, symmetries, ranks, label, progress) as session:
        found = results(session) if settings.sample else session.results()
        rows = tuple(result.record for result in found if isinstance(result, Result))
        refused = [result for result in found if isinstance(result, Refusal)]
        if not rows:
            raise refused[0].error
        for result in found:
            if keep is not None and isinstance(result, Result) and result.witness is not None:
                keep(result.record, result.witness)
        omitted = tuple(Omission(r.measure.label, r.geometry.name, str(r.error), label) for r in refused)
        # From the first process: costs and all.
        return ranks.from_first(Table(rows, omitted))


@contextmanager
def opened(
    prepare: Callable[[], Subject],
    plan: Bound,
    settings: Settings,
    symmetries: Found | Sequence[Symmetry] | None,
    ranks: Ranks,
    label: str,
    progress: bool,
) -> Iterator[Session]:
    """A session with all symmetries proved, under a progress bar, in exact arithmetic as far as the device has it.

    Args:
        prepare: makes the subject.
        plan: measures, each with the geometry it is measured in.
        settings: how hard.
        symmetries: as for `measure`.
        ranks: the processes.
        label: what the user calls the network.
        progress: whether the bar is shown.

    Raises:
        IsoflatError: as for `measure`.
    """
    target = agreed(ranks, prepare, settings, plan)
    _reachable(settings, target.state.dtype)
    found = symmetries if isinstance(symmetries, Found) else None
    declared = () if found is not None else tuple(symmetries or ())  # pyrefly: ignore

    def bound() -> Bound:
        _verify(target, declared, settings.seed)
        return _bound(plan, target, declared, found)

    with (
        tqdm(disable=not (progress and ranks.first), unit=" passes", desc=label or "measuring", leave=False) as bar,
        exactly(target.state.device),
    ):

        def report(status: str) -> None:
            bar.set_postfix_str(status, refresh=False)
            bar.update()

        yield Session(at_equal_loss(target), settings, ranks.on_all_ranks(bound, _groups), label, report)


def _groups(plan: Bound) -> dict[str, str]:
    """The group of each geometry that knows the network's symmetries."""
    found = {place.name: place.found for _, place in plan if isinstance(place, Traced)}
    return {f"group of {name}": group.hash for name, group in found.items() if group is not None}


def checked(value: ProductCheck | str) -> ProductCheck:
    """The name of a check, or a check.

    Raises:
        UsageError: there is no such check.
    """
    if value not in set(ProductCheck):
        raise UsageError(f"check must be one of {', '.join(ProductCheck)}, got {value!r}")
    return ProductCheck(value)


def _reachable(settings: Settings, dtype: torch.dtype) -> None:
    """Refuse tolerances below what products can give."""
    floor = torch.finfo(settings.inside or dtype).eps
    if settings.rtol < floor:
        raise UsageError(
            f"rtol={settings.rtol:g} lies below the rounding of a product in {settings.inside or dtype} ({floor:.1e}): ask for "
            "less, or pass a wider dtype"
        )


def planned(measures: Sequence[str | Measure], geometries: Sequence[str | Geometry]) -> Bound:
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


def _bound(plan: Bound, target: Subject, declared: Sequence[Symmetry], known: Found | None) -> Bound:
    """The plan with geometries that need them knowing the network's symmetries."""
    if not any(isinstance(geometry, Traced) and geometry.found is None for _, geometry in plan):
        return plan
    if known is not None:
        if known.model is not target.risk.network.module:
            raise UsageError("these symmetries were found on another network: call isoflat.symmetries on this one")
        known.verify()
    found = known or symmetries_of(target, declared)
    return tuple(
        (measure, place.on(found) if isinstance(place, Traced) and place.found is None else place)
        for measure, place in plan
    )


def _verify(target: Subject, symmetries: Sequence[Symmetry], seed: int) -> None:
    """Prove the user's own symmetries on the first batch."""
    if not symmetries:
        return
    output = outputs(target.risk)
    for symmetry in symmetries:
        missing = symmetry.touches - set(target.state.tensors)
        if missing:
            raise SymmetryViolated(f"{symmetry} names tensors the model does not have: {', '.join(sorted(missing))}")
        verify(symmetry, output, target.state, stream(seed, "verify", symmetry.label))
