"""Drawings as files or as inline markup that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.figure import Figure

INK, MUTED, RULE, FIRST, SECOND, THIRD = "#1b1b1a", "#6f6e69", "#d9d7cf", "#3a6ea5", "#c0532b", "#6b8a3a"
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", FIRST: "first", SECOND: "second", THIRD: "third"}
"""Colours on light paper, and the names under which a page may set others."""

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "isoflat",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.grid.which": "major",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "text.parse_math": False,  # names come from users: a dollar begins no formula
}


@contextmanager
def style() -> Iterator[None]:
    """Context in which figures are made and saved in the report's style; matplotlib's settings come back afterwards."""
    with matplotlib.rc_context(_STYLE):
        yield


def markup(figure: Figure, name: str) -> str:
    """A figure as inline SVG without addresses, with ids of its own and with the page's colours.

    Args:
        figure: made within `style`.
        name: letters, unique on the page.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'<svg width="[\d.]+pt" height="[\d.]+pt"', '<svg aria-hidden="true" focusable="false"', text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.strip()


def picture(figure: Figure) -> bytes:
    """A figure as PNG on white paper, 200 dots per inch.

    Args:
        figure: made within `style`.
    """
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def power(value: float) -> str:
    """A power of ten for an axis, without any markup.

    >>> power(1000.0), power(1.0), power(1e-12)
    ('10³', '1', '10⁻¹²')
    """
    text = f"{value:e}"
    exponent = int(text.split("e")[1])
    if exponent in (0, 1):
        return f"{value:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
