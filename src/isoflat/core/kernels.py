"""Kernels that torch has in single precision only, written out for double precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@final
class InDouble(TorchFunctionMode):
    """While this is entered, products over groups of rows (`torch.nn.functional.grouped_mm`) accept float64.

    >>> a, b = torch.ones(3, 2, dtype=torch.float64), torch.ones(2, 2, 4, dtype=torch.float64)
    >>> with InDouble():
    ...     torch.nn.functional.grouped_mm(a, b, offs=torch.tensor([1, 3], dtype=torch.int32)).shape
    torch.Size([3, 4])
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace what has no kernel; everything else is as it is."""
        named = dict(kwargs or {})
        if func in _GROUPED and args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            return _grouped(*args, **named)
        return func(*args, **named)


_GROUPED = {
    made
    for made in (getattr(torch.nn.functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
    if made is not None
}


def _grouped(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """Products of groups of a and b; `offs` holds the ends of the groups along the axis that only one of them has."""
    if offs is None:
        made = torch.bmm(a, b)
        return made if bias is None else made + bias[:, None]
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    spans = list(zip(starts, ends, strict=True))
    if a.ndim == 2 and b.ndim == 3:  # groups of a's rows; rows after the last belong to none
        parts = [a[start:end] @ b[g] for g, (start, end) in enumerate(spans)]
        return torch.cat([*parts, a.new_zeros(len(a) - ends[-1], b.shape[-1])])
    if a.ndim == 2:  # groups of the axis that is summed over
        return torch.stack([a[:, start:end] @ b[start:end] for start, end in spans])
    return torch.cat([a[g] @ b[:, start:end] for g, (start, end) in enumerate(spans)], -1)
