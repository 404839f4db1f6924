"""`isoflat reproduce` under torchrun: one network after the other, each measured by all processes."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cases import recipes
from cases.group import run
from isoflat.cli.main import app
from isoflat.experiments.recipe import parse_recipe
from isoflat.experiments.reproduce import reproduce

REPRODUCE = ["reproduce", "synthetic-invariance", "--replicates", "1"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ISOFLAT = [*TORCHRUN, "-m", "isoflat"]

RECIPE = """
title = "t"
question = "q?"
reference = "r"
asks = "contrast"
data = { source = "digits", train = 120, test = 60 }
network = { family = "mlp", widths = [64, 12, 8, 10], bias = false }
training = { optimizer = "adam", rate = 0.01, target = 0.3, epochs = 200 }
arms = [{ name = "small batch", batch = 8 }, { name = "steep", optimizer = "sgd", rate = 1e6 }]
replicates = 1
orbit = 0
numbers = [{ measure = "quotient_spectral_norm", geometry = "layerwise" }]
"""


def _run(folder, *arguments):
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**env, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=180,
    )


def _cells(folder):
    found = [json.loads(path.read_text()) for path in sorted((folder / "store" / "cells").glob("*.json"))]
    return {cell["address"]: cell for cell in found}


def _agree(one, other):
    """The same network, and enclosures that overlap."""
    assert one["model_hash"] == other["model_hash"]
    assert one["lower"] <= other["upper"] and other["lower"] <= one["upper"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds_and_write_it_once(tmp_path):
    one = CliRunner().invoke(app, [*REPRODUCE, "--json", "--out", str(tmp_path / "one"), "--jobs", "1"])
    two = _run(tmp_path, *ISOFLAT, *REPRODUCE, "--json", "--out", "two")
    assert one.exit_code == two.returncode == 0, one.stderr + two.stderr
    single, shared = (json.loads(run.stdout) for run in (one, two))
    assert len(single["networks"]) == len(shared["networks"]) > 0
    for own, other in zip(single["networks"], shared["networks"], strict=True):
        _agree(own, other)
    kept, both = _cells(tmp_path / "one"), _cells(tmp_path / "two")
    assert kept.keys() == both.keys() and len(both) == 2
    record = next(cell for cell in both.values() if "points" in cell["result"])["result"]["points"][0]["rows"][0]
    assert record["settings"]["processes"] == 2
    assert not any("no batch" in note for note in record["estimate"]["notes"])
    again = CliRunner().invoke(app, [*REPRODUCE, "--json", "--out", str(tmp_path / "two"), "--jobs", "1"])
    assert json.loads(again.stdout)["networks"] == shared["networks"]


def test_what_trains_has_the_weights_of_one_process_and_what_diverges_does_so_for_all(tmp_path):
    reproduce(parse_recipe(RECIPE, "tiny"), out=tmp_path / "one", jobs=1)
    answers = run(2, recipes.reproduced, RECIPE, str(tmp_path / "two"))
    assert all(answer is not None and not answer.error for answer in answers), answers
    one, two = _cells(tmp_path / "one"), _cells(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 3
    assert [cell["weights"] for cell in one.values()] == [cell["weights"] for cell in two.values()]
    assert sum("diverged" in cell["result"] for cell in two.values()) == 1
    assert not list((tmp_path / "two" / "store" / "under-way").iterdir())
    (measured,) = (cell["result"]["points"][0]["rows"] for cell in two.values() if "points" in cell["result"])
    assert measured[0]["settings"]["processes"] == 2
    assert not any("no batch" in note for note in measured[0]["estimate"]["notes"])


def test_workers_of_workers_are_refused_by_all(tmp_path):
    answers = run(2, recipes.given_workers, RECIPE, str(tmp_path / "two"))
    assert [answer.value.error for answer in answers] == ["UsageError"] * 2
    assert all(answer.value.message.startswith("under torchrun") for answer in answers)
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--jobs", "2"), ("--submit", "local")])
def test_workers_of_workers_are_refused_in_one_line(tmp_path, more):
    run = _run(tmp_path, *ISOFLAT, *REPRODUCE, *more)
    assert run.returncode and not run.stdout
    assert run.stderr.count("error: under torchrun") == 1
