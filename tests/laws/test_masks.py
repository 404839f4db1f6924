"""Masks: stored ones of infinite or huge numbers, rows of attention that are masked whole, and targets that do not count.

Truths are edits of the weights written by hand: what keeps every loss must keep the number; what does not is a control.
"""

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import isoflat

CE = nn.CrossEntropyLoss()
KW = {"geometry": "auto", "rtol": 1e-3}


class Attending(nn.Module):
    """Scores of classes from one layer of attention, whose keys are kept where the first feature is positive."""

    def __init__(self, width=4, mean=True):
        super().__init__()
        self.q, self.k, self.v, self.o = (
            nn.Linear(3, width),
            nn.Linear(3, width),
            nn.Linear(3, width),
            nn.Linear(width, 3),
        )
        self.mean = mean

    def forward(self, x):
        keep = (x[..., 0] > 0)[:, None, :].expand(-1, x.shape[1], -1)
        y = self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=keep))
        return y.mean(1) if self.mean else y.transpose(1, 2)


class Causal(nn.Module):
    """Scores of the next token; keys are those before it that are no padding. The mask is made, held, or stored."""

    def __init__(self, mask=None, kind="made", length=5):
        super().__init__()
        self.e = nn.Embedding(7, 4)
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        self.h = nn.Linear(4, 7)
        self.kind = kind
        if kind == "buffer":
            self.register_buffer("mask", mask)
        elif kind == "frozen":
            self.mask = nn.Parameter(mask, requires_grad=False)
        elif kind == "attribute":
            self.mask = mask

    def forward(self, ids, keep=None):
        x = self.e(ids)
        n = ids.shape[1]
        if self.kind == "made":
            mask = torch.ones(n, n, dtype=torch.bool).tril()[None]
            mask = mask if keep is None else mask & keep[:, None, :].bool()
            y = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=mask)
        else:
            y = ((self.q(x) @ self.k(x).mT) / 2 + self.mask[:n, :n].to(x.dtype)).softmax(-1) @ self.v(x)
        return self.h(torch.relu(x + self.o(y))).transpose(1, 2)


def _made(make, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return make().to(dtype).eval()


def _scores(net, *inputs):
    with torch.no_grad():
        return net(*inputs).double()


def _value_shift(net, size=2.0):
    """The network with a constant added to all values and taken from what reads them."""
    twin = copy.deepcopy(net)
    c = size * torch.randn(len(twin.v.bias), generator=torch.Generator().manual_seed(1)).to(twin.v.bias)
    with torch.no_grad():
        twin.v.bias += c
        twin.o.bias -= twin.o.weight @ c
    return twin


def _data(dtype=torch.float64, rows=7, whole=False):
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(rows, 4, 3, generator=g).to(dtype), torch.randint(0, 3, (rows,), generator=g)
    x[:, 0, 0] = 1.0
    if whole:
        x[-1, :, 0] = -1.0  # no key is left in the last row
    return x, y


def _overlap(a, b):
    return a.lower <= b.upper * (1 + 1e-9) and b.lower <= a.upper * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_shift_where_every_row_keeps_a_key(dtype):
    net, data = _made(Attending, dtype), _data(dtype)
    twin = _value_shift(net)
    assert torch.allclose(_scores(net, data[0]), _scores(twin, data[0]), atol=1e-5)
    a, b = (isoflat.measure(q, data, CE, **KW, dtype="float64") for q in (net, twin))
    assert _overlap(a, b)
    assert a.value == pytest.approx(b.value, rel=1e-3)
    assert not any("masked whole" in note for note in a.notes)


@pytest.mark.parametrize(
    ("dtype", "cut"),
    [
        (torch.float32, 3),
        (torch.float64, None),
        pytest.param(torch.float32, None, marks=pytest.mark.slow),
        pytest.param(torch.float64, 3, marks=pytest.mark.slow),
    ],
)
def test_rows_that_are_masked_whole_are_seen_in_any_batch(dtype, cut):
    """The first batch, on which the network is traced, leaves every row a key; the last one does not."""
    net, (x, y) = _made(Attending, dtype), _data(dtype, whole=True)
    moved = (_scores(_value_shift(net), x) - _scores(net, x)).abs().amax(1)
    assert float(moved[-1]) > 1e-2  # the control: no symmetry there
    assert float(moved[:-1].max()) < 1e-5
    batches = (x, y) if cut is None else [(x[i : i + cut], y[i : i + cut]) for i in range(0, len(x), cut)]
    made = isoflat.measure(net, batches, CE, **KW, dtype="float64")
    assert any("masked whole" in note and "v.bias" in note for note in made.notes)
    # Found on rows that keep their keys, and given for data in which some do not: the claim is taken back there too.
    found = isoflat.symmetries(net, x[:2], loss=CE)
    assert float((_scores(isoflat.reparametrize(net, found, spread=1.0), x) - _scores(net, x))[-1].abs().max()) > 1e-3
    given = isoflat.measure(net, batches, CE, **KW, dtype="float64", symmetries=found)
    assert given.value == made.value
    # What is left is a symmetry: a copy along it has the same scores and the same number.
    fewer = isoflat.symmetries(net, x, loss=CE)
    assert 0 < fewer.dimension < found.dimension
    twin = isoflat.reparametrize(net, fewer, spread=0.5, seed=3)
    change = _scores(net, x) - _scores(twin, x)
    assert float((change - change.mean(1, keepdim=True)).abs().max()) < 1e-4
    assert _overlap(made, isoflat.measure(twin, batches, CE, **KW, dtype="float64"))


def test_a_constant_mask_with_an_empty_row_holds_values():
    class Fixed(Attending):
        def forward(self, x):
            keep = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
            return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=keep)).mean(1)

    net, (x, y) = _made(Fixed), _data()
    assert float((_scores(_value_shift(net), x) - _scores(net, x)).abs().max()) > 1e-2
    found = isoflat.symmetries(net, x, loss=CE)
    assert "v.bias" not in found.translation.touches
    assert "masked whole" in str(found)
    isoflat.measure(net, (x, y), CE, geometry="auto", rtol=1e-2)


