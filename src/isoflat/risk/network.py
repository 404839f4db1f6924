"""A user's module as a pure function of named tensors: out of its wrappers, without checkpoints, in full precision.

The module itself is never changed: what a forward pass writes goes into copies (`modules.private`).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils import checkpoint

from isoflat.core.errors import NonFinite, UnsupportedModel, UsageError
from isoflat.core.kernels import InDouble
from isoflat.core.precision import unrounded
from isoflat.core.state import State, everywhere
from isoflat.modules.caches import Cache, emptied
from isoflat.modules.private import (
    Copies,
    Swap,
    held_fixed,
    own_precision,
    private,
    reassigned,
    registered,
    wider,
    writes_into,
)
from isoflat.risk.dense import dense_tables

Selector = str | list[str] | tuple[str, ...] | Callable[[str, Tensor], bool] | None


@final
@dataclass(frozen=True)
class Habits:
    """Facts about a network that trying it out has told (`risk.habits`).

    Attributes:
        written: names of buffers and frozen parameters that a forward pass writes into.
        held: identities of further tensors that it writes into, which the module holds as plain attributes.
        caches: attributes that were filled from the weights before, and are filled anew in each pass.
        single: why the network does not run in float64; None if it does.
        leaves: flag that the loss differentiates by the weights, so that these need gradients even where only its value is
            asked for.
    """

    written: frozenset[str] = frozenset()
    held: frozenset[int] = frozenset()
    caches: tuple[Cache, ...] = ()
    single: str | None = None
    leaves: bool = False


@final
@dataclass(frozen=True)
class Network:
    """A module, read only.

    Attributes:
        module: module of the user.
        inside: precision that torch's autocast may use inside a float32 pass; None for float32 throughout.
        habits: what trying it out has told; None before that, when every buffer is copied for each pass.

    >>> network = Network(nn.Linear(2, 1, bias=False))
    >>> state = network.state().replace({"weight": torch.tensor([[1.0, 2.0]])})
    >>> network(state, lambda model: model(torch.tensor([3.0, 4.0])).item())
    11.0
    """

    module: nn.Module
    inside: torch.dtype | None = None
    habits: Habits | None = None

    def __post_init__(self) -> None:
        """Refuse anything but a module."""
        if not isinstance(self.module, nn.Module):
            weights = isinstance(self.module, Mapping)
            hint = ": a state_dict holds weights only, load it into the network" if weights else ""
            raise UsageError(f"expected a torch.nn.Module as the model, got {type(self.module).__name__}{hint}")

    def __call__(self, state: State, use: Callable[[nn.Module], Any], held: Copies | None = None) -> Any:
        """Result of `use(model)` where the model's tensors are those of the state.

        Running means among the parameters are differentiated by as well, which torch's batch normalisation does not do:
        moving one is moving its input the other way.

        Args:
            state: weights and buffers.
            use: function of the model.
            held: stand-ins of tensors that modules hold otherwise; None for those that trying it out has told.

        Raises:
            UnsupportedModel: the forward pass writes into trainable tensors.
        """
        if self.habits is not None and self.habits.leaves:
            state = replace(state, parameters={name: _leaf(tensor) for name, tensor in state.parameters.items()})
        versions = [tensor._version for tensor in state.parameters.values()]
        copied = {**state.tensors, **self._copied(state)}
        given = everywhere(self.module, {**copied, **{name: held_fixed(copied[name]) for name in state.frozen}})
        tensors = {f"model.{name}": tensor for name, tensor in given.items()}
        with ExitStack() as stack:
            # Losses may differentiate by their inputs; weights that require no gradients cost no graph.
            stack.enter_context(torch.enable_grad())
            stack.enter_context(private(self.module, self._swap(given, held or self.copies(state.dtype))))
            for name in state.parameters:
                path, _, own = name.rpartition(".")
                if own == "running_mean" and isinstance(module := self.module.get_submodule(path), _BatchNorm):
                    tensors[f"model.{name}"] = state.parameters[name].detach()
                    stack.callback(module.register_forward_pre_hook(_moved_by(state.parameters[name])).remove)
            if compiled(self.module):  # what torch.compile makes has no second derivative
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self.following(state))
            stack.enter_context(without_checkpoints())
            stack.enter_context(dense_tables())
            if state.dtype == torch.float64 and stacked(self.module):
                stack.enter_context(InDouble())
            if self.inside is not None and state.dtype == torch.float32:
                # Casts of leaves must not outlive a pass: every pass has leaves of its own.
                stack.enter_context(torch.autocast(state.device.type, self.inside, cache_enabled=False))
            if state.device.type == "cuda" and any(isinstance(part, nn.RNNBase) for part in self.module.modules()):
                # cuDNN's recurrent kernels have no second derivative.
                stack.enter_context(settings((torch.backends.cudnn, "enabled", False)))
            caches, put = () if self.habits is None else self.habits.caches, dict(tensors)
            try:
                result = torch.func.functional_call(_Use(self.module, use, caches), tensors, (), tie_weights=False)
            except TypeError as error:
                raise reassigned(error) or error from None
        now = zip(state.parameters.items(), versions, strict=True)
        replaced = [name for name in state.parameters if tensors[f"model.{name}"] is not put[f"model.{name}"]]
        if written := [name for (name, tensor), before in now if tensor._version != before] + replaced:
            raise writes_into(written)
        return result

    def following(self, state: State) -> AbstractContextManager[None]:
        """Precision of a pass, which whatever the network or a loss makes in it follows."""
        return unrounded(state.dtype, self._own)

    @cached_property
    def _own(self) -> torch.dtype:
        """Precision of the module itself."""
        return own_precision(self.module)

    def widest(self, state: State) -> State:
        """The state in the precision of checks and last products: float64, unless the network does not run in that."""
        single = self.habits is not None and self.habits.single is not None
        return state.to(dtype=torch.float32 if single else torch.float64)

    def _copied(self, state: State) -> dict[str, Tensor]:
        """Copies of tensors that a pass may write into."""
        known = self.habits
        names = state.buffers if known is None else known.written
        return {name: state.tensors[name].clone() for name in names if name in state.tensors}

    def copies(self, dtype: torch.dtype, every: bool = False) -> Copies:
        """Stand-ins of tensors in plain attributes, in the precision of a pass where the network's own is less.

        Args:
            dtype: precision of the pass.
            every: flag that all are copied, not only those that a pass is known to write into.
        """
        known = None if every else self.habits
        return Copies(lambda tensor: known is None or id(tensor) in known.held, wider(self._own, dtype))

    def _swap(self, given: Mapping[str, Tensor], copies: Copies) -> Swap:
        """Stand-ins of tensors in plain attributes: those of the state where they are the module's own, else copies."""
        names: dict[int, str] = {}

        def swap(tensor: Tensor) -> Tensor:
            if not names:  # most modules hold nothing of the kind
                names.update({id(tensor): name for name, tensor in registered(self.module)})
            name = names.get(id(tensor))
            return copies(tensor) if name is None else given.get(name, tensor)

        return swap

    def state(self, params: Selector = None) -> State:
        """The module's tensors; those that require gradients and match `params` are trainable.

        Tied tensors appear once. Nothing is copied but the buffers.

        Args:
            params: glob, or several, or predicate of name and tensor; None for all that require gradients.

        Raises:
            UsageError: nothing is selected.
            UnsupportedModel: a parameter has a type, layout or memory that has no Hessian here.
            NonFinite: a weight is NaN or infinite.
        """
        chosen: dict[str, Tensor] = {}
        frozen: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            wanted = parameter.requires_grad and _selected(params, name, parameter)
            if wanted or not parameter.is_quantized:
                _check_parameter(name, parameter)
            (chosen if wanted else frozen)[name] = parameter.detach()
        if not chosen:
            names = ", ".join(list(frozen)[:8]) or "none"
            raise UsageError(f"no trainable tensor selected by params={params!r}; the model's parameters: {names}")
        _check_overlap(chosen)
        # Cloned, because a forward pass may write into buffers; of the parameters only views without history are kept.
        buffers = {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()}
        return State(chosen, frozen, buffers)

    def tied(self) -> tuple[str, ...]:
        """Further names of parameters that appear under more than one."""
        once = dict(self.module.named_parameters())
        return tuple(name for name, _ in self.module.named_parameters(remove_duplicate=False) if name not in once)

    def check_mode(self) -> None:
        """Refuse modules whose output is random or depends on the rest of the batch.

        Raises:
            UnsupportedModel: dropout or batch normalisation is in train mode.
        """
        for name, module in self.module.named_modules():
            where = f"'{name}' ({type(module).__name__})" if name else type(module).__name__
            if isinstance(module, nn.modules.batchnorm._NormBase) and (module.training or module.running_mean is None):
                if module.training or isinstance(module, nn.modules.batchnorm._BatchNorm):
                    why = "is in train mode" if module.training else "has no running statistics"
                    raise UnsupportedModel(
                        f"{where} {why}, so the loss of one example depends on the others in its batch and the number "
                        "on the batch size. Call model.eval() first (with track_running_stats=True)"
                    )
            elif module.training and _drop_rate(module) > 0:
                raise UnsupportedModel(
                    f"{where} drops at random in train mode, so no two products would agree. Call model.eval() first"
                )


