"""Numbers from any source, as a page and as flat rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from isoflat.core.comparison import Comparison
from isoflat.core.estimate import interval
from isoflat.core.plain import attributes
from isoflat.core.record import Record
from isoflat.core.render import leading, rounded
from isoflat.experiments.results import Results, StoredComparison, StoredNumber
from isoflat.io.strict import flattened
from isoflat.report import tables
from isoflat.report.document import Grid, Page, Plate, Prose, Section
from isoflat.report.figures import Panel
from isoflat.report.pages import compare as compare_report
from isoflat.report.pages import parts
from isoflat.report.pages.parts import COST, INTERVAL, STATIONARITY, TEXT, brief, drawable, names, plates, tame

READING = (
    INTERVAL,
    ("Measure and geometry", "What was measured, and the units of the weights in which it was: isoflat measures NAME explains "
     "one. Numbers of different measures or geometries are not compared, nor are those that are invariant to different "
     "groups: they stand in tables of their own."),
    STATIONARITY,
    COST,
)  # fmt: skip

LISTED = 60
"""Lines of a kind that are shown among the warnings; more are counted."""

OTHER = ", weights "
"""Text before the number of other weights of a network."""

SENTENCE = 2000
"""Characters of a sentence that are shown."""

Key = tuple[str, str, str]


def page(results: Results, command: str) -> Page:
    """Page of a folder, ready to be rendered.

    Args:
        results: the results that were read.
        command: the command line that shows them.
    """
    if len(results.comparisons) == 1 and not results.found:
        contest = results.comparisons[0]
        return with_warnings(compare_report.page(contest.comparison, contest.subject), refusals(results))
    records = tamed(numbers_of(results))
    numbers, networks = len(records), _networks(records)
    first, *others = _told(results) or [""]
    told = f"{_many(numbers, 'number')} of {_many(networks, 'network')}."
    open_ends = sum(not record.estimate.converged for record in records)
    return Page(
        title=f"isoflat report: {brief(results.folder.resolve().name)}",
        headline=first or told,
        lead=(*others, *([told] if first else []), f"Read from {_sources(results)}."),
        facts=(
            ("Networks", str(networks)),
            ("Numbers", str(numbers)),
            ("Converged", f"{numbers - open_ends} of {numbers}"),
            ("Data sets", str(len({record.data_hash for record in records}))),
            ("Hessian-vector products", str(sum(record.estimate.cost.products for record in records))),
            ("Time", f"{math.fsum(record.estimate.cost.seconds for record in records):.0f} s"),
        ),
        sections=(
            *(_contest(contest) for contest in results.comparisons),
            *([Section("What was measured", (*_figures(records), _summary(records)))] if records else []),
            *parts.closing(
                READING, measured(records), _warnings(results, records), _provenance(results, records, command)
            ),
        ),
        colophon=parts.COLOPHON,
    )


def tamed(found: Sequence[StoredNumber]) -> tuple[Record, ...]:
    """Records with texts that a page can show, each network under a name of its own."""
    labels = labelled(found)
    own = names(labels)
    return tuple(tame(number.record, own[label]) for number, label in zip(found, labels, strict=True))


def labelled(found: Sequence[StoredNumber]) -> list[str]:
    """Names of networks; where one has several weights, as at other points of its orbit, each has its number."""
    weights: dict[str, dict[str, int]] = {}
    made = []
    for number in found:
        known = weights.setdefault(number.label, {})
        place = known.setdefault(number.record.model_hash, len(known) + 1)
        made.append(number.label if place == 1 else f"{number.label}{OTHER}{place}")
    return made


def measured(records: Sequence[Record]) -> tuple[Grid, ...]:
    """Tables of every number; numbers of normalised or scaled scores have tables of their own."""
    by_scores: dict[str, list[Record]] = {}
    for record in records:
        by_scores.setdefault(_key(record)[2], []).append(record)
    return tuple(
        grid
        for scores, rows in by_scores.items()
        for grid in tables.measurements(rows, f"Networks, {scores} scores" if scores else "Networks")
    )


def refusals(results: Results) -> tuple[str, ...]:
    """Sentences about what could not be read."""
    return _some([f"{brief(refused.why, TEXT)}." for refused in results.refused])


def with_warnings(made: Page, texts: Sequence[str]) -> Page:
    """The page with further warnings, before its own."""
    if not texts:
        return made
    sections = []
    for section in made.sections:
        if section.title != parts.WARNINGS:
            sections.append(section)
            continue
        own = [block for block in section.blocks if not parts.is_none(block)]
        sections.append(Section(section.title, (*map(Prose, texts), *own)))
    return Page(made.title, made.headline, made.lead, made.facts, tuple(sections), made.colophon)


def rows(results: Results) -> list[dict[str, Any]]:
    """One flat row for each number: inputs under `settings.`, the outcome under `result.`."""
    return [_row(number) for number in numbers_of(results)]


def numbers_of(results: Results) -> tuple[StoredNumber, ...]:
    """Every number, those that were compared included."""
    compared = (StoredNumber(row, contest.source) for contest in results.comparisons for row in contest.comparison.rows)
    return (*results.found, *compared)


_RESULT = ("value", "lower", "upper", "confidence", "converged", "residual", "standard_error")


def _row(number: StoredNumber) -> dict[str, Any]:
    record, estimate = number.record, number.record.estimate
    return {
        **_plain(record.settings, "settings"),
        "settings.label": number.label,
        "settings.measure": record.measure,
        "settings.geometry": record.geometry,
        **{f"result.{name}": getattr(estimate, name) for name in _RESULT},
        "result.stationarity_ratio": record.stationarity_ratio,
        **_plain(vars(record.point), "result.point"),
        **_plain(vars(estimate.cost), "result.cost"),
        "kind": str(estimate.kind),
        **attributes(record, "group", "group_hash", "model_hash", "data_hash"),
        **_plain(record.versions, "versions"),
        "notes": "; ".join(estimate.notes),
        **attributes(number, "source", "place"),
    }


def _plain(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Flat values; lists as their JSON."""
    return {
        key: json.dumps(value) if isinstance(value, (list, tuple, dict)) else value
        for key, value in flattened(values, name).items()
    }


