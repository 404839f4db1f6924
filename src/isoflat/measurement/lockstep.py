"""The scheduler: coroutines advanced in step, so that one pass over the data serves all that wait for one.

A coroutine yields one of three requests and is sent what it asked for: products with a matrix
(`linalg.solver.PendingProduct`), a sum over the data of something of each batch's output (`curvature.sweeps.Pass`), or the
loss at other weights (`risk.moved.AtWeights`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import IsoflatError
from isoflat.curvature.sweeps import Pass, Sweeps, accumulated
from isoflat.geometry.base import Geometry
from isoflat.linalg.operator import Operator, Pullback
from isoflat.linalg.solver import Domain, Outcome, PendingProduct, Solver, products_of, serve
from isoflat.measures.base import Question, Steps
from isoflat.measures.point import NOT_APPLICABLE, EvaluationPoint
from isoflat.risk.foreign import InWords
from isoflat.risk.moved import AtWeights, evaluate


@final
@dataclass(eq=False)
class Task:
    """A coroutine that is advanced in step with others.

    Attributes:
        start: makes the coroutine, from the answers of the tasks it requires, in order.
        requires: tasks that must have ended before.
        point: the point at which its sums over the data are taken; None for a coroutine that asks for none.
        owner: the task that bears its cost; None for a task that was asked for by itself.
        steps: the coroutine, once it has begun.
        request: the request whose reply it waits for; None where it does not wait.
        value: the answer.
        error: the reason why there is no answer.
        done: True once the answer or the error is known.
        products: Hessian-vector products so far, those with a part of the data by their share of the cost.
        seconds: time spent on it so far, of shared passes its share.
    """

    start: Callable[..., Steps[Any]]
    requires: tuple[Task, ...] = ()
    point: EvaluationPoint | None = None
    owner: Task | None = None
    steps: Steps[Any] | None = None
    request: PendingProduct | Pass | AtWeights | None = None
    value: Any = None
    error: IsoflatError | None = None
    done: bool = False
    products: float = 0.0
    seconds: float = 0.0

    @staticmethod
    def of(solver: Solver[Any], operator: Pullback, stream: torch.Generator) -> Task:
        """A task that runs a solver on an operator."""
        return Task(lambda: products_of(solver, operator, stream))

    def begin(self) -> None:
        """Run up to the first request, unless what is required has failed."""
        self.error = next((task.error for task in self.requires if task.error), None)
        self.done = self.error is not None
        if not self.done:
            self._run(self._first)

    def send(self, reply: Any) -> None:
        """Hand the coroutine the reply it waits for; run up to the next request."""
        assert self.steps is not None
        self._run(self.steps.send, reply)

    def refuse(self, error: IsoflatError) -> None:
        """Raise in the coroutine why its request cannot be met."""
        assert self.steps is not None
        self._run(self.steps.throw, error)

    @property
    def outcome(self) -> Outcome | IsoflatError:
        """The answer with its cost, or why there is none."""
        if self.error is not None:
            return self.error
        borne = sum(task.seconds for task in self.requires if task.owner is self)
        # Shares of a sum add up to one but for rounding.
        return Outcome(self.value, math.ceil(round(self.products, 9)), self.seconds + borne)

    def _first(self) -> PendingProduct | Pass | AtWeights:
        self.steps = self.start(*(task.value for task in self.requires))
        return next(self.steps)

    def _run(self, step: Callable[..., PendingProduct | Pass | AtWeights], *given: Any) -> None:
        started = time.monotonic()
        self.request = None
        try:
            with InWords():
                self.request = step(*given)
        except StopIteration as end:
            self.value, self.done = end.value, True
        except NOT_APPLICABLE as error:
            self.error, self.done = error, True
        self.seconds += time.monotonic() - started


def run_in_lockstep(
    tasks: Sequence[Task], report: Callable[[str], None] = lambda _: None
) -> list[Outcome | IsoflatError]:
    """Run coroutines, and those that they require, in step: each round makes one pass over the data for all that fit into it.

    Products that must be in float64 wait until no others of their operator are asked for, so that they share a pass too;
    where the operator is in float64 itself, they join the others. Of products with parts of a sum the cheapest come first,
    so that those who fall behind catch up with the others before these ask for more.

    Args:
        tasks: the tasks; those they require are run with them.
        report: called with a status line once a round.

    Returns:
        One outcome per task, in order, or why there is none.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.eigen.lanczos import Lanczos
    >>> from isoflat.linalg.maps import Diagonal, Identity
    >>> from isoflat.linalg.operator import Dense
    >>> base = Dense(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)))
    >>> half = Diagonal(torch.tensor([1.0, 2.0], dtype=torch.float64))
    >>> tasks = [Task.of(Lanczos(), Pullback(base, e), stream(0)) for e in (Identity(2), half)]
    >>> [round(outcome.result.top.value, 12) for outcome in run_in_lockstep(tasks)]
    [3.0, 4.0]
    """
    every = list(dict.fromkeys(task for asked in tasks for task in _with_required(asked)))
    doubles: list[tuple[Operator, Operator]] = []
    while True:
        for task in every:  # each comes after those it requires
            if not task.done and task.steps is None and all(other.done for other in task.requires):
                task.begin()
        waiting = [task for task in every if task.request is not None]
        if not waiting:
            return [task.outcome for task in tasks]
        if sweeping := [task for task in waiting if isinstance(task.request, Pass)]:
            _sweep([task for task in sweeping if task.point is sweeping[0].point], report)
        elif moved := [task for task in waiting if isinstance(task.request, AtWeights)]:
            _evaluate(moved, report)
        else:
            _multiply(waiting, doubles, report)


def outcomes(tasks: Sequence[Task], report: Callable[[str], None]) -> list[Outcome]:
    """The outcomes of `run_in_lockstep` where each task must have one.

    Raises:
        IsoflatError: one has none.
    """
    found = []
    for outcome in run_in_lockstep(tasks, report):
        if isinstance(outcome, IsoflatError):
            raise outcome
        found.append(outcome)
    return found


def tasks_of(point: EvaluationPoint, asked: Sequence[tuple[Geometry, Question]]) -> list[Task]:
    """One task for each question in its geometry, in order; equal ones are the same task, and so is what they require.

    Args:
        point: the point at which all of them are asked.
        asked: questions with their geometries.
    """
    made: dict[tuple[Geometry | None, Question], Task] = {}

    def task(geometry: Geometry, question: Question, owner: Task | None) -> Task:
        key = (geometry if question.framed else None, question)
        if key not in made:
            here = point if geometry == point.geometry else point.within(geometry)
            fresh = made[key] = Task(lambda *found: question.steps(here, *found), (), point, owner)
            try:
                fresh.requires = tuple(task(geometry, other, fresh) for other in question.requires(here))
            except NOT_APPLICABLE as error:
                fresh.error, fresh.done = error, True
        return made[key]

    return [task(geometry, question, None) for geometry, question in asked]


def _with_required(task: Task) -> Iterator[Task]:
    """All that a task requires, each after what that requires in turn, and the task itself last."""
    for other in task.requires:
        yield from _with_required(other)
    yield task


def _sweep(group: Sequence[Task], report: Callable[[str], None]) -> None:
    """One pass over the data for all tasks; a pass for each where one of them is refused, to know which."""
    point = group[0].point
    assert point is not None
    wanted = [task.request for task in group if isinstance(task.request, Pass)]
    spent = [0.0] * len(group)

    def timed(place: int, part: Callable[[Sweeps], Tensor]) -> Callable[[Sweeps], Tensor]:
        def run(sweeps: Sweeps) -> Tensor:
            started = time.monotonic()
            found = part(sweeps)
            spent[place] += time.monotonic() - started
            return found

        return run

    report("; ".join(dict.fromkeys(one.status for one in wanted if one.status)))
    started = time.monotonic()
    try:
        passes = [replace(one, part=timed(place, one.part)) for place, one in enumerate(wanted)]
        with InWords():
            sums = accumulated(point.risk, point.state, passes)
    except NOT_APPLICABLE as error:
        if len(group) == 1:
            group[0].refuse(error)
            return
        for task in group:
            _sweep([task], report)
        return
    shared = (time.monotonic() - started - sum(spent)) / len(group)
    for task, own, total in zip(group, spent, sums, strict=True):
        task.seconds += own + shared
        task.send(total)


def _evaluate(waiting: Sequence[Task], report: Callable[[str], None]) -> None:
    """Evaluate losses and gradients at other weights, in one pass over the data for all that can share one with the first."""
    requests = {task: task.request for task in waiting if isinstance(task.request, AtWeights)}
    first = next(iter(requests.values()))
    group = {task: one for task, one in requests.items() if one is first or one.shares_a_pass_with(first)}
    report("; ".join(dict.fromkeys(one.status for one in group.values() if one.status)))
    started = time.monotonic()
    found = evaluate(list(group.values()))
    share = (time.monotonic() - started) / len(group)
    for task, moved in zip(group, found, strict=True):
        task.seconds += share
        task.send(moved)


def _multiply(waiting: Sequence[Task], doubles: list[tuple[Operator, Operator]], report: Callable[[str], None]) -> None:
    """One pass over the data for the cheapest products of the operator that the first task waits for.

    Args:
        waiting: tasks that wait for products.
        doubles: operators with their twins in float64, as far as these were made; more are added.
        report: called with a status line.
    """
    asked = {task: task.request for task in waiting if isinstance(task.request, PendingProduct)}
    base = next(iter(asked.values())).operator.base
    asked = {task: one for task, one in asked.items() if one.operator.base is base}
    precise = next((twin for known, twin in doubles if known is base), None)
    if precise is None and any(one.request.double for one in asked.values()):
        precise = base.double()
        doubles.append((base, precise))
    domain = Domain.of(base)
    wants = {
        task: (one.request.double and precise is not base, domain.share(one.request.parts), one.request.parts)
        for task, one in asked.items()
    }
    first = min(wants.values(), key=lambda want: want[:2])
    group = {task: asked[task] for task, want in wants.items() if want == first}
    report("; ".join(dict.fromkeys(one.request.status for one in group.values() if one.request.status)))
    started = time.monotonic()
    found = serve(list(group.values()), precise if first[0] and precise is not None else base)
    columns = {task: one.request.vectors.shape[1] for task, one in group.items()}
    share = (time.monotonic() - started) / sum(columns.values())
    for task, products in zip(group, found, strict=True):
        task.products += columns[task] * first[1]
        task.seconds += share * columns[task]
        task.send(products)
