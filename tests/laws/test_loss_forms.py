"""Whatever form a loss has, the number is that of the loss itself, batch by batch where it is no mean over rows, or refused.

Truths are dense Hessians by two plain passes of torch.autograd in float64, on the user's own functions.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import isoflat
from isoflat.io.rows import Rows

F = nn.functional
HOW = {"measure": "hessian_spectral_norm", "geometry": "euclidean", "rtol": 1e-7}
DTYPES = [torch.float64, torch.float32]
ROWS = 30


def _random(*labels):
    return torch.Generator().manual_seed(sum(map(ord, str(labels))))


def _filled(net):
    """The network with weights that do not depend on other tests, in float64."""
    random = _random("weights")
    net = net.double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    return net


def _network(outputs=1):
    return _filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)))


def _dense(net, loss) -> Tensor:
    """The Hessian of `loss()` in the network's parameters."""
    parameters = list(net.parameters())
    slopes = torch.autograd.grad(loss(), parameters, create_graph=True, materialize_grads=True, allow_unused=True)
    flat = torch.cat([slope.reshape(-1) for slope in slopes])
    rows = []
    for entry in flat:
        second = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
        rows.append(torch.cat([part.reshape(-1) for part in second]))
    return torch.stack(rows)


def _top(hessian) -> float:
    return float(torch.linalg.eigvalsh((hessian + hessian.T) / 2).abs().max())


def _as(data, dtype):
    """Data in a precision."""
    if isinstance(data, Tensor):
        return data.to(dtype) if data.is_floating_point() else data
    if isinstance(data, dict):
        return {key: _as(value, dtype) for key, value in data.items()}
    return type(data)(_as(part, dtype) for part in data)


def _check(net, data, loss, dtype, truth, per_batch: bool, **how):
    """Measured in a precision: the value, the interval and the label."""
    model = copy.deepcopy(net).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    how = HOW | ({"rtol": 1e-4} if dtype is torch.float32 else {}) | how
    found = isoflat.measure(model, _as(data, dtype), loss, **how)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    slack = 1e-6 if dtype is torch.float64 else 3e-4
    assert found.value == pytest.approx(truth, rel=slack)
    assert found.lower - slack * truth <= truth <= found.upper + slack * truth
    assert any("per-batch loss" in note for note in found.notes) is per_batch, found.notes
    return found


# Functions of output and target that are no means over rows.


def weighted(output, target):
    return F.cross_entropy(output, target, weight=torch.tensor([1.0, 15.0], dtype=output.dtype))


def weighted_by_hand(output, target):
    weights = torch.tensor([1.0, 7.0], dtype=output.dtype)[target]
    return (weights * F.cross_entropy(output, target, reduction="none")).sum() / weights.sum()


def balanced(output, target):
    """Weights computed from the batch."""
    counts = torch.bincount(target, minlength=2).to(output)
    return F.cross_entropy(output, target, weight=counts.sum() / (2 * counts.clamp(min=1)))


def dice(output, target):
    score, target = output.sigmoid(), target.to(output)
    return 1 - 2 * (score[:, 1] * target).sum() / (score[:, 1].sum() + target.sum() + 1)


def cox(output, target):
    """Partial likelihood, the times in the order of the rows."""
    return -(output[:, 0] - output[:, 0].flip(0).logcumsumexp(0).flip(0))[target == 1].mean()


def auc(output, target):
    score = output[:, 1] - output[:, 0]
    return F.softplus(score[target == 0][None] - score[target == 1][:, None]).mean()


def batch_hard(output, target):
    apart = ((output[:, None] - output[None]).square().sum(-1) + 1e-6).sqrt()
    same = target[:, None] == target[None]
    return F.softplus(apart.where(same, -torch.inf).amax(1) - apart.where(~same, torch.inf).amin(1)).mean()


