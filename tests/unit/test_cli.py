"""The verbs through the real entry point: exit codes, strict JSON, nothing half-written."""

import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import isoflat
from isoflat.cli.main import app
from isoflat.measures.catalogue import measures

NETS = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))

def normed():
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 10))

def precise():
    return normed().double()

def unsaved():
    net = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)).eval()
    net[1].register_buffer("running_mean", net[1].running_mean, persistent=False)
    return net

def tied():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    net[2].weight = net[0].weight
    return net
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


def test_auto_is_the_default_and_says_what_it_is_invariant_to(folder):
    plain, named = (_measure("--weights", "best.safetensors", "--json", *more) for more in ((), ("--geometry", "auto")))
    assert plain.exit_code == named.exit_code == 0, plain.output + named.output
    rows = [json.loads(result.stdout)["rows"][0] for result in (plain, named)]
    assert rows[0]["geometry"] == "auto"
    assert rows[0]["estimate"]["value"] == rows[1]["estimate"]["value"]
    assert rows[0]["group"] in " ".join(_measure("--weights", "best.safetensors").stdout.split())


def test_numbers_over_the_orbit_are_printed_and_in_the_json(folder):
    """All three geometries together: one does not move, two do."""
    asked = [word for place in ("auto", "layerwise", "euclidean") for word in ("--geometry", place)]
    few = ("--weights", "best.safetensors", "--examples", "50", "--orbit", "2", *asked)
    result = _measure(*few, "--json")
    assert result.exit_code == 0, result.output
    orbit = json.loads(result.stdout)["orbit"]
    assert [row["survives"] for row in orbit["rows"]] == [True, False, False]
    assert len(orbit["copies"]) == 2
    printed = _measure(*few).stdout
    assert printed.count("over 2 orbit points") == 3
    assert printed.count("does not move") == 1


def test_every_measure_in_every_geometry_prints(folder):
    """Also where b/value is not defined: in plain weights, and for traces."""
    short = {"local_learning_coefficient": "(chains=2, draws=4, burn=2)", "log_prior_volume": "(draws=10)"}
    asked = [word for name in measures() for word in ("--measure", name + short.get(name, ""))]
    places = ("--geometry", "layerwise", "--geometry", "euclidean")
    result = _measure(*asked, *places, "--rtol", "0.5", "--examples", "40")
    assert result.exit_code in (0, 3), result.output
    for name in measures():
        assert name in result.output
    assert "not defined here" in result.output


def test_unconverged_has_an_exit_code_of_its_own(folder):
    assert _measure("--weights", "best.safetensors", "--rtol", "1e-6", "--max-products", "3").exit_code == 3


