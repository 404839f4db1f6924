"""Batches in every usual form give the number of the plain loop that a user would write, or one line with the form to use."""

import copy
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import isoflat
from isoflat.risk.batches import as_batches, digest, move, tensors

CE = nn.CrossEntropyLoss()
ROWS = 23
DTYPES = (torch.float64, torch.float32)


def dense(model: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> float:
    """Eigenvalue of largest size of the Hessian in float64, by plain autograd."""
    wide = copy.deepcopy(model).double()
    parameters = list(wide.parameters())
    slopes = torch.autograd.grad(loss(wide), parameters, create_graph=True)
    slope = torch.cat([part.reshape(-1) for part in slopes])
    rows = []
    for entry in slope:
        row = torch.autograd.grad(entry, parameters, retain_graph=True)
        rows.append(torch.cat([part.reshape(-1) for part in row]))
    values = torch.linalg.eigvalsh(torch.stack(rows))
    return float(values[values.abs().argmax()])


def measured(model: nn.Module, data: Any, loss: Any, **options: Any) -> isoflat.Estimate:
    asked = {"measure": "hessian_spectral_norm", "geometry": "euclidean", **options}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        return isoflat.measure(model, data, loss, **asked)
    finally:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


def agrees(found: isoflat.Estimate, truth: float, dtype: torch.dtype = torch.float64) -> None:
    slack = 1e-9 if dtype is torch.float64 else 1e-4
    size = abs(truth)
    assert found.lower - slack * size <= size <= found.upper + slack * size, (found, truth)
    assert found.converged


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def classes(rows: int, count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, count, (rows,), generator=torch.Generator().manual_seed(seed))


def linear(inputs: int = 4, outputs: int = 3, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs).to(dtype)


X, Y = randn(ROWS, 4), classes(ROWS)
TRUTH = dense(linear(), lambda model: CE(model(X), Y))
Columns = namedtuple("Columns", ["a", "b"])


class Joined(nn.Module):
    """One argument that holds several tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(width, 3)

    def forward(self, parts):
        values = parts.values() if isinstance(parts, dict) else parts
        return self.layer(torch.cat([part.flatten(1) for part in values], 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [[ROWS], [9, 9, 5]], ids=["one", "ragged"])
@pytest.mark.parametrize(
    "hold",
    [
        lambda a, b: [a, b],
        lambda a, b: (a, b),
        lambda a, b: ([a, b],),
        lambda a, b: {"a": a, "b": b},
        Columns,
    ],
    ids=["list", "tuple", "packed", "dict", "named"],
)
def test_a_container_is_one_argument_where_the_model_takes_one(hold, cuts, dtype):
    a, b = randn(ROWS, 3, dtype=dtype), randn(ROWS, 2, 2, seed=2, dtype=dtype)
    net = Joined(7).to(dtype)
    truth = dense(net, lambda model: CE(model([a.double(), b.double()]), Y))
    batches = [
        (hold(*parts), target) for *parts, target in zip(a.split(cuts), b.split(cuts), Y.split(cuts), strict=True)
    ]
    agrees(measured(net, batches, CE), truth, dtype)


@pytest.mark.parametrize("measure", ["fisher_trace", "hessian_spectral_norm"])
def test_named_inputs_are_mapped_row_by_row(measure):
    """Row by row means under vmap, which must not take a container apart."""
    a, b = randn(ROWS, 3), randn(ROWS, 4, seed=2)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(7, 3, dtype=torch.float64)

        def forward(self, both):
            return self.layer(torch.cat([both.a, both.b], 1))

    net = Named()
    plain = nn.Sequential(net.layer)
    spread = measured(plain, (torch.cat([a, b], 1), Y), CE, measure=measure)
    found = measured(net, [(Columns(a, b), Y)], CE, measure=measure)
    assert found.value == pytest.approx(spread.value, rel=1e-9)


def test_several_inputs_and_their_targets_are_one_data_set():
    """Not two batches: the first would compare one input with the other."""
    net = nn.Bilinear(4, 4, 3).double()
    other = randn(ROWS, 4, seed=3)
    truth = dense(net, lambda model: CE(model(X, other), Y))
    for data in (((X, other), Y), ([X, other], Y), [((X, other), Y)], ({"input1": X, "input2": other}, Y)):
        agrees(measured(net, data, CE), truth)
    with pytest.raises(isoflat.DataError, match=r"tuple of 3 tensors.*\(\(x, tabular\), y\)"):
        measured(net, (X, other, Y), CE)
    with pytest.raises(isoflat.DataError, match=r"list of 3.*\(\(a, b\), targets\)"):
        measured(net, DataLoader(TensorDataset(X, other, Y), 5), CE)


def test_columns_are_cut_like_pairs():
    rows = [len(targets) for _, targets in as_batches(((torch.zeros(1100, 2), torch.zeros(1100)), torch.zeros(1100)))]
    assert rows == [500, 500, 100]


@pytest.mark.parametrize("kind", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize(
    "loss", [CE, lambda output, target: F.cross_entropy(output, target)], ids=["module", "function"]
)
def test_labels_of_any_whole_type(kind, loss):
    agrees(measured(linear(), (X, Y.to(kind)), loss), TRUTH)
    agrees(measured(linear(), (X.numpy(), Y.to(kind).numpy()), loss), TRUTH)


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


@pytest.mark.parametrize("stream", [lambda items: items, Stream], ids=["list", "stream"])
@pytest.mark.parametrize("number", [lambda y: y, int, lambda y: y.numpy()], ids=["tensor", "int", "numpy"])
def test_single_examples_are_put_together(stream, number):
    examples = [(x, number(y)) for x, y in zip(X, Y, strict=True)]
    found = measured(linear(), stream(examples), CE)
    agrees(found, TRUTH)
    assert any("single examples" in note for note in found.notes)
    assert not any("single examples" in note for note in measured(linear(), (X, Y), CE).notes)


def test_examples_of_unlike_shapes_are_batches_of_one():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear(2)

        def forward(self, x):
            return self.layer(x.mean(1))

    sequences = [randn(2 + k % 4, 2, seed=k) for k in range(9)]
    targets = classes(9)
    net = Mean()
    truth = dense(
        net, lambda model: sum(CE(model(s[None]), y[None]) for s, y in zip(sequences, targets, strict=True)) / 9
    )
    agrees(measured(net, list(zip(sequences, targets, strict=True)), CE), truth)


def test_a_stream_of_batches_is_left_alone_and_an_unclear_one_refused():
    agrees(measured(linear(), Stream(list(zip(X.split(9), Y.split(9), strict=True))), CE), TRUTH)
    vague = Stream(list(zip(X, randn(ROWS, 3, seed=5), strict=True)))
    with pytest.raises(isoflat.DataError, match=r"batch_size=\.\.\..*batch_size=None"):
        measured(linear(), vague, nn.MSELoss())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.core, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, packed):
        return self.head(self.core(packed)[1][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences(dtype):
    x, lengths = randn(ROWS, 6, 3, dtype=dtype), 1 + classes(ROWS, 6)
    net = Recurrent().to(dtype)

    def packed(rows: slice, kind: torch.dtype) -> Any:
        return pack_padded_sequence(x[rows].to(kind), lengths[rows], batch_first=True, enforce_sorted=False)

    truth = dense(net, lambda model: CE(model(packed(slice(None), torch.float64)), Y))
    agrees(measured(net, [(packed(slice(None), dtype), Y)], CE), truth, dtype)
    ragged = [(packed(slice(k, k + 9), dtype), Y[k : k + 9]) for k in range(0, ROWS, 9)]
    loss = isoflat.BatchLoss(lambda model, batch: (CE(model(batch[0]), batch[1]) * len(batch[1]), len(batch[1])))
    agrees(measured(net, ragged, loss), truth, dtype)


class Messages(nn.Module):
    """Message passing on a graph with all its nodes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, source, goal):
        hidden = torch.tanh(self.first(x))
        return self.second(torch.zeros_like(hidden).index_add(0, goal, hidden[source]))


