"""The page of `isoflat reproduce`."""

from __future__ import annotations

import math

from isoflat.core.estimate import interval
from isoflat.experiments.cells import MeasuredNetwork
from isoflat.experiments.recipe import Asks
from isoflat.experiments.reproduction import Reproduction
from isoflat.report import tables
from isoflat.report.document import Grid, Page, Plate, Prose, Section
from isoflat.report.drawing import markup
from isoflat.report.figures import Panel, strips
from isoflat.report.pages import parts
from isoflat.report.pages.parts import INTERVAL, RANK_TEST
from isoflat.report.scatter import ScatterPanel, scatter

READING = (
    ("Mean ± standard error", "Over the networks of an arm that reached their target loss: how far the mean would move with "
     "other seeds. It knows nothing of other data or architectures."),
    INTERVAL,
    ("Random point of the orbit", "The same function with other weights: a random element of every symmetry that was found "
     "was applied. A number that changes there says something about the weights, not about the function."),
    RANK_TEST,
)  # fmt: skip


def page(result: Reproduction, command: str) -> Page:
    """Page of an experiment, ready to be rendered.

    Args:
        result: the experiment's result.
        command: the command line that makes it.
    """
    recipe = result.recipe
    return Page(
        title=f"isoflat reproduce {recipe.name}",
        headline=result.headline,
        lead=(_setting(result),),
        facts=(
            ("Data", result.data),
            ("Networks", str(len(result.networks))),
            ("Scale", str(recipe.scale)),
            ("Seed", str(recipe.seed)),
            ("Time", f"{result.cost:.0f} s"),
        ),
        sections=(
            Section(recipe.question, (*map(Prose, result.sentences), *_figures(result), _summaries(result))),
            Section("Every network", (_networks(result), *_moved(result))),
            *parts.closing(
                READING,
                tables.measurements([row for network in result.networks for row in network.table], "Networks"),
                _warnings(result),
                _provenance(result, command),
            ),
        ),
        colophon=parts.COLOPHON,
    )


def _setting(result: Reproduction) -> str:
    recipe = result.recipe
    differs = f" Not as there: {recipe.differs}" if recipe.differs else ""
    return f"{recipe.title}. After {recipe.reference}.{differs}"


def _figures(result: Reproduction) -> tuple[Plate, ...]:
    arms = [(arm, result.arm(arm)) for arm in result.recipe.arms]
    if result.recipe.asks is Asks.TREND:
        return _scatter(result)
    panels = []
    for number in result.numbers:
        groups = [
            (arm.name, tuple(row.estimate for network in networks if (row := number.find(network.table)) is not None))
            for arm, networks in arms
        ]
        groups += [
            (
                f"{arm.name}, moved" if len(arms) == 1 else f"{arm.name}, other weights",
                tuple(row.estimate for n in networks for table in n.moved if (row := number.find(table)) is not None),
            )
            for arm, networks in arms
        ]
        groups = [(name, estimates) for name, estimates in groups if estimates]
        if groups and all(estimate.value > 0 for _, estimates in groups for estimate in estimates):
            panels.append(Panel(number.title, tuple(groups), colours=len(arms)))
    if not panels:
        return ()
    return (
        Plate(
            caption="Every dot is a network, with its interval (mostly narrower than the dot); the bar is the geometric mean. "
            "Further right is sharper. “Other weights”: the same networks at other points of their orbits, the same functions.",
            alternative=" ".join(result.sentences),
            svg=markup(strips(panels), "strips"),
        ),
    )


