"""Loading of weights into a network: all of them in the right places, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from isoflat.core.errors import CheckpointError, UnsupportedModel
from isoflat.core.render import some
from isoflat.io.prefixes import NetworkNames, rename
from isoflat.io.weights import Weights


def fit(model: nn.Module, weights: Weights, prefixes: Sequence[str] = ()) -> tuple[str, ...]:
    """Load weights into a network strictly, after everything about them has been checked.

    Args:
        model: the network, changed in place; left as it is where anything does not fit.
        weights: weights from `read_weights`.
        prefixes: prefixes to remove from the names, in this order; those of the usual wrappers are found by themselves.

    Returns:
        Lines that say what was chosen while reading and fitting.

    Raises:
        CheckpointError: names, shapes or types differ; all differences are listed in one message.
        UnsupportedModel: a tensor of the network has no shape yet.
    """
    target = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    if lazy := [name for name, tensor in target.items() if nn.parameter.is_lazy(tensor)]:
        raise UnsupportedModel(f"tensors without a shape (lazy): {some(lazy)}. Run the network once in its factory")
    tied = _tied(target)
    tensors, notes = rename(weights, NetworkNames(frozenset(target), tied), prefixes)
    for names in tied:
        if held := [name for name in names if name in tensors]:
            tensors = {**dict.fromkeys(names, tensors[held[0]]), **tensors}
    # Files from before torch 0.4.1 lack these counters of training steps, which evaluation never reads.
    tensors = {**{name: target[name] for name in target if name.endswith("num_batches_tracked")}, **tensors}
    if problems := list(_problems(tensors, target, tied)):
        raise CheckpointError(
            f"{weights.source} does not fit {type(model).__name__}: {'; '.join(problems)}. Build the network these "
            "weights were trained in, or pick the right ones with --weights-key and --strip-prefix"
        )
    if rounded := [name for name, tensor in tensors.items() if not _exact(tensor, target[name])]:
        kinds = f"{tensors[rounded[0]].dtype} to {target[rounded[0]].dtype}"
        notes.append(f"weights rounded from {kinds} to fit the network: {some(rounded)}".replace("torch.", ""))
    notes += _set_epsilons(model, weights)
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{weights.source}: the network refuses its weights: {error}") from error
    return (*weights.notes, *notes)


def _set_epsilons(model: nn.Module, weights: Weights) -> list[str]:
    """Set the epsilons that belong to the weights in the modules of a network.

    Raises:
        CheckpointError: the network has no such number.
    """
    modules = dict(model.named_modules())
    notes = []
    for path, value in weights.epsilons.items():
        place, _, name = path.rpartition(".")
        held = vars(modules[place]).get(name) if place in modules else None
        if "eps" not in name or not isinstance(held, float):
            raise CheckpointError(
                f"{weights.source} comes with the epsilon {path!r}, which {type(model).__name__} does not have. Build the "
                "network these weights were made for"
            )
        notes.append(f"{path} = {value:.6g}, as it belongs to these weights (it was {held:g})")
    for path, value in weights.epsilons.items():
        place, _, name = path.rpartition(".")
        setattr(modules[place], name, value)
    return notes


def _tied(target: Mapping[str, Tensor]) -> list[list[str]]:
    """Groups of names that one tensor has: files often hold it under one of them only."""
    groups: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in target.items():
        if tensor.numel():
            groups.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _problems(
    tensors: Mapping[str, Tensor], target: Mapping[str, Tensor], tied: Sequence[Sequence[str]]
) -> Iterator[str]:
    """Iterate over the differences of weights and network, one text for each kind."""
    if missing := [name for name in target if name not in tensors]:
        yield f"missing {some(missing)}"
    if unexpected := [name for name in tensors if name not in target]:
        yield f"unexpected {some(unexpected)}"
    both = [(name, tensors[name], target[name]) for name in target if name in tensors]
    shapes = [
        f"{name} is {list(there.shape)}, not {list(wanted.shape)}"
        for name, there, wanted in both
        if there.shape != wanted.shape
    ]
    if shapes:
        yield f"wrong shape {some(shapes)}"
    types = [
        f"{name} is {there.dtype}, not {wanted.dtype}".replace("torch.", "")
        for name, there, wanted in both
        if _kind(there) != _kind(wanted)
    ]
    if types:
        yield f"wrong type {some(types)}"
    differing = [
        " and ".join(names)
        for names in tied
        if names[0] in tensors and any(not _same(tensors[name], tensors[names[0]]) for name in names)
    ]
    if differing:
        yield f"tied in the network but different in the file {some(differing)}"


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "floating" if tensor.is_floating_point() else "bool" if tensor.dtype is torch.bool else "integer"


def _exact(tensor: Tensor, wanted: Tensor) -> bool:
    """True if every value of a tensor's type is a value of the wanted one's."""
    if not (tensor.is_floating_point() and wanted.is_floating_point()):
        return True
    there, here = torch.finfo(tensor.dtype), torch.finfo(wanted.dtype)
    return here.eps <= there.eps and here.max >= there.max
