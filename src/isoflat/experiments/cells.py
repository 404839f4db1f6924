"""One network of an experiment: trained once, measured once for every question, and kept.

A cell of either kind is addressed by everything that its result depends on. Training knows nothing of what is measured, and
a measurement knows the training it is of, so that asking for another number trains nothing anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, final

import torch
from torch import Tensor, nn

from isoflat.core.errors import UsageError
from isoflat.core.record import Record
from isoflat.core.streams import stream
from isoflat.core.table import Omission, Table
from isoflat.experiments import families
from isoflat.experiments.checkpoint import Checkpoint
from isoflat.experiments.data import Split
from isoflat.experiments.loop import VERSION, Training, accuracy, full_loss, train
from isoflat.experiments.numbers import Number
from isoflat.experiments.recipe import Arm, Recipe
from isoflat.experiments.store import Cell, Store, address
from isoflat.measures.run import measure_all
from isoflat.symmetry.canonical import reparametrize
from isoflat.symmetry.discover import symmetries
from isoflat.symmetry.found import VERSION as RULES

Report = Callable[[str, float], None]
"""Told what is being done, and which share of the cell has been done since the last call."""

EPOCHS = 10
"""Between two checkpoints of a training."""

TRAINING = 0.7
"""Share of a cell's time that training is taken to need, for the progress bar."""

ROWS = 1000
"""Rows per batch while measuring."""


@final
@dataclass(frozen=True)
class Task:
    """A network to train and measure.

    Attributes:
        recipe: of the experiment.
        arm: how it is trained.
        replicate: its number within the arm; networks of the same number start from the same weights.
    """

    recipe: Recipe
    arm: Arm
    replicate: int

    @property
    def label(self) -> str:
        """Arm and number."""
        return f"{self.arm.name} {self.replicate}"

    def training(self, data: Split) -> dict[str, Any]:
        """Everything that its weights depend on."""
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
        """Everything that its numbers depend on."""
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
            "versions": {"isoflat": version("isoflat"), "torch": torch.__version__, "rules": str(RULES)},
        }


@final
@dataclass(frozen=True)
class Measured:
    """A trained and measured network.

    Attributes:
        task: how it was made.
        training: how that went.
        train_error: share of the training rows, as labelled in training, that it gets wrong.
        test_error: share of the held-out rows; NaN-free: None where nothing is held out.
        test_loss: mean cross-entropy there.
        table: every number at the weights as trained.
        moved: the same at other weights with the same function: random points of the orbit, or after the recipe's edit.
        seconds: that training and measuring took when they were done.
    """

    task: Task
    training: Training
    train_error: float
    test_error: float | None
    test_loss: float | None
    table: Table
    moved: tuple[Table, ...]
    seconds: float

    @property
    def label(self) -> str:
        """Arm and number."""
        return self.task.label

    def record(self, number: Number) -> Record | None:
        """One of its numbers, if it applies."""
        return found(self.table, number)


def found(table: Table, number: Number) -> Record | None:
    """A number in a table, if it applies."""
    key = (number.measure, number.geometry, number.logits or "raw")
    return next((row for row in table if (row.measure, row.geometry, row.settings["logits"]) == key), None)


def run(task: Task, data: Split, numbers: Sequence[Number], store: Store, report: Report) -> Measured | None:
    """Train and measure, or read what was done before.

    Args:
        task: which network.
        data: what to train and measure on.
        numbers: what to measure.
        store: where results are kept.
        report: told what is going on.

    Returns:
        The network's numbers; None where another process is at it.

    Raises:
        NonFinite: the training diverged.
        DataError: a cell of the store is damaged.
    """
    wanted = task.measurement(data, numbers)
    with store.claim(wanted["of"]) as mine:
        if not mine:
            return None
        trained = store.get(wanted["of"]) or _trained(task, data, store, report)
        measured = store.get(address(wanted)) or _measured(task, data, numbers, trained, store, report)
    report(f"{task.label} is there", 0.0)
    return read(task, trained, measured)


def read(task: Task, trained: Cell, measured: Cell) -> Measured:
    """From what is kept."""
    result = trained.result
    told: dict[str, Any] = {**result["training"], "history": tuple(map(tuple, result["training"]["history"]))}
    training = Training(**told)
    tables = [_table(rows) for rows in measured.result["points"]]
    return Measured(
        task,
        training,
        result["train_error"],
        result["test_error"],
        result["test_loss"],
        tables[0],
        tuple(tables[1:]),
        training.seconds + measured.result["seconds"],
    )


def network(task: Task, data: Split) -> nn.Module:
    """With its initial weights."""
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


