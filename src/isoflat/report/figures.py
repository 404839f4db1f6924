"""The drawings of the reports. They know numbers and names, not networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.report import drawing

FLOOR = 2.0**-52
"""Changes below the spacing of doubles are drawn there."""


@final
@dataclass(frozen=True)
class Panel:
    """One number over several groups.

    Attributes:
        title: what is on the axis.
        groups: each group's name and estimates.
    """

    title: str
    groups: tuple[tuple[str, tuple[Estimate, ...]], ...]


@final
@dataclass(frozen=True)
class Curve:
    """One quantity against the factor.

    Attributes:
        name: written beside its last point.
        factors: abscissae.
        changes: relative changes; zeros are drawn at the spacing of doubles.
        colour: a name of `drawing.VARIABLES`.
        dashed: for what is not the main message.
    """

    name: str
    factors: tuple[float, ...]
    changes: tuple[float, ...]
    colour: str
    dashed: bool = False


def strips(panels: Sequence[Panel]) -> Figure:
    """Every estimate as a point with its enclosure, one strip per group, on a logarithmic axis per panel.

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
    colours = (drawing.FIRST, drawing.SECOND, drawing.THIRD)
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
    _logarithmic(axes, min(every), max(every))


def _logarithmic(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis with round numbers at readable distances, however narrow or wide its range is."""
    low, high = low / 1.15, high * 1.15
    axes.set_xscale("log")
    decades = math.log10(high / low)
    if decades > 2.5:
        axes.xaxis.set_major_locator(LogLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: drawing.power(value)))
    else:
        steps = (1, 2, 5) if decades > 1.3 else (1, 1.5, 2, 3, 4, 5, 6, 8)
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.set_xlim(low, high)
    axes.grid(axis="x")


def ladder(curves: Sequence[Curve], abscissa: str, ordinate: str) -> Figure:
    """Relative changes against a factor, both axes logarithmic, each curve named at its end."""
    drawn = [np.maximum(curve.changes, FLOOR) for curve in curves]
    factors = sorted({factor for curve in curves for factor in curve.factors})
    if not factors or any(factor <= 0 for factor in factors):
        raise UsageError("a ladder needs positive factors")
    with drawing.style():
        figure = Figure(figsize=(7.2, 3.7), layout="constrained")
        axes = figure.subplots()
        for curve, changes in zip(curves, drawn, strict=True):
            colour = {name: value for value, name in drawing.VARIABLES.items()}[curve.colour]
            dash = (0, (4, 2.5)) if curve.dashed else "-"
            axes.plot(curve.factors, changes, color=colour, linestyle=dash, linewidth=1.5, marker="o", markersize=5)
            axes.annotate(
                curve.name,
                (curve.factors[-1], changes[-1]),
                xytext=(9, 0),
                textcoords="offset points",
                verticalalignment="center",
                color=colour,
                fontsize=9,
            )
        axes.axhline(FLOOR, color=drawing.MUTED, linewidth=0.8, linestyle=(0, (1, 2.5)))
        axes.annotate(
            "rounding of a double", (1, FLOOR), xycoords=("axes fraction", "data"), xytext=(-2, -4),
            textcoords="offset points", color=drawing.MUTED, fontsize=8, va="top", ha="right",
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(factors[0] / 1.15, factors[-1] * (factors[-1] / factors[0]) ** 0.42)
        axes.set_ylim(FLOOR / 60, 30 * max(float(changes.max()) for changes in drawn))
        axes.xaxis.set_major_locator(FixedLocator(factors))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: drawing.power(value)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="minor", length=0)
        axes.grid(axis="y")
        axes.set_xlabel(abscissa)
        axes.set_title(ordinate)
        return figure
