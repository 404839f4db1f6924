"""Names that a pickle stream asks for, read off its opcodes: nothing in it is executed, and nothing is imported."""

from __future__ import annotations

import _compat_pickle as renamed
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, final


@final
@dataclass
class Requests:
    """Names that a stream asks for, `module.name`, and how the objects made from them are filled.

    Attributes:
        names: every name as Python 3 has it, by the name as it is in the stream.
        mappings: names of those whose objects receive items by key, as subclasses of dict do.
        lists: names of those whose objects receive items in order, as subclasses of list do.
    """

    names: dict[str, str] = field(default_factory=dict)
    mappings: set[str] = field(default_factory=set)
    lists: set[str] = field(default_factory=set)


def requests(file: BinaryIO, streams: int) -> Requests:
    """Everything that the first pickle streams of a file ask for; what follows damage is left out.

    Args:
        file: file opened for reading, at the start of the first stream.
        streams: number of streams.
    """
    found = Requests()
    for _ in range(streams):
        try:
            _follow(pickletools.genops(file), found)
        except (ValueError, IndexError):  # a damaged stream: the reader proper refuses it, and says where
            break
    return found


@final
@dataclass(frozen=True)
class _Followed:
    """A name on the stack, or an object made from it."""

    name: str
    made: bool = False


_MARK = object()


def _follow(operations: Iterator[tuple[Any, Any, Any]], found: Requests) -> None:
    """Follow the stack through a stream: only names, and objects made from them, are told apart.

    Raises:
        IndexError: the stream takes more from the stack than there is.
        ValueError: the stream is truncated, or holds an unknown opcode.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for operation, argument, _ in operations:
        match operation.name:
            case "GLOBAL":
                module, _, last = argument.partition(" ")
                name = found.names[f"{module}.{last}"] = _today(module, last)
                stack.append(_Followed(name))
            case "REDUCE" | "NEWOBJ":
                stack.pop()
                maker = stack.pop()
                stack.append(_Followed(maker.name, made=True) if isinstance(maker, _Followed) else None)
            case "BUILD":
                stack.pop()
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo.get(argument))
            case "MARK":
                stack.append(_MARK)
            case "SETITEM" | "SETITEMS" | "APPEND" | "APPENDS":
                _take(stack, operation)
                holder = stack[-1]
                if isinstance(holder, _Followed) and holder.made:
                    (found.mappings if operation.name.startswith("SET") else found.lists).add(holder.name)
            case _:
                _take(stack, operation, keep=0)
                stack += [None] * len(operation.stack_after)


def _take(stack: list[Any], operation: Any, keep: int = 1) -> None:
    """Take from the stack what an opcode takes, but for the lowest `keep` of it."""
    before = operation.stack_before
    marked = pickletools.markobject in before
    if marked:
        while stack.pop() is not _MARK:
            pass
    count = (before.index(pickletools.markobject) if marked else len(before)) - keep
    for _ in range(count):
        stack.pop()


def _today(module: str, name: str) -> str:
    """The full name under which Python 3 knows what old streams call by the name of Python 2."""
    module, name = renamed.NAME_MAPPING.get((module, name), (renamed.IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"
