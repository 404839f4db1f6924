"""Tiny float64 architectures, one for each thing that a network can do to its units. To add one, write a function
under `@entry` that returns a module and the shape of one input row; its docstring says what it is there for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

F = nn.functional

EPSILON = 0.1
"""Of every normalisation: large, so that one left behind is seen."""

TOKENS = 7
"""Size of the vocabulary of nets that read token numbers."""


@dataclass(frozen=True)
class Entry:
    """An architecture: a function that builds it, the shape of one input row, and what it is there for."""

    make: Callable[[], tuple[nn.Module, tuple[int, ...]]]
    note: str
    tokens: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        """The network in evaluation mode with random weights; torch's own generator is not touched."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = self.make()[0].double().eval()
        return randomised(net, torch.Generator().manual_seed(seed))

    def inputs(self, rows: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        """Random input rows."""
        with torch.random.fork_rng(devices=[]):
            shape = (rows, *self.make()[1])
        generator = torch.Generator().manual_seed(seed + 1)
        if self.tokens:
            return (torch.randint(TOKENS, shape, generator=generator),)
        return (torch.randn(shape, generator=generator, dtype=torch.float64),)


ZOO: dict[str, Entry] = {}
"""By name."""


def entry(function=None, *, tokens: bool = False, **options):
    """Register an architecture; with options, a variant of it by name."""
    if function is None:
        return partial(entry, tokens=tokens, **options)
    ZOO[function.__name__.replace("_", "-")] = Entry(function, function.__doc__ or "", tokens)
    return function


def variants(*, tokens: bool = False, **kinds):
    """Register one architecture for each keyword, called with its value."""

    def register(function):
        for kind, value in kinds.items():
            name = f"{function.__name__}-{kind}".replace("_", "-")
            ZOO[name] = Entry(partial(function, value), function.__doc__ or "", tokens)
        return function

    return register


AGAIN: set[str] = set()
"""Entries that differ from another one in spelling only, as far as what is done with their weights goes."""


VARIANTS = {
    "mlp-plain", "lenet-plain", "vgg-free", "homogeneous-leaky", "homogeneous-prelu", "smooth-silu", "smooth-tanh", "pool-mean",
    "pool-override", "pool-adaptive", "resnet-basic-free", "resnet-bottleneck-batch", "resnet-bottleneck-free", "densenet",
    "pre-norm-hand", "post-norm-hand", "dead-unit", "multihead-extra", "multihead-zero", "attention-bare",
    "attention-chunked", "grouped-queries-single", "rotary-partial", "linear-chain-wide", "linear-chain-joined",
    "torch-encoder-post-gelu", "torch-decoder-post", "decoder-layer", "positioned-tied", "adapters-zero",
    "adapters-frozen", "recurrent-gru", "hugging-bert", "hugging-vit", "mobilenet-relu", "resnet-bottleneck-group",
    "pre-norm-rms", "post-norm-layer", "glu-bilinear", "multihead-extra-eager", "torch-decoder-pre",
}  # fmt: skip
"""Entries whose kind another one stands for, where a test measures each."""


def thinned(names: Iterable[str], further: Collection[str] = ()) -> list[Any]:
    """Parameters for a test that costs seconds an entry: those of `AGAIN` and further ones are left to the slow tests."""
    slow = AGAIN | set(further)
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def randomised(net: nn.Module, generator: torch.Generator) -> nn.Module:
    """Weights of the usual size, gains of both signs away from zero, biases and statistics that are not trivial."""

    def normal(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def away(shape: torch.Size) -> Tensor:
        return (0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)) * normal(shape).sign()

    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(away(tensor.shape).abs())
            elif tensor.ndim == 1 and name.endswith(("weight", "gain")):
                tensor.copy_(away(tensor.shape))
            elif tensor.ndim <= 1:
                tensor.copy_(normal(tensor.shape) / 2)
            else:
                tensor.copy_(normal(tensor.shape) * (2 / tensor[0].numel()) ** 0.5)
    after = getattr(net, "after", None)
    if after is not None:
        with torch.no_grad():
            after(net)
    return net


def afterwards(net: nn.Module, change: Callable[[nn.Module], None]) -> nn.Module:
    """A network whose weights are changed once they are random."""
    net.after = change
    return net


# Parts ----------------------------------------------------------------------------------------------------------------


class Total(nn.Module):
    """The sum of branches."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        made = self.branches[0](x)
        for branch in self.branches[1:]:
            made = made + branch(x)
        return made


class Joined(Total):
    """Branches side by side."""

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


class Product(Total):
    """The product of two branches."""

    def forward(self, x):
        return self.branches[0](x) * self.branches[1](x)


class Apply(nn.Module):
    """A function of the input and of modules and parameters (given by their shapes) of its own."""

    def __init__(self, function, *owned: nn.Module | tuple[int, ...]):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(part for part in owned if isinstance(part, nn.Module))
        self.tensors = nn.ParameterList(nn.Parameter(torch.zeros(part)) for part in owned if isinstance(part, tuple))

    def forward(self, x):
        return self.function(x, *self.parts, *self.tensors)


class RootMeanSquare(nn.Module):
    """RMSNorm as people write it."""

    def __init__(self, width: int, eps: float = 1e-2):
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def layer_norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=EPSILON)


def rms_norm(width: int) -> nn.Module:
    return nn.RMSNorm(width, eps=EPSILON)


def batch_norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=EPSILON)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels, eps=EPSILON)


def no_norm(channels: int) -> nn.Module:
    return nn.Identity()


def conv(a: int, b: int, norm=no_norm, size: int = 3, act: nn.Module | None = None, **options) -> nn.Sequential:
    """Convolution, normalisation, activation; a bias where there is no normalisation."""
    layer = nn.Conv2d(a, b, size, padding=size // 2, bias=norm is no_norm, **options)
    return nn.Sequential(layer, norm(b), act or nn.Identity())


def head(channels: int, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def dense(widths, act=nn.ReLU, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), act()]
    return nn.Sequential(*layers[:-1])


NORMS = {"batch": batch_norm, "group": group_norm, "free": no_norm}
IMAGE = (2, 6, 6)

# Chains ---------------------------------------------------------------------------------------------------------------


@variants(bias=True, plain=False)
def mlp(bias):
    """One scale for each hidden unit."""
    return dense((4, 6, 5, 3), bias=bias), (4,)


@variants(bias=True, plain=False)
def lenet(bias):
    """Convolutions, max pooling, then a linear layer that reads each channel at several places."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=bias), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 1, bias=bias), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 5, bias=bias), nn.ReLU(), nn.Linear(5, 3, bias=bias),
    ), IMAGE  # fmt: skip


