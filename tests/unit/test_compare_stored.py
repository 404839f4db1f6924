"""`isoflat compare` of numbers that are stored: as it says of the networks themselves, and only of what can be compared."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from isoflat.cli import reproduce
from isoflat.cli.main import app
from isoflat.core.estimate import Estimate, Kind
from isoflat.core.record import Point, Record
from isoflat.experiments.recipe import parse_recipe
from isoflat.experiments.reproduce import reproduce as follow

ASKED = ("--model", "stored_nets:build", "--data", "digits", "--examples", "60", "--rtol", "0.25")


def record(label, value, measure="quotient_spectral_norm", logits="raw", model="own"):
    return Record(
        measure=measure,
        geometry="auto",
        group="scalings",
        group_hash="aa",
        estimate=Estimate(value, 0.99 * value, 1.01 * value, 0.999, Kind.ENCLOSURE, True),
        point=Point(0.1, 0.9, 1e-3, 1e-4, 100, 100.0, 610, 0.1),
        stationarity_ratio=0.01,
        label=label,
        settings={"seed": 0, "dtype": "float32", "logits": logits},
        versions={"isoflat": "0.1.0"},
        model_hash=f"{label}, {model}",
        data_hash="dd",
    )


def write(name, *records):
    Path(name).write_text("".join(f"{each.to_json()}\n" for each in records), encoding="utf-8")


def compare(*arguments, code=0):
    done = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def found(*arguments):
    return json.loads(compare(*arguments, "--json").stdout)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A model factory and two sets of weights."""
    (tmp_path / "stored_nets.py").write_text("from torch import nn\n\ndef build():\n    return nn.Linear(64, 10)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("stored_nets", None)
    from stored_nets import build

    for name, factor in (("small", 1.0), ("large", 3.0)):
        torch.manual_seed(0)
        save_file({key: factor * tensor for key, tensor in build().state_dict().items()}, f"{name}.safetensors")


def test_stored_numbers_are_compared_as_the_networks_are(nets):
    numbers = ["--measure", "hessian_spectral_norm", "--measure", "hessian_trace"]
    live = found(*ASKED, *numbers, "small.safetensors", "large.safetensors")
    for name in ("small", "large"):
        done = CliRunner().invoke(
            app, ["measure", *ASKED, *numbers, "--weights", f"{name}.safetensors", "--out", f"{name}.json"]
        )
        assert done.exit_code == 0, done.output
    stored = found("small.json", "large.json")
    assert stored["subject"] == {"stored": ["small.json", "large.json"], "notes": []}
    assert [gap["first"] for gap in stored["differences"]] == ["large", "large"]
    for one, other in zip(live["differences"], stored["differences"], strict=True):
        assert {key: other[key] for key in ("verdict", "basis")} == {key: one[key] for key in ("verdict", "basis")}
        for end in ("value", "lower", "upper"):
            assert other[end] == pytest.approx(one[end], rel=1e-6)
    turned = found("small.json", "large.json", "--reference", "large")
    assert turned["differences"][0]["value"] == -stored["differences"][0]["value"]


def test_networks_of_an_experiment_are_compared_at_their_own_weights():
    recipe = parse_recipe(
        """
title = "Tiny"
question = "Are large-batch minima sharper?"
reference = "ours"
asks = "contrast"
replicates = 2
orbit = 1
data = { source = "digits", train = 60, test = 20, flat = true }
network = { family = "mlp", widths = [64, 4, 10], bias = false }
training = { optimizer = "sgd", epochs = 2 }
arms = [{ name = "small batch", batch = 10 }, { name = "large batch" }]
numbers = [{ measure = "quotient_spectral_norm", geometry = "layerwise" }]
""",
        "tiny",
    )
    folder = Path("runs")
    result = follow(recipe, out=folder, jobs=1)
    reproduce.write(result, folder, "isoflat reproduce tiny")
    for place in (folder, folder / "store"):
        told = found(place)
        values = {row["label"]: row["estimate"]["value"] for row in told["rows"]}
        assert values == {n.label: n.table[0].estimate.value for n in result.networks}
        assert "4 other weights of the same networks" in told["subject"]["notes"][0]
        assert len(told["differences"]) == 6


def test_numbers_that_not_all_have_are_left_out_and_named():
    write("a.jsonl", record("a", 1.0), record("a", 5.0, "quotient_trace"))
    write("b.jsonl", record("b", 2.0))
    told = found("a.jsonl", "b.jsonl")
    assert {row["measure"] for row in told["rows"]} == {"quotient_spectral_norm"}
    assert told["subject"]["notes"] == ["not known of all networks, and left out: quotient_trace (auto)"]
    assert (
        "no network with a number to compare"
        in compare("a.jsonl", "b.jsonl", "--measure", "gradient_norm", code=2).stderr
    )
    write("b.jsonl", record("b", 2.0, "quotient_trace"))
    write("a.jsonl", record("a", 1.0))
    assert "no number is known of all 2 networks" in " ".join(compare("a.jsonl", "b.jsonl", code=2).stderr.split())


def test_scores_are_chosen_and_never_mixed():
    raw = [record("a", 1.0), record("b", 2.0)]
    normalised = [record(name, value, logits="normalised") for name, value in (("a", 7.0), ("b", 14.0))]
    write("all.jsonl", *raw, *normalised)
    assert [row["estimate"]["value"] for row in found("all.jsonl")["rows"]] == [1.0, 2.0]
    chosen = found("all.jsonl", "--logits", "normalised")
    assert [row["estimate"]["value"] for row in chosen["rows"]] == [7.0, 14.0]


def test_one_name_in_two_files_is_told_apart():
    write("one.jsonl", record("net", 1.0))
    write("two.jsonl", record("net", 2.0, model="other"))
    assert {row["label"] for row in found("one.jsonl", "two.jsonl")["rows"]} == {"one.jsonl: net", "two.jsonl: net"}


def test_the_page_and_the_result_are_written():
    write("all.jsonl", record("<b>a", 1.0), record("b", 2.0))
    compare("all.jsonl", "--out", "result.json", "--report", "page.html")
    page = Path("page.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;a is flatter" in page
    assert "<b>a" not in page
    assert "exists already" in compare("all.jsonl", "--out", "result.json", code=2).stderr
    assert len(found("result.json")["rows"]) == 2  # a comparison holds numbers too


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("a.jsonl",), "only a with a number to compare"),
        (("a.jsonl", "nowhere.json"), "is no file"),
        (("a.jsonl", "cut.json"), "cut.json is refused"),
        (("a.jsonl", "other.jsonl"), "differ in data"),
        (("a.jsonl", "b.jsonl", "--reference", "c"), "--reference c is none of the networks: a, b"),
        (("a.jsonl", "b.jsonl", "--model", "nets:build", "--rtol", "0.1"), "--model, --rtol"),
        (("a.jsonl", "b.jsonl", "--measure", "hessian"), "hessian"),
        (("a.jsonl", "weights.safetensors"), "weights need --model"),
        ((".",), "no network"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, told):
    write("a.jsonl", record("a", 1.0))
    write("b.jsonl", record("b", 1.0))
    write("other.jsonl", replace(record("c", 1.0), data_hash="ee"))
    Path("cut.json").write_text('{"rows": [')
    if arguments == (".",):
        for name in ("a.jsonl", "b.jsonl", "other.jsonl"):
            Path(name).unlink()
    error = " ".join(compare(*arguments, code=2).stderr.split())
    assert told in error
    assert "Traceback" not in error
