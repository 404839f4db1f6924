"""`isoflat study`: does flatness predict generalization over many trained networks?"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isoflat.cli import options
from isoflat.cli.exits import NOT_CONVERGED

if TYPE_CHECKING:
    from rich.table import Table as Grid

    from isoflat.cli.load.inputs import Inputs
    from isoflat.cli.load.listed import Plan, Ready
    from isoflat.cli.study_report import Facts
    from isoflat.experiments.cells import Measured
    from isoflat.experiments.numbers import Number
    from isoflat.experiments.prediction import Observed, Prediction
    from isoflat.experiments.recipe import Recipe
    from isoflat.experiments.store import Store
    from isoflat.risk.batches import Batches

DEFAULT = (
    ("quotient_spectral_norm", "auto"),
    ("quotient_spectral_norm", "layerwise"),
    ("hessian_spectral_norm", "auto"),
    ("relative_flatness", "auto"),
    ("fisher_rao_norm", "auto"),
    ("gradient_norm", "auto"),
)
"""Measured where no --measure is given: cheap, and of different kinds."""

LISTED, TRAINED = "Networks of your own, with --networks", "Networks to train, with --grid"
"""Panels of the help."""

ONLY = {
    "networks": (
        "model", "loss", "params", "weights_key", "strip_prefix", "transform", "split", "examples", "batch_size", "rtol",
        "probes", "max_products", "dtype", "check",
    ),
    "grid": ("scale", "replicates", "jobs"),
}  # fmt: skip
"""Options that belong to one of the two ways in."""


def study(  # noqa: PLR0913
    context: typer.Context,
    networks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV with a row, or TOML with a table networks, for each network: weights (a path from there), an outcome (gap, "
            "test_error, test_accuracy or test_loss), and where known train_loss and label; every other column is a "
            "hyper-parameter, but seed and replicate.",
            rich_help_panel=LISTED,
        ),
    ] = None,
    grid: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML: a recipe with data, network, training and a table grid of lists. Every combination is trained.",
            rich_help_panel=TRAINED,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help=f"What is measured on: {options.DATA_HELP} With --grid: a path, where the data does not come with isoflat.",
        ),
    ] = None,
    outcome: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="gap, test_error, test_accuracy or test_loss. Default: the one listed; gap with --grid.",
        ),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--measure",
            metavar="NAME",
            help="See isoflat measures; can be repeated. Default: "
            + ", ".join(dict.fromkeys(n for n, _ in DEFAULT))
            + ".",
        ),
    ] = None,
    geometry: Annotated[
        list[str] | None,
        typer.Option("--geometry", metavar="NAME", help="With --measure; can be repeated. Default: auto."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="Function without arguments that builds the network of every row.",
            rich_help_panel=LISTED,
        ),
    ] = None,
    loss: options.Loss = "cross_entropy",
    params: options.Params = None,
    weights_key: options.WeightsKey = None,
    strip_prefix: options.StripPrefix = None,
    transform: options.Transform = None,
    split: options.Split = None,
    examples: options.Examples = None,
    batch_size: options.BatchSize = 500,
    rtol: options.Rtol = 0.01,
    probes: options.Probes = 64,
    max_products: options.MaxProducts = 300,
    dtype: options.Precision = None,
    check: options.Check = "refuse",
    scale: Annotated[
        str, typer.Option(help="Which table of the file stands over the rest: small or paper.", rich_help_panel=TRAINED)
    ] = "small",
    replicates: Annotated[
        int | None, typer.Option(min=1, help="Networks per combination. Default: the file's.", rich_help_panel=TRAINED)
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes. Default: one for each core; one on a GPU.", rich_help_panel=TRAINED),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all random numbers. Default: 0; the file's with --grid.")] = None,
    device: options.Device = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="For report, tables and the store of what is measured.", rich_help_panel=options.OUT
        ),
    ] = Path("isoflat-study"),
    as_json: options.AsJson = False,
) -> None:
    """Does flatness predict generalization? Relates every number to an outcome over many networks, and says how surely.

    Give --networks, a list of checkpoints with what became of them; or --grid, hyper-parameters to train with. What is
    measured is kept in the folder: stopped at any point, the same command goes on.

    Exit code 0: done. 3: a number did not converge. 2: refused, with the reason; bad rows are all named, before anything
    is measured.
    """
    from isoflat.core.errors import UsageError

    if (networks is None) == (grid is None):
        raise UsageError("give either --networks, a list of checkpoints, or --grid, hyper-parameters to train with")
    _check_options(context, "grid" if networks is not None else "networks")
    numbers, hidden = quantities(names, geometry), as_json or not sys.stderr.isatty()
    if networks is not None:
        from isoflat.cli.load.inputs import Inputs

        if model is None or data is None:
            raise UsageError("--networks needs --model module:factory, and --data that the networks are measured on")
        inputs = Inputs(
            model=model,
            data=data,
            weights_key=weights_key,
            strip_prefix=tuple(strip_prefix or ()),
            split=split,
            transform=transform,
            examples=examples,
            batch_size=batch_size,
            loss=loss,
            seed=seed or 0,
        )
        effort = {"rtol": rtol, "probes": probes, "seed": seed or 0}
        settings = {"params": params or None, "dtype": dtype, "check": check}
        plan = planned(inputs, numbers or DEFAULT, effort, settings, max_products, device)
        result, facts = listed(networks, outcome, plan, out, hidden)
    else:
        recipe = read_grid(grid or Path(), scale, numbers, {"replicates": replicates, "seed": seed})
        result, facts = trained(recipe, outcome, data, out, jobs, device, hidden)
    write(result, out, _command(context), facts)
    if as_json:
        from isoflat.cli.study_report import subject

        sys.stdout.write(json.dumps({"subject": subject(facts), **result.to_dict()}, allow_nan=False) + "\n")
    else:
        show(result, out, facts)
    if any(not record.estimate.converged for record in result.records):
        raise typer.Exit(NOT_CONVERGED)


def quantities(names: Sequence[str] | None, places: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """Every measure in every place it is asked for, or in its own; none where none is named.

    Raises:
        UsageError: a name is unknown, or there are places without measures.

    >>> quantities(["hessian_trace", "quotient_trace"], ["auto", "layerwise"])
    (('hessian_trace', 'euclidean'), ('quotient_trace', 'auto'), ('quotient_trace', 'layerwise'))
    """
    from isoflat.core.errors import UsageError
    from isoflat.measures.catalogue import find_geometry, find_measure

    if places and not names:
        raise UsageError("--geometry says where --measure is measured: name measures too")
    known = [find_geometry(place).name for place in places or [options.PLACE]]
    made = [(name, place) for name in names or () for place in _places(find_measure(name).geometry, known)]
    return tuple(dict.fromkeys(made))


def _places(own: str | None, known: Sequence[str]) -> Sequence[str]:
    return known if own is None else [own]


def _check_options(context: typer.Context, other: str) -> None:
    """Refuse options that would be ignored.

    Args:
        context: what was typed.
        other: the way in that was not taken.
    """
    from isoflat.core.errors import UsageError

    typed = [name for name in ONLY[other] if options.typed(context, name)]
    if typed:
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
        raise UsageError(f"{listed} belongs to --{other}, which was not given: leave it out")


def _command(context: typer.Context) -> str:
    """What was typed, as it can be typed again."""
    words = ["isoflat", "study"]
    for option in context.command.params:
        if option.name and options.typed(context, option.name):
            value = context.params[option.name]
            values = value if isinstance(value, list | tuple) else [value]
            words += [
                part for each in values for part in ([option.opts[0]] if each is True else [option.opts[0], str(each)])
            ]
    return shlex.join(words)


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
    from isoflat.cli.load.inputs import check, device_of
    from isoflat.cli.load.listed import Plan
    from isoflat.measures.base import Budget
    from isoflat.measures.run import checked

    numbers = _numbers(asked)
    check([n.measure for n in numbers], [n.geometry for n in numbers], budget=Budget(products), **effort)
    own = {**effort, **settings, "check": str(checked(settings["check"]))}
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
    from isoflat.cli.load.listed import read_listing, ready
    from isoflat.cli.study_report import NOTE
    from isoflat.experiments.prediction import Prediction
    from isoflat.experiments.store import Store

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
    from isoflat.cli.load.listed import kept
    from isoflat.cli.reproduce import bar
    from isoflat.core.errors import IsoflatError, NoInvariantGeometry, NonFinite, SymmetryViolated, UnsupportedModel
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
    from isoflat.cli.load.listed import OUTCOMES, whole
    from isoflat.cli.load.splits import load_split
    from isoflat.cli.reproduce import followed
    from isoflat.core.errors import DataError, UnknownName, UsageError
    from isoflat.experiments.prediction import Observed, Prediction
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


def read_grid(path: Path, scale: str, asked: Sequence[tuple[str, str]], changes: Mapping[str, Any]) -> Recipe:
    """The recipe in a file, with what a grid needs not say.

    Args:
        path: of the file.
        scale: whose table stands over the rest.
        asked: measures with their geometries; none for the file's.
        changes: fields that the user sets differently; None for none.

    Raises:
        DataError: there is no such file, or no grid in it.
        UsageError: something in it is missing, unknown or without meaning.
    """
    import tomllib

    from isoflat.core.errors import DataError, UnknownName
    from isoflat.experiments.recipe import Asks, Scale, parse

    if scale not in list(Scale):
        raise UnknownName("scale", scale, list(Scale))
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = tomllib.loads(text)
    except OSError as error:
        raise DataError(f"--grid {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"--grid {path} is no TOML: {error}") from error
    over = content.get(scale, {})
    there = content.keys() | (over.keys() if isinstance(over, dict) else set())
    axes = content.get("grid", over.get("grid") if isinstance(over, dict) else None)
    if "arms" in there or not isinstance(axes, dict) or not axes:
        raise DataError(f"--grid {path}: expected a table [grid] of lists, such as batch = [16, 64], and no arms")
    usual = {
        "title": f"Grid {path.stem}",
        "question": "Does flatness predict generalization?",
        "reference": path.name,
        "orbit": 0,  # every network once: its functions are not at stake here
    }
    further: dict[str, Any] = {name: value for name, value in usual.items() if name not in there} | {
        "asks": Asks.RELATION
    }
    if asked or "numbers" not in there:
        further["numbers"] = [{"measure": name, "geometry": place} for name, place in asked or DEFAULT]
    return parse(text, path.stem, Scale(scale), **{**further, **changes})


def write(result: Prediction, folder: Path, command: str, facts: Facts) -> None:
    """The report, the result and the tables; earlier ones of the same names are replaced, nothing else is touched."""
    from isoflat.cli.save import save
    from isoflat.cli.study_report import page, subject
    from isoflat.integrations.tables import to_csv
    from isoflat.report.html import render

    content = {"command": command, "subject": subject(facts), **result.to_dict()}
    save(folder / "result.json", json.dumps(content, allow_nan=False, indent=1) + "\n", force=True)
    save(folder / "networks.csv", to_csv(result.rows()), force=True)
    save(folder / "records.jsonl", "".join(f"{record.to_json()}\n" for record in result.records), force=True)
    save(folder / "report.html", render(page(result, command, facts)), force=True)


def show(result: Prediction, folder: Path, facts: Facts) -> None:
    """Tables and sentences on the terminal."""
    from isoflat.cli.terminal import console, plain
    from isoflat.cli.terminal import facts as listed

    screen = console()
    screen.print(listed(facts))
    screen.print(_networks(result))
    screen.print(_relations(result))
    first, *others = result.sentences
    screen.print(plain(first, style="bold"), end="\n\n")
    for sentence in others:
        screen.print(plain(sentence), end="\n\n")
    screen.print(plain(f"Report: {folder / 'report.html'}", style="bold"))


def _networks(result: Prediction) -> Grid:
    """One line for each network."""
    from rich.table import Table as Grid

    from isoflat.cli.terminal import plain
    from isoflat.experiments.cells import found
    from isoflat.experiments.prediction import words

    grid = Grid(title="Networks", title_justify="left", header_style="bold")
    grid.add_column("network", overflow="fold")
    for head in (result.outcome, "training loss", *map(words, result.numbers)):
        grid.add_column(plain(head), justify="right", overflow="fold", max_width=WIDEST)
    for network in result.networks:
        rows = [found(network.table, number) for number in result.numbers]
        cells = ["–" if row is None else str(row.estimate) for row in rows]
        grid.add_row(plain(network.label), f"{network.outcome:.4g}", f"{network.loss:.4g}", *cells)
    return grid


WIDEST = 14
"""Columns of a terminal that a number may take, so that labels have room."""


def _relations(result: Prediction) -> Grid:
    """One line for each number."""
    from rich.table import Table as Grid

    from isoflat.cli.study_report import line
    from isoflat.cli.terminal import plain

    grid = Grid(title=f"Relation to the {result.outcome}", title_justify="left", header_style="bold")
    for head in NARROW:
        grid.add_column(head, justify="left" if head == "number" else "right", overflow="fold")
    for relation in result.relations:
        cells = line(relation)
        grid.add_row(*(plain(cells[head]) for head in NARROW))
    return grid


NARROW = ("number", "τ-b", "interval", "p", "given loss", "Ψ", "sign error", "worst", "where", "K")
"""Columns of the table of relations that a terminal has room for."""