def hardest(output, target):
    """Mean over the half of the rows that is worst."""
    each = F.cross_entropy(output, target, reduction="none")
    return each.topk(max(1, len(each) // 2)).values.mean()


def focal_by_positives(output, target):
    """Sum over rows, divided by the number of positives."""
    each = F.cross_entropy(output, target, reduction="none")
    return (each * (1 - torch.exp(-each)) ** 2).sum() / (target == 1).sum().clamp(min=1)


class Subclassed(nn.CrossEntropyLoss):
    """A criterion of torch's own by name, and a ratio by what it does."""

    def forward(self, input, target):
        return balanced(input, target)


RATIOS = [
    weighted, weighted_by_hand, balanced, dice, cox, auc, batch_hard, hardest, focal_by_positives, Subclassed(),
]  # fmt: skip


def _classes():
    x = torch.randn(ROWS, 3, generator=_random("x"), dtype=torch.float64)
    y = torch.randint(2, (ROWS,), generator=_random("y"))
    y[::5], y[1::5] = 1, 0  # every part of the data has both
    return x, y


def _name(loss):
    return getattr(loss, "__name__", type(loss).__name__)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", RATIOS, ids=_name)
@pytest.mark.parametrize(
    "sizes", [(10, 12, 8), *(pytest.param(s, marks=pytest.mark.slow) for s in ((ROWS,), (15, 15)))]
)
def test_ratios_are_measured_batch_by_batch(loss, dtype, sizes):
    """The mean over the batches of the user's own loss; one batch is the loss itself."""
    net, (x, y) = _network(2), _classes()
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    truth = _top(sum(_dense(net, lambda x=x, y=y: loss(net(x), y)) for x, y in batches) / len(batches))
    _check(net, batches, loss, dtype, truth, per_batch=True)


@pytest.mark.parametrize("loss", RATIOS, ids=_name)
def test_a_pair_of_tensors_is_one_batch_for_a_ratio(loss):
    """510 rows are not cut into 500 and 10."""
    net = _network(2)
    x = torch.randn(510, 3, generator=_random("x"), dtype=torch.float64)
    y = (x[:, 0] > 1).long()
    truth = _top(_dense(net, lambda: loss(net(x), y)))
    _check(net, (x, y), loss, torch.float64, truth, per_batch=True)


def test_averaging_parts_would_be_wrong():
    """Negative control: weighing batches by rows moves the number, and writing rows twice does not show it."""
    net, (x, y) = _network(2), _classes()
    x, y = x[y.argsort()], y.sort().values
    one, other = (_dense(net, lambda k=k: weighted(net(x[k]), y[k])) for k in (slice(10), slice(10, None)))
    truth = _top(_dense(net, lambda: weighted(net(x), y)))
    assert abs(_top(one / 3 + 2 * other / 3) - truth) > 0.05 * truth
    twice = weighted(net(torch.cat([x, x])), torch.cat([y, y]))
    assert twice.item() == pytest.approx(weighted(net(x), y).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_of_one_class_each_are_weighed_against_each_other(dtype):
    """Within each batch the weights are equal, so that only rows of several batches tell."""
    net, (x, y) = _network(2), _classes()
    order = y.argsort()
    zeros = int((y == 0).sum())
    x, y = x[order], y[order]
    batches = [(x[:zeros], y[:zeros]), (x[zeros:], y[zeros:])]
    truth = _top(sum(_dense(net, lambda x=x, y=y: weighted(net(x), y)) for x, y in batches) / 2)
    _check(net, batches, weighted, dtype, truth, per_batch=True)
    _check(net, (x, y), weighted, dtype, _top(_dense(net, lambda: weighted(net(x), y))), per_batch=True)


def test_a_last_layer_of_zeros_hides_nothing():
    """All rows have the same loss there, so that losses alone tell no ratio from a mean."""
    net, (x, y) = _network(2), _classes()
    nn.init.zeros_(net[2].weight)
    nn.init.zeros_(net[2].bias)
    batches = list(zip(x.split(12), y.split(12), strict=True))
    truth = _top(sum(_dense(net, lambda x=x, y=y: weighted(net(x), y)) for x, y in batches) / len(batches))
    _check(net, batches, weighted, torch.float64, truth, per_batch=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(ROWS,), (15, 15), (10, 12, 8)])
@pytest.mark.parametrize(
    "loss",
    [
        lambda output, target: F.cross_entropy(output, target),
        lambda output, target: F.cross_entropy(output, target, label_smoothing=0.1) + 1,
        lambda output, target: (output[:, 1] - target.to(output)).pow(4).mean(),
        lambda output, target: F.mse_loss(output[:, :1].squeeze(1), target.to(output)),
    ],
)
def test_means_over_rows_are_as_they_were(loss, dtype, sizes):
    """The number is that of all rows, whatever the batches; batches carry no label."""
    net, (x, y) = _network(2), _classes()
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    _check(net, batches, loss, dtype, _top(_dense(net, lambda: loss(net(x), y))), per_batch=False)


def test_masked_means_over_tokens():
    """`(N, T, V)` scores with ignored targets: as a criterion exact over all tokens, as a function batch by batch."""
    net = _network(5)
    x = torch.randn(12, 6, 3, generator=_random("x"), dtype=torch.float64)
    y = torch.randint(5, (12, 6), generator=_random("y"))
    for row in range(12):
        y[row, 1 + row % 5 :] = -100
    loss = lambda output, target: F.cross_entropy(output.transpose(1, 2), target)  # noqa: E731
    batches = list(zip(x.split(5), y.split(5), strict=True))
    truth = _top(sum(_dense(net, lambda x=x, y=y: loss(net(x), y)) for x, y in batches) / len(batches))
    _check(net, batches, loss, torch.float64, truth, per_batch=True)
    _check(net, (x, y), loss, torch.float64, _top(_dense(net, lambda: loss(net(x), y))), per_batch=True)


@pytest.mark.parametrize("loss", [weighted, dice, batch_hard], ids=_name)
def test_a_sample_needs_rows(loss):
    net = _network(2)
    x = torch.randn(5000, 3, generator=_random("x"), dtype=torch.float64)
    y = (x[:, 0] > 1).long()
    with pytest.raises(isoflat.UsageError, match="sample='auto' draws single rows"):
        isoflat.measure(net, (x, y), loss, sample="auto", **(HOW | {"rtol": 0.1}))


@pytest.mark.slow
def test_a_sample_of_a_mean_over_rows():
    """A plain function, with rows that are drawn."""
    net = _network(2)
    x = torch.randn(20000, 3, generator=_random("x"), dtype=torch.float64)
    y = (x[:, 0] + 0.1 * x[:, 1] > 1).long()
    loss = lambda output, target: F.cross_entropy(output, target)  # noqa: E731
    found = isoflat.measure(net, (x, y), loss, sample="auto", **(HOW | {"rtol": 0.1}))
    truth = _top(_dense(net, lambda: loss(net(x), y)))
    assert found.lower <= truth <= found.upper


def test_sums_are_refused():
    net, (x, y) = _network(2), _classes()
    for loss in (
        lambda o, t: F.cross_entropy(o, t, reduction="sum"),
        lambda o, t: F.mse_loss(o, o.detach() + 1) * len(o),
    ):
        for data in ((x, y), [(x, y)], [(x[i : i + 1], y[i : i + 1]) for i in range(6)]):
            with pytest.raises(isoflat.UsageError, match=r"not a mean over rows.*BatchLoss"):
                isoflat.measure(net, data, loss, **HOW)


# Targets that broadcast.


@pytest.mark.parametrize(
    "loss",
    [
        nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.BCEWithLogitsLoss(), nn.MSELoss(reduction="sum"),
        lambda output, target: (output - target).square().mean(), lambda output, target: (output - target).abs().mean(),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sizes", [30, 7, 1])
def test_targets_that_broadcast_are_refused(loss, sizes):
    net, (x, y) = _network(1), _classes()
    y = y + 0.5 * x[:, 1]
    for data in (list(zip(x.split(sizes), y.split(sizes), strict=True)), (x, y)):
        with pytest.raises(isoflat.DataError, match=r"every output would be compared with every target.*squeeze"):
            isoflat.measure(net, data, loss, **HOW)
    images = nn.Conv2d(2, 1, 3).double()
    shape = (4, 2, 5, 5)
    inputs, targets = (torch.randn(*part, dtype=torch.float64, generator=_random(part)) for part in (shape, (4, 3, 3)))
    with pytest.raises(isoflat.DataError, match="every output"):
        isoflat.measure(images, [(inputs, targets)], loss, **HOW)


def test_functions_that_bring_targets_into_shape_are_not_refused():
    net, (x, y) = _network(1), _classes()
    loss = lambda output, target: F.mse_loss(output, target[:, None].to(output))  # noqa: E731
    _check(net, (x, y), loss, torch.float64, _top(_dense(net, lambda: loss(net(x), y))), per_batch=False)
    survival = lambda output, target: cox(output, target)  # noqa: E731
    _check(net, (x, y), survival, torch.float64, _top(_dense(net, lambda: survival(net(x), y))), per_batch=True)


# Rows that meet inside the network.


class Centred(nn.Module):
    """Batch statistics without a module of torch's for them."""

    def __init__(self):
        super().__init__()
        self.layers = _network(2)

    def forward(self, x):
        z = self.layers(x)
        return (z - z.mean(0)) / z.std(0, correction=0)


class Attending(nn.Module):
    """Attention between the rows of a batch."""

    def __init__(self):
        super().__init__()
        self.layers = _network(2)

    def forward(self, x):
        z = self.layers(x)
        return z + (z @ z.T).softmax(1) @ z


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Centred, Attending])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), lambda output, target: F.cross_entropy(output, target)])
def test_rows_that_meet_in_the_network(kind, loss, dtype):
    net, (x, y) = kind(), _classes()
    batches = list(zip(x.split(12), y.split(12), strict=True))
    shares = [_dense(net, lambda x=x, y=y: F.cross_entropy(net(x), y)) * len(x) / ROWS for x, y in batches]
    _check(net, batches, loss, dtype, _top(sum(shares)), per_batch=True)
    _check(net, [(x, y)], loss, dtype, _top(_dense(net, lambda: F.cross_entropy(net(x), y))), per_batch=True)


