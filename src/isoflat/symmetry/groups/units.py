"""Positive scalings of units: the reductive part of the group that tracing finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import scipy
import torch
from torch import Tensor

from isoflat.core.state import State
from isoflat.symmetry.groups.base import Symmetry
from isoflat.symmetry.motions import Field, Norm, Running
from isoflat.symmetry.relations import Solution


@final
@dataclass(frozen=True)
class Exponents:
    """Logarithm of a tensor's scale as a linear function of the group's coordinates z.

    Entry `[g, i, j, …]` of the view is multiplied by `exp(first[g, i] z + sign · second[g, j] z)`.

    Attributes:
        name: name of the tensor.
        view: shape `(g, i, j, k)`.
        first: sparse, shape `(g · i or 1, d)`.
        second: sparse, shape `(g · j or 1, d)`.
        sign: sign of the second term.
    """

    name: str
    view: tuple[int, int, int, int]
    first: scipy.sparse.csr_matrix
    second: scipy.sparse.csr_matrix
    sign: int

    def terms(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the factors of both kinds of units, broadcastable to the view; they add up."""
        coordinates = z.detach().double().numpy()
        a, b = (torch.from_numpy(part @ coordinates) for part in (self.first, self.second))
        g = self.view[0]
        a = a.view(g, -1, 1, 1) if len(a) > 1 else a.view(1, 1, 1, 1)
        b = b.view(g, 1, -1, 1) if len(b) > 1 else b.view(1, 1, 1, 1)
        return a, self.sign * b

    def log(self, z: Tensor) -> Tensor:
        """Logarithms of the factors, broadcastable to the view."""
        a, b = self.terms(z)
        return a + b

    def still(self) -> bool:
        """Test whether no element moves the tensor."""
        return self.first.nnz == 0 and self.second.nnz == 0


def exponents(entry: Field, solution: Solution) -> Exponents:
    """A field whose unknowns are solved for."""
    return Exponents(entry.name, entry.view, solution.rows(entry.first), solution.rows(entry.second), entry.sign)


@final
@dataclass(frozen=True)
class UnitScaling(Symmetry):
    """Every unit, channel or stream times a factor of its own; readers are divided by it.

    An element is the vector z of d log-factors. Variances of batch normalisations move so that `v + ε` scales; epsilons
    of normalisations whose input is scaled by u are multiplied by u² where a module holds them.

    Attributes:
        tensors: exponents of every tensor that moves.
        runnings: batch normalisations with the exponents of √(v + ε), sparse `(C, d)`.
        norms: normalisations with the exponents of each factor that they divide out, sparse `(factors, d)`.
        size: d.
    """

    tensors: tuple[Exponents, ...]
    runnings: tuple[tuple[Running, scipy.sparse.csr_matrix], ...]
    norms: tuple[tuple[Norm, scipy.sparse.csr_matrix], ...]
    size: int

    @property
    def touches(self) -> frozenset[str]:
        """Tensors that some element moves."""
        return frozenset(e.name for e in self.tensors) | {r.variance for r, rows in self.runnings if rows.nnz}

    @property
    def dimension(self) -> int:
        """Number of coordinates."""
        return self.size

    def sample(self, stream: torch.Generator, spread: float = 1.0) -> Tensor:
        """Normal log-factors; deviations of batch normalisations only grow, so that no variance falls below zero."""
        element = torch.randn(self.size, generator=stream, dtype=torch.float64) * spread
        for _, rows in self.runnings:
            single = np.flatnonzero(np.diff(rows.indptr) == 1)
            places = rows.indptr[:-1][single]
            columns = torch.from_numpy(rows.indices[places]).long()
            element[columns] = element[columns].abs() * torch.from_numpy(np.sign(rows.data[places]))
        return element

    def act(self, state: State, element: Tensor) -> State:
        """Multiply; new tensors."""
        moved: dict[str, Tensor] = {}
        for entry in self.tensors:
            tensor = state.tensors[entry.name]
            moved[entry.name] = _multiplied(tensor, entry.view, entry.terms(element))
        for running, rows in self.runnings:
            if rows.nnz:
                variance = state.tensors[running.variance]
                factor = torch.from_numpy(np.exp(2 * (rows @ element.numpy()))).to(variance)
                moved[running.variance] = (variance + running.epsilon) * factor - running.epsilon
        constants = dict(state.constants)
        for path, factor in self.epsilons(element).items():
            if path in constants:
                constants[path] = constants[path] * factor
        return replace(state.replace(moved), constants=constants)

    def epsilons(self, element: Tensor) -> Mapping[str, float]:
        """Factors by which each module's epsilon is multiplied."""
        factors: dict[str, float] = {}
        for norm, rows in self.norms:
            if norm.constant is not None and rows.nnz:
                factors[norm.constant] = float(np.exp(2 * (rows[0] @ element.numpy())[0]))
        return factors

    def velocity(self, state: State, rates: Tensor) -> dict[str, Tensor]:
        """`δT = T · (rates of its logarithms)`."""
        moving: dict[str, Tensor] = {}
        for entry in self.tensors:
            tensor = state.tensors[entry.name].detach().double()
            moving[entry.name] = (tensor.reshape(entry.view) * entry.log(rates).to(tensor.device)).view(tensor.shape)
        for running, rows in self.runnings:
            if rows.nnz:
                variance = state.tensors[running.variance].detach().double()
                speed = torch.from_numpy(2 * (rows @ rates.numpy())).to(variance.device)
                moving[running.variance] = (variance + running.epsilon) * speed
        return moving


def _multiplied(tensor: Tensor, view: tuple[int, ...], terms: tuple[Tensor, Tensor]) -> Tensor:
    """A tensor times `exp(a + b)`; one after the other, unless one of them alone would overflow."""
    apart = all(float(part.abs().max()) < 300 for part in terms) and tensor.dtype == torch.float64
    factors = [part.exp() for part in terms] if apart else [(terms[0] + terms[1]).exp()]
    made = tensor.reshape(view) * factors[0].to(tensor)
    for factor in factors[1:]:
        made *= factor.to(tensor)
    return made.view(tensor.shape)
