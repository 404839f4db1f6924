"""Processes that share one measurement; the only module that knows `torch.distributed`.

Batches go round the ranks; weights, data and seeds are replicated. A sum over data is one `all_reduce`, which hands the
same bits to every rank (gloo and NCCL both reduce each entry in one place and copy it), so that all ranks run the same
solver on the same numbers. Each sum also carries a checksum of the vectors it is about: ranks that drift apart, for
instance on processors of two kinds, are refused instead of mixed.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from isoflat.core.errors import RankLost, RanksDiffer, UnsupportedModel
from isoflat.risk.foreign import translated

T = TypeVar("T")

TIMEOUT = 600.0
"""Seconds that a rank waits for the others, where the library starts the group."""

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun puts into the environment of each process."""

_LOST = (
    "a process of the group ended, or did not answer in time, so that the sum over its data is missing. Look for the "
    "first error in the output of the others; every process must make the same call (not rank 0 alone), and a slow one "
    "needs a longer timeout"
)


@final
@dataclass(frozen=True)
class BatchSum:
    """Share of one batch in a sum over data: its total, and its count."""

    total: Tensor
    count: float


@final
@dataclass(frozen=True)
class DataSum:
    """Sum over all batches.

    Attributes:
        total: sum of the batches' totals, float64; None where there was no batch.
        count: sum of their counts, the divisor of a mean.
        batches: number of batches on all ranks.
    """

    total: Tensor | None
    count: float
    batches: int


class _Failure(NamedTuple):
    """An error as other ranks can raise it too."""

    kind: type[Exception]
    message: str


class _Report(NamedTuple):
    """State of one rank beside its share of a sum, in whole numbers, which are exact in float64."""

    batches: int
    checksum: int
    failed: int