@pytest.mark.parametrize("kind", [Centred, Attending])
def test_rows_that_meet_are_one_batch_of_a_pair(kind):
    net = kind()
    x = torch.randn(600, 3, generator=_random("x"), dtype=torch.float64)
    y = (x[:, 0] > 1).long()
    truth = _top(_dense(net, lambda: F.cross_entropy(net(x), y)))
    _check(net, (x, y), nn.CrossEntropyLoss(), torch.float64, truth, per_batch=True)


@pytest.mark.parametrize(
    ("net", "loss"), [(_network(2), batch_hard), (_network(2), weighted), (Attending(), nn.CrossEntropyLoss())]
)
def test_sizes_of_batches_that_are_asked_for_do_not_decide(net, loss):
    """The command line's --batch-size is refused, unless it takes the data whole."""
    x = torch.randn(120, 3, generator=_random("x"), dtype=torch.float64)
    rows = Rows(x, (x[:, 0] > 1).long())
    for size in (1, 50, 119):
        with pytest.raises(isoflat.DataError, match=r"batches of \d+ rows \(--batch-size\) would change the number"):
            isoflat.measure(net, rows.batches(size), loss, **HOW)
    one = F.cross_entropy if isinstance(loss, nn.Module) else loss
    truth = _top(_dense(net, lambda: one(net(x), rows.targets)))
    found = isoflat.measure(net, rows.batches(120), loss, **HOW)
    assert found.value == pytest.approx(truth, rel=1e-6)


