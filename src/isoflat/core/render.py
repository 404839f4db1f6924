"""Text for people: rounded numbers and intervals, lists of names cut short, tables, and no character a terminal obeys.

Two rules hold for every printed number:

* a printed interval is rounded outwards, so that it contains the stored one;
* a printed value is the multiple of its last digit that is nearest to the stored value *among those inside the stored
  interval*; where there is none, it gets further digits. It therefore lies inside the printed interval too.
"""

from __future__ import annotations

import io
import math
import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 160
"""Columns where the output is no terminal and COLUMNS does not say, so that a table in a log keeps its rows."""

_EXACT = Context(prec=1200, Emax=9999, Emin=-9999)
"""Decimal arithmetic in which sums, and multiples of powers of ten, of the decimal numbers that floats print as are exact."""

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that move the cursor, change the direction of writing, or show nothing."""


def visible(text: object) -> str:
    r"""The text with control characters, escape sequences and marks of writing direction spelled out.

    >>> visible("layer\x1b[31m.weight\u202e\n")
    'layer\\x1b[31m.weight\\u202e\\n'
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _UNSEEN else char for char in str(text)
    )


def some(names: Iterable[object], most: int = 6) -> str:
    """A few names, each cut to a readable length, and how many more.

    >>> some(["b", "a", "c"], most=2)
    'a, b and 1 more'
    """
    listed = sorted(map(str, names))
    return leading([name if len(name) <= 80 else f"{name[:77]}..." for name in listed], most)


def leading(texts: Sequence[str], most: int = 6, more: str = "more") -> str:
    """The first few texts, in their order, and how many more.

    >>> leading(["b", "a", "c"], most=2)
    'b, a and 1 more'
    """
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} {more}" if len(texts) > most else "")


def enumerated(names: Sequence[str], last: str = "and") -> str:
    """All names in a row, as a sentence has them.

    >>> enumerated(["a", "b", "c"], "or"), enumerated(["a"])
    ('a, b or c', 'a')
    """
    return f" {last} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def concise(value: float, lower: float, upper: float) -> str:
    """A value with the uncertainty of its last digit in brackets, from the interval it is known to lie in.

    The digit in brackets is the distance from the value to the farther end, rounded up.

    >>> concise(690.1234, 690.1213, 690.1255), concise(690.1234, 673.1, 707.2), concise(1e-9, 0.97e-9, 1.03e-9)
    ('690.123(3)', '690(20)', '1.00(3)e-09')
    >>> concise(12121.3, 12121.3, 12418.0), concise(2.5, 2.5, 2.5)  # 12100 would lie outside
    ('12200(300)', '2.5')
    """
    centre, least, most = map(_decimal, (value, lower, upper))
    if least == most:
        return f"{value:.12g}"
    if not (least.is_finite() and most.is_finite()):
        return f"{significant(value, lower, upper, 6)}(inf)"
    uncertainty = max(_EXACT.subtract(most, centre), _EXACT.subtract(centre, least))
    place = uncertainty.adjusted()  # of the last digit shown
    found = None
    if _steps(uncertainty, place) == 10:  # which one unit of the place before says with a digit less
        found = _inside(centre, least, most, place + 1)
    if found is not None:
        place += 1
    else:
        # A unit of this place is no longer than the interval from the value to its farther end, so that one is inside.
        found = _inside(centre, least, most, place)
        assert found is not None
    bracket = _steps(uncertainty, place)
    exponent = (centre or uncertainty).adjusted()
    if exponent < -4 or exponent >= 6:
        found, place = _EXACT.scaleb(found, -exponent), place - exponent
        ending = f"e{exponent:+03d}"
    else:
        ending = ""
    return f"{found:.{max(-place, 0)}f}({bracket * 10 ** max(place, 0)}){ending}"


def significant(value: float, lower: float, upper: float, digits: int, unit: int = 1) -> str:
    """A value with so many significant digits, or as many more as it takes to stay inside its interval.

    >>> significant(0.123456, 0.1, 0.2, 4), significant(0.1234491, 0.1234483, 0.1234495, 4), significant(0.5, 0.4, 0.6, 4, 100)
    ('0.1235', '0.123449', '50')
    """
    scaled, least, most = (_EXACT.multiply(_decimal(part), Decimal(unit)) for part in (value, lower, upper))
    if not scaled or not scaled.is_finite() or least == most:
        return f"{float(scaled):.12g}"
    for more in range(digits, 18):
        found = _inside(scaled, least, most, scaled.adjusted() - more + 1)
        if found is not None:
            return f"{float(found):.{more}g}"
    return repr(float(scaled))


