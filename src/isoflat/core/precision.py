"""Float64 all the way: casts inside a network that would throw digits away are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NARROW = {torch.float32, torch.float16, torch.bfloat16}
_SHORTHANDS = {Tensor.float, Tensor.half, Tensor.bfloat16}


@contextmanager
def unrounded(dtype: torch.dtype) -> Iterator[None]:
    """While a network runs in float64, `x.float()` and its like do nothing; in other types, nothing is changed.

    Networks written for half precision compute norms and softmax in float32, whatever their weights are. In exact
    arithmetic those casts are the identity, and proofs and certificates are about that function.

    >>> with unrounded(torch.float64):
    ...     torch.ones(1, dtype=torch.float64).to(torch.float32).dtype
    torch.float64
    """
    with _Unrounded() if dtype == torch.float64 else nullcontext():
        yield


@final
class _Unrounded(TorchFunctionMode):
    """Replaces narrower floating-point types by float64 in whatever is asked of torch."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SHORTHANDS:
            return args[0].double()
        named = dict(kwargs or {})
        for key, value in named.items():
            named[key] = _wide(value)
        return func(*map(_wide, args), **named)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value
