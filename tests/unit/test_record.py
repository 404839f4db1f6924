"""Records and tables: what is written comes back, and other layouts are refused."""

from __future__ import annotations

import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Cost, Estimate, Kind
from isoflat.core.record import SCHEMA, Point, Record
from isoflat.core.table import Table

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def records(draw):
    lower, value, upper = sorted(draw(st.tuples(FINITE, FINITE, FINITE)))
    kind = draw(st.sampled_from(list(Kind)))
    upper = math.inf if kind is Kind.UNCERTIFIED else upper
    size = st.floats(0, allow_infinity=False)
    return Record(
        measure=draw(st.sampled_from(["quotient_spectral_norm", "hessian_spectral_norm"])),
        geometry="layerwise",
        group="positive rescalings",
        group_hash="0123456789ab",
        estimate=Estimate(value, lower, upper, 0.5, kind, False, Cost(2, 0.5, 0.25, 7), draw(st.none() | size)),
        point=Point(draw(FINITE), draw(st.none() | st.floats(0, 1)), draw(size), draw(size), 10, 10.0, 3),
        stationarity_ratio=draw(st.none() | size),
        label=draw(st.text(max_size=10)),
        settings={"seed": draw(st.integers()), "dtype": "float32"},
        versions={"isoflat": "0"},
        model_hash="a",
        data_hash="b",
    )


@given(records())
def test_record_round_trip_is_exact_and_strict_json(record):
    line = record.to_json()
    assert "\n" not in line
    json.loads(line, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))
    assert Record.from_json(line) == record


@given(st.lists(records(), min_size=1, max_size=3))
def test_table_round_trip(rows):
    table = Table(tuple(rows))
    assert Table.from_json(table.to_json()) == table
    assert list(table) == rows
    assert len(table) == len(rows)
    assert table[0] is rows[0]
    assert table[rows[-1].measure].measure == rows[-1].measure


def example(**changes) -> Record:
    fields = {
        "measure": "quotient_spectral_norm",
        "geometry": "layerwise",
        "group": "positive rescalings",
        "group_hash": "0123456789ab",
        "estimate": Estimate(2.5, 2.5, 2.5013, 0.999999, Kind.ENCLOSURE, True, Cost(17, 40.25, 1.5, 0)),
        "point": Point(0.1, 0.9, 0.02, 0.05, 100, 100.0, 12),
    }
    return Record(**{**fields, **changes})


@pytest.mark.parametrize("schema", [0, SCHEMA + 1, None, str(SCHEMA)])
def test_other_schemas_are_refused_by_name(schema):
    with pytest.raises(UsageError, match=f"schema {SCHEMA}"):
        Record.from_dict({**example().to_dict(), "schema": schema})


def test_table_prints_every_number_with_its_enclosure():
    text = str(Table((example(), example(label="narrow"))))
    for part in ("quotient_spectral_norm", "2.500(2)", "[2.50000, 2.50130]", "17", "40.2", "narrow", "yes"):
        assert part in text
    assert "interval" in text
    assert "stationarity" in text
    html = Table((example(),))._repr_html_()
    assert "2.500(2)" in html
    assert "network" not in str(Table((example(),)))


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("label", ["", "small batch"])
def test_a_printed_table_fits_the_terminal_and_loses_nothing(monkeypatch, width, label):
    monkeypatch.setenv("COLUMNS", str(width))
    text = str(Table((example(label=label, stationarity_ratio=0.25),)))
    assert max(map(len, text.splitlines())) <= width
    for part in ("quotient_spectral_norm", "layerwise", "2.500(2)", "[2.50000,", "2.50130]", "yes", "0.25", "17, 40.2"):
        assert part in " ".join(text.split()), text
    assert ("──" in text) is (width == 80 and not label)  # a table where there is room, a list where there is none


def test_data_frames_have_a_line_per_row_and_no_nesting():
    pandas = pytest.importorskip("pandas")
    rows = (example(label="a", settings={"seed": 3, "shape": [1, 2]}), example(label="b", versions={"torch": "2"}))
    frame = Table(rows).to_pandas()
    assert list(frame["label"]) == ["a", "b"]
    assert list(frame["value"]) == [float(row.estimate) for row in rows]
    assert list(frame["upper"]) == [row.estimate.upper for row in rows]
    assert frame["settings.seed"][0] == 3
    assert frame["settings.shape"][0] == "[1, 2]"
    assert pandas.isna(frame["settings.shape"][1])
    assert frame["versions.torch"][1] == "2"


@pytest.mark.parametrize("settings", [{"seed": 1}, {"a": None, "b": {"c": 1}}])
def test_flat_rows_hold_plain_values_only(settings):
    (flat,) = Table((example(settings=settings),)).flat()
    assert all(value is None or isinstance(value, str | int | float) for value in flat.values())
    assert flat["value"] == example().estimate.value
    assert {f"settings.{name}" for name in settings} <= set(flat)


def test_without_pandas_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match=r"pip install 'isoflat\[pandas\]'"):
        Table((example(),)).to_pandas()
