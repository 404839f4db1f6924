"""The empirical risk: a weighted sum over data, and the only loop over data in the library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar, final

import torch
from torch import Tensor

from isoflat.core.errors import DataError, NondeterministicRisk, NonFinite, UsageError
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.risk.batches import Batches, Weighted, alone, digest, move, rows_of, tensors
from isoflat.risk.dense import dense
from isoflat.risk.losses import Loss, TargetLoss, Term, call, importance, split
from isoflat.risk.network import Network
from isoflat.risk.ranks import BatchSum, Ranks

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Survey:
    """Results of one plain gradient pass over the data.

    Attributes:
        loss: empirical risk.
        gradient: gradient of the risk, shape `(n,)`, float64; empty after a screening, which has none.
        accuracy: share of correct predictions; None where undefined.
        chance: accuracy of always predicting the most frequent class; None where undefined.
        rows: number of examples.
        count: number of counted targets, or sum of their weights.
        digests: hash of each batch.
        unused: names of trainable tensors that the loss does not depend on.
        hardness: `‖∂ total/∂z‖` of each row of the data, z the model's output, shape `(rows,)` (`risk.parts`), or its
            importance after a screening (`losses.importance`); None where the output does not have the rows.
        seconds: duration of the pass: the unit of cost.
    """

    loss: float
    gradient: Tensor
    accuracy: float | None
    chance: float | None
    rows: int
    count: float
    digests: tuple[str, ...]
    unused: tuple[str, ...]
    hardness: Tensor | None
    seconds: float


class Observer(Protocol):
    """Observer of every batch of a first pass over the data."""

    def batch(self, index: int, batch: Any, term: Term, output: Any = None) -> None:
        """Look at one batch of this process.

        Args:
            index: number of the batch.
            batch: the batch.
            term: its contribution.
            output: output of the network, where the loss is a function of it.
        """

    def finish(self, batches: int) -> None:
        """Conclude after the last of so many batches, on all processes alike."""


@final
@dataclass(frozen=True)
class EmpiricalRisk:
    """`L(θ) = Σ_b total_b(θ) / Σ_b count_b`, with parameters entering only through the state.

    Every batch is weighted by its counted targets, so that the batch size, a ragged last batch or ignored targets
    change nothing; nor does the number of processes that share the batches.

    Attributes:
        network: model as a function of its tensors.
        loss: loss of a batch.
        batches: data in a fixed order.
        ranks: processes that share the data.
        of: divisor of a mean where the data is a part of more data; None for the data's own count.
    """

    network: Network
    loss: Loss
    batches: Batches
    ranks: Ranks = field(default_factory=Ranks)
    of: float | None = None

    def term(self, state: State, batch: Any) -> Term:
        """One batch's summed loss, as a function of the state's tensors; rows count by their weights, if they have any."""
        return self.network(state, self._of_model(state, batch))

    def _of_model(self, state: State, batch: Any) -> Callable[[Any], Term]:
        """One batch's summed loss, as a function of the model."""
        moved = move(alone(batch), state.device, state.dtype)
        loss = self.loss
        if isinstance(batch, Weighted):
            if not isinstance(loss, TargetLoss):
                raise UsageError("rows have weights in losses of output and target only")
            loss = loss.weighted(batch.weights)
        return partial(loss, batch=moved)

    def target(self, state: State, batch: Any) -> Any:
        """Target that the loss compares the output of a batch with; None where the model computes its own loss."""
        return split(move(alone(batch), state.device, state.dtype))[1] if isinstance(self.loss, TargetLoss) else None

    def accumulate(
        self, per_batch: Callable[[int, Any], BatchSum], like: Tensor, over: Iterable[Any] | None = None
    ) -> Tensor:
        """`Σ total / Σ count` over the batches, added in float64: the only loop over data there is.

        Of several processes each reads all batches and computes its own; all return the same bits.

        Args:
            per_batch: function that gives one batch's share from its index and content.
            like: tensor of the shape and on the device of a total: the vectors that are multiplied, so that every
                process is seen to multiply the same, or integers.
            over: items to run over instead of the batches: one for each, such as a kept graph; items of
                batches that other processes own are not looked at.

        Raises:
            DataError: there is no data, or no target counts.
            RanksDiffer: the processes do not compute the same.
            RankLost: a process is gone.
        """
        found = self.ranks.add(self.batches if over is None else over, per_batch, like)
        if found.total is None:
            raise DataError("the data is empty: the loader gave no batch")
        count = found.count if self.of is None else self.of
        if not count > 0:
            raise DataError(f"no target counts in any of the {found.batches} batches: are all of them ignored?")
        return found.total.div_(count) if self.loss.averages else found.total

    def own(self, make: Callable[[int, Any], T]) -> Iterator[T | None]:
        """Results of `make` for each batch of this process, from its index and content; None for those of others."""
        for index, batch in enumerate(self.batches):
            yield make(index, batch) if self.ranks.owns(index) else None

    def value(self, state: State) -> float:
        """The empirical risk at a state."""

        def per_batch(index: int, batch: Any) -> BatchSum:
            term = self.term(state, batch)
            return BatchSum(term.total.detach().reshape(1).double(), term.count)

        return float(self.accumulate(per_batch, _shape(1, state)))

    def outputs(self) -> Callable[[State], Tensor]:
        """The model's output on the first batch, as a function of the state."""
        inputs, _ = split(alone(next(iter(self.batches))))

        def output(state: State) -> Tensor:
            moved = move(inputs, state.device, state.dtype)
            made = self.network(state, partial(call, inputs=moved, whole=True))
            if isinstance(made, Tensor):
                return made.detach()
            return torch.cat([part.detach().reshape(-1) for part in tensors(made) if part.is_floating_point()])

        return output

    def pinned(self, survey: Survey) -> EmpiricalRisk:
        """The same risk, whose data must from now on come out as at the survey."""
        return replace(self, batches=self.batches.pinned(survey.digests))

    def survey(self, state: State, observer: Observer | None = None) -> Survey:
        """Loss, gradient and accuracy in one plain gradient pass, with every check that needs the data.

        Args:
            state: the point.
            observer: what else looks at each batch; None for nothing.

        Raises:
            DataError: there is nothing to measure on.
            NonFinite: loss or gradient is NaN or infinite in some batch.
            NondeterministicRisk: the loss of one batch is random.
            UnsupportedModel: the forward pass writes into trainable tensors.
            IsoflatError: whatever the observer refuses.
        """
        self._probe(state)
        tally = _Tally(state)

        def per_batch(index: int, batch: Any) -> BatchSum:
            leaves = leaf_state(state)
            term = self.term(leaves, batch)
            parameters = list(leaves.parameters.values())
            hard = term.z is not None and term.z.requires_grad and term.z.ndim > 0 and len(term.z) == term.rows
            gradients = differentiate(term.total, [*parameters, term.z] if hard and term.z is not None else parameters)
            slope = gradients.pop() if hard else None
            tally.hardness[index] = None if slope is None else slope.detach().reshape(len(slope), -1).norm(dim=1).cpu()
            tally.show(observer, index, batch, term, term.z)
            return BatchSum(torch.cat([tally.loss(index, term), *tally.gradient(index, gradients)]), term.count)

        return self._surveyed(tally, per_batch, 1 + state.space.size, observer)

    def screen(self, state: State, observer: Observer | None = None) -> Survey:
        """Loss, accuracy and each row's importance in one forward pass; no gradient.

        Args:
            state: the point.
            observer: as for `survey`.

        Raises:
            UsageError: the loss is no function of output and target, or the output does not have the rows.
            IsoflatError: as for `survey`.
        """
        self._probe(state)
        tally, loss = _Tally(state), self.loss
        if not isinstance(loss, TargetLoss):
            raise UsageError(
                "sample='auto' weighs examples by the loss of each, and needs a torch.nn criterion or a function of output "
                f"and target; {loss.label} has one for the whole batch only: leave sample out"
            )

        def per_batch(index: int, batch: Any) -> BatchSum:
            inputs, target = split(move(alone(batch), state.device, state.dtype))
            output = self.network(state, partial(loss.output, inputs=inputs))
            with self.network.following(state):
                own, z = loss.packed(output, target)
            z = z.detach().requires_grad_(True)
            if z.ndim == 0 or len(z) != rows_of(batch):
                raise UsageError(
                    f"sample='auto' needs one row of output for each example, got shape {tuple(z.shape)} for "
                    f"{rows_of(batch)} examples: leave sample out"
                )
            with self.network.following(state):
                term = own.of(z, target, len(z))
            mixed = own.criterion is None
            tally.hardness[index] = importance(term.total, z, stream(0, "importance", index), mixed)
            tally.show(observer, index, batch, term, z)
            return BatchSum(tally.loss(index, term), term.count)

        return self._surveyed(tally, per_batch, 1, observer)

    def _surveyed(
        self, tally: _Tally, per_batch: Callable[[int, Any], BatchSum], entries: int, observer: Observer | None
    ) -> Survey:
        """The survey that a pass over the data makes of a tally, whose batches' totals have so many entries."""
        started = time.monotonic()
        mean = self.accumulate(per_batch, _shape(entries, tally.state), over=tally.digesting(self.batches))
        seconds = time.monotonic() - started - tally.observing
        if observer is not None:
            with self.ranks.agreeing():
                observer.finish(len(tally.digests))
        if self.ranks.world > 1:
            tally.join(self.ranks.gather(tally.counts))
        return tally.survey(mean, seconds)

    def _probe(self, state: State) -> None:
        """Check the first batch twice, under different random streams.

        The second time the model has what it kept from the first: a loss that depends on that is none of the weights.
        """
        with self.ranks.agreeing() as facts:
            batch = next(iter(self.batches), None)
            if batch is None:
                raise DataError("the data is empty: the loader gave no batch")
            loss = self._of_model(state, batch)

            def twice(model: Any) -> list[float]:
                found = []
                for seed in (1, 2):
                    torch.manual_seed(seed)
                    found.append(float(loss(model).total.detach()))
                return found

            losses = self.network(state, twice)
            tolerance = 1000 * torch.finfo(state.dtype).eps * abs(losses[0])
            if abs(losses[0] - losses[1]) > tolerance:
                raise NondeterministicRisk(
                    f"the loss of batch 0 is random: {losses[0]:.8g}, then {losses[1]:.8g} on the same data and weights. "
                    "Call model.eval() and switch off dropout, noise and sampling in the forward pass, and whatever it keeps "
                    "from one call for the next"
                )
            facts["loss of the first batch"] = f"{losses[0]:.4g}"


