"""Operations with kinks, noticed while a network runs: second differences across a kink are no second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_KINKED = (
    "relu", "threshold", "hardtanh", "hardswish", "hardsigmoid", "clamp", "abs", "max", "min", "round", "floor", "ceil",
    "trunc", "sign", "shrink", "l1_loss", "margin", "topk", "sort", "median", "quantile",
)  # fmt: skip
"""Parts of names of operations that have a kink or a jump."""

_SMOOTH = ("softmax", "softmin")
"""Parts of names that contain one of the above by chance."""

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
"""Types that are narrower than float64."""

_COMPARISONS = ("gt", "ge", "lt", "le")
"""Comparisons: where numbers are compared, something is chosen by them."""


@final
class Kinks(TorchDispatchMode):
    """A block that notices operations with kinks on floating-point numbers, and numbers narrower than float64.

    >>> with Kinks() as kinks:
    ...     _ = torch.tanh(torch.ones(2))
    >>> kinks.seen
    False
    >>> with kinks:
    ...     _ = torch.relu(torch.ones(2))
    >>> kinks.seen
    True
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False
        self.narrow = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch's compiler is not loaded for this, which takes a second."""
        return False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and note its name."""
        if not self.seen and any(isinstance(arg, Tensor) and arg.is_floating_point() for arg in args):
            name = str(getattr(func, "__name__", func)).partition(".")[0].strip("_")
            self.seen = name in _COMPARISONS or (
                any(part in name for part in _KINKED) and not any(part in name for part in _SMOOTH)
            )
        made = func(*args, **(kwargs or {}))
        self.narrow = self.narrow or (isinstance(made, Tensor) and made.dtype in _NARROW)
        return made