def test_a_lack_of_memory_does_not_cut_what_stays_whole():
    net, (x, y) = _network(2), _classes()
    with pytest.raises(isoflat.UsageError, match="budget of 100000 bytes is too small"):
        isoflat.measure(
            net, [(x.repeat(200, 1), y.repeat(200))], weighted, budget=isoflat.Budget(memory=100_000), **HOW
        )
    mean = lambda output, target: F.cross_entropy(output, target)  # noqa: E731
    isoflat.measure(net, [(x.repeat(200, 1), y.repeat(200))], mean, budget=isoflat.Budget(memory=100_000), **HOW)


# Losses on whole batches.


def _pairs(ratio):
    def contrast(model, batch):
        one, other = (F.normalize(model(part), dim=1) for part in batch)
        loss = F.cross_entropy(one @ other.T / 0.2, torch.arange(len(one)))
        return loss if ratio else (loss * len(one), len(one))

    return contrast


@pytest.mark.parametrize("mean", [True, False])
def test_contrastive_batches(mean):
    """Pairs of a batch are compared with each other: 600 rows are one batch, and batches of the user's own stay."""
    net = _network(3)
    views = tuple(torch.randn(600, 3, generator=_random(k), dtype=torch.float64) for k in range(2))
    loss = isoflat.BatchLoss(_pairs(mean))
    plain = lambda batch: _pairs(True)(net, batch)  # noqa: E731
    _check(net, views, loss, torch.float64, _top(_dense(net, lambda: plain(views))), per_batch=True)
    batches = list(zip(views[0][:36].split(20), views[1][:36].split(20), strict=True))
    shares = [0.5, 0.5] if mean else [20 / 36, 16 / 36]
    truth = _top(sum(share * _dense(net, lambda b=b: plain(b)) for share, b in zip(shares, batches, strict=True)))
    _check(net, batches, loss, torch.float64, truth, per_batch=True)


