"""The drawing of a spectrum: smoothed density above, distribution function with its band below."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from isoflat.core.density import Atoms, Density
from isoflat.core.errors import UsageError
from isoflat.core.spectrum import NEAR, Spectrum
from isoflat.report import drawing

Reals = NDArray[np.float64]

KERNEL = 0.1
"""Smallest standard deviation of a smoothing kernel, in decades of the axis."""

SPACING = 0.6
"""Smallest standard deviation in units of the distance to the probe's next nodes: finer than these nothing is seen."""

FORMATS = (".png", ".svg")
"""Endings of files that a drawing can be written to."""


@final
@dataclass(frozen=True)
class Axis:
    """A symmetric-logarithmic axis without a kink: `asinh(x/width)`, in decades far from zero and linear near it."""

    width: float

    def decades(self, values: Reals) -> Reals:
        """Places of values on the axis.

        >>> Axis(1e-9).decades(np.array([-1.0, 0.0, 1.0, 10.0])).round(6).tolist()
        [-9.30103, 0.0, 9.30103, 10.30103]
        """
        return np.arcsinh(values / self.width) / math.log(10)

    def values(self, decades: Reals) -> Reals:
        """Values at places of the axis."""
        return self.width * np.sinh(decades * math.log(10))


def portrait(spectrum: Spectrum) -> Figure:
    """Density and distribution function over one axis.

    *Above*, what the probes saw, smoothed for the eye: Gauss nodes with their weights, as eigenvalues per decade of the
    axis. Outliers are single eigenvalues and stand apart. *Below*, what is known: the band that holds the distribution
    function everywhere, on a scale that shows both tails.

    Args:
        spectrum: the spectrum.
    """
    density = spectrum.density
    axis = Axis(max(NEAR * density.largest, density.wasserstein) or 1.0)
    with drawing.style():
        figure = Figure(figsize=(7.2, 5.8), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.06)  # pyrefly: ignore
        above, below = figure.subplots(2, 1, sharex=True)
        _density(above, density, axis)
        _distribution(below, density)
        _abscissa(below, density, axis)
        record = spectrum.record
        name = f"{record.label}, " if record.label else ""
        figure.suptitle(
            f"{name}{density.n:,} Hessian eigenvalues, geometry {record.geometry}", x=0.012, ha="left", fontsize=11
        )
        figure.align_ylabels()
        return figure


def smoothed(density: Density, axis: Axis, at: Reals) -> Reals:
    """Eigenvalues per decade of an axis at some places of it: the bulk, without outliers, under a Gaussian kernel.

    Args:
        density: the spectrum.
        axis: the axis.
        at: places, in its decades.
    """
    squares = math.fsum(probe.square for probe in density.probes)
    total = np.zeros(len(at))
    for probe in density.probes:
        places = axis.decades(np.array(probe.nodes))
        widths = np.full(len(places), KERNEL)
        if len(places) > 1:
            widths = np.maximum(widths, SPACING * np.gradient(places))
        eigenvalues = (density.n - len(density.outliers)) * probe.square / squares * np.array(probe.weights)
        apart = (at[:, None] - places) / widths
        total += np.exp(-(apart**2) / 2) @ (eigenvalues / (widths * math.sqrt(2 * math.pi)))
    return total


