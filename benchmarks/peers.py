"""Our measurement beside those of PyHessian, curvlinops and hessian-eigenthings: whole answers, in gradient passes.

Run with `make bench`; needs the environment that it makes. Networks and data are those of `benchmarks/problems.py`,
trained to a low loss; who takes part is in `benchmarks/contestants.py`, how a row is measured in `benchmarks/rows.py`.
Every answer has a process of its own, in which plain gradient passes over the same data in the same batches come before
and after it: the unit of cost. Answers that take a few seconds are repeated, and the median counts. Extra memory is what
an answer adds to the high-water mark of the gradient passes. True errors are relative to values in float64. True
residuals are by a product in float64 after the answer, isoflat's by the product of its own that it reports them from.

Whatever does not fit into the time is left out, and the table says so. It is printed line by line, and, where all
contestants were asked for, written to `benchmarks/results/peers.md` and `peers.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from answers import Contestant
from contestants import OURS, PAPER, PAPERS, PEERS, REFERENCES, TOP, TRACE, TRACES
from problems import PROBLEMS, source
from rows import HEAD, Row, answered, child, prepared

RESULTS = Path(__file__).parent / "results"

GRACE = 30.0
"""Further seconds, after which its process is killed: for what goes before and after an answer, and single products."""

LEAVE = 2.0
"""Seconds that a process is given to end by itself."""

PRELOAD = [
    "isoflat",
    "isoflat.experiments.data",
    "scipy.sparse.linalg",
    "pyhessian",
    "curvlinops",
    "hessian_eigenthings",
]
"""What every process needs, imported once; what is missing fails in the process that asks for it."""

LIBRARIES = ("isoflat", "torch", "numpy", "scipy", "pyhessian", "curvlinops-for-pytorch", "hessian-eigenthings")

# By importance: what the time does not suffice for is at the end.
SCHEDULE: Sequence[tuple[str, Sequence[Contestant]]] = (
    ("mlp", (REFERENCES[TOP], *OURS, *PEERS)),
    ("lenet", (REFERENCES[TOP], *OURS, *PEERS[:2])),
    ("decoder", (REFERENCES[TOP], *OURS, *PEERS[:2])),
    ("mlp", (REFERENCES[PAPER], *PAPERS)),
    ("mlp", (REFERENCES[TRACE], *TRACES[:5])),
    ("lenet", PEERS[2:3]),
    ("decoder", PEERS[2:3]),
    ("decoder", (REFERENCES[PAPER], *PAPERS)),
    ("lenet", (REFERENCES[PAPER], *PAPERS)),
    ("decoder", PEERS[3:]),
    ("lenet", PEERS[3:]),
    ("mlp", TRACES[5:]),
    ("lenet", (REFERENCES[TRACE], *TRACES)),
)


@dataclass
class Bench:
    """The run: what is known so far, and how much time is left."""

    threads: int
    cap: float
    deadline: float
    folder: Path
    began: float = field(default_factory=time.monotonic)
    cases: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def say(self, what: str) -> None:
        """Progress, for people."""
        spent = int(time.monotonic() - self.began)
        print(f"[{spent // 60:2d}:{spent % 60:02d}] {what}", file=sys.stderr, flush=True)

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def apart(self, limit: float, work: Callable[..., Any], *args: Any) -> Any:
        """What comes of something in a process of its own; in words, if that is an error."""
        context = multiprocessing.get_context("forkserver")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(sender, self.threads, work, *args))
        process.start()
        sender.close()
        try:
            if receiver.poll(limit):
                return receiver.recv()
            process.kill()
            return f"killed after {limit:.0f} s"
        except EOFError:
            process.join()
            return f"its process ended with code {process.exitcode}"
        finally:
            process.join(LEAVE)
            process.kill()
            process.join()

    def run(self, key: str, contestant: Contestant) -> Row:
        """One row."""
        blank = Row(key, contestant.task, contestant.name, contestant.targets.get(key, ""))
        limit = min(self.cap, self.left() - GRACE)
        if limit < GRACE / 2:
            return replace(blank, note="not run: the time was up")
        self.say(f"{PROBLEMS[key].name}, {contestant.task}: {contestant.name}")
        found = self.apart(limit + GRACE, answered, key, contestant.task, contestant.name, self.folder, limit)
        return self.compared(found) if isinstance(found, Row) else replace(blank, note=f"failed: {found}")

    def compared(self, row: Row) -> Row:
        """With the true error, and the paper's method with ours."""

        def of(name: str) -> Row | None:
            rows = (r for r in self.rows if (r.network, r.task) == (row.network, row.task) and r.value is not None)
            return next((r for r in rows if r.name == name), None)

        reference = of(REFERENCES[row.task].name)
        if reference is not None and reference.value and row.value is not None:
            row = replace(row, error=abs(row.value - reference.value) / abs(reference.value))
        ours = of(PAPERS[0].name) if row.name == PAPERS[1].name else None
        if ours is not None and ours.passes and row.passes:
            times = (
                f"{'' if row.value is not None else 'more than '}{row.passes / ours.passes:.1f} times isoflat's passes"
            )
            row = replace(row, note=f"{times}; {row.note}")
        return row

    def train(self, keys: Sequence[str]) -> None:
        """All networks."""
        for key in keys:
            self.say(f"train {PROBLEMS[key].name}")
            made = self.apart(max(self.left(), 1.0), prepared, key, self.folder)
            if not isinstance(made, dict):
                raise SystemExit(f"{PROBLEMS[key].name} could not be trained: {made}")
            self.cases.append(made)

    def heading(self) -> str:
        """What was measured where."""
        installed = ", ".join(f"{name} {number}" for name, number in versions().items())
        where = f"{self.threads} of {os.cpu_count()} cores, float32; {source()}"
        lines = [
            f"{where}; Python {platform.python_version()}, {installed}.",
            "",
            "| network | parameters | rows, batch | training loss | accuracy |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {c['name']} | {c['parameters']:,} | {c['rows']}, {c['batch']} | {c['loss']:.3g} | {c['accuracy']:.4f} |"
            for c in self.cases
        ]
        return "\n".join([*lines, "", HEAD])

    def write(self) -> None:
        """Table and figures so far."""
        RESULTS.mkdir(exist_ok=True)
        table = "\n".join([self.heading(), *(row.line() for row in self.rows), ""])
        (RESULTS / "peers.md").write_text(table, encoding="utf-8")
        record = {
            "versions": {"python": platform.python_version(), **versions()},
            "threads": self.threads,
            "cores": os.cpu_count(),
            "dtype": "float32",
            "data": source(),
            "networks": self.cases,
            "rows": [asdict(row) for row in self.rows],
        }
        (RESULTS / "peers.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Of what takes part."""

    def number(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    return {name: number(name) for name in LIBRARIES}


def main() -> None:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=15.0, help="for everything")
    parser.add_argument("--cap", type=float, default=120.0, help="seconds after which a contestant is stopped")
    parser.add_argument("--only", default="", help="networks, as a regular expression: mlp|lenet|decoder")
    parser.add_argument("--task", default="", help="numbers, likewise: λ_max|paper's number|trace")
    parser.add_argument("--by", default="", help="contestants, likewise; references always run")
    options = parser.parse_args()
    jobs = [
        (key, contestant)
        for key, contestants in SCHEDULE
        for contestant in contestants
        if re.search(options.only, key) and re.search(options.task, contestant.task)
        if re.search(options.by, contestant.name) or contestant in REFERENCES.values()
    ]
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.threads, options.cap, time.monotonic() + 60 * options.minutes, Path(folder))
        bench.train(list(dict.fromkeys(key for key, _ in jobs)))
        print(bench.heading(), flush=True)
        for key, contestant in jobs:
            row = bench.run(key, contestant)
            bench.rows.append(row)
            print(row.line(), flush=True)
            if not (options.only or options.task or options.by):
                bench.write()
        bench.say("done")


if __name__ == "__main__":
    main()
