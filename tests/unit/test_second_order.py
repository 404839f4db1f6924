"""Second-order rules agree with torch's own derivatives, and stay away from what they do not cover."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.autograd import forward_ad, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

import isoflat.risk.routes.reverse as reverse
import isoflat.risk.second_order.convolution as convolution_rule
import isoflat.risk.second_order.relu as relu_rule
from cases.networks import cnn, mlp
from isoflat.risk.batches import as_batches
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.losses import BatchLoss, as_loss
from isoflat.risk.network import Network
from isoflat.risk.second_order import Trace

CONVOLUTIONS = [
    # inputs, weight, stride, padding, dilation, groups
    ((2, 1, 5, 5), (3, 1, 3, 3), 1, 0, 1, 1),
    ((2, 3, 5, 4), (2, 3, 2, 3), (2, 1), (1, 2), 1, 1),
    ((2, 4, 5, 5), (4, 2, 2, 2), 1, 1, 2, 2),
    ((1, 3, 4, 4), (3, 1, 3, 3), 2, "valid", 1, 3),
]
POOLINGS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": (3, 2), "stride": 1, "padding": 1},
    {"kernel_size": 2, "stride": 2, "dilation": 2, "ceil_mode": True},
]


class Various(nn.Module):
    """Everything that has a rule, in many forms, beside things that have none."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, bias=False)
        self.dilated = nn.Conv2d(4, 3, 2, dilation=2)
        self.same = nn.Conv2d(3, 3, 3, padding="same")
        self.norm = nn.LayerNorm(3)
        self.mix = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        positive = F.relu(self.grouped(x))
        x = positive + F.max_pool2d(positive, 3, stride=1, padding=1)
        x = F.max_pool2d(torch.relu(self.dilated(x)), 2, stride=1)
        x = torch.tanh(self.same(x)).relu()
        x = self.mix(self.norm(x.flatten(2).transpose(1, 2))).relu_()
        return self.head(x.reshape(len(x), -1)[:, :12])


def various(seed=0):
    torch.manual_seed(seed)
    return Various().double(), (torch.randn(7, 1, 9, 9, dtype=torch.float64), torch.randint(3, (7,)))


@contextmanager
def stock():
    yield Trace()


def products(net, data, monkeypatch, rules, params=None, loss=None):
    """Products with two vectors, twice: through graphs made with our rules, or by torch alone."""
    with monkeypatch.context() as patch:
        if not rules:
            patch.setattr(reverse, "Trace", stock)
        risk = EmpiricalRisk(Network(net), as_loss(loss or nn.CrossEntropyLoss()), as_batches(data, 4))
        state = risk.network.state(params)
        kept = reverse.Recomputed(risk, state).keep()
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(state.space.size, 2, generator=generator, dtype=torch.float64).to(state.dtype)
    first, again = kept.products(vectors), kept.products(vectors)
    torch.testing.assert_close(first, again, rtol=1e-13, atol=0)
    return again


def apart(a, b):
    return float((a - b).norm() / b.norm())


def ruled(operation, *args, **kwargs):
    """The operation under the rules, and the names of those that applied."""
    with Trace() as trace:
        value = operation(*args, **kwargs)
    return value, trace.used


def leaf(*shape, dtype=torch.float64):
    """Distinct values, so that maxima are far apart."""
    count = torch.Size(shape).numel()
    return ((torch.randperm(count).to(dtype).view(shape) + 0.5) / count - 0.4).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "weight", "stride", "padding", "dilation", "groups"), CONVOLUTIONS)
def test_convolution(inputs, weight, stride, padding, dilation, groups, bias):
    torch.manual_seed(0)
    factors = [leaf(*inputs), leaf(*weight), *([leaf(weight[0])] if bias else [])]

    def work(x, w, b=None):
        return ruled(F.conv2d, x, w, b, stride, padding, dilation, groups)[0]

    assert gradgradcheck(work, factors, atol=1e-7)
    for frozen in factors:
        frozen.requires_grad_(False)
        assert gradgradcheck(work, factors, atol=1e-7)
        frozen.requires_grad_(True)


