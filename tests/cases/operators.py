"""Symmetric operators with known spectra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from isoflat.core.rng import stream
from isoflat.linalg.operator import Dense, Operator, Pullback
from isoflat.linalg.solver import Outcome, Solver
from isoflat.measurement.lockstep import Task, outcomes


@dataclass(frozen=True)
class Spectrum(Operator):
    """A diagonal matrix that writes down what it multiplies."""

    entries: Tensor
    seen: list[Tensor] = field(default_factory=list)

    @property
    def n(self) -> int:
        return len(self.entries)

    @property
    def dtype(self) -> torch.dtype:
        return self.entries.dtype

    @property
    def device(self) -> torch.device:
        return self.entries.device

    def matmat(self, vectors: Tensor) -> Tensor:
        self.seen.append(vectors)
        return (self.entries[:, None] * vectors.to(self.dtype)).double()

    def double(self) -> Operator:
        return self if self.dtype == torch.float64 else Spectrum(self.entries.double(), self.seen)

    @property
    def calls(self) -> list[int]:
        """Columns of each pass, the passes in float64 included."""
        return [vectors.shape[1] for vectors in self.seen]


def spectrum(values, dtype: torch.dtype = torch.float64) -> Spectrum:
    return Spectrum(torch.as_tensor(np.asarray(values, dtype=float)).to(dtype))


def rotated(values, seed: int = 0, dtype: torch.dtype = torch.float64) -> Dense:
    """A dense matrix with these eigenvalues in a random orthonormal basis."""
    values = torch.as_tensor(values, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=stream(seed, "basis"), dtype=torch.float64))
    matrix = (q * values) @ q.T
    return Dense(((matrix + matrix.T) / 2).to(dtype))


class Job(NamedTuple):
    """A solver on an operator, to run alone or in step with others."""

    operator: Pullback
    solver: Solver[Any]
    stream: torch.Generator


def in_lockstep(jobs: Sequence[Job], report: Callable[[str], None] = lambda _: None) -> list[Outcome]:
    """The outcomes of jobs that share passes."""
    return outcomes([Task.of(job.solver, job.operator, job.stream) for job in jobs], report)
