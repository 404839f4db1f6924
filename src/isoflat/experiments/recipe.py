"""Recipes: experiments as plain files, checked before anything is computed."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from functools import cache
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from isoflat.core.errors import DataError, UnknownName, UsageError
from isoflat.experiments.loop import OPTIMIZERS, Regime
from isoflat.experiments.numbers import NUMBERS, Number
from isoflat.measures.catalogue import find_geometry, find_measure

FOLDER = files("isoflat.experiments") / "recipes"
"""Folder with one file for each recipe."""


class Scale(StrEnum):
    """Size of an experiment."""

    SMALL = "small"
    PAPER = "paper"


class Asks(StrEnum):
    """Question that a recipe asks of its networks."""

    CONTRAST = "contrast"
    """The question whether the second arm's minima are sharper than the first's."""

    TREND = "trend"
    """The question whether numbers rise along the arms, and with the test error."""

    DISSENT = "dissent"
    """The question whether the flatter arm is also the one that generalizes better."""

    INVARIANCE = "invariance"
    """The question whether an edit that keeps the function moves the numbers."""

    RELATION = "relation"
    """The question whether numbers go with the generalisation gap over a grid of hyper-parameters."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Positive = Annotated[int, Field(ge=1)]


@final
class DataSpec(_Strict):
    """Data that networks are trained and measured on.

    Attributes:
        source: "digits", "characters" or "gaussian", which come with isoflat; "mnist" or "cifar10", which do not.
        train: number of training rows, the first of the data set; None for all.
        test: number of held-out rows, the first of the test set; None for all.
        measured: number of training rows that are measured on, the first ones; None for all.
        flat: whether each input is one vector.
        raw: whether pixels keep their values from 0 to 255, instead of 0 to 1.
        context: number of characters in a row of "characters".
        features: number of entries of an input of "gaussian".
        classes: number of classes of "gaussian", whose labels are binomial.
    """

    source: str
    train: Positive | None = None
    test: Positive | None = None
    measured: Positive | None = None
    flat: bool = False
    raw: bool = False
    context: Positive | None = None
    features: Positive | None = None
    classes: Annotated[int, Field(ge=2)] | None = None


@final
class NetworkSpec(BaseModel):
    """A family of networks in `experiments.families`, and the arguments of its `build`.

    Attributes:
        family: name of the family; every further entry is an argument.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    family: str

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `build` beside the seed."""
        return dict(self.model_extra or {})


@final
class TrainingSpec(_Strict):
    """Settings of a training, as a recipe gives them to `loop.Regime`.

    Attributes:
        batch: number of rows per step; None for all of them.
        optimizer: "sgd" or "adam".
        rate: learning rate; None for the optimizer's own.
        momentum: momentum of "sgd".
        weight_decay: multiple of the weights that is added to their gradient.
        halve_every: number of epochs after which the learning rate is halved, again and again; None to keep it.
        epochs: number of epochs after which training stops anyway.
        target: training loss at which training stops; None to train all epochs.
        noise: share of the training labels that are drawn anew, uniformly.
        looks: number of evaluations of the training loss per epoch, far from the target.
    """

    batch: Positive | None = None
    optimizer: str = "adam"
    rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    halve_every: Positive | None = None
    epochs: Positive = 4000
    target: float | None = None
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    looks: int | float = 2  # an address tells 2 from 2.0

    @model_validator(mode="after")
    def _known(self) -> TrainingSpec:
        """Refuse what a regime refuses."""
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}: one of {', '.join(OPTIMIZERS)}")
        self.regime()
        return self

    def regime(self) -> Regime:
        """The regime with these settings."""
        return Regime(
            batch=self.batch,
            target=self.target,
            optimizer=self.optimizer,
            max_epochs=self.epochs,
            rate=self.rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            halve_every=self.halve_every,
            looks=self.looks,
        )


@final
class Arm(_Strict):
    """One of the ways of training that a recipe compares.

    Attributes:
        name: name in the singular, such as "small batch".
        value: position along the arms, where a trend is asked for, such as the batch size.
        training: settings of the training.
        network: arguments of the network that differ from the recipe's.
        factors: values of the hyper-parameters that vary over a grid, by name; empty without a grid.
    """

    name: str
    value: float | None = None
    training: TrainingSpec
    network: dict[str, Any] = Field(default_factory=dict)
    factors: dict[str, str | float] = Field(default_factory=dict)

    @property
    def minima(self) -> str:
        """Name of the arm's networks in a sentence, such as "small-batch minima"."""
        return f"{self.name.replace(' ', '-')} minima"


