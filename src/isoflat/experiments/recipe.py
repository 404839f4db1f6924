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
"""One file for each recipe."""


class Scale(StrEnum):
    """Size of an experiment."""

    SMALL = "small"
    PAPER = "paper"


class Asks(StrEnum):
    """Question that is asked of the networks."""

    CONTRAST = "contrast"
    """Whether the second arm's minima are sharper than the first's."""

    TREND = "trend"
    """Whether numbers rise along the arms, and with the test error."""

    DISSENT = "dissent"
    """Whether the flatter arm is also the one that generalizes better."""

    INVARIANCE = "invariance"
    """Whether an edit that keeps the function moves the numbers."""

    RELATION = "relation"
    """Whether numbers go with the generalisation gap over a grid of hyper-parameters."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Positive = Annotated[int, Field(ge=1)]


@final
class DataSpec(_Strict):
    """Data that networks are trained and measured on.

    Attributes:
        source: "digits", "characters" or "gaussian", which come with isoflat; "mnist" or "cifar10", which do not.
        train: how many training rows, the first ones; None for all.
        test: how many rows are held out, the first ones of the test set; None for all.
        measured: how many of the training rows are measured on, the first ones; None for all.
        flat: whether each input is one vector.
        raw: whether pixels keep their values from 0 to 255, instead of 0 to 1.
        context: of "characters": characters in a row.
        features: of "gaussian": entries of an input.
        classes: of "gaussian": labels are binomial with this number less one.
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
    """A family of `experiments.families`, and the arguments of its `build`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    family: str

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `build` beside the seed."""
        return dict(self.model_extra or {})


@final
class TrainingSpec(_Strict):
    """Settings of a training; see `loop.Regime`, whose own values stand where none are given.

    Attributes:
        epochs: at most so many.
        target: training loss at which training stops; None to train all epochs.
        noise: share of the training labels that are drawn anew, uniformly.
        looks: at the training loss per epoch, fewer than a regime's own: on networks of any size they cost.
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
        """Whatever a regime refuses is refused here."""
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}: one of {', '.join(OPTIMIZERS)}")
        self.regime()
        return self

    def regime(self) -> Regime:
        """For the loop."""
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
    """One way of training.

    Attributes:
        name: singular, such as "small batch".
        value: its place along the arms, where a trend is asked for.
        training: how.
        network: arguments of the network that differ from the recipe's.
        factors: what sets it apart from the others, where there are many: hyper-parameters with their values.
    """

    name: str
    value: float | None = None
    training: TrainingSpec
    network: dict[str, Any] = Field(default_factory=dict)
    factors: dict[str, str | float] = Field(default_factory=dict)

    @property
    def minima(self) -> str:
        """Name of its networks in a sentence, such as "small-batch minima"."""
        return f"{self.name.replace(' ', '-')} minima"


@final
class NumberSpec(_Strict):
    """A measure in a geometry.

    Attributes:
        measure: name in the catalogue, with its options in brackets where they are not the usual ones.
        geometry: name of a metric.
        logits: what scores become before the loss; None for as they are.
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
        weights: of the weight of each layer.
        biases: of its bias.
    """

    weights: tuple[float, ...]
    biases: tuple[float, ...]


@final
class Recipe(_Strict):
    """An experiment.

    Attributes:
        name: of its file.
        scale: at which the file was read.
        title: what it is.
        question: that it answers.
        reference: whose experiment it is.
        differs: what is not as in the reference, in words.
        asks: what is asked of the networks.
        along: what rises from arm to arm, where a trend is asked for.
        data: what is trained and measured on.
        network: what is trained.
        arms: the ways of training.
        replicates: networks per arm.
        numbers: that are measured.
        rtol: relative width of their enclosures.
        dtype: of the weights while they are measured.
        orbit: random points of each network's orbit at which the numbers are measured again.
        spread: of these points: standard deviation of the logarithms of the factors.
        edit: of each network, where an invariance is asked for.
        seed: all randomness follows from it.
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

    @property
    def targets(self) -> tuple[float, ...]:
        """Training losses at which networks are compared."""
        return tuple(arm.training.target for arm in self.arms if arm.training.target is not None)


@cache
def recipes() -> tuple[str, ...]:
    """Names of all recipes."""
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in FOLDER.iterdir() if entry.name.endswith(".toml")))


def read_recipe(name: str, scale: str = Scale.SMALL, **changes: Any) -> Recipe:
    """A recipe of the package.

    Args:
        name: of its file.
        scale: small, or the paper's own.
        **changes: fields that the user sets differently; None for none.

    Raises:
        UnknownName: there is no such recipe.

    >>> read_recipe("digits").question
    'Are large-batch minima sharper?'
    """
    if name not in recipes():
        raise UnknownName("recipe", name, recipes())
    return parse_recipe((FOLDER / f"{name}.toml").read_text(encoding="utf-8"), name, scale, **changes)


def parse_recipe(text: str, name: str, scale: str = Scale.SMALL, **changes: Any) -> Recipe:
    """A recipe from the text of a file: the table `[small]` or `[paper]` stands over the rest; what differs adds up.

    In each arm stands what differs from the table `[training]`; a table `[grid]` of lists makes an arm of each combination.

    Raises:
        UsageError: it is no TOML, or something in it is missing, unknown or without meaning.
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
    """An arm for every combination of hyper-parameters: of the training, or else of the network."""
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
    """Tables within tables are joined; everything else is replaced."""
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
    """The recipe in a file, with what a grid needs not say.

    Args:
        path: of the file.
        scale: whose table stands over the rest.
        asked: measures with their geometries; none for the file's.
        default: measured where neither says what.
        changes: fields that the user sets differently; None for none.

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
        "orbit": 0,  # every network once: its functions are not at stake here
    }
    further: dict[str, Any] = {name: value for name, value in usual.items() if name not in there} | {
        "asks": Asks.RELATION
    }
    if asked or "numbers" not in there:
        further["numbers"] = [{"measure": name, "geometry": place} for name, place in asked or default]
    return parse_recipe(text, path.stem, scale, **{**further, **changes})
