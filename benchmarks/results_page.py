"""Writes docs/results/README.md from the results beside it, and from further.md, which is about results elsewhere.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

FOLDER = Path(__file__).parent.parent / "docs" / "results"
"""Of the results, and of the page."""

ORDER = (
    "digits",
    "mnist-mlp",
    "mnist-lenet",
    "cifar10-alexnet",
    "cifar10-vgg16",
    "two-transformers",
    "false-friend",
    "batch-size-ladder",
    "batch-size-ladder-lenet",
    "label-noise",
    "label-noise-mlp",
    "synthetic-invariance",
)
"""Experiments as they are told."""

INTRODUCTION = """# Results

Made by `isoflat reproduce NAME --scale small`, seed 0, on two cores of a shared machine without a GPU; this page by
`make results-page` from the files beside it. Each `NAME.json` is the whole result, `NAME.csv` has a row for each network, point
of its orbit and number, each with its interval. `isoflat reproduce --check docs/results/NAME.json` runs it again and compares.
Values in tables are means ± standard errors over networks.
"""


def page(folder: Path = FOLDER) -> str:
    """The page as Markdown."""
    found = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ORDER}
    parts = [INTRODUCTION, *(_experiment(name, result) for name, result in found.items())]
    return "\n".join([*parts, (folder / "further.md").read_text(encoding="utf-8")])


def _experiment(name: str, result: Mapping[str, Any]) -> str:
    recipe = result["recipe"]
    cost = f"Training and measuring took {result['cost_seconds']:.0f} s of one core."
    lines = [f"## `{name}`: {recipe['title']}", "", f"{recipe['question']} {cost}", ""]
    if recipe["differs"]:
        lines += [f"Not as in {recipe['reference']}: {recipe['differs']}", ""]
    if result["summaries"]:
        lines += [*_grid(result), ""]
    return "\n".join([*lines, *(f"- {sentence}" for sentence in result["sentences"]), ""])


def _grid(result: Mapping[str, Any]) -> Iterator[str]:
    """Means of each arm."""
    names = list(dict.fromkeys(summary["number"] for summary in result["summaries"]))
    known = {(summary["arm"], summary["number"]): summary for summary in result["summaries"]}
    heads = ["arm", "networks", "training loss", "test error", *names]
    yield _row(heads)
    yield _row(["---", *["---:"] * (len(heads) - 1)])
    for arm in dict.fromkeys(summary["arm"] for summary in result["summaries"]):
        rows = [row for row in result["networks"] if row["arm"] == arm and row["reached"]]
        cells = [_cell(known.get((arm, name))) for name in names]
        count = max(known[arm, name]["networks"] for name in names if (arm, name) in known)
        yield _row([arm, str(count), f"{_mean(rows, 'training_loss'):.2g}", _error(rows), *cells])


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Over networks, each of which has several rows."""
    return fmean({row["replicate"]: row[name] for row in rows}.values())


def _error(rows: Sequence[Mapping[str, Any]]) -> str:
    return "–" if any(row["test_error"] is None for row in rows) else f"{100 * _mean(rows, 'test_error'):.2f} %"


def _cell(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return "–"
    return f"{summary['mean']:.4g}" + ("" if summary["error"] is None else f" ± {summary['error']:.2g}")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(page(), encoding="utf-8")
