"""Small networks with data, and the dense matrices they are compared with."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network, its data, and a criterion that averages."""

    net: nn.Module
    inputs: Tensor
    targets: Tensor
    criterion: nn.Module

    @property
    def data(self):
        return self.inputs, self.targets

    @property
    def sizes(self):
        return [p.numel() for p in self.net.parameters()]

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.net.parameters()])

    def loss(self, vector: Tensor) -> Tensor:
        """The empirical risk as a function of one flat vector."""
        parts = vector.split(self.sizes)
        named = {name: part.view(p.shape) for part, (name, p) in zip(parts, self.net.named_parameters(), strict=True)}
        return self.criterion(torch.func.functional_call(self.net, named, (self.inputs,)), self.targets)

    def hessian(self) -> Tensor:
        """Forward over reverse through torch.func: another route than the library's."""
        return torch.func.hessian(self.loss)(self.weights)

    def gradient(self) -> Tensor:
        return torch.func.grad(self.loss)(self.weights)

    def frame(self) -> Tensor:
        """The diagonal of D."""
        return torch.cat([p.detach().norm().expand(p.numel()) for p in self.net.parameters()])

    def connection(self) -> Tensor:
        """D C D, block by block from the definition in Rangamani's metric."""
        g, w = self.gradient().split(self.sizes), self.weights.split(self.sizes)
        return torch.block_diag(
            *(
                torch.outer(gi, wi) + torch.outer(wi, gi) - torch.dot(gi, wi) * torch.eye(len(wi), dtype=wi.dtype)
                for gi, wi in zip(g, w, strict=True)
            )
        )


def mlp(widths, bias: bool, seed: int, rows: int = 12, activation=nn.ReLU) -> Case:
    """A feed-forward classifier with random float64 weights."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias, dtype=torch.float64), activation()]
    net = nn.Sequential(*layers[:-1])
    inputs = torch.randn(rows, widths[0], generator=generator, dtype=torch.float64)
    return Case(_seeded(net, generator), inputs, _labels(rows, widths[-1], generator), nn.CrossEntropyLoss())


def cnn(channels: int, bias: bool, seed: int, rows: int = 6) -> Case:
    """Convolution, pooling, convolution, linear head; random float64 weights."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, channels, 3, bias=bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, channels, 2, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(channels * 4, 3, bias=bias),
    ).double()
    inputs = torch.randn(rows, 1, 8, 8, generator=generator, dtype=torch.float64)
    return Case(_seeded(net, generator), inputs, _labels(rows, 3, generator), nn.CrossEntropyLoss())


def micro() -> Case:
    """The bias-free 2-3-2 network of the ground-truth table."""
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([(1.0, 2.0), (-1.0, 1.0), (0.5, -1.0)]))
        net[2].weight.copy_(torch.tensor([(1.0, -1.0, 0.5), (-0.5, 1.0, 2.0)]))
    inputs = torch.tensor([(1.0, 2.0), (-1.0, 1.0), (2.0, -1.0), (0.5, 0.5)], dtype=torch.float64)
    return Case(net, inputs, torch.tensor([0, 1, 1, 0]), nn.CrossEntropyLoss())


def scale(net: nn.Module, factors: dict[str, float | Tensor]) -> nn.Module:
    """Multiply named parameters in place."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name in factors:
                parameter.mul_(factors[name])
    return net


def _seeded(net: nn.Module, generator: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * (2 / fan) ** 0.5)
    return net


def _labels(rows: int, classes: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, classes, (rows,), generator=generator)
