"""The command line under torchrun."""

import json
import os
import socket
import subprocess
import sys

import pytest

from cases import commands
from cases.group import run

NETS = """
import os
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).double()

def odd():
    net = build()
    if os.environ.get("RANK") == "1":
        net[0].bias.data[0] += 1
    return net

class Dying(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.left = build(), 25

    def forward(self, x):
        self.left -= 1
        if self.left == 0 and os.environ.get("RANK") == "1":
            os._exit(9)
        return self.inner(x)
"""

WORDS = ["measure", "--data", "digits", "--examples", "210", "--geometry", "layerwise"]
MEASURE = ["-m", "isoflat", *WORDS]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rank_nets.py").write_text(NETS)
    return tmp_path


def _run(folder, *arguments):
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**env, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def _values(text):
    return [[row["estimate"][key] for key in ("value", "lower", "upper")] for row in json.loads(text)["rows"]]


def test_variables_of_a_launcher_make_a_group_and_only_the_first_prints(folder):
    """What torchrun starts, without torchrun, which takes longer to start than all the rest takes."""
    words = [*WORDS, "--model", "rank_nets:build", "--json"]
    (one,) = run(1, commands.printed, str(folder), words)
    first, second = run(2, commands.printed, str(folder), [*words, "--out", "result.json"], launched=True)
    assert [answer.value[0] for answer in (one, first, second)] == [0, 0, 0], (one, first, second)
    assert second.value[1] == ""
    assert _values(first.value[1])[0] == pytest.approx(_values(one.value[1])[0], rel=1e-12, abs=0)
    assert json.loads(first.value[1])["rows"][0]["settings"]["processes"] == 2
    assert (folder / "result.json").read_text() == first.value[1]


@pytest.mark.slow
def test_two_processes_print_what_one_prints_once(folder):
    one = _run(folder, *MEASURE, "--model", "rank_nets:build", "--json")
    two = _run(folder, *TORCHRUN, *MEASURE, "--model", "rank_nets:build", "--json", "--out", "result.json")
    assert one.returncode == two.returncode == 0, two.stderr
    assert _values(two.stdout)[0] == pytest.approx(_values(one.stdout)[0], rel=1e-12, abs=0)
    assert json.loads(two.stdout)["rows"][0]["settings"]["processes"] == 2
    assert (folder / "result.json").read_text() == two.stdout


@pytest.mark.slow
def test_in_order_the_bits_are_the_same(folder):
    order = ["--model", "rank_nets:build", "--json", "--reproducible-sum", "--batch-size", "50"]
    one, two = _run(folder, *MEASURE, *order), _run(folder, *TORCHRUN, *MEASURE, *order)
    assert _values(one.stdout) == _values(two.stdout)


@pytest.mark.slow
def test_refusals_are_one_line_and_losses_end_everything(folder):
    differs = _run(folder, *TORCHRUN, *MEASURE, "--model", "rank_nets:odd")
    assert differs.returncode
    assert differs.stderr.count("error: rank 1 differs from rank 0 in '0.bias'") == 1
    assert "exitcode  : 2" in differs.stderr
    lost = _run(folder, *TORCHRUN, *MEASURE, "--model", "rank_nets:Dying", "--timeout", "5", "--batch-size", "20")
    assert lost.returncode
    assert "exitcode  : 9" in lost.stderr
    assert not differs.stdout + lost.stdout


@pytest.mark.slow
def test_a_survivor_says_so_and_ends_with_its_own_exit_code(folder):
    """Without torchrun, which stops the others as soon as one is gone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, *MEASURE, "--model", "rank_nets:Dying", "--timeout", "5", "--batch-size", "20"],
            cwd=folder,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": "2",
                "RANK": str(rank),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [4, 9]
    assert errors[0].startswith("error: a process of the group ended, or did not answer in time")
    assert errors[0].count("\n") == 1
