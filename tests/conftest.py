"""Modules of `cases` are imported by name; collected for doctests they would run once more, under another one."""

collect_ignore = ["cases"]