def _images(sizes):
    x = [torch.randn(3, 6 + k % 3, 7, generator=_random(k), dtype=torch.float64) for k in range(8)]
    boxes = [{"boxes": torch.randn(1 + k % 2, 2, generator=_random(k), dtype=torch.float64)} for k in range(8)]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [(x[a:b], boxes[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def test_lists_of_images():
    """No tensor tells how many images there are: a sum with its count needs no rows, and a mean is refused."""
    net = _filled(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)))

    def total(model, batch):
        return sum(
            F.mse_loss(model(image[None]).expand_as(t["boxes"]), t["boxes"]) for image, t in zip(*batch, strict=True)
        )

    whole = _images([8])
    truth = _top(_dense(net, lambda: total(net, whole[0]) / 8))
    counted = isoflat.BatchLoss(lambda model, batch: (total(model, batch), len(batch[0])))
    mean = isoflat.BatchLoss(lambda model, batch: total(model, batch) / len(batch[0]))
    for sizes in ([8], [7, 1], [4, 4]):
        _check(net, _images(sizes), counted, torch.float64, truth, per_batch=False)
    _check(net, whole, mean, torch.float64, truth, per_batch=False)
    with pytest.raises(isoflat.UsageError, match=r"several batches cannot be weighed.*\(sum, count\)"):
        isoflat.measure(net, _images([7, 1]), mean, **HOW)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.RNN(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][-1])


@pytest.mark.parametrize("length", [7, 10])
def test_time_major_sequences_are_not_cut_along_time(length):
    """Inputs `(T, N, 3)` of 10 rows, in batches of 10 and of 6 and 4; also where there are as many times as rows."""
    net = _filled(Recurrent())
    x = torch.randn(length, 10, 3, generator=_random("x"), dtype=torch.float64)
    y = torch.randint(2, (10,), generator=_random("y"))
    truth = _top(_dense(net, lambda: F.cross_entropy(net(x), y)))
    for data in ([(x, y)], [(x[:, :6], y[:6]), (x[:, 6:], y[6:])]):
        found = isoflat.measure(net, data, nn.CrossEntropyLoss(), **HOW)
        assert found.value == pytest.approx(truth, rel=1e-6)
    mean = isoflat.BatchLoss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    assert isoflat.measure(net, [(x, y)], mean, **HOW).value == pytest.approx(truth, rel=1e-6)
    with pytest.raises(isoflat.UsageError, match="cannot be weighed"):
        isoflat.measure(net, [(x[:, :6], y[:6]), (x[:, 6:], y[6:])], mean, **HOW)


