"""Relative flatness of the last convolution, where pooling and a linear layer follow it.

With `z = V φ (+ b)`, `φ_c` the mean over S positions of `relu(⟨w_c, patch⟩ + b_c)`, a row's score moves with the kernel w_c
as `∂z/∂w_c = V_:c ψ_cᵀ`, `ψ_c = (1/S) Σ_{active positions} patch`. So under softmax cross-entropy the Hessian's block of the
kernels c and c' is `E[V_:cᵀ (diag p − p pᵀ) V_:c' ψ_c ψ_c'ᵀ]`: no derivative is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.space import norm
from isoflat.curvature.block_trace import check_blocks
from isoflat.geometry.base import Invariance
from isoflat.measures.base import DataStatistic, Findings, Measure
from isoflat.measures.entries.last_layer import gain
from isoflat.measures.point import EvaluationPoint
from isoflat.risk.likelihood import likelihood
from isoflat.risk.likelihood.records import covariance
from isoflat.risk.network import exactly
from isoflat.risk.ranks import BatchSum
from isoflat.risk.routes.output import output_of

MEMORY = 1 << 28
"""Bytes that the patches of a few rows may take."""

ROUNDING = 1000
"""Roundings that scores computed again may differ by, in units of their size."""

_Call = tuple[str, nn.Conv1d | nn.Conv2d, Tensor, Tensor]


@final
@dataclass(frozen=True)
class _Layers:
    """The last convolution and the linear layer, in one batch.

    Attributes:
        name: name of the kernel.
        module: the convolution.
        kernel: shape `(channels, in, *window)`.
        inputs: inputs of the convolution, shape `(rows, in, *positions)`.
        output: output of the convolution, shape `(rows, channels, *positions)`.
        head: V times the factor of the scores, shape `(classes, channels)`.
        z: scores, shape `(rows, classes)`.
        count: counted targets or their weights.
    """

    name: str
    module: nn.Conv1d | nn.Conv2d
    kernel: Tensor
    inputs: Tensor
    output: Tensor
    head: Tensor
    z: Tensor
    count: float


@final
@dataclass(frozen=True)
class _KernelTrace(DataStatistic):
    """`Σ_cc' ⟨w_c, w_c'⟩ tr H_cc'` of the last convolution."""

    framed = False

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> tuple[float, str]:
        """One forward pass, once the scores are seen to be linear in the kernel."""
        risk, state = point.risk, point.state
        names: list[str] = []

        def per_batch(index: int, batch: Any) -> BatchSum:
            with torch.no_grad():
                layers = _layers(point, batch)
                names.append(layers.name)
                mass = likelihood(risk.loss, layers.z, risk.target(state, batch)).mass.double()
                total = sum(_contracted(layers, mass, rows) for rows in _pieces(layers))
            return BatchSum(torch.as_tensor(total, device=state.device).reshape(1), layers.count)

        with exactly(state.device), torch.no_grad():
            name = _layers(point, next(iter(risk.batches))).name
        check_blocks(risk, state, [name])
        point.report("last convolution")
        with exactly(state.device):
            value = risk.accumulate(per_batch, torch.zeros(1, dtype=torch.int8, device=state.device))
        if set(names) - {name}:
            raise UsageError(f"the last convolution is {name} in one batch and another in others")
        return float(value), name


def _layers(point: EvaluationPoint, batch: Any) -> _Layers:
    """Layers that a batch passes on its way to the scores.

    Raises:
        UsageError: the scores are not those of convolution, ReLU, mean over all positions and linear layer.
    """
    linear: list[str] = []
    convolution: list[_Call] = []
    with ExitStack() as stack:
        for path, module in point.risk.network.module.named_modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(_name(linear, path)).remove)
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                stack.callback(module.register_forward_hook(_last(convolution, path), with_kwargs=True).remove)
        term = point.risk.term(point.state, batch)
    z = output_of(term)
    if not linear or not convolution:
        raise UsageError(f"{_KNOWN}: the network has no such layers")
    path, module, inputs, output = convolution[0]
    tensors = point.state.tensors
    head, kernel = tensors.get(_inside(linear[-1], "weight")), point.state.parameters.get(_inside(path, "weight"))
    if head is None or kernel is None:
        raise UsageError(f"the last convolution's {_inside(path, 'weight')} is held fixed, or tied to another tensor")
    if module.groups > 1 or output.ndim != kernel.ndim or z.ndim != 2 or output.shape[1] != head.shape[1]:
        raise UsageError(f"{_KNOWN}, in one group, and inputs in batches: {path} is not of this kind")
    pooled = output.relu().flatten(2).mean(2)
    factor = gain(point)
    scores = factor * F.linear(pooled, head, tensors.get(_inside(linear[-1], "bias")))
    if scores.shape != z.shape or norm(scores - z) > ROUNDING * torch.finfo(z.dtype).eps * norm(z):
        raise UsageError(f"{_KNOWN}: from {path} on, that does not give the scores of this network")
    return _Layers(_inside(path, "weight"), module, kernel, inputs, output, factor * head, z, term.count)


def _inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _name(calls: list[str], path: str) -> Any:
    """Hook that adds the path of a layer to a list at each call."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        calls.append(path)

    return hook


