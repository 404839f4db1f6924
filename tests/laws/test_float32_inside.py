"""Networks that make or hold float32 tensors follow passes in float64; those that cannot are checked in float32, and say so."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import isoflat
from isoflat.core.precision import unrounded

LOSS = nn.CrossEntropyLoss()
EUCLIDEAN = {"measure": "hessian_spectral_norm", "geometry": "euclidean"}
MIX = torch.randn(6, 6, generator=torch.Generator().manual_seed(5))
WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


def dense(loss, parameters):
    """Norm of the Hessian, by two plain passes of autograd in float32."""
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in gradient]
    matrix = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).double()
    found = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    return float(found.abs().max())


class Base(nn.Module):
    """Two layers, and constants where no conversion reaches them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)
        self.mix, self.shifts, self.pair = torch.randn(6, 6), [torch.randn(5)], (torch.randn(5), "x")

    def before(self, x):
        return x

    def between(self, z):
        return z

    def forward(self, x):
        return self.b(torch.tanh(self.between(self.a(self.before(x)))))


class Factories(Base):
    def between(self, z):
        kept = torch.zeros(len(z), 5)
        kept[:, :] = z
        row = torch.arange(5.0) / 5 + torch.full((5,), 0.5) + torch.linspace(0, 1, 5) + torch.tensor([0.1] * 5)
        return kept @ torch.eye(5) + row * torch.ones(5) + torch.Tensor([0.2] * 5) + torch.arange(5) / 7


class Explicit(Base):
    def between(self, z):
        return z @ torch.eye(5, dtype=torch.float32) + z.float().type(torch.FloatTensor) * torch.FloatTensor([0.5])


class Attributes(Base):
    def before(self, x):
        return x @ self.mix

    def between(self, z):
        return F.linear(z, torch.eye(5), self.shifts[0]) + self.pair[0]


class Closure(Base):
    def before(self, x):
        return torch.cat([x[:, :3], (x @ MIX)[:, 3:]], 1)


class Arrays(Base):
    def before(self, x):
        return x @ torch.from_numpy(MIX.numpy())


class Seeded(Base):
    def between(self, z):
        stream = torch.Generator().manual_seed(0)
        noise = torch.randn(5, generator=stream) + torch.empty(5).normal_(generator=stream)
        return z + noise + torch.rand(5, generator=stream, dtype=z.dtype)


class Recurrent(Base):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(2, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        state = torch.zeros(1, len(x), 4), torch.zeros(1, len(x), 4)
        return self.head(self.inner(x.view(len(x), 3, 2), state)[0][:, -1])


class FakeQuantised(Base):
    def __init__(self):
        super().__init__()
        self.fake = torch.ao.quantization.FakeQuantize()
        self.fake(torch.randn(100))
        self.fake.disable_observer()

    def before(self, x):
        return self.fake(x)


class SingleOnly(torch.autograd.Function):
    """A kernel that is there for float32 only."""

    @staticmethod
    def forward(ctx, x):
        if x.dtype != torch.float32:
            raise RuntimeError("expected scalar type Float but found Double")
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent * ctx.saved_tensors[0].cos()


class Kernel(Base):
    def between(self, z):
        return SingleOnly.apply(z)


class Cut(Base):
    """Part of the network is cut out of the gradient, and the rest runs in float32 only."""

    def between(self, z):
        return SingleOnly.apply(z) * z.detach().exp()


FOLLOWING = [Factories, Explicit, Attributes, Closure, Arrays, Seeded, Recurrent, FakeQuantised]


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 6, generator=generator), torch.randint(0, 3, (20,), generator=generator)


def _truth(net, data, loss=LOSS):
    output = net(data[0])
    return dense(loss(output, data[1]), [p for p in net.parameters() if p.requires_grad and _used(output, p)])


def _used(output, parameter):
    return torch.autograd.grad(output.sum(), parameter, retain_graph=True, allow_unused=True)[0] is not None


@pytest.mark.parametrize("kind", FOLLOWING)
def test_networks_that_make_or_hold_float32(kind, data):
    net = kind().eval()
    truth, ragged = _truth(net, data), [(data[0][:13], data[1][:13]), (data[0][13:], data[1][13:])]
    found = isoflat.measure(net, ragged, LOSS, **EUCLIDEAN)
    assert found.value == pytest.approx(truth, rel=2e-6)
    assert found.lower <= truth * (1 + 2e-6)
    assert found.upper >= truth * (1 - 2e-6)
    assert found.converged
    assert not any("float32" in note for note in found.notes)
    wide = isoflat.measure(net, data, LOSS, dtype="float64", **EUCLIDEAN)
    assert wide.value == pytest.approx(truth, rel=2e-6)
    assert wide.value == pytest.approx(found.value, rel=1e-9)


@pytest.mark.parametrize("settings", [{"check": "skip"}, {"certify": False}, {"check": "skip", "certify": False}])
def test_every_way_of_measuring_one(settings, data):
    for kind in (Recurrent, Attributes, Kernel):
        net = kind().eval()
        assert isoflat.measure(net, data, LOSS, **settings, **EUCLIDEAN).value == pytest.approx(
            _truth(net, data), rel=1e-5
        )


