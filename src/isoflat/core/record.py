"""A measured number with everything needed to trust it and to repeat it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, final

from isoflat.core.estimate import Estimate
from isoflat.core.plain import attributes, check_schema

SCHEMA = 1
"""Version of the JSON layout; raised whenever a field changes its meaning."""


@final
@dataclass(frozen=True)
class Point:
    """Place on the loss surface where a number was measured.

    Attributes:
        loss: empirical risk.
        accuracy: share of correct predictions among counted targets; None where the loss does not define one.
        gradient_norm: Euclidean norm of the gradient.
        stationarity: `b = max_i ‖W_i‖ ‖∇_i L‖`, invariant to layer-wise rescaling: `D H D` differs from the
            covariant Hessian by at most b.
        examples: rows of data.
        targets: divisor of the risk: number of counted targets, or sum of their weights.
        parameters: number of trainable entries.
        chance: accuracy of always predicting the most frequent class, where accuracy is defined.
    """

    loss: float
    accuracy: float | None
    gradient_norm: float
    stationarity: float
    examples: int
    targets: float
    parameters: int
    chance: float | None = None


@final
@dataclass(frozen=True)
class Record:
    """A measured number: the estimate, its measure and geometry, and its provenance.

    Attributes:
        measure: catalogue name.
        geometry: name of the metric.
        group: reparametrisations the number is invariant to, in words.
        group_hash: hash of that group on these tensors; numbers with different hashes are not compared silently.
        estimate: the number.
        point: loss, accuracy and gradient there.
        stationarity_ratio: `b / ‖D H D‖`, small at a minimum; None where the measure's unit is not the metric's.
        label: the user's name of the network.
        settings: seed, tolerance, dtype, device, product route and further choices.
        versions: isoflat, torch, Python, measure and rules.
        model_hash: fingerprint of weights and buffers.
        data_hash: fingerprint of the data in the order used.
    """

    measure: str
    geometry: str
    group: str
    group_hash: str
    estimate: Estimate
    point: Point
    stationarity_ratio: float | None = None
    label: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    model_hash: str = ""
    data_hash: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {"schema": SCHEMA, **attributes(self, *_KEYS)}

    def to_json(self) -> str:
        """One line of strict JSON; floats return bit for bit."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Record:
        """Inverse of `to_dict`.

        Raises:
            UsageError: the record was written by another schema version.
        """
        check_schema(data, "record", SCHEMA)
        read: dict[str, Any] = {"estimate": Estimate.from_dict(data["estimate"]), "point": Point(**data["point"])}
        return Record(**{key: data[key] for key in _KEYS} | read)

    @staticmethod
    def from_json(line: str) -> Record:
        """Inverse of `to_json`."""
        return Record.from_dict(json.loads(line))


_KEYS = (
    "measure", "geometry", "group", "group_hash", "label", "estimate", "point", "stationarity_ratio", "settings",
    "versions", "model_hash", "data_hash",
)  # fmt: skip
