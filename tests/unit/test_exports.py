"""Rows for spreadsheets, data frames and trackers: read back by those that are to read them."""

from __future__ import annotations

import csv
import io
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflat.core.errors import UsageError
from isoflat.integrations import mlflow, trackio
from isoflat.integrations.tables import parts, to_csv, to_parquet

ROWS = [
    {
        "address": "0a" * 12, "settings.seed": 1, "settings.label": "narrow", "settings.net.widths": "[4,2]",
        "settings.none": None, "settings._x": 2, "result.loss": 0.1, "result.steps": 7, "result.reached": True,
        'result.norm."0.weight"': 2.5, "result.finding": "no evidence", "result.gap": None,
    },
    {"address": "0b" * 12, "settings.seed": 2, "result.loss": -0.0},
]  # fmt: skip

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


def read(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_csv_has_a_column_for_every_name_and_empty_cells():
    one, two = read(to_csv(ROWS))
    assert list(one) == list(ROWS[0])
    assert one["settings.net.widths"] == "[4,2]"
    assert (one["settings.none"], one["result.reached"]) == ("", "True")
    assert [name for name, cell in two.items() if cell] == ["address", "settings.seed", "result.loss"]
    assert to_csv([]) == "\n"


@given(st.floats(allow_nan=False) | st.integers())
def test_numbers_in_csv_return_bit_for_bit(value):
    found = type(value)(read(to_csv([{"x": value, "y": "-"}]))[0]["x"])
    assert found == value
    assert math.copysign(1, found) == math.copysign(1, value)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '-\r\n"=1'])
def test_text_that_looks_like_a_formula_is_marked(text):
    lines = list(csv.reader(io.StringIO(to_csv([{text: text, "x": -1.5, "y": "1\r=1", "z": ""}]), newline="")))
    assert lines == [[f"'{text}", "x", "y", "z"], [f"'{text}", "-1.5", "1\r=1", ""]]


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), SCALARS), max_size=4))
def test_both_tables_hold_every_row(rows):
    parquet = pytest.importorskip("pyarrow.parquet")
    names = list(dict.fromkeys(name for row in rows for name in row))
    if names:
        assert len(read(to_csv([{"first": 1, **row} for row in rows]))) == len(rows)
    table = parquet.read_table(io.BytesIO(to_parquet(rows)))
    assert table.column_names == names
    for name in names:
        for value, row in zip(table.column(name).to_pylist(), rows, strict=True):
            expected = row.get(name)
            if isinstance(value, str) and not isinstance(expected, str):
                expected = str(expected)  # a column of several kinds
            if isinstance(expected, float) and math.isnan(expected):
                assert math.isnan(value)
            else:
                assert value == expected


def test_parquet_columns_have_the_kind_of_their_values():
    parquet = pytest.importorskip("pyarrow.parquet")
    big = (1 << 53) + 1
    columns = {
        "whole": ([1, None, -(1 << 63)], "int64", [1, None, -(1 << 63)]),
        "fractions": ([1, 0.5, None], "double", [1.0, 0.5, None]),
        "truth": ([True, None, False], "bool", [True, None, False]),
        "text": (["=1", None, ""], "string", ["=1", None, ""]),
        "beyond": ([1, 1 << 63, None], "string", ["1", str(1 << 63), None]),
        "inexact": ([big, 0.5, None], "string", [str(big), "0.5", None]),
        "mixed": ([1, "a", True], "string", ["1", "a", "True"]),
        "nothing": ([None, None, None], "string", [None, None, None]),
    }
    rows = [{name: values[i] for name, (values, _, _) in columns.items()} for i in range(3)]
    table = parquet.read_table(io.BytesIO(to_parquet(rows)))
    for name, (_, kind, expected) in columns.items():
        assert str(table.schema.field(name).type) == kind
        assert table.column(name).to_pylist() == expected


@pytest.mark.parametrize("act", [to_csv, to_parquet, lambda rows: parts(rows[0])])
def test_what_is_no_scalar_is_refused_by_name(act):
    with pytest.raises(UsageError, match=r"result\.curve is a list"):
        act([{"result.curve": [1]}])


@pytest.mark.parametrize(
    ("module", "act", "command"),
    [
        ("pyarrow", to_parquet, r"pip install 'isoflat\[images\]'"),
        ("mlflow", lambda rows: mlflow.log(rows, "study"), "pip install mlflow"),
        ("trackio", lambda rows: trackio.log(rows, "study"), "pip install trackio"),
    ],
)
def test_a_missing_library_is_named_with_its_command(monkeypatch, module, act, command):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=command):
        act(ROWS)


def test_parts_of_a_row():
    one = parts(ROWS[0])
    assert one.name == "narrow"
    assert one.settings == {"seed": 1, "label": "narrow", "net.widths": "[4,2]", "none": None, "_x": 2}
    assert one.numbers == {"loss": 0.1, "steps": 7, 'norm."0.weight"': 2.5}
    assert one.texts == {"address": "0a" * 12, "result.reached": "True", "result.finding": "no evidence"}
    assert parts(ROWS[1]).name == "0b" * 12


# Trackers: stand-ins with the signatures of mlflow 3.17 and trackio 0.43, and the libraries where they are installed


class MlflowException(Exception):
    pass


