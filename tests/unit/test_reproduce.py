"""Recipes, cells and sweeps: what is asked is checked first, trained once, and said honestly."""

import csv
import json
import math
import random
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from isoflat.cli.exits import DOES_NOT_HOLD
from isoflat.cli.main import app
from isoflat.cli.reproduce import show, write
from isoflat.core.errors import DataError, IsoflatError, NoInvariantGeometry, RankLost, UnknownName, UsageError
from isoflat.core.estimate import Estimate, Kind
from isoflat.core.record import Point, Record
from isoflat.core.table import Table
from isoflat.experiments import cells, checking, families
from isoflat.experiments.cells import MeasuredNetwork, NetworkTask, labelled
from isoflat.experiments.data import Split, digits, gaussian, load_split
from isoflat.experiments.loop import Training
from isoflat.experiments.rebuild import rebuild_reproduction
from isoflat.experiments.recipe import Asks, DataSpec, NumberSpec, Scale, parse_recipe, read_recipe, recipes
from isoflat.experiments.reproduce import reproduce
from isoflat.experiments.reproduction import Reproduction
from isoflat.experiments.store import Store, address
from isoflat.experiments.sweep import sweep, tasks
from isoflat.measurement.run import measure_all
from isoflat.report.html import render
from isoflat.report.pages.reproduce import page

SMALL = """
title = "t"
question = "q?"
reference = "r"
asks = "contrast"
data = { source = "digits", train = 120, test = 60 }
network = { family = "mlp", widths = [64, 12, 8, 10], bias = false }
training = { optimizer = "adam", rate = 0.01, target = 0.3, epochs = 200, looks = 2.0 }
arms = [{ name = "small batch", batch = 8 }, { name = "large batch" }]
replicates = 2
numbers = [{ measure = "quotient_spectral_norm" }, { measure = "hessian_spectral_norm" }]
"""


DIVERGING = SMALL.replace('{ name = "large batch" }', '{ name = "large batch", optimizer = "sgd", rate = 1e6 }')


def _followed(recipe, folder, jobs=1):
    numbers = tuple(quantity.number for quantity in recipe.numbers)
    split = load_split(recipe.data, None)
    networks = sweep(tasks(recipe), split, numbers, Store.open(folder), jobs=jobs)
    return Reproduction(recipe, split.name, numbers, networks, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def result(folder):
    return _followed(parse_recipe(SMALL, "tiny"), folder)


@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("name", recipes())
def test_every_recipe_can_be_built(name, scale):
    recipe = read_recipe(name, scale)
    assert recipe.title and recipe.question and recipe.reference
    for quantity in recipe.numbers:
        assert quantity.number.words
    shape = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "digits": (64,), "gaussian": (50,)}.get(recipe.data.source)
    if shape is None:
        data = load_split(recipe.data, None)
        inputs = data.train[0][:2]
    else:
        inputs = torch.zeros(2, *((math.prod(shape),) if recipe.data.flat else shape))
        data = Split("none", (inputs, torch.zeros(2, dtype=torch.int64)), (inputs[:0], torch.zeros(0)))
    model = cells.initial_network(NetworkTask(recipe, recipe.arms[0], 0), data)
    with torch.no_grad():
        assert len(model(inputs)) == 2