class OfObject(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, graph):
        return self.inner(graph.x, *graph.edges)


SOURCE, GOAL = classes(60, ROWS, seed=7), classes(60, ROWS, seed=8)
EDGES = torch.stack([SOURCE, GOAL])


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    edges: torch.Tensor
    y: torch.Tensor
    name: str = "graph"


class Graph:
    """What libraries of graphs have: attributes, and a method that moves them."""

    def __init__(self, **parts: torch.Tensor) -> None:
        self.__dict__.update(parts)

    def to(self, *args: Any, **kwargs: Any) -> "Graph":
        return Graph(**{name: part.to(*args, **kwargs) for name, part in vars(self).items()})


class Booked:
    """A graph that keeps its tensors in a store of its own, and can be iterated."""

    def __init__(self, **parts: torch.Tensor) -> None:
        self._store = {"parts": dict(parts)}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._store["parts"][name]

    def __copy__(self) -> "Booked":
        return Booked(**self._store["parts"])

    def __iter__(self) -> Any:
        return iter(self._store["parts"].items())

    def to(self, *args: Any) -> "Booked":
        return self.apply(lambda part: part.to(*args))

    def apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Booked":
        self._store["parts"] = {name: change(part) for name, part in self._store["parts"].items()}
        return self

    def to_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._store["parts"])