_COUNTED = ("rows", "count", "correct", "counted", "classes", "used", "hardness")


class _Tally:
    """Accumulator of everything that a survey gathers beside the gradient."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.digests: list[str] = []
        self.rows = 0
        self.count = 0.0
        self.correct = 0
        self.counted = 0
        self.classes = torch.zeros(0, dtype=torch.int64)
        self.used = [False] * len(state.parameters)
        self.hardness: dict[int, Tensor | None] = {}
        self.observing = 0.0

    def digesting(self, batches: Batches) -> Iterator[Any]:
        """The batches, each hashed on the way."""
        for batch in batches:
            self.digests.append(digest(batch))
            yield batch

    def show(self, observer: Observer | None, index: int, batch: Any, term: Term, z: Tensor | None) -> None:
        """Show a batch to an observer; its seconds are no part of a plain pass, which is the unit of cost."""
        if observer is not None:
            started = time.monotonic()
            observer.batch(index, batch, term, z)
            self.observing += time.monotonic() - started

    def loss(self, index: int, term: Term) -> Tensor:
        """Count a batch's rows and predictions; returns its summed loss, shape `(1,)`, float64."""
        total = term.total.detach().reshape(1).double()
        if not bool(torch.isfinite(total).all()):
            raise NonFinite(f"the loss of batch {index} is {float(total)}: check its inputs and targets for NaN")
        self.rows += term.rows
        self.count += term.count
        if term.output is not None and term.target is not None:
            self.correct += int((term.output.argmax(-1) == term.target).sum())
            self.counted += term.target.numel()
            found = term.target.bincount(minlength=len(self.classes)).cpu()
            found[: len(self.classes)] += self.classes
            self.classes = found
        return total

    def gradient(self, index: int, gradients: list[Tensor | None]) -> list[Tensor]:
        """A batch's gradient, tensor by tensor, in float64."""
        tensors = []
        for j, (name, parameter) in enumerate(self.state.parameters.items()):
            gradient = gradients[j]
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            elif not bool(torch.isfinite(gradient).all()):
                raise NonFinite(f"the gradient of '{name}' in batch {index} is NaN or infinite, though the loss is not")
            else:
                self.used[j] = True
            tensors.append(gradient.reshape(-1).double())
        return tensors

    @property
    def counts(self) -> Mapping[str, Any]:
        """Counts over the batches that this process owns."""
        return {name: getattr(self, name) for name in _COUNTED}

    def join(self, counts: list[Mapping[str, Any]]) -> None:
        """Put what all processes counted in the place of one's own."""
        for name in ("rows", "count", "correct", "counted"):
            setattr(self, name, sum(own[name] for own in counts))
        self.classes = torch.zeros(max(len(own["classes"]) for own in counts), dtype=torch.int64)
        for own in counts:
            self.classes[: len(own["classes"])] += own["classes"]
        self.used = [any(used) for used in zip(*(own["used"] for own in counts), strict=True)]
        self.hardness = {index: rows for own in counts for index, rows in own["hardness"].items()}

    def survey(self, mean: Tensor, seconds: float) -> Survey:
        """The survey from the accumulated mean."""
        counted = self.counted
        return Survey(
            loss=float(mean[0]),
            gradient=mean[1:],
            accuracy=self.correct / counted if counted else None,
            chance=int(self.classes.max()) / counted if counted else None,
            rows=self.rows,
            count=self.count,
            digests=tuple(self.digests),
            hardness=self._hardness(),
            unused=tuple(name for name, used in zip(self.state.parameters, self.used, strict=True) if not used),
            seconds=seconds,
        )

    def _hardness(self) -> Tensor | None:
        """Hardness of all rows in the order of the data; None where it is not known."""
        found = [rows for _, rows in sorted(self.hardness.items()) if rows is not None]
        return torch.cat(found) if found and len(found) == len(self.hardness) else None


def _shape(size: int, state: State) -> Tensor:
    """The shape and place of a total of so many entries, where no vectors have it."""
    return torch.zeros(size, dtype=torch.int8, device=state.device)


def leaf_state(state: State) -> State:
    """The state with its trainable tensors as fresh leaves of a graph, sharing memory."""
    leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in state.parameters.items()}
    return State(leaves, state.frozen, state.buffers)


def differentiate(total: Tensor, leaves: list[Tensor], keep: bool = False) -> list[Tensor | None]:
    """Gradients of a summed loss; None for leaves it does not depend on."""
    if not total.requires_grad:
        return [None] * len(leaves)
    return [dense(part) for part in torch.autograd.grad(total, leaves, create_graph=keep, allow_unused=True)]