@variants(batch=batch_norm, free=no_norm)
def vgg(norm):
    """A chain of 3×3 convolutions with max pooling: three scales for each channel of a batch normalisation."""
    return nn.Sequential(
        conv(2, 4, norm, act=nn.ReLU()), nn.MaxPool2d(2), conv(4, 3, norm, act=nn.ReLU()), head(3)
    ), IMAGE  # fmt: skip


@variants(leaky=nn.LeakyReLU, prelu=partial(nn.PReLU, 5), square=partial(Apply, lambda x: torch.relu(x) ** 2))
def homogeneous(act):
    """Other positively homogeneous activations, one of degree two."""
    return dense((4, 5, 5, 3), act), (4,)


@variants(gelu=nn.GELU, silu=nn.SiLU, tanh=nn.Tanh)
def smooth(act):
    """Nothing may be claimed."""
    return dense((4, 5, 4, 3), act), (4,)


@entry
def half_smooth():
    """One hidden layer that scales, one that does not."""
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)), (4,)


@entry
def linear_pair():
    """No activation between two layers: constants pass, and the scales are part of a larger group."""
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), (4,)


@variants(
    maximum=partial(nn.MaxPool2d, 3, stride=1, padding=1), mean=partial(nn.AvgPool2d, 2),
    padded=partial(nn.AvgPool2d, 3, padding=1), override=partial(nn.AvgPool2d, 2, divisor_override=3),
    adaptive=partial(nn.AdaptiveMaxPool2d, 2),
)  # fmt: skip
def pool(kind):
    """Pooling straight after a convolution: whether the bias's constant passes depends on the kind."""
    return nn.Sequential(nn.Conv2d(2, 3, 3), kind(), nn.Conv2d(3, 4, 1), nn.ReLU(), head(4)), IMAGE


@entry
def transposed_convolution():
    """The weight's first axis is the input's."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.ReLU(), head(6)
    ), IMAGE  # fmt: skip


@entry
def one_dimension():
    """conv1d with groups and dilation."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 2, groups=2, dilation=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ), (2, 8)  # fmt: skip


@entry
def shuffled():
    """Channels that are shuffled, then turned into pixels, four of which share a scale."""
    mix = Apply(lambda x: F.pixel_shuffle(F.channel_shuffle(x, 2), 2))
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), mix, nn.Conv2d(2, 3, 1), nn.ReLU(), head(3)), IMAGE


# Residuals ------------------------------------------------------------------------------------------------------------


@variants(**NORMS)
def resnet_basic(norm):
    """Basic blocks, the second with a downsampling branch: one scale for each channel of each stream."""
    relu = nn.ReLU
    block = nn.Sequential(conv(4, 4, norm, act=relu()), conv(4, 4, norm))
    down = nn.Sequential(conv(4, 6, norm, stride=2, act=relu()), conv(6, 6, norm))
    return nn.Sequential(
        conv(2, 4, norm, act=relu()), Total(block, nn.Identity()), relu(),
        Total(down, conv(4, 6, norm, size=1, stride=2)), relu(), head(6),
    ), IMAGE  # fmt: skip


