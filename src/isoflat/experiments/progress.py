"""Progress of long experiments on standard error: a bar on a terminal, a line for each step in a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from isoflat.core.render import visible

Report = Callable[[str, float], None]
"""A function that is called with what is being done, and how many units of work were done since the last call."""


def silent(text: str, done: float) -> None:
    """Report nothing."""


def shares(report: Report, text: str, units: float = 1.0) -> Callable[[float], None]:
    """A function that is told the share of a piece of work that is done, and reports what was added since it was last told.

    Args:
        report: the report of the whole.
        text: name of the piece of work.
        units: size of the piece in the whole's units of work.

    >>> told = []
    >>> half = shares(lambda text, done: told.append(done), "first half", 8.0)
    >>> half(0.25), half(0.125), half(1.0), told
    (None, None, None, [2.0, 0.0, 6.0])
    """
    reached = 0.0

    def share(done: float) -> None:
        nonlocal reached
        report(text, units * max(0.0, done - reached))
        reached = max(reached, done)

    return share


@contextmanager
def bar(total: float, hidden: bool) -> Iterator[Report]:
    """A line that tells what is being done, the share that is done, and how long the rest will take.

    Args:
        total: number of units of work.
        hidden: whether nothing is shown.

    >>> with bar(2, hidden=True) as report:
    ...     report("first half", 1.0)
    """
    if hidden:
        yield silent
    elif sys.stderr.isatty():
        from tqdm import tqdm

        layout = "{desc:<44} {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left"
        with tqdm(total=total, bar_format=layout, leave=False, smoothing=0.1) as line:

            def report(text: str, done: float) -> None:
                line.set_description_str(text, refresh=False)
                line.update(done)

            yield report
    else:
        yield _lines(total)


def _lines(total: float) -> Report:
    """A report that writes each new step as a line, at once."""
    passed, last = 0.0, ""

    def report(text: str, done: float) -> None:
        nonlocal passed, last
        passed += done
        if text != last:
            sys.stderr.write(f"{100 * min(passed / total, 1):3.0f} % {visible(text)}\n")
            sys.stderr.flush()
            last = text

    return report
