"""Every fault of the list applied to a copy of the source, one at a time, and the tests that should notice it run there.

    python tests/mutants/run.py [--jobs 2] [--only eigen] [--markdown docs/mutants.md]

A fault is caught if one of its tests fails or does not come to an end; the same tests must pass without it.
"""

from __future__ import annotations

import argparse
import compileall
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import cache_from_source
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar, final

import pytest
from listed import FAULTS, Fault

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
SECONDS = 300
"""What the tests of one fault may take; without it they take a tenth of that."""

SHARED = ["numpy", "torch", "torch.func", "torch._dynamo", "scipy.stats", "scipy.sparse.linalg", "sklearn", "pytest"]
"""What every test imports, and no fault touches: imported once."""

PROCESSES = multiprocessing.get_context("forkserver")

FAILED = re.compile(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", re.MULTILINE)


@final
@dataclass(frozen=True)
class Outcome:
    """What became of one fault.

    Attributes:
        fault: which.
        verdict: "caught", "timeout", "SURVIVED" or "stale".
        by: the first test that failed; empty if none did.
    """

    fault: Fault
    verdict: str
    by: str = ""


def mutated(source: str, fault: Fault) -> str:
    """The source with the fault in it.

    Raises:
        ValueError: the text to replace does not occur exactly once, or nothing changes.
    """
    found = source.count(fault.old)
    if found != 1 or fault.old == fault.new:
        raise ValueError(f"{fault.file}: expected {fault.old!r} once and a change, found it {found} times")
    return source.replace(fault.old, fault.new)


def tested(copy: Path, ids: Sequence[str]) -> tuple[int, str]:
    """The exit status and the output of the tests with these ids, on a copy of the source.

    They run in a process of their own, forked from one that has imported what they all need but the library.

    Raises:
        TimeoutError: they do not come to an end.
    """
    log = copy / "log"
    run = PROCESSES.Process(target=_run, args=(copy, ids, log))
    run.start()
    run.join(SECONDS)
    if run.exitcode is None:
        run.kill()
        run.join()
        raise TimeoutError
    return run.exitcode, log.read_text()


def _run(copy: Path, ids: Sequence[str], log: Path) -> None:
    """What the process does: pytest, with everything that is printed in a file."""
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.path.insert(0, str(copy))
    os.chdir(ROOT)
    own = [str(ROOT / "tests" / each) for each in ids]
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=no", *own])
    sys.stdout.flush()
    os._exit(int(status))


@contextmanager
def applied(fault: Fault, copy: Path) -> Iterator[None]:
    """While a copy of the source has the fault; what was compiled of the file goes with it."""
    path = copy / "isoflat" / fault.file
    source, compiled = path.read_text(), Path(cache_from_source(str(path)))
    try:
        compiled.unlink(missing_ok=True)
        path.write_text(mutated(source, fault))
        yield
    finally:
        path.write_text(source)
        compiled.unlink(missing_ok=True)


def attacked(fault: Fault, copy: Path) -> Outcome:
    """A fault applied to a copy, tested, and taken back."""
    try:
        with applied(fault, copy):
            status, output = tested(copy, fault.tests)
    except TimeoutError:
        return Outcome(fault, "timeout")
    except (ValueError, FileNotFoundError):
        return Outcome(fault, "stale")
    if status == 0:
        return Outcome(fault, "SURVIVED")
    named = FAILED.search(output)
    if named is None:
        raise SystemExit(f"pytest could not run {fault.tests}: status {status}\n{output[-4000:]}")
    return Outcome(fault, "caught", named[1])


def passing(faults: Sequence[Fault], copies: SimpleQueue[Path], jobs: int) -> bool:
    """Whether all the tests pass where there is no fault; what does not is printed."""
    ids = list(dict.fromkeys(each for fault in faults for each in fault.tests))
    fine = True
    with ThreadPoolExecutor(jobs) as pool:
        for status, output in pool.map(lambda part: _lent(copies, lambda copy: tested(copy, part)), _shared(ids, jobs)):
            if status:
                print(output[-4000:])
                fine = False
    return fine


def markdown(outcomes: Sequence[Outcome], seconds: float) -> str:
    """The table for `docs/mutants.md`."""
    rows = "\n".join(
        f"| {o.fault.subject} | {o.fault.file} | `{_cell(o.fault.old)}` | `{_cell(o.fault.new)}` | {o.by or o.verdict} |"
        for o in outcomes
    )
    return (
        "# Faults that the tests notice\n\n"
        f"Each line was once written wrong on purpose, by `make mutants`: {len(outcomes)} faults, "
        f"{sum(o.verdict in ('caught', 'timeout') for o in outcomes)} noticed, in {seconds / 60:.0f} minutes. The last "
        "column names the first test that failed.\n\n"
        "| Subject | File | Right | Wrong | Noticed by |\n|---|---|---|---|---|\n" + rows + "\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").strip()


def _shared(ids: Sequence[str], jobs: int) -> list[Sequence[str]]:
    return [part for part in (ids[job::jobs] for job in range(jobs)) if part]


def _lent(copies: SimpleQueue[Path], work: Callable[[Path], T]) -> T:
    copy = copies.get()
    try:
        return work(copy)
    finally:
        copies.put(copy)


def main() -> int:
    """Apply them all; 1 if one survives, or the list is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="a part of the subject, file or text of the faults to apply")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    PROCESSES.set_forkserver_preload(SHARED)
    faults = [
        fault for fault in FAULTS if options.only in " ".join((fault.subject, fault.file, fault.old, *fault.tests))
    ]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for job in range(options.jobs):
            copy = Path(folder) / str(job)
            shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
            compileall.compile_dir(copy, quiet=1)
            copies.put(copy)
        if not passing(faults, copies, options.jobs):
            print("some tests fail without any fault")
            return 1
        print(f"without a fault all tests pass ({time.monotonic() - started:.0f} s)", flush=True)
        outcomes = []
        with ThreadPoolExecutor(options.jobs) as pool:
            for outcome in pool.map(lambda fault: _lent(copies, lambda copy: attacked(fault, copy)), faults):
                outcomes.append(outcome)
                fault, verdict = outcome.fault, f"{outcome.verdict} {outcome.by.removeprefix('tests/')}"
                print(f"{fault.subject:12}{fault.file}: {fault.old}  →  {fault.new}\n    {verdict}", flush=True)
    seconds = time.monotonic() - started
    left = [outcome for outcome in outcomes if outcome.verdict not in ("caught", "timeout")]
    print(f"{len(outcomes)} faults, {len(outcomes) - len(left)} caught, in {seconds:.0f} s")
    if options.markdown:
        options.markdown.write_text(markdown(outcomes, seconds))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
