"""The point at which a network is measured: its tensors by name, and short hashes that tell whether two things are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.space import ParameterSpace


@final
@dataclass(frozen=True)
class State:
    """Weights and buffers of a network, apart from the network.

    Attributes:
        parameters: tensors that the loss is differentiated by, in order.
        frozen: further parameters, held constant.
        buffers: running statistics and other non-parameters.
        constants: numbers held by modules that a rescaling moves with the weights, by dotted path: a
            normalisation's epsilon. Only those that are known; the others are the module's own.
    """

    parameters: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    constants: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def space(self) -> ParameterSpace:
        """The flat space of the trainable tensors."""
        return ParameterSpace(tuple(self.parameters), tuple(tuple(tensor.shape) for tensor in self.parameters.values()))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the trainable tensors."""
        return next(iter(self.parameters.values())).dtype

    @property
    def device(self) -> torch.device:
        """Device of the trainable tensors."""
        return next(iter(self.parameters.values())).device

    @property
    def vector(self) -> Tensor:
        """The trainable tensors as one vector of shape `(n,)`."""
        return self.space.flatten(self.parameters)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything the network reads, by name."""
        return {**self.parameters, **self.frozen, **self.buffers}

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> State:
        """The same point with floating-point tensors in another precision or place."""

        def move(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
                for name, tensor in tensors.items()
            }

        return State(move(self.parameters), move(self.frozen), move(self.buffers), self.constants)

    def replace(self, tensors: Mapping[str, Tensor]) -> State:
        """A state in which the named tensors have other values.

        Raises:
            UsageError: a name is not in this state.
        """
        unknown = set(tensors) - set(self.tensors)
        if unknown:
            raise UsageError(f"no tensor named {', '.join(sorted(unknown))}; known: {', '.join(self.tensors)}")

        def swap(old: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensors.get(name, tensor) for name, tensor in old.items()}

        return replace(self, parameters=swap(self.parameters), frozen=swap(self.frozen), buffers=swap(self.buffers))

    def fingerprint(self) -> str:
        """Hash over names, types, shapes and bytes of every tensor."""
        parts: list[str | bytes] = []
        for name, tensor in sorted(self.tensors.items()):
            parts.append(repr((name, str(tensor.dtype), tuple(tensor.shape))))
            plain = tensor.dequantize() if tensor.is_quantized else tensor.detach()
            parts.append(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return fingerprint(*parts)


def everywhere(module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under every name by which a module holds them, for `torch.func.functional_call(..., tie_weights=False)`.

    Tied tensors have several names. A module that is used twice has two paths, but is named once here: torch would
    swap its tensors twice, and leave the wrong ones behind.

    Args:
        module: torch module.
        tensors: tensors by canonical name, the first one under which `named_parameters` or `named_buffers` gives a tensor.
    """
    canonical = {id(held): name for name, held in (*module.named_parameters(), *module.named_buffers())}
    found = {}
    for path, part in module.named_modules():
        for own, held in (*part._parameters.items(), *part._buffers.items()):
            name = canonical.get(id(held))
            if name in tensors:
                found[f"{path}.{own}" if path else own] = tensors[name]
    return found


def fingerprint(*parts: str | bytes) -> str:
    """First 16 hex digits of SHA-256 over the parts in order, each with its length.

    >>> fingerprint("ab", "c") == fingerprint("a", "bc")
    False
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]
