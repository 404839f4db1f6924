"""Networks as people have them: each is measured as its dense Hessian says, comes back as it was, or is refused in words."""

import copy
import math
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import isoflat
from cases.networks import cnn, mlp
from isoflat.risk import plan as planning
from isoflat.risk.batches import as_batches
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.linearise import ProductCheck, choose, linearise
from isoflat.risk.losses import as_loss
from isoflat.risk.network import Network
from isoflat.risk.plan import plan
from isoflat.risk.routes.differences import Differences
from isoflat.risk.routes.forward import Forward
from isoflat.risk.routes.reverse import GradientGraph, Recomputed

LOSS = nn.CrossEntropyLoss()


class Sub(nn.Module):
    """A network from a function of its parts and the input."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def _attention(net, x):
    q, k, v = net.inner(x).chunk(3, -1)
    return net.head(nn.functional.scaled_dot_product_attention(q, k, v).mean(1))


def _recurrent(net, x):
    return net.head(net.inner(x)[0][:, -1])


def _checkpointed(reentrant):
    return lambda net, x: net.head(checkpoint(lambda y: net.inner(y).tanh(), x, use_reentrant=reentrant).mean(1))


def _compiled():
    net = Sub(lambda net, x: net.head(net.inner(x).tanh().mean(1)), inner=nn.Linear(4, 5), head=nn.Linear(5, 3))
    return torch.compile(net.double().eval(), backend="aot_eager")


NETS = {
    "fused attention": lambda: Sub(_attention, inner=nn.Linear(4, 12), head=nn.Linear(4, 3)),
    "LSTM": lambda: Sub(_recurrent, inner=nn.LSTM(4, 4, batch_first=True), head=nn.Linear(4, 3)),
    "GRU": lambda: Sub(_recurrent, inner=nn.GRU(4, 4, batch_first=True), head=nn.Linear(4, 3)),
    "checkpointed": lambda: Sub(_checkpointed(False), inner=nn.Linear(4, 5), head=nn.Linear(5, 3)),
    "checkpointed, reentrant": lambda: Sub(_checkpointed(True), inner=nn.Linear(4, 5), head=nn.Linear(5, 3)),
    "in place": lambda: Sub(
        lambda net, x: net.head(nn.functional.relu_(net.inner(x).mul_(2.0)).mean(1)),
        inner=nn.Linear(4, 5),
        head=nn.Linear(5, 3),
    ),
    "unused": lambda: Sub(lambda net, x: net.head(x.mean(1)), head=nn.Linear(4, 3), spare=nn.Linear(4, 2)),
    "compiled": _compiled,
}


def _net(name):
    torch.manual_seed(0)
    return NETS[name]().double().eval()


def _data(rows=7):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(rows, 5, 4, generator=generator, dtype=torch.float64),
        torch.randint(3, (rows,), generator=generator),
    )


def _dense(net, data):
    """By forward over reverse where that works, else column by column from gradients of gradients."""
    plain = getattr(net, "_orig_mod", net)
    names = [name for name, p in plain.named_parameters() if p.requires_grad]
    leaves = [plain.get_parameter(name).detach().requires_grad_(True) for name in names]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run = plain.run
        if "reentrant" in str(run.__code__.co_freevars):
            plain = copy.copy(plain)
            plain.run = _checkpointed(False)
        loss = LOSS(torch.func.functional_call(plain, dict(zip(names, leaves, strict=True)), (data[0],)), data[1])
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        flat = torch.cat(
            [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(leaves, gradients, strict=True)]
        )
        rows = []
        for entry in flat:
            row = [None] * len(leaves)
            if entry.requires_grad:
                row = torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(leaves, row, strict=True)]
                )
            )
    return torch.stack(rows)


@pytest.mark.parametrize("name", NETS)
def test_the_number_is_that_of_the_dense_hessian(name):
    """In batches of unequal size; nothing is left behind on the model."""
    net, data = _net(name), _data()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    x, y = data
    estimate = isoflat.measure(net, [(x[:4], y[:4]), (x[4:], y[4:])], LOSS, measure="hessian_spectral_norm", rtol=1e-9)
    truth = torch.linalg.matrix_norm(_dense(net, data), 2)
    assert estimate.value == pytest.approx(float(truth), rel=1e-10)
    assert not net.training
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


class Output(NamedTuple):
    """As models of Hugging Face return it."""

    loss: torch.Tensor
    logits: torch.Tensor


def test_batches_and_losses_of_every_form_agree():
    case = mlp((4, 5, 3), bias=True, seed=2)
    x, y = case.data

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = case.net

        def forward(self, inputs, labels):
            scores = self.net(inputs)
            return Output(LOSS(scores, labels), scores)

    summed = isoflat.BatchLoss(
        lambda model, batch: (
            nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"),
            len(batch["y"]),
        )
    )
    options = {"geometry": "euclidean", "measure": "hessian_spectral_norm", "rtol": 1e-9}
    wanted = isoflat.measure(case.net, case.data, LOSS, **options).value
    dicts = [{"x": x[:5], "y": y[:5]}, {"x": x[5:], "y": y[5:]}]
    assert isoflat.measure(case.net, dicts, summed, **options).value == pytest.approx(wanted, rel=1e-12)
    own = [{"inputs": x[:5], "labels": y[:5]}, {"inputs": x[5:], "labels": y[5:]}]
    assert isoflat.measure(Own(), own, **options).value == pytest.approx(wanted, rel=1e-12)


# What products are made of --------------------------------------------------------------------------------------------


class TanhSlope(torch.autograd.Function):
    """`g (1 − y²)`, with a forward derivative only."""

    @staticmethod
    def forward(g, y):
        return g * (1 - y * y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, along, slope):
        g, y = ctx.saved_tensors
        return along * (1 - y * y) - 2 * g * y * slope

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("the slope has no backward")


class OnceBackward(torch.autograd.Function):
    """tanh with a forward derivative, whose backward has no backward."""

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, gradient):
        return TanhSlope.apply(gradient, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tangent):
        (y,) = ctx.saved_tensors
        return tangent * (1 - y * y)


class OnceOnly(torch.autograd.Function):
    """tanh that can be differentiated backward, once."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class WrongBackward(torch.autograd.Function):
    """tanh with a backward that is not its derivative."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 3)


def _hidden(activation):
    torch.manual_seed(0)
    parts = {"inner": nn.Linear(4, 5), "head": nn.Linear(5, 3)}
    return Sub(lambda net, x: net.head(activation(net.inner(x)).mean(1)), **parts).double().eval()


def _risk(net, data, rows=4):
    return EmpiricalRisk(Network(net), as_loss(LOSS), as_batches(data, rows=rows)), Network(net).state()


OPTIONS = {"geometry": "euclidean", "measure": "hessian_spectral_norm"}


def test_forward_over_reverse_where_the_backward_has_no_backward():
    risk, state = _risk(_hidden(OnceBackward.apply), _data())
    assert choose(risk, state).route is Forward
    plain = _hidden(torch.tanh)
    estimate = isoflat.measure(_hidden(OnceBackward.apply), _data(), LOSS, rtol=1e-9, **OPTIONS)
    assert estimate.value == pytest.approx(isoflat.measure(plain, _data(), LOSS, rtol=1e-9, **OPTIONS).value, rel=1e-12)
    assert any("forward over reverse, because others fail (reverse over reverse: " in note for note in estimate.notes)


def test_differences_of_gradients_are_the_last_resort_and_certify_nothing():
    risk, state = _risk(_hidden(OnceOnly.apply), _data())
    assert choose(risk, state).route is Differences
    wanted = isoflat.measure(_hidden(torch.tanh), _data(), LOSS, rtol=1e-9, **OPTIONS).value
    estimate = isoflat.measure(_hidden(OnceOnly.apply), _data(), LOSS, rtol=1e-4, **OPTIONS)
    assert estimate.value == pytest.approx(wanted, rel=1e-6)
    assert estimate.kind is isoflat.Kind.UNCERTIFIED
    (note,) = (note for note in estimate.notes if "differences of gradients are off by about" in note)
    assert float(note.split("about ")[1].split(" ")[0]) < 1e-6


CUT_OUT = {
    "stop-gradient": lambda x: x * x.detach().sigmoid(),
    "straight-through": lambda x: x + (torch.round(4 * x) / 4 - x).detach(),
    "backward of its own": WrongBackward.apply,
}
"""With gradients that are not the loss's."""


