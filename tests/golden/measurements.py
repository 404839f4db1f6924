"""Golden measurements: what `compare.py` runs on two trees and compares to the last bit.

Only the public interface and the command line are used, so that the same file runs on any state of the package. Networks
and data are made here from fixed generators. A measurement is a function that returns what can be written as JSON; what
it raises is its result too.

    python tests/golden/measurements.py --src src --out numbers.json [--only PART]
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import isoflat

F64, F32 = torch.float64, torch.float32
EVERYWHERE = ("auto", "layerwise", "elementwise", "euclidean")
EIGENVALUES = (
    "quotient_spectral_norm",
    "quotient_largest_eigenvalue",
    "quotient_smallest_eigenvalue",
    "hessian_spectral_norm",
    "riemannian_hessian_spectral_norm",
    "gauss_newton_spectral_norm",
    "fisher_spectral_norm",
)
PASSES = (
    "edge_of_stability(learning_rate=0.1)",
    "critical_sharpness",
    "fisher_rao_norm",
    "fisher_trace",
    "gauss_newton_trace",
    "gradient_norm",
    "hessian_trace",
    "normalized_sharpness",
    "quotient_effective_rank(steps=8)",
    "quotient_frobenius",
    "quotient_sharpness",
    "quotient_trace",
    "tic_diagonal",
    "tic_trace_ratio",
)
SLOW = (
    "feature_robustness(draws=4)",
    "hessian_frobenius",
    "local_learning_coefficient(chains=2,draws=30,burn=20)",
    "log_prior_volume(draws=10)",
    "minimum_sharpness",
    "minimum_sharpness_unitwise",
    "neuronwise_flatness",
    "pac_bayes_curvature_posterior",
    "pac_bayes_effective_curvature",
    "pac_bayes_rescaled",
    "relative_flatness",
    "relative_flatness_conv",
    "relative_flatness_max",
    "sa_cms(draws=4)",
    "tic",
)


# Networks and data.


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(net: nn.Module, seed: int, dtype: torch.dtype = F64) -> nn.Module:
    """Weights and running statistics from a generator, so that no default initialisation decides them."""
    draw = drawn(seed)
    net = net.to(F64)
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if tensor.is_floating_point():
                fan = math.sqrt(tensor[0].numel()) if tensor.ndim > 1 else 1.0
                values = torch.randn(tensor.shape, generator=draw, dtype=F64)
                gain = name.endswith("weight") and tensor.ndim == 1
                positive = name.endswith("running_var")
                tensor.copy_(values.square() + 0.5 if positive else 1 + 0.2 * values if gain else values / fan)
    return net.to(dtype).eval()


class Norm(nn.Module):
    """Root mean square, with a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return self.o((scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2))


