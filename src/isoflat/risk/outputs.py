"""Outputs of several tensors (tuples, mappings, records, distributions), packed into one tensor and back.

What looks at a loss as a function of the model's output (Gauss-Newton, Fisher, the order of the data) looks at one tensor
z. An output of several is packed into one: side by side along dimension 1 where all have the rows along dimension 0.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from isoflat.core.errors import UsageError


@final
@dataclass(frozen=True)
class Layout:
    """Structure of an output.

    Attributes:
        example: output as the model returned it.
        leaves: tensors in it that the loss reads, in order.
        rowed: flag that all have the rows along dimension 0.

    >>> layout = Layout.of((torch.ones(2, 3), torch.zeros(2)), lambda output: output[0].sum() + output[1].sum())
    >>> layout.pack().shape, [tuple(part.shape) for part in layout.unpack(layout.pack())]
    (torch.Size([2, 4]), [(2, 3), (2,)])
    """

    example: Any
    leaves: tuple[Tensor, ...]
    rowed: bool

    @staticmethod
    def of(output: Any, use: Callable[[Any], Any]) -> Layout:
        """Structure of an output that a function reads.

        Raises:
            UsageError: it reads no tensor of it.
        """
        found = {id(leaf): leaf for leaf in leaves(output)}
        with torch.no_grad(), _Touched(found) as touched:
            use(output)
        read = tuple(leaf for key, leaf in found.items() if key in touched.seen)
        if not read:
            raise UsageError(
                f"the loss reads no floating-point tensor of the model's output ({described(output)}): expected a function "
                "of output and target"
            )
        sizes = {leaf.shape[0] if leaf.ndim else None for leaf in read}
        return Layout(output, read, len(sizes) == 1 and None not in sizes)

    def pack(self) -> Tensor:
        """The tensors as one: itself where it is one, `(rows, entries)` where all have rows, else flat."""
        if len(self.leaves) == 1:
            return self.leaves[0]
        if self.rowed:
            return torch.cat([leaf.reshape(len(leaf), -1) for leaf in self.leaves], 1)
        return torch.cat([leaf.reshape(-1) for leaf in self.leaves])

    def unpack(self, z: Tensor) -> Any:
        """The output with other values, of as many rows as z has."""
        if len(self.leaves) == 1:
            return _with(self.example, {id(self.leaves[0]): z})
        shapes = [leaf.shape[1:] if self.rowed else leaf.shape for leaf in self.leaves]
        parts = z.split([shape.numel() for shape in shapes], -1)
        made = (
            part.reshape(*z.shape[: int(self.rowed)], *shape).to(leaf.dtype)
            for part, shape, leaf in zip(parts, shapes, self.leaves, strict=True)
        )
        return _with(self.example, {id(leaf): part for leaf, part in zip(self.leaves, made, strict=True)})


def leaves(output: Any) -> Iterator[Tensor]:
    """Floating-point tensors of an output, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
        return
    for value in _members(output).values():
        yield from leaves(value)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tuples, lists and mappings with every tensor changed.

    >>> mapped({"a": (torch.ones(1), None)}, lambda tensor: tensor + 1)
    {'a': (tensor([2.]), None)}
    """
    if isinstance(value, Tensor):
        return change(value)
    return _rebuilt(value, {key: mapped(inside, change) for key, inside in _members(value).items()})


def described(output: Any) -> str:
    """An output in words: its kind, and the shapes in it."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    members = _members(output)
    shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves(output))
    return f"{type(output).__name__} of shapes {shapes}" if members and shapes else type(output).__name__


class _Touched(TorchFunctionMode):
    """Notes which of some tensors are computed with."""

    def __init__(self, known: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.known = known
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # not shape, dtype, device
            self._note((*args, *(kwargs or {}).values()))
        return func(*args, **(kwargs or {}))

    def _note(self, given: Any) -> None:
        for value in given:
            if isinstance(value, Tensor) and id(value) in self.known:
                self.seen.add(id(value))
            elif isinstance(value, list | tuple):
                self._note(value)


def _members(value: Any) -> dict[Any, Any]:
    """Parts of a value: entries, or attributes of a record; none where it is no container."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    if isinstance(value, nn.Module | type) or callable(value) or not hasattr(value, "__dict__"):
        return {}
    return {key: part for key, part in vars(value).items() if isinstance(part, Tensor | Distribution)}


def _with(value: Any, new: Mapping[int, Tensor]) -> Any:
    """A copy of a value in which some tensors, by identity, are replaced."""
    if isinstance(value, Tensor):
        return new.get(id(value), value)
    return _rebuilt(value, {key: _with(inside, new) for key, inside in _members(value).items()})


def _rebuilt(value: Any, members: dict[Any, Any]) -> Any:
    """A copy of a value with other members."""
    if not members:
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*members.values())
    if type(value) in (list, tuple, dict):
        return members if type(value) is dict else type(value)(members.values())
    if isinstance(value, list | tuple):
        return type(value)(members.values())
    made = copy.copy(value)
    for key, inside in members.items():
        if isinstance(value, Mapping):
            made[key] = inside
        else:
            object.__setattr__(made, key, inside)
    return made
