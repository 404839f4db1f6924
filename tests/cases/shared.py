"""Measurements that run in every process of a group; returned as plain numbers."""

import copy
import os
import time
import warnings
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

import isoflat
from cases.group import Answer, attempt
from cases.networks import Case, mlp
from isoflat.core.rng import stream
from isoflat.core.space import norm
from isoflat.measurement.subject import subject
from isoflat.measures.settings import Settings
from isoflat.risk.ranks import Ranks
from isoflat.risk.routes.reverse import Recomputed


def ragged(case: Case, sizes) -> list:
    return list(zip(case.inputs.split(sizes), case.targets.split(sizes), strict=True))


def ignoring(case: Case, rows) -> Case:
    """The case with targets that do not count."""
    targets = case.targets.clone()
    targets[rows] = -100
    return replace(case, targets=targets)


def subjects() -> dict:
    """Networks with data: name -> (net, data, criterion)."""
    case = mlp((3, 5, 4), bias=True, seed=1)
    sparse = ignoring(case, [0, 1, 2, 5, 6, 11])  # the first batch has no target that counts, the others unlike numbers
    squares = nn.Sequential(copy.deepcopy(case.net), nn.Linear(4, 2, dtype=torch.float64))
    torch.manual_seed(3)
    targets = torch.randn(12, 2, dtype=torch.float64)
    for parameter in squares[1].parameters():
        nn.init.normal_(parameter)
    return {
        "ragged batches": (case.net, ragged(case, [5, 1, 4, 2]), case.criterion),
        "ignored targets": (sparse.net, ragged(sparse, [3, 4, 1, 2, 2]), sparse.criterion),
        "one batch": (case.net, [case.data], case.criterion),
        "cut by the library": (case.net, case.data, case.criterion),
        "a sum": (case.net, ragged(case, [7, 3, 2]), nn.CrossEntropyLoss(reduction="sum")),
        "squares": (squares, ragged(replace(case, targets=targets), [6, 6]), nn.MSELoss()),
    }


