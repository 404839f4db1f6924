"""Training and measuring of one network of an experiment; each is done once, and its result kept in a cell of the store.

A cell of either kind is addressed by everything that its result depends on. Training knows nothing of what is measured, and
a measurement knows the training it is of, so that asking for another number trains nothing anew.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from isoflat.core.errors import IsoflatError, NonFinite, RankLost, RanksDiffer, UsageError
from isoflat.core.plain import adapter, plain
from isoflat.core.rng import stream
from isoflat.core.table import Omission, Table
from isoflat.experiments import families
from isoflat.experiments.checkpoint import Checkpoint
from isoflat.experiments.data import Split
from isoflat.experiments.loop import VERSION, Training, accuracy, full_loss, train
from isoflat.experiments.numbers import Number
from isoflat.experiments.progress import Report, shares
from isoflat.experiments.recipe import Arm, Recipe
from isoflat.experiments.store import Artifact, Store, address
from isoflat.measurement.run import measure_all
from isoflat.measures.catalogue import find_measure
from isoflat.risk.ranks import Ranks
from isoflat.symmetry.canonical.representative import reparametrize
from isoflat.symmetry.finding.discover import symmetries
from isoflat.symmetry.found import VERSION as RULES

T = TypeVar("T")

POINTS = 2
"""Version of the points of an orbit; raised whenever others are drawn."""

EPOCHS = 10
"""Number of epochs between two checkpoints of a training."""

TRAINING = 0.7
"""Share of a cell's time that training is taken to need, for the progress bar."""

FEW_ROWS, ROWS = 250, 2000
"""Rows per batch while measuring: on a processor, whose allocator keeps small pieces from one Hessian-vector product to the
next; and on accelerators, which want large ones."""


@final
@dataclass(frozen=True)
class NetworkTask:
    """A network to train and measure.

    Attributes:
        recipe: recipe of the experiment.
        arm: way of training.
        replicate: position within the arm; networks of the same position start from the same weights.
    """

    recipe: Recipe
    arm: Arm
    replicate: int

    @property
    def label(self) -> str:
        """Name of the network: its arm and its replicate."""
        return f"{self.arm.name} {self.replicate}"

    def training(self, data: Split) -> dict[str, Any]:
        """Settings of the training cell: everything that the trained weights depend on."""
        recipe = self.recipe
        return {
            "kind": "training",
            "data": recipe.data.model_dump(exclude={"measured"}),
            "data_hash": data.hash,
            "network": {**recipe.network.model_dump(mode="json"), **self.arm.network},
            "arm": self.arm.name,
            "training": self.arm.training.model_dump(),
            "trained": recipe.edit is None,
            "replicate": self.replicate,
            "seed": recipe.seed,
            "versions": {"isoflat": version("isoflat"), "torch": torch.__version__, "loop": VERSION},
        }

    def measurement(self, data: Split, numbers: Sequence[Number]) -> dict[str, Any]:
        """Settings of the measurement cell: everything that the numbers depend on."""
        recipe = self.recipe
        return {
            "kind": "measurement",
            "of": address(self.training(data)),
            "measured": recipe.data.measured,
            "numbers": [number.name for number in numbers],
            "rtol": recipe.rtol,
            "dtype": recipe.dtype,
            "orbit": recipe.orbit,
            "spread": recipe.spread,
            "edit": None if recipe.edit is None else recipe.edit.model_dump(mode="json"),
            "seed": recipe.seed,
            "versions": {
                "isoflat": version("isoflat"),
                "torch": torch.__version__,
                "rules": str(RULES),
                "points": POINTS,
            },
        }


@final
@dataclass(frozen=True)
class MeasuredNetwork:
    """A network of an experiment, trained and measured.

    Attributes:
        task: recipe, arm and replicate of the network.
        training: outcome of the training; where it diverged the loss is infinite, and steps and epochs are 0.
        train_error: share of the training rows, as labelled in training, that it gets wrong; None where training diverged.
        test_error: share of the held-out rows that it gets wrong; None where nothing is held out, or training diverged.
        test_loss: mean cross-entropy on the held-out rows; None where nothing is held out, or training diverged.
        table: every number at the weights as trained; numbers that cannot be measured are omitted, with the reason.
        moved: every number at other weights with the same function: at random points of the orbit, or after an edit.
        seconds: seconds that training and measuring took when they were done.
        diverged: message of the error with which training diverged; empty where it did not.
    """

    task: NetworkTask
    training: Training
    train_error: float | None
    test_error: float | None
    test_loss: float | None
    table: Table
    moved: tuple[Table, ...]
    seconds: float
    diverged: str = ""

    @property
    def label(self) -> str:
        """Name of the network: its arm and its replicate."""
        return self.task.label


def decided(ranks: Ranks, work: Callable[[], T]) -> T:
    """Let the first of several processes do some work alone; all go on with its outcome, or raise its error.

    >>> decided(Ranks(), lambda: 3)
    3
    """
    with ranks.agreeing():
        outcome = [work()] if ranks.first else []
    return ranks.from_first(outcome)[0]


