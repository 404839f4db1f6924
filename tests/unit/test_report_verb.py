"""`isoflat report` and the pages of `compare`: what is readable is shown, the rest is named, nothing in it is obeyed."""

import csv
import json
import math
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from isoflat.cli import reproduce
from isoflat.cli.main import app
from isoflat.core.comparison import Comparison
from isoflat.core.errors import UsageError
from isoflat.core.estimate import Cost, Estimate, Kind
from isoflat.core.record import Point, Record
from isoflat.core.table import Table
from isoflat.experiments.recipe import parse_recipe
from isoflat.experiments.reproduce import reproduce as follow
from isoflat.experiments.results import read_results
from isoflat.experiments.store import Store
from isoflat.measurement.compare import contrast
from isoflat.report.html import POLICY, render
from isoflat.report.pages.records import page
from isoflat.report.write import write_report

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "--></svg><script>alert(1)</script>",
    "bell\a, escape\x1b[31m, null\0, turned\u202e",
    "n" * 10_000,
    "=1+1",
    r"$\frac{",
    "網路",
    "{{ 7 * 7 }}",
    "http://example.com/x.png",
]


def record(label="net", value=2.0, **changes):
    estimate = Estimate(value, 0.99 * value, 1.01 * value, 0.999, Kind.ENCLOSURE, True, Cost(7, 14.5, 0.25, 100))
    whole = Record(
        measure="quotient_spectral_norm",
        geometry="auto",
        group="scalings",
        group_hash="aa",
        estimate=estimate,
        point=Point(0.1, 0.9, 1e-3, 1e-4, 100, 100.0, 610, 0.1),
        stationarity_ratio=0.01,
        label=label,
        settings={"seed": 0, "dtype": "float32", "logits": "raw", "parts": [1.0]},
        versions={"isoflat": "0.1.0"},
        model_hash=f"hash of {label[:20]}",
        data_hash="dd",
    )
    return replace(whole, **changes)


def write(path, records):
    path.write_text("".join(f"{each.to_json()}\n" for each in records))


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


