"""The comparison of golden numbers: what it must see, and what it must leave out."""

from __future__ import annotations

import math
from typing import Any

import pytest

from golden.compare import compared


def outcome(refuses: bool = False, **result: Any) -> dict[str, Any]:
    return {"result": result, "refuses": refuses, "cpu": 1.0}


@pytest.mark.parametrize(
    "base, here, place",
    [
        ({"value": 1.0}, {"value": math.nextafter(1.0, 2)}, "result.value"),
        ({"value": 0.0}, {"value": -0.0}, "result.value"),
        ({"value": 1.0}, {"value": 1}, "result.value"),
        ({"value": math.nan}, {"value": 1.0}, "result.value"),
        ({"value": 1.0}, {}, "result.value"),
        ({}, {"value": None}, "result.value"),
        ({"samples": [1.0]}, {"samples": [1.0, 2.0]}, "result.samples.length"),
        ({"rows": [{"group_hash": "a"}]}, {"rows": [{"group_hash": "b"}]}, "result.rows[0].group_hash"),
        ({"cost": {"products": 3}}, {"cost": {"products": 4}}, "result.cost.products"),
    ],
)
def test_a_difference_is_seen_and_named(base: dict[str, Any], here: dict[str, Any], place: str) -> None:
    found = compared(outcome(**base), outcome(**here))
    assert place in [where for where, _, _ in found.differing]


def test_equal_bits_are_equal_and_counted() -> None:
    one, two = (outcome(value=0.1 + 0.2, nothing=math.nan, far=-math.inf, name="a") for _ in range(2))
    found = compared(one, two)
    assert (found.floats, found.differing, found.reworded, found.unwanted) == (3, [], [], False)


def test_clocks_are_left_out_and_words_are_told_apart() -> None:
    found = compared(
        outcome(cost={"seconds": 1.0, "products": 3}, versions={"torch": "1"}, notes=["so"]),
        outcome(cost={"seconds": 2.0, "products": 3}, versions={"torch": "2"}, notes=["thus"]),
    )
    assert found.differing == []
    assert [place for place, _, _ in found.reworded] == ["result.notes[0]"]


@pytest.mark.parametrize("refuses", [True, False])
def test_what_raises_fails_unless_it_is_to(refuses: bool) -> None:
    raised = {"raised": "UsageError", "message": "no", "refuses": refuses, "cpu": 0.0}
    assert compared(raised, raised).unwanted is not refuses
    assert compared(raised, raised | {"raised": "KeyError"}).differing
    assert compared(outcome(refuses), outcome(refuses)).unwanted is refuses
