"""Modules of `cases` are imported by name; collected for doctests they would run once more, under another one."""

from cases import elsewhere

collect_ignore = ["cases"]

elsewhere.device()  # the engine of derivatives counts its devices at the first derivative of a process
