"""One traced run of a network: operations in order, with stored tensors by their canonical names."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn.attention import SDPBackend, sdpa_kernel

from isoflat.core.errors import UnsupportedModel
from isoflat.core.raised import first_line
from isoflat.symmetry.finding.values import Known, StoredTensor, Value, shifted_only


@final
@dataclass(frozen=True)
class TracedGraph:
    """A network as `torch.export` sees it.

    Attributes:
        nodes: operations in the order of execution.
        inputs: values of the placeholders, by node.
        outputs: nodes that leave the network.
        module: the traced module; its tensors are the user's, its structure is a copy.
    """

    nodes: tuple[Node, ...]
    inputs: Mapping[Node, Value]
    outputs: tuple[Node, ...]
    module: nn.Module

    def where(self, node: Node) -> str:
        """The operation and the module that it comes from, in words."""
        space, name, *_ = [*str(node.target).split("."), ""]
        operation = name if space == "aten" else f"{space}.{name}".strip(".")
        path, kind = self._place(node)
        return f"{operation} ('{path}')" if path else f"{operation} ({kind})" if kind else operation

    def epsilon_of(self, node: Node, value: float) -> str | None:
        """Path of the module attribute that holds an epsilon; None if there is none to be told from others."""
        path, _ = self._place(node)
        module = self.module.get_submodule(path)
        named = [n for n, held in vars(module).items() if "eps" in n and isinstance(held, float) and held == value]
        return ".".join(filter(None, (path, named[0]))) if len(named) == 1 else None

    def centred(self, node: Node) -> bool:
        """Test whether a node is a batch normalisation by the running mean that its own module holds."""
        if str(node.target) != "aten._native_batch_norm_legit_no_training.default":
            return False
        modules = dict(self.module.named_modules(remove_duplicate=False))
        module = modules.get(self._place(node)[0])
        mean = self.inputs.get(node.args[3])  # pyrefly: ignore
        path = f"{self._place(node)[0]}.running_mean".lstrip(".")
        return (
            isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(mean, StoredTensor) and mean.name == path
        )

    @staticmethod
    def _place(node: Node) -> tuple[str, str]:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if not stack:
            return "", ""
        path, kind = stack[-1][0], stack[-1][1]
        return path, kind if isinstance(kind, str) else kind.__name__


def arguments(node: Node, value: Callable[[Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of an operation, with the values of the nodes in them."""
    args: Any
    kwargs: Any
    args, kwargs = map_arg((node.args, node.kwargs), value)
    return args, kwargs


def skeleton(module: nn.Module) -> nn.Module:
    """A copy of the module's structure, in evaluation mode, that shares its parameters and buffers.

    A cache of keys and values (Hugging Face's `config.use_cache`) is no part of the function: it is switched off.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    made = copy.deepcopy(module, shared).eval()
    for part in made.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False
    return made


def trace(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], known: Callable[[str], bool]
) -> TracedGraph:
    """Trace a network on an example; operations that are not known are taken apart where torch knows how.

    Args:
        module: any module that `torch.export` can trace; it is not changed.
        args: positional inputs; two rows or more.
        kwargs: keyword inputs.
        known: whether there is a rule for an operation.

    Raises:
        UnsupportedModel: `torch.export` cannot trace it.
    """
    try:
        traced = skeleton(module)
    except TypeError as error:
        raise UnsupportedModel(
            f"the network's structure cannot be copied to be traced ({error}): a module holds something that "
            "copy.deepcopy refuses, such as an operator. geometry='layerwise' needs no tracing"
        ) from error
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad(), _plain_attention():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(traced, args, dict(kwargs), strict=False)
            program.graph.eliminate_dead_code()
            if not all(_has_rule(node, known) for node in _depending(program)):
                # One pass takes apart all of them, and what they are made of, and writes side effects as values.
                table = {op: rule for op, rule in torch.export.default_decompositions().items() if not known(str(op))}
                program = program.run_decompositions(table)
        except Exception as error:  # whatever the tracer or the user's forward raises
            raise UnsupportedModel(
                f"the network cannot be traced by torch.export ({first_line(error)}). geometry='layerwise' needs no tracing; or "
                "rewrite data-dependent control flow, and give inputs of the shape that is used"
            ) from error
    signature = program.graph_signature
    canonical = {id(tensor): name for name, tensor in (*traced.named_parameters(), *traced.named_buffers())}
    tensors = {**dict(traced.named_parameters(remove_duplicate=False)), **dict(traced.named_buffers())}
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {**program.constants, **program.state_dict}
    lifted = signature.inputs_to_lifted_tensor_constants
    inputs: dict[Node, Value] = {}
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in stored and stored[node.name] in tensors:
            tensor = tensors[stored[node.name]]
            floating = tensor.is_floating_point()
            inputs[node] = StoredTensor(canonical[id(tensor)], tensor.shape) if floating else Known(tensor)
        elif node.name in lifted or node.name in stored:
            inputs[node] = Known(constants[lifted[node.name] if node.name in lifted else stored[node.name]])
        else:
            example = node.meta.get("val")
            inputs[node] = shifted_only(example.shape) if isinstance(example, Tensor) else Known(example)
    last = next(node for node in program.graph.nodes if node.op == "output")
    wanted = set(signature.user_outputs)
    outputs = tuple(node for node in last.all_input_nodes if node.name in wanted)
    return TracedGraph(tuple(program.graph.nodes), inputs, outputs, traced)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as the modules write it down: neither torch's shortcut for inference, nor a device's fused kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _depending(program: torch.export.ExportedProgram) -> Iterator[Node]:
    """Operations on the input or a parameter, and those that no table of constants can stand for."""
    constants = program.graph_signature.inputs_to_lifted_tensor_constants
    depending: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name not in constants:
            depending.add(node)
        elif node.op not in ("placeholder", "output") and (
            not _is_constant_function(node) or not depending.isdisjoint(node.all_input_nodes)
        ):
            depending.add(node)
            yield node


def _has_rule(node: Node, known: Callable[[str], bool]) -> bool:
    """Test whether a rule covers an operation as it is written, with nothing taken apart and no side effect left."""
    operation = node.target
    if not isinstance(operation, torch._ops.OpOverload):
        return operation is operator.getitem
    draws = _TRAINING.get(str(operation))
    if draws is not None and (len(node.args) <= draws or node.args[draws] is not False):
        return False
    return known(str(operation)) and not operation._schema.is_mutable


_TRAINING = {"aten.dropout.default": 2, "aten.feature_dropout.default": 2, "aten.alpha_dropout.default": 2}
"""Operations that draw random numbers in training, with the argument that says so."""


def _is_constant_function(node: Node) -> bool:
    """Test whether an operation gives the same result for the same arguments and changes none of them."""
    operation = node.target
    return operation is operator.getitem or (
        isinstance(operation, torch._ops.OpOverload)
        and not operation._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in operation.tags
    )