@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("window", POOLINGS)
def test_pooling(window, rectified):
    torch.manual_seed(0)

    def work(x):
        return ruled(lambda: F.max_pool2d(F.relu(x) if rectified else x.exp(), **window))[0]

    x = leaf(2, 2, 5, 6)
    plain = F.max_pool2d(F.relu(x) if rectified else x.exp(), **window)
    torch.testing.assert_close(work(x), plain, rtol=0, atol=0)
    assert gradgradcheck(work, [x])


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 1, 3, 4)])
def test_linear(shape):
    torch.manual_seed(0)
    factors = [leaf(*shape), leaf(2, 4), leaf(2)]

    def work(x, w, b=None):
        return ruled(F.linear, x, w, b)[0]

    assert gradgradcheck(work, factors) and gradgradcheck(work, factors[:2])
    for frozen in factors:
        frozen.requires_grad_(False)
        assert gradgradcheck(work, factors)
        frozen.requires_grad_(True)


@pytest.mark.parametrize("chosen", [None, "first.*", "*.bias", "grouped.weight", "head.*", ["dilated.bias", "mix.*"]])
def test_products_agree_with_torch(chosen, monkeypatch):
    net, data = various()
    ours, plain = (products(net, data, monkeypatch, rules, chosen) for rules in (True, False))
    assert apart(ours, plain) < 1e-12


def test_a_few_rows_at_a_time(monkeypatch):
    net, data = various()
    plain = products(net, data, monkeypatch, False)
    monkeypatch.setattr(convolution_rule, "BITE", 100)
    assert apart(products(net, data, monkeypatch, True), plain) < 1e-12


@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
def test_convolution_and_pooling_in_one(frozen):
    torch.manual_seed(0)
    factors = [leaf(3, 2, 6, 6), leaf(2, 2, 3, 3), leaf(2)]
    if frozen is not None:
        factors[frozen].requires_grad_(False)

    def work(x, w, b):
        return ruled(lambda: F.max_pool2d(F.relu(F.conv2d(x, w, b)), 2))[0]

    assert gradgradcheck(work, factors)


@pytest.mark.parametrize("case", [cnn(3, True, 0), cnn(2, False, 1), mlp((5, 7, 6, 3), True, 2)])
def test_products_agree_with_the_dense_hessian(case, monkeypatch):
    hessian = case.hessian()
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(len(hessian), 2, generator=generator, dtype=torch.float64)
    assert apart(products(case.net, case.data, monkeypatch, True), hessian @ vectors) < 1e-12


def test_single_precision(monkeypatch):
    net, data = various()
    exact = products(net, data, monkeypatch, True)
    assert apart(products(net.float(), (data[0].float(), data[1]), monkeypatch, True), exact) < 2e-6


def test_a_derivative_inside_the_loss(monkeypatch):
    """Products are then third derivatives."""
    net, data = various()

    def penalised(model, batch):
        inputs = batch[0].clone().requires_grad_()
        total = F.cross_entropy(model(inputs), batch[1], reduction="sum")
        (slope,) = torch.autograd.grad(total, inputs, create_graph=True)
        return total + slope.square().sum(), len(inputs)

    ours, plain = (products(net, data, monkeypatch, rules, loss=BatchLoss(penalised)) for rules in (True, False))
    assert apart(ours, plain) < 1e-11
    assert apart(ours, products(net, data, monkeypatch, True)) > 1e-3


