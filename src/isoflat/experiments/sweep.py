"""Training and measuring of many networks: each once, by whichever worker comes to it first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from joblib import Parallel, delayed
from torch import nn

from isoflat.core.errors import UsageError
from isoflat.core.raised import first_line
from isoflat.experiments import cells
from isoflat.experiments.cells import MeasuredNetwork, NetworkTask, train_and_measure
from isoflat.experiments.data import Split
from isoflat.experiments.loop import one_thread
from isoflat.experiments.numbers import Number
from isoflat.experiments.progress import Report, silent
from isoflat.experiments.recipe import Recipe
from isoflat.experiments.store import Store
from isoflat.measurement.run import opened, planned
from isoflat.measurement.subject import subject
from isoflat.measures.catalogue import find_measure
from isoflat.measures.settings import Settings
from isoflat.risk.ranks import Ranks
from isoflat.symmetry.finding.discover import symmetries

FEW = 4
"""Number of rows that a network is traced and tried on."""

PAUSE = 1.0
"""Seconds between two looks at a cell that another process is computing."""


def tasks(recipe: Recipe) -> tuple[NetworkTask, ...]:
    """Tasks for every network of an experiment; arms alternate, so that the time left is foreseen well."""
    return tuple(NetworkTask(recipe, arm, replicate) for replicate in range(recipe.replicates) for arm in recipe.arms)


def check_recipe(recipe: Recipe, data: Split, numbers: Sequence[Number]) -> None:
    """Refuse, before anything is trained, a recipe that cannot be followed for any network of an arm.

    Every architecture is built, traced where that is needed, and prepared for its numbers on a few rows; nothing is measured.

    Args:
        recipe: recipe of the experiment.
        data: rows to train and measure on.
        numbers: numbers to measure.

    Raises:
        IsoflatError: a network cannot be built or traced, or a setting has no meaning.
    """
    settings, dtype = Settings(rtol=recipe.rtol, seed=recipe.seed), getattr(torch, recipe.dtype)
    for number in numbers:
        find_measure(number.measure).questions(settings)
    inputs, targets = (part[:FEW] for part in data.train)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    seen: list[dict[str, Any]] = []
    for task in (NetworkTask(recipe, arm, 0) for arm in recipe.arms):
        if task.arm.network in seen:
            continue
        seen.append(task.arm.network)
        model = cells.initial_network(task, data).eval().to(dtype)
        try:
            nn.CrossEntropyLoss()(model(inputs), targets)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # as torch refuses shapes and types
            raise UsageError(
                f"recipe {recipe.name}: {task.label} does not run on {data.name}: {first_line(error)}"
            ) from error
        if recipe.edit is not None:
            cells.edited(model, recipe.edit.weights, recipe.edit.biases)
        elif recipe.orbit:
            symmetries(model, inputs)
        for logits in dict.fromkeys(number.logits for number in numbers):
            subject(model, [(inputs, targets)], nn.CrossEntropyLoss(), Settings(logits=logits))
        plan = planned([number.measure for number in numbers], [number.geometry for number in numbers])
        prepare = partial(subject, model, [(inputs, targets)], nn.CrossEntropyLoss())
        with opened(prepare, plan, settings, Ranks(), task.label):
            pass  # opening traces the network for the geometries that are asked for


def sweep(
    todo: Sequence[NetworkTask],
    data: Split,
    numbers: Sequence[Number],
    store: Store,
    report: Report = silent,
    jobs: int = 1,
) -> tuple[MeasuredNetwork, ...]:
    """Train and measure all networks; those that are in the store already are read from there.

    On a processor every worker has one thread, so that results do not depend on how many workers there are. In a process
    group of torch.distributed all processes are at the same network, one after the other.

    Args:
        todo: tasks, one for each network.
        data: rows to train and measure on.
        numbers: numbers to measure.
        store: store for the results; other processes may be at work in it.
        report: function that is told what is being done, and how many networks were done since the last call.
        jobs: number of processes; on an accelerator they share it and its memory.

    Returns:
        The measured networks, in the order of their tasks.

    Raises:
        IsoflatError: a cell of the store is damaged, or a process of the group is gone.
    """
    if jobs < 1:
        raise UsageError(f"the number of jobs must be positive, got {jobs}")
    if jobs > 1 and Ranks.here().world > 1:
        raise UsageError(f"processes that share every network have one job, got {jobs}")
    left = list(enumerate(todo))
    done: dict[int, MeasuredNetwork] = {}
    while left:
        if jobs > 1 and len(left) > 1:
            made = _side_by_side(left, data, numbers, store, report, jobs)
        else:
            made = _in_turn(left, data, numbers, store, report)
        for place, network in made:
            if network is not None:
                done[place] = network
        left = [(place, task) for place, task in left if place not in done]
        if left:
            report(f"waiting for {left[0][1].label}, which another process is at", 0.0)
            time.sleep(PAUSE)
    return tuple(done[place] for place in range(len(todo)))


def _in_turn(
    left: Sequence[tuple[int, NetworkTask]], data: Split, numbers: Sequence[Number], store: Store, report: Report
) -> Iterator[tuple[int, MeasuredNetwork | None]]:
    for place, task in left:
        told = 0.0

        def progress(text: str, done: float) -> None:
            nonlocal told
            told += done
            report(text, done)

        with one_thread():
            network = train_and_measure(task, data, numbers, store, progress)
        if network is not None:
            report(f"{task.label} is there", max(0.0, 1 - told))
        yield place, network


def _side_by_side(
    left: Sequence[tuple[int, NetworkTask]],
    data: Split,
    numbers: Sequence[Number],
    store: Store,
    report: Report,
    jobs: int,
) -> Iterator[tuple[int, MeasuredNetwork | None]]:
    device = data.train[0].device
    arrays = [part.numpy(force=True) for pair in (data.train, data.test) for part in pair]
    # Copies on writing: workers share one copy of the data in memory.
    parallel = Parallel(n_jobs=jobs, return_as="generator_unordered", mmap_mode="c")
    calls = (
        delayed(_worker)(place, task, (data.name, data.vocabulary, arrays, device), numbers, store)
        for place, task in left
    )
    report(f"{len(left)} networks, {jobs} at a time", 0.0)
    for place, network in parallel(calls):
        if network is not None:
            report(f"{network.label} is there", 1.0)
        yield place, network


def _worker(
    place: int,
    task: NetworkTask,
    content: tuple[str, str, Sequence[Any], torch.device],
    numbers: Sequence[Number],
    store: Store,
) -> tuple[int, MeasuredNetwork | None]:
    name, vocabulary, arrays, device = content
    inputs, targets, others, rest = (torch.from_numpy(array).to(device) for array in arrays)
    data = Split(name, (inputs, targets), (others, rest), vocabulary)
    with one_thread():
        return place, train_and_measure(task, data, numbers, store, silent)