def _sure(activation):
    """A network that has every class right, and a loss of about 1e-11: slopes are differences of numbers next to 1."""
    net = _hidden(activation)
    inputs, _ = _data()
    with torch.no_grad():
        net.head.weight.mul_(2e3)
        scores = net(inputs)
        apart = scores.sort().values.diff()[:, -1].min()
        net.head.weight.mul_(25 / apart)
        net.head.bias.zero_()
        scores = net(inputs)
    return net, (inputs, scores.argmax(1))


def test_a_network_that_is_sure_of_its_classes_is_not_taken_for_a_broken_one():
    net, data = _sure(torch.tanh)
    assert LOSS(net(data[0]), data[1]).item() < 1e-9
    risk, state = _risk(net, data)
    assert choose(risk, state).notes == ()
    # Cross-entropy of scores has no cancellation left; the loss of log-probabilities still has.
    logs = nn.Sequential(net, nn.LogSoftmax(1))
    risk, state = replace(risk, network=Network(logs), loss=as_loss(nn.NLLLoss())), Network(logs).state()
    assert choose(risk, state).notes == ()
    with mock.patch("isoflat.risk.check.SURE", math.inf), pytest.raises(isoflat.UnsupportedModel):
        choose(risk, state)  # as it was: differences of rounding errors


