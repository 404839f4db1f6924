"""The page of `isoflat study`."""

from __future__ import annotations

from isoflat.core.render import visible
from isoflat.experiments.numbers import Number
from isoflat.experiments.prediction import NOTE, Facts, ObservedNetwork, Prediction, words
from isoflat.experiments.statistics.relation import OutcomeRelation
from isoflat.measures.base import Direction
from isoflat.measures.catalogue import find_measure
from isoflat.report import tables
from isoflat.report.document import Grid, Page, Plate, Prose, Section
from isoflat.report.drawing import markup
from isoflat.report.pages import parts
from isoflat.report.pages.parts import INTERVAL
from isoflat.report.scatter import ScatterPanel, scatter

SHADES = 8
"""Levels of a hyper-parameter that can be told apart by shade."""

HOW_SURELY = ("number", "networks", "τ-b", "interval", "p", "given loss", "its p")
"""Columns of the first table of relations."""

HOW_ROBUSTLY = ("number", "Ψ", "sign error", "worst", "where", "K", "K by chance")
"""Columns of the second."""

READING = (
    ("τ-b and its interval", "Kendall’s rank correlation: 1 where the sharper of any two networks has the worse outcome, 0 "
     "where neither order is more frequent, −1 where it is the other way round. The interval is of resampled networks. "
     "Numbers whose intervals overlap widely should not be ranked by their τ: differences between them are not tested."),
    ("p", "How often outcomes dealt out at random give a τ as large, two-sided; then corrected for the number of "
     "relations that were tried (Holm). Above 0.05 there is no evidence, which is not evidence that there is no relation."),
    ("Ψ", "The mean of τ over pairs that differ in one hyper-parameter only (Jiang et al. 2019). A number that merely follows, "
     "say, the width can have a large τ and a Ψ near 0."),
    ("Sign error and worst", "Share of such pairs that the number orders wrongly, on average over environments and in the worst "
     "one (Dziugaite et al. 2020); guessing has 50 %. An environment is one hyper-parameter changed from one value to another. "
     "With replicates, pairs count by how far their outcomes differ beyond the noise."),
    ("K", "Information that the number has on the order of outcomes when two hyper-parameters or fewer are known, at its "
     "smallest (Jiang et al. 2019). It is never quite 0: compare with what chance gives."),
    ("Given loss", "Partial Spearman correlation given the training loss. Curvature falls with the training loss, so that a "
     "relation may be one of the loss; what is taken away is linear in its rank."),
    ("What this cannot say", "A relation over these networks is no cause, and says nothing of other architectures, data or "
     "ranges of hyper-parameters. Networks are taken to be exchangeable: those of one run at several epochs are not."),
    INTERVAL,
)  # fmt: skip


def page(result: Prediction, command: str, facts: Facts) -> Page:
    """Page of a study, ready to be rendered.

    Args:
        result: the study's result.
        command: the command line that makes it.
        facts: names and values that say what was studied.
    """
    return Page(
        title="isoflat study",
        headline=result.headline,
        lead=result.cautions,
        facts=tuple(fact for fact in facts if fact[0] != NOTE),
        sections=(
            Section(
                f"Does flatness predict the {result.outcome}?",
                (*_figures(result), *_relations(result), *(Prose(each.sentence) for each in result.relations)),
            ),
            Section(
                "What to know", tuple(map(Prose, result.notes)) or (Prose("Every number is known of every network."),)
            ),
            Section("Every network", _networks(result)),
            *parts.closing(
                READING,
                tables.measurements(result.records, "Networks"),
                _warnings(result),
                _provenance(result, command, facts),
            ),
        ),
        colophon=parts.COLOPHON,
    )


def _figures(result: Prediction) -> tuple[Plate | Prose, ...]:
    factor, groups = _groups(result)
    panels, undrawn = [], []
    for number in result.numbers:
        drawn = []
        for name, networks in groups:
            known = [(value, n.outcome) for n in networks if (value := n.value(number)) is not None]
            if known:
                drawn.append((name, tuple(x for x, _ in known), tuple(y for _, y in known)))
        if drawn and all(x > 0 for _, xs, _ in drawn for x in xs):
            panels.append(ScatterPanel(words(number), _axis(number), result.outcome, tuple(drawn)))
        elif drawn:
            undrawn.append(words(number))
    blocks: list[Plate | Prose] = []
    if panels:
        shades = f"Later values of {factor} are darker." if factor else ""
        blocks.append(
            Plate(
                caption=f"Every dot is a network: a number, and the {result.outcome}. {shades}",
                alternative=" ".join(result.sentences),
                svg=markup(scatter(panels), "clouds"),
            )
        )
    if undrawn:
        blocks.append(Prose(f"Not drawn, because a value is not positive: {', '.join(undrawn)}."))
    return tuple(blocks)


