"""What is collected, and in which order."""

import pytest
from hypothesis import settings

settings.register_profile("busy", deadline=None)  # a machine with other work is no failure
settings.load_profile("busy")

collect_ignore = ["cases", "golden", "mutants"]
"""Modules that are imported by name; collected for doctests they would run once more, under another one."""

ORDER = ("unit", "faults", "distributed", "oracles", "laws")
"""Folders, quick ones first. The longest files of few tests are not at the end, where one process would wait for the other."""

BY_ARCHITECTURE = {"test_canonical.py", "test_completeness.py", "test_symmetries.py"}
"""Files whose tests of one architecture follow each other, because it is traced once for all of them."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort files so that most mistakes show within a minute, in each of several processes.

    `--dist worksteal` begins with one piece of the list for each process: every piece has quick files first, and files, or
    all tests of an architecture, are in one piece, because they share what they compute.
    """
    groups: dict[tuple[int, str], list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(_group(item), []).append(item)
    count = getattr(config, "workerinput", {}).get("workercount", 1)
    share = len(items) // count
    pieces: list[list[pytest.Item]] = [[] for _ in range(count)]
    for key in sorted(groups, key=lambda key: key[0]):
        min(pieces, key=len).extend(groups[key])
    spare = [item for piece in pieces for item in piece[share:]]
    for piece in pieces:
        del piece[share:]
        while len(piece) < share:
            piece.append(spare.pop())
    items[:] = [*(item for piece in pieces for item in piece), *spare]


def _group(item: pytest.Item) -> tuple[int, str]:
    """Position of the folder, and what the test shares things with; doctests come after the folders of small tests."""
    folder = item.path.parent.name if item.path.parent.name in ORDER else "distributed"
    name = item.callspec.params.get("name") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
    shares = f"architecture {name}" if name and item.path.name in BY_ARCHITECTURE else str(item.path)
    return ORDER.index(folder), shares