def _padded():
    g = torch.Generator().manual_seed(4)
    ids, keep = torch.randint(0, 7, (5, 5), generator=g), torch.ones(5, 5, dtype=torch.long)
    keep[0, :2] = keep[3, :1] = 0
    target = torch.randint(0, 7, (5, 5), generator=g)
    return ids, keep, target


@pytest.mark.parametrize("loss", [CE, lambda z, y: F.cross_entropy(z, y)], ids=["criterion", "function"])
def test_left_padding_counts_where_targets_do(loss):
    ids, keep, target = _padded()
    ignored = target.masked_fill(keep == 0, -100)
    if not isinstance(loss, nn.Module):  # a mean over counted targets is none over rows: one row of each length
        ids, keep, ignored = ids[:1], keep[:1], ignored[:1]
    net = _made(Causal)
    twin = _value_shift(net)
    assert float(CE(_scores(net, ids, keep), ignored) - CE(_scores(twin, ids, keep), ignored)) == pytest.approx(
        0, abs=1e-12
    )
    assert (
        float((_scores(net, ids, keep) - _scores(twin, ids, keep)).abs().max()) > 1e-2
    )  # where nothing counts, outputs differ
    a, b = (isoflat.measure(q, [((ids, keep), ignored)], loss, **KW) for q in (net, twin))
    assert _overlap(a, b)
    assert a.value == pytest.approx(b.value, rel=1e-3)
    assert not any("masked whole" in note for note in a.notes)


def test_left_padding_that_counts_holds_values():
    ids, keep, target = _padded()
    net = _made(Causal)
    twin = _value_shift(net)
    assert abs(float(CE(_scores(net, ids, keep), target) - CE(_scores(twin, ids, keep), target))) > 1e-4
    made = isoflat.measure(net, [((ids, keep), target)], CE, **KW)
    assert any("masked whole" in note for note in made.notes)
    assert isoflat.symmetries(net, (ids, keep), loss=CE).verify() < 1e-9  # no error, fewer dimensions


class Output(NamedTuple):
    """A model's output that carries its loss."""

    loss: torch.Tensor
    logits: torch.Tensor


class WithLoss(nn.Module):
    """Scores of the next token and the mean loss of those labels that count, shifted by one."""

    def __init__(self):
        super().__init__()
        self.net = Causal()

    def forward(self, ids, keep, labels):
        logits = self.net(ids, keep).transpose(1, 2)
        return Output(loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits=logits)