@final
@dataclass(frozen=True)
class Ranks:
    """The processes that share a measurement, and which of them this one is.

    Attributes:
        rank: number of this process.
        world: number of processes.
        ordered: flag that batches are added in their order, whatever the number of ranks: the same bits for
            all of them, at one broadcast per batch.

    >>> [index for index in range(7) if Ranks(rank=1, world=3).owns(index)]
    [1, 4]
    """

    rank: int = 0
    world: int = 1
    ordered: bool = False

    @staticmethod
    def here(ordered: bool = False) -> Ranks:
        """The ranks of the process group that this process is in; a single one where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return Ranks(ordered=ordered)
        return Ranks(dist.get_rank(), dist.get_world_size(), ordered)

    @property
    def first(self) -> bool:
        """Flag that this is the rank that prints and writes."""
        return self.rank == 0

    def owns(self, index: int) -> bool:
        """Test of whether the batch of this index is computed here."""
        return index % self.world == self.rank

    def most(self, batches: int) -> int:
        """Largest number of batches that one rank owns; all where the number of ranks must not change a choice."""
        return batches if self.ordered else -(-batches // self.world)

    def share(self, memory: int, device: torch.device) -> int:
        """Bytes that every rank can take of those that each finds free, where some may be on one machine.

        Raises:
            RankLost: a rank is gone.
        """
        if self.world == 1:
            return memory
        found = self._gather((memory, f"{socket.gethostname()} {device}"))
        places = [place for _, place in found]
        return min(free // places.count(place) for free, place in found)

    def add(self, items: Iterable[Any], share: Callable[[int, Any], BatchSum], like: Tensor) -> DataSum:
        """The sum of all batches' shares; the same bits on every rank.

        Args:
            items: one for each batch, in order; those of batches of other ranks are not looked at.
            share: function that gives a batch's share from its index and item.
            like: tensor of the shape and on the device of a total. Where it holds numbers, they are what is
                multiplied, and must be the same on all ranks.

        Raises:
            RanksDiffer: the ranks saw different numbers of batches, or multiply different vectors.
            RankLost: a rank is gone.
            Exception: what was raised on any rank while its parts were computed.
        """
        if self.world > 1:
            return self._in_order(items, share, like) if self.ordered else self._at_once(items, share, like)
        total: Tensor | None = None
        count, batches = 0.0, 0
        for index, item in enumerate(items):
            part = share(index, item)
            total = part.total.double() if total is None else total.add_(part.total)
            count += part.count
            batches += 1
        return DataSum(total, count, batches)

    @contextmanager
    def agreeing(self) -> Iterator[dict[str, str]]:
        """Work that every rank does for itself: where it fails on one, or comes out differently, it fails on all.

        Yields:
            Facts that must be the same on all ranks, by name; the block writes them down.

        Raises:
            RanksDiffer: the facts differ; the message says which, and where.
            RankLost: a rank is gone.
            Exception: what the block raised on any rank.

        >>> with Ranks().agreeing() as facts:
        ...     route = "reverse"
        ...     facts["route"] = route
        """
        facts: dict[str, str] = {}
        if self.world == 1:
            yield facts
            return
        failure: Exception | None = None
        try:
            yield facts
        except Exception as error:  # noqa: BLE001 (raised below, once the other ranks know)
            failure = error
        found = self._gather((_portable(failure), facts))
        self._settle([failed for failed, _ in found], failure)
        compare([theirs for _, theirs in found])

    def gather(self, value: T) -> list[T]:
        """Values of all ranks, by rank.

        Raises:
            RankLost: a rank is gone.
        """
        return [value] if self.world == 1 else self._gather(value)

    def from_first(self, value: T) -> T:
        """The value of rank 0.

        Raises:
            RankLost: a rank is gone.
        """
        if self.world == 1:
            return value
        held = [value]
        _collective(lambda: dist.broadcast_object_list(held, src=0))
        return held[0]

    def _at_once(self, items: Iterable[Any], share: Callable[[int, Any], BatchSum], like: Tensor) -> DataSum:
        """One collective: this rank's sum with the count and the reports of all ranks behind it."""
        size, device = like.numel(), _carrier(like.device)
        flat = torch.zeros(size + 1 + 3 * self.world, dtype=torch.float64, device=device)
        total, reports = flat[:size].view(like.shape), flat[size + 1 :].view(self.world, 3)
        failure: Exception | None = None
        batches = 0
        try:
            for index, item in enumerate(items):
                batches += 1
                if self.owns(index):
                    part = share(index, item)
                    total.add_(part.total.to(device))
                    flat[size] += part.count
        except Exception as error:  # noqa: BLE001 (raised by `_check`, once the other ranks know)
            failure = error
        reports[self.rank] = _reported(batches, like, failure)
        _collective(lambda: dist.all_reduce(flat))
        self._check(reports, failure)
        return DataSum(total.to(like.device) if batches else None, float(flat[size]), batches)

    def _in_order(self, items: Iterable[Any], share: Callable[[int, Any], BatchSum], like: Tensor) -> DataSum:
        """Round by round, a batch for each rank: all compute, then each part is sent to all and added in turn."""
        size, device = like.numel(), _carrier(like.device)
        source, total, count, batches = enumerate(items), None, 0.0, 0
        filled = self.world
        while filled == self.world:
            mine = torch.zeros(size + 1, dtype=torch.float64, device=device)
            failure: Exception | None = None
            filled = 0
            try:
                while filled < self.world and (found := next(source, None)) is not None:
                    filled += 1
                    if self.owns(found[0]):
                        part = share(*found)
                        mine[:size] = part.total.reshape(-1)
                        mine[size] = part.count
            except Exception as error:  # noqa: BLE001 (raised by `_check`, once the other ranks know)
                failure = error
            reports = torch.zeros(self.world, 3, dtype=torch.float64, device=device)
            reports[self.rank] = _reported(batches + filled, like, failure)
            _collective(lambda reports=reports: dist.all_reduce(reports))
            self._check(reports, failure)
            for slot in range(filled):
                sent = mine if slot == self.rank else torch.empty_like(mine)
                _collective(lambda sent=sent, slot=slot: dist.broadcast(sent, src=slot))
                total = sent[:size].clone() if total is None else total.add_(sent[:size])
                count += float(sent[size])
            batches += filled
        return DataSum(None if total is None else total.view(like.shape).to(like.device), count, batches)

    def _check(self, reports: Tensor, failure: Exception | None) -> None:
        """Raise on all ranks what one of them reports."""
        found = [_Report(*map(int, row)) for row in reports.tolist()]
        if any(report.failed for report in found):
            self._settle(self._gather(_portable(failure)), failure)
        compare([{"number of batches read": str(report.batches)} for report in found])
        compare([{"vectors that are multiplied": f"checksum {report.checksum:x}"} for report in found])

    def _settle(self, failures: Sequence[_Failure | None], own: Exception | None) -> None:
        """Raise the same error on all ranks, if there is one; each its own where all have failed."""
        failed = [rank for rank, failure in enumerate(failures) if failure is not None]
        if own is not None and len(failed) == self.world:
            raise own
        for rank in failed[:1]:
            kind, message = failures[rank]  # pyrefly: ignore
            error = kind.__new__(kind)
            error.args = (f"rank {rank}: {message}",)
            raise error from own

    def _gather(self, value: Any) -> list[Any]:
        held: list[Any] = [None] * self.world
        _collective(lambda: dist.all_gather_object(held, value))
        return held