def _scatter(result: Reproduction) -> tuple[Plate, ...]:
    panels = []
    for number in result.numbers:
        groups = []
        for arm in result.recipe.arms:
            known = [
                (row.estimate.value, 100 * network.test_error)
                for network in result.arm(arm)
                if (row := number.find(network.table)) is not None and network.test_error is not None
            ]
            if known:
                groups.append((arm.name, tuple(x for x, _ in known), tuple(y for _, y in known)))
        if groups and all(x > 0 for _, xs, _ in groups for x in xs):
            panels.append(ScatterPanel(number.words, "sharper →", "test error, %", tuple(groups)))
    if not panels:
        return ()
    return (
        Plate(
            caption="Every dot is a network: its number and its test error. Later arms are darker.",
            alternative=" ".join(result.sentences),
            svg=markup(scatter(panels), "clouds"),
        ),
    )


def _summaries(result: Reproduction) -> Grid:
    heads = ("arm", "networks", *(number.words for number in result.numbers))
    rows = []
    for arm in result.recipe.arms:
        own = {summary.number: summary for summary in result.summaries if summary.arm == arm.name}
        cells = [own[number.name].words if number.name in own else "–" for number in result.numbers]
        rows.append((arm.name, str(len(result.arm(arm))), *cells))
    widest = max((summary.width for summary in result.summaries), default=0.0)
    note = f"The widest interval of a single number is {widest:.1e} of its value."
    return Grid("Mean ± standard error over networks.", heads, tuple(rows), note=note)


def _networks(result: Reproduction) -> Grid:
    heads = ("network", "training loss", "train error", "test error", "epochs", *(n.words for n in result.numbers))
    rows = []
    for arm in result.recipe.arms:
        for network in result.arm(arm, all_of_them=True):
            records = [number.find(network.table) for number in result.numbers]
            rows.append(
                (
                    network.label,
                    _loss(network),
                    _share(network.train_error),
                    _share(network.test_error),
                    f"{network.training.epochs:.4g}" if math.isfinite(network.training.loss) else "–",
                    *("–" if row is None else interval(row.estimate) for row in records),
                )
            )
    return Grid("Every network, with the confidence intervals of its numbers.", heads, tuple(rows))


def _loss(network: MeasuredNetwork) -> str:
    if not math.isfinite(network.training.loss):
        return "diverged"
    return f"{network.training.loss:.5f}" + ("" if network.training.reached else " (missed)")


def _share(error: float | None) -> str:
    return "–" if error is None else f"{100 * error:.2f} %"


def _moved(result: Reproduction) -> tuple[Grid, ...]:
    """Table of the numbers at other weights with the same function, or after the edit."""
    rows = [
        (network.label, str(place + 1), *("–" if row is None else interval(row.estimate) for row in records))
        for network in result.networks
        for place, table in enumerate(network.moved)
        for records in [[number.find(table) for number in result.numbers]]
    ]
    if not rows:
        return ()
    what = (
        "After the edit." if result.recipe.edit is not None else "At random points of the orbits: the same functions."
    )
    return (Grid(what, ("network", "point", *(number.words for number in result.numbers)), tuple(rows)),)


def _warnings(result: Reproduction) -> tuple[Prose, ...]:
    told = [f"{network.label} missed the target loss: {network.training.loss:.4g}." for network in result.missed]
    diverged = [network for network in result.networks if not math.isfinite(network.training.loss)]
    told += [f"{network.label} diverged: {network.diverged}." for network in diverged]
    told += parts.unconverged(result.records)
    tables_of = (table for network in result.networks for table in (network.table, *network.moved))
    told += parts.missing(part for table in tables_of for part in table.omitted)
    told += tables.network_notes(result.records)
    return parts.warning_blocks(told, "every network reached its target, every number converged")


def _provenance(result: Reproduction, command: str) -> parts.Pairs:
    recipe, records = result.recipe, result.records
    return (
        ("Command", command),
        ("Network", ", ".join(f"{key} {value}" for key, value in recipe.network.model_dump().items())),
        ("Training", "; ".join(f"{arm.name}: {parts.listed(arm.training.model_dump())}" for arm in recipe.arms)),
        ("Data", f"{result.data}, hash of what was measured on {parts.hashes(records)}"),
        *(("Settings", parts.listed(row.settings)) for row in records[:1]),
        *parts.origins(records),
    )
