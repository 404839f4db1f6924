"""Recipes, cells and sweeps: what is asked is checked first, trained once, and said honestly."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from isoflat.cli import checking
from isoflat.cli.exits import DOES_NOT_HOLD
from isoflat.cli.load.splits import load_split
from isoflat.cli.main import app
from isoflat.cli.reproduce_report import page
from isoflat.core.errors import DataError, UnknownName, UsageError
from isoflat.experiments import cells, families
from isoflat.experiments.cells import Task, labelled
from isoflat.experiments.data import Split, digits, gaussian
from isoflat.experiments.recipe import Asks, Data, Scale, parse, read, recipes
from isoflat.experiments.reproduction import Reproduction
from isoflat.experiments.store import Store
from isoflat.experiments.sweep import sweep, tasks
from isoflat.report.html import render

SMALL = """
title = "t"
question = "q?"
reference = "r"
asks = "contrast"
data = { source = "digits", train = 120, test = 60 }
network = { family = "mlp", widths = [64, 12, 8, 10], bias = false }
training = { optimizer = "adam", rate = 0.01, target = 0.3, epochs = 200 }
arms = [{ name = "small batch", batch = 8 }, { name = "large batch" }]
replicates = 2
numbers = [{ measure = "quotient_spectral_norm" }, { measure = "hessian_spectral_norm" }]
"""


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
    return _followed(parse(SMALL, "tiny"), folder)


@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("name", recipes())
def test_every_recipe_can_be_built(name, scale):
    recipe = read(name, scale)
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
    model = cells.network(Task(recipe, recipe.arms[0], 0), data)
    with torch.no_grad():
        assert len(model(inputs)) == 2


def test_the_papers_experiments_are_the_papers():
    mlp = read("mnist-mlp", Scale.PAPER)
    assert mlp.network.arguments["widths"] == [784, *[512] * 5, 10] and not mlp.network.arguments["bias"]
    assert [arm.training.batch for arm in mlp.arms] == [256, 5000] and mlp.replicates == 5
    assert {arm.training.epochs for arm in mlp.arms} == {200} and mlp.data.train == 50000
    alexnet, vgg = read("cifar10-alexnet", Scale.PAPER), read("cifar10-vgg16", Scale.PAPER)
    for recipe, epochs, halve in ((alexnet, (150, 500), 30), (vgg, (90, 300), 50)):
        small, large = (arm.training for arm in recipe.arms)
        assert (small.batch, small.rate, small.momentum, small.halve_every) == (256, 1e-4, 0.9, halve)
        assert (large.batch, large.rate, large.momentum, large.halve_every) == (2000, 1e-3, 0.99, None)
        assert (small.epochs, large.epochs) == epochs and recipe.data.measured == 10000
    assert vgg.data.raw and not alexnet.data.raw
    synthetic = read("synthetic-invariance")
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
        parse(SMALL.replace(old, new), "tiny")


def test_unknown_names_are_refused():
    with pytest.raises(UnknownName, match="mnist-mlp"):
        read("mnist-mpl")
    with pytest.raises(UnknownName):
        families.find("mpl")


def test_a_scale_stands_over_the_rest():
    text = SMALL + "\n[paper]\ndata = { train = 130 }\nreplicates = 3\n"
    small, paper = parse(text, "tiny"), parse(text, "tiny", Scale.PAPER)
    assert (small.data.train, small.replicates, paper.data.train, paper.replicates) == (120, 2, 130, 3)
    assert paper.data.test == 60 and parse(text, "tiny", replicates=7).replicates == 7


def test_a_grid_makes_an_arm_of_each_combination():
    text = SMALL.replace('arms = [{ name = "small batch", batch = 8 }, { name = "large batch" }]', "")
    text = (
        text.replace('asks = "contrast"', 'asks = "relation"')
        + "\n[grid]\nbatch = [8, 16]\nwidths = [[64, 8, 10], [64, 9, 10]]\n"
    )
    recipe = parse(text, "tiny")
    assert [arm.factors for arm in recipe.arms] == [
        {"batch": batch, "widths": widths} for batch in (8, 16) for widths in ("64-8-10", "64-9-10")
    ]
    assert recipe.arms[3].training.batch == 16 and recipe.arms[3].network == {"widths": [64, 9, 10]}
    assert cells.network(Task(recipe, recipe.arms[3], 0), digits())[0].out_features == 9


def test_networks_of_one_replicate_start_alike_and_others_do_not(result):
    recipe = result.recipe
    first, second = recipe.arms
    weights = [
        cells.network(Task(recipe, arm, k), digits())[0].weight for arm, k in ((first, 0), (second, 0), (first, 1))
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_orbit_points_are_the_same_functions_with_the_same_canonical_number(result):
    canonical, plain = result.numbers
    assert result.drift(canonical) < 0.02  # twice the enclosures' width
    assert result.drift(plain) > 0.5  # the test bites
    for network in result.networks:
        before, after = network.record(canonical), network.moved[0].rows[0]
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
    other = _followed(parse(SMALL, "tiny", numbers=[{"measure": "gradient_norm"}]), folder)
    assert [n.training for n in other.networks] == [n.training for n in result.networks]


def test_several_jobs_give_the_same_bits(result, tmp_path):
    other = _followed(result.recipe, tmp_path, jobs=2)
    for a, b in zip(result.networks, other.networks, strict=True):
        assert [(r.model_hash, r.estimate.value) for r in a.table] == [
            (r.model_hash, r.estimate.value) for r in b.table
        ]


def test_networks_that_miss_their_target_are_reported_and_left_out(tmp_path):
    text = SMALL.replace("target = 0.3, epochs = 200", "target = 0.001, epochs = 2")
    found = _followed(parse(text, "tiny"), tmp_path)
    assert len(found.missed) == 4 and not found.verdicts()
    assert any("missed the target" in sentence for sentence in found.sentences)
    assert "No comparison" in found.sentences[0]


def test_an_edit_moves_what_it_should(tmp_path):
    recipe = read("synthetic-invariance", replicates=1)
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
    same = checking.compared(stored, result)
    assert same.holds and same.same == same.networks == 4
    for edit in (_shifted, _narrowed, _turned):
        other = json.loads(json.dumps(stored))
        edit(other)
        assert not checking.compared(other, result).holds


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


def test_workers_that_submitit_runs_fill_the_same_store(tmp_path):
    pytest.importorskip("submitit")
    recipe = parse(SMALL.replace("replicates = 2", "replicates = 1"), "tiny", orbit=0)
    from isoflat.cli.submission import submitted

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


def test_the_first_rows_are_taken():
    whole, part = digits(), load_split(Data(source="digits", train=120, test=60), None)
    for pair, every, rows in ((part.train, whole.train, 120), (part.test, whole.test, 60)):
        assert all(
            len(own) == rows and torch.equal(own, all_of_it[:rows]) for own, all_of_it in zip(pair, every, strict=True)
        )
    assert part.hash != whole.hash == digits().hash


def test_data_with_too_few_rows_is_refused():
    with pytest.raises(DataError, match="1257"):
        load_split(Data(source="digits", train=5000), None)
    with pytest.raises(UsageError, match="must be one of"):
        load_split(Data(source="svhn"), None)


def test_asks_are_all_used():
    assert {read(name).asks for name in recipes()} == set(Asks) - {Asks.RELATION}