@final
class NumberSpec(_Strict):
    """A number to measure, as a recipe names it; `Number` adds its words.

    Attributes:
        measure: name of the measure in the catalogue, with its options in brackets where they are not the usual ones.
        geometry: name of the geometry in the catalogue.
        logits: what the network's scores become before the loss; None to leave them as they are.
    """

    measure: str
    geometry: str = "auto"
    logits: str | None = None

    @property
    def number(self) -> Number:
        """The number to measure, with its words; a measure that knows one geometry only is measured in that."""
        own = find_measure(self.measure)
        place = own.geometry or find_geometry(self.geometry).name
        known = next((n for n in NUMBERS if (n.measure, n.geometry) == (self.measure, place)), None)
        words = (
            known.words if known else self.measure.replace("_", " ") + (f" ({place})" if own.geometry is None else "")
        )
        title = known.title if known else f"{own.definition}"
        if self.logits:
            words += " of normalised scores" if self.logits == "normalised" else f" of scores scaled to {self.logits}"
            title = f"The {words}"
        name = f"{self.measure}@{place}" + (f",logits={self.logits}" if self.logits else "")
        return Number(name, own.label, place, words, title, self.logits)


@final
class Edit(_Strict):
    """Factors of an edit that keeps the function, layer by layer.

    Attributes:
        weights: factor of the weight of each layer.
        biases: factor of the bias of each layer.
    """

    weights: tuple[float, ...]
    biases: tuple[float, ...]


@final
class Recipe(_Strict):
    """An experiment: data, networks, ways of training, and the numbers to measure.

    Attributes:
        name: name of the recipe, which is that of its file.
        scale: size of the experiment.
        title: title of the experiment.
        question: question that the experiment answers.
        reference: publication that the experiment is from.
        differs: differences from the publication, in words.
        asks: kind of the question.
        along: name of the quantity that rises from arm to arm, where a trend is asked for.
        data: data that networks are trained and measured on.
        network: architecture of the networks.
        arms: ways of training that are compared.
        replicates: number of networks per arm.
        numbers: numbers that are measured.
        rtol: relative width of the confidence intervals to reach.
        dtype: precision of the weights while they are measured.
        orbit: number of random points of each network's orbit at which the numbers are measured again.
        spread: standard deviation of the logarithms of the factors that lead to these points.
        edit: edit of each network, where an invariance is asked for.
        seed: seed of all random numbers.
    """

    name: str
    scale: Scale
    title: str
    question: str
    reference: str
    differs: str = ""
    asks: Asks
    along: str = "place along the arms"
    data: DataSpec
    network: NetworkSpec
    arms: tuple[Arm, ...]
    replicates: Positive = 5
    numbers: tuple[NumberSpec, ...]
    rtol: Annotated[float, Field(gt=0, lt=1)] = 0.01
    dtype: Literal["float32", "float64"] = "float32"
    orbit: Annotated[int, Field(ge=0)] = 1
    spread: Annotated[float, Field(gt=0)] = 1.0
    edit: Edit | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _sensible(self) -> Recipe:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names) or not names or not self.numbers:
            raise ValueError(f"expected arms of different names, and numbers to measure; got arms {names}")
        if self.asks in (Asks.CONTRAST, Asks.DISSENT) and len(names) != 2:
            raise ValueError(f"a {self.asks} has two arms, got {len(names)}")
        if self.asks is Asks.TREND and (len(names) < 3 or any(arm.value is None for arm in self.arms)):
            raise ValueError("a trend has at least three arms, each with its value")
        if (self.asks is Asks.INVARIANCE) != (self.edit is not None):
            raise ValueError("an edit belongs to an invariance, and the other way round")
        return self


@cache
def recipes() -> tuple[str, ...]:
    """Names of all recipes."""
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in FOLDER.iterdir() if entry.name.endswith(".toml")))


def read_recipe(name: str, scale: str = Scale.SMALL, **changes: Any) -> Recipe:
    """A recipe of the package.

    Args:
        name: name of the recipe.
        scale: "small", or "paper" for the experiment as it was published.
        **changes: fields of the recipe that are set differently; None to leave a field as it is.

    Raises:
        UnknownName: there is no such recipe, or no such scale.

    >>> read_recipe("digits").question
    'Are large-batch minima sharper?'
    """
    if name not in recipes():
        raise UnknownName("recipe", name, recipes())
    return parse_recipe((FOLDER / f"{name}.toml").read_text(encoding="utf-8"), name, scale, **changes)


