"""Networks and losses that are named on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isoflat.core.errors import IsoflatError, UsageError
from isoflat.io.fit import fit
from isoflat.io.libraries import library, own_weights
from isoflat.io.named import function, named, reason
from isoflat.io.weights import read_weights
from isoflat.risk.arguments import NAMED

LOSSES = (*NAMED, "model")
"""Names of losses that need no code of the user's own; with `model` the model's output carries its loss."""


def load_model(
    spec: str,
    weights: Path | str | None = None,
    *,
    key: str | None = None,
    strip_prefix: Sequence[str] = (),
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> nn.Module:
    """The network that a factory builds, with the weights of a file, in evaluation mode.

    Weights are read without ever running what the file says, and fitted strictly: all of them in the right places, or none.

    Args:
        spec: name of the factory, `module:factory`; it is called without arguments. Or `hf:FOLDER`, a network that
            Hugging Face's `save_pretrained` wrote, or `timm:NAME`, such as `timm:resnet18,num_classes=10`.
        weights: path of a file: `.safetensors`, a `.safetensors.index.json`, or `.pt`, `.pth`, `.ckpt`, `.bin` written by
            `torch.save`; None for the weights that the factory builds.
        key: entry of the file that holds the weights, with dots for entries within entries; None to look in the
            usual places.
        strip_prefix: prefixes removed from the names in the file; the usual wrappers' are found by themselves.
        seed: seed of torch's random numbers while the network is built, so that fresh weights are the same at each run.
        note: function that is called with a line for each choice that was made while the weights were read.

    Raises:
        UsageError: the factory cannot be found, fails, or returns something else.
        CheckpointError: the file cannot be opened safely, or does not fit.

    >>> load_model("torch.nn:Identity")
    Identity()
    """
    model = build(spec, seed)
    for text in fill(model, spec, weights, key, strip_prefix, seed):
        note(text)
    return model


def fill(
    model: nn.Module, spec: str, weights: Path | str | None, key: str | None, strip_prefix: Sequence[str], seed: int
) -> tuple[str, ...]:
    """Load a weights file into a network, if there is one.

    Args:
        model: the network, changed in place; left as it is where anything does not fit.
        spec: name that the network was built by.
        weights: path of the file; None for the weights that the factory built.
        key: entry of the file that holds the weights; None to look in the usual places.
        strip_prefix: prefixes removed from the names in the file.
        seed: seed with which the network was built.

    Returns:
        Lines that say what was chosen while the weights were read.

    Raises:
        CheckpointError: the file cannot be opened safely, or does not fit.
        UsageError: an option for weights files was given without one.
    """
    if weights is not None:
        return fit(model, read_weights(Path(weights), key), strip_prefix)
    if key is not None or strip_prefix:
        raise UsageError("--weights-key and --strip-prefix choose within a weights file: name it with --weights")
    if own := own_weights(spec):
        return (f"weights from {own} (no --weights was given)",)
    return (f"weights as built by the factory (no --weights was given), torch's seed {seed}",)


def build(spec: str, seed: int) -> nn.Module:
    """The network that the factory `module:factory` builds, in evaluation mode.

    Args:
        spec: name of the factory, `module:factory`, which is called without arguments; `hf:FOLDER` or `timm:NAME`.
        seed: seed of torch's random numbers while the network is built, so that fresh weights are the same at each run.

    Raises:
        UsageError: the factory cannot be found, fails, or returns something else.
    """
    factory = library(spec) or named(spec, "--model")
    if isinstance(factory, nn.Module):
        raise UsageError(f"--model {spec} is a network already: name a function that builds one, without arguments")
    if not callable(factory):
        raise UsageError(f"--model {spec}: expected a function that builds a network, got {type(factory).__name__}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = factory()
        except IsoflatError:
            raise
        except Exception as error:
            raise UsageError(
                f"--model {spec}: the factory, called without arguments, failed: {reason(error)}"
            ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model {spec} returned {type(model).__name__}: expected a torch.nn.Module")
    return model.eval()


def find_loss(spec: str) -> Any:
    """A loss by name, or the user's own as `module:name`.

    Raises:
        UsageError: there is no such loss.
    """
    if spec in NAMED:
        return NAMED[spec]()
    if spec == "model":
        return None
    if ":" not in spec:
        raise UsageError(f"--loss {spec}: expected one of {', '.join(LOSSES)}, or module:name for your own")
    return function(spec, "--loss")
