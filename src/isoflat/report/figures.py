"""Drawings of the reports, made of numbers and names: they know nothing of networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.report import drawing

FLOOR = 2.0**-52
"""Smallest change that is drawn, the spacing of doubles at 1: smaller ones are drawn there."""


@final
@dataclass(frozen=True)
class Panel:
    """One number over several groups.

    Attributes:
        title: name of the quantity on the axis.
        groups: each group's name and estimates.
        colours: number of groups after which colours repeat.
    """

    title: str
    groups: tuple[tuple[str, tuple[Estimate, ...]], ...]
    colours: int = 3


@final
@dataclass(frozen=True)
class Curve:
    """One quantity against the amount of an edit.

    Attributes:
        name: name in the legend.
        amounts: abscissae.
        changes: relative changes; zeros are drawn at the spacing of doubles.
        colour: a name of `drawing.VARIABLES`.
    """

    name: str
    amounts: tuple[float, ...]
    changes: tuple[float, ...]
    colour: str


@final
@dataclass(frozen=True)
class Climb:
    """Curves of one kind of edit.

    Attributes:
        title: the kind of edit.
        abscissa: meaning of the amounts.
        curves: one per quantity.
    """

    title: str
    abscissa: str
    curves: tuple[Curve, ...]


def strips(panels: Sequence[Panel]) -> Figure:
    """Every estimate as a point with its interval, one strip per group, on a logarithmic axis per panel.

    The bar across a strip is its geometric mean.
    """
    if not panels or any(not group for panel in panels for _, group in panel.groups):
        raise UsageError("a strip plot needs at least one estimate in every group")
    with drawing.style():
        figure = Figure(figsize=(7.2, 0.55 + 1.45 * len(panels)), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1)  # pyrefly: ignore
        for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            _strip(axes, panel)
        return figure


def _strip(axes: Axes, panel: Panel) -> None:
    colours = (drawing.FIRST, drawing.SECOND, drawing.THIRD)[: panel.colours]
    for row, (_, group) in enumerate(panel.groups):
        colour = colours[row % len(colours)]
        values = np.array([estimate.value for estimate in group])
        offsets = row + (np.arange(len(values)) - (len(values) - 1) / 2) * min(0.12, 0.5 / len(values))
        ends = np.array([[estimate.lower, min(estimate.upper, 1e300)] for estimate in group])
        axes.hlines(offsets, ends[:, 0], ends[:, 1], color=colour, linewidth=1.2)
        axes.scatter(values, offsets, s=26, color=colour, alpha=0.85, linewidth=0, zorder=3)
        middle = float(np.exp(np.log(values).mean()))
        axes.vlines(middle, row - 0.36, row + 0.36, color=drawing.INK, linewidth=1.4, zorder=4)
    axes.set_yticks(range(len(panel.groups)), [name for name, _ in panel.groups])
    axes.set_ylim(len(panel.groups) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title(panel.title)
    every = [estimate.value for _, group in panel.groups for estimate in group]
    logarithmic(axes, min(every), max(every))


FEWEST = 3
"""Numbers that an axis needs at least, to be read."""

STEPS = ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,))
"""Round numbers of a decade, fewer and fewer."""


def logarithmic(axes: Axes, low: float, high: float, room: int = 10) -> None:
    """A logarithmic axis with round numbers at readable distances, however narrow or wide its range is.

    Args:
        axes: the axes that get it.
        low: least value that is drawn.
        high: largest value.
        room: numbers that fit below it.
    """
    low, high = low / 1.15, high * 1.15
    axes.set_xscale("log")
    decades = math.log10(high / low)
    if decades > 2.5:
        axes.xaxis.set_major_locator(LogLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: drawing.power(value)))
    else:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        decade = [[step * 10.0**exponent for exponent in exponents for step in steps] for steps in STEPS]
        ticks = [[tick for tick in ticks if low <= tick <= high] for ticks in decade]
        chosen = next((few for few in ticks if len(few) <= room), ticks[-1])
        if len(chosen) < FEWEST:  # a range within one step of a decade
            chosen = [tick for tick in MaxNLocator(min(room, 5)).tick_values(low, high) if low <= tick <= high]
        axes.xaxis.set_major_locator(FixedLocator(chosen))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.set_xlim(low, high)
    axes.grid(axis="x")


def ladders(climbs: Sequence[Climb], ordinate: str) -> Figure:
    """Relative changes against the amounts of several edits, side by side on common logarithmic axes.

    Args:
        climbs: one panel each, with the same curves in the same order.
        ordinate: label of the changes.
    """
    amounts = [amount for climb in climbs for curve in climb.curves for amount in curve.amounts]
    if not amounts or any(amount <= 0 for amount in amounts):
        raise UsageError("a ladder needs positive amounts")
    top = max(max(curve.changes) for climb in climbs for curve in climb.curves)
    with drawing.style():
        figure = Figure(figsize=(7.2, 3.5), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08)  # pyrefly: ignore
        row = figure.subplots(1, len(climbs), sharey=True, squeeze=False)[0]
        for axes, climb in zip(row, climbs, strict=True):
            _climb(axes, climb)
            axes.set_ylim(FLOOR / 60, 30 * max(top, FLOOR))
        row[0].yaxis.set_major_locator(LogLocator(numticks=8))
        row[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: drawing.power(value)))
        row[0].set_ylabel(ordinate)
        handles, names = row[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=len(names), fontsize=9, handlelength=1.4)
        return figure


def _climb(axes: Axes, climb: Climb) -> None:
    for curve in climb.curves:
        colour = {name: value for value, name in drawing.VARIABLES.items()}[curve.colour]
        changes = np.maximum(curve.changes, FLOOR)
        axes.plot(curve.amounts, changes, color=colour, linewidth=1.5, marker="o", markersize=4.5, label=curve.name)
    axes.axhline(FLOOR, color=drawing.MUTED, linewidth=0.8, linestyle=(0, (1, 2.5)))
    axes.annotate(
        "rounding of a double", (0, FLOOR), xycoords=("axes fraction", "data"), xytext=(2, -4),
        textcoords="offset points", color=drawing.MUTED, fontsize=8, va="top", ha="left",
    )  # fmt: skip
    ticks = sorted({amount for curve in climb.curves for amount in curve.amounts})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(ticks[0] / 1.6, ticks[-1] * 1.6)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.grid(axis="y")
    axes.set_xlabel(climb.abscissa)
    axes.set_title(climb.title)