def train_and_measure(
    task: NetworkTask, data: Split, numbers: Sequence[Number], store: Store, report: Report
) -> MeasuredNetwork | None:
    """Train and measure a network, or read from the store what was done before.

    In a process group every process trains the same, all go on with the weights of the first, and share the measurement;
    the first alone uses the store. A training that diverges, and a number that cannot be measured, are results as well.

    Args:
        task: recipe, arm and replicate of the network.
        data: rows to train and measure on.
        numbers: numbers to measure.
        store: store for the results.
        report: function that is told what is going on.

    Returns:
        The measured network; None where another process is working on it.

    Raises:
        DataError: a cell of the store is damaged.
        RankLost: a process of the group is gone.
    """
    wanted, ranks = task.measurement(data, numbers), Ranks.here()
    with ExitStack() as held:
        if not decided(ranks, lambda: held.enter_context(store.claim(wanted["of"]))):
            return None
        trained = decided(ranks, lambda: store.get(wanted["of"])) or _trained(task, data, store, report)
        measured = None
        if "diverged" not in trained.result:
            there = decided(ranks, lambda: store.get(address(wanted)))
            measured = there or _measured(task, data, numbers, trained, store, report)
    report(f"{task.label} is there", 0.0)
    return assembled(task, trained, measured)


def assembled(task: NetworkTask, trained: Artifact, measured: Artifact | None) -> MeasuredNetwork:
    """A network put together from its cells in the store; one that diverged has a training and no measurement."""
    if measured is None:
        gone = adapter(_Diverged).validate_python(trained.result)
        training = Training(math.inf, reached=False, steps=0, epochs=0.0, seconds=gone.seconds)
        return MeasuredNetwork(task, training, None, None, None, Table(()), (), gone.seconds, gone.diverged)
    there = adapter(_TrainingResult).validate_python(trained.result)
    table, *moved = [Table.from_dict(rows) for rows in measured.result["points"]]
    seconds = there.training.seconds + adapter(float).validate_python(measured.result["seconds"])
    errors = (there.train_error, there.test_error, there.test_loss)
    return MeasuredNetwork(task, there.training, *errors, table, tuple(moved), seconds)


@final
@dataclass(frozen=True)
class _TrainingResult:
    """The result of a cell whose training went well."""

    training: Training
    train_error: float
    test_error: float | None
    test_loss: float | None


@final
@dataclass(frozen=True)
class _Diverged:
    """The result of a cell whose training diverged."""

    diverged: str
    seconds: float


def initial_network(task: NetworkTask, data: Split) -> nn.Module:
    """Build the network of a task with its initial weights."""
    recipe = task.recipe
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in {**recipe.network.arguments, **task.arm.network}.items()
    }
    if data.vocabulary:
        given["vocabulary"] = len(data.vocabulary)
    build = families.find(recipe.network.family)
    try:
        model = build(**given, seed=stream(recipe.seed, "network", task.replicate).initial_seed())
    except TypeError as error:
        raise UsageError(
            f"recipe {recipe.name}: the family {recipe.network.family} cannot be built: {error}"
        ) from error
    return model.to(data.train[0].device)


def _trained(task: NetworkTask, data: Split, store: Store, report: Report) -> Artifact:
    recipe, arm = task.recipe, task.arm
    settings = task.training(data)
    model, noisy = initial_network(task, data), labelled(data, arm.training.noise, recipe.seed)
    ranks, started = Ranks.here(), time.monotonic()
    progress = shares(report, f"training {task.label}", TRAINING)

    def trained(checkpoint: Checkpoint | None) -> dict[str, Any]:
        if recipe.edit is None:
            order = stream(recipe.seed, "order", arm.name, task.replicate)
            training = train(model, noisy, arm.training.regime(), order, progress, checkpoint)
        else:
            model.eval()
            training = Training(full_loss(model, noisy), True, 0, 0.0, 0.0)
        held = len(data.test[1]) > 0
        return {
            "training": plain(training),
            "train_error": 1 - accuracy(model, noisy),
            "test_error": 1 - accuracy(model, data.test) if held else None,
            "test_loss": full_loss(model, data.test) if held else None,
        }

    report(f"training {task.label}", 0.0)
    checkpoint = None if recipe.edit is not None else _checkpoint(task, address(settings), store, ranks)
    try:
        with ranks.agreeing():
            result = trained(checkpoint)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    except NonFinite as error:
        result, tensors = {"diverged": str(error), "seconds": time.monotonic() - started}, None
    return decided(ranks, lambda: store.put(settings, result, tensors))