def test_graphs_are_taken_whole():
    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, source, sink):
            z = torch.tanh(self.one(x))
            return self.two(torch.zeros_like(z).index_add(0, sink, z[source]))

    net = _filled(Passing())
    x = torch.randn(20, 3, generator=_random("x"), dtype=torch.float64)
    source, sink = torch.randint(20, (2, 60), generator=_random("edges"))
    y = torch.randint(2, (20,), generator=_random("y"))
    truth = _top(_dense(net, lambda: F.cross_entropy(net(x, source, sink), y)))
    found = isoflat.measure(net, [((x, source, sink), y)], nn.CrossEntropyLoss(), **HOW)
    assert found.value == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_means_of_batches_are_weighed_by_rows_where_they_are_means_over_them(dtype):
    net, (x, y) = _network(2), _classes()
    mean = isoflat.BatchLoss(lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]))
    batches = [{"x": a, "y": b} for a, b in zip(x.split(12), y.split(12), strict=True)]
    _check(net, batches, mean, dtype, _top(_dense(net, lambda: F.cross_entropy(net(x), y))), per_batch=False)
    ratio = isoflat.BatchLoss(lambda model, batch: weighted(model(batch["x"]), batch["y"]))
    truth = sum(_dense(net, lambda b=b: weighted(net(b["x"]), b["y"])) for b in batches) / 3
    _check(net, batches, ratio, dtype, _top(truth), per_batch=True)


# Models that compute their own loss.


