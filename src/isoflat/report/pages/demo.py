"""The demonstration's result as a page."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from isoflat.core.estimate import interval
from isoflat.core.render import rounded
from isoflat.experiments.demonstration import DemoArm, DemoLine, DemoNetwork, DemoResult
from isoflat.experiments.ladders import Ladder
from isoflat.experiments.numbers import CANONICAL, NUMBERS, PAPER
from isoflat.report import tables
from isoflat.report.document import Grid, Page, Plate, Prose, Section
from isoflat.report.drawing import markup
from isoflat.report.figures import Climb, Curve, Panel, ladders, strips
from isoflat.report.pages import parts
from isoflat.report.pages.parts import COST, INTERVAL, RANK_TEST, STATIONARITY

COLOURS = ("first", "second", "third")

READING = (
    ("The canonical number", "Spectral norm of D H D at the canonical representative: the one network with the same "
     "function that rescalings of units, changes of scale that a normalisation undoes, shifts of constants and changes of "
     "basis between linear maps (queries and keys, values and outputs) lead back to. They are found by tracing the "
     "network and proved on it. Lower is flatter."),
    ("The paper’s number", "Spectral norm of D H D (Rangamani et al. 2019, arXiv 1902.02434): the Hessian H of the "
     "training loss, seen in units of each layer’s own norm, D. Multiplying one layer by a factor and dividing another "
     "by it leaves the number exactly where it was; multiplying single units does not. Lower is flatter."),
    ("The plain number", "Spectral norm of H itself. The same rescaling moves it as far as one likes."),
    ("Spread", "How far a random edit goes: the standard deviation of the logarithms of its factors. Spread 3 multiplies "
     "a typical unit by twenty, or divides it by that; constants and bases move along."),
    ("339.27(7)", "The digit in brackets is the uncertainty of the last digit shown; the confidence interval spells the same "
     "out. In float32 it takes in the estimated rounding error of a product."),
    INTERVAL,
    STATIONARITY,
    COST,
    RANK_TEST,
)  # fmt: skip


def page(result: DemoResult, command: str) -> Page:
    """Page of the demonstration, ready to be rendered.

    Args:
        result: the demonstration's result.
        command: the command line that makes it.
    """
    plan = result.plan
    main = result.verdicts.get(CANONICAL.name)
    return Page(
        title="isoflat demo",
        headline=f"{main.claim}." if main else result.comparison[0],
        lead=(_setting(result), result.ladders[result.setting.leading].sentence),
        facts=(
            ("Data", result.data),
            ("Networks", str(len(result.networks))),
            ("Training loss", f"{plan.target:g}"),
            ("Optimizer", plan.optimizer),
            ("Seed", str(plan.seed)),
            ("Time", f"{result.seconds:.0f} s"),
        ),
        sections=(
            *((Section("In one table", (_everything(result),)),) if result.setting.together else ()),
            Section(result.setting.question, _comparison(result)),
            Section("Can the number be moved without changing the network?", _attack(result)),
            *parts.closing(READING, _numbers(result), _warnings(result), _provenance(result, command)),
        ),
        colophon=parts.COLOPHON,
    )


def _setting(result: DemoResult) -> str:
    plan, rows = result.plan, _rows(result)
    first, second = (f"{arm.how(rows)} ({arm.name})" for arm in result.setting.arms)
    return (
        f"{plan.seeds} networks per arm ({result.setting.network}) were trained on {result.data} with {plan.optimizer} to "
        f"the same training loss of {plan.target:g}: {first} or {second}. Pairs start from the same weights."
    )


def _rows(result: DemoResult) -> int:
    return result.records[0].point.examples


def _everything(result: DemoResult) -> Grid:
    enclosed = tuple(head for number in (CANONICAL, PAPER) for head in (f"{number.words}, interval", "changes by"))
    return Grid(
        "Networks as they were trained, then two of them with other weights that give the same function. All changes "
        "are relative to the network as it was trained, in float64.",
        ("network", "outputs change by", *enclosed),
        tuple(_line(line) for group in result.lines for line in group),
        note=" ".join(f"{how[0].upper()}{how[1:]}." for how in dict.fromkeys(ladder.how for ladder in result.ladders)),
    )


def _line(line: DemoLine) -> tuple[str, ...]:
    cells = [line.label, "–" if line.output_change is None else f"{line.output_change:.0e}"]
    for number in (CANONICAL, PAPER):
        change = f"{line.changes[number.name]:.0e}" if line.changes else "–"
        cells += [interval(line.records[number.name].estimate), change]
    return tuple(cells)


def _comparison(result: DemoResult) -> tuple[Prose | Plate | Grid, ...]:
    panels = [
        Panel(
            number.title,
            tuple((arm.name, tuple(n.estimate(number) for n in result.arm(arm))) for arm in result.setting.arms),
        )
        for number in NUMBERS
    ]
    figure = Plate(
        caption="Every dot is a network, with its confidence interval (mostly narrower than the dot). The bar is the geometric "
        "mean of the arm. Further right is sharper.",
        alternative=" ".join(verdict.sentence for verdict in result.verdicts.values()) or "Every number by arm.",
        svg=markup(strips(panels), "strips"),
    )
    main, *others = (Prose(text) for text in result.comparison)
    return (main, figure, *others, Prose(_heights(result)), _summary(result), _networks(result))


def _heights(result: DemoResult) -> str:
    losses = [network.training.loss for network in result.networks]
    return (
        f"Training stopped at losses between {min(losses):.4g} and {max(losses):.4g}: the networks are compared at "
        f"heights that differ by a factor of at most {max(losses) / min(losses):.2f}."
    )


def _summary(result: DemoResult) -> Grid:
    heads = ("arm", *(number.words for number in NUMBERS), "test accuracy", "epochs")
    return Grid(
        "Medians per arm, with the range over networks.",
        heads,
        tuple(_arm(result.arm(arm), arm) for arm in result.setting.arms),
    )


def _arm(networks: tuple[DemoNetwork, ...], arm: DemoArm) -> tuple[str, ...]:
    def spread(values: list[float], written: Callable[[float], str] = rounded) -> str:
        return f"{written(median(values))} ({written(min(values))}–{written(max(values))})"

    return (
        arm.name,
        *(spread([n.estimate(number).value for n in networks]) for number in NUMBERS),
        spread([n.test_accuracy for n in networks], "{:.3f}".format),
        spread([n.training.epochs for n in networks]),
    )


def _networks(result: DemoResult) -> Grid:
    return Grid(
        "Every network.",
        ("network", *(number.words for number in NUMBERS), "training loss", "|gradient|", "test accuracy", "steps"),
        tuple(
            (
                network.label,
                *(str(network.estimate(number)) for number in NUMBERS),
                f"{network.training.loss:.5f}" + ("" if network.training.reached else " (missed)"),
                f"{network.table[0].point.gradient_norm:.1e}",
                f"{network.test_accuracy:.4f}",
                str(network.training.steps),
            )
            for network in result.networks
        ),
    )  # fmt: skip


def _attack(result: DemoResult) -> tuple[Prose | Plate | Grid, ...]:
    titles = [ladder.title for ladder in result.ladders]
    climbs = [
        Climb(ladder.label if titles.count(ladder.title) > 1 else ladder.title, ladder.name, curves(ladder))
        for ladder in result.ladders
    ]
    kinds: dict[tuple[str, str], list[str]] = {}
    for ladder in result.ladders:
        kinds.setdefault((ladder.title, ladder.how), []).append(ladder.label)
    how = "; ".join(f"{title.lower()} ({' and '.join(labels)}): {what}" for (title, what), labels in kinds.items())
    plate = Plate(
        caption=f"Edits in float64 that keep the function. {how[0].upper()}{how[1:]}.",
        alternative=" ".join(ladder.sentence for ladder in result.ladders),
        svg=markup(ladders(climbs, "Relative change of the number"), "ladders"),
    )
    said = [Prose(text) for text in result.manipulation]
    return (said[0], plate, *said[1:], *(_rungs(ladder) for ladder in result.ladders))


def curves(ladder: Ladder) -> tuple[Curve, ...]:
    """Relative changes of every number along an attack."""
    amounts = tuple(rung.amount for rung in ladder.rungs[1:])
    return tuple(
        Curve(number.words, amounts, tuple(rung.changes[number.name] for rung in ladder.rungs[1:]), colour)
        for number, colour in zip(NUMBERS, COLOURS, strict=True)
    )


def _rungs(ladder: Ladder) -> Grid:
    rows = tuple(
        (
            f"{rung.amount:g}",
            f"{rung.output_change:.0e}" if rung.output_change else "0",
            *(
                cell
                for number in NUMBERS
                for cell in (
                    str(rung.records[number.name].estimate),
                    f"{rung.changes[number.name]:.0e}" if rung.changes[number.name] else "0",
                )
            ),
        )
        for rung in ladder.rungs
    )
    heads = (ladder.name, "outputs change by", *(head for number in NUMBERS for head in (number.words, "changes by")))
    note = f"Random elements of every symmetry found were applied before: outputs agree to {ladder.verified:.0e}."
    return Grid(f"{ladder.title} ({ladder.label}). All changes are relative.", heads, rows, note=note)


def _numbers(result: DemoResult) -> tuple[Grid, ...]:
    networks = [record for network in result.networks for record in network.table]
    return (
        *tables.measurements(networks, "Networks"),
        *(grid for ladder in result.ladders for grid in tables.measurements(ladder.records, ladder.title)),
    )


def _warnings(result: DemoResult) -> tuple[Prose, ...]:
    told = [f"{network.label} missed the target loss: {network.training.loss:.4g}." for network in result.missed]
    told += [*parts.unconverged(result.records), *tables.network_notes(result.records)]
    return parts.warning_blocks(told, "every network reached the target, every number converged")


def _provenance(result: DemoResult, command: str) -> parts.Pairs:
    first = result.records[0]
    return (
        ("Command", command),
        ("Plan", parts.listed(vars(result.plan))),
        ("Settings", f"{parts.listed(first.settings)}; the attack in float64"),
        ("Data", f"{result.data}, {_rows(result)} training rows, hash {first.data_hash}"),
        *parts.origins(result.records),
    )
