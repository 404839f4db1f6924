"""Products on large networks, on a GPU where there is one: how much of the machine's matrix-product rate they use.

Networks of the size of GPT-2 small and ResNet-50 (random weights from their default configurations, random data), float32
without TF32. For each: a plain gradient pass, a product with one vector and with several at once, and a whole certified
answer; floating-point operations as torch counts them, over the time, over the rate of a large matrix product in the same
process. And what a Lanczos step takes beside its product on vectors of so many entries, against a plain read of them.

Run with `make bench-device`, or with `--small` to see that it runs. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import isoflat
from isoflat.linalg.krylov.recurrence import Recurrence
from isoflat.risk.batches import as_batches
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.losses import BatchLoss, as_loss
from isoflat.risk.network import Network, exactly
from isoflat.risk.routes.reverse import Recomputed

ROUNDS = 5
VECTORS = 4


def seconds(device: torch.device, work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median of some runs after one that does not count."""
    found = []
    for _ in range(rounds + 1):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - started)
    return median(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(device: torch.device, n: int) -> float:
    """Floating-point operations per second of a square matrix product in float32."""
    a = torch.randn(n, n, device=device)
    return 2 * n**3 / seconds(device, lambda: a @ a)


def operations(work: Callable[[], Any]) -> int:
    """Of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def decoder(small: bool) -> tuple[nn.Module, list[Any], Any]:
    """GPT-2 small and random tokens."""
    import transformers

    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 500} if small else {}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    tokens = torch.randint(model.config.vocab_size, (4, 32) if small else (4, 256))

    def loss(net: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        logits = net(batch, use_cache=False).logits[:, :-1]
        wanted = batch[:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"), wanted.numel()

    return model, [tokens], BatchLoss(loss)


def resnet(small: bool) -> tuple[nn.Module, list[Any], Any]:
    """ResNet-50 and random images."""
    import transformers

    sizes = {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 8} if small else {}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000, **sizes))
    images = torch.randn(4, 3, 64, 64) if small else torch.randn(32, 3, 224, 224)
    return model, [(images, torch.randint(1000, (len(images),)))], nn.CrossEntropyLoss()


def measured(name: str, made: tuple[nn.Module, list[Any], Any], device: torch.device, peak: float) -> None:
    """The lines of one network."""
    model, batches, loss = made
    model = model.to(device).eval()
    network = Network(model)
    risk, state = EmpiricalRisk(network, as_loss(loss), as_batches(batches)), network.state()
    n = state.space.size
    with exactly(device):
        plain = seconds(device, lambda: risk.survey(state))
        print(f"| {name}, {n / 1e6:.0f} M weights, gradient pass | {plain:.3f} | 1.00 | |", flush=True)
        kept = Recomputed(risk, state).keep()
        for width in (1, VECTORS):
            vectors = torch.randn(n, width, device=device)
            count = operations(lambda vectors=vectors: kept.products(vectors))
            took = seconds(device, lambda vectors=vectors: kept.products(vectors))
            share = count / took / peak
            print(
                f"| {width} product(s), graph kept | {took:.3f} | {took / plain / width:.2f} | {share:.0%} |",
                flush=True,
            )
    started = time.perf_counter()
    answer = isoflat.measure(model, batches, loss, geometry="layerwise", rtol=0.1, budget=30, check="skip")
    took = time.perf_counter() - started
    print(f"| {answer}, {answer.cost.products} products | {took:.1f} | {took / plain:.1f} | |", flush=True)


def steps(device: torch.device, n: int) -> None:
    """What a Lanczos step takes beside its product, and what reading the vectors once takes."""
    start = torch.randn(n, device=device)
    run = Recurrence(start / start.norm(), torch.float32)
    scale = torch.linspace(0.1, 1.0, n, device=device)
    basis = [start]
    for k in range(1, 11):
        product = (scale * run.last[:, 0]).double()
        basis.append(run.last[:, 0])
        _wait(device)
        started = time.perf_counter()
        run.extend(product)
        _wait(device)
        took = time.perf_counter() - started
        if k in (1, 5, 10):
            floor = seconds(device, lambda: [row.sum() for row in basis[:k]], 3)  # noqa: B023
            print(
                f"| {n:.0e} entries, step {k} beside its product | {took:.2f} | | one read: {floor:.2f} s |", flush=True
            )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny networks: to see that it runs")
    parser.add_argument("--entries", type=float, default=1e8, help="length of the vectors of the last lines")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = rate(device, 1024 if options.small else 8192 if device.type == "cuda" else 4096)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}: {peak / 1e12:.2f} Tflop/s in a float32 matrix product\n")
    print("| what | seconds | gradient passes (per vector) | share of that rate |\n|---|---|---|---|")
    measured("GPT-2 small", decoder(options.small), device, peak)
    measured("ResNet-50", resnet(options.small), device, peak)
    steps(device, int(options.entries))


if __name__ == "__main__":
    main()
