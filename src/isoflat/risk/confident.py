"""Cross-entropy of networks that are sure of nearly every target, without cancellation.

Loss, gradient and curvature of a target are about `1 − p`, the chance that is left beside the likeliest class. As they are
commonly computed they are differences of numbers next to 1, and off by eps: nothing where `1 − p` is eps. With the
likeliest class r they are sums of small numbers,

    log Σ_c exp z_c = z_r + log(1 + Σ_{c≠r} exp(z_c − z_r)),

and so are all their derivatives. Batches of which that is less than a square root of eps on average are computed so; all
others as torch does it, to the last bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

FEW = 16
"""Share of the rows, as a divisor, that is looked at first."""


def applied(criterion: Any, output: Tensor, target: Any) -> Tensor:
    """A criterion of output and target, in another arithmetic where the network is sure; its reduction is none or a sum."""
    if isinstance(criterion, nn.CrossEntropyLoss) and _sure_of_classes(criterion, output, target):
        found = _class_losses(criterion, output, target)
    elif isinstance(criterion, nn.BCEWithLogitsLoss) and _sure_of_labels(output):
        found = _label_losses(criterion, output, target)
    else:
        return criterion(output, target)
    return found if criterion.reduction == "none" else found.sum()


def _sure_of_classes(criterion: nn.CrossEntropyLoss, z: Tensor, target: Tensor) -> bool:
    """Test of whether the chance of the second class over that of the first is negligible on average, where targets count."""
    axis = 1 if z.ndim > 1 else 0
    if not z.ndim or z.shape[axis] < 2 or not z.is_floating_point() or is_mapped(z):
        return False
    counted = None if target.is_floating_point() else target != criterion.ignore_index
    count = z.numel() // z.shape[axis] if counted is None else int(counted.sum())
    most = math.sqrt(torch.finfo(z.dtype).eps) * count
    few = max(1, len(z) // FEW) if z.ndim > 1 else len(z)
    total = 0.0
    for rows in (slice(0, few), slice(few, None)):  # a few rows are nearly always enough to say no
        first, second = z.detach()[rows].topk(2, axis).values.unbind(axis)
        chances = (second - first).exp()
        total += float((chances if counted is None else chances[counted[rows]] if z.ndim > 1 else chances).sum())
        if not total <= most or few == len(z):
            break
    return count > 0 and total <= most


def _sure_of_labels(z: Tensor) -> bool:
    """Test of whether the chance of the other label is negligible on average."""
    if not z.numel() or not z.is_floating_point() or is_mapped(z):
        return False
    return float(z.detach().abs().neg().exp().mean()) <= math.sqrt(torch.finfo(z.dtype).eps)


def _class_losses(criterion: nn.CrossEntropyLoss, z: Tensor, target: Tensor) -> Tensor:
    """Loss of each target: `Σ_c a_c (−log p_c)`."""
    axis = 1 if z.ndim > 1 else 0
    classes, smoothing = z.shape[axis], criterion.label_smoothing
    weight = z.new_ones(classes) if criterion.weight is None else criterion.weight
    along = weight.view([-1 if dim == axis else 1 for dim in range(z.ndim)])
    top = z.detach().argmax(axis, keepdim=True)
    behind = (z.gather(axis, top) - z).scatter(axis, top, 0.0)
    others = (-behind).scatter(axis, top, -math.inf).exp().sum(axis)
    spread = torch.log1p(others)
    if target.is_floating_point():
        shares = along * (target * (1 - smoothing) + smoothing / classes)
        return shares.sum(axis) * spread + (shares * behind).sum(axis)
    counted = target != criterion.ignore_index
    own = target.where(counted, 0)
    held = weight[own]
    found = held * (spread + behind.gather(axis, own.unsqueeze(axis)).squeeze(axis))
    if smoothing:
        smooth = weight.mean() * spread + (along * behind).sum(axis) / classes
        found = (1 - smoothing) * found + smoothing * smooth
    return torch.where(counted, found, 0)


def _label_losses(criterion: nn.BCEWithLogitsLoss, z: Tensor, target: Tensor) -> Tensor:
    """Loss of each entry: `P y (−log p) + (1 − y) (−log(1 − p))`, weighted."""
    positive = target if criterion.pos_weight is None else criterion.pos_weight * target
    above = z > 0
    spread = torch.log1p(torch.where(above, -z, z).exp())
    found = (1 - target) * (torch.where(above, z, 0) + spread) + positive * (torch.where(above, 0, -z) + spread)
    return found if criterion.weight is None else criterion.weight * found


def is_mapped(tensor: Tensor) -> bool:
    """Test of whether a tensor stands for many, inside torch.func.vmap: its values decide nothing there."""
    inside = torch._C._functorch
    while inside.is_functorch_wrapped_tensor(tensor):
        if inside.is_batchedtensor(tensor):
            return True
        tensor = inside.get_unwrapped(tensor)
    return False
