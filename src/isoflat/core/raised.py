"""Exceptions of other people's code: which of them a lack of memory is, and what they say in one line."""

from __future__ import annotations

import re

import torch

LONGEST = 300
"""Characters of an exception's text that are passed on."""

_BEGGING = re.compile(
    r"\b(file|open|report|submit)\s+(an?|this)\s+(new\s+)?(issue|bug|feature|pr\b|pull)|bug report|github\.com|please report",
    re.IGNORECASE,
)
"""Sentences that ask the reader to write to the authors of another library."""


def is_out_of_memory(error: BaseException) -> bool:
    """Test of whether an allocation failed: torch has a type for accelerators, and words for the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def first_line(error: BaseException) -> str:
    r"""First line of what an error says; its type where it says nothing.

    Requests to write to the authors of another library are left out.

    >>> first_line(RuntimeError("no rule for cdist. Please file an issue on GitHub.\nStack: ..."))
    'no rule for cdist.'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # A loader's worker process puts the traceback before the words.
    line = lines[-1] if lines[0].startswith("Caught ") and "worker process" in lines[0] else lines[0]
    text = plain(line) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def plain(text: str) -> str:
    """A text without requests to write to the authors of another library."""
    return " ".join(part for part in re.split(r"(?<=[.!?;])\s+", text) if not _BEGGING.search(part))