class Reader(HTMLParser):
    """Tags, attributes and text as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def harmless(text):
    """A page without scripts, handlers or addresses."""
    found = Reader(text)
    assert not {"script", "img", "iframe", "object", "embed", "link", "base", "form", "a"} & set(found.tags)
    assert ("content", POLICY) in found.attributes
    for name, value in found.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "srcset", "action", "formaction")
        assert name not in ("href", "xlink:href") or value.startswith("#")
        assert "url(" not in (value or "") or "url(#" in value
    return found


TINY = """
title = "Digits, hardly trained"
question = "Are large-batch minima sharper?"
reference = "ours"
asks = "contrast"
replicates = 2
orbit = 0
data = { source = "digits", train = 60, test = 20, flat = true }
network = { family = "mlp", widths = [64, 4, 10], bias = true }
training = { optimizer = "sgd", epochs = 2 }
arms = [{ name = "small batch", batch = 10 }, { name = "large batch" }]
numbers = [{ measure = "quotient_spectral_norm", geometry = "layerwise" }, { measure = "hessian_spectral_norm" }]
"""

EDITED = f"{TINY}\nedit = {{ weights = [2.0, 0.5], biases = [2.0, 1.0] }}\n".replace("contrast", "invariance")


def reproduce_in(folder, text):
    """A folder of `reproduce` with four networks that take no time."""
    recipe = parse_recipe(text, "tiny")
    result = follow(recipe, out=folder, jobs=1)
    reproduce.write(result, folder, f"isoflat reproduce tiny --scale small --replicates 2 --seed {recipe.seed}")
    return folder


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    return reproduce_in(tmp_path_factory.mktemp("reproduced"), TINY)


def test_records_of_a_file_become_a_page(tmp_path):
    write(
        tmp_path / "records.jsonl",
        [record("small batch 0", 2.0), record("small batch 1", 3.0), record("large batch 0", 7.5)],
    )
    done = run(tmp_path)
    assert done.exit_code == 0, done.output
    found = harmless((tmp_path / "report.html").read_text())
    assert "3 numbers of 3 networks." in found.text
    assert "7.50(8)" in found.text
    assert "[7.42500, 7.57500]" in found.text
    assert "None: every file could be read" in found.text
    again = run(tmp_path)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    assert run(tmp_path, "--force").exit_code == 0


def test_hostile_names_are_text(tmp_path):
    rows = [record(name, float(2 + place), geometry=name, group=name) for place, name in enumerate(HOSTILE)]
    rows += [
        record("a", 1.0, settings={"seed": name, name: name, "logits": name}, versions={name: name}) for name in HOSTILE
    ]
    noted = record("b", 2.0)
    rows.append(replace(noted, estimate=replace(noted.estimate, notes=tuple(HOSTILE))))
    write(tmp_path / "records.jsonl", rows)
    done = run(tmp_path, "--csv", tmp_path / "all.csv")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "report.html").read_text()
    found = harmless(text)
    assert "<script>alert(1)</script>" in found.text
    assert "{{ 7 * 7 }}" in found.text
    assert r"bell\x07, escape\x1b[31m, null\x00, turned\u202e" in found.text
    assert not set("\0\a\x1b\u202e") & set(text)
    assert "n" * 600 not in text
    with (tmp_path / "all.csv").open(newline="") as file:
        labels = [row["settings.label"] for row in csv.DictReader(file)]
    assert labels[: len(HOSTILE)] == [f"'{name}" if name[0] in "=-" else name for name in HOSTILE]
    with (tmp_path / "all.csv").open(newline="") as file:
        assert not [cell for line in csv.reader(file) for cell in line if cell[:1] in ("=", "+", "@")]


@pytest.mark.parametrize(
    ("value", "lower", "upper"),
    [(0.0, 0.0, 0.0), (-3.0, -4.0, 1.0), (1e-320, 0.0, 1e-310), (1.7e308, 1e300, math.inf), (2.0, -math.inf, math.inf)],
)
def test_numbers_that_no_axis_holds_are_in_the_tables(tmp_path, value, lower, upper):
    odd = replace(record().estimate, value=value, lower=lower, upper=upper, converged=False)
    write(tmp_path / "records.jsonl", [record("odd", estimate=odd), record("even", 3.0)])
    done = run(tmp_path)
    assert done.exit_code == 0, done.output
    assert "odd, quotient_spectral_norm (auto) did not converge" in (tmp_path / "report.html").read_text()


def test_a_table_of_everything_parses_back_bit_for_bit(tmp_path):
    import pyarrow.parquet as parquet

    values = [0.1, 1 / 3, 2.0**-40, 1e22, 123456789.123456789, 5e-324, 1.7e308]
    rows = [record(f"net {place}", value) for place, value in enumerate(values)]
    open_ended = replace(record().estimate, upper=math.inf, converged=False)
    write(tmp_path / "records.jsonl", [*rows, record("open", estimate=open_ended)])
    done = run(tmp_path, "--csv", tmp_path / "all.csv", "--parquet", tmp_path / "all.parquet", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["numbers"] == len(values) + 1
    with (tmp_path / "all.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    columns = parquet.read_table(tmp_path / "all.parquet").to_pylist()
    for line, column, row in zip(lines, columns, read_results(tmp_path).found, strict=True):
        estimate = row.record.estimate
        expected = (
            estimate.value,
            estimate.lower,
            estimate.upper,
            estimate.cost.gradient_passes,
            row.record.point.loss,
        )
        names = ("value", "lower", "upper", "cost.gradient_passes", "point.loss")
        assert tuple(float(line[f"result.{name}"]) for name in names) == expected
        assert tuple(column[f"result.{name}"] for name in names) == expected
        assert line["settings.label"] == column["settings.label"] == row.record.label
        assert (line["model_hash"], line["settings.seed"], line["result.point.examples"]) == (
            row.record.model_hash,
            "0",
            "100",
        )


def test_rows_are_handed_to_trackers(tmp_path, monkeypatch):
    from isoflat.integrations import mlflow, trackio

    handed = {}
    monkeypatch.setattr(mlflow, "log", lambda rows, name: handed.update({name: rows}))
    monkeypatch.setattr(trackio, "log", lambda rows, name: handed.update({name: rows}))
    write(tmp_path / "records.jsonl", [record()])
    assert run(tmp_path, "--mlflow", "first", "--trackio", "second").exit_code == 0
    assert handed["first"] == handed["second"]
    assert handed["first"][0]["result.value"] == 2.0


def test_what_is_damaged_or_foreign_is_named_and_the_rest_shown(tmp_path):
    good = record("good")
    write(tmp_path / "records.jsonl", [good])
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"schema": 1, "measu\n[]\n')
    (tmp_path / "measured.json").write_text(json.dumps({"subject": {}, **Table((record("", 5.0),)).to_dict()}))
    (tmp_path / "cut.json").write_text('{"rows": [')
    (tmp_path / "package.json").write_text('{"name": "foreign"}')
    (tmp_path / "old.json").write_text(json.dumps({"rows": [good.to_dict() | {"schema": 99}]}))
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "store").mkdir()
    done = run(tmp_path)
    assert done.exit_code == 0, done.output
    text = Reader((tmp_path / "report.html").read_text()).text
    for name in ("records.jsonl: line 2", "cut.json", "package.json", "old.json", "folder.json", "store"):
        assert name in done.stderr
        assert name in text[text.index("Warnings") :]
    assert "2 numbers of 2 networks." in text
    assert "measured" in text


def test_a_study_has_its_sentences_above_its_numbers(tmp_path):
    named = record("runs/a")
    write(tmp_path / "records.jsonl", [named])
    Store.open(tmp_path / "store").put(
        {"kind": "listed"}, {"table": Table((replace(named, label="a"),)).to_dict()}, None
    )
    content = {"outcome": "gap", "sentences": ["Nothing goes with the gap."], "relations": [], "networks": []}
    left_out = {"left_out": [{"label": "b", "reason": "no weights"}]}
    (tmp_path / "result.json").write_text(json.dumps(content | left_out))
    done = run(tmp_path)
    assert done.exit_code == 0, done.output
    assert "shown by its sentences and numbers only: 'omitted' is missing" in done.stderr
    text = Reader((tmp_path / "report.html").read_text()).text
    assert "Nothing goes with the gap." in text
    assert "1 number of 1 network." in text
    assert "Left out of the study: b: no weights" in text


def test_a_damaged_cell_is_named_and_the_others_shown(tmp_path):
    store = Store.open(tmp_path)
    cells = [
        store.put({"label": name}, {"points": [{"rows": [record(name, value).to_dict()], "omitted": []}]}, None)
        for name, value in (("first", 2.0), ("second", 3.0))
    ]
    path = tmp_path / "cells" / f"{cells[0].address}.json"
    path.write_text(path.read_text().replace("2.0", "9.0", 1))
    before = sorted(tmp_path.rglob("*"))
    done = run(tmp_path, "--out", tmp_path.parent / f"{tmp_path.name}.html")
    assert done.exit_code == 0, done.output
    assert str(path) in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    text = Reader((tmp_path.parent / f"{tmp_path.name}.html").read_text()).text
    assert "1 number of 1 network." in text
    assert cells[0].address in text
    assert "second" in text


@pytest.mark.parametrize("content", [None, "{", "[]", '{"rows": []}', "\0", "NaN", "[" * 100_000])
def test_a_folder_without_anything_readable_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    done = run(tmp_path, "--json")
    assert done.exit_code == 2
    assert "no result of isoflat in it can be read" in done.stderr
    assert content is None or "result.json" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "report.html").exists()


def test_wrong_folders_and_files_are_refused_before_anything_is_read(tmp_path):
    assert "is no folder" in run(tmp_path / "nowhere").stderr
    write(tmp_path / "records.jsonl", [record()])
    same = tmp_path / "same.html"
    assert "name the same file" in run(tmp_path, "--out", same, "--csv", same).stderr
    assert "would replace" in run(tmp_path, "--csv", tmp_path / "records.jsonl", "--force").stderr
    assert "does not exist" in run(tmp_path, "--csv", tmp_path / "no" / "x.csv").stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.jsonl"]


def test_a_reproduction_has_the_page_that_reproduce_made(reproduced, tmp_path):
    done = run(reproduced, "--out", tmp_path / "again.html", "--csv", tmp_path / "all.csv")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert (tmp_path / "again.html").read_text() == (reproduced / "report.html").read_text()
    with (tmp_path / "all.csv").open(newline="") as file:
        values = [float(line["result.value"]) for line in csv.DictReader(file)]
    assert values == [row["value"] for row in json.loads((reproduced / "result.json").read_text())["networks"]]


def test_a_reproduction_with_edits_has_them_again(tmp_path):
    reproduce_in(tmp_path, EDITED)
    assert run(tmp_path, "--out", tmp_path / "again.html").exit_code == 0
    assert (tmp_path / "again.html").read_text() == (tmp_path / "report.html").read_text()


def test_a_reproduction_with_a_damaged_cell_says_who_is_left_out(reproduced, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(reproduced, folder)
    store = Store.open(folder / "store")
    trained = next(
        cell for cell in store.find({"kind": "training", "arm": "small batch"}) if cell.settings["replicate"] == 1
    )
    path = folder / "store" / "cells" / f"{trained.address}.json"
    path.write_text(path.read_text()[:-20])
    done = run(folder, "--force")
    assert done.exit_code == 0, done.output
    assert path.name in done.stderr
    text = Reader((folder / "report.html").read_text()).text
    assert "1 of 4 networks are not in the store" in text
    assert "left out: small batch 1." in text
    assert "Other numbers in this folder" in text  # those of the network whose training cannot be read


def test_a_result_that_was_edited_is_not_believed(reproduced, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(reproduced, folder)
    stored = json.loads((folder / "result.json").read_text())
    stored["networks"][0]["value"] *= 2
    (folder / "result.json").write_text(json.dumps(stored))
    done = run(folder, "--force")
    assert done.exit_code == 0
    assert "result.json tells other numbers than the store" in done.stderr
    stored["recipe"]["arms"] = "none"
    (folder / "result.json").write_text(json.dumps(stored))
    done = run(folder, "--force")
    assert done.exit_code == 0
    assert "refused" in done.stderr
    assert "of 4 networks." in Reader((folder / "report.html").read_text()).text


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("nan"), st.just("\ud800"),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), leaf=LEAVES)
def test_any_part_of_a_record_may_be_wrong(tmp_path, data, leaf):
    content = record("kept").to_dict()
    table = data.draw(st.sampled_from([content, content["estimate"], content["point"], content["estimate"]["cost"]]))
    name = data.draw(st.sampled_from(sorted(table)))
    table[name] = leaf
    (tmp_path / "result.json").write_text(json.dumps({"rows": [content, record("sound").to_dict()]}))
    if data.draw(st.booleans()):
        (tmp_path / "result.json").write_text(json.dumps(content))
    results = read_results(tmp_path)
    assert results.found or results.refused
    if results.found:
        render(page(results, "isoflat report")).encode()


def compared(labels=("small", "large"), values=(2.0, 3.0)):
    return contrast([Table((record(name, value),)) for name, value in zip(labels, values, strict=True)])


def test_a_comparison_that_was_saved_has_the_page_of_compare(tmp_path):
    found = compared()
    (tmp_path / "compared.json").write_text(json.dumps({"subject": {"model": "nets:build"}, **found.to_dict()}))
    assert run(tmp_path).exit_code == 0
    text = (tmp_path / "report.html").read_text()
    assert found.sentences[0] in Reader(text).text
    from isoflat.cli.compare import written

    assert text == written(found, {"model": "nets:build"})


@pytest.mark.parametrize("change", ["pair", "reference", "schema", "label", "basis"])
def test_a_comparison_that_contradicts_itself_is_refused(tmp_path, change):
    content = compared(("a", "b", "c"), (2.0, 3.0, 4.0)).to_dict()
    if change == "pair":
        content["differences"].pop()
    if change in ("reference", "schema"):
        content[change] = "x"
    if change == "label":
        content["rows"][0]["label"] = 7
    if change == "basis":
        content["differences"][0]["basis"] = "a hunch"
    (tmp_path / "compared.json").write_text(json.dumps(content))
    done = run(tmp_path)
    assert done.exit_code == 2
    assert "compared.json is refused, as a comparison" in done.stderr


def test_hostile_names_in_a_comparison_are_text(tmp_path):
    found = compared(HOSTILE, [float(2 + place) for place in range(len(HOSTILE))])
    content = {"subject": {name: name for name in HOSTILE} | {"notes": HOSTILE}, **found.to_dict()}
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps(content | {"reference": HOSTILE[name == "one"]}))
    assert Comparison.from_dict(content) == found
    done = run(tmp_path)
    assert done.exit_code == 0, done.output
    harmless((tmp_path / "report.html").read_text())
    (tmp_path / "two.json").unlink()
    assert run(tmp_path, "--force").exit_code == 0
    harmless((tmp_path / "report.html").read_text())


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A working directory with a model factory and two sets of weights."""
    (tmp_path / "report_nets.py").write_text("from torch import nn\n\ndef build():\n    return nn.Linear(64, 10)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("report_nets", None)
    from report_nets import build

    for name, factor in (("small", 1.0), ("<b>large", 3.0)):
        torch.manual_seed(0)
        save_file(
            {key: factor * tensor for key, tensor in build().state_dict().items()}, tmp_path / f"{name}.safetensors"
        )
    return tmp_path


def test_compare_writes_a_page(nets):
    options = ["--model", "report_nets:build", "--data", "digits", "--examples", "50", "--geometry", "euclidean"]
    command = [
        "compare",
        *options,
        "small.safetensors",
        "<b>large.safetensors",
        "--rtol",
        "0.01",
        "--report",
        "page.html",
    ]
    done = CliRunner().invoke(app, [*command, "--out", "result.json", "--json"])
    assert done.exit_code == 0, done.output
    found = harmless((nets / "page.html").read_text())
    result = json.loads(done.stdout)
    assert result["ranks"][0]["sentence"] in found.text
    assert "report_nets:build" in found.text
    for gap in result["differences"]:
        assert f"{gap['confidence']:.7g}" in found.text
    again = CliRunner().invoke(app, [*command, "--model", "nowhere:build"])
    assert again.exit_code == 2
    assert "--report page.html exists already" in again.stderr  # before the model is looked for
    both = CliRunner().invoke(app, [*command[:-1], "same", "--out", "same"])
    assert both.exit_code == 2
    assert "name the same file" in both.stderr


def test_numbers_at_hand_have_a_page(tmp_path):
    """A table, a comparison and records, without a folder of results."""
    table = Table((record("mine", 2.0),))
    told = []
    written = write_report(table, tmp_path / "table.html", csv=tmp_path / "table.csv", warn=told.append)
    assert (len(written.rows), written.warnings, told) == (1, (), [])
    assert "mine" in Reader((tmp_path / "table.html").read_text()).text
    assert "mine" in (tmp_path / "table.csv").read_text()
    found = compared()
    assert write_report(found, tmp_path / "compared.html").headline == found.sentences[0]
    assert write_report([record("", 3.0)], tmp_path / "records.html").headline == "1 number of 1 network."
    with pytest.raises(UsageError, match="exists already"):
        write_report(table, tmp_path / "table.html")
    with pytest.raises(UsageError, match="name the file"):
        write_report(table)
