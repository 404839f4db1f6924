"""The demonstration's result as a page."""

from __future__ import annotations

from statistics import median

from isoflat.core.record import Record
from isoflat.core.table import interval
from isoflat.experiments.attack import PAPER, PLAIN, Rung
from isoflat.experiments.demo import LARGE, SMALL, Arm, DemoResult, Trained
from isoflat.report import tables
from isoflat.report.document import Grid, Page, Plate, Prose, Section, Terms
from isoflat.report.drawing import markup
from isoflat.report.figures import Curve, Panel, ladder, strips

TITLES = {
    PAPER: "The paper’s number: ‖D H D‖, each layer in units of its own norm",
    PLAIN: "The plain number: ‖H‖, in the weights as they are stored",
}

READING = (
    ("The paper’s number", "Spectral norm of D H D (Rangamani et al. 2019, arXiv 1902.02434): the Hessian H of the "
     "training loss, seen in units of each layer’s own norm, D. Multiplying one layer by a factor and dividing another "
     "by it leaves the number exactly where it was. Lower is flatter."),
    ("The plain number", "Spectral norm of H itself. The same rescaling moves it as far as one likes."),
    ("339.27(7)", "The digit in brackets is the uncertainty of the last digit shown. The enclosure spells the same out: "
     "an interval that contains the exact number for these weights and these data, with the stated confidence over "
     "the solver’s random start, in float32 given the estimated rounding error of a product. It says nothing about "
     "other seeds: their spread is what the dots of Figure 1 show."),
    ("b / value", "A bound on how far the paper’s number is from the exact Riemannian curvature because the gradient "
     "has not vanished, relative to the number. Small means: close enough to a minimum."),
    ("Products, gradient passes", "The cost: Hessian-vector products over all of the data, and the whole measurement "
     "in units of one gradient over the same data, timed in the same run."),
    ("Rank test", "Exact two-sided Mann-Whitney test. Networks, not data points, are what is counted, so the smallest "
     "p is limited by the number of seeds. One data set and one architecture: nothing here speaks for others."),
)  # fmt: skip


def page(result: DemoResult, command: str) -> Page:
    """Everything the demonstration found, ready to be rendered.

    Args:
        result: what was found.
        command: what was typed to find it.
    """
    plan = result.plan
    main = result.verdicts.get(PAPER)
    return Page(
        title="isoflat demo",
        headline=f"{main.claim}." if main else result.comparison[0],
        lead=(_setting(result), result.manipulation[0]),
        facts=(
            ("Data", result.data),
            ("Networks", str(len(result.networks))),
            ("Training loss", f"{plan.target:g}"),
            ("Optimizer", plan.optimizer),
            ("Seed", str(plan.seed)),
            ("Time", f"{result.seconds:.0f} s"),
        ),
        sections=(
            Section("Are large-batch minima sharper?", _comparison(result)),
            Section("Can the number be moved without changing the network?", _attack(result)),
            Section("How to read this", (Terms(READING),)),
            Section("Every number with its enclosure and cost", _numbers(result)),
            Section("Warnings", _warnings(result)),
            Section("Provenance", (Terms(_provenance(result, command)),)),
        ),
        colophon="Made by isoflat. This file is complete in itself: it loads nothing and runs nothing.",
    )


def _setting(result: DemoResult) -> str:
    plan = result.plan
    return (
        f"{plan.seeds} networks per arm ({'–'.join(map(str, plan.widths))}, ReLU, no biases) were trained on "
        f"{result.data} with {plan.optimizer} to the same training loss of {plan.target:g}: with {SMALL.batch} rows per "
        f"step ({SMALL.name}) or with all {_rows(result)} ({LARGE.name}). Pairs start from the same weights."
    )


def _rows(result: DemoResult) -> int:
    return result.records[0].point.examples