def parse_recipe(text: str, name: str, scale: str = Scale.SMALL, **changes: Any) -> Recipe:
    """A recipe from the text of a file.

    The table `[small]` or `[paper]` overrides the rest; only its `differs` is added. An arm overrides the table
    `[training]`. A table `[grid]` of lists makes an arm of each combination.

    Raises:
        UsageError: the text is no TOML, or something in it is missing, unknown or without meaning.
    """
    if scale not in list(Scale):
        raise UnknownName("scale", scale, list(Scale))
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {name} is no TOML: {error}") from error
    scales = {str(each): given.pop(str(each), {}) for each in Scale}
    own = scales[scale]
    whole = _over(given, own)
    if "differs" in own and "differs" in given:
        whole["differs"] = f"{given['differs']} At this scale: {own['differs']}"
    usual = whole.pop("training", {})
    arms = [_arm(arm, usual) for arm in whole.pop("arms", [])] + list(_grid(whole.pop("grid", {}), usual))
    set_by_user = {key: value for key, value in changes.items() if value is not None}
    try:
        return Recipe.model_validate({**whole, "name": name, "scale": scale, "arms": arms, **set_by_user})
    except ValidationError as error:
        told = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'recipe'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        raise UsageError(f"recipe {name} at scale {scale}: {told}") from error


def _arm(given: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in given.items() if key in Arm.model_fields}
    return {**own, "training": {**usual, **{key: value for key, value in given.items() if key not in own}}}


def _grid(axes: Mapping[str, Any], usual: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Iterate over arms, one for every combination of hyper-parameters of the training or of the network."""
    if not axes:
        return
    lists = [values if isinstance(values, list) else [values] for values in axes.values()]
    for values in product(*lists):
        chosen = dict(zip(axes, values, strict=True))
        trained = {key: value for key, value in chosen.items() if key in TrainingSpec.model_fields}
        yield {
            "name": ", ".join(f"{key} {_word(value)}" for key, value in chosen.items()),
            "training": {**usual, **trained},
            "network": {key: value for key, value in chosen.items() if key not in trained},
            "factors": {
                key: value if isinstance(value, int | float) else _word(value) for key, value in chosen.items()
            },
        }


def _word(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Join two tables, and tables within them; any other value of the second replaces that of the first."""
    joined = dict(below)
    for key, value in above.items():
        own = joined.get(key)
        joined[key] = _over(own, value) if isinstance(own, Mapping) and isinstance(value, Mapping) else value
    return joined


def read_grid(
    path: Path,
    scale: str,
    asked: Sequence[tuple[str, str]],
    default: Sequence[tuple[str, str]],
    changes: Mapping[str, Any],
) -> Recipe:
    """The recipe of a grid in a file; title, question, reference and numbers need not be in it.

    Args:
        path: path of the file.
        scale: name of the table that overrides the rest.
        asked: names of measures with their geometries; none for the file's numbers.
        default: names of measures with their geometries where neither `asked` nor the file has any.
        changes: fields of the recipe that are set differently; None to leave a field as it is.

    Raises:
        DataError: there is no such file, or no grid in it.
        UsageError: something in it is missing, unknown or without meaning.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = tomllib.loads(text)
    except OSError as error:
        raise DataError(f"--grid {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"--grid {path} is no TOML: {error}") from error
    over = content.get(scale, {})
    there = content.keys() | (over.keys() if isinstance(over, dict) else set())
    axes = content.get("grid", over.get("grid") if isinstance(over, dict) else None)
    if "arms" in there or not isinstance(axes, dict) or not axes:
        raise DataError(f"--grid {path}: expected a table [grid] of lists, such as batch = [16, 64], and no arms")
    usual = {
        "title": f"Grid {path.stem}",
        "question": "Does flatness predict generalization?",
        "reference": path.name,
        "orbit": 0,  # invariance is not asked for: every network is measured once
    }
    further: dict[str, Any] = {name: value for name, value in usual.items() if name not in there} | {
        "asks": Asks.RELATION
    }
    if asked or "numbers" not in there:
        further["numbers"] = [{"measure": name, "geometry": place} for name, place in asked or default]
    return parse_recipe(text, path.stem, scale, **{**further, **changes})