def test_the_papers_experiments_are_the_papers():
    mlp = read_recipe("mnist-mlp", Scale.PAPER)
    assert mlp.network.arguments["widths"] == [784, *[512] * 5, 10] and not mlp.network.arguments["bias"]
    assert [arm.training.batch for arm in mlp.arms] == [256, 5000] and mlp.replicates == 5
    assert {arm.training.epochs for arm in mlp.arms} == {200} and mlp.data.train == 50000
    alexnet, vgg = read_recipe("cifar10-alexnet", Scale.PAPER), read_recipe("cifar10-vgg16", Scale.PAPER)
    for recipe, epochs, halve in ((alexnet, (150, 500), 30), (vgg, (90, 300), 50)):
        small, large = (arm.training for arm in recipe.arms)
        assert (small.batch, small.rate, small.momentum, small.halve_every) == (256, 1e-4, 0.9, halve)
        assert (large.batch, large.rate, large.momentum, large.halve_every) == (2000, 1e-3, 0.99, None)
        assert (small.epochs, large.epochs) == epochs and recipe.data.measured == 10000
    assert vgg.data.raw and not alexnet.data.raw
    synthetic = read_recipe("synthetic-invariance")
    assert synthetic.edit.weights == (5, 4, 1 / 20) and synthetic.edit.biases == (5, 20, 1)
    assert math.prod(synthetic.edit.weights) == 1


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('optimizer = "adam"', 'optimizer = "adamm"', "unknown optimizer"),
        ("replicates = 2", "replicates = 0", "replicates"),
        ("replicates = 2", "replicas = 2", "replicas"),
        (', { name = "large batch" }', "", "two arms"),
        ("target = 0.3", "target = -1", "target"),
        ('asks = "contrast"', 'asks = "trend"', "at least three arms"),
        ('asks = "contrast"', 'asks = "invariance"', "edit"),
        ('title = "t"', "title = ", "no TOML"),
        ('name = "large batch"', 'name = "small batch"', "different names"),
    ],
)
def test_recipes_without_meaning_are_refused(old, new, told):
    assert old in SMALL
    with pytest.raises(UsageError, match=told):
        parse_recipe(SMALL.replace(old, new), "tiny")


def test_unknown_names_are_refused():
    with pytest.raises(UnknownName, match="mnist-mlp"):
        read_recipe("mnist-mpl")
    with pytest.raises(UnknownName):
        families.find("mpl")


def test_a_scale_stands_over_the_rest():
    text = SMALL + "\n[paper]\ndata = { train = 130 }\nreplicates = 3\n"
    small, paper = parse_recipe(text, "tiny"), parse_recipe(text, "tiny", Scale.PAPER)
    assert (small.data.train, small.replicates, paper.data.train, paper.replicates) == (120, 2, 130, 3)
    assert paper.data.test == 60 and parse_recipe(text, "tiny", replicates=7).replicates == 7


def test_a_grid_makes_an_arm_of_each_combination():
    text = SMALL.replace('arms = [{ name = "small batch", batch = 8 }, { name = "large batch" }]', "")
    text = (
        text.replace('asks = "contrast"', 'asks = "relation"')
        + "\n[grid]\nbatch = [8, 16]\nwidths = [[64, 8, 10], [64, 9, 10]]\n"
    )
    recipe = parse_recipe(text, "tiny")
    assert [arm.factors for arm in recipe.arms] == [
        {"batch": batch, "widths": widths} for batch in (8, 16) for widths in ("64-8-10", "64-9-10")
    ]
    assert recipe.arms[3].training.batch == 16 and recipe.arms[3].network == {"widths": [64, 9, 10]}
    assert cells.initial_network(NetworkTask(recipe, recipe.arms[3], 0), digits())[0].out_features == 9