def test_refusals_are_one_line_and_exit_code_2(folder):
    (folder / "cut.safetensors").write_bytes((folder / "best.safetensors").read_bytes()[:100])
    torch.save({"0.weight": torch.zeros(3, 3)}, folder / "wrong.pt")
    for arguments, words in (
        (("--weights", "absent.safetensors"), "absent.safetensors"),
        (("--weights", "cut.safetensors"), "cut.safetensors"),
        (("--weights", "wrong.pt"), "0.weight"),
        (("--measure", "quotient_norm"), "quotient_spectral_norm"),
        (("--geometry", "automatic"), "auto"),
        (("--measure", "quotient_norm", "--orbit", "2"), "quotient_spectral_norm"),
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


def test_attack_tells_what_survives(folder):
    few = ("attack", "--model", "cli_nets:normed", "--data", "digits", "--examples", "50", "--points", "2")
    result = _run(*few, "--search", "1", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert [(row["geometry"], row["survives"]) for row in content["rows"]] == [
        ("auto", True),
        ("layerwise", False),
        ("euclidean", False),
    ]
    assert content["output_change"] <= 1e-10
    printed = _run(*few, "--search", "0", "--measure", "quotient_spectral_norm", "--geometry", "layerwise")
    assert printed.exit_code == 0, printed.output
    assert "Nothing survives" in printed.stdout


def test_symmetries_are_counted(folder):
    """One scale per hidden unit; the head's common vector and shift, because cross-entropy ignores them."""
    asked = ("symmetries", "--data", "digits", "--examples", "20")
    found = json.loads(_run(*asked, "--model", "cli_nets:build", "--json").stdout)
    assert _by_kind(found) == {"scale": 8, "shift": 1, "common vector": 8}
    assert found["dimension"] == {"exact": 17, "without_epsilon": 17}
    assert found["verified"] <= 1e-10
    normed = json.loads(_run(*asked, "--model", "cli_nets:normed", "--json").stdout)
    assert _by_kind(normed)["scale"] == 8 + 6
    assert _by_kind(normed)["scale divided out"] == 1
    assert normed["group_hash"] != found["group_hash"]
    printed = _run(*asked, "--model", "cli_nets:normed")
    assert printed.exit_code == 0, printed.output
    assert normed["group_hash"] in printed.stdout
    assert "0.weight rows, 0.bias, 2.weight columns" in printed.stdout


def _by_kind(found):
    kinds = {}
    for group in found["groups"]:
        kinds[group["kind"]] = kinds.get(group["kind"], 0) + group["dimension"]
    return kinds


def _canonicalize(model, out, *arguments):
    few = ("--data", "digits", "--examples", "100", "--out", out)
    result = _run("canonicalize", "--model", f"cli_nets:{model}", *few, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def _same_function(one, two):
    """Up to a constant added to all scores of an example, which cross-entropy ignores."""
    outputs = [net(torch.randn(20, 64, generator=torch.Generator().manual_seed(2)).double()) for net in (one, two)]
    centred = [scores - scores.mean(1, keepdim=True) for scores in outputs]
    assert (centred[1] - centred[0]).abs().max() <= 1e-9 * centred[0].abs().max()


def test_canonical_weights_are_the_same_function_and_the_same_number(folder):
    import cli_nets

    torch.manual_seed(1)
    net = cli_nets.precise()
    save_file(net.state_dict(), "given.safetensors")
    _canonicalize("precise", "canonical.safetensors", "--weights", "given.safetensors", "--fixed-epsilon")
    twin = cli_nets.precise()
    twin.load_state_dict(load_file("canonical.safetensors"))
    _same_function(twin, net)
    assert not torch.allclose(twin[0].weight, net[0].weight)
    values = []
    for file in ("given.safetensors", "canonical.safetensors"):
        few = ("--data", "digits", "--examples", "100", "--weights", file, "--json")
        result = _run("measure", "--model", "cli_nets:precise", *few)
        assert result.exit_code == 0, result.output
        values.append(json.loads(result.stdout)["rows"][0]["estimate"]["value"])
    assert values[1] == pytest.approx(values[0], rel=1e-8)


def test_canonical_weights_are_canonical(folder):
    _canonicalize("normed", "once.safetensors", "--fixed-epsilon")
    _canonicalize("normed", "twice.safetensors", "--fixed-epsilon", "--weights", "once.safetensors")
    once, twice = load_file("once.safetensors"), load_file("twice.safetensors")
    for name, tensor in once.items():
        assert tensor.dtype is torch.float32
        assert (twice[name] - tensor).abs().max() <= 1e-6 * max(1.0, float(tensor.abs().max()))


def test_moved_epsilons_are_told(folder):
    import cli_nets

    torch.manual_seed(1)
    net = cli_nets.precise()
    save_file(net.state_dict(), "given.safetensors")
    facts = _canonicalize("precise", "moved.safetensors", "--weights", "given.safetensors")
    (path, epsilon), *further = facts["epsilons"].items()
    assert (path, further) == ("3.eps", [])
    with safe_open("moved.safetensors", "pt") as file:
        labels = file.metadata()
    assert json.loads(labels["epsilons"]) == {path: epsilon["after"]}
    assert labels["group_hash"] == facts["group_hash"]
    twin = cli_nets.precise()
    twin.load_state_dict(load_file("moved.safetensors"))
    twin[3].eps = epsilon["after"]
    _same_function(twin, net)
    printed = _run(
        *("canonicalize", "--model", "cli_nets:precise", "--data", "digits", "--weights", "given.safetensors"),
        *("--out", "moved.safetensors", "--force"),
    )
    assert printed.exit_code == 0, printed.output
    assert f"3.eps = {epsilon['after']!r}" in printed.stdout
    assert "--fixed-epsilon" in printed.stdout


def test_moved_epsilons_come_with_the_file(folder):
    """isoflat sets them as it loads the weights, says so, and refuses a network that has no such number."""
    import cli_nets

    torch.manual_seed(1)
    save_file(cli_nets.precise().state_dict(), "given.safetensors")
    _canonicalize("precise", "moved.safetensors", "--weights", "given.safetensors")
    few = ("--data", "digits", "--examples", "100", "--json")
    given, moved = (
        json.loads(_run("measure", "--model", "cli_nets:precise", "--weights", f"{name}.safetensors", *few).stdout)
        for name in ("given", "moved")
    )
    values = [result["rows"][0]["estimate"]["value"] for result in (given, moved)]
    assert values[1] == pytest.approx(values[0], rel=1e-8)
    assert any("3.eps" in note for note in moved["subject"]["notes"])
    for epsilons, words in (({"9.eps": 1.0}, "9.eps"), ({"3.eps": -1.0}, "positive"), ("no table", "cannot be read")):
        save_file(cli_nets.precise().state_dict(), "bad.safetensors", {"epsilons": json.dumps(epsilons)})
        refused = _run("measure", "--model", "cli_nets:precise", "--weights", "bad.safetensors", *few)
        assert refused.exit_code == 2
        assert words in refused.stderr


def test_tied_weights_are_written_once_and_load(folder):
    _canonicalize("tied", "tied.safetensors")
    assert "2.weight" not in load_file("tied.safetensors")
    few = ("--data", "digits", "--examples", "100", "--weights", "tied.safetensors", "--rtol", "0.1")
    assert _run("measure", "--model", "cli_nets:tied", *few).exit_code == 0


def test_the_new_verbs_refuse_in_one_line(folder):
    named = ("--model", "cli_nets:build", "--data", "digits")
    for arguments, words in (
        (("attack", *named, "--points", "0", "--search", "0"), "at least one random point"),
        (("attack", *named, "--geometry", "flat"), "unknown geometry"),
        (("symmetries", "--model", "cli_nets:build", "--data", "absent.npz"), "absent.npz"),
        (("canonicalize", *named, "--out", "weights.pt"), ".safetensors"),
        (("canonicalize", *named, "--out", "best.safetensors"), "--force"),
        (("canonicalize", "--model", "cli_nets:unsaved", *named[2:], "--out", "new.safetensors"), "1.running_mean"),
    ):
        result = _run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert words in result.stderr
        *steps, refusal = result.stderr.splitlines()  # what was done before is told where there is no terminal
        assert refusal.startswith("error: ") and not any(line.startswith("error: ") for line in steps)
        assert result.stdout == ""
