"""Attributes that modules fill from their weights in evaluation mode, and take for constants from then on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from isoflat.core.errors import IsoflatError, UnsupportedModel
from isoflat.modules.private import STANDARD, held_tensors

SAME = 1e-2
"""Relative difference up to which what was kept is what the weights give: it may have been kept in half precision."""

_Group = dict[tuple[str, str], dict[Any, Tensor]]
"""Attributes of one name in modules of one class: tensors in each, by path of the module and name."""


@final
@dataclass(frozen=True)
class Cache:
    """An attribute that is filled by the forward pass where it finds none.

    Attributes:
        path: path of the module that holds it.
        name: name of the attribute.
        how: how it looks when it is empty: "empty" for a container, "none", or "absent"; "mode" for one that only a change
            to evaluation mode fills.
    """

    path: str
    name: str
    how: str

    def __str__(self) -> str:
        """Dotted name."""
        return f"{self.path}.{self.name}" if self.path else self.name


_Pass = Callable[[tuple[Cache, ...], Callable[[], Any]], Any]
"""A pass before which some caches are emptied, and the result of a function at its end."""


def emptied(module: nn.Module, caches: Iterable[Cache]) -> None:
    """Empty caches; what was in them comes back at the end of the pass (`modules.private`)."""
    for cache in caches:
        part = module.get_submodule(cache.path)
        held = part.__dict__
        if cache.how == "mode":
            part.train(not part.training)
            part.train(not part.training)
        elif cache.how == "empty":
            held[cache.name] = copy.copy(held[cache.name])
            held[cache.name].clear()
        elif cache.how == "none":
            held[cache.name] = None
        else:
            del held[cache.name]


def filled(module: nn.Module, known: Callable[[Tensor], bool]) -> Iterator[tuple[str, str]]:
    """Attributes that hold floating-point tensors otherwise than as parameters and buffers: path of the module, and name.

    Buffers are among them where a change of mode runs code of the module's own.

    Args:
        module: the network.
        known: test of whether a tensor is a parameter or buffer.
    """
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in STANDARD and any(
                tensor.is_floating_point() and not known(tensor) for _, tensor in held_tensors(value)
            ):
                yield path, name
        if _changes(part):
            yield from (
                (path, name) for name, held in part._buffers.items() if held is not None and held.is_floating_point()
            )


def _changes(part: nn.Module) -> bool:
    return type(part).train is not nn.Module.train


def stale(
    module: nn.Module,
    known: Callable[[Tensor], bool],
    here: _Pass,
    away: _Pass,
    apart: _Pass,
) -> tuple[Cache, ...]:
    """Caches that hold what the weights gave, by trying: each is emptied before a pass at other weights.

    What the pass then fills in otherwise was made from the weights, and is no constant.

    Args:
        module: the network.
        known: test of whether a tensor is a parameter or buffer.
        here: runs a pass at the weights, trainable ones of which require gradients.
        away: the same at other weights.
        apart: the same where trainable weights are other ones, and all else is as it is.

    Raises:
        UnsupportedModel: a cache holds what other weights gave, or what is kept cannot be made anew.
    """
    groups: dict[tuple[type, str], list[str]] = {}
    for path, name in filled(module, known):
        groups.setdefault((type(module.get_submodule(path)), name), []).append(path)
    found: list[Cache] = []
    for (_, name), paths in groups.items():
        members = [(path, name) for path in paths]
        before = {member: _tensors(module, *member) for member in members}
        if not _kept(before, away((), lambda members=members: {m: _tensors(module, *m) for m in members})):
            continue  # made anew in every pass as it is
        found += _tried(module, before, here, away, apart)
    return tuple(found)


def _tried(module: nn.Module, before: _Group, here: _Pass, away: _Pass, apart: _Pass) -> tuple[Cache, ...]:
    """Members of a group of attributes that are caches of the weights."""

    def read() -> _Group:
        return {member: _tensors(module, *member) for member in before}

    members = list(before)
    part, name = module.get_submodule(members[0][0]), members[0][1]
    ways = (
        () if name in part._buffers else (*(("empty",) if hasattr(vars(part)[name], "clear") else ()), "none", "absent")
    )
    for how in (*ways, "mode") if _changes(part) else ways:
        caches = tuple(Cache(path, name, how) for path, name in members)
        try:
            there = away(caches, read)
        except IsoflatError:
            raise
        except Exception:  # noqa: BLE001 — whatever a forward pass raises that needs the attribute: it is no cache then
            continue
        made = tuple(
            cache for cache in caches if _differ(before[cache.path, cache.name], there[cache.path, cache.name])
        )
        if made:
            now = here(made, read)
            _check_present(made, before, now)
            _check_arrives(made, now, apart(made, read))
        if made or how != "mode":
            return made
    _check_constant(before)
    return ()


def _check_present(caches: tuple[Cache, ...], before: _Group, now: _Group) -> None:
    """Check that caches hold what the weights give.

    Raises:
        UnsupportedModel: one holds something else.
    """
    for cache in caches:
        if _differ(before[cache.path, cache.name], now[cache.path, cache.name], SAME):
            raise UnsupportedModel(
                f"'{cache}' holds what other weights gave, and the forward pass takes it for a constant: empty it "
                "(usually model.train(), then model.eval()), and measure again"
            )


def _check_arrives(caches: tuple[Cache, ...], now: _Group, apart: _Group) -> None:
    """Check that the gradient finds its way through caches that trainable weights enter.

    Raises:
        UnsupportedModel: it does not.
    """
    for cache in caches:
        member = cache.path, cache.name
        if not any(tensor.requires_grad for tensor in now[member].values()) and _differ(now[member], apart[member]):
            raise UnsupportedModel(
                f"'{cache}' is computed from the weights without a gradient (no_grad, detach, .data), so that the loss's "
                "gradient is not that of the loss: compute it with gradients enabled"
            )


def _check_constant(before: _Group) -> None:
    """Check that what cannot be made anew was not computed from the weights.

    Raises:
        UnsupportedModel: it was.
    """
    for member, tensors in before.items():
        if any(tensor.grad_fn is not None for tensor in tensors.values()):
            raise UnsupportedModel(
                f"'{Cache(*member, 'none')}' was computed from the weights before the forward pass, which takes it for a "
                "constant: the loss would seem not to depend on them through it. Compute it in the forward pass, or, if it "
                "is meant to be a constant, detach() it"
            )


def _tensors(module: nn.Module, path: str, name: str) -> dict[Any, Tensor]:
    part = module.get_submodule(path)
    held = vars(part).get(name, part._buffers.get(name))
    return {key: tensor for key, tensor in held_tensors(held) if tensor.is_floating_point()}


def _kept(before: _Group, after: _Group) -> bool:
    """Test of whether a pass has left anything as it found it."""
    return any(
        key in after[member] and not _apart(tensor, after[member][key], 0.0)
        for member, tensors in before.items()
        for key, tensor in tensors.items()
    )


def _differ(before: dict[Any, Tensor], after: dict[Any, Tensor], allowed: float = 0.0) -> bool:
    """Test of whether a pass has filled in something else of the same shape."""
    return any(key in after and _apart(tensor, after[key], allowed) for key, tensor in before.items())


def _apart(one: Tensor, other: Tensor, allowed: float) -> bool:
    if one.shape != other.shape:
        return False
    kind = min(one.dtype, other.dtype, key=lambda kind: kind.itemsize)
    a, b = (tensor.detach().to(kind).double() for tensor in (one, other.to(one.device)))
    size = float(a.abs().max()) if a.numel() else 0.0
    rounding = 8 * torch.finfo(kind).eps
    return bool(((a - b).abs() > max(allowed, rounding) * size).any())
