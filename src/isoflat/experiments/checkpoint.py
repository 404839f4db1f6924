"""Checkpoints of a training: written whole or not at all, and resumed by the same training only."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from isoflat.core.errors import DataError, UsageError
from isoflat.core.state import fingerprint
from isoflat.io import files


@final
@dataclass(frozen=True)
class Checkpoint:
    """Place where a training is saved on its way, so that it survives being killed.

    Attributes:
        path: path of the file; its folder must exist. The file is left there when the training ends.
        every: number of epochs between two savings.
    """

    path: Path
    every: int

    def __post_init__(self) -> None:
        """Refuse what would never be saved."""
        if self.every < 1:
            raise UsageError(f"a checkpoint is saved every 1 or more epochs, got {self.every}")


@final
@dataclass
class TrainingProgress:
    """Progress of a training.

    Attributes:
        first: loss before the first step.
        loss: loss when it was last evaluated.
        steps: number of steps taken.
        seen: number of rows seen.
        seconds: wall-clock time spent.
        history: epochs with the loss after each.
    """

    first: float
    loss: float
    steps: int = 0
    seen: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)


@final
@dataclass(frozen=True)
class Keeper:
    """Saves everything that a training depends on from here on, and puts it back.

    Attributes:
        checkpoint: file to save to, and how often.
        identity: everything that tells this training from others; a file of another training is refused.
        model: the network that is trained.
        optimizer: the optimizer, with its momenta and steps.
        schedule: the schedule of learning rates, with the epochs it has counted.
        shuffling: generator that draws the order of the rows.
    """

    checkpoint: Checkpoint
    identity: Mapping[str, str]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    shuffling: torch.Generator

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def save(self, way: TrainingProgress) -> None:
        """Save in one step: a process that is killed meanwhile leaves the previous checkpoint whole."""
        device = self._device
        content = {
            "of": dict(self.identity),
            "way": dict(vars(way)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "order": self.shuffling.get_state(),
            "dropout": torch.get_rng_state(),
            "card": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        packed = io.BytesIO()
        torch.save(content, packed)
        path = self.checkpoint.path
        with files.as_usage_errors(path, "saving a checkpoint"):
            files.write(path, packed.getvalue(), alone=True)

    def resume(self) -> TrainingProgress | None:
        """Restore what was saved, and return the progress; None where nothing is saved."""
        path = self.checkpoint.path
        if not path.parent.is_dir():
            raise UsageError(f"checkpoint {path}: the folder {path.parent} does not exist; create it first")
        if not path.exists():
            return None
        content = _unpacked(path)
        known = content.get("of") if isinstance(content, dict) else None
        if not isinstance(known, dict):
            raise DataError(f"{path} is no checkpoint of a training; it is left as it is, give another file")
        if other := [name for name, value in self.identity.items() if known.get(name) != value]:
            raise DataError(
                f"{path} is the checkpoint of another training ({', '.join(other)} differ); it is left as it is, "
                "give another file, or remove it to train anew"
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        self.shuffling.set_state(content["order"])
        torch.set_rng_state(content["dropout"])
        if content["card"] is not None:
            torch.cuda.set_rng_state(content["card"], self._device)
        return TrainingProgress(**content["way"])


def _unpacked(path: Path) -> Any:
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            broken = archive.testzip()  # torch's own reader does not compare the checksums
        if broken is None:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything from within the reader
        raise DataError(_damaged(path, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")) from error
    raise DataError(_damaged(path, f"the checksum of {broken} is wrong"))


def _damaged(path: Path, how: str) -> str:
    return f"{path} is no whole checkpoint of a training ({how}); it is left as it is, remove it to train anew"


def content_of(tensors: Mapping[str, Tensor]) -> str:
    """Hash of tensors with their names, types and shapes."""
    return fingerprint(
        *(
            part
            for name, tensor in tensors.items()
            for part in (repr((name, tensor.dtype, tuple(tensor.shape))), _bytes(tensor))
        )
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
