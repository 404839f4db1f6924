"""Runs of a user's module that leave no trace: whatever a forward pass writes beside its result is undone after it.

A forward pass may fill caches, count its calls, keep hidden states. Each pass begins with the attributes that the module
was given with, so that a pass is a function of its tensors and inputs, and after it they are there again, the same objects
with the same contents, however the pass ended.
"""

from __future__ import annotations

import copy
import operator
import random
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from functools import cache
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from isoflat.core.errors import UnsupportedModel

Swap = Callable[[Tensor], Tensor]
"""Stand-in of a tensor that a module holds; itself where none is needed."""

_FIXED = frozenset(
    {
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        type(None),
        type,
        FunctionType,
        BuiltinFunctionType,
        MethodType,
        ModuleType,
        torch.dtype,
        torch.device,
        torch.Size,
    }
)
"""Types whose objects cannot be written into, or hold nothing that a pass would write."""


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Keep a module as it is, gradients and random streams among it, over many passes with their backward passes.

    Blocks that recompute themselves in their own backward add to `.grad` of the module's parameters, behind the back of
    whoever asked for gradients of other tensors. Meanwhile the parameters have none, so that nothing is added to the user's.
    """
    held = _Held(module)
    streams = [(put, get()) for value in held.others for get, put in _streams(value)]
    arrays = [(value, value.copy()) for value in held.others if isinstance(value, np.ndarray)]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        held.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for put, state in streams:
            put(state)
        for array, values in arrays:
            if array.flags.writeable:
                array[...] = values


def twin(module: nn.Module, shared: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of a module, apart from tensors that torch refuses to copy: what an earlier pass has left behind.

    Args:
        module: the module.
        shared: objects that the copy has as well, by identity.

    >>> net = nn.Linear(2, 1)
    >>> net.last = net(torch.ones(2))
    >>> twin(net).last.requires_grad
    False
    """
    memo: dict[int, Any] = dict(shared or {})
    for part in module.modules():
        for name, value in vars(part).items():
            if name not in STANDARD and type(value) not in _FIXED:
                memo |= {id(tensor): tensor.detach() for _, tensor in held_tensors(value) if not tensor.is_leaf}
    return copy.deepcopy(module, memo)


@contextmanager
def private(module: nn.Module, swap: Swap = lambda tensor: tensor) -> Iterator[None]:
    """Attributes as they are, in a single pass, and back to that after it.

    Args:
        module: the module.
        swap: stand-in of each tensor that is held otherwise than as a parameter or buffer.

    >>> net = nn.Linear(2, 1)
    >>> net.calls = [1]
    >>> with private(net):
    ...     net.calls.append(2)
    ...     net.cache = net.weight + 1
    >>> net.calls, hasattr(net, "cache")
    ([1], False)
    """
    held = _Held(module)
    with ExitStack() as stack:
        stack.callback(held.restore)
        for owner, name in {pair for kind in held.kinds for pair in _remembering(kind)}:
            remembering = vars(owner)[name]
            stack.callback(setattr, owner, name, remembering)
            setattr(owner, name, remembering.__wrapped__)
        held.install(swap)
        yield


@cache
def _remembering(kind: type[nn.Module]) -> tuple[tuple[type, str], ...]:
    """Methods that remember their results (`functools.lru_cache`), also those for other weights: the class, and the name."""
    own = [owner for owner in kind.__mro__ if owner.__module__.partition(".")[0] not in ("torch", "builtins")]
    return tuple((owner, name) for owner in own for name, held in vars(owner).items() if hasattr(held, "cache_clear"))


