"""Scatter plots: one quantity against another, groups in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from isoflat.core.errors import UsageError
from isoflat.report import drawing
from isoflat.report.figures import logarithmic

ACROSS = 3
"""Panels beside each other."""

LABELS = 4
"""Numbers that fit below the axis of one panel."""


@final
@dataclass(frozen=True)
class ScatterPanel:
    """One scatter plot of several side by side.

    Attributes:
        title: line above it; a part in brackets gets a line of its own.
        abscissa: name of the quantity on the horizontal axis, which is logarithmic.
        ordinate: name of the quantity on the vertical axis.
        groups: name, abscissae and ordinates of each, in an order that means something: later ones are drawn darker.
    """

    title: str
    abscissa: str
    ordinate: str
    groups: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...]


def scatter(panels: Sequence[ScatterPanel]) -> Figure:
    """Scatter plots in rows, with one legend.

    Raises:
        UsageError: there is nothing to draw, or an abscissa is not positive.
    """
    if not panels or any(not xs for panel in panels for _, xs, _ in panel.groups):
        raise UsageError("a scatter plot needs at least one point in every group")
    if any(x <= 0 for panel in panels for _, xs, _ in panel.groups for x in xs):
        raise UsageError("a logarithmic axis needs positive numbers")
    with drawing.style():
        rows = -(-len(panels) // ACROSS)
        figure = Figure(figsize=(7.2, 0.5 + 2.7 * rows), layout="constrained")
        axes = figure.subplots(rows, min(ACROSS, len(panels)), squeeze=False).ravel()
        for place, panel in zip(axes, panels, strict=False):
            _draw(place, panel)
        for place in axes[len(panels) :]:
            place.set_visible(False)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=min(4, len(names)), fontsize=8.5, handlelength=1)
        return figure


def _draw(axes: Axes, panel: ScatterPanel) -> None:
    last = max(1, len(panel.groups) - 1)
    for place, (name, xs, ys) in enumerate(panel.groups):
        shade = 0.4 + 0.6 * place / last
        axes.scatter(xs, ys, s=22, color=drawing.FIRST, alpha=shade, linewidth=0, label=name, zorder=3)
    every = [x for _, xs, _ in panel.groups for x in xs]
    logarithmic(axes, min(every), max(every), LABELS)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y")
    axes.set_xlabel(panel.abscissa)
    axes.set_ylabel(panel.ordinate)
    axes.set_title(panel.title.replace(" (", "\n(", 1))