def _key(record: Record) -> Key:
    scores = record.settings.get("logits")
    return record.measure, record.geometry, "" if scores in (None, "None", "raw") else str(scores)


def _words(key: Key) -> str:
    return f"{key[0]} ({key[1]}{f', {key[2]} scores' if key[2] else ''})"


def _by_key(records: Sequence[Record]) -> dict[Key, list[Record]]:
    found: dict[Key, list[Record]] = {}
    for record in records:
        found.setdefault(_key(record), []).append(record)
    return found


def _arm(label: str) -> str:
    """A label without the number of a replicate.

    >>> _arm("small batch 3"), _arm("vgg16"), _arm("7"), _arm("small batch 3, weights 2")
    ('small batch', 'vgg16', '7', 'small batch, other weights')
    """
    name, other, _ = label.partition(OTHER)
    return re.sub(r"(?<=\S)\s+\d+$", "", name) + (", other weights" if other else "")


def _networks(records: Sequence[Record]) -> int:
    """Number of networks, whatever their weights."""
    return len({record.label.partition(OTHER)[0] for record in records})


def _figures(records: Sequence[Record]) -> tuple[Plate, ...]:
    panels = []
    for key, group in _by_key(records).items():
        arms: dict[str, list[Record]] = {}
        for record in group:
            if drawable(record.estimate):
                arms.setdefault(_arm(record.label), []).append(record)
        if arms:
            strips = tuple((name, tuple(row.estimate for row in own)) for name, own in arms.items())
            panels.append(Panel(_words(key), strips))
    caption = (
        "Every dot is a number with its interval, which is often narrower than the dot; the bar is the geometric mean of the "
        "strip. Numbers that are not positive have no place on this axis, and are in the tables only."
    )
    return plates(panels, caption, "Every positive number by measure, geometry and network; the tables hold the same.")