def test_left_padding_under_a_models_own_loss():
    ids, keep, target = _padded()
    labels = target.masked_fill(keep == 0, -100)
    labels[0, 2] = labels[3, 1] = -100  # the first token is told from a row that is masked whole
    net = _made(WithLoss)
    twin = copy.deepcopy(net)
    twin.net = _value_shift(net.net)
    batch = {"ids": ids, "keep": keep, "labels": labels}
    a, b = (isoflat.measure(q, [batch], None, **KW) for q in (net, twin))
    assert a.value == pytest.approx(b.value, rel=1e-3)
    assert not any("masked whole" in note for note in a.notes)
    batch["labels"] = target
    assert any("masked whole" in note for note in isoflat.measure(net, [batch], None, **KW).notes)


LOW = [
    (float("-inf"), torch.float32),
    pytest.param(float("-inf"), torch.float64, marks=pytest.mark.slow),
    (torch.finfo(torch.float32).min, torch.float32),
    pytest.param(-1e30, torch.float64, marks=pytest.mark.slow),
    pytest.param(-1e12, torch.float32, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("low", "dtype"), LOW)
def test_a_stored_mask_is_a_constant(low, dtype):
    ids, _, target = _padded()
    nets = {}
    for kind in ("buffer", "attribute"):
        mask = torch.full((5, 5), low, dtype=dtype).triu(1)
        nets[kind] = _made(lambda kind=kind, mask=mask: Causal(mask, kind), dtype)
    before = {name: tensor.clone() for name, tensor in nets["buffer"].state_dict().items()}
    found = {kind: isoflat.symmetries(net, ids, loss=CE) for kind, net in nets.items()}
    assert found["buffer"].dimension == found["attribute"].dimension
    assert "mask" not in {name for group in found["buffer"].symmetries for name in group.touches}
    a, b = (isoflat.measure(net, (ids, target), CE, **KW) for net in nets.values())
    assert a.value == b.value
    assert all(torch.equal(before[name], tensor) for name, tensor in nets["buffer"].state_dict().items())
    twin = _value_shift(nets["buffer"])
    assert _overlap(a, isoflat.measure(twin, (ids, target), CE, **KW))


def test_a_frozen_parameter_may_be_a_mask():
    ids, _, target = _padded()
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)
    net = _made(lambda: Causal(mask, "frozen"), torch.float32)
    assert isoflat.measure(net, (ids, target), CE, **KW).value > 0


def test_scores_of_classes_that_are_switched_off():
    """Minus infinity among the scores is neither a change nor a reason to believe that a loss ignores constants."""

    class Off(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x))).masked_fill(torch.tensor([False, False, True]), float("-inf"))

    net = _made(Off)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = isoflat.symmetries(net, x, loss=CE)
    assert found.verify() < 1e-10
    assert found.dimension > 0
    assert not isoflat.symmetries(net, x, loss=lambda z, y: z[:, :2].square().mean() + 0 * y.sum()).blind


class Tied(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.e, self.how = nn.Embedding(7, 4), how
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, ids):
        x = self.e(ids)
        h, w = x + self.b(torch.relu(self.a(x))), self.e.weight
        return {
            "F.linear": lambda: F.linear(h, w),
            "h @ W.T": lambda: h @ w.T,
            "h @ W.mT": lambda: h @ w.mT,
            "einsum": lambda: torch.einsum("btd,vd->btv", h, w),
            "scaled": lambda: F.linear(h, w * 0.5),
            "transpose": lambda: torch.matmul(h, w.transpose(0, 1)),
            "flat": lambda: (h.flatten(0, 1) @ w.T).view(*h.shape[:2], -1),
        }[self.how]().transpose(1, 2)


@pytest.mark.parametrize(
    "how",
    [
        "h @ W.T",
        "einsum",
        "scaled",
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("h @ W.mT", "transpose", "flat")),
    ],
)
def test_a_tied_head_in_any_spelling(how):
    ids, _, target = _padded()
    net = _made(lambda: Tied(how))
    found = isoflat.symmetries(net, ids, loss=CE)
    assert found.verify() < 1e-9
    twin = copy.deepcopy(net)
    with torch.no_grad():  # units of the hidden layer
        s = torch.tensor([0.1, 0.5, 1, 2, 5, 10.0], dtype=torch.float64)
        twin.a.weight *= s[:, None]
        twin.a.bias *= s
        twin.b.weight /= s
    a, b = (isoflat.measure(q, (ids, target), CE, **KW) for q in (net, twin))
    assert _overlap(a, b)
    assert a.value == pytest.approx(b.value, rel=1e-3)