def _last(call: list[_Call], path: str) -> Any:
    """Hook that keeps copies of the latest call only: layers that work in place overwrite what they are given."""

    def hook(module: Any, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        call[:] = [(path, module, (args[0] if args else named["input"]).clone(), output.clone())]

    return hook


def _pieces(layers: _Layers) -> Iterator[slice]:
    """Ranges of rows, so few at a time that their patches fit into memory."""
    channels, patch = len(layers.kernel), layers.kernel[0].numel()
    per_row = 8 * (patch * (channels + layers.output[0, 0].numel()) + channels * channels)
    step = max(1, MEMORY // per_row)
    return (slice(start, start + step) for start in range(0, len(layers.z), step))


def _contracted(layers: _Layers, mass: Tensor, rows: slice) -> Tensor:
    """`Σ_i m_i Σ_cc' ⟨w_c, w_c'⟩ V_:cᵀ (diag p − p pᵀ) V_:c' ⟨ψ_c, ψ_c'⟩`, float64."""
    kernel, head = layers.kernel.double().flatten(1), layers.head.double()
    p = layers.z[rows].double().softmax(1)
    psi = _active_patches(layers.module, layers.inputs[rows].double(), layers.output[rows] > 0)
    return torch.einsum("n,cd,ncd,ncd->", mass[rows], kernel @ kernel.T, covariance(p, head), psi @ psi.mT)


def _active_patches(module: nn.Conv1d | nn.Conv2d, inputs: Tensor, active: Tensor) -> Tensor:
    """ψ: mean over positions of the patch where a channel is active, else zero; shape `(rows, channels, in · window)`."""
    padding: list[int] = module._reversed_padding_repeated_twice
    padded = F.pad(inputs, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    line = isinstance(module, nn.Conv1d)
    window, dilation, stride = (
        (1, *sizes) if line else sizes for sizes in (module.kernel_size, module.dilation, module.stride)
    )
    patches = F.unfold(padded[:, :, None] if line else padded, window, dilation, 0, stride)
    return active.flatten(2).to(patches) @ patches.mT / math.prod(active.shape[2:])


_KNOWN = (
    "relative flatness of a convolution is known in closed form where torch.nn.Conv1d or Conv2d, ReLU, the mean over all "
    "positions and torch.nn.Linear give the scores"
)


def _evaluate(findings: Findings) -> Estimate:
    value, name = findings.answers[0].result
    return Estimate.exact(value, f"relative flatness is that of {name}")


MEASURE = Measure(
    name="relative_flatness_conv",
    formula=(
        r"\sum_{c,c'} \langle w_c, w_{c'} \rangle\, \mathrm{tr}\, H_{c,c'}, \quad \mathrm{tr}\, H_{c,c'} = "
        r"\mathbb{E}\, V_{:c}^\top (\mathrm{diag}\, p - p p^\top) V_{:c'} \langle \psi_c, \psi_{c'} \rangle"
    ),
    definition="Curvature of the last convolution before mean pooling and a linear layer, in units of its kernels.",
    reference="taleghani2026, arXiv:2603.09016",
    needs=(_KernelTrace(),),
    evaluate=_evaluate,
    geometry="euclidean",
    claims=frozenset({Invariance.LAYERS, Invariance.ORDER}),
    provisional=(
        "the closed form of the trace is proved here, but that kernels are weighed by their inner products, as rows are in "
        "relative_flatness, was not checked against the paper; nor which networks it covers"
    ),
    pitfalls=(
        "Only where ReLU, the mean over all positions and one linear layer follow the convolution, which is checked by its "
        "values. Scaling its filters against the linear layer leaves it alone; scaling the channels that it reads does not. "
        "Biases do not enter."
    ),
)