class Prenorm(nn.Module):
    """Encoder with layer norms before its parts, biases everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.first, self.second, self.last = (nn.LayerNorm(8) for _ in range(3))
        self.attention = Attention(8, 2, True)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.first(x))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return self.head(self.last(x).mean(-2))


class Gated(nn.Module):
    """Decoder block with RMS norms and a SwiGLU, on tokens; the head may be the embedding."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.first, self.second, self.last = Norm(6), Norm(6), Norm(6)
        self.attention = Attention(6, 2, False)
        self.gate, self.up, self.down = (nn.Linear(*ends, bias=False) for ends in ((6, 8), (6, 8), (8, 6)))
        self.head = nn.Linear(6, 9, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(self.first(x))
        y = self.second(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.last(x)).mean(-2)


class Lora(nn.Module):
    """A frozen layer with a trained product of two thin ones beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(6, 7), nn.Linear(7, 3)
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 7, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.base(x) + self.b(self.a(x))))


class Carrying(nn.Module):
    """Output with its own loss in it, as models of other packages have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def perceptron(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for ends in pairwise(widths):
        layers += [nn.Linear(*ends), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def pooled() -> nn.Module:
    """The one kind of network that `relative_flatness_conv` is of."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (partial(perceptron, 6, 8, 7, 3), (6,), 3),
    "conv": (convolutional, (1, 6, 6), 3),
    "pooled": (pooled, (1, 5, 5), 3),
    "prenorm": (Prenorm, (4, 5), 3),
    "lora": (Lora, (6,), 3),
    "tied": (partial(Gated, True), (), 9),
    "gated": (partial(Gated, False), (), 9),
}
"""What builds each network, the shape of one input (none: five tokens) and the number of classes."""


def network(name: str, dtype: torch.dtype = F64, seed: int = 1) -> nn.Module:
    return filled(NETWORKS[name][0](), seed, dtype)


def data(name: str, dtype: torch.dtype = F64, rows: int = 24) -> tuple[Tensor, Tensor]:
    _, shape, classes = NETWORKS[name]
    draw = drawn(2)
    tokens = torch.randint(9, (rows, 5), generator=draw)
    inputs = torch.randn(rows, *shape, generator=draw, dtype=F64).to(dtype) if shape else tokens
    return inputs, torch.randint(classes, (rows,), generator=draw)


@cache
def trained(dtype: torch.dtype = F64, rows: int = 6000) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A small network that fits its data but for a hard part of it, and that data."""
    draw = drawn(3)
    inputs = torch.randn(rows, 6, generator=draw, dtype=F64)
    teacher = torch.randn(6, 3, generator=draw, dtype=F64)
    targets = (3 * inputs @ teacher + 0.3 * torch.randn(rows, 3, generator=draw, dtype=F64)).argmax(1)
    net = filled(perceptron(6, 8, 3), 4)
    step = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    for _ in range(60):
        step.zero_grad()
        F.cross_entropy(net(inputs), targets).backward()
        step.step()
    step.zero_grad()
    return net.to(dtype), (inputs.to(dtype), targets)


@cache
def found(name: str) -> tuple[nn.Module, Any]:
    net = network(name)
    return net, isoflat.symmetries(net, data(name)[0])


# The list.


@dataclass(frozen=True)
class Measurement:
    run: Callable[[], Any]
    refuses: bool = False


GOLDEN: dict[str, Measurement] = {}


def golden(name: str, run: Callable[[], Any], refuses: bool = False) -> None:
    assert name not in GOLDEN, name
    GOLDEN[name] = Measurement(run, refuses)


def entropy() -> nn.Module:
    return nn.CrossEntropyLoss()


def catalogue(name: str, dtype: torch.dtype, measures: Iterable[str], **how: Any) -> Any:
    net = network(name, dtype)
    return isoflat.measure_all(net, data(name, dtype), entropy(), measures=list(measures), **how)


def canonical(name: str) -> Any:
    """The weights of other points of the orbit, and a number of each of them."""
    net, group = found(name)
    moved = isoflat.reparametrize(net, group, seed=5, spread=1.0)
    rest = isoflat.canonicalize(net, group)
    own = {"measures": ["quotient_spectral_norm"], "geometry": ["auto", "euclidean"]}
    return {
        "moved": weights(moved),
        "rest": weights(rest),
        "numbers": isoflat.measure_all(net, data(name), entropy(), symmetries=group, **own),
        "numbers there": isoflat.measure_all(moved, data(name), entropy(), **own),
    }


def weights(net: nn.Module) -> dict[str, Any]:
    return {key: tensor.detach().double().flatten().tolist() for key, tensor in net.state_dict().items()}


def one(net: nn.Module, rows: Any, loss: Any, **how: Any) -> Any:
    return isoflat.measure_all(net, rows, loss, measures=["quotient_spectral_norm", "quotient_trace"], **how)


def stepped(kind: type[torch.optim.Optimizer], **how: Any) -> Any:
    """Numbers in the metric of an optimiser that has taken three steps."""
    net, (inputs, targets) = network("mlp"), data("mlp")
    optimizer = kind(net.parameters(), lr=0.01, **how)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    place = isoflat.Preconditioned.of(optimizer, net)
    names = ["quotient_spectral_norm", "preconditioned_edge_of_stability", "quotient_trace", "gradient_norm"]
    return isoflat.measure_all(net, (inputs, targets), entropy(), measures=names, geometry=place)


def with_vectors() -> Any:
    kept: list[Any] = []
    table = isoflat.measure_all(
        network("mlp"), data("mlp"), entropy(), keep=lambda record, vector: kept.append([record, vector.tolist()])
    )
    return {"table": table, "vectors": kept}


def from_initial() -> Any:
    names = ["pac_bayes_rescaled", "pac_bayes_curvature_posterior", "pac_bayes_effective_curvature"]
    start = network("mlp", seed=9)
    both = (start, start.state_dict())
    return [
        isoflat.measure_all(network("mlp"), data("mlp"), entropy(), measures=names, initial=first) for first in both
    ]


def own_symmetry(kind: str) -> Any:
    scale = {
        "units": isoflat.UnitScale(("0.weight", "0.bias"), ("2.weight",), 8),
        "layers": isoflat.LayerScale(("0.weight", "2.weight", "4.weight"), ("0.bias", "2.bias", "4.bias")),
        "wrong": isoflat.UnitScale(("0.weight",), ("2.weight",), 8),
    }[kind]
    return one(network("mlp"), data("mlp"), entropy(), symmetries=[scale])


def batches(kind: str) -> Any:
    inputs, targets = data("mlp", rows=30)
    pieces = list(zip(inputs.split(12), targets.split(12), strict=True))
    given = {
        "pair": (inputs, targets),
        "list": pieces,
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=7),
    }[kind]
    return one(network("mlp"), given, entropy())


def spectrum(name: str, dtype: torch.dtype = F64, **how: Any) -> Any:
    return isoflat.spectrum(network(name, dtype), data(name, dtype), entropy(), steps=24, probes=3, **how)


def compared(names: Iterable[str], **how: Any) -> Any:
    """Networks that differ in seed and, so that the groups stay the same, in nothing else."""
    models = {f"net {seed}": network("mlp", seed=seed) for seed in (1, 2, 3)}
    return isoflat.compare(models, data("mlp"), entropy(), measures=list(names), **how)


def compared_on_a_sample() -> Any:
    net, rows = trained()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[2].weight.mul_(1.3)
    return isoflat.compare({"one": net, "other": other}, rows, entropy(), geometry="layerwise", rtol=0.1, sample="auto")


def sampled(dtype: torch.dtype = F64, **how: Any) -> Any:
    net, rows = trained(dtype)
    names = ["quotient_spectral_norm", "quotient_largest_eigenvalue", "quotient_trace"]
    return isoflat.measure_all(net, rows, entropy(), measures=names, sample="auto", probes=8, **how)


def at_a_loss() -> Any:
    net, rows = trained(rows=600)
    return one(net, rows, entropy(), logits="loss=0.2", geometry=["auto", "layerwise"])


def carried(kind: str) -> Any:
    inputs, targets = data("mlp")
    net = filled(Carrying(), 6)
    if kind == "model":
        return one(net, [{"x": inputs[:14], "labels": targets[:14]}, {"x": inputs[14:], "labels": targets[14:]}], None)

    def summed(model: Any, batch: Any) -> Any:
        loss = F.cross_entropy(model(*batch)["logits"], batch[1], reduction="sum")
        return loss, len(batch[0])

    def mean(model: Any, batch: Any) -> Any:
        return model(*batch)["loss"]

    pieces = [(inputs[:14], targets[:14]), (inputs[14:], targets[14:])]
    return one(net, pieces, isoflat.BatchLoss(summed if kind == "sum" else mean), geometry="layerwise")


def regressed(loss: nn.Module) -> Any:
    inputs, _ = data("mlp")
    targets = torch.rand(len(inputs), 3, generator=drawn(7), dtype=F64)
    names = ["quotient_spectral_norm", "gauss_newton_spectral_norm", "fisher_trace", "quotient_trace"]
    return isoflat.measure_all(network("mlp"), (inputs, targets), loss, measures=names, geometry=["auto", "layerwise"])


def with_nan() -> Any:
    net = network("mlp")
    with torch.no_grad():
        net[0].weight[0, 0] = math.nan
    return one(net, data("mlp"), entropy())


def single(**how: Any) -> Any:
    return isoflat.measure(network("mlp"), data("mlp"), entropy(), **how)


# The command line, in an empty folder.

NET = """
import torch
from torch import nn

def build():
    net = nn.Sequential(nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10)).double()
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=torch.float64) / 8)
    return net
"""
SUBJECT = ("--model", "golden_net:build", "--data", "digits", "--examples", "120")


def called(*arguments: str, code: int = 0) -> str:
    """What a command prints; its exit code must be the expected one."""
    done = subprocess.run([sys.executable, "-m", "isoflat", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != code:
        raise RuntimeError(f"isoflat {' '.join(arguments)}: exit code {done.returncode}: {done.stderr[-600:]}")
    return done.stdout


def measured_by_command() -> Any:
    """One result with its witness, its bytes but for what the clock decides, and the check of it."""
    Path("golden_net.py").write_text(NET)
    names = ("--measure", "quotient_spectral_norm", "--measure", "quotient_trace", "--geometry", "layerwise")
    printed = called("measure", *SUBJECT, *names, "--json", code=3)  # the trace does not reach the tolerance
    called("measure", *SUBJECT, "--geometry", "layerwise", "--witness", "--out", "result.json")
    result = json.loads(Path("result.json").read_text())
    # The file seals the record, its seconds included.
    result["witness"]["sha256"] = None
    vectors = safetensors.torch.load_file("result.safetensors")
    return {
        "printed": json.loads(printed),
        "text": still(printed),
        "result": result,
        "witness": [vectors[name].tolist() for name in sorted(vectors)],
        "verified": json.loads(called("verify", "result.json", *SUBJECT[:4], "--examples", "120", "--json")),
    }


def attacked_by_command() -> Any:
    Path("golden_net.py").write_text(NET)
    how = ("--points", "2", "--search", "2", "--geometry", "layerwise", "--geometry", "auto")
    return json.loads(called("attack", *SUBJECT, *how, "--json"))


def reproduced_by_command() -> Any:
    """A recipe, and everything in its store: names are addresses, which hash the settings."""
    how = ("--replicates", "2", "--jobs", "1", "--measure", "quotient_spectral_norm", "--geometry", "layerwise")
    printed = called("reproduce", "synthetic-invariance", *how, "--out", "recipe", "--json")
    cells = sorted(Path("recipe/store/cells").iterdir())
    # The check of a cell covers its seconds.
    read = {path.name: json.loads(path.read_text()) | {"check": None} for path in cells if path.suffix == ".json"}
    return {
        "result": json.loads(printed),
        "names": [path.name for path in cells],
        "cells": read,
        "weights": {path.name: tensors(path) for path in cells if path.suffix == ".safetensors"},
    }


def still(printed: str) -> str:
    """The text of a result, without what the clock decides, what is installed, and notes."""
    pieces = [r'("(?:seconds|gradient_passes|peak_memory)": )[^,}]+', r'("versions": ){[^}]*}']
    content = json.loads(printed)
    for holder in (content["subject"], *(row["estimate"] for row in content["rows"])):
        notes = json.dumps(holder["notes"])
        assert notes in printed, "notes are spelled in another way"
        printed = printed.replace(notes, "[]")
    for piece in pieces:
        printed, times = re.subn(piece, r"\1-", printed)
        assert times, piece
    return printed


def tensors(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def register() -> None:
    """All of them."""
    register_networks()
    register_ways()
    register_surroundings()


def register_networks() -> None:
    """The catalogue on every network."""
    wide = {"geometry": list(EVERYWHERE), "probes": 8}
    for name in (name for name in NETWORKS if name != "pooled"):
        few = EIGENVALUES if name in ("mlp", "conv", "lora") else EIGENVALUES[:1]
        golden(f"eigenvalues {name}", partial(catalogue, name, F64, few, **wide))
        golden(f"eigenvalues {name} float32", partial(catalogue, name, F32, few[:3], **wide | {"geometry": "auto"}))
        golden(f"passes {name}", partial(catalogue, name, F64, PASSES, geometry=["auto", "layerwise"], probes=8))
        golden(
            f"uncertified {name}",
            partial(catalogue, name, F64, EIGENVALUES[:3], certify=False, geometry=["layerwise", "euclidean"]),
        )
        golden(f"orbit {name}", partial(canonical, name))
    for name in ("mlp", "conv", "pooled"):
        golden(f"slow measures {name}", partial(catalogue, name, F64, SLOW))
    golden("passes mlp float32", partial(catalogue, "mlp", F32, PASSES, **wide))


def register_ways() -> None:
    """Other ways to measure than all the data in a named geometry."""
    golden("sampled", partial(sampled, geometry=["auto", "layerwise"], rtol=0.1))
    golden("sampled finer", partial(sampled, geometry="layerwise", rtol=0.03, seed=3))
    golden("sampled float32", partial(sampled, F32, geometry="layerwise", rtol=0.1))
    golden("spectrum mlp", partial(spectrum, "mlp"))
    golden("spectrum mlp layerwise", partial(spectrum, "mlp", geometry="layerwise", outliers=4, seed=2))
    golden("spectrum conv euclidean", partial(spectrum, "conv", geometry="euclidean"))
    golden("spectrum prenorm float32", partial(spectrum, "prenorm", F32, geometry="layerwise", outliers=6))
    golden("compare", partial(compared, ["quotient_spectral_norm", "quotient_trace"], reference="net 2", probes=8))
    golden("compare in two geometries", partial(compared, EIGENVALUES[:2], geometry=["layerwise", "euclidean"]))
    golden("compare on a sample", compared_on_a_sample)
    golden("preconditioned adam", partial(stepped, torch.optim.Adam))
    golden("preconditioned rmsprop", partial(stepped, torch.optim.RMSprop))
    golden("vectors", with_vectors)
    golden("initial", from_initial)


def register_surroundings() -> None:
    """Settings, kinds of data and losses, refusals, the command line."""
    golden("logits normalised", partial(single, logits="normalised"))
    golden("logits at a loss", at_a_loss)
    golden("params", partial(single, params="2.*"))
    golden("symmetries own units", partial(own_symmetry, "units"))
    golden("symmetries own layers", partial(own_symmetry, "layers"))
    golden("inside bfloat16", partial(single, dtype="bfloat16", certify=False, geometry="layerwise", rtol=0.05))
    golden("budget spent", partial(single, budget=6, rtol=1e-6))
    golden("another seed", partial(single, seed=5, measure="quotient_trace"))
    golden("fine", partial(single, rtol=1e-7, confidence=0.99))
    golden("summed in order", partial(single, reproducible_sum=True, check="skip"))
    for kind in ("pair", "list", "loader"):
        golden(f"data as {kind}", partial(batches, kind))
    for kind in ("model", "sum", "mean"):
        golden(f"loss of the {kind}", partial(carried, kind))
    golden("squared error", partial(regressed, nn.MSELoss()))
    golden("binary entropy summed", partial(regressed, nn.BCEWithLogitsLoss(reduction="sum")))
    golden("refused: symmetry", partial(own_symmetry, "wrong"), refuses=True)
    golden("refused: name", partial(single, measure="quotient_spektral_norm"), refuses=True)
    golden("refused: NaN", with_nan, refuses=True)
    golden("command measure and verify", measured_by_command)
    golden("command attack", attacked_by_command)
    golden("command reproduce", reproduced_by_command)


def plain(result: Any) -> Any:
    """What JSON can hold; floats keep every bit, NaN and infinities included."""
    if hasattr(result, "to_dict"):
        return plain(result.to_dict())
    if isinstance(result, dict):
        return {str(key): plain(value) for key, value in result.items()}
    if isinstance(result, (list, tuple)):
        return [plain(value) for value in result]
    if result is None or isinstance(result, (str, bool, int, float)):
        return result
    raise TypeError(f"a measurement returned a {type(result).__name__}")


def spent() -> float:
    """Seconds of processor time, commands included."""
    return sum(os.times()[:4])


def outcome(measurement: Measurement) -> dict[str, Any]:
    """What came out, or what was raised."""
    started = spent()
    folder = Path.cwd()
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        try:
            found = {"result": plain(measurement.run())}
        except Exception as error:  # noqa: BLE001  what is raised is the result, and is compared
            found = {"raised": type(error).__name__, "message": str(error)}
        finally:
            os.chdir(folder)
    return found | {"refuses": measurement.refuses, "cpu": spent() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--src", type=Path, required=True, help="the package must come from there")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    came = Path(isoflat.__file__).resolve()
    if given.src.resolve() not in came.parents:
        sys.exit(f"isoflat comes from {came}, not from {given.src}: set PYTHONPATH")
    out = given.out.resolve()
    register()
    found = {}
    for name, measurement in GOLDEN.items():
        if given.only in name:
            found[name] = outcome(measurement)
            out.write_text(json.dumps(found))
    if not found:
        sys.exit(f"no measurement has {given.only!r} in its name; there are: {', '.join(GOLDEN)}")


if __name__ == "__main__":
    main()
