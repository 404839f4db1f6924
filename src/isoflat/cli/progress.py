"""Signs of life on standard error: a bar on a terminal, a line for each step in a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from isoflat.core.render import visible


def interactive() -> bool:
    """True where standard error is a terminal, which can show a moving bar."""
    return sys.stderr.isatty()


def step(text: str, hidden: bool = False) -> None:
    """Say what is done now; at once, and not on a terminal, where a bar says it.

    Args:
        text: what is done.
        hidden: say nothing.
    """
    if not hidden and not interactive():
        sys.stderr.write(f"{visible(text)}\n")
        sys.stderr.flush()


@contextmanager
def progress(total: float, hidden: bool, width: int = 44) -> Iterator[Callable[[str, float], None]]:
    """A function that is told what is done now, and how much was done since it was told last.

    Args:
        total: of what is told.
        hidden: show nothing.
        width: columns for the text.
    """
    if hidden or interactive():
        from tqdm import tqdm

        layout = f"{{desc:<{width}}} {{percentage:3.0f}}%|{{bar}}| {{elapsed}} passed, {{remaining}} left"
        with tqdm(total=total, disable=hidden, bar_format=layout, leave=False, smoothing=0.1) as bar:

            def move(text: str, done: float) -> None:
                bar.set_description_str(text, refresh=False)
                bar.update(done)

            yield move
        return
    passed, last = 0.0, ""

    def write(text: str, done: float) -> None:
        nonlocal passed, last
        passed += done
        if text != last:
            step(f"{100 * min(passed / total, 1):3.0f} % {text}" if total else text)
            last = text

    yield write
