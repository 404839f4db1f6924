"""Activation checkpointing, switched off while a network is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint


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
