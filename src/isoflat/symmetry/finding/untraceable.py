"""Networks whose symmetries cannot be found: which part it is that cannot be traced, and the wrapper that helps."""

from __future__ import annotations

from pathlib import PurePath
from traceback import walk_tb

from torch import nn

from isoflat.core.errors import UnsupportedModel
from isoflat.core.raised import first_line

UNFORESEEN = (RuntimeError, IndexError, TypeError, ValueError, AttributeError, KeyError, AssertionError)
"""Errors of a rule that meets a use of its operation that it was not made for: the operation is then taken for an unknown one."""

_CHOICES = (
    "data-dependent",
    "data dependent",
    "datadependent",
    "_local_scalar_dense",
    "unbacked",
    "nonzero",
    "could not guard",
)
_TYPES = ("input type", "output type", "pytree", "not a supported type", "unsupported type", "expected example_inputs")

_REMEDIES = {
    _CHOICES: "A choice there hangs on values: wrap the network in a module whose forward takes the branch that is used, or "
    "write the choice with torch.where",
    _TYPES: "Wrap the network in a module whose forward takes tensors, builds what the network wants from them, and returns a "
    "tensor",
}

_OTHERWISE = (
    "Wrap the network in a module whose forward takes tensors of the shape that is used, leaves that part out or fixes what it "
    "does, and returns a tensor"
)


def unsupported(what: str, error: BaseException, module: nn.Module) -> UnsupportedModel:
    """The refusal of a network, in one line: what failed, in which part of it, and what helps.

    Args:
        what: what could not be done with the network.
        error: what was raised; its traceback names the part.
        module: the network that was run.
    """
    line = first_line(error)
    told = f"{type(error).__name__} {error}".lower()
    remedy = next((text for words, text in _REMEDIES.items() if any(word in told for word in words)), _OTHERWISE)
    place = _place(error, module)
    return UnsupportedModel(
        f"{what} ({line}){f', in {place}' if place else ''}. {remedy}; geometry='layerwise' needs no tracing"
    )


def _place(error: BaseException, module: nn.Module) -> str:
    """The innermost part of the network whose code was running, with file and line."""
    names = {id(part): (path, type(part).__name__) for path, part in module.named_modules()}
    found = ""
    for frame, line in walk_tb(error.__traceback__):
        part = frame.f_locals.get("self")
        path, kind = names.get(id(part), (None, ""))
        if path is None or frame.f_code.co_name in ("_call_impl", "_wrapped_call_impl", "__call__"):
            continue
        where = f"{PurePath(frame.f_code.co_filename).name}:{line}"
        found = f"'{path}' ({kind}, {where})" if path else f"{kind} ({where})"
    return found