@pytest.mark.parametrize("name", CUT_OUT)
def test_a_broken_network_that_is_sure_of_its_classes_is_refused(name):
    with pytest.raises(isoflat.UnsupportedModel, match="from central differences of gradients"):
        choose(*_risk(*_sure(CUT_OUT[name])))


@pytest.mark.parametrize("name", CUT_OUT)
def test_products_of_another_function_are_refused(name):
    net = _hidden(CUT_OUT[name])
    with pytest.raises(isoflat.UnsupportedModel, match=r"differ by .* from central differences of gradients"):
        isoflat.measure(net, _data(), LOSS, **OPTIONS)
    estimate = isoflat.measure(net, _data(), LOSS, check="warn", **OPTIONS)
    assert any("from central differences of gradients" in note for note in estimate.notes)
    assert not any(
        "central differences" in n for n in isoflat.measure(net, _data(), LOSS, check="skip", **OPTIONS).notes
    )


def test_a_detach_in_a_backward_is_noticed_and_gone_around():
    """The gradient is right, its derivative is not: only differences are."""

    class Detached(OnceOnly):
        @staticmethod
        def backward(ctx, gradient):
            (y,) = ctx.saved_tensors
            return gradient * (1 - y.detach() ** 2)

    wanted = isoflat.measure(_hidden(torch.tanh), _data(), LOSS, rtol=1e-9, **OPTIONS).value
    estimate = isoflat.measure(_hidden(Detached.apply), _data(), LOSS, rtol=1e-4, **OPTIONS)
    assert estimate.value == pytest.approx(wanted, rel=1e-6)
    assert any("reverse over reverse: products differ by" in note for note in estimate.notes)


def test_what_fails_in_the_forward_pass_is_no_question_of_routes():
    def broken(x):
        raise ValueError("a bug of the user's")

    with pytest.raises(ValueError, match="a bug of the user's"):
        isoflat.measure(_hidden(broken), _data(), LOSS, **OPTIONS)


# Memory ---------------------------------------------------------------------------------------------------------------


def _scarce(monkeypatch, rows):
    """A machine without room for graphs of more rows than these."""
    build, sizes = GradientGraph.build, []

    def limited(risk, state, batch):
        sizes.append(len(batch[1]))
        if len(batch[1]) > rows:
            raise torch.OutOfMemoryError("planted")
        return build(risk, state, batch)

    monkeypatch.setattr(GradientGraph, "build", limited)
    return sizes


