"""Entries of a network's output that a loss looks at: targets that are ignored leave the others free to differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isoflat.risk.losses import Loss, ModelLoss, TargetLoss, split
from isoflat.symmetry.found import Counted, output_tensors


def counted(loss: Loss, model: nn.Module, output: Any, batch: Any) -> Counted | None:
    """Entries of an output that the loss of a batch hangs on; None for all, or where that cannot be told for sure.

    Args:
        loss: the loss.
        model: the network.
        output: what the network gave for the batch.
        batch: the batch, on the network's device.
    """
    if isinstance(loss, TargetLoss):
        scores, target = getattr(output, "logits", output), split(batch)[1]
        mask = _of_targets(loss, scores, target) if isinstance(scores, Tensor) and _ignoring(target) else None
    elif isinstance(loss, ModelLoss) and isinstance(batch, Mapping) and _ignoring(batch.get("labels")):
        scores, mask = _of_labels(model, batch)
    else:
        return None
    if mask is None or bool(mask.all()):
        return None
    places = [place for place, tensor in enumerate(output_tensors(output)) if tensor.shape == scores.shape]
    return (places[0], mask) if len(places) == 1 else None


def _ignoring(target: Any) -> bool:
    """Test whether a target holds classes, and negative ones that stand for none."""
    return isinstance(target, Tensor) and _whole(target) and bool((target < 0).any())


def _whole(target: Tensor) -> bool:
    return not target.is_floating_point() and not target.is_complex() and target.dtype != torch.bool


def _of_targets(loss: TargetLoss, scores: Tensor, target: Tensor) -> Tensor | None:
    """Entries of scores whose target counts: as many for each target that does not must be without any slope."""
    if not scores.is_floating_point() or not target.numel() or scores.numel() % target.numel():
        return None
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for _ in range(3):
        z = torch.randn(scores.shape, generator=generator).to(scores).requires_grad_(True)
        with torch.enable_grad():
            total = loss.of(z, target, len(target)).total
        slope = torch.autograd.grad(total, z, allow_unused=True)[0] if total.requires_grad else None
        if slope is None:
            return None
        seen |= slope != 0
    ignored = int((target < 0).sum()) * (scores.numel() // target.numel())
    return seen if int((~seen).sum()) == ignored else None


def _of_labels(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Positions of scores that a model's own loss hangs on, shape `(rows, positions, 1)`; and the scores."""
    labels = batch["labels"]
    with torch.enable_grad():
        output = model(**batch)
    loss, scores = getattr(output, "loss", None), getattr(output, "logits", None)
    if not isinstance(loss, Tensor) or not isinstance(scores, Tensor) or scores.shape[:-1] != labels.shape:
        return labels, None
    slope = (
        torch.autograd.grad(loss, scores, allow_unused=True)[0] if loss.requires_grad and scores.requires_grad else None
    )
    if slope is None:
        return scores, None
    seen = (slope != 0).any(-1, keepdim=True)
    shifted = int((labels[:, 1:] < 0).sum()) + len(labels) if labels.ndim == 2 else -1
    ignored = int((~seen).sum())
    return scores, seen if ignored in (int((labels < 0).sum()), shifted) else None