def _comparison(result: DemoResult) -> tuple[Prose | Plate | Grid, ...]:
    panels = [
        Panel(title, tuple((arm.name, tuple(n.estimate(m) for n in result.arm(arm))) for arm in (SMALL, LARGE)))
        for m, title in TITLES.items()
    ]
    figure = Plate(
        caption="Every dot is a network, with its enclosure (mostly narrower than the dot). The bar is the geometric "
        "mean of the arm. Further right is sharper.",
        alternative=" ".join(verdict.sentence for verdict in result.verdicts.values()) or "Both numbers by arm.",
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
    heads = ("arm", "networks", "the paper’s number", "the plain number", "test accuracy", "epochs", "|gradient|")
    return Grid(
        "Medians per arm, with the range over networks.",
        heads,
        tuple(_arm(result.arm(arm), arm) for arm in (SMALL, LARGE)),
    )


def _arm(networks: tuple[Trained, ...], arm: Arm) -> tuple[str, ...]:
    def spread(values: list[float], digits: str) -> str:
        return f"{median(values):{digits}} ({min(values):{digits}}–{max(values):{digits}})"

    return (
        arm.name,
        str(len(networks)),
        spread([n.estimate(PAPER).value for n in networks], ".4g"),
        spread([n.estimate(PLAIN).value for n in networks], ".4g"),
        spread([n.test_accuracy for n in networks], ".3f"),
        spread([n.training.epochs for n in networks], ".4g"),
        f"{median(n.table[PAPER].point.gradient_norm for n in networks):.1e}",
    )


def _networks(result: DemoResult) -> Grid:
    return Grid(
        "Every network.",
        ("network", "the paper’s number", "the plain number", "training loss", "|gradient|", "test accuracy", "epochs", "steps"),
        tuple(
            (
                network.label,
                str(network.estimate(PAPER)),
                str(network.estimate(PLAIN)),
                f"{network.training.loss:.5f}" + ("" if network.training.reached else " (missed)"),
                f"{network.table[PAPER].point.gradient_norm:.1e}",
                f"{network.test_accuracy:.4f}",
                f"{network.training.epochs:.1f}",
                str(network.training.steps),
            )
            for network in result.networks
        ),
    )  # fmt: skip


def _attack(result: DemoResult) -> tuple[Prose | Plate | Grid, ...]:
    attack = result.attack
    factors = tuple(rung.factor for rung in attack.layers[1:])
    curves = [
        Curve("paper’s number,\nsingle units rescaled", factors, _changes(attack.units, "paper"), "muted", dashed=True),
        Curve("plain number,\nlayers rescaled", factors, _changes(attack.layers, "plain"), "second"),
        Curve("paper’s number,\nlayers rescaled", factors, _changes(attack.layers, "paper"), "first"),
    ]
    plate = Plate(
        caption=f"One network ({attack.label}) in float64, rescaled without changing its function. Solid: the first layer times "
        "the factor, the last layer divided by it. Dashed, the negative control: units of the first hidden layer "
        "times the factor or divided by it, the next layer inversely.",
        alternative=" ".join(attack.sentences),
        svg=markup(ladder(curves, "factor", "Relative change of the number"), "ladder"),
    )
    said = [Prose(text) for text in result.manipulation]
    note = f"Random layer-wise rescalings were verified before: outputs agree to {attack.verified:.0e}."
    return (
        said[0], plate, *said[1:],
        _rungs("Whole layers rescaled.", attack.layers, note), _rungs("Single units rescaled (negative control).", attack.units, ""),
    )  # fmt: skip


def _changes(rungs: tuple[Rung, ...], number: str) -> tuple[float, ...]:
    return tuple(getattr(rung, f"{number}_change") for rung in rungs[1:])


def _rungs(caption: str, rungs: tuple[Rung, ...], note: str) -> Grid:
    rows = tuple(
        (
            f"{rung.factor:g}",
            f"{rung.output_change:.0e}" if rung.output_change else "0",
            str(rung.paper.estimate),
            f"{rung.paper_change:.1e}" if rung.paper_change else "0",
            str(rung.plain.estimate),
            f"{rung.plain_change:.1e}" if rung.plain_change else "0",
        )
        for rung in rungs
    )
    heads = ("factor", "outputs change by", "the paper’s number", "changes by", "the plain number", "changes by")
    return Grid(f"{caption} All changes are relative.", heads, rows, note=note)


def _numbers(result: DemoResult) -> tuple[Grid, ...]:
    networks = [record for network in result.networks for record in network.table]
    return (
        *tables.measurements(networks, "Networks"),
        *tables.measurements(result.attack.records, "Attack"),
    )


def _warnings(result: DemoResult) -> tuple[Prose, ...]:
    found = [f"{network.label} missed the target loss: {network.training.loss:.4g}." for network in result.missed]
    found += [
        f"{_name(r)} did not converge: {interval(r.estimate)}." for r in result.records if not r.estimate.converged
    ]
    found += tables.warnings(result.records)
    return tuple(Prose(text) for text in found) or (
        Prose("None: every network reached the target, every number converged."),
    )


def _name(record: Record) -> str:
    return f"{record.label}, {record.measure}"


def _provenance(result: DemoResult, command: str) -> tuple[tuple[str, str], ...]:
    first = result.records[0]
    plan = result.plan
    settings = ", ".join(f"{key} {value}" for key, value in first.settings.items())
    return (
        ("Command", command),
        ("Plan", ", ".join(f"{key} {value}" for key, value in vars(plan).items())),
        ("Settings", settings + "; the attack in float64"),
        ("Data", f"{result.data}, {_rows(result)} training rows, hash {first.data_hash}"),
        ("Groups", "; ".join(dict.fromkeys(f"{r.geometry}: {r.group_hash}" for r in result.records))),
        *tables.versions(result.records),
    )
