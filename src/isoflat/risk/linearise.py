"""Choosing a product route: the cheapest that works and fits into memory."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import Tensor

from isoflat.core.state import State
from isoflat.risk.batches import rows_of
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.network import exactly
from isoflat.risk.routes.base import Linearisation
from isoflat.risk.routes.reverse import GradientGraph, Kept, Rebuilt


def linearise(risk: EmpiricalRisk, state: State, rows: int, memory: int) -> Linearisation:
    """The cheapest route that fits the memory budget.

    Args:
        risk: the empirical risk.
        state: the point.
        rows: examples in the data.
        memory: bytes that kept graphs may take.
    """
    with exactly(state.device):
        first = next(iter(risk.batches))
        forecast = graph_bytes(risk, state, first) * rows / max(rows_of(first), 1)
        if forecast > memory:
            return Rebuilt(risk, state)
        graphs = [GradientGraph.build(risk, state, batch) for batch in risk.batches]
    return Kept(risk, state, tuple(graphs))


def graph_bytes(risk: EmpiricalRisk, state: State, batch: Any) -> int:
    """Memory that one batch's gradient graph holds on to, measured by building it once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in state.tensors.values()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = GradientGraph.build(risk, state, batch)
    gradients = sum(g.numel() * g.element_size() for g in graph.gradients if g is not None)
    return sum(held.values()) + gradients


def available_memory(device: torch.device) -> int:
    """Free memory of the device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_memory(device: torch.device) -> int:
    """High-water mark of this process, or of the accelerator's allocations, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    info = psutil.Process().memory_info()
    # Linux and macOS keep the mark in the kernel; Windows reports it here.
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource
    import sys

    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return mark if sys.platform == "darwin" else mark * 1024