def _trained(task: Task, data: Split, store: Store, report: Report) -> Cell:
    recipe, arm = task.recipe, task.arm
    settings = task.training(data)
    model, noisy = network(task, data), labelled(data, arm.training.noise, recipe.seed)
    reached = 0.0

    def progress(share: float) -> None:
        nonlocal reached
        report(f"training {task.label}", TRAINING * max(0.0, share - reached))
        reached = max(reached, share)

    report(f"training {task.label}", 0.0)
    if recipe.edit is None:
        checkpoint = Checkpoint(store.scratch(address(settings)) / "training.pt", EPOCHS)
        order = stream(recipe.seed, "order", arm.name, task.replicate)
        training = train(model, noisy, arm.training.regime(), order, progress, checkpoint)
    else:
        model.eval()
        training = Training(full_loss(model, noisy), True, 0, 0.0, 0.0)
    held = len(data.test[1]) > 0
    result = {
        "training": dict(vars(training)),
        "train_error": 1 - accuracy(model, noisy),
        "test_error": 1 - accuracy(model, data.test) if held else None,
        "test_loss": full_loss(model, data.test) if held else None,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return store.put(settings, result, tensors)


def _measured(task: Task, data: Split, numbers: Sequence[Number], trained: Cell, store: Store, report: Report) -> Cell:
    recipe = task.recipe
    model = network(task, data)
    model.load_state_dict(trained.tensors())
    model.eval().to(getattr(torch, recipe.dtype))
    rows = slice(recipe.data.measured)
    inputs, targets = (part[rows] for part in labelled(data, task.arm.training.noise, recipe.seed))
    inputs = inputs.to(getattr(torch, recipe.dtype)) if inputs.is_floating_point() else inputs
    started = time.monotonic()
    twins = tuple(_twins(task, model, inputs))
    points = []
    for place, twin in enumerate((model, *twins)):
        report(f"measuring {task.label}" + (f", moved {place}" if place else ""), 0.0)
        points.append(_numbers(twin, (inputs, targets), numbers, recipe, task.label))
        report(f"measured {task.label}", (1 - TRAINING) / (1 + len(twins)))
    result = {"points": points, "seconds": time.monotonic() - started}
    return store.put(task.measurement(data, numbers), result, None)


def _twins(task: Task, model: nn.Module, inputs: Tensor) -> Sequence[nn.Module]:
    """The same function with other weights: after the recipe's edit, or at random points of the orbit."""
    recipe = task.recipe
    if recipe.edit is not None:
        return [edited(model, recipe.edit.weights, recipe.edit.biases)]
    if not recipe.orbit:
        return []
    found = symmetries(model, inputs[:4])
    return [
        reparametrize(model, found, seed=stream(recipe.seed, "orbit", task.replicate, place).initial_seed(), spread=recipe.spread)
        for place in range(recipe.orbit)
    ]  # fmt: skip


def edited(model: nn.Module, weights: Sequence[float], biases: Sequence[float]) -> nn.Module:
    """A copy with the weight and bias of each linear layer multiplied by its own factors.

    Raises:
        UsageError: there are other numbers of layers and factors.
    """
    import copy

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
    """The training rows, a share of whose labels is drawn anew, uniformly over the classes there are.

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
    model: nn.Module, data: tuple[Tensor, Tensor], numbers: Sequence[Number], recipe: Recipe, label: str
) -> dict[str, Any]:
    """Every number of one network as JSON: those with the same scores share their passes over the data."""
    batches = list(zip(data[0].split(ROWS), data[1].split(ROWS), strict=True))
    rows: list[Any] = []
    omitted: list[Any] = []
    for logits in dict.fromkeys(number.logits for number in numbers):
        chosen = [number for number in numbers if number.logits == logits]
        table = measure_all(
            model,
            batches,
            nn.CrossEntropyLoss(),
            measures=list(dict.fromkeys(number.measure for number in chosen)),
            geometry=list(dict.fromkeys(number.geometry for number in chosen)),
            rtol=recipe.rtol,
            logits=logits,
            seed=recipe.seed,
            label=label,
        )
        asked = {(number.measure, number.geometry) for number in chosen}
        rows += [row.to_dict() for row in table if (row.measure, row.geometry) in asked]
        omitted += [dict(vars(part)) for part in table.omitted if (part.measure, part.geometry) in asked]
    return {"rows": rows, "omitted": omitted}


def _table(stored: Mapping[str, Any]) -> Table:
    return Table(
        tuple(Record.from_dict(row) for row in stored["rows"]), tuple(Omission(**part) for part in stored["omitted"])
    )