def test_networks_of_one_replicate_start_alike_and_others_do_not(result):
    recipe = result.recipe
    first, second = recipe.arms
    weights = [
        cells.initial_network(NetworkTask(recipe, arm, k), digits())[0].weight
        for arm, k in ((first, 0), (second, 0), (first, 1))
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_orbit_points_are_the_same_functions_with_the_same_canonical_number(result):
    canonical, plain = result.numbers
    assert result.drift(canonical) < 0.02  # twice the enclosures' width
    assert result.drift(plain) > 0.5  # the test bites
    for network in result.networks:
        before, after = canonical.find(network.table), network.moved[0].rows[0]
        assert after.point.loss == pytest.approx(before.point.loss, rel=1e-4)
        assert after.model_hash != before.model_hash


def test_a_second_time_nothing_is_computed(result, folder, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(cells, "train", never)
    monkeypatch.setattr(cells, "measure_all", never)
    again = _followed(result.recipe, folder)
    assert [n.table.to_json() for n in again.networks] == [n.table.to_json() for n in result.networks]
    with pytest.raises(AssertionError, match="computed again"):
        _followed(result.recipe.model_copy(update={"seed": 1}), folder)


def test_another_number_trains_nothing(result, folder, monkeypatch):
    monkeypatch.setattr(cells, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    other = _followed(parse_recipe(SMALL, "tiny", orbit=0, numbers=[{"measure": "gradient_norm"}]), folder)
    assert [n.training for n in other.networks] == [n.training for n in result.networks]


def test_several_jobs_give_the_same_bits(result, tmp_path):
    other = _followed(parse_recipe(SMALL, "tiny", orbit=0, replicates=1), tmp_path, jobs=2)
    for a, b in zip(result.networks[:2], other.networks, strict=True):
        assert a.label == b.label
        assert [(r.model_hash, r.estimate.value) for r in a.table] == [
            (r.model_hash, r.estimate.value) for r in b.table
        ]


def test_networks_that_miss_their_target_are_reported_and_left_out(tmp_path):
    text = SMALL.replace("target = 0.3, epochs = 200", "target = 0.001, epochs = 2")
    found = _followed(parse_recipe(text, "tiny", orbit=0), tmp_path)
    assert len(found.missed) == 4 and not found.verdicts()
    assert any("missed the target" in sentence for sentence in found.sentences)
    assert "No comparison" in found.sentences[0]


@pytest.fixture(scope="module")
def diverged(folder):
    return _followed(parse_recipe(DIVERGING, "tiny"), folder)


def test_networks_that_diverge_are_told_and_left_out_and_the_others_measured(diverged, result):
    assert [network.label for network in diverged.diverged] == ["large batch 0", "large batch 1"]
    assert not diverged.missed and not diverged.verdicts()
    told = " ".join(diverged.sentences)
    assert "diverged: large batch 0" in told and "take a smaller step" in told
    assert {summary.arm for summary in diverged.summaries} == {"small batch"}
    for own, other in zip(diverged.networks[::2], result.networks[::2], strict=True):
        assert own.table == other.table and own.moved == other.moved
    assert diverged.points == 1 and diverged.drift(diverged.numbers[0]) < 0.02


def test_networks_that_diverge_are_in_every_file(diverged, folder, tmp_path):
    write(diverged, tmp_path, "isoflat reproduce tiny")
    show(diverged, tmp_path)
    stored = json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [part["label"] for part in stored["diverged"]] == ["large batch 0", "large batch 1"]
    rows = [row for row in stored["networks"] if row["arm"] == "large batch"]
    assert [(row["replicate"], row["reached"], row["training_loss"], row["value"]) for row in rows] == [
        (0, False, None, None),
        (1, False, None, None),
    ]
    assert all(row.keys() - {"diverged"} == stored["networks"][0].keys() for row in rows)
    with (tmp_path / "networks.csv").open(encoding="utf-8") as file:
        lines = [row for row in csv.DictReader(file) if row["arm"] == "large batch"]
    assert [line["training_loss"] for line in lines] == ["", ""] and all(
        "diverged" in line["diverged"] for line in lines
    )
    assert ">diverged<" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert checking.check_against(stored, diverged).holds
    again = rebuild_reproduction(stored, Store.open(folder).cells()[0])
    assert not again.warnings and again.result.rows() == diverged.rows()


def test_a_network_that_diverged_is_not_trained_again(diverged, folder, monkeypatch):
    monkeypatch.setattr(cells, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    again = _followed(diverged.recipe, folder)
    assert again.rows() == diverged.rows() and again.sentences == diverged.sentences


def test_what_cannot_be_measured_of_one_network_is_omitted_there(result, folder, monkeypatch):
    recipe = result.recipe.model_copy(update={"rtol": 0.02})
    refused = ("small batch 1", "large batch 0")

    def measured(model, *args, measures, geometry, label, **settings):
        # The first has a number that is refused, the second has nothing else.
        if label == refused[1] or (label == refused[0] and "auto" in geometry):
            raise NoInvariantGeometry(f"no metric for {label}")
        return measure_all(model, *args, measures=measures, geometry=geometry, label=label, **settings)

    monkeypatch.setattr(cells, "measure_all", measured)
    found = _followed(recipe, folder)
    counts = {network.label: (len(network.table), len(network.table.omitted)) for network in found.networks}
    assert counts == {
        "small batch 0": (2, 0),
        "small batch 1": (1, 1),
        "large batch 0": (0, 2),
        "large batch 1": (2, 0),
    }
    assert "Not known of small batch 1: quotient_spectral_norm (auto): no metric for small batch 1." in found.sentences
    html = render(page(found, "isoflat reproduce tiny"))
    assert "no metric for large batch 0" in html
    assert [row["value"] for row in found.rows() if (row["arm"], row["replicate"]) == ("large batch", 0)] == [None]
    monkeypatch.setattr(cells, "measure_all", lambda *args, **kwargs: pytest.fail("measured again"))
    assert _followed(recipe, folder).rows() == found.rows()


def test_orbits_that_cannot_be_found_are_omitted(result, folder, monkeypatch):
    monkeypatch.setattr(cells, "symmetries", _raising(NoInvariantGeometry("no orbit here")))
    found = _followed(result.recipe.model_copy(update={"spread": 0.5}), folder)
    assert all(len(network.table) == 2 and len(network.moved[0]) == 0 for network in found.networks)
    assert any("no orbit here" in sentence for sentence in found.sentences)


def test_that_a_process_is_lost_is_no_result(result, folder, monkeypatch):
    monkeypatch.setattr(cells, "measure_all", _raising(RankLost("gone")))
    with pytest.raises(RankLost):
        _followed(result.recipe.model_copy(update={"rtol": 0.03}), folder)


def _raising(error):
    def call(*args, **kwargs):
        raise error

    return call


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            '{ measure = "hessian_spectral_norm" }',
            '{ measure = "hessian_spectral_norm", logits = "loss=-1" }',
            "logits",
        ),
        ("replicates = 2", "replicates = 2\nrtol = 1e-9", "rounding"),
        ('{ name = "large batch" }', '{ name = "large batch", network = { depth = 3 } }', "cannot be built"),
        ("spectral_norm", "spectral_norms", "unknown measure"),
        ("widths = [64, 12", "widths = [60, 12", "does not run on digits"),
    ],
)
def test_what_holds_for_all_networks_is_refused_before_any_is_trained(old, new, told, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "train", lambda *args, **kwargs: pytest.fail("trained"))
    assert old in SMALL
    with pytest.raises(IsoflatError, match=told):
        reproduce(parse_recipe(SMALL.replace(old, new, 1), "tiny"), out=tmp_path, jobs=1)


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_read_back_is_the_same_to_the_store(name):
    recipe, data = read_recipe(name), digits()
    again = checking.stored_recipe(json.loads(json.dumps({"recipe": recipe.model_dump(mode="json")})), name)
    for own, other in zip(tasks(recipe), tasks(again), strict=True):
        assert address(own.training(data)) == address(other.training(data))


def test_bounds_around_the_initial_weights_are_given_them(result, folder):
    name = "pac_bayes_effective_curvature"
    found = _followed(parse_recipe(SMALL, "tiny", orbit=0, numbers=[{"measure": name}]), folder)
    task, data = found.networks[0].task, load_split(result.recipe.data, None)
    trained, initial = cells.initial_network(task, data), cells.initial_network(task, data)
    trained.load_state_dict(Store.open(folder).get(address(task.training(data))).tensors())
    settings = {"measures": [name], "rtol": task.recipe.rtol, "initial": initial}
    alone = measure_all(trained.eval(), data.train, torch.nn.CrossEntropyLoss(), **settings)
    row = found.networks[0].table[0]
    assert row.estimate.value == pytest.approx(alone[0].estimate.value, rel=1e-5)
    assert row.settings["initial"] == alone[0].settings["initial"] is not None
    assert all(record.settings["initial"] is None for record in result.records)


MOMENTS = 100
"""Reports of a run that a kill may follow; it makes more."""

KILLED = """
import sys
from pathlib import Path

from isoflat.experiments.data import load_split
from isoflat.experiments.recipe import parse_recipe
from isoflat.experiments.store import Store
from isoflat.experiments.sweep import sweep, tasks

recipe = parse_recipe(sys.argv[1], "tiny", orbit=0, replicates=1)
numbers = tuple(quantity.number for quantity in recipe.numbers)
store = Store.open(Path(sys.argv[2]))
sweep(tasks(recipe), load_split(recipe.data, None), numbers, store, lambda text, done: print(text, flush=True))
"""


def test_a_run_that_is_killed_goes_on_to_the_same_numbers(result, tmp_path):
    moment = random.randint(1, MOMENTS)
    with subprocess.Popen([sys.executable, "-c", KILLED, SMALL, tmp_path], stdout=subprocess.PIPE, text=True) as child:
        for _ in range(moment):
            child.stdout.readline()
        child.kill()
    assert child.returncode == -signal.SIGKILL, moment
    again = _followed(parse_recipe(SMALL, "tiny", orbit=0, replicates=1), tmp_path)
    for own, other in zip(again.networks, result.networks[:2], strict=True):
        assert own.label == other.label
        values = [[(row.model_hash, row.estimate.value) for row in network.table] for network in (own, other)]
        assert values[0] == values[1], moment


def test_an_edit_moves_what_it_should(tmp_path):
    recipe = read_recipe("synthetic-invariance", replicates=1)
    found = _followed(recipe, tmp_path)
    drifts = {number.name: found.drift(number) for number in found.numbers}
    # Two Lanczos runs that converge apart differ by their tolerance, not more.
    assert drifts["quotient_spectral_norm@layerwise"] < 1e-12
    assert drifts["quotient_spectral_norm@auto"] < 1e-10
    assert drifts["hessian_spectral_norm@euclidean"] > 1


def test_noise_draws_labels_and_more_noise_keeps_them():
    data = digits()
    some, more, every = (labelled(data, share, 0)[1] for share in (0.2, 0.5, 1.0))
    changed = (some != data.train[1]).float().mean()
    assert 0.13 < changed < 0.23  # nine tenths of a fifth
    assert torch.equal(labelled(data, 0.0, 0)[1], data.train[1])
    moved = some != data.train[1]
    assert torch.equal(some[moved], more[moved]) and torch.equal(
        more[more != data.train[1]], every[more != data.train[1]]
    )


def test_gaussian_labels_are_binomial():
    _, targets = gaussian(20000, 2, 10).train
    counts = torch.bincount(targets, minlength=10) / 20000
    expected = torch.tensor([math.comb(9, k) / 512 for k in range(10)])
    assert (counts - expected).abs().max() < 5 * (0.25 / 20000) ** 0.5


def test_the_page_and_the_json_say_everything(result):
    html = render(page(result, "isoflat reproduce tiny"))
    for network in result.networks:
        assert network.label in html
    told = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert len(told["networks"]) == 4 * 2 * 2
    assert {row["point"] for row in told["networks"]} == {0, 1}


def test_a_check_finds_what_differs(result):
    stored = json.loads(json.dumps(result.to_dict()))
    same = checking.check_against(stored, result)
    assert same.holds and same.same == same.networks == 4
    for edit in (_shifted, _narrowed, _turned):
        other = json.loads(json.dumps(stored))
        edit(other)
        assert not checking.check_against(other, result).holds


def _shifted(stored):
    for row in stored["summaries"]:
        row["mean"] *= 100


def _narrowed(stored):
    stored["networks"][0]["lower"] = stored["networks"][0]["upper"] = 2 * stored["networks"][0]["value"]


def _turned(stored):
    for verdict in stored["verdicts"].values():
        verdict["finding"] = "sharper" if verdict["finding"] != "sharper" else "flatter"


def _run(*arguments):
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


def test_the_verb_from_end_to_end(tmp_path):
    out = tmp_path / "run"
    once = _run("synthetic-invariance", "--replicates", 1, "--out", out, "--jobs", 1)
    assert once.exit_code == 0 and "paper's number" in once.stdout
    names = {path.name for path in out.iterdir()}
    assert names == {"store", "result.json", "networks.csv", "records.jsonl", "report.html"}
    again = _run("--check", out / "result.json", "--out", out, "--jobs", 1, "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["check"]["holds"]
    stored = json.loads((out / "result.json").read_text())
    stored["summaries"][0]["mean"] = 7.0
    (tmp_path / "edited.json").write_text(json.dumps(stored))
    assert _run("--check", tmp_path / "edited.json", "--out", out, "--jobs", 1).exit_code == DOES_NOT_HOLD


@pytest.mark.slow
def test_workers_that_submitit_runs_fill_the_same_store(tmp_path):
    pytest.importorskip("submitit")
    recipe = parse_recipe(SMALL.replace("replicates = 2", "replicates = 1"), "tiny", orbit=0)
    from isoflat.experiments.reproduce import submitted

    submitted("local", recipe, None, tmp_path, 1, None)
    assert len(Store.open(tmp_path / "store").cells()[0]) == 4  # a training and a measurement for each network
    assert list((tmp_path / "jobs").iterdir())
    with pytest.raises(UsageError, match=r"(?i)slurm|sbatch|srun"):
        submitted("slurm", recipe, None, tmp_path, 1, None)


def test_recipes_are_listed():
    assert {recipe["name"] for recipe in json.loads(_run("--json").stdout)} == set(recipes())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("mnist-mpl",), "mnist-mlp"),
        (("mnist-mlp",), "--data"),
        (("mnist-mlp", "--data", "nowhere.npz"), "no such"),
        (("digits", "--data", "x.npz"), "comes with isoflat"),
        (("digits", "--scale", "huge"), "small"),
        (("digits", "--measure", "quotient"), "measure"),
        (("digits", "--geometry", "auto"), "--measure"),
        (("--check", "nowhere.json"), "cannot be read"),
        (("digits", "--submit", "moon"), "slurm"),
    ],
)
def test_the_verb_refuses_in_one_line(arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = _run(*arguments)
    assert found.exit_code == 2 and told in found.stderr and len(found.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_the_first_rows_are_taken():
    whole, part = digits(), load_split(DataSpec(source="digits", train=120, test=60), None)
    for pair, every, rows in ((part.train, whole.train, 120), (part.test, whole.test, 60)):
        assert all(
            len(own) == rows and torch.equal(own, all_of_it[:rows]) for own, all_of_it in zip(pair, every, strict=True)
        )
    assert part.hash != whole.hash == digits().hash


def test_data_with_too_few_rows_is_refused():
    with pytest.raises(DataError, match="1257"):
        load_split(DataSpec(source="digits", train=5000), None)
    with pytest.raises(UsageError, match="must be one of"):
        load_split(DataSpec(source="svhn"), None)


def test_asks_are_all_used():
    assert {read_recipe(name).asks for name in recipes()} == set(Asks) - {Asks.RELATION}


def _judged(errors, values):
    """An experiment on generalization in which the second arm has these test errors and numbers, the first has ones."""
    recipe = parse_recipe(SMALL.replace("contrast", "dissent").replace("replicates = 2", "replicates = 4"), "tiny")
    point = Point(0.1, 0.9, 1e-3, 1e-4, 100, 100.0, 610, 0.1)
    [number] = [quantity.number for quantity in recipe.numbers][:1]

    def network(task):
        second = task.arm == recipe.arms[1]
        factor = 1 + task.replicate / 100
        error, value = (errors, values) if second else (1.0, 1.0)
        estimate = Estimate(value * factor, value * factor, value * factor, 0.999, Kind.ENCLOSURE, True)
        row = Record(number.measure, number.geometry, "g", "g", estimate, point, settings={"logits": "raw"})
        return MeasuredNetwork(task, Training(0.1, True, 1, 1.0, 1.0), 0.0, error * factor, 0.1, Table((row,)), (), 1.0)

    return Reproduction(recipe, "digits", (number,), tuple(map(network, tasks(recipe))), 1.0)


@pytest.mark.parametrize(
    ("errors", "values", "headline", "friend"),
    [
        (
            0.5,
            2.0,
            "Large-batch minima generalize better, and the canonical number calls them sharper.",
            "a false friend",
        ),
        (
            0.5,
            0.5,
            "Large-batch minima generalize better, and the canonical number calls them flatter.",
            "a true friend",
        ),
        (
            2.0,
            2.0,
            "Small-batch minima generalize better, and the canonical number calls them flatter.",
            "a true friend",
        ),
        (
            2.0,
            0.5,
            "Small-batch minima generalize better, and the canonical number calls them sharper.",
            "a false friend",
        ),
        (1.0, 2.0, "By the canonical number, large-batch minima are 2.0 times sharper than small-batch minima.", None),
    ],
)
def test_a_false_friend_is_told_from_a_true_one(errors, values, headline, friend):
    result = _judged(errors, values)
    assert result.headline == headline
    first, second = result.sentences[:2]
    if friend is None:
        assert first.startswith("There is no evidence that one generalizes better")
    else:
        assert first.startswith(headline.partition(",")[0])
        assert friend in second


def test_a_trend_is_asked_for_again_at_other_weights():
    arms = "[" + ", ".join(f'{{ name = "{size} rows", batch = {size}, value = {size} }}' for size in (8, 16, 32)) + "]"
    text = SMALL.replace("contrast", "trend").replace("replicates = 2", "replicates = 4")
    recipe = parse_recipe(text.replace(text[text.index("[{ name") : text.index("replicates")], f"{arms}\n"), "tiny")
    numbers = tuple(quantity.number for quantity in recipe.numbers)

    def table(task, values):
        point = Point(0.1, 0.9, 1e-3, 1e-4, 100, 100.0, 610, 0.1)
        rows = (
            Record(n.measure, n.geometry, "g", "g", Estimate(v, v, v, 0.999, Kind.ENCLOSURE, True), point)
            for n, v in zip(numbers, values, strict=True)
        )
        return Table(tuple(replace(row, settings={"logits": "raw"}) for row in rows))

    def network(task):
        size = task.arm.value + task.replicate / 10
        own, moved = table(task, (size, size)), table(task, (size, -size))  # only the first number stays
        return MeasuredNetwork(task, Training(0.1, True, 1, 1.0, 1.0), 0.0, size / 100, 0.1, own, (moved,), 1.0)

    result = Reproduction(recipe, "digits", numbers, tuple(map(network, tasks(recipe))), 1.0)
    assert [relation.finding for relation in result.relations] == ["rises"] * 4
    assert [relation.finding for relation in result.relations_elsewhere[0]] == ["rises", "falls"] * 2
    again = [sentence for sentence in result.sentences if "At a random point" in sentence]
    assert [" gives the same verdict: " in sentence for sentence in again] == [True, False] * 2
    stored = json.loads(json.dumps(result.to_dict()))
    assert checking.check_against(stored, result).holds
    stored["relations"][1]["finding"] = "no evidence"
    (line,) = (line for line in checking.check_against(stored, result).lines if not line.holds)
    assert (line.stored, line.found) == ("no evidence", "rises")


def test_numbers_of_changed_scores_have_names_for_sentences():
    words = [
        NumberSpec(measure="hessian_spectral_norm", logits=logits).number.words
        for logits in (None, "normalised", "loss=0.1")
    ]
    assert words[1:] == [f"{words[0]} of normalised scores", f"{words[0]} of scores scaled to loss=0.1"]


def test_the_page_of_results_says_what_the_results_say():
    root = Path(__file__).parents[2]
    made = runpy.run_path(str(root / "benchmarks" / "results_page.py"))["page"]()
    assert made == (root / "docs" / "results" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "docs" / "results").glob("*.json")), ids=lambda path: path.stem
)
def test_stored_results_follow_the_recipes_of_today(path):
    stored = checking.read_stored(path)
    assert checking.stored_recipe(stored, path.stem) == read_recipe(path.stem)
    assert " /" not in stored["command"]