def numbers(ordered: bool, dtype: str = "float64") -> dict[str, list[float]]:
    """Everything that is a sum over data."""
    found = {}
    ranks = Ranks.here(ordered)
    for name, (net, data, criterion) in subjects().items():
        target = subject(net, data, criterion, Settings(dtype=dtype))
        batches = target.risk.batches if ordered else target.risk.batches.among(ranks.world)
        risk = replace(target.risk, ranks=ranks, batches=batches)
        state, survey = target.state, risk.survey(target.state)
        vectors = torch.randn(state.space.size, 3, generator=torch.Generator().manual_seed(0), dtype=state.dtype)
        kept = Recomputed(risk, state).keep()
        assert sum(graph is not None for graph in kept.graphs) <= -(-len(kept.graphs) // ranks.world)
        found[name] = [
            risk.value(state),
            survey.loss,
            survey.accuracy or 0.0,
            survey.chance or 0.0,
            float(survey.rows),
            survey.count,
            *survey.gradient.tolist(),
            *kept.products(vectors).ravel().tolist(),
            *Recomputed(risk, state).products(vectors).ravel().tolist(),
        ]
    return found


PLACES = {"ragged batches": ["auto", "layerwise"], "one batch": ["layerwise"]}
"""Geometries of what is measured; every process traces the network once more, so that one subject has to do for that, and
none where sums are in order, which no geometry knows of."""


def measured(ordered: bool = False, dtype="float64"):
    """The public function: value and enclosure, by subject, measure and geometry; and the estimates in full."""
    values, texts = {}, []
    for name, (net, data, criterion) in subjects().items():
        if name in PLACES:
            table = isoflat.measure_all(
                net,
                data,
                criterion,
                measures=["quotient_spectral_norm"],
                geometry=["layerwise"] if ordered else PLACES[name],
                dtype=dtype,
                reproducible_sum=ordered,
            )
            for row in table:
                estimate = row.estimate
                values[f"{name}: {row.measure}, {row.geometry}"] = [estimate.value, estimate.lower, estimate.upper]
                texts.append(row.to_json())
    return values, texts


def equality(ordered: bool, dtype: str = "float64"):
    return numbers(ordered, dtype), *measured(ordered, dtype=dtype)


LEFT: dict[int, int] = {}
"""Calls until a `Tripped` network acts, by its `id`: kept outside of it, since passes leave no traces in a network."""


class Tripped(nn.Module):
    """A network that does something at its n-th call."""

    def __init__(self, inner: nn.Module, calls: int, act) -> None:
        super().__init__()
        self.inner, self.act = inner, act
        LEFT[id(self)] = calls

    def forward(self, x):
        if id(self) in LEFT:  # a copy does nothing
            LEFT[id(self)] -= 1
            if LEFT[id(self)] == 0:
                self.act()
        return self.inner(x)


class Swinging:
    """Batches that come out otherwise at the n-th pass."""

    def __init__(self, batches, passes: int) -> None:
        self.batches, self.left = batches, passes

    def __iter__(self):
        self.left -= 1
        return iter(self.batches if self.left else self.batches[::-1])


def refusals() -> dict[str, Answer]:
    """What becomes of measurements in which rank 1 is given something else than the others."""
    odd = dist.get_rank() == 1
    plain = mlp((3, 5, 4), bias=True, seed=1)
    batches = ragged(plain, [5, 1, 4, 2])

    def bent(change):
        case = mlp((3, 5, 4), bias=True, seed=1)
        if odd:
            change(case.net)
        return case.net

    def go(net=plain.net, data=batches, loss=plain.criterion, **settings):
        return attempt(lambda: isoflat.measure(net, data, loss, geometry="layerwise", budget=40, **settings).value)

    def fail():
        raise RuntimeError("no room on this device")

    def spoil(net):
        net[0].weight.data[0, 0] = float("nan")

    return {
        "weights": go(bent(lambda net: net[2].bias.data.add_(1e-9))),
        "network": go(bent(lambda net: net.__setitem__(1, nn.Tanh()))),
        "frozen": go(bent(lambda net: net[0].requires_grad_(False))),
        "mode": go(bent(lambda net: net.append(nn.Dropout().train()))),
        "nan": go(bent(spoil)),
        "constant": go(bent(lambda net: net.register_forward_hook(lambda _, args, out: 2 * out))),
        "data": go(data=batches[::-1] if odd else batches),
        "shard": go(data=batches[dist.get_rank() :: dist.get_world_size()]),
        "missing batch": go(data=batches[:-1] if odd else batches),
        "swinging": go(data=Swinging(batches, 4 if odd else 10**9)),
        "seed": go(seed=int(odd)),
        "tolerance": go(rtol=1e-4 if odd else 1e-3),
        "precision": go(dtype="float32" if odd else None),
        "argument": go(measure="no_such_measure"),
        "seconds": attempt(
            lambda: isoflat.measure(plain.net, batches, plain.criterion, budget=isoflat.Budget(seconds=1.0))
        ),
        "failure": go(Tripped(plain.net, 9 if odd else 10**9, fail)),
        "after all that": go(),
    }


def accidents(memory: int | None) -> list[tuple[str, str, float]]:
    """What becomes of a measurement in which one rank fails at its n-th use of the network, for many n."""
    case = mlp((3, 5, 4), bias=True, seed=1)
    batches = ragged(case, [5, 1, 4, 2])

    def fail(message):
        raise RuntimeError(message)

    found = []
    for message in ("planted", "can't allocate memory: planted"):
        for call in range(1, 46, 2 if memory else 15):
            net = Tripped(case.net, call if dist.get_rank() == 1 else 10**9, lambda message=message: fail(message))
            budget = isoflat.Budget(products=40, memory=memory)
            answer = attempt(
                lambda net=net, budget=budget: isoflat.measure(net, batches, case.criterion, budget=budget)
            )
            found.append((answer.error, answer.message, answer.value.value if answer.value else 0.0))
    return found


def lost(how: str, ordered: bool = False):
    """Rank 1 ends, or hangs, in the middle."""
    case = mlp((3, 5, 4), bias=True, seed=1)
    act = {"ends": lambda: os._exit(7), "hangs": lambda: time.sleep(600)}[how]
    net = Tripped(case.net, 15 if dist.get_rank() == 1 else 10**9, act)
    batches = ragged(case, [5, 1, 4, 2])
    isoflat.measure(net, batches, case.criterion, geometry="layerwise", rtol=1e-9, reproducible_sum=ordered)


def lost_before(how: str):
    """Rank 1 never comes."""
    if dist.get_rank() == 1:
        {"ends": lambda: os._exit(7), "hangs": lambda: time.sleep(600)}[how]()
    case = mlp((3, 5, 4), bias=True, seed=1)
    isoflat.measure(case.net, case.data, case.criterion, geometry="layerwise")


def drifting():
    """Products whose vectors differ in the last bit on one rank."""
    case = mlp((3, 5, 4), bias=True, seed=1)
    target = subject(case.net, ragged(case, [5, 1, 4, 2]), case.criterion)
    vectors = torch.ones(target.state.space.size, 2, dtype=torch.float64)
    if dist.get_rank() == 1:
        vectors[3, 1] += torch.finfo(torch.float64).eps
    return norm(Recomputed(replace(target.risk, ranks=Ranks.here()), target.state).products(vectors)[:, 0])


def wrapped():
    """The number with and without DDP around the network, and whether everything is as it was."""
    case = mlp((3, 5, 4), bias=True, seed=1)
    net = nn.parallel.DistributedDataParallel(case.net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random, flags = torch.get_rng_state(), (net.training, torch.is_grad_enabled(), torch.get_num_threads())
    plain = isoflat.measure(case.net, case.data, case.criterion, geometry="layerwise")
    inside = isoflat.measure(net, case.data, case.criterion, geometry="layerwise")
    untouched = (
        all(bool((tensor == before[name]).all()) for name, tensor in net.state_dict().items())
        and all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
        and bool((torch.get_rng_state() == random).all())
        and flags == (net.training, torch.is_grad_enabled(), torch.get_num_threads())
        and dist.is_initialized()
    )
    return plain.value, inside.value, inside.notes, untouched


def sharded():
    """Parameters spread over processes, and the remedy."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    case = mlp((3, 5, 4), bias=True, seed=1)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    spread = copy.deepcopy(case.net)
    fully_shard(spread, mesh=mesh)
    refused = attempt(lambda: isoflat.measure(spread, case.data, case.criterion))
    with warnings.catch_warnings(action="ignore"):  # a single process has nothing to shard
        old = FullyShardedDataParallel(copy.deepcopy(case.net), device_id=torch.device("cpu"))
    refused_too = attempt(lambda: isoflat.measure(old, case.data, case.criterion))
    whole = copy.deepcopy(case.net)
    whole.load_state_dict(get_model_state_dict(spread, options=StateDictOptions(full_state_dict=True)))
    values = [isoflat.measure(net, case.data, case.criterion, geometry="layerwise").value for net in (case.net, whole)]
    return refused, refused_too, values


def sampled():
    """A number from a sample: value, ends, and how many examples were drawn."""
    net, (x, y) = confident(6000)
    found = isoflat.measure(net, (x, y), nn.CrossEntropyLoss(), geometry="layerwise", rtol=0.2, sample="auto")
    return found.value, found.lower, found.upper, next(note for note in found.notes if note.startswith("sampled: "))


def confident(rows):
    """A network that is sure of most of its examples, and right: their labels are its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double().eval()
    x = torch.randn(rows, 6, generator=stream(0, "sampled"), dtype=torch.float64)
    with torch.no_grad():
        net[2].weight.mul_(30)
        return net, (x, net(x).argmax(1))