@pytest.mark.parametrize("kind", [Factories, Attributes])
def test_symmetries_are_proved(kind, data):
    found = isoflat.measure(kind().eval(), data, LOSS)
    assert found.converged


@pytest.mark.parametrize("geometry", ["euclidean", "auto"])
def test_a_kernel_for_float32_only(geometry, data):
    net = Kernel().eval()
    found = isoflat.measure(net, data, LOSS, measure="hessian_spectral_norm", geometry=geometry)
    assert any("the last product are in float32" in note and "found Double" in note for note in found.notes)
    assert found.converged
    if geometry == "euclidean":
        truth = _truth(net, data)
        assert found.value == pytest.approx(truth, rel=1e-5)
        assert found.lower <= truth <= found.upper * (1 + 1e-5)
    with pytest.raises(isoflat.UnsupportedModel, match="does not run in float64"):
        isoflat.measure(net, data, LOSS, dtype="float64", **EUCLIDEAN)


def test_the_check_in_float32_still_bites(data):
    """The negative control: what is cut out of the gradient is noticed in float32 as well."""
    with pytest.raises(isoflat.UnsupportedModel, match="cut out"):
        isoflat.measure(Cut().eval(), data, LOSS, **EUCLIDEAN)


def test_without_following_it_would_not_run(data):
    """The negative control: plain float64 copies of these networks raise."""
    for kind in (Attributes, Closure, Arrays, Recurrent, Kernel):
        with pytest.raises(RuntimeError):
            kind().double()(data[0].double())


class Weighing(nn.Module):
    """A loss that holds tensors as buffers, which its own conversion alone would reach."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", WEIGHTS)

    def forward(self, output, target):
        return (output @ self.weight).square().mean() + F.cross_entropy(output, target)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", [Weighing(), lambda z, y: (z @ WEIGHTS).square().mean()])
def test_losses_that_hold_float32(loss, dtype, data):
    net = Base().eval()
    found = isoflat.measure(net, data, loss, dtype=dtype, **EUCLIDEAN)
    assert found.value == pytest.approx(_truth(net, data, loss), rel=2e-6)


def test_the_default_type_is_the_users_again(data):
    before = torch.get_default_dtype()
    isoflat.measure(Factories().eval(), data, LOSS, **EUCLIDEAN)
    with pytest.raises(KeyError), unrounded(torch.float64, own=torch.float32):
        raise KeyError
    assert torch.get_default_dtype() == before == torch.float32


# Losses that differentiate -------------------------------------------------------------------------------------------


def _oscillator(net, t):
    """The residual of u″ + u = 0 with u(0) = 1, by derivatives of the network in its input."""
    t = t.clone().requires_grad_(True)
    u = net(t)
    (first,) = torch.autograd.grad(u.sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), t, create_graph=True)
    return (second + u).square().mean() + (net(torch.zeros(1, 1)) - 1).square().mean()


def _functional(net, t):
    """The same by torch.func."""
    u = torch.func.vmap(lambda s: net(s[None]).squeeze())(t)
    slope = torch.func.grad(lambda s: net(s[None]).squeeze())
    second = torch.func.vmap(torch.func.grad(lambda s: slope(s)[0]))(t)[:, 0]
    return (second + u).square().mean() + (net(torch.zeros(1, 1)) - 1).square().mean()


def _inner_step(net, t):
    """The loss after a step of gradient descent, as in meta-learning."""
    parameters = dict(net.named_parameters())
    loss = (net(t) - t.sin()).square().mean()
    slopes = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    moved = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), slopes, strict=True)}
    return (torch.func.functional_call(net, moved, (t,)) - t.cos()).square().mean()


class Force(nn.Module):
    """A force field: the negative gradient of an energy, in the forward pass."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        x = x.requires_grad_(True)
        return -torch.autograd.grad(self.inner(x).sum(), x, create_graph=True)[0]


@pytest.fixture
def smooth():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))


@pytest.mark.parametrize("check", ["refuse", "skip"])
@pytest.mark.parametrize("loss", [_oscillator, _functional, _inner_step])
def test_losses_that_differentiate(loss, check, smooth):
    t = torch.linspace(0, 3, 12)[:, None]
    truth = dense(loss(smooth, t), list(smooth.parameters()))
    batch = isoflat.BatchLoss(lambda net, t: (loss(net, t) * len(t), len(t)))
    with torch.no_grad():  # the caller's own mode does not matter
        found = isoflat.measure(smooth, [t], batch, check=check, **EUCLIDEAN)
    assert found.value == pytest.approx(truth, rel=5e-5)
    assert all(p.grad is None for p in smooth.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forces_of_a_network(dtype, smooth):
    net = Force(smooth).to(dtype)
    x = torch.linspace(0, 3, 12, dtype=dtype)[:, None]
    truth = dense(
        (net(x.clone()) - x.cos()).square().mean(), [p for n, p in net.named_parameters() if n != "inner.4.bias"]
    )
    found = isoflat.measure(net, (x, x.cos()), nn.MSELoss(), **EUCLIDEAN)
    assert found.value == pytest.approx(truth, rel=1e-5)
