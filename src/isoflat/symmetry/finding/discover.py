"""Find a network's continuous symmetries by tracing it: units inference over the operations."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from isoflat.core.errors import IsoflatError, UsageError
from isoflat.core.state import State
from isoflat.symmetry.finding.axes import Readers
from isoflat.symmetry.finding.bases.accept import accepted, unproved
from isoflat.symmetry.finding.bases.families import families, scales
from isoflat.symmetry.finding.bases.propagate import propagate_bases
from isoflat.symmetry.finding.caches import caches_of, traceable
from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.finding.declared import declare
from isoflat.symmetry.finding.gains import foldable
from isoflat.symmetry.finding.graph import TracedGraph, arguments, aside, skeleton, trace
from isoflat.symmetry.finding.logical import blocks
from isoflat.symmetry.finding.means import means
from isoflat.symmetry.finding.rows import all_inputs, inputs_of, on_few_rows
from isoflat.symmetry.finding.rules import Rule, rules
from isoflat.symmetry.finding.rules.elementwise import nonlinear
from isoflat.symmetry.finding.solve import effective, movable_offsets, scaling, translation
from isoflat.symmetry.finding.untraceable import UNFORESEEN, unsupported
from isoflat.symmetry.finding.values import Activation, Known, StoredTensor, Value
from isoflat.symmetry.found import Counted, Found
from isoflat.symmetry.groups.basis import BasisChange, Family
from isoflat.symmetry.groups.declared import UnitScale
from isoflat.symmetry.groups.translation import common
from isoflat.symmetry.relations import Form, Solution
from isoflat.symmetry.report import UNCLAIMED, SymmetryLine


def symmetries(
    model: nn.Module,
    example: Any,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    further_rules: Mapping[str, Rule] | None = None,
    declared: Sequence[UnitScale] = (),
    verify: bool = True,
) -> Found:
    """The continuous reparametrisations of a network that keep its function, found by tracing it and proved on it.

    The network is traced as it evaluates (`eval`), once, on the example; claims hold for inputs of its shape, and any
    number of rows. Operations without a rule fix what they touch, so that unknown code can only make the group smaller.

    Args:
        model: any module that `torch.export` can trace; it is not changed.
        example: an input with two rows or more, a tuple of positional inputs, or a mapping of keyword inputs. Where the network
            does not run on two of its rows, such as on two nodes of a graph, it is traced on all.
        loss: function of output and class targets; given, and found to ignore a constant added to all scores of an example
            (softmax cross-entropy), that direction of the head is a symmetry too.
        further_rules: rules beside those of the package, by the full overload name of the operation
            (`"mylib.op.default"`); see `symmetry.rules`.
        declared: symmetries of your own, to be proved like the others.
        verify: apply random elements to the network in float64 before anything is returned.

    Raises:
        UnsupportedModel: the network cannot be traced.
        UsageError: the example has no rows, or a rule of the user's own fails.
        SymmetryViolated: a symmetry that was found changes the output: a wrong rule.
        NondeterministicRisk: the output is random.
        NonFinite: no output is a number.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> found = symmetries(net, torch.randn(5, 4))
    >>> found.scaling.dimension
    3
    """

    def find(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Found:
        blind = loss is not None and ignores_common_score(model, args, kwargs, loss)
        return discover(model, args, kwargs, blind, further_rules, declared)

    with searching(model):
        inputs_of(example)  # an example without rows is refused before anything runs
        args, kwargs = all_inputs(example)
        with torch.random.fork_rng(devices=[]), traceable(model, caches_of(model, args, kwargs)):
            found = on_few_rows(args, kwargs, find)
        if found.constraints.averages and not found.averages_hold(args, kwargs):
            found = found.without_averages()
    if verify:
        found.verify()
    return found


@contextmanager
def searching(model: nn.Module) -> Iterator[None]:
    """Whatever goes wrong while symmetries are looked for, said in one line.

    Raises:
        UnsupportedModel: something did that isoflat does not refuse on purpose.
    """
    try:
        yield
    except IsoflatError:
        raise
    except Exception as error:
        raise unsupported("the network's symmetries cannot be found", error, model) from error


def discover(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    blind: bool = False,
    further: Mapping[str, Rule] | None = None,
    declared: Sequence[UnitScale] = (),
    counted: Counted | None = None,
) -> Found:
    """Trace, propagate units, solve; nothing is proved yet.

    Args:
        model: any module that `torch.export` can trace.
        args: positional inputs with two rows or more.
        kwargs: keyword inputs.
        blind: whether the loss ignores a constant added to all scores of an example.
        further: rules beside those of the package.
        declared: symmetries of the user's own.
        counted: entries of the output that the loss looks at; None for all.

    Raises:
        UnsupportedModel: the network cannot be traced.
    """
    own = further or {}
    known = {**rules(), **{name: _of_user(name, rule) for name, rule in own.items()}}
    graph = trace(model, args, kwargs, known.__contains__)
    readers = Readers(graph, blind)
    constraints, values = propagate(graph, known, readers)
    tensors = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
    for symmetry in declared:
        declare(symmetry, constraints, State(tensors))
    solution = effective(constraints, constraints.scales.solve())
    folded = frozenset(
        name for name, fine in foldable(constraints, solution, scaling(constraints, solution)).items() if fine.all()
    )
    constants = {node: value for node, value in values.items() if isinstance(value, Known)}
    tensor_axes = propagate_bases(graph, constants, folded, frozenset(constraints.normalised))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    basis = _diagonals_too(
        constraints, solution, families(tensor_axes.settle(), tensor_axes.by_region, tensor_axes.gains), shapes
    )
    shifts = translation(constraints)
    movable = movable_offsets(shifts)
    lost = (
        mean for mean in means(graph, readers) if {mean.gain} <= {None, *folded} and {mean.offset} <= {None, *movable}
    )
    found = Found(
        model,
        skeleton(graph.module),
        args,
        kwargs,
        constraints,
        solution,
        exact_forms(constraints),
        shifts,
        common(tuple(lost), shapes),
        basis,
        {},
        blind,
        counted,
    )
    precise = found.precise()  # a network that was traced on rows which it cannot run on is refused here
    left = accepted(basis, precise, found.output)
    return replace(
        found,
        basis=left,
        blocks=blocks(graph, left),
        left_out=tuple(
            SymmetryLine(UNCLAIMED, f.count * f.freedom, f.names, ("outputs at random weights are no numbers",))
            for f in unproved(basis, left, precise, found.output)
        ),
    )


def _diagonals_too(
    constraints: Constraints, solution: Solution, found: Sequence[Family], shapes: Mapping[str, torch.Size]
) -> BasisChange:
    """Changes of basis whose coordinates can also be scaled: the two walks must agree."""

    def scaled(family: Family) -> bool:
        if family.orthogonal:
            return True
        rows = (solution.rows(torch.tensor(ids)) for ids in scales(constraints.fields, family, shapes))
        return all(bool((np.diff(matrix.indptr) > 0).all()) for matrix in rows)

    return BasisChange(tuple(filter(scaled, found)))


def propagate(graph: TracedGraph, known: Mapping[str, Rule], readers: Readers) -> tuple[Constraints, dict[Node, Value]]:
    """Go through the operations in order and write down what they relate.

    Args:
        graph: the traced network.
        known: rules by overload name.
        readers: directions to which all readers of a node are blind.
    """
    first = {id(module): path for path, module in graph.module.named_modules()}

    def epsilon_of(node: Node, value: float) -> str | None:
        """One path for a module that has several."""
        try:
            path, dot, name = (graph.epsilon_of(node, value) or "").rpartition(".")
        except AttributeError:  # not the path of a module: a slice of a list, called in a loop
            return None
        return f"{first[id(graph.module.get_submodule(path))]}{dot}{name}" if name else None

    constraints = Constraints(
        where=graph.where,
        epsilon_of=epsilon_of,
        centred=graph.centred,
        forgets=readers.subtract,
        varies=graph.varies,
    )
    values: dict[Node, Value] = dict(graph.inputs)
    for node in graph.nodes:
        if node.op == "get_attr":  # a branch of a control-flow operation
            values[node] = Known(None)
        elif node.op == "call_function":
            values[node] = _step(constraints, node, known, values)
    for node in graph.outputs:
        value = values[node]
        constraints.scales.pin(constraints.activation(value, "output").scale, "output")
        shift = constraints.activation(value, "output").shift
        if readers.blind and len(graph.outputs) == 1 and shift.ndim > 1:
            constraints.shifts.along(shift, *(axis for axis in range(shift.ndim) if axis != 1))
        else:
            constraints.shifts.pin(shift, "output")
        if isinstance(value, StoredTensor):
            constraints.rigid[value.name] = "output"
    constraints.settle()
    return constraints, values


def exact_forms(constraints: Constraints) -> tuple[Form, ...]:
    """Linear forms that must vanish for a rescaling to be exact though normalisations have an epsilon.

    An epsilon that a module holds moves with its factor; several factors behind one epsilon must be equal, and one that
    nothing holds cannot move at all.
    """
    forms: list[Form] = []
    held: dict[str, int] = {}
    for norm in constraints.norms:
        for factor in norm.factors:
            if norm.epsilon == 0:
                continue
            if norm.constant is None:
                forms.append({factor: Fraction(1)})
            elif held.setdefault(norm.constant, factor) != factor:
                forms.append({factor: Fraction(1), held[norm.constant]: Fraction(-1)})
    return tuple(forms)


def ignores_common_score(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss: Callable[[Tensor, Tensor], Tensor]
) -> bool:
    """Test whether a loss of scores and classes is the same when a constant is added to all scores of each example."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        scores = aside(model)(*args, **kwargs)
        scores = getattr(scores, "logits", scores)
        if not isinstance(scores, Tensor) or scores.ndim < 2 or not scores.is_floating_point():
            return False
        scores = scores.detach().double()
        targets = torch.randint(scores.shape[1], (scores.shape[0], *scores.shape[2:]), device=scores.device)
        shifts = torch.randn(scores.shape[0], 1, *scores.shape[2:], dtype=torch.float64).to(scores.device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a loss that broadcasts was not made for class indices
                before, after = loss(scores, targets), loss(scores + shifts, targets)
        except (RuntimeError, ValueError, TypeError, IndexError, UserWarning):
            return False  # no loss of scores and class indices
    # Classes that are switched off have scores of minus infinity, which say nothing about the size of the others.
    scale = float(before.abs().max() + scores.masked_fill(~scores.isfinite(), 0.0).abs().max())
    return math.isfinite(scale) and bool((before - after).abs().max() <= 1e-12 * scale)


def _step(constraints: Constraints, node: Node, known: Mapping[str, Rule], values: Mapping[Node, Value]) -> Value:
    """The value of one operation."""
    args, kwargs = arguments(node, values.__getitem__)
    name = str(node.target)
    if node.target is operator.getitem:  # taking one of several results
        return args[0][args[1]] if not isinstance(args[0], Known) else Known(args[0].value[args[1]])
    if not isinstance(node.target, torch._ops.OpOverload):
        return nonlinear(constraints, node, *args, **kwargs)  # control flow
    if not _any_unknown((args, list(kwargs.values()))) and torch.Tag.nondeterministic_seeded not in node.target.tags:
        return Known(node.target(*_plain(args), **{key: _plain(value) for key, value in kwargs.items()}))
    rule = known.get(name, nonlinear)
    try:
        return rule(constraints, node, *args, **kwargs)
    except IsoflatError:
        raise
    except UNFORESEEN as error:
        # What a rule has written down by now only ties or holds more; what goes in is held, and the report says so.
        if rule is nonlinear:
            raise
        reason = f"{constraints.where(node)}: no rule for this use of it ({type(error).__name__})"
        constraints.pin([*args, *kwargs.values()], reason)
        return nonlinear(constraints, node)


def _of_user(name: str, rule: Rule) -> Rule:
    """A rule of the user's own, whose errors are his."""

    def called(constraints: Constraints, node: Node, *args: Any, **kwargs: Any) -> Any:
        try:
            return rule(constraints, node, *args, **kwargs)
        except Exception as error:
            raise UsageError(
                f"the rule given for {name} failed on {constraints.where(node)} ({type(error).__name__}: {error}): a rule is "
                "called with constraints, node and the operation's own arguments, and returns a value (isoflat.symmetry.rules)"
            ) from error

    return called


def _any_unknown(part: Any) -> bool:
    if isinstance(part, list | tuple):
        return any(map(_any_unknown, part))
    return isinstance(part, Activation | StoredTensor)


def _plain(part: Any) -> Any:
    if isinstance(part, list | tuple):
        return [_plain(item) for item in part]
    return part.value if isinstance(part, Known) else part
