"""One line of the table of `benchmarks/peers.py`, and how it is measured in a process of its own."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from answers import Answer, Meter, TimeUp, plain
from contestants import EVERYONE, TRACE
from problems import PROBLEMS, Case, fit, seconds
from safetensors.torch import load_file, save_file

from isoflat.experiments.loop import accuracy, full_loss
from isoflat.risk.plan import peak_memory

LOSSES = {"mlp": (0.03, 60), "lenet": (0.03, 60), "decoder": (0.5, 40)}
"""Training loss at which to stop, and epochs after which to stop anyway."""

REPEAT = 6.0
"""Seconds within which an answer is repeated, three times at most."""


@dataclass(frozen=True)
class Row:
    """One line of the table; what is not known is None.

    Attributes:
        network: key of the problem.
        task: which number.
        name: who answered, and how it was asked.
        target: gradient passes that were aimed at.
        seconds: median over the rounds.
        passes: the same in gradient passes.
        unit: seconds of a gradient pass, median.
        rounds: how often the answer was taken.
        products: Hessian-vector products.
        value: the answer.
        error: distance from the true value, in units of that.
        residual: true residual, in units of the value.
        width: of the interval, in units of the value.
        memory: bytes beyond the gradient passes.
        note: in words.
    """

    network: str
    task: str
    name: str
    target: str = ""
    seconds: float | None = None
    passes: float | None = None
    unit: float | None = None
    rounds: int = 0
    products: float | None = None
    value: float | None = None
    error: float | None = None
    residual: float | None = None
    width: float | None = None
    memory: int | None = None
    note: str = ""

    def line(self) -> str:
        """In Markdown."""
        bounded = "" if self.value is not None else "> "  # a lower bound, where there is no answer
        cells = [
            PROBLEMS[self.network].name,
            self.task,
            self.name,
            "" if self.seconds is None else f"{bounded}{self.seconds:.1f}",
            "" if self.passes is None else f"{bounded}{self.passes:.1f}",
            "" if self.products is None else f"{bounded}{self.products:.4g}",
            "" if self.value is None else f"{self.value:.7g}",
            *("" if share is None else f"{share:.1e}" for share in (self.error, self.residual, self.width)),
            "" if self.memory is None else f"{self.memory / 2**20:.0f} MiB",
            self.target,
            self.note.replace("|", "/"),
        ]
        return f"| {' | '.join(cells)} |"


HEAD = (
    "| network | number | by | seconds | gradient passes | products | value | true error | true residual | width "
    "| extra memory | target | note |\n|" + "---|" * 13
)


def load(key: str, folder: Path) -> Case:
    """A trained network with its data."""
    problem = PROBLEMS[key]
    stored = load_file(folder / f"{key}.safetensors")
    data = stored.pop("inputs"), stored.pop("targets")
    model = problem.build()
    model.load_state_dict(stored)
    return Case.of(problem, model.eval(), data)


def prepared(key: str, folder: Path) -> dict[str, Any]:
    """Train, save, and tell how it went."""
    problem, (target, epochs) = PROBLEMS[key], LOSSES[key]
    data = problem.data()
    model = fit(problem, data, epochs, target)
    weights = model.state_dict()
    save_file({**weights, "inputs": data[0].clone(), "targets": data[1].clone()}, folder / f"{key}.safetensors")
    return {
        "network": key,
        "name": problem.name,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "rows": len(data[1]),
        "batch": problem.rows,
        "loss": full_loss(model, data),
        "accuracy": accuracy(model, data),
    }


def answered(key: str, task: str, name: str, folder: Path, limit: float) -> Row:
    """Rounds of gradient pass and answer.

    Args:
        key: of the problem.
        task: of the contestant: contestants are functions, which do not travel between processes, but their names do.
        name: of the contestant.
        folder: where the trained network is.
        limit: seconds of an answer.
    """
    contestant = next(c for c in EVERYONE if (c.task, c.name) == (task, name))
    case, meter = load(key, folder), Meter(limit)
    work = contestant.prepare(case, meter)
    row = Row(key, contestant.task, contestant.name, contestant.targets.get(key, ""))
    case.gradient()  # what happens once
    units, spent = [seconds(case.gradient)], []
    before = peak_memory(case.state.device)
    memory, answer = 0, None
    while len(spent) < 3 and sum(spent) + (spent[-1] if spent else 0) <= REPEAT:
        meter.start()
        started = time.perf_counter()
        try:
            with plain():
                answer = work()
        except TimeUp as ended:
            row = replace(row, note=str(ended))
        spent.append(time.perf_counter() - started)
        memory = memory or peak_memory(case.state.device) - before
        units.append(seconds(case.gradient))
    local = [2 * s / (a + b) for s, (a, b) in zip(spent, pairwise(units), strict=True)]
    row = replace(
        row,
        seconds=median(spent),
        passes=median(local),
        unit=median(units),
        rounds=len(spent),
        products=meter.products or None,
        memory=memory,
    )
    return row if answer is None else judged(row, answer, case)


def judged(row: Row, answer: Answer, case: Case) -> Row:
    """With the answer's residual and width."""
    residual = answer.residual
    if answer.vector is not None:
        vector = answer.vector.double() / answer.vector.double().norm()
        residual = float((case.exact()(vector) - answer.value * vector).norm())
    size = abs(answer.value)
    width = answer.upper - answer.lower
    return replace(
        row,
        products=row.products if answer.products is None else answer.products,
        value=size if row.task != TRACE else answer.value,
        residual=None if residual is None or not size else residual / size,
        width=width / size if math.isfinite(width) and size else None,
        note=answer.note,
    )


def child(pipe: Connection, threads: int, work: Callable[..., Any], *args: Any) -> None:
    """Run something, and send what comes of it."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # the peers' own, about their own ways
    try:
        pipe.send(work(*args))
    except Exception as error:  # noqa: BLE001  whatever a peer raises is a row of the table
        first = (str(error).strip().splitlines() or [""])[0]
        pipe.send(f"{type(error).__name__}: {first}")