class Client:
    """Keeps what it is given, and refuses what MLflow refuses."""

    experiments: dict[str, str]
    runs: dict[str, dict]

    def __init__(self, tracking_uri=None, registry_uri=None, workspace_store_uri=None):
        if tracking_uri == "nowhere":
            raise MlflowException("no store there")

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name, artifact_location=None, tags=None):
        assert name not in self.experiments
        return self.experiments.setdefault(name, f"e{len(self.experiments)}")

    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        assert experiment_id in self.experiments.values()
        run = f"r{len(self.runs)}"
        self.runs[run] = {"name": run_name, "params": {}, "metrics": {}, "tags": {}, "status": "RUNNING"}
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        assert len(params) <= 100 and len(tags) <= 100 and len(metrics) + len(params) + len(tags) <= 1000
        for kind, entries in (("metrics", metrics), ("params", params), ("tags", tags)):
            for entry in entries:
                if not all(letter.isalnum() or letter in "_-. :/" for letter in entry.key):
                    raise MlflowException(f"invalid name {entry.key}")
                self.runs[run_id][kind][entry.key] = entry.value

    def set_terminated(self, run_id, status=None, end_time=None):
        self.runs[run_id]["status"] = status or "FINISHED"


def metric(key, value, timestamp, step, model_id=None, dataset_name=None, dataset_digest=None, run_id=None):
    return SimpleNamespace(key=key, value=value, timestamp=timestamp, step=step)


def entry(key, value):
    assert isinstance(value, str)
    return SimpleNamespace(key=key, value=value)


@pytest.fixture
def client(monkeypatch):
    class Fresh(Client):
        experiments, runs = {}, {}

    for name, content in {
        "mlflow": {"MlflowClient": Fresh},
        "mlflow.exceptions": {"MlflowException": MlflowException},
        "mlflow.entities": {"Metric": metric, "Param": entry, "RunTag": entry},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return Fresh


ONE = {
    "name": "narrow",
    "params": {"seed": "1", "label": "narrow", "net.widths": "[4,2]", "_x": "2"},
    "metrics": {"loss": 0.1, "steps": 7, "norm._0.weight_": 2.5},
    "tags": {"address": "0a" * 12, "result.reached": "True", "result.finding": "no evidence"},
    "status": "FINISHED",
}


def test_mlflow_gets_one_run_per_row(client):
    assert mlflow.log(ROWS, "study") == ("r0", "r1")
    assert mlflow.log(ROWS[:1], "study") == ("r2",)
    assert client.experiments == {"study": "e0"}
    assert client.runs["r0"] == client.runs["r2"] == ONE
    assert client.runs["r1"]["metrics"] == {"loss": -0.0}


def test_mlflow_gets_long_rows_in_pieces(client):
    row = {f"{kind}.{n}": n for n in range(250) for kind in ("settings", "result")}
    mlflow.log([row], "study")
    assert client.runs["r0"]["params"] == {str(n): str(n) for n in range(250)}
    assert client.runs["r0"]["metrics"] == {str(n): n for n in range(250)}


def test_mlflow_refusing_is_one_line(client):
    with pytest.raises(UsageError, match=r"MLflow refuses experiment 'study' \(no store there\)"):
        mlflow.log(ROWS, "study", tracking_uri="nowhere")


@pytest.fixture
def projects(monkeypatch):
    found: dict[str, list] = {}
    current: list = []

    def init(project, name=None, group=None, space_id=None, server_url=None, dataset_id=None, bucket_id=None,
             config=None, resume="never", settings=None, private=None, embed=True, auto_log_gpu=None,
             gpu_log_interval=10.0, auto_log_cpu=None, cpu_log_interval=10.0, webhook_url=None, webhook_min_level=None):  # fmt: skip
        print("* Trackio project initialized")
        if "/" in project:
            raise ValueError("invalid project name")
        assert not current, "the run before is finished"
        if reserved := [key for key in config if key.startswith("_")]:
            raise ValueError(f"Config key {reserved[0]!r} is reserved")
        assert (space_id, server_url, embed, auto_log_gpu, auto_log_cpu) == (None, None, False, False, False)
        run = SimpleNamespace(
            name=name, config=config, logs=[], log=lambda metrics, step=None: run.logs.append(metrics)
        )
        found.setdefault(project, []).append(run)
        current.append(run)
        return run

    module = ModuleType("trackio")
    vars(module).update(init=init, finish=current.clear)
    monkeypatch.setitem(sys.modules, "trackio", module)
    return found


def test_trackio_gets_one_run_per_row(projects, capsys):
    trackio.log(ROWS, "study")
    one, two = projects["study"]
    assert (one.name, two.name) == ("narrow", "0b" * 12)
    assert one.config == {
        "address": "0a" * 12, "seed": 1, "label": "narrow", "net.widths": "[4,2]", "none": None, "x_x": 2,
        "result.reached": "True", "result.finding": "no evidence",
    }  # fmt: skip
    assert one.logs == [{"loss": 0.1, "steps": 7, 'norm."0.weight"': 2.5}]
    assert two.logs == [{"loss": -0.0}]
    printed = capsys.readouterr()
    assert not printed.out, "the standard output is for results"
    assert "Trackio" in printed.err
    with pytest.raises(UsageError, match="Trackio refuses project 'a/b'"):
        trackio.log(ROWS, "a/b")


@pytest.mark.filterwarnings("ignore")
def test_mlflow_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    library = pytest.importorskip("mlflow")
    where = (tmp_path / "runs").as_uri()
    first, _ = mlflow.log(ROWS, "study", tracking_uri=where)
    run = library.MlflowClient(where).get_run(first)
    assert (run.info.run_name, run.info.status) == (ONE["name"], ONE["status"])
    assert run.data.params == ONE["params"]
    assert run.data.metrics == ONE["metrics"]
    assert run.data.tags.items() >= ONE["tags"].items()


@pytest.mark.filterwarnings("ignore")
def test_trackio_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # before it is imported: it looks there only once
    library = pytest.importorskip("trackio")
    trackio.log(ROWS, "study")
    assert sorted(run.name for run in library.Api().runs("study")) == ["0b" * 12, "narrow"]
