"""Families of changes of basis: the blocks that a network allows, with the slices of stored tensors that they mix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from isoflat.symmetry.finding.bases.partition import CellBlock
from isoflat.symmetry.finding.bases.tensor_axes import Region, TensorAxis
from isoflat.symmetry.groups.basis import Family, Piece, Side
from isoflat.symmetry.motions import Field, along


def scales(fields: Mapping[str, Field], family: Family, shapes: Mapping[str, torch.Size]) -> Iterator[list[int]]:
    """Unknown scales for each block, those of its coordinates."""
    side = next(side for side in family.sides if not side.dual)
    for block in range(family.count):
        yield [
            unit
            for piece in side.pieces
            for unit in along(fields[piece.name], piece.axis, shapes[piece.name])[piece.places[block]].tolist()
        ]


def families(
    blocks: tuple[CellBlock, ...],
    tensor_axes: Mapping[tuple[Region, int], TensorAxis],
    gains: list[tuple[int, int, str]],
) -> tuple[Family, ...]:
    """Blocks with the slices that they mix, those on the same tensors together."""
    owners: dict[int, list[tuple[tuple[Region, int], TensorAxis, int]]] = defaultdict(list)
    for key, tensor_axis in tensor_axes.items():
        for place, unit in enumerate(tensor_axis.units.tolist()):
            owners[unit].append((key, tensor_axis, place))
    alike: dict[tuple[object, ...], list[list[Side]]] = defaultdict(list)
    for block in blocks:
        sides = _sides(block, owners, gains)
        if sides:
            shape = tuple(
                (s.dual, s.gain, tuple((p.name, p.axis, p.window, tuple(p.slots.tolist())) for p in s.pieces))
                for s in sides
            )
            alike[(block.cells.shape[1], block.orthogonal, block.centred, shape)].append(sides)
    return tuple(
        Family(len(members), d, orthogonal, centred, _together(members))  # pyrefly: ignore
        for (d, orthogonal, centred, _), members in alike.items()
    )


def _sides(
    block: CellBlock,
    owners: Mapping[int, list[tuple[tuple[Region, int], TensorAxis, int]]],
    gains: list[tuple[int, int, str]],
) -> list[Side]:
    """The sides of one block; none where some coordinate of a side has no slice of its own."""
    sides = []
    slots = list(range(block.cells.shape[1]))
    for cell, dual in zip(block.cells, block.dual, strict=True):
        # A unit that is read by several slices (repeated heads) has as many copies, told apart by their order.
        copies: dict[tuple[object, int], dict[tuple[Region, int], list[tuple[int, int]]]] = {}
        flips: dict[object, bool] = {}
        for slot, unit in enumerate(cell.tolist()):
            seen: dict[object, int] = defaultdict(int)
            for key, tensor_axis, place in owners[unit]:
                copy = copies.setdefault((tensor_axis.role, seen[tensor_axis.role]), defaultdict(list))
                copy[key].append((slot, place))
                seen[tensor_axis.role] += 1
                flips[tensor_axis.role] = tensor_axis.dual != dual
        gain = next(((name, first) for first, last, name in gains if first <= cell[0] <= last), None)
        places = torch.from_numpy(cell - gain[1]) if gain else torch.zeros(len(slots), dtype=torch.int64)
        for (role, _), tensors in copies.items():
            if sorted(slot for entries in tensors.values() for slot, _ in entries) != slots:
                return []
            pieces = tuple(_piece(region, axis, entries) for (region, axis), entries in tensors.items())
            sides.append(Side(flips[role], gain[0] if gain else None, places[None], pieces))
    return sides


def _piece(region: Region, axis: int, entries: list[tuple[int, int]]) -> Piece:
    """Slices of a region, by their places along the whole tensor's axis."""
    places = torch.tensor([[place for _, place in entries]])
    slots = torch.tensor([slot for slot, _ in entries])
    if region.axis == axis:
        return Piece(region.name, axis, places + region.start, slots)
    window = None if region.axis is None else (region.axis, region.start, region.size)
    return Piece(region.name, axis, places, slots, window)


def _together(members: list[list[Side]]) -> tuple[Side, ...]:
    """The sides of several blocks that have the same shape."""
    sides = []
    for alike in zip(*members, strict=True):
        pieces = tuple(
            replace(parts[0], places=torch.cat([part.places for part in parts]))
            for parts in zip(*(side.pieces for side in alike), strict=True)
        )
        sides.append(replace(alike[0], places=torch.cat([side.places for side in alike]), pieces=pieces))
    return tuple(sides)
