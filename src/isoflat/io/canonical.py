"""The canonical weights of a network as a file of weights."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import torch
from safetensors.torch import save as pack
from torch import Tensor, nn

from isoflat.core.errors import SymmetryViolated, UsageError
from isoflat.core.render import some
from isoflat.io.inputs import Loaded
from isoflat.measurement.subject import subject
from isoflat.modules.private import twin
from isoflat.risk.network import exactly
from isoflat.symmetry.canonical.representative import Epsilon, canonical, install
from isoflat.symmetry.found import VERSION, Found
from isoflat.symmetry.proof import TOLERANCE


def canonical_file(loaded: Loaded, found: Found, epsilon: Epsilon) -> tuple[dict[str, Any], bytes]:
    """Facts about the canonical weights of a network, and the content of a safetensors file with them.

    Args:
        loaded: the network and the data.
        found: symmetries of the network.
        epsilon: treatment of the epsilons of normalisations, as for `isoflat.canonicalize`.

    Raises:
        SymmetryViolated: the canonical network's outputs differ from the given one's.
    """
    model = loaded.model
    state = canonical(found, found.state(model), epsilon).state
    precise = twin(model).double()
    moved, rounded = install(precise, state), install(model, state)
    change = _change(found, model, moved)
    if not change <= TOLERANCE:
        raise SymmetryViolated(
            f"the canonical weights change the network's outputs by {change:.1e} of the largest (allowed: {TOLERANCE:g}), "
            "so that nothing was written. Are the given weights too badly scaled for float64, or is a rule wrong?"
        )
    before, after = found.constants(model), found.constants(rounded)
    epsilons = {path: {"before": before[path], "after": after[path]} for path in before if after[path] != before[path]}
    tensors = _tensors(rounded)
    held, touched = set(model.state_dict()), frozenset[str]().union(*(group.touches for group in found.symmetries))
    if lost := [name for name, _ in model.named_buffers() if name in touched and name not in held]:
        raise UsageError(
            f"buffers that no weights file holds would have to change ({some(lost)}): register them with persistent=True"
        )
    labels = {
        "format": "pt",
        "isoflat": metadata.version("isoflat"),
        "group_hash": found.hash,
        "rules": str(VERSION),
        "epsilons": json.dumps({path: value["after"] for path, value in epsilons.items()}),
    }
    facts = {
        "tensors": len(tensors),
        "dtype": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "group_hash": found.hash,
        "rules": VERSION,
        "fixed_epsilon": epsilon == "fixed",
        "epsilons": epsilons,
        "loss_ignores_common_score": found.blind,
        "output_change": change,
        "rounding_change": _change(found, model, rounded),
        "loss": {"before": _loss(loaded, precise), "after": _loss(loaded, moved)},
    }
    return facts, pack(tensors, labels)


def _change(found: Found, model: nn.Module, other: nn.Module) -> float:
    """Largest change of an output in float64, relative to the largest output."""
    one, two = (found.output(found.state(module).to(dtype=torch.float64)) for module in (model, other))
    return float((two - one).abs().max()) / (float(one.abs().max()) or 1.0)


def _loss(loaded: Loaded, model: nn.Module) -> float:
    """Loss on all the data, in float64."""
    target = subject(model, loaded.batches, loaded.loss)
    with exactly(target.state.device):
        return target.risk.value(target.state)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors for a weights file, each under its first name only."""
    kept: dict[tuple[Any, ...], str] = {}
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        kept.setdefault(place, name)
    return {name: state[name].detach().cpu().clone().contiguous() for name in kept.values()}
