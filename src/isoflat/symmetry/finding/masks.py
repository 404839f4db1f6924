"""Stored masks of attention: constants of the network, though they are kept in tensors that could be moved.

Nothing can be added to a number as far out as a mask's and be seen again, and infinity times zero is no number.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.finding.rules.views import COPIES, MOVES, RESHAPES

FAR = 1e-9 / torch.finfo(torch.float64).eps
"""Size at which a number keeps fewer digits than proofs ask of what is added to it, where that is of size one."""

_SOFTMAX = ("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
_CASTS = ("_to_copy", "to", "type_as")
_SUMS = ("add", "add_", "sub", "mul", "masked_fill", "masked_fill_", "where", "baddbmm", "addmm")
_ATTENTION = "aten.scaled_dot_product_attention.default"


@final
class Masks:
    """Tests of stored tensors that the gradient does not reach."""

    def __init__(self) -> None:
        """Start with nothing remembered."""
        self._reaching: dict[Node, bool] = {}

    def is_constant(self, node: Node, tensor: Tensor) -> bool:
        """Test whether a tensor holds infinity, or numbers so far out that nothing but a softmax makes sense of them.

        Args:
            node: where the network reads it.
            tensor: its values.
        """
        if tensor.requires_grad or not tensor.numel():
            return False
        largest = float(tensor.abs().max())
        # Whatever is no number is measured as such elsewhere; here it must not spread to what could be moved with it.
        return not largest < float("inf") or (largest >= FAR and self._only_masks(node))

    def _only_masks(self, node: Node) -> bool:
        """Test whether a node does nothing but decide which entries a softmax sees."""
        if node not in self._reaching:
            self._reaching[node] = bool(node.users) and all(self._masks(user, node) for user in node.users)
        return self._reaching[node]

    def _masks(self, user: Node, node: Node) -> bool:
        name = str(user.target)
        space, operation, *_ = [*name.split("."), ""]
        if name == _ATTENTION:
            given = user.args[3] if len(user.args) > 3 else user.kwargs.get("attn_mask")
            return given is node and node not in user.args[:3]
        if space != "aten" or operation.startswith("_assert"):
            return operation.startswith("_assert")
        if operation in _SOFTMAX:
            return True
        moved = name in COPIES | MOVES | RESHAPES or operation in (*_CASTS, *_SUMS)
        return moved and self._only_masks(user)