def _leaf(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_(True)


class _Use(nn.Module):
    """Lets `functional_call` swap tensors for any use of a model, not its forward only."""

    def __init__(self, model: nn.Module, use: Callable[[nn.Module], Any], caches: tuple[Cache, ...]) -> None:
        super().__init__()
        self.model = model
        self.use = use
        self.caches = caches

    def forward(self) -> Any:
        emptied(self.model, self.caches)
        return self.use(self.model)


def _moved_by(mean: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A hook that takes a running mean's derivative through the input; its value changes nothing."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        still = mean - mean.detach()
        return (args[0] - still.view(1, -1, *[1] * (args[0].ndim - 2)), *args[1:])

    return hook


_BY_NAME = {"_FabricModule": "Lightning Fabric"}
"""Classes that hold the network as `.module`, by name, because their packages may be absent; and whose they are."""


def unwrapped(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The network inside its wrappers, and what they were, from outside in.

    Data-parallel wrappers and compiled code have no second derivative; the network inside has the same weights.

    >>> unwrapped(nn.DataParallel(nn.Linear(1, 1)))
    (Linear(in_features=1, out_features=1, bias=True), ('DataParallel',))
    """
    removed = []
    while (inside := _inside(module)) is not None:
        module, what = inside
        removed.append(what)
    return module, tuple(removed)


def compiled(module: nn.Module) -> bool:
    """Test of whether a part of a network is compiled, in place or in a wrapper."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and any(
        part._compiled_call_impl is not None or isinstance(part, compiler.OptimizedModule) for part in module.modules()
    )


def stacked(module: nn.Module) -> bool:
    """Test whether a part of a network holds several matrices in one weight, as mixtures of experts do.

    >>> stacked(nn.Conv1d(2, 2, 3)), stacked(nn.ParameterList([torch.ones(2, 3, 3)]))
    (False, True)
    """
    return any(
        weight is not None and weight.ndim == 3 and len(weight) > 1
        for part in module.modules()
        if not isinstance(part, _ConvNd)
        for weight in part._parameters.values()
    )


def _inside(module: nn.Module) -> tuple[nn.Module, str] | None:
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return module.module, type(module).__name__
    # A compiled module exists only where its class has been loaded; loading it takes seconds.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        return module._orig_mod, "torch.compile"
    name, held = _BY_NAME.get(type(module).__name__), getattr(module, "module", None)
    return (held, name) if name is not None and isinstance(held, nn.Module) else None


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Differentiable twice, in full precision, with gradients on; the user's flags and random streams come back.

    Fused attention has no second derivative, so the math kernel is used; autocast and shorter float32 are off.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(full_precision())
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Networks run as if they did not checkpoint.

    What is recomputed in a backward pass is recomputed with the module's own tensors, which are not those of the state
    any more: gradients would be right at the module's own point only, and second derivatives nowhere. The reentrant
    kind cannot be differentiated twice at all. Memory is planned for without it.
    """
    reentrant, generator = checkpoint.CheckpointFunction, checkpoint._checkpoint_without_reentrant_generator
    checkpoint.CheckpointFunction = _Plain  # pyrefly: ignore
    checkpoint._checkpoint_without_reentrant_generator = _nothing  # pyrefly: ignore
    try:
        yield
    finally:
        checkpoint.CheckpointFunction, checkpoint._checkpoint_without_reentrant_generator = reentrant, generator


class _Plain:
    """Stands for the autograd function of the reentrant kind."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands for the generator around the other kind."""
    yield


@contextmanager
def settings(*wanted: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes with other values, which come back: triples of an object, a name and a value."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in wanted]
    try:
        for owner, name, value in wanted:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


KERNELS = tuple((place, kind) for place in ("cuda", "mkldnn") for kind in ("matmul", "conv", "rnn"))
"""Backends and kinds of kernels for which `torch.backends` has a `fp32_precision`."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Products and convolutions in float32 round to float32: no TF32 or bfloat16 inside, whatever the user allows.

    Torch has switches for single kernels, and older ones for all of them, which refuse to be read where the two disagree,
    also by torch itself. So both are set; an older one that disagreed before stays as it is.
    """
    cudnn = torch.backends.cudnn
    product = _readable(torch.get_float32_matmul_precision)
    convolution = _readable(partial(getattr, cudnn, "allow_tf32"))
    before = [torch._C._get_fp32_precision_getter(*kernel) for kernel in KERNELS]

    def allow(product: str | None, convolution: bool | None, single: list[str]) -> None:
        if product is not None:
            torch.set_float32_matmul_precision(product)
        if convolution is not None:
            cudnn.allow_tf32 = convolution
        for kernel, value in zip(KERNELS, single, strict=True):
            torch._C._set_fp32_precision_setter(*kernel, value)

    with settings((cudnn, "benchmark", False)):
        try:
            allow(product and "highest", convolution and False, ["ieee"] * len(KERNELS))
            yield
        finally:
            allow(product, convolution, before)


def _readable(switch: Callable[[], Any]) -> Any:
    """One of torch's older switches, or None where newer ones say something else."""
    try:
        return switch()
    except RuntimeError:
        return None


def _selected(params: Selector, name: str, parameter: Tensor) -> bool:
    if params is None:
        return True
    if callable(params):
        return bool(params(name, parameter))
    return any(fnmatchcase(name, pattern) for pattern in ([params] if isinstance(params, str) else params))


def _check_parameter(name: str, parameter: Tensor) -> None:
    if parameter.is_meta or isinstance(parameter, nn.UninitializedParameter):
        raise UnsupportedModel(f"parameter '{name}' has no values yet (meta or lazy): load weights, or run the model")
    if parameter.layout is not torch.strided or type(parameter.data) is not Tensor or parameter.is_quantized:
        raise UnsupportedModel(f"parameter '{name}' is sharded, sparse or quantised; expected a plain dense tensor")
    if parameter.is_complex() or (parameter.requires_grad and not parameter.is_floating_point()):
        remedy = (
            ": hold it as real numbers, torch.nn.Parameter(torch.view_as_real(w)), and use torch.view_as_complex in forward"
            if parameter.is_complex()
            else ""
        )
        raise UnsupportedModel(f"parameter '{name}' is {parameter.dtype}; expected a real floating-point type{remedy}")
    if parameter.numel() and not bool(torch.isfinite(parameter).all()):
        bad = int((~torch.isfinite(parameter)).sum())
        raise NonFinite(f"parameter '{name}' holds {bad} NaN or infinite entries of {parameter.numel()}")


def _check_overlap(parameters: dict[str, Tensor]) -> None:
    """Tied tensors are one and the same object; tensors that merely share memory cannot be told apart by the loss."""
    spans = []
    for name, parameter in parameters.items():
        if 0 in parameter.stride() and parameter.numel() > 1:
            raise UnsupportedModel(f"parameter '{name}' is an expanded view (stride 0); give it memory of its own")
        steps = sum((size - 1) * step for size, step in zip(parameter.shape, parameter.stride(), strict=True))
        if parameter.numel():
            spans.append((parameter.data_ptr(), parameter.data_ptr() + (steps + 1) * parameter.element_size(), name))
    spans.sort()
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            raise UnsupportedModel(
                f"parameters '{name}' and '{other}' share memory without being one parameter: tie them by assigning "
                "the same nn.Parameter, or clone one"
            )


def _drop_rate(module: nn.Module) -> float:
    """Probability with which a module changes its output at random in train mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.dropout
    return 1.0 if isinstance(module, nn.RReLU) else 0.0
