"""Groups that act on a network's tensors without changing its function."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from isoflat.core.errors import NondeterministicRisk, NonFinite, SymmetryViolated
from isoflat.core.state import State


class Symmetry(ABC):
    """A continuous group acting linearly on named tensors.

    Laws: `act` with the identity changes nothing, composition and inverses hold, the network's output is the same
    (`verify` proves it on the network), and the generators lie in the kernel of the network's Jacobian.
    """

    @property
    def label(self) -> str:
        """Text from which its proof draws random elements; a symmetry that users declare spells it out, so that it stays."""
        return repr(self)

    @property
    @abstractmethod
    def touches(self) -> frozenset[str]:
        """Names of the tensors it acts on."""

    @property
    @abstractmethod
    def dimension(self) -> int:
        """Dimension of the group."""

    def sample(self, stream: torch.Generator, spread: float = 1.0) -> Tensor:
        """A random group element; `spread` is the standard deviation of its logarithms, or of what it adds."""
        return torch.randn(self.dimension, generator=stream, dtype=torch.float64) * spread

    @abstractmethod
    def act(self, state: State, element: Tensor) -> State:
        """The state moved along the orbit; new tensors."""

    @abstractmethod
    def velocity(self, state: State, rates: Tensor) -> dict[str, Tensor]:
        """Velocity of every tensor that moves, when the group's coordinates move at these rates; float64."""

    @final
    def generators(self, state: State) -> Tensor:
        """Vertical directions of the trainable tensors at a state, shape `(n, dimension)`, float64."""
        columns = []
        for rates in torch.eye(self.dimension, dtype=torch.float64):
            moving = self.velocity(state, rates)
            columns.append(
                torch.cat(
                    [
                        moving.get(name, torch.zeros_like(tensor)).double().reshape(-1)
                        for name, tensor in state.parameters.items()
                    ]
                )
            )
        return torch.stack(columns, dim=1)


def verify(
    symmetry: Symmetry,
    output: Callable[[State], Tensor],
    state: State,
    stream: torch.Generator,
    spread: float = 2.0,
    samples: int = 3,
) -> float:
    """Apply random group elements to the real network in float64 and compare outputs.

    Args:
        symmetry: the claimed group.
        output: the network's output on real inputs, as a function of the state.
        state: where to start.
        stream: randomness.
        spread: standard deviation of the logarithms of the group elements.
        samples: number of elements to try.

    Returns:
        The largest relative change seen, at rounding level for a true symmetry.

    Raises:
        SymmetryViolated: an output changed by more than 1e-9 of its size.
        NondeterministicRisk: outputs differ where nothing was moved.
        NonFinite: an output is no number where nothing was moved.
    """
    precise = state.to(dtype=torch.float64)
    before = output(precise).detach().double()
    if not bool(torch.isfinite(before).all()):
        raise NonFinite(
            f"the network's output holds NaN or infinity before {symmetry} moves anything, so that it cannot be proved: look "
            "for NaN in the inputs, or for rows of attention that are masked whole"
        )
    size = float(before.abs().max())
    worst = 0.0
    for _ in range(samples):
        after = output(symmetry.act(precise, symmetry.sample(stream, spread))).detach().double()
        change = float((after - before).abs().max())
        worst = max(worst, change / size if size else change) if math.isfinite(change) else math.inf
        if not worst <= 1e-9:
            again = float((output(precise).detach().double() - before).abs().max())
            if not again <= 1e-9 * size:
                raise NondeterministicRisk(
                    f"the network's output is random: two passes over the same inputs differ by {again:.2e}, so that {symmetry} "
                    "cannot be proved. Call model.eval(), and draw noise outside the network"
                )
            how = f"by {worst:.2e} of its size (allowed: 1e-9)" if math.isfinite(worst) else "to NaN or infinity"
            raise SymmetryViolated(
                f"{symmetry} changes the network's output {how}, on {', '.join(sorted(symmetry.touches))}. Expected "
                "positively homogeneous activations between the named layers and no other path around them"
            )
    return worst
