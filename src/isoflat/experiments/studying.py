"""Networks of a study: those of a list, measured, and those of a grid, trained and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isoflat.experiments.cells import Measured
    from isoflat.experiments.listed import Plan, Ready
    from isoflat.experiments.numbers import Number
    from isoflat.experiments.prediction import Observed, Prediction
    from isoflat.experiments.recipe import Recipe
    from isoflat.experiments.store import Store
    from isoflat.io.inputs import Inputs
    from isoflat.report.pages.study import Facts
    from isoflat.risk.batches import Batches


def planned(
    inputs: Inputs,
    asked: Sequence[tuple[str, str]],
    effort: Mapping[str, Any],
    settings: Mapping[str, Any],
    products: int,
    device: str | None,
) -> Plan:
    """How networks of a list are measured; names and limits are checked before a file is opened.

    Args:
        inputs: model, data and loss.
        asked: measures with their geometries.
        effort: `rtol`, `probes` and `seed`.
        settings: `params`, `dtype` and `check`.
        products: Hessian-vector products per eigenvalue.
        device: where networks are measured.

    Raises:
        UsageError: something is unknown or has no meaning.
    """
    from isoflat.experiments.listed import Plan
    from isoflat.io.inputs import check, device_of
    from isoflat.measures.settings import Budget, Settings

    numbers = _numbers(asked)
    check([n.measure for n in numbers], [n.geometry for n in numbers], budget=Budget(products), **effort)
    own = {**effort, **settings, "check": str(Settings(check=settings["check"]).check)}
    return Plan(inputs, numbers, own, products, device_of(device))


def listed(path: Path, outcome: str | None, plan: Plan, folder: Path, hidden: bool) -> tuple[Prediction, Facts]:
    """Networks of a list, measured or read from the folder's store.

    Args:
        path: of the list.
        outcome: the column to predict; None for the only one.
        plan: how they are measured.
        folder: whose store is used; made if need be.
        hidden: show no progress.

    Raises:
        IsoflatError: something is refused; bad rows are all named, before anything is measured.
    """
    from isoflat.cli.demo import prepare
    from isoflat.experiments.listed import read_listing, ready
    from isoflat.experiments.prediction import Prediction
    from isoflat.experiments.store import Store
    from isoflat.report.pages.study import NOTE

    listing = read_listing(path, outcome)
    rows, batches, notes = ready(listing, plan)
    prepare(folder)
    found, left_out = _observed(rows, batches, plan, Store.open(folder / "store"), hidden)
    result = Prediction(plan.numbers, found, listing.words, plan.inputs.seed, left_out)
    told = listing.words if listing.column != "test_accuracy" else f"{listing.words}, 1 less the accuracy"
    return result, (
        ("Networks", f"{path}, {len(found)} of {len(rows)}"),
        ("Model", plan.inputs.model),
        ("Data", f"{plan.inputs.data}, {found[0].table[0].point.examples} examples"),
        ("Loss", plan.inputs.loss),
        ("Outcome", f"column {listing.column}: {told}"),
        ("Training loss", "as measured" if listing.rows[0].loss is None else "column train_loss"),
        *((NOTE, note) for note in notes),
    )


def _observed(
    rows: Sequence[Ready], batches: Batches, plan: Plan, store: Store, hidden: bool
) -> tuple[tuple[Observed, ...], tuple[tuple[str, str], ...]]:
    """What was measured, and the networks that cannot be, with the reasons."""
    from isoflat.cli.compare import labels
    from isoflat.cli.reproduce import bar
    from isoflat.core.errors import IsoflatError, NoInvariantGeometry, NonFinite, SymmetryViolated, UnsupportedModel
    from isoflat.experiments.listed import kept
    from isoflat.experiments.prediction import Observed

    found: list[Observed] = []
    refused: list[tuple[str, IsoflatError]] = []
    with bar(len(rows), hidden) as report:
        for ready, short in zip(rows, labels([each.row.weights for each in rows]), strict=True):
            row, label = ready.row, ready.row.label or short
            report(f"measuring {label}", 0.0)
            try:
                table = kept(ready, label, plan, batches, store)
            except (UnsupportedModel, NonFinite, NoInvariantGeometry, SymmetryViolated) as error:  # of these weights
                refused.append((label, error))
            else:
                loss = table[0].point.loss if row.loss is None else row.loss
                found.append(Observed(label, table, row.outcome, loss, row.factors))
            report(f"{label} is done", 1.0)
    if not found:
        raise refused[0][1]
    return tuple(found), tuple((label, f"which cannot be measured: {error}") for label, error in refused)


def _numbers(asked: Sequence[tuple[str, str]]) -> tuple[Number, ...]:
    from isoflat.experiments.recipe import Quantity

    made = {number.name: number for number in (Quantity(measure=name, geometry=place).number for name, place in asked)}
    return tuple(made.values())


def trained(
    recipe: Recipe,
    outcome: str | None,
    data: str | None,
    folder: Path,
    jobs: int | None,
    device: str | None,
    hidden: bool,
) -> tuple[Prediction, Facts]:
    """Networks of a grid, trained and measured or read from the folder's store.

    Args:
        recipe: with an arm for every combination.
        outcome: what to predict; None for the generalisation gap.
        data: a path, where the data does not come with isoflat.
        folder: whose store is used; made if need be.
        jobs: processes.
        device: where networks live.
        hidden: show no progress.

    Raises:
        IsoflatError: something is refused.
    """
    from isoflat.cli.reproduce import followed
    from isoflat.core.errors import DataError, UnknownName, UsageError
    from isoflat.experiments.listed import OUTCOMES, whole
    from isoflat.experiments.prediction import Observed, Prediction
    from isoflat.experiments.splits import load_split
    from isoflat.experiments.statistics.sample import LEAST

    chosen = outcome or TRAINED_OUTCOMES[0]
    if chosen not in TRAINED_OUTCOMES:
        raise UnknownName("outcome of trained networks", chosen, TRAINED_OUTCOMES)
    if len(recipe.arms) * recipe.replicates < LEAST:
        raise UsageError(f"--grid: a relation needs at least {LEAST} networks: give more values, or --replicates")
    if data is None and not len(load_split(recipe.data, None).test[1]):
        raise DataError(f"--grid: the data {recipe.data.source} has no held-out rows to generalize to")
    made = followed(recipe, data, folder, jobs, device, None, hidden)
    networks = tuple(
        Observed(
            network.label,
            network.table,
            _outcome(network, chosen),
            network.training.loss,
            {
                name: whole(level) if isinstance(level, float) else level
                for name, level in network.task.arm.factors.items()
            },
        )
        for network in made.networks
        if network.training.reached and len(network.table)
    )
    left_out = (
        *((n.label, f"which missed its target: training loss {n.training.loss:.3g}") for n in made.missed),
        *((n.label, f"which diverged: {n.diverged}") for n in made.diverged),
        *(
            (n.label, f"which cannot be measured: {n.table.omitted[0]}")
            for n in made.networks
            if n.training.reached and not len(n.table)
        ),
    )
    result = Prediction(made.numbers, networks, OUTCOMES[chosen], recipe.seed, left_out)
    explained = {"gap": ", test error less training error"}.get(chosen, "")
    return result, (
        (
            "Grid",
            f"{recipe.name}, {len(recipe.arms)} combinations, {recipe.replicates} networks each, scale {recipe.scale}",
        ),
        ("Network", ", ".join(f"{key} {value}" for key, value in recipe.network.model_dump().items())),
        ("Data", made.data),
        ("Outcome", f"{OUTCOMES[chosen]}{explained}"),
        ("Seed", str(recipe.seed)),
        ("Time", f"{made.cost:.0f} s to train and measure"),
    )


TRAINED_OUTCOMES = ("gap", "test_error", "test_loss")
"""What is known of networks that are trained here."""


def _outcome(network: Measured, chosen: str) -> float:
    """Of a network whose data has held-out rows, and whose training did not diverge."""
    found = network.test_loss if chosen == "test_loss" else network.test_error
    return (found or 0.0) - ((network.train_error or 0.0) if chosen == "gap" else 0.0)