@variants(**NORMS)
def resnet_bottleneck(norm):
    """Bottleneck blocks with a downsampling branch."""
    relu = nn.ReLU

    def body(a, stride):
        return nn.Sequential(
            conv(a, 2, norm, size=1, act=relu()), conv(2, 2, norm, stride=stride, act=relu()), conv(2, 4, norm, size=1)
        )

    return nn.Sequential(
        conv(2, 2, norm, act=relu()), Total(body(2, 2), conv(2, 4, norm, size=1, stride=2)), relu(),
        Total(body(4, 1), nn.Identity()), relu(), head(4),
    ), IMAGE  # fmt: skip


@variants(relu=nn.ReLU, relu6=nn.ReLU6)
def mobilenet(act):
    """Inverted residuals: depthwise convolutions and a stream without activation; ReLU6 fixes all but the stream."""
    norm = batch_norm

    def inverted(a, b, middle):
        return nn.Sequential(
            conv(a, middle, norm, size=1, act=act()), conv(middle, middle, norm, groups=middle, act=act()),
            conv(middle, b, norm, size=1),
        )  # fmt: skip

    return nn.Sequential(
        conv(2, 3, norm, act=act()), inverted(3, 2, 4), Total(inverted(2, 2, 4), nn.Identity()),
        conv(2, 4, norm, size=1, act=act()), head(4),
    ), IMAGE  # fmt: skip


@entry
def grouped():
    """Grouped convolution: columns in groups."""
    return nn.Sequential(conv(2, 4, act=nn.ReLU()), conv(4, 6, groups=2, act=nn.ReLU()), head(6)), IMAGE


@entry
def densenet():
    """Concatenation: each reader sees the channels of all earlier layers."""
    relu = nn.ReLU
    return nn.Sequential(
        conv(2, 3, act=relu()), Joined(nn.Identity(), conv(3, 2, act=relu())),
        Joined(nn.Identity(), conv(5, 2, act=relu())), head(7),
    ), IMAGE  # fmt: skip


@entry
def densenet_batch():
    """Concatenation with batch normalisation before each activation: several of them read the same channels."""

    def grow(a):
        return nn.Sequential(batch_norm(a), nn.ReLU(), nn.Conv2d(a, 2, 3, padding=1, bias=False))

    return nn.Sequential(
        conv(2, 3), Joined(nn.Identity(), grow(3)), Joined(nn.Identity(), grow(5)), batch_norm(7), nn.ReLU(), head(7)
    ), IMAGE  # fmt: skip


@entry
def zero_branch():
    """A residual branch whose last layer is zero, as at initialisation."""
    body = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
    net = nn.Sequential(nn.Linear(3, 4), Total(body, nn.Identity()), nn.ReLU(), nn.Linear(4, 3))
    return afterwards(net, lambda net: [p.zero_() for p in net[1].branches[0][2].parameters()]), (3,)


NORM_KINDS = {"layer": layer_norm, "rms": rms_norm, "hand": RootMeanSquare}


@variants(**NORM_KINDS)
def pre_norm(norm):
    """A residual stream that every reader normalises: one scale, divided out, and one for each gain and hidden unit."""

    def body():
        return nn.Sequential(norm(4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))

    return nn.Sequential(
        nn.Linear(3, 4), Total(nn.Identity(), body()), Total(nn.Identity(), body()), norm(4), nn.Linear(4, 3)
    ), (3,)  # fmt: skip


@variants(**NORM_KINDS)
def post_norm(norm):
    """The sum of stream and branch is normalised: gain and offset of one normalisation enter the next."""

    def body():
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))

    return nn.Sequential(
        nn.Linear(3, 4), Total(nn.Identity(), body()), norm(4), Total(nn.Identity(), body()), norm(4), nn.Linear(4, 3)
    ), (3,)  # fmt: skip


@entry
def two_offsets():
    """Two normalisations added before an activation: their offsets enter through the sum only."""
    branches = Total(*(nn.Sequential(nn.Linear(3, 4), layer_norm(4)) for _ in range(2)))
    return nn.Sequential(branches, nn.ReLU(), nn.Linear(4, 3)), (3,)


@entry
def norm_of_part():
    """One normalisation whose groups do not all scale: its epsilon has to stay."""
    return nn.Sequential(
        Joined(nn.Identity(), nn.Conv2d(2, 2, 1)), group_norm(4), nn.ReLU(), head(4)
    ), IMAGE  # fmt: skip


# Sharing --------------------------------------------------------------------------------------------------------------


@entry
def shared_linear():
    """A layer used twice, in a row: its rows and columns scale alike."""
    layer = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 3)), (3,)


