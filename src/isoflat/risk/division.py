"""Decision whether batches may be cut and merged, and by what they are weighed: by experiment on the rows themselves.

Where rows may not be taken apart, because the loss of a batch is no weighted mean over its rows or because rows meet inside
the network, batches stay as they are, and their size and order are part of the number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from isoflat.core.errors import UsageError
from isoflat.core.raised import first_line
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.risk.batches import Weighted, alone, chosen, leading, merged, move, rows_of
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.losses import BY_ROWS, BatchLoss, Loss, ModelLoss, PerBatchLoss, TargetLoss, Term, split
from isoflat.risk.separability import (
    REFUSALS,
    Judge,
    MeanTest,
    NoMeanOverRows,
    OfOutputs,
    Share,
    SumOverRows,
    distance,
    reraise_unrelated,
    splits,
    spread,
    tolerance,
    with_change,
)
from isoflat.risk.tokens import LabelCount, guesses, thinned

FEW = 16
"""Rows of an experiment."""

TRIALS = 8
"""Batches, at most, on which a rule of weights is looked for."""

UNKNOWN = "the tensors of a batch do not agree on a number of rows"
"""Reason why nothing is known of rows."""

MEETING = "the output of a row changes with the other rows of its batch"
"""Reason why rows of some networks cannot be taken apart."""


def settled(risk: EmpiricalRisk, state: State) -> EmpiricalRisk:
    """The risk with batches that stay as they are where rows meet in the network, and a model's own loss with its weights.

    A few rows of the first batch are evaluated together and in two parts.

    Raises:
        UsageError: it is not known how to weigh several batches.
        DataError: the data comes in batches of a size that was asked for, and that would decide about the number.
    """
    first = list(islice(risk.batches, TRIALS if isinstance(risk.loss, ModelLoss) else 1))
    if not first:
        return risk
    if isinstance(risk.loss, ModelLoss):
        return _weighed(risk, risk.loss, state, first)
    why = _meeting(risk, state, first[0])
    return risk if why is None else replace(risk, batches=risk.batches.kept(why))


def undivided(risk: EmpiricalRisk, found: NoMeanOverRows) -> EmpiricalRisk:
    """The risk that a training loop minimises batch by batch, of a loss that proved to be no mean over rows.

    Raises:
        UsageError: several batches cannot be weighed, or the loss is a sum.
        DataError: the data comes in batches of a size that was asked for.
    """
    loss, why = risk.loss, re.sub(r"^rank \d+: ", "", str(found))  # where it was found out is no part of the reason
    batches = risk.batches.kept(why)
    several = len(list(islice(batches, 2))) > 1
    if isinstance(found, SumOverRows) and (several or isinstance(loss, TargetLoss)):
        raise UsageError(
            f"the loss function is not a mean over rows: {why}. Return a mean, or pass an isoflat.BatchLoss that returns "
            "(sum, count)"
        )
    if isinstance(loss, TargetLoss) and loss.claimed_mean is not None:
        notes = tuple(note for note in loss.notes if note != BY_ROWS)
        whole = PerBatchLoss(loss.claimed_mean, loss.scores, notes=notes, logits=loss.logits)
        return replace(risk, batches=batches, loss=whole)
    if isinstance(loss, BatchLoss):
        return replace(risk, batches=batches, loss=replace(loss, equally=True))
    if several:
        raise UsageError(_unweighed(why))
    return replace(risk, batches=batches)


def notes(risk: EmpiricalRisk, rows: int, batches: int) -> tuple[str, ...]:
    """Notes on batches that stay as they are, for the reader of a number.

    Args:
        risk: the empirical risk.
        rows: number of examples.
        batches: number of batches.
    """
    why = risk.batches.whole
    if why is None:
        return ()
    if why == UNKNOWN:
        return (f"batches were taken as they are, neither cut nor merged: {why}",) if batches > 1 else ()
    equal = isinstance(risk.loss, PerBatchLoss) or (isinstance(risk.loss, BatchLoss) and risk.loss.equally)
    each = ", each of which counts the same" if equal and batches > 1 else ""
    what = f"{batches} batches of {rows} rows in all{each}" if batches > 1 else f"one batch of {rows} rows"
    return (
        f"a per-batch loss, of {what}: {why}. Batches were neither cut nor merged; their size and order are part of the "
        "number",
    )


def told(notes: Sequence[str], before: Loss, after: Loss) -> list[str]:
    """Notes on a measurement, with those on a loss replaced by what was found out about it."""
    left = [note for note in notes if note not in before.notes or note in after.notes]
    return [*left, *(note for note in after.notes if note not in left)]


def _unweighed(why: str) -> str:
    return (
        f"a mean over each of several batches cannot be weighed, because {why}. Pass isoflat.BatchLoss(fn) with "
        "fn(model, batch) -> (sum, count), or give the data as a single batch"
    )


def _meeting(risk: EmpiricalRisk, state: State, batch: Any) -> str | None:
    """The reason why rows of a batch may not be taken apart, as a few of them show; None where they may."""
    rows = leading(batch)
    if rows is None:
        return UNKNOWN
    if risk.batches.together is not None and rows < FEW:  # the library cut them, and may as well merge them
        held = list(islice(risk.batches, -(-FEW // rows)))
        batch = merged(held)
        rows = rows_of(batch)
    if rows < 2:
        return None
    few = spread(batch, rows, FEW)
    try:
        found = _apart(risk, state, few)
        if found > tolerance(state.dtype) and state.dtype is not torch.float64:
            found = _confirmed(risk, state, few, found)
    except REFUSALS as error:
        reraise_unrelated(error)
        with torch.no_grad():
            risk.term(state, batch)  # what fails here as well is no question of rows
        return f"network or loss cannot be evaluated on some rows of a batch without the others ({first_line(error)})"
    if found <= tolerance(state.dtype) or not _repeats(risk, state, few):
        return None
    if isinstance(risk.loss, TargetLoss):
        return MEETING
    return "the loss of some rows is not the sum of the losses of two parts of them"


def _confirmed(risk: EmpiricalRisk, state: State, few: Any, found: float) -> float:
    """The distance in float64, in units of what rounding explains in the state's precision."""
    try:
        wide = _apart(risk, state.to(dtype=torch.float64), few)
    except REFUSALS as error:
        reraise_unrelated(error)
        return found if found > torch.finfo(state.dtype).eps ** 0.5 else 0.0
    return found if wide > tolerance(torch.float64) else 0.0