class Head(nn.Module):
    """A stand-in for the heads of common libraries: embeddings, a layer, and a mean over what counts."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.embed, self.out = kind, nn.Embedding(7, 3), nn.Linear(3, 7)

    def forward(self, input_ids, labels=None, attention_mask=None, start_positions=None, end_positions=None, nsp=None):
        z = self.out(torch.tanh(self.embed(input_ids)))
        return {
            "loss": getattr(self, f"_{self.kind}")(z, labels, attention_mask, start_positions, end_positions, nsp),
            "logits": z,
        }

    def _causal(self, z, labels, *rest):
        return F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def _masked(self, z, labels, *rest):
        return F.cross_entropy(z.flatten(0, 1), labels.flatten())

    def _attended(self, z, labels, mask, *rest):
        return F.cross_entropy(z.flatten(0, 1), labels.where(mask == 1, -100).flatten())

    def _classes(self, z, labels, *rest):
        return F.cross_entropy(z.mean(1), labels)

    def _regression(self, z, labels, *rest):
        return F.mse_loss(z.mean(1)[:, 0], labels)

    def _multilabel(self, z, labels, *rest):
        return F.binary_cross_entropy_with_logits(z.mean(1), labels)

    def _answers(self, z, labels, mask, start, end, nsp):
        length = z.shape[1]
        parts = (
            F.cross_entropy(z[..., k], where.clamp(0, length), ignore_index=length)
            for k, where in enumerate((start, end))
        )
        return sum(parts) / 2

    def _both(self, z, labels, mask, start, end, nsp):
        return F.cross_entropy(z.flatten(0, 1), labels.flatten()) + F.cross_entropy(z.mean(1), nsp)

    def _contrast(self, z, labels, *rest):
        return F.cross_entropy(z.mean(1) @ z.mean(1).T, torch.arange(len(z)))


def _texts(kind, rows=12, length=6):
    random = _random("texts")
    ids = torch.randint(7, (rows, length), generator=random)
    mask = (torch.arange(length)[None] < 2 + torch.arange(rows)[:, None] % (length - 1)).long()
    tokens = ids.where(mask == 1, -100)
    tokens[1 : rows // 2, :2] = -100
    labels = {
        "classes": torch.randint(7, (rows,), generator=random),
        "regression": torch.randn(rows, generator=random, dtype=torch.float64),
        "multilabel": torch.rand(rows, 7, generator=random, dtype=torch.float64),
        "attended": ids,
    }.get(kind, tokens)
    if kind == "answers":
        start = torch.randint(length, (rows,), generator=random)
        start[1::3] = length + 5
        return {"input_ids": ids, "start_positions": start, "end_positions": start.clone()}
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return batch | {"nsp": torch.randint(7, (rows,), generator=random)} if kind == "both" else batch


def _parts(batch, *sizes):
    columns = {name: value.split(sizes) for name, value in batch.items()}
    return [{name: column[k] for name, column in columns.items()} for k in range(len(sizes))]


HEADS = ["causal", "masked", "attended", "classes", "regression", "multilabel", "answers"]


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", HEADS)
def test_a_models_own_loss_is_weighed_by_what_it_is_a_mean_over(kind, dtype):
    net = _filled(Head(kind))
    texts = _texts(kind)
    truth = _top(_dense(net, lambda: net(**texts)["loss"]))
    for sizes in ((12,), (6, 6), (5, 4, 3), (1,) * 12):
        _check(net, _parts(texts, *sizes), None, dtype, truth, per_batch=False)


def test_weighing_tokens_by_rows_would_be_wrong():
    """Negative control of the law before."""
    net = _filled(Head("causal"))
    parts = _parts(_texts("causal"), 5, 4, 3)
    truth = _top(_dense(net, lambda: net(**_texts("causal"))["loss"]))
    shares = [_dense(net, lambda b=b: net(**b)["loss"]) * len(b["labels"]) / 12 for b in parts]
    assert abs(_top(sum(shares)) - truth) > 0.01 * truth


@pytest.mark.parametrize("kind", HEADS)
def test_equal_labels_in_the_first_batch_do_not_mislead(kind):
    """Rows of the first batch have equal weights; the rule is found by ignoring some of its labels."""
    net = _filled(Head(kind))
    texts = _texts(kind)
    full = torch.arange(4, 10)
    for name in texts.keys() & {"attention_mask"}:
        texts[name][full] = 1
    if kind in ("causal", "masked"):
        texts["labels"][full] = texts["input_ids"][full]
    order = torch.tensor([*full.tolist(), 0, 1, 2, 3, 10, 11])
    texts = {name: value[order] for name, value in texts.items()}
    truth = _top(_dense(net, lambda: net(**texts)["loss"]))
    _check(net, _parts(texts, 6, 6), None, torch.float64, truth, per_batch=False)


@pytest.mark.parametrize("kind", ["both", "contrast"])
def test_a_models_own_loss_without_a_rule_is_refused(kind):
    """Two means over unlike numbers of labels; rows against each other. A single batch is taken whole."""
    net = _filled(Head(kind))
    texts = _texts(kind)
    with pytest.raises(
        isoflat.UsageError, match=r"several batches cannot be weighed.*model's own loss.*\(sum, count\)"
    ):
        isoflat.measure(net, _parts(texts, 5, 4, 3), None, **HOW)
    _check(net, [texts], None, torch.float64, _top(_dense(net, lambda: net(**texts)["loss"])), per_batch=True)


def test_a_data_set_of_mappings_is_one_batch_where_it_must_be():
    class Texts(Dataset):
        def __init__(self, texts):
            self.texts = texts

        def __len__(self):
            return len(self.texts["input_ids"])

        def __getitem__(self, place):
            return {name: value[place] for name, value in self.texts.items()}

    texts = _texts("contrast", rows=510)
    net = _filled(Head("contrast"))
    # The truth is a slope: the loss of so many rows against each other has no cheap dense Hessian.
    found = isoflat.measure_all(
        net, Texts(texts), None, measures=["hessian_spectral_norm"], geometry="euclidean", rtol=0.1
    )
    assert found[0].point.loss == pytest.approx(net(**texts)["loss"].item(), rel=1e-12)


def test_outputs_with_attributes_are_read_like_mappings():
    class Named(Head):
        def forward(self, **batch):
            return SimpleNamespace(**super().forward(**batch))

    net = _filled(Named("causal"))
    texts = _texts("causal")
    truth = _top(_dense(net, lambda: net(**texts).loss))
    _check(net, _parts(texts, 5, 4, 3), None, torch.float64, truth, per_batch=False)
