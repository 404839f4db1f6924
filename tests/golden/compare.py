"""Measures a base commit and the present tree on this machine and compares every number to the last bit.

    python tests/golden/compare.py --base COMMIT [--only PART]

Both trees run the same list (`measurements.py`, the present one) at the same time, each in a process of one thread with
its own `src`. Times, memory and versions are left out. Words (notes, reasons, sentences) are compared too, but where
they alone differ that is said and does not fail. Exit code 1: a number differs, something is missing, or a measurement
raised that should not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).resolve().with_name("measurements.py")

LEFT_OUT = frozenset({"seconds", "cost_seconds", "gradient_passes", "peak_memory", "versions", "cpu", "date"})
"""What two runs of one tree differ in, or what is installed."""

WORDS = frozenset({"notes", "note", "reason", "message", "sentence", "sentences", "title", "question", "differs"})
"""Text for readers."""

SHOWN = 12
"""Differences that are printed for each measurement."""


@dataclass
class Compared:
    """One measurement on both trees.

    Attributes:
        floats: how many were compared.
        others: counts, names, hashes and truth values alike.
        differing: where, and both values.
        reworded: the same for words.
        raised: what each side raised.
        unwanted: whether one did so that is not to.
    """

    floats: int = 0
    others: int = 0
    differing: list[tuple[str, str, str]] = field(default_factory=list)
    reworded: list[tuple[str, str, str]] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)
    unwanted: bool = False


def leaves(value: Any, place: str = "", words: bool = False) -> Iterator[tuple[str, Any, bool]]:
    """Every value that has none inside, with its place and whether it is text for readers."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in LEFT_OUT:
                yield from leaves(inner, f"{place}.{key}".lstrip("."), words or key in WORDS)
    elif isinstance(value, list):
        # The length first, so that a list that ended earlier is named as such.
        yield f"{place}.length", len(value), words
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{place}[{index}]", words)
    else:
        yield place, value, words


def spelled(value: Any) -> str:
    """A text that two values share only if they are the same bits; 0.0 and -0.0 differ, NaN equals NaN."""
    return f"{value!r} ({value.hex()})" if isinstance(value, float) else repr(value)


def compared(base: dict[str, Any], here: dict[str, Any]) -> Compared:
    """Both outcomes of one measurement."""
    found = Compared()
    sides = [{place: (value, words) for place, value, words in leaves(outcome)} for outcome in (base, here)]
    for place in dict.fromkeys((*sides[0], *sides[1])):
        (one, _), (other, words) = (side.get(place, ("missing", False)) for side in sides)
        texts = spelled(one), spelled(other)
        if isinstance(one, float) or isinstance(other, float):
            found.floats += 1
        else:
            found.others += 1
        if texts[0] != texts[1]:
            (found.reworded if words else found.differing).append((place, *texts))
    for name, outcome in (("base", base), ("here", here)):
        if "raised" in outcome:
            found.raised.append(f"{name}: {outcome['raised']}: {outcome['message'][:300]}")
        found.unwanted |= ("raised" in outcome) != outcome["refuses"]
    return found


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A work tree of a commit, which is gone afterwards whatever happens."""
    tree = folder / "base"
    git = ["git", "-C", str(ROOT)]
    if subprocess.run(
        [*git, "cat-file", "-e", f"{commit}^{{commit}}"], check=False, stderr=subprocess.DEVNULL
    ).returncode:
        sys.exit(f"--base {commit}: there is no such commit")
    try:
        subprocess.run([*git, "worktree", "add", "--detach", "--quiet", str(tree), commit], check=True)
        yield tree
    finally:
        if subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=False).returncode:
            shutil.rmtree(tree, ignore_errors=True)
            subprocess.run([*git, "worktree", "prune"], check=False)


def started(tree: Path, out: Path, only: str) -> subprocess.Popen[bytes]:
    """The measurements of a tree, under way in one thread."""
    source = tree / "src"
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    env = {**os.environ, **threads, "PYTHONPATH": str(source), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(LIST), "--src", str(source), "--out", str(out), "--only", only]
    return subprocess.Popen(command, env=env, cwd=out.parent)


def measured(base: Path, folder: Path, only: str) -> list[dict[str, Any]]:
    """What both trees give, by measurement: base first."""
    outs = [folder / "base.json", folder / "here.json"]
    runs: list[subprocess.Popen[bytes]] = []
    try:
        runs += [started(tree, out, only) for tree, out in zip((base, ROOT), outs, strict=True)]
        codes = [run.wait() for run in runs]
    finally:
        for run in runs:
            if run.poll() is None:
                run.kill()
                run.wait()
    if any(codes):
        sys.exit(f"the measurements ended early: exit codes {codes[0]} (base) and {codes[1]} (here)")
    return [json.loads(out.read_text()) for out in outs]


def table(rows: dict[str, Compared]) -> None:
    """One line for each measurement, then every difference."""
    width = max(len(name) for name in rows)
    print(f"{'measurement':{width}}  floats  others  differ  reworded  raised")
    for name, row in rows.items():
        numbers = f"{row.floats:6}  {row.others:6}  {len(row.differing):6}  {len(row.reworded):8}"
        raised = "unexpectedly" if row.unwanted else "as it should" if row.raised else ""
        print(f"{name:{width}}  {numbers}  {raised}".rstrip())
    for name, row in rows.items():
        for line in row.raised if row.unwanted else ():
            print(f"\n{name}: raised on the side of {line}")
        for title, found in (("differs", row.differing), ("reworded", row.reworded)):
            for place, one, other in found[:SHOWN]:
                print(f"\n{name}: {place} {title}\n  base {one}\n  here {other}")
            if len(found) > SHOWN:
                print(f"\n{name}: {title} in {len(found) - SHOWN} more places")


def main() -> int:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="commit to compare with")
    parser.add_argument("--only", default="", help="measurements with this in their name")
    given = parser.parse_args()
    # Ended from outside, it clears up as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        with checked_out(given.base, folder) as tree:
            base, here = measured(tree, folder, given.only)
    missing = {"raised": "missing", "message": "not measured", "refuses": False}
    names = dict.fromkeys((*base, *here))
    rows = {name: compared(base.get(name, missing), here.get(name, missing)) for name in names}
    table(rows)
    differing, unwanted = sum(len(row.differing) for row in rows.values()), sum(row.unwanted for row in rows.values())
    floats, raised = sum(row.floats for row in rows.values()), sum(bool(row.raised) for row in rows.values())
    reworded = sum(len(row.reworded) for row in rows.values())
    cpu = [sum(outcome["cpu"] for outcome in side.values()) for side in (base, here)]
    print(
        f"\n{len(rows)} measurements, {floats} floats: {differing} differences, {reworded} texts reworded. {raised} raised, "
        f"{unwanted} of them unexpectedly. {time.monotonic() - begun:.0f} s; CPU {cpu[0]:.0f} s (base), {cpu[1]:.0f} s (here)"
    )
    return 1 if differing or unwanted else 0


if __name__ == "__main__":
    sys.exit(main())
