"""Exceptions of the user's own model, loss and data, in one line: what was raised, where, on which batch, and what to do.

They pass through the library as they are, since routes of products are chosen by what raises. At the end of a measurement,
or of one measure, their traceback tells whose code it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import PurePath
from traceback import walk_tb
from types import FrameType
from typing import Any, ParamSpec, TypeVar, final

import torch
from torch import Tensor, nn

from isoflat.core.errors import IsoflatError, UserCodeError
from isoflat.core.raised import first_line, is_out_of_memory
from isoflat.risk.arguments import PAIR, name_of
from isoflat.risk.batches import tensors

P = ParamSpec("P")
T = TypeVar("T")

_BOUNDARY = ("isoflat.risk.losses", "isoflat.risk.batches", "isoflat.risk.separability", "isoflat.risk.examples")
"""Modules that call the user's loss and read the data: what is raised in them comes from there."""

_MODES = ("isoflat.risk.second_order", "isoflat.core.precision")
"""Modules whose functions stand between the user's code and torch."""

_FIRST = ("_probe", "_works", "learned", "settled", "choose", "plan", "symmetries_of", "outputs")
"""Functions that look at the first batch, or some rows of it."""

_SHOWN = 6
"""Tensors of a batch whose shapes are said."""


@final
class InWords:
    """Block at whose end an exception of the user's code is told in one line; a lack of memory is none.

    Raises:
        UserCodeError: the user's model, loss or data raised something.
    """

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise what the exception is in words, with the exception as its cause."""
        found = translated(error) if isinstance(error, Exception) else None
        if found is not None:
            raise found from error


def told(opening: Callable[P, AbstractContextManager[T]]) -> Callable[P, AbstractContextManager[T]]:
    """A function that opens a block, `InWords` from its opening to its end."""

    @wraps(opening)
    @contextmanager
    def inside(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        with InWords(), opening(*args, **kwargs) as opened:
            yield opened

    return inside


def translated(error: Exception) -> UserCodeError | None:
    """The refusal that tells of an exception; None where it is no exception of the user's code."""
    if isinstance(error, IsoflatError) or is_out_of_memory(error):
        return None
    found = _Trail(tuple(frame for frame, _ in walk_tb(error.__traceback__)))
    if not found.is_users:
        return None
    line = first_line(error)
    kind = type(error).__name__
    said = line if line.startswith(kind) else f"{kind}: {line}"
    return UserCodeError(f"{found.place}{found.batch} raised {said.rstrip('.')}. {_remedy(found, str(error))}")


@final
@dataclass(frozen=True)
class _Trail:
    """Frames from the entry of the library down to where something was raised.

    Attributes:
        frames: the frames, outermost first.
    """

    frames: tuple[FrameType, ...]

    @cached_property
    def ours(self) -> tuple[FrameType, ...]:
        """Frames of the library that asked for something, outermost first."""
        return tuple(frame for frame in self.frames if _is_ours(frame))

    @cached_property
    def beyond(self) -> tuple[FrameType, ...]:
        """Frames below the last of the library's own."""
        last = max(place for place, frame in enumerate(self.frames) if _is_ours(frame))
        return self.frames[last + 1 :]

    @property
    def is_users(self) -> bool:
        """Test of whether what was raised came from the user's code, or from torch while it differentiated that."""
        if not self.ours:
            return False
        last = _module(self.ours[-1])
        if last in _BOUNDARY:
            return True
        names = [_module(frame) for frame in self.beyond if not _is_plumbing(frame)]
        if not names or {name.partition(".")[0] for name in names} <= {"numpy", "scipy"}:
            return False
        if last.startswith("isoflat.risk."):
            return True
        return any(
            name.startswith(("torch.nn.modules", "torch.autograd", "torch._functorch")) or not name.startswith("torch")
            for name in names
        )

    @cached_property
    def model(self) -> nn.Module | None:
        """The network, as a loss calls it."""
        for frame in reversed(self.ours):
            model = frame.f_locals.get("model")
            model = getattr(model, "_module", model)
            if isinstance(model, nn.Module):
                return model
        return None

    @cached_property
    def part(self) -> tuple[str, nn.Module] | None:
        """The innermost part of the network that was running, and its path."""
        if self.model is None:
            return None
        names = {id(part): (path, part) for path, part in self.model.named_modules()}
        running = (frame.f_locals.get("self") for frame in reversed(self.frames))
        return next((names[id(part)] for part in running if id(part) in names and isinstance(part, nn.Module)), None)

    @cached_property
    def loss(self) -> Any:
        """The loss in the library's form."""
        wanted = "isoflat.risk.losses"
        found = (frame.f_locals.get("self") for frame in reversed(self.ours) if _module(frame) == wanted)
        return next((loss for loss in found if hasattr(loss, "label")), None)

    @property
    def reads(self) -> bool:
        """Flag that the data was being read."""
        return _module(self.ours[-1]) in ("isoflat.risk.batches", "isoflat.risk.examples")

    @property
    def differentiates(self) -> bool:
        """Flag that torch was differentiating."""
        return self.loss is None and any(_module(frame).startswith("torch.autograd") for frame in self.beyond)

    @property
    def place(self) -> str:
        """Code that raised, in words."""
        where = ""
        for frame in reversed(self.beyond):
            if not _module(frame).startswith(("torch", "numpy", "scipy")) and not _is_plumbing(frame):
                where = f" ({PurePath(frame.f_code.co_filename).name}, line {frame.f_lineno})"
                break
        if self.reads:
            return f"reading the data{where}"
        if self.part is not None and self.model is not None:
            path, part = self.part
            kind = type(self.model).__name__
            inside = f" in its part '{path}', {_described(part)}" if path else ""
            return f"the forward pass of {kind}{inside}{where}"
        if self.differentiates:
            return f"the backward pass of model and loss{where}"
        return f"the loss{self._loss_name()}{where}"

    @property
    def batch(self) -> str:
        """Batch in words: its number and shapes, as far as the frames tell."""
        if self.reads:
            return ""
        for frame in reversed(self.ours):
            batch = frame.f_locals.get("moved", frame.f_locals.get("batch"))
            if batch is None:
                continue
            shapes = [f"{tuple(part.shape)} {part.dtype}".replace("torch.", "") for part in tensors(batch)]
            if shapes:
                more = f" and {len(shapes) - _SHOWN} more" if len(shapes) > _SHOWN else ""
                return f" on {self._number()} (tensors {', '.join(shapes[:_SHOWN])}{more})"
        return ""

    def local(self, name: str) -> Any:
        """Value of a variable in the innermost of the library's frames that has it."""
        return next((f.f_locals[name] for f in reversed(self.ours) if name in f.f_locals), None)

    def _number(self) -> str:
        index = self.local("index")
        if isinstance(index, int):
            return f"batch {index}"
        return "batch 0" if any(frame.f_code.co_name in _FIRST for frame in self.ours) else "a batch"

    def _loss_name(self) -> str:
        own = [getattr(self.loss, name, None) for name in ("criterion", "claimed_mean", "function", "fn")]
        named = next((name_of(part) for part in own if part is not None), "")
        return "" if named in ("", "<lambda>") else f" {named}"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_ours(frame: FrameType) -> bool:
    name = _module(frame)
    return name.partition(".")[0] == "isoflat" and not name.startswith(_MODES) and name != __name__