@final
class Copies:
    """Stand-ins that nothing else refers to; tensors that share memory share that of their copies too."""

    def __init__(self, wanted: Callable[[Tensor], bool], dtype: torch.dtype | None = None) -> None:
        """Copies of the tensors that are wanted.

        Args:
            wanted: test of whether a tensor is to be copied.
            dtype: precision that floating-point tensors are brought to; None for their own.
        """
        self._wanted = wanted
        self._dtype = dtype
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._memory: dict[tuple[int, torch.dtype], Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """The copy of a tensor; itself where none is wanted."""
        wider = self._dtype is not None and tensor.is_floating_point() and tensor.dtype != self._dtype
        if not (wider or self._wanted(tensor)) or not _plain(tensor):
            return tensor
        if id(tensor) not in self._made:
            self._made[id(tensor)] = (tensor, _copied(tensor, self._dtype if wider else None, self._memory))
        return self._made[id(tensor)][1]

    def written(self) -> frozenset[int]:
        """Identities of tensors whose copies are not what they were."""
        pairs = self._made.items()
        return frozenset(key for key, (one, made) in pairs if made._version or differs(made, one.to(made.dtype)))


def held_fixed(tensor: Tensor) -> Tensor:
    """A tensor that stands for a parameter without gradient: modules take nothing but parameters in the place of one."""
    return nn.Parameter(tensor, requires_grad=False) if _plain(tensor) and not tensor.requires_grad else tensor


def reassigned(error: TypeError) -> UnsupportedModel | None:
    """Refusal of a forward pass that assigned a tensor in the place of a parameter; None for other errors."""
    found = re.search(r"cannot assign .* as parameter '(.+?)'", str(error))
    return None if found is None else writes_into([found[1]])


def registered(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of all parts, under every name."""
    for path, part in module.named_modules():
        for own, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                yield f"{path}.{own}" if path else own, tensor


def own_precision(module: nn.Module) -> torch.dtype:
    """Narrowest floating-point type of a module's parameters."""
    kinds = {tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()}
    return min(kinds, key=lambda kind: kind.itemsize, default=torch.float64)


def wider(own: torch.dtype, dtype: torch.dtype) -> torch.dtype | None:
    """The precision of a pass, where it is wider than a module's own and what the module holds has to follow."""
    return dtype if own != dtype and own.itemsize <= dtype.itemsize else None


def differs(one: Tensor, other: Tensor) -> bool:
    """Test of whether two tensors have different values; NaN is like NaN."""
    return one.shape != other.shape or bool(((one != other) & ~((one != one) & (other != other))).any())


def _copied(tensor: Tensor, dtype: torch.dtype | None, memory: dict[tuple[int, torch.dtype], Tensor]) -> Tensor:
    """A tensor of the same values; views of most of the same memory get views of one copy of it."""
    storage = tensor.untyped_storage()
    size = tensor.numel() * tensor.dtype.itemsize
    if torch._C._functorch.peek_interpreter_stack() is not None or not 0 < storage.nbytes() <= 2 * size:
        made = tensor.detach().clone() if dtype is None else tensor.detach().to(dtype)
    else:
        key = (storage.data_ptr(), tensor.dtype)
        if key not in memory:
            count = storage.nbytes() // tensor.dtype.itemsize
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (count,), (1,))
            memory[key] = flat.clone() if dtype is None else flat.to(dtype)
        made = memory[key].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return made.requires_grad_() if tensor.requires_grad and tensor.is_leaf else made


def _plain(tensor: Tensor) -> bool:
    """Test of whether a tensor is ordinary memory; fake, sparse, quantised and transformed ones are left alone."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def writes_into(names: Sequence[str]) -> UnsupportedModel:
    """Refusal of a network whose forward pass changes its own weights."""
    return UnsupportedModel(
        f"the forward pass writes into {', '.join(names[:5])}: the loss is no function of the weights. Take the update out "
        "of the forward pass (max_norm=None, no clamp_ or renormalisation in place), after applying it once to the weights, "
        "and call model.eval()"
    )


def held_tensors(value: Any) -> Iterator[tuple[Any, Tensor]]:
    """Tensors in nested containers, with the keys that lead to them."""
    if isinstance(value, Tensor):
        yield (), value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from (((key, *rest), found) for rest, found in held_tensors(part))
    elif isinstance(value, list | tuple | deque):
        for key, part in enumerate(value):
            yield from (((key, *rest), found) for rest, found in held_tensors(part))


@final
class _Held:
    """Everything that a module and its parts hold, as found.

    Attributes:
        registers: attributes of modules, and their registers of parameters, buffers and parts, with what is in them.
        found: further containers, with what is in them.
        plain: attributes of modules that hold tensors or containers.
        others: generators and arrays in them.
        kinds: classes of the parts.
    """

    def __init__(self, module: nn.Module) -> None:
        self.registers: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.found: list[tuple[Any, Any]] = []
        self.plain: list[tuple[dict[str, Any], str, Any]] = []
        self.others: list[Any] = []
        self.kinds: set[type[nn.Module]] = set()
        self._seen: set[int] = set()
        for part in module.modules():
            self.kinds.add(type(part))
            self._part(part)

    def _part(self, part: nn.Module) -> None:
        own = part.__dict__
        self._seen.add(id(own))
        self.registers.append((own, own.copy()))
        for name in _REGISTERS:
            self.registers.append((own[name], own[name].copy() if own[name] else _EMPTY))
        for name, value in own.items():
            if name not in STANDARD and type(value) not in _FIXED:
                if isinstance(value, Tensor | tuple):
                    self.plain.append((own, name, value))
                if not isinstance(value, Tensor):
                    self._add(value, type(part).__module__.partition(".")[0])

    def _add(self, value: Any, package: str) -> None:
        """Go through a value of an attribute, and through what it holds; the depth of the nesting costs no frames."""
        todo = [value]
        while todo:
            value = todo.pop()
            if type(value) in _FIXED or isinstance(value, Tensor):
                continue
            if isinstance(value, tuple):
                todo += value
                continue
            if isinstance(value, nn.Module) or _of_the_users_own(value, package):
                value = value.__dict__
            if id(value) in self._seen:
                continue
            self._seen.add(id(value))
            if isinstance(value, dict):
                self.found.append((value, dict(value)))
                todo += value.values()
            elif isinstance(value, list | deque | set):
                self.found.append((value, list(value)))
                todo += value
            elif isinstance(value, _OTHERS):
                self.others.append(value)

    def install(self, swap: Swap) -> None:
        """Put stand-ins of tensors into the containers."""
        for container, name, value in self.plain:
            container[name] = _swapped(value, swap)
        for container, before in self.found:
            if isinstance(container, set):
                continue
            for key, value in before.items() if isinstance(before, dict) else enumerate(before):
                if isinstance(value, Tensor | tuple) and (swapped := _swapped(value, swap)) is not value:
                    container[key] = swapped

    def restore(self) -> None:
        """Put everything back that is not as it was; what has not changed is not touched."""
        for now, before in (*self.registers, *self.found):
            if isinstance(now, dict):
                if not _same(now.values(), before.values()) or list(now) != list(before):
                    _restore(now, before)
            elif not _same(now, before):
                if isinstance(now, list):
                    now[:] = before
                else:
                    now.clear()
                    (now.update if isinstance(now, set) else now.extend)(before)


_EMPTY: dict[str, Any] = {}

_REGISTERS = ("_parameters", "_buffers", "_modules")

STANDARD = frozenset(vars(nn.Module()))
"""Attributes that every module has for the use of torch."""

_OTHERS = (np.ndarray, np.random.Generator, np.random.RandomState, torch.Generator, random.Random)


def _same(now: Collection[Any], before: Collection[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _of_the_users_own(value: Any, package: str) -> bool:
    """Test of whether to look into an object: a record, or of the code that the module is of.

    Trainers, loggers and the like, which a module may know, lead to everything.
    """
    if not hasattr(value, "__dict__") or isinstance(value, type):
        return False
    own = type(value).__module__.partition(".")[0]
    return own != "torch" and (isinstance(value, SimpleNamespace) or is_dataclass(value) or own == package)


def _swapped(value: Any, swap: Swap) -> Any:
    """A tensor's stand-in, or a tuple with stand-ins; itself where nothing in it has one."""
    if isinstance(value, Tensor):
        return swap(value)
    if not isinstance(value, tuple) or type(value) is torch.Size:
        return value
    parts = [_swapped(part, swap) for part in value]
    if all(one is other for one, other in zip(parts, value, strict=True)):
        return value
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def _restore(now: Any, before: dict[Any, Any]) -> None:
    """Put entries of a mapping back, in their order."""
    for key in [key for key in now if key not in before]:
        del now[key]
    for key, value in before.items():
        if key not in now or now[key] is not value:
            now[key] = value
    if list(now) != list(before):
        for key, value in before.items():
            del now[key]
            now[key] = value


def _streams(value: Any) -> Iterator[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Reading and setting the state of a stream of random numbers."""
    if isinstance(value, torch.Generator | np.random.RandomState):
        yield value.get_state, value.set_state
    elif isinstance(value, np.random.Generator):
        yield lambda: value.bit_generator.state, lambda state: setattr(value.bit_generator, "state", state)
    elif isinstance(value, random.Random):
        yield value.getstate, value.setstate
