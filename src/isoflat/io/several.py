"""Several checkpoints of one architecture, loaded side by side."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch

from isoflat.core.errors import UsageError
from isoflat.core.render import visible
from isoflat.io.inputs import Inputs, try_forward
from isoflat.io.model import find_loss
from isoflat.measurement.subject import subject
from isoflat.measures.settings import Settings
from isoflat.risk.batches import Batches

_ENDINGS = (".index.json", ".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Endings of files of weights, taken off in this order to make labels."""


@final
@dataclass(frozen=True)
class LoadedNetworks:
    """Networks that can be compared, and what they are measured on.

    Attributes:
        models: networks by label, in evaluation mode, each with its weights.
        batches: data that all are measured on.
        loss: loss function, as for `isoflat.compare`.
        notes: lines that say what was chosen while loading.
    """

    models: Mapping[str, torch.nn.Module]
    batches: Batches
    loss: Any
    notes: tuple[str, ...]


def load_several(inputs: Inputs, files: Mapping[str, Path], settings: Mapping[str, Any]) -> LoadedNetworks:
    """Build every network and load its weights, read the data once, and check that all networks run on it.

    Args:
        inputs: names that the user gave; the weights among them are not used.
        files: paths of weights files by label.
        settings: `params`, `dtype` and `device`, as for `isoflat.measure`.

    Raises:
        IsoflatError: something cannot be found, opened or fitted; nothing has been measured then.
    """
    loss = find_loss(inputs.loss)
    models: dict[str, torch.nn.Module] = {}
    notes: list[str] = []
    for label, path in files.items():
        own: list[str] = []
        models[label] = replace(inputs, weights=path).network(own.append)
        notes += [f"{label}: {note}" for note in own]
    _check_apart(models, inputs.model)
    batches = inputs.read(notes.append)
    for model in models.values():
        try_forward(subject(model, batches, loss, Settings(**settings)))
    return LoadedNetworks(models, batches, loss, tuple(notes))


def _check_apart(models: Mapping[str, torch.nn.Module], factory: str) -> None:
    """Refuse networks that share tensors: the weights loaded last would be in all of them."""
    owner: dict[int, str] = {}
    for label, model in models.items():
        for name, tensor in model.state_dict(keep_vars=True).items():
            place = tensor.untyped_storage().data_ptr() if hasattr(tensor, "untyped_storage") else 0
            if place and owner.setdefault(place, label) != label:
                raise UsageError(
                    f"--model {factory}: the networks it builds share the tensor '{name}', so that weights loaded into one "
                    "change the others: build everything anew at each call"
                )


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names for files, all different: a file's own, with its ending or folders where these tell files apart.

    >>> labels([Path("runs/small.safetensors"), Path("runs/large.safetensors")])
    ['small', 'large']
    >>> labels([Path("a/best.pt"), Path("b/best.pt"), Path("last.pt"), Path("last.ckpt"), Path("c.pt"), Path("c.pt")])
    ['a/best', 'b/best', 'last.pt', 'last.ckpt', 'c', 'c (2)']
    """
    short = [_stem(path.name) for path in paths]
    found = list(short)
    for stem in set(short):
        same = [index for index, name in enumerate(short) if name == stem]
        whole = [Path(os.path.abspath(paths[index])) for index in same]  # noqa: PTH100 (links keep their names)
        if len(same) == 1 or len(set(whole)) == 1:
            continue
        if len({path.name for path in whole}) == len(same):
            apart = [path.name for path in whole]
        else:
            common = os.path.commonpath([path.parent for path in whole])
            inside = [path.relative_to(common) for path in whole]
            stems = [(path.parent / _stem(path.name)).as_posix() for path in inside]
            apart = stems if len(set(stems)) == len(set(whole)) else [path.as_posix() for path in inside]
        for index, name in zip(same, apart, strict=True):
            found[index] = name
    unique: list[str] = []
    for name in map(visible, found):
        numbered = (name if count == 1 else f"{name} ({count})" for count in itertools.count(1))
        unique.append(next(label for label in numbered if label not in unique))
    return unique


def _stem(name: str) -> str:
    """A file's name without the endings of weights files.

    >>> _stem("model.safetensors.index.json"), _stem("epoch.3.ckpt"), _stem(".pt")
    ('model', 'epoch.3', '.pt')
    """
    for ending in _ENDINGS:
        name = name.removesuffix(ending) or name
    return name
