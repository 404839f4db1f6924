"""Solvers in step: the same bits as alone, and one pass over the data for all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cases.operators import Job, Spectrum, in_lockstep
from isoflat.core.errors import NonFinite, UsageError
from isoflat.core.rng import stream
from isoflat.linalg.eigen.extremes import Extremes, Which
from isoflat.linalg.eigen.lanczos import Lanczos
from isoflat.linalg.eigen.power import PowerMethod
from isoflat.linalg.maps import Complement, Diagonal, Identity
from isoflat.linalg.operator import Operator, Pullback
from isoflat.linalg.solver import Domain, Request, Solver, Steps
from isoflat.linalg.trace.base import TraceEstimate
from isoflat.linalg.trace.hutchinson import Hutchinson

N = 60


def base(dtype: torch.dtype) -> Spectrum:
    return Spectrum(torch.randn(N, generator=stream(0, "base"), dtype=torch.float64).to(dtype))


def jobs(operator: Operator) -> list[Job]:
    """Different solvers, frames and an extra part, of very different lengths."""
    entries = torch.rand(N, generator=stream(0, "frame"), dtype=torch.float64)
    away = Complement(torch.eye(N, dtype=torch.float64)[:, :3])
    plus = Spectrum(torch.linspace(-1, 1, N).to(operator.dtype))
    return [
        Job(Pullback(operator, Identity(N)), Lanczos(rtol=1e-2), stream(1)),
        Job(Pullback(operator, Diagonal(entries)), Lanczos(rtol=1e-6, which=Which.SMALLEST), stream(2)),
        Job(Pullback(operator, Diagonal(entries), plus), Lanczos(rtol=1e-4), stream(3)),
        Job(Pullback(operator, away), Lanczos(rtol=1e-3, certify=False), stream(4)),
        Job(Pullback(operator, Identity(N)), Hutchinson(probes=10, block=4), stream(5)),
        Job(Pullback(operator, Diagonal(entries)), PowerMethod(max_products=9), stream(6)),
    ]


def numbers(result: Extremes | TraceEstimate) -> list[float]:
    if isinstance(result, TraceEstimate):
        return [result.value, result.standard_error, result.half_width, result.products]
    ends = (result.bottom, result.top)
    return [x for end in ends for x in (end.value, end.bound, end.slack, end.residual or 0.0)] + [result.products]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_together_gives_the_same_bits_as_alone(dtype):
    alone = [job.solver(job.operator, job.stream) for job in jobs(base(dtype))]
    operator = base(dtype)
    for result, outcome in zip(alone, in_lockstep(jobs(operator)), strict=True):
        assert numbers(result) == numbers(outcome.result)
        assert outcome.products == result.products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_passes_are_shared(dtype):
    """As many passes as the longest job has rounds; in float32, one more for all that float64 must confirm."""
    rounds = []
    for job in jobs(single := base(dtype)):
        single.seen.clear()
        job.solver(job.operator, job.stream)
        rounds.append(len(single.calls))
    operator = base(dtype)
    outcomes = in_lockstep(jobs(operator))
    longest = max(rounds)
    assert len(operator.calls) == longest + (dtype == torch.float32) - (dtype == torch.float32) * _ends_wide(rounds)
    assert sum(operator.calls) == sum(outcome.products for outcome in outcomes)
    assert len(operator.calls) < sum(rounds) / 2


def _ends_wide(rounds: list[int]) -> bool:
    """Whether the longest job is a certified one, whose last round is the shared pass in float64 itself."""
    return rounds.index(max(rounds)) in (0, 1, 2)


def test_status_lines_name_every_solver_under_way():
    lines: list[str] = []
    operator = base(torch.float64)
    in_lockstep(jobs(operator), lines.append)
    assert len(lines) == len(operator.calls)
    assert all(word in lines[0] for word in ("Lanczos", "trace", "power"))


@dataclass(frozen=True)
class Asking(Solver[Tensor]):
    """Asks once in float64, and returns what it gets."""

    vector: Tensor

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[Tensor]:
        return (yield Request(self.vector[:, None], double=True))[:, 0]


def test_float64_requests_get_float64_in_every_part():
    """1/3 in float32 differs from 1/3 in float64: neither the base nor the extra part may fall back."""
    vector = torch.full((N,), 1 / 3, dtype=torch.float64)
    operator, plus = Spectrum(torch.full((N,), 3.0)), Spectrum(torch.full((N,), 7.0))
    job = Job(Pullback(operator, Identity(N), plus), Asking(vector), stream(0))
    expected = 3 * vector + 7 * vector
    assert torch.equal(in_lockstep([job])[0].result, expected)
    assert torch.equal(job.solver(job.operator, stream(0)), expected)
    assert not torch.equal((operator.matmat(vector[:, None]) + plus.matmat(vector[:, None]))[:, 0], expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_not_finite_is_refused(bad):
    entries = torch.ones(N, dtype=torch.float64)
    entries[7] = bad
    for operator, plus in ((Spectrum(entries), None), (Spectrum(torch.ones(N)), Spectrum(entries))):
        pullback = Pullback(operator, Identity(N), plus)
        for solver in (Lanczos(), Hutchinson(probes=4), PowerMethod()):
            with pytest.raises(NonFinite, match="float64"):
                solver(pullback, stream(0))
            with pytest.raises(NonFinite, match="float64"):
                in_lockstep([Job(pullback, solver, stream(0))])


def test_a_frame_that_does_not_fit_is_refused():
    with pytest.raises(UsageError):
        Pullback(base(torch.float64), Identity(N + 1))
    with pytest.raises(UsageError):
        Pullback(base(torch.float64), Identity(N), Spectrum(torch.ones(N + 1)))


def test_frames_are_adjoint_and_projections_project():
    u, v = torch.randn(2, N, 3, generator=stream(0), dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(N, 4, generator=stream(1), dtype=torch.float64))
    for frame in (Identity(N), Diagonal(u[:, 0]), Complement(q)):
        assert (frame.rows, frame.columns) == (N, N)
        assert torch.allclose((frame.push(u) * v).sum(0), (u * frame.pull(v)).sum(0), rtol=1e-12)
    away = Complement(q).push(v)
    assert float((q.T @ away).abs().max()) < 1e-14
    assert torch.allclose(Complement(q).push(away), away, rtol=0, atol=1e-14)


def test_nothing_to_do():
    operator = base(torch.float64)
    assert in_lockstep([]) == []
    assert operator.calls == []