OBJECTS = {
    "dataclass": lambda x: Frozen(x, EDGES, Y),
    "namespace": lambda x: SimpleNamespace(x=x, edges=EDGES, y=Y),
    "graph": lambda x: Graph(x=x, edges=EDGES, y=Y),
    "booked": lambda x: Booked(x=x, edges=EDGES, y=Y),
}
OF_GRAPH = isoflat.BatchLoss(lambda model, graph: (CE(model(graph), graph.y) * len(graph.y), len(graph.y)))


def graph_truth(x: torch.Tensor) -> float:
    return dense(Messages(), lambda model: CE(model(x.double(), SOURCE, GOAL), Y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", list(OBJECTS))
def test_objects_with_tensors(form, dtype):
    x = X.to(dtype)
    net, graph = OfObject(Messages()).to(dtype), OBJECTS[form](x)
    truth = graph_truth(x)
    for data in ([graph], graph):
        agrees(measured(net, data, OF_GRAPH), truth, dtype)
    agrees(measured(net, [(graph, Y)], CE), truth, dtype)
    assert graph.x is x  # the user's own is not touched


@pytest.mark.parametrize("geometry", ["euclidean", "layerwise", "auto"])
@pytest.mark.parametrize("check", ["refuse", "skip"])
def test_a_graph_is_never_cut(geometry, check):
    net = Messages().double()
    found = measured(
        net, [((X, SOURCE, GOAL), Y)], CE, geometry=geometry, check=check, measure="quotient_spectral_norm"
    )
    assert found.converged
    if geometry == "euclidean":
        agrees(found, graph_truth(X))


def test_a_graph_is_traced_on_all_its_nodes():
    net = Messages().double()
    found = isoflat.symmetries(net, (X, SOURCE, GOAL))
    assert len(found.args[0]) == ROWS
    few = isoflat.symmetries(linear(), X)
    assert len(few.args[0]) == 2  # what two rows tell is told by two


def test_sparse_adjacency():
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x, adjacency):
            return self.second(adjacency @ torch.tanh(self.first(adjacency @ x)))

    net = Convolution().double()
    adjacency = torch.sparse_coo_tensor(
        EDGES, torch.ones(EDGES.shape[1], dtype=torch.float64), (ROWS, ROWS), check_invariants=True
    )
    truth = dense(net, lambda model: CE(model(X, adjacency.to_dense()), Y))
    agrees(measured(net, [((X, adjacency), Y)], CE), truth)


def test_bags_with_offsets_are_taken_whole():
    torch.manual_seed(0)
    net = nn.Sequential(nn.EmbeddingBag(7, 3))
    bags, offsets = classes(40, 7), torch.arange(0, 40, 4)

    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(net[0].weight.detach().double())

        def forward(self, ids, starts):
            owner = torch.bucketize(torch.arange(len(ids)), starts, right=True) - 1
            return torch.zeros(len(starts), 3, dtype=self.table.dtype).index_add(0, owner, self.table[ids])

    target = classes(10)
    truth = dense(Bags(), lambda model: CE(model(bags, offsets), target))
    agrees(measured(Bags(), [((bags, offsets), target)], CE), truth)


def test_a_single_dict_is_a_batch():
    loss = isoflat.BatchLoss(
        lambda model, batch: (CE(model(batch["x"]), batch["y"]) * len(batch["y"]), len(batch["y"]))
    )
    agrees(measured(linear(), {"x": X, "y": Y}, loss), TRUTH)
    with pytest.raises(isoflat.DataError, match="BatchLoss"):
        measured(linear(), {"x": X, "y": Y}, CE)
    with pytest.raises(isoflat.DataError, match=r"\[tensor\]"):
        measured(linear(), X, CE)


def test_targets_in_tuples_and_dicts():
    """Two heads' worth of labels; ragged batches, so that a wrong number of rows would show."""
    other = classes(ROWS, seed=9)
    truth = dense(linear(), lambda model: (CE(model(X), Y) + CE(model(X), other)) / 2)
    pair = lambda output, target: (F.cross_entropy(output, target[0]) + F.cross_entropy(output, target[1])) / 2  # noqa: E731
    named = lambda output, target: (F.cross_entropy(output, target["a"]) + F.cross_entropy(output, target["b"])) / 2  # noqa: E731
    cut = list(zip(X.split([9, 9, 5]), Y.split([9, 9, 5]), other.split([9, 9, 5]), strict=True))
    agrees(measured(linear(), [(x, (a, b)) for x, a, b in cut], pair), truth)
    agrees(measured(linear(), [(x, {"a": a, "b": b}) for x, a, b in cut], named), truth)


class Labelled(Dataset):
    def __len__(self):
        return ROWS

    def __getitem__(self, place):
        return X[place], int(Y[place])


@pytest.mark.parametrize("size", [5, ROWS])
def test_dropped_examples_are_noted(size):
    found = measured(linear(), DataLoader(Labelled(), size, drop_last=True), CE)
    left = ROWS % size
    notes = [note for note in found.notes if "drop_last" in note]
    assert notes == ([f"the loader has drop_last=True: {left} of {ROWS} examples are left out"] if left else [])
    agrees(found, dense(linear(), lambda model: CE(model(X[: ROWS - left]), Y[: ROWS - left])))


class Drained(IterableDataset):
    """A dataset that reads on where it stopped."""

    def __init__(self, items):
        self.left = iter(items)

    def __iter__(self):
        yield from self.left


class SameIterator:
    def __init__(self, items):
        self.left = iter(items)

    def __iter__(self):
        return self.left


@pytest.mark.parametrize("measure", ["gradient_norm", "hessian_spectral_norm"])
@pytest.mark.parametrize(
    "once",
    [
        lambda: DataLoader(Drained(list(zip(X, Y, strict=True))), 5),
        lambda: Drained(list(zip(X, Y, strict=True))),
        lambda: SameIterator(list(zip(X.split(5), Y.split(5), strict=True))),
        lambda: (lambda left: lambda: left)(iter(list(zip(X.split(5), Y.split(5), strict=True)))),
    ],
    ids=["loader", "stream", "iterable", "function"],
)
def test_data_that_can_be_read_once(once, measure):
    """A measure of one pass would have lost the batch that the loss was tried on."""
    with pytest.raises(isoflat.IsoflatError, match=r"one-shot|two passes over the data differ"):
        measured(linear(), once(), CE, measure=measure)


@pytest.mark.parametrize("form", list(OBJECTS))
def test_objects_are_hashed_and_moved_leaf_by_leaf(form):
    one, other = OBJECTS[form](X), OBJECTS[form](X + 1)
    assert digest(one) == digest(OBJECTS[form](X.clone())) != digest(other)
    moved = move(one, torch.device("cpu"), torch.float32)
    assert moved.x.dtype is torch.float32
    assert moved.edges.dtype is torch.int64
    assert type(moved) is type(one)
    assert len(list(tensors(moved))) == 3