def _checkpoint(task: NetworkTask, where: str, store: Store, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint of a training: the first process writes it, the others only resume from it, so as not to fall behind."""
    folder = decided(ranks, lambda: store.scratch(where))
    if not folder.is_dir():
        return None
    return Checkpoint(folder / "training.pt", EPOCHS if ranks.first else task.arm.training.epochs + 1)


def _measured(
    task: NetworkTask, data: Split, numbers: Sequence[Number], trained: Artifact, store: Store, report: Report
) -> Artifact:
    recipe, ranks = task.recipe, Ranks.here()
    model = initial_network(task, data)
    model.load_state_dict(decided(ranks, trained.tensors))
    model.eval().to(getattr(torch, recipe.dtype))
    rows = slice(recipe.data.measured)
    inputs, targets = (part[rows] for part in labelled(data, task.arm.training.noise, recipe.seed))
    inputs = inputs.to(getattr(torch, recipe.dtype)) if inputs.is_floating_point() else inputs
    before = initial_network(task, data) if any(find_measure(number.measure).prior for number in numbers) else None
    started = time.monotonic()
    twins: Sequence[nn.Module] = ()
    lost: list[Table] = []
    try:
        twins = _twins(task, model, inputs)
    except IsoflatError as error:
        gone = Table((), tuple(_omission(number, error, task.label) for number in numbers))
        lost = [gone] * (recipe.orbit or 1)
    points = []
    for place, twin in enumerate((model, *twins)):
        report(f"measuring {task.label}" + (f", moved {place}" if place else ""), 0.0)
        points.append(_numbers(twin, (inputs, targets), numbers, task, before))
        report(f"measured {task.label}", (1 - TRAINING) / (1 + len(twins)))
    result = {"points": [table.to_dict() for table in (*points, *lost)], "seconds": time.monotonic() - started}
    return decided(ranks, lambda: store.put(task.measurement(data, numbers), result, None))


def _twins(task: NetworkTask, model: nn.Module, inputs: Tensor) -> Sequence[nn.Module]:
    """Copies with other weights and the same function: after the recipe's edit, or at random points of the orbit."""
    recipe = task.recipe
    if recipe.edit is not None:
        return [edited(model, recipe.edit.weights, recipe.edit.biases)]
    if not recipe.orbit:
        return []
    found = symmetries(model, inputs[:4])
    seeds = (stream(recipe.seed, "orbit", task.arm.name, task.replicate, k).initial_seed() for k in range(recipe.orbit))
    return [reparametrize(model, found, seed=seed, spread=recipe.spread) for seed in seeds]


def edited(model: nn.Module, weights: Sequence[float], biases: Sequence[float]) -> nn.Module:
    """A copy with the weight and bias of each linear layer multiplied by its own factors.

    Raises:
        UsageError: the numbers of layers and of factors differ.
    """
    twin = copy.deepcopy(model)
    layers = [module for module in twin.modules() if isinstance(module, nn.Linear)]
    if not len(layers) == len(weights) == len(biases):
        raise UsageError(
            f"{len(layers)} linear layers, but factors for {len(weights)} weights and {len(biases)} biases"
        )
    with torch.no_grad():
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            layer.weight.mul_(weight)
            if layer.bias is not None:
                layer.bias.mul_(bias)
    return twin


def labelled(data: Split, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Training rows, with a share of the labels drawn anew, uniformly over the classes there are.

    More noise keeps the labels that less noise has drawn.
    """
    inputs, targets = data.train
    if not noise:
        return inputs, targets
    drawing = stream(seed, "noise")
    order = torch.randperm(targets.numel(), generator=drawing)
    drawn = torch.randint(int(targets.max()) + 1, (targets.numel(),), generator=drawing)
    chosen = order[: round(noise * targets.numel())]
    changed = targets.flatten().clone()
    changed[chosen.to(changed.device)] = drawn[chosen].to(changed)
    return inputs, changed.view_as(targets)


def _numbers(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    numbers: Sequence[Number],
    task: NetworkTask,
    before: nn.Module | None,
) -> Table:
    """Every number of one network: those with the same scores share their passes over the data."""
    recipe = task.recipe
    most = FEW_ROWS if data[1].device.type == "cpu" else ROWS
    rows = min(most, -(-len(data[1]) // Ranks.here().world))  # some for every process
    batches = list(zip(data[0].split(rows), data[1].split(rows), strict=True))

    def measured(chosen: Sequence[Number]) -> Table:
        """Measure numbers together; where that is refused each by itself, and what is still refused is omitted."""
        try:
            return measure_all(
                model,
                batches,
                nn.CrossEntropyLoss(),
                measures=list(dict.fromkeys(number.measure for number in chosen)),
                geometry=list(dict.fromkeys(number.geometry for number in chosen)),
                rtol=recipe.rtol,
                logits=chosen[0].logits,
                initial=before,
                seed=recipe.seed,
                label=task.label,
            )
        except (RankLost, RanksDiffer):
            raise
        except IsoflatError as error:
            if len(chosen) == 1:
                return Table((), (_omission(chosen[0], error, task.label),))
        return _joined(measured([number]) for number in chosen)

    tables = []
    for logits in dict.fromkeys(number.logits for number in numbers):
        chosen = [number for number in numbers if number.logits == logits]
        tables.append(measured(chosen).only({(number.measure, number.geometry) for number in chosen}))
    return _joined(tables)


def _joined(tables: Iterable[Table]) -> Table:
    tables = tuple(tables)
    return Table(
        tuple(row for table in tables for row in table), tuple(part for table in tables for part in table.omitted)
    )


def _omission(number: Number, error: IsoflatError, label: str) -> Omission:
    return Omission(number.measure, number.geometry, str(error), label)
