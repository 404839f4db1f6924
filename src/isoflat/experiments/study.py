"""Studies of whether flatness predicts generalization, over checkpoints of a list or over a grid that is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isoflat.core.errors import (
    DataError,
    IsoflatError,
    NoInvariantGeometry,
    NonFinite,
    SymmetryViolated,
    UnknownName,
    UnsupportedModel,
    UsageError,
)
from isoflat.experiments.cells import MeasuredNetwork
from isoflat.experiments.data import load_split
from isoflat.experiments.listed import OUTCOMES, ListedPlan, ReadyNetwork, kept, read_listing, ready, whole
from isoflat.experiments.prediction import NOTE, ObservedNetwork, Prediction
from isoflat.experiments.progress import bar
from isoflat.experiments.recipe import NumberSpec, Recipe, read_grid
from isoflat.experiments.reproduce import reproduce
from isoflat.experiments.statistics.sample import LEAST
from isoflat.experiments.store import Store
from isoflat.io.files import make_folder
from isoflat.io.inputs import Inputs, check_names, device_of
from isoflat.io.several import labels
from isoflat.measures.catalogue import find_geometry, find_measure
from isoflat.measures.settings import Budget, Settings
from isoflat.risk.batches import Batches

NUMBERS = (
    ("quotient_spectral_norm", "auto"),
    ("quotient_spectral_norm", "layerwise"),
    ("hessian_spectral_norm", "auto"),
    ("relative_flatness", "auto"),
    ("fisher_rao_norm", "auto"),
    ("gradient_norm", "auto"),
)
"""Numbers that are measured where none is named: cheap, and of different kinds."""

TRAINED_OUTCOMES = ("gap", "test_error", "test_loss")
"""Outcomes that are known of networks that are trained here."""


def study(  # noqa: PLR0913
    networks: Path | str | None = None,
    model: str | None = None,
    data: str | None = None,
    *,
    grid: Path | str | None = None,
    outcome: str | None = None,
    measures: Sequence[str] | None = None,
    geometry: Sequence[str] | None = None,
    out: Path | str = "isoflat-study",
    seed: int | None = None,
    device: str | None = None,
    progress: bool = False,
    scale: str = "small",
    replicates: int | None = None,
    jobs: int | None = None,
    max_products: int = 300,
    rtol: float = 0.01,
    probes: int = 64,
    params: Sequence[str] | None = None,
    dtype: str | None = None,
    check: str = "refuse",
    **inputs: Any,
) -> Prediction:
    """Relate every number to an outcome over many networks, as `isoflat study` does, and say how surely.

    Give `networks`, a list of checkpoints with what became of them; or `grid`, hyper-parameters to train with. Measured
    networks are kept in the folder's store: the same call goes on where another was stopped.

    Args:
        networks: CSV file with a row, or TOML file with a table, for each network: weights, an outcome, hyper-parameters.
        model: name `module:factory` of a function without arguments that builds the network of every row of `networks`.
        data: source of the data, as in `isoflat.load_data`; with `grid` a path, where it does not come with isoflat.
        grid: TOML file with data, network, training and a table grid of lists. Every combination is trained.
        outcome: "gap", "test_error", "test_accuracy" or "test_loss"; None for the one listed, or the gap with `grid`.
        measures: names in the catalogue; None for a few cheap ones of different kinds.
        geometry: names of metrics, with `measures`; None for "auto".
        out: folder for the store; made if need be.
        seed: seed of all random numbers; None for 0, or the file's with `grid`.
        device: device of the networks; None for the CPU.
        progress: whether a line of progress is shown on the standard error.
        scale: table of the grid's file that overrides the rest, "small" or "paper".
        replicates: number of networks for each combination of the grid; None for the file's.
        jobs: number of processes with `grid`; None for one for each core.
        max_products: with `networks`, as all that follow: largest number of Hessian-vector products per eigenvalue.
        rtol: relative width of the confidence intervals to reach.
        probes: number of random probes of traces.
        params: names of the parameters that count; None for all.
        dtype: precision of the Hessian-vector products; None for that of the weights.
        check: "refuse", "warn" or "skip", where Hessian-vector products disagree with differences of gradients.
        **inputs: further fields of `isoflat.io.inputs.Inputs`, which say how weights and data are read.

    Raises:
        UsageError: neither or both ways in are given, or something is unknown or has no meaning.
        IsoflatError: something else is refused; bad rows are all named, before anything is measured.

    >>> import tempfile
    >>> text = '''
    ... data = { source = "digits", train = 60, test = 60 }
    ... network = { family = "mlp", widths = [64, 4, 10] }
    ... training = { epochs = 1 }
    ... grid = { batch = [10, 20, 30] }
    ... '''
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     grid = Path(folder) / "grid.toml"
    ...     _ = grid.write_text(text)
    ...     found = study(
    ...         grid=grid, out=folder, measures=["gradient_norm"], geometry=["layerwise"], replicates=1, jobs=1
    ...     )
    >>> len(found.networks), found.outcome
    (3, 'generalisation gap')
    """
    if (networks is None) == (grid is None):
        raise UsageError("give either --networks, a list of checkpoints, or --grid, hyper-parameters to train with")
    asked = quantities(measures, geometry)
    if grid is not None:
        recipe = read_grid(Path(grid), scale, asked, NUMBERS, {"replicates": replicates, "seed": seed})
        return of_grid(recipe, outcome, data, Path(out), jobs, device, progress)
    if model is None or data is None:
        raise UsageError("--networks needs --model module:factory, and --data that the networks are measured on")
    plan = planned(
        Inputs(model=model, data=data, seed=seed or 0, **inputs),
        asked or NUMBERS,
        {
            "rtol": rtol,
            "probes": probes,
            "seed": seed or 0,
            "params": None if params is None else list(params),
            "dtype": dtype,
            "check": check,
        },
        max_products,
        device,
    )
    return of_list(Path(networks or ""), outcome, plan, Path(out), progress)


def quantities(names: Sequence[str] | None, places: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """Every named measure with every named geometry, or with its own; none where no measure is named.

    Raises:
        UsageError: a name is unknown, or geometries are named without measures.

    >>> quantities(["hessian_trace", "quotient_trace"], ["auto", "layerwise"])
    (('hessian_trace', 'euclidean'), ('quotient_trace', 'auto'), ('quotient_trace', 'layerwise'))
    """
    if places and not names:
        raise UsageError("--geometry says where --measure is measured: name measures too")
    known = [find_geometry(place).name for place in places or ["auto"]]
    made: list[tuple[str, str]] = []
    for name in names or ():
        own = find_measure(name).geometry
        made += [(name, place) for place in (known if own is None else [own])]
    return tuple(dict.fromkeys(made))


def planned(
    inputs: Inputs,
    asked: Sequence[tuple[str, str]],
    settings: Mapping[str, Any],
    products: int,
    device: str | None,
) -> ListedPlan:
    """The plan of measuring the networks of a list; names and limits are checked before a file is opened.

    Args:
        inputs: names of model, data and loss, and how they are read.
        asked: names of measures with their geometries.
        settings: `rtol`, `probes`, `seed`, `params`, `dtype` and `check`, as for `isoflat.measure`.
        products: largest number of Hessian-vector products per eigenvalue.
        device: device that networks are measured on; None for where they are built.

    Raises:
        UsageError: something is unknown or has no meaning.
    """
    made = (NumberSpec(measure=name, geometry=place).number for name, place in asked)
    numbers = tuple({number.name: number for number in made}.values())
    check_names([n.measure for n in numbers], [n.geometry for n in numbers], budget=Budget(products), **settings)
    own = {**settings, "check": str(Settings(check=settings["check"]).check)}
    return ListedPlan(inputs, numbers, own, products, device_of(device))


def of_list(path: Path, outcome: str | None, plan: ListedPlan, folder: Path, progress: bool) -> Prediction:
    """A study of the networks of a list, measured or read from the folder's store.

    Args:
        path: path of the list.
        outcome: column to predict; None for the only one.
        plan: settings of the measurement.
        folder: folder of the store; made if need be.
        progress: whether a line of progress is shown on the standard error.

    Raises:
        IsoflatError: something is refused; bad rows are all named, before anything is measured.
    """
    listing = read_listing(path, outcome)
    rows, batches, notes = ready(listing, plan)
    make_folder(folder)
    found, left_out = _observed(rows, batches, plan, Store.open(folder / "store"), progress)
    told = listing.words if listing.column != "test_accuracy" else f"{listing.words}, 1 less the accuracy"
    facts = (
        ("Networks", f"{path}, {len(found)} of {len(rows)}"),
        ("Model", plan.inputs.model),
        ("Data", f"{plan.inputs.data}, {found[0].table[0].point.examples} examples"),
        ("Loss", plan.inputs.loss),
        ("Outcome", f"column {listing.column}: {told}"),
        ("Training loss", "as measured" if listing.rows[0].loss is None else "column train_loss"),
        *((NOTE, note) for note in notes),
    )
    return Prediction(plan.numbers, found, listing.words, plan.inputs.seed, left_out, facts=facts)


def _observed(
    rows: Sequence[ReadyNetwork], batches: Batches, plan: ListedPlan, store: Store, progress: bool
) -> tuple[tuple[ObservedNetwork, ...], tuple[tuple[str, str], ...]]:
    """Networks that were measured, and labels of those that cannot be, with the reasons."""
    found: list[ObservedNetwork] = []
    refused: list[tuple[str, IsoflatError]] = []
    with bar(len(rows), not progress) as report:
        for ready, short in zip(rows, labels([each.row.weights for each in rows]), strict=True):
            row, label = ready.row, ready.row.label or short
            report(f"measuring {label}", 0.0)
            try:
                table = kept(ready, label, plan, batches, store)
            except (UnsupportedModel, NonFinite, NoInvariantGeometry, SymmetryViolated) as error:  # of these weights
                refused.append((label, error))
            else:
                loss = table[0].point.loss if row.loss is None else row.loss
                found.append(ObservedNetwork(label, table, row.outcome, loss, row.factors))
            report(f"{label} is done", 1.0)
    if not found:
        raise refused[0][1]
    return tuple(found), tuple((label, f"which cannot be measured: {error}") for label, error in refused)


def of_grid(
    recipe: Recipe,
    outcome: str | None,
    data: str | None,
    folder: Path,
    jobs: int | None,
    device: str | None,
    progress: bool,
) -> Prediction:
    """A study of the networks of a grid, trained and measured or read from the folder's store.

    Args:
        recipe: recipe with an arm for every combination.
        outcome: outcome to predict, one of `TRAINED_OUTCOMES`; None for the generalisation gap.
        data: path of the data, where it does not come with isoflat.
        folder: folder of the store; made if need be.
        jobs: number of processes; None for one for each core.
        device: device of the networks; None for the CPU.
        progress: whether a line of progress is shown on the standard error.

    Raises:
        IsoflatError: something is refused.
    """
    chosen = outcome or TRAINED_OUTCOMES[0]
    if chosen not in TRAINED_OUTCOMES:
        raise UnknownName("outcome of trained networks", chosen, TRAINED_OUTCOMES)
    if len(recipe.arms) * recipe.replicates < LEAST:
        raise UsageError(f"--grid: a relation needs at least {LEAST} networks: give more values, or --replicates")
    if data is None and not len(load_split(recipe.data, None).test[1]):
        raise DataError(f"--grid: the data {recipe.data.source} has no held-out rows to generalize to")
    made = reproduce(recipe, data, out=folder, jobs=jobs, device=device, progress=progress)
    networks = tuple(
        ObservedNetwork(
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
    explained = {"gap": ", test error less training error"}.get(chosen, "")
    facts = (
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
    return Prediction(made.numbers, networks, OUTCOMES[chosen], recipe.seed, left_out, facts=facts)


def _outcome(network: MeasuredNetwork, chosen: str) -> float:
    """The outcome of a network whose data has held-out rows, and whose training did not diverge."""
    found = network.test_loss if chosen == "test_loss" else network.test_error
    return (found or 0.0) - ((network.train_error or 0.0) if chosen == "gap" else 0.0)
