"""A pretend accelerator: its tensors hold others on the CPU, and will not be mixed with those that live there.

Nothing here runs on a GPU, but whatever would fail on one for a tensor on the wrong device fails here as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)


class Away(Tensor):
    """A tensor there."""

    @staticmethod
    def __new__(cls, held: Tensor):
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=device(), **shape)

    def __init__(self, held: Tensor):
        self.held = held

    def __deepcopy__(self, memo):
        copied = Away(self.held.clone())
        return nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied

    def __repr__(self):
        return f"{self.held!r} on {self.device}"

    def untyped_storage(self):
        return self.held.untyped_storage()

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """What is made there belongs there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Makers(TorchFunctionMode):
    """Those that copy from Python objects, which no dispatch mode sees."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in MAKERS and _there(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(device())
        return func(*args, **kwargs)


@cache
def device() -> torch.device:
    """Registered with torch at the first call, once in a process."""

    class Module(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend("elsewhere", backend_module=Module())
    return torch.device("elsewhere", 0)


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Inside, the device can be used."""
    there = device()
    with _Dispatch(), _Makers():
        yield there


def _there(wanted) -> bool:
    return wanted is not None and torch.device(wanted).type == device().type


def _run(func, args, kwargs):
    flat = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    away = {id(value.held): value for value in flat if isinstance(value, Away)}
    if func not in MOVES and away and any(value.ndim and not isinstance(value, Away) for value in flat):
        raise RuntimeError(f"{func} of tensors on {device()} and on the cpu")
    goes = bool(away) if kwargs.get("device") is None else _there(kwargs["device"])
    if goes and "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    # A derivative's zeros have no data: here below the layer that knows of it, they need some.
    kernel = aten.zeros.default if func is aten._efficientzerotensor.default else func
    found = kernel(*tree_map(_held, args), **tree_map(_held, kwargs))
    if away and torch.Tag.inplace_view in func.tags:
        with no_dispatch():  # the wrapper's own shape
            func(*args, **kwargs)
    if func is aten.copy_.default:
        return args[0]
    if not goes:
        return found
    fresh = func is aten._to_copy.default
    return tree_map(lambda value: _wrapped(value, {} if fresh else away), found)


def _held(value):
    return value.held if isinstance(value, Away) else value


def _wrapped(value, known):
    return known.get(id(value)) if id(value) in known else Away(value) if isinstance(value, Tensor) else value
