"""Networks that write while they run are measured as if they did not, or refused; they come back bitwise as they were."""

import contextlib
import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

import isoflat
from isoflat.modules import private as keeping
from isoflat.modules.private import Copies, private, untouched

LOSS = nn.CrossEntropyLoss()
EUCLIDEAN = {"measure": "hessian_spectral_norm", "geometry": "euclidean"}


def dense(loss, parameters):
    """Norm of the Hessian, by two plain passes of autograd."""
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [
        torch.cat(
            [
                torch.zeros_like(p).reshape(-1) if part is None else part.reshape(-1)
                for p, part in zip(
                    parameters, torch.autograd.grad(g, parameters, retain_graph=True, allow_unused=True), strict=True
                )
            ]
        )
        for g in gradient
    ]
    found = torch.linalg.eigvalsh(torch.stack(rows).double())
    return float(found.abs().max())


class Attention(nn.Module):
    """Self-attention with a bias by relative position, as LeViT, EfficientFormer and TinyViT have it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.q, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.bias = nn.Parameter(torch.randn(5))
        self.register_buffer("places", torch.randint(0, 5, (3, 3)), persistent=False)
        self.cache = {}
        self.kept = None

    def table(self):
        return self.bias[self.places]

    def forward(self, x):
        z = self.q(x)
        return self.head(((z @ z.transpose(1, 2) + self.table()).softmax(-1) @ z).mean(1))


class InDict(Attention):
    def table(self):
        if self.training:
            return super().table()
        if str(self.bias.device) not in self.cache:
            self.cache[str(self.bias.device)] = super().table()
        return self.cache[str(self.bias.device)]


class InAttribute(Attention):
    def table(self):
        if self.kept is None:
            self.kept = super().table()
        return self.kept


class InNewAttribute(Attention):
    def table(self):
        if not hasattr(self, "made"):
            self.made = [super().table()]
        return self.made[0]


class Remembered(Attention):
    @functools.lru_cache  # noqa: B019 — the case is about it
    def table(self):
        return super().table()


class OnEval(Attention):
    """As the first LeViT: what evaluation needs is made when its mode is set."""

    def train(self, mode=True):
        super().train(mode)
        if not mode:
            self.made = self.bias[self.places]
        return self

    def table(self):
        return super().table() if self.training else self.made


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(17, 3, 4, generator=generator), torch.randint(0, 3, (17,), generator=generator)


def _batches(data, dtype, ragged):
    x, y = data[0].to(dtype), data[1]
    return [(x[:7], y[:7]), (x[7:], y[7:])] if ragged else [(x, y)]


def _truth(data):
    net = Attention().double().train()
    return dense(LOSS(net(data[0].double()), data[1]), list(net.parameters()))


def _snapshot(module):
    """Everything that a module holds: identities, and contents as bytes."""

    def told(value):
        if isinstance(value, torch.Tensor):
            return (id(value), value.detach().numpy().tobytes(), value.requires_grad, value._version)
        if isinstance(value, np.ndarray):
            return (id(value), value.tobytes())
        if isinstance(value, dict):
            return (id(value), [(key, told(part)) for key, part in value.items()])
        if isinstance(value, list | tuple):
            return (id(value), list(map(told, value)))
        return value if isinstance(value, int | float | str | None) else id(value)

    held = [{name: told(value) for name, value in vars(part).items()} for part in module.modules()]
    return held, [None if p.grad is None else told(p.grad) for p in module.parameters()]


@pytest.mark.parametrize(("dtype", "ragged"), [(torch.float32, True), (torch.float64, False)])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("kind", [InDict, InAttribute, InNewAttribute, Remembered, OnEval])
def test_caches_of_weights(kind, filled, dtype, ragged, data):
    net = kind().to(dtype).eval()
    if filled:
        net(data[0].to(dtype))
    before = _snapshot(net)
    found = isoflat.measure(net, _batches(data, dtype, ragged), LOSS, **EUCLIDEAN)
    assert found.value == pytest.approx(_truth(data), rel=1e-6 if dtype == torch.float32 else 1e-10)
    assert _snapshot(net) == before


def test_a_filled_cache_taken_for_a_constant_would_be_another_number(data):
    """The negative control: at a constant bias the Hessian's norm differs by far more than the tolerance above."""
    net = InDict().double().eval()
    net(data[0].double())
    net.cache = {key: table.detach() for key, table in net.cache.items()}
    others = [p for name, p in net.named_parameters() if name != "bias"]
    assert abs(dense(LOSS(net(data[0].double()), data[1]), others) / _truth(data) - 1) > 1e-4


