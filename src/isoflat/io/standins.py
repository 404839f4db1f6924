"""Stand-ins for objects in a checkpoint that weights do not need: they are filled as the file says, and do nothing.

Training scripts save options, paths, numbers of NumPy and configurations beside the weights. Their classes are never imported:
each name that the file asks for is answered by a stand-in of that name, so that no code of theirs can run.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

import numpy as np

from isoflat.io.opcodes import Requests

_PATHS = "Path PosixPath WindowsPath PurePosixPath PureWindowsPath"

CALLED = frozenset(
    f"{module}.{name}"
    for module, names in {
        "numpy": "dtype",
        "numpy.core.multiarray": "scalar _reconstruct",
        "numpy._core.multiarray": "scalar _reconstruct",
        "numpy.core.numeric": "_frombuffer",
        "numpy._core.numeric": "_frombuffer",
        "builtins": "frozenset slice range type getattr list dict tuple object int float str bool bytes",
        "collections": "defaultdict deque ChainMap UserDict",
        "pathlib": _PATHS,
        "pathlib._local": _PATHS,
        "datetime": "date datetime time timedelta timezone",
        "argparse": "Namespace",
        "types": "SimpleNamespace",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "uuid": "UUID",
        "functools": "partial",
        "operator": "getitem",
        "_operator": "getitem",
        "re": "_compile",
        "copyreg": "_reconstructor",
    }.items()
    for name in names.split()
)
"""Functions and classes of Python and NumPy that honest checkpoints call to rebuild plain values. Stand-ins answer for them,
too: the list says which calls are no reason to refuse a file."""


class _StandInType(type):
    """Class of the stand-ins' classes: what a file calls is a stand-in, or refused."""

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        """An inert object, whatever the arguments.

        Raises:
            RuntimeError: the name is a function, or a class that plain values do not need.
        """
        name = cls.__name__
        if not (name in CALLED or name.startswith("numpy.random.") or _may_be_class(name)):
            raise RuntimeError(f"GLOBAL {name}")
        return cls.__new__(cls, *arguments, **options)  # pyrefly: ignore


class StandIn(metaclass=_StandInType):
    """An object that the file describes and nobody built.

    Attributes:
        arguments: what it was to be made from.
        state: what it was to be filled with; None where the file gives nothing.
    """

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any, **_: Any) -> StandIn:
        """An object that keeps what it is given."""
        made = object.__new__(cls)
        made.arguments = arguments
        made.state = None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Mapping(StandIn):
    """Stand-in for classes whose objects receive items by key."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()  # torch's reader lets such a one have attributes, too


class _List(StandIn):
    """Stand-in for classes whose objects receive items in order."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return []


def stand_ins(wanted: Requests, known: set[str]) -> list[tuple[Any, str]]:
    """Pairs of a stand-in and the name it answers to, for `torch.serialization.safe_globals`.

    Args:
        wanted: names that the file asks for.
        known: names that need no stand-in.
    """
    made = []
    for name in sorted(set(wanted.names.values()) - known):
        base = _Mapping if name in wanted.mappings else _List if name in wanted.lists else StandIn
        kind = _StandInType(name, (base,), {})
        made += [(kind, given) for given in {name, *(old for old, new in wanted.names.items() if new == name)}]
    return made


def array_of(value: Any) -> np.ndarray | None:
    """A NumPy array of numbers that a file describes; None for anything else.

    >>> array_of("no array") is None
    True
    """
    if not isinstance(value, StandIn) or not type(value).__name__.endswith(".multiarray._reconstruct"):
        return None
    match value.state:
        case (int(), tuple(shape), StandIn() as kind, bool(by_columns), bytes(data)):
            dtype = _dtype_of(kind)
            if dtype is None or not all(isinstance(size, int) and size >= 0 for size in shape):
                return None
            if dtype.itemsize * int(np.prod(shape, dtype=object)) != len(data):
                return None
            return np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")
    return None


def _dtype_of(kind: StandIn) -> np.dtype | None:
    """Type of an array's numbers; None where it is no plain one."""
    if type(kind).__name__ != "numpy.dtype" or not isinstance(kind.state, tuple):
        return None
    code, order = (*kind.arguments, None)[0], (*kind.state, None, None)[1]
    if not isinstance(code, str) or code[:1] not in tuple("biuf") or order not in ("<", ">", "|", "="):
        return None
    try:
        return np.dtype(f"{order}{code}")
    except TypeError:
        return None


def _may_be_class(name: str) -> bool:
    """True for names outside Python's own library that are spelt as classes are: enumerations are rebuilt by a call."""
    module, _, last = name.rpartition(".")
    return module.partition(".")[0] not in sys.stdlib_module_names and last[:1].isupper()
