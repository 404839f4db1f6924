"""The network before training, for bounds whose prior is centred there."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from isoflat.io.fit import fit
from isoflat.io.inputs import Inputs
from isoflat.io.model import build
from isoflat.io.weights import read_weights


def before(inputs: Inputs, file: Path | None) -> tuple[nn.Module | None, tuple[str, ...]]:
    """The network with the weights of a file, if there is one, and what a reader must know of it."""
    if file is None:
        return None, ()
    model = build(inputs.model, inputs.seed)
    return model, fit(model, read_weights(file, inputs.weights_key), inputs.strip_prefix)
