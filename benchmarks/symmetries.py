"""What finding, proving and canonicalising cost, in seconds and in gradient passes over one batch of 128 rows.

Run with `make bench-symmetries`; prints a Markdown table. Networks have random weights: nothing here depends on their
values but the number of Newton steps.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from isoflat.symmetry.canonical.representative import canonical
from isoflat.symmetry.finding.discover import discover, inputs_of

T = TypeVar("T")


class Basic(nn.Module):
    """ResNet's basic block."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
            nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b),
        )  # fmt: skip
        same = stride == 1 and a == b
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Body plus skip."""
        return torch.relu(self.body(x) + self.skip(x))


def resnet18() -> tuple[nn.Module, tuple[int, ...]]:
    """ResNet-18 for images of 32 × 32, with statistics and gains that are not trivial."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width = 64
    for b, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        layers.append(Basic(width, b, stride))
        width = b
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2.0)
    return net, (3, 32, 32)


def deep() -> tuple[nn.Module, tuple[int, ...]]:
    """A hundred hidden layers of 32 units, with biases."""
    layers = [part for _ in range(100) for part in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(32, 10)), (32,)


def wide() -> tuple[nn.Module, tuple[int, ...]]:
    """A hundred million weights in six layers."""
    layers = [part for _ in range(6) for part in (nn.Linear(4096, 4096), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(4096, 10)), (4096,)


NETWORKS = {"ResNet-18": resnet18, "MLP, depth 100, width 32": deep, "MLP 4096 × 6": wide}


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what came out."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def row(name: str) -> str:
    """One network's line of the table."""
    torch.manual_seed(0)
    net, shape = NETWORKS[name]()
    net.eval()
    inputs, targets = torch.randn(128, *shape), torch.randint(10, (128,))
    unit = min(timed(lambda: nn.functional.cross_entropy(net(inputs), targets).backward())[0] for _ in range(3))
    args, kwargs = inputs_of(inputs)
    find, found = timed(lambda: discover(net, args, kwargs, True))
    prove, _ = timed(found.verify)
    balance, _ = timed(lambda: canonical(found, found.state()))
    size = f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M"
    passes = f"{(find + prove + balance) / unit:.0f}"
    return f"| {name} | {size} | {found.dimension} | {find:.1f} s | {prove:.1f} s | {balance:.1f} s | {passes} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a network's name")
    only = parser.parse_args().only
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores\n")
    print("| network | parameters | dimension | find | prove | canonical | all, in gradient passes |")
    print("|---|---|---|---|---|---|---|")
    for name in NETWORKS:
        if only in name:
            print(row(name), flush=True)


if __name__ == "__main__":
    main()
