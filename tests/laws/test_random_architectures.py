"""Whatever a network does, nothing wrong is claimed about it: random architectures, moved along what was found."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import nn

from cases.zoo import Apply, Joined, Product, RootMeanSquare, Total, randomised
from isoflat.core.errors import SymmetryViolated, UnsupportedModel
from isoflat.symmetry.finding.discover import symmetries

F = nn.functional
EPSILON = 1e-2


# On the input's channels (axis 1, `c` of them) or whatever shape it has; (batch, c) or (batch, c, height, width).

SMOOTH = [
    torch.tanh,
    F.gelu,
    F.silu,
    F.elu,
    F.hardswish,
    F.relu6,
    F.softplus,
    torch.sin,
    F.logsigmoid,
    lambda x: x.clamp(-1, 1),
    lambda x: x.clamp(min=0.5),
    lambda x: F.threshold(x, 0.5, 0.0),
    lambda x: x.softmax(1),
    lambda x: torch.where(x > 0.5, x, 0.0),
    lambda x: torch.sort(x, 1).values,
    lambda x: torch.exp(-x.square()),
    lambda x: x.round(),
    lambda x: x.long().double(),
    lambda x: x * (x > x.mean()),
    lambda x: x.cumprod(1),
    lambda x: torch.where(x == x.amax(1, keepdim=True), x, 0.0),
    lambda x: torch.maximum(x, -x + 1),
]

HOMOGENEOUS = [
    F.relu,
    F.leaky_relu,
    torch.abs,
    lambda x: F.relu(x) ** 2,
    lambda x: x**3,
    lambda x: x * x.abs(),
    lambda x: -x,
    lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: torch.where(x > 0, x, 0.0),
    lambda x: x.clamp(min=0),
    lambda x: x * x.sign(),
    lambda x: torch.maximum(x, 0.3 * x),
    lambda x: x.abs().sqrt(),
    lambda x: x * (x > 0),
    lambda x: F.threshold(x, 0.0, 0.0),
    lambda x: x.square().sum(1, keepdim=True) + x**2,
]

LINEAR = [
    lambda x: 0.5 * x,
    lambda x: x / 3,
    lambda x: x + 1,
    lambda x: 1 - x,
    lambda x: x - 0.25 * x,
    lambda x: torch.add(x, x, alpha=2),
    lambda x: x + x.detach(),
    lambda x: x * 0 + x,
    lambda x: x.flip(1),
    lambda x: x.roll(1, 1),
    lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    lambda x: x[:, 1:],
    lambda x: x[:, ::2],
    lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    lambda x: x.index_select(1, torch.tensor([0, 0])),
    lambda x: x.narrow(1, 0, 1),
    lambda x: torch.stack([x, -2 * x], 1).sum(1),
    lambda x: torch.stack([x, x], 2).flatten(1, 2),
    lambda x: x.repeat_interleave(2, 1),
    lambda x: F.pad(x, (0, 0) * (x.ndim - 2) + (0, 1)),
    lambda x: F.pad(x, (0, 0) * (x.ndim - 2) + (1, 0), value=1.0),
    lambda x: x - x.mean(1, keepdim=True),
    lambda x: x + x.sum(1, keepdim=True),
    lambda x: x.cumsum(1),
    lambda x: x.amax(1, keepdim=True) - x,
    lambda x: x.unsqueeze(1).expand(-1, 2, *x.shape[1:]).reshape(x.shape[0], -1, *x.shape[2:]),
    lambda x: x.unbind(1)[0].unsqueeze(1) + x,
    lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    lambda x: x + torch.linspace(0, 1, x.shape[1], dtype=x.dtype).view(-1, *[1] * (x.ndim - 2)),
    lambda x: x * torch.tensor([0.0, 1.0] * x.shape[1])[: x.shape[1]].view(-1, *[1] * (x.ndim - 2)),
]

NORMALISING = [
    lambda x: F.normalize(x, dim=1),
    lambda x: x / x.norm(dim=1, keepdim=True),
    lambda x: x / x.std(1, keepdim=True),
    lambda x: x / (x.abs().amax(1, keepdim=True) + 1e-3),
    lambda x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-3),
    lambda x: (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True) + 1e-3),
    lambda x: x / x.square().sum(1, keepdim=True),
    lambda x: x.pow(2) / x.pow(2).sum(1, keepdim=True).sqrt(),
    lambda x: x.reciprocal().clamp(min=0),
]

TWO_PARTS = [
    lambda a, b: a * b,
    lambda a, b: a * b.sigmoid(),
    lambda a, b: torch.maximum(a, b),
    lambda a, b: a - b,
    lambda a, b: torch.where(a > 0, a, b),
    lambda a, b: a / (1 + b.abs()),
    lambda a, b: torch.add(a, b, alpha=0.5),
    lambda a, b: torch.cat([a, b, a], 1),
    lambda a, b: a.relu() + b,
    lambda a, b: a * b.abs().sqrt(),
    lambda a, b: torch.lerp(a, b, 0.3),
]

WITH_TENSOR = [
    lambda x, p: x * p,
    lambda x, p: x + p,
    lambda x, p: x * p + p,
    lambda x, p: x * p.relu(),
    lambda x, p: (x + p) * (x - p),
    lambda x, p: x * p[:1],
    lambda x, p: x + p.mean(),
    lambda x, p: x + p.sum(),
    lambda x, p: x + p.cumsum(0),
    lambda x, p: x * (1 + p),
    lambda x, p: torch.maximum(x, p),
    lambda x, p: torch.where(x > 0, x, p * x),
    lambda x, p: x + p.abs(),
    lambda x, p: x + p.flip(0),
    lambda x, p: x * F.normalize(p, dim=0),
    lambda x, p: x * p / p.abs().amax(),
    lambda x, p: x * p * p,
    lambda x, p: x + p**2,
    lambda x, p: x - p.norm(),
    lambda x, p: torch.where(p > 0, x, p),
    lambda x, p: x + torch.sort(p, 0).values,
]

WITH_MATRIX = [  # x (batch, c), w (m, c)
    lambda x, w: x @ w.t(),
    lambda x, w: F.linear(x, w.relu()),
    lambda x, w: F.linear(x, w / w.norm(dim=1, keepdim=True)),
    lambda x, w: F.linear(x, w - w.mean(1, keepdim=True)),
    lambda x, w: F.linear(F.linear(x, w).relu(), w.t()),
    lambda x, w: F.linear(x * w[0], w),
    lambda x, w: F.linear(x, w) + w.sum(),
    lambda x, w: F.linear(x, w, w[:, 0]),
    lambda x, w: F.linear(x, w[:1] * w),
    lambda x, w: F.linear(x.relu(), w.flip(0)) - F.linear(x, w),
    lambda x, w: torch.addmm(w[:, 0], x, w.t()),
    lambda x, w: w[:1].expand(len(x), -1) + x,
    lambda x, w: x @ w.t() @ w,
    lambda x, w: torch.einsum("bi,oi->bo", x, w),
    lambda x, w: F.embedding(x.argmax(1), w.t()),
    lambda x, w: torch.cat([x, w[:1].expand(len(x), -1)], 1),
    lambda x, w: torch.index_select(w, 0, (x[:, 0] > 0).long() % len(w)),
    lambda x, w: x.unsqueeze(1).matmul(w.t()).squeeze(1),
]

POOLING = [
    lambda x: F.max_pool2d(x, 2),
    lambda x: F.max_pool2d(x, 3, 1, 1),
    lambda x: F.avg_pool2d(x, 2),
    lambda x: F.avg_pool2d(x, 3, 1, 1),
    lambda x: F.avg_pool2d(x, 2, 1, ceil_mode=True),
    lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    lambda x: F.adaptive_avg_pool2d(x, 2),
    lambda x: F.adaptive_max_pool2d(x, 2),
    lambda x: x.transpose(2, 3),
    lambda x: F.interpolate(x, scale_factor=2),
    lambda x: F.pad(x, (1, 0, 0, 1)),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    lambda x: x.mean((2, 3), keepdim=True) * x,
    lambda x: x + x.mean((2, 3), keepdim=True),
    lambda x: x.amax(2, keepdim=True) - x,
    lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    lambda x: F.lp_pool2d(x.relu() + 1e-3, 2, 2),
    lambda x: F.unfold(x, 2)[..., :1, None],
    lambda x: x[:, :, 1:] - x[:, :, :-1],
    lambda x: x.flatten(2).cumsum(2).unflatten(2, x.shape[2:]),
]


class Builder:
    """Draws stages that fit the shape so far; modules of earlier stages may be used again."""

    def __init__(self, draw):
        self.draw, self.made = draw, {}

    def pick(self, options):
        return self.draw(st.sampled_from(options))

    def kept(self, key, make):
        """A module that later stages may use again."""
        self.made[key] = make()
        return self.made[key]

    def contraction(self, shape):
        c = shape[0]
        out = self.pick([1, 2, 3, 4])
        bias = self.draw(st.booleans())
        if len(shape) == 1:
            if self.draw(st.booleans()):
                return self.kept(("linear", c, out, bias), lambda: nn.Linear(c, out, bias=bias))
            return Apply(self.pick(WITH_MATRIX), (out, c))
        groups = self.pick([g for g in (1, 2, c) if c % g == 0])
        size = self.pick([s for s in (1, 2, 3) if s <= min(shape[1:])])
        options = {"bias": bias, "groups": groups}
        kind = self.pick(["conv", "conv", "padded", "transposed"])
        if kind == "transposed":
            return nn.ConvTranspose2d(c, groups * out, size, **options)
        padding = size // 2 if kind == "padded" else 0
        key = ("conv", c, groups * out, size, padding, *options.values())
        return self.kept(key, lambda: nn.Conv2d(c, groups * out, size, padding=padding, **options))

    def norm(self, shape):
        c = shape[0]
        groups = self.pick([g for g in (1, 2, c) if c % g == 0])
        affine = self.draw(st.booleans())
        if len(shape) == 1:
            kinds = {
                "batch": lambda: nn.BatchNorm1d(c, EPSILON, affine=affine),
                "layer": lambda: nn.LayerNorm(c, EPSILON, affine),
                "rms": lambda: nn.RMSNorm(c, EPSILON, affine),
                "plain rms": lambda: nn.RMSNorm(c),
                "hand": lambda: RootMeanSquare(c),
            }
        else:
            kinds = {
                "batch": lambda: nn.BatchNorm2d(c, EPSILON, affine=affine),
                "group": lambda: nn.GroupNorm(groups, c, EPSILON, affine),
                "instance": lambda: nn.InstanceNorm2d(c, EPSILON, affine=affine),
                "tracked": lambda: nn.InstanceNorm2d(c, EPSILON, affine=affine, track_running_stats=True),
                "layer": lambda: nn.LayerNorm(shape, EPSILON, affine),
            }
        kind = self.pick(sorted(kinds))
        return self.kept((kind, shape, groups, affine), kinds[kind])

    def branches(self, shape, depth):
        """Two branches that give the same shape."""
        first, made = self.stages(shape, depth - 1, self.pick([1, 2]))
        if made == shape and self.draw(st.booleans()):
            return first, nn.Identity()
        second, other = self.stages(shape, depth - 1, 1)
        return first, nn.Sequential(*second, _onto(other, made))

    def stage(self, shape, depth):
        wide = (shape[0], *[1] * (len(shape) - 1))
        kinds = ["contraction"] * 4 + ["norm"] * 2 + ["homogeneous"] * 3 + ["smooth", "linear", "linear", "normalising"]
        kinds += ["tensor", "tensor"] + (["pooling"] * 2 if len(shape) == 3 else [])
        kinds += ["residual"] * 3 + ["join", "product", "two"] if depth else []
        fitting = [module for (_, wanted, *_), module in self.made.items() if wanted in (shape, shape[0])]
        kind = self.pick(kinds + ["a module used twice"] * 2 * bool(fitting))
        event(kind)
        if kind == "a module used twice":
            return self.pick(fitting)
        if kind in ("contraction", "norm"):
            return getattr(self, kind)(shape)
        tables = {
            "homogeneous": HOMOGENEOUS,
            "smooth": SMOOTH,
            "linear": LINEAR,
            "normalising": NORMALISING,
            "pooling": POOLING,
        }
        if kind in tables:
            return Apply(self.pick(tables[kind]))
        if kind == "tensor":
            return nn.PReLU(shape[0]) if self.draw(st.integers(0, 9)) == 0 else Apply(self.pick(WITH_TENSOR), wide)
        first, second = self.branches(shape, depth)
        if kind == "two":
            function = self.pick(TWO_PARTS)
            return Apply(lambda x, a, b: function(a(x), b(x)), first, second)
        return {"residual": Total, "join": Joined, "product": Product}[kind](first, second)

    def stages(self, shape, depth, number):
        """A sequence of stages, and the shape that leaves it."""
        found = []
        for _ in range(number):
            module = self.stage(shape, depth)
            try:
                made = _shape(module, shape)
            except (RuntimeError, IndexError, ValueError, UserWarning):
                continue  # does not fit this shape
            if len(made) == len(shape) and 0 < torch.Size(made).numel() <= 200:
                found.append(module)
                shape = made
        return nn.Sequential(*found), shape


def _shape(module, shape):
    """What leaves a module that such an input enters."""
    return tuple(module.double().eval()(torch.zeros(2, *shape, dtype=torch.float64)).shape[1:])


def _onto(shape, wanted):
    """From one shape to another by something that has a rule."""
    if shape == wanted:
        return nn.Identity()
    if len(shape) == 1:
        return nn.Linear(shape[0], wanted[0])
    return nn.Sequential(nn.Conv2d(shape[0], wanted[0], 1), nn.AdaptiveAvgPool2d(wanted[1:]))


def network(draw):
    """A network with random weights, and inputs for it."""
    builder = Builder(draw)
    shape = draw(st.sampled_from([(3,), (4,), (2, 4, 4), (3, 5, 4)]))
    rows = draw(st.sampled_from([2, 3]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = builder.contraction(shape) if draw(st.booleans()) else nn.Identity()
        after = _shape(first, shape)
        assume(len(after) == len(shape))
        body, made = builder.stages(after, 2, draw(st.integers(1, 5)))
        net = nn.Sequential(first, body)
        if draw(st.booleans()):
            net.append(nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(made).numel(), 2)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    net = randomised(net.double().eval(), generator)
    return net, torch.randn(rows, *shape, generator=generator, dtype=torch.float64)


def _claims_nothing_wrong(case):
    net, inputs = case
    with torch.no_grad():
        assume(bool(torch.isfinite(net(inputs)).all()))
    assume(any(True for _ in net.parameters()))
    try:
        found = symmetries(net, inputs, verify=False)
    except UnsupportedModel:
        event("not supported")
        return
    event("something claimed" if found.dimension else "nothing claimed")
    assume(_well_posed(found))
    assert _proved(found) <= 1e-9, str(found)


def _proved(found):
    """A wrong claim is wrong at every spread. Factors of e³ may be too many for a variance: where v + ε shrinks by more than
    1e-8, its digits are lost to ε."""
    try:
        return found.verify(spread=3.0)
    except SymmetryViolated:
        event("factors of e only")
        return found.verify(spread=1.0)


def _well_posed(found):
    """Whether rounding of the tensors moves the output by no more than rounding: without epsilon, a normalised constant is
    noise over noise."""
    state = found.state()
    outputs = []
    for size in (0.0, 1e-14):
        tensors = {name: tensor * (1 + size) for name, tensor in state.tensors.items() if tensor.is_floating_point()}
        outputs.append(found.output(replace(state.replace(tensors), constants=dict.fromkeys(state.constants, 0.0))))
    moved, size = (outputs[1] - outputs[0]).abs().max(), outputs[0].abs().max()
    return not bool(torch.isfinite(outputs[0]).all()) or bool(moved <= 1e-10 * size)


ROUNDS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=12, derandomize=True, **ROUNDS)
@given(st.composite(network)())
def test_claims_are_true(case):
    """Factors of e³ along everything that was found change no output: unknown operations only make the group smaller."""
    _claims_nothing_wrong(case)


@pytest.mark.slow
@settings(max_examples=400, **ROUNDS)
@given(st.composite(network)())
def test_more_claims_are_true(case):
    _claims_nothing_wrong(case)
