"""Objects of the user's own code, named as `module:name` on the command line."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

from isoflat.core.errors import UsageError
from isoflat.core.raised import plain


def named(spec: str, what: str) -> Any:
    """The object that `module:name` names; modules in the working directory can be imported.

    Args:
        spec: module and name, for instance `mypkg.nets:build`.
        what: name of the option, for messages: `--model`.

    Raises:
        UsageError: the text is no such pair, there is no such module or name, or importing the module fails.

    >>> named("math:pi", "--model")
    3.141592653589793
    """
    module, colon, name = spec.partition(":")
    if not (colon and module and name):
        raise UsageError(f"{what} {spec}: expected module:name, for instance mypkg.nets:build")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise UsageError(
                f"{what} {spec}: no module named {error.name}, neither installed nor in the folder you are in"
            ) from error
        raise UsageError(f"{what} {spec}: importing {module} failed: {reason(error)}") from error
    except Exception as error:
        raise UsageError(f"{what} {spec}: importing {module} failed: {reason(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [known for known in vars(found) if not known.startswith("_")]
            raise UsageError(
                f"{what} {spec}: {module} has no {part!r}; it has {', '.join(sorted(public)[:12]) or 'none'}"
            )
        found = getattr(found, part)
    return found


def function(spec: str, what: str) -> Any:
    """A function named by `module:name`.

    Raises:
        UsageError: there is no such module or name, or the object cannot be called.
    """
    found = named(spec, what)
    if not callable(found):
        raise UsageError(f"{what} {spec}: expected a function, got {type(found).__name__}")
    return found


def reason(error: BaseException) -> str:
    """An exception of the user's code in a line: its type, message and the place it was raised at."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    message = plain(" ".join(str(error).split()))
    return f"{type(error).__name__}: {message[:300]}{place}"
