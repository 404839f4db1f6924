"""Count the files, functions and stack depth that one call passes through, and the lines of each layer.

    python benchmarks/structure.py
    python benchmarks/structure.py --src ../older/src --lines

Every case runs in a fresh process on a two-layer perceptron with 64 rows of data. The call is made twice and the second
one is counted, so that lazy imports and filled caches are left out. Counted are frames whose code lies in a file below
`SRC/isoflat`, on every thread:

* files: distinct files among them;
* functions: distinct code objects, lambdas, comprehensions and generator expressions included (Python 3.12 and later
  inline some comprehensions, so compare numbers of one Python);
* named: those of them that a `def` at the top of a module or class made;
* depth: the most frames of isoflat on one stack at once; frames of other libraries between them are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

SRC = Path(__file__).resolve().parent.parent / "src"

RECIPE = "synthetic-invariance"
"""The recipe of the case `reproduce`; it needs no data."""


class Census:
    """A profile function that remembers which code of a folder ran, and how deep its frames were stacked."""

    def __init__(self, folder: Path) -> None:
        self.folder = f"{folder.resolve()}{os.sep}"
        self.codes: set[CodeType] = set()
        self.inside: dict[CodeType, bool] = {}
        self.depth = 0
        self.stack = threading.local()

    def counts(self, code: CodeType) -> bool:
        """Whether a frame of this code is one of the folder's."""
        if code not in self.inside:
            self.inside[code] = code.co_filename.startswith(self.folder)
        return self.inside[code]

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Take note of a call, or of its end; a generator ends at every `yield` and is called again at the next."""
        if event not in ("call", "return") or not self.counts(frame.f_code):
            return
        height = getattr(self.stack, "height", 0) + (1 if event == "call" else -1)
        self.stack.height = height
        if event == "call":
            self.codes.add(frame.f_code)
            self.depth = max(self.depth, height)

    def watch(self, call: Callable[[], object]) -> None:
        """Run something under this profile."""
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            call()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)


def problem() -> tuple[Any, Any, Any]:
    """A perceptron, its data and its loss."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    return model, (torch.randn(64, 8), torch.randint(0, 3, (64,))), nn.CrossEntropyLoss()


def measured(geometry: str | None) -> Callable[[], object]:
    """`isoflat.measure` on a perceptron."""
    import isoflat

    model, data, loss = problem()
    chosen = {} if geometry is None else {"geometry": geometry}
    return lambda: isoflat.measure(model, data, loss, **chosen)


def compared() -> Callable[[], object]:
    """`isoflat.compare` of two perceptrons."""
    import isoflat

    (first, data, loss), (second, *_) = problem(), problem()
    return lambda: isoflat.compare({"a": first, "b": second}, data, loss)


def spectrum() -> Callable[[], object]:
    """`isoflat.spectrum` of a perceptron."""
    import isoflat

    model, data, loss = problem()
    return lambda: isoflat.spectrum(model, data, loss)


def reproduced() -> Callable[[], object]:
    """`isoflat reproduce`, the smallest recipe with one network per arm, in this process."""
    from isoflat.cli.main import run

    def call() -> None:
        folder = tempfile.mkdtemp()
        sys.argv = ["isoflat", "reproduce", RECIPE, "--replicates", "1", "--out", folder]
        try:
            run()
        except SystemExit as ended:
            if ended.code not in (0, None):
                raise RuntimeError(f"isoflat reproduce ended with {ended.code}") from None

    return call


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "measure, layerwise": lambda: measured("layerwise"),
    "measure, auto": lambda: measured(None),
    "compare, auto": compared,
    "spectrum, auto": spectrum,
    "reproduce": reproduced,
}


def child(src: Path, case: str) -> None:
    """Count one case and print it as JSON."""
    import torch

    torch.set_num_threads(1)
    census = Census(src / "isoflat")
    call = CASES[case]()
    call()
    census.watch(call)
    counts = {
        "files": len({code.co_filename for code in census.codes}),
        "functions": len(census.codes),
        "named": sum("<" not in code.co_qualname for code in census.codes),
        "depth": census.depth,
    }
    print(json.dumps(counts))


def lines(src: Path) -> Counter[str]:
    """Lines of Python in every folder of the package, and in its own modules."""
    found: Counter[str] = Counter()
    for path in sorted((src / "isoflat").rglob("*.py")):
        inside = path.relative_to(src / "isoflat")
        found[inside.parts[0] if len(inside.parts) > 1 else "(top)"] += len(path.read_text("utf-8").splitlines())
    return found


def counted(src: Path, case: str) -> dict[str, int] | None:
    """The counts of one case from a fresh process; None where it fails, and its complaint on standard error."""
    here = Path(__file__).resolve()
    done = subprocess.run(
        [sys.executable, str(here), "--src", str(src), "--case", case, "--here"],
        env={**os.environ, "PYTHONPATH": str(src), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.stderr.write(f"{case}: {done.stderr}\n")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--src", type=Path, default=SRC, help="folder that holds the package isoflat")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only these; can be repeated")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lines", action="store_true", help="only the lines of each layer, which is immediate")
    asked = parser.parse_args()
    src = asked.src.resolve()
    if asked.here:
        child(src, asked.case[0])
        return
    if not asked.lines:
        print("| call | files | functions | named | depth |\n|---|---:|---:|---:|---:|")
        for case in asked.case or CASES:
            found = counted(src, case)
            cells = ["–"] * 4 if found is None else found.values()
            print("| " + " | ".join(map(str, (case, *cells))) + " |", flush=True)
        print()
    print("| layer | lines |\n|---|---:|")
    layers = lines(src)
    for layer, count in [*layers.most_common(), ("all", layers.total())]:
        print(f"| {layer} | {count} |")


if __name__ == "__main__":
    main()