def _apart(risk: EmpiricalRisk, state: State, few: Any) -> float:
    """Relative distance of a few rows by themselves from the same in company: in output, or else in loss and count."""
    loss = risk.loss
    rows = rows_of(few)
    with torch.no_grad():
        if not isinstance(loss, TargetLoss):
            whole = risk.term(state, few)
            if whole.mean:  # it is compared at every batch
                return 0.0
            pair = next(splits(few, rows))
            return distance(_share(whole), [_share(risk.term(state, part)) for part in pair])

        def output(part: Any) -> Tensor:
            inputs, target = split(move(alone(part), state.device, state.dtype))
            made = risk.network(state, partial(loss.output, inputs=inputs))
            with risk.network.following(state):
                z = loss.packed(made, target)[1]
            return z.detach().reshape(rows_of(part), -1).double()

        order = torch.randperm(rows, generator=stream(0, "company"))
        size = max(1, rows // 3)
        together = output(few)
        parts = [output(chosen(few, places, rows)) for places in (order[:size], order[size:])]
    if any(part.shape[1] != together.shape[1] for part in parts):
        return float("inf")
    return _gap(together[order.to(together.device)], torch.cat(parts))


def _gap(one: Tensor, other: Tensor) -> float:
    """Largest difference in units of the largest entry; entries that are infinite alike do not count."""
    gap = torch.where(one == other, 0.0, (one - other).abs())
    finite = one[one.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    largest = float(gap.max()) if gap.numel() else 0.0
    if largest != largest:
        return float("inf")
    return largest / scale if scale else largest


def _repeats(risk: EmpiricalRisk, state: State, few: Any) -> bool:
    """Test of whether the loss is no matter of chance; where it is, a survey refuses it in better words."""
    losses = []
    with torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            losses.append(float(risk.term(state, few).total.detach()))
    return abs(losses[0] - losses[1]) <= 1000 * torch.finfo(state.dtype).eps * abs(losses[0])


def _share(term: Term) -> Share:
    return Share(float(term.total.detach()), float(term.count))


def _weighed(risk: EmpiricalRisk, loss: ModelLoss, state: State, first: Sequence[Any]) -> EmpiricalRisk:
    """The risk of a model's own loss, weighed by the labels or rows that it proves to be a mean over."""
    found: list[LabelCount | None] = [*guesses(first[0], risk.network.module), None]
    for batch in first:
        found, told_apart = _rules(risk, state, batch, found)
        if told_apart:
            break
    if found:
        rule, *rivals = found
        note = loss.notes if rule is None else (f"the model's own mean loss is weighted by {rule}",)
        return replace(risk, loss=replace(loss, count=rule, rivals=tuple(rivals), notes=note))
    why = "the model's own loss is a mean over neither rows nor labels that could be found"
    if leading(first[0]) is None:
        why = f"what the model's own loss is a mean over cannot be told, since {UNKNOWN}"
    if len(first) > 1 and risk.batches.together is None:
        raise UsageError(_unweighed(why))
    return replace(risk, batches=risk.batches.kept(why), loss=replace(loss, notes=()))


def _rules(
    risk: EmpiricalRisk, state: State, batch: Any, left: list[LabelCount | None]
) -> tuple[list[LabelCount | None], bool]:
    """Rules by which the losses of parts of a few rows add up to those of the rows; None stands for their number.

    Returns:
        The rules, and whether those that are left count alike, or there is none.
    """
    rows = leading(batch)
    if rows is None:
        return [], True
    names = {rule.name for rule in left if rule is not None}
    masks = {rule.mask for rule in left if rule is not None and rule.mask is not None}
    # Fewer rows are repeated: unlike labels are ignored in each.
    places = torch.arange(min(max(rows, FEW // 2), FEW)) % rows
    few = chosen(batch, places, rows)
    trials = [few]
    if isinstance(few, Mapping):
        trials += [thinned(few, blank, masks, len(places)) for blank in (names | masks, names) if names]
    counts: dict[LabelCount | None, tuple[float, ...]] = dict.fromkeys(left, ())
    for trial in trials:
        seen = _tried(risk, state, trial, len(places))
        if seen is None:
            if trial is few:
                return [], True
            continue
        dtype, whole, parts = seen
        left = [rule for rule in left if _fits(rule, whole, parts, tolerance(dtype))]
        counts = {rule: (*counts[rule], *(one.share(rule).weight for one in (whole, *parts))) for rule in left}
    return left, len(set(counts.values())) < 2 and all(map(any, counts.values()))


@dataclass(frozen=True)
class _Tried:
    """A model's own loss on some rows, with its derivative in a random direction."""

    rows: Any
    values: Tensor

    def share(self, rule: LabelCount | None) -> Share:
        """Share by a rule: nothing where nothing counts, whose mean is no number."""
        weight = float(rows_of(self.rows)) if rule is None else rule(self.rows)
        values = self.values * weight if weight else torch.zeros_like(self.values)
        return Share(float(values[0]), weight, values[1:])


def _fits(rule: LabelCount | None, whole: _Tried, parts: Sequence[_Tried], allowed: float) -> bool:
    try:
        return distance(whole.share(rule), [part.share(rule) for part in parts]) <= allowed
    except REFUSALS:  # entries that this rule needs have other shapes here
        return False


def _tried(
    risk: EmpiricalRisk, state: State, few: Any, rows: int
) -> tuple[torch.dtype, _Tried, tuple[_Tried, ...]] | None:
    """A few rows, and parts of them; None where the model refuses them."""
    failed: Exception | None = None
    for dtype in dict.fromkeys((torch.float64, state.dtype)):
        wide = state.to(dtype=dtype)
        try:
            whole = _evaluated(risk, wide, few)
            pair = next(splits(few, rows, "labels"))
            return dtype, whole, tuple(_evaluated(risk, wide, part) for part in pair)
        except REFUSALS as error:
            reraise_unrelated(error)
            failed = error
    assert failed is not None
    return None


def _evaluated(risk: EmpiricalRisk, state: State, rows: Any) -> _Tried:
    """The model's own loss on some rows."""
    assert isinstance(risk.loss, ModelLoss)
    plain = replace(risk, loss=replace(risk.loss, count=None))
    leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in state.parameters.items()}
    with torch.enable_grad():
        term = plain.term(state.replace(leaves), rows)
        mean = term.total / term.count
    slope = 0.0
    if mean.requires_grad:
        slopes = torch.autograd.grad(mean, list(leaves.values()), allow_unused=True)
        for (name, leaf), part in zip(leaves.items(), slopes, strict=True):
            along = torch.randn(leaf.shape, generator=stream(0, "direction", name), dtype=torch.float64)
            slope += 0.0 if part is None else float((part.double().cpu() * along).sum())
    return _Tried(rows, torch.tensor([float(mean.detach()), slope], dtype=torch.float64))


@final
@dataclass
class MeanProof:
    """Proof, over a first pass, that the loss of every batch is the weighted mean that it was taken for.

    Attributes:
        risk: the empirical risk.
        state: the point.
        test: comparisons of batches with parts of them.
        judge: evaluates the loss of some rows; None before the first batch.
        unknown: numbers of batches whose rows are not known.
        ratios: counts by rules that fit as well as the one that is used, over the count by that.
    """

    risk: EmpiricalRisk
    state: State
    test: MeanTest = field(default_factory=MeanTest)
    judge: Judge | None = None
    unknown: list[int] = field(default_factory=list)
    ratios: list[tuple[float, ...]] = field(default_factory=list)

    @staticmethod
    def of(risk: EmpiricalRisk, state: State) -> MeanProof | None:
        """A proof; None where nothing has to be proved."""
        loss = risk.loss
        if isinstance(loss, TargetLoss):
            return None if loss.claimed_mean is None else MeanProof(risk, state)
        free = risk.batches.whole is None or risk.batches.whole == UNKNOWN
        own = (isinstance(loss, BatchLoss) and not loss.equally) or isinstance(loss, ModelLoss)
        return MeanProof(risk, state) if own and free else None

    def batch(self, index: int, batch: Any, term: Term, output: Any = None) -> None:
        """Look at one batch.

        Args:
            index: number of the batch.
            batch: the batch.
            term: its contribution.
            output: output of the network, where the loss is a function of it.

        Raises:
            NoMeanOverRows: the loss is no mean over rows.
            UsageError: it is a mean over rows that are not known.
            DataError: outputs are compared with the targets of other rows.
        """
        if isinstance(batch, Weighted):  # a part of data that was looked at as a whole
            return
        if isinstance(self.risk.loss, TargetLoss) and self.risk.loss.claimed_mean is not None:
            self._outputs(index, batch, term, output)
        elif term.mean or self.risk.batches.together is not None:
            self._rows(index, batch, term)

    def finish(self, batches: int) -> None:
        """Compare all batches with each other, on all processes alike.

        Args:
            batches: number of batches.
        """
        ranks, here = self.risk.ranks, self.test.kept
        if ranks.world > 1:
            here = {form: [_placed(rows, torch.device("cpu")) for rows in held] for form, held in here.items()}
        facts = ranks.gather((self.unknown, self.ratios, here))
        if any(unknown for unknown, _, _ in facts) and batches > 1:
            raise UsageError(_unweighed(UNKNOWN))
        ratios = [own for _, theirs, _ in facts for own in theirs]
        if any(not _same(one, ratios[0]) for one in ratios):
            raise UsageError(
                _unweighed("several rules fit the first batch of the model's own loss, and differ on others")
            )
        kept = [held for _, _, held in facts]
        if ranks.world > 1:
            place = self.state.device
            kept = [{form: [_placed(rows, place) for rows in held] for form, held in own.items()} for own in kept]
        if self.judge is not None:
            self.test.finish(kept, self.judge, alike=not isinstance(self.risk.loss, ModelLoss))

    def _outputs(self, index: int, batch: Any, term: Term, output: Any) -> None:
        loss = term.loss or self.risk.loss
        assert isinstance(loss, TargetLoss) and loss.claimed_mean is not None
        _, target = split(move(alone(batch), self.state.device, self.state.dtype))
        output = move(output, self.state.device, self.state.dtype)
        rows = with_change(output, target, index)
        count = leading(rows)
        if count is None:
            raise NoMeanOverRows("output and targets do not agree on a number of rows")
        if self.judge is None:
            self.judge = OfOutputs.of(loss.claimed_mean, rows, self.state.dtype).judge
        self.test.batch(index, rows, count, self.judge)

    def _rows(self, index: int, batch: Any, term: Term) -> None:
        rows = leading(batch)
        if rows is None:
            if term.mean:
                self.unknown.append(index)
                if index:
                    raise UsageError(_unweighed(UNKNOWN))
            return
        if isinstance(self.risk.loss, ModelLoss) and term.count:
            rivals = (rows_of(batch) if rule is None else rule(batch) for rule in self.risk.loss.rivals)
            self.ratios.append(tuple(count / term.count for count in rivals))
        if self.judge is None:
            finer = None
            if self.state.dtype is not torch.float64:
                finer = Judge(partial(_reckoned, self.risk, self.state.to(dtype=torch.float64)), torch.float64)
            self.judge = Judge(partial(_reckoned, self.risk, self.state), self.state.dtype, finer)
        self.test.batch(index, batch, rows, self.judge, many=1)


def _placed(rows: Any, device: torch.device) -> Any:
    """Rows on a device, as they are."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), rows)


def _reckoned(risk: EmpiricalRisk, state: State, rows: Any) -> Share:
    with torch.no_grad():
        return _share(risk.term(state, rows))


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    allowed = tolerance(torch.float64)
    return all(abs(a - b) <= allowed * abs(b) for a, b in zip(one, other, strict=True))
