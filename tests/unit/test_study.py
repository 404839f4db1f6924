"""Does flatness predict generalization: planted relations are found, absent ones are not, and nothing is measured twice."""

import csv
import json
import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import kendalltau
from typer.testing import CliRunner

from isoflat.cli.main import app
from isoflat.core.errors import DataError, UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.record import Point, Record
from isoflat.core.table import Omission, Table
from isoflat.experiments import listed
from isoflat.experiments.listed import read_listing
from isoflat.experiments.numbers import Number
from isoflat.experiments.prediction import ObservedNetwork, Prediction
from isoflat.experiments.rebuild import rebuild_study
from isoflat.experiments.recipe import NumberSpec
from isoflat.experiments.study import quantities
from isoflat.measurement.run import measure_all
from isoflat.report.html import render
from isoflat.report.pages.study import page

NETS = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))

class Scaled(nn.Sequential):
    def forward(self, x):
        return super().forward(FACTOR * x)

def scaled():
    return Scaled(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
"""
EVIL = "<script>alert(1)</script>"
MEASURES = ("--measure", "gradient_norm", "--measure", "fisher_rao_norm", "--geometry", "layerwise")
COUNT = 9
POINT = Point(0.1, 0.9, 0.02, 0.05, 9, 9.0, 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a factory, data and checkpoints."""
    (tmp_path / "study_nets.py").write_text(NETS.replace("FACTOR", "2"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("study_nets", None)
    from study_nets import build

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 5, generator=generator)
    targets = torch.randint(3, (40,), generator=generator)
    np.savez("data.npz", x=inputs.numpy(), y=targets.numpy())
    for seed in range(COUNT):
        torch.manual_seed(seed)
        net = build()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1 + seed / 4)
        save_file(net.state_dict(), f"net{seed}.safetensors")
    return tmp_path


@pytest.fixture
def norms(folder):
    """The gradient norm of each checkpoint, measured by itself; checkpoints are the same in every test."""
    return list(_norms())


@cache
def _norms():
    from safetensors.torch import load_file
    from study_nets import build

    data = np.load("data.npz")
    batch = [(torch.from_numpy(data["x"]), torch.from_numpy(data["y"]))]
    found = []
    for seed in range(COUNT):
        net = build()
        net.load_state_dict(load_file(f"net{seed}.safetensors"))
        found.append(
            measure_all(
                net.eval(), batch, torch.nn.CrossEntropyLoss(), measures=["gradient_norm"], geometry="layerwise"
            )[0]
        )
    return tuple(record.estimate.value for record in found)


def _write(outcomes, name="nets.csv", column="gap", **more):
    rows = [
        {"weights": f"net{seed}.safetensors", column: outcome, "batch": 8 * 2 ** (seed % 3)}
        | {key: values[seed] for key, values in more.items()}
        for seed, outcome in enumerate(outcomes)
    ]
    if name.endswith(".toml"):
        tables = ["[[networks]]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in row.items()) for row in rows]
        Path(name).write_text("\n".join(tables), encoding="utf-8")
        return
    with Path(name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _run(*more, networks="nets.csv", model="build"):
    arguments = ["study", "--networks", networks, "--model", f"study_nets:{model}", "--data", "data.npz", *more]
    return CliRunner().invoke(app, arguments)


def _found(*more, **where):
    result = _run(*MEASURES, "--json", *more, **where)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def _refused(*more, **where):
    result = _run(*MEASURES, *more, **where)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


# Networks of a list


def test_a_planted_relation_is_found_and_written(folder, norms):
    noise = np.random.default_rng(0).normal(0, 0.01, COUNT)
    _write([float(value) for value in norms + noise], label=[EVIL, *(f"net {i}" for i in range(1, COUNT))])
    found = _found()
    planted = next(relation for relation in found["relations"] if relation["measure"] == "gradient norm (layerwise)")
    assert planted["found"]
    assert planted["kendall"]["tau"] == pytest.approx(kendalltau(norms, norms + noise).statistic)
    assert "most strongly the gradient norm (layerwise): sharper networks have a larger one" in found["sentences"][0]
    values = [row["value"] for row in found["networks"] if row["measure"] == "gradient_norm"]
    assert values == norms
    place = folder / "isoflat-study"
    html = (place / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert (place / "records.jsonl").read_text(encoding="utf-8").count("\n") == 2 * COUNT
    assert json.loads((place / "result.json").read_text(encoding="utf-8"))["relations"] == found["relations"]
    with (place / "networks.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["label"] == EVIL
    assert {row["factor.batch"] for row in rows} == {"8", "16", "32"}


def test_where_outcomes_are_dealt_out_there_is_no_evidence(folder, norms):
    order = [4, 0, 7, 2, 8, 1, 5, 3, 6]  # τ near 0 with the ranks of the values
    ranked = np.empty(COUNT)
    ranked[np.argsort(norms)] = order
    _write([float(value) for value in ranked])
    result = _run("--measure", "gradient_norm", "--geometry", "layerwise")
    assert result.exit_code == 0, result.output
    assert "There is no evidence that the gradient norm (layerwise) is related" in " ".join(result.stdout.split())


def test_a_relation_the_wrong_way_round_is_said_to_be(folder, norms):
    _write([-value for value in norms])
    assert "have a smaller one, against what flatness promises" in _found()["sentences"][0]


def test_lists_as_csv_and_as_toml_say_the_same(folder, norms):
    for name in ("nets.csv", "nets.toml"):
        _write(norms, name, optimizer=["sgd", "adam", "sgd"] * 3, train_loss=[0.1 + i for i in range(COUNT)])
    one, two = (_found("--out", f"of-{name}", networks=name) for name in ("nets.csv", "nets.toml"))
    one.pop("subject"), two.pop("subject")
    for row in one["networks"] + two["networks"]:
        row.pop("gradient_passes")  # timed
    assert one == two
    assert one["networks"][-1]["training_loss"] == 0.1 + COUNT - 1


def test_what_is_measured_is_not_measured_again(folder, norms, monkeypatch):
    _write(norms)
    first = _found()
    _write(norms[::-1], label=[f"other {i}" for i in range(COUNT)])

    def fail(*arguments, **settings):
        raise AssertionError("measured")

    monkeypatch.setattr(listed, "measure_all", fail)
    again = _found()
    assert [row["value"] for row in again["networks"]] == [row["value"] for row in first["networks"]]
    assert again["networks"][0]["label"] == "other 0"
    for more in (("--rtol", "0.1"), ("--batch-size", "7"), ("--out", "elsewhere")):
        assert isinstance(_run(*MEASURES, *more).exception, AssertionError)


def test_other_code_of_the_network_is_another_network(folder, norms):
    _write(norms)
    first = _found(model="scaled")
    (folder / "study_nets.py").write_text(NETS.replace("FACTOR", "3").replace("return super", "return  super"))
    sys.modules.pop("study_nets")
    again = _found(model="scaled")
    assert [row["value"] for row in again["networks"]] != [row["value"] for row in first["networks"]]


def test_all_bad_rows_are_named_before_anything_is_measured(folder, norms):
    outcomes = [*norms[:3], "much", *norms[4:]]
    _write(outcomes)
    (folder / "net0.safetensors").unlink()
    save_file({"weight": torch.zeros(2)}, "net1.safetensors")
    (folder / "net5.safetensors").write_bytes((folder / "net6.safetensors").read_bytes())
    torch.manual_seed(0)
    state = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).state_dict()
    state["0.bias"][1] = math.nan
    save_file(state, "net2.safetensors")
    told = _refused()
    for row in (
        "5 bad rows",
        "row 4 (net3.safetensors): expected a finite number in the column gap, got 'much'",
        "row 1 (net0.safetensors):",
        "row 2 (net1.safetensors):",
        "row 3 (net2.safetensors): parameter '0.bias' holds 1 NaN or infinite entries",
        "row 7 (net6.safetensors) has the same weights as row 6 (net5.safetensors)",
    ):
        assert row in told
    assert not (folder / "isoflat-study").exists()


def test_of_two_outcomes_one_is_chosen(folder, norms):
    _write(norms, test_accuracy=[0.9 - 0.01 * i for i in range(COUNT)])
    assert "choose one with --outcome" in _refused()
    assert "unknown outcome" in _refused("--outcome", "speed")
    assert "no column test_loss" in _refused("--outcome", "test_loss")
    found = _found("--outcome", "test_accuracy")
    assert found["outcome"] == "test error"
    assert found["networks"][-1]["outcome"] == 1 - (0.9 - 0.01 * (COUNT - 1))
    assert found["factors"] == {"batch": [8, 16, 32]}


def test_seeds_make_replicates_and_no_hyper_parameter(folder, norms):
    _write(norms, seed=list(range(COUNT)))
    found = _found()
    assert found["factors"] == {"batch": [8, 16, 32]}
    assert found["relations"][0]["robust"]["noise"] is not None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no column weights"),
        ("weights,gap\na,1\nb,2\n", "at least 3 networks"),
        ("weights,batch\na,1\nb,2\nc,3\n", "no column gap, test_error, test_accuracy, test_loss to predict"),
        ("weights,gap,gap\n", "a name of its own"),
        ('weights,gap\n"a,1\n', "no CSV"),
    ],
)
def test_lists_without_meaning_are_refused(tmp_path, text, told):
    path = tmp_path / "nets.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=told):
        read_listing(path)


def test_files_that_are_no_lists_are_refused(tmp_path):
    for name, content, told in (
        ("none.csv", None, "cannot be read"),
        ("nets.csv", b"\xff\xfe\x00", "no text in UTF-8"),
        ("nets.xlsx", b"", "expected .csv or .toml"),
        ("nets.toml", b"networks = 3", r"\[\[networks\]\]"),
        ("bad.toml", b"networks", "no TOML"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=told):
            read_listing(tmp_path / name)


def test_rows_of_other_lengths_and_gaps_in_the_losses_are_bad_rows(tmp_path):
    path = tmp_path / "nets.csv"
    path.write_text("weights,test_accuracy,train_loss\na,0.5,1\nb,0.5\nc,97,1\nd,0.5,\n,0.5,1\n")
    found = read_listing(path)
    assert [row.weights.name for row in found.rows] == ["a"]
    assert [problem[:5] for problem in found.problems] == ["row 2", "row 3", "row 4", "row 5"]
    assert found.words == "test error"


@given(
    st.lists(st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3)
)
def test_levels_do_not_depend_on_the_kind_of_list(tmp_path_factory, levels):
    folder = tmp_path_factory.mktemp("lists")
    lines = [f"w{i},{i},{level!r}" for i, level in enumerate(levels)]
    (folder / "a.csv").write_text("\n".join(["weights,gap,rate", *lines]))
    tables = [f'[[networks]]\nweights = "w{i}"\ngap = {i}\nrate = {level!r}' for i, level in enumerate(levels)]
    (folder / "a.toml").write_text("\n".join(tables))
    one, two = (read_listing(folder / name).rows for name in ("a.csv", "a.toml"))
    assert one == two
    assert [row.factors["rate"] for row in one] == levels


# The verb


def test_ways_in_do_not_mix(folder, norms):
    _write(norms)
    (folder / "grid.toml").write_text("[grid]\nbatch = [8]\n")
    for arguments, told in (
        ([], "either --networks"),
        (["--networks", "nets.csv", "--grid", "grid.toml"], "either --networks"),
        (["--networks", "nets.csv"], "needs --model"),
        (["--networks", "nets.csv", "--jobs", "2"], "--jobs belongs to --grid"),
        (["--grid", "grid.toml", "--batch-size", "2", "--model", "a:b"], "--model, --batch-size belongs to --networks"),
        (["--networks", "nets.csv", "--geometry", "auto"], "name measures too"),
    ):
        result = CliRunner().invoke(app, ["study", *arguments])
        assert result.exit_code == 2
        assert told in " ".join(result.stderr.split())


def test_measures_that_know_one_geometry_are_measured_once():
    assert quantities(["hessian_trace", "gradient_norm"], ["auto", "layerwise"]) == (
        ("hessian_trace", "euclidean"),
        ("gradient_norm", "auto"),
        ("gradient_norm", "layerwise"),
    )


GRID = """
replicates = 2
data = { source = "digits", train = 100, test = 100 }
network = { family = "mlp", widths = [64, 8, 10] }
training = { optimizer = "sgd", epochs = 3 }

[grid]
batch = [10, 50]
rate = [0.01, 0.1]
"""


def test_a_grid_is_trained_measured_and_related(folder):
    (folder / "small.toml").write_text(GRID)
    arguments = ["study", "--grid", "small.toml", "--jobs", "1", *MEASURES]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["factors"] == {"batch": [10, 50], "rate": [0.01, 0.1]}
    assert [relation["networks"] for relation in found["relations"]] == [8, 8]
    assert all(relation["robust"]["noise"] is not None for relation in found["relations"])
    assert "<svg" in (folder / "isoflat-study" / "report.html").read_text(encoding="utf-8")
    again = CliRunner().invoke(app, [*arguments, "--outcome", "test_loss"])
    assert again.exit_code == 0, again.output
    assert "related to the test loss" in " ".join(again.stdout.split())


def test_networks_that_miss_their_target_are_named_and_left_out(folder):
    text = GRID.replace("epochs = 3", "epochs = 12, target = 1.0").replace("replicates = 2", "replicates = 1")
    (folder / "small.toml").write_text(text.replace("[0.01, 0.1]", "[0.0001, 0.1, 0.2]"))
    result = CliRunner().invoke(app, ["study", "--grid", "small.toml", "--jobs", "1", *MEASURES, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    left = {entry["label"] for entry in found["left_out"]}
    assert {"batch 10, rate 0.0001 0", "batch 50, rate 0.0001 0"} <= left
    assert left.isdisjoint(row["label"] for row in found["networks"])
    assert "which missed its target" in " ".join(found["sentences"])


def test_networks_that_diverge_are_named_and_left_out(folder):
    text = GRID.replace("replicates = 2", "replicates = 1").replace("[0.01, 0.1]", "[0.01, 0.1, 1e30]")
    (folder / "small.toml").write_text(text)
    result = CliRunner().invoke(app, ["study", "--grid", "small.toml", "--jobs", "1", *MEASURES, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {entry["label"] for entry in found["left_out"]} == {"batch 10, rate 1e+30 0", "batch 50, rate 1e+30 0"}
    assert {relation["networks"] for relation in found["relations"]} == {4}
    assert "rate 1e+30 0, which diverged: the training loss is" in " ".join(found["sentences"])


def test_grids_without_meaning_are_refused(folder):
    for text, told in (
        ("asks = 'relation'", "a table [grid]"),
        (GRID + "momentum = 3", "momentum"),
        (GRID.replace("100", "10000"), "10000 are asked for"),
        (GRID.replace("[10, 50]", "[10]").replace("[0.01, 0.1]", "[0.01]"), "at least 3 networks"),
        ('data = { source = "gaussian" }\n' + GRID.replace("data", "#"), "no held-out rows"),
        ("grid", "no TOML"),
    ):
        (folder / "small.toml").write_text(text)
        result = CliRunner().invoke(app, ["study", "--grid", "small.toml", "--jobs", "1"])
        assert result.exit_code == 2, result.output
        assert told in " ".join(result.stderr.split())


# The page, written again from the folder


def _again(*more):
    done = CliRunner().invoke(app, ["report", "isoflat-study", "--out", "again.html", "--force", *more])
    assert done.exit_code == 0, done.output
    return done.stderr, Path("again.html").read_text(encoding="utf-8")


def _edit(change):
    path = Path("isoflat-study/result.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_the_page_of_a_list_is_written_again(folder, norms):
    _write(norms, label=[EVIL, *(f"net {i}" for i in range(1, COUNT))], optimizer=["sgd", "adam", "sgd"] * 3)
    _found()
    told, html = _again()
    assert told == ""
    assert html == Path("isoflat-study/report.html").read_text(encoding="utf-8")


def test_the_page_of_a_grid_is_written_again_with_what_was_left_out(folder):
    text = GRID.replace("epochs = 3", "epochs = 12, target = 1.0").replace("replicates = 2", "replicates = 1")
    (folder / "small.toml").write_text(text.replace("[0.01, 0.1]", "[0.0001, 0.1, 0.2, 0.3]"))
    result = CliRunner().invoke(app, ["study", "--grid", "small.toml", "--jobs", "1", *MEASURES])
    assert result.exit_code == 0, result.output
    told, html = _again()
    assert told == ""
    first, found, _ = html.partition("Other numbers in this folder")  # of those that were left out
    assert found
    assert "which missed its target" in first
    written = Path("isoflat-study/report.html").read_text(encoding="utf-8")
    assert written.startswith(first[: first.rindex("<section>")])


def test_an_edited_study_is_not_believed(folder, norms):
    _write(norms)
    _found()
    whole = Path("isoflat-study/report.html").read_text(encoding="utf-8")
    _edit(lambda content: content["sentences"].__setitem__(0, "Flatness explains everything."))
    told, html = _again()
    assert "says other sentences than its numbers" in told
    assert "Flatness explains everything" not in html
    assert whole.count("<svg") == html.count("<svg")
    _edit(lambda content: content["networks"][1].__setitem__("value", 1e9))
    told, html = _again()
    assert "is not among the numbers of the folder, or is another there" in told
    assert "1e+09" not in html


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_part_of_a_study_may_be_wrong(studied, data):
    written, records = studied
    content = json.loads(written)
    place = content
    while isinstance(place, dict | list) and place:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        within, place = place, place[key]
        if data.draw(st.booleans()):
            break
    within[key] = data.draw(st.sampled_from([None, -1, 0.5, True, "", EVIL, [], {}, [None], {"a": 1}, "nan"]))
    found = rebuild_study(content, records)  # never an exception
    assert found.result is not None or found.warnings


@pytest.fixture
def studied(folder, norms):
    _write(norms, optimizer=["sgd", "adam", "sgd"] * 3)
    assert _run("--measure", "gradient_norm", "--geometry", "layerwise").exit_code == 0
    content = json.loads(Path("isoflat-study/result.json").read_text(encoding="utf-8")) | {"draws": 99}
    lines = Path("isoflat-study/records.jsonl").read_text(encoding="utf-8").splitlines()
    return json.dumps(content), [Record.from_dict(json.loads(line)) for line in lines]


# What is said of the numbers


def _number(measure="gradient_norm", geometry="auto"):
    return NumberSpec(measure=measure, geometry=geometry).number


def _network(label, outcome, values, group="g", **factors):
    rows = tuple(
        Record(number.measure, number.geometry, "", group, Estimate.exact(value), POINT, settings={"logits": "raw"})
        for number, value in values.items()
    )
    return ObservedNetwork(label, Table(rows, (Omission("fisher_rao_norm", "euclidean", "no"),)), outcome, 0.1, factors)


def _prediction(networks, *numbers: Number):
    return Prediction(numbers, tuple(networks), "test error", draws=199)


def test_numbers_that_are_higher_for_flatter_minima_are_turned():
    rank = _number("quotient_effective_rank")
    found = _prediction([_network(str(i), float(i), {rank: 9.0 - i}) for i in range(8)], rank)
    assert found.samples["negated quotient effective rank (auto)"].values == tuple(i - 9.0 for i in range(8))
    assert found.relations[0].claim.startswith("A higher negated quotient effective rank (auto) goes with a larger")


def test_a_number_is_related_where_it_is_known_and_this_is_said():
    one, other = _number(), _number("fisher_rao_norm")
    networks = [_network(f"n{i}", float(i), {one: 1.0 + i} | ({other: 1.0 + i} if i > 2 else {})) for i in range(9)]
    found = _prediction(networks, one, other)
    assert [relation.networks for relation in found.relations] == [9, 6]
    assert "The Fisher-Rao norm is known of 6 of 9 networks, not of n0, n1, n2." in found.sentences
    few = _prediction([networks[0], *networks[3:5]], one, other)
    assert [relation.networks for relation in few.relations] == [3]
    assert any("known of 2 networks: too few" in note for note in few.notes)


def test_too_few_networks_are_said_to_be_too_few():
    number = _number()
    networks = [_network(str(i), float(i), {number: 1.0 + i}) for i in range(4)]
    assert "With 4 networks nothing can be shown" in _prediction(networks, number).headline
    assert "at least 3 networks" in _prediction(networks[:2], number).headline
    alike = [replace(network, outcome=0.5) for network in networks]
    assert "all 4 networks have the same test error" in _prediction(alike, number).headline


def test_what_speaks_against_a_finding_is_said():
    number = _number()
    networks = [
        _network(f"{a} {b}", 10.0 * a + b, {number: 10.0 * a - b + 2}, a=a, b=b) for a in range(6) for b in range(2)
    ]
    found = _prediction(networks, number)
    assert found.strongest is not None
    assert found.cautions == (
        "Given the training loss there is still evidence of gradient norm (auto).",
        "What a change of a hyper-parameter does is not always predicted: where b is 0 against 1, the gradient norm (auto) "
        "orders 100 % of pairs wrongly.",
    )
    explained = [replace(network, loss=network.outcome) for network in networks]
    assert "no evidence left" in _prediction(explained, number).cautions[0]


def test_networks_with_other_symmetries_are_not_compared_silently():
    number = _number()
    networks = [_network(str(i), float(i), {number: 1.0 + i}, group=str(i % 2)) for i in range(6)]
    assert any("2 architectures" in note for note in _prediction(networks, number).notes)
    assert not _prediction([_network(n.label, n.outcome, {number: 1.0}) for n in networks], number).notes


def test_a_page_takes_names_as_they_come():
    number = _number()
    names = (EVIL, r"$\frac", "_hidden", "\x1b[31m")
    networks = [
        _network(f"{name}{i}", float(i % 5), {number: float(i) - 1 if i > 20 else 1.0 + i}, **{r"_$x": name})
        for i, name in enumerate(names * 3)
    ]
    html = render(page(_prediction(networks, number), f"isoflat study {EVIL}", (("Data", EVIL),)))
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 3
    assert "hidden" in html[html.index("<svg") : html.index("</svg>")]
    flat = [replace(network, table=Table(())) for network in networks]
    assert "Nothing can be said" in render(page(_prediction(flat, number), "isoflat study", ()))