def _groups(result: Prediction) -> tuple[str, list[tuple[str, list[ObservedNetwork]]]]:
    """Networks by the first hyper-parameter that differs, if its levels can be told apart; its name."""
    factor = next(iter(result.factors), "")
    levels = result.factors.get(factor, ())
    if not 1 < len(levels) <= SHADES:
        return "", [("networks", list(result.networks))]
    return factor, [
        (_drawn(f"{factor} {level}"), [n for n in result.networks if n.factors.get(factor, "none") == level])
        for level in levels
    ]


def _drawn(text: str) -> str:
    """A name as a figure takes it: no formula, no command to leave it out of the legend."""
    shown = visible(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _axis(number: Number) -> str:
    lower = find_measure(number.measure).direction is Direction.LOWER_IS_FLATTER
    return "sharper →" if lower else "flatter →"


def _relations(result: Prediction) -> tuple[Grid, ...]:
    if not result.relations:
        return ()
    confidence = 100 * result.relations[0].kendall.confidence
    lines = [line(relation) for relation in result.relations]
    first, second = (
        tuple(tuple(cells[head] for head in heads) for cells in lines) for heads in (HOW_SURELY, HOW_ROBUSTLY)
    )
    return (
        Grid(
            f"How surely every number is related to the {result.outcome}; intervals with {confidence:g} % confidence.",
            HOW_SURELY,
            first,
            note="A higher number is sharper. All p are corrected for all numbers in this table (Holm).",
        ),
        Grid(
            "What is left where hyper-parameters are held: pairs that differ in one only, and what they do not tell.",
            HOW_ROBUSTLY,
            second,
            note="Guessing has Ψ 0 and a sign error of 50 %. A dash: no two networks differ in one hyper-parameter only.",
        ),
    )


def line(relation: OutcomeRelation) -> dict[str, str]:
    """A relation's cells by column."""
    kendall, worst, partial = relation.kendall, relation.robust.worst, relation.partial
    return {
        "number": relation.measure,
        "networks": str(relation.networks),
        "τ-b": _signed(kendall.tau),
        "interval": "–" if kendall.tau is None else f"{kendall.lower:+.2f} to {kendall.upper:+.2f}",
        "p": f"{relation.p_holm:.2g}",
        "given loss": _signed(None if partial is None else partial.rho),
        "its p": "–" if relation.partial_holm is None else f"{relation.partial_holm:.2g}",
        "Ψ": _signed(relation.granulated.mean),
        "sign error": _percent(relation.robust.mean),
        "worst": "–" if worst is None else _percent(worst.error),
        "where": "–" if worst is None else worst.name,
        "K": "–" if relation.conditional.score is None else f"{relation.conditional.score:.2f}",
        "K by chance": "–" if relation.conditional.chance is None else f"{relation.conditional.chance:.2f}",
    }


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _networks(result: Prediction) -> tuple[Grid, ...]:
    names = tuple(name for name in result.factors if not all(_told(network, name) for network in result.networks))
    heads = ("network", *names, result.outcome, "training loss", *map(words, result.numbers))
    rows = []
    for network in result.networks:
        records = [number.find(network.table) for number in result.numbers]
        rows.append(
            (
                network.label,
                *(str(network.factors.get(name, "none")) for name in names),
                f"{network.outcome:.4g}",
                f"{network.loss:.4g}",
                *("–" if row is None else str(row.estimate) for row in records),
            )
        )
    return (
        (Grid("Every network; the digit in brackets is the uncertainty of the last one.", heads, tuple(rows)),)
        if rows
        else ()
    )


def _told(network: ObservedNetwork, name: str) -> bool:
    """True where the label says the level of a hyper-parameter, as the labels of a grid do."""
    return f"{name} {network.factors.get(name, 'none')}" in network.label


def _warnings(result: Prediction) -> tuple[Prose, ...]:
    told = parts.unconverged(result.records)
    told += parts.missing(part for network in result.networks for part in network.table.omitted)
    return parts.warning_blocks([*told, *tables.network_notes(result.records)])


def _provenance(result: Prediction, command: str, facts: Facts) -> tuple[tuple[str, str], ...]:
    records = result.records
    if not records:
        return (("Command", command), *facts)
    return (
        ("Command", command),
        *(fact for fact in facts if fact[0] == NOTE),
        ("Data measured on", parts.hashes(records)),
        ("Draws", f"{result.draws} resamples and permutations, seed {result.seed}"),
        ("Settings", parts.listed(records[0].settings)),
        *tables.versions(records),
    )
