"""One traced run of a network: operations in order, with stored tensors by their canonical names."""

from __future__ import annotations

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
from isoflat.core.state import everywhere
from isoflat.modules.private import twin
from isoflat.symmetry.finding.masks import Masks
from isoflat.symmetry.finding.untraceable import unsupported
from isoflat.symmetry.finding.values import Activation, Known, StoredTensor, Value, shifted_only


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

    def varies(self, node: Node) -> bool:
        """Test whether a node's value hangs on the network's input, and not on its shape alone."""
        waiting, seen = [node], set[Node]()
        while waiting:
            part = waiting.pop()
            if isinstance(self.inputs.get(part), Activation):
                return True
            if part not in seen:
                seen.add(part)
                waiting += part.all_input_nodes
        return False

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

    Raises:
        UnsupportedModel: a module holds something that cannot be copied.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    try:
        made = twin(module, shared).eval()
    except (TypeError, RuntimeError, AttributeError, ValueError) as error:
        raise UnsupportedModel(
            f"the network's structure cannot be copied to be traced ({error}): a module holds something that "
            "copy.deepcopy refuses, such as an operator, an open file, or a tensor with a history: make it when it is used. "
            "geometry='layerwise' needs no tracing"
        ) from error
    for part in made.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False
    return made


def aside(module: nn.Module) -> Callable[..., Any]:
    """The module's function in evaluation mode, for a look at its output: nothing that a forward pass writes is the user's.

    Raises:
        UnsupportedModel: the module cannot be copied, or (when it is called) does not run.
    """
    apart = skeleton(module)
    parameters = {name: parameter.detach() for name, parameter in apart.named_parameters()}
    buffers = {name: buffer.detach() for name, buffer in apart.named_buffers()}

    def function(*args: Any, **kwargs: Any) -> Any:
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        swapped = everywhere(apart, {**parameters, **own})
        try:
            return torch.func.functional_call(apart, swapped, args, kwargs, tie_weights=False)
        except Exception as error:  # whatever the user's forward raises
            raise unsupported("the network does not run on the example", error, apart) from error

    return function


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
    traced = skeleton(module)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad(), plain_attention():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(traced, args, dict(kwargs), strict=False)
            program.graph.eliminate_dead_code()
            if not all(_has_rule(node, known) for node in _depending(program)):
                # One pass takes apart all of them, and what they are made of, and writes side effects as values.
                table = {op: rule for op, rule in torch.export.default_decompositions().items() if not known(str(op))}
                program = program.run_decompositions(table)
        except Exception as error:  # whatever the tracer or the user's forward raises
            raise unsupported("the network cannot be traced by torch.export", error, traced) from error
    signature = program.graph_signature
    canonical = {id(tensor): name for name, tensor in (*traced.named_parameters(), *traced.named_buffers())}
    tensors = {**dict(traced.named_parameters(remove_duplicate=False)), **dict(traced.named_buffers())}
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {**program.constants, **program.state_dict}
    lifted = signature.inputs_to_lifted_tensor_constants
    inputs: dict[Node, Value] = {}
    masks = Masks()
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in stored and stored[node.name] in tensors:
            tensor = tensors[stored[node.name]]
            fixed = not tensor.is_floating_point() or masks.is_constant(node, tensor)
            inputs[node] = Known(tensor) if fixed else StoredTensor(canonical[id(tensor)], tensor.shape)
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
def plain_attention() -> Iterator[None]:
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