@pytest.mark.parametrize("kind", [InDict, pytest.param(InAttribute, marks=pytest.mark.slow)])
def test_symmetries_of_a_network_with_filled_caches(kind, data):
    x = data[0].double()
    filled, fresh = kind().double().eval(), kind().double().eval()
    filled(x)
    before = _snapshot(filled)
    found = isoflat.symmetries(filled, x)
    assert found.hash == isoflat.symmetries(fresh, x).hash
    assert _snapshot(filled) == before
    other = isoflat.reparametrize(filled, found, seed=1, spread=1.0)
    assert torch.allclose(other(x), fresh(x), rtol=1e-9, atol=1e-9)
    one, two = (isoflat.measure(net, (x, data[1]), LOSS).value for net in (filled, other))
    assert one == pytest.approx(two, rel=1e-8)


def test_a_cache_that_other_weights_filled_is_refused(data):
    net = InDict().double().eval()
    net(data[0].double())
    with torch.no_grad():
        net.bias.mul_(2)
    with pytest.raises(isoflat.UnsupportedModel, match=r"'cache' holds what other weights gave"):
        isoflat.measure(net, (data[0].double(), data[1]), LOSS, **EUCLIDEAN)


class WithoutGradient(Attention):
    def table(self):
        if self.kept is None:
            self.kept = super().table().detach()
        return self.kept


def test_a_cache_without_gradient_is_refused(data):
    net = WithoutGradient().double().eval()
    net(data[0].double())
    with pytest.raises(isoflat.UnsupportedModel, match="'kept' is computed from the weights without a gradient"):
        isoflat.measure(net, (data[0].double(), data[1]), LOSS, **EUCLIDEAN)


class Keeping(Attention):
    """Counters, histories, hidden states and arrays that do not enter the loss, and constants that do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))
        self.count, self.history, self.nested = 0, [0.5], {"deep": [{"seen": torch.zeros(3)}]}
        self.constants = (torch.ones(4), {"shift": torch.full((4,), 0.5)})
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.tally = np.zeros(3)

    def forward(self, x):
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        self.count += 1
        self.history.append(float(x.sum()))
        self.nested["deep"][0]["seen"] += 1
        self.nested["new"] = x
        self.frozen += 1
        self.tally += 1
        self.last = super().forward(x * self.constants[0] + 0 * self.constants[1]["shift"])
        return self.last


@pytest.mark.parametrize(("dtype", "geometry"), [(torch.float32, "auto"), (torch.float64, "euclidean")])
def test_what_a_pass_keeps_beside_its_result_changes_nothing(dtype, geometry, data):
    x = data[0].to(dtype)
    net = Keeping().to(dtype).eval()
    before = _snapshot(net)
    found = isoflat.measure(net, (x, data[1]), LOSS, measure="hessian_spectral_norm", geometry=geometry)
    assert _snapshot(net) == before
    plain = Attention().to(dtype).eval()
    assert found.value == pytest.approx(
        isoflat.measure(plain, (x, data[1]), LOSS, measure="hessian_spectral_norm", geometry=geometry).value, rel=1e-6
    )


class Remembering(Attention):
    def forward(self, x):
        self.kept = (0 if self.kept is None else self.kept) + super().forward(x)
        return self.kept


class Stepping(Attention):
    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x):
        self.step += 1
        return super().forward(x) / self.step


class Drawing(Attention):
    def __init__(self):
        super().__init__()
        self.stream = torch.Generator().manual_seed(0)

    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn(x.shape, generator=self.stream, dtype=x.dtype))


@pytest.mark.parametrize("kind", [Remembering, Stepping, Drawing])
def test_a_loss_that_depends_on_earlier_calls_is_refused(kind, data):
    net = kind().double().eval()
    before, stream = _snapshot(net), getattr(net, "stream", torch.Generator()).get_state()
    with pytest.raises(isoflat.NondeterministicRisk, match="keeps from one call for the next"):
        isoflat.measure(net, (data[0].double(), data[1]), LOSS, **EUCLIDEAN)
    assert _snapshot(net) == before
    assert torch.equal(getattr(net, "stream", torch.Generator()).get_state(), stream)


class Clamped(Attention):
    def forward(self, x):
        self.q.weight.data.clamp_(min=-0.1)
        return super().forward(x)


class ClampedInPlace(Attention):
    def forward(self, x):
        with torch.no_grad():
            self.q.weight.clamp_(min=-0.1)
        return super().forward(x)


class Pointed(Attention):
    def forward(self, x):
        self.q.weight.data = self.q.weight.data.clamp(min=-0.1)
        return super().forward(x)


class Replaced(Attention):
    def forward(self, x):
        self.q.weight = nn.Parameter(self.q.weight.detach().clamp(min=-0.1))
        return super().forward(x)


class Renormalised(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.head = nn.Embedding(12, 4, max_norm=1.0), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.emb((x.abs() * 5).long().clamp(max=11)[..., 0]).mean(1))


@pytest.mark.parametrize(("dtype", "inside"), [(torch.float32, False), (torch.float64, True)])
@pytest.mark.parametrize("kind", [Clamped, ClampedInPlace, Pointed, Replaced, Renormalised])
def test_weights_that_the_forward_pass_changes_are_refused(kind, dtype, inside, data):
    net = kind().to(dtype).eval()
    if inside:
        net(data[0].to(dtype))
    before = _snapshot(net)
    for run in (
        lambda: isoflat.measure(net, (data[0].to(dtype), data[1]), LOSS, check="warn", **EUCLIDEAN),
        lambda: isoflat.symmetries(net, data[0].to(dtype)),
    ):
        with pytest.raises(isoflat.UnsupportedModel, match=r"the forward pass writes into (q|emb)\.weight"):
            run()
        assert _snapshot(net) == before


def test_without_copies_the_weights_would_change(data):
    """The negative control of the test above."""
    for kind in (Clamped, Renormalised):
        net = kind()
        before = copy.deepcopy(net.state_dict())
        net(data[0])
        assert any(not torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


class Recomputing(torch.autograd.Function):
    """Forgets its graph, and makes it anew on the way back, with the module's own tensors."""

    @staticmethod
    def forward(ctx, module, x):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, cotangent):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.module(x), cotangent)
        return None, x.grad


