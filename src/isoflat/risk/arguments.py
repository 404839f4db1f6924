"""Arguments of the user's model and loss: how a batch is handed to them, and what does not fit, before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from isoflat.core.errors import UsageError
from isoflat.core.render import some

NAMED: dict[str, Any] = {"cross_entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss}
"""Losses by the names that the command line has for them."""

PAIR = "isoflat.BatchLoss(fn) with fn(model, batch) -> (sum, count)"
"""Form of a loss that is more than a function of output and target."""


def as_one(model: Any, inputs: Any) -> bool:
    """Test of whether a container of inputs is a model's only argument: it cannot be spread over the arguments.

    Args:
        model: the model.
        inputs: a list, tuple or mapping.

    >>> class Joined(nn.Module):
    ...     def forward(self, parts): ...
    >>> as_one(Joined(), [1, 2]), as_one(nn.Bilinear(1, 1, 1), [1, 2])
    (True, False)
    """
    if isinstance(inputs, PackedSequence):
        return True
    try:
        signature = inspect.signature(getattr(model, "forward", model))
    except (TypeError, ValueError):  # made in C
        return False
    spread = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    return not _fits(signature, *spread) and _fits(signature, (inputs,), {})


def check_arguments(loss: Callable[..., Any]) -> None:
    """Refuse a loss that cannot be called with output and target.

    Raises:
        UsageError: it takes other arguments.
    """
    function = getattr(loss, "forward", loss) if isinstance(loss, nn.Module) else loss
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # made in C
        return
    if _fits(signature, (None, None), {}):
        return
    names = ", ".join(signature.parameters)
    three = isinstance(loss, nn.Module) and {"anchor", "x1", "input1"} & set(signature.parameters)
    call = "criterion(*map(model, batch[:-1]), batch[-1])"
    if three and "anchor" in signature.parameters:
        call = "criterion(*map(model, batch))"
    example = f": fn = lambda model, batch: ({call} * len(batch[0]), len(batch[0]))" if three else ""
    raise UsageError(
        f"the loss {name_of(loss)} takes ({names}), but is called with two arguments, the model's output and the batch's "
        f"target. Pass {PAIR} as the loss{example}"
    )


def check_batch_loss(fn: Any) -> None:
    """Refuse a criterion where a function of model and batch is expected.

    Raises:
        UsageError: it is one, or cannot be called.
    """
    if isinstance(fn, nn.modules.loss._Loss) or any(fn is known for known in (F.cross_entropy, F.mse_loss, F.nll_loss)):
        raise UsageError(
            f"a BatchLoss needs a function of model and batch, got {name_of(fn)}, a function of output and target: pass it as "
            "the loss by itself, or call it inside a function of model and batch"
        )
    if not callable(fn):
        raise UsageError(f"a BatchLoss needs a function of model and batch, got {type(fn).__name__}")


def no_loss(loss: Any) -> UsageError:
    """The refusal of something that is no loss, with what was probably meant."""
    if isinstance(loss, str):
        known = NAMED.get(loss) or next((kind for kind in _criteria() if kind.__name__ == loss), None)
        meant = None if known is None else f"torch.nn.{known.__name__}()"
        if meant is None and callable(getattr(F, loss, None)):
            meant = f"torch.nn.functional.{loss}"
        what = f"loss={loss!r} is a name: pass the criterion itself"
        return UsageError(f"{what}, loss={meant}" if meant else f"{what}, such as loss=torch.nn.CrossEntropyLoss()")
    hint = ""
    if isinstance(loss, Tensor):
        hint = ". Inputs and targets are one argument: isoflat.measure(model, (inputs, targets), loss)"
    return UsageError(
        f"cannot use {type(loss).__name__} as a loss: expected a torch.nn criterion, a function of output and target, "
        f"or an isoflat.BatchLoss{hint}"
    )


def name_of(loss: Any) -> str:
    """Name of a loss in messages."""
    return type(loss).__name__ if isinstance(loss, nn.Module) else getattr(loss, "__name__", type(loss).__name__)


def held_in_loss(loss: Any, model: nn.Module) -> tuple[str, ...]:
    """Note on trainable tensors of a loss, which are constants of the risk: only the model's own move.

    Args:
        loss: as the user gave it.
        model: the network.
    """
    own = {id(parameter) for parameter in model.parameters()}
    found = {
        f"{type(part).__name__}.{name}": parameter
        for part in _modules_of(loss)
        for name, parameter in part.named_parameters()
        if parameter.requires_grad and id(parameter) not in own
    }
    if not found:
        return ()
    return (f"trainable tensors of the loss were held fixed: {some(found)} (measured if they are part of the model)",)


def _modules_of(loss: Any, seen: frozenset[int] = frozenset()) -> Iterator[nn.Module]:
    """Modules that a loss is or reaches: bound to it, in its closure, or given to it in advance."""
    if isinstance(loss, nn.Module):
        yield loss
        return
    if isinstance(loss, partial):
        parts: list[Any] = [loss.func, *loss.args, *loss.keywords.values()]
    else:
        cells = getattr(loss, "__closure__", None) or ()
        parts = [getattr(loss, "fn", None), getattr(loss, "__self__", None)]
        parts += [cell.cell_contents for cell in cells if _is_filled(cell)]
        parts += [part for part in _globals_of(loss) if isinstance(part, nn.Module)]
    for part in parts:
        if id(part) not in {*seen, id(loss)} and (
            isinstance(part, nn.Module | partial) or hasattr(part, "__closure__")
        ):
            yield from _modules_of(part, seen | {id(loss)})


def _globals_of(function: Any) -> list[Any]:
    """Global variables that the code of a function names."""
    known, code = getattr(function, "__globals__", {}), getattr(function, "__code__", None)
    return [known[name] for name in getattr(code, "co_names", ()) if name in known]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a name that has no value yet
        return False
    return True


def _criteria() -> list[type[nn.Module]]:
    return [kind for kind in vars(nn.modules.loss).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]


def _fits(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