def test_out_of_memory_halves_the_rows_and_goes_on(monkeypatch):
    net, data = _hidden(torch.tanh), _data(13)
    wanted = isoflat.measure(net, data, LOSS, rtol=1e-9, **OPTIONS)
    risk, state = _risk(net, data, rows=13)
    planned = plan(risk, state, Recomputed, 13, 1 << 30)
    _scarce(monkeypatch, 4)
    made = linearise(risk, state, planned)
    vector = torch.ones(state.space.size, 1, dtype=torch.float64)
    products = made.products(vector)
    assert (made.grain.rows, made.grain.halvings) == (4, 2)
    monkeypatch.undo()
    whole = Recomputed(risk, state).products(vector)
    assert torch.allclose(products, whole, rtol=1e-12)
    monkeypatch.setattr("isoflat.measures.point.plan", lambda *args: planned)
    _scarce(monkeypatch, 4)
    estimate = isoflat.measure(net, data, LOSS, rtol=1e-9, check="skip", **OPTIONS)
    assert estimate.value == pytest.approx(wanted.value, rel=1e-12)
    assert "memory ran out: 4 rows at a time" in estimate.notes
    _scarce(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        linearise(risk, state, planned).products(vector)


def test_a_budget_is_kept_by_smaller_pieces(monkeypatch):
    net, data = _hidden(torch.tanh), _data(2000)
    risk, state = _risk(net, data, rows=2000)
    roomy = plan(risk, state, Recomputed, 2000, 1 << 30)
    assert (roomy.kept, roomy.whole, roomy.rows) == (True, True, 2000)
    tight = plan(risk, state, Recomputed, 2000, roomy.forecast // 4)
    assert not tight.kept
    assert tight.rows < 2000
    assert tight.forecast <= roomy.forecast // 4
    sizes = _scarce(monkeypatch, 2000)
    made = linearise(risk, state, tight)
    made.products(torch.ones(state.space.size, 1, dtype=torch.float64))
    assert max(sizes) == tight.rows
    with pytest.raises(isoflat.UsageError, match="memory budget of 100 bytes is too small"):
        plan(risk, state, Recomputed, 2000, 100)


def test_a_batch_that_must_stay_whole_is_not_cut():
    """A contrastive loss compares the rows of a batch."""
    net, data = _hidden(torch.tanh), _data(8)
    loss = isoflat.BatchLoss(
        lambda model, batch: ((model(batch[0]) @ model(batch[0]).T).logsumexp(1).sum(), len(batch[0]))
    )
    risk = EmpiricalRisk(Network(net), loss, as_batches([data]))
    assert not planning.separable(risk, Network(net).state(), data)
    assert plan(risk, Network(net).state(), Recomputed, 8, 1 << 30).whole
    with pytest.raises(isoflat.UsageError, match=r"whose loss is no sum over its rows.*give smaller batches"):
        plan(risk, Network(net).state(), Recomputed, 8, 100)


# Precision ------------------------------------------------------------------------------------------------------------


def test_bfloat16_may_be_inside_but_never_in_a_certificate():
    case = mlp((20, 40, 40, 5), bias=True, seed=3, rows=2000)
    net = case.net.float()
    data = (case.inputs.float(), case.targets)
    with pytest.raises(isoflat.UsageError, match="never in a certificate"):
        isoflat.measure(net, data, LOSS, dtype="bfloat16", rtol=0.05, **OPTIONS)
    exact = isoflat.measure(net, data, LOSS, dtype="float64", rtol=1e-9, **OPTIONS).value
    low = isoflat.measure(net, data, LOSS, dtype="bfloat16", certify=False, rtol=0.05, **OPTIONS)
    assert low.value == pytest.approx(exact, rel=1e-2)
    assert low.value != isoflat.measure(net, data, LOSS, certify=False, rtol=0.05, **OPTIONS).value


@pytest.mark.parametrize(
    ("options", "rules"),
    [({}, ["convolution", "linear", "pooling", "relu"]), ({"dtype": "bfloat16", "certify": False, "rtol": 0.05}, [])],
)
def test_the_record_names_the_rules_that_applied(options, rules):
    """Autocast inside a product leaves the operations to torch."""
    case = cnn(3, True, 0)
    table = isoflat.measure_all(
        case.net.float(), (case.inputs.float(), case.targets), LOSS,
        measures=[OPTIONS["measure"]], geometry=OPTIONS["geometry"], **options,
    )  # fmt: skip
    assert table[0].settings["second_order_rules"] == rules
    assert isoflat.Table.from_json(table.to_json())[0].settings == table[0].settings


def test_a_tolerance_below_rounding_is_refused():
    case = mlp((4, 5, 3), bias=True, seed=1)
    with pytest.raises(isoflat.UsageError, match=r"rtol=1e-08 lies below the rounding of a product in torch.float32"):
        isoflat.measure(case.net.float(), (case.inputs.float(), case.targets), LOSS, rtol=1e-8, **OPTIONS)


class Quantised(nn.Module):
    """A frozen linear map in eight bits, with a trainable adapter beside it."""

    def __init__(self, base, dtype):
        super().__init__()
        size = base.weight.abs().max() / 127
        self.weight = nn.Parameter((base.weight.detach() / size).round().to(torch.int8), requires_grad=False)
        self.register_buffer("size", size.detach().to(dtype))
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x):
        weight = self.weight.to(x.dtype) * self.size.to(x.dtype)
        return nn.functional.linear(x, weight) + self.up(self.down(x))


def test_adapters_on_a_quantised_or_half_precision_frozen_base():
    """Products in float32 for what is trainable; as with the base written out in full."""
    torch.manual_seed(0)
    net = nn.Sequential(
        Quantised(nn.Linear(4, 5), torch.bfloat16), nn.Tanh(), nn.Linear(5, 3).to(torch.bfloat16)
    ).eval()
    net[2].requires_grad_(False)
    net[0].to(dtype=torch.float32)
    x, y = _data()
    mixed = Sub(lambda net, x: net.body[2](net.body[:2](x.mean(1)).to(net.body[2].weight.dtype)), body=net)
    wide = copy.deepcopy(mixed).double()
    estimate = isoflat.measure(mixed, (x.float(), y), LOSS, rtol=1e-4, **OPTIONS)
    wanted = isoflat.measure(wide, (x, y), LOSS, rtol=1e-9, **OPTIONS)
    assert estimate.value == pytest.approx(wanted.value, rel=1e-4)
    assert any("held fixed" in note for note in estimate.notes)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_frozen_tensor_may_be_of_a_quantised_type():
    torch.manual_seed(0)
    low = torch.quantize_per_tensor(torch.randn(5, 4), 0.02, 0, torch.qint8)

    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(low, requires_grad=False)
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(nn.functional.linear(x.mean(1), self.weight.dequantize().to(x.dtype)).tanh())

    x, y = _data()
    plain = Low().eval()
    estimate = isoflat.measure(plain, (x.float(), y), LOSS, rtol=1e-4, **OPTIONS)
    hidden = nn.functional.linear(x.float().mean(1), low.dequantize()).tanh()
    assert estimate.value == pytest.approx(
        isoflat.measure(plain.head, (hidden, y), LOSS, rtol=1e-4, **OPTIONS).value, rel=1e-4
    )


def test_routes_are_tried_in_float64_whatever_the_weights_are():
    risk, state = _risk(_hidden(torch.tanh).to(torch.bfloat16), _data())
    assert choose(risk, state, ProductCheck.REFUSE).route is Recomputed
    assert choose(replace(risk, loss=as_loss(LOSS)), state, ProductCheck.SKIP).notes == ()


def test_a_row_of_padding_is_held_and_no_stop_gradient():
    """The network depends on it, but torch gives it no gradient."""
    torch.manual_seed(0)
    parts = {"inner": nn.Embedding(6, 4, padding_idx=0), "head": nn.Linear(4, 3)}
    net = Sub(lambda net, x: net.head(net.inner(x).tanh().mean(1)), **parts).double().eval()
    with torch.no_grad():
        net.inner.weight[0] = 1.0
    data = torch.randint(6, (9, 5)), torch.randint(3, (9,))
    data[0][:, 0] = 0
    risk, state = _risk(net, data)
    assert choose(risk, state).route is Recomputed
