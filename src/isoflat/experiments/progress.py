"""Progress of long experiments on the standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Report = Callable[[str, float], None]
"""Called with what is being done, and how many units of work have been done since the last call."""


def silent(text: str, done: float) -> None:
    """Report nothing."""


@contextmanager
def bar(total: float, hidden: bool) -> Iterator[Report]:
    """A line that tells what is being done, the share that is done, and how long the rest will take.

    Args:
        total: units of work.
        hidden: show nothing.

    >>> with bar(2, hidden=True) as report:
    ...     report("first half", 1.0)
    """
    layout = "{desc:<44} {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left"
    with tqdm(total=total, disable=hidden, bar_format=layout, leave=False, smoothing=0.1) as line:

        def report(text: str, done: float) -> None:
            line.set_description_str(text, refresh=False)
            line.update(done)

        yield report