class Reentrant(Attention):
    def forward(self, x):
        return super().forward(Recomputing.apply(self.q, x.requires_grad_()))


@pytest.mark.parametrize("had", [False, True])
def test_gradients_stay_the_users(had, data):
    net = Reentrant().eval()
    if had:
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
    before = _snapshot(net)
    with contextlib.suppress(isoflat.IsoflatError):
        isoflat.measure(net, (data[0], data[1]), LOSS, check="warn", **EUCLIDEAN)
    assert _snapshot(net) == before


class Interrupting(Keeping):
    left = 10**9

    def forward(self, x):
        Interrupting.left -= 1
        found = super().forward(x)
        if Interrupting.left == 0:
            raise KeyboardInterrupt
        return found


@pytest.mark.parametrize("calls", [1, 3, 8])
def test_interrupts_leave_no_trace(calls, data, monkeypatch):
    net = Interrupting().eval()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before = _snapshot(net)
    monkeypatch.setattr(Interrupting, "left", calls)
    with pytest.raises(KeyboardInterrupt):
        isoflat.measure(net, (data[0], data[1]), LOSS, **EUCLIDEAN)
    assert _snapshot(net) == before


def test_batch_normalisation_in_training_is_not_written_by_finding_symmetries():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 3))
    x = torch.randn(40, 8) + 3
    before, stream = _snapshot(net), torch.get_rng_state()
    isoflat.symmetries(net, x, loss=LOSS)
    assert _snapshot(net) == before
    assert net.training
    assert torch.equal(stream, torch.get_rng_state())


class InTuple(Attention):
    """Weights that are read from where they were kept."""

    def __init__(self):
        super().__init__()
        self.kept = (self.bias, [self.q.weight, self.q.bias])

    def forward(self, x):
        bias, (weight, shift) = self.kept
        z = nn.functional.linear(x, weight, shift)
        return self.head(((z @ z.transpose(1, 2) + bias[self.places]).softmax(-1) @ z).mean(1))


def test_weights_read_from_a_tuple_are_those_of_the_state(data):
    found = isoflat.measure(InTuple().double().eval(), (data[0].double(), data[1]), LOSS, **EUCLIDEAN)
    assert found.value == pytest.approx(_truth(data), rel=1e-10)


def test_copies_share_memory_as_their_originals_do():
    whole = torch.arange(6.0)
    module = nn.Module()
    module.whole, module.view, module.nest = whole, whole[1:5], [(whole[:4],)]
    with private(module, Copies(lambda tensor: True)):
        module.whole.zero_()
        assert float(module.view.sum()) == float(module.nest[0][0].sum()) == 0
    assert float(whole.sum()) == 15
    assert module.whole is whole


def test_everything_comes_back_with_its_identity_and_order():
    module = nn.Linear(2, 2)
    module.first, module.second = {"a": [1, {2}], "b": (3,)}, [np.ones(2)]
    module.weight.grad = torch.ones(2, 2)
    before = _snapshot(module)
    with untouched(module):
        module.weight.grad = torch.zeros(2, 2)
        module.first["a"][1].add(4)
        module.first["a"].append(5)
        del module.first["b"]
        module.second[0][:] = 7
        module.second = None
        module.register_buffer("new", torch.ones(1))
        module.extra = nn.Linear(1, 1)
        module.eval()
    assert _snapshot(module) == before
    assert module.training and module.first["a"][1] == {2} and not hasattr(module, "extra")


def test_without_restoring_the_tests_above_fail(data, monkeypatch):
    """The negative control: nothing put back, and the module is not as it was."""
    monkeypatch.setattr(keeping._Held, "restore", lambda self: None)
    net = Keeping().eval()
    before = _snapshot(net)
    with private(net):
        net(data[0])
    assert _snapshot(net) != before
