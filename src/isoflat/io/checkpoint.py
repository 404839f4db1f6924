"""Files of `torch.save`, read by torch's restricted reader: tensors and plain containers, and stand-ins for the rest."""

from __future__ import annotations

import re
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import get_safe_globals, safe_globals

from isoflat.core.errors import CheckpointError
from isoflat.core.render import leading
from isoflat.io.archive import check_zip, is_zip, regular
from isoflat.io.opcodes import Requests, requests
from isoflat.io.standins import stand_ins

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
"""Endings of files that `torch.save` writes."""

SAFE = (
    "Where it was made, save the weights alone: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors'), "
    "or torch.save(model.state_dict(), 'weights.pt')"
)
"""Remedy for files that cannot be opened without running code."""

_LEGACY = 4
"""Number of pickle streams of a file from before torch 1.6, up to the one that holds the content."""

_ONE_READS = threading.Lock()
"""Held while the names of a file are answered: torch keeps its list of names for the whole process."""


def read_checkpoint(path: Path) -> tuple[Any, tuple[str, ...]]:
    """Content of a file of `torch.save`, and notes on what in it was passed over.

    Objects that are no tensors and no plain containers become stand-ins, which do nothing: options, configurations, numbers
    of NumPy. Functions that the file would have called are a reason to refuse it.

    Args:
        path: path of the file.

    Raises:
        CheckpointError: the file is missing, damaged, or needs code to be run.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 10):
        raise CheckpointError(
            f"{path}: torch {torch.__version__} reads such files with known holes; update to torch 2.10 or later, or "
            "convert the weights to safetensors"
        )
    archived = False
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            archived = is_zip(file)
            if archived:
                check_zip(file, path, regular(path))
            try:
                return torch.load(file, map_location="cpu", weights_only=True), ()
            except Exception as error:
                if _named(error) is None:
                    raise
            content, names = _with_stand_ins(file, archived)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile file may raise anything from within the reader
        raise _refused(path, error, archived=archived) from error
    note = f"{path.name} holds objects of {leading(names)}: none of their code was imported or run"
    return content, (note,) * bool(names)


def _with_stand_ins(file: BinaryIO, archived: bool) -> tuple[Any, list[str]]:
    """Content of a file, with stand-ins for objects that torch's reader does not know, and the names of their kinds."""
    wanted = _requests(file, archived)
    known = {given[1] if isinstance(given, tuple) else _full(given) for given in get_safe_globals()}
    pairs = stand_ins(wanted, known)
    file.seek(0)
    with _ONE_READS, safe_globals(list(pairs)):
        content = torch.load(file, map_location="cpu", weights_only=True)
    return content, sorted({name for name in wanted.names.values() if not _is_plain(name)})


def _is_plain(name: str) -> bool:
    """True for names of containers, numbers and tensors, which need not be told."""
    return name.startswith(("builtins.", "collections.", "numpy.", "_codecs.", "torch._")) or name.endswith("Storage")


def _requests(file: BinaryIO, archived: bool) -> Requests:
    file.seek(0)
    if not archived:
        return requests(file, _LEGACY)
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.split("/", 1)[-1] == "data.pkl")
        with archive.open(name) as stream:
            return requests(stream, 1)  # pyrefly: ignore


def _full(given: Any) -> str:
    return f"{given.__module__}.{given.__qualname__}"


def _named(error: Exception) -> str | None:
    """The name that torch's reader refused, where it refused one."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found and found[1]


def needs_code(path: Path, name: str) -> CheckpointError:
    """The refusal of a file that names a function or an object which only code could rebuild."""
    return CheckpointError(
        f"{path} needs pickle to rebuild {name}, and pickle can run any code in the file: refused. {SAFE}"
    )


def _refused(path: Path, error: Exception, archived: bool) -> CheckpointError:
    """An error that says why torch's restricted reader stopped, without its advice to switch the restriction off."""
    text = str(error)
    if named := _named(error):
        return needs_code(path, named)
    if type(error).__name__ == "UnpicklingError" and archived:
        return CheckpointError(f"{path} needs pickle, which can run any code in the file: refused. {SAFE}")
    if "TorchScript" in text:
        return CheckpointError(f"{path} is a TorchScript program, no file of weights: refused. {SAFE}")
    line = (
        "" if text.startswith("Weights only") else ": " + " ".join(text.split())[:160]
    )  # the advice to trust the file
    return CheckpointError(
        f"{path} cannot be read without running what it says: it needs pickle, or is truncated or corrupt "
        f"({type(error).__name__}{line}). {SAFE}"
    )


def doubts(tensor: Tensor) -> Iterator[str]:
    """Iterate over reasons not to use a tensor: it claims more entries than the file gave it memory for, or has no plain ones."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        yield f"is {tensor.layout}, quantised or without values, not plain and dense"
        return
    if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
        yield f"repeats its memory (stride 0) to fill the shape {tuple(tensor.shape)}"
    claimed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > held:
        yield f"claims {claimed} bytes in a storage of {held}"