def _is_plumbing(frame: FrameType) -> bool:
    name = _module(frame)
    return name.partition(".")[0] in {*sys.stdlib_module_names, "isoflat", "tqdm"} - {"__main__"}


def _described(part: nn.Module) -> str:
    """Class of a layer with its sizes."""
    sizes = part.extra_repr()
    return f"{type(part).__name__}({sizes})" if 0 < len(sizes) <= 80 else type(part).__name__


def _remedy(found: _Trail, text: str) -> str:
    """The way out."""
    if found.reads:
        return (
            "Correct the dataset, or give a DataLoader whose collate_fn puts its examples together (batches may be tuples, dicts, "
            "dataclasses, or objects with a method .to)"
        )
    for words, remedy in _REMEDIES:
        if any(word in text for word in words):
            return remedy
    loss = found.loss
    if loss is not None and loss.label == "ModelLoss":
        return (
            "No loss was given, so the model was called on each batch as a whole, for an output with .loss: pass "
            "loss=torch.nn.CrossEntropyLoss() or another, with batches (inputs, targets)"
        )
    target, output = found.local("target"), found.local("output")
    if isinstance(target, Tensor) and isinstance(output, Tensor) and found.part is None:
        by_class = isinstance(getattr(loss, "criterion", None), nn.CrossEntropyLoss | nn.NLLLoss)
        return _of_targets(output, target, by_class or "target dtype to be Long" in text)
    if loss is not None and loss.label == "BatchLoss" and found.part is None:
        return "The function of a BatchLoss is called with model and batch, and returns (sum, count): a scalar tensor and a number"
    if found.part is not None:
        return (
            "Give inputs in the form that it was trained on: a tensor, a tuple of arguments, or a dict of arguments by name; for "
            f"any other call, and where a batch cannot be cut, pass {PAIR}, and all rows that belong together as one batch"
        )
    if found.differentiates:
        return "Replace the operation named there by one that torch can differentiate, or hold its tensors fixed with params="
    return f"A loss of more than output and target, or of rows that belong together, is {PAIR}, on one batch"


_REMEDIES: Sequence[tuple[tuple[str, ...], str]] = (
    (
        ("numpy() on Tensor", "tensor that requires grad to numpy", "data pointer of Tensor", "doesn't have storage"),
        "NumPy and SciPy cannot be differentiated: write that part of model and loss with torch",
    ),
    (
        ("Found dtype Long but expected", "Found dtype Int but expected"),
        "Give targets of a regression in floating point: targets.float()",
    ),
)
"""Remedies by what an exception says."""


def _of_targets(output: Tensor, target: Tensor, by_class: bool) -> str:
    """The remedy for output and targets that do not fit, of a function of both, which may be one of classes."""
    shapes = f"output {tuple(output.shape)} {output.dtype}, targets {tuple(target.shape)} {target.dtype}".replace(
        "torch.", ""
    )
    if by_class and target.is_floating_point() and target.shape != output.shape:
        return f"Classes are whole numbers: give targets.long(), or probabilities in the output's shape ({shapes})"
    plain = target.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(target)
    if plain and not target.is_floating_point() and target.numel() and output.ndim > 1 and target.ndim < output.ndim:
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= output.shape[1]:
            return (
                f"Targets go from {low} to {high}, and the output has {output.shape[1]} classes, 0 to {output.shape[1] - 1} "
                f"({shapes}): number classes from 0, and widen the last layer where there are more"
            )
    return (
        f"Bring output and targets into the form that the loss expects ({shapes}); a loss of more than these two, or of rows "
        f"that belong together, is {PAIR}, on one batch"
    )