def rounded(value: float) -> str:
    """Three digits, and powers of ten only where they save space.

    >>> rounded(4017.6), rounded(0.81234), rounded(2.291e15)
    ('4020', '0.812', '2.29e+15')
    """
    return f"{float(f'{value:.3g}'):g}"


def estimated(value: float, lower: float, upper: float) -> str:
    """A value with a digit more than the width of its interval has; six digits where there is no interval.

    >>> estimated(-229.4, -336.0, -123.0), estimated(83.27402, 83.19, 83.35), estimated(1.2e-5, -0.1, 0.1)
    ('-229', '83.27', '1e-05')
    """
    width = upper - lower
    if not math.isfinite(width) or width == 0 or not 1e-4 <= max(abs(value), width) < 1e6:
        return significant(value, lower, upper, 6)
    place = max(-12, min(0, _decimal(width).adjusted() - 1))
    found = _inside(_decimal(value), _decimal(lower), _decimal(upper), place)
    return f"{found:.{-place}f}" if found else significant(value, lower, upper, 1)


def bounds(lower: float, upper: float) -> str:
    """An interval in brackets, rounded outwards, with the digits that tell its ends apart: six or more.

    >>> bounds(2.5, 2.5013), bounds(0.25, 0.25)
    ('[2.50000, 2.50130]', '[0.25, 0.25]')
    """
    width = upper - lower
    if width == 0:
        return f"[{outwards(lower, 12, -1)}, {outwards(upper, 12, 1)}]"
    digits = 6
    while digits < 15 and math.isfinite(width):
        if float(f"{upper:.{digits}g}") - float(f"{lower:.{digits}g}") > 0.9 * width:
            break
        digits += 1
    return f"[{outwards(lower, digits, -1, '#')}, {outwards(upper, digits, 1, '#')}]"


def outwards(value: float, digits: int, direction: int, style: str = "", unit: int = 1) -> str:
    """A number with so many significant digits that is not above (`direction` −1) or not below (1) the true one.

    >>> outwards(0.12345, 3, -1), outwards(0.12345, 3, 1), outwards(2.0, 3, 1, "#")
    ('0.123', '0.124', '2.00')
    """
    exact = _EXACT.multiply(_decimal(value), Decimal(unit))
    if not exact or not exact.is_finite():
        return f"{float(exact):{style}.{digits}g}"
    rounding = ROUND_CEILING if direction > 0 else ROUND_FLOOR
    text = f"{float(_multiple(exact, exact.adjusted() - digits + 1, rounding)):{style}.{digits}g}".removesuffix(".")
    wrong = (Decimal(text) - exact) * direction < 0  # a subnormal number has fewer digits than are asked for
    return str(exact) if wrong else text


def _decimal(value: float) -> Decimal:
    """The shortest decimal number that reads back as this float: what printed digits are compared with."""
    return Decimal(repr(float(value)))


def _steps(length: Decimal, place: int) -> int:
    """Number of units of a decimal place that cover a length."""
    return int(_EXACT.scaleb(_multiple(length, place, ROUND_CEILING), -place))


def _multiple(value: Decimal, place: int, rounding: str) -> Decimal:
    """The multiple of `10**place` next to a number."""
    return value.quantize(Decimal((0, (1,), place)), rounding=rounding, context=_EXACT)


def _inside(value: Decimal, lower: Decimal, upper: Decimal, place: int) -> Decimal | None:
    """The multiple of `10**place` nearest to a value among those inside an interval, or None."""
    near = (_multiple(value, place, rounding) for rounding in (ROUND_HALF_EVEN, ROUND_FLOOR, ROUND_CEILING))
    return next((found for found in near if lower <= found <= upper), None)


def columns() -> int | None:
    """Columns of what is printed: None for those of the terminal, or those that the variable COLUMNS says."""
    from rich.console import Console

    return None if Console().is_terminal or "COLUMNS" in os.environ else WIDTH


class Printed(ABC):
    """A value that prints itself on a terminal and in a notebook, by one drawing."""

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """Draw it for `rich.print`."""

    @final
    def __str__(self) -> str:
        """Plain text that fits the terminal, or `WIDTH` columns where there is none."""
        from rich.console import Console

        console = Console(width=columns(), color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    @final
    def _repr_html_(self) -> str:
        """Draw it for notebooks."""
        from rich.console import Console

        console = Console(width=WIDTH, record=True, file=io.StringIO())
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre style='line-height:1.3'>{code}</pre>")
