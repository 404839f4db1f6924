"""Edits of weights by hand that keep the function: written down here, not drawn from what was found."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import isoflat

DOUBLE = torch.float64
ROWS = 24


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Sum(nn.Module):
    """`a·first(x) + b·second(x)`."""

    def __init__(self, first, second, a=1.0, b=1.0):
        super().__init__()
        self.first, self.second, self.a, self.b = first, second, a, b

    def forward(self, x):
        return self.a * self.first(x) + self.b * self.second(x)


class Buffered(nn.Module):
    """A linear map whose bias is a buffer."""

    def __init__(self, a, b):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a))
        self.register_buffer("offset", torch.randn(b))

    def forward(self, x):
        return F.linear(x, self.weight, self.offset)


def common(name, axis=0, bias=None):
    """A common vector for all rows of a weight, and a constant for its bias."""

    def edit(t):
        shape = list(t[name].shape)
        shape[axis] = 1
        t[name] += torch.randn(shape, dtype=DOUBLE)
        if bias is not None:
            t[bias] += 3.0

    return edit


def units(*rows, columns=(), factor=7.0):
    """Every other unit times a factor: rows with it, columns against it."""

    def edit(t):
        for name in rows:
            t[name][::2] *= factor
        for name in columns:
            t[name][:, ::2] /= factor

    return edit


def constant(give, *, into=None, mean=None, weight=None, amount=1.0):
    """A constant added to an offset, taken back by a bias (`−W d`) or a running mean (`+W d`, or `+d` without weight)."""

    def edit(t):
        d = amount * torch.randn(t[give].shape, dtype=DOUBLE)
        t[give] += d
        passed = d if weight is None else t[weight].flatten(2).sum(2) @ d if t[weight].ndim > 2 else t[weight] @ d
        if into is not None:
            t[into] -= passed
        if mean is not None:
            t[mean] += passed

    return edit


def _bn(channels):
    return nn.BatchNorm2d(channels)


IMAGE, FLAT = (2, 6, 6), (4,)
HEAD = (nn.AdaptiveAvgPool2d(1), nn.Flatten())

CASES = {
    "head before log_softmax": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.LogSoftmax(1)), FLAT,
        common("2.weight", bias="2.bias"),
    ),
    "head of a convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 1), *HEAD), IMAGE,
        common("2.weight", bias="2.bias"),
    ),
    "convolution, permuted, before LayerNorm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 5, 3), Apply(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(5), Apply(lambda x: x.mean((1, 2))),
            nn.Linear(5, 3),
        ), IMAGE, common("0.weight", bias="0.bias"),
    ),
    "before a GroupNorm of one group": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(1, 6), nn.ReLU(), nn.Linear(6, 3)), FLAT,
        common("0.weight", bias="0.bias"),
    ),
    "averaged over tokens before LayerNorm": (
        lambda: nn.Sequential(nn.Linear(4, 5), Apply(lambda x: x.mean(1)), nn.LayerNorm(5), nn.Linear(5, 3)), (7, 4),
        common("0.weight", bias="0.bias"),
    ),
    "sliced before LayerNorm": (
        lambda: nn.Sequential(
            nn.Linear(4, 5), Apply(lambda x: x[:, 1:]), nn.LayerNorm(5), Apply(lambda x: x.mean(1)), nn.Linear(5, 3)
        ), (7, 4), common("0.weight", bias="0.bias"),
    ),
    "offset through a bias-free convolution into a running mean": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), _bn(4), nn.Conv2d(4, 5, 1, bias=False), _bn(5), nn.ReLU(), *HEAD, nn.Linear(5, 3)
        ), IMAGE, constant("1.bias", mean="3.running_mean", weight="2.weight"),
    ),
    "bias into a running mean": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), _bn(4), nn.ReLU(), *HEAD, nn.Linear(4, 3)), IMAGE,
        constant("0.bias", mean="1.running_mean", amount=100.0),
    ),
    "offset into a bias": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), FLAT,
        constant("1.bias", into="2.bias", weight="2.weight", amount=10.0),
    ),
    "offset into a bias that is a buffer": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), Buffered(5, 6), nn.ReLU(), nn.Linear(6, 3)), FLAT,
        constant("1.bias", into="2.offset", weight="2.weight"),
    ),
    "hidden bias of a linear pair": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), FLAT,
        constant("0.bias", into="1.bias", weight="1.weight", amount=10.0),
    ),
    "constants under unequal factors": (
        lambda: nn.Sequential(Sum(nn.Linear(4, 5), nn.Linear(4, 5), 0.5, 2.0), nn.ReLU(), nn.Linear(5, 3)), FLAT,
        lambda t: (t["0.first.bias"].add_(4.0), t["0.second.bias"].sub_(1.0)),
    ),
    "offsets of two normalisations that are added": (
        lambda: nn.Sequential(
            Sum(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)), nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))),
            nn.ReLU(), nn.Linear(5, 3),
        ), FLAT, lambda t: (t["0.first.1.bias"].add_(9.0), t["0.second.1.bias"].sub_(9.0)),
    ),
    "units behind circular padding": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), nn.ReLU(), *HEAD, nn.Linear(5, 3)
        ), IMAGE, units("0.weight", "0.bias", columns=["2.weight"]),
    ),
    "units behind interpolation": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 5, 3), nn.ReLU(), *HEAD, nn.Linear(5, 3)
        ), IMAGE, units("0.weight", "0.bias", columns=["3.weight"]),
    ),
    "units of degree two": (
        lambda: nn.Sequential(nn.Linear(4, 6), Apply(lambda x: x.relu() ** 2), nn.Linear(6, 3)), FLAT,
        lambda t: (units("0.weight", "0.bias", factor=3.0)(t), units(columns=["2.weight"], factor=9.0)(t)),
    ),
    "gains against their readers, with signs": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), FLAT,
        units("1.weight", "1.bias", columns=["2.weight"], factor=-5.0),
    ),
    "whole stream before a normalisation without epsilon": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6, eps=0.0), nn.ReLU(), nn.Linear(6, 3)), FLAT,
        lambda t: (t["0.weight"].mul_(2.0**-60), t["0.bias"].mul_(2.0**-60)),
    ),
    "permuted units": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), FLAT,
        lambda t: (t["0.weight"].copy_(t["0.weight"].flip(0)), t["0.bias"].copy_(t["0.bias"].flip(0)),
                   t["2.weight"].copy_(t["2.weight"].flip(1))),
    ),
}  # fmt: skip


def _network(build):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = build().double().eval()
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if name.endswith("running_var"):
                tensor.data.uniform_(0.5, 2.0)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.data.add_(0.5 * torch.randn(tensor.shape, dtype=DOUBLE))
    return net


@pytest.mark.parametrize("name", CASES)
def test_an_edit_by_hand_does_not_move_the_number(name):
    build, shape, edit = CASES[name]
    net, loss = _network(build), nn.NLLLoss() if "log_softmax" in name else nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, *shape, generator=generator, dtype=DOUBLE)
    targets = torch.randint(3, (ROWS,), generator=generator)
    twin = copy.deepcopy(net)
    tensors = dict((*twin.named_parameters(), *twin.named_buffers()))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        edit(tensors)
        scores, moved = (torch.log_softmax(n(inputs), 1) for n in (net, twin))
    assert torch.allclose(scores, moved, rtol=1e-10, atol=1e-10)
    before, after, layerwise = (
        isoflat.measure(n, (inputs, targets), loss, geometry=g, rtol=1e-9).value
        for n, g in ((net, "auto"), (twin, "auto"), (twin, "layerwise"))
    )
    assert after == pytest.approx(before, rel=1e-8)
    # Negative control: the layer-wise number of the edited network is another one than the canonical number.
    assert layerwise != pytest.approx(before, rel=1e-3)
