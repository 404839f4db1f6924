"""Rules: how an operation relates the units of what goes in and what comes out. One file per family of operations.

A rule is `rule(constraints, node, *args, **kwargs) -> value`, called with the operation's own arguments, in which tensors are
`Activation`, `Stored` or `Known`. Each file lists its rules in a dictionary `RULES` by the operation's full overload
name, because overloads of one operation differ in what they do to units. An operation without a rule pins what it
touches, so that a missing rule can only make the group smaller.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

Rule = Callable[..., Any]


@cache
def rules() -> dict[str, Rule]:
    """Every rule of this package, by overload name.

    >>> "aten.linear.default" in rules()
    True
    """
    found: dict[str, Rule] = {}
    for info in pkgutil.iter_modules(__path__):
        found |= importlib.import_module(f"{__name__}.{info.name}").RULES
    return found
