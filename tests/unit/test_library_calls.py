"""Calls of the library that do what the command line does: loading, checking stored numbers, reproducing, relating."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from isoflat import CheckpointError, DataError, UsageError, measure
from isoflat.cli.main import app
from isoflat.experiments.reproduce import reproduce
from isoflat.experiments.study import study
from isoflat.io import load_data, load_model
from isoflat.io.files import claim, save, write
from isoflat.io.verify import verify
from isoflat.measurement.verify import RecordVerdict


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a factory and a file of weights."""
    (tmp_path / "library_nets.py").write_text("from torch import nn\n\ndef build():\n    return nn.Linear(64, 10)\n")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_file({f"trunk.{k}": v for k, v in nn.Linear(64, 10).state_dict().items()}, tmp_path / "w.safetensors")
    return tmp_path


def test_a_network_is_loaded_with_its_weights_and_says_how(here):
    notes = []
    fresh = load_model("library_nets:build", seed=3, note=notes.append)
    assert "torch's seed 3" in notes[0] and not fresh.training
    assert torch.equal(fresh.weight, load_model("library_nets:build", seed=3).weight)
    filled = load_model("library_nets:build", "w.safetensors", strip_prefix=["trunk."])
    torch.manual_seed(0)
    assert torch.equal(filled.weight, nn.Linear(64, 10).weight)
    with pytest.raises(CheckpointError, match="missing bias, weight"):
        load_model("library_nets:build", here / "w.safetensors")
    with pytest.raises(UsageError, match="--weights-key"):
        load_model("library_nets:build", key="model")


def test_data_is_loaded_in_batches_and_says_how(here):
    notes = []
    batches = load_data("digits", "test", examples=100, batch_size=40, note=notes.append)
    assert [len(targets) for _, targets in batches] == [40, 40, 20]
    assert notes == ["digits, test split", "100 of 540 examples, evenly spaced"]
    with pytest.raises(DataError, match="no such data"):
        load_data("nowhere")


def test_what_the_command_line_measures_the_library_measures_too_and_checks(here):
    options = ["--model", "library_nets:build", "--data", "digits", "--examples", "50", "--geometry", "layerwise"]
    done = CliRunner().invoke(app, ["measure", *options, "--out", "result.json", "--witness", "--json"])
    assert done.exit_code == 0, done.output
    stored = json.loads((here / "result.json").read_text())
    net, data = load_model("library_nets:build"), load_data("digits", examples=50)
    est = measure(net, data, nn.CrossEntropyLoss(), geometry="layerwise")
    assert est.value == stored["rows"][0]["estimate"]["value"]
    assert [check.verdict for check in verify(here / "result.json", net, data, nn.CrossEntropyLoss())] == [
        RecordVerdict.HOLDS
    ]
    other = load_model("library_nets:build", seed=1)
    assert verify(here / "result.json", other, data, nn.CrossEntropyLoss())[0].verdict is RecordVerdict.REFUSED
    stored["rows"][0]["label"] = "another"
    (here / "result.json").write_text(json.dumps(stored))
    assert "edited" in verify(here / "result.json", net, data, nn.CrossEntropyLoss())[0].sentence
    stored["rows"][0]["estimate"]["value"] *= 1.0001
    (here / "result.json").write_text(json.dumps(stored))
    with pytest.raises(UsageError, match="edited"):
        verify(here / "result.json", net, data, nn.CrossEntropyLoss())


def test_neither_or_both_ways_into_a_study_are_refused(tmp_path):
    for ways in ({}, {"networks": "list.csv", "grid": "grid.toml"}):
        with pytest.raises(UsageError, match="either"):
            study(**ways)
    with pytest.raises(UsageError, match="--geometry"):
        reproduce("digits", geometry=["auto"], out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_is_written_whole_and_nothing_else_is_left(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    save(path, "old")
    with pytest.raises(UsageError, match="exists already"):
        save(path, "new")
    save(path, "new", force=True)
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # as any file of the user's
    (tmp_path / "other").unlink()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("isoflat.io.files.os.fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        save(path, "newer", force=True)
    with pytest.raises(OSError, match="No space left"):
        write(path, b"newest", alone=True)
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UsageError, match="does not exist"):
        claim(tmp_path / "no" / "result.json")