@entry
def shared_block():
    """A block with normalisation used twice: one epsilon, one gain."""
    block = nn.Sequential(layer_norm(4), nn.Linear(4, 4), nn.ReLU())
    return nn.Sequential(nn.Linear(3, 4), block, nn.Linear(4, 4), block, nn.Linear(4, 3)), (3,)


@entry
def shared_norm():
    """A normalisation used first on the input, which has a scale of its own, then on a layer's output."""
    norm = layer_norm(4)
    return nn.Sequential(norm, nn.Linear(4, 4), norm, nn.ReLU(), nn.Linear(4, 3)), (4,)


@entry
def padded_and_shared():
    """A layer that first reads zeros in some columns, then not."""
    layer = nn.Linear(4, 4)
    pad = Apply(lambda x: F.pad(x, (0, 2)))
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), pad, layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 3)), (3,)


class Domains(nn.Module):
    """Two sets of statistics behind one gain and offset."""

    def __init__(self):
        super().__init__()
        self.layer, self.first, self.second = nn.Conv2d(2, 3, 1), batch_norm(3), batch_norm(3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = head(3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(self.layer(x))))))


@entry
def shared_affine():
    """Batch normalisations with statistics of their own but a common gain and offset."""
    return Domains(), IMAGE


@entry
def frozen():
    """First layers are not trained: the group acts on them nevertheless."""
    net = dense((4, 5, 6, 3))
    net[0].requires_grad_(False)
    return net, (4,)


class Tied(nn.Module):
    """Tokens, positions, one normalised block, and the table of tokens once more as head."""

    def __init__(self, tied: bool):
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, 4), nn.Embedding(3, 4)
        self.norm, self.up, self.down = layer_norm(4), nn.Linear(4, 5), nn.Linear(5, 4)
        self.last, self.head = layer_norm(4), nn.Linear(4, TOKENS, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, index):
        x = self.tokens(index) + self.places(torch.arange(index.shape[1], device=index.device))
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(self.last(x))


@entry(tokens=True)
def embedded():
    """Two tables that enter through their sum, under normalisations."""
    return Tied(False), (3,)


@entry(tokens=True)
def tied():
    """The table of tokens is the head too: neither its constants nor its mean are free."""
    return Tied(True), (3,)


# Dead and extreme units -----------------------------------------------------------------------------------------------


def _dead(*layers: int):
    def change(net):
        for i in layers:
            net[i].weight[0] *= 1e3
            net[i].bias[0] = -1e6

    return change


@entry
def dead_unit():
    """A unit that is never active, with huge incoming weights."""
    return afterwards(dense((4, 6, 5, 3)), _dead(0)), (4,)


@entry
def dead_chain():
    """Dead units that feed dead units."""
    return afterwards(dense((4, 6, 5, 5, 3)), _dead(0, 2, 4)), (4,)


# Products and operations without a rule -------------------------------------------------------------------------------


@entry
def bilinear():
    """A gated unit without a nonlinear gate: two scales for each unit."""
    return nn.Sequential(Product(nn.Linear(4, 5), nn.Linear(4, 5)), nn.Linear(5, 3)), (4,)


@entry
def gated():
    """A gated unit with a sigmoid gate: the value scales, the gate does not."""
    gate = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid())
    return nn.Sequential(Product(nn.Linear(4, 5), gate), nn.Linear(5, 3)), (4,)


@entry
def weight_normed():
    """A weight that is computed from a direction and a length."""
    return nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 3)), (4,)


@entry
def sorted_units():
    """Sorting has no rule: it fixes what it touches and nothing else."""
    return nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), Apply(lambda x: torch.sort(x, -1).values), nn.Linear(4, 3)
    ), (4,)  # fmt: skip


@torch.library.custom_op("isoflat_zoo::cubed", mutates_args=())
def cubed(x: Tensor) -> Tensor:
    """An operation that nobody has heard of; it is homogeneous of degree three."""
    return x**3


@cubed.register_fake
def _(x):
    return torch.empty_like(x)


@entry
def custom():
    """An operation from somebody's library."""
    return nn.Sequential(nn.Linear(4, 5), Apply(lambda x: cubed(x)), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), (4,)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


@entry
def lstm():
    """Recurrence: two biases that enter through their sum, no scales."""
    return Recurrent(), (3, 3)


class Learned(nn.Module):
    """A table that is summed over, and a gain that is computed."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.table, self.length = nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(2, 5))

    def forward(self, x):
        x = (self.layer(x) + self.table.sum(0)) * torch.linalg.vector_norm(self.length, dim=0)
        return self.head(torch.relu(x + self.table.cumsum(0)[1]))


@entry
def reduced_tables():
    """Sums and norms of stored tensors: a constant in them counts as often as there are terms, or not at all."""
    return Learned(), (4,)


import_module("cases.transformers")  # which registers its own, made of the parts above
