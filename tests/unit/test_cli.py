"""The verbs through the real entry point: exit codes, strict JSON, nothing half-written."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import isoflat
from isoflat.cli.main import app
from isoflat.measures.catalogue import measures

NETS = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a model factory and its weights."""
    (tmp_path / "cli_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("cli_nets", None)
    from cli_nets import build

    torch.manual_seed(0)
    net = build()
    save_file(net.state_dict(), tmp_path / "best.safetensors")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "last.ckpt"
    )
    return tmp_path


def _run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def _measure(*arguments):
    return _run("measure", "--model", "cli_nets:build", "--data", "digits", *arguments)


def test_measure_prints_strict_json_that_reads_back(folder):
    result = _measure(
        "--weights",
        "best.safetensors",
        "--measure",
        "quotient_spectral_norm",
        "--measure",
        "hessian_spectral_norm",
        "--json",
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["measure"] for row in rows] == ["quotient_spectral_norm", "hessian_spectral_norm"]
    estimate = isoflat.Record.from_dict(rows[0]).estimate
    assert estimate.converged
    assert estimate.lower <= estimate.value <= estimate.upper


def test_checkpoints_of_both_kinds_give_the_same_number(folder):
    values = []
    for file in ("best.safetensors", "last.ckpt"):
        result = _measure("--weights", file, "--json")
        assert result.exit_code == 0, result.output
        values.append(json.loads(result.stdout)["rows"][0]["estimate"]["value"])
    assert values[0] == values[1]


def test_every_measure_in_every_geometry_prints(folder):
    """Also where b/value is not defined: in plain weights, and for traces."""
    asked = [word for name in measures() for word in ("--measure", name)]
    result = _measure(*asked, "--geometry", "layerwise", "--geometry", "euclidean", "--rtol", "0.5")
    assert result.exit_code in (0, 3), result.output
    for name in measures():
        assert name in result.output
    assert "not defined here" in result.output


def test_unconverged_has_an_exit_code_of_its_own(folder):
    assert _measure("--weights", "best.safetensors", "--rtol", "1e-9", "--max-products", "3").exit_code == 3


def test_refusals_are_one_line_and_exit_code_2(folder):
    (folder / "cut.safetensors").write_bytes((folder / "best.safetensors").read_bytes()[:100])
    torch.save({"0.weight": torch.zeros(3, 3)}, folder / "wrong.pt")
    for arguments, words in (
        (("--weights", "absent.safetensors"), "absent.safetensors"),
        (("--weights", "cut.safetensors"), "cut.safetensors"),
        (("--weights", "wrong.pt"), "0.weight"),
        (("--measure", "quotient_norm"), "quotient_spectral_norm"),
        (("--geometry", "auto"), "layerwise"),
    ):
        result = _measure(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert words in result.stderr
        assert result.stdout == ""


def test_pickles_are_refused_and_never_run(folder):
    class Payload:
        def __reduce__(self):
            return (open, (str(folder / "canary"), "w"))

    torch.save({"state_dict": Payload()}, folder / "evil.pt")
    result = _measure("--weights", "evil.pt")
    assert result.exit_code == 2
    assert "evil.pt" in result.stderr
    assert not (folder / "canary").exists()


def test_measures_and_doctor(folder):
    listed = json.loads(_run("measures", "--json").stdout)
    assert "quotient_spectral_norm" in json.dumps(listed)
    for verb in (("measures",), ("measures", "quotient_sharpness"), ("doctor",), ("--version",)):
        result = _run(*verb)
        assert result.exit_code == 0, result.output
    checked = _run("doctor", "--model", "cli_nets:build", "--weights", "best.safetensors", "--data", "digits")
    assert checked.exit_code == 0, checked.output
