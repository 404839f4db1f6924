"""Records of known losses: curvature in the output, its square roots, and the law that labels are drawn from."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from isoflat.core.errors import UsageError
from isoflat.risk.likelihood.joint import of_function
from isoflat.risk.likelihood.known import of_criterion
from isoflat.risk.likelihood.records import Bernoulli, Categorical, Gaussian, Likelihood
from isoflat.risk.losses import Loss, TargetLoss

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "likelihood"]


def likelihood(loss: Loss, z: Tensor, target: Any) -> Likelihood:
    """The likelihood of which a loss, summed over the targets, is the negative logarithm.

    Args:
        loss: the loss.
        z: output of the model as one tensor, that the loss is a function of.
        target: target that it is compared with.

    Raises:
        UsageError: it is of no kind that labels can be drawn from.
    """
    found = None
    if isinstance(loss, TargetLoss) and target is not None:
        known = loss.criterion is not None and not isinstance(loss.criterion, nn.GaussianNLLLoss)
        found = of_criterion(loss.criterion, z, target) if known else of_function(loss, z, target)
    if found is None:
        criterion = loss.criterion if isinstance(loss, TargetLoss) else None
        came = loss.label if criterion is None else type(criterion).__name__
        raise UsageError(
            f"labels cannot be drawn from the loss ({came}): expected CrossEntropyLoss, NLLLoss, BCEWithLogitsLoss, BCELoss, "
            "PoissonNLLLoss, GaussianNLLLoss, or MSELoss with targets in the output's shape, from torch.nn, or a function of "
            "output and target that adds up such losses of torch.nn.functional, with batches (inputs, targets). The "
            "Gauss-Newton matrix needs no labels"
        )
    return found
