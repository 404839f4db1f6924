"""Go through the traced network and find the bases that can be changed."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.finding.bases.rotary import commute, run_from
from isoflat.symmetry.finding.bases.rules import RULES, fixed, held
from isoflat.symmetry.finding.bases.tensor_axes import TensorAxes
from isoflat.symmetry.finding.graph import TracedGraph, arguments
from isoflat.symmetry.finding.untraceable import UNFORESEEN
from isoflat.symmetry.finding.values import Activation, Known, StoredTensor


def propagate_bases(
    graph: TracedGraph, known: Mapping[Node, Known], foldable: frozenset[str], normalised: frozenset[Node]
) -> TensorAxes:
    """Go through the operations in order and write down which axes of stored tensors carry units that may be mixed.

    Args:
        graph: the traced network.
        known: values that depend on neither parameters nor input.
        foldable: vectors after normalisations that can be folded into what reads them.
        normalised: nodes that hold what a normalisation written by hand gives.
    """
    tensor_axes = TensorAxes(foldable, normalised)
    constant = _constants(graph, known)
    values: dict[Node, Any] = {}
    for node, value in graph.inputs.items():
        values[node] = fixed(node) if isinstance(value, Activation) else value
    values |= constant
    done: set[Node] = set()
    for node in graph.nodes:
        if node.op == "output":
            held(tensor_axes, node, *(values[part] for part in node.all_input_nodes))
        if node.op != "call_function" or node in values or node in done:
            continue
        values[node] = _step(tensor_axes, node, values)
        if isinstance(values[node], Tensor) and bool(values[node].any()):
            run = run_from(node, constant)
            if run is not None:
                commute(tensor_axes.partition, run, values[node], constant)
                values[run.nodes[-1]] = values[node]
                done.update(run.nodes)
    for units in tensor_axes.squares.values():
        tensor_axes.partition.hold(units)
    return tensor_axes


def _constants(graph: TracedGraph, known: Mapping[Node, Known]) -> dict[Node, Known]:
    """Values that no parameter and no input enters.

    Buffers, such as the frequencies of rotary embeddings, are taken as they are: no change of basis reaches them.
    """
    tensors = dict(graph.module.named_buffers())
    made = dict(known)
    for node in graph.nodes:
        stored = graph.inputs.get(node)
        if isinstance(stored, StoredTensor) and stored.name in tensors:
            made[node] = Known(tensors[stored.name].detach())
        sources = node.all_input_nodes
        if node.op != "call_function" or node in made or not sources or not all(part in made for part in sources):
            continue
        operation: Any = node.target
        args, kwargs = arguments(node, lambda part: made[part].value)
        made[node] = Known(operation(*args, **kwargs))
    return made


def _step(tensor_axes: TensorAxes, node: Node, values: Mapping[Node, Any]) -> Any:
    if node.target is operator.getitem:
        return values[node.args[0]][node.args[1]]  # pyrefly: ignore
    args, kwargs = arguments(node, values.__getitem__)
    if not isinstance(node.target, torch._ops.OpOverload):
        return held(tensor_axes, node, *args, **kwargs)
    rule = RULES.get(str(node.target), held)
    try:
        return rule(tensor_axes, node, *args, **kwargs)
    except UNFORESEEN:
        if rule is held:
            raise
        return held(tensor_axes, node, *args, **kwargs)  # what the rule has written down by now only holds more
