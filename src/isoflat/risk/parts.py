"""Data in parts, those examples first that carry most of the curvature.

An example enters the Hessian through the loss's derivatives in its output, `∂²ℓ/∂z²` and `∂ℓ/∂z`; for softmax
cross-entropy both are small where the prediction p is close to the target y, about `‖p − y‖ = ‖∂ℓ/∂z‖`. What that norm
is called here is the *hardness* of the example. It only decides the order in which data is looked at: nothing that is
measured depends on whether it was a good guess.
"""

from __future__ import annotations

from torch import Tensor

TAILS = (0.05, 0.005)
"""Shares of the total hardness that the parts after the first carry together, after the second, and so on. On a multilayer
perceptron and a LeNet on MNIST the norm of what was left was about twice that share of the whole."""

MINORITY = 0.35
"""Share of the data that the first part may have; where hard examples are more than that nothing is gained."""

FEWEST = 256
"""Least number of rows of a part: with fewer, what a pass costs does not depend on their number."""

WORTHWHILE = 2048
"""Least number of rows of data for which parts are worth while."""


def by_hardness(hardness: Tensor | None) -> tuple[Tensor, ...]:
    """The places of the examples of each part, in the order of the data; a single part where it does not pay.

    Args:
        hardness: hardness of each example, shape `(rows,)`; None if it is not known.

    >>> import torch
    >>> hardness = torch.full((10_000,), 1e-5)
    >>> hardness[::20] = 1.0
    >>> [len(part) for part in by_hardness(hardness)]
    [476, 256, 9268]
    """
    if hardness is None or len(hardness) < WORTHWHILE or not float(hardness.sum()) > 0:
        return ()
    order = hardness.argsort(descending=True, stable=True)
    tail = 1 - hardness[order].double().cumsum(0) / hardness.double().sum()
    cuts = [0]
    for share in TAILS:
        cut = max(int((tail > share).sum()) + 1, cuts[-1] + FEWEST)
        if cut + FEWEST <= len(order):
            cuts.append(cut)
    if len(cuts) == 1 or cuts[1] > MINORITY * len(order):
        return ()
    return tuple(order[a:b].sort().values for a, b in zip(cuts, [*cuts[1:], len(order)], strict=True))