def compare(facts: Sequence[Mapping[str, str]]) -> None:
    """See that every rank has the same facts.

    Args:
        facts: facts of each rank, by rank.

    Raises:
        RanksDiffer: one has other facts than most; the lowest rank is right where there is no majority.

    >>> compare([{"seed": "1"}, {"seed": "0"}, {"seed": "0"}])
    Traceback (most recent call last):
    isoflat.core.errors.RanksDiffer: rank 0 differs from rank 1 in seed (1 on rank 0, 0 on rank 1). All ranks must ...
    """
    usual = max(facts, key=facts.count)
    odd = [rank for rank, own in enumerate(facts) if own != usual]
    if not odd:
        return
    own, place = facts[odd[0]], facts.index(usual)
    names = [name for name in {**usual, **own} if usual.get(name) != own.get(name)]
    listed = ", ".join(
        f"{name} ({own.get(name, 'none')} on rank {odd[0]}, {usual.get(name, 'none')} on rank {place})"
        for name in names[:3]
    )
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    who = f"rank {odd[0]} differs" if len(odd) == 1 else f"ranks {', '.join(map(str, odd))} differ"
    raise RanksDiffer(
        f"{who} from rank {place} in {listed}{more}. All ranks must be given the same network, weights, data and "
        "settings; all of the data in the same order, too: isoflat shares it out (no DistributedSampler)"
    )


def launched() -> bool:
    """Test of whether this process was started by torchrun, or by a launcher that sets the same variables."""
    return all(name in os.environ for name in _LAUNCHED)


def own_device(device: torch.device | None) -> torch.device | None:
    """The device of this process: of several processes on one machine each takes the accelerator of its number."""
    if device is None or device.type != "cuda" or device.index is not None or not launched():
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined(device: torch.device | None = None, timeout: float = TIMEOUT) -> Iterator[None]:
    """Join the group that torchrun started, for the time of a block; a group that is there already is left alone.

    Args:
        device: device of this process; on an accelerator sums go through NCCL, elsewhere through gloo.
        timeout: number of seconds after which a rank that does not answer is given up.

    Raises:
        RankLost: the others did not come.
    """
    if not launched() or not dist.is_available() or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)
        # Without it a lost rank ends this process from a thread of NCCL's own, with no message of ours.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        backend = "cpu:gloo,cuda:nccl"
    _collective(lambda: dist.init_process_group(backend, timeout=timedelta(seconds=timeout)))
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_whole(module: nn.Module) -> None:
    """Refuse networks whose parameters are spread over processes.

    Raises:
        UnsupportedModel: a parameter is a DTensor, or part of the network is wrapped in FSDP.
    """
    # What has not been imported has no instances; importing it would take seconds.
    sharding, tensors = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor"))
    wrapped = [
        name or "the model"
        for name, part in module.named_modules()
        if sharding is not None and isinstance(part, sharding.FullyShardedDataParallel)
    ]
    spread = [
        name
        for name, held in module.named_parameters()
        if tensors is not None and isinstance(held.data, tensors.DTensor)
    ]
    if wrapped or spread:
        what = f"'{wrapped[0]}' is wrapped in FSDP" if wrapped else f"parameter '{spread[0]}' is a DTensor"
        raise UnsupportedModel(
            f"{what}: its values are spread over processes, and products need them whole. Gather them with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) (or FSDP.summon_full_params), load them into a plain copy "
            "of the network on every rank, and measure that"
        )


def _collective(call: Callable[[], T]) -> T:
    """A collective, whose failure means that a rank is gone."""
    try:
        return call()
    except RuntimeError as error:
        raise RankLost(_LOST) from error


def _carrier(device: torch.device) -> torch.device:
    """Device through which a sum is exchanged: NCCL alone cannot reach the host's memory."""
    if device.type == "cpu" and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _reported(batches: int, like: Tensor, failure: Exception | None) -> Tensor:
    return torch.tensor([batches, _checksum(like), failure is not None], dtype=torch.float64)


def _checksum(tensor: Tensor) -> int:
    """Checksum of the bits of a floating-point tensor, below 2⁵²; 0 for others. Whole numbers: the order of adding is free."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    bits = tensor.detach().contiguous().view(torch.int64 if tensor.dtype.itemsize == 8 else torch.int32)
    return int((bits * bits).sum()) % 2**52


def _portable(failure: Exception | None) -> _Failure | None:
    """An error in a form that any rank can raise: of its own type where all ranks know it."""
    if failure is None:
        return None
    failure = translated(failure) or failure
    kind = type(failure)
    if kind.__module__.partition(".")[0] in ("builtins", "torch", "isoflat"):
        return _Failure(kind, str(failure))
    return _Failure(RankLost, f"{kind.__name__}: {failure}")
