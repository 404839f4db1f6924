"""Labels that a model's own mean loss is a mean over: guesses, to be confirmed by experiment (`risk.division`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.rng import stream

IGNORED = -100
"""Label that counts for nothing, by the convention of torch.nn.CrossEntropyLoss."""

BEYOND = 1 << 20
"""Position that lies outside of any text."""

_LABELS = re.compile(r"label|target|(start|end)_position", re.IGNORECASE)
"""Names of a batch's entries that hold what outputs are compared with."""


@final
@dataclass(frozen=True)
class LabelCount:
    """Number of labels of a batch that count.

    Attributes:
        name: entry of the batch that holds the labels.
        ignored: label that counts for nothing.
        shifted: flag that the labels of each row count from the second on, since each is predicted from those before it.
        mask: entry that is zero where labels count for nothing; None for none.
        below: entry whose length labels must stay below, such as positions in it; None for no such limit.

    >>> LabelCount("labels", shifted=True)({"labels": torch.tensor([[1, 2, -100], [-100, 3, 4]])})
    3.0
    """

    name: str
    ignored: int = IGNORED
    shifted: bool = False
    mask: str | None = None
    below: str | None = None

    def __call__(self, batch: Any) -> float:
        """Number of them."""
        labels = torch.as_tensor(batch[self.name])
        counted = labels != self.ignored
        if self.mask is not None:
            counted = counted & (torch.as_tensor(batch[self.mask]) != 0).to(counted.device)
        if self.below is not None:
            counted = counted & (labels < torch.as_tensor(batch[self.below]).shape[1])
        if self.shifted:
            counted = counted[..., 1:]
        return float(counted.sum())

    def __str__(self) -> str:
        """Rule in words."""
        more = ["shifted by one"] * self.shifted
        more += [f"other than {self.ignored}"] if self.ignored != IGNORED else []
        more += [f"where {self.mask} is not zero"] if self.mask is not None else []
        more += [f"inside {self.below}"] if self.below is not None else []
        return f"the entries of '{self.name}' that count" + (f" ({', '.join(more)})" if more else "")


def guesses(batch: Any, model: Any) -> Iterator[LabelCount]:
    """Rules that a model's loss might follow on batches like this one, the usual ones first.

    Args:
        batch: the arguments of the model, by name.
        model: the model, whose `config` may name further labels that count for nothing.
    """
    if not isinstance(batch, Mapping):
        return
    found = {str(name): torch.as_tensor(value) for name, value in batch.items() if isinstance(value, Tensor)}
    config = getattr(model, "config", None)
    further = [getattr(config, name, None) for name in ("pad_token_id", "semantic_loss_ignore_index")]
    ignored = list(dict.fromkeys([IGNORED, *(value for value in (*further, 255) if isinstance(value, int))]))
    for name, labels in found.items():
        if labels.is_floating_point() or not labels.ndim or not _LABELS.search(name):
            continue
        if labels.ndim == 1:
            texts = [other for other, value in found.items() if value.ndim == 2 and len(value) == len(labels)]
            yield LabelCount(name)
            if "position" in name:
                yield from (LabelCount(name, below=other) for other in texts)
            continue
        for value in ignored:
            masks = [
                other
                for other, mask in found.items()
                if "mask" in other and mask.shape == labels.shape and not mask.is_floating_point()
            ]
            for mask in (None, *masks):
                yield LabelCount(name, value, shifted=True, mask=mask)
                yield LabelCount(name, value, mask=mask)


def thinned(batch: Mapping[str, Any], blank: set[str], full: set[str], rows: int) -> dict[str, Any]:
    """A batch in which labels and masks leave nothing out, but for unlike numbers of entries in each row.

    Rows then have unlike weights, and rules that agree on the batch itself differ.

    Args:
        batch: rows of data.
        blank: entries, labels or masks, of which some are blanked.
        full: those of which none is.
        rows: number of its rows.
    """
    made = dict(batch)
    for name in blank | full:
        held = torch.as_tensor(batch[name])
        nothing, something = (0, 1) if "mask" in name else (BEYOND if "position" in name else IGNORED, 0)
        whole = torch.full_like(held, something) if "mask" in name else held.clamp(min=something)
        # Starts and ends are blanked together, and the first entry of a mask never is.
        drawn = torch.rand(held.shape, generator=stream(0, "thinned", nothing)).to(held.device)
        share = 0.2 + 0.6 * torch.arange(rows, device=held.device).view(-1, *[1] * (held.ndim - 1)) / rows
        hit = (drawn < share) & torch.full_like(held, name in blank, dtype=torch.bool)
        if "mask" in name:
            hit[..., 0] = False
        made[name] = torch.where(hit, torch.full_like(held, nothing), whole)
    return made