def _density(axes: Axes, density: Density, axis: Axis) -> None:
    ends = axis.decades(np.array([density.low.points[0], density.high.points[-1]]))
    at = np.linspace(ends[0] - 5 * KERNEL, ends[1] + 5 * KERNEL, 1200)
    per_decade = smoothed(density, axis, at)
    floor, top = 0.3, max(3.0 * float(per_decade.max(initial=1.0)), 3.0)
    shown = np.maximum(per_decade, floor)
    axes.fill_between(axis.values(at), floor, shown, color=drawing.FIRST, alpha=0.22, linewidth=0)
    axes.plot(axis.values(at), np.where(per_decade > floor, per_decade, np.nan), color=drawing.FIRST, linewidth=1.4)
    values = [outlier.value for outlier in density.outliers]
    axes.vlines(values, floor, 1, color=drawing.SECOND, linewidth=1.0)
    axes.scatter(values, [1.0] * len(values), s=20, color=drawing.SECOND, linewidth=0, zorder=3)
    axes.set_yscale("log")
    axes.set_ylim(floor, top)
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: drawing.power(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")
    axes.set_ylabel("eigenvalues per decade")
    axes.set_title("Density: smoothed for the eye", fontsize=9.5, color=drawing.MUTED)
    if values:
        note = f"{len(values)} outliers, one eigenvalue each" if len(values) > 1 else "1 outlier"
        axes.scatter([], [], s=20, color=drawing.SECOND, linewidth=0, label=note)
        axes.legend(loc="upper right", handletextpad=0.2, borderaxespad=0)


def _distribution(axes: Axes, density: Density) -> None:
    """The band as a surface and the estimate as a line, on a logit scale."""
    points, masses = density.estimate
    grid = np.unique(np.concatenate([points, density.low.points, density.high.points]))
    reach = 1e3 * float(np.abs(grid).max() or 1.0)
    grid = np.concatenate([[-reach], grid, [reach]])
    limit = min(0.5 / density.n, 0.1)
    most, least = (_logit(_shares(atoms, grid), limit) for atoms in (density.low, density.high))
    axes.fill_between(grid, least, most, step="post", color=drawing.FIRST, alpha=0.28, linewidth=0)
    shares = np.concatenate([[0.0], np.cumsum(masses)])
    axes.step(points[[0, *range(len(points))]], _logit(shares, limit), where="post", color=drawing.FIRST, linewidth=1.4)
    levels = [level for level in _LEVELS if level == 0.5 or limit < min(level, 1 - level)]
    axes.yaxis.set_major_locator(FixedLocator(_logit(np.array(levels), limit).tolist()))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 / (1 + 10**-value):.5g} %"))
    axes.set_ylim(*_logit(np.array([0.0, 1.0]), 0.7 * limit))
    axes.grid(axis="y")
    axes.set_ylabel("share at or below")
    known = (
        "exact" if density.exact else f"the truth lies in the band everywhere, with confidence {density.confidence:g}"
    )
    axes.set_title(f"Distribution: {known}", fontsize=9.5, color=drawing.MUTED)


_LEVELS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 0.999, 1 - 1e-4, 1 - 1e-5, 1 - 1e-6)


def _shares(atoms: Atoms, grid: Reals) -> Reals:
    ends = np.concatenate([[0], atoms.ends])
    return ends[np.searchsorted(atoms.points, grid, side="right")] / atoms.n


def _logit(shares: Reals, limit: float) -> Reals:
    """Decades of odds; shares of none and of all are drawn at a limit."""
    inside = np.clip(shares, limit, 1 - limit)
    return np.log10(inside / (1 - inside))


def _abscissa(axes: Axes, density: Density, axis: Axis) -> None:
    """Powers of ten on both sides of zero."""
    axes.set_xscale("function", functions=(axis.decades, axis.values))
    ends = axis.decades(np.array([density.low.points[0], density.high.points[-1]]))
    margin = max(3.5 * KERNEL, (1.5 - float(ends[1] - ends[0])) / 2)
    left, right = ends[0] - margin, ends[1] + margin
    powers = 10.0 ** np.arange(math.ceil(math.log10(axis.width) - 0.2), math.log10(axis.width) + right + 8)
    ticks = np.concatenate([-powers[::-1], [0.0], powers])
    where = axis.decades(ticks)
    inside = ticks[(where >= left) & (where <= right)]
    axes.xaxis.set_major_locator(FixedLocator(inside.tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(*axis.values(np.array([left, right])))
    axes.grid(axis="x")
    axes.set_xlabel("eigenvalue λ")


def _power(value: float) -> str:
    sign = "−" if value < 0 else ""
    return f"{sign}{drawing.power(abs(value))}" if value else "0"


def written(figure: Figure, ending: str) -> bytes:
    """A figure as the content of a file.

    Args:
        figure: made within `drawing.style`.
        ending: one of `FORMATS`.

    Raises:
        UsageError: it is none of them.
    """
    if ending == ".png":
        return drawing.picture(figure)
    if ending != ".svg":
        raise UsageError(f"a drawing is written as {' or '.join(FORMATS)}, not as {ending!r}")
    buffer = io.BytesIO()
    with drawing.style():
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
