"""Readings in step: each says what it wants of a pass over the data, and one pass serves all that wait for one."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from isoflat.core.errors import IsoflatError
from isoflat.curvature.sweeps import Pass, Sweeps, accumulated
from isoflat.geometry.base import Geometry
from isoflat.linalg.solver import Outcome
from isoflat.measurement.scribe import NOT_APPLICABLE
from isoflat.measures.base import DataStatistic, Scene

Key = tuple[Geometry | None, DataStatistic]
"""Readings that are one: the geometry counts only where the answer depends on it."""


def answered(asked: Sequence[tuple[Scene, DataStatistic]]) -> list[Outcome | IsoflatError]:
    """The answers in order, each made once, or why there is none; what several of them need is billed to the first.

    Args:
        asked: readings at one place.
    """
    tasks: dict[Key, _Task] = {}
    found = [_task(tasks, scene, reading) for scene, reading in asked]
    while True:
        for task in found:
            _advance(tasks, task)
        waiting = [task for task in tasks.values() if isinstance(task.wants, Pass)]
        if not waiting:
            return [task.error or Outcome(task.value, 0, task.seconds) for task in found]
        _serve(waiting)


@final
@dataclass(eq=False)
class _Task:
    """A reading under way.

    Attributes:
        scene: where.
        reading: which.
        steps: its coroutine, once it has begun and is one.
        wants: what that waits for.
        value: the answer.
        error: why there is none.
        done: whether either is known.
        billed: whether its cost is part of another's.
        seconds: spent on it.
    """

    scene: Scene
    reading: DataStatistic
    steps: Generator[DataStatistic | Pass, Any, Any] | None = None
    wants: DataStatistic | Pass | None = None
    value: Any = None
    error: IsoflatError | None = None
    done: bool = False
    billed: bool = True
    seconds: float = 0.0

    def begin(self) -> None:
        """Up to the first wish."""
        self._step(self._begun)

    def give(self, value: Any) -> None:
        """What it waits for, up to the next wish."""
        steps = self.steps
        assert steps is not None
        self._step(lambda: steps.send(value))

    def refuse(self, error: IsoflatError) -> None:
        """Why there is no such thing."""
        steps = self.steps
        assert steps is not None
        self._step(lambda: steps.throw(error))

    def _begun(self) -> DataStatistic | Pass:
        made = self.reading.answer(self.scene)
        if not isinstance(made, Generator):
            raise StopIteration(made)
        self.steps = made
        return next(made)

    def _step(self, run: Callable[[], DataStatistic | Pass]) -> None:
        started = time.monotonic()
        self.wants = None
        try:
            self.wants = run()
        except StopIteration as end:
            self.value, self.done = end.value, True
        except NOT_APPLICABLE as error:
            self.error, self.done = error, True
        self.seconds += time.monotonic() - started


def _task(tasks: dict[Key, _Task], scene: Scene, reading: DataStatistic) -> _Task:
    return tasks.setdefault((scene.geometry if reading.framed else None, reading), _Task(scene, reading))


def _advance(tasks: dict[Key, _Task], task: _Task) -> None:
    """As far as a reading comes without another pass over the data."""
    if not task.done and task.steps is None:
        task.begin()
    while isinstance(task.wants, DataStatistic):
        fresh = len(tasks)
        other = _task(tasks, task.scene, task.wants)
        if len(tasks) > fresh:
            other.billed = False
        _advance(tasks, other)
        if not other.done:
            return
        if not other.billed:
            task.seconds, other.billed = task.seconds + other.seconds, True
        if other.error:
            task.refuse(other.error)
        else:
            task.give(other.value)


def _serve(waiting: list[_Task]) -> None:
    """One pass over the data for all; one for each where that does not work for one of them, to know for which."""
    scene = waiting[0].scene
    spent = [0.0] * len(waiting)

    def timed(place: int, part: Callable[[Sweeps], Tensor]) -> Callable[[Sweeps], Tensor]:
        def run(sweeps: Sweeps) -> Tensor:
            started = time.monotonic()
            found = part(sweeps)
            spent[place] += time.monotonic() - started
            return found

        return run

    passes = [task.wants for task in waiting if isinstance(task.wants, Pass)]
    started = time.monotonic()
    try:
        wanted = [replace(one, part=timed(place, one.part)) for place, one in enumerate(passes)]
        sums = accumulated(scene.risk, scene.state, wanted)
    except NOT_APPLICABLE as error:
        if len(waiting) == 1:
            waiting[0].refuse(error)
            return
        for task in waiting:
            _serve([task])
        return
    shared = (time.monotonic() - started - sum(spent)) / len(waiting)
    for task, own, total in zip(waiting, spent, sums, strict=True):
        task.seconds += own + shared
        task.give(total)
