"""Layer-wise rescalings of chains of positively homogeneous layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.state import State
from isoflat.symmetry.base import Symmetry


@final
@dataclass(frozen=True)
class LayerScale(Symmetry):
    """The equivalence relation of Rangamani et al. 2019, section 2: layers l = 1…L multiplied by α_l > 0, ∏ α_l = 1.

    The bias of layer l is multiplied by α_1 ⋯ α_l. An element is the tensor of the L factors.

    Attributes:
        weights: names of the layers' weights, from input to output.
        biases: name of each layer's bias; None where it has none.

    >>> chain = LayerScale(("a", "b"), (None, None))
    >>> state = State({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    >>> chain.act(state, chain.element(2.0, 0.5)).vector.tolist()
    [6.0, 2.0]
    """

    weights: tuple[str, ...]
    biases: tuple[str | None, ...]

    def __post_init__(self) -> None:
        """Refuse a chain whose parts do not match."""
        if len(self.weights) < 2 or len(self.weights) != len(self.biases):
            raise UsageError(f"a chain needs two layers or more and one bias entry each, got {self.weights}")

    @staticmethod
    def sequential(state: State) -> LayerScale:
        """The chain that a feed-forward network would have: a proposal to be verified, not a finding.

        Weights are the tensors of two or more dimensions in the order of registration; a one-dimensional tensor that
        follows its layer's weight is its bias.

        Raises:
            UsageError: a tensor fits neither, or there are fewer than two layers.
        """
        weights: list[str] = []
        biases: list[str | None] = []
        for name, tensor in {**state.parameters, **state.frozen}.items():
            if tensor.ndim >= 2:
                weights.append(name)
                biases.append(None)
            elif weights and biases[-1] is None and name.rpartition(".")[0] == weights[-1].rpartition(".")[0]:
                biases[-1] = name
            else:
                raise UsageError(
                    f"'{name}' belongs to no layer of a chain; name the layers: LayerScale(weights, biases)"
                )
        return LayerScale(tuple(weights), tuple(biases))

    @property
    def label(self) -> str:
        """Name and tensors in a fixed spelling: another one would draw other random elements."""
        return f"LayerScale(weights={self.weights!r}, biases={self.biases!r})"

    @property
    def touches(self) -> frozenset[str]:
        """Weights and biases of the chain."""
        return frozenset(self.weights) | {bias for bias in self.biases if bias is not None}

    @property
    def dimension(self) -> int:
        """One less than the number of layers."""
        return len(self.weights) - 1

    def element(self, *factors: float) -> Tensor:
        """The group element with these factors.

        Raises:
            UsageError: not one positive factor per layer, or a product other than 1.
        """
        element = torch.tensor(factors, dtype=torch.float64)
        product = float(element.prod())
        if len(factors) != len(self.weights) or not bool((element > 0).all()) or abs(product - 1) > 1e-12:
            raise UsageError(
                f"expected {len(self.weights)} positive factors with product 1, got {factors} ({product:g})"
            )
        return element

    def sample(self, stream: torch.Generator, spread: float = 1.0) -> Tensor:
        """Log-normal factors, centred so that their product is 1."""
        logs = torch.randn(len(self.weights), generator=stream, dtype=torch.float64) * spread
        return (logs - logs.mean()).exp()

    def act(self, state: State, element: Tensor) -> State:
        """Multiply weights by their factor and biases by the factors up to their layer."""
        return state.replace(
            {name: state.tensors[name] * float(factor) for name, factor in self._factors(element) if factor != 1}
        )

    def velocity(self, state: State, rates: Tensor) -> dict[str, Tensor]:
        """`δW_l = c_l W_l`, `δb_l = (c_1 + … + c_l) b_l` for `c = Σ_j rates_j (e_j − e_{j+1})`."""
        own = torch.cat([rates, rates.new_zeros(1)]) - torch.cat([rates.new_zeros(1), rates])
        return {name: state.tensors[name].detach().double() * rate for name, rate in self._rates(own) if rate}

    def _factors(self, element: Tensor) -> Sequence[tuple[str, float]]:
        return self._pairs(element.tolist(), torch.cumprod(element, 0).tolist())

    def _rates(self, rates: Tensor) -> Sequence[tuple[str, float]]:
        return self._pairs(rates.tolist(), torch.cumsum(rates, 0).tolist())

    def _pairs(self, own: list[float], up_to: list[float]) -> Sequence[tuple[str, float]]:
        weights = list(zip(self.weights, own, strict=True))
        return weights + [(bias, value) for bias, value in zip(self.biases, up_to, strict=True) if bias is not None]