def _summary(records: Sequence[Record]) -> Grid:
    lines = []
    for key, group in _by_key(records).items():
        values = [record.estimate.value for record in group]
        lines.append(
            (
                _words(key),
                str(_networks(group)),
                str(len(group)),
                *(rounded(pick(values)) for pick in (min, median, max)),
                str(sum(not record.estimate.converged for record in group)),
            )
        )
    heads = ("number", "networks", "values", "smallest", "median", "largest", "open")
    return Grid("Every number over all networks; “open”: how many did not converge.", heads, tuple(lines))


def _told(results: Results) -> list[str]:
    """Sentences of studies and comparisons."""
    studied = [brief(sentence, SENTENCE) for study in results.studied for sentence in study.sentences]
    contests = [compare_report.tamed(contest.comparison) for contest in results.comparisons]
    return [*studied, *(sentence for contest in contests for sentence in contest.sentences)]


def _contest(contest: StoredComparison) -> Section:
    found = compare_report.tamed(contest.comparison)
    told = compare_report.warnings(found, contest.subject)
    return Section(
        f"Compared: {brief(contest.source)}",
        (*map(Prose, found.sentences), *compare_report.blocks(found), *(told if found.notes or found.remarks else ())),
    )


def _warnings(results: Results, records: Sequence[Record]) -> tuple[Prose, ...]:
    told = [*refusals(results)]
    told += _some(
        [f"Left out of the study: {brief(text, TEXT)}" for study in results.studied for text in study.left_out]
    )
    told += _some(
        [
            f"{record.label}, {_words(_key(record))} did not converge: {interval(record.estimate)}."
            for record in records
            if not record.estimate.converged
        ]
    )
    told += _some(
        [f"Not measured: {brief(part.label)} {brief(part, TEXT)}".replace("  ", " ") for part in results.omitted]
    )
    for key, group in _by_key(records).items():
        groups = {record.group_hash for record in group}
        if len(groups) > 1:
            told.append(
                f"{_words(key)}: {len(groups)} different groups of symmetries, which are those of different architectures. "
                "What is invariant to one need not be comparable with what is invariant to another."
            )
        # The notes of numbers side by side, in few lines.
        remarks = Comparison(tuple(group), (), group[0].label).remarks
        told += _some([brief(f"{_words(key)}: {remark}", TEXT) for remark in remarks])
    return parts.warning_blocks(told, "every file could be read, every number converged")


def _some(texts: Sequence[str]) -> tuple[str, ...]:
    shown = tuple(texts[:LISTED])
    return shown if len(texts) <= LISTED else (*shown, f"… and {len(texts) - LISTED} more of this kind.")


def _provenance(results: Results, records: Sequence[Record], command: str) -> tuple[tuple[str, str], ...]:
    settings: dict[str, list[str]] = {}
    for record in records:
        for name, value in record.settings.items():
            settings.setdefault(name, []).append(value)
    return (
        ("Command", brief(command, TEXT)),
        ("Files", _sources(results)),
        ("Settings", "; ".join(f"{name} {_listed(values)}" for name, values in settings.items())),
        ("Data hashes", _listed([record.data_hash for record in records])),
        ("Groups", _listed([f"{record.geometry}: {record.group_hash}" for record in records])),
        *((name, brief(text, TEXT)) for name, text in tables.versions(records)),
    )


def _listed(values: Sequence[str], most: int = 8) -> str:
    return leading(list(dict.fromkeys(values)), most)


def _sources(results: Results) -> str:
    """The files that numbers come from; those of a store together."""
    names = [part.source for part in (*results.studied, *results.comparisons, *results.found)]
    cells = {number.source for number in results.found if number.cell}
    files = [brief(name) for name in names if name not in cells]
    return _listed([*files, *([_many(len(cells), "cell") + " of the store"] if cells else [])]) or "nothing"


def _many(count: int, what: str) -> str:
    """A count with its noun.

    >>> _many(1, "number"), _many(2, "network")
    ('1 number', '2 networks')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"