def test_ties():
    """Of equal entries torch takes the first, and nothing where a ReLU is zero: so do we."""
    inputs = torch.tensor([0.0, -1.0, 1.0, 1.0, 2.0, 2.0]).repeat(6, 1).view(1, 1, 6, 6).double()
    weight = torch.linspace(1, 2, 9, dtype=torch.float64)
    found = []
    for manager in (Trace, stock):
        x = inputs.clone().requires_grad_()
        with manager():
            y = F.max_pool2d(F.relu(x), 2)
        (slope,) = torch.autograd.grad((y.flatten() ** 3 * weight).sum(), x, create_graph=True)
        found.append((slope, *torch.autograd.grad(slope, x, torch.ones_like(x))))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_relu_in_place():
    for operation in (lambda x: F.relu(x, inplace=True), torch.relu_, torch.Tensor.relu_):
        x = leaf(3, 4)
        y = x * 2
        z, used = ruled(operation, y)
        assert z is y and used == {"relu"} and bool((y >= 0).all())
        (slope,) = torch.autograd.grad((z**3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), x)
        torch.testing.assert_close(second, 48 * x.detach().clamp(min=0))
    with pytest.raises(RuntimeError, match="leaf"):
        ruled(torch.relu_, leaf(2))
    base = leaf(4) * 1
    part = base[:2]
    assert not ruled(torch.relu_, part)[1] and bool((base[:2] >= 0).all())


def test_what_was_written_to_since_is_not_taken_for_a_relu():
    x = leaf(1, 1, 4, 4)

    def work():
        y = F.relu(x * 1)
        y.mul_(-1)
        return F.max_pool2d(y, 2)

    torch.testing.assert_close(ruled(work)[0], work(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_strides_stay(dtype, layout):
    x = leaf(2, 4, 6, 6, dtype=dtype).detach().contiguous(memory_format=layout).requires_grad_()
    w, matrix = leaf(3, 4, 3, 3, dtype=dtype), leaf(2, 6, dtype=dtype)
    for operation in (lambda: F.conv2d(x, w), lambda: F.max_pool2d(F.relu(x), 2), lambda: F.linear(x, matrix)):
        ours, plain = ruled(operation)[0], operation()
        assert ours.stride() == plain.stride()
        torch.testing.assert_close(ours, plain)


def test_what_no_rule_covers_is_left_to_torch():
    x, w = leaf(1, 2, 4, 4), leaf(2, 2, 3, 3)
    calls = [
        lambda: F.conv2d(x, w, padding="same"),
        lambda: F.conv2d(x[0], w),
        lambda: F.conv2d(x.detach(), w.detach()),
        lambda: F.max_pool2d(x, 2, return_indices=True)[1],
        lambda: F.linear(x[0, 0, 0], x[0, 0].detach()),
        lambda: torch.vmap(F.relu)(x),
        lambda: torch.func.grad(lambda y: F.relu(y).sum())(x),
        lambda: F.relu(nn.Buffer(x.detach())),
    ]
    for call in calls:
        ours, used = ruled(call)
        assert not used
        torch.testing.assert_close(ours, call(), rtol=0, atol=0)
    with torch.no_grad():
        assert not ruled(F.relu, x)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not ruled(F.conv2d, x.float(), w.float())[1]
    with forward_ad.dual_level():
        dual, used = ruled(lambda: F.relu(forward_ad.make_dual(x, torch.ones_like(x))))
        assert not used and forward_ad.unpack_dual(dual).tangent is not None


def test_a_wrong_rule_is_noticed(monkeypatch):
    net, data = various()
    plain = products(net, data, monkeypatch, False)
    backward = relu_rule._Masked.backward
    monkeypatch.setattr(relu_rule._Masked, "backward", staticmethod(lambda ctx, g: backward(ctx, 1.01 * g)))
    assert apart(products(net, data, monkeypatch, True), plain) > 1e-4
    with pytest.raises(GradcheckError):
        gradgradcheck(lambda x: ruled(lambda: F.relu(x) ** 2)[0], [leaf(2, 2, 5, 6)])


def test_what_was_used_is_told():
    net, data = various()
    assert ruled(net, data[0])[1] == {"convolution", "linear", "pooling", "relu"}
