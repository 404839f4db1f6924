"""Float64 all the way: what inside a network would throw digits away, or stay behind in float32, is made to follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NARROW = {torch.float32, torch.float16, torch.bfloat16}
_SHORTHANDS = {Tensor.float, Tensor.half, Tensor.bfloat16}
_TYPES = {f"torch.{place}{kind}Tensor" for place in ("", "cuda.") for kind in ("Float", "Half", "BFloat16")}

_DRAWS = {torch.rand, torch.randn, torch.rand_like, torch.randn_like, torch.normal}
"""Factories of random numbers, which come out otherwise in another precision."""

_FILLS = {Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.cauchy_, Tensor.log_normal_}
"""Methods that draw random numbers into a tensor."""


@contextmanager
def unrounded(dtype: torch.dtype, own: torch.dtype = torch.float64) -> Iterator[None]:
    """While a network runs in float64, `x.float()` and its like do nothing; in other types, nothing is changed.

    Networks written for half precision compute norms and softmax in float32, whatever their weights are. In exact
    arithmetic those casts are the identity, and proofs and certificates are about that function.

    Networks written for float32 make tensors in it as they go (`torch.zeros(...)`), and hold some that no conversion
    reaches: a loss's weights, a constant of a module. Where the network's own precision is less than float64, what it makes
    is made in float64, and what it holds is converted where it meets float64. Random numbers that it draws remain those
    that it draws by itself.

    Args:
        dtype: precision of the pass.
        own: precision of the network itself.

    >>> with unrounded(torch.float64):
    ...     torch.ones(1, dtype=torch.float64).to(torch.float32).dtype
    torch.float64
    >>> mask, x = torch.ones(2, 2), torch.ones(2, dtype=torch.float64)
    >>> with unrounded(torch.float64, own=torch.float32):
    ...     (mask @ x).dtype, torch.zeros(1).dtype
    (torch.float64, torch.float64)
    """
    if dtype != torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    follows = own in _NARROW
    try:
        if follows:
            torch.set_default_dtype(torch.float64)
        with _Unrounded(own if follows else None):
            yield
    finally:
        if follows:
            torch.set_default_dtype(before)


@final
class _Unrounded(TorchFunctionMode):
    """Replaces narrower floating-point types by float64 in whatever is asked of torch."""

    def __init__(self, own: torch.dtype | None) -> None:
        super().__init__()
        self._own = own

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SHORTHANDS:
            return args[0].double()
        named = dict(kwargs or {})
        if self._own is not None:
            if func in _DRAWS:
                return _drawn(func, self._own, args, named)
            if func in _FILLS and _is(args[0], torch.float64):
                return args[0].copy_(func(torch.empty_like(args[0], dtype=self._own), *args[1:], **named))
            args, named = _met(func, args, named)
        for key, value in named.items():
            named[key] = _wide(value)
        return func(*map(_wide, args), **named)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def _drawn(func: Callable[..., Any], own: torch.dtype, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Random numbers as the network draws them in its own precision, in float64."""
    if named.get("out") is None and named.get("dtype") in (None, torch.float64):
        args = tuple(value.to(own) if _is(value, torch.float64) else value for value in args)
        if func is not torch.normal:
            named["dtype"] = own
    drawn = func(*args, **named)
    return drawn.double() if drawn.dtype in _NARROW else drawn


def _met(func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Arguments of which those in narrower types are in float64, if some are; what is written into stays as it is."""
    if func is Tensor.type and len(args) > 1 and (args[1] if isinstance(args[1], str) else _named(args[1])) in _TYPES:
        return (args[0], torch.float64), named
    kinds: set[torch.dtype] = set()
    _kinds((args, *named.values()), kinds)
    if torch.float64 not in kinds or not kinds & _NARROW:
        return args, named
    name = getattr(func, "__name__", "")
    into = name in ("__setitem__", "__set__") or name[:3] == "__i" or (name[-1:] == "_" and name[-2:] != "__")
    first = args[:1] if into else ()
    return first + tuple(map(_widened, args[len(first) :])), {
        key: value if key == "out" else _widened(value) for key, value in named.items()
    }


def _named(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__name__}" if isinstance(kind, type) else str(kind)


def _kinds(values: Any, found: set[torch.dtype]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            found.add(value.dtype)
        elif isinstance(value, list | tuple):
            _kinds(value, found)


def _is(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _NARROW else value
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(map(_widened, value))
    return value
